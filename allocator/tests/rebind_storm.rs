//! Granules change their backing all the time while threads and the kernel
//! write to them. Nothing may be lost, and no system call may fail.
//!
//! `REBIND_STORM_SECONDS` makes the storm longer than its 3 s; `cargo xtask
//! soak` has it blow for 60.

mod rebind_rig;

use allocator::space::rebind::{GRANULE, LivePages, Memory, Mover, RUN, Step};
use rebind_rig::{Heap, PAGE, on_mover};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Barrier, mpsc};
use std::time::{Duration, Instant};

const GRANULES: usize = 16;
/// Every fourth granule has few live pages, so that it moves page by page.
const SPARSE_EVERY: usize = 4;
const SPARSE_STEP: usize = 5;
/// Pages from here on to the end of a granule are the kernel's to write to,
/// those before are counters.
const KERNEL_PAGES: usize = 384;
/// The kernel's pages of a granule that a datagram goes to.
const DATAGRAM_PAGES: usize = 448;

/// xorshift64*: any spread will do.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}

fn is_sparse(granule: usize) -> bool {
    granule % SPARSE_EVERY == SPARSE_EVERY - 1
}

fn live(granule: usize) -> LivePages {
    if !is_sparse(granule) {
        return LivePages::ALL;
    }
    let mut live = LivePages([0; 8]);
    for page in (0..512).step_by(SPARSE_STEP) {
        live.0[page / 64] |= 1 << (page % 64);
    }
    live
}

/// The counter of `writer` in some cache line that is live.
fn counter<'a>(heap: &Heap, random: &mut Random, writer: usize) -> &'a AtomicU64 {
    let granule = random.below(GRANULES);
    let page = match is_sparse(granule) {
        true => random.below(KERNEL_PAGES / SPARSE_STEP) * SPARSE_STEP,
        false => random.below(KERNEL_PAGES),
    };
    let offset = page * PAGE + random.below(PAGE / 64) * 64 + writer * 8;
    // SAFETY: a word of the heap that only atomics access.
    unsafe { AtomicU64::from_ptr(heap.word(granule, offset)) }
}

/// A page of the kernel's in a granule that is not sparse.
fn kernel_page(heap: &Heap, random: &mut Random, first: usize, last: usize) -> *mut u8 {
    let granule = random.below(GRANULES / SPARSE_EVERY) * SPARSE_EVERY;
    let page = first + random.below(last - first);
    (heap.granule(granule) + page * PAGE) as *mut u8
}

/// Increments counters all over the heap; says how many.
fn count(heap: &Heap, writer: usize, stop: &AtomicBool) -> u64 {
    let mut random = Random(writer as u64 + 1);
    let mut done = 0;
    while !stop.load(Relaxed) {
        counter(heap, &mut random, writer).fetch_add(1, Relaxed);
        done += 1;
    }
    done
}

/// Has the kernel write to the heap: read(2) across two pages and
/// getrandom(2). Says how often, and how often it was short or refused.
fn kernel_writes(heap: &Heap, stop: &AtomicBool) -> (u64, u64) {
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let mut random = Random(99);
    let (mut done, mut failed) = (0, 0);
    while !stop.load(Relaxed) {
        let at = kernel_page(heap, &mut random, KERNEL_PAGES, DATAGRAM_PAGES - 1);
        // SAFETY: 4096 bytes from the middle of a page of the kernel's on, of
        // which there is another.
        let (read, filled) = unsafe {
            let read = libc::read(zero.as_raw_fd(), at.add(PAGE / 2).cast(), PAGE);
            (read, libc::getrandom(at.cast(), 64, 0))
        };
        failed += u64::from(read != PAGE as isize) + u64::from(filled != 64);
        done += 2;
    }
    (done, failed)
}

/// Two datagram sockets whose sender waits until each datagram has arrived in
/// the heap. Says how many arrived, and how many did not.
fn datagrams(heap: &Heap, stop: &AtomicBool) -> (u64, u64) {
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect(udp.local_addr().unwrap()).unwrap();
    let (unix, unix_sender) = UnixDatagram::pair().unwrap();
    // A lost datagram must not hang the test.
    let patience = Some(Duration::from_secs(2));
    udp.set_read_timeout(patience).unwrap();
    unix.set_read_timeout(patience).unwrap();
    let mut random = Random(7);
    let (mut arrived, mut lost) = (0u64, 0);
    while !stop.load(Relaxed) {
        let number = (arrived + 1).to_ne_bytes();
        let receiver = match random.below(2) {
            0 => sender.send(&number).map(|_| udp.as_raw_fd()),
            _ => unix_sender.send(&number).map(|_| unix.as_raw_fd()),
        };
        let at = kernel_page(heap, &mut random, DATAGRAM_PAGES, 512).cast::<u64>();
        // SAFETY: a page that only this thread writes to.
        let (got, seen) = unsafe {
            let got = libc::recv(receiver.unwrap(), at.cast(), 8, 0);
            (got, at.read_volatile().to_ne_bytes())
        };
        match got == 8 && seen == number {
            true => arrived += 1,
            false => lost += 1,
        }
    }
    (arrived, lost)
}

/// Where each granule is, and the granules of the window that hold none.
struct Placement {
    at: [Memory; GRANULES],
    free: Vec<Memory>,
}

impl Placement {
    fn new(heap: &Heap) -> Self {
        Self {
            at: std::array::from_fn(|i| heap.extent(i)),
            free: (GRANULES..2 * GRANULES).map(|i| heap.extent(i)).collect(),
        }
    }

    /// Somewhere else for a granule: DRAM or a free extent, as likely.
    fn elsewhere(&mut self, granule: usize, random: &mut Random) -> Memory {
        match (self.at[granule], random.below(2)) {
            (Memory::Extent(_), 0) => Memory::Dram,
            _ => self.free.swap_remove(random.below(self.free.len())),
        }
    }

    fn moved(&mut self, granule: usize, to: Memory) {
        let from = std::mem::replace(&mut self.at[granule], to);
        if from != Memory::Dram {
            self.free.push(from);
        }
    }
}

/// What a mover did until told to stop.
#[derive(Default, Debug)]
struct Report {
    runs: u64,
    granules: u64,
    bytes: u64,
    longest_hold: u64,
}

fn move_until(heap: &Heap, mover: &mut Mover, end: Instant) -> Report {
    let mut random = Random(4711);
    let mut placement = Placement::new(heap);
    let mut report = Report::default();
    while Instant::now() < end {
        let first = random.below(GRANULES);
        let n = 1 + random.below(RUN.min(GRANULES - first));
        let lives: Vec<LivePages> = (first..first + n).map(live).collect();
        let steps: Vec<Step<'_>> = (first..first + n)
            .zip(&lives)
            .map(|(granule, live)| Step {
                from: placement.at[granule],
                to: placement.elsewhere(granule, &mut random),
                live,
            })
            .collect();
        // SAFETY: the heap is this test's, and the placement says what is
        // where.
        let moved = unsafe { mover.rebind(heap.granule(first), &steps) }.unwrap();
        (first..)
            .zip(&steps)
            .for_each(|(g, step)| placement.moved(g, step.to));
        report.runs += 1;
        report.granules += n as u64;
        report.bytes += moved.bytes_copied;
        report.longest_hold = report.longest_hold.max(moved.longest_hold);
    }
    report
}

/// What the threads of a storm lost.
#[derive(Debug, PartialEq, Eq)]
struct Losses {
    increments: u64,
    system_calls: u64,
    datagrams: u64,
}

fn storm(duration: Duration, guarded: bool) -> Losses {
    let heap = Heap::new(GRANULES);
    // SAFETY: the alias of a heap that nobody uses yet.
    unsafe { std::ptr::write_bytes(heap.alias as *mut u8, 0, 2 * GRANULES * GRANULE) };
    let stop = AtomicBool::new(false);
    let ready = Barrier::new(5);
    let (done, counts) = mpsc::channel();
    let mut losses = Losses {
        increments: 0,
        system_calls: 0,
        datagrams: 0,
    };
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let (done, heap, stop, ready) = (done.clone(), &heap, &stop, &ready);
            scope.spawn(move || {
                ready.wait();
                done.send(count(heap, writer, stop)).unwrap();
            });
        }
        let kernel = scope.spawn(|| (ready.wait(), kernel_writes(&heap, &stop)).1);
        let network = scope.spawn(|| (ready.wait(), datagrams(&heap, &stop)).1);
        let report = on_mover(None, |mover| {
            let mut mover = mover.unwrap();
            assert!(mover.takes_kernel_faults(), "this test runs as root");
            if !guarded {
                mover.leave_unguarded();
            }
            ready.wait();
            let report = move_until(&heap, &mut mover, Instant::now() + duration);
            let stalls = mover.stalls();
            println!(
                "{} threads waited: p50 {} us, p99 {} us, longest {} us",
                stalls.count(),
                stalls.percentile(0.5) / 1000,
                stalls.percentile(0.99) / 1000,
                stalls.max() / 1000
            );
            report
        });
        stop.store(true, Relaxed);
        let wanted: u64 = counts.iter().take(2).sum();
        let (calls, failed) = kernel.join().unwrap();
        let (arrived, lost) = network.join().unwrap();
        let counted: u64 = (0..GRANULES).map(|granule| sum(&heap, granule)).sum();
        println!(
            "{} granules moved in {} runs, {} MiB copied, longest hold {} us; {wanted} increments, {calls} \
             system calls of which {failed} failed or were short, {arrived} datagrams and {lost} lost",
            report.granules,
            report.runs,
            report.bytes >> 20,
            report.longest_hold / 1000
        );
        // Also in a guest without hardware support.
        assert!(report.granules > 10 && calls > 100 && arrived > 100 && wanted > 100);
        losses.increments = wanted.abs_diff(counted);
        (losses.system_calls, losses.datagrams) = (failed, lost);
    });
    losses
}

/// All counters of a granule.
fn sum(heap: &Heap, granule: usize) -> u64 {
    let step = if is_sparse(granule) { SPARSE_STEP } else { 1 };
    let pages = (0..KERNEL_PAGES).step_by(step);
    let lines = pages.flat_map(|page| (0..PAGE).step_by(64).map(move |line| page * PAGE + line));
    lines
        .flat_map(|line| [line, line + 8])
        // SAFETY: a word of the heap; the writers have stopped.
        .map(|word| unsafe { heap.word(granule, word).read() })
        .sum()
}

const NOTHING: Losses = Losses {
    increments: 0,
    system_calls: 0,
    datagrams: 0,
};

fn duration() -> Duration {
    let seconds = std::env::var("REBIND_STORM_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|s| s.parse().ok()).unwrap_or(3))
}

#[test]
fn nothing_is_lost_while_granules_move() {
    assert_eq!(storm(duration(), true), NOTHING);
}

#[test]
fn the_storm_notices_when_nobody_waits() {
    let losses = storm(duration() / 3, false);
    assert!(losses.increments > 0, "{losses:?}");
}
