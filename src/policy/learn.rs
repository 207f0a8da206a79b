// SPDX-License-Identifier: GPL-2.0
//! Which VMCS fields of L1 are worth shadowing: learned from the exits that they cost.
//!
//! A field that L1 reads or writes costs an exit each time; a shadowed one costs a copy each way on
//! every switch, some seventieth of an exit in instructions and some thirtieth in time. So a field
//! pays if L1 touches it at least once in [`Config::window`] switches, and this one rule decides both
//! ways, whatever was before: a field joins when it is touched in a second switch of a window, and
//! leaves when it is put out on trial and not touched for a window. (One that is touched again and
//! again without a switch joins as well, and along with a field that joins those, if they are few, whose first touch was in the same switch as
//! its first. Two of a family, fields that make up one thing, count as one touched twice, and bring the others along.) So the set that a steady habit ends in is that habit's own:
//! every field whose touches are never more than a window apart (20 switches of 32 if it was known for bursts before), and none that is never touched. A field
//! that is touched in bursts is judged by its rate over [`LONG`] windows, whenever these begin: it comes back after more
//! than `LONG` touches in them, after half as many again if it has failed by that measure before, and
//! stays with `LONG`.
//!
//! A shadowed field is invisible, hence the trials. The first trial of a field since habits have changed lasts until it
//! was touched `LONG` times in as many windows, and so does each one of a field that is known for bursts. Any
//! other ends with the first touch. Who was not touched in a window leaves at once, but for those known for bursts. A
//! trial takes up to [`FIRST_SIZE`] fields that have not had their first, and there are at least two switches for each
//! exit that trials take. Later it takes [`TRIAL_SIZE`] fields by turns, [`TRIAL`] windows after the last
//! one or, if that took many exits, up to [`GROUP_TRIAL`], so that learning costs one exit in 64 switches then (in 32 where all
//! fields are touched in bursts). As
//! long as at least half of what was on trial turns out to be out of use, the next trial follows after two switches for each exit that
//! this one took, takes twice as many and passes over what has come back (if nothing else is left, a long pause follows), so a set of `n` fields none of which L1 uses any more is gone after
//! `TRIAL + log2(n)` windows. Where L1 goes on with most of them and begins with no other, the others are found in turn,
//! within `n / TRIAL_SIZE * (TRIAL + 1)` windows.
//!
//! Fields that somebody else had chosen to begin with ([`Learner::with`]) and that have left come back with their first
//! touch or that of one of their family, [`GIVEN`] times: somebody had a reason, and a guest that boots changes its habits.
//!
//! *Costly* fields cost something together, however many they are: half an exit on each switch. They
//! are shadowed while their touches are one in four switches, counted over a window; now and then all
//! are put out to count anew, at first after two windows and later, if they always come back, after
//! [`GROUP_TRIAL`] of them.
//!
//! With more fields than the budget allows, those with the lowest numbers are shadowed.

use super::set::{Set, FIELDS};

/// Windows between two trials, at most.
pub const TRIAL: u16 = 8;
/// Windows between two trials of the costly fields, at most.
pub const GROUP_TRIAL: u16 = 32;
/// Fields on trial at a time.
pub const TRIAL_SIZE: u8 = 4;
/// The same while there are fields that had none since habits have changed.
pub const FIRST_SIZE: u8 = 32;
/// The same while most turn out to be out of use.
const LARGE_TRIAL: u8 = 32;
/// Most fields that are taken to belong together because they were first touched in one switch. More at once are those
/// of a VMCS that is being set up, touched once and not again.
pub const COMPANIONS: usize = 16;
/// How often a field that was there to begin with comes back with its first touch.
pub const GIVEN: u8 = 3;
/// Windows, and touches in them, by which bursts are judged.
pub const LONG: u8 = 4;

/// What the administrator may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Most fields that are shadowed, those that are pinned included; these are shadowed anyway.
    pub budget: u8,
    /// A field pays if it is touched once in this many switches, [`Config::WINDOWS`].
    pub window: u16,
    /// Fields that are always shadowed.
    pub pinned: Set,
    /// Fields that never are, even if they are pinned.
    pub forbidden: Set,
    /// The first touch ends a field's first trial as it ends others, unless the field is known for bursts: for fields whose
    /// touches cost no exit to begin with, so that one that is put out by mistake is worse than one that stays. The pause after all
    /// were asked follows from the exits of all these trials, not of the last one.
    pub eager: bool,
}

impl Config {
    /// Windows that make sense.
    pub const WINDOWS: core::ops::RangeInclusive<u16> = 4..=1024;

    /// The one to begin with.
    pub const fn new(budget: u8) -> Self {
        Self {
            budget,
            window: 32,
            pinned: Set::EMPTY,
            forbidden: Set::EMPTY,
            eager: false,
        }
    }

    /// Switches from one trial to the next while something changes.
    pub const fn trial(&self) -> u16 {
        self.window * 2
    }

    /// Touches in a window that make the costly fields join.
    pub const fn burst(&self) -> u16 {
        self.window / 4
    }
}

/// What one vCPU's L1 has been seen to touch.
#[derive(Debug)]
pub struct Learner {
    config: Config,
    learned: Set,
    barred: Set,
    /// Those to begin with that have come back less than [`GIVEN`] times.
    given: Set,
    /// Something was touched.
    awake: bool,
    /// The number of the switch, which may go round.
    now: u32,
    uses: [Use; FIELDS],
    /// Fields on trial, how many there were when it began, and how many may be in the next.
    trial: Set,
    tried: u8,
    /// How many of them were not touched in the first window, which is over if `prolonged`.
    failed: u8,
    prolonged: bool,
    /// Exits that the trial took; and that all have taken since the last long pause, with touches of what has come back with the first.
    spent: u16,
    spent_since: u16,
    /// Fields that were touched often enough in a trial of many windows, or had none to prove, since habits changed.
    proven: Set,
    /// Fields that had their trial, or came back, since the last long pause.
    kept: Set,
    trial_size: u8,
    last_trial: u8,
    /// Switches until the trial ends, or the next begins.
    wait: u16,
    /// How many fields have come back from trials since anything changed.
    unchanged: u8,
    group: Group,
}

/// What was seen of one field.
#[derive(Clone, Copy, Debug)]
struct Use {
    /// The switch with which the count began, in which the field left, or, on trial, of the last touch.
    at: u32,
    /// Touches since, or on trial.
    count: u8,
    /// How often it came back soon after it had left: not 0 means bursts.
    back: u8,
    /// It has left, and was not touched since.
    away: bool,
    /// How often it came back with its first touch.
    given_back: u8,
}

impl Use {
    const NONE: Use = Use {
        at: 0,
        count: 0,
        back: 0,
        away: false,
        given_back: 0,
    };

    /// Begins to count.
    fn start(&mut self, now: u32) {
        self.at = now;
        self.count = 0;
    }

    /// Windows in which touches are counted.
    fn windows(&self) -> u32 {
        if self.back == 0 {
            1
        } else {
            u32::from(LONG)
        }
    }

    /// Touches in these with which it joins.
    fn enough(&self) -> u8 {
        match self.back {
            0 => 2,
            1 => LONG + 1,
            _ => LONG + LONG / 2,
        }
    }
}

/// Most that is made of coming back.
const BACK: u8 = 2;
/// The same for costly fields, whose window it doubles.
const GROUP_BACK: u8 = 3;

/// The costly fields.
#[derive(Debug)]
struct Group {
    all: Set,
    /// Those that pay if costly fields do.
    aside: Set,
    is_in: bool,
    /// They were put out to see whether they come back.
    on_trial: bool,
    /// When they left, and how often they came back soon after, as for one field.
    left: u32,
    back: u8,
    touches: u16,
    /// Switches until the window ends, or the next trial.
    wait: u16,
    /// Switches between the last trial and the next.
    interval: u16,
}

impl Learner {
    /// Starts with nothing learned.
    pub const fn new(config: Config) -> Self {
        Self {
            config,
            learned: Set::EMPTY,
            barred: Set::EMPTY,
            given: Set::EMPTY,
            awake: false,
            // More than a window after 0, in which nothing was seen.
            now: 1 << 16,
            uses: [Use::NONE; FIELDS],
            trial: Set::EMPTY,
            tried: 0,
            failed: 0,
            prolonged: false,
            spent: 0,
            spent_since: 0,
            proven: Set::EMPTY,
            kept: Set::EMPTY,
            trial_size: TRIAL_SIZE,
            last_trial: 0,
            wait: config.trial(),
            unchanged: 0,
            group: Group {
                all: Set::EMPTY,
                aside: Set::EMPTY,
                is_in: false,
                on_trial: false,
                left: 0,
                back: 0,
                touches: 0,
                wait: config.window,
                interval: config.trial(),
            },
        }
    }

    /// Starts with `fields` learned, which somebody else has chosen; none of them has been proven yet.
    pub const fn with(config: Config, fields: Set) -> Self {
        let mut learner = Self::new(config);
        learner.learned = fields;
        learner.given = fields;
        learner
    }

    /// The fields to shadow now.
    pub fn learned(&self) -> &Set {
        &self.learned
    }

    /// Fields that are not shadowed just now, to see whether they are still in use.
    pub fn on_trial(&self) -> Set {
        if self.group.on_trial {
            self.trial.or(&self.group.aside)
        } else {
            self.trial
        }
    }

    /// Whether nothing was ever touched.
    pub fn is_idle(&self) -> bool {
        !self.awake
    }

    /// Sets other rules. `true` if the learned fields have changed.
    pub fn configure(&mut self, config: Config) -> bool {
        let before = self.learned;
        if self.config.window != config.window {
            self.wait = self.wait.min(config.trial());
            self.group.wait = self.group.wait.min(config.window);
            self.group.interval = config.trial();
        }
        self.config = config;
        let out = config.forbidden;
        self.learned = self.learned.without(&out);
        self.trial = self.trial.without(&out).without(&config.pinned);
        self.group.aside = self.group.aside.without(&out).without(&config.pinned);
        self.learned = self.learned.or(&self.pinned());
        if self.room() < 0 {
            self.trial = Set::EMPTY;
            self.group.aside = Set::EMPTY;
        }
        while self.room() < 0 {
            let Some(last) = self.learned.without(&config.pinned).last() else {
                break;
            };
            self.learned.remove(last);
        }
        self.learned != before
    }

    fn pinned(&self) -> Set {
        let never = self.barred.or(&self.config.forbidden);
        self.config.pinned.without(&never)
    }

    /// How many more fields may join; those that may come back have their places.
    fn room(&self) -> isize {
        let used = self.learned.or(&self.trial).or(&self.group.aside).len();
        isize::from(self.config.budget) - used as isize
    }

    /// L1's access to `field`, which may be shadowed, has cost an exit. `true` if the field has
    /// just joined, perhaps with others.
    pub fn touched(&mut self, field: u8, costly: bool) -> bool {
        self.touched_of(field, costly, &Set::EMPTY)
    }

    /// The same for one of a `family`, fields that make up one thing and of which any may be shadowed: all come back when one
    /// does, and all join when a second one is touched.
    pub fn touched_of(&mut self, field: u8, costly: bool, family: &Set) -> bool {
        if self.learned.has(field)
            || self.barred.has(field)
            || self.config.forbidden.has(field)
            || usize::from(field) >= FIELDS
        {
            return false;
        }
        self.awake = true;
        if !costly && self.is_given_back(field) {
            self.spent_since = self.spent_since.saturating_add(1);
            for other in family.iter() {
                self.is_given_back(other);
            }
            return true;
        }
        let second = !costly && self.is_second_of(field, family);
        let pays = self.pays(field) || second;
        let tried = self.trial.has(field);
        if costly {
            self.group.all.insert(field);
            self.group.touches = self.group.touches.saturating_add(1);
        }
        if tried && !pays {
            return self.group_joins();
        }
        let has_place = tried || self.group.aside.has(field);
        if costly && !self.group.is_in {
            if tried || (pays && (has_place || self.room() > 0)) {
                self.trial.remove(field);
                self.group.aside.insert(field);
            }
            return self.group_joins();
        }
        if !(has_place || pays && self.make_place(field)) {
            return false;
        }
        self.join(field);
        if !has_place {
            self.companions_join(field);
        }
        if second {
            for other in family.iter() {
                self.join_along(other);
            }
        }
        true
    }

    /// Whether another one of the `family` was touched within a window, and neither is on trial or known for bursts.
    fn is_second_of(&self, field: u8, family: &Set) -> bool {
        let window = u32::from(self.config.window);
        let plain = |field: u8| {
            let u = self.uses.get(usize::from(field));
            u.filter(|u| u.back == 0 && !self.trial.has(field))
        };
        let seen = |u: &Use| {
            let lately = u.count != 0 && self.now.wrapping_sub(u.at) <= window;
            lately && !u.away
        };
        let mut others = family.iter().filter(|&other| other != field);
        plain(field).is_some() && others.any(|other| plain(other).is_some_and(seen))
    }

    /// `field` has joined with its second touch: so do those whose first was in the same switch as its first, unless there are
    /// more than [`COMPANIONS`].
    fn companions_join(&mut self, field: u8) {
        let Some(&Use { at, back: 0, .. }) = self.uses.get(usize::from(field)) else {
            return;
        };
        if at == self.now {
            return;
        }
        let mut companions = Set::EMPTY;
        for (other, u) in (0..FIELDS as u8).zip(&self.uses) {
            if u.at == at && u.count != 0 && !self.kept.has(other) {
                companions.insert(other);
            }
        }
        if companions.len() > COMPANIONS {
            return;
        }
        for other in companions.iter() {
            let seen_once = self
                .uses
                .get(usize::from(other))
                .is_some_and(|u| u.count == 1 && !u.away);
            if seen_once {
                self.join_along(other);
            }
        }
    }

    /// `field` joins because another one does, if it may and is not known for bursts.
    fn join_along(&mut self, field: u8) {
        if self.is_out_of_question(field) || self.room() <= 0 {
            return;
        }
        let u = self.uses.get_mut(usize::from(field));
        if let Some(u) = u.filter(|u| u.back == 0) {
            u.away = false;
            self.learned.insert(field);
        }
    }

    /// Whether `field` is shadowed, may not be, is on trial, or is one of the costly.
    fn is_out_of_question(&self, field: u8) -> bool {
        let never = self.barred.has(field) || self.config.forbidden.has(field);
        let known = self.learned.has(field) || self.trial.has(field);
        never || known || self.group.all.has(field)
    }

    /// Whether `field` was there to begin with, had left, and now is back for this touch.
    fn is_given_back(&mut self, field: u8) -> bool {
        let never = self.barred.has(field) || self.config.forbidden.has(field);
        let here = self.learned.has(field) || self.trial.has(field);
        if !self.given.has(field) || never || here || self.room() <= 0 {
            return false;
        }
        let Some(u) = self.uses.get_mut(usize::from(field)) else {
            return false;
        };
        if !u.away {
            return false;
        }
        u.away = false;
        u.given_back = u.given_back.saturating_add(1);
        if u.given_back >= GIVEN {
            self.given.remove(field);
        }
        self.learned.insert(field);
        self.proven.insert(field);
        self.kept.insert(field);
        true
    }

    /// Whether there is, or now is, a place for `field`.
    fn make_place(&mut self, field: u8) -> bool {
        if self.room() > 0 {
            return true;
        }
        match self.learned.without(&self.config.pinned).last() {
            Some(last) if last > field => {
                self.learned.remove(last);
                self.room() > 0
            }
            _ => false,
        }
    }

    /// Notes the touch. Whether the field is touched often enough.
    fn pays(&mut self, field: u8) -> bool {
        let Some(u) = self.uses.get_mut(usize::from(field)) else {
            return false;
        };
        let since = self.now.wrapping_sub(u.at);
        let window = u32::from(self.config.window);
        if self.trial.has(field) {
            self.spent = self.spent.saturating_add(1);
            if since > window {
                u.back = u.back.max(1);
            }
            u.at = self.now;
            u.count = u.count.saturating_add(1);
            let proven = u.back == 0 && (self.config.eager || self.proven.has(field));
            return proven || u.count >= LONG;
        }
        if since > window * u32::from(GROUP_TRIAL) {
            u.back = 0;
        } else if u.away {
            u.back = (u.back + 1).min(BACK);
        }
        if u.away || since > window * u.windows() {
            u.start(self.now);
        }
        u.away = false;
        u.count = u.count.saturating_add(1);
        u.count >= u.enough()
    }

    fn join(&mut self, field: u8) {
        self.learned.insert(field);
        if self.trial.has(field) {
            self.trial.remove(field);
            self.kept.insert(field);
            self.proven.insert(field);
            if self.trial.is_empty() {
                self.trial_ends();
            }
        } else if self.group.aside.has(field) {
            self.group.aside.remove(field);
        } else {
            // Other habits than before.
            self.unchanged = 0;
            if self
                .uses
                .get(usize::from(field))
                .is_some_and(|u| u.back == 0)
            {
                self.proven = Set::EMPTY;
            } else {
                self.proven.insert(field);
            }
            if self.trial.is_empty() {
                self.wait = self.wait.min(self.config.trial());
            }
        }
    }

    /// Lets the costly fields in if they are touched often enough.
    fn group_joins(&mut self) -> bool {
        let group = &mut self.group;
        if group.is_in || group.touches < self.config.burst() << group.back.min(2) {
            return false;
        }
        let most = self.config.window.saturating_mul(GROUP_TRIAL);
        if group.on_trial {
            group.interval = group.interval.saturating_mul(2).min(most);
        } else {
            let soon = self.now.wrapping_sub(group.left) <= u32::from(most);
            group.back = if soon {
                (group.back + 1).min(GROUP_BACK)
            } else {
                0
            };
            group.interval = self.config.trial();
        }
        group.is_in = true;
        group.on_trial = false;
        group.wait = group.interval;
        let joins = !group.aside.is_empty();
        self.learned = self.learned.or(&group.aside);
        group.aside = Set::EMPTY;
        joins
    }

    /// L1 has entered its guest and come back. `true` if fields have just left, for a trial.
    #[inline]
    pub fn switched(&mut self) -> bool {
        self.now = self.now.wrapping_add(1);
        if self.wait > 1 && self.group.wait > 1 {
            self.wait -= 1;
            self.group.wait -= 1;
            return false;
        }
        self.switched_with_more()
    }

    /// As `switched`, where a trial or a window may end.
    #[inline(never)]
    fn switched_with_more(&mut self) -> bool {
        let group = self.switched_group();
        self.wait = self.wait.saturating_sub(1);
        if self.wait != 0 {
            return group;
        }
        if !self.trial.is_empty() {
            self.out_of_use();
            if self.wait != 0 {
                return group;
            }
        }
        if self.group.on_trial {
            // Else the turn of those that are out now would be passed over.
            self.wait = 1;
            return group;
        }
        self.start_trial() || group
    }

    /// The first window of a trial is over, or the others: fields that were not touched enough stay out.
    fn out_of_use(&mut self) {
        let (now, prolonged) = (self.now, self.prolonged);
        let trial = self.trial;
        for field in trial.iter() {
            if let Some(u) = self.uses.get_mut(usize::from(field)) {
                if prolonged || u.count == 0 && u.back == 0 {
                    u.start(now);
                    u.away = true;
                    self.trial.remove(field);
                    self.failed = self.failed.saturating_add(1);
                }
            }
        }
        if self.trial.is_empty() {
            self.trial_ends();
        } else {
            self.prolonged = true;
            self.wait = self.config.window.saturating_mul(u16::from(LONG) - 1);
        }
    }

    fn trial_ends(&mut self) {
        let pause = self.spent.saturating_mul(2);
        self.spent_since = self.spent_since.saturating_add(self.spent);
        if self.failed == 0 {
            self.unchanged = self.unchanged.saturating_add(self.tried);
            self.trial_size = TRIAL_SIZE;
            self.wait = if usize::from(self.unchanged) < self.learned.len() {
                self.config.trial().max(pause)
            } else {
                self.long_pause()
            };
            return;
        }
        self.unchanged = 0;
        self.wait = pause;
        if self.failed >= self.tried.div_ceil(2) {
            // Those that have just come back are not asked at once again.
            self.proven = self.kept;
            self.trial_size = (self.trial_size * 2).min(LARGE_TRIAL);
        }
        let left = self.learned.without(&self.config.pinned);
        if left.without(&self.kept).is_empty() {
            self.trial_size = TRIAL_SIZE;
            self.wait = self.long_pause();
        }
    }

    /// Switches to the next trial where all that is left is in use.
    fn long_pause(&mut self) -> u16 {
        self.kept = Set::EMPTY;
        let window = self.config.window;
        let most = window.saturating_mul(GROUP_TRIAL);
        let spent = if self.config.eager {
            self.spent_since
        } else {
            self.spent
        };
        self.spent_since = 0;
        let pause = spent.saturating_mul(2 * window);
        let pause = pause.clamp(window.saturating_mul(TRIAL), most);
        pause.saturating_add(self.jitter())
    }

    /// Less than a window, another each time. A habit whose period is some windows long would else have all trials of a field fall into the
    /// same part of it, and one that is touched there alone would stay for ever.
    fn jitter(&self) -> u16 {
        // Mixed well: the numbers follow on one another in steps of some multiple of that period.
        let hash = (self.now ^ self.now >> 15).wrapping_mul(0x7feb_352d);
        let hash = (hash >> 15 ^ hash) as u16;
        hash.checked_rem(self.config.window).unwrap_or(0)
    }

    fn start_trial(&mut self) -> bool {
        let all = self.learned.without(&self.config.pinned);
        let mut from = all.without(&self.proven);
        let mut size = self.trial_size.max(FIRST_SIZE);
        if from.is_empty() {
            let rest = all.without(&self.kept);
            from = if rest.is_empty() { all } else { rest };
            size = self.trial_size;
        }
        self.tried = 0;
        self.failed = 0;
        self.prolonged = false;
        self.spent = 0;
        while self.tried < size {
            let Some(field) = from.after(self.last_trial) else {
                break;
            };
            from.remove(field);
            self.learned.remove(field);
            self.last_trial = field;
            self.trial.insert(field);
            self.tried += 1;
            if let Some(u) = self.uses.get_mut(usize::from(field)) {
                u.start(self.now);
                u.away = false;
            }
        }
        let any = self.tried != 0;
        self.wait = if any {
            self.config.window
        } else {
            self.config.trial()
        };
        any
    }

    /// Counts the costly fields' windows. `true` if they have just left.
    fn switched_group(&mut self) -> bool {
        let group = &mut self.group;
        group.wait = group.wait.saturating_sub(1);
        if group.wait != 0 {
            return false;
        }
        group.wait = self.config.window << group.back;
        group.touches = 0;
        if !group.is_in {
            // A window without enough of them.
            if group.on_trial {
                group.left = self.now;
            }
            group.aside = Set::EMPTY;
            group.on_trial = false;
            return false;
        }
        let leave = self.learned.and(&group.all).without(&self.config.pinned);
        group.is_in = false;
        group.on_trial = true;
        group.aside = leave;
        self.learned = self.learned.without(&leave);
        !leave.is_empty()
    }

    /// `field` cannot be shadowed on this processor: it leaves and never comes back.
    pub fn bar(&mut self, field: u8) {
        self.learned.remove(field);
        self.trial.remove(field);
        self.group.aside.remove(field);
        self.barred.insert(field);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: usize = Config::new(0).window as usize;
    const LONG: usize = WINDOW * TRIAL as usize;

    fn learner(budget: u8) -> Learner {
        Learner::new(Config::new(budget))
    }

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

    fn fields_of(learner: &Learner) -> Vec<u8> {
        learner.learned().or(&learner.on_trial()).iter().collect()
    }

    #[test]
    fn learns_what_is_touched_again_and_again() {
        let mut learner = learner(64);
        let fields: Vec<u8> = (10..50).collect();
        assert_eq!(run(&mut learner, &fields, 4), 40 * 2);
        // Later on one trial in so many switches costs an exit for each field.
        run(&mut learner, &fields, 1024);
        assert!(run(&mut learner, &fields, 1024) <= (1024 / LONG + 1) * usize::from(TRIAL_SIZE));
    }

    #[test]
    fn what_is_touched_together_joins_together() {
        let mut learner = learner(64);
        let fields: Vec<u8> = (10..22).collect();
        assert_eq!(run(&mut learner, &fields, 4), 12 + 1);
        assert_eq!(fields_of(&learner), fields);
        // Not with one whose first touch was in another switch.
        learner.touched(1, false);
        learner.switched();
        learner.touched(2, false);
        learner.touched(1, false);
        assert!(learner.learned().has(1) && !learner.learned().has(2));
    }

    #[test]
    fn two_of_a_family_bring_the_others() {
        let family = Set::EMPTY.with(4).with(5).with(6);
        let mut learner = learner(64);
        assert!(!learner.touched_of(4, false, &family));
        assert!(learner.touched_of(6, false, &family));
        assert_eq!(fields_of(&learner), [4, 5, 6]);
        // One that was touched long ago does not count, nor does one that is known for bursts.
        let family = Set::EMPTY.with(7).with(8);
        assert!(!learner.touched_of(7, false, &family));
        run(&mut learner, &[4, 5, 6], WINDOW + 1);
        assert!(!learner.touched_of(8, false, &family));
    }

    #[test]
    fn a_family_comes_back_together() {
        let mut learner = chosen(40);
        run(&mut learner, &[], 4 * LONG);
        let family = Set::EMPTY.with(7).with(8).with(50);
        assert!(learner.touched_of(7, false, &family));
        assert_eq!(fields_of(&learner), [7, 8]);
    }

    #[test]
    fn a_vmcs_that_is_set_up_is_not_learned() {
        let mut learner = learner(96);
        let fields: Vec<u8> = (10..90).collect();
        run(&mut learner, &fields, 1);
        run(&mut learner, &[20, 30], 3);
        assert_eq!(fields_of(&learner), [20, 30]);
    }

    #[test]
    fn a_loop_without_switches_is_learned() {
        let mut learner = learner(64);
        let exits = (0..100).filter(|_| {
            let exit = !learner.learned().has(5);
            learner.touched(5, false);
            exit
        });
        assert_eq!(exits.count(), 2);
    }

    #[test]
    fn forgets_what_is_no_longer_touched() {
        let mut learner = learner(64);
        run(&mut learner, &[1, 2, 3], 10);
        run(&mut learner, &[3], 3 * LONG);
        assert_eq!(fields_of(&learner), [3]);
    }

    #[test]
    fn of_a_set_to_begin_with_what_is_in_use_stays() {
        let mut all = Set::EMPTY;
        (0..40).for_each(|field| all.insert(field));
        let mut learner = Learner::with(Config::new(u8::MAX), all);
        assert_eq!(run(&mut learner, &[3, 30, 39], 2 * WINDOW - 1), 0);
        let exits = run(&mut learner, &[3, 30, 39], 3 * LONG);
        assert_eq!(fields_of(&learner), [3, 30, 39]);
        assert!(exits <= 3 * LONG / 16, "{exits}");
    }

    /// `count` fields that somebody has chosen, by the rules for such.
    fn chosen(count: u8) -> Learner {
        let mut all = Set::EMPTY;
        (0..count).for_each(|field| all.insert(field));
        let config = Config {
            eager: true,
            ..Config::new(u8::MAX)
        };
        Learner::with(config, all)
    }

    #[test]
    fn those_that_have_just_come_back_are_left_alone() {
        // More than a first trial takes; those in use cost an exit each, and then not for a long while.
        let mut learner = chosen(FIRST_SIZE + 1);
        assert_eq!(run(&mut learner, &[1, 2, 3, 4, 5], 4 * WINDOW + LONG), 5);
        assert_eq!(fields_of(&learner), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn of_a_set_to_begin_with_one_that_left_comes_back_at_once() {
        let mut learner = chosen(40);
        for _ in 0..GIVEN {
            run(&mut learner, &[], 4 * LONG);
            assert!(learner.learned().is_empty());
            assert!(learner.touched(7, false));
            assert_eq!(fields_of(&learner), [7]);
        }
        run(&mut learner, &[], 4 * LONG);
        assert!(!learner.touched(7, false));
        assert!(!learner.touched(41, false));
    }

    #[test]
    fn eager_trials_cost_less() {
        let mut all = Set::EMPTY;
        (0..30).for_each(|field| all.insert(field));
        let exits = |eager| {
            let config = Config {
                eager,
                ..Config::new(u8::MAX)
            };
            let mut learner = Learner::with(config, all);
            let used: Vec<u8> = (0..20).collect();
            // The first trial, and what follows from those who left.
            let exits = run(&mut learner, &used, 2 * WINDOW + LONG);
            assert_eq!(fields_of(&learner), used);
            exits
        };
        // One of each field in its first trial, and some in later ones.
        assert!((20..40).contains(&exits(true)));
        assert!(exits(false) >= 20 * usize::from(super::LONG));
    }

    #[test]
    fn a_new_phase_is_followed_soon() {
        let mut learner = learner(96);
        run(&mut learner, &(0..90).collect::<Vec<_>>(), 1000);
        assert_eq!(fields_of(&learner).len(), 90);
        let log2 = 7;
        run(&mut learner, &[100], LONG + WINDOW * (1 + log2));
        assert_eq!(fields_of(&learner), [100]);
    }

    #[test]
    fn a_phase_that_keeps_half_is_followed_within_a_trial_of_each() {
        let mut learner = learner(96);
        run(&mut learner, &(0..90).collect::<Vec<_>>(), 1000);
        let kept: Vec<u8> = (0..90).step_by(2).collect();
        run(
            &mut learner,
            &kept,
            90 / usize::from(TRIAL_SIZE) * (LONG + WINDOW),
        );
        assert_eq!(fields_of(&learner), kept);
    }

    #[test]
    fn costly_fields_join_when_they_pay_together() {
        let mut learner = learner(96);
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
        assert_eq!(fields_of(&learner).len(), 40);
    }

    #[test]
    fn bursts_do_not_flap() {
        // Five touches at once in every eightieth switch are one in sixteen and worth it.
        let mut learner = learner(64);
        let live = |learner: &mut Learner, rounds| {
            let mut exits = 0;
            for _ in 0..rounds {
                for _ in 0..5 {
                    exits += usize::from(!learner.learned().has(7));
                    learner.touched(7, false);
                    learner.switched();
                }
                (5..80).for_each(|_| {
                    learner.switched();
                });
            }
            exits
        };
        live(&mut learner, 100);
        // A trial now and then takes as many as keep the field in.
        assert!(live(&mut learner, 100) <= 4 * 100 * 80 / LONG);
        assert_eq!(fields_of(&learner), [7]);
    }

    #[test]
    fn rare_touches_are_not_worth_it() {
        let mut learner = learner(64);
        for _ in 0..100 {
            learner.touched(7, false);
            (0..=WINDOW).for_each(|_| {
                learner.switched();
            });
        }
        assert!(learner.learned().is_empty());
    }

    #[test]
    fn the_budget_holds_for_the_lowest_numbers() {
        let mut learner = learner(5);
        let fields: Vec<u8> = (0..100).rev().collect();
        run(&mut learner, &fields, 50);
        assert_eq!(fields_of(&learner), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_pinned_field_is_always_there_and_a_forbidden_one_never() {
        let mut learner = learner(4);
        run(&mut learner, &[1, 2, 3], 10);
        let mut config = Config::new(4);
        config.pinned.insert(9);
        config.forbidden.insert(2);
        assert!(learner.configure(config));
        run(&mut learner, &[1, 2], 4 * LONG);
        assert!(learner.learned().has(9) && !learner.learned().has(2));
        assert_eq!(fields_of(&learner), [1, 9]);
        learner.configure(Config::new(4));
        run(&mut learner, &[1, 2], 4 * LONG);
        assert_eq!(fields_of(&learner), [1, 2]);
    }
}
