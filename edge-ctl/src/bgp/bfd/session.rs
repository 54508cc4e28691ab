//! The state machine of one BFD session (RFC 5880 6.2, 6.8) in asynchronous mode. Pure: `step(state, now, event)` returns
//! what to do; time and randomness come in with [`Now`].
//!
//! | State        | Event                                        | Next      | Actions                               |
//! |--------------|----------------------------------------------|-----------|---------------------------------------|
//! | Down         | packet, Down                                 | Init      | Changed, Send                         |
//! | Down         | packet, Init                                 | Up        | Changed, Send with P                  |
//! | Down         | packet, Up or AdminDown                      | Down      | none                                  |
//! | Init         | packet, Down                                 | Init      | none                                  |
//! | Init         | packet, Init or Up                           | Up        | Changed, Send with P                  |
//! | Up           | packet, Init or Up                           | Up        | none                                  |
//! | Up           | packet, Down                                 | Down      | Changed, Send (diagnostic 3)          |
//! | Init, Up     | packet, AdminDown                            | Down      | Changed, Send (diagnostic 3)          |
//! | Init, Up     | detection time over                          | Down      | Changed, Send (diagnostic 1)          |
//! | Down         | detection time over                          | Down      | none; the other's discriminator is forgotten |
//! | any but Admin| packet with P                                | as above  | Send with F                           |
//! | any          | packet with F                                | as above  | our own poll ends                     |
//! | any but Admin| transmit timer                               | same      | Send, unless the other wants none     |
//! | any          | Stop                                         | AdminDown | Send (diagnostic 7)                   |
//! | AdminDown    | anything                                     | AdminDown | none                                  |
//!
//! While not Up, packets leave once a second at most (6.8.3). An interval that changes with the state is told by a poll.
//! C is never set: BFD here lives and dies with the daemon that speaks BGP.

use std::time::Duration;

use super::{
    super::fsm::Now,
    packet::{Diagnostic, Name, Packet},
};
use crate::model::bgp_session::Bfd;

/// RFC 5880 6.8.3: not Up, no faster than this.
const SLOW: Duration = Duration::from_secs(1);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A packet of the other side.
    Received(Packet),
    /// [`State::next_deadline`] has come.
    Due,
    /// The session is no longer wanted.
    Stop,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this.
    Send(Packet),
    /// The state is another one.
    Changed,
}

/// What the other side last told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Its discriminator; 0: not known, or forgotten.
    pub discriminator: u32,
    /// Its state.
    pub state: Name,
    /// Why it last left Up.
    pub diagnostic: Diagnostic,
    /// Its detection multiplier.
    pub multiplier: u8,
    /// The interval that it wishes to send at.
    pub desired_min_tx: Duration,
    /// The shortest interval that it can receive at.
    pub required_min_rx: Duration,
    /// C: its BFD does not share fate with its control plane.
    pub independent: bool,
    demand: bool,
}

/// State of one session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    settings: Bfd,
    discriminator: u32,
    name: Name,
    diagnostic: Diagnostic,
    remote: Remote,
    polling: bool,
    transmit_at: Option<Duration>,
    detect_at: Option<Duration>,
}

impl State {
    /// A session that begins now. `discriminator` is not 0 and no other session's of this system.
    pub const fn new(settings: Bfd, discriminator: u32, now: Now) -> Self {
        Self {
            settings,
            discriminator,
            name: Name::Down,
            diagnostic: Diagnostic::NONE,
            remote: Remote {
                discriminator: 0,
                state: Name::Down,
                diagnostic: Diagnostic::NONE,
                multiplier: 1,
                desired_min_tx: SLOW,
                // RFC 5880 6.8.1: one microsecond until it says otherwise.
                required_min_rx: Duration::from_micros(1),
                independent: false,
                demand: false,
            },
            polling: false,
            transmit_at: Some(now.time),
            detect_at: None,
        }
    }

    /// Its state.
    pub const fn name(&self) -> Name {
        self.name
    }

    /// Why it last left Up.
    pub const fn diagnostic(&self) -> Diagnostic {
        self.diagnostic
    }

    /// The other side.
    pub const fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Our discriminator.
    pub const fn discriminator(&self) -> u32 {
        self.discriminator
    }

    /// When [`Event::Due`] is.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.transmit_at.into_iter().chain(self.detect_at).min()
    }

    /// The interval that packets leave at, jitter aside; `None`: the other side wants none.
    pub fn transmit_interval(&self) -> Option<Duration> {
        let wanted = !self.remote.required_min_rx.is_zero();
        // RFC 5880 6.8.7: in demand mode only polls leave.
        let both_up = self.name == Name::Up && self.remote.state == Name::Up;
        let asked_not_to = self.remote.demand && both_up && !self.polling;
        (wanted && !asked_not_to).then(|| self.desired_min_tx().max(self.remote.required_min_rx))
    }

    /// Silence of this length means that the other side is gone (RFC 5880 6.8.4).
    pub fn detection_time(&self) -> Duration {
        self.settings.interval.max(self.remote.desired_min_tx) * u32::from(self.remote.multiplier)
    }

    fn desired_min_tx(&self) -> Duration {
        if self.name == Name::Up { self.settings.interval } else { self.settings.interval.max(SLOW) }
    }

    fn packet(&self, answer: bool) -> Packet {
        Packet {
            diagnostic: self.diagnostic,
            state: self.name,
            poll: self.polling && !answer,
            answer,
            independent: false,
            demand: false,
            multiplier: self.settings.multiplier,
            mine: self.discriminator,
            yours: self.remote.discriminator,
            desired_min_tx: micros(self.desired_min_tx()),
            required_min_rx: micros(self.settings.interval),
        }
    }

    /// RFC 5880 6.8.7: up to a quarter sooner, and at least a tenth where one lost packet is too many.
    fn schedule(&mut self, now: Now) {
        self.transmit_at = self.transmit_interval().map(|interval| {
            let (least, most) = if self.settings.multiplier == 1 { (10, 25) } else { (0, 25) };
            let sooner = least + now.random % (most - least + 1);
            now.time + interval * (100 - sooner) / 100
        });
    }

    fn change(&mut self, now: Now, to: Name, diagnostic: Diagnostic, actions: &mut Vec<Action>) {
        self.name = to;
        self.diagnostic = diagnostic;
        // What we wish to send at is another interval now.
        self.polling = to == Name::Up && self.settings.interval < SLOW;
        actions.push(Action::Changed);
        actions.push(Action::Send(self.packet(false)));
        self.schedule(now);
    }
}

fn micros(interval: Duration) -> u32 {
    u32::try_from(interval.as_micros()).unwrap_or(u32::MAX)
}

/// One step.
pub fn step(state: &mut State, now: Now, event: Event) -> Vec<Action> {
    let mut actions = Vec::new();
    if state.name == Name::AdminDown {
        return actions;
    }
    match event {
        Event::Received(packet) => received(state, now, packet, &mut actions),
        Event::Due => due(state, now, &mut actions),
        Event::Stop => {
            state.change(now, Name::AdminDown, Diagnostic::ADMINISTRATIVELY_DOWN, &mut actions);
            (state.transmit_at, state.detect_at) = (None, None);
        }
    }
    actions
}

/// RFC 5880 6.8.6, from where the session is found.
fn received(state: &mut State, now: Now, packet: Packet, actions: &mut Vec<Action>) {
    let before = state.transmit_interval();
    state.remote = Remote {
        discriminator: packet.mine,
        state: packet.state,
        diagnostic: packet.diagnostic,
        multiplier: packet.multiplier,
        desired_min_tx: Duration::from_micros(packet.desired_min_tx.into()),
        required_min_rx: Duration::from_micros(packet.required_min_rx.into()),
        independent: packet.independent,
        demand: packet.demand,
    };
    if packet.answer {
        state.polling = false;
    }
    state.detect_at = Some(now.time + state.detection_time());
    let next = match (state.name, packet.state) {
        (Name::Init | Name::Up, Name::AdminDown) | (Name::Up, Name::Down) => {
            Some((Name::Down, Diagnostic::NEIGHBOR_SIGNALED))
        }
        (Name::Down, Name::Down) => Some((Name::Init, state.diagnostic)),
        (Name::Down, Name::Init) | (Name::Init, Name::Init | Name::Up) => Some((Name::Up, Diagnostic::NONE)),
        _ => None,
    };
    if let Some((next, diagnostic)) = next {
        state.change(now, next, diagnostic, actions);
    } else if state.transmit_interval() != before {
        state.schedule(now);
    }
    if packet.poll {
        actions.push(Action::Send(state.packet(true)));
    }
}

fn due(state: &mut State, now: Now, actions: &mut Vec<Action>) {
    if state.detect_at.is_some_and(|at| at <= now.time) {
        state.detect_at = None;
        state.remote.discriminator = 0;
        if matches!(state.name, Name::Init | Name::Up) {
            state.change(now, Name::Down, Diagnostic::TIME_EXPIRED, actions);
        }
    }
    if state.transmit_at.is_some_and(|at| at <= now.time) {
        if state.transmit_interval().is_some() {
            actions.push(Action::Send(state.packet(false)));
        }
        state.schedule(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Bfd = Bfd { interval: Duration::from_millis(50), multiplier: 3, multihop: false };

    fn at(milliseconds: u64) -> Now {
        Now { time: Duration::from_millis(milliseconds), random: 0 }
    }

    fn says(state: Name) -> Packet {
        Packet {
            diagnostic: Diagnostic::NONE,
            state,
            poll: false,
            answer: false,
            independent: false,
            demand: false,
            multiplier: 3,
            mine: 7,
            yours: 1,
            desired_min_tx: 50_000,
            required_min_rx: 50_000,
        }
    }

    fn sent(actions: &[Action]) -> Vec<Packet> {
        let packet = |action: &Action| match action {
            Action::Send(packet) => Some(*packet),
            Action::Changed => None,
        };
        actions.iter().filter_map(packet).collect()
    }

    fn hears(state: &mut State, now: Now, packet: Packet) -> Vec<Action> {
        step(state, now, Event::Received(packet))
    }

    fn up() -> State {
        let mut state = State::new(SETTINGS, 1, at(0));
        hears(&mut state, at(0), says(Name::Down));
        hears(&mut state, at(10), says(Name::Init));
        assert_eq!(state.name(), Name::Up);
        state
    }

    /// Up, and what the other side last said is this.
    fn up_with(packet: Packet) -> State {
        let mut state = up();
        hears(&mut state, at(20), packet);
        state
    }

    #[test]
    fn every_state_moves_with_every_packet_as_rfc_5880_6_8_6_has_it() {
        use Name::{AdminDown, Down, Init, Up};
        for (from, heard, next) in [
            (Down, Down, Init),
            (Down, Init, Up),
            (Down, Up, Down),
            (Down, AdminDown, Down),
            (Init, Down, Init),
            (Init, Init, Up),
            (Init, Up, Up),
            (Init, AdminDown, Down),
            (Up, Down, Down),
            (Up, Init, Up),
            (Up, Up, Up),
            (Up, AdminDown, Down),
            (AdminDown, Up, AdminDown),
        ] {
            let mut state = State { name: from, ..State::new(SETTINGS, 1, at(0)) };
            let actions = hears(&mut state, at(1), says(heard));
            assert_eq!(state.name(), next, "{from:?} hears {heard:?}");
            assert_eq!(actions.contains(&Action::Changed), from != next, "{from:?} hears {heard:?}");
        }
    }

    #[test]
    fn packets_leave_once_a_second_until_up_and_then_at_the_interval_told_by_a_poll() {
        let mut state = State::new(SETTINGS, 1, at(0));
        let first = sent(&step(&mut state, at(0), Event::Due));
        assert_eq!((first[0].state, first[0].desired_min_tx, first[0].yours), (Name::Down, 1_000_000, 0));
        assert_eq!(state.next_deadline(), Some(Duration::from_secs(1)));
        hears(&mut state, at(100), says(Name::Down));
        let polls = sent(&hears(&mut state, at(200), says(Name::Init)));
        assert_eq!((polls[0].state, polls[0].poll, polls[0].desired_min_tx), (Name::Up, true, 50_000));
        assert_eq!(state.next_deadline(), Some(Duration::from_millis(250)));
        assert!(sent(&step(&mut state, at(250), Event::Due))[0].poll, "until it is answered");
        hears(&mut state, at(260), Packet { answer: true, ..says(Name::Up) });
        assert!(!sent(&step(&mut state, at(300), Event::Due))[0].poll);
    }

    #[test]
    fn a_poll_is_answered_at_once_with_f_and_without_p() {
        let mut state = up();
        let answers = sent(&hears(&mut state, at(20), Packet { poll: true, ..says(Name::Up) }));
        assert_eq!(answers.len(), 1);
        assert!(answers[0].answer && !answers[0].poll);
    }

    #[test]
    fn silence_for_the_detection_time_takes_the_session_down_and_not_sooner() {
        let mut state = up();
        hears(&mut state, at(40), says(Name::Up));
        step(&mut state, at(189), Event::Due);
        assert_eq!(state.name(), Name::Up, "3 x 50 ms since 40");
        let actions = step(&mut state, at(190), Event::Due);
        assert!(actions.contains(&Action::Changed));
        assert_eq!((state.name(), state.diagnostic()), (Name::Down, Diagnostic::TIME_EXPIRED));
        let last = sent(&actions);
        assert_eq!((last[0].state, last[0].yours), (Name::Down, 0), "whoever comes back is somebody new");
    }

    #[test]
    fn the_slower_side_sets_the_pace_in_each_direction() {
        let slow = Packet { desired_min_tx: 300_000, required_min_rx: 200_000, multiplier: 5, ..says(Name::Up) };
        let state = up_with(slow);
        assert_eq!(state.transmit_interval(), Some(Duration::from_millis(200)));
        assert_eq!(state.detection_time(), Duration::from_millis(1500));
    }

    #[test]
    fn whoever_wants_no_packets_gets_none() {
        let unwanted = up_with(Packet { required_min_rx: 0, ..says(Name::Up) });
        assert_eq!(unwanted.transmit_interval(), None);
        let demand = up_with(Packet { demand: true, answer: true, ..says(Name::Up) });
        assert_eq!(demand.transmit_interval(), None, "demand mode");
    }

    #[test]
    fn packets_are_early_by_up_to_a_quarter_and_by_a_tenth_at_least_where_one_may_not_be_lost() {
        for (multiplier, random, expected) in [(3, 0, 50_000), (3, 25, 37_500), (1, 0, 45_000), (1, 15, 37_500)] {
            let mut state = State { settings: Bfd { multiplier, ..SETTINGS }, ..up() };
            state.schedule(Now { time: Duration::ZERO, random });
            assert_eq!(state.transmit_at, Some(Duration::from_micros(expected)));
        }
    }

    #[test]
    fn a_session_that_is_stopped_says_so_and_hears_nothing_any_more() {
        let mut state = up();
        let last = sent(&step(&mut state, at(30), Event::Stop));
        assert_eq!((last[0].state, last[0].diagnostic), (Name::AdminDown, Diagnostic::ADMINISTRATIVELY_DOWN));
        assert_eq!((state.next_deadline(), hears(&mut state, at(40), says(Name::Down))), (None, vec![]));
    }

    #[test]
    fn two_of_these_find_each_other_and_stay_up_until_one_falls_silent() {
        let (mut a, mut b) = (State::new(SETTINGS, 1, at(0)), State::new(SETTINGS, 2, at(0)));
        let mut downs = Vec::new();
        for time in 0..5_000 {
            let silent = time >= 4_000;
            let mut wire = sent(&step(&mut a, at(time), Event::Due));
            let mut back = if silent { vec![] } else { sent(&step(&mut b, at(time), Event::Due)) };
            while let Some(packet) = wire.pop().filter(|_| !silent) {
                back.extend(sent(&hears(&mut b, at(time), packet)));
            }
            for packet in back {
                for answer in sent(&hears(&mut a, at(time), packet)) {
                    hears(&mut b, at(time), answer);
                }
            }
            if (2_500..).contains(&time) && a.name() != Name::Up {
                downs.push(time);
            }
        }
        let first = *downs.first().unwrap();
        assert!((4_100..=4_150).contains(&first), "down at {first} ms");
    }
}
