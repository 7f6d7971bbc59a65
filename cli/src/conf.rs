//! `DCMALLOC_CONF` for the program: what the environment says, then `--conf`,
//! then `--placement`. The library ignores what it does not know, because it
//! must not disturb a program; `dcm` is the place to refuse it.
#![forbid(unsafe_code)]

use allocator::Config;

use crate::failure::Failure;

/// The settings' variable.
pub(crate) const VARIABLE: &str = "DCMALLOC_CONF";

/// What the program's heap is told.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The variable's value.
    pub(crate) text: String,
    /// What it means.
    pub(crate) config: Config,
}

/// Joins and checks the settings; later ones win.
pub(crate) fn join(
    environment: Option<&str>,
    option: Option<&str>,
    placement: Option<&str>,
) -> Result<Settings, Failure> {
    let placement = placement.map(|placement| format!("placement:{placement}"));
    let sources = [
        (VARIABLE, environment),
        ("--conf", option),
        ("--placement", placement.as_deref()),
    ];
    let mut joined = Vec::new();
    let mut config = Config::DEFAULT;
    for (source, text) in sources {
        let items = text.unwrap_or_default().split(',').map(str::trim);
        for item in items.filter(|item| !item.is_empty()) {
            config
                .set(item)
                .map_err(|error| Failure::Usage(format!("{source}: {error}")))?;
            joined.push(item);
        }
    }
    Ok(Settings {
        text: joined.join(","),
        config,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_settings_come_last() {
        let joined = join(Some("verbose:true"), Some("verbose:false,"), Some("dc")).unwrap();
        assert_eq!(joined.text, "verbose:true,verbose:false,placement:dc");
        assert!(!joined.config.verbose);
        assert_eq!(join(None, None, None).unwrap().text, "");
    }

    #[test]
    fn an_unknown_setting_is_refused_with_the_nearest_known_one() {
        let error = join(None, Some("placment:dc"), None).unwrap_err();
        assert_eq!(error.code(), 2);
        let text = error.to_string();
        assert!(
            text.starts_with("--conf") && text.contains("`placement`"),
            "{text}"
        );
        let error = join(Some("verbos:true"), None, None).unwrap_err();
        assert!(error.to_string().starts_with(VARIABLE), "{error}");
        let error = join(None, None, Some("moon")).unwrap_err();
        assert!(error.to_string().contains("moon"), "{error}");
    }
}
