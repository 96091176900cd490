//! Schedules with one chunk for each rank: GPipe, 1F1B and the zero-bubble schedule ZB-H1.
//!
//! Invariant: a list holds compute actions only, each micro-batch once forward and once backward.
//!
//! With f and b the seconds of a forward and a backward pass (b = i + w where it is split into input and weight gradients), p ranks
//! and m micro-batches, all stages alike:
//!
//! | schedule | idle seconds of a rank | live micro-batches of rank r |
//! |---|---|---|
//! | gpipe | (p - 1)(f + b) | m |
//! | 1F1B | (p - 1)(f + b) | min(p - r, m) |
//! | ZB-H1 | (p - 1)(f + i - w) | min(p, m) |

use super::{Action, backward, backward_input, backward_weight, forward};

/// All forward, then all backward (Huang and others, 2019). Backward goes in order of micro-batches, not in reverse: the order of the sums.
pub fn gpipe(ranks: usize, micros: usize) -> Vec<Vec<Action>> {
    let list: Vec<_> = (0..micros).map(|i| forward(0, i)).chain((0..micros).map(|i| backward(0, i))).collect();
    vec![list; ranks]
}

/// As many forward passes as there are ranks below, then one forward and one backward in turn (Narayanan and others, 2021).
pub fn one_forward_one_backward(ranks: usize, micros: usize) -> Vec<Vec<Action>> {
    let list = |rank: usize| {
        let warmup = (ranks - 1 - rank).min(micros);
        let mut list: Vec<_> = (0..warmup).map(|i| forward(0, i)).collect();
        for i in 0..micros - warmup {
            list.push(forward(0, warmup + i));
            list.push(backward(0, i));
        }
        list.extend((micros - warmup..micros).map(|i| backward(0, i)));
        list
    };
    (0..ranks).map(list).collect()
}

/// ZB-H1 (Qi and others, 2023): 1F1B with the backward pass split. Rank r runs the weight gradients r micro-batches late, which takes
/// them off the path of the gradients through the ranks and fills the idle end of the step with them, in the memory that 1F1B needs.
pub fn zero_bubble(ranks: usize, micros: usize) -> Vec<Vec<Action>> {
    let list = |rank: usize| {
        let warmup = (ranks - 1 - rank).min(micros);
        let mut list: Vec<_> = (0..warmup).map(|i| forward(0, i)).collect();
        let mut weights = 0;
        for i in 0..micros {
            if warmup + i < micros {
                list.push(forward(0, warmup + i));
            }
            list.push(backward_input(0, i));
            if i >= rank {
                list.push(backward_weight(0, weights));
                weights += 1;
            }
        }
        list.extend((weights..micros).map(|i| backward_weight(0, i)));
        list
    };
    (0..ranks).map(list).collect()
}
