//! Sampling text from a trained model.
//!
//! Plain: every new token runs the whole window through the model again. A window longer than the model was built for slides.

use crate::data::loader::Batch;
use crate::rng::Stream;
use crate::train::step::Trainer;
use anyhow::Result;

#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0: always the likeliest token.
    pub temperature: f64,
    /// Only the likeliest so many; 0: all.
    pub top_k: usize,
    pub seed: u64,
}

/// Continues `tokens` by up to `count` tokens, each of which is shown to `each`; ends early at `end`.
pub fn generate(
    trainer: &mut Trainer,
    tokens: &mut Vec<u32>,
    count: usize,
    sampling: Sampling,
    end: Option<u32>,
    mut each: impl FnMut(u32),
) -> Result<()> {
    let stream = Stream::new(sampling.seed, "generate");
    for index in 0..count {
        let window = &tokens[tokens.len().saturating_sub(trainer.plan.t)..];
        let logits = trainer.stage.logits(&one_row(window))?;
        let vocabulary = logits.len() / window.len();
        let token = sample(&logits[logits.len() - vocabulary..], sampling, stream.uniform(index as u64));
        if Some(token) == end {
            break;
        }
        tokens.push(token);
        each(token);
    }
    Ok(())
}

fn one_row(tokens: &[u32]) -> Batch {
    let t = tokens.len();
    Batch {
        rows: vec![0],
        seq_len: t,
        inputs: tokens.to_vec(),
        targets: vec![0; t],
        positions: (0..t as u32).collect(),
        starts: vec![0; t],
    }
}

/// The token at which the cumulated probability passes `uniform`.
fn sample(logits: &[f32], sampling: Sampling, uniform: f64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if sampling.temperature <= 0.0 {
        return order[0] as u32;
    }
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let highest = logits[order[0]] as f64;
    let weights: Vec<f64> = order.iter().map(|&i| ((logits[i] as f64 - highest) / sampling.temperature).exp()).collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    for (&token, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    order[order.len() - 1] as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_follow_the_probabilities() {
        let logits = [0.0, f32::ln(3.0), f32::NEG_INFINITY];
        let plain = Sampling { temperature: 1.0, top_k: 0, seed: 0 };
        let ones = (0..1000).filter(|i| sample(&logits, plain, *i as f64 / 1000.0) == 1).count();
        assert_eq!(ones, 750);
        assert_eq!(sample(&logits, Sampling { top_k: 1, ..plain }, 0.999), 1);
        assert_eq!(sample(&logits, Sampling { temperature: 0.0, ..plain }, 0.0), 1);
    }
}
