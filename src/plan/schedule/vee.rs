//! Schedules with two chunks for each rank, the second running back (`Route::Vee`): a rank that waits for one chunk has work of the other.
//!
//! Invariant: a list holds compute actions only; each slot once forward, once for the input's gradient and once for the weights'.

use super::{Action, backward, backward_input, backward_weight, forward, only_micros};

/// The list of one rank while it is written: the next micro-batch of each pass and chunk, and the weight gradients put off.
#[derive(Default)]
struct Writer {
    list: Vec<Action>,
    forwards: [usize; 2],
    backwards: [usize; 2],
    put_off: std::collections::VecDeque<Action>,
}

impl Writer {
    fn forward(&mut self, chunk: usize) {
        self.list.push(forward(chunk, self.forwards[chunk]));
        self.forwards[chunk] += 1;
    }

    fn backward(&mut self, chunk: usize) {
        self.list.push(backward(chunk, self.backwards[chunk]));
        self.backwards[chunk] += 1;
    }

    /// The input's gradient now, the weights' later.
    fn backward_input(&mut self, chunk: usize) {
        self.list.push(backward_input(chunk, self.backwards[chunk]));
        self.put_off.push_back(backward_weight(chunk, self.backwards[chunk]));
        self.backwards[chunk] += 1;
    }

    /// The oldest weight gradient put off.
    fn weight(&mut self) {
        self.list.extend(self.put_off.pop_front());
    }
}

/// ZB-V (Qi and others, 2024): every backward pass is split, and with f = i = w no rank idles between its first and its last action:
/// a step takes 6m + p - 1 such units where m >= 2p - 1. At most 2p live slots, the memory of 1F1B.
pub fn zbv(ranks: usize, micros: usize) -> Vec<Vec<Action>> {
    let pattern = micros.max(2 * ranks - 1);
    let list = |rank: usize| {
        let mut w = Writer::default();
        for _ in 0..2 * (ranks - rank) - 1 {
            w.forward(0);
        }
        for _ in 0..rank {
            w.forward(1);
            w.forward(0);
        }
        for _ in 0..ranks - rank {
            w.forward(1);
            w.backward_input(1);
            w.weight();
        }
        while w.forwards[1] < pattern {
            if w.forwards[0] < pattern {
                w.forward(0);
            }
            w.backward_input(0);
            w.weight();
            w.forward(1);
            w.backward_input(1);
            w.weight();
        }
        for _ in 0..rank {
            w.backward_input(0);
            w.backward_input(1);
        }
        for _ in 0..ranks - rank {
            w.backward_input(0);
            w.weight();
        }
        while !w.put_off.is_empty() {
            w.weight();
        }
        only_micros(w.list, micros)
    };
    (0..ranks).map(list).collect()
}

/// DualPipeV (DeepSeek, 2025; the V half of DualPipe): whole backward passes in the middle, each beside a forward pass of the other chunk
/// whose transfers it can hide; split ones only where a rank would idle. With f = i = w a step takes 6m + p - 1 such units where m >= 2p. At most 2p + 1 live slots.
pub fn dualpipe_v(ranks: usize, micros: usize) -> Vec<Vec<Action>> {
    let pattern = micros.max(2 * ranks);
    let list = |rank: usize| {
        let below = ranks - 1 - rank;
        let mut w = Writer::default();
        for _ in 0..2 * below {
            w.forward(0);
        }
        for _ in 0..rank + 1 {
            w.forward(0);
            w.forward(1);
        }
        for _ in 0..below {
            w.backward_input(1);
            w.weight();
            w.forward(1);
        }
        for _ in 0..pattern - 2 * ranks + rank + 1 {
            w.forward(0);
            w.backward(1);
            w.forward(1);
            w.backward(0);
        }
        for _ in 0..below {
            w.backward(1);
            w.forward(1);
            w.backward(0);
        }
        // The second half of the last pairs is split: its weight gradients fill the way of the last gradients to rank 0.
        for k in 0..2 * (rank + 1) {
            let chunk = 1 - k % 2;
            if k <= rank { w.backward(chunk) } else { w.backward_input(chunk) }
        }
        for _ in 0..below {
            w.weight();
            w.backward_input(0);
        }
        while !w.put_off.is_empty() {
            w.weight();
        }
        only_micros(w.list, micros)
    };
    (0..ranks).map(list).collect()
}
