//! Answers to children: at once when they open a task, with the tick when something became better or was lost.

use darter_types::LayerTask;

use crate::core::Core;
use crate::limits::{ENOUGH_PARENTS, MAX_TOLD_PER_TICK};
use crate::state::Told;
use crate::{Action, PeerId};

impl Core {
    /// Looks at every task of which something changed or whose time has come, within the tick's bound.
    pub(crate) fn tick(&mut self) {
        while let Some((due, task)) = self.timers.first().copied().filter(|(due, _)| *due <= self.now) {
            self.timers.remove(&(due, task));
            self.changed.insert(task);
        }
        let mut budget = MAX_TOLD_PER_TICK;
        for task in std::mem::take(&mut self.changed) {
            self.see_to_maker(task);
            self.changed.remove(&task);
            if self.tell_waiting(task, &mut budget) {
                self.forget_if_empty(task);
            } else {
                self.changed.insert(task);
            }
        }
    }

    /// False if the budget did not suffice for all who wait.
    fn tell_waiting(&mut self, task: LayerTask, budget: &mut usize) -> bool {
        let Some(entry) = self.tasks.get_mut(&task) else { return true };
        let turn = entry.turn;
        let waiting = entry.waiting.range(turn..).chain(entry.waiting.range(..turn));
        let children: Vec<PeerId> = waiting.copied().take(*budget).collect();
        let all = children.len() == entry.waiting.len();
        if let Some(last) = children.last() {
            entry.turn = PeerId(last.0.saturating_add(1));
        }
        *budget -= children.len();
        children.into_iter().for_each(|child| self.tell(child, task));
        all
    }

    /// Tells one child its parents and seed, unless it knows them already, or has to wait because nobody knows yet.
    pub(crate) fn tell(&mut self, child: PeerId, task: LayerTask) {
        let (Some(chooser), Some(open)) = (self.chooser(task), self.open_of(child, task)) else { return };
        let parents = chooser.parents(child, open);
        let seed = chooser.seed(child, open);
        let nobody = parents.is_empty() && seed.is_none();
        if nobody && open.told.is_none() && self.held_back.contains(&task) {
            return;
        }
        let told = Told { parents: parents.iter().copied().collect(), seed };
        let news = open.told.as_ref() != Some(&told);
        let entry = self.tasks.get_mut(&task).expect("its chooser was there");
        if parents.len() >= ENOUGH_PARENTS && seed.is_some() {
            entry.waiting.remove(&child);
        } else {
            entry.waiting.insert(child);
        }
        if news {
            self.send(child, task, &parents, told);
        }
    }

    fn send(&mut self, child: PeerId, task: LayerTask, parents: &[PeerId], told: Told) {
        self.take_back(child, task);
        for parent in parents {
            let parent = self.peers.get_mut(parent).expect("parents are connected");
            parent.children.insert((task, child));
        }
        let seed = told.seed.map(|id| self.peers[&id].as_parent());
        let parents = parents.iter().map(|id| self.peers[id].as_parent()).collect();
        let open = self.tasks.get_mut(&task).and_then(|entry| entry.opens.get_mut(&child));
        open.expect("only who has it open is told").told = Some(told);
        self.actions.push(Action::SendParents { peer: child, task, parents, seed });
    }
}
