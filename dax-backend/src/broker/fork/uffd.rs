//! A member's userfaultfd (userfaultfd(2)): what its threads wait for, and the
//! pages that end the wait.

use std::fs::read_link;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};

use crate::broker::protocol::GRANULE;

// include/uapi/linux/userfaultfd.h
const API: u64 = 0xAA;
const IOC_API: Opcode = opcode::read_write::<[u64; 3]>(0xAA, 0x3F);
const IOC_UNREGISTER: Opcode = opcode::read::<[u64; 2]>(0xAA, 0x01);
const IOC_WAKE: Opcode = opcode::read::<[u64; 2]>(0xAA, 0x02);
const IOC_COPY: Opcode = opcode::read_write::<Copy>(0xAA, 0x03);
const IOC_ZEROPAGE: Opcode = opcode::read_write::<Fill>(0xAA, 0x04);
const IOC_POISON: Opcode = opcode::read_write::<Fill>(0xAA, 0x08);
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_POISON: u64 = 1 << 14;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
pub(super) const PAGE: u64 = 4096;
/// No kernel lets a program map less, few programs map this.
const NOWHERE: u64 = 64 << 10;
/// No processor has addresses of fewer bits.
const ADDRESS_BITS: u32 = 32;

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage`, and `struct uffdio_poison`.
#[repr(C)]
struct Fill {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    arg: [u64; 3],
}

const _: () = assert!(size_of::<Message>() == 32);

/// What a member did.
#[derive(Debug)]
pub(super) enum Event {
    /// One of its threads waits for the page at this address.
    Fault(u64),
    /// It has forked; the child's own.
    Fork(Uffd),
}

/// What came of filling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// Every page is there.
    Done,
    /// Not now: the member is changing its mappings, or there is no memory.
    Later,
    /// The member is gone.
    Gone,
    /// The original can't be read.
    Unreadable,
}

/// A userfaultfd of another process.
#[derive(Debug)]
pub(super) struct Uffd(OwnedFd);

impl Uffd {
    /// Sets a client's new userfaultfd up. That its children are protected
    /// at birth (`UFFD_FEATURE_EVENT_FORK`) takes `CAP_SYS_PTRACE`, which a
    /// client need not have.
    ///
    /// # Errors
    /// `EINVAL`: it is none, or not new. `EPERM`: this process may not either.
    /// `EOPNOTSUPP`: this kernel can't raise SIGBUS for what is lost
    /// (`UFFDIO_POISON`, Linux 6.6), and it would read as zeroes.
    pub(super) fn set_up(fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let link = read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        if link.is_ok_and(|to| to.as_os_str() != "anon_inode:[userfaultfd]") {
            return Err(Errno::INVAL);
        }
        let mut api = [API, FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP, 0];
        // SAFETY: UFFDIO_API reads and writes a `struct uffdio_api`, three words.
        unsafe { ioctl(fd, Updater::<IOC_API, _>::new(&mut api)) }?;
        is_enough(api[1])
    }

    /// One that is set up.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, Errno> {
        fcntl_setfl(&fd, OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// The next thing that the member did.
    ///
    /// # Errors
    /// `EAGAIN`: nothing. Others: the kernel could not tell now.
    pub(super) fn next(&self) -> Result<Option<Event>, Errno> {
        let mut bytes = [0u8; size_of::<Message>()];
        if rustix::io::read(&self.0, &mut bytes)? != bytes.len() {
            return Ok(None);
        }
        // SAFETY: as many bytes, and any are a valid message.
        let message: Message = unsafe { std::mem::transmute(bytes) };
        match message.event {
            EVENT_PAGEFAULT => Ok(Some(Event::Fault(message.arg[1]))),
            EVENT_FORK => {
                // SAFETY: the kernel made this descriptor for us just now.
                let fd = unsafe { OwnedFd::from_raw_fd(message.arg[0] as u32 as i32) };
                Self::new(fd).map(|uffd| Some(Event::Fork(uffd)))
            }
            _ => Ok(None),
        }
    }

    /// Copies the granule at `original` (an address of this process) to
    /// `place`, but for pages that are there already, and wakes who waits.
    pub(super) fn fill(&self, place: u64, original: u64) -> Filled {
        self.each_part(place, |done, len| {
            let mut copy = Copy {
                dst: place + done,
                src: original + done,
                len,
                mode: 0,
                copy: 0,
            };
            // SAFETY: UFFDIO_COPY reads and writes a `struct uffdio_copy`; what
            // it writes to is another process's memory.
            let result = unsafe { ioctl(&self.0, Updater::<IOC_COPY, _>::new(&mut copy)) };
            (result, copy.copy)
        })
    }

    /// Calls `part` for the pages of the granule at `place`, with a distance
    /// from its start and a length, until each is done or needs nothing; wakes
    /// who waits. `part` says with an error how much it has done all the same.
    fn each_part(
        &self,
        place: u64,
        mut part: impl FnMut(u64, u64) -> (Result<(), Errno>, i64),
    ) -> Filled {
        let (mut done, mut most) = (0, GRANULE);
        while done < GRANULE {
            let len = most.min(GRANULE - done);
            match part(done, len) {
                (Ok(()), _) => done += len,
                // The reason shows at the next attempt.
                (Err(_), some) if some > 0 => done += some as u64,
                (Err(Errno::EXIST), _) => done += PAGE,
                // The kernel takes what lies in one mapping. The member may
                // have made several of a granule (mlock, mprotect, madvise).
                (Err(Errno::NOENT | Errno::INVAL), _) if len > PAGE => most = PAGE,
                // Nothing of ours is there any more.
                (Err(Errno::NOENT | Errno::INVAL), _) => done += PAGE,
                (Err(Errno::SRCH), _) => return Filled::Gone,
                (Err(Errno::FAULT), _) => return Filled::Unreadable,
                (Err(_), _) => return Filled::Later,
            }
        }
        self.wake(place);
        Filled::Done
    }

    /// Shows words to a member, at the start of the page at `at`.
    pub(super) fn show(&self, at: u64, words: [u64; 2]) -> Filled {
        #[repr(C, align(4096))]
        struct Page([u64; 512]);
        let mut page = Page([0; 512]);
        page.0[..2].copy_from_slice(&words);
        let mut copy = Copy {
            dst: at,
            src: (&raw const page) as u64,
            len: PAGE,
            mode: 0,
            copy: 0,
        };
        // SAFETY: as in `fill`.
        match unsafe { ioctl(&self.0, Updater::<IOC_COPY, _>::new(&mut copy)) } {
            Err(Errno::AGAIN | Errno::NOMEM) => Filled::Later,
            Err(Errno::SRCH) => Filled::Gone,
            _ => Filled::Done,
        }
    }

    /// Makes ordinary memory of a range in which every page is there.
    ///
    /// # Errors
    /// `ENOMEM`: the member has too many mappings. Others: there is nothing of
    /// ours.
    pub(super) fn release(&self, at: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: UFFDIO_UNREGISTER reads a `struct uffdio_range`, two words.
        unsafe { ioctl(&self.0, Setter::<IOC_UNREGISTER, _>::new([at, len])) }
    }

    /// Puts a page of zeroes where a member has dropped one of its own.
    pub(super) fn zero(&self, addr: u64) -> Filled {
        let start = addr - addr % PAGE;
        let mut fill = Fill {
            start,
            len: PAGE,
            mode: 0,
            done: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes a `struct uffdio_zeropage`.
        let result = unsafe { ioctl(&self.0, Updater::<IOC_ZEROPAGE, _>::new(&mut fill)) };
        match result {
            Err(Errno::AGAIN | Errno::NOMEM) => Filled::Later,
            Err(Errno::SRCH) => Filled::Gone,
            _ => {
                self.wake(addr - addr % GRANULE);
                Filled::Done
            }
        }
    }

    /// Makes what is missing of a granule raise SIGBUS, as the memory itself
    /// would have.
    pub(super) fn poison(&self, place: u64) -> Filled {
        self.each_part(place, |done, len| {
            let mut fill = Fill {
                start: place + done,
                len,
                mode: 0,
                done: 0,
            };
            // SAFETY: UFFDIO_POISON reads and writes a `struct uffdio_poison`.
            let result = unsafe { ioctl(&self.0, Updater::<IOC_POISON, _>::new(&mut fill)) };
            (result, fill.done)
        })
    }

    /// Has who waits for a granule try again.
    pub(super) fn wake(&self, place: u64) {
        let _ = self.wake_range(place, GRANULE);
    }

    /// Has everybody try again: whoever still waits then is heard of anew.
    pub(super) fn wake_all(&self) {
        // The kernel refuses what goes beyond the end of a process's memory,
        // and that depends on the processor.
        for bits in (ADDRESS_BITS..u64::BITS).rev() {
            if self.wake_range(NOWHERE, (1 << bits) - PAGE - NOWHERE) == Ok(()) {
                return;
            }
        }
    }

    fn wake_range(&self, start: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: UFFDIO_WAKE reads a `struct uffdio_range`, two words.
        unsafe { ioctl(&self.0, Setter::<IOC_WAKE, _>::new([start, len])) }
    }

    /// Whether the member's memory is gone: it has ended, or called exec.
    pub(super) fn is_gone(&self) -> bool {
        self.copy_nowhere() == Err(Errno::SRCH)
    }

    /// Whether the member is forking, or moving what is registered.
    pub(super) fn is_changing(&self) -> bool {
        self.copy_nowhere() == Err(Errno::AGAIN)
    }

    fn copy_nowhere(&self) -> Result<(), Errno> {
        // To an address where nothing can be registered: only what is checked
        // first can be the answer.
        let page = [0u8; 1];
        let mut copy = Copy {
            dst: NOWHERE,
            src: page.as_ptr() as u64 & !(PAGE - 1),
            len: PAGE,
            mode: 0,
            copy: 0,
        };
        // SAFETY: as in `fill`.
        unsafe { ioctl(&self.0, Updater::<IOC_COPY, _>::new(&mut copy)) }
    }
}

/// Whether a kernel with these features (what `UFFDIO_API` says) can do all
/// that forks may come to need.
fn is_enough(features: u64) -> Result<(), Errno> {
    match features & FEATURE_POISON {
        0 => Err(Errno::OPNOTSUPP),
        _ => Ok(()),
    }
}

impl AsFd for Uffd {
    /// Readable when the member did something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use core::ffi::c_void;
    use rustix::mm::{
        MapFlags, MprotectFlags, MremapFlags, ProtFlags, UserfaultfdFlags, mmap_anonymous,
        mprotect, mremap_fixed, munmap,
    };
    use std::thread::JoinHandle;

    const IOC_REGISTER: Opcode = opcode::read_write::<[u64; 4]>(0xAA, 0x00);
    const MODE_MISSING: u64 = 1;
    /// `UFFD_USER_MODE_ONLY`: needs no right.
    const USER_MODE_ONLY: u32 = 1;

    /// A userfaultfd of this process, and a granule that it serves.
    pub(in super::super) fn served() -> (Uffd, u64) {
        served_with(0)
    }

    /// The same, whose owner waits until it is read that something moves.
    pub(in super::super) fn served_moving() -> (Uffd, u64) {
        served_with(FEATURE_EVENT_REMAP)
    }

    /// Moves a granule that `uffd` serves; waits until that is read.
    pub(in super::super) fn move_another(uffd: &Uffd) -> JoinHandle<()> {
        let (from, to) = (mapped(), mapped());
        register(uffd, from).unwrap();
        std::thread::spawn(move || {
            let (len, flags) = (GRANULE as usize, MremapFlags::MAYMOVE);
            let (from, to) = (from as *mut c_void, to as *mut c_void);
            // SAFETY: mappings of the test's, which nobody else uses.
            unsafe { mremap_fixed(from, len, len, flags, to) }.unwrap();
        })
    }

    fn served_with(features: u64) -> (Uffd, u64) {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        // SAFETY: it serves only what this test maps.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }.unwrap();
        let mut api = [API, features, 0];
        // SAFETY: as in `set_up`.
        unsafe { ioctl(&fd, Updater::<IOC_API, _>::new(&mut api)) }.unwrap();
        let (uffd, place) = (Uffd::new(fd).unwrap(), mapped());
        register(&uffd, place).unwrap();
        (uffd, place)
    }

    /// `EBUSY`: it is another one's.
    pub(in super::super) fn register(uffd: &Uffd, place: u64) -> Result<(), Errno> {
        let mut register = [place, GRANULE, MODE_MISSING, 0];
        // SAFETY: UFFDIO_REGISTER reads and writes four words.
        unsafe { ioctl(&uffd.0, Updater::<IOC_REGISTER, _>::new(&mut register)) }
    }

    /// A granule of ordinary memory.
    fn mapped() -> u64 {
        let (access, len) = (ProtFlags::READ | ProtFlags::WRITE, 2 * GRANULE as usize);
        let to = std::ptr::null_mut();
        // SAFETY: a new mapping.
        let at = unsafe { mmap_anonymous(to, len, access, MapFlags::PRIVATE) }.unwrap();
        (at as u64).next_multiple_of(GRANULE)
    }

    /// Whether a page is there.
    pub(in super::super) fn is_present(at: u64) -> bool {
        let mut page = 0u8;
        // SAFETY: mincore writes a byte for one page.
        let done = unsafe { libc::mincore(at as *mut c_void, PAGE as usize, &raw mut page) };
        assert_eq!(done, 0);
        page & 1 == 1
    }

    /// What a program reads there; it may wait for it.
    pub(in super::super) fn words_at(at: u64) -> [u64; 2] {
        // SAFETY: memory that a test has mapped, and does not unmap.
        unsafe { (at as *const [u64; 2]).read_volatile() }
    }

    /// Makes several mappings of a granule: page 5 may not be written, page 9
    /// is not there any more.
    fn split(place: u64) {
        let page = |n: u64| (place + n * PAGE) as *mut c_void;
        // SAFETY: a mapping of the test's.
        unsafe { mprotect(page(5), PAGE as usize, MprotectFlags::READ) }.unwrap();
        // SAFETY: as above.
        unsafe { munmap(page(9), PAGE as usize) }.unwrap();
    }

    #[test]
    fn a_granule_of_several_mappings_is_filled_in_each() {
        let ((uffd, place), original) = (served(), mapped());
        for page in 0..GRANULE / PAGE {
            // SAFETY: memory of the test's.
            unsafe { ((original + page * PAGE) as *mut u64).write(page + 1) };
        }
        split(place);
        assert_eq!(uffd.fill(place, original), Filled::Done);
        // Whatever is not there would be waited for.
        let missing: Vec<u64> = (0..GRANULE / PAGE)
            .filter(|page| *page != 9)
            .filter(|page| !is_present(place + page * PAGE))
            .collect();
        assert_eq!(missing, [0u64; 0]);
        for page in (0..GRANULE / PAGE).filter(|page| *page != 9) {
            // SAFETY: as above.
            let word = unsafe { ((place + page * PAGE) as *const u64).read() };
            assert_eq!(word, page + 1);
        }
    }

    #[test]
    fn a_granule_of_several_mappings_is_poisoned_in_each() {
        let (uffd, place) = served();
        split(place);
        assert_eq!(uffd.poison(place), Filled::Done);
        for page in (0..GRANULE / PAGE).filter(|page| *page != 9) {
            let mut fill = Fill {
                start: place + page * PAGE,
                len: PAGE,
                mode: 0,
                done: 0,
            };
            // SAFETY: as in `zero`.
            let zeroed = unsafe { ioctl(&uffd.0, Updater::<IOC_ZEROPAGE, _>::new(&mut fill)) };
            assert_eq!(zeroed, Err(Errno::EXIST), "page {page}");
        }
    }

    #[test]
    fn a_kernel_that_can_not_raise_sigbus_serves_no_forks() {
        // Linux 6.5 has all features up to UFFD_FEATURE_WP_UNPOPULATED (1 << 13).
        assert_eq!(is_enough((1 << 14) - 1), Err(Errno::OPNOTSUPP));
        assert_eq!(is_enough((1 << 15) - 1), Ok(()));
    }

    #[test]
    fn another_descriptor_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(Uffd::set_up(file.as_fd()), Err(Errno::INVAL));
    }
}
