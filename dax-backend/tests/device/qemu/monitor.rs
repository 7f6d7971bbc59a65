//! QEMU's monitor, the fabric manager of its device (`cxl-add-dynamic-capacity` in its QMP reference).

use std::io::{BufRead, BufReader, Read, Write};

use dax_backend::address::DpaRange;
use dax_backend::extent::ExtentTag;
use serde_json::{Value, json};

/// A way to QEMU.
pub(super) trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// One connection to QMP.
pub(super) struct Monitor(BufReader<Box<dyn Stream>>);

impl Monitor {
    pub(super) fn new(stream: impl Stream + 'static) -> Self {
        let mut monitor = Self(BufReader::new(Box::new(stream)));
        monitor.line();
        monitor.execute("qmp_capabilities", json!({}));
        monitor
    }

    /// Offers ranges of region 0, which begins at DPA 0, as one More group.
    pub(super) fn add(&mut self, ranges: &[DpaRange], tag: ExtentTag) {
        let mut arguments = capacity(ranges);
        arguments["selection-policy"] = "prescriptive".into();
        if tag != ExtentTag::NULL {
            arguments["tag"] = uuid::Uuid::from_bytes(tag.0).to_string().into();
        }
        self.execute("cxl-add-dynamic-capacity", arguments);
    }

    /// Asks for ranges of region 0 back.
    pub(super) fn release(&mut self, ranges: &[DpaRange]) {
        let mut arguments = capacity(ranges);
        arguments["removal-policy"] = "prescriptive".into();
        self.execute("cxl-release-dynamic-capacity", arguments);
    }

    fn execute(&mut self, command: &str, arguments: Value) {
        let order = json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{order}").expect("QEMU listens");
        loop {
            let answer = self.line();
            if answer.get("return").is_some() {
                return;
            }
            assert!(answer.get("error").is_none(), "{order}: {answer}");
            // Anything else is an event.
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("QEMU answers");
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line:?}"))
    }
}

fn capacity(ranges: &[DpaRange]) -> Value {
    let extents: Vec<Value> = ranges
        .iter()
        .map(|range| json!({ "offset": range.start.0, "len": range.len }))
        .collect();
    json!({ "path": "/machine/peripheral/dcd0", "host-id": 0, "region": 0, "extents": extents })
}
