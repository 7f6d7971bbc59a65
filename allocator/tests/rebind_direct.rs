//! RocksDB reads and writes with `O_DIRECT`, from buffers that it aligns by
//! hand inside of ordinary blocks. The kernel transfers to and from the pages
//! that a buffer had when the call began: while granules moved, a read ended
//! in pages that the program had no more, and what it found was damaged.

mod rebind_rig;

use allocator::space::rebind::{GRANULE, LivePages, Memory, Mover, RebindError, Step};
use rebind_rig::{Heap, PAGE, Stop, on_mover};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const GRANULES: usize = 4;
/// What is transferred at a time: many pages, so that it takes a while.
const LEN: usize = 512 << 10;
/// So many such pieces are in the file that is read, and in that written.
const PIECES: usize = 16;
/// Where in its granule a buffer begins.
const WITHIN: usize = 3 * PAGE;
const LASTS: Duration = Duration::from_secs(3);

/// Word `i` of a piece whose seed is `seed`.
fn word(seed: u64, i: usize) -> u64 {
    (seed << 32 | i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

fn piece(seed: u64) -> Vec<u8> {
    (0..LEN / 8)
        .flat_map(|i| word(seed, i).to_ne_bytes())
        .collect()
}

/// A file that is gone at its end, on the disk that the build is on: `/tmp`
/// need not have direct I/O. `None` where that has none either.
fn open(name: &str) -> Option<(File, PathBuf)> {
    let path =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let plain = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(&path)
        .unwrap();
    for seed in 0..PIECES {
        plain
            .write_all_at(&piece(seed as u64), (seed * LEN) as u64)
            .unwrap();
    }
    plain.sync_all().unwrap();
    let direct = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    match direct {
        Ok(direct) => Some((direct, path)),
        Err(error) => {
            std::fs::remove_file(&path).unwrap();
            println!("SKIPPED: no direct I/O in {}: {error}", path.display());
            None
        }
    }
}

/// A buffer of the heap's as bytes.
///
/// # Safety
/// Nobody else uses it meanwhile.
unsafe fn buffer<'a>(heap: &Heap, granule: usize) -> &'a mut [u8] {
    let at = heap.granule(granule) + WITHIN;
    // SAFETY: inside of one granule, and the caller's.
    unsafe { std::slice::from_raw_parts_mut(at as *mut u8, LEN) }
}

/// Reads pieces and looks whether they are what the file has.
fn read(heap: &Heap, granule: usize, file: &File, vectored: bool, stop: &AtomicBool) -> u64 {
    // SAFETY: each thread has a granule of its own.
    let buffer = unsafe { buffer(heap, granule) };
    let mut done = 0;
    while !stop.load(Relaxed) {
        let seed = done % PIECES as u64;
        buffer.fill(0);
        let at = seed * LEN as u64;
        if vectored {
            let (front, back) = buffer.split_at_mut(LEN / 2);
            let both = [front, back].map(|half| libc::iovec {
                iov_base: half.as_mut_ptr().cast(),
                iov_len: half.len(),
            });
            // SAFETY: halves of the buffer.
            let n = unsafe { libc::preadv(file.as_raw_fd(), both.as_ptr(), 2, at as i64) };
            assert_eq!(n, LEN as isize);
        } else {
            file.read_exact_at(buffer, at).unwrap();
        }
        for (i, bytes) in buffer.chunks_exact(8).enumerate() {
            let found = u64::from_ne_bytes(bytes.try_into().unwrap());
            assert!(
                found == word(seed, i),
                "round {done}: word {i} of what was read is {found:#x}"
            );
        }
        done += 1;
    }
    done
}

/// Writes pieces and looks, in a buffer that stays, what the file has then.
fn write(heap: &Heap, granule: usize, file: &File, plain: &File, stop: &AtomicBool) -> u64 {
    // SAFETY: each thread has a granule of its own.
    let buffer = unsafe { buffer(heap, granule) };
    let mut found = vec![0; LEN];
    let mut done = 0;
    while !stop.load(Relaxed) {
        buffer.copy_from_slice(&piece(done));
        let at = done % PIECES as u64 * LEN as u64;
        file.write_all_at(buffer, at).unwrap();
        plain.read_exact_at(&mut found, at).unwrap();
        assert!(found == buffer, "round {done}: the file has something else");
        done += 1;
    }
    done
}

/// Moves every granule around until it is over; how often, and how often it
/// was refused because of a transfer. What a granule has left is overwritten,
/// as whoever gets it next would.
fn move_around(mover: &mut Mover, heap: &Heap, stop: &AtomicBool) -> (u64, u64) {
    let (mut moved, mut refused) = (0, 0);
    let mut memory = [0, 1, 2, 3].map(|i| heap.extent(i));
    let start = Instant::now();
    while start.elapsed() < LASTS && !stop.load(Relaxed) {
        for (i, from) in memory.iter_mut().enumerate() {
            let to = match *from {
                Memory::Dram => heap.extent(i),
                at if at == heap.extent(i) => heap.extent(GRANULES + i),
                _ => Memory::Dram,
            };
            let live = &LivePages::ALL;
            // SAFETY: the test's own granule, mapped as it says.
            let done = unsafe {
                mover.rebind(
                    heap.granule(i),
                    &[Step {
                        from: *from,
                        to,
                        live,
                    }],
                )
            };
            match done {
                Ok(_) => {
                    if let Memory::Extent(alias) = *from {
                        // SAFETY: the granule has left it.
                        unsafe { std::ptr::write_bytes(alias as *mut u8, 0xEE, GRANULE) };
                    }
                    *from = to;
                    moved += 1;
                }
                Err(RebindError::InTransfer { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
    }
    (moved, refused)
}

#[test]
fn transfers_under_way_end_before_a_granule_is_copied() {
    let (Some((file, path)), Some((target, written))) = (open("read"), open("written")) else {
        return;
    };
    let plain = File::open(&written).unwrap();
    let heap = Heap::new(GRANULES);
    let stop = AtomicBool::new(false);
    let busy = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (heap, stop, busy) = (&heap, &stop, &busy);
        let (file, target, plain) = (&file, &target, &plain);
        let works = [
            scope.spawn(move || read(heap, 0, file, false, stop)),
            scope.spawn(move || read(heap, 1, file, true, stop)),
            scope.spawn(move || write(heap, 2, target, plain, stop)),
            scope.spawn(move || {
                // Never in the kernel, as far as it can help it.
                while !stop.load(Relaxed) {
                    busy.fetch_add(1, Relaxed);
                }
                u64::from(heap.va != 0)
            }),
        ];
        let (moved, refused) = on_mover(None, |mover| {
            let _stopped = Stop(stop);
            move_around(&mut mover.unwrap(), heap, stop)
        });
        let done = works.map(|work| work.join().unwrap());
        println!(
            "{moved} moves, {refused} refused; transfers: {:?}",
            &done[..3]
        );
        assert!(done.iter().all(|&n| n > 0), "{done:?}");
        assert!(
            moved > 20 && refused < moved,
            "{moved} moves, {refused} refused"
        );
    });
    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(written).unwrap();
}
