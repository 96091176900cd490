//! The types an opcode can name.
//!
//! Invariant: a type has one size, and one kind of register holds it: a predicate, a word of 32 lanes × 32 bits, or a double of
//! 32 lanes × 64 bits. Types under 32 bits live zero-extended in words.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scalar {
    Predicate,
    B8,
    U8,
    S8,
    B16,
    U16,
    S16,
    F16,
    Bf16,
    B32,
    U32,
    S32,
    F32,
    Tf32,
    F16x2,
    Bf16x2,
    B64,
    U64,
    S64,
    F64,
}

impl Scalar {
    pub(crate) fn parse(name: &str) -> Option<Scalar> {
        Some(match name {
            "pred" => Scalar::Predicate,
            "b8" => Scalar::B8,
            "u8" => Scalar::U8,
            "s8" => Scalar::S8,
            "b16" => Scalar::B16,
            "u16" => Scalar::U16,
            "s16" => Scalar::S16,
            "f16" => Scalar::F16,
            "bf16" => Scalar::Bf16,
            "b32" => Scalar::B32,
            "u32" => Scalar::U32,
            "s32" => Scalar::S32,
            "f32" => Scalar::F32,
            "tf32" => Scalar::Tf32,
            "f16x2" => Scalar::F16x2,
            "bf16x2" => Scalar::Bf16x2,
            "b64" => Scalar::B64,
            "u64" => Scalar::U64,
            "s64" => Scalar::S64,
            "f64" => Scalar::F64,
            _ => return None,
        })
    }

    /// Bytes in memory; a predicate has none.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Scalar::Predicate => 0,
            Scalar::B8 | Scalar::U8 | Scalar::S8 => 1,
            Scalar::B16 | Scalar::U16 | Scalar::S16 | Scalar::F16 | Scalar::Bf16 => 2,
            Scalar::B64 | Scalar::U64 | Scalar::S64 | Scalar::F64 => 8,
            _ => 4,
        }
    }

    pub(crate) fn signed(self) -> bool {
        matches!(self, Scalar::S8 | Scalar::S16 | Scalar::S32 | Scalar::S64)
    }

    /// A whole number or untyped bits.
    pub(crate) fn integer(self) -> bool {
        !self.float() && self != Scalar::Predicate
    }

    pub(crate) fn float(self) -> bool {
        use Scalar::{Bf16, Bf16x2, F16, F16x2, F32, F64, Tf32};
        matches!(self, F16 | Bf16 | F32 | Tf32 | F16x2 | Bf16x2 | F64)
    }
}
