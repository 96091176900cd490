//! The definition of every operation, in f64 and as plainly as it can be said: what fast code is held to.
//!
//! Invariant: no code is shared with the operations themselves.

/// w x / sqrt(mean(x^2) + eps) of each row of w.len() elements.
pub fn rms(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let r = 1.0 / (mean(x.iter().map(|x| x * x)) + eps).sqrt();
        x.iter().zip(w).map(|(x, w)| w * x * r).collect::<Vec<f64>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

/// w (x - mean) / sqrt(variance + eps) + b of each row.
pub fn layer(x: &[f64], w: &[f64], b: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let m = mean(x.iter().copied());
        let r = 1.0 / (mean(x.iter().map(|x| (x - m) * (x - m))) + eps).sqrt();
        x.iter().zip(w).zip(b).map(|((x, w), b)| w * (x - m) * r + b).collect::<Vec<f64>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

/// silu(gate) up, of rows of f gates and f ups.
pub fn swiglu(gate_up: &[f64], f: usize) -> Vec<f64> {
    let row = |row: &[f64]| (0..f).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[f + i]).collect::<Vec<f64>>();
    gate_up.chunks(2 * f).flat_map(row).collect()
}

/// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
pub fn gelu(x: &[f64]) -> Vec<f64> {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    x.iter().map(|x| 0.5 * x * (1.0 + (root * (x + 0.044715 * x * x * x)).tanh())).collect()
}

/// The first `heads` heads of each row turned by the angles whose cosines and sines are rows of `table`.
pub fn rope(x: &[f64], width: usize, heads: usize, table: &[f64], head_dim: usize, positions: &[u32]) -> Vec<f64> {
    let mut y = x.to_vec();
    for (row, position) in positions.iter().enumerate() {
        let angles = &table[*position as usize * head_dim..][..head_dim];
        for head in 0..heads {
            for j in 0..head_dim / 2 {
                let (a, b) = (row * width + head * head_dim + j, row * width + head * head_dim + j + head_dim / 2);
                let (cosine, sine) = (angles[j], angles[j + head_dim / 2]);
                (y[a], y[b]) = (x[a] * cosine - x[b] * sine, x[b] * cosine + x[a] * sine);
            }
        }
    }
    y
}

/// The rows of `table` (c columns, of ids from `first` on) at `ids`; zeros for ids outside.
pub fn embedding(ids: &[u32], table: &[f64], c: usize, first: usize) -> Vec<f64> {
    let rows = first..first + table.len() / c;
    let row = |id: &u32| if rows.contains(&(*id as usize)) { table[(*id as usize - first) * c..][..c].to_vec() } else { vec![0.0; c] };
    ids.iter().flat_map(row).collect()
}

/// -ln softmax(logits)[target] of each row of v logits; zero for a row without a target.
pub fn cross_entropy(logits: &[f64], targets: &[Option<usize>], v: usize) -> Vec<f64> {
    let row = |(logits, target): (&[f64], &Option<usize>)| {
        let max = logits.iter().fold(f64::NEG_INFINITY, |max, x| max.max(*x));
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        target.map_or(0.0, |target| sum.ln() - (logits[target] - max))
    };
    logits.chunks(v).zip(targets).map(row).collect()
}

fn mean(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = x.len() as f64;
    x.sum::<f64>() / count
}
