//! A heap of granules on a memfd, and a thread that moves them: what the
//! rebind tests share.
#![allow(dead_code, reason = "each test binary uses a part")]

use allocator::space::rebind::{GRANULE, LivePages, Memory, Monitor, Mover, RUN, StartError, Step};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap, mmap_anonymous, mremap_fixed};
use std::ffi::c_void;
use std::ops::Range;
use std::process::Command;
use std::ptr::null_mut;
use std::sync::mpsc;

pub const PAGE: usize = 4096;

/// `granules` granules of heap, all on extents at first, and a window of
/// twice as many.
pub struct Heap {
    pub va: usize,
    pub granules: usize,
    pub window: OwnedFd,
    pub alias: usize,
}

impl Heap {
    pub fn new(granules: usize) -> Self {
        let window = rustix::fs::memfd_create("window", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let len = 2 * granules * GRANULE;
        rustix::fs::ftruncate(&window, len as u64).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let place = reserve(len);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the target was reserved for this.
        let alias = unsafe { mmap(place as *mut c_void, len, access, flags, &window, 0) };
        let heap = Self {
            va: reserve(granules * GRANULE),
            granules,
            window,
            alias: alias.unwrap() as usize,
        };
        let (len, flags) = (granules * GRANULE, MremapFlags::MAYMOVE);
        let va = heap.va as *mut c_void;
        // SAFETY: the target was reserved for this.
        unsafe { mremap_fixed(heap.alias as *mut c_void, 0, len, flags, va) }.unwrap();
        heap
    }

    pub fn granule(&self, i: usize) -> usize {
        self.va + i * GRANULE
    }

    /// The extent's granule `i`, of twice as many as the heap has.
    pub fn extent(&self, i: usize) -> Memory {
        Memory::Extent(self.alias + i * GRANULE)
    }

    pub fn range(&self) -> Range<usize> {
        self.va..self.granule(self.granules)
    }

    /// The word at `offset` of granule `i`.
    pub fn word(&self, i: usize, offset: usize) -> *mut u64 {
        (self.granule(i) + offset) as *mut u64
    }
}

fn reserve(len: usize) -> usize {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping.
    let at = unsafe { mmap_anonymous(null_mut(), len + GRANULE, ProtFlags::empty(), flags) };
    (at.unwrap() as usize).next_multiple_of(GRANULE)
}

/// Runs `work` on a thread as the mover needs it: its own descriptor table,
/// with nothing in it but standard streams and `keep`, and all signals
/// blocked.
pub fn on_mover<T: Send>(
    keep: &[&OwnedFd],
    work: impl FnOnce(Result<Mover, StartError>) -> T + Send,
) -> T {
    let keep: Vec<i32> = keep.iter().map(|fd| fd.as_raw_fd()).collect();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // SAFETY: plain system calls on this thread's own state.
            unsafe {
                let mut all = std::mem::zeroed();
                libc::sigfillset(&mut all);
                libc::pthread_sigmask(libc::SIG_BLOCK, &all, null_mut());
                assert_eq!(libc::unshare(libc::CLONE_FILES), 0);
                (3..1024)
                    .filter(|fd| !keep.contains(fd))
                    .for_each(|fd| _ = libc::close(fd));
            }
            // A monitor lives as long as the process.
            let monitor: &'static Monitor = Box::leak(Box::new(Monitor::new()));
            let device = keep.first().map(|&fd| {
                // SAFETY: the caller keeps it open.
                unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) }
            });
            work(Mover::start(monitor, device))
        });
        thread.join().unwrap()
    })
}

/// Moves `n` neighbours from granule `i` on, all of them live, as `from` and
/// `to` say.
pub fn move_run(
    mover: &mut Mover,
    heap: &Heap,
    run: Range<usize>,
    live: &LivePages,
    memory: impl Fn(usize) -> (Memory, Memory),
) -> allocator::space::rebind::Moved {
    let steps: Vec<Step<'_>> = run
        .clone()
        .map(|i| {
            let (from, to) = memory(i);
            Step { from, to, live }
        })
        .collect();
    assert!(steps.len() <= RUN);
    // SAFETY: the test's own granules, mapped as it says.
    unsafe { mover.rebind(heap.granule(run.start), &steps) }.unwrap()
}

/// Runs the body of a test in a process of its own: what it does to the
/// process (limits, locks, user, descriptors) stays there.
pub fn in_own_process(test: &str, body: impl FnOnce()) {
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
pub fn mappings_in(range: Range<usize>) -> usize {
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
pub fn pages_present(range: Range<usize>) -> usize {
    let mut pages = vec![0u8; range.len() / PAGE];
    // SAFETY: a byte per page is written.
    let done =
        unsafe { libc::mincore(range.start as *mut c_void, range.len(), pages.as_mut_ptr()) };
    assert_eq!(done, 0);
    pages.iter().filter(|&&page| page & 1 == 1).count()
}

/// A channel to a thread that waits in the test until told.
pub fn signal() -> (mpsc::Sender<()>, mpsc::Receiver<()>) {
    mpsc::channel()
}
