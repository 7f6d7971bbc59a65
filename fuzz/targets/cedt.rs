//! The firmware's CEDT: a table, or an error with a place in it.
#![no_main]

use dax_backend::window::cedt::Cedt;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|table: &[u8]| {
    match Cedt::parse(table) {
        Ok(cedt) => {
            // Each structure has a header of 4 bytes.
            assert!((cedt.bridges.len() + cedt.windows.len()) * 4 <= table.len());
            for window in &cedt.windows {
                assert!(!window.targets.is_empty());
                let bridges = cedt.bridges.iter();
                let suited = bridges.filter(|bridge| window.suits(bridge.uid));
                assert!(suited.count() == 0 || window.targets.len() == 1);
            }
        }
        Err(error) => assert!(error.offset <= table.len(), "{error}"),
    }
});
