//! The number formats of tensors, and the one trait by which CPU code is generic over them.
//!
//! Invariant: arithmetic happens in f32; a narrow format is only how a value rests in memory. Rounding is to nearest even.

use half::{bf16, f16};
use std::fmt;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
    U32,
}

impl Dtype {
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 | Dtype::U32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }

    /// The name in configurations and messages.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::U32 => "u32",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that rests in a tensor.
pub trait Stored: bytemuck::Pod + Send + Sync + Default + PartialEq + fmt::Debug + 'static {
    const DTYPE: Dtype;
}

/// A floating-point format that activations and weights may have.
pub trait Element: Stored {
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(x: f32) -> Self;
}

impl Stored for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Stored for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}
impl Stored for f16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl Stored for u32 {
    const DTYPE: Dtype = Dtype::U32;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}
impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        // A NaN keeps its sign and becomes quiet; everything else rounds to nearest even by carrying into the kept half.
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
    }
}
impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

/// Runs `body` with the type alias `$T` bound to the Rust type of a floating-point dtype.
///
/// `dispatch!(x.dtype(), T => kernel::<T>(x.slice(), y.slice_mut()))`
#[macro_export]
macro_rules! dispatch {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F32 => {
                type $T = f32;
                $body
            }
            $crate::dtype::Dtype::Bf16 => {
                type $T = half::bf16;
                $body
            }
            $crate::dtype::Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            other => panic!("a floating-point dtype is needed here, not {other}"),
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_like_the_half_crate() {
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(((high as u32) << 16) | low);
                let (ours, theirs) = (<bf16 as Element>::from_f32(x), bf16::from_f32(x));
                assert_eq!(ours.is_nan(), theirs.is_nan(), "{x:e}");
                assert!(x.is_nan() || ours.to_bits() == theirs.to_bits(), "{x:e}: {ours:?} {theirs:?}");
            }
        }
    }
}
