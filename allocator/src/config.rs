//! Settings: `key:value,key:value`, in the style of jemalloc's `MALLOC_CONF`.
//!
//! [`KEYS`] is the one table of them; `dcm` checks against it and the
//! documentation is made from it.
#![forbid(unsafe_code)]

#[path = "config/spill_dir.rs"]
mod spill_dir;

use crate::placement::{OnExhausted, Placement};
use core::fmt;
pub use spill_dir::SpillDir;

/// A setting that can be named in `DCMALLOC_CONF`.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What values it takes.
    pub values: &'static str,
    /// What it is if nothing is said.
    pub default: &'static str,
    /// What it does.
    pub help: &'static str,
}

const fn key(
    name: &'static str,
    values: &'static str,
    default: &'static str,
    help: &'static str,
) -> Key {
    Key {
        name,
        values,
        default,
        help,
    }
}

/// Every key.
pub const KEYS: &[Key] = &[
    key(
        "placement",
        "dram | dc | size[=BYTES, 4K or more] | interleave=N (2 or more)",
        "size=64K",
        "where allocations go",
    ),
    key(
        "on_exhausted",
        "dram | fail | wait=MS",
        "dram",
        "what an allocation does when no extent is left",
    ),
    key(
        "dram_limit",
        "BYTES | none",
        "none",
        "DRAM that the heap may hold, by placement or by moves, for live data to be moved there \
         under pressure",
    ),
    key(
        "spill_dir",
        "ABSOLUTE PATH | none",
        "none",
        "where live data is written that can move neither to other extents nor to DRAM",
    ),
    key(
        "spill_limit",
        "BYTES | none",
        "none",
        "how much may be written there",
    ),
    key(
        "io_dram",
        "true | false",
        "true",
        "whether blocks of 4 KiB and more aligned to 512 and more, as for direct I/O, go to DRAM",
    ),
    key(
        "promote",
        "BYTES",
        "512M",
        "how much may move back to extents per second when there are some again",
    ),
    key(
        "moves",
        "safe | user",
        "safe",
        "where the kernel's own accesses can't be made to wait: whether live memory stays where it \
         is, or moves and a system call that meets it fails with EFAULT",
    ),
    key(
        "fork",
        "eager | lazy | none",
        "eager",
        "how a child gets what is on extents: moved to DRAM before, copied by the broker when \
         touched (or else as eager), or not at all",
    ),
    key(
        "decay",
        "MS",
        "250",
        "how long the engine keeps freed pages of extents",
    ),
    key(
        "return_after",
        "MS",
        "500",
        "how long an unused granule is kept before it goes back to the broker",
    ),
    key(
        "on_lost",
        "sigbus | zero",
        "sigbus",
        "what memory reads as that a device took by force, where no callback says otherwise",
    ),
    key(
        "confirm_conf",
        "true | false",
        "false",
        "whether the settings and where they come from are written to stderr at the start",
    ),
    key(
        "stats_print",
        "true | false",
        "false",
        "whether statistics are written to stderr, as a line of JSON, when the process ends",
    ),
    key(
        "verbose",
        "true | false",
        "false",
        "whether notes may be written to stderr (lost memory is told always)",
    ),
];

/// How a forked child gets what its parent has on extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ForkPolicy {
    /// It is moved to DRAM before the fork.
    Eager,
    /// The source copies what either touches; where it can't, as `Eager`.
    Lazy,
    /// Not at all: a child that touches it gets SIGSEGV. For programs whose
    /// children only call exec.
    None,
}

/// The settings of a heap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Where allocations go.
    pub placement: Placement,
    /// What happens when no extent is left.
    pub on_exhausted: OnExhausted,
    /// Bytes of DRAM that the heap may hold for granules to be moved there, what
    /// is there by placement among them; `u64::MAX`: no limit. The control
    /// group's limit holds besides.
    pub dram_limit: u64,
    /// Where live data is written that can go nowhere else.
    pub spill_dir: Option<SpillDir>,
    /// Bytes that may be written there; `u64::MAX`: no limit.
    pub spill_limit: u64,
    /// Whether what looks like a buffer for direct I/O goes to DRAM.
    pub io_dram: bool,
    /// Bytes per second that may be moved back to extents; 0: none.
    pub promote: u64,
    /// Whether live memory moves also where a system call that meets it then
    /// fails with `EFAULT`.
    pub user_moves: bool,
    /// How a forked child gets what is on extents.
    pub fork: ForkPolicy,
    /// Milliseconds for which freed pages of extents stay with the engine.
    pub decay_ms: u32,
    /// Milliseconds for which an unused granule is kept.
    pub return_after_ms: u32,
    /// Whether what is lost reads as zeroes, instead of raising SIGBUS.
    pub zero_lost: bool,
    /// Whether the settings are written to stderr at the start.
    pub confirm_conf: bool,
    /// Whether statistics are written to stderr at the end.
    pub stats_print: bool,
    /// Whether notes may be written to stderr; lost memory is told always.
    pub verbose: bool,
}

impl Config {
    /// What holds if nothing is said.
    pub const DEFAULT: Self = Self {
        placement: Placement::Size(Placement::DEFAULT_THRESHOLD),
        on_exhausted: OnExhausted::Dram,
        dram_limit: u64::MAX,
        spill_dir: None,
        spill_limit: u64::MAX,
        io_dram: true,
        promote: 512 << 20,
        user_moves: false,
        fork: ForkPolicy::Eager,
        decay_ms: 250,
        return_after_ms: 500,
        zero_lost: false,
        confirm_conf: false,
        stats_print: false,
        verbose: false,
    };

    /// Reads one `key:value`; the last word on a key holds.
    ///
    /// # Errors
    /// The key is none of [`KEYS`], or the value is none that it takes; the
    /// settings are then as they were.
    pub fn set<'a>(&mut self, item: &'a str) -> Result<(), ConfigError<'a>> {
        let (name, value) = item
            .split_once(':')
            .ok_or(ConfigError::NoValue { item })
            .map(|(name, value)| (name.trim(), value.trim()))?;
        let bad = |expected| ConfigError::BadValue {
            name,
            value,
            expected,
        };
        let key = KEYS
            .iter()
            .find(|key| key.name == name)
            .ok_or(ConfigError::UnknownKey { name })?;
        match name {
            "placement" => self.placement = placement(value).ok_or(bad(key.values))?,
            "on_exhausted" => self.on_exhausted = on_exhausted(value).ok_or(bad(key.values))?,
            "dram_limit" if value == "none" => self.dram_limit = u64::MAX,
            "dram_limit" => self.dram_limit = parse_size(value).ok_or(bad(key.values))? as u64,
            "spill_dir" if value == "none" => self.spill_dir = None,
            "spill_dir" => self.spill_dir = Some(SpillDir::new(value).ok_or(bad(key.values))?),
            "spill_limit" if value == "none" => self.spill_limit = u64::MAX,
            "spill_limit" => self.spill_limit = parse_size(value).ok_or(bad(key.values))? as u64,
            "io_dram" => self.io_dram = value.parse().map_err(|_| bad(key.values))?,
            "promote" => self.promote = parse_size(value).ok_or(bad(key.values))? as u64,
            "moves" => match value {
                "safe" => self.user_moves = false,
                "user" => self.user_moves = true,
                _ => return Err(bad(key.values)),
            },
            "fork" => self.fork = fork(value).ok_or(bad(key.values))?,
            "decay" => self.decay_ms = value.parse().map_err(|_| bad(key.values))?,
            "return_after" => self.return_after_ms = value.parse().map_err(|_| bad(key.values))?,
            "on_lost" => match value {
                "sigbus" => self.zero_lost = false,
                "zero" => self.zero_lost = true,
                _ => return Err(bad(key.values)),
            },
            "confirm_conf" => self.confirm_conf = value.parse().map_err(|_| bad(key.values))?,
            "stats_print" => self.stats_print = value.parse().map_err(|_| bad(key.values))?,
            _ => self.verbose = value.parse().map_err(|_| bad(key.values))?,
        }
        Ok(())
    }

    /// Reads a whole string; what can't be read is skipped and counted.
    pub fn read(text: &str) -> (Self, u32) {
        let mut config = Self::DEFAULT;
        let refused = config.set_all(text);
        (config, refused)
    }

    /// Reads the settings in a text over these; how many could not be read.
    pub fn set_all(&mut self, text: &str) -> u32 {
        items(text).filter(|item| self.set(item).is_err()).count() as u32
    }

    /// The value of a key, as [`Config::set`] reads it. `None`: no such key.
    pub fn value(&self, name: &str) -> Option<String> {
        let key = KEYS.iter().find(|key| key.name == name)?;
        Some(Setting { config: self, key }.to_string())
    }
}

/// The settings of a text, which are separated by commas or ends of lines.
/// Lines that begin with `#` are none.
pub fn items(text: &str) -> impl Iterator<Item = &str> {
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'));
    let items = lines.flat_map(|line| line.split(','));
    items.map(str::trim).filter(|item| !item.is_empty())
}

/// One setting, without its key.
struct Setting<'a> {
    config: &'a Config,
    key: &'a Key,
}

impl fmt::Display for Setting<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = self.config;
        let limit = |f: &mut fmt::Formatter<'_>, bytes| match bytes {
            u64::MAX => f.write_str("none"),
            bytes => write!(f, "{bytes}"),
        };
        match self.key.name {
            "placement" => match config.placement {
                Placement::Dram => f.write_str("dram"),
                Placement::Dc => f.write_str("dc"),
                Placement::Size(bytes) => write!(f, "size={bytes}"),
                Placement::Interleave(n) => write!(f, "interleave={n}"),
            },
            "on_exhausted" => match config.on_exhausted {
                OnExhausted::Dram => f.write_str("dram"),
                OnExhausted::Fail => f.write_str("fail"),
                OnExhausted::Wait(ms) => write!(f, "wait={ms}"),
            },
            "dram_limit" => limit(f, config.dram_limit),
            "spill_dir" => match &config.spill_dir {
                None => f.write_str("none"),
                Some(dir) => f.write_str(dir.as_c_str().to_str().unwrap_or("none")),
            },
            "spill_limit" => limit(f, config.spill_limit),
            "io_dram" => write!(f, "{}", config.io_dram),
            "promote" => write!(f, "{}", config.promote),
            "moves" => f.write_str(if config.user_moves { "user" } else { "safe" }),
            "fork" => f.write_str(match config.fork {
                ForkPolicy::Lazy => "lazy",
                ForkPolicy::Eager => "eager",
                ForkPolicy::None => "none",
            }),
            "decay" => write!(f, "{}", config.decay_ms),
            "return_after" => write!(f, "{}", config.return_after_ms),
            "on_lost" => f.write_str(if config.zero_lost { "zero" } else { "sigbus" }),
            "confirm_conf" => write!(f, "{}", config.confirm_conf),
            "stats_print" => write!(f, "{}", config.stats_print),
            _ => write!(f, "{}", config.verbose),
        }
    }
}

/// `key:value,…` of all keys.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, key) in KEYS.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{}:{}", key.name, Setting { config: self, key })?;
        }
        Ok(())
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Why a setting was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ConfigError<'a> {
    /// There is no colon in it.
    NoValue {
        /// The text.
        item: &'a str,
    },
    /// No key has that name.
    UnknownKey {
        /// The name.
        name: &'a str,
    },
    /// The key does not take that value.
    BadValue {
        /// The key.
        name: &'a str,
        /// The value.
        value: &'a str,
        /// What it takes.
        expected: &'static str,
    },
}

impl ConfigError<'_> {
    /// For an unknown key: the key whose name is nearest to it.
    pub fn nearest(&self) -> Option<&'static str> {
        let Self::UnknownKey { name } = self else {
            return None;
        };
        nearest(name, KEYS.iter().map(|key| key.name))
    }
}

impl fmt::Display for ConfigError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoValue { item } => write!(f, "setting `{item}` has no value: write key:value"),
            Self::UnknownKey { name } => {
                let nearest = self.nearest().unwrap_or_default();
                write!(f, "unknown setting `{name}`: did you mean `{nearest}`?")
            }
            Self::BadValue {
                name,
                value,
                expected,
            } => {
                write!(f, "`{name}` does not take `{value}`: it takes {expected}")
            }
        }
    }
}

impl core::error::Error for ConfigError<'_> {}

/// A size in bytes: digits with K, M, G or T (powers of 1024) after them.
pub fn parse_size(text: &str) -> Option<usize> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'0'..=b'9' => (text, 0),
        unit => (
            text.get(..text.len() - 1)?,
            10 * (1 + b"KMGT".iter().position(|&u| u == unit)?),
        ),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

/// Smallest threshold: below a page nothing would be gained.
const MIN_THRESHOLD: usize = 4096;

fn placement(value: &str) -> Option<Placement> {
    let (name, argument) = argument(value);
    match (name, argument) {
        ("dram", None) => Some(Placement::Dram),
        ("dc", None) => Some(Placement::Dc),
        ("size", None) => Some(Placement::default()),
        ("size", Some(bytes)) => parse_size(bytes)
            .filter(|&bytes| bytes >= MIN_THRESHOLD)
            .map(Placement::Size),
        ("interleave", Some(n)) => n
            .parse()
            .ok()
            .filter(|&n| n >= 2)
            .map(Placement::Interleave),
        _ => None,
    }
}

fn fork(text: &str) -> Option<ForkPolicy> {
    match text {
        "eager" => Some(ForkPolicy::Eager),
        "lazy" => Some(ForkPolicy::Lazy),
        "none" => Some(ForkPolicy::None),
        _ => None,
    }
}

fn on_exhausted(value: &str) -> Option<OnExhausted> {
    match argument(value) {
        ("dram", None) => Some(OnExhausted::Dram),
        ("fail", None) => Some(OnExhausted::Fail),
        ("wait", Some(ms)) => ms.parse().ok().map(OnExhausted::Wait),
        _ => None,
    }
}

/// `size:64K` and `size=64K` alike: a name, and what it is given.
fn argument(value: &str) -> (&str, Option<&str>) {
    match value.split_once([':', '=']) {
        Some((name, argument)) => (name, Some(argument)),
        None => (value, None),
    }
}

/// Of some names, the one that is nearest to `name`.
pub fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names.min_by_key(|known| distance(known.as_bytes(), name.as_bytes()))
}

/// Levenshtein distance of two short names.
fn distance(a: &[u8], b: &[u8]) -> usize {
    const MAX: usize = 64;
    let b = &b[..b.len().min(MAX)];
    let mut row: [usize; MAX + 1] = core::array::from_fn(|i| i);
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_documented() {
        let (config, refused) = Config::read(
            "placement:size:1M,on_exhausted:wait:50,decay:10,return_after:0,verbose:true",
        );
        assert_eq!(refused, 0);
        assert_eq!(config.placement, Placement::Size(1 << 20));
        assert_eq!(config.on_exhausted, OnExhausted::Wait(50));
        assert_eq!(
            (config.decay_ms, config.return_after_ms, config.verbose),
            (10, 0, true)
        );
        let config = Config::read("spill_dir:/var/tmp,spill_limit:3G").0;
        assert_eq!(config.spill_dir.unwrap().as_c_str(), c"/var/tmp");
        assert_eq!(config.spill_limit, 3 << 30);
        assert_eq!(Config::read("").0, Config::DEFAULT);
        for (text, placement) in [
            ("placement:dc", Placement::Dc),
            ("placement:dram", Placement::Dram),
            ("placement:size", Placement::Size(64 << 10)),
            ("placement:interleave=4", Placement::Interleave(4)),
        ] {
            assert_eq!(Config::read(text).0.placement, placement);
        }
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        for key in KEYS {
            let mut config = Config::DEFAULT;
            config
                .set(&format!("{}:{}", key.name, key.default))
                .unwrap();
            assert_eq!(config, Config::DEFAULT, "{}", key.name);
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let said = "placement:interleave=3,on_exhausted:wait=20,dram_limit:1G,spill_dir:/tmp,io_dram:false";
        let config = Config::read(said).0;
        let (again, refused) = Config::read(&config.to_string());
        assert_eq!((again, refused), (config, 0), "{config}");
        assert_eq!(
            Config::read(&Config::DEFAULT.to_string()).0,
            Config::DEFAULT
        );
        assert_eq!(config.value("on_exhausted").as_deref(), Some("wait=20"));
        assert_eq!(config.value("on_exhaust"), None);
    }

    /// A key that nobody had thought of here was shown with the value of another: `fork:false`,
    /// which cannot be read.
    #[test]
    fn each_key_shows_its_own_value() {
        let others = [
            "placement:dc",
            "on_exhausted:fail",
            "dram_limit:1",
            "spill_dir:/tmp",
            "spill_limit:2",
            "io_dram:false",
            "promote:3",
            "moves:user",
            "fork:lazy",
            "decay:4",
            "return_after:5",
            "on_lost:zero",
            "confirm_conf:true",
            "stats_print:true",
            "verbose:true",
        ];
        assert_eq!(others.len(), KEYS.len());
        for (key, said) in KEYS.iter().zip(others) {
            let (config, refused) = Config::read(said);
            let value = config.value(key.name).unwrap();
            assert_eq!(
                (format!("{}:{value}", key.name).as_str(), refused),
                (said, 0)
            );
            assert_ne!(config, Config::DEFAULT, "{said}");
            assert_eq!(Config::read(&config.to_string()), (config, 0));
        }
    }

    #[test]
    fn a_file_has_lines_and_comments() {
        let text = "# ours\n\n placement:dc\n  # decay:1\ndecay:7,return_after:8\r\nwrong\n";
        let (config, refused) = Config::read(text);
        assert_eq!((config.placement, config.decay_ms), (Placement::Dc, 7));
        assert_eq!((config.return_after_ms, refused), (8, 1));
    }

    #[test]
    fn what_is_wrong_is_named_and_changes_nothing() {
        let mut config = Config::DEFAULT;
        let error = config.set("placment:dc").unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown setting `placment`: did you mean `placement`?"
        );
        assert_eq!(
            ConfigError::UnknownKey { name: "on_exhaust" }.nearest(),
            Some("on_exhausted")
        );
        for bad in [
            "placement:size=12Q",
            "placement:size=1",
            "placement:cxl",
            "on_exhausted:wait",
            "decay:-1",
            "verbose:yes",
            "verbose",
            "placement:interleave=1",
            "spill_dir:relative",
            "spill_limit:much",
        ] {
            assert!(config.set(bad).is_err(), "{bad}");
        }
        assert_eq!(config, Config::DEFAULT);
        assert_eq!(Config::read("x:y,placement:dc,decay:?").1, 2);
    }

    /// It was cut where no character ends, which panics: a program with such a setting in its
    /// environment ended at its first allocation.
    #[test]
    fn a_size_that_ends_in_the_middle_of_a_character_is_none() {
        for bad in ["1é", "é", "64Ԍ", "1😀"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
        assert_eq!(Config::read("promote:1é,decay:7").1, 1);
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64K"), Some(65536));
        assert_eq!(parse_size("1g"), Some(1 << 30));
        assert_eq!(parse_size("12"), Some(12));
        for bad in ["", "K", "1KK", "1X", "-1", "99999999999T", "1.5G"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }
}
