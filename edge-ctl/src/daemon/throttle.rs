//! Something that is cheap once and dear a thousand times a second: done at once, then at most once per pause. Pure.

use std::time::{Duration, Instant};

/// When to do it next.
#[derive(Debug)]
pub struct Throttle {
    pause: Duration,
    last: Option<Instant>,
    due: Option<Instant>,
}

impl Throttle {
    /// Never done yet, nothing asked for.
    pub const fn new(pause: Duration) -> Self {
        Self { pause, last: None, due: None }
    }

    /// Asks for it. Several times before it is [due](Throttle::due) are one.
    pub fn ask(&mut self, now: Instant) {
        let earliest = self.last.map_or(now, |last| (last + self.pause).max(now));
        self.due.get_or_insert(earliest);
    }

    /// When it is to be done; `None`: nobody has asked.
    pub const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It is being done.
    pub const fn done(&mut self, now: Instant) {
        (self.last, self.due) = (Some(now), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_answered_at_once_and_then_once_per_pause_with_the_last_word_heard() {
        let (start, pause) = (Instant::now(), Duration::from_millis(100));
        let mut throttle = Throttle::new(pause);
        assert_eq!(throttle.due(), None);
        let mut done = Vec::new();
        for millisecond in 0..1000 {
            let now = start + Duration::from_millis(millisecond);
            throttle.ask(now);
            if throttle.due().is_some_and(|due| due <= now) {
                throttle.done(now);
                done.push(millisecond);
            }
        }
        assert_eq!(done, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]);
        assert_eq!(throttle.due(), Some(start + Duration::from_secs(1)), "what came after the last is not forgotten");
    }
}
