//! What is known of repositories, by the names that people write: so many at most. When there is one more, the oldest of the
//! registry goes that has most: whoever names many of his own keeps out nobody else's.

use std::collections::HashMap;

/// A registry, as people write it, and a repository's name there.
pub(super) type Name = (String, String);

pub(super) struct Names<T> {
    /// With the number of the last change.
    all: HashMap<Name, (u64, T)>,
    changes: u64,
    max: usize,
}

impl<T: Default> Names<T> {
    pub fn new(max: usize) -> Self {
        Self { all: HashMap::new(), changes: 0, max }
    }

    pub fn get(&self, name: &Name) -> Option<&T> {
        self.all.get(name).map(|(_, value)| value)
    }

    pub fn get_mut(&mut self, name: &Name) -> Option<&mut T> {
        self.all.get_mut(name).map(|(_, value)| value)
    }

    /// What is known under the name, to be changed: from now on it is the newest.
    pub fn entry(&mut self, name: Name) -> &mut T {
        if self.all.len() >= self.max && !self.all.contains_key(&name) {
            self.make_room();
        }
        self.changes += 1;
        let (changed, value) = self.all.entry(name).or_default();
        *changed = self.changes;
        value
    }

    pub fn remove(&mut self, name: &Name) {
        self.all.remove(name);
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Name, &T)> {
        self.all.iter().map(|(name, (_, value))| (name, value))
    }

    fn make_room(&mut self) {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for (registry, _) in self.all.keys() {
            *counts.entry(registry).or_default() += 1;
        }
        let most = counts.values().copied().max();
        let candidates = self.all.iter().filter(|((registry, _), _)| Some(counts[registry.as_str()]) == most);
        let oldest = candidates.min_by_key(|(_, (changed, _))| *changed).map(|(name, _)| name.clone());
        oldest.and_then(|oldest| self.all.remove(&oldest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(registry: &str, number: u32) -> Name {
        (registry.to_owned(), format!("app-{number}"))
    }

    #[test]
    fn who_names_many_repositories_pushes_out_his_own_oldest() {
        let mut names = Names::new(8);
        for number in 0..3 {
            *names.entry(name("ours", number)) = number;
        }
        for number in 0..100 {
            *names.entry(name("evil", number)) = number;
            // Used again, it is the newest.
            names.entry(name("evil", 0));
        }
        assert_eq!(names.iter().count(), 8);
        assert!((0..3).all(|number| names.get(&name("ours", number)) == Some(&number)));
        assert!([0, 96, 97, 98, 99].into_iter().all(|number| names.get(&name("evil", number)).is_some()));
    }
}
