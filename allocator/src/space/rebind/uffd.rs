//! userfaultfd(2), as far as a rebind needs it: the right to make threads
//! wait for a page, and to wake them.

use core::ffi::c_void;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

// include/uapi/linux/userfaultfd.h
const API: u64 = 0xAA;
const IOC_NEW: Opcode = opcode::none(0xAA, 0x00);
const IOC_API: Opcode = opcode::read_write::<ApiArg>(0xAA, 0x3F);
const IOC_REGISTER: Opcode = opcode::read_write::<RegisterArg>(0xAA, 0x00);
const IOC_UNREGISTER: Opcode = opcode::read::<RangeArg>(0xAA, 0x01);
const IOC_WAKE: Opcode = opcode::read::<RangeArg>(0xAA, 0x02);
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_THREAD_ID: u64 = 1 << 8;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const USER_MODE_ONLY: u32 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMAP: u8 = 0x14;

/// `struct uffdio_api`.
#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

/// `struct uffd_msg`: a tag, then 24 bytes whose meaning the tag decides; the
/// second word of a page fault is its address, half of the third its thread.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Message {
    event: u8,
    reserved: [u8; 7],
    arg: [u64; 3],
}

const _: () = assert!(size_of::<ApiArg>() == 24);
const _: () = assert!(size_of::<RegisterArg>() == 32);
const _: () = assert!(size_of::<Message>() == 32);

/// What the kernel reports to the monitor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Event {
    /// A thread waits for the page at this address.
    Fault { address: usize, thread: i32 },
    /// A registered mapping moved; mremap(2) returns once this is read.
    Remap,
    /// Nothing a rebind asked for.
    Other,
}

impl Message {
    pub(super) const EMPTY: Self = Self {
        event: 0,
        reserved: [0; 7],
        arg: [0; 3],
    };

    pub(super) fn event(&self) -> Event {
        match self.event {
            EVENT_PAGEFAULT => Event::Fault {
                address: self.arg[1] as usize,
                thread: self.arg[2]
                    .to_ne_bytes()
                    .first_chunk()
                    .map_or(0, |&id| i32::from_ne_bytes(id)),
            },
            EVENT_REMAP => Event::Remap,
            _ => Event::Other,
        }
    }
}

/// Why there is no userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// Every way of opening one was denied.
    #[error(
        "userfaultfd is denied ({0}): granules cannot be moved while in use; \
         allow the system call in the container's seccomp profile"
    )]
    Denied(Errno),
    /// The kernel has no `UFFD_FEATURE_EVENT_REMAP` (Linux 4.11), or no
    /// `UFFD_FEATURE_THREAD_ID` (4.14).
    #[error("userfaultfd does not report moved mappings ({0}): Linux 4.14 or newer is needed")]
    NoRemapEvents(Errno),
}

/// An open userfaultfd that reports moved mappings.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    kernel_faults: bool,
}

impl Uffd {
    /// Opens a userfaultfd with the most right there is, in this order: a new
    /// one from `device` (an open `/dev/userfaultfd`, which gives any process
    /// that holds it the full right), from `/dev/userfaultfd` opened here, by
    /// userfaultfd(2), and last by userfaultfd(2) with
    /// `UFFD_USER_MODE_ONLY`, which [`takes_kernel_faults`] then tells.
    ///
    /// [`takes_kernel_faults`]: Self::takes_kernel_faults
    pub fn open(device: Option<BorrowedFd<'_>>) -> Result<Self, UffdError> {
        let uffd = match Self::open_raw(device) {
            Ok(uffd) => uffd,
            Err(_) => {
                let user_only = UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
                let fd = system_call(UserfaultfdFlags::CLOEXEC | user_only);
                Self {
                    fd: fd.map_err(UffdError::Denied)?,
                    kernel_faults: false,
                }
            }
        };
        let mut api = ApiArg {
            api: API,
            features: FEATURE_EVENT_REMAP | FEATURE_THREAD_ID,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes a `struct uffdio_api`.
        unsafe { ioctl(&uffd.fd, Updater::<IOC_API, _>::new(&mut api)) }
            .map_err(UffdError::NoRemapEvents)?;
        Ok(uffd)
    }

    /// Opens one with the full right, and does not set it up.
    pub(super) fn open_raw(device: Option<BorrowedFd<'_>>) -> Result<Self, UffdError> {
        let fd = match device.map(new_from_device) {
            Some(Ok(fd)) => Ok(fd),
            _ => open_device()
                .and_then(|own| new_from_device(own.as_fd()))
                .or_else(|_| system_call(UserfaultfdFlags::CLOEXEC)),
        };
        fd.map(Self::from_fd).map_err(UffdError::Denied)
    }

    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Self {
            fd,
            kernel_faults: true,
        }
    }

    /// Whether the kernel itself waits for a granule in flight, as in
    /// `read(fd, granule, n)`. Without it such a call fails with `EFAULT` and
    /// a datagram is lost, so the caller decides whether to move at all.
    pub fn takes_kernel_faults(&self) -> bool {
        self.kernel_faults
    }

    /// Makes every access to a page that is missing in the range wait.
    pub(super) fn register(&self, at: usize, len: usize) -> Result<(), Errno> {
        let mut arg = RegisterArg {
            range: range(at, len),
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes a `struct uffdio_register`.
        unsafe { ioctl(&self.fd, Updater::<IOC_REGISTER, _>::new(&mut arg)) }
    }

    /// Undoes [`register`](Self::register); waiting threads go on.
    pub(super) fn unregister(&self, at: usize, len: usize) -> Result<(), Errno> {
        // SAFETY: UFFDIO_UNREGISTER reads a `struct uffdio_range`.
        unsafe { ioctl(&self.fd, Setter::<IOC_UNREGISTER, _>::new(range(at, len))) }
    }

    /// Lets the threads that wait in the range try again. Whether the range is
    /// still registered does not matter.
    pub(super) fn wake(&self, at: usize, len: usize) -> Result<(), Errno> {
        // SAFETY: UFFDIO_WAKE reads a `struct uffdio_range`.
        unsafe { ioctl(&self.fd, Setter::<IOC_WAKE, _>::new(range(at, len))) }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn as_raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

fn range(at: usize, len: usize) -> RangeArg {
    RangeArg {
        start: at as u64,
        len: len as u64,
    }
}

fn open_device() -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(c"/dev/userfaultfd", flags, Mode::empty())
}

fn system_call(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    // SAFETY: the descriptor is used only for placeholders of this module.
    unsafe { rustix::mm::userfaultfd(flags) }
}

fn new_from_device(device: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: on a `/dev/userfaultfd`, USERFAULTFD_IOC_NEW takes flags and
    // returns a descriptor; on anything else it fails.
    unsafe { ioctl(device, NewArg) }
}

/// `USERFAULTFD_IOC_NEW`: its argument is flags, its result a descriptor.
struct NewArg;

// SAFETY: the opcode matches the argument (flags by value) and the output.
unsafe impl Ioctl for NewArg {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        UserfaultfdFlags::CLOEXEC.bits() as usize as *mut c_void
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: a successful call returns a new descriptor that is ours.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

/// Reads what has happened; waits until something has.
pub(super) fn read_events(fd: BorrowedFd<'_>, into: &mut [Message; 16]) -> Result<usize, Errno> {
    // SAFETY: `Message` is plain old data without padding, so its bytes may be
    // written freely.
    let bytes = unsafe {
        core::slice::from_raw_parts_mut(into.as_mut_ptr().cast::<u8>(), size_of_val(into))
    };
    Ok(rustix::io::read(fd, bytes)? / size_of::<Message>())
}
