//! Schedules with several chunks for each rank, each chunk running from the first rank to the last (`Route::Loop`).
//!
//! Invariant: a list holds compute actions only, each slot once forward and once backward.
//!
//! With v chunks a chunk takes 1/v of a rank's time, and so does the bubble: a rank idles (p - 1)(f + b) / v seconds where m is at
//! least p, f and b being the passes of all its chunks together.

use super::{Action, backward, forward, only_micros};

/// Interleaved 1F1B (Narayanan and others, 2021): groups of micro-batches go through all chunks, one group after the other. Groups
/// have p micro-batches, or somewhat more where m is no multiple of p: m / p groups as even as can be, of g at most, g < 2p. A group
/// smaller than p would leave the first rank waiting for the last in every chunk; only m < p has one, which is scheduled as
/// a group of p whose surplus is dropped.
///
/// Rank r has at most 2(p - 1 - r) + (v - 1)g + 1 live slots. With one chunk this is 1F1B with a longer warm-up.
pub fn interleaved(ranks: usize, micros: usize, chunks: usize) -> Vec<Vec<Action>> {
    let padded = micros.max(ranks);
    let groups = padded / ranks;
    let first_of = |group: usize| group * padded / groups;
    let order = |group: usize| {
        let members = first_of(group)..first_of(group + 1);
        (0..chunks).flat_map(move |chunk| members.clone().map(move |micro| (chunk, micro)))
    };
    let slots: Vec<(usize, usize)> = (0..groups).flat_map(order).collect();
    let forward = |&(chunk, micro): &(usize, usize)| forward(chunk, micro);
    let backward = |&(chunk, micro): &(usize, usize)| backward(chunks - 1 - chunk, micro);
    let list = |rank: usize| {
        let warmup = ((ranks - 1 - rank) * 2 + (chunks - 1) * padded.div_ceil(groups)).min(slots.len());
        let mut list: Vec<_> = slots[..warmup].iter().map(forward).collect();
        for (ahead, behind) in slots[warmup..].iter().zip(&slots) {
            list.push(forward(ahead));
            list.push(backward(behind));
        }
        list.extend(slots[slots.len() - warmup..].iter().map(backward));
        only_micros(list, micros)
    };
    (0..ranks).map(list).collect()
}

/// Breadth first (Lamy-Poirier, 2023): all micro-batches through a chunk before the next chunk, and back likewise. Keeps all v m slots
/// alive, but uses a chunk's weights and completes its gradients in one go: with ZeRO 3, one gather and one reduction for each chunk.
pub fn breadth_first(ranks: usize, micros: usize, chunks: usize) -> Vec<Vec<Action>> {
    let mut list = Vec::with_capacity(2 * micros * chunks);
    for chunk in 0..chunks {
        list.extend((0..micros).map(|i| forward(chunk, i)));
    }
    for chunk in (0..chunks).rev() {
        list.extend((0..micros).map(|i| backward(chunk, i)));
    }
    vec![list; ranks]
}
