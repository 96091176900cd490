//! Which units of the model (embedding, blocks, head) each pipeline stage holds.
//!
//! Invariant: the ranges tile the units in order; where a rank has one stage, no other cut has a smaller most costly one.

use std::ops::Range;

use anyhow::{Result, ensure};

use crate::plan::catalog::{Kind, Unit};
use crate::plan::schedule::Placement;

/// Cuts the units of a model. Positions stay with the embedding and the head with its norm, as both pairs are one layer of the model.
///
/// Where there are no more stages than blocks, every stage has a block, but the last, which may have the head alone: a stage
/// without one would make another stage longer, and the cut less even.
pub fn of_units(units: &[Unit], costs: &[f64], placement: &Placement) -> Result<Vec<Range<usize>>> {
    assert_eq!(units.len(), costs.len(), "units and their costs");
    let joins = |unit: &Unit| matches!(unit.kind, Kind::Positions | Kind::Head { .. });
    let mut starts: Vec<usize> = (0..units.len()).filter(|&unit| !joins(&units[unit])).collect();
    starts.push(units.len());
    let layers: Vec<f64> = starts.windows(2).map(|pair| costs[pair[0]..pair[1]].iter().sum()).collect();
    let ranges = even_ranks(&layers, partition(&layers, placement.stages())?, placement);
    Ok(ranges.into_iter().map(|range| starts[range.start]..starts[range.end]).collect())
}

/// A rank with several stages is as slow, and as full, as all of them together: moves layers over the cuts, one at a time, as long as
/// that makes the most loaded rank lighter, or leaves it and makes ranks or stages more even.
fn even_ranks(costs: &[f64], mut ranges: Vec<Range<usize>>, placement: &Placement) -> Vec<Range<usize>> {
    let squares = |loads: &[f64]| loads.iter().map(|load| load * load).sum::<f64>();
    let weigh = |ranges: &[Range<usize>]| {
        let stages: Vec<f64> = ranges.iter().map(|range| costs[range.clone()].iter().sum()).collect();
        let mut ranks = vec![0.0; placement.ranks];
        stages.iter().enumerate().for_each(|(stage, cost)| ranks[placement.place(stage).0] += cost);
        [ranks.iter().copied().fold(0.0, f64::max), squares(&ranks), squares(&stages)]
    };
    let mut best = weigh(&ranges);
    loop {
        let before = best;
        for cut in 1..ranges.len() {
            for to in [ranges[cut].start + 1, ranges[cut].start.wrapping_sub(1)] {
                // The first layer is the embedding, with which a block has to stay.
                let least = ranges[cut - 1].start + if cut == 1 { 2 } else { 1 };
                if !(least..ranges[cut].end).contains(&to) {
                    continue;
                }
                let mut moved = ranges.clone();
                (moved[cut - 1].end, moved[cut].start) = (to, to);
                let weight = weigh(&moved);
                if weight < best {
                    (ranges, best) = (moved, weight);
                }
            }
        }
        if best == before {
            return ranges;
        }
    }
}

/// Cuts a chain of units into `stages` consecutive ranges so that the most costly stage costs as little as any cut allows; among such
/// cuts, one whose stages are as even as can be (least sum of squares), and of these the one whose later stages are longer:
/// later ranks keep fewer activations alive in most schedules.
///
/// Every stage has a unit where there are enough. Where there are not, each unit has a stage of its own, the last unit the last
/// stage, and the stages before that hold nothing and pass on what they get.
///
/// `costs` may be in any unit, seconds or FLOPs or layers. Takes stages × units² steps.
pub fn partition(costs: &[f64], stages: usize) -> Result<Vec<Range<usize>>> {
    ensure!(stages > 0 && !costs.is_empty(), "{} units cannot be cut into {stages} stages", costs.len());
    ensure!(costs.iter().all(|cost| cost.is_finite() && *cost >= 0.0), "costs of units must be finite and not negative: {costs:?}");
    let units = costs.len();
    if units < stages {
        let first = |stage: usize| if stage == stages { units } else { stage.min(units - 1) };
        return Ok((0..stages).map(|stage| first(stage)..first(stage + 1)).collect());
    }
    let largest = best_cut(costs, stages, |so_far, cost| so_far.max(cost)).0;
    let even = |so_far, cost| if cost <= largest { so_far + cost * cost } else { f64::INFINITY };
    Ok(best_cut(costs, stages, even).1)
}

/// The cut into non-empty ranges for which the stages' costs, put together by `join` from 0 on, give the least; and that least.
fn best_cut(costs: &[f64], stages: usize, join: impl Fn(f64, f64) -> f64) -> (f64, Vec<Range<usize>>) {
    let units = costs.len();
    // least[end]: of the first `stage` stages over the first `end` units; cuts[stage - 1][end]: where the last of them then starts.
    let mut least = vec![f64::INFINITY; units + 1];
    least[0] = 0.0;
    let mut cuts = Vec::with_capacity(stages);
    for stage in 1..=stages {
        let mut next = vec![f64::INFINITY; units + 1];
        let mut cut = vec![stage - 1; units + 1];
        for end in stage..=units - (stages - stage) {
            let mut cost = 0.0;
            for start in (stage - 1..end).rev() {
                cost += costs[start];
                let joined = join(least[start], cost);
                if joined <= next[end] {
                    (next[end], cut[end]) = (joined, start);
                }
            }
        }
        least = next;
        cuts.push(cut);
    }
    let mut end = units;
    let mut ranges: Vec<Range<usize>> = Vec::with_capacity(stages);
    for cut in cuts.iter().rev() {
        ranges.push(cut[end]..end);
        end = cut[end];
    }
    assert_eq!(end, 0, "the ranges must begin with the first unit");
    ranges.reverse();
    (least[units], ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::schedule::Route;
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    /// What a range costs, summed as `best_cut` sums, from the back.
    fn cost(units: &[f64]) -> f64 {
        units.iter().rev().fold(0.0, |sum, cost| sum + cost)
    }

    /// The least largest cost over all cuts into non-empty ranges.
    fn brute_force(costs: &[f64], stages: usize) -> f64 {
        if stages == 1 {
            return cost(costs);
        }
        let with_first = |first: usize| cost(&costs[..first]).max(brute_force(&costs[first..], stages - 1));
        (1..=costs.len() - (stages - 1)).map(with_first).fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn no_cut_is_better(costs in proptest::collection::vec(0.0f64..10.0, 1..11), stages in 1usize..12) {
            let ranges = partition(&costs, stages).expect("the arguments are good");
            prop_assert_eq!(ranges.len(), stages);
            prop_assert_eq!((ranges[0].start, ranges[stages - 1].end), (0, costs.len()));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{:?}", ranges);
            if stages <= costs.len() {
                prop_assert!(ranges.iter().all(|range| !range.is_empty()), "{:?}", ranges);
                let largest = ranges.iter().map(|range| cost(&costs[range.clone()])).fold(0.0, f64::max);
                prop_assert_eq!(largest, brute_force(&costs, stages));
            } else {
                prop_assert!(ranges.iter().all(|range| range.len() <= 1) && ranges[stages - 1].len() == 1, "{:?}", ranges);
            }
        }
    }

    #[test]
    fn equal_units_are_spread_evenly() {
        for (units, stages) in (1..40).flat_map(|units| (1..=units).map(move |stages| (units, stages))) {
            let ranges = partition(&vec![1.0; units], stages).expect("the arguments are good");
            let lengths: Vec<usize> = ranges.iter().map(|range| range.len()).collect();
            let even: Vec<usize> = (0..stages).map(|stage| units / stages + usize::from(stage >= stages - units % stages)).collect();
            assert_eq!(lengths, even);
        }
    }

    #[test]
    fn a_heavy_head_gets_few_blocks_beside_it() {
        let costs = [0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0];
        assert_eq!(partition(&costs, 4).expect("the arguments are good"), [0..3, 3..5, 5..8, 8..10]);
    }

    #[test]
    fn ranks_of_a_vee_share_evenly_what_their_stages_cannot() {
        let costs = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5];
        let placement = Placement { ranks: 2, chunks: 2, route: Route::Vee };
        let cut = partition(&costs, 4).expect("the arguments are good");
        assert_eq!(cut, [0..2, 2..4, 4..6, 6..8], "ranks 0 and 1 have 2.5 and 4");
        assert_eq!(even_ranks(&costs, cut, &placement), [0..3, 3..4, 4..6, 6..8], "3.5 and 3");
    }

    #[test]
    fn bad_costs_are_refused() {
        assert!(partition(&[], 2).is_err() && partition(&[1.0], 0).is_err() && partition(&[f64::NAN], 1).is_err());
        assert_eq!(partition(&[1.0, 1.0], 4).expect("two units are enough"), [0..1, 1..1, 1..1, 1..2]);
    }
}
