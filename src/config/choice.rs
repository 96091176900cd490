//! Configuration values that are one of a few names.
//!
//! Invariant: one list per set of names serves reading, writing and messages, so they cannot disagree.

use super::{DataOrder, DeviceKind, Family, Matmul, Offload, OptimizerKind, Recompute, Resume, RopeType, ScheduleKind, SumOrder, WsdShape};
use crate::dtype::Dtype;
use serde::{Serialize, Serializer};

/// A value that is one of a few names. The one list serves reading, writing and messages.
pub trait Choice: Copy + PartialEq + 'static {
    const NAMES: &'static [(&'static str, Self)];

    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, value)| *value == self).expect("the list of names has every value").0
    }
}

/// Writes a choice by its name.
pub fn name<C: Choice, S: Serializer>(value: &C, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(value.name())
}

impl Serialize for Resume {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Resume::Auto => serializer.serialize_str("auto"),
            Resume::None => serializer.serialize_str("none"),
            Resume::Step(step) => serializer.serialize_u64(*step),
            Resume::Path(path) => path.serialize(serializer),
        }
    }
}

impl Serialize for Offload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Offload::None => serializer.serialize_str("none"),
            Offload::Folder(path) => path.serialize(serializer),
        }
    }
}

impl Choice for Family {
    const NAMES: &'static [(&'static str, Family)] = &[("llama", Family::Llama), ("gpt2", Family::Gpt2)];
}

impl Choice for RopeType {
    const NAMES: &'static [(&'static str, RopeType)] = &[("llama3", RopeType::Llama3)];
}

impl Choice for DataOrder {
    const NAMES: &'static [(&'static str, DataOrder)] = &[("shuffled", DataOrder::Shuffled), ("sequential", DataOrder::Sequential)];
}

impl Choice for Dtype {
    const NAMES: &'static [(&'static str, Dtype)] = &[("f32", Dtype::F32), ("bf16", Dtype::Bf16), ("f16", Dtype::F16)];
}

impl Choice for Recompute {
    const NAMES: &'static [(&'static str, Recompute)] =
        &[("none", Recompute::None), ("selective", Recompute::Selective), ("full", Recompute::Full)];
}

impl Choice for SumOrder {
    const NAMES: &'static [(&'static str, SumOrder)] = &[("auto", SumOrder::Auto), ("lanes", SumOrder::Lanes), ("rows", SumOrder::Rows)];
}

impl Choice for OptimizerKind {
    const NAMES: &'static [(&'static str, OptimizerKind)] = &[("adamw", OptimizerKind::Adamw)];
}

impl Choice for ScheduleKind {
    const NAMES: &'static [(&'static str, ScheduleKind)] = &[
        ("constant", ScheduleKind::Constant),
        ("linear", ScheduleKind::Linear),
        ("cosine", ScheduleKind::Cosine),
        ("wsd", ScheduleKind::Wsd),
        ("inverse_sqrt", ScheduleKind::InverseSqrt),
    ];
}

impl Choice for WsdShape {
    const NAMES: &'static [(&'static str, WsdShape)] = &[("sqrt", WsdShape::Sqrt), ("linear", WsdShape::Linear)];
}

impl Choice for Matmul {
    const NAMES: &'static [(&'static str, Matmul)] = &[("auto", Matmul::Auto), ("cublaslt", Matmul::Cublaslt), ("own", Matmul::Own)];
}

impl Choice for DeviceKind {
    const NAMES: &'static [(&'static str, DeviceKind)] =
        &[("auto", DeviceKind::Auto), ("cpu", DeviceKind::Cpu), ("cuda", DeviceKind::Cuda), ("emulated", DeviceKind::Emulated)];
}
