//! What others do on this machine while something is measured: a limit that holds on idle processors can't be
//! asked of a program that gets half of one.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fs;

use anyhow::{Context, Result};

/// From this share of the processors on, the machine was not ours.
const TOO_MUCH: f64 = 0.15;

/// Processor time at one moment, in clock ticks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Others {
    /// Of everything, idling included.
    all: u64,
    /// Of everything but idling; what the host took from this machine is in it.
    busy: u64,
    /// Of this task and all that it has started.
    ours: u64,
}

impl Others {
    /// Begins to watch.
    pub(crate) fn watch() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let (all, busy) = machine(&stat).context("/proc/stat has no line cpu")?;
        let ours = tree(std::process::id())?;
        Ok(Self { all, busy, ours })
    }

    /// The share of the processors that others had since.
    pub(crate) fn share(&self) -> Result<f64> {
        let now = Self::watch()?;
        let all = now.all.saturating_sub(self.all).max(1);
        let busy = now.busy.saturating_sub(self.busy);
        let ours = now.ours.saturating_sub(self.ours);
        Ok(busy.saturating_sub(ours) as f64 / all as f64)
    }
}

/// Whether limits for idle processors can be asked where others had `share` of them.
pub(crate) fn is_quiet(share: f64) -> bool {
    share < TOO_MUCH
}

/// All ticks, and those not idle, of the first line of proc_stat(5): user, nice, system, idle, iowait, irq,
/// softirq, steal, and guests, which are in the first two.
fn machine(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line
        .split_ascii_whitespace()
        .take(8)
        .map_while(|word| word.parse().ok())
        .collect();
    let all: u64 = ticks.iter().sum();
    Some((all, all - ticks.get(3)? - ticks.get(4)?))
}

/// A process's parent and its ticks, those of children that it has waited for included: proc_pid_stat(5).
fn process(stat: &str) -> Option<(u32, u64)> {
    // Its name may have spaces and parentheses.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut words = rest.split_ascii_whitespace();
    let parent = words.nth(1)?.parse().ok()?;
    let ticks: Vec<u64> = words
        .skip(9)
        .take(4)
        .map_while(|word| word.parse().ok())
        .collect();
    (ticks.len() == 4).then(|| (parent, ticks.iter().sum()))
}

/// The ticks of `root` and all its descendants.
fn tree(root: u32) -> Result<u64> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // It may have ended.
        if let Ok(stat) = fs::read_to_string(entry.path().join("stat"))
            && let Some((parent, ticks)) = process(&stat)
        {
            processes.push((pid, parent, ticks));
        }
    }
    let mut ours = HashSet::from([root]);
    loop {
        let before = ours.len();
        ours.extend(
            processes
                .iter()
                .filter(|(_, parent, _)| ours.contains(parent))
                .map(|(pid, ..)| *pid)
                .collect::<Vec<u32>>(),
        );
        if ours.len() == before {
            break;
        }
    }
    let ticks = processes.iter().filter(|(pid, ..)| ours.contains(pid));
    Ok(ticks.map(|(.., ticks)| ticks).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    #[test]
    fn the_kernel_s_words_are_read() {
        let stat = "cpu  10 20 30 400 5 6 7 8 9 9\ncpu0 1 2 3 4 5 6 7 8 9 9\n";
        assert_eq!(machine(stat), Some((486, 81)));
        let stat = "12 (a) b (c) S 7 12 12 0 -1 4194304 1 2 3 4 100 20 3 4 20 0 1 0 5";
        assert_eq!(process(stat), Some((7, 127)));
        assert_eq!(process("12 (short) S 7"), None);
    }

    #[test]
    fn what_we_start_is_ours() {
        let before = tree(std::process::id()).unwrap();
        let mut busy = Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let start = std::time::Instant::now();
        // Ten ticks of a processor, which a busy machine takes longer to give.
        while tree(std::process::id()).unwrap() < before + 10 {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(10));
        }
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(
            tree(std::process::id()).unwrap() >= before + 10,
            "waited for"
        );
        // Nobody's child is ours.
        assert!(tree(1).unwrap() >= tree(std::process::id()).unwrap());
    }
}
