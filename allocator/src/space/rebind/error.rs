//! Why granules were not moved.
#![forbid(unsafe_code)]

use super::mapping::Change;
use super::placeholder::PlaceholderError;
use super::taken::Taken;
use super::uffd::UffdError;
use core::ops::Range;
use rustix::io::Errno;

/// Why the mover could not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No userfaultfd.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// Without it changed mappings cannot be recognised.
    #[error("/proc/self/smaps cannot be read ({0}): mount /proc to have granules moved")]
    NoProc(Errno),
    /// Threads or descriptors are exhausted.
    #[error("the monitor thread cannot start ({0}): raise RLIMIT_NPROC or RLIMIT_NOFILE")]
    Monitor(Errno),
}

/// Why granules were not moved. Where the variant does not say otherwise, all
/// of them have their old backing and content.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RebindError {
    /// The program changed the mapping of some granule of the run.
    #[error(
        "granules at {:#x}..{:#x} stay where they are: {change}; undo it to have them moved",
        at.start, at.end
    )]
    Changed {
        /// The run.
        at: Range<usize>,
        /// What is different.
        change: Change,
    },
    /// The new backing or the placeholder could not be mapped.
    #[error(
        "no memory to move granules to ({0}): DRAM, RLIMIT_AS, RLIMIT_MEMLOCK, overcommit or \
         vm.max_map_count is exhausted"
    )]
    NoMemory(Errno),
    /// The placeholder had pages, so that nobody would have waited.
    #[error("a placeholder has pages in memory, so granules cannot be moved safely")]
    Populated,
    /// Live pages of an extent cannot be read: it has gone, or is poisoned.
    #[error("granule {granule:#x} cannot be moved: its extent cannot be read ({errno})")]
    Unreadable {
        /// The address of the granule.
        granule: usize,
        /// `ENOMEM`, `EFAULT` or `EHWPOISON`.
        errno: Errno,
    },
    /// A read or write with `O_DIRECT` under way there did not end in time.
    #[error(
        "granules at {:#x}..{:#x} stay where they are: a read or write with O_DIRECT uses them; \
         try again when it has ended",
        at.start, at.end
    )]
    InTransfer {
        /// The run.
        at: Range<usize>,
    },
    /// The kernel refused something else.
    #[error("the kernel refused a step of the move ({0})")]
    Refused(Errno),
    /// Some granules could not be given their new backing, and have their old
    /// one and their content again. The others are moved.
    #[error("{} granules of a run were not moved: the kernel cannot map them ({errno})",
        stayed.count_ones())]
    Partly {
        /// A bit per granule of the run that was not moved.
        stayed: u32,
        /// Why the first of them was not.
        errno: Errno,
    },
    /// Neither new nor old backing could be mapped. The granules that still
    /// wait keep their content; call [`put_back`] until it succeeds, after
    /// which all have their old backing but those that were moved.
    ///
    /// [`put_back`]: super::Mover::put_back
    #[error("the kernel maps neither new nor old backing ({errno}): threads wait for it")]
    Stuck {
        /// The granules that wait, and their content.
        taken: Taken,
        /// A bit per granule of the run that was moved.
        moved: u32,
        /// Why.
        errno: Errno,
    },
}

impl From<PlaceholderError> for RebindError {
    fn from(error: PlaceholderError) -> Self {
        match error {
            PlaceholderError::Populated => Self::Populated,
            PlaceholderError::System(errno) => errno.into(),
        }
    }
}

impl From<Errno> for RebindError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOMEM | Errno::AGAIN => Self::NoMemory(errno),
            _ => Self::Refused(errno),
        }
    }
}
