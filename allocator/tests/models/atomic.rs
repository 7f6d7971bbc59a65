//! loom's atomics, with a `const fn new` as the real ones have it.

use std::ops::Deref;
use std::sync::OnceLock;

use loom::sync::atomic;

macro_rules! late {
    ($($name:ident: $value:ty,)+) => {$(
        pub(crate) struct $name($value, OnceLock<atomic::$name>);

        impl $name {
            pub(crate) const fn new(value: $value) -> Self {
                Self(value, OnceLock::new())
            }
        }

        impl Deref for $name {
            type Target = atomic::$name;
            fn deref(&self) -> &atomic::$name {
                self.1.get_or_init(|| atomic::$name::new(self.0))
            }
        }
    )+};
}

late! {
    AtomicBool: bool,
    AtomicU64: u64,
    AtomicUsize: usize,
}
