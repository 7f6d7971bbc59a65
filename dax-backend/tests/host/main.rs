//! A host's files, as a tree made up for the test: finding devices, and the way to their memory.
//! What is missing has its own error each, which says what to do.

#![forbid(unsafe_code)]

mod pci;
mod tree;
mod window;
