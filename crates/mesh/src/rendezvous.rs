//! Rendezvous hashing: everybody who knows the same members puts them in the same order for a task, and a member that
//! comes or goes moves only its own share.

use darter_identity::attend::MemberInfo;
use darter_types::LayerTask;

/// The members in the task's order: the first is responsible, the next stands in for it.
pub(crate) fn order(task: LayerTask, members: &[MemberInfo]) -> Vec<MemberInfo> {
    let mut all = members.to_vec();
    all.sort_by_cached_key(|member| std::cmp::Reverse(weight(task, member)));
    all
}

fn weight(task: LayerTask, member: &MemberInfo) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(task.diff_id.as_bytes());
    hasher.update(&task.format.to_le_bytes());
    hasher.update(member.node.as_str().as_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::{DiffId, Digest};

    fn members(count: usize) -> Vec<MemberInfo> {
        let member = |number: usize| MemberInfo {
            node: format!("scheduler-{number}").parse().unwrap(),
            address: format!("host-{number}:7410"),
            zone: String::new(),
        };
        (0..count).map(member).collect()
    }

    fn task(number: u32) -> LayerTask {
        LayerTask::current(DiffId(Digest::of(&number.to_le_bytes())))
    }

    #[test]
    fn order_does_not_depend_on_the_order_given() {
        let mut turned = members(5);
        turned.rotate_left(2);
        assert_eq!(order(task(1), &members(5)), order(task(1), &turned));
    }

    #[test]
    fn lost_member_moves_only_its_own_tasks() {
        let (all, rest) = (members(4), members(3));
        let mut moved = 0;
        for number in 0..400 {
            let before = order(task(number), &all).remove(0);
            let after = order(task(number), &rest).remove(0);
            if before != after {
                assert_eq!(before, all[3]);
                moved += 1;
            }
        }
        assert!((60..140).contains(&moved), "{moved} of 400 moved");
    }
}
