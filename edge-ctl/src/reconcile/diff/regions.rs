//! Selection regions: what a service's should hold, and where there is room for it.

use std::collections::BTreeMap;

use super::{Planner, Reserved};
use crate::{
    desired::DesiredFrontend,
    model::{Frontend, PoolMember, TableShape, Tier},
    reconcile::ports::{Action, DatapathState, Region, share_of, tier_of, weight_of},
};

impl Planner<'_> {
    /// The region that a service should refer to, written if it is not there yet; `None` where there is no room.
    pub(super) fn publish_region(
        &mut self,
        frontend: &Frontend,
        desired: &DesiredFrontend,
        service: u32,
        current: u32,
    ) -> Option<u32> {
        let shape = TableShape { balance: desired.balance, maglev_size: desired.selection.maglev_size };
        let primary = self.region(service, Tier::Primary, shape);
        let backup = self.region(service, Tier::Backup, shape);
        let region = match (primary, backup) {
            (Some(primary), backup) => Region { backup: backup.map(Box::new), ..primary },
            (None, Some(backup)) => backup,
            (None, None) => return Some(0),
        };
        if current != 0 && self.state.regions.get(&current).is_some_and(|now| **now == region) {
            return Some(current);
        }
        let Some(first_chunk) = self.room(region.chunks()) else {
            self.fail(frontend, format!("{frontend}: the selection map is full; its pool stays as it was"));
            return None;
        };
        self.used.insert(first_chunk, region.chunks());
        self.step(Action::WriteRegion { first_chunk, region: region.into() });
        Some(first_chunk)
    }

    /// The eligible backends of one tier and their table; `None` where there are none.
    fn region(&self, service: u32, tier: Tier, shape: TableShape) -> Option<Region> {
        let numbers = self.members.get(&service).into_iter().flatten();
        let slots = numbers.filter_map(|number| Some((number, self.state.backends.get(number)?)));
        let mine = slots.filter(|(_, slot)| slot.eligible() && tier_of(slot.state) == tier);
        let mut members: Vec<(PoolMember, u8, u32)> = mine
            .map(|(number, slot)| {
                let member = PoolMember { address: slot.address(), weight: weight_of(slot.state), tier };
                (member, share_of(slot.state), *number)
            })
            .collect();
        // By address, so that edges with the same pool build the same table.
        members.sort_unstable();
        let table = (self.fill)(&shared(&members), shape);
        if table.is_empty() {
            return None;
        }
        // A vector of its own size: one made of the members would keep their memory.
        Some(Region { pool: members.iter().map(|(_, _, number)| *number).collect(), table, backup: None })
    }

    /// The first gap of `chunks` chunks.
    fn room(&self, chunks: u32) -> Option<u32> {
        let mut first = 1_u32;
        for (start, length) in &self.used {
            if start.saturating_sub(first) >= chunks {
                break;
            }
            first = first.max(start.saturating_add(*length));
        }
        (first.checked_add(chunks)? <= self.state.capacity.chunks).then_some(first)
    }

    pub(super) fn retire(&mut self, first_chunk: u32) {
        if let Some(region) = self.state.regions.get(&first_chunk) {
            self.plan.retired.push((first_chunk, region.chunks()));
        }
    }
}

/// Chunks that hold a region, or held one a moment ago. What a plan replaces stays among them until its end.
pub(super) fn used(state: &DatapathState, reserved: &Reserved) -> BTreeMap<u32, u32> {
    let mut used: BTreeMap<u32, u32> = state.regions.iter().map(|(first, region)| (*first, region.chunks())).collect();
    for (first, length) in &reserved.regions {
        let known = used.entry(*first).or_default();
        *known = (*length).max(*known);
    }
    used
}

/// The members with the weights that their shares leave them: as they are while nobody starts slowly, else in the same
/// proportion to each other, at least 1.
fn shared(members: &[(PoolMember, u8, u32)]) -> Vec<PoolMember> {
    let all_whole = members.iter().all(|(_, share, _)| *share == 100);
    let parts = |member: &PoolMember, share: u8| u32::from(member.weight) * u32::from(share);
    let most = members.iter().map(|(member, share, _)| parts(member, *share)).max().unwrap_or(0);
    let divisor = most / u32::from(u16::MAX) + 1;
    let weight = |member: &PoolMember, share: u8| match u16::try_from(parts(member, share) / divisor) {
        _ if all_whole => member.weight,
        Ok(weight) => weight.max(1),
        Err(_) => u16::MAX,
    };
    members.iter().map(|(member, share, _)| PoolMember { weight: weight(member, *share), ..*member }).collect()
}
