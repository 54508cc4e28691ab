//! What results of checks mean for one backend. Pure: time comes in, transitions come out.
//!
//! | state | pass | fail | inconclusive |
//! |---|---|---|---|
//! | checking (new, `mandatory`) | up, at once | stays; the fail is counted | nothing |
//! | up | failures in a row: 0 | down after `fall` in a row | nothing |
//! | down | up after `rise` in a row | passes in a row: 0 | nothing |
//!
//! An inconclusive check (no socket could be had here) says nothing about the backend. The next check follows after
//! `fast_interval` while a change has begun and is not decided, after `interval` otherwise.

use std::time::Duration;

use crate::model::{Health, Verdict};

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should, with the time that the connect took (for UDP, the answer).
    Pass {
        /// Connect time.
        connect: Duration,
    },
    /// Badly, in words.
    Fail {
        /// What was wrong.
        reason: String,
    },
    /// This host could not make the check: no verdict on the backend.
    Local {
        /// What was missing.
        reason: String,
    },
}

/// A change of a backend's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Before.
    pub from: Verdict,
    /// From now on.
    pub to: Verdict,
    /// The result that decided, in words.
    pub reason: String,
}

/// One backend through time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    verdict: Verdict,
    /// Results in a row that contradict the verdict.
    against: u32,
    /// Counters since it is known.
    pub counts: Counts,
    /// When the last check ended.
    pub last: Option<Duration>,
    /// Connect time of the last pass.
    pub connect: Option<Duration>,
    /// What was wrong with the last check, if anything was.
    pub error: Option<String>,
    /// Since when the verdict holds.
    pub since: Duration,
}

/// Counters of one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Checks that ended.
    pub checks: u64,
    /// Of these, failed ones.
    pub fails: u64,
    /// Of these, inconclusive ones.
    pub local: u64,
    /// Times it went down.
    pub unavailable: u64,
}

impl Checked {
    /// A backend that starts as `verdict` at `now`.
    pub fn new(now: Duration, verdict: Verdict) -> Self {
        Self { verdict, against: 0, counts: Counts::default(), last: None, connect: None, error: None, since: now }
    }

    /// What checks say about it.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes in how a check ended at `now`, a time on any clock that never goes back.
    pub fn step(&mut self, now: Duration, health: &Health, outcome: Outcome) -> Option<Transition> {
        self.last = Some(now);
        self.counts.checks += 1;
        match outcome {
            Outcome::Local { reason } => {
                self.counts.local += 1;
                self.error = Some(reason);
                None
            }
            Outcome::Pass { connect } => {
                self.connect = Some(connect);
                self.error = None;
                let enough = if self.verdict == Verdict::Checking { 1 } else { health.rise };
                self.count(now, self.verdict != Verdict::Up, enough, Verdict::Up, "passed")
            }
            Outcome::Fail { reason } => {
                self.counts.fails += 1;
                let transition = self.count(now, self.verdict == Verdict::Up, health.fall, Verdict::Down, &reason);
                self.counts.unavailable += u64::from(transition.is_some());
                self.error = Some(reason);
                transition
            }
        }
    }

    /// One result towards `to`, which `contradicts` the verdict or confirms it.
    fn count(
        &mut self,
        now: Duration,
        contradicts: bool,
        enough: u32,
        to: Verdict,
        reason: &str,
    ) -> Option<Transition> {
        self.against = if contradicts { self.against + 1 } else { 0 };
        if self.against < enough.max(1) {
            return None;
        }
        let from = std::mem::replace(&mut self.verdict, to);
        (self.against, self.since) = (0, now);
        Some(Transition { from, to, reason: reason.to_owned() })
    }

    /// From the start of one check to the start of the next. `random` spreads it within `jitter`; any number will do.
    pub fn pause(&self, health: &Health, random: u32) -> Duration {
        let undecided = self.against > 0 || self.verdict == Verdict::Checking;
        spread(if undecided { health.fast_interval } else { health.interval }, health.jitter, random)
    }
}

/// `interval` within `jitter` percent of itself.
fn spread(interval: Duration, jitter: u8, random: u32) -> Duration {
    let share = f64::from(random) / f64::from(u32::MAX) * 2.0 - 1.0;
    interval.mul_f64(1.0 + share * f64::from(jitter.min(100)) / 100.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Check, Exchange};

    fn health(fall: u32, rise: u32) -> Health {
        Health {
            check: Check::Tcp(Exchange::default()),
            interval: Duration::from_secs(5),
            fast_interval: Duration::from_secs(1),
            jitter: 10,
            timeout: Duration::from_secs(1),
            fall,
            rise,
            port: None,
            mandatory: false,
            panic: 0,
            passive: None,
        }
    }

    fn pass() -> Outcome {
        Outcome::Pass { connect: Duration::from_millis(1) }
    }

    fn fail() -> Outcome {
        Outcome::Fail { reason: "refused".to_owned() }
    }

    fn verdicts(checked: &mut Checked, health: &Health, outcomes: &[Outcome]) -> Vec<Verdict> {
        let step = |outcome: &Outcome| {
            checked.step(Duration::ZERO, health, outcome.clone());
            checked.verdict()
        };
        outcomes.iter().map(step).collect()
    }

    #[test]
    fn a_backend_goes_down_after_fall_failures_in_a_row_and_comes_back_after_rise_passes() {
        use Verdict::{Down, Up};
        let mut checked = Checked::new(Duration::ZERO, Up);
        let outcomes = [fail(), fail(), pass(), fail(), fail(), fail(), pass(), fail(), pass(), pass()];
        let expected = [Up, Up, Up, Up, Up, Down, Down, Down, Down, Up];
        assert_eq!(verdicts(&mut checked, &health(3, 2), &outcomes), expected);
        assert_eq!((checked.counts.checks, checked.counts.fails, checked.counts.unavailable), (10, 6, 1));
    }

    #[test]
    fn a_new_mandatory_backend_waits_for_one_pass_however_many_fail_before() {
        use Verdict::{Checking, Up};
        let mut checked = Checked::new(Duration::ZERO, Checking);
        let outcomes = [fail(), fail(), fail(), fail(), pass()];
        assert_eq!(verdicts(&mut checked, &health(2, 3), &outcomes), [Checking, Checking, Checking, Checking, Up]);
        assert_eq!(checked.counts.unavailable, 0, "it never was available");
    }

    #[test]
    fn a_check_that_this_host_could_not_make_says_nothing() {
        let mut checked = Checked::new(Duration::ZERO, Verdict::Up);
        let local = || Outcome::Local { reason: "no file descriptors".to_owned() };
        let outcomes = [fail(), local(), local(), local(), fail()];
        let seen = verdicts(&mut checked, &health(3, 1), &outcomes);
        assert_eq!(seen, [Verdict::Up; 5]);
        assert_eq!(checked.counts.local, 3);
        assert_eq!(verdicts(&mut checked, &health(3, 1), &[fail()]), [Verdict::Down]);
    }

    #[test]
    fn checks_come_faster_while_a_change_has_begun_and_stay_within_jitter() {
        let (settings, mut checked) = (health(3, 2), Checked::new(Duration::ZERO, Verdict::Up));
        assert_eq!(checked.pause(&settings, 0), Duration::from_millis(4500));
        assert_eq!(checked.pause(&settings, u32::MAX), Duration::from_millis(5500));
        checked.step(Duration::ZERO, &settings, fail());
        assert_eq!(checked.pause(&settings, 0), Duration::from_millis(900));
        checked.step(Duration::ZERO, &settings, pass());
        assert_eq!(checked.pause(&settings, 0), Duration::from_millis(4500));
    }

    fn outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            2 => Just(pass()),
            2 => Just(fail()),
            1 => Just(Outcome::Local { reason: String::new() }),
        ]
    }

    proptest! {
        /// The model looks at the whole past instead of counting.
        #[test]
        fn the_verdict_changes_exactly_when_the_last_results_in_a_row_say_so(
            fall in 1u32..5,
            rise in 1u32..5,
            mandatory in any::<bool>(),
            outcomes in proptest::collection::vec(outcome(), 1..200),
        ) {
            let settings = health(fall, rise);
            let start = if mandatory { Verdict::Checking } else { Verdict::Up };
            let mut checked = Checked::new(Duration::ZERO, start);
            let mut past: Vec<bool> = Vec::new();
            let mut expected = start;
            for (at, outcome) in outcomes.into_iter().enumerate() {
                let told = match outcome {
                    Outcome::Pass { .. } => Some(true),
                    Outcome::Fail { .. } => Some(false),
                    Outcome::Local { .. } => None,
                };
                let transition = checked.step(Duration::from_secs(at as u64), &settings, outcome);
                let before = expected;
                past.extend(told);
                let ends_with = |count: u32, kind: bool| {
                    past.len() >= count as usize && past[past.len() - count as usize..].iter().all(|&one| one == kind)
                };
                expected = match before {
                    Verdict::Up if told.is_some() && ends_with(fall, false) => Verdict::Down,
                    Verdict::Down if told.is_some() && ends_with(rise, true) => Verdict::Up,
                    Verdict::Checking if ends_with(1, true) => Verdict::Up,
                    same => same,
                };
                if expected != before {
                    past.clear();
                }
                prop_assert_eq!(checked.verdict(), expected);
                prop_assert_eq!(transition.is_some(), expected != before);
            }
        }
    }
}
