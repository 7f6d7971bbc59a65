//! Settings of the kernel, as its files tell.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use super::finding::Finding;
use crate::size::Bytes;

const MIB: u64 = 1 << 20;

/// A machine's `/proc` and `/sys`.
pub(super) struct Machine {
    root: PathBuf,
}

impl Machine {
    pub(super) fn real() -> Self {
        Self { root: "/".into() }
    }

    #[cfg(test)]
    pub(super) fn under(root: &Path) -> Self {
        Self { root: root.into() }
    }

    /// A file's text without the blanks around it; `None` if it can't be read.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    /// What is in brackets in a file that lists its choices.
    fn chosen(&self, path: &str) -> Option<String> {
        let text = self.read(path)?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    }

    fn exists(&self, path: &str) -> bool {
        Path::exists(&self.root.join(path))
    }
}

/// Puts `parameter` on the kernel's command line, as Debian and its kin do.
pub(super) fn boot_with(parameter: &str) -> String {
    format!(
        "sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{parameter} /' /etc/default/grub \
         && sudo update-grub && sudo reboot"
    )
}

/// Everything that files tell.
pub(super) fn look(machine: &Machine) -> Vec<Finding> {
    vec![
        kernel(machine),
        huge_pages(machine),
        shared_huge_pages(machine),
        mappings(machine),
        overcommit(machine),
        control_group(machine),
        pressure(machine),
    ]
}

fn kernel(machine: &Machine) -> Finding {
    let what = "kernel";
    let release = machine
        .read("proc/sys/kernel/osrelease")
        .unwrap_or_default();
    let mut parts = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    match version {
        (6, 1..) | (7.., _) => Finding::ok(what, format!("Linux {release}")),
        (5, 9..) | (6, 0) => Finding::hint(
            what,
            format!("Linux {release}"),
            "from 6.1 on, fresh memory is made huge pages ahead of use (MADV_COLLAPSE)",
        ),
        _ => Finding::missing(
            what,
            format!("Linux {release}"),
            "5.9 or newer is needed to keep descriptors from the program (CLOSE_RANGE_UNSHARE)",
        ),
    }
}

fn huge_pages(machine: &Machine) -> Finding {
    let what = "huge pages";
    match machine
        .chosen("sys/kernel/mm/transparent_hugepage/enabled")
        .as_deref()
    {
        Some(choice @ ("always" | "madvise")) => Finding::ok(what, choice),
        Some(choice) => Finding::hint(
            what,
            choice,
            "what moves to DRAM lies in pages of 4 KiB: moves and accesses are slower",
        )
        .mend("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"),
        None => Finding::hint(
            what,
            "not in this kernel (CONFIG_TRANSPARENT_HUGEPAGE)",
            "what moves to DRAM lies in pages of 4 KiB: moves and accesses are slower",
        ),
    }
}

/// Of interest to the software device, whose memory is a memfd.
fn shared_huge_pages(machine: &Machine) -> Finding {
    let what = "shared huge pages";
    match machine
        .chosen("sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .as_deref()
    {
        Some("deny") => Finding::hint(
            what,
            "deny",
            "the software device is in pages of 4 KiB: 512 faults where one would do",
        )
        .mend("echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        Some(choice) => Finding::ok(what, format!("{choice} (the broker makes them itself)")),
        None => Finding::ok(what, "not in this kernel; the software device does without"),
    }
}

/// A granule that has moved is a mapping of its own, and so is each neighbour
/// of another kind.
fn mappings(machine: &Machine) -> Finding {
    let what = "max_map_count";
    let Some(count) = machine.number("proc/sys/vm/max_map_count") else {
        return Finding::hint(what, "can't be read", "how much may be moved is not known");
    };
    let memory = machine
        .read("proc/meminfo")
        .and_then(|text| {
            let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok()
        })
        .unwrap_or(0)
        * 1024;
    let reach = count.saturating_mul(MIB);
    let found = format!(
        "{count}, enough for {} in granules that moved",
        Bytes(reach)
    );
    if reach >= memory {
        Finding::ok(what, found)
    } else {
        Finding::hint(
            what,
            found,
            &format!(
                "the machine has {}: a heap that large may find that no more of it can be moved",
                Bytes(memory)
            ),
        )
        .mend(format!(
            "sudo sysctl -w vm.max_map_count={}",
            memory.div_ceil(MIB).next_power_of_two()
        ))
    }
}

fn overcommit(machine: &Machine) -> Finding {
    let what = "overcommit";
    match machine.number("proc/sys/vm/overcommit_memory") {
        Some(2) => Finding::hint(
            what,
            "2 (strict)",
            "DRAM that granules move to is counted in full; moves may be refused early",
        )
        .mend("sudo sysctl -w vm.overcommit_memory=0"),
        Some(mode) => Finding::ok(what, mode.to_string()),
        None => Finding::ok(what, "can't be read"),
    }
}

fn control_group(machine: &Machine) -> Finding {
    let what = "memory limit";
    let groups = machine.read("proc/self/cgroup").unwrap_or_default();
    let follows = "moving live data to DRAM is not bounded by the group's limit: set dram_limit";
    let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Finding::hint(what, "no control group of version 2", follows);
    };
    let mut group = group.trim_end_matches('/');
    let mut least: Option<(u64, String)> = None;
    let mut seen = false;
    while !group.is_empty() {
        let folder = format!("sys/fs/cgroup{group}");
        let file = |name: &str| format!("{folder}/{name}");
        seen |= machine.exists(&file("memory.max"));
        if let (Some(limit), Some(used)) = (
            machine.number(&file("memory.max")),
            machine.number(&file("memory.current")),
        ) {
            let room = limit.saturating_sub(used);
            if least.as_ref().is_none_or(|(other, _)| room < *other) {
                least = Some((room, group.to_owned()));
            }
        }
        group = &group[..group.rfind('/').unwrap_or(0)];
    }
    match least {
        Some((room, group)) if room < 256 * MIB => Finding::hint(
            what,
            format!("{} left in {group}", Bytes(room)),
            "little DRAM to move live data to: recalls may be refused, or spill to a file",
        )
        .mend(format!(
            "sudo sh -c 'echo max > /sys/fs/cgroup{group}/memory.max'"
        )),
        Some((room, group)) => Finding::ok(what, format!("{} left in {group}", Bytes(room))),
        None if seen => Finding::ok(what, "none"),
        None if groups.lines().any(|line| line.contains(":memory:")) => Finding::hint(
            what,
            "memory is under control groups of version 1, whose limits are not seen",
            follows,
        )
        .mend(boot_with("systemd.unified_cgroup_hierarchy=1")),
        None => Finding::ok(what, "none"),
    }
}

fn pressure(machine: &Machine) -> Finding {
    let what = "memory pressure";
    match machine.read("proc/pressure/memory") {
        Some(text) => {
            let some = text.lines().next().unwrap_or_default();
            Finding::ok(what, some.to_owned())
        }
        None => Finding::hint(
            what,
            "/proc/pressure/memory can't be read",
            "pressure on DRAM is found by polling only",
        )
        .mend(boot_with("psi=1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let machine = Machine::under(root.path());
        (root, machine)
    }

    const THP: &str = "sys/kernel/mm/transparent_hugepage";

    #[test]
    fn a_good_machine_has_nothing_to_mend() {
        let (_root, machine) = machine(&[
            ("proc/sys/kernel/osrelease", "6.12.1-amd64\n"),
            (&format!("{THP}/enabled"), "always [madvise] never\n"),
            (
                &format!("{THP}/shmem_enabled"),
                "always within_size [advise] never deny force\n",
            ),
            ("proc/sys/vm/max_map_count", "1048576\n"),
            ("proc/meminfo", "MemTotal:       65536000 kB\n"),
            ("proc/sys/vm/overcommit_memory", "0\n"),
            ("proc/self/cgroup", "0::/a.slice/b\n"),
            ("sys/fs/cgroup/a.slice/memory.max", "max\n"),
            ("sys/fs/cgroup/a.slice/memory.current", "4096\n"),
            ("proc/pressure/memory", "some avg10=0.00\nfull avg10=0.00\n"),
        ]);
        let findings = look(&machine);
        assert!(
            findings.iter().all(|f| f.verdict == Verdict::Ok),
            "{findings:#?}"
        );
    }

    #[test]
    fn a_bad_machine_is_told_what_mends_it() {
        let (_root, machine) = machine(&[
            ("proc/sys/kernel/osrelease", "5.4.0\n"),
            (&format!("{THP}/enabled"), "always madvise [never]\n"),
            (
                &format!("{THP}/shmem_enabled"),
                "always within_size advise never [deny] force\n",
            ),
            ("proc/sys/vm/max_map_count", "65530\n"),
            ("proc/meminfo", "MemTotal:       268435456 kB\n"),
            ("proc/sys/vm/overcommit_memory", "2\n"),
            ("proc/self/cgroup", "0::/a.slice/b\n"),
            ("sys/fs/cgroup/a.slice/memory.max", "104857600\n"),
            ("sys/fs/cgroup/a.slice/memory.current", "52428800\n"),
        ]);
        let findings = look(&machine);
        let of = |what| findings.iter().find(|f| f.what == what).unwrap();
        assert_eq!(of("kernel").verdict, Verdict::Missing);
        for (what, mend) in [
            ("huge pages", "echo madvise | sudo tee"),
            ("shared huge pages", "shmem_enabled"),
            ("max_map_count", "sudo sysctl -w vm.max_map_count=262144"),
            ("overcommit", "vm.overcommit_memory=0"),
            ("memory limit", "/sys/fs/cgroup/a.slice/memory.max"),
            ("memory pressure", "psi=1"),
        ] {
            let finding = of(what);
            assert_eq!(finding.verdict, Verdict::Hint, "{finding:?}");
            assert!(finding.mend.as_ref().unwrap().contains(mend), "{finding:?}");
        }
        assert_eq!(of("memory limit").found, "50M left in /a.slice");
    }

    #[test]
    fn a_machine_without_any_file_is_no_crash() {
        let (_root, machine) = machine(&[]);
        assert_eq!(look(&machine).len(), 7);
    }
}
