//! Fabric managers, as the command line names them.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;

use dax_backend::orchestrator::qmp::QmpTarget;
use dax_backend::pci::PciAddress;

/// Who adds capacity to a device of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Manager {
    /// QEMU's monitor: `qmp:SOCKET,DEVICE`.
    Qmp(QmpTarget),
    /// A mailbox that takes the FM-API: `fm:BDF,PORT` through a switch, `fm:BDF` of the device.
    Mailbox {
        address: PciAddress,
        port: Option<u8>,
    },
}

impl Manager {
    /// Reads one.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("qmp", rest)) if !rest.is_empty() => qmp(text, rest),
            Some(("fm", rest)) if !rest.is_empty() => mailbox(text, rest),
            _ => Err(format!(
                "`{text}` is no orchestrator: write qmp:SOCKET,DEVICE, such as \
                 qmp:/run/qemu.sock,/machine/peripheral/dcd0, or fm:BDF,PORT for the mailbox of a \
                 switch and the device's port, such as fm:0000:0d:00.1,0"
            )),
        }
    }

    /// What [`parse`](Self::parse) reads.
    pub(crate) fn to_argument(&self) -> OsString {
        match self {
            Self::Qmp(QmpTarget { socket, device }) => {
                let mut text = OsString::from("qmp:");
                text.push(socket);
                text.push(",");
                text.push(device);
                text
            }
            Self::Mailbox { address, port } => {
                let port = port.map_or_else(String::new, |port| format!(",{port}"));
                format!("fm:{address}{port}").into()
            }
        }
    }
}

fn qmp(text: &str, rest: &str) -> Result<Manager, String> {
    let (socket, device) = rest.split_once(',').unwrap_or((rest, ""));
    if !device.starts_with('/') {
        return Err(format!(
            "`{text}` names no device: add its path in QEMU's tree, such as \
             {rest},/machine/peripheral/dcd0"
        ));
    }
    Ok(Manager::Qmp(QmpTarget {
        socket: PathBuf::from(socket),
        device: device.to_owned(),
    }))
}

fn mailbox(text: &str, rest: &str) -> Result<Manager, String> {
    let (address, port) = match rest.split_once(',') {
        Some((address, port)) => (address, Some(port)),
        None => (rest, None),
    };
    let address = address
        .parse()
        .map_err(|error| format!("`{text}`: {error}"))?;
    let port = port.map(|port| {
        let parsed = port.parse::<u8>();
        parsed.map_err(|_| format!("`{text}`: {port:?} is no number of a port, 0 to 255"))
    });
    let port = port.transpose()?;
    Ok(Manager::Mailbox { address, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_orchestrator_is_a_monitor_or_a_mailbox() {
        let target = QmpTarget {
            socket: PathBuf::from("/run/q.sock"),
            device: "/machine/peripheral/dcd0".into(),
        };
        let address: PciAddress = "0000:0d:00.1".parse().unwrap();
        let mailbox = |port| Manager::Mailbox { address, port };
        for (text, manager) in [
            (
                "qmp:/run/q.sock,/machine/peripheral/dcd0",
                Manager::Qmp(target),
            ),
            ("fm:0000:0d:00.1,3", mailbox(Some(3))),
            ("fm:0000:0d:00.1", mailbox(None)),
        ] {
            assert_eq!(Manager::parse(text).as_ref(), Ok(&manager));
            assert_eq!(manager.to_argument(), text);
        }
        for (wrong, says) in [
            ("redfish:x", "no orchestrator"),
            ("qmp:", "no orchestrator"),
            ("fm:", "no orchestrator"),
            ("qmp:/run/q.sock", "no device"),
            ("qmp:/run/q.sock,dcd0", "no device"),
            ("fm:here", "here"),
            ("fm:0000:0d:00.1,300", "no number of a port"),
        ] {
            let error = Manager::parse(wrong).unwrap_err();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }
}
