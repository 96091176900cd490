//! Copies that go on while the warp does.
//!
//! Invariant: a copy has one of the sizes the hardware has.

use super::Decoder;
use super::opcode::Opcode;
use crate::fault::LoadError;
use crate::instruction::{CopyAsync, NONE, Operation, Slots};
use crate::scalar::Scalar;
use crate::syntax::Operand;

impl<'a> Decoder<'a> {
    pub(super) fn asynchronous(&mut self, o: &Opcode<'a>) -> Result<bool, LoadError> {
        match o.name() {
            "cp" => {
                if !o.take("async") {
                    return Ok(false);
                }
                self.copy(o)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn copy(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        if o.take("commit_group") {
            self.emit(Operation::CopyCommit, Slots::NONE);
            return Ok(());
        }
        if o.take("wait_all") {
            // Also what was not committed.
            self.emit(Operation::CopyCommit, Slots::NONE);
            self.emit(Operation::CopyWait(0), Slots::NONE);
            return Ok(());
        }
        if o.take("wait_group") {
            let groups = self.immediate(0)? as u32;
            self.emit(Operation::CopyWait(groups), Slots::NONE);
            return Ok(());
        }
        o.ignore(&["ca", "cg", "shared", "shared::cta", "global"]);
        o.ignore_beginning(&["L2::"]);
        let (to, from) = (self.address(self.operand(0)?)?, self.address(self.operand(1)?)?);
        let bytes = self.immediate(2)?;
        if !matches!(bytes, 4 | 8 | 16) {
            return self.error(format!("{bytes} bytes; 4, 8 and 16 are possible"));
        }
        let (mut source_bytes, mut ignore) = (NONE, NONE);
        if let Some(operand) = self.line.operands.get(3) {
            let is_predicate =
                matches!(operand, Operand::Name(name) if matches!(self.find(name), Some(super::Binding::Register(Scalar::Predicate, _))));
            if is_predicate {
                ignore = self.predicate(operand)?;
            } else if !self.is_double(operand) {
                source_bytes = self.word(operand, Scalar::U32)?;
            }
        }
        let copy = CopyAsync { to, from, bytes: bytes as u32, source_bytes, ignore };
        self.emit(Operation::CopyAsync(Box::new(copy)), Slots::NONE);
        Ok(())
    }
}
