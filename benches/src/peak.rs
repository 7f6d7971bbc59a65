//! What a running program's memory costs, sampled from outside.
//!
//! DRAM is `RssAnon + RssFile` of /proc/PID/status (proc(5)), or, for a program that maps no shared memory,
//! the kernel's own high-water mark (`VmHWM`), which no sampling can miss. Extents are mapped shared and would show in
//! `RssShmem` page by page; what counts for them is what the program *holds*, whole granules, and that
//! number comes from dcmalloc's own statistics. So no byte is counted twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(2);

/// Samples one program's DRAM on a thread until stopped.
#[derive(Debug)]
pub struct DramSampler {
    stop: Arc<AtomicBool>,
    peak: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl DramSampler {
    /// Watches process `root`, or its descendant that executes `program`, whichever does.
    pub fn start(root: u32, program: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let peak = Arc::new(AtomicU64::new(0));
        let program = fs::canonicalize(program).unwrap_or_else(|_| program.to_path_buf());
        let thread = thread::spawn({
            let (stop, peak) = (Arc::clone(&stop), Arc::clone(&peak));
            move || {
                let mut pid = None;
                while !stop.load(Ordering::Relaxed) {
                    pid = pid.or_else(|| executing(root, &program));
                    if let Some(bytes) = pid.and_then(dram_bytes) {
                        peak.fetch_max(bytes, Ordering::Relaxed);
                    }
                    thread::sleep(INTERVAL);
                }
            }
        });
        Self { stop, peak, thread }
    }

    /// The largest number of bytes seen.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        // The sampler only reads files; should it have panicked, what it saw until then stands.
        let _ = self.thread.join();
        self.peak.load(Ordering::Relaxed)
    }
}

/// The process in the tree under `root` whose executable is `program`.
fn executing(root: u32, program: &Path) -> Option<u32> {
    if fs::read_link(PathBuf::from(format!("/proc/{root}/exe"))).ok()? == program {
        return Some(root);
    }
    children(root)
        .into_iter()
        .find_map(|child| executing(child, program))
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

fn dram_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    if status_bytes(&status, "RssShmem:") == Some(0) {
        return status_bytes(&status, "VmHWM:");
    }
    Some(status_bytes(&status, "RssAnon:")? + status_bytes(&status, "RssFile:")?)
}

fn status_bytes(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_fields_are_kib() {
        let status = "VmRSS:\t  100 kB\nRssAnon:\t      12 kB\nRssFile:\t 3 kB\n";
        assert_eq!(status_bytes(status, "RssAnon:"), Some(12 * 1024));
        assert_eq!(status_bytes(status, "RssShmem:"), None);
    }

    #[test]
    fn finds_this_process_by_its_executable() {
        let me = std::env::current_exe().unwrap();
        let pid = std::process::id();
        assert_eq!(executing(pid, &me), Some(pid));
        assert_eq!(executing(pid, Path::new("/nowhere")), None);
        assert!(dram_bytes(pid).unwrap() > 0);
    }
}
