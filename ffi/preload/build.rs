//! Linker arguments of the preloaded library.

fn main() {
    // Memory that it gave out outlives any dlclose.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libdcmalloc_preload.so");
    println!("cargo:rerun-if-changed=build.rs");
}
