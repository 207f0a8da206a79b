// SPDX-License-Identifier: GPL-2.0-or-later
//! Statistics that an interrupt cannot spoil.
//!
//! The cost of an operation is a fixed number of instructions, except when something asynchronous
//! falls into it. So the minimum and the median mean something and the mean does not, and a sample
//! whose count of exits differs from most is not a slow operation but another event. An operation of
//! dozens of exits may have a few less without being another: the module under test takes one more
//! or less while it learns. Where no count is that of half of the samples, the lowest quarter is what is undisturbed.

/// One measured operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Difference of the TSC: retired instructions of all levels on the laboratory's emulator, cycles on
    /// a real machine.
    pub ticks: u64,
    /// VM exits into L0 meanwhile; 0 where they cannot be counted.
    pub exits: u64,
}

/// What is reported of a set of samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Fewest ticks of an undisturbed sample.
    pub min: u64,
    /// Median of the undisturbed samples; the upper one of the two in the middle.
    pub median: u64,
    /// Most ticks of an undisturbed sample.
    pub max: u64,
    /// Undisturbed samples.
    pub n: u32,
    /// Samples set aside because they had more exits than usual, or far fewer.
    pub disturbed: u32,
    /// Most ticks of any sample.
    pub worst: u64,
    /// Exits that an operation usually had.
    pub exits: u64,
}

/// The value that at least half of a sorted slice have, or that of the lowest quarter.
fn usual(sorted: &[Sample]) -> u64 {
    let mut best = (0, 0);
    for run in sorted.chunk_by(|a, b| a.exits == b.exits) {
        if run.len() > best.0 {
            best = (run.len(), run[0].exits);
        }
    }
    if best.0 * 2 >= sorted.len() {
        return best.1;
    }
    sorted
        .get(sorted.len() / 4)
        .map_or(0, |sample| sample.exits)
}

/// Fewest exits of a sample that is not disturbed, where `usual` is what most have.
fn fewest(usual: u64) -> u64 {
    usual - usual / 16
}

/// Summarises `samples`, from each of which `overhead` ticks and exits are the bracket's own. Sorts in
/// place, so that it needs no memory. An empty slice gives all zeros.
pub fn summarize(samples: &mut [Sample], overhead: Sample) -> Summary {
    samples.sort_unstable_by_key(|sample| sample.exits);
    let usual = usual(samples);
    let disturbed = |sample: &Sample| !(fewest(usual)..=usual).contains(&sample.exits);
    samples.sort_unstable_by_key(|sample| (disturbed(sample), sample.ticks));
    let n = samples.partition_point(|sample| !disturbed(sample));
    let ticks = |sample: Option<&Sample>| {
        sample.map_or(0, |sample| sample.ticks.saturating_sub(overhead.ticks))
    };
    Summary {
        min: ticks(samples.first()),
        median: ticks(samples.get(n / 2)),
        max: ticks(samples[..n].last()),
        n: n as u32,
        disturbed: (samples.len() - n) as u32,
        worst: ticks(samples.iter().max_by_key(|sample| sample.ticks)),
        exits: usual.saturating_sub(overhead.exits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[(u64, u64)]) -> std::vec::Vec<Sample> {
        values
            .iter()
            .map(|&(ticks, exits)| Sample { ticks, exits })
            .collect()
    }

    #[test]
    fn an_interrupted_sample_is_set_aside() {
        let mut set = samples(&[(105, 2), (103, 2), (9000, 3), (104, 2)]);
        let summary = summarize(&mut set, Sample { ticks: 3, exits: 0 });
        assert_eq!((summary.min, summary.median, summary.max), (100, 101, 102));
        assert_eq!((summary.n, summary.disturbed), (3, 1));
        assert_eq!((summary.worst, summary.exits), (8997, 2));
    }

    #[test]
    fn a_few_exits_less_of_many_count() {
        let mut set = samples(&[
            (1050, 32),
            (1030, 32),
            (1040, 32),
            (900, 30),
            (700, 29),
            (3000, 33),
        ]);
        let summary = summarize(&mut set, Sample::default());
        let range = (summary.min, summary.median, summary.max);
        assert_eq!(range, (900, 1040, 1050));
        assert_eq!((summary.n, summary.disturbed, summary.exits), (4, 2, 32));
    }

    #[test]
    fn where_counts_are_scattered_the_lowest_quarter_counts() {
        let mut set = samples(&[
            (748, 141),
            (750, 142),
            (773, 146),
            (900, 160),
            (901, 160),
            (902, 170),
            (903, 171),
            (904, 180),
        ]);
        let summary = summarize(&mut set, Sample::default());
        assert_eq!((summary.min, summary.exits), (748, 146));
        assert_eq!((summary.n, summary.disturbed), (3, 5));
    }

    #[test]
    fn nothing_gives_nothing() {
        assert_eq!(summarize(&mut [], Sample::default()), Summary::default());
    }
}
