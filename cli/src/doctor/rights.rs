//! What the calling user may do: userfaultfd, io_uring, limits; the library and its settings.

use std::env;
use std::path::Path;

use allocator::Config;
use allocator::config::SpillDir;
use allocator::space::rebind::Uffd;
use rustix::fs::{Mode, OFlags, open, statfs};
use rustix::process::{Resource, getrlimit};

use super::finding::Finding;
use super::machine::Machine;
use crate::conf;
use crate::failure::Failure;
use crate::run::find_library;
use crate::size::Bytes;

/// What a client of the broker takes of the broker's descriptors.
const PER_CLIENT: u64 = 3;

pub(super) fn look(machine: &Machine) -> Vec<Finding> {
    let text = env::var(conf::VARIABLE).ok();
    let mut findings = vec![library()];
    findings.extend(settings(conf::of_file(), text.as_deref()));
    findings.extend([userfaultfd(), io_uring(machine)]);
    findings.extend(limits());
    findings
}

fn library() -> Finding {
    match find_library() {
        Ok(path) => Finding::ok("library", path.display().to_string()),
        Err(error) => Finding::missing(
            "library",
            error.to_string(),
            "dcm run has nothing to put under a program",
        )
        .mend("cargo build --release"),
    }
}

/// The settings that programs started from here get, and the directory in them.
fn settings(file: Result<Config, Failure>, text: Option<&str>) -> Vec<Finding> {
    let what = "settings";
    let refused = |error: Failure| {
        Finding::missing(
            what,
            error.to_string(),
            "dcm run refuses them; the preloaded library goes on without that one",
        )
    };
    let file = match file {
        Ok(file) => file,
        Err(error) => return vec![refused(error)],
    };
    match conf::join(file, text, None, None) {
        Ok(settings) => {
            let found = match settings.changed() {
                changed if changed.is_empty() => "the defaults".to_owned(),
                changed => changed,
            };
            let dir = settings.config.spill_dir;
            vec![Finding::ok(what, found), spill(dir.as_ref())]
        }
        Err(error) => vec![refused(error).mend(format!("unset {}", conf::VARIABLE))],
    }
}

fn spill(dir: Option<&SpillDir>) -> Finding {
    /// What statfs(2) calls tmpfs.
    const TMPFS: u64 = 0x0102_1994;
    let what = "spill_dir";
    let Some(dir) = dir else {
        return Finding::ok(
            what,
            "none: live data that finds no room stays, and a recall of it is refused",
        );
    };
    let path = dir.as_c_str();
    let shown = path.to_string_lossy();
    // As the heap does it: a file without a name.
    let file = open(
        path,
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::RUSR | Mode::WUSR,
    );
    let file = match file {
        Ok(file) => file,
        Err(error) => {
            let finding = Finding::missing(
                what,
                format!("{shown}: {error}"),
                "no file can be made there (O_TMPFILE), so nothing is spilled",
            );
            let there = Path::new(&*shown).exists();
            return if there {
                finding
            } else {
                finding.mend(format!("mkdir -p {shown}"))
            };
        }
    };
    drop(file);
    match statfs(path) {
        Ok(fs) if fs.f_type as u64 == TMPFS => Finding::hint(
            what,
            format!("{shown} is a tmpfs"),
            "what is spilled there is in DRAM all the same: name a directory on a disk",
        ),
        Ok(fs) => {
            let free = fs.f_bavail.saturating_mul(fs.f_frsize.unsigned_abs());
            Finding::ok(what, format!("{shown}, {} free", Bytes(free)))
        }
        Err(error) => Finding::hint(what, format!("{shown}: {error}"), "its room is not known"),
    }
}

fn userfaultfd() -> Finding {
    let what = "userfaultfd";
    match Uffd::open(None) {
        Ok(uffd) if uffd.takes_kernel_faults() => {
            Finding::ok(what, "with faults in the kernel: live memory can be moved")
        }
        Ok(_) => Finding::hint(
            what,
            "for faults of the program only",
            "live memory moves only under a broker of root, which lends its right, or with moves:user, \
             and then system calls that meet it fail",
        )
        .mend("sudo sysctl -w vm.unprivileged_userfaultfd=1"),
        Err(error) => Finding::missing(
            what,
            error.to_string(),
            "live memory can't be moved: recalls get back only what is free",
        ),
    }
}

fn io_uring(machine: &Machine) -> Finding {
    let what = "io_uring";
    // struct io_uring_params has 120 bytes (io_uring_setup(2)).
    let mut parameters = [0u64; 15];
    // SAFETY: the kernel reads and writes the structure, which is large enough
    // and aligned; what it returns is a new descriptor or an error.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    if result >= 0 {
        // SAFETY: the descriptor is new, and nobody else knows it.
        unsafe { libc::close(result as libc::c_int) };
        return Finding::ok(what, "there");
    }
    let error = std::io::Error::last_os_error();
    let disabled = machine.read("proc/sys/kernel/io_uring_disabled");
    let finding = Finding::hint(
        what,
        error.to_string(),
        "spilling to a file and its coming back are slower, one granule at a time",
    );
    match disabled.as_deref() {
        Some("1" | "2") => finding.mend("sudo sysctl -w kernel.io_uring_disabled=0"),
        _ => finding,
    }
}

fn limits() -> Vec<Finding> {
    let text = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |n| Bytes(n).to_string());
    let locked = getrlimit(Resource::Memlock).current;
    let addresses = getrlimit(Resource::As).current;
    let files = getrlimit(Resource::Nofile).maximum;
    let mut findings = Vec::new();
    findings.push(match locked {
        Some(bytes) if bytes < 8 << 20 && !rustix::process::geteuid().is_root() => Finding::hint(
            "locked memory",
            text(locked),
            "buffers registered with io_uring may be refused on kernels before 5.12",
        )
        .mend("ulimit -l unlimited"),
        _ => Finding::ok("locked memory", text(locked)),
    });
    findings.push(match addresses {
        Some(_) => Finding::missing(
            "address space",
            text(addresses),
            "the heap's addresses and the device's memory don't fit: everything stays in DRAM",
        )
        .mend("ulimit -v unlimited"),
        None => Finding::ok("address space", text(addresses)),
    });
    let clients = files.map(|files| files / PER_CLIENT);
    findings.push(match clients {
        Some(clients) if clients < 500 => Finding::hint(
            "descriptors",
            format!("{} at most", files.unwrap_or(0)),
            &format!("a broker started here has room for about {clients} programs"),
        )
        .mend("ulimit -Hn 65536"),
        _ => Finding::ok(
            "descriptors",
            files.map_or("unlimited".to_owned(), |files| format!("{files} at most")),
        ),
    });
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn settings_and_their_directory_are_tried() {
        let verdicts = |text: Option<&str>| -> Vec<Verdict> {
            let found = settings(Ok(Config::DEFAULT), text);
            found.iter().map(|f| f.verdict).collect()
        };
        assert_eq!(verdicts(None), [Verdict::Ok; 2]);
        assert_eq!(verdicts(Some("placment:dc")), [Verdict::Missing]);
        let default = || Ok(Config::DEFAULT);
        let found = settings(default(), Some("spill_dir:/nonexistent/spill"));
        assert_eq!(found[1].verdict, Verdict::Missing);
        assert_eq!(
            found[1].mend.as_deref(),
            Some("mkdir -p /nonexistent/spill")
        );
        let here = env!("CARGO_MANIFEST_DIR");
        let found = settings(default(), Some(&format!("spill_dir:{here}")));
        assert_ne!(found[1].verdict, Verdict::Missing, "{found:?}");
        assert!(found[1].found.starts_with(here), "{found:?}");
    }
}
