//! A limit in bytes per second over many that share it, and that can change while they wait.
//!
//! Each taker goes as soon as what was taken before it is paid for by time, so a piece of any size goes through, and the mean
//! is kept. Takers of one urgency go in the order in which they came; as long as a more urgent one waits, no other goes, except that
//! [`Bucket::sharing`] gives `Ahead` a third. Of each urgency only the first waits for the clock: a thousand takers wake nobody.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Mutex as Gate, Notify};
use tokio::time::{Instant, sleep};

/// So much may go at once after a pause.
const BURST: Duration = Duration::from_millis(50);
/// What was spent without waiting holds up others for no longer.
const DEBT_MAX: Duration = Duration::from_secs(30);
/// And those of whom somebody waits: it may be anything that a peer has sent.
const DEBT_OF_DEMAND_MAX: Duration = Duration::from_secs(1);

/// How much a taker is in a hurry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// Nobody waits for it.
    Background,
    /// Somebody will probably want it soon.
    Ahead,
    /// Somebody waits.
    Demand,
}

const URGENCIES: usize = 3;

#[derive(Default)]
pub(crate) struct Bucket {
    state: Mutex<State>,
    gates: [Gate<()>; URGENCIES],
    /// The rate is another one, or a more urgent taker doesn't wait any more.
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// Bytes per second.
    rate: Option<u64>,
    /// When all that was taken and spent will be paid for.
    free_at: Option<Instant>,
    /// The same as far as `Demand` waits for it: all that was taken, and some of what was spent.
    demand_free_at: Option<Instant>,
    waiting: [usize; URGENCIES],
    /// While takers of both kinds wait, `Ahead` has one byte for two of `Demand`.
    is_shared: bool,
    /// Bytes that `Ahead` has less than its share; negative: more.
    owed: i64,
}

/// What keeps a taker.
#[derive(Debug, PartialEq, Eq)]
enum Wait {
    Time(Duration),
    /// Others, who are more urgent.
    Others,
}

impl State {
    fn waits(&self, urgency: Urgency) -> bool {
        self.waiting[urgency as usize] > 0
    }

    /// Whether `Ahead` goes before `Demand` now.
    fn is_turn_of_ahead(&self) -> bool {
        self.is_shared && self.owed > 0 && self.waits(Urgency::Ahead)
    }

    /// Whether others go before a taker of this urgency.
    fn is_behind(&self, urgency: Urgency) -> bool {
        match urgency {
            Urgency::Demand => self.is_turn_of_ahead(),
            Urgency::Ahead => self.waits(Urgency::Demand) && !self.is_turn_of_ahead(),
            Urgency::Background => self.waits(Urgency::Ahead) || self.waits(Urgency::Demand),
        }
    }

    /// Notes who has had how much while the other waited. No credit is saved up for later.
    fn count_share(&mut self, bytes: u64, urgency: Urgency) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        match urgency {
            Urgency::Demand => {
                let owed = self.owed.saturating_add(bytes / 2);
                self.owed = if self.waits(Urgency::Ahead) { owed } else { owed.min(0) };
            }
            Urgency::Ahead if self.waits(Urgency::Demand) => self.owed = self.owed.saturating_sub(bytes),
            Urgency::Ahead | Urgency::Background => {}
        }
    }

    /// `Ok`: the bytes may go now, and are noted.
    fn try_take(&mut self, bytes: u64, urgency: Urgency, now: Instant) -> Result<(), Wait> {
        if self.is_behind(urgency) {
            return Err(Wait::Others);
        }
        let debt = if urgency == Urgency::Demand { self.debt_of_demand(now) } else { self.debt(now) };
        if debt > BURST {
            return Err(Wait::Time(debt - BURST));
        }
        let cost = self.cost(bytes);
        self.free_at = Some(now + self.debt(now) + cost);
        self.demand_free_at = Some(now + self.debt_of_demand(now) + cost);
        self.count_share(bytes, urgency);
        Ok(())
    }

    fn debt(&self, now: Instant) -> Duration {
        self.free_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }

    fn debt_of_demand(&self, now: Instant) -> Duration {
        self.demand_free_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }

    fn cost(&self, bytes: u64) -> Duration {
        self.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(bytes as f64 / rate as f64))
    }

    /// Without a wait: what waits already, does so for no longer than the bounds say.
    fn spend(&mut self, bytes: u64, now: Instant) {
        let cost = self.cost(bytes);
        let more = |debt: Duration, max: Duration| (debt + cost).min(max.max(debt));
        self.free_at = Some(now + more(self.debt(now), DEBT_MAX));
        self.demand_free_at = Some(now + more(self.debt_of_demand(now), DEBT_OF_DEMAND_MAX));
    }

    fn give_back(&mut self, bytes: u64, now: Instant) {
        let cost = self.cost(bytes);
        self.free_at = Some(now + self.debt(now).saturating_sub(cost));
        self.demand_free_at = Some(now + self.debt_of_demand(now).saturating_sub(cost));
    }

    /// What is owed is owed in bytes: at another rate it takes another time.
    fn set_rate(&mut self, rate: Option<u64>, now: Instant) {
        let before = std::mem::replace(&mut self.rate, rate);
        let times = before.zip(rate).map_or(0.0, |(before, rate)| before as f64 / rate as f64);
        let debt = |before: Duration| {
            Duration::try_from_secs_f64(before.as_secs_f64() * times).unwrap_or(DEBT_MAX).min(DEBT_MAX)
        };
        self.free_at = Some(now + debt(self.debt(now)));
        self.demand_free_at = Some(now + debt(self.debt_of_demand(now)));
    }
}

impl Bucket {
    /// One of which neither `Demand` nor `Ahead` can have all: what others are sent is asked for by them.
    pub(crate) fn sharing() -> Self {
        Self { state: Mutex::new(State { is_shared: true, ..State::default() }), ..Self::default() }
    }

    /// Holds from now on, also for those who wait. `None` or 0: no limit, as at first.
    pub(crate) fn set_rate(&self, rate: Option<u64>) {
        self.state.lock().set_rate(rate.filter(|rate| *rate > 0), Instant::now());
        self.changed.notify_waiters();
    }

    /// Bytes per second; `None`: no limit.
    pub(crate) fn rate(&self) -> Option<u64> {
        self.state.lock().rate
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.rate().is_some()
    }

    /// Waits until `bytes` more may go. Whoever is dropped while it waits has taken nothing.
    pub(crate) async fn take(&self, bytes: u64, urgency: Urgency) {
        if !self.is_limited() {
            return;
        }
        let _waiting = self.wait_as(urgency);
        let _first = self.gates[urgency as usize].lock().await;
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            let (tried, is_turned) = {
                let mut state = self.state.lock();
                let before = state.is_turn_of_ahead();
                (state.try_take(bytes, urgency, Instant::now()), state.is_turn_of_ahead() != before)
            };
            if is_turned {
                self.changed.notify_waiters();
            }
            match tried {
                Ok(()) => return,
                Err(Wait::Others) => changed.await,
                Err(Wait::Time(time)) => tokio::select! {
                    () = sleep(time) => {}
                    () = changed => {}
                },
            }
        }
    }

    /// Counts bytes that could not wait: others wait for longer.
    pub(crate) fn spend(&self, bytes: u64) {
        self.state.lock().spend(bytes, Instant::now());
    }

    /// Bytes that were taken, but did not come.
    pub(crate) fn give_back(&self, bytes: u64) {
        if bytes > 0 && self.is_limited() {
            self.state.lock().give_back(bytes, Instant::now());
            self.changed.notify_waiters();
        }
    }

    fn wait_as(&self, urgency: Urgency) -> Waiting<'_> {
        self.state.lock().waiting[urgency as usize] += 1;
        Waiting(self, urgency)
    }
}

/// Counts among those who wait.
struct Waiting<'a>(&'a Bucket, Urgency);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let count = &mut self.0.state.lock().waiting[self.1 as usize];
        *count -= 1;
        if *count == 0 {
            self.0.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn bucket(rate: u64) -> Arc<Bucket> {
        let bucket = Bucket::default();
        bucket.set_rate(Some(rate));
        Arc::new(bucket)
    }

    fn state(rate: u64) -> State {
        State { rate: Some(rate), ..State::default() }
    }

    #[test]
    fn a_taker_waits_until_what_went_before_is_paid_for() {
        let (mut state, now) = (state(1000), Instant::now());
        assert_eq!(state.try_take(1000, Urgency::Demand, now), Ok(()));
        let waits = Err(Wait::Time(Duration::from_millis(950)));
        assert_eq!(state.try_take(500, Urgency::Demand, now), waits);
        let later = now + Duration::from_millis(950);
        assert_eq!(state.try_take(500, Urgency::Demand, later), Ok(()));
        assert_eq!(state.try_take(1, Urgency::Demand, now + Duration::from_secs(10)), Ok(()));
    }

    #[test]
    fn nobody_goes_before_those_who_are_in_a_hurry() {
        let (mut state, now) = (state(1000), Instant::now());
        state.waiting = [1, 0, 1];
        assert_eq!(state.try_take(1, Urgency::Background, now), Err(Wait::Others));
        assert_eq!(state.try_take(1, Urgency::Ahead, now), Err(Wait::Others));
        assert_eq!(state.try_take(1, Urgency::Demand, now), Ok(()));
    }

    #[tokio::test]
    async fn of_a_shared_limit_a_third_is_for_those_who_are_less_urgent_and_no_more() {
        const PART: u64 = 32 << 10;
        let bucket = Arc::new(Bucket::sharing());
        bucket.set_rate(Some(100 * PART));
        let moved: [Arc<std::sync::atomic::AtomicU64>; 2] = Default::default();
        let urgencies = [Urgency::Demand, Urgency::Ahead];
        // Two of each, so that one waits while the other one's bytes go.
        let takers = (0..4).map(|at| {
            let (bucket, moved) = (bucket.clone(), moved[at % 2].clone());
            tokio::spawn(async move {
                loop {
                    bucket.take(PART, urgencies[at % 2]).await;
                    moved.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            })
        });
        let takers: Vec<_> = takers.collect();
        let now = || moved.each_ref().map(|moved| moved.load(std::sync::atomic::Ordering::Relaxed));
        tokio::time::timeout(Duration::from_secs(20), async {
            while now().iter().sum::<u64>() < 60 {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("somebody goes on");
        takers.iter().for_each(|taker| taker.abort());
        let [demand, ahead] = now();
        assert!((15..=25).contains(&ahead), "{demand} and {ahead}");
    }

    #[test]
    fn who_did_not_wait_has_saved_nothing_up() {
        let (mut state, now) = (State { is_shared: true, ..state(u64::MAX) }, Instant::now());
        state.waiting = [0, 0, 1];
        for _ in 0..10 {
            assert_eq!(state.try_take(1000, Urgency::Demand, now), Ok(()));
        }
        state.waiting = [0, 1, 1];
        assert_eq!(state.try_take(1000, Urgency::Ahead, now), Err(Wait::Others));
        assert_eq!(state.try_take(1000, Urgency::Demand, now), Ok(()));
        assert_eq!(state.try_take(1000, Urgency::Demand, now), Err(Wait::Others));
        assert_eq!(state.try_take(1000, Urgency::Ahead, now), Ok(()));
        assert_eq!(state.try_take(1000, Urgency::Ahead, now), Err(Wait::Others));
    }

    #[test]
    fn what_did_not_come_costs_nothing() {
        let (mut state, now) = (state(1000), Instant::now());
        state.spend(1000, now);
        state.give_back(400, now);
        assert_eq!(state.debt(now), Duration::from_millis(600));
        state.give_back(4000, now);
        assert_eq!(state.debt(now), Duration::ZERO);
    }

    #[test]
    fn what_was_spent_holds_up_who_waits_for_a_second_and_others_for_half_a_minute() {
        let (mut state, now) = (state(1000), Instant::now());
        let wait = |debt: Duration| Err(Wait::Time(debt - BURST));
        state.spend(1_000_000, now);
        state.spend(1_000_000, now);
        assert_eq!(state.try_take(1, Urgency::Background, now), wait(DEBT_MAX));
        assert_eq!(state.try_take(1, Urgency::Ahead, now), wait(DEBT_MAX));
        assert_eq!(state.try_take(1, Urgency::Demand, now), wait(DEBT_OF_DEMAND_MAX));
        let later = now + DEBT_OF_DEMAND_MAX;
        assert_eq!(state.try_take(5000, Urgency::Demand, later), Ok(()));
        // What was taken is paid for in full, also by those who are in a hurry.
        assert_eq!(state.try_take(1, Urgency::Demand, later), wait(Duration::from_secs(5)));
        state.spend(1_000_000, later);
        assert_eq!(state.try_take(1, Urgency::Demand, later), wait(Duration::from_secs(5)));
    }

    #[test]
    fn a_debt_takes_another_time_at_another_rate() {
        let (mut state, now) = (state(1000), Instant::now());
        state.spend(1000, now);
        state.set_rate(Some(10_000), now);
        assert_eq!(state.debt(now), Duration::from_millis(100));
        state.set_rate(None, now);
        assert_eq!(state.try_take(u64::MAX, Urgency::Background, now), Ok(()));
    }

    #[tokio::test]
    async fn who_waits_goes_when_the_limit_is_lifted() {
        let bucket = bucket(1);
        bucket.take(1_000_000, Urgency::Demand).await;
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let bucket = bucket.clone();
                tokio::spawn(async move { bucket.take(1_000_000, Urgency::Background).await })
            })
            .collect();
        tokio::task::yield_now().await;
        bucket.set_rate(Some(0));
        for waited in waiting {
            waited.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_taker_that_gives_up_lets_the_others_go() {
        let bucket = bucket(1_000_000);
        bucket.take(100_000, Urgency::Demand).await;
        let urgent = tokio::time::timeout(Duration::from_millis(1), bucket.take(1, Urgency::Demand));
        let calm = bucket.take(1, Urgency::Background);
        let (gave_up, ()) = tokio::join!(urgent, calm);
        assert!(gave_up.is_err());
    }
}
