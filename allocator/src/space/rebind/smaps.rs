//! `/proc/self/smaps`, read in pieces into a buffer on the stack.
#![forbid(unsafe_code)]

use core::ops::Range;
use rustix::io::Errno;

/// One mapping of the process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Area {
    pub(super) range: Range<usize>,
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) executable: bool,
    pub(super) shared: bool,
    /// Its protection key (pkeys(7)), 0 where there are none.
    pub(super) key: u32,
}

/// Calls `each` with every mapping, in order of address. A line longer than
/// the buffer is cut; what matters stands at its beginning.
pub(super) fn each_area(
    mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>,
    mut each: impl FnMut(Area),
) -> Result<(), Errno> {
    let mut buffer = [0u8; 4096];
    let mut filled = 0;
    let mut cut = false;
    let mut current: Option<Area> = None;
    loop {
        let read = read(&mut buffer[filled..])?;
        filled += read;
        let mut rest = &buffer[..filled];
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let line = &rest[..end];
            rest = &rest[end + 1..];
            // The tail of a line that was cut is no line of its own.
            if core::mem::take(&mut cut) {
                continue;
            }
            if let Some(area) = header(line) {
                current.replace(area).into_iter().for_each(&mut each);
            } else if let (Some(area), Some(key)) = (&mut current, protection_key(line)) {
                area.key = key;
            }
        }
        if read == 0 {
            current.into_iter().for_each(each);
            return Ok(());
        }
        let left = rest.len();
        buffer.copy_within(filled - left..filled, 0);
        filled = left;
        if filled == buffer.len() {
            // Only a header can be this long, by its path.
            if let Some(area) = header(&buffer) {
                current.replace(area).into_iter().for_each(&mut each);
            }
            cut = true;
            filled = 0;
        }
    }
}

/// `7f12a000-7f12c000 rw-s 00000000 00:01 42   /memfd:x`
fn header(line: &[u8]) -> Option<Area> {
    let mut fields = line.split(|&byte| byte == b' ');
    let range = fields.next()?;
    let dash = range.iter().position(|&byte| byte == b'-')?;
    let &[r, w, x, s] = fields.next()? else {
        return None;
    };
    Some(Area {
        range: number(&range[..dash], 16)?..number(&range[dash + 1..], 16)?,
        readable: r == b'r',
        writable: w == b'w',
        executable: x == b'x',
        shared: s == b's',
        key: 0,
    })
}

/// `ProtectionKey:         0`
fn protection_key(line: &[u8]) -> Option<u32> {
    let value = line.strip_prefix(b"ProtectionKey:")?;
    number(value.trim_ascii(), 10).map(|key| key as u32)
}

fn number(digits: &[u8], radix: u32) -> Option<usize> {
    let text = core::str::from_utf8(digits).ok()?;
    usize::from_str_radix(text, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn areas(text: &str, chunk: usize) -> Vec<Area> {
        let mut left = text.as_bytes();
        let mut seen = Vec::new();
        let read = |buffer: &mut [u8]| {
            let n = chunk.min(left.len()).min(buffer.len());
            buffer[..n].copy_from_slice(&left[..n]);
            left = &left[n..];
            Ok(n)
        };
        each_area(read, |area| seen.push(area)).unwrap();
        seen
    }

    #[test]
    fn headers_and_keys_are_read_whatever_the_pieces() {
        let text = "\
10000-20000 rw-s 00000000 00:01 42                     /memfd:a b (deleted)
Size:                 64 kB
ProtectionKey:         0
VmFlags: rd wr sh
7f0000200000-7f0000400000 r-xp 00000000 00:00 0 
Rss:                   0 kB
ProtectionKey:         3
VmFlags: rd ex
";
        for chunk in [1, 7, 100, 4096] {
            let seen = areas(text, chunk);
            assert_eq!(seen.len(), 2, "pieces of {chunk}");
            assert_eq!(seen[0].range, 0x10000..0x20000);
            assert!(seen[0].shared && seen[0].writable && !seen[0].executable);
            assert_eq!((seen[0].key, seen[1].key), (0, 3));
            assert!(seen[1].executable && !seen[1].writable && !seen[1].shared);
        }
    }

    #[test]
    fn a_path_longer_than_the_buffer_hides_no_mapping() {
        let path = "/very/long".repeat(1000);
        let text = format!(
            "1000-2000 rw-p 0 00:01 1 {path}\nProtectionKey: 2\n2000-3000 r--p 0 00:01 1\n"
        );
        let seen = areas(&text, 4096);
        assert_eq!(seen.len(), 2);
        assert_eq!((seen[0].key, seen[1].range.start), (2, 0x2000));
    }
}
