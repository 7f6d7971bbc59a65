//! Linker arguments of the preloaded library.

fn main() {
    // Memory that it gave out outlives any dlclose.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libdcmalloc_preload.so");
    // The exported `free` is the engine's own, at its own address: a jump less
    // on every call, 0.3 ns of a pair of 6 (see `standard::free`).
    println!("cargo:rustc-cdylib-link-arg=-Wl,--defsym=free=_rjem_free");
    // What that leaves to a function is ours, so that foreign pointers are
    // told apart where it costs nothing (see `standard::free_slow`).
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        println!(
            "cargo:rustc-cdylib-link-arg=-Wl,--defsym=_rjem_je_free_default=dcmalloc_free_slow"
        );
    }
    println!("cargo:rerun-if-changed=build.rs");
}
