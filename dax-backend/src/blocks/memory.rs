//! Memory blocks: the pieces in which the kernel puts memory online and takes it offline
//! (Documentation/admin-guide/mm/memory-hotplug.rst).

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use thiserror::Error;

use crate::address::HpaWindow;
use crate::pci::{PciError, Sysfs};

/// How often it is looked whether a block is offline.
const LOOK: Duration = Duration::from_millis(10);

/// Why blocks of memory are not what they should be.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BlockError {
    /// This kernel adds no memory while it runs.
    #[error(
        "{}: this kernel can't add memory while it runs (CONFIG_MEMORY_HOTPLUG)",
        .path.display()
    )]
    NoHotplug {
        /// What is missing.
        path: PathBuf,
    },
    /// Memory that is added would be used at once, accepted or not.
    #[error(
        "the kernel puts added memory online by itself ({policy}), also what the device has not given: \
         `echo offline > {}` as root, or the kernel parameter memhp_default_state=offline",
        .path.display()
    )]
    AutoOnline {
        /// What the kernel does.
        policy: String,
        /// Where it says so.
        path: PathBuf,
    },
    /// The kernel does not put a block online.
    #[error("memory block {block} is not put online: {source}; dmesg may say why")]
    NotOnline {
        /// Its number.
        block: u64,
        /// What the system says.
        source: io::Error,
    },
    /// A block cannot be emptied.
    #[error("memory block {block} stays online: it has pages that can't move; dmesg may say which")]
    Stuck {
        /// Its number.
        block: u64,
    },
    /// A block was not empty in time.
    #[error("memory block {block} stays online: it was not emptied in time")]
    Late {
        /// Its number.
        block: u64,
    },
    /// A file of the system.
    #[error(transparent)]
    System(#[from] PciError),
}

/// The machine's memory blocks. A block's number is its first address in units of the size.
#[derive(Debug)]
pub struct MemoryBlocks {
    directory: PathBuf,
    size: u64,
}

impl MemoryBlocks {
    /// The blocks of a machine.
    ///
    /// # Errors
    /// [`BlockError::NoHotplug`]
    pub fn of(sysfs: &Sysfs) -> Result<Self, BlockError> {
        let directory = sysfs.path("devices/system/memory");
        let path = directory.join("block_size_bytes");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let size = u64::from_str_radix(text.trim(), 16).unwrap_or_default();
        if !size.is_power_of_two() {
            return Err(BlockError::NoHotplug { path });
        }
        Ok(Self { directory, size })
    }

    /// Bytes of a block, a power of two; 128 MiB on a small x86 machine, 2 GiB on a large one.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether memory that is added stays offline until somebody says otherwise.
    ///
    /// # Errors
    /// [`BlockError::AutoOnline`]
    pub fn check_policy(&self) -> Result<(), BlockError> {
        let path = self.directory.join("auto_online_blocks");
        let policy = fs::read_to_string(&path).unwrap_or_default();
        match policy.trim() {
            "offline" => Ok(()),
            policy => Err(BlockError::AutoOnline {
                policy: policy.to_owned(),
                path,
            }),
        }
    }

    /// The numbers of the blocks that lie in `range` whole.
    pub fn within(&self, range: HpaWindow) -> std::ops::Range<u64> {
        range.base.0.div_ceil(self.size)..range.end().0 / self.size
    }

    /// Whether `block` is in use; `false` also for one that the kernel does not know.
    pub fn is_online(&self, block: u64) -> bool {
        let state = fs::read_to_string(self.state(block));
        state.is_ok_and(|state| state.trim() == "online")
    }

    /// Puts `block` online, for pages that can move.
    ///
    /// # Errors
    /// [`BlockError::NotOnline`]
    pub fn put_online(&self, block: u64) -> Result<(), BlockError> {
        fs::write(self.state(block), "online_movable")
            .map_err(|source| BlockError::NotOnline { block, source })
    }

    /// Takes `block` offline; the kernel moves what is on it elsewhere.
    ///
    /// # Errors
    /// [`BlockError::Stuck`], [`BlockError::Late`]: it is online as before.
    pub fn take_offline(&self, block: u64, deadline: Instant) -> Result<(), BlockError> {
        // The kernel goes on trying until it gets a signal, so this is for a process that can be sent one.
        let mut writer = Command::new("/bin/sh")
            .args(["-c", "echo offline > \"$0\""])
            .arg(self.state(block))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| PciError::io("/bin/sh", "run", error))?;
        let ended = loop {
            match writer.try_wait() {
                Ok(Some(status)) => break status.success(),
                Ok(None) if Instant::now() < deadline => thread::sleep(LOOK),
                _ => {
                    let _ = writer.kill();
                    let _ = writer.wait();
                    // It may have been done in the last instant.
                    return match self.is_online(block) {
                        true => Err(BlockError::Late { block }),
                        false => Ok(()),
                    };
                }
            }
        };
        match ended {
            true => Ok(()),
            false => Err(BlockError::Stuck { block }),
        }
    }

    fn state(&self, block: u64) -> PathBuf {
        self.directory.join(format!("memory{block}/state"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Hpa;

    const SIZE: u64 = 128 << 20;

    fn machine(policy: &str) -> (tempfile::TempDir, MemoryBlocks) {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("devices/system/memory");
        fs::create_dir_all(directory.join("memory9")).unwrap();
        fs::write(directory.join("block_size_bytes"), "8000000\n").unwrap();
        fs::write(directory.join("auto_online_blocks"), policy).unwrap();
        fs::write(directory.join("memory9/state"), "offline\n").unwrap();
        let blocks = MemoryBlocks::of(&Sysfs::new(root.path())).unwrap();
        (root, blocks)
    }

    #[test]
    fn blocks_go_online_for_movable_pages_and_offline_again() {
        let (_root, blocks) = machine("offline\n");
        assert_eq!(blocks.size(), SIZE);
        blocks.check_policy().unwrap();
        assert!(!blocks.is_online(9));
        blocks.put_online(9).unwrap();
        let state = fs::read_to_string(blocks.state(9)).unwrap();
        assert_eq!(state, "online_movable");
        // As the kernel shows it then.
        fs::write(blocks.state(9), "online\n").unwrap();
        assert!(blocks.is_online(9));
        let soon = Instant::now() + Duration::from_secs(60);
        blocks.take_offline(9, soon).unwrap();
        assert!(!blocks.is_online(9));
        let unknown = blocks.put_online(8).unwrap_err();
        assert!(matches!(unknown, BlockError::NotOnline { block: 8, .. }));
        let unknown = blocks.take_offline(8, soon).unwrap_err();
        assert!(matches!(unknown, BlockError::Stuck { block: 8 }));
    }

    #[test]
    fn a_block_that_is_not_emptied_in_time_is_left() {
        let (_root, blocks) = machine("offline\n");
        // A pipe that nobody reads from keeps its writer waiting, as the kernel does.
        let state = blocks.state(9);
        fs::remove_file(&state).unwrap();
        let made = Command::new("mkfifo").arg(&state).status().unwrap();
        assert!(made.success());
        let start = Instant::now();
        let blocked = thread::scope(|scope| {
            // Whoever looks at the state must not wait for ever.
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(300));
                fs::remove_file(&state).unwrap();
                fs::write(&state, "online\n").unwrap();
            });
            blocks.take_offline(9, start + Duration::from_secs(1))
        });
        let error = blocked.unwrap_err();
        assert!(matches!(error, BlockError::Late { block: 9 }), "{error}");
    }

    #[test]
    fn memory_that_would_be_online_at_once_is_refused_with_the_way_out() {
        let (root, blocks) = machine("online_movable\n");
        let error = blocks.check_policy().unwrap_err().to_string();
        assert!(error.contains("(online_movable)"), "{error}");
        assert!(error.contains("memhp_default_state=offline"), "{error}");
        fs::remove_file(blocks.directory.join("block_size_bytes")).unwrap();
        let error = MemoryBlocks::of(&Sysfs::new(root.path())).unwrap_err();
        assert!(error.to_string().contains("CONFIG_MEMORY_HOTPLUG"));
    }

    #[test]
    fn only_whole_blocks_count() {
        let (_root, blocks) = machine("offline\n");
        let window = |base, len| HpaWindow {
            base: Hpa(base),
            len,
        };
        assert_eq!(blocks.within(window(2 * SIZE, 3 * SIZE)), 2..5);
        assert_eq!(blocks.within(window(2 * SIZE - 1, 2 * SIZE)), 2..3);
        assert!(blocks.within(window(1, SIZE)).is_empty());
    }
}
