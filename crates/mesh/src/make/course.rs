//! What a flight consists of and when, for whoever follows it in a trace: a scheduler's order may have begun it, and who wants
//! the layer comes when it is half over.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use darter_daemon::traces::{Said, Step, Trail, Value};
use darter_types::LayerTask;
use parking_lot::Mutex;

/// As the making of a layer is called in a trace.
pub(super) const MAKING: &str = "make layer";

/// Parts that are noted of one flight; what comes after is not.
const PARTS_MAX: usize = 64;

/// How long the course of a flight is told that has ended.
const LATELY: Duration = Duration::from_secs(30);

/// Of so many flights; of more the oldest are forgotten.
const LATELY_MAX: usize = 64;

#[derive(Default)]
pub(super) struct Course(Mutex<Vec<Part>>);

struct Part {
    name: &'static str,
    begun: SystemTime,
    ended: Option<SystemTime>,
    said: Vec<Said>,
}

/// A part that is under way; it ends when this is dropped.
pub(super) struct UnderWay<'a> {
    course: &'a Course,
    /// `None` if it is not noted.
    position: Option<usize>,
}

impl Course {
    pub(super) fn part(&self, name: &'static str) -> UnderWay<'_> {
        let mut parts = self.0.lock();
        let position = Some(parts.len()).filter(|position| *position < PARTS_MAX);
        if position.is_some() {
            parts.push(Part { name, begun: SystemTime::now(), ended: None, said: Vec::new() });
        }
        UnderWay { course: self, position }
    }

    /// Tells its parts as steps of `trail`: when they were, not when somebody began to look.
    pub(super) fn tell(&self, trail: Trail) {
        if !trail.is_followed() {
            return;
        }
        for part in self.0.lock().iter() {
            let ended = part.ended.unwrap_or_else(SystemTime::now);
            Step::past(trail, part.name, (part.begun, ended), part.said.clone());
        }
    }

    /// From the first of its parts to the last.
    fn times(&self) -> Option<(SystemTime, SystemTime)> {
        let parts = self.0.lock();
        let ended = parts.iter().map(|part| part.ended.unwrap_or_else(SystemTime::now)).max()?;
        Some((parts.iter().map(|part| part.begun).min()?, ended))
    }
}

/// The courses of flights that have lately made their layers: who has a layer ordered often comes when it is made already.
#[derive(Default)]
pub(super) struct Lately(Mutex<VecDeque<(LayerTask, Instant, Arc<Course>)>>);

impl Lately {
    pub(super) fn made(&self, task: LayerTask, course: Arc<Course>) {
        let mut all = self.0.lock();
        all.retain(|(_, at, _)| at.elapsed() < LATELY);
        if all.len() >= LATELY_MAX {
            all.pop_front();
        }
        all.push_back((task, Instant::now(), course));
    }

    /// Tells how the layer was made, if that was lately.
    pub(super) fn tell(&self, task: LayerTask, trail: Trail) {
        let all = self.0.lock();
        let is_it = |(of, at, _): &&(LayerTask, Instant, Arc<Course>)| *of == task && at.elapsed() < LATELY;
        let course = all.iter().rev().find(is_it).map(|(_, _, course)| course.clone());
        drop(all);
        if let Some((course, times)) = course.and_then(|course| Some((course.clone(), course.times()?))) {
            let said = vec![("darter.joined", true.into())];
            course.tell(Step::past(trail, MAKING, times, said));
        }
    }
}

impl UnderWay<'_> {
    pub(super) fn say(&self, key: &'static str, value: impl Into<Value>) {
        self.change(|part| part.said.push((key, value.into())));
    }

    fn change(&self, change: impl FnOnce(&mut Part)) {
        if let Some(position) = self.position {
            change(&mut self.course.0.lock()[position]);
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.change(|part| part.ended = Some(SystemTime::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flight_over_many_sources_keeps_a_bounded_course() {
        let course = Course::default();
        for _ in 0..PARTS_MAX + 10 {
            course.part("read blob").say("darter.bytes", 1u64);
        }
        let parts = course.0.lock();
        assert_eq!(parts.len(), PARTS_MAX);
        assert!(parts.iter().all(|part| part.ended.is_some() && part.said.len() == 1));
    }
}
