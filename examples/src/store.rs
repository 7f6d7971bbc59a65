//! A table of a small key-value store: all of it in an arena of its own, every record with a checksum.
#![forbid(unsafe_code)]

use dcmalloc::Arena;
use dcmalloc::allocator_api2::boxed::Box;
use dcmalloc::allocator_api2::vec::Vec;
use hashbrown::{DefaultHashBuilder, HashMap};

/// Records by key.
#[derive(Debug)]
pub struct Store {
    records: HashMap<u64, Record, DefaultHashBuilder, Arena>,
    arena: Arena,
    value_bytes: usize,
}

#[derive(Debug)]
struct Record {
    checksum: u64,
    value: Box<[u8], Arena>,
}

/// A record that is not what was put.
#[derive(Debug, PartialEq, Eq)]
pub struct Damaged {
    /// Its key.
    pub key: u64,
}

impl Store {
    /// An empty store in `arena`.
    pub fn new_in(arena: Arena) -> Self {
        Self {
            records: HashMap::new_in(arena.clone()),
            arena,
            value_bytes: 0,
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.records = HashMap::new_in(self.arena.clone());
        self.value_bytes = 0;
    }

    /// Puts `value` under `key`, in place of what was there.
    pub fn put(&mut self, key: u64, value: &[u8]) {
        self.value_bytes += value.len();
        let mut copy = Vec::with_capacity_in(value.len(), self.arena.clone());
        copy.extend_from_slice(value);
        let record = Record {
            checksum: checksum(key, value),
            value: copy.into_boxed_slice(),
        };
        if let Some(old) = self.records.insert(key, record) {
            self.value_bytes -= old.value.len();
        }
    }

    /// The value under `key`, if there is one.
    ///
    /// # Errors
    /// [`Damaged`] when the value does not fit its checksum.
    pub fn get(&self, key: u64) -> Result<Option<&[u8]>, Damaged> {
        match self.records.get(&key) {
            Some(record) if record.checksum != checksum(key, &record.value) => Err(Damaged { key }),
            found => Ok(found.map(|record| &*record.value)),
        }
    }

    /// Removes `key`; whether it was there.
    pub fn remove(&mut self, key: u64) -> bool {
        match self.records.remove(&key) {
            Some(record) => {
                self.value_bytes -= record.value.len();
                true
            }
            None => false,
        }
    }

    /// Checks every record; returns how many there are.
    ///
    /// # Errors
    /// The first [`Damaged`] one.
    pub fn verify(&self) -> Result<usize, Damaged> {
        for key in self.records.keys() {
            self.get(*key)?;
        }
        Ok(self.records.len())
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Bytes of all values.
    pub fn value_bytes(&self) -> usize {
        self.value_bytes
    }
}

/// FNV-1a over the key and eight bytes at a time of the value: quick, and any changed byte shows.
fn checksum(key: u64, value: &[u8]) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let (words, rest) = value.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    let rest = rest.iter().map(|byte| u64::from(*byte));
    [key, value.len() as u64]
        .into_iter()
        .chain(words)
        .chain(rest)
        .fold(0xcbf2_9ce4_8422_2325, |hash, word| {
            (hash ^ word).wrapping_mul(PRIME).rotate_left(23)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use dcmalloc::DcMalloc;

    static HEAP: DcMalloc = DcMalloc::new();

    fn store() -> Store {
        Store::new_in(HEAP.arena("records").build().unwrap())
    }

    #[test]
    fn put_get_remove() {
        let mut store = store();
        store.put(1, b"one");
        store.put(2, b"two two");
        store.put(1, b"one again");
        assert_eq!(store.get(1), Ok(Some(&b"one again"[..])));
        assert_eq!(store.get(3), Ok(None));
        assert_eq!((store.len(), store.value_bytes()), (2, 16));
        assert!(store.remove(1) && !store.remove(1));
        assert_eq!(store.verify(), Ok(1));
        store.clear();
        assert_eq!((store.len(), store.value_bytes()), (0, 0));
    }

    #[test]
    fn every_changed_byte_is_found() {
        for at in 0..20 {
            let mut store = store();
            store.put(7, &[5; 20]);
            store.records.get_mut(&7).unwrap().value[at] ^= 1;
            assert_eq!(store.verify(), Err(Damaged { key: 7 }));
            assert_eq!(store.get(7), Err(Damaged { key: 7 }));
        }
    }
}
