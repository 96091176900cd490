//! `wgmma`: matrix products of four warps.
//!
//! Invariant: the number of sums is the one of the shape; the first factor is a descriptor or four registers.

use super::Decoder;
use super::matrix::matrix_type;
use super::opcode::Opcode;
use crate::fault::LoadError;
use crate::instruction::{GroupFactor, GroupMultiply, MatrixType, Operation, Slots};
use crate::scalar::Scalar;
use crate::syntax::Operand;

impl<'a> Decoder<'a> {
    pub(super) fn group_multiply(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        if !o.take("mma_async") {
            return self.error("the emulator has no such instruction");
        }
        let shape = o.after("m64n").and_then(|shape| shape.split_once('k'));
        let Some((Ok(columns), Ok(depth))) = shape.map(|(n, k)| (n.parse::<usize>(), k.parse::<usize>())) else {
            return self.error("the shape is no m64nNkK");
        };
        let &[d, a, b] = o.scalars().as_slice() else { return self.error("three types are needed") };
        let Some(factor) = matrix_type(a).filter(|_| a == b) else {
            return self.error("the emulator multiplies f16, bf16 and tf32, both factors alike");
        };
        let wide_sum = d == Scalar::F32;
        let fits = depth == if factor == MatrixType::Tf32 { 8 } else { 16 };
        if !(8..=256).contains(&columns) || columns % 8 != 0 || !fits || !(wide_sum || d == Scalar::F16 && factor == MatrixType::F16) {
            return self.error("the emulator does not know this combination of shape and types");
        }
        let sums = self.words(0, Scalar::B32)?;
        let expected = if wide_sum { columns / 2 } else { columns / 4 };
        if sums.len() != expected {
            return self.error(format!("{} sums, of which {expected} are needed", sums.len()));
        }
        let from_registers = matches!(self.operand(1)?, Operand::List(_));
        let a = if from_registers {
            GroupFactor::Registers(self.words(1, Scalar::B32)?)
        } else {
            GroupFactor::Descriptor(self.source(1, Scalar::B64)?)
        };
        let b = self.source(2, Scalar::B64)?;
        let (keep, invert) = self.signed_predicate(3)?;
        let keep = if invert { self.inverse(keep) } else { keep };
        let sixteen_bits = factor != MatrixType::Tf32;
        let (first, second) = if from_registers { (None, 6) } else { (Some(6), 7) };
        let flag = |index: usize| Ok(self.immediate(index)? != 0);
        let transposed = [first.filter(|_| sixteen_bits).map_or(Ok(false), flag)?, if sixteen_bits { flag(second)? } else { false }];
        let negate = [self.immediate(4)? < 0, self.immediate(5)? < 0];
        if matches!(&a, GroupFactor::Registers(registers) if registers.len() != 4) {
            return self.error("a factor in registers has four of them");
        }
        let multiply = GroupMultiply { columns, depth, factor, wide_sum, d: sums, a, b, keep, negate, transposed };
        self.emit(Operation::GroupMultiply(Box::new(multiply)), Slots::NONE);
        Ok(())
    }
}
