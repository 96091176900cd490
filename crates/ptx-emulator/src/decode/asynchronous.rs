//! Copies that go on while the warp does, and the barriers in memory that tell when they are done.
//!
//! Invariant: a bulk copy knows its direction, and one into shared memory knows the mbarrier it reports to.

use super::Decoder;
use super::opcode::Opcode;
use crate::fault::LoadError;
use crate::instruction::{AtomicOperator, NONE, Operation, Slots};
use crate::scalar::Scalar;
use crate::syntax::Operand;
use crate::transfer::{Bulk, BulkDirection, CopyAsync, Mbarrier, MbarrierOperator};

impl<'a> Decoder<'a> {
    pub(super) fn asynchronous(&mut self, o: &Opcode<'a>) -> Result<bool, LoadError> {
        match o.name() {
            "mbarrier" => self.mbarrier(o)?,
            "cp" => {
                let reduces = o.take("reduce");
                if !o.take("async") {
                    return Ok(false);
                }
                if o.take("bulk") {
                    self.bulk(o, reduces)?;
                } else {
                    self.copy(o)?;
                }
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
        if o.take("mbarrier") {
            o.ignore(&["arrive", "b64", "shared", "shared::cta"]);
            let counted = o.take("noinc");
            let address = self.address(self.operand(0)?)?;
            let operator = MbarrierOperator::ArriveAfterCopies(counted);
            let mbarrier = Mbarrier { operator, address, value: NONE, to: NONE };
            self.emit(Operation::Mbarrier(Box::new(mbarrier)), Slots::NONE);
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

    fn mbarrier(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        o.ignore(&["shared", "shared::cta", "shared::cluster", "b64", "release", "acquire", "relaxed", "cta", "cluster"]);
        let parity = o.take("parity");
        let expects = o.take("expect_tx");
        let operator = match o.pick(&[("init", 0), ("inval", 1), ("arrive", 2), ("try_wait", 3), ("test_wait", 4)]) {
            Some(0) => MbarrierOperator::Initialise,
            Some(1) => MbarrierOperator::Invalidate,
            Some(2) if expects => MbarrierOperator::ArriveExpect,
            Some(2) => {
                o.ignore(&["noComplete"]);
                MbarrierOperator::Arrive
            }
            Some(3) if parity => MbarrierOperator::TryWait,
            Some(3) => MbarrierOperator::TryWaitState,
            Some(_) if parity => MbarrierOperator::TestWait,
            Some(_) => MbarrierOperator::TestWaitState,
            None if expects => MbarrierOperator::Expect,
            None => return self.error("the emulator has no such operation"),
        };
        let operands = &self.line.operands;
        let Some(at) = operands.iter().position(|operand| matches!(operand, Operand::Address(..))) else {
            return self.error("no address is named");
        };
        let address = self.address(&operands[at])?;
        let value_type = match operator {
            MbarrierOperator::TryWaitState | MbarrierOperator::TestWaitState => Scalar::B64,
            _ => Scalar::U32,
        };
        let value = if operands.len() > at + 1 { self.source(at + 1, value_type)? } else { NONE };
        let to_type = match operator {
            MbarrierOperator::Arrive | MbarrierOperator::ArriveExpect => Scalar::B64,
            _ => Scalar::Predicate,
        };
        let to = if at == 0 { NONE } else { self.target(0, to_type)? };
        self.emit(Operation::Mbarrier(Box::new(Mbarrier { operator, address, value, to })), Slots::NONE);
        Ok(())
    }

    fn bulk(&mut self, o: &Opcode<'a>, reduces: bool) -> Result<(), LoadError> {
        if o.take("commit_group") {
            self.emit(Operation::BulkCommit, Slots::NONE);
            return Ok(());
        }
        if o.take("wait_group") {
            o.ignore(&["read"]);
            let groups = self.immediate(0)? as u32;
            self.emit(Operation::BulkWait(groups), Slots::NONE);
            return Ok(());
        }
        if o.take("prefetch") {
            return self.error("bulk prefetches are not supported");
        }
        let to_shared = o.before("shared", "global");
        o.ignore(&["shared::cluster", "shared::cta", "global", "tile", "bulk_group", "mbarrier::complete_tx::bytes", "L2::cache_hint"]);
        let direction = match o.pick(&[("add", AtomicOperator::Add), ("min", AtomicOperator::Minimum), ("max", AtomicOperator::Maximum)]) {
            Some(operator) if reduces && !to_shared => BulkDirection::Reduce(operator),
            None if !reduces && to_shared => BulkDirection::ToShared,
            None if !reduces => BulkDirection::ToGlobal,
            _ => return self.error("the emulator has no such reduction"),
        };
        let scalar = o.scalars().first().copied().unwrap_or(Scalar::B8);
        if o.take("noftz") && scalar == Scalar::F32 {
            return self.error("`.noftz` is for 16-bit types");
        }
        let (shared_at, global_at) = if to_shared { (0, 1) } else { (1, 0) };
        let global_operand = self.operand(global_at)?;
        let mut coordinates = Vec::new();
        let tensor = o.take("tensor");
        let mut next = 2;
        if tensor {
            let Some(rank) = o.pick(&[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)]) else {
                return self.error("no rank is named");
            };
            let Operand::Address(_, _, more) = global_operand else { return self.error("no tensor map is named") };
            let list = more.first().map_or(&[][..], |operand| self.list(operand));
            for operand in list {
                coordinates.push(self.word(operand, Scalar::S32)?);
            }
            if coordinates.len() != rank {
                return self.error(format!("{} coordinates for {rank} dimensions", coordinates.len()));
            }
        }
        let bytes = if tensor { NONE } else { self.source(2, Scalar::U32)? };
        next += usize::from(!tensor);
        let mbarrier = if to_shared { Some(self.address(self.operand(next)?)?) } else { None };
        // A tensor map among the parameters is named by its generic address.
        let (shared, global) = (self.address(self.operand(shared_at)?)?, self.address(global_operand)?);
        let bulk = Bulk { direction, shared, global, coordinates, bytes, mbarrier, scalar };
        self.emit(Operation::Bulk(Box::new(bulk)), Slots::NONE);
        Ok(())
    }
}
