//! A spilled granule whose file was changed raises SIGBUS, after one line on
//! stderr: a program must never see zeroes, or bytes of somebody else.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use allocator::config::SpillDir;
use allocator::space::{Backing, GRANULE};
use allocator::{Config, Heap, Placement};
use common::{MemfdSource, moves};

static HEAP: Heap = Heap::new();
const ROLE: &str = "DCM_TEST_TOUCHES";

/// The file, in the descriptor table of the heap's own threads.
fn spoil() {
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let descriptors = fs::read_dir(task.path().join("fd")).unwrap();
        for descriptor in descriptors.flatten() {
            let name = fs::read_link(descriptor.path()).unwrap_or_default();
            let name = name.to_string_lossy().into_owned();
            if name.starts_with(std::env::temp_dir().to_str().unwrap())
                && name.contains("(deleted)")
            {
                let file = fs::OpenOptions::new().write(true).open(descriptor.path());
                let file = file.unwrap();
                for granule in 0..256 {
                    file.write_all_at(&[0; 64], granule * GRANULE as u64)
                        .unwrap();
                }
                return;
            }
        }
    }
    panic!("no file is there");
}

/// Spills, spoils the file, and touches.
fn touch() {
    let source = MemfdSource::leak(32);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        dram_limit: 0,
        spill_dir: SpillDir::new(std::env::temp_dir().to_str().unwrap()),
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let block = HEAP.allocate(GRANULE, 16, false);
    // SAFETY: a new block of this size.
    unsafe { block.write_bytes(5, GRANULE) };
    source.close(true);
    let outcome = source.recall(1, 32 * GRANULE as u64);
    assert_eq!(outcome.spilled, GRANULE as u64, "{outcome:?}");
    let backing = || HEAP.space().backing_of(block as usize);
    assert_eq!(backing(), Some(Backing::Spilled));
    spoil();
    // The kernel is told first.
    let (_from, to) = rustix::pipe::pipe().unwrap();
    // SAFETY: a live block; reading it through the kernel harms nobody.
    let bytes = unsafe { std::slice::from_raw_parts(block, 4096) };
    assert_eq!(rustix::io::write(&to, bytes), Err(rustix::io::Errno::FAULT));
    // Who waited is woken a moment before the books are written.
    let end = Instant::now() + Duration::from_secs(10);
    while (backing(), HEAP.stats().spill_lost) != (Some(Backing::Lost), 1) {
        assert!(Instant::now() < end, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("told");
    // SAFETY: as above; it raises SIGBUS.
    let byte = unsafe { block.read_volatile() };
    println!("read {byte}");
}

#[test]
fn nobody_sees_what_was_not_written() {
    if std::env::var_os(ROLE).is_some() {
        return touch();
    }
    let this = std::env::current_exe().unwrap();
    let output = Command::new(this)
        .args(["--nocapture", "--test-threads=1"])
        .env(ROLE, "1")
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    if stdout.contains("SKIPPED") {
        return println!("{stdout}");
    }
    assert!(stdout.contains("told"), "{stdout}{stderr}");
    assert!(!stdout.contains("read "), "{stdout}");
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGBUS),
        "{stdout}{stderr}"
    );
    let lines = stderr
        .lines()
        .filter(|line| line.contains("spilled memory is lost"));
    assert_eq!(lines.count(), 1, "{stderr}");
}
