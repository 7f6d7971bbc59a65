//! `DCMALLOC_CONF` for the program: what the environment says, then `--conf`,
//! then `--placement`; all over the file, which the program reads by itself.
//! The library ignores what it does not know, because it must not disturb a
//! program; `dcm` is the place to refuse it.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::path::Path;
use std::{env, fs};

use allocator::Config;
use allocator::config::{KEYS, items};

use crate::failure::Failure;

/// The settings' variable.
pub(crate) const VARIABLE: &str = "DCMALLOC_CONF";
/// Names another file than the machine's.
pub(crate) const FILE_VARIABLE: &str = "DCMALLOC_CONF_FILE";
const FILE: &str = "/etc/dcmalloc.conf";
/// The library refuses a longer one.
const MAX_FILE: usize = 4096;

/// What the program's heap is told.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The variable's value.
    pub(crate) text: String,
    /// What it means, over the file.
    pub(crate) config: Config,
}

impl Settings {
    /// Those that are not the defaults.
    pub(crate) fn changed(&self) -> String {
        let changed = KEYS.iter().filter_map(|key| {
            let value = self.config.value(key.name)?;
            let differs = Config::DEFAULT.value(key.name)? != value;
            differs.then(|| format!("{}:{value}", key.name))
        });
        changed.collect::<Vec<_>>().join(",")
    }
}

/// The settings of the file; the defaults where the machine has none.
pub(crate) fn of_file() -> Result<Config, Failure> {
    let named = env::var_os(FILE_VARIABLE);
    let path = named.as_deref().map_or(Path::new(FILE), Path::new);
    let refused = |why: &dyn Display| Failure::Usage(format!("{}: {why}", path.display()));
    let text = match fs::read_to_string(path) {
        Ok(text) if text.len() >= MAX_FILE => return Err(refused(&"it is not less than 4 KiB")),
        Ok(text) => text,
        Err(_) if named.is_none() => String::new(),
        Err(error) => return Err(refused(&error)),
    };
    let mut config = Config::DEFAULT;
    for item in items(&text) {
        config.set(item).map_err(|error| refused(&error))?;
    }
    Ok(config)
}

/// Joins and checks the settings over those of the file; later ones win.
pub(crate) fn join(
    file: Config,
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
    let mut config = file;
    for (source, text) in sources {
        for item in items(text.unwrap_or_default()) {
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
        let joined = join(
            Config::DEFAULT,
            Some("verbose:true"),
            Some("verbose:false,"),
            Some("dc"),
        )
        .unwrap();
        assert_eq!(joined.text, "verbose:true,verbose:false,placement:dc");
        assert!(!joined.config.verbose);
        assert_eq!(join(Config::DEFAULT, None, None, None).unwrap().text, "");
    }

    #[test]
    fn an_unknown_setting_is_refused_with_the_nearest_known_one() {
        let error = join(Config::DEFAULT, None, Some("placment:dc"), None).unwrap_err();
        assert_eq!(error.code(), 2);
        let text = error.to_string();
        assert!(
            text.starts_with("--conf") && text.contains("`placement`"),
            "{text}"
        );
        let error = join(Config::DEFAULT, Some("verbos:true"), None, None).unwrap_err();
        assert!(error.to_string().starts_with(VARIABLE), "{error}");
        let error = join(Config::DEFAULT, None, None, Some("moon")).unwrap_err();
        assert!(error.to_string().contains("moon"), "{error}");
    }
}
