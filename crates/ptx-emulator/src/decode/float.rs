//! Instructions on floating-point numbers, and conversions.
//!
//! Invariant: a rounding mode that the executor cannot give exactly is refused here.

use super::Decoder;
use super::opcode::Opcode;
use crate::fault::LoadError;
use crate::instruction::{Convert, Float, FloatFlags, HalfFlags, HalfFormat, NONE, Operation, Rounding, Slots};
use crate::scalar::Scalar;

const ROUNDINGS: &[(&str, Rounding)] =
    &[("rn", Rounding::Nearest), ("rz", Rounding::Zero), ("rm", Rounding::Down), ("rp", Rounding::Up), ("rna", Rounding::Away)];

const INTEGRAL: &[(&str, Rounding)] =
    &[("rni", Rounding::Nearest), ("rzi", Rounding::Zero), ("rmi", Rounding::Down), ("rpi", Rounding::Up)];

impl<'a> Decoder<'a> {
    fn float_operator(&self, o: &Opcode<'a>) -> Result<(Float, usize), LoadError> {
        let nan = o.take("NaN");
        Ok(match o.name() {
            "add" => (Float::Add, 2),
            "sub" => (Float::Subtract, 2),
            "mul" => (Float::Multiply, 2),
            "div" => (Float::Divide, 2),
            "fma" | "mad" => (Float::MultiplyAdd, 3),
            "min" => (if nan { Float::MinimumNan } else { Float::Minimum }, 2),
            "max" => (if nan { Float::MaximumNan } else { Float::Maximum }, 2),
            "neg" => (Float::Negate, 1),
            "abs" => (Float::Absolute, 1),
            "copysign" => (Float::CopySign, 2),
            "rcp" => (Float::Reciprocal, 1),
            "sqrt" => (Float::SquareRoot, 1),
            "rsqrt" => (Float::ReciprocalSquareRoot, 1),
            "ex2" => (Float::Exponential, 1),
            "lg2" => (Float::Logarithm, 1),
            "sin" => (Float::Sine, 1),
            "cos" => (Float::Cosine, 1),
            "tanh" => (Float::Tangent, 1),
            _ => return self.error("the emulator has no such instruction on floating-point numbers"),
        })
    }

    fn float_slots(&mut self, scalar: Scalar, sources: usize) -> Result<Slots, LoadError> {
        Ok(Slots {
            to: self.target(0, scalar)?,
            a: self.source(1, scalar)?,
            b: if sources > 1 { self.source(2, scalar)? } else { NONE },
            c: if sources > 2 { self.source(3, scalar)? } else { NONE },
        })
    }

    pub(super) fn float(&mut self, o: &Opcode<'a>, scalar: Scalar) -> Result<(), LoadError> {
        let (operator, sources) = self.float_operator(o)?;
        let rounding = o.pick(ROUNDINGS).unwrap_or(Rounding::Nearest);
        o.ignore(&["approx", "full"]);
        let flags = FloatFlags { flush: o.take("ftz"), saturate: o.take("sat"), rounding };
        let directed = matches!(operator, Float::Add | Float::Subtract | Float::Multiply | Float::MultiplyAdd);
        if rounding == Rounding::Away || rounding != Rounding::Nearest && (!directed || scalar == Scalar::F64) {
            return self.error("the emulator rounds this to nearest alone");
        }
        let slots = self.float_slots(scalar, sources)?;
        let operation = if scalar == Scalar::F64 { Operation::Double(operator) } else { Operation::Float(operator, flags) };
        self.emit(operation, slots);
        Ok(())
    }

    pub(super) fn half(&mut self, o: &Opcode<'a>, scalar: Scalar) -> Result<(), LoadError> {
        if matches!(o.name(), "and" | "or" | "xor" | "not" | "div" | "rcp" | "sqrt" | "rsqrt" | "lg2" | "sin" | "cos" | "copysign") {
            return self.error("the emulator has no such instruction on 16-bit floating-point numbers");
        }
        let (operator, sources) = self.float_operator(o)?;
        o.ignore(&["rn", "approx"]);
        let flags = HalfFlags {
            format: if matches!(scalar, Scalar::F16 | Scalar::F16x2) { HalfFormat::F16 } else { HalfFormat::Bf16 },
            pair: matches!(scalar, Scalar::F16x2 | Scalar::Bf16x2),
            flush: o.take("ftz"),
            saturate: o.take("sat"),
            relu: o.take("relu"),
        };
        let slots = self.float_slots(scalar, sources)?;
        self.emit(Operation::Half(operator, flags), slots);
        Ok(())
    }

    pub(super) fn convert(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        let scalars = o.scalars();
        let &[to, from] = scalars.as_slice() else { return self.error("a conversion names two types") };
        let integral = o.pick(INTEGRAL);
        let rounding = integral.or_else(|| o.pick(ROUNDINGS)).unwrap_or(Rounding::Nearest);
        let convert = Convert {
            to,
            from,
            rounding,
            integral: integral.is_some() && to.float(),
            flush: o.take("ftz"),
            saturate: o.take("sat"),
            relu: o.take("relu"),
        };
        if to == Scalar::Predicate || from == Scalar::Predicate || from == Scalar::Tf32 || matches!(from, Scalar::F16x2 | Scalar::Bf16x2) {
            return self.error("the emulator has no conversion between these types");
        }
        if rounding == Rounding::Away && to != Scalar::Tf32 {
            return self.error("the emulator rounds halves away from zero for tf32 alone");
        }
        if matches!(to, Scalar::F16x2 | Scalar::Bf16x2) {
            if from != Scalar::F32 {
                return self.error("the emulator makes pairs of f32 alone");
            }
            let slots = Slots { to: self.target(0, to)?, a: self.source(1, from)?, b: self.source(2, from)?, c: NONE };
            self.emit(Operation::ConvertPair(convert), slots);
            return Ok(());
        }
        if to == Scalar::F64 && rounding != Rounding::Nearest && !convert.integral && from.bytes() == 8 {
            return self.error("the emulator rounds this to nearest alone");
        }
        let slot = self.target(0, to)?;
        let operand = self.operand(1)?;
        let a = if from.bytes() == 8 { self.double(operand)? } else { self.low_word(operand, from)? };
        self.emit(Operation::Convert(convert), Slots { to: slot, a, ..Slots::NONE });
        Ok(())
    }
}
