// SPDX-License-Identifier: GPL-2.0
//! Which VMCS fields of L1 are worth shadowing: learned from the exits that they cost.
//!
//! A field that L1 reads or writes costs an exit each time; a shadowed one costs a copy each way on
//! every switch, some hundredth of an exit. So a field joins once it has been touched [`JOIN`]
//! times, where old touches fade: they are halved every [`FADE`] switches. A shadowed field is
//! invisible, so now and then some are put out on trial: one that is touched within [`FADE`]
//! switches comes back at once; the others stay out and must earn their place anew.
//!
//! While L1 keeps its habits a trial takes one field and there is one in [`TRIAL`] switches, so
//! that learning costs one exit in that many. When a trial shows that nothing of it was needed, the
//! next follows at once and takes twice as many: a set of `n` fields that L1 no longer uses is gone
//! after `TRIAL + FADE * (2 + log2(n))` switches.

/// Touches after which a field joins.
pub const JOIN: u8 = 2;
/// Touches of all costly fields together, at least so many of which must not have faded for any of
/// them to join. Shadowing costly fields costs about half an exit on each switch, however many they
/// are, so they pay from one touch in two switches; this asks for one in each.
pub const JOIN_COSTLY: u16 = FADE;
/// Switches after which old touches count half, and after which a trial ends.
pub const FADE: u16 = 16;
/// Switches from the start of one trial to the next.
pub const TRIAL: u16 = 64;

const WORD: usize = 64;
/// Words of a set.
pub const WORDS: usize = 3;
/// Most fields that a learner can tell apart.
pub const FIELDS: usize = WORDS * WORD;

/// A set of fields, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set([u64; WORDS]);

impl Set {
    /// No field.
    pub const EMPTY: Set = Set([0; WORDS]);

    /// The set as bits, the lowest for field 0.
    pub fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    /// The set with these bits.
    pub const fn from_words(words: [u64; WORDS]) -> Self {
        Self(words)
    }

    /// Whether `field` is in the set.
    pub fn has(&self, field: u8) -> bool {
        self.0
            .get(field as usize / WORD)
            .is_some_and(|w| (w >> (field as usize % WORD)) & 1 != 0)
    }

    /// Puts `field` in.
    pub fn insert(&mut self, field: u8) {
        if let Some(w) = self.0.get_mut(field as usize / WORD) {
            *w |= 1 << (field as usize % WORD);
        }
    }

    /// Takes `field` out.
    pub fn remove(&mut self, field: u8) {
        if let Some(w) = self.0.get_mut(field as usize / WORD) {
            *w &= !(1 << (field as usize % WORD));
        }
    }

    /// How many fields are in the set.
    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether there is no field in the set.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&w| w == 0)
    }

    /// The fields in the set, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..FIELDS as u8).filter(|&f| self.has(f))
    }

    /// The first field of the set after `field`, going round.
    fn after(&self, field: u8) -> Option<u8> {
        (1..=FIELDS)
            .map(|d| ((field as usize + d) % FIELDS) as u8)
            .find(|&f| self.has(f))
    }
}

/// What one vCPU's L1 has been seen to touch.
#[derive(Debug)]
pub struct Learner {
    touches: [u8; FIELDS],
    learned: Set,
    barred: Set,
    trial: Set,
    trial_size: usize,
    last_trial: u8,
    next_trial: u16,
    costly: u16,
    switches: u16,
    budget: u8,
}

impl Learner {
    /// Starts with nothing learned; at most `budget` fields will be.
    pub const fn new(budget: u8) -> Self {
        Self {
            touches: [0; FIELDS],
            learned: Set::EMPTY,
            barred: Set::EMPTY,
            trial: Set::EMPTY,
            trial_size: 1,
            last_trial: 0,
            next_trial: TRIAL,
            costly: 0,
            switches: 0,
            budget,
        }
    }

    /// The fields to shadow now.
    pub fn learned(&self) -> &Set {
        &self.learned
    }

    /// L1's access to `field`, which may be shadowed, has cost an exit. `true` if the field has
    /// just joined. Costly fields only pay together.
    pub fn touched(&mut self, field: u8, costly: bool) -> bool {
        if self.learned.has(field) || self.barred.has(field) {
            return false;
        }
        let Some(count) = self.touches.get_mut(field as usize) else {
            return false;
        };
        *count = count.saturating_add(1);
        self.costly = self.costly.saturating_add(u16::from(costly));
        let pays = !costly || self.costly >= JOIN_COSTLY;
        let tried = self.trial.has(field);
        let wanted = tried || (*count >= JOIN && pays);
        if !wanted || self.learned.len() >= self.budget as usize {
            return false;
        }
        if tried {
            // Habits are as they were.
            self.trial.remove(field);
            self.trial_size = 1;
            self.next_trial = TRIAL;
        }
        *count = 0;
        self.learned.insert(field);
        true
    }

    /// L1 has entered its guest and come back. `true` if fields have just left, for a trial.
    pub fn switched(&mut self) -> bool {
        self.switches = (self.switches + 1) % FADE;
        self.next_trial = self.next_trial.saturating_sub(1);
        if self.switches != 0 {
            return false;
        }
        self.touches.iter_mut().for_each(|t| *t /= 2);
        self.costly /= 2;
        if !self.trial.is_empty() {
            // Not touched since: they stay out. If all of them do, more may.
            let all = self.trial.len() == self.trial_size;
            self.trial = Set::EMPTY;
            if all {
                self.trial_size = (self.trial_size * 2).min(FIELDS);
                self.next_trial = 0;
            }
        }
        if self.next_trial != 0 || self.learned.is_empty() {
            return false;
        }
        self.next_trial = TRIAL;
        self.trial_size = self.trial_size.min(self.learned.len());
        for _ in 0..self.trial_size {
            let Some(field) = self.learned.after(self.last_trial) else {
                break;
            };
            self.learned.remove(field);
            self.last_trial = field;
            self.trial.insert(field);
        }
        true
    }

    /// `field` cannot be shadowed on this processor: it leaves and never comes back.
    pub fn bar(&mut self, field: u8) {
        self.learned.remove(field);
        self.barred.insert(field);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `switches` switches in which L1 touches `fields` once each; returns the exits it took.
    fn run(learner: &mut Learner, fields: &[u8], switches: usize) -> usize {
        let mut exits = 0;
        for _ in 0..switches {
            for &f in fields {
                if !learner.learned().has(f) {
                    exits += 1;
                    learner.touched(f, false);
                }
            }
            learner.switched();
        }
        exits
    }

    #[test]
    fn learns_what_is_touched_again_and_again() {
        let mut learner = Learner::new(64);
        let fields: Vec<u8> = (10..50).collect();
        assert_eq!(run(&mut learner, &fields, 4), 40 * JOIN as usize);
        // From then on one trial in TRIAL switches costs one exit.
        assert!(run(&mut learner, &fields, 1024) <= 1024 / TRIAL as usize);
    }

    #[test]
    fn forgets_what_is_no_longer_touched() {
        let mut learner = Learner::new(64);
        run(&mut learner, &[1, 2, 3], 10);
        run(&mut learner, &[3], 10 * TRIAL as usize);
        assert_eq!(learner.learned().iter().collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_new_phase_is_followed_soon() {
        let mut learner = Learner::new(96);
        run(&mut learner, &(0..90).collect::<Vec<_>>(), 1000);
        assert_eq!(learner.learned().len(), 90);
        let log2 = 7;
        run(&mut learner, &[100], (TRIAL + FADE * (2 + log2)) as usize);
        assert_eq!(learner.learned().iter().collect::<Vec<_>>(), [100]);
    }

    #[test]
    fn costly_fields_join_when_they_pay_together() {
        let mut learner = Learner::new(96);
        // One alone, touched on every eighth switch, never pays.
        for n in 0..1000 {
            if n % 8 == 0 {
                learner.touched(3, true);
            }
            learner.switched();
        }
        assert!(learner.learned().is_empty());
        // Forty of them, each touched as rarely, do.
        for n in 0..1000 {
            if n % 8 == 0 {
                (10..50).for_each(|f| {
                    learner.touched(f, true);
                });
            }
            learner.switched();
        }
        assert!(learner.learned().len() >= 39);
    }

    #[test]
    fn rare_touches_are_not_worth_it() {
        let mut learner = Learner::new(64);
        for _ in 0..100 {
            learner.touched(7, false);
            (0..2 * FADE).for_each(|_| {
                learner.switched();
            });
        }
        assert!(learner.learned().is_empty());
    }

    #[test]
    fn the_budget_holds() {
        let mut learner = Learner::new(5);
        run(&mut learner, &(0..100).collect::<Vec<_>>(), 50);
        assert_eq!(learner.learned().len(), 5);
    }
}
