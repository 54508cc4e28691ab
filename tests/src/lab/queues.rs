//! Receive queues of the edge's interface.

use std::process::Command;

use anyhow::{Context, Result};

use super::{Lab, exec, netns, topology::EDGE_INTERFACE};

impl Lab {
    /// Gives the edge's interface a receive queue for each of the first two cores, as a NIC has them: what a core sends
    /// arrives in the core's own queue and is received on it; what the edge sends leaves likewise.
    ///
    /// To be called before the daemon attaches its program: a veth hands it only to the queues that it has then
    /// (kernel 6.18).
    ///
    /// # Errors
    /// Where ethtool is missing or the kernel refuses.
    pub fn queue_for_each_core(&self) -> Result<()> {
        let (fabric, edge) = (self.namespace("fabric"), self.namespace("edge"));
        let port = "p-edge";
        // An end with a program must not have fewer receive queues than its peer has to send by.
        for (namespace, device, direction) in
            [(&edge, EDGE_INTERFACE, "rx"), (&fabric, port, "rx"), (&edge, EDGE_INTERFACE, "tx"), (&fabric, port, "tx")]
        {
            let mut command = Command::new(exec::program("ethtool", "ethtool")?);
            command.args(["-L", device, direction, "2"]);
            netns::start_inside(&mut command, namespace, false)?;
            exec::run(&mut command).with_context(|| format!("two {direction} queues for {device}"))?;
        }
        for (namespace, device) in [(&edge, EDGE_INTERFACE), (&fabric, port)] {
            let queues = format!("/sys/class/net/{device}/queues");
            let script = format!("echo 1 > {queues}/tx-0/xps_cpus && echo 2 > {queues}/tx-1/xps_cpus");
            // A namespace's interfaces show in a /sys mounted in it, which `ip netns exec` does for its child alone.
            exec::run(Command::new("ip").args(["netns", "exec", namespace, "sh", "-c", &script]))?;
        }
        Ok(())
    }
}
