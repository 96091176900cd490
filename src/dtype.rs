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
    // Straight-line arithmetic on bits, so that loops become vector code: the `half` crate asks for the processor's features at every call.
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let (sign, rest) = ((self.to_bits() as u32 & 0x8000) << 16, self.to_bits() as u32 & 0x7fff);
        // The exponent's bias differs by 112; multiplying is exact for denormals, too.
        let finite = (f32::from_bits(rest << 13) * f32::from_bits((112 + 127) << 23)).to_bits();
        let quiet = if rest > 0x7c00 { 0x40_0000 } else { 0 };
        let special = (rest << 13) | 0x7f80_0000 | quiet;
        f32::from_bits(sign | if rest >= 0x7c00 { special } else { finite })
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let (sign, rest) = ((x.to_bits() >> 16) & 0x8000, x.to_bits() & 0x7fff_ffff);
        // To nearest even by carrying into the kept bits, with the bias of the exponent moved by -112.
        let normal = rest.wrapping_add((0xfff + ((rest >> 13) & 1)).wrapping_sub(112 << 23)) >> 13;
        // A sum with 0.5 has the step of a denormal f16 in its last place, so adding rounds to it.
        let denormal = (f32::from_bits(rest) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let special = 0x7c00 | if rest > 0x7f80_0000 { 0x200 | ((rest >> 13) & 0x3ff) } else { 0 };
        let finite = if rest < 0x3880_0000 { denormal } else { normal };
        f16::from_bits((sign | if rest >= 0x4780_0000 { special } else { finite }) as u16)
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
    fn f16_converts_like_the_half_crate() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            let (ours, theirs) = (Element::to_f32(x), x.to_f32());
            assert!(ours.is_nan() && theirs.is_nan() || ours.to_bits() == theirs.to_bits(), "{bits:#x}: {ours:e} {theirs:e}");
        }
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x1fff, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8000, 0xf000, 0xffff] {
                let x = f32::from_bits(((high as u32) << 16) | low);
                let (ours, theirs) = (<f16 as Element>::from_f32(x), f16::from_f32(x));
                assert_eq!(ours.is_nan(), theirs.is_nan(), "{x:e}");
                assert!(x.is_nan() || ours.to_bits() == theirs.to_bits(), "{x:e}: {ours:?} {theirs:?}");
            }
        }
    }

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
