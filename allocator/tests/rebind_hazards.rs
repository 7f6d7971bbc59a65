//! What programs do to their memory, their descriptors and their limits, and
//! what a rebind makes of it.

mod rebind_rig;

use allocator::space::rebind::{
    Change, GRANULE, LivePages, Memory, Mover, RebindError, Spare, StartError, Step, UffdError,
};
use rebind_rig::{
    Heap, PAGE, Stop, go_round, in_own_process, mappings_in, move_run, on_mover, pages_present,
    under_a_writer,
};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::mm::{MlockAllFlags, MprotectFlags, mlock, mlockall, mprotect, munmap};
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const ALL: LivePages = LivePages::ALL;

fn pattern(granule: usize, page: usize) -> u64 {
    (granule * 1000 + page) as u64 | 1 << 40
}

/// Writes a word to each page of each granule.
fn fill(heap: &Heap) {
    for granule in 0..heap.granules {
        for page in 0..512 {
            // SAFETY: a word of the heap.
            unsafe {
                heap.word(granule, page * PAGE)
                    .write_volatile(pattern(granule, page))
            };
        }
    }
}

/// The words in `pages` of a granule are as [`fill`] wrote them.
fn is_filled(heap: &Heap, granule: usize, mut pages: impl Iterator<Item = usize>) -> bool {
    // SAFETY: a word of the heap.
    let word = |page| unsafe { heap.word(granule, page * PAGE).read_volatile() };
    pages.all(|page| word(page) == pattern(granule, page))
}

fn to_dram(mover: &mut Mover, heap: &Heap, run: Range<usize>) -> Result<(), RebindError> {
    let memory = |i| (heap.extent(i), Memory::Dram);
    move_run(mover, heap, run, &ALL, memory).map(drop)
}

fn sparse(step: usize) -> LivePages {
    let mut live = LivePages([0; 8]);
    (0..512)
        .step_by(step)
        .for_each(|page| live.0[page / 64] |= 1 << (page % 64));
    live
}

/// The value of a key of `/proc/self/smaps` for the mapping at `at`.
fn smaps(at: usize, key: &str) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let after = smaps.split(&format!("{at:x}-")).nth(1).unwrap();
    let line = after.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap().trim().to_owned()
}

#[test]
fn mostly_live_granules_become_huge_pages_and_others_take_their_live_pages_only() {
    let heap = Heap::new(3);
    fill(&heap);
    let (few, none) = (sparse(5), LivePages([0; 8]));
    on_mover(None, |mover| {
        let mut mover = mover.unwrap();
        for (i, live) in [&ALL, &few, &none].into_iter().enumerate() {
            let memory = |i| (heap.extent(i), Memory::Dram);
            let moved = move_run(&mut mover, &heap, i..i + 1, live, memory).unwrap();
            assert_eq!(moved.bytes_copied, u64::from(live.count()) * PAGE as u64);
        }
    });
    let present = |i| pages_present(heap.granule(i)..heap.granule(i + 1));
    assert_eq!(
        [present(0), present(1), present(2)],
        [512, few.count() as usize, 0]
    );
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    match enabled.is_ok_and(|modes| !modes.contains("[never]")) {
        true => assert_eq!(smaps(heap.va, "AnonHugePages:"), "2048 kB"),
        false => println!("SKIPPED huge pages: the system gives none"),
    }
    assert!(is_filled(&heap, 0, 0..512));
    assert!(is_filled(&heap, 1, (0..512).step_by(5)));
}

#[test]
fn pages_missing_in_dram_are_zeroes_on_the_extent_and_stall_nobody() {
    let heap = Heap::new(1);
    fill(&heap);
    on_mover(None, |mover| {
        let mut mover = mover.unwrap();
        let memory = |_| (heap.extent(0), Memory::Dram);
        move_run(&mut mover, &heap, 0..1, &sparse(5), memory).unwrap();
        let memory = |_| (Memory::Dram, heap.extent(1));
        move_run(&mut mover, &heap, 0..1, &ALL, memory).unwrap();
    });
    assert!(is_filled(&heap, 0, (0..512).step_by(5)));
    // SAFETY: a word of the heap.
    assert_eq!(unsafe { heap.word(0, PAGE).read() }, 0);
}

#[test]
fn neighbours_on_contiguous_extents_share_one_mapping_that_children_do_not_get() {
    let heap = Heap::new(8);
    fill(&heap);
    on_mover(None, |mover| {
        let mut mover = mover.unwrap();
        for run in [0..3, 3..8] {
            to_dram(&mut mover, &heap, run).unwrap();
        }
        assert!(
            mappings_in(heap.range()) <= 2,
            "a run in DRAM is one mapping"
        );
        for i in [5, 0, 7, 2, 6, 1, 4, 3] {
            let memory = |i| (Memory::Dram, heap.extent(i));
            move_run(&mut mover, &heap, i..i + 1, &ALL, memory).unwrap();
        }
    });
    assert_eq!(mappings_in(heap.range()), 1);
    let flags = smaps(heap.va, "VmFlags:");
    for flag in ["dc", "dd"] {
        assert!(
            flags.split(' ').any(|f| f == flag),
            "{flag} is not in {flags}"
        );
    }
    assert!((0..8).all(|i| is_filled(&heap, i, 0..512)));
}

fn refused(mover: &mut Mover, heap: &Heap, run: Range<usize>, from: Memory) -> Change {
    match move_run(mover, heap, run, &ALL, |_| (from, Memory::Dram)) {
        Err(RebindError::Changed { change, .. }) => change,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_granule_whose_mapping_the_program_changed_stays_and_is_named() {
    let heap = Heap::new(6);
    fill(&heap);
    let page = |i: usize| (heap.granule(i) + 7 * PAGE) as *mut c_void;
    // SAFETY: pages of the heap, as a program would treat them.
    unsafe {
        if mprotect(page(0), PAGE, MprotectFlags::READ).is_err() {
            println!("SKIPPED: on device-DAX nobody can change a page of a granule");
            return;
        }
        mprotect(
            page(1).wrapping_byte_sub(7 * PAGE),
            GRANULE,
            MprotectFlags::empty(),
        )
        .unwrap();
        mlock(page(2), PAGE).unwrap();
    }
    on_mover(None, |mover| {
        let mut mover = mover.unwrap();
        let mover = &mut mover;
        assert_eq!(
            refused(mover, &heap, 0..1, heap.extent(0)),
            Change::Protection
        );
        assert_eq!(
            refused(mover, &heap, 1..2, heap.extent(1)),
            Change::Protection
        );
        assert_eq!(refused(mover, &heap, 2..3, heap.extent(2)), Change::Locked);
        assert_eq!(refused(mover, &heap, 3..4, Memory::Dram), Change::Replaced);
        // Its neighbour is not moved by halves.
        assert_eq!(refused(mover, &heap, 2..4, heap.extent(2)), Change::Locked);
        to_dram(mover, &heap, 4..5).unwrap();
        // SAFETY: as above.
        unsafe { mprotect(page(4), PAGE, MprotectFlags::READ) }.unwrap();
        assert_eq!(
            refused(mover, &heap, 4..5, Memory::Dram),
            Change::Protection
        );
    });
    let flags = smaps(heap.granule(2) + 7 * PAGE, "VmFlags:");
    assert!(flags.split(' ').any(|f| f == "lo"), "unlocked: {flags}");
    assert!(
        [0, 2, 3, 4, 5]
            .into_iter()
            .all(|i| is_filled(&heap, i, 0..512))
    );
}

#[test]
fn a_granule_whose_extent_has_gone_is_named_and_costs_nothing_else() {
    let heap = Heap::new(2);
    fill(&heap);
    let Memory::Extent(alias) = heap.extent(1) else {
        unreachable!()
    };
    // SAFETY: takes the extent away, as far as a copy is concerned.
    unsafe { munmap(alias as *mut c_void, GRANULE) }.unwrap();
    on_mover(None, |mover| {
        let mut mover = mover.unwrap();
        match to_dram(&mut mover, &heap, 0..2) {
            Err(RebindError::Unreadable { granule, .. }) => assert_eq!(granule, heap.granule(1)),
            other => panic!("{other:?}"),
        }
        to_dram(&mut mover, &heap, 0..1).unwrap();
    });
    assert!(is_filled(&heap, 0, 0..512));
}

/// An epoll descriptor of which one event is always there.
fn always_ready() -> (OwnedFd, OwnedFd) {
    use rustix::event::{EventfdFlags, epoll, eventfd};
    let bell = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
    let events = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let data = epoll::EventData::new_u64(7);
    epoll::add(&events, &bell, data, epoll::EventFlags::IN).unwrap();
    (events, bell)
}

/// redis-server hung when a recall met it in epoll_wait(2) with its table of
/// events in the granule that moved: the thread held the lock of its epoll
/// descriptor and waited for the granule, and the mover, which looked for
/// descriptors with `O_DIRECT`, waited for that lock.
#[test]
fn nothing_waits_for_a_thread_that_epoll_wait_has_wait_for_its_granule() {
    let name = "nothing_waits_for_a_thread_that_epoll_wait_has_wait_for_its_granule";
    in_own_process(name, || {
        let heap = Heap::new(2);
        let (events, _bell) = always_ready();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (heap, stop, events) = (&heap, &stop, &events);
            let waits = scope.spawn(move || {
                let table = heap.word(0, 3 * PAGE).cast::<libc::epoll_event>();
                let mut done = 0u64;
                while !stop.load(Relaxed) {
                    // SAFETY: a table in the heap that this thread alone uses.
                    let (n, data) = unsafe {
                        let n = libc::epoll_wait(events.as_raw_fd(), table, 8, -1);
                        (n, (&raw const (*table).u64).read_unaligned())
                    };
                    assert_eq!((n, data), (1, 7), "round {done}");
                    done += 1;
                }
                done
            });
            // Where it is can't be told, so that its descriptors are looked at.
            scope.spawn(move || while !stop.load(Relaxed) {});
            scope.spawn(move || {
                let start = Instant::now();
                while !stop.load(Relaxed) {
                    if start.elapsed() > Duration::from_secs(60) {
                        eprintln!("the mover hangs");
                        std::process::exit(1);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            on_mover(None, |mover| {
                let _stopped = Stop(stop);
                let mut mover = mover.unwrap();
                let start = Instant::now();
                while start.elapsed() < Duration::from_secs(3) {
                    go_round(&mut mover, heap);
                }
            });
            assert!(waits.join().unwrap() > 0);
        });
    });
}

#[test]
fn mlockall_populates_no_placeholder() {
    in_own_process("mlockall_populates_no_placeholder", || {
        let heap = Heap::new(2);
        for flags in [
            MlockAllFlags::FUTURE,
            MlockAllFlags::CURRENT | MlockAllFlags::FUTURE,
        ] {
            mlockall(flags).unwrap();
            on_mover(None, |mover| {
                let mut mover = mover.unwrap();
                under_a_writer(&heap, || (0..20).for_each(|_| go_round(&mut mover, &heap)));
            });
        }
    });
}

#[test]
fn a_program_that_closes_all_descriptors_loses_nothing() {
    let name = "a_program_that_closes_all_descriptors_loses_nothing";
    in_own_process(name, || {
        let heap = Heap::new(2);
        let (moving, hears) = mpsc::channel();
        std::thread::scope(|scope| {
            // Threads share the table of the thread that starts them, so this
            // one has the program's and not the mover's.
            scope.spawn(move || {
                hears.recv().unwrap();
                // SAFETY: the program's own descriptors.
                assert_eq!(unsafe { libc::close_range(3, u32::MAX, 0) }, 0);
            });
            on_mover(None, |mover| {
                let mut mover = mover.unwrap();
                under_a_writer(&heap, || {
                    go_round(&mut mover, &heap);
                    moving.send(()).unwrap();
                    (0..20).for_each(|_| go_round(&mut mover, &heap));
                });
            });
        });
    });
}

fn become_nobody() {
    // SAFETY: changes the whole process, which is this test's own.
    unsafe {
        assert_eq!(libc::setgroups(0, null_mut()), 0);
        assert_eq!(libc::setgid(65534), 0);
        assert_eq!(libc::setuid(65534), 0);
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: needs root to open /dev/userfaultfd and to become nobody");
    }
    root
}

fn userfaultfd_device() -> Option<OwnedFd> {
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    if device.is_err() {
        println!("SKIPPED: no /dev/userfaultfd (Linux 6.1)");
    }
    device.ok().map(OwnedFd::from)
}

#[test]
fn an_unprivileged_program_with_the_device_moves_granules_under_the_kernel() {
    let name = "an_unprivileged_program_with_the_device_moves_granules_under_the_kernel";
    in_own_process(name, || {
        if !is_root() {
            return;
        }
        let Some(device) = userfaultfd_device() else {
            return;
        };
        let heap = Heap::new(2);
        become_nobody();
        on_mover(Some(&device), |mover| {
            let mut mover = mover.unwrap();
            assert!(mover.takes_kernel_faults());
            under_a_writer(&heap, || go_round(&mut mover, &heap));
            // SAFETY: the heap's own granule; put back below.
            let taken = unsafe { mover.take(heap.va, &[heap.extent(0)]) }.unwrap();
            let zero = std::fs::File::open("/dev/zero").unwrap();
            std::thread::scope(|scope| {
                let at = heap.va + 64;
                // SAFETY: eight bytes of the heap.
                let reader = scope
                    .spawn(move || unsafe { libc::read(zero.as_raw_fd(), at as *mut c_void, 8) });
                wait_until_wanted(&mover, &heap, 0);
                // SAFETY: nothing wrote to the extent.
                unsafe { mover.put_back(taken) }.unwrap();
                assert_eq!(reader.join().unwrap(), 8);
            });
        });
    });
}

#[test]
fn without_the_device_an_unprivileged_program_is_told_that_the_kernel_does_not_wait() {
    let name = "without_the_device_an_unprivileged_program_is_told_that_the_kernel_does_not_wait";
    in_own_process(name, || {
        let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
        if !is_root() || allowed.is_ok_and(|v| v.trim() == "1") {
            println!("SKIPPED: this system lets everybody take the kernel's faults");
            return;
        }
        let heap = Heap::new(2);
        become_nobody();
        on_mover(None, |mover| {
            let mut mover = mover.unwrap();
            assert!(!mover.takes_kernel_faults());
            under_a_writer(&heap, || go_round(&mut mover, &heap));
        });
    });
}

/// Makes userfaultfd(2) fail with `EPERM` from now on, as the default seccomp
/// profiles of container runtimes do.
fn deny_userfaultfd() {
    let statement = |code, k| libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    };
    let load_number = statement((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0);
    let mut is_it = statement(
        (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        libc::SYS_userfaultfd as u32,
    );
    is_it.jf = 1;
    let verdict = |verdict| statement((libc::BPF_RET | libc::BPF_K) as u16, verdict);
    let mut filter = [
        load_number,
        is_it,
        verdict(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        verdict(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: a valid filter program.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &program), 0);
    }
}

#[test]
fn a_denied_userfaultfd_is_said_at_start() {
    in_own_process("a_denied_userfaultfd_is_said_at_start", || {
        if !is_root() {
            return;
        }
        become_nobody();
        deny_userfaultfd();
        let started = on_mover(None, |mover| mover.map(drop));
        let denied = StartError::Uffd(UffdError::Denied(rustix::io::Errno::PERM));
        assert_eq!(started, Err(denied));
    });
}

fn wait_until_wanted(mover: &Mover, heap: &Heap, granule: usize) {
    let start = Instant::now();
    while mover.wanted(heap.range()) != Some(heap.granule(granule)) {
        assert!(start.elapsed() < Duration::from_secs(10), "nobody waits");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A spare in DRAM with `content`.
fn filled(content: &[u8]) -> Spare {
    let steps = [Step {
        from: Memory::Dram,
        to: Memory::Dram,
        live: &ALL,
    }];
    // SAFETY: no extent is named, and the spare is a granule.
    unsafe {
        let spare = Spare::prepare(&steps).unwrap();
        spare.granule(0).copy_from(content.as_ptr(), GRANULE);
        spare
    }
}

#[test]
fn granules_can_wait_without_content_and_come_back_on_touch() {
    let heap = Heap::new(2);
    fill(&heap);
    on_mover(None, |mover| {
        let mut mover = mover.unwrap();
        to_dram(&mut mover, &heap, 0..2).unwrap();
        // SAFETY: the heap's own granules, given again below.
        let taken = unsafe { mover.take(heap.va, &[Memory::Dram; 2]) }.unwrap();
        let files = [0, 1].map(|i| {
            // SAFETY: the content of a granule.
            unsafe { std::slice::from_raw_parts(taken.content(i), GRANULE) }.to_vec()
        });
        // What held it in DRAM is free now.
        drop(taken);
        assert_eq!(pages_present(heap.range()), 0);
        assert_eq!(mover.wanted(heap.range()), None);

        std::thread::scope(|scope| {
            let heap = &heap;
            let read = |i, page| scope.spawn(move || is_filled(heap, i, [page].into_iter()));
            // More than the monitor's table holds, so that it has no room for
            // the last.
            let mut readers: Vec<_> = (0..200).map(|page| read(0, page)).collect();
            wait_until_wanted(&mover, heap, 0);
            std::thread::sleep(Duration::from_millis(50));
            readers.push(read(1, 7));
            std::thread::sleep(Duration::from_millis(50));
            for (i, file) in files.iter().enumerate() {
                wait_until_wanted(&mover, heap, i);
                // SAFETY: the granule is still taken, and this its content.
                unsafe { mover.give(heap.granule(i), &mut filled(file), 0) }.unwrap();
                // Waits that the monitor heard of after their end.
                while mover.wanted(heap.range()) == Some(heap.granule(i)) {
                    mover.dismiss(heap.granule(i));
                }
            }
            assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
        });
        assert!(mover.stalls().count() > 0 && mover.stalls().max() > 40_000_000);
    });
}

/// All the mappings that the kernel still allowed, to be freed one by one.
struct Hoard {
    at: usize,
    pages: usize,
}

impl Hoard {
    fn new(limit: usize) -> Self {
        let (access, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, of which every other page becomes one more.
        unsafe {
            let at = libc::mmap(null_mut(), limit * PAGE, access, flags, -1, 0) as usize;
            let page = |i: usize| (at + i * PAGE) as *mut c_void;
            let split = |i: &usize| libc::mprotect(page(*i), PAGE, libc::PROT_READ) == 0;
            let splits = (1..limit).step_by(2).take_while(split).count();
            assert!(2 * splits < limit, "the limit was not reached");
            let pages = 2 * splits;
            libc::munmap(page(pages), (limit - pages) * PAGE);
            Self { at, pages }
        }
    }

    fn free_one(&mut self) {
        self.pages -= 1;
        // SAFETY: the last page of the hoard.
        unsafe { libc::munmap((self.at + self.pages * PAGE) as *mut c_void, PAGE) };
    }
}

impl Drop for Hoard {
    fn drop(&mut self) {
        // SAFETY: the rest of the hoard.
        unsafe { libc::munmap(self.at as *mut c_void, self.pages * PAGE) };
    }
}

#[test]
fn with_few_mappings_left_granules_move_or_stay_but_keep_their_content() {
    let name = "with_few_mappings_left_granules_move_or_stay_but_keep_their_content";
    in_own_process(name, || {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let limit: usize = limit.trim().parse().unwrap();
        if limit > 2_000_000 {
            println!("SKIPPED: vm.max_map_count is {limit}, too many to use up");
            return;
        }
        let heap = Heap::new(4);
        fill(&heap);
        on_mover(None, |mover| {
            let mut mover = mover.unwrap();
            for to_dram in [true, false] {
                let memory = |i| match to_dram {
                    true => (heap.extent(i), Memory::Dram),
                    false => (Memory::Dram, heap.extent(i)),
                };
                let mut hoard = Hoard::new(limit);
                let mut refused = 0;
                while let Err(error) = move_run(&mut mover, &heap, 0..4, &ALL, memory) {
                    assert!(matches!(error, RebindError::NoMemory(_)), "{error}");
                    assert!((0..4).all(|i| is_filled(&heap, i, 0..512)), "{refused}");
                    refused += 1;
                    hoard.free_one();
                }
                assert!((0..4).all(|i| is_filled(&heap, i, 0..512)));
                println!("moved after {refused} refusals");
                assert!((1..100).contains(&refused));
            }
        });
    });
}

#[test]
fn with_little_address_space_left_granules_move_or_stay_but_keep_their_content() {
    let name = "with_little_address_space_left_granules_move_or_stay_but_keep_their_content";
    in_own_process(name, || {
        let heap = Heap::new(2);
        fill(&heap);
        on_mover(None, |mover| {
            shrink_address_space(&mut mover.unwrap(), &heap)
        });
    });
}

fn shrink_address_space(mover: &mut Mover, heap: &Heap) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let used: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    let (mut refused, mut moved) = (0, 0);
    for pages in (0..6144).step_by(128) {
        set_address_space((used + pages) * PAGE as u64);
        let there = to_dram(mover, heap, 0..2);
        let memory = |i| (Memory::Dram, heap.extent(i));
        let back = there
            .is_ok()
            .then(|| move_run(mover, heap, 0..2, &ALL, memory));
        set_address_space(libc::RLIM_INFINITY);
        assert!((0..2).all(|i| is_filled(heap, i, 0..512)), "{pages} pages");
        match (there, back) {
            (Err(RebindError::NoMemory(_)), _) => refused += 1,
            (Ok(()), Some(Ok(_))) => moved += 1,
            (Ok(()), Some(Err(RebindError::NoMemory(_)))) => {
                move_run(mover, heap, 0..2, &ALL, memory).unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
    println!("{refused} refused, {moved} moved");
    assert!(refused > 0 && moved > 0);
}

fn set_address_space(bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the soft limit of this process, which is the test's own.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}
