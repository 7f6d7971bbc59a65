//! One heap in a process: two copies of the library would each take what the
//! other must not touch, and neither could tell its own memory from the other's.
//!
//! The first copy maps a page at an address that nobody else uses; the next one
//! finds it there. A forked child inherits it along with the heap, exec drops
//! both.

use core::ffi::c_void;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use crate::process::StartError;

/// Far from programs, libraries and stacks on every architecture with 47 bits
/// of user addresses; "dcma".
const PLACE: usize = 0x6463_6d61_0000;
const MARK: [u8; 16] = *b"dcmalloc's heap\n";

/// Says that this copy serves the process. Where no mark can be made, nobody
/// can tell, and the heap starts.
pub(crate) fn claim() -> Result<(), StartError> {
    let place = PLACE as *mut c_void;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: where something is mapped already this fails and changes nothing.
    match unsafe { mmap_anonymous(place, MARK.len(), prot, flags) } {
        Ok(page) if page == place => {
            // SAFETY: the page just made.
            unsafe { page.cast::<[u8; 16]>().write(MARK) };
            Ok(())
        }
        Ok(elsewhere) => {
            // A kernel before 4.17, to which the address is a hint.
            // SAFETY: the page just made.
            let _ = unsafe { rustix::mm::munmap(elsewhere, MARK.len()) };
            Ok(())
        }
        Err(Errno::EXIST) if marked() => Err(StartError::SecondCopy),
        Err(_) => Ok(()),
    }
}

/// Whether the mark is there; read through the kernel, since what is mapped
/// there may not be readable.
fn marked() -> bool {
    let mut found = [0u8; MARK.len()];
    let local = libc::iovec {
        iov_base: found.as_mut_ptr().cast(),
        iov_len: found.len(),
    };
    let remote = libc::iovec {
        iov_base: PLACE as *mut c_void,
        iov_len: found.len(),
    };
    // SAFETY: one buffer that lives here; a bad remote address is an error.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    read == found.len() as isize && found == MARK
}
