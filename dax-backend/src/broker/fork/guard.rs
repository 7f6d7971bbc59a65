//! What becomes of a family whose fork server was killed: nobody has what its
//! members have not touched yet, and a userfaultfd that is closed makes zeroes
//! of it. So somebody holds them open, and whoever touches it gets SIGBUS.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::uffd::{Event, Filled, PAGE, Uffd};
use crate::broker::protocol::GRANULE;

/// Between two looks whether the members live.
const PATIENCE: Duration = Duration::from_millis(250);
/// Names nobody, see `Kind::ForkJoin`.
const NOBODY: [u64; 2] = [u64::MAX; 2];

/// Guards the members of a family, for as long as one lives. `userfaultfds`
/// are theirs, `mark` as in `ForkFamily`.
///
/// # Errors
/// Those of poll(2) itself.
pub fn guard(userfaultfds: Vec<OwnedFd>, mark: u64) -> Result<(), Errno> {
    let members = userfaultfds.into_iter().filter_map(|fd| Uffd::new(fd).ok());
    let mut members: Vec<Uffd> = members.collect();
    // The server may have read of a wait, and not have ended it.
    members.iter().for_each(Uffd::wake_all);
    let mut waits: Vec<(usize, u64)> = Vec::new();
    while !members.is_empty() {
        if waits.is_empty() {
            members.retain(|member| !member.is_gone());
        }
        let mut fds: Vec<PollFd<'_>> = members
            .iter()
            .map(|member| PollFd::from_borrowed_fd(member.as_fd(), PollFlags::IN))
            .collect();
        let patience = match waits.is_empty() {
            true => PATIENCE,
            false => Duration::from_millis(1),
        };
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        match poll(&mut fds, Some(&patience)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let mut born = Vec::new();
        for (index, member) in members.iter().enumerate() {
            while let Ok(event) = member.next() {
                match event {
                    Some(Event::Fault(addr)) => waits.push((index, addr)),
                    Some(Event::Fork(child)) => born.push(child),
                    None => {}
                }
            }
        }
        waits.retain(|&(index, addr)| {
            let done = match addr - addr % PAGE == mark {
                true => members[index].show(mark, NOBODY),
                false => members[index].poison(addr - addr % GRANULE),
            };
            done == Filled::Later
        });
        members.append(&mut born);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::fork::uffd::tests::{served, words_at};
    use std::sync::mpsc;

    #[test]
    fn who_waited_for_the_server_hears_of_its_end() {
        let (server, mark) = served();
        let (say, hear) = mpsc::channel();
        std::thread::spawn(move || say.send(words_at(mark)));
        let mut members = [PollFd::new(&server, PollFlags::IN)];
        poll(&mut members, None).unwrap();
        // It dies with what it has read.
        assert!(matches!(server.next(), Ok(Some(Event::Fault(at))) if at == mark));
        let fd = server.as_fd().try_clone_to_owned().unwrap();
        std::thread::spawn(move || guard(vec![fd], mark));
        let seen = hear.recv_timeout(Duration::from_secs(20));
        assert_eq!(seen, Ok(NOBODY), "it still waits");
    }
}
