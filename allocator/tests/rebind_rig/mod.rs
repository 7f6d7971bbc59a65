//! A heap of granules, and a thread that moves them: what the rebind tests
//! share.
//!
//! The window is a memfd, or the device that `REBIND_WINDOW` names (such as
//! `/dev/dax0.0`; then with `--test-threads=1`).
#![allow(dead_code, reason = "each test binary uses a part")]

use allocator::space::rebind::{
    GRANULE, LivePages, Memory, Monitor, Moved, Mover, RebindError, StartError, Step,
};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap, mmap_anonymous, mremap_fixed};
use std::ffi::c_void;
use std::fs::File;
use std::ops::Range;
use std::process::Command;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

pub(crate) const PAGE: usize = 4096;

/// `granules` granules of heap, all on extents at first, and a window of
/// twice as many.
pub(crate) struct Heap {
    pub(crate) va: usize,
    pub(crate) granules: usize,
    pub(crate) alias: usize,
}

impl Heap {
    pub(crate) fn new(granules: usize) -> Self {
        let len = 2 * granules * GRANULE;
        let window = window(len);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let place = reserve(len);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the target was reserved for this.
        let alias = unsafe { mmap(place as *mut c_void, len, access, flags, &window, 0) };
        let heap = Self {
            va: reserve(granules * GRANULE),
            granules,
            alias: alias.unwrap() as usize,
        };
        let (len, flags) = (granules * GRANULE, MremapFlags::MAYMOVE);
        let va = heap.va as *mut c_void;
        // SAFETY: the target was reserved for this.
        unsafe { mremap_fixed(heap.alias as *mut c_void, 0, len, flags, va) }.unwrap();
        heap
    }

    pub(crate) fn granule(&self, i: usize) -> usize {
        self.va + i * GRANULE
    }

    /// The extent's granule `i`, of twice as many as the heap has.
    pub(crate) fn extent(&self, i: usize) -> Memory {
        Memory::Extent(self.alias + i * GRANULE)
    }

    pub(crate) fn range(&self) -> Range<usize> {
        self.va..self.granule(self.granules)
    }

    /// The word at `offset` of granule `i`.
    pub(crate) fn word(&self, i: usize, offset: usize) -> *mut u64 {
        (self.granule(i) + offset) as *mut u64
    }
}

fn window(len: usize) -> OwnedFd {
    if let Some(device) = std::env::var_os("REBIND_WINDOW") {
        let device = File::options().read(true).write(true).open(device);
        return device.unwrap().into();
    }
    let memfd = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memfd, len as u64).unwrap();
    memfd
}

fn reserve(len: usize) -> usize {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping.
    let at = unsafe { mmap_anonymous(null_mut(), len + GRANULE, ProtFlags::empty(), flags) };
    (at.unwrap() as usize).next_multiple_of(GRANULE)
}

/// Runs `work` on a thread as the mover needs it: all signals blocked, and a
/// descriptor table of its own with just the standard streams and `device`, a
/// descriptor of `/dev/userfaultfd`, in it.
pub(crate) fn on_mover<T: Send>(
    device: Option<&OwnedFd>,
    work: impl FnOnce(Result<Mover, StartError>) -> T + Send,
) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let keep = device.map(AsRawFd::as_raw_fd);
            // SAFETY: system calls on this thread's own state; what it closes
            // stays open for the others.
            unsafe {
                let mut all = std::mem::zeroed();
                libc::sigfillset(&mut all);
                libc::pthread_sigmask(libc::SIG_BLOCK, &all, null_mut());
                assert_eq!(libc::unshare(libc::CLONE_FILES), 0);
                for fd in (3..1024).filter(|&fd| Some(fd) != keep) {
                    libc::close(fd);
                }
            }
            // A monitor lives as long as the process.
            let monitor: &'static Monitor = Box::leak(Box::default());
            work(Mover::start(monitor, device.map(AsFd::as_fd)))
        });
        thread.join().unwrap()
    })
}

/// Moves the granules of `run`, of which `live` is live, as `memory` says.
pub(crate) fn move_run(
    mover: &mut Mover,
    heap: &Heap,
    run: Range<usize>,
    live: &LivePages,
    memory: impl Fn(usize) -> (Memory, Memory),
) -> Result<Moved, RebindError> {
    let steps: Vec<Step<'_>> = run
        .clone()
        .map(|i| {
            let (from, to) = memory(i);
            Step { from, to, live }
        })
        .collect();
    // SAFETY: the test's own granules, mapped as it says.
    unsafe { mover.rebind(heap.granule(run.start), &steps) }
}

/// Increments a word of each page of the heap's first granule on another
/// thread while `work` runs. Says how many increments there were, and panics
/// when some are lost.
pub(crate) fn under_a_writer(heap: &Heap, work: impl FnOnce()) -> u64 {
    let stop = AtomicBool::new(false);
    // SAFETY: words of the heap that only atomics access meanwhile.
    let word = |page: usize| unsafe { AtomicU64::from_ptr(heap.word(0, page * PAGE)) };
    let sum = || (0..512).map(|page| word(page).load(Relaxed)).sum::<u64>();
    let before = sum();
    let done = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut done = 0;
            while !stop.load(Relaxed) {
                word(done as usize * 7 % 512).fetch_add(1, Relaxed);
                done += 1;
            }
            done
        });
        // Also when it panics, or the writer would run for ever.
        let stopped = Stop(&stop);
        work();
        drop(stopped);
        writer.join().unwrap()
    });
    assert_eq!(sum() - before, done, "increments were lost");
    done
}

/// Tells threads to stop when dropped.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Moves the first granule from extent to DRAM, back, and to another extent.
pub(crate) fn go_round(mover: &mut Mover, heap: &Heap) {
    let (here, there) = (heap.extent(0), heap.extent(heap.granules));
    for (from, to) in [(here, Memory::Dram), (Memory::Dram, there), (there, here)] {
        move_run(mover, heap, 0..1, &LivePages::ALL, |_| (from, to)).unwrap();
    }
}

/// Runs the body of a test in a process of its own: what it does to the
/// process (limits, locks, user, descriptors) stays there.
pub(crate) fn in_own_process(test: &str, body: impl FnOnce()) {
    const NAME: &str = "REBIND_TEST_CHILD";
    if std::env::var(NAME).as_deref() == Ok(test) {
        return body();
    }
    let exe = std::env::current_exe().unwrap();
    let arguments = ["--exact", test, "--nocapture", "--test-threads=1"];
    let out = Command::new(exe).args(arguments).env(NAME, test).output();
    let out = out.unwrap();
    print!("{}", String::from_utf8_lossy(&out.stdout));
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// How many mappings the kernel keeps for the range.
pub(crate) fn mappings_in(range: Range<usize>) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let starts = maps.lines().filter_map(|line| {
        let (start, rest) = line.split_once('-')?;
        let end = rest.split_once(' ')?.0;
        let hex = |s| usize::from_str_radix(s, 16).unwrap();
        Some(hex(start)..hex(end))
    });
    starts
        .filter(|vma| vma.start < range.end && range.start < vma.end)
        .count()
}

/// How many pages of the range are in memory (mincore(2)).
pub(crate) fn pages_present(range: Range<usize>) -> usize {
    let mut pages = vec![0u8; range.len() / PAGE];
    // SAFETY: a byte per page is written.
    let done =
        unsafe { libc::mincore(range.start as *mut c_void, range.len(), pages.as_mut_ptr()) };
    assert_eq!(done, 0);
    pages.iter().filter(|&&page| page & 1 == 1).count()
}
