//! Extents as memory of a NUMA node: a program that knows nothing of us is bound to it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::super::inside::Guest;
use super::super::port::Piece;
use super::served::{self, LIMIT, MIB, Served};
use crate::process::{self, Background};

const DAX: &str = "/sys/bus/dax/devices/dax0.0";
const DRIVERS: &str = "/sys/bus/dax/drivers";
const MEMORY: &str = "/sys/devices/system/memory";
const ACCEPTED: &str = "/capacity/accepted";
/// Bytes that are online, as the surface counts them.
const ONLINE: &str = "/clients/0/stats/extent_live_bytes";

/// A program with 6 MiB bound to a node (mbind(2)), which it changes and checks until there is a file `stop`. In
/// `where` and at its end it says which memory blocks they lie in (pagemap, proc_pid_pagemap(5)).
const HOLDER: &str = "
import ctypes, mmap, os, struct, sys
node, block_size, stop, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
PIECE, PIECES = 65536, 96
memory = mmap.mmap(-1, PIECE * PIECES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
mask = (ctypes.c_ulong * 16)()
mask[node // 64] = 1 << node % 64
libc = ctypes.CDLL(None, use_errno=True)
MBIND, MPOL_BIND = 237, 2
bound = libc.syscall(MBIND, ctypes.c_void_p(start), ctypes.c_ulong(PIECE * PIECES), MPOL_BIND, mask,
                     ctypes.c_ulong(1024), 0)
assert bound == 0, os.strerror(ctypes.get_errno())
pattern = bytes(range(256)) * (PIECE // 256)
turned = lambda by: pattern[by % 256:] + pattern[:by % 256]
def blocks():
    with open('/proc/self/pagemap', 'rb') as pagemap:
        pagemap.seek(start // 4096 * 8)
        pages = struct.unpack(f'{PIECE * PIECES // 4096}Q', pagemap.read(PIECE * PIECES // 4096 * 8))
    present = [page & (1 << 55) - 1 for page in pages if page >> 63]
    assert len(present) == len(pages), 'pages are missing'
    return ' '.join(map(str, sorted({page * 4096 // block_size for page in present})))
for i in range(PIECES):
    memory[i * PIECE:(i + 1) * PIECE] = turned(i)
with open(where, 'w') as file:
    file.write(blocks())
print('filled', flush=True)
rounds = 0
while rounds == 0 or not os.path.exists(stop):
    for i in range(PIECES):
        assert memory[i * PIECE:(i + 1) * PIECE] == turned(i + rounds), f'damaged in round {rounds}'
        memory[i * PIECE:(i + 1) * PIECE] = turned(i + rounds + 1)
    rounds += 1
print(f'{rounds} rounds')
print(blocks())
";

/// The window, in memory blocks.
struct Window {
    /// Its first address.
    base: u64,
    len: u64,
    block: u64,
}

impl Window {
    fn read() -> Result<Self> {
        let number = |path: String, radix| -> Result<u64> {
            let text = fs::read_to_string(&path).with_context(|| format!("no {path}"))?;
            let digits = text.trim().trim_start_matches("0x");
            Ok(u64::from_str_radix(digits, radix)?)
        };
        Ok(Self {
            base: number(format!("{DAX}/resource"), 16)?,
            len: number(format!("{DAX}/size"), 10)?,
            block: number(format!("{MEMORY}/block_size_bytes"), 16)?,
        })
    }

    /// A piece of the DC region that begins where the window does.
    fn piece(&self, first: u64, len: u64) -> Piece {
        Piece {
            offset: first * self.block,
            len,
        }
    }

    /// Blocks of the window that are online, counted from its start.
    fn online(&self) -> Vec<u64> {
        let first = self.base / self.block;
        let is_online = |block: &u64| {
            let state = fs::read_to_string(format!("{MEMORY}/memory{}/state", first + block));
            state.is_ok_and(|state| state.trim() == "online")
        };
        (0..self.len / self.block).filter(is_online).collect()
    }

    fn expect_online(&self, blocks: &[u64]) -> Result<()> {
        let online = self.online();
        ensure!(online == blocks, "online are {online:?} and not {blocks:?}");
        Ok(())
    }
}

pub(super) fn node(guest: &Guest) -> Result<()> {
    let mut modprobe = Command::new("modprobe");
    let loaded = process::run(modprobe.arg("kmem"), LIMIT)?;
    ensure!(loaded.success(), "no kmem: {}", loaded.stderr.trim());
    let window = Window::read()?;
    let result = on_a_node(guest, &window);
    // The checks that follow want /dev/dax0.0 as they know it.
    back_to_programs().and(result)
}

fn serve(guest: &Guest) -> Result<Served> {
    Served::start_with(guest, &["--surface", "node"])
}

fn on_a_node(guest: &Guest, window: &Window) -> Result<()> {
    let mut served = serve(guest)?;
    served.give_back()?;
    window.expect_online(&[])?;
    let start = Instant::now();
    let size = window.block;
    // Half a block can't be put online, and is not taken.
    let group = [
        window.piece(0, size),
        window.piece(2, size),
        window.piece(3, size / 2),
    ];
    guest.add(0, &group)?;
    served.until(ACCEPTED, |accepted| accepted == 2 * size)?;
    served.until(ONLINE, |online| online == 2 * size)?;
    guest.note(format!(
        "2 blocks of {} MiB online {} ms after the offer",
        size / MIB,
        start.elapsed().as_millis()
    ));
    window.expect_online(&[0, 2])?;
    // The blocks stay as they are without a broker, and the next one has them.
    served.broker.end(Signal::TERM)?;
    served = serve(guest)?;
    served.until(ONLINE, |online| online == 2 * size)?;

    let node = fs::read_to_string(format!("{DAX}/target_node"))?;
    let dir = tempfile::tempdir()?;
    let (stop, place) = (dir.path().join("stop"), dir.path().join("where"));
    let mut python = Command::new("/usr/bin/python3.11");
    python.args(["-c", HOLDER, node.trim(), &size.to_string()]);
    let mut holder = Background::start(python.arg(&stop).arg(&place))?;
    if let Err(error) = holder.wait_for("filled", LIMIT) {
        bail!("{error:#}: {}", holder.stderr_tail());
    }
    let before = blocks_in(&fs::read_to_string(&place)?, window)?;
    let used = *before.first().context("the program has no page")?;
    ensure!(
        before.iter().all(|block| [0, 2].contains(block)),
        "pages of the program are in blocks {before:?}"
    );

    let start = Instant::now();
    let receipt = served.lose(guest, &[window.piece(used, size)])?;
    let moved = served::moved(&receipt)?;
    ensure!(moved == size, "{moved} bytes were emptied: {receipt}");
    guest.note(format!(
        "a block in use was offline and released {} ms after it was asked for",
        start.elapsed().as_millis()
    ));
    window.expect_online(&[2 - used])?;
    fs::write(&stop, "")?;
    let finished = holder.finish(LIMIT)?;
    ensure!(
        finished.success(),
        "{}: {}",
        finished.ending(),
        finished.stderr.trim()
    );
    let mut said = finished.stdout.lines().skip(1);
    guest.note(format!("meanwhile: {}", said.next().unwrap_or_default()));
    let after = blocks_in(said.next().context("it did not say where")?, window)?;
    ensure!(!after.contains(&used), "pages are still in block {used}");

    // The device has the extent: what is accepted can't be offered. As it is no block, it is not taken.
    guest
        .add(0, &[window.piece(used, 2 * MIB)])
        .context("the device still counts it as accepted")?;
    served.until("/device/counters/groups_answered", |answered| answered == 1)?;
    served.until(ACCEPTED, |accepted| accepted == size)?;
    served.leave()?;
    window.expect_online(&[])
}

/// Blocks of the window among those in `text`; what is elsewhere is in DRAM.
fn blocks_in(text: &str, window: &Window) -> Result<Vec<u64>> {
    let first = window.base / window.block;
    let mut blocks = Vec::new();
    for number in text.split_ascii_whitespace() {
        let block: u64 = number.parse().with_context(|| format!("{number:?}"))?;
        if let Some(inside) = block.checked_sub(first) {
            blocks.push(inside);
        }
    }
    Ok(blocks)
}

/// Takes the window from `kmem` and gives it to programs again.
fn back_to_programs() -> Result<()> {
    let driver = fs::read_link(format!("{DAX}/driver")).unwrap_or_default();
    if driver.ends_with("kmem") {
        fs::write(format!("{DRIVERS}/kmem/unbind"), "dax0.0").context("kmem keeps the window")?;
        fs::write(format!("{DRIVERS}/kmem/remove_id"), "dax0.0")?;
        fs::write(format!("{DRIVERS}/device_dax/new_id"), "dax0.0")?;
    }
    ensure!(
        Path::new("/dev/dax0.0").exists(),
        "the window is not /dev/dax0.0 again"
    );
    Ok(())
}
