//! What programs ask their malloc about itself. glibc's own functions would
//! answer for its empty heap.

use core::ffi::{c_char, c_int, c_void};
use core::ptr::null_mut;

use dcmalloc::process::HEAP;

use crate::standard::keep_errno;

/// mallinfo2(3): `arena` is what the heap holds, `uordblks` what the program
/// holds of it, `fordblks` the rest; there are no mmap'ed chunks apart.
#[unsafe(no_mangle)]
pub extern "C" fn mallinfo2() -> libc::mallinfo2 {
    let stats = keep_errno(|| HEAP.stats());
    let usage = stats.usage;
    let held = (usage.extent_held + usage.dram_held + stats.outside) as usize;
    let used = (stats.allocated as usize).min(held);
    // SAFETY: a struct of integers.
    let mut info: libc::mallinfo2 = unsafe { core::mem::zeroed() };
    info.arena = held;
    info.ordblks = stats.arenas as usize;
    info.usmblks = (usage.live_peak + stats.outside) as usize;
    info.uordblks = used;
    info.fordblks = held - used;
    info.keepcost = usage.idle as usize;
    info
}

/// mallinfo(3): the same, cut to `int` as it always was.
#[unsafe(no_mangle)]
pub extern "C" fn mallinfo() -> libc::mallinfo {
    let wide = mallinfo2();
    // SAFETY: a struct of integers.
    let mut info: libc::mallinfo = unsafe { core::mem::zeroed() };
    info.arena = wide.arena as c_int;
    info.ordblks = wide.ordblks as c_int;
    info.usmblks = wide.usmblks as c_int;
    info.uordblks = wide.uordblks as c_int;
    info.fordblks = wide.fordblks as c_int;
    info.keepcost = wide.keepcost as c_int;
    info
}

/// malloc_trim(3): gives back all that is unused; 1 if there was some. `pad`
/// is for a heap that grows at one end.
#[unsafe(no_mangle)]
pub extern "C" fn malloc_trim(_pad: usize) -> c_int {
    c_int::from(keep_errno(|| HEAP.trim()))
}

/// mallopt(3): the settings are glibc's own and mean nothing here; 1 is what
/// glibc answers to those it knows.
#[unsafe(no_mangle)]
pub extern "C" fn mallopt(_param: c_int, _value: c_int) -> c_int {
    1
}

/// malloc_stats(3): to stderr, as the caller asked.
#[unsafe(no_mangle)]
pub extern "C" fn malloc_stats() {
    // SAFETY: a null callback writes to stderr, null options mean the usual.
    unsafe { crate::jemalloc::malloc_stats_print(None, null_mut(), core::ptr::null()) }
}

unsafe extern "C" {
    fn fprintf(stream: *mut c_void, format: *const c_char, ...) -> c_int;
}

/// malloc_info(3): XML in the shape of glibc's, one heap.
///
/// # Safety
/// `stream` is open for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_info(options: c_int, stream: *mut c_void) -> c_int {
    if options != 0 {
        return libc::EINVAL;
    }
    let info = mallinfo2();
    let format = c"<malloc version=\"1\">\n<heap nr=\"0\">\n<system type=\"current\" size=\"%zu\"/>\n<system type=\"max\" size=\"%zu\"/>\n<aspace type=\"total\" size=\"%zu\"/>\n</heap>\n<system type=\"current\" size=\"%zu\"/>\n<system type=\"max\" size=\"%zu\"/>\n<aspace type=\"total\" size=\"%zu\"/>\n</malloc>\n";
    let (now, max) = (info.arena, info.usmblks);
    // SAFETY: six values for six conversions of `size_t`.
    let written = unsafe { fprintf(stream, format.as_ptr(), now, max, now, now, max, now) };
    if written < 0 { -1 } else { 0 }
}
