//! Dynamic loss scaling for f16, as a pure state machine.
//!
//! The loss is multiplied by the scale before the backward pass, so that small gradients do not vanish in f16; the update divides it
//! out. A gradient that is not finite skips the step and lowers the scale; many good steps in a row double it.
//!
//! Invariant: the next state depends on the state, the settings and whether the step overflowed, so all ranks that agree on the
//! overflow agree on the scale, and a checkpoint needs only `LossScaler`.

use crate::config::LossScale;
use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// More than any gradient needs; keeps the scaled loss far from the end of f32.
const MOST: f64 = 4294967296.0; // 2^32, where Megatron starts

#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct LossScaler {
    pub scale: f64,
    /// Steps without an overflow since the scale last changed.
    pub good_steps: u64,
    /// Steps skipped since the last good one.
    pub skips_in_a_row: u64,
    /// Steps skipped since the start of the run.
    pub skips: u64,
}

impl LossScaler {
    pub fn new(settings: &LossScale) -> LossScaler {
        LossScaler { scale: settings.initial, good_steps: 0, skips_in_a_row: 0, skips: 0 }
    }

    /// Takes note of a step. An error when so many were skipped in a row that waiting has become pointless.
    pub fn note(&mut self, settings: &LossScale, overflow: bool) -> Result<()> {
        if !overflow {
            self.skips_in_a_row = 0;
            self.good_steps += 1;
            if self.good_steps >= settings.growth_interval {
                self.good_steps = 0;
                self.scale = (2.0 * self.scale).min(MOST.max(self.scale));
            }
            return Ok(());
        }
        self.good_steps = 0;
        self.skips += 1;
        self.skips_in_a_row += 1;
        self.scale = (self.scale * settings.backoff).max(settings.min);
        if self.skips_in_a_row >= settings.max_skips {
            // Where the scale does not move the run is not in f16.
            let (scale, fits, or) = match settings.backoff < 1.0 {
                true => (format!(", down to a loss scale of {}", self.scale), " or does not fit f16", ", or set train.dtype = \"bf16\""),
                false => (String::new(), "", ""),
            };
            bail!(
                "{} steps in a row had gradients that are not finite{scale}: the run has diverged{fits}; \
                 lower optimizer.lr, lengthen schedule.warmup_steps{or}",
                self.skips_in_a_row,
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: LossScale = LossScale { initial: 8.0, growth_interval: 3, backoff: 0.5, min: 1.0, max_skips: 5 };

    fn run(steps: &str) -> (LossScaler, Result<()>) {
        let mut scaler = LossScaler::new(&SETTINGS);
        for step in steps.chars() {
            if let Err(error) = scaler.note(&SETTINGS, step == 'x') {
                return (scaler, Err(error));
            }
        }
        (scaler, Ok(()))
    }

    #[test]
    fn grows_after_good_steps_and_only_then() {
        assert_eq!(run("..").0.scale, 8.0);
        assert_eq!(run("...").0.scale, 16.0);
        assert_eq!(run(".....").0.scale, 16.0);
        assert_eq!(run("......").0.scale, 32.0);
        assert_eq!(run("..x..").0.scale, 4.0);
        assert_eq!(run("..x...").0.scale, 8.0);
    }

    #[test]
    fn falls_to_the_floor_and_gives_up_with_advice() {
        let (scaler, result) = run("xxxx");
        assert!(result.is_ok());
        assert_eq!((scaler.scale, scaler.skips, scaler.skips_in_a_row), (1.0, 4, 4));
        assert_eq!(run("xxxx.xxxx").0.skips, 8);
        let message = run("xxxxx").1.expect_err("the fifth skip in a row is too many").to_string();
        assert!(message.contains("5 steps in a row") && message.contains("optimizer.lr"), "{message}");
    }

    #[test]
    fn never_grows_out_of_range() {
        let mut scaler = LossScaler { scale: MOST, good_steps: 2, skips_in_a_row: 0, skips: 0 };
        scaler.note(&SETTINGS, false).expect("a good step");
        assert_eq!(scaler.scale, MOST);
    }

    #[test]
    fn survives_a_checkpoint() {
        let (scaler, _) = run("..x.");
        let text = serde_json::to_string(&scaler).expect("plain numbers");
        assert_eq!(serde_json::from_str::<LossScaler>(&text).expect("its own text"), scaler);
    }
}
