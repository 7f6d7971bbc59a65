//! The worker and the listener.

use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::Ordering;
use core::time::Duration;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use super::{TICK, TICK_QUIET};
use crate::arena::callbacks;
use crate::evacuation::Evacuator;
use crate::headroom::Strain;
use crate::heap::Heap;
use crate::source::{Event, ExtentSource};
use crate::space::Lot;
use crate::thread::{self, Main};

/// For so many ticks after a recall the reserve is not filled up again, unless
/// the source says that it has more: what was just given back is not asked for
/// in the same breath.
const RESTRAINT: u32 = 20;
/// For so many ticks after word that DRAM is short, what is in DRAM for want of
/// extents comes back as fast as it can.
const HURRY: u32 = 100;
/// Every so many ticks the control group is looked at.
const STRAIN_EVERY: u32 = 10;
/// So often granules that could not be brought back are tried again: a lock or
/// a transfer may be over.
const FORGIVE_EVERY: Duration = Duration::from_secs(5);
/// When there was no memory to bring a granule back to, that is tried again.
const RETRY: Duration = Duration::from_millis(10);
/// Room for the thread-locals of the program and its libraries, which share
/// the stack's mapping, besides a few pages of our own.
const STACK: usize = 512 << 10;

/// Starts a thread of this service; the heap works without it meanwhile.
pub(super) fn spawn(main: Main, heap: &'static Heap) -> Result<(), Errno> {
    let heap = core::ptr::from_ref(heap).cast_mut();
    thread::spawn(main, heap.cast(), STACK)
}

pub(super) extern "C" fn worker(heap: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` passed a heap that lives for ever.
    let heap: &'static Heap = unsafe { &*heap.cast::<Heap>() };
    let service = heap.service();
    let Some(source) = service.source() else {
        return null_mut();
    };
    let _ = rustix::thread::set_name(c"dcmalloc");
    source.adopt_thread();
    let spills = service.take_up(Evacuator::start(heap, source));
    // Without it nothing would be heard; then the heap has no source.
    if spawn(listener, heap).is_err() || (spills && spawn(restorer, heap).is_err()) {
        service.closed(heap);
    }
    service.adopted.raise();
    work(heap, source)
}

/// The worker of a forked child: it finds the source itself. What it allocates
/// may come to lie on a granule that moves; it is read while threads are made,
/// and nothing moves then.
pub(super) extern "C" fn newborn(heap: *mut c_void) -> *mut c_void {
    // SAFETY: as in `worker`.
    let heap: &'static Heap = unsafe { &*heap.cast::<Heap>() };
    let service = heap.service();
    let _ = rustix::thread::set_name(c"dcmalloc");
    let Some(source) = join(heap) else {
        service.joined(heap);
        return null_mut();
    };
    let evacuator = Evacuator::start(heap, source);
    // It may wait for who serves an ancestor, and no fork is to wait for that.
    service.sharing.join(heap, source);
    let spills;
    {
        // A fork before this needs no worker, one after it finds it ready.
        let _guard = heap.no_fork();
        *service.source.lock() = Some(source);
        *service.lender.lock() = Some(source);
        spills = service.take_up(evacuator);
        service.running.store(true, Ordering::Release);
        service.alive.store(true, Ordering::Release);
    }
    let hears = spawn(listener, heap).is_ok() && !(spills && spawn(restorer, heap).is_err());
    match hears {
        true => {
            heap.space().set_exhausted(false);
            heap.expect_extents();
        }
        false => service.closed(heap),
    }
    service.joined(heap);
    if hears {
        settle(heap, source);
    }
    work(heap, source)
}

/// Finds a child a source of its own.
fn join(heap: &'static Heap) -> Option<&'static dyn ExtentSource> {
    // Before this thread gets a descriptor table of its own: callbacks use the
    // program's. Where they can't be told of losses, nothing becomes zeroes.
    let _ = callbacks().start_again();
    let source = heap.reconnect()?;
    let (addr, len) = source.window();
    // SAFETY: the window is as `ExtentSource::window` promises.
    unsafe { heap.space().open_window(addr, len) }.ok()?;
    Some(source)
}

/// Brings what is in DRAM for want of extents to them without waiting for the
/// next tick, as much as one tick may: in a child, whose heap begins there and
/// which may not live for long, and after a fork that moved a small heap.
fn settle(heap: &Heap, source: &dyn ExtentSource) {
    let service = heap.service();
    if !service.is_running() {
        return;
    }
    let seen = heap.lent().read();
    service.ask(heap, source, true, false);
    let asked = service.asked[Lot::UNTAGGED.index()].load(Ordering::Acquire);
    if asked && !service.is_to_stop() {
        heap.lent().wait(seen, TICK);
    }
    if let Some(evacuator) = service.evacuator.lock().as_mut() {
        evacuator.bring_back(heap, source, heap.back_per_tick_in(false));
    }
}

/// What the worker does for as long as the process lives.
fn work(heap: &'static Heap, source: &'static dyn ExtentSource) -> ! {
    let service = heap.service();
    let (mut quiet, mut restraint, mut hurry) = (0, 0u32, 0u32);
    let mut strain = Strain::now();
    let mut before = heap.space().usage();
    let mut last_tick = Instant::now();
    let mut forgiven = last_tick;
    let mut ticks = 0u32;
    loop {
        let seen = heap.wanted().read();
        if let Some(rest) = service.stand_still(heap, source) {
            restraint = restraint.max(rest.div_duration_f32(TICK) as u32);
            if restraint == 0 {
                heap.wanted().wait(heap.wanted().read(), rest);
                settle(heap, source);
            }
        }
        if service.trimmed(heap, source) {
            restraint = RESTRAINT;
        }
        if service.plenty.swap(false, Ordering::AcqRel) {
            restraint = 0;
        }
        if service.strained.swap(false, Ordering::AcqRel) {
            heap.purge();
            (restraint, hurry) = (0, HURRY);
        }
        {
            let _nothing_moves = service.evacuator.lock();
            service.lose_landed(heap, source);
        }
        while !service.is_to_stop()
            && let Some(recall) = service.take_recall()
        {
            // What threads lacked may be met by now; who still waits says so.
            Lot::all().for_each(|lot| heap.demand(lot).store(0, Ordering::Release));
            service.answer(heap, source, &recall);
            heap.lent().raise();
            restraint = RESTRAINT;
        }
        if service.is_running() {
            service.ask(heap, source, restraint == 0, hurry > 0);
        }
        let patience = if quiet > 20 { TICK_QUIET } else { TICK };
        heap.wanted()
            .wait(seen, patience.saturating_sub(last_tick.elapsed()));
        // A clock of its own: how often somebody calls is no measure of time.
        if last_tick.elapsed() < TICK {
            continue;
        }
        last_tick = Instant::now();
        restraint = restraint.saturating_sub(1);
        hurry = hurry.saturating_sub(1);
        ticks = ticks.wrapping_add(1);
        if ticks.is_multiple_of(STRAIN_EVERY) && strain.grew() {
            service.strained.store(true, Ordering::Release);
        }
        service.regain_patience(heap);
        heap.space().tick();
        heap.decay_extents();
        if forgiven.elapsed() > FORGIVE_EVERY {
            forgiven = Instant::now();
            heap.space().forgive();
        }
        service.sharing.hear(heap, source);
        if let Some(evacuator) = service.evacuator.lock().as_mut() {
            evacuator.sweep(heap);
            if restraint == 0 && service.is_running() {
                evacuator.bring_back(heap, source, heap.back_per_tick_in(hurry > 0));
            }
        }
        if service.is_running() {
            service.give_back_surplus(heap, source);
        }
        let now = heap.space().usage();
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
        heap.report_to(source);
    }
}

/// Brings spilled granules back when they are touched. A thread of its own,
/// because the worker calls the engine, whose locks a thread may hold that
/// waits for such a granule.
extern "C" fn restorer(heap: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` passed a heap that lives for ever.
    let heap: &'static Heap = unsafe { &*heap.cast::<Heap>() };
    let service = heap.service();
    let _ = rustix::thread::set_name(c"dcmalloc-back");
    let bell = service.evacuator.lock().as_ref().and_then(|evacuator| {
        let bell = evacuator.bell()?;
        Some(bell.as_raw_fd())
    });
    let (Some(bell), Some(source)) = (bell, service.source()) else {
        return null_mut();
    };
    // SAFETY: the evacuator stays, and its mover never closes the bell.
    let bell = unsafe { BorrowedFd::borrow_raw(bell) };
    let mut all = true;
    loop {
        if all {
            let _ = poll(&mut [PollFd::from_borrowed_fd(bell, PollFlags::IN)], None);
        } else {
            std::thread::sleep(RETRY);
        }
        if let Some(evacuator) = service.evacuator.lock().as_mut() {
            all = evacuator.restore_wanted(heap, source);
        }
    }
}

extern "C" fn listener(heap: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` passed a heap that lives for ever.
    let heap: &'static Heap = unsafe { &*heap.cast::<Heap>() };
    let service = heap.service();
    let Some(source) = service.source() else {
        return null_mut();
    };
    let _ = rustix::thread::set_name(c"dcmalloc-hear");
    while service.is_running() {
        match source.next_event(Duration::from_secs(3600)) {
            Event::Granted {
                ranges,
                tag,
                exhausted,
                last,
            } => {
                if ranges.is_empty() && last && !exhausted {
                    // The source was away, and knows of no request.
                    let asked = service.asked.iter();
                    asked.for_each(|asked| asked.store(false, Ordering::Release));
                }
                match heap.space().lend_tagged(tag, &ranges) {
                    Some(lot) => {
                        if last {
                            heap.supply().be_patient(lot);
                            heap.space().set_lot_exhausted(lot, exhausted);
                            service.asked[lot.index()].store(false, Ordering::Release);
                        }
                    }
                    // Its last arena has ended meanwhile.
                    None => {
                        source.give_back(&ranges);
                        let tagged = service.asked.iter().skip(1);
                        tagged.for_each(|asked| asked.store(false, Ordering::Release));
                    }
                }
                if !ranges.is_empty() {
                    service.grants.fetch_add(1, Ordering::Relaxed);
                }
                heap.lent().raise();
            }
            Event::CapacityAvailable => {
                service.plenty.store(true, Ordering::Release);
                heap.space().set_exhausted(false);
                heap.lent().raise();
                heap.wanted().raise();
            }
            Event::Recall(recall) => {
                if let Some(free) = service
                    .recalls
                    .lock()
                    .iter_mut()
                    .find(|slot| slot.is_none())
                {
                    *free = Some(recall);
                }
                heap.wanted().raise();
            }
            Event::Lost(ranges) => service.lose(heap, source, &ranges),
            Event::DramShort => {
                service.strained.store(true, Ordering::Release);
                heap.wanted().raise();
            }
            Event::Timeout => {}
            Event::Disconnected => service.away(heap),
            Event::Closed => service.closed(heap),
        }
    }
    null_mut()
}
