//! A heap under load while its extents are recalled in random pieces, all the
//! time, and lent again: nothing may be lost, no system call may fail, and the
//! books must add up. One test, because a process has one heap.
//!
//! `DCM_STORM_SECONDS` makes the storm longer than its 8 s; `cargo xtask soak`
//! has it blow for 60.

mod common;

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use allocator::space::GRANULE;
use allocator::{Config, Heap, OnExhausted, Placement, engine};
use common::{MemfdSource, Random, moves};

static HEAP: Heap = Heap::new();
/// Of the window: the 256 MiB, what is allocated and freed beside them, and
/// some that are free, so that granules go to other extents, too.
const GRANULES: usize = 208;
const MIB: usize = 1 << 20;
/// The heap is used in pieces of this size: three pages of counters, one that
/// the kernel writes to.
const PIECE: usize = 16 << 10;
const COUNTERS: usize = 12 << 10;
/// Of the kernel's page: read(2) and getrandom(2) the first half, datagrams
/// the second.
const DATAGRAMS: usize = COUNTERS + 2048;
/// Blocks that are live at a time beside the 256 MiB.
const BLOCKS: usize = 24;
const LARGEST: usize = 6 * MIB;

/// 256 MiB of blocks of several sizes, by piece.
struct Land {
    pieces: Vec<usize>,
}

impl Land {
    fn new() -> Self {
        let blocks = [(4096, PIECE), (16, 4 * MIB), (64, 2 * MIB)];
        let mut pieces = Vec::new();
        for (count, size) in blocks {
            for _ in 0..count {
                let block = HEAP.allocate(size, 64, true) as usize;
                assert!(block != 0 && block.is_multiple_of(64));
                pieces.extend((block..block + size).step_by(PIECE));
            }
        }
        assert_eq!(pieces.len() * PIECE, 256 * MIB);
        Self { pieces }
    }

    fn piece(&self, random: &mut Random) -> usize {
        self.pieces[random.below(self.pieces.len())]
    }

    /// All counters together.
    fn sum(&self) -> u64 {
        let lines = |piece: &usize| (*piece..piece + COUNTERS).step_by(64);
        let words = self.pieces.iter().flat_map(lines).flat_map(|l| [l, l + 8]);
        // SAFETY: words of live blocks that only atomics access.
        words
            .map(|w| unsafe { AtomicU64::from_ptr(w as *mut u64) }.load(Relaxed))
            .sum()
    }
}

/// Increments counters all over the heap; says how many.
fn count(land: &Land, writer: usize, stop: &AtomicBool) -> u64 {
    let mut random = Random(writer as u64 + 1);
    let mut done = 0;
    while !stop.load(Relaxed) {
        let line = land.piece(&mut random) + random.below(COUNTERS / 64) * 64;
        // SAFETY: a word of a live block that only atomics access.
        let word = unsafe { AtomicU64::from_ptr((line + writer * 8) as *mut u64) };
        word.fetch_add(1, Relaxed);
        done += 1;
    }
    done
}

/// What the kernel did for the program.
#[derive(Debug, Default)]
struct Kernel {
    calls: u64,
    datagrams: u64,
    /// Refused, most likely with EFAULT.
    failed: u64,
    /// Did less than was asked for.
    short: u64,
    /// Datagrams that did not arrive, or arrived in other words.
    lost: u64,
}

impl Kernel {
    fn book(&mut self, got: isize, wanted: usize) {
        self.calls += 1;
        self.failed += u64::from(got < 0);
        self.short += u64::from(got >= 0 && got != wanted as isize);
    }
}

/// Has the kernel write to the heap in every way it does, until told to stop.
fn kernel_writes(land: &Land, stop: &AtomicBool) -> Kernel {
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let large = HEAP.allocate(LARGEST, 64, false);
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let udp_sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    udp_sender.connect(udp.local_addr().unwrap()).unwrap();
    let (unix, unix_sender) = UnixDatagram::pair().unwrap();
    // A lost datagram must not hang the test.
    let patience = Some(Duration::from_secs(2));
    udp.set_read_timeout(patience).unwrap();
    unix.set_read_timeout(patience).unwrap();
    let mut random = Random(99);
    let mut done = Kernel::default();
    while !stop.load(Relaxed) {
        let small = (land.piece(&mut random) + COUNTERS) as *mut libc::c_void;
        let at = random.below(LARGEST - 3 * MIB);
        // SAFETY: parts of live blocks that only this thread uses; the large
        // read lies across a border of granules.
        unsafe {
            done.book(libc::read(zero.as_raw_fd(), small, 2048), 2048);
            done.book(libc::getrandom(small, 256, 0), 256);
            if done.calls.is_multiple_of(64) {
                let got = libc::read(zero.as_raw_fd(), large.add(at).cast(), 3 * MIB);
                done.book(got, 3 * MIB);
            }
        }
        let number = done.datagrams + done.lost + 1;
        let arrived = |sent: std::io::Result<usize>, receiver, at: usize| {
            sent.unwrap();
            let at = at as *mut u64;
            // SAFETY: 8 bytes of a live block that only this thread uses.
            unsafe { libc::recv(receiver, at.cast(), 8, 0) == 8 && at.read_volatile() == number }
        };
        let bytes = number.to_ne_bytes();
        let there = (
            land.piece(&mut random) + DATAGRAMS,
            land.piece(&mut random) + DATAGRAMS + 1024,
        );
        for ok in [
            arrived(udp_sender.send(&bytes), udp.as_raw_fd(), there.0),
            arrived(unix_sender.send(&bytes), unix.as_raw_fd(), there.1),
        ] {
            done.datagrams += u64::from(ok);
            done.lost += u64::from(!ok);
        }
    }
    // SAFETY: live, and not used again.
    unsafe { engine::free(large) };
    done
}

/// A block with known content.
struct Block {
    at: *mut u8,
    size: usize,
    seed: u8,
}

impl Block {
    fn new(random: &mut Random) -> Self {
        let size = any_size(random);
        let zero = random.below(3) == 0;
        let at = HEAP.allocate(size, 16, zero);
        assert!(!at.is_null());
        let block = Self {
            at,
            size,
            seed: random.below(256) as u8,
        };
        assert!(
            !zero || block.bytes().iter().all(|byte| *byte == 0),
            "{size} bytes were not zeroes"
        );
        block.fill();
        block
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: a live block of this size.
        unsafe { std::slice::from_raw_parts(self.at, self.size) }
    }

    fn fill(&self) {
        // SAFETY: a live block of this size that is this thread's own.
        unsafe { self.at.write_bytes(self.seed, self.size) };
    }

    fn check(&self, len: usize) {
        let wrong = self.bytes()[..len].iter().position(|b| *b != self.seed);
        assert_eq!(wrong, None, "a block of {} bytes changed", self.size);
    }

    fn resize(&mut self, random: &mut Random) {
        let size = any_size(random);
        // SAFETY: live, and from this heap.
        self.at = unsafe { HEAP.reallocate(self.at, size, 1) };
        assert!(!self.at.is_null());
        let kept = self.size.min(size);
        self.size = size;
        self.check(kept);
        self.fill();
    }

    fn free(self) {
        self.check(self.size);
        // SAFETY: live, and not used again.
        unsafe { engine::free(self.at) };
    }
}

/// 16 B to 6 MiB, each power of two as likely.
fn any_size(random: &mut Random) -> usize {
    let least = 16 << random.below(19);
    (least + random.below(least)).min(LARGEST)
}

/// Allocates, resizes and frees; says how often.
fn churn(stop: &AtomicBool) -> u64 {
    let mut random = Random(31);
    let mut blocks: Vec<Block> = (0..BLOCKS).map(|_| Block::new(&mut random)).collect();
    let mut done = 0;
    while !stop.load(Relaxed) {
        let which = random.below(BLOCKS);
        if random.below(3) == 0 {
            blocks[which].resize(&mut random);
        } else {
            blocks.swap_remove(which).free();
            blocks.push(Block::new(&mut random));
        }
        done += 1;
    }
    blocks.into_iter().for_each(Block::free);
    done
}

/// Granules in use, on extents and in all.
fn used() -> (usize, usize) {
    let usage = HEAP.stats().usage;
    let on_extents = (usage.extent_held - usage.idle) as usize / GRANULE;
    (on_extents, on_extents + usage.dram_held as usize / GRANULE)
}

/// What a recaller did.
#[derive(Debug, Default)]
struct Recalls {
    answered: u64,
    asked: u64,
    evacuated: u64,
    /// Hundredths of the granules in use that one recall moved, at least.
    least_share: u64,
    slowest: Duration,
}

/// Recalls at least a quarter of what is in use and gives it back, until it
/// is time.
fn recall(source: &MemfdSource, end: Instant) -> Recalls {
    let mut random = Random(4711);
    let mut done = Recalls {
        least_share: 100,
        ..Recalls::default()
    };
    while Instant::now() < end {
        let back = Instant::now() + Duration::from_secs(10);
        let part = 50 + random.below(50);
        // Half: some of it may have been freed before its turn comes, most of all on a machine
        // that gives this thread little of a processor.
        let (want, all) = loop {
            let (on_extents, all) = used();
            if on_extents >= all * part / 100 {
                break (all.div_ceil(2), all);
            }
            assert!(
                Instant::now() < back,
                "nothing comes back: {:?}",
                HEAP.stats()
            );
            std::thread::sleep(Duration::from_millis(2));
        };
        let idle = HEAP.space().idle_granules();
        let ranges = source.some_lent(want + idle, &mut random);
        let before = HEAP.stats().evacuated;
        let start = Instant::now();
        let outcome = source.recall_ranges(done.answered + 1, &ranges);
        done.slowest = done.slowest.max(start.elapsed());
        assert_eq!(outcome.refused.bytes(), 0, "{outcome:?}");
        assert_eq!(source.lent_of(&ranges), 0, "{outcome:?}");
        let moved = HEAP.stats().evacuated - before;
        done.answered += 1;
        done.asked += ranges.bytes() / GRANULE as u64;
        done.evacuated += moved;
        done.least_share = done.least_share.min(moved * 100 / all as u64);
        source.restore();
    }
    done
}

fn duration() -> Duration {
    let seconds = std::env::var("DCM_STORM_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|s| s.parse().ok()).unwrap_or(8))
}

#[test]
fn nothing_is_lost_while_extents_come_and_go() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        promote: 8 << 30,
        decay_ms: 20,
        return_after_ms: 50,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let land = Land::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let counters = [0, 1].map(|writer| {
            let (land, stop) = (&land, &stop);
            scope.spawn(move || count(land, writer, stop))
        });
        let kernel = scope.spawn(|| kernel_writes(&land, &stop));
        let churn = scope.spawn(|| churn(&stop));
        let end = Instant::now() + duration();
        let recaller = scope.spawn(move || recall(source, end)).join();
        stop.store(true, Relaxed);
        let recalls = recaller.unwrap();
        let wanted: u64 = counters.map(|c| c.join().unwrap()).iter().sum();
        let kernel = kernel.join().unwrap();
        let blocks = churn.join().unwrap();
        let stats = HEAP.stats();
        println!(
            "{} recalls, each answered with a receipt, of {} granules; {} evacuated in use, at \
             least {} % of those in use each time; slowest {} ms; {} granules promoted",
            recalls.answered,
            recalls.asked,
            recalls.evacuated,
            recalls.least_share,
            recalls.slowest.as_millis(),
            stats.promoted
        );
        println!(
            "{wanted} increments and {blocks} blocks; {} reads and getrandoms, {} failed, {} \
             short; {} datagrams, {} lost",
            kernel.calls, kernel.failed, kernel.short, kernel.datagrams, kernel.lost
        );
        println!(
            "{} threads waited: p50 {} us, p99 {} us, longest {} us",
            stats.stalls.count,
            stats.stalls.p50 / 1000,
            stats.stalls.p99 / 1000,
            stats.stalls.max / 1000
        );
        assert_eq!(land.sum(), wanted, "increments were lost");
        assert_eq!((kernel.failed, kernel.short, kernel.lost), (0, 0, 0));
        assert!(kernel.calls > 100 && kernel.datagrams > 100 && blocks > 100);
        assert!(recalls.least_share >= 25, "{recalls:?}");
        assert!(stats.promoted > 0);
    });
    the_books_add_up(source);
}

fn the_books_add_up(source: &MemfdSource) {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let usage = HEAP.stats().usage;
        let held = usage.extent_held as usize / GRANULE;
        let whole = source.free_granules() + held == GRANULES;
        // The 256 MiB are live, all of them on extents again, and nothing
        // is live that is not held.
        let live = (usage.extent_live + usage.dram_live) as usize;
        let fits = (256 * MIB..300 * MIB).contains(&live)
            && usage.extent_live <= usage.extent_held - usage.idle
            && usage.dram_live <= usage.dram_held;
        if whole && fits && usage.dram_held <= (4 * MIB) as u64 {
            println!(
                "at rest {} MiB in use on {} granules, {} granules free",
                live / MIB,
                held,
                source.free_granules()
            );
            break;
        }
        assert!(
            Instant::now() < end,
            "{} free: {:?}",
            source.free_granules(),
            HEAP.stats()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
