//! Reading the JUnit files that CPython's regrtest writes: each test case with what came of it.

use super::Results;

const CASE: &str = "<testcase name=\"";

/// Books every test case of `xml`: `ok`, or the name of the element inside it, such as `failure`.
pub(super) fn read(xml: &str, results: &mut Results) {
    let mut rest = xml;
    while let Some((_, at)) = rest.split_once(CASE) {
        let (name, after) = at.split_once('"').unwrap_or((at, ""));
        let (attributes, inside) = after.split_once('>').unwrap_or((after, ""));
        let outcome = if attributes.ends_with('/') {
            "ok"
        } else {
            let element = inside.trim_start().trim_start_matches('<');
            let end = element.find([' ', '>', '/']).unwrap_or(element.len());
            // No more than what the test printed.
            match &element[..end] {
                "system-out" | "system-err" | "" => "ok",
                other => other,
            }
        };
        results.add(name, outcome);
        rest = inside;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_its_outcome() {
        let xml = r#"<testsuites tests="3"><testsuite><testcase name="a.b" result="completed" time="0.1" />
<testcase name="a.c" result="completed" time="0.2"><skipped>not here</skipped></testcase>
<testcase name="a.d" time="1"><failure type="AssertionError">why</failure></testcase></testsuite></testsuites>"#;
        let (mut results, mut expected) = (Results::default(), Results::default());
        read(xml, &mut results);
        for (name, outcome) in [("a.b", "ok"), ("a.c", "skipped"), ("a.d", "failure")] {
            expected.add(name, outcome);
        }
        assert_eq!(results, expected);
    }
}
