//! Memory of one NUMA node, such as CXL memory that the kernel has put online.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::{io, ptr};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use thiserror::Error;

use crate::broker::GRANULE;

/// Nodes that a mask of ours can name; the kernel is built for 1024 at most.
const NODES: usize = 1024;

/// Why a node's memory can't be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NodeError {
    /// There is no such node, or none with memory.
    #[error("there is no NUMA node {node} with memory; this machine has {known}")]
    NoSuchNode {
        /// What was asked for.
        node: u32,
        /// The nodes with memory, as the kernel lists them (`0-1`).
        known: String,
    },
    /// More than is free there.
    #[error(
        "NUMA node {node} has {free} bytes free, and {len} were asked for: ask for less, or have \
         the kernel drop its caches (as root: echo 1 > /proc/sys/vm/drop_caches)"
    )]
    TooLarge {
        /// The node.
        node: u32,
        /// Bytes asked for.
        len: u64,
        /// Its free bytes.
        free: u64,
    },
    /// Memory comes in granules.
    #[error("{len} bytes are not a multiple of 2 MiB, and more than 0")]
    Granules {
        /// Bytes asked for.
        len: u64,
    },
    /// The system refuses to bind memory to the node.
    #[error(
        "memory cannot be bound to NUMA node {node}: {source}; a container needs the capability \
         SYS_NICE for mbind, and the node in its cpuset.mems"
    )]
    Bind {
        /// The node.
        node: u32,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel has no file to put it in.
    #[error("memory for NUMA node {node} cannot be made: {source}")]
    Memory {
        /// The node.
        node: u32,
        /// The system's answer.
        source: io::Error,
    },
}

/// `len` bytes of anonymous memory, to be mapped from its start, whose pages come from `node` and
/// from nowhere else, whoever touches them: a shared policy belongs to the file (numa(7), mbind(2)).
///
/// # Errors
/// See [`NodeError`]; `len` is compared with what is free now, and taken when it is touched.
pub fn node_memory(node: u32, len: u64) -> Result<OwnedFd, NodeError> {
    node_memory_of(Path::new("/sys/devices/system/node"), node, len)
}

fn node_memory_of(nodes: &Path, node: u32, len: u64) -> Result<OwnedFd, NodeError> {
    if len == 0 || !len.is_multiple_of(GRANULE) {
        return Err(NodeError::Granules { len });
    }
    let Some(free) = free_bytes(nodes, node).filter(|_| (node as usize) < NODES) else {
        let known = fs::read_to_string(nodes.join("has_memory")).unwrap_or_default();
        let known = match known.trim() {
            "" => "none (its kernel knows no NUMA)".to_owned(),
            list => list.to_owned(),
        };
        return Err(NodeError::NoSuchNode { node, known });
    };
    if len > free {
        return Err(NodeError::TooLarge { node, len, free });
    }
    let memory = |source: rustix::io::Errno| NodeError::Memory {
        node,
        source: source.into(),
    };
    let file = memfd_create("dcmalloc-node", MemfdFlags::CLOEXEC).map_err(memory)?;
    ftruncate(&file, len).map_err(memory)?;
    bind(&file, len, node)?;
    Ok(file)
}

/// What `node` has free; `None` if it has no memory at all.
fn free_bytes(nodes: &Path, node: u32) -> Option<u64> {
    let text = fs::read_to_string(nodes.join(format!("node{node}/meminfo"))).ok()?;
    let bytes = |name: &str| {
        let line = text.lines().find(|line| line.contains(name))?;
        let kib = line.split_ascii_whitespace().nth_back(1)?;
        kib.parse::<u64>().ok()?.checked_mul(1024)
    };
    let free = bytes(" MemFree:")?;
    (bytes(" MemTotal:")? > 0).then_some(free)
}

/// Gives all of `file` the policy that its pages are on `node`.
fn bind(file: impl AsFd, len: u64, node: u32) -> Result<(), NodeError> {
    let failed = |source| NodeError::Bind { node, source };
    let len = usize::try_from(len).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
    // SAFETY: a new mapping at an address of the kernel's choice, which nobody dereferences.
    let mapped = unsafe {
        mmap(
            ptr::null_mut(),
            len,
            ProtFlags::empty(),
            MapFlags::SHARED,
            file,
            0,
        )
    }
    .map_err(|errno| failed(errno.into()))?;
    let mut mask = [0_u64; NODES / 64];
    mask[node as usize / 64] = 1 << (node % 64);
    // SAFETY: the range is ours, and the mask is as long as is said; the kernel counts one bit
    // more than it reads (mbind(2), BUGS).
    let bound = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            mapped,
            len,
            libc::MPOL_BIND,
            mask.as_ptr(),
            NODES + 1,
            0,
        )
    };
    let result = match bound {
        0 => Ok(()),
        _ => Err(failed(io::Error::last_os_error())),
    };
    // SAFETY: mapped above, and used by nobody.
    let unmapped = unsafe { munmap(mapped, len) };
    debug_assert_eq!(unmapped, Ok(()));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_is_the_files_own() {
        let file = match node_memory(0, 4 * GRANULE) {
            Err(NodeError::NoSuchNode { .. }) => {
                println!("SKIPPED: a kernel without NUMA");
                return;
            }
            result => result.unwrap(),
        };
        let len = 4 * GRANULE as usize;
        // SAFETY: a new mapping at an address of the kernel's choice, never touched.
        let anew = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                &file,
                0,
            )
        }
        .unwrap();
        let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
        let start = format!("{:x} ", anew.addr());
        let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
        assert!(line.contains(" bind:0 "), "{line}");
        // SAFETY: mapped above.
        unsafe { munmap(anew, len) }.unwrap();
    }

    #[test]
    fn what_a_node_cannot_give_is_told_with_what_it_has() {
        let nodes = tempfile::tempdir().unwrap();
        let meminfo = |node: u32, total: u64, free: u64| {
            let directory = nodes.path().join(format!("node{node}"));
            fs::create_dir(&directory).unwrap();
            let text = format!(
                "Node {node} MemTotal:       {total} kB\nNode {node} MemFree:        {free} kB\n"
            );
            fs::write(directory.join("meminfo"), text).unwrap();
        };
        fs::write(nodes.path().join("has_memory"), "0-1\n").unwrap();
        meminfo(1, 8192, 4096);
        meminfo(2, 0, 0);
        let told = |node, len| {
            let error = node_memory_of(nodes.path(), node, len).unwrap_err();
            (error.to_string(), error)
        };
        for node in [2, 7] {
            let (text, error) = told(node, GRANULE);
            assert!(matches!(error, NodeError::NoSuchNode { .. }), "{text}");
            assert!(text.contains("this machine has 0-1"), "{text}");
        }
        let (text, error) = told(1, 3 * GRANULE);
        assert!(matches!(error, NodeError::TooLarge { .. }), "{text}");
        assert!(text.contains("has 4194304 bytes free"), "{text}");
        for len in [0, GRANULE + 4096] {
            let (text, error) = told(1, len);
            assert!(matches!(error, NodeError::Granules { .. }), "{text}");
        }
    }
}
