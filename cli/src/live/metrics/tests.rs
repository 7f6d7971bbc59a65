use super::*;
use crate::top::sample::status;

/// Each line is a comment or a sample, each sample's family was announced, and
/// no sample comes twice.
#[test]
fn every_sample_belongs_to_a_family_and_is_unique() {
    let text = render(Some(&status()));
    let mut families = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            families.push(rest.split(' ').next().unwrap().to_owned());
        } else if !line.starts_with("# HELP ") {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(seen.insert(name.to_owned()), "twice: {line}");
            let family = families.last().unwrap();
            assert!(name.starts_with(family.as_str()), "{line} under {family}");
        }
    }
    assert!(families.len() > 30, "{families:?}");
    let unique: std::collections::HashSet<_> = families.iter().collect();
    assert_eq!(unique.len(), families.len());
}

#[test]
fn buckets_grow_and_end_with_all() {
    let text = render(Some(&status()));
    let counts: Vec<u64> = text
        .lines()
        .filter(|line| line.starts_with("dcmalloc_stall_seconds_bucket"))
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(counts.len(), STALL_BUCKETS);
    assert!(counts.is_sorted());
    assert!(text.contains("le=\"+Inf\"} 11\n"), "{text}");
    assert!(text.contains("dcmalloc_stall_seconds_count 11\n"));
    assert!(text.contains("dcmalloc_stall_seconds_bucket{le=\"0.000002048\"} 0\n"));
}

#[test]
fn a_process_may_call_itself_anything() {
    let mut status = status();
    status.clients[0].command = "a\"b\\c\nd".into();
    let text = render(Some(&status));
    assert!(text.contains(r#"command="a\"b\\c\nd""#), "{text}");
}

#[test]
fn without_a_broker_only_that_is_said() {
    let text = render(None);
    assert!(
        text.ends_with("dcmalloc_up 0\n") && text.lines().count() == 3,
        "{text}"
    );
}
