//! Settings: whatever the text, what was read of it reads back the same.
#![no_main]

// By file: the crate would bring its engine along, and a compiler for C.
#[expect(dead_code, reason = "not all of it is for settings")]
#[path = "../../allocator/src/config.rs"]
mod config;
#[expect(dead_code, reason = "not all of it is for settings")]
#[path = "../../allocator/src/placement.rs"]
mod placement;
/// What the placement names of the rest.
mod space {
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub enum Tier {
        Dram,
        Extent,
    }
}

use config::{Config, items, parse_size};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let (config, refused) = Config::read(text);
    assert!(refused as usize <= items(text).count());
    let shown = config.to_string();
    assert_eq!(Config::read(&shown), (config, 0), "{shown}");

    let mut one_by_one = Config::DEFAULT;
    let mut wrong = 0;
    for item in items(text) {
        let before = one_by_one;
        if let Err(error) = one_by_one.set(item) {
            wrong += 1;
            assert_eq!(one_by_one, before, "{item} changes what it should not");
            assert!(!error.to_string().is_empty());
        }
    }
    assert_eq!((one_by_one, wrong), (config, refused));

    if let Some(bytes) = parse_size(text) {
        assert_eq!(parse_size(&bytes.to_string()), Some(bytes));
    }
});
