//! What came of the parts of a program's run, by name.

use std::collections::BTreeMap;

/// The outcome of each part, such as `ok`. Equal parts of two runs have equal names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Results(BTreeMap<String, String>);

impl Results {
    /// Books one more part; parts that have the same name are numbered.
    pub(crate) fn add(&mut self, name: impl Into<String>, outcome: impl Into<String>) {
        let name = name.into();
        let mut unique = name.clone();
        let mut number = 2;
        while self.0.contains_key(&unique) {
            unique = format!("{name} #{number}");
            number += 1;
        }
        self.0.insert(unique, outcome.into());
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// How often each outcome that is but one word occurs, such as `412 ok, 3 skipped`.
    pub(crate) fn summary(&self) -> String {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for outcome in self.0.values() {
            let word = outcome.split_whitespace().next().unwrap_or("nothing");
            let plain = word.len() <= 12 && word.chars().all(|c| c.is_ascii_alphabetic());
            *counts
                .entry(if plain { word } else { "values" })
                .or_default() += 1;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let words: Vec<String> = counts
            .iter()
            .map(|(outcome, count)| format!("{count} {outcome}"))
            .collect();
        words.join(", ")
    }

    /// Every part whose outcome is not that of `without`, with both.
    pub(crate) fn differences(&self, without: &Self) -> Vec<String> {
        const NOTHING: &str = "nothing";
        let names = self.0.keys().chain(without.0.keys());
        let mut differences: Vec<String> = names
            .filter_map(|name| {
                let [with, without] = [self, without]
                    .map(|results| results.0.get(name).map_or(NOTHING, String::as_str));
                (with != without).then(|| format!("{name}: {with} instead of {without}"))
            })
            .collect();
        differences.sort();
        differences.dedup();
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named_with_both_outcomes() {
        let (mut with, mut without) = (Results::default(), Results::default());
        for results in [&mut with, &mut without] {
            results.add("a", "ok");
            results.add("a", "skipped for want of a network");
        }
        assert!(with.differences(&without).is_empty());
        assert_eq!(with.summary(), "1 ok, 1 skipped");
        without.add("b", "ok");
        assert_eq!(with.differences(&without), ["b: nothing instead of ok"]);
        with.add("b", "failed");
        assert_eq!(with.differences(&without), ["b: failed instead of ok"]);
    }
}
