//! Pods one by one, as a rolling replacement starts, publishes and ends them. [`Lab::scale`] knows only the first so many.

use anyhow::{Result, ensure};

use super::{
    Lab, netns,
    pods::SERVICE,
    topology::{self, MOST_PODS},
};

impl Lab {
    /// Starts a pod and waits until it is ready. It is not in DNS by that.
    ///
    /// # Errors
    /// Where it runs already, its number is out of range, or it does not answer.
    pub fn start_pod(&mut self, number: usize) -> Result<()> {
        ensure!((1..=MOST_PODS).contains(&number), "pods have numbers from 1 to {MOST_PODS}");
        ensure!(!self.state.pods.contains(&number), "ingress-{number} runs already");
        let pod = topology::ingress(number);
        if !netns::path(&self.namespace(&pod.name)).exists() {
            self.attach_pod(&pod)?;
        }
        self.start_ingress(&pod)?;
        self.state.pods.insert(number);
        self.save()
    }

    /// Makes these the pods that DNS names, from the next query on. Those that are left out go on serving, as a pod does
    /// that is asked to end.
    ///
    /// # Errors
    /// Where the zone file cannot be written.
    pub fn publish_pods(&self, numbers: impl IntoIterator<Item = usize>) -> Result<()> {
        let addresses = numbers.into_iter().map(|number| topology::ingress(number).address).collect();
        self.change_zone(|zone| zone.services.entry(SERVICE.to_owned()).or_default().addresses = addresses)
    }

    /// Ends a pod: its processes, and so what connections it has left.
    ///
    /// # Errors
    /// Where it does not end.
    pub fn end_pod(&mut self, number: usize) -> Result<()> {
        self.kill_in(&[&topology::ingress(number).name])?;
        self.state.pods.remove(&number);
        self.save()
    }
}
