//! QEMU's qtest protocol: lines that read and write the memory of a machine whose processors never run.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use dax_backend::pci::config::ConfigSpace;

/// One connection. QEMU answers each line with one line.
pub(super) struct Qtest(BufReader<UnixStream>);

impl Qtest {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// The words of the answer after `OK`.
    fn ask(&mut self, order: &str) -> String {
        writeln!(self.0.get_mut(), "{order}").expect("QEMU listens");
        let mut line = String::new();
        loop {
            line.clear();
            let read = self.0.read_line(&mut line).expect("QEMU answers");
            assert!(read > 0, "QEMU is gone after {order:?}");
            if !line.starts_with("IRQ") {
                break;
            }
        }
        let answer = line.trim_end().strip_prefix("OK");
        let answer = answer.unwrap_or_else(|| panic!("{order:?}: {line}"));
        answer.trim_start().to_owned()
    }

    fn number(&mut self, order: &str) -> u64 {
        let answer = self.ask(order);
        let digits = answer.trim_start_matches("0x");
        u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{order:?}: {answer:?}"))
    }

    pub(super) fn read32(&mut self, addr: u64) -> u32 {
        self.number(&format!("readl {addr:#x}")) as u32
    }

    pub(super) fn read64(&mut self, addr: u64) -> u64 {
        self.number(&format!("readq {addr:#x}"))
    }

    pub(super) fn write32(&mut self, addr: u64, value: u32) {
        self.ask(&format!("writel {addr:#x} {value:#x}"));
    }

    pub(super) fn write64(&mut self, addr: u64, value: u64) {
        self.ask(&format!("writeq {addr:#x} {value:#x}"));
    }

    pub(super) fn read(&mut self, addr: u64, bytes: &mut [u8]) {
        if bytes.is_empty() {
            return;
        }
        let answer = self.ask(&format!("read {addr:#x} {:#x}", bytes.len()));
        let digits = answer.trim_start_matches("0x").as_bytes();
        assert_eq!(digits.len(), 2 * bytes.len(), "of {answer:?}");
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            let pair = std::str::from_utf8(pair).expect("ASCII");
            *byte = u8::from_str_radix(pair, 16).expect("hexadecimal");
        }
    }

    pub(super) fn write(&mut self, addr: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.ask(&format!("write {addr:#x} {:#x} 0x{digits}", bytes.len()));
    }

    /// Writes a dword of configuration space through the host bridge's ports.
    pub(super) fn write_port(&mut self, register: u8, value: u32) {
        self.ask(&format!(
            "outl 0xcf8 {:#x}",
            0x8000_0000 | u32::from(register)
        ));
        self.ask(&format!("outl 0xcfc {value:#x}"));
    }
}

/// The configuration space of one function, in the memory that the host bridge maps it to.
pub(super) struct Function<'a> {
    pub(super) qtest: &'a mut Qtest,
    pub(super) at: u64,
}

impl ConfigSpace for Function<'_> {
    fn read32(&mut self, offset: u16) -> std::io::Result<u32> {
        Ok(self.qtest.read32(self.at + u64::from(offset)))
    }

    fn write32(&mut self, offset: u16, value: u32) -> std::io::Result<()> {
        self.qtest.write32(self.at + u64::from(offset), value);
        Ok(())
    }
}
