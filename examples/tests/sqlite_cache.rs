//! SQLite's page cache in an arena, in DRAM: the program, and what goes under pressure.

use std::process::Command;

use dcmalloc::DcMalloc;
use dcmalloc_examples::page_cache;
use rusqlite::Connection;

#[global_allocator]
static HEAP: DcMalloc = DcMalloc::new();

#[test]
fn the_program_finds_every_row_as_written() {
    let output = Command::new(env!("CARGO_BIN_EXE_sqlite_cache"))
        .args(["--database", "8", "--cache", "4", "--seconds", "1"])
        .args(["--directory", env!("CARGO_TARGET_TMPDIR")])
        .env("DCM_SOCKET", "/nowhere/dcm.sock")
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{told}");
    assert!(told.contains("no extents, everything is in DRAM"), "{told}");
    assert!(told.contains("all of them as written"), "{told}");
}

#[test]
fn pages_that_are_not_in_use_go_and_are_read_again() {
    let arena = HEAP.arena("pages").build().unwrap();
    page_cache::install(arena.clone()).unwrap();
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let database = Connection::open(file.path()).unwrap();
    database.pragma_update(None, "cache_size", -8192).unwrap();
    let fill = "CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
        INSERT INTO t SELECT i, printf('%0300d', i) FROM n;";
    database.execute_batch(fill).unwrap();
    let sum = || -> i64 {
        let query = "SELECT sum(a * (b + 0 = a) * (length(b) = 300)) FROM t";
        database.query_row(query, [], |row| row.get(0)).unwrap()
    };
    assert_eq!(sum(), 200_010_000);
    let full = page_cache::held().0;
    assert!(full > 6 << 20, "{full}");
    assert!(arena.stats().allocated >= full as u64);

    assert_eq!(page_cache::shrink(2 << 20), 2 << 20);
    assert_eq!(page_cache::held().0, full - (2 << 20));
    let misses = page_cache::held().1.1;
    assert_eq!(sum(), 200_010_000);
    assert!(page_cache::held().1.1 > misses, "read again");
    assert!(
        page_cache::held().0 <= full - (2 << 20),
        "no more before it may"
    );
    page_cache::may_grow();
    assert_eq!(sum(), 200_010_000);
    assert!(page_cache::held().0 > full - (2 << 20));
    // Whatever is asked for, what a statement has in its hands stays.
    let mut select = database.prepare("SELECT b FROM t ORDER BY a").unwrap();
    let mut rows = select.query([]).unwrap();
    rows.next().unwrap();
    page_cache::shrink(u64::MAX);
    assert!(page_cache::held().0 > 0);
    for number in 2..=20_000 {
        let row = rows.next().unwrap().unwrap();
        assert_eq!(row.get::<_, String>(0).unwrap(), format!("{number:0300}"));
    }
    drop(rows);
    drop(select);
    database.close().unwrap();
    assert_eq!(page_cache::held().0, 0);
}
