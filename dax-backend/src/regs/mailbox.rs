//! Mailbox registers (CXL r3.1 8.2.8.4).

#![forbid(unsafe_code)]

use bitfield_struct::bitfield;

/// Offset of [`Capabilities`], 4 bytes.
pub const CAPABILITIES: u32 = 0x00;
/// Offset of [`Control`], 4 bytes.
pub const CONTROL: u32 = 0x04;
/// Offset of [`CommandRegister`], 8 bytes.
pub const COMMAND: u32 = 0x08;
/// Offset of [`Status`], 8 bytes.
pub const STATUS: u32 = 0x10;
/// Offset of [`BackgroundStatus`], 8 bytes.
pub const BACKGROUND_STATUS: u32 = 0x18;
/// Offset of the payload.
pub const PAYLOAD: u32 = 0x20;

/// Mailbox Capabilities register.
#[bitfield(u32)]
pub struct Capabilities {
    /// The payload has 2^n bytes; CXL allows 8 to 20.
    #[bits(5)]
    pub payload_size_log2: u8,
    pub doorbell_interrupt: bool,
    pub background_interrupt: bool,
    #[bits(4)]
    pub message_number: u8,
    /// Seconds until the mailbox is ready after a reset; 0 if not reported.
    pub ready_time: u8,
    #[bits(4)]
    pub kind: u8,
    #[bits(9)]
    _reserved: u16,
}

/// Mailbox Control register.
#[bitfield(u32)]
pub struct Control {
    /// Set by the host to start a command, cleared by the device when it is done.
    pub doorbell: bool,
    pub doorbell_interrupt_enable: bool,
    pub background_interrupt_enable: bool,
    #[bits(29)]
    _reserved: u32,
}

/// Command register.
#[bitfield(u64)]
pub struct CommandRegister {
    pub opcode: u16,
    /// Bytes of payload: input when the doorbell is rung, output when it is clear again.
    #[bits(21)]
    pub payload_len: u32,
    #[bits(27)]
    _reserved: u32,
}

/// Mailbox Status register.
#[bitfield(u64)]
pub struct Status {
    pub background_operation: bool,
    #[bits(31)]
    _reserved: u32,
    pub return_code: u16,
    pub vendor_code: u16,
}

/// Background Command Status register.
#[bitfield(u64)]
pub struct BackgroundStatus {
    pub opcode: u16,
    #[bits(7)]
    pub percent: u8,
    #[bits(9)]
    _reserved: u16,
    pub return_code: u16,
    pub vendor_code: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_from_hardware_decode() {
        let capabilities = Capabilities::from_bits(0x3cb);
        assert_eq!(capabilities.payload_size_log2(), 11);
        assert!(!capabilities.doorbell_interrupt());
        assert!(capabilities.background_interrupt());
        assert_eq!(capabilities.message_number(), 7);
    }

    #[test]
    fn opcode_and_length_share_one_register() {
        let command = CommandRegister::new()
            .with_opcode(0x4802)
            .with_payload_len(0x1_2345);
        assert_eq!(command.into_bits(), 0x1_2345_4802);
        let status = Status::from_bits(0x0abc_000f_0000_0001);
        assert_eq!(status.return_code(), 0x0f);
        assert_eq!(status.vendor_code(), 0x0abc);
        assert!(status.background_operation());
    }
}
