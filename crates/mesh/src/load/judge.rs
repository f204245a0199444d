//! From what was measured to what it means: pure, one look after the other.

/// Shares of what a resource can do, from 0 to 1: from the one on it is busy, below the other it is calm. What lies between
/// changes nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    pub busy: f64,
    pub calm: f64,
}

/// Of the time: somebody waited for the disk so long.
pub(super) const DISK: Marks = Marks { busy: 0.3, calm: 0.15 };
/// Of the link's rate, in the busier direction: whoever shares a link with the background alone gets half of it.
pub(super) const NETWORK: Marks = Marks { busy: 0.5, calm: 0.3 };

/// Looks that must agree before anything changes: one busy second is none, and calm must last longer than a pause for breath.
const BUSY_LOOKS: u8 = 2;
const CALM_LOOKS: u8 = 3;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Judge {
    is_busy: bool,
    /// Looks, one after the other, that spoke against what is believed.
    against: u8,
}

impl Judge {
    pub(super) fn is_busy(self) -> bool {
        self.is_busy
    }

    /// What is believed after one more look. `None`: nothing could be measured, and nobody stands back for nothing.
    pub(super) fn next(self, share: Option<f64>, marks: Marks) -> Self {
        let share = share.unwrap_or(0.0);
        let (speaks_against, looks) =
            if self.is_busy { (share < marks.calm, CALM_LOOKS) } else { (share >= marks.busy, BUSY_LOOKS) };
        match (speaks_against, self.against + 1 >= looks) {
            (false, _) => Self { against: 0, ..self },
            (true, false) => Self { against: self.against + 1, ..self },
            (true, true) => Self { is_busy: !self.is_busy, against: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn believed(shares: &[f64]) -> Vec<bool> {
        let mut judge = Judge::default();
        let mut step = |share: &f64| {
            judge = judge.next(Some(*share), DISK);
            judge.is_busy()
        };
        shares.iter().map(&mut step).collect()
    }

    #[test]
    fn one_busy_second_is_none() {
        assert_eq!(believed(&[0.9, 0.0, 0.9, 0.2, 0.9]), [false; 5]);
        assert_eq!(believed(&[0.0, 0.3, 0.9]), [false, false, true]);
    }

    #[test]
    fn calm_must_last_and_between_the_marks_nothing_changes() {
        let shares = [0.9, 0.9, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.2];
        let busy = [false, true, true, true, true, true, true, false, false];
        assert_eq!(believed(&shares), busy);
    }

    #[test]
    fn what_cannot_be_measured_is_calm() {
        let mut judge = Judge { is_busy: true, against: 0 };
        for _ in 0..CALM_LOOKS {
            judge = judge.next(None, NETWORK);
        }
        assert!(!judge.is_busy());
    }
}
