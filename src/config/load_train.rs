//! Reads `[train]`.
//!
//! Invariant: a run has one length, in steps; tokens are turned into steps here and nowhere else.

use super::reader::{Reader, SOME};
use super::{LossScale, Recompute, Train};
use crate::dtype::Dtype;
use toml::Value;

/// `None` where a required key is missing or wrong.
pub fn read(mut r: Reader) -> Option<Train> {
    let (steps, tokens) = (r.whole("steps", SOME), tokens(&mut r));
    let seq_len = r.whole("seq_len", 1..=1 << 24);
    let seq_len = r.required("seq_len", seq_len, "1024");
    let global_batch_size = r.whole("global_batch_size", 1..=1 << 24);
    let global_batch_size = r.required("global_batch_size", global_batch_size, "32");
    let steps = match (steps, tokens) {
        (Some(_), Some(_)) => {
            r.problem("tokens", "both `train.tokens` and `train.steps` are given", "leave one of them out");
            None
        }
        (None, Some(tokens)) => match (seq_len, global_batch_size) {
            (Some(seq_len), Some(batch)) => Some(tokens.div_ceil(seq_len as u64 * batch as u64)),
            _ => None,
        },
        (steps, None) if r.has("tokens") => steps,
        (steps, None) => r.required("steps", steps, "1000, or tokens = \"10B\""),
    };
    let stop_after = r.whole("stop_after", SOME);
    let micro_batch_size = r.whole("micro_batch_size", 1..=1 << 24).unwrap_or(1);
    let dtype = r.choice("dtype").unwrap_or(Dtype::Bf16);
    let recompute = r.choice("recompute").unwrap_or(Recompute::None);
    let loss_scale = loss_scale(r.subsection("loss_scale"));
    r.finish();
    Some(Train {
        steps: steps?,
        stop_after,
        seq_len: seq_len?,
        global_batch_size: global_batch_size?,
        micro_batch_size,
        dtype,
        recompute,
        loss_scale,
    })
}

/// `train.tokens`: a whole number, or text such as "10B".
fn tokens(r: &mut Reader) -> Option<u64> {
    let help = "for instance 300000000, \"300M\" or \"1.5B\" (k, M, B, T are powers of 1000)";
    let tokens = match r.take("tokens")? {
        Value::Integer(tokens) => tokens as f64,
        Value::String(text) => match with_suffix(text.trim()) {
            Some(tokens) => tokens,
            None => {
                r.problem("tokens", format!("`train.tokens` = \"{text}\" is not a number of tokens"), help);
                return None;
            }
        },
        other => return r.wrong("tokens", "a number of tokens such as \"10B\"", &other),
    };
    // Up to here a f64 holds every whole number.
    if !(1.0..=9e15).contains(&tokens) {
        r.problem("tokens", format!("`train.tokens` = {tokens} is out of range"), help);
        return None;
    }
    Some(tokens.round() as u64)
}

fn with_suffix(text: &str) -> Option<f64> {
    let last = text.chars().last()?;
    let factor = match last {
        'k' | 'K' => 1e3,
        'm' | 'M' => 1e6,
        'b' | 'B' | 'g' | 'G' => 1e9,
        't' | 'T' => 1e12,
        _ => return text.parse().ok(),
    };
    text[..text.len() - last.len_utf8()].trim().parse::<f64>().ok().map(|number| number * factor)
}

fn loss_scale(r: Option<Reader>) -> LossScale {
    let mut scale = LossScale { initial: 65536.0, growth_interval: 2000, backoff: 0.5, min: 1.0, max_skips: 50 };
    if let Some(mut r) = r {
        scale.initial = r.number("initial", |x| x > 0.0, "above 0").unwrap_or(scale.initial);
        scale.growth_interval = r.whole("growth_interval", SOME).unwrap_or(scale.growth_interval);
        scale.backoff = r.number("backoff", |x| x > 0.0 && x < 1.0, "between 0 and 1").unwrap_or(scale.backoff);
        scale.min = r.number("min", |x| x > 0.0, "above 0").unwrap_or(scale.min);
        scale.max_skips = r.whole("max_skips", SOME).unwrap_or(scale.max_skips);
        r.finish();
    }
    scale
}
