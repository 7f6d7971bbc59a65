//! Memory that is lost where nobody is told: SIGBUS after one line, as the
//! kernel's own, through the program's handler if it has one. Each case is a
//! process of its own.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use allocator::source::WindowRange;
use allocator::space::{Backing, GRANULE};
use allocator::{Config, Heap, Placement};
use common::MemfdSource;
use libc::{c_int, c_void, siginfo_t};

static HEAP: Heap = Heap::new();
const ROLE: &str = "DCM_TEST_ROLE";
const LINE: &str = "is lost: its device took it by force";
/// What the program's own handler says with its exit code.
const HANDLED: i32 = 42;
const BUS_MCEERR_AR: c_int = 4;

extern "C" fn with_info(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel's.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    let right = signal == libc::SIGBUS && code == libc::BUS_ADRERR && HEAP.space().contains(addr);
    // SAFETY: ends the process.
    unsafe { libc::_exit(if right { HANDLED } else { 1 }) };
}

extern "C" fn plain(signal: c_int) {
    let right = signal == libc::SIGBUS;
    // SAFETY: ends the process.
    unsafe { libc::_exit(if right { HANDLED } else { 1 }) };
}

fn handle(handler: usize, flags: c_int) {
    // SAFETY: handlers of the type that the flags say.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        assert_eq!(
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()),
            0
        );
    }
}

fn extent_of(block: *mut u8) -> WindowRange {
    let Some(Backing::Extent(offset)) = HEAP.space().backing_of(block.addr()) else {
        panic!("not on an extent");
    };
    let len = GRANULE as u64;
    WindowRange { offset, len }
}

/// Has the next access to a page of anonymous memory raise SIGBUS as a machine
/// check does (`UFFDIO_POISON`, Linux 6.6). `false`: not here.
fn poison(page: *mut u8) -> bool {
    #[repr(C)]
    struct Poison {
        page: *mut u8,
        len: u64,
        mode: u64,
        done: i64,
    }
    const API: [u64; 3] = [0xaa, 1 << 14, 0];
    const UFFDIO_API: u64 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;
    const UFFDIO_POISON: u64 = 0xc020_aa08;
    let mut poison = Poison {
        page,
        len: 4096,
        mode: 0,
        done: 0,
    };
    // Missing pages, in the place of the mode.
    let mut register = [page as u64, 4096, 1, 0];
    let mut api = API;
    // SAFETY: structures of userfaultfd(2), and a page of this process's.
    unsafe {
        // For faults of the program's own (UFFD_USER_MODE_ONLY).
        let uffd = libc::syscall(libc::SYS_userfaultfd, 1) as c_int;
        uffd >= 0
            && libc::ioctl(uffd, UFFDIO_API, &mut api) == 0
            && libc::ioctl(uffd, UFFDIO_REGISTER, &mut register) == 0
            && libc::madvise(page.cast(), 4096, libc::MADV_DONTNEED) == 0
            && libc::ioctl(uffd, UFFDIO_POISON, &mut poison) == 0
    }
}

/// SIGBUS as a machine check sends it; only to oneself may one (rt_sigqueueinfo(2)).
fn machine_check(addr: *mut u8) {
    #[repr(C)]
    struct Fault {
        signo: c_int,
        errno: c_int,
        code: c_int,
        pad: c_int,
        addr: *mut u8,
        rest: [u64; 13],
    }
    let fault = Fault {
        signo: libc::SIGBUS,
        errno: 0,
        code: BUS_MCEERR_AR,
        pad: 0,
        addr,
        rest: [0; 13],
    };
    // SAFETY: as large as a siginfo_t, to this thread.
    let sent = unsafe {
        let (process, thread) = (libc::getpid(), libc::gettid());
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            process,
            thread,
            libc::SIGBUS,
            &fault,
        )
    };
    assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
}

fn play(role: &str) {
    match role {
        "chained" => handle(with_info as *const () as usize, libc::SA_SIGINFO),
        "chained plainly" => handle(plain as *const () as usize, 0),
        "ignored" => handle(libc::SIG_IGN, 0),
        // Rust's own is there otherwise.
        _ => handle(libc::SIG_DFL, 0),
    }
    let source = MemfdSource::leak(16);
    assert!(HEAP.start(Config {
        placement: Placement::Dram,
        zero_lost: role == "zero",
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if role == "handled later" {
        handle(with_info as *const () as usize, libc::SA_SIGINFO);
    }
    let arena = HEAP.arena("mine").build().unwrap();
    let other = HEAP.arena("other").on_lost(|_| ()).build().unwrap();
    let block = |arena: &allocator::Arena| {
        let block = arena.allocate_bytes(GRANULE, GRANULE, false);
        // SAFETY: a new block of this size.
        unsafe { block.write_bytes(5, GRANULE) };
        block
    };
    let (mine, others) = (block(&arena), block(&other));
    // SAFETY: live blocks.
    let read = |block: *mut u8| unsafe { block.read_volatile() };
    match role {
        "sent" => {
            // SAFETY: a signal to this process.
            unsafe { libc::raise(libc::SIGBUS) };
            return println!("goes on");
        }
        "broken DRAM" => {
            let arena = HEAP.arena("dram").placement(Placement::Dram);
            let arena = arena.on_lost(|_| ()).build().unwrap();
            let dram = block(&arena);
            assert_eq!(HEAP.space().backing_of(dram.addr()), Some(Backing::Dram));
            if !poison(dram) {
                return println!("SKIPPED: no UFFDIO_POISON");
            }
            machine_check(dram);
            return println!("read {}", read(dram));
        }
        "broken" => {
            machine_check(others);
            assert_eq!((read(others), read(mine)), (0, 5));
            assert!(other.is_lost() && source.gone_granules() == 0);
            println!("zero");
            machine_check(mine);
            read(mine);
            // No hardware tries this access again.
            machine_check(mine);
            return println!("goes on");
        }
        _ => {}
    }
    source.take_by_force(&[extent_of(mine)]);
    let end = Instant::now() + Duration::from_secs(20);
    while source.gone_granules() > 0 {
        assert!(Instant::now() < end, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(read(others), 5);
    assert!(arena.is_lost() && !other.is_lost());
    if role != "zero" {
        // The kernel does not read zeroes either.
        let (_from, to) = rustix::pipe::pipe().unwrap();
        // SAFETY: a live block.
        let bytes = unsafe { std::slice::from_raw_parts(mine, 4096) };
        assert_eq!(rustix::io::write(&to, bytes), Err(rustix::io::Errno::FAULT));
    }
    println!("told");
    println!("read {}", read(mine));
}

struct Played {
    stdout: String,
    output: Output,
    lines: usize,
}

fn process(role: &str) -> Played {
    let this = std::env::current_exe().unwrap();
    let output = Command::new(this)
        .args(["--nocapture", "--test-threads=1", "as_the_kernel_has_it"])
        .env(ROLE, role)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    println!("{role}: {:?}\n{stdout}{stderr}", output.status);
    let lines = stderr.lines().filter(|line| line.contains("dcmalloc: "));
    let lines = lines.count();
    Played {
        stdout,
        output,
        lines,
    }
}

#[test]
fn as_the_kernel_has_it() {
    if let Ok(role) = std::env::var(ROLE) {
        return play(&role);
    }
    for role in ["default", "ignored"] {
        let played = process(role);
        assert_eq!(played.output.status.signal(), Some(libc::SIGBUS), "{role}");
        assert!(played.stdout.contains("told") && !played.stdout.contains("read "));
        let stderr = String::from_utf8_lossy(&played.output.stderr);
        assert!(stderr.contains(LINE) && played.lines == 1, "{role}");
    }
    // The program's own handler, with the line unless it came after ours.
    for (role, lines) in [("chained", 1), ("chained plainly", 1), ("handled later", 0)] {
        let played = process(role);
        assert_eq!(played.output.status.code(), Some(HANDLED), "{role}");
        assert!(played.stdout.contains("told") && !played.stdout.contains("read "));
        assert_eq!(played.lines, lines, "{role}");
    }
    let played = process("zero");
    assert!(played.output.status.success() && played.stdout.contains("read 0"));
    assert_eq!(played.lines, 0);
    // What is no loss is nobody's business.
    let played = process("sent");
    assert_eq!(played.output.status.signal(), Some(libc::SIGBUS));
    assert!(!played.stdout.contains("goes on"));
    assert_eq!(played.lines, 0);
    // What nothing can mend is not tried for ever.
    let played = process("broken DRAM");
    if !played.stdout.contains("SKIPPED") {
        assert_eq!(played.output.status.signal(), Some(libc::SIGBUS));
        assert!(!played.stdout.contains("read "));
        assert_eq!(played.lines, 1);
    }
    let played = process("broken");
    assert_eq!(played.output.status.signal(), Some(libc::SIGBUS));
    assert!(played.stdout.contains("zero") && !played.stdout.contains("goes on"));
    assert_eq!(played.lines, 1);
}
