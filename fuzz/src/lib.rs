//! What the targets share.
#![deny(unsafe_code)]

pub mod judge;
pub mod peer;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dax_backend::device::DeviceConfig;
use dax_backend::journal::{Journal, JournalEntry};
use dax_backend::mailbox::MailboxConfig;

/// A driver that waits for nothing: the software device is done when the doorbell is rung.
pub fn impatient() -> DeviceConfig {
    DeviceConfig {
        mailbox: MailboxConfig {
            doorbell_timeout: Duration::ZERO,
            background_timeout: Duration::ZERO,
            attempts: 3,
            first_backoff: Duration::ZERO,
        },
        ..DeviceConfig::default()
    }
}

/// A journal that outlives its driver.
#[derive(Clone, Default)]
pub struct Kept(Arc<Mutex<Option<JournalEntry>>>);

impl Journal for Kept {
    fn save(&mut self, entry: &JournalEntry) -> io::Result<()> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(entry.clone());
        Ok(())
    }

    fn load(&mut self) -> io::Result<Option<JournalEntry>> {
        Ok(self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone())
    }
}
