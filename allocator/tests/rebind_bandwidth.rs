//! How fast granules move, against memcpy in the same run. Needs a release
//! build and an idle machine:
//! `cargo test --release --test rebind_bandwidth -- --ignored --nocapture`.

mod rebind_rig;

use allocator::space::rebind::{GRANULE, LivePages, Memory, Mover, RUN};
use rebind_rig::{Heap, move_run, on_mover};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

const GRANULES: usize = 32;
const ROUNDS: usize = 45;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn gb_per_s(seconds: f64) -> f64 {
    (GRANULES * GRANULE) as f64 / seconds / 1e9
}

fn timed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn memcpy(from: usize, to: usize, len: usize) {
    // SAFETY: the callers pass two mappings of at least `len` bytes.
    unsafe { libc::memcpy(to as *mut c_void, from as *const c_void, len) };
}

/// Huge pages for a memfd, as device-DAX has them.
fn collapse(at: usize, len: usize) -> bool {
    const MADV_COLLAPSE: i32 = 25;
    // SAFETY: changes no content.
    unsafe { libc::madvise(at as *mut c_void, len, MADV_COLLAPSE) == 0 }
}

/// memcpy into anonymous huge pages, a granule at a time, touched for the
/// first time.
fn first_touch(from: usize) -> f64 {
    let len = (GRANULES + 1) * GRANULE;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping.
    let raw = unsafe { mmap_anonymous(null_mut(), len, access, MapFlags::PRIVATE) }.unwrap();
    let at = (raw as usize).next_multiple_of(GRANULE);
    let time = timed(|| {
        // SAFETY: the mapping above.
        unsafe { madvise(at as *mut c_void, GRANULES * GRANULE, Advice::LinuxHugepage) }.unwrap();
        for i in 0..GRANULES {
            memcpy(from + i * GRANULE, at + i * GRANULE, GRANULE);
        }
    });
    // SAFETY: as above.
    unsafe { munmap(raw, len) }.unwrap();
    time
}

fn move_all(mover: &mut Mover, heap: &Heap, memory: impl Fn(usize) -> (Memory, Memory)) -> f64 {
    timed(|| {
        for i in (0..GRANULES).step_by(RUN) {
            move_run(mover, heap, i..i + RUN, &LivePages::ALL, &memory).unwrap();
        }
    })
}

/// A heap on populated extents with huge pages.
fn huge_heap() -> Option<Heap> {
    let heap = Heap::new(GRANULES);
    let len = 2 * GRANULES * GRANULE;
    // SAFETY: the test's own mappings.
    unsafe { std::ptr::write_bytes(heap.alias as *mut u8, 1, len) };
    if collapse(heap.alias, len) {
        return Some(heap);
    }
    println!("SKIPPED: MADV_COLLAPSE is not supported, extents have small pages");
    None
}

#[test]
#[ignore = "a measurement: needs an idle machine and a release build"]
fn bandwidth() {
    let Some(heap) = huge_heap() else { return };
    let len = GRANULES * GRANULE;
    let (low, high) = (heap.alias, heap.alias + len);
    let [mut copy, mut fresh, mut to_extent, mut to_dram, mut back] = [const { Vec::new() }; 5];
    on_mover(None, |mover| {
        let mut mover = mover.unwrap();
        for round in 0..=ROUNDS {
            let times = [
                timed(|| memcpy(low, high, len)),
                first_touch(low),
                move_all(&mut mover, &heap, |i| {
                    (heap.extent(i), heap.extent(GRANULES + i))
                }),
                move_all(&mut mover, &heap, |i| {
                    (heap.extent(GRANULES + i), Memory::Dram)
                }),
                move_all(&mut mover, &heap, |i| (Memory::Dram, heap.extent(i))),
            ];
            if round > 0 {
                let all = [
                    &mut copy,
                    &mut fresh,
                    &mut to_extent,
                    &mut to_dram,
                    &mut back,
                ];
                all.into_iter().zip(times).for_each(|(v, t)| v.push(t));
            }
        }
    });
    let [copy, fresh] = [copy, fresh].map(median);
    let [to_extent, to_dram, back] = [to_extent, to_dram, back].map(median);
    println!("memcpy, both populated    {:6.2} GB/s", gb_per_s(copy));
    println!("memcpy, first touch       {:6.2} GB/s", gb_per_s(fresh));
    println!(
        "extent to extent          {:6.2} GB/s, {:.2} of memcpy",
        gb_per_s(to_extent),
        copy / to_extent
    );
    println!(
        "extent to DRAM            {:6.2} GB/s, {:.2} of first touch",
        gb_per_s(to_dram),
        fresh / to_dram
    );
    println!(
        "DRAM to extent            {:6.2} GB/s, {:.2} of memcpy",
        gb_per_s(back),
        copy / back
    );
    assert!(copy / to_extent >= 0.6, "extent to extent is too slow");
    assert!(fresh / to_dram >= 0.8, "extent to DRAM is too slow");
}

#[test]
#[ignore = "a measurement: needs an idle machine and a release build"]
fn stalls_of_a_busy_thread() {
    let Some(heap) = huge_heap() else { return };
    let (low, len) = (heap.alias, GRANULES * GRANULE);
    let one_copy = median(
        (0..ROUNDS)
            .map(|_| timed(|| memcpy(low, low + len, len)))
            .collect(),
    );
    let one_copy = one_copy / GRANULES as f64;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut at = 0;
            while !stop.load(Relaxed) {
                at = (at + 0x3_1415_9000) % len;
                // SAFETY: a byte of the heap, which nobody else writes to.
                unsafe { ((heap.va + at) as *mut u8).write_volatile(1) };
            }
        });
        let stalls = on_mover(None, |mover| {
            let mut mover = mover.unwrap();
            let (here, there) = (|i| heap.extent(i), |i| heap.extent(GRANULES + i));
            for _ in 0..10 * ROUNDS {
                move_all(&mut mover, &heap, |i| (here(i), there(i)));
                move_all(&mut mover, &heap, |i| (there(i), Memory::Dram));
                move_all(&mut mover, &heap, |i| (Memory::Dram, here(i)));
            }
            mover.stalls()
        });
        stop.store(true, Relaxed);
        let copies = |ns: u64| ns as f64 / 1e9 / one_copy;
        let p999 = copies(stalls.percentile(0.999));
        println!("one copy of a granule: {:.0} us", one_copy * 1e6);
        println!(
            "{} accesses hit a moving granule; in copies:",
            stalls.count()
        );
        let p50 = copies(stalls.percentile(0.5));
        let p99 = copies(stalls.percentile(0.99));
        println!(
            "p50 {p50:.1}, p99 {p99:.1}, p99.9 {p999:.1}, max {:.1}",
            copies(stalls.max())
        );
        assert!(p999 < 10.0, "threads wait too long");
    });
}
