//! Which request goes to a store next. So many are in flight at most; lanes (a Kubernetes namespace each) take turns, and no
//! lane may hold more than half, so that one tenant's hanging store does not stop the others.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

/// Who shares a turn: the namespace of a service account, or where a local mount's credential comes from.
pub(super) type Lane = Arc<str>;

/// What goes first within a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// Somebody waits for it: a reader, or all reads of an identity for its login.
    Wanted,
    /// A refresh.
    Background,
}

/// A place in a lane's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket {
    rank: Rank,
    sequence: u64,
}

struct Queue<J> {
    jobs: BTreeMap<Ticket, J>,
    in_flight: usize,
}

/// Jobs that wait for their turn, and the number of those that have it.
pub(super) struct Budget<J> {
    limit: usize,
    in_flight: usize,
    lanes: HashMap<Lane, Queue<J>>,
    /// Lanes with jobs, the next one first; each stands here once.
    turns: VecDeque<Lane>,
    sequence: u64,
}

impl<J> Budget<J> {
    /// At most `limit` in flight; one at least.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), in_flight: 0, lanes: HashMap::new(), turns: VecDeque::new(), sequence: 0 }
    }

    /// Queues a job. Who queues sees to it that no job stands here twice.
    pub(super) fn push(&mut self, lane: &Lane, rank: Rank, job: J) -> Ticket {
        self.sequence += 1;
        let ticket = Ticket { rank, sequence: self.sequence };
        let queue = self
            .lanes
            .entry(Arc::clone(lane))
            .or_insert_with(|| Queue { jobs: BTreeMap::new(), in_flight: 0 });
        if queue.jobs.is_empty() {
            self.turns.push_back(Arc::clone(lane));
        }
        queue.jobs.insert(ticket, job);
        ticket
    }

    /// Moves a background job among the wanted ones.
    pub(super) fn promote(&mut self, lane: &Lane, ticket: Ticket) -> Ticket {
        if ticket.rank == Rank::Wanted {
            return ticket;
        }
        match self.remove(lane, ticket) {
            Some(job) => self.push(lane, Rank::Wanted, job),
            None => ticket,
        }
    }

    /// Takes a job out of its queue.
    pub(super) fn remove(&mut self, lane: &Lane, ticket: Ticket) -> Option<J> {
        let queue = self.lanes.get_mut(lane)?;
        let job = queue.jobs.remove(&ticket);
        if queue.jobs.is_empty() {
            self.turns.retain(|other| other != lane);
            if queue.in_flight == 0 {
                self.lanes.remove(lane);
            }
        }
        job
    }

    /// The next job, if the budget has room for it; it counts as in flight until [`Budget::release`].
    pub(super) fn take(&mut self) -> Option<(Lane, J)> {
        if self.in_flight >= self.limit {
            return None;
        }
        for _ in 0..self.turns.len() {
            let lane = self.turns.pop_front()?;
            let share = self.limit.div_ceil(2);
            let Some(queue) = self.lanes.get_mut(&lane) else { continue };
            if queue.in_flight >= share {
                self.turns.push_back(lane);
                continue;
            }
            let Some((_, job)) = queue.jobs.pop_first() else { continue };
            queue.in_flight += 1;
            self.in_flight += 1;
            if !queue.jobs.is_empty() {
                self.turns.push_back(Arc::clone(&lane));
            }
            return Some((lane, job));
        }
        None
    }

    /// A taken job is over.
    pub(super) fn release(&mut self, lane: &Lane) {
        let Some(queue) = self.lanes.get_mut(lane) else { return };
        queue.in_flight -= 1;
        self.in_flight -= 1;
        if queue.in_flight == 0 && queue.jobs.is_empty() {
            self.lanes.remove(lane);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(name: &str) -> Lane {
        Arc::from(name)
    }

    #[test]
    fn lanes_take_turns_however_long_one_queue_is() {
        let (mut budget, big, small) = (Budget::new(4), lane("big"), lane("small"));
        for n in 0..1_000 {
            budget.push(&big, Rank::Background, n);
        }
        budget.push(&small, Rank::Background, 7_000);
        budget.push(&small, Rank::Background, 7_001);
        let taken: Vec<_> = std::iter::from_fn(|| budget.take()).map(|(_, job)| job).collect();
        assert_eq!(taken, [0, 7_000, 1, 7_001]);
    }

    #[test]
    fn a_lane_that_hangs_leaves_half_of_the_budget_to_the_others() {
        let (mut budget, hung, other) = (Budget::new(8), lane("hung"), lane("other"));
        for n in 0..100 {
            budget.push(&hung, Rank::Background, n);
        }
        assert_eq!(std::iter::from_fn(|| budget.take()).count(), 4);
        budget.push(&other, Rank::Background, 500);
        assert_eq!(budget.take(), Some((Arc::clone(&other), 500)));
        budget.release(&other);
        assert_eq!(budget.take(), None);
        budget.release(&hung);
        assert_eq!(budget.take(), Some((hung, 4)));
    }

    #[test]
    fn a_job_that_somebody_waits_for_goes_before_refreshes() {
        let (mut budget, lane) = (Budget::new(10), lane("a"));
        budget.push(&lane, Rank::Background, 1);
        let second = budget.push(&lane, Rank::Background, 2);
        budget.push(&lane, Rank::Background, 3);
        budget.promote(&lane, second);
        let order: Vec<_> = std::iter::from_fn(|| budget.take()).map(|(_, job)| job).collect();
        assert_eq!(order, [2, 1, 3]);
    }

    #[test]
    fn a_removed_job_is_never_taken_and_leaves_no_lane_behind() {
        let (mut budget, lane) = (Budget::new(1), lane("a"));
        let ticket = budget.push(&lane, Rank::Wanted, 1);
        assert_eq!(budget.remove(&lane, ticket), Some(1));
        assert_eq!(budget.take(), None);
        assert!(budget.lanes.is_empty() && budget.turns.is_empty());
    }
}
