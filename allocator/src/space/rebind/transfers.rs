//! Direct transfers under way: reads and writes with `O_DIRECT`.
//!
//! Such a call works on the pages that its buffer had when it began, whatever
//! is mapped there since. What is behind a placeholder is met by no new one,
//! but those that had pages before go on: a copy made before they end lacks
//! what they read, and a page that is lent anew is not what they were to
//! write. The kernel has no count of such pages that a program could ask for.
//! But a direct call lasts as long as its transfer, so it is enough to wait
//! until every thread has been seen elsewhere. What goes on without a thread
//! in the kernel (io_uring, aio) is not seen.

use super::PAGE;
use super::monitor::now;
use super::waiters::Waiters;
use core::mem::MaybeUninit;
use core::ops::Range;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, StatxFlags, open, openat, statx};
use rustix::io::Errno;
use std::io::Write;

/// How long to wait (ns). A transfer that takes longer is on a slow disk, or
/// waits itself for a granule that it reached after others.
const PATIENCE: u64 = 50_000_000;
/// How long to sleep between two looks (ns).
const PAUSE: i64 = 50_000;
/// A thread that was on a processor for so long (ns) and was never seen in a
/// direct call is in none: one that has pages sleeps for its disk by then.
const AT_WORK: u64 = 5_000_000;
/// How many threads may be in doubt.
const MOST: usize = 256;
/// More descriptors than this are not looked at one by one.
const MOST_DESCRIPTORS: usize = 1024;
/// More pieces of one call than this are not looked at.
const MOST_PIECES: usize = 64;

/// The threads of the process.
#[derive(Debug)]
pub(super) struct Transfers {
    tasks: OwnedFd,
}

/// What a thread was seen at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    /// Nothing that has pages of the range.
    Elsewhere,
    /// A direct call that may have pages of the range.
    Transfer,
    /// It runs, or is about to; where, can't be told.
    Running,
}

/// A thread that may be in a direct call.
#[derive(Clone, Copy)]
struct Doubt {
    thread: i32,
    /// Its processor time when it may have been in one for the last time.
    since: u64,
    /// Whether it was seen in one.
    transfer: bool,
}

impl Transfers {
    pub(super) fn open() -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let tasks = open(c"/proc/self/task", flags, Mode::empty())?;
        Ok(Self { tasks })
    }

    /// Waits until no direct call that began before has pages of `range`,
    /// which is behind placeholders since `taken` (CLOCK_MONOTONIC, ns).
    /// `false`: one is still under way, or may be.
    pub(super) fn end(&self, range: &Range<usize>, taken: u64, waiters: &Waiters) -> bool {
        let look = |thread| self.look(thread, range, taken, waiters);
        let mut doubts = [const { MaybeUninit::<Doubt>::uninit() }; MOST];
        let mut len = 0;
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let listed = each_number(&self.tasks, |thread| {
            if thread == own {
                return true;
            }
            let seen = look(thread);
            if seen == Seen::Elsewhere {
                return true;
            }
            let since = processor_time(thread);
            let transfer = seen == Seen::Transfer;
            let Some(doubt) = doubts.get_mut(len) else {
                return false;
            };
            doubt.write(Doubt {
                thread,
                since,
                transfer,
            });
            len += 1;
            true
        });
        // SAFETY: so many were written.
        let mut doubts = unsafe { doubts[..len].assume_init_mut() };
        // Each, because some are ours, which have descriptors of their own.
        if doubts
            .iter()
            .all(|doubt| !doubt.transfer && !self.any_direct(doubt.thread))
        {
            return listed.is_ok();
        }
        while !doubts.is_empty() {
            if listed != Ok(true) || now().saturating_sub(taken) > PATIENCE {
                return false;
            }
            pause();
            let mut i = 0;
            while let Some(doubt) = doubts.get_mut(i) {
                if doubt.is_gone(look(doubt.thread)) {
                    let last = doubts.len() - 1;
                    doubts.swap(i, last);
                    doubts = &mut doubts[..last];
                } else {
                    i += 1;
                }
            }
        }
        true
    }

    /// What `thread` does.
    fn look(&self, thread: i32, range: &Range<usize>, taken: u64, waiters: &Waiters) -> Seen {
        let mut text = [0; 256];
        let text = match self.read(&mut text, thread, "syscall", None) {
            Ok(text) => text,
            // It has ended.
            Err(Errno::NOENT | Errno::SRCH) => return Seen::Elsewhere,
            Err(_) => return Seen::Running,
        };
        let Some((number, arguments)) = call(text) else {
            return Seen::Running;
        };
        let [fd, at, len, ..] = arguments;
        let met = match number {
            libc::SYS_read | libc::SYS_write | libc::SYS_pread64 | libc::SYS_pwrite64 => {
                meets(at..at.saturating_add(len), range)
            }
            libc::SYS_readv
            | libc::SYS_writev
            | libc::SYS_preadv
            | libc::SYS_pwritev
            | libc::SYS_preadv2
            | libc::SYS_pwritev2 => match pieces_meet(at, len, range) {
                Ok(met) => met,
                // Where its buffers are can't be told.
                Err(()) => Some(usize::MAX),
            },
            _ => None,
        };
        let Some(page) = met else {
            return Seen::Elsewhere;
        };
        // Who waits for the first page of its buffer here has none yet.
        let waits = waiters.latest_of(thread, taken) == Some(page);
        if waits || !self.is_direct(thread, fd as i32) {
            return Seen::Elsewhere;
        }
        Seen::Transfer
    }

    /// Whether some descriptor of `thread` is for direct I/O, or may be.
    fn any_direct(&self, thread: i32) -> bool {
        let mut path = [0; 64];
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = path_of(&mut path, thread, "fdinfo", None);
        let Ok(directory) = openat(&self.tasks, directory, flags, Mode::empty()) else {
            return true;
        };
        let mut left = MOST_DESCRIPTORS;
        let none = each_number(&directory, |fd| {
            left -= 1;
            left > 0 && !self.is_direct(thread, fd)
        });
        none != Ok(true)
    }

    /// Whether a descriptor is for direct I/O. One that is closed by now may
    /// have been.
    ///
    /// Only of files and block devices more is asked than their kind: what
    /// others have to say may be said under a lock. Of an epoll descriptor it
    /// is the one that a thread holds that waits here for the memory that its
    /// events go to.
    fn is_direct(&self, thread: i32, fd: i32) -> bool {
        match self.kind(thread, fd) {
            Ok(FileType::RegularFile | FileType::BlockDevice) => {
                let mut text = [0; 256];
                let flags = self.read(&mut text, thread, "fdinfo", Some(fd));
                flags
                    .ok()
                    .and_then(flags_in)
                    .is_none_or(|flags| flags & libc::O_DIRECT as u32 != 0)
            }
            Ok(_) => false,
            Err(_) => true,
        }
    }

    /// What a descriptor is of. Asks no server of a file system.
    fn kind(&self, thread: i32, fd: i32) -> Result<FileType, Errno> {
        let mut path = [0; 64];
        let path = path_of(&mut path, thread, "fd", Some(fd));
        let (flags, mask) = (AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
        let found = statx(&self.tasks, path, flags, mask)?;
        Ok(FileType::from_raw_mode(u32::from(found.stx_mode)))
    }

    /// The beginning of a file of a thread's.
    fn read<'a>(
        &self,
        text: &'a mut [u8; 256],
        thread: i32,
        file: &str,
        entry: Option<i32>,
    ) -> Result<&'a str, Errno> {
        let mut path = [0; 64];
        let path = path_of(&mut path, thread, file, entry);
        let file = openat(
            &self.tasks,
            path,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let n = rustix::io::read(file, &mut text[..])?;
        Ok(core::str::from_utf8(&text[..n]).unwrap_or_default())
    }
}

impl Doubt {
    /// Whether it is no doubt any more.
    fn is_gone(&mut self, seen: Seen) -> bool {
        match seen {
            Seen::Elsewhere => true,
            Seen::Transfer => {
                self.transfer = true;
                self.since = processor_time(self.thread);
                false
            }
            Seen::Running => processor_time(self.thread).saturating_sub(self.since) > AT_WORK,
        }
    }
}

/// The number and the arguments in the text of `/proc/TID/syscall`; a number
/// of -1 outside of any. `None`: it runs.
fn call(text: &str) -> Option<(i64, [usize; 6])> {
    let mut words = text.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let mut arguments = [0; 6];
    if number >= 0 {
        for argument in &mut arguments {
            *argument = usize::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        }
    }
    Some((number, arguments))
}

/// The flags in the text of `/proc/PID/fdinfo/FD`.
fn flags_in(text: &str) -> Option<u32> {
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(flags.trim(), 8).ok()
}

/// The first page of `range` that `buffer` has a part of.
fn meets(buffer: Range<usize>, range: &Range<usize>) -> Option<usize> {
    let start = buffer.start.max(range.start);
    (start < buffer.end.min(range.end)).then_some(start & !(PAGE - 1))
}

/// The same for the `len` buffers in the table at `at`. An error: the table
/// can't be read.
fn pieces_meet(at: usize, len: usize, range: &Range<usize>) -> Result<Option<usize>, ()> {
    if len > MOST_PIECES {
        return Err(());
    }
    let table = at..at.saturating_add(len * size_of::<libc::iovec>());
    if !is_present(&table) {
        return Err(());
    }
    let mut pieces = [[0usize; 2]; MOST_PIECES];
    let iov = |base: *mut [usize; 2], len| libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    };
    let local = iov(pieces.as_mut_ptr(), table.len());
    let remote = iov(at as *mut [usize; 2], table.len());
    // SAFETY: the kernel writes so many pairs of words, and looks itself
    // whether the table is there.
    let n = unsafe {
        libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    if usize::try_from(n) != Ok(table.len()) {
        return Err(());
    }
    let met = |&[base, len]: &[usize; 2]| meets(base..base.saturating_add(len), range);
    Ok(pieces[..len].iter().find_map(met))
}

/// Whether at most two pages are in memory. What is behind a placeholder is
/// not, and who read it would wait for himself.
fn is_present(table: &Range<usize>) -> bool {
    let page = table.start & !(PAGE - 1);
    let mut present = [0u8; 2];
    let len = table.end - page;
    // SAFETY: writes a byte for each page, of which there are two at most.
    let told = len <= present.len() * PAGE
        && unsafe { libc::mincore(page as *mut _, len, present.as_mut_ptr()) } == 0;
    let pages = len.div_ceil(PAGE);
    told && present[..pages].iter().all(|page| page & 1 == 1)
}

/// Calls `each` with every number that is the name of an entry, until that is
/// `false`; the last of what it said.
fn each_number(directory: impl AsFd, mut each: impl FnMut(i32) -> bool) -> Result<bool, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let own = openat(directory, c".", flags, Mode::empty())?;
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(own, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let number = entry
            .file_name()
            .to_str()
            .ok()
            .and_then(|name| name.parse().ok());
        if let Some(number) = number
            && !each(number)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// `THREAD/FILE` or `THREAD/FILE/ENTRY`.
fn path_of<'a>(path: &'a mut [u8; 64], thread: i32, file: &str, entry: Option<i32>) -> &'a [u8] {
    let mut left = &mut path[..];
    // Three short words, for which there is room.
    let _ = write!(left, "{thread}/{file}");
    if let Some(entry) = entry {
        let _ = write!(left, "/{entry}");
    }
    let len = 64 - left.len();
    &path[..len]
}

/// For how long a thread of this process was on a processor (ns).
fn processor_time(thread: i32) -> u64 {
    // As pthread_getcpuclockid(3) names the clock of a thread.
    let clock = !thread << 3 | 0b110;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes a time.
    match unsafe { libc::clock_gettime(clock, &raw mut time) } {
        0 => time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64,
        // It has ended, which is seen next.
        _ => 0,
    }
}

fn pause() {
    let time = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: PAUSE,
    };
    let _ = rustix::thread::nanosleep(&time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_of_a_thread_is_understood() {
        let text = "17 0x5 0x7f0000003000 0x1000 0x0 0x16 0x7ffd 0x7ffe75fa87d0 0x7f5ee08ddaec\n";
        let arguments = [5, 0x7f00_0000_3000, 0x1000, 0, 0x16, 0x7ffd];
        assert_eq!(call(text), Some((17, arguments)));
        assert_eq!(
            call("-1 0x7ffe75fa87d0 0x7f5ee08ddaec\n"),
            Some((-1, [0; 6]))
        );
        assert_eq!(call("running\n"), None);
        let text = "pos:\t0\nflags:\t02140002\nmnt_id:\t29\n";
        assert_eq!(flags_in(text), Some(0o2140002));
    }

    #[test]
    fn the_first_page_of_a_buffer_in_the_range_is_told() {
        let range = 0x20_0000..0x40_0000;
        assert_eq!(meets(0x1F_F000..0x20_0000, &range), None);
        assert_eq!(meets(0x1F_F000..0x20_0001, &range), Some(0x20_0000));
        assert_eq!(meets(0x3F_F200..0x50_0000, &range), Some(0x3F_F000));
        assert_eq!(meets(0x40_0000..0x50_0000, &range), None);
        let pieces = [[0x10_0000, 0x1000], [0x30_0200, 0x200usize]];
        let at = pieces.as_ptr() as usize;
        assert_eq!(pieces_meet(at, 1, &range), Ok(None));
        assert_eq!(pieces_meet(at, 2, &range), Ok(Some(0x30_0000)));
        assert_eq!(pieces_meet(8, 1, &range), Err(()), "nothing is there");
        let empty = crate::space::rebind::staging::map_nothing(PAGE).unwrap();
        assert_eq!(pieces_meet(empty, 1, &range), Err(()), "it would wait");
    }

    #[test]
    fn a_descriptor_for_direct_io_is_found() {
        use rustix::event::epoll;
        use rustix::fd::AsRawFd;
        use rustix::pipe::{PipeFlags, pipe_with};
        let transfers = Transfers::open().unwrap();
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        // On the disk that the build is on: `/tmp` need not have direct I/O.
        let program = std::env::current_exe().unwrap();
        let file = |flags| open(&program, OFlags::RDONLY | flags, Mode::empty());
        let plain = file(OFlags::CLOEXEC).unwrap();
        assert!(!transfers.is_direct(own, plain.as_raw_fd()));
        // Of a pipe O_DIRECT makes packets.
        let (_read, write) = pipe_with(PipeFlags::DIRECT).unwrap();
        assert!(!transfers.is_direct(own, write.as_raw_fd()));
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        assert!(!transfers.is_direct(own, events.as_raw_fd()));
        assert!(transfers.is_direct(own, -1), "closed by now");
        match file(OFlags::DIRECT) {
            Ok(direct) => {
                assert!(transfers.is_direct(own, direct.as_raw_fd()));
                assert!(transfers.any_direct(own));
            }
            Err(errno) => println!("SKIPPED: no direct I/O here: {errno}"),
        }
    }
}
