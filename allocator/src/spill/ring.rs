//! Several writes at a time, by io_uring (io_uring(7)).

use io_uring::{IoUring, opcode, types};
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;

use super::{Piece, write_all};

/// Writes under way at once: a granule each, or less where pages were freed.
const DEPTH: usize = 16;

/// A ring that only this process's own threads know.
pub(super) struct Ring(IoUring);

impl Ring {
    pub(super) fn new() -> Result<Self, Errno> {
        let built = IoUring::builder().dontfork().build(DEPTH as u32);
        built.map(Self).map_err(|error| errno(&error))
    }

    /// Writes all pieces.
    ///
    /// # Errors
    /// `NOSYS`: io_uring is denied, and nothing is under way; otherwise what a
    /// write ended with. In any case none is under way any more.
    ///
    /// # Safety
    /// The pieces are readable, and nobody writes to them.
    pub(super) unsafe fn write(
        &mut self,
        file: BorrowedFd<'_>,
        pieces: impl Iterator<Item = Piece>,
    ) -> Result<(), Errno> {
        let mut pieces = pieces.peekable();
        let mut slots: [Option<Piece>; DEPTH] = [None; DEPTH];
        let mut result = Ok(());
        loop {
            while result.is_ok()
                && pieces.peek().is_some()
                && let Some(slot) = slots.iter().position(Option::is_none)
            {
                let Some(piece) = pieces.next() else { break };
                let entry =
                    opcode::Write::new(types::Fd(file.as_raw_fd()), piece.from, piece.len as u32)
                        .offset(piece.offset)
                        .build()
                        .user_data(slot as u64);
                // SAFETY: this function returns when the write has ended, and
                // the caller keeps the piece until then.
                if unsafe { self.0.submission().push(&entry) }.is_err() {
                    result = Err(Errno::BUSY);
                }
                slots[slot] = Some(piece);
            }
            if slots.iter().all(Option::is_none) {
                return result;
            }
            match self.0.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) => match errno(&error) {
                    Errno::INTR | Errno::AGAIN | Errno::BUSY => {}
                    // Denied (seccomp): it was from the first call on.
                    _ => return Err(Errno::NOSYS),
                },
            }
            for ended in self.0.completion() {
                let Some(piece) = slots[ended.user_data() as usize].take() else {
                    continue;
                };
                let done = match ended.result() {
                    // SAFETY: the caller's.
                    n if n >= 0 => unsafe { rest(file, piece, n as usize) },
                    n if n == -libc::EINTR || n == -libc::EAGAIN => {
                        // SAFETY: the caller's.
                        unsafe { write_all(file, piece) }
                    }
                    n => Err(Errno::from_raw_os_error(-n)),
                };
                result = result.and(done);
            }
        }
    }
}

/// Writes what a short write left.
///
/// # Safety
/// As [`write_all`].
unsafe fn rest(file: BorrowedFd<'_>, piece: Piece, done: usize) -> Result<(), Errno> {
    let done = done.min(piece.len);
    let rest = Piece {
        // SAFETY: within the piece.
        from: unsafe { piece.from.add(done) },
        len: piece.len - done,
        offset: piece.offset + done as u64,
    };
    // SAFETY: the caller's.
    unsafe { write_all(file, rest) }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO))
}
