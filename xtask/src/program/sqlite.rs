//! SQLite's shell builds a database in memory, changes it all over and checks it.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::{same_either_way, verbatim};

/// 200,000 rows with two indexes; then updates, deletes and a vacuum; then the check and checksums.
pub(crate) const SCRIPT: &str = "\
PRAGMA journal_mode = MEMORY;
CREATE TABLE record(id INTEGER PRIMARY KEY, name TEXT NOT NULL, payload TEXT NOT NULL, score INTEGER NOT NULL);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)
INSERT INTO record
SELECT i, printf('name-%08d', i * 7919 % 200003), printf('%0*d', 40 + i % 160, i), i * 31 % 1000 FROM n;
CREATE INDEX record_name ON record(name);
CREATE INDEX record_score ON record(score, id);
UPDATE record SET payload = payload || '-changed' WHERE score < 300;
DELETE FROM record WHERE id % 7 = 3;
VACUUM;
PRAGMA integrity_check;
SELECT count(*), sum(length(payload)), sum(score), min(name), max(name) FROM record;
SELECT score, count(*), sum(id) FROM record GROUP BY score HAVING score % 100 = 0;
";

pub(super) fn judge() -> Result<()> {
    let mut shell = Command::new("sqlite3");
    shell.args(["-batch", ":memory:", SCRIPT]);
    same_either_way(&mut shell, Duration::from_secs(120), verbatim)
}
