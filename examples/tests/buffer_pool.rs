//! The buffer pool, in DRAM: what it says of its pages, and what is left of it under pressure.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use dcmalloc::DcMalloc;
use dcmalloc_examples::pool::{PAGE, Pool, SLAB_FRAMES};

#[global_allocator]
static HEAP: DcMalloc = DcMalloc::new();

#[test]
fn the_program_finds_every_page_as_written() {
    let directory = env!("CARGO_TARGET_TMPDIR");
    let output = Command::new(env!("CARGO_BIN_EXE_buffer_pool"))
        .args(["--file", "16", "--pool", "4", "--seconds", "1"])
        .args(["--directory", directory])
        .env("DCM_SOCKET", "/nowhere/dcm.sock")
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{told}");
    assert!(told.contains("no extents, everything is in DRAM"), "{told}");
    assert!(told.contains("all of them as written"), "{told}");
}

#[test]
fn what_it_drops_is_read_again_and_it_grows_back() {
    const PAGES: u64 = 4 * SLAB_FRAMES as u64;
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for page in 0..PAGES {
        file.as_file().write_all(&[page as u8; PAGE]).unwrap();
    }
    file.as_file().sync_data().unwrap();
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(file.path())
        .unwrap();
    let arena = HEAP.arena("pool").build().unwrap();
    let heap = arena.heap();
    let mut pool = Pool::new(direct, arena, 4).unwrap();
    let all: Vec<u64> = (0..PAGES).collect();
    let read_all = |pool: &mut Pool| {
        let mut right = 0;
        let check = |page: u64, bytes: &[u8]| right += u64::from(bytes == [page as u8; PAGE]);
        pool.with_pages(&all, check).unwrap();
        assert_eq!(right, PAGES);
    };
    read_all(&mut pool);
    assert_eq!((pool.slabs(), pool.misses), (4, PAGES));
    assert!(heap.stats().pinned >= 4 << 21);
    read_all(&mut pool);
    assert_eq!(pool.hits, PAGES);

    assert_eq!(pool.shrink(3 << 20), 2 << 21, "whole slabs");
    read_all(&mut pool);
    assert_eq!(pool.slabs(), 2, "no more before it may");
    pool.may_grow(4);
    read_all(&mut pool);
    assert_eq!(pool.slabs(), 4);
    assert_eq!(pool.shrink(u64::MAX), 3 << 21, "one is kept");
    read_all(&mut pool);
    drop(pool);
    assert_eq!(heap.stats().pinned, 0);
}
