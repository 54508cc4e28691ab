//! What policy says of one path, without anything being received or sent: `bgp policy test`. Pure.

use std::net::IpAddr;

use super::{
    advertise::{Candidate, Originated, Terms},
    policy::{self, Policy},
    rib::{Best, Rib, Route},
    wire::{AsPath, Attributes, Origin, Segment},
};
use crate::model::{query::PolicyQuestion, view::PolicyRow as Row};

/// Judges the path that the question is about: the one that was received, or that would be announced, unless the question
/// gives its attributes itself.
pub fn test(question: &PolicyQuestion, policy: &Policy, terms: &Terms, rib: &Rib, originated: &Originated) -> Row {
    let row = Row {
        peer: question.peer.to_string(),
        direction: if question.export { "out" } else { "in" }.to_owned(),
        network: question.prefix.to_string(),
        ..Row::default()
    };
    if question.export {
        export(question, policy, terms, rib, originated, row)
    } else {
        import(question, policy, rib, row)
    }
}

fn import(question: &PolicyQuestion, policy: &Policy, rib: &Rib, row: Row) -> Row {
    let received = rib.received(question.peer).find(|(prefix, _)| *prefix == question.prefix);
    let (source, route) = match received {
        Some((_, standing)) if !is_given(question) => ("received", Route::clone(&standing.path.received)),
        _ => ("given", Route { attributes: given(question), next_hop: question.next_hop.unwrap_or(question.peer) }),
    };
    let row = Row { path_from: source.to_owned(), ..row };
    let Route { mut attributes, mut next_hop } = route;
    match policy.import(rib.local(), &question.prefix, &attributes, next_hop) {
        Err(why) => {
            shown(Row { verdict: "refused".to_owned(), reason: Some(why.to_string()), ..row }, &attributes, next_hop)
        }
        Ok(permit) => {
            let term = permit.term.map(|term| term as u64);
            if let Some(changes) = permit.changes {
                policy::apply(changes, &mut attributes, &mut next_hop, question.peer, rib.local().asn);
            }
            shown(Row { verdict: "accepted".to_owned(), term, ..row }, &attributes, next_hop)
        }
    }
}

fn export(
    question: &PolicyQuestion,
    policy: &Policy,
    terms: &Terms,
    rib: &Rib,
    originated: &Originated,
    row: Row,
) -> Row {
    let alone = policy.client_networks.contains(&question.prefix);
    let for_one = || originated.for_one(&policy.client_networks).find(|(prefix, _)| *prefix == question.prefix);
    let own = originated.get(&question.prefix).or_else(|| Some(for_one()?.1)).filter(|_| !is_given(question));
    let given = std::sync::Arc::new(Route {
        attributes: given(question),
        next_hop: question.next_hop.unwrap_or(terms.next_hop),
    });
    let best = rib.best(&question.prefix).filter(|_| !is_given(question));
    let (source, candidate) = match (&own, best) {
        (Some(own), _) if alone => ("client network", Candidate::Own(own)),
        (Some(own), _) => ("ours", Candidate::Own(own)),
        (None, Some(best)) => ("best path", Candidate::Learnt(best)),
        // As if an external peer had sent it.
        (None, None) => {
            ("given", Candidate::Learnt(Best { route: &given, peer: IpAddr::from([0, 0, 0, 0]), internal: false }))
        }
    };
    let row = Row { path_from: source.to_owned(), ..row };
    match terms.judge(policy, &question.prefix, candidate) {
        Ok(out) => {
            let term = policy.export(&question.prefix, &given.attributes, own.is_none()).ok();
            let term = term.filter(|_| is_given(question)).and_then(|permit| permit.term).map(|term| term as u64);
            shown(Row { verdict: "announced".to_owned(), term, ..row }, &out.attributes, out.next_hop)
        }
        Err(why) => Row { verdict: "withheld".to_owned(), reason: Some(why.to_string()), ..row },
    }
}

fn is_given(question: &PolicyQuestion) -> bool {
    question.as_path.is_some() || !question.communities.is_empty() || question.next_hop.is_some()
}

fn given(question: &PolicyQuestion) -> Attributes {
    let numbers = question.as_path.clone().unwrap_or_default();
    let segments = if numbers.is_empty() { Vec::new() } else { vec![Segment::Sequence(numbers)] };
    let mut attributes = Attributes { origin: Origin::Igp, as_path: AsPath(segments), ..Attributes::default() };
    question.communities.iter().for_each(|community| attributes.add_community(*community));
    attributes
}

fn shown(row: Row, attributes: &Attributes, next_hop: IpAddr) -> Row {
    Row {
        next_hop: Some(next_hop.to_string()),
        metric: attributes.med,
        locprf: attributes.local_pref,
        path: attributes.as_path.to_string(),
        communities: attributes.community_texts(),
        ..row
    }
}
