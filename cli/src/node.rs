//! Memory of a NUMA node with a broker over it.
#![forbid(unsafe_code)]

use std::fmt;

use anyhow::Context;
use dax_backend::broker::{Broker, BrokerConfig, Window};
use dax_backend::fixed::{fixed, node_memory};

use crate::failure::Failure;
use crate::size::{self, Bytes};

/// How much of which node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NodeMemory {
    node: u32,
    len: u64,
}

impl fmt::Display for NodeMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.node, self.len)
    }
}

/// Reads `N,SIZE`.
pub(crate) fn parse(text: &str) -> Result<NodeMemory, String> {
    let (node, len) = text
        .split_once(',')
        .ok_or("give a node and a size, such as 1,4G")?;
    let node = node
        .parse()
        .map_err(|_| format!("{node:?} is no number of a node"))?;
    let len = size::parse(len)?;
    Ok(NodeMemory { node, len })
}

/// Serves memory of a node, and says what that is.
pub(crate) fn broker(
    memory: NodeMemory,
    config: BrokerConfig,
) -> Result<(Broker, String), Failure> {
    let NodeMemory { node, len } = memory;
    let file = node_memory(node, len)?;
    let freed = file.try_clone().context("too many open files")?;
    let (device, orchestrator) = fixed(len);
    let window = Window::map(file, 0, len).context("the node's memory cannot be mapped")?;
    let broker = Broker::new(
        Box::new(device.freeing(freed)),
        Some(Box::new(orchestrator)),
        window,
        config,
    )?;
    Ok((broker, format!("{} of NUMA node {node}", Bytes(len))))
}
