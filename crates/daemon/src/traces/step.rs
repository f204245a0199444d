//! One step of what is followed: OpenTelemetry's span.

use std::hash::{BuildHasher, RandomState};
use std::num::{NonZeroU64, NonZeroU128};
use std::time::{Instant, SystemTime};

use super::trail::Place;
use super::{Trail, now, tell};
use crate::backoff::random_fraction;

/// What can be said of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Text(String),
    Number(i64),
    Yes(bool),
}

/// Something that is said of a step: a name, as `darter.piece`, and a value.
pub type Said = (&'static str, Value);

impl From<String> for Value {
    fn from(text: String) -> Self {
        Value::Text(text)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Text(text.to_owned())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Value::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Value::Number(number.into())
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Value::from(number as u64)
    }
}

impl From<bool> for Value {
    fn from(yes: bool) -> Self {
        Value::Yes(yes)
    }
}

/// Who does the step, as OpenTelemetry tells it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Inside,
    /// Asks another program.
    Client,
    /// Answers one.
    Server,
}

/// A step as it is told when it has ended.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "otlp"), allow(dead_code))]
pub(super) struct Record {
    pub name: &'static str,
    pub place: Place,
    pub parent: Option<NonZeroU64>,
    pub is_parent_elsewhere: bool,
    pub side: Side,
    pub begun: SystemTime,
    pub ended: SystemTime,
    pub said: Vec<Said>,
    /// Why it failed.
    pub fault: Option<String>,
    since: Instant,
}

/// A step that is under way, if somebody follows it. It ends when it is dropped.
#[derive(Debug, Default)]
#[must_use = "a step ends when it is dropped"]
pub struct Step(Option<Box<Record>>);

impl Step {
    /// Nobody follows it.
    pub const fn none() -> Step {
        Step(None)
    }

    /// A read of a container, perhaps the beginning of a trace.
    pub fn of_read(name: &'static str) -> Step {
        match now() {
            Some(traces) if traces.share_of_reads.has(random_fraction()) => Step::first(name),
            _ => Step::none(),
        }
    }

    /// An image that is being pulled, perhaps the beginning of a trace.
    pub fn of_pull(name: &'static str) -> Step {
        match now() {
            Some(traces) if traces.share_of_pulls.has(random_fraction()) => Step::first(name),
            _ => Step::none(),
        }
    }

    /// A step of what is being done here, see [`Trail::over`].
    pub fn here(name: &'static str) -> Step {
        Trail::current().step(name)
    }

    /// The answer to another member, who may want it followed: so it is, up to a limit.
    pub fn for_member(trail: Trail, name: &'static str) -> Step {
        if now().is_some() && trail.is_followed() && super::may_accept() {
            Step::below(trail, name, true).on(Side::Server)
        } else {
            Step::none()
        }
    }

    /// One that is over already, with all that there is to say; where its own steps belong.
    pub fn past(
        trail: Trail,
        name: &'static str,
        (begun, ended): (SystemTime, SystemTime),
        said: Vec<Said>,
    ) -> Trail {
        let mut step = trail.step(name);
        let place = step.trail();
        if let Some(mut record) = step.0.take() {
            (record.begun, record.ended, record.said) = (begun, ended, said);
            tell(record);
        }
        place
    }

    fn first(name: &'static str) -> Step {
        let trace = NonZeroU128::MIN | (u128::from(random()) << 64 | u128::from(random()));
        Step::begin(name, trace, None, false)
    }

    pub(super) fn below(trail: Trail, name: &'static str, is_parent_elsewhere: bool) -> Step {
        match trail.0 {
            Some(Place { trace, step }) if now().is_some() => {
                Step::begin(name, trace, Some(step), is_parent_elsewhere)
            }
            _ => Step::none(),
        }
    }

    fn begin(
        name: &'static str,
        trace: NonZeroU128,
        parent: Option<NonZeroU64>,
        is_parent_elsewhere: bool,
    ) -> Step {
        let place = Place { trace, step: NonZeroU64::MIN | random() };
        let (begun, since) = (SystemTime::now(), Instant::now());
        Step(Some(Box::new(Record {
            name,
            place,
            parent,
            is_parent_elsewhere,
            side: Side::Inside,
            begun,
            ended: begun,
            said: Vec::new(),
            fault: None,
            since,
        })))
    }

    fn on(mut self, side: Side) -> Step {
        self.0.iter_mut().for_each(|record| record.side = side);
        self
    }

    /// It asks another program.
    pub fn asking(self) -> Step {
        self.on(Side::Client)
    }

    /// It answers another program.
    pub fn answering(self) -> Step {
        self.on(Side::Server)
    }

    pub fn is_followed(&self) -> bool {
        self.0.is_some()
    }

    /// Where the steps belong that this one consists of.
    pub fn trail(&self) -> Trail {
        Trail(self.0.as_ref().map(|record| record.place))
    }

    /// The value is made only if somebody follows the step.
    pub fn say<V: Into<Value>>(&mut self, key: &'static str, value: impl FnOnce() -> V) {
        if let Some(record) = &mut self.0 {
            record.said.push((key, value().into()));
        }
    }

    /// The same, in a chain.
    pub fn with<V: Into<Value>>(mut self, key: &'static str, value: impl FnOnce() -> V) -> Step {
        self.say(key, value);
        self
    }

    /// It failed, and why.
    pub fn fail(&mut self, why: impl std::fmt::Display) {
        if let Some(record) = &mut self.0 {
            record.fault = Some(why.to_string());
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(mut record) = self.0.take() {
            record.ended = record.begun + record.since.elapsed();
            tell(record);
        }
    }
}

/// It differs from call to call and from process to process; an identifier need be no secret.
fn random() -> u64 {
    RandomState::new().hash_one(0u8)
}
