//! Matrix instructions of a warp and of a group of four warps.
//!
//! Invariant: the number of registers of every fragment is the one its shape has.

use super::Decoder;
use super::opcode::Opcode;
use crate::fault::LoadError;
use crate::instruction::{MatrixMove, MatrixType, Multiply, Operation, Slots};
use crate::scalar::Scalar;
use crate::syntax::Operand;

pub(super) fn matrix_type(scalar: Scalar) -> Option<MatrixType> {
    Some(match scalar {
        Scalar::F16 => MatrixType::F16,
        Scalar::Bf16 => MatrixType::Bf16,
        Scalar::Tf32 => MatrixType::Tf32,
        _ => return None,
    })
}

impl<'a> Decoder<'a> {
    pub(super) fn matrix(&mut self, o: &Opcode<'a>) -> Result<bool, LoadError> {
        match o.name() {
            "mma" => self.multiply(o)?,
            "ldmatrix" | "stmatrix" => self.matrix_move(o)?,
            "wgmma" => {
                o.ignore(&["sync", "aligned"]);
                if o.take("fence") {
                    self.emit(Operation::GroupFence, Slots::NONE);
                } else if o.take("commit_group") {
                    self.emit(Operation::GroupCommit, Slots::NONE);
                } else if o.take("wait_group") {
                    let groups = self.immediate(0)?;
                    self.emit(Operation::GroupWait(groups as u32), Slots::NONE);
                } else {
                    self.group_multiply(o)?;
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn immediate(&self, index: usize) -> Result<i64, LoadError> {
        match self.operand(index)? {
            Operand::Integer(value) => Ok(*value),
            other => self.error(format!("{other:?} stands where a constant should")),
        }
    }

    fn multiply(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        o.ignore(&["sync", "aligned", "row", "col"]);
        let Some(depth) = o.pick(&[("m16n8k8", 8), ("m16n8k16", 16), ("m16n8k4", 4)]) else {
            return self.error("the emulator has the shapes m16n8k4, m16n8k8 and m16n8k16");
        };
        let &[d, a, b, c] = o.scalars().as_slice() else { return self.error("four types are needed") };
        let Some(factor) = matrix_type(a).filter(|_| a == b) else {
            return self.error("the emulator multiplies f16, bf16 and tf32, both factors alike");
        };
        let wide_sum = d == Scalar::F32;
        let fits = if factor == MatrixType::Tf32 { depth != 16 } else { depth != 4 };
        if c != d || !(wide_sum || d == Scalar::F16 && factor == MatrixType::F16) || !fits {
            return self.error("the emulator does not know this combination of shape and types");
        }
        let per_register = if factor == MatrixType::Tf32 { 1 } else { 2 };
        let multiply = Multiply {
            depth,
            factor,
            wide_sum,
            d: self.words(0, Scalar::B32)?,
            a: self.words(1, Scalar::B32)?,
            b: self.words(2, Scalar::B32)?,
            c: self.words(3, Scalar::B32)?,
        };
        let sums = if wide_sum { 4 } else { 2 };
        let expected = [sums, depth / 2 / per_register, depth / 4 / per_register, sums];
        let lengths = [multiply.d.len(), multiply.a.len(), multiply.b.len(), multiply.c.len()];
        if lengths != expected {
            return self.error(format!("fragments of {lengths:?} registers, of which {expected:?} are needed"));
        }
        self.emit(Operation::Multiply(Box::new(multiply)), Slots::NONE);
        Ok(())
    }

    fn matrix_move(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        o.ignore(&["sync", "aligned", "shared", "shared::cta", "b16"]);
        if !o.take("m8n8") {
            return self.error("the emulator moves matrices of shape m8n8 alone");
        }
        let count = o.pick(&[("x1", 1), ("x2", 2), ("x4", 4)]).unwrap_or(1);
        let load = o.name() == "ldmatrix";
        let (address, list) = if load { (1, 0) } else { (0, 1) };
        let matrix =
            MatrixMove { address: self.shared_address(address)?, transposed: o.take("trans"), registers: self.words(list, Scalar::B32)? };
        if matrix.registers.len() != count {
            return self.error(format!("{} registers for {count} matrices", matrix.registers.len()));
        }
        let matrix = Box::new(matrix);
        self.emit(if load { Operation::LoadMatrix(matrix) } else { Operation::StoreMatrix(matrix) }, Slots::NONE);
        Ok(())
    }
}
