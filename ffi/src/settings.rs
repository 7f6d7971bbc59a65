//! Where the settings of this process come from: a file, the environment, and
//! the program, each over the ones before.
//!
//! | from | |
//! |---|---|
//! | [`FILE`], or the file that `DCMALLOC_CONF_FILE` names | settings separated by commas or ends of lines; lines that begin with `#` are comments |
//! | `DCMALLOC_CONF` | `key:value,…` |
//! | [`configure`] | the same, before the heap starts |
//!
//! A set-user-ID program reads neither file nor environment. Nothing here
//! allocates unless the program calls [`configure`].

use core::ffi::{CStr, c_char};
use core::fmt::{self, Write};

use allocator::Config;
use allocator::config::{ConfigError, items};
use allocator::sync::Lock;
use rustix::fs::{Mode, OFlags};

/// The settings of a machine.
pub const FILE: &CStr = c"/etc/dcmalloc.conf";

/// A longer file is refused.
const MAX_FILE: usize = 4096;

static SAID: Lock<String> = Lock::new(String::new());

/// Whether settings can be read, and would all be taken.
///
/// # Errors
/// What is wrong with the first that would not.
pub fn check(text: &str) -> Result<(), ConfigError<'_>> {
    let mut config = Config::DEFAULT;
    items(text).try_for_each(|item| config.set(item))
}

/// What the program says, over what it said before.
pub(crate) fn configure(text: &str) {
    let mut said = SAID.lock();
    said.push(',');
    said.push_str(text);
}

/// What the environment says, if it may be trusted.
pub(crate) fn environment(name: &CStr) -> Option<&'static CStr> {
    unsafe extern "C" {
        fn secure_getenv(name: *const c_char) -> *const c_char;
    }
    // SAFETY: a nul-terminated name; libc returns null or a string that stays
    // for as long as the program leaves that variable alone. The preloaded
    // library asks before the program's constructors run, others when the
    // program calls, as getenv(3) would.
    let value = unsafe { secure_getenv(name.as_ptr()) };
    // SAFETY: as above.
    (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) })
}

fn trusted() -> bool {
    // SAFETY: a plain call.
    unsafe { libc::getauxval(libc::AT_SECURE) == 0 }
}

/// The settings, and how many could not be read.
pub(crate) fn read() -> (Config, u32) {
    let mut buffer = [0; MAX_FILE];
    let file = read_file(&mut buffer);
    let named = environment(c"DCMALLOC_CONF_FILE").is_some();
    let environment =
        environment(c"DCMALLOC_CONF").map_or(Ok(""), |text| text.to_str().map_err(drop));
    let said = SAID.lock();
    let name = if named {
        "DCMALLOC_CONF_FILE"
    } else {
        "/etc/dcmalloc.conf"
    };
    let sources = [
        (name, file),
        ("DCMALLOC_CONF", environment),
        ("dcm_configure", Ok(said.as_str())),
    ];
    let (mut config, mut refused) = (Config::DEFAULT, 0);
    for (_, text) in &sources {
        refused += text.map_or(1, |text| config.set_all(text));
    }
    if config.confirm_conf {
        for (source, text) in &sources {
            confirm(source, *text);
        }
        say(&format_args!("settings in effect: {config}"));
    }
    (config, refused)
}

/// What one source said, and what of it was not understood.
fn confirm(source: &str, text: Result<&str, ()>) {
    let Ok(text) = text else {
        return say(&format_args!("{source}: cannot be read"));
    };
    let mut config = Config::DEFAULT;
    for item in items(text) {
        match config.set(item) {
            Ok(()) => say(&format_args!("{source}: {item}")),
            Err(error) => say(&format_args!("{source}: ignored: {error}")),
        }
    }
}

/// The file's text; empty if there is none. A file that was named must be there.
fn read_file(buffer: &mut [u8; MAX_FILE]) -> Result<&str, ()> {
    if !trusted() {
        return Ok("");
    }
    let named = environment(c"DCMALLOC_CONF_FILE");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let Ok(file) = rustix::fs::open(named.unwrap_or(FILE), flags, Mode::empty()) else {
        return if named.is_some() { Err(()) } else { Ok("") };
    };
    let mut len = 0;
    loop {
        match rustix::io::read(&file, &mut buffer[len..]) {
            Ok(0) if len < MAX_FILE => break,
            Ok(0) | Err(_) => return Err(()),
            Ok(n) => len += n,
        }
    }
    str::from_utf8(&buffer[..len]).map_err(drop)
}

/// One line on stderr, without the heap: the text goes into a fixed buffer.
pub(crate) fn say(text: &dyn fmt::Display) {
    let mut line = Line::<1024>::new();
    let _ = write!(line, "dcmalloc: {text}");
    line.print();
}

/// A line of at most `N` bytes; what is more is cut off.
pub(crate) struct Line<const N: usize> {
    text: [u8; N],
    len: usize,
}

impl<const N: usize> Line<N> {
    pub(crate) const fn new() -> Self {
        Self {
            text: [0; N],
            len: 0,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        // The last byte is for the end of the line.
        let room = &mut self.text[self.len..N - 1];
        let n = bytes.len().min(room.len());
        room[..n].copy_from_slice(&bytes[..n]);
        self.len += n;
    }

    pub(crate) fn print(&mut self) {
        self.text[self.len] = b'\n';
        let _ = rustix::io::write(rustix::stdio::stderr(), &self.text[..=self.len]);
    }
}

impl<const N: usize> Write for Line<N> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.push(s.as_bytes());
        Ok(())
    }
}

impl<const N: usize> std::io::Write for Line<N> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
