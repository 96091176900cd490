//! The learning rate of every update, as a pure function.
//!
//! With t = 0, 1, … the update, W the warm-up, D the end of the decay, m the lowest rate and x = (t − W) / (D − W):
//!
//! ```text
//! t < W          lr (t + 1) / W                          the first update moves, the last of the warm-up is exactly lr
//! constant       lr
//! t ≥ D          m
//! linear         lr + (m − lr) x
//! cosine         m + (lr − m) (1 + cos πx) / 2
//! wsd            lr until D − L, then m + (lr − m) (1 − √y) or m + (lr − m) (1 − y), y = (t − (D − L)) / L
//! inverse_sqrt   lr √(W / t), never below m; D does not matter
//! ```
//!
//! Invariant: resuming needs nothing but the step's number.

use crate::config::{Optimizer, Schedule, ScheduleKind, WsdShape};
use std::f64::consts::PI;

/// The rate of update `step0` (counted from 0) of a run of `steps` updates.
pub fn rate(optimizer: &Optimizer, schedule: &Schedule, steps: u64, step0: u64) -> f64 {
    let (lr, least) = (optimizer.lr, schedule.min_lr);
    let warmup = schedule.warmup_steps;
    let end = if schedule.decay_steps == 0 { steps } else { schedule.decay_steps };
    if step0 < warmup {
        return lr * (step0 + 1) as f64 / warmup as f64;
    }
    let x = (step0 - warmup) as f64 / end.saturating_sub(warmup).max(1) as f64;
    match schedule.kind {
        ScheduleKind::Constant => lr,
        ScheduleKind::InverseSqrt => least.max(lr * (warmup.max(1) as f64 / step0.max(1) as f64).sqrt()),
        _ if step0 >= end => least,
        ScheduleKind::Linear => lr + (least - lr) * x,
        ScheduleKind::Cosine => least + (lr - least) * 0.5 * (1.0 + (PI * x).cos()),
        ScheduleKind::Wsd => {
            let start = end.saturating_sub(schedule.wsd_decay_steps);
            if step0 < start {
                return lr;
            }
            let y = (step0 - start) as f64 / schedule.wsd_decay_steps as f64;
            let height = match schedule.wsd_shape {
                WsdShape::Sqrt => 1.0 - y.sqrt(),
                WsdShape::Linear => 1.0 - y,
            };
            least + (lr - least) * height
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OptimizerKind;

    fn rates(kind: ScheduleKind, shape: WsdShape, decay_steps: u64, steps: u64) -> Vec<f64> {
        let optimizer = Optimizer {
            kind: OptimizerKind::Adamw,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            no_decay: Vec::new(),
            grad_clip: 1.0,
            stochastic_rounding: false,
        };
        let schedule = Schedule { kind, warmup_steps: 2, decay_steps, min_lr: 1e-4, wsd_decay_steps: 4, wsd_shape: shape };
        (0..steps).map(|step0| rate(&optimizer, &schedule, steps, step0)).collect()
    }

    fn assert_close(got: &[f64], wanted: &[f64]) {
        assert_eq!(got.len(), wanted.len());
        for (step, (got, wanted)) in got.iter().zip(wanted).enumerate() {
            assert!((got - wanted).abs() < 1e-15, "step {step}: {got} instead of {wanted}");
        }
    }

    #[test]
    fn cosine_has_the_rates_of_the_reference_run() {
        // The five steps of the parity oracle, whose defaults these are.
        let got = rates(ScheduleKind::Cosine, WsdShape::Sqrt, 0, 5);
        assert_close(&got, &[0.0005, 0.001, 0.001, 0.000775, 0.000325]);
    }

    #[test]
    fn linear_falls_evenly_and_stays_at_the_end() {
        let got = rates(ScheduleKind::Linear, WsdShape::Sqrt, 5, 7);
        assert_close(&got, &[0.0005, 0.001, 0.001, 0.0007, 0.0004, 0.0001, 0.0001]);
    }

    #[test]
    fn constant_ignores_the_end() {
        assert_close(&rates(ScheduleKind::Constant, WsdShape::Sqrt, 3, 5), &[0.0005, 0.001, 0.001, 0.001, 0.001]);
    }

    #[test]
    fn wsd_holds_then_falls() {
        let got = rates(ScheduleKind::Wsd, WsdShape::Linear, 0, 9);
        assert_close(&got, &[0.0005, 0.001, 0.001, 0.001, 0.001, 0.001, 0.000775, 0.00055, 0.000325]);
        let got = rates(ScheduleKind::Wsd, WsdShape::Sqrt, 0, 9);
        // 1 − √(1/4) = 1/2, 1 − √(1/2) = 0.2929, 1 − √(3/4) = 0.1340
        let fall = [0.00055, 1e-4 + 9e-4 * 0.292_893_218_813_452_4, 1e-4 + 9e-4 * 0.133_974_596_215_561_3];
        assert_close(&got[5..], &[&[0.001], &fall[..]].concat());
    }

    #[test]
    fn inverse_sqrt_falls_to_its_floor() {
        let got = rates(ScheduleKind::InverseSqrt, WsdShape::Sqrt, 0, 301);
        assert_close(&got[..5], &[0.0005, 0.001, 0.001, 1e-3 * (2.0f64 / 3.0).sqrt(), 1e-3 * 0.5f64.sqrt()]);
        assert_close(&got[8..9], &[0.0005]);
        assert_close(&got[300..], &[0.0001]);
    }
}
