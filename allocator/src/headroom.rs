//! How much memory the process's control group still allows (cgroups(7),
//! version 2). Extents are not charged to it, DRAM is: moving live data to
//! DRAM can run into a limit that the program never came near, and the kernel
//! answers that with a kill.
#![forbid(unsafe_code)]

use core::ffi::CStr;
use rustix::fs::{Mode, OFlags, open};

/// Where the hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";
const PATH_MAX: usize = 512;
/// Longer than what is read of `/proc/self/cgroup` and `memory.stat`.
const TEXT_MAX: usize = 8192;

/// Bytes that may still be charged before the nearest limit; `u64::MAX` where
/// there is none, or none that can be read. Allocates nothing.
pub(crate) fn headroom() -> u64 {
    let mut text = [0u8; TEXT_MAX];
    own_group(read(c"/proc/self/cgroup", &mut text)).map_or(u64::MAX, |group| below(ROOT, group))
}

/// The process's group of version 2 in the text of `/proc/self/cgroup`.
fn own_group(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// The least room of a group and of those above it.
fn below(root: &str, group: &str) -> u64 {
    let mut group = group.trim_end_matches('/');
    let mut least = u64::MAX;
    while !group.is_empty() {
        let limit = value(root, group, "memory.max");
        let used = value(root, group, "memory.current");
        if let (Some(limit), Some(used)) = (limit, used) {
            // The kernel drops what files have cached before it kills.
            let cached = cached(root, group);
            least = least.min(limit.saturating_sub(used.saturating_sub(cached)));
        }
        group = &group[..group.rfind('/').unwrap_or(0)];
    }
    least
}

/// The number in a file of a group; `None` for `max`.
fn value(root: &str, group: &str, file: &str) -> Option<u64> {
    let mut text = [0u8; 32];
    read_of(root, group, file, &mut text)?
        .trim_end()
        .parse()
        .ok()
}

/// Bytes of a group that files have cached and nobody uses.
fn cached(root: &str, group: &str) -> u64 {
    let mut text = [0u8; TEXT_MAX];
    let stat = read_of(root, group, "memory.stat", &mut text).unwrap_or_default();
    let inactive = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "));
    inactive.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

fn read_of<'a>(root: &str, group: &str, file: &str, text: &'a mut [u8]) -> Option<&'a str> {
    let mut path = [0u8; PATH_MAX];
    let mut len = 0;
    for part in [root, group, "/", file] {
        path.get_mut(len..len + part.len())?
            .copy_from_slice(part.as_bytes());
        len += part.len();
    }
    Some(read(
        CStr::from_bytes_with_nul(path.get(..=len)?).ok()?,
        text,
    ))
}

/// The beginning of a file, as far as it fits; empty if it can't be read.
fn read<'a>(path: &CStr, buffer: &'a mut [u8]) -> &'a str {
    let read = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::read(file, &mut *buffer));
    let text = &buffer[..read.unwrap_or(0)];
    core::str::from_utf8(text).unwrap_or_default()
}

/// How often the process's control group ran into its memory limits
/// (`memory.events`: `high`, `max` and `oom`).
pub(crate) struct Strain(u64);

impl Strain {
    /// What was counted until now.
    pub(crate) fn now() -> Self {
        Self(strain_of_own_group())
    }

    /// Whether more was counted since this was last asked.
    pub(crate) fn grew(&mut self) -> bool {
        let before = std::mem::replace(&mut self.0, strain_of_own_group());
        self.0 > before
    }
}

fn strain_of_own_group() -> u64 {
    let mut text = [0u8; TEXT_MAX];
    let group = own_group(read(c"/proc/self/cgroup", &mut text));
    group.map_or(0, |group| strain(ROOT, group))
}

/// What a group has counted; 0 where nothing is (version 1, the root).
fn strain(root: &str, group: &str) -> u64 {
    let mut text = [0u8; TEXT_MAX];
    let events = read_of(
        root,
        group.trim_end_matches('/'),
        "memory.events",
        &mut text,
    );
    let counts = events.unwrap_or_default().lines().filter_map(|line| {
        let (name, count) = line.split_once(' ')?;
        matches!(name, "high" | "max" | "oom").then(|| count.parse::<u64>().ok())?
    });
    counts.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(root: &std::path::Path, path: &str, max: &str, current: &str) {
        let folder = root.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("memory.max"), max).unwrap();
        std::fs::write(folder.join("memory.current"), current).unwrap();
    }

    #[test]
    fn the_tightest_group_on_the_way_up_decides() {
        let root = std::env::temp_dir().join(format!("dcm-headroom-{}", std::process::id()));
        group(&root, "/a", "1000\n", "400\n");
        group(&root, "/a/b", "max\n", "300\n");
        group(&root, "/a/b/c", "5000\n", "100\n");
        let text = root.to_str().unwrap();
        assert_eq!(below(text, "/a/b/c"), 600);
        assert_eq!(below(text, "/a/b"), 600);
        group(&root, "/a/b/c", "50\n", "100\n");
        assert_eq!(below(text, "/a/b/c"), 0);
        let cache = "anon 1\ninactive_file 70\nactive_file 9\n";
        std::fs::write(root.join("a/b/c/memory.stat"), cache).unwrap();
        assert_eq!(below(text, "/a/b/c"), 20, "50 - (100 - 70)");
        assert_eq!(below(text, "/elsewhere"), u64::MAX);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn limits_that_were_met_are_counted() {
        let root = std::env::temp_dir().join(format!("dcm-strain-{}", std::process::id()));
        group(&root, "/a", "1000\n", "400\n");
        let text = root.to_str().unwrap();
        assert_eq!(strain(text, "/a"), 0, "without memory.events");
        let events = "low 5\nhigh 10\nmax 200\noom 1\noom_kill 1\noom_group_kill 0\n";
        std::fs::write(root.join("a/memory.events"), events).unwrap();
        assert_eq!(strain(text, "/a"), 211);
        assert_eq!(strain(text, "/"), 0);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn the_group_of_version_2_is_found_among_others() {
        assert_eq!(
            own_group("4:memory:/x\n0::/user.slice/run\n"),
            Some("/user.slice/run")
        );
        assert_eq!(own_group("4:memory:/x\n"), None);
    }
}
