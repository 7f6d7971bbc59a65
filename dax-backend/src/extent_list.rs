//! Reading the device's list of accepted extents, which takes several commands and may change
//! in between.

#![forbid(unsafe_code)]

use crate::cmd::dynamic_capacity::{ExtentListHeader, GetExtentList, ListedExtent};
use crate::error::DeviceError;
use crate::extent::Extent;
use crate::mailbox::Mailbox;
use crate::mmio::Mmio;

/// How often a list that changes underneath is read again, as in Linux.
const ATTEMPTS: u32 = 10;

/// The whole list, from one generation of it, in order of DPA. `blocks` are those of all DC
/// regions: there cannot be more extents.
///
/// QEMU never changes the generation number, so the total is compared as well.
///
/// # Errors
/// [`DeviceError::ExtentListUnstable`], [`DeviceError::ExtentListTruncated`],
/// [`DeviceError::ExtentListTooLong`], or the mailbox's.
pub fn read<M: Mmio>(mailbox: &mut Mailbox<M>, blocks: u64) -> Result<Vec<Extent>, DeviceError> {
    for _ in 0..ATTEMPTS {
        if let Some(mut extents) = read_once(mailbox, blocks)? {
            extents.sort_unstable_by_key(|extent| extent.range);
            return Ok(extents);
        }
    }
    Err(DeviceError::ExtentListUnstable { attempts: ATTEMPTS })
}

/// One pass; `None` if the list changed during it.
fn read_once<M: Mmio>(
    mailbox: &mut Mailbox<M>,
    blocks: u64,
) -> Result<Option<Vec<Extent>>, DeviceError> {
    let payload = mailbox.payload_len() - size_of::<ExtentListHeader>();
    let per_page = (payload / size_of::<ListedExtent>()) as u32;
    let mut extents = Vec::new();
    let mut first = None;
    let mut start = 0;
    loop {
        let request = GetExtentList {
            count: per_page.into(),
            start: start.into(),
        };
        let page = mailbox.execute(&request)?;
        if u64::from(page.total) > blocks {
            return Err(DeviceError::ExtentListTooLong {
                total: page.total,
                blocks,
            });
        }
        let version = (page.generation, page.total);
        if *first.get_or_insert(version) != version {
            return Ok(None);
        }
        let read = page.extents.len() as u32;
        // A device that counts extents it does not write leaves zeroes in their place.
        extents.extend(
            page.extents
                .into_iter()
                .filter(|extent| !extent.range.is_empty()),
        );
        start += read;
        if start >= page.total {
            return Ok(Some(extents));
        }
        if read == 0 {
            return Err(DeviceError::ExtentListTruncated {
                read: start,
                total: page.total,
            });
        }
    }
}
