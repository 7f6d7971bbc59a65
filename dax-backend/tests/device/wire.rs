//! Registers with something between driver and device: a hook, a cut wire, a crash.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use dax_backend::journal::{Journal, JournalEntry};
use dax_backend::mmio::{Mmio, RegisterBlock};

/// Something that is told of every doorbell, and may cut the wire.
pub(crate) trait Tap: Send {
    /// Whether the driver still reaches the device.
    fn is_alive(&self) -> bool {
        true
    }

    /// Before a doorbell is rung.
    fn before(&mut self) {}

    /// After it was rung, with the opcode; with a fast device the command is done.
    fn after(&mut self, _opcode: u16) {}
}

/// Registers behind a [`Tap`]. A dead device reads as all ones and takes no writes.
struct Wire<T> {
    mmio: Box<dyn Mmio>,
    tap: T,
    opcode: u16,
}

/// `mmio` with `tap` in between.
pub(crate) fn tapped(mmio: Box<dyn Mmio>, tap: impl Tap + 'static) -> Box<dyn Mmio> {
    Box::new(Wire {
        mmio,
        tap,
        opcode: 0,
    })
}

impl<T: Tap> Mmio for Wire<T> {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        self.mmio.block_len(block)
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        let value = self.mmio.read32(block, offset);
        if self.tap.is_alive() { value } else { u32::MAX }
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        let value = self.mmio.read64(block, offset);
        if self.tap.is_alive() { value } else { u64::MAX }
    }

    /// The only 4-byte writes to the device block are doorbells.
    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        if block == RegisterBlock::Device {
            self.tap.before();
        }
        if !self.tap.is_alive() {
            return;
        }
        self.mmio.write32(block, offset, value);
        if block == RegisterBlock::Device {
            self.tap.after(self.opcode);
        }
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        if self.tap.is_alive() {
            self.opcode = value as u16;
            self.mmio.write64(block, offset, value);
        }
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        self.mmio.read_payload(offset, payload);
        if !self.tap.is_alive() {
            payload.fill(0xff);
        }
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        if self.tap.is_alive() {
            self.mmio.write_payload(offset, payload);
        }
    }
}

/// Which commands were sent.
#[derive(Clone, Default)]
pub(crate) struct Doorbells(Arc<Mutex<Vec<u16>>>);

impl Doorbells {
    pub(crate) fn count(&self, wanted: impl Fn(u16) -> bool) -> usize {
        let rung = self.0.lock().unwrap();
        rung.iter().filter(|&&opcode| wanted(opcode)).count()
    }
}

impl Tap for Doorbells {
    fn after(&mut self, opcode: u16) {
        self.0.lock().unwrap().push(opcode);
    }
}

/// A device that can be unplugged.
#[derive(Clone, Default)]
pub(crate) struct Plug(Arc<AtomicBool>);

impl Plug {
    pub(crate) fn pull(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Tap for Plug {
    fn is_alive(&self) -> bool {
        !self.0.load(Ordering::SeqCst)
    }
}

/// Calls something after each command.
pub(crate) struct Hook<F>(pub(crate) F);

impl<F: FnMut(u16) + Send> Tap for Hook<F> {
    fn after(&mut self, opcode: u16) {
        (self.0)(opcode);
    }
}

/// Ends the driver after so many steps. A step lies before and after each command, and before
/// each write of the journal.
#[derive(Clone)]
pub(crate) struct Crash(Arc<AtomicI64>);

impl Crash {
    pub(crate) fn after(steps: i64) -> Self {
        Self(Arc::new(AtomicI64::new(steps)))
    }

    pub(crate) fn happened(&self) -> bool {
        self.0.load(Ordering::SeqCst) < 0
    }

    fn step(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Tap for Crash {
    fn is_alive(&self) -> bool {
        !self.happened()
    }

    fn before(&mut self) {
        self.step();
    }

    fn after(&mut self, _opcode: u16) {
        self.step();
    }
}

/// A journal that outlives the driver, and is not written by a dead one.
#[derive(Clone)]
pub(crate) struct SharedJournal {
    pub(crate) entry: Arc<Mutex<Option<JournalEntry>>>,
    pub(crate) crash: Crash,
}

impl SharedJournal {
    pub(crate) fn new() -> Self {
        Self {
            entry: Arc::default(),
            crash: Crash::after(i64::MAX),
        }
    }

    pub(crate) fn with(&self, crash: Crash) -> Self {
        Self {
            entry: Arc::clone(&self.entry),
            crash,
        }
    }
}

impl Journal for SharedJournal {
    fn save(&mut self, entry: &JournalEntry) -> io::Result<()> {
        self.crash.step();
        if self.crash.happened() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        *self.entry.lock().unwrap() = Some(entry.clone());
        Ok(())
    }

    fn load(&mut self) -> io::Result<Option<JournalEntry>> {
        Ok(self.entry.lock().unwrap().clone())
    }
}
