// SPDX-License-Identifier: GPL-2.0
//! What is learned of an L1's VMCS fields, whatever that L1 does.

use std::collections::BTreeSet;

use policy::{
    learn::{Config, Learner},
    set::{Set, FIELDS},
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Touch(u8, bool),
    Switch,
    Bar(u8),
    Configure(Config),
}

/// Few fields, so that they are touched often, and now and then any number at all.
fn field() -> impl Strategy<Value = u8> {
    prop_oneof![8 => 0u8..12, 1 => any::<u8>()]
}

fn config() -> impl Strategy<Value = Config> {
    let some = || prop::collection::vec(field(), 0..3);
    let parts = (0u8..10, 4u16..40, some(), some(), any::<bool>());
    parts.prop_map(|(budget, window, pinned, forbidden, eager)| Config {
        eager,
        budget,
        window,
        pinned: set(pinned),
        forbidden: set(forbidden),
    })
}

fn set(fields: impl IntoIterator<Item = u8>) -> Set {
    let mut set = Set::EMPTY;
    fields.into_iter().for_each(|f| set.insert(f));
    set
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        200 => (field(), any::<bool>()).prop_map(|(f, costly)| Step::Touch(f, costly)),
        100 => Just(Step::Switch),
        4 => field().prop_map(Step::Bar),
        1 => config().prop_map(Step::Configure),
    ]
}

/// What an L1 touches, costly or not, in each switch of a period that repeats.
type Habit = Vec<Vec<u8>>;

/// From this number on fields are costly.
const COSTLY: u8 = 30;

/// What L1 does and what it costs, in units of a seventieth of an exit.
struct Machine {
    learner: Learner,
    cost: u64,
    stock: u64,
    /// Changes of the learned set that no trial explains.
    changes: usize,
}

const EXIT: u64 = 70;
/// What fetching costly fields takes for each switch in which none of them is touched; KVM does it itself otherwise.
const FETCH: u64 = 35;
/// What a switch costs beside: the cheapest that stock KVM has is some ten exits.
const SWITCH: u64 = 10 * EXIT;

impl Machine {
    fn new() -> Self {
        Self {
            learner: Learner::new(Config::new(96)),
            cost: 0,
            stock: 0,
            changes: 0,
        }
    }

    fn live(&mut self, habit: &Habit, switches: usize) {
        for touched in habit.iter().cycle().take(switches) {
            let before = settled(&self.learner);
            let learned = *self.learner.learned();
            for &f in touched {
                if !self.learner.learned().has(f) {
                    self.cost += EXIT;
                    self.learner.touched(f, f >= COSTLY);
                }
            }
            self.cost += SWITCH + learned.len() as u64;
            self.stock += SWITCH + EXIT * touched.len() as u64;
            let fetches = learned.iter().any(|f| f >= COSTLY);
            if fetches && !touched.iter().any(|&f| f >= COSTLY) {
                self.cost += FETCH;
            }
            self.learner.switched();
            self.changes += usize::from(settled(&self.learner) != before);
        }
    }
}

/// So many switches, as far as they are whole periods: what follows goes on with the first switch of one.
fn whole(switches: usize, habit: &Habit) -> usize {
    switches / habit.len() * habit.len()
}

/// What is learned, on trial or not.
fn settled(learner: &Learner) -> Set {
    learner.learned().or(&learner.on_trial())
}

fn habit(fields: u8) -> impl Strategy<Value = Habit> {
    habit_within(fields, 29)
}

/// With a period of so many switches at most.
fn habit_within(fields: u8, period: usize) -> impl Strategy<Value = Habit> {
    let switch = prop::collection::vec(0..fields, 0..30).prop_map(|mut fields| {
        fields.sort_unstable();
        fields.dedup();
        fields
    });
    prop::collection::vec(switch, 1..=period)
}

/// Switches after which habits with bursts have settled.
const BURSTS_SETTLE: usize = 80_000;

/// A period longer than a window, with fields that are touched in bursts, and those of them that pay: touched once in at most
/// 20 switches, the others once in at least 64.
fn bursts() -> impl Strategy<Value = (Habit, Set)> {
    (64usize..128).prop_flat_map(|period| {
        let often = period.div_ceil(20)..=period / 8;
        let rare = 1..=(period / 64).max(1);
        let field = prop_oneof![often.prop_map(|n| (n, true)), rare.prop_map(|n| (n, false))];
        let field = (field, 0..period, 1usize..3);
        prop::collection::vec(field, 1..30).prop_map(move |fields| {
            let mut habit = vec![Vec::new(); period];
            let mut pays = Set::EMPTY;
            for (number, ((touches, often), at, step)) in (0u8..).zip(fields) {
                for touch in 0..touches {
                    habit[(at + touch * step) % period].push(number);
                }
                if often {
                    pays.insert(number);
                }
            }
            (habit, pays)
        })
    })
}

/// Whether the costly fields are clearly, by half, worth it or not in any window of the habit, or there are none.
fn is_clear(habit: &Habit) -> bool {
    let window = usize::from(Config::new(0).window);
    let touches: Vec<usize> = habit
        .iter()
        .cycle()
        .take(habit.len() + window)
        .map(|touched| touched.iter().filter(|&&f| f >= COSTLY).count())
        .collect();
    let counts = || touches.windows(window).map(|w| w.iter().sum::<usize>());
    let limit = window / 4;
    counts().all(|n| n >= limit * 3 / 2) || counts().all(|n| n < limit / 2)
}

/// What a habit is to end in: what it touches, as its period is shorter than a window.
fn worth(habit: &Habit) -> Set {
    let window = usize::from(Config::new(0).window);
    let costly: usize = habit
        .iter()
        .map(|t| t.iter().filter(|&&f| f >= COSTLY).count())
        .sum();
    let pays = costly * window >= habit.len() * window / 4;
    set(habit
        .iter()
        .flatten()
        .copied()
        .filter(|&f| f < COSTLY || pays))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_learner_keeps_its_promises(
        first in config(), steps in prop::collection::vec(step(), 0..600),
    ) {
        let mut config = first;
        let mut learner = Learner::new(config);
        learner.configure(config);
        let mut barred = BTreeSet::new();
        for step in steps {
            let before: BTreeSet<u8> = learner.learned().iter().collect();
            match step {
                Step::Touch(field, costly) => {
                    let joined = learner.touched(field, costly);
                    let after: BTreeSet<u8> = learner.learned().iter().collect();
                    prop_assert_eq!(joined, !after.is_subset(&before));
                }
                Step::Switch => {
                    let left = learner.switched();
                    prop_assert_eq!(left, learner.learned().len() < before.len());
                    prop_assert!(learner.learned().iter().all(|f| before.contains(&f)));
                }
                Step::Bar(field) => {
                    learner.bar(field);
                    barred.insert(field);
                }
                Step::Configure(new) => {
                    config = new;
                    let changed = learner.configure(config);
                    let after: BTreeSet<u8> = learner.learned().iter().collect();
                    prop_assert_eq!(changed, before != after);
                }
            }
            let learned: BTreeSet<u8> = learner.learned().iter().collect();
            let pinned: BTreeSet<u8> = config.pinned.without(&config.forbidden).iter().collect();
            prop_assert!(learned.len() <= usize::from(config.budget).max(pinned.len()));
            prop_assert!(learned.is_disjoint(&barred));
            prop_assert!(pinned.difference(&barred).all(|f| learned.contains(f)));
            prop_assert!(config.forbidden.iter().all(|f| !learned.contains(&f)));
            prop_assert!(learned.iter().all(|&f| usize::from(f) < FIELDS));
            prop_assert!(learner.learned().and(&learner.on_trial()).is_empty());
        }
    }

    #[test]
    fn a_steady_habit_ends_in_one_set_whatever_was_before(
        past in prop::collection::vec((habit(60), 0usize..400), 0..4),
        // Fields that were known for bursts come back if they are touched that often.
        steady in habit_within(60, 20).prop_filter("clear", is_clear),
    ) {
        let mut machine = Machine::new();
        for (habit, switches) in &past {
            machine.live(habit, *switches);
        }
        // A trial for each field that may be left of the past, and one of the costly ones.
        machine.live(&steady, whole(2 * (60 / 4 * 9 * 32 + 32 * 32), &steady));
        machine.changes = 0;
        machine.live(&steady, 5000);
        prop_assert_eq!(settled(&machine.learner), worth(&steady));
        prop_assert_eq!(machine.changes, 0);
    }

    #[test]
    fn bursts_end_in_one_set_whenever_they_begin(
        past in prop::collection::vec((habit(30), 0usize..400), 0..3),
        (steady, often) in bursts(), phase in 0usize..128,
    ) {
        let mut machine = Machine::new();
        for (habit, switches) in &past {
            machine.live(habit, *switches);
        }
        machine.live(&vec![Vec::new(); 1], phase);
        machine.live(&steady, whole(BURSTS_SETTLE, &steady));
        machine.changes = 0;
        machine.live(&steady, 10_000);
        prop_assert_eq!(settled(&machine.learner), often);
        prop_assert!(machine.changes <= 2 * often.len(), "{} changes", machine.changes);
    }

    #[test]
    fn a_steady_habit_costs_little_more_than_its_copies(steady in habit(60)) {
        let mut machine = Machine::new();
        machine.live(&steady, 8000);
        machine.cost = 0;
        machine.stock = 0;
        machine.live(&steady, 4096);
        // Four exits in 8 windows, and those of a trial of the costly fields in 32.
        let trials = 4096 / (8 * 32) * 4 * EXIT + (4096 / (32 * 32) + 1) * 8 * EXIT;
        prop_assert!(machine.cost <= machine.stock + machine.stock / 100 + trials,
            "{} against {}", machine.cost, machine.stock);
    }

    #[test]
    fn phases_cost_at_most_five_per_cent_more_than_stock(
        phases in prop::collection::vec((habit(60), 1usize..3000), 1..12),
    ) {
        let mut machine = Machine::new();
        for (habit, switches) in &phases {
            machine.live(habit, *switches);
            prop_assert!(machine.cost * 100 <= machine.stock * 105 + 100 * 100 * EXIT,
                "{} against {}", machine.cost, machine.stock);
        }
    }

    #[test]
    fn a_set_is_a_set(
        changes in prop::collection::vec((any::<bool>(), any::<u8>()), 0..100),
        others in prop::collection::btree_set(0..FIELDS as u8, 0..100),
        from in any::<u8>(),
    ) {
        let mut set = Set::EMPTY;
        let mut model = BTreeSet::new();
        for (insert, field) in changes {
            if insert {
                set.insert(field);
                // Numbers beyond the last field are not kept.
                if usize::from(field) < FIELDS {
                    model.insert(field);
                }
            } else {
                set.remove(field);
                model.remove(&field);
            }
            prop_assert_eq!(set.has(field), model.contains(&field));
        }
        let other = self::set(others.iter().copied());
        prop_assert_eq!(set.len(), model.len());
        prop_assert_eq!(set.is_empty(), model.is_empty());
        prop_assert!(set.iter().eq(model.iter().copied()));
        prop_assert!(set.and(&other).iter().eq(model.intersection(&others).copied()));
        prop_assert!(set.or(&other).iter().eq(model.union(&others).copied()));
        prop_assert!(set.without(&other).iter().eq(model.difference(&others).copied()));
        prop_assert_eq!(set.last(), model.last().copied());
        let after = model.iter().find(|&&f| f > from).or(model.first());
        prop_assert_eq!(set.after(from), after.copied());
        prop_assert_eq!(Set::from_words(*set.words()), set);
    }
}
