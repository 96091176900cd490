//! Barriers, fences and instructions in which the lanes of a warp take part together.
//!
//! Invariant: member masks are words, so that a register and an immediate are executed alike.

use super::Decoder;
use super::opcode::Opcode;
use crate::fault::LoadError;
use crate::instruction::{Barrier, Fence, NONE, Operation, Reduce, Shuffle, ShuffleMode, Slots, Vote};
use crate::scalar::Scalar;
use crate::syntax::Operand;

impl<'a> Decoder<'a> {
    pub(super) fn sync(&mut self, o: &Opcode<'a>) -> Result<bool, LoadError> {
        match o.name() {
            "bar" | "barrier" => self.barrier(o)?,
            "membar" | "fence" => self.fence(o),
            "shfl" => self.shuffle(o)?,
            "vote" => self.vote(o)?,
            "match" => {
                let all = o.take("all");
                o.ignore(&["any", "sync"]);
                let Some(&scalar) = o.scalars().first() else { return self.error("no type is named") };
                let (to, second) = self.target_and_predicate()?;
                let (a, b) = (self.source(1, scalar)?, self.source(2, Scalar::U32)?);
                self.emit(Operation::Match(all, scalar.bytes() == 8), Slots { to, a, b, c: second });
            }
            "redux" => self.reduce(o)?,
            "elect" => {
                o.ignore(&["sync"]);
                let (to, second) = self.target_and_predicate()?;
                let b = self.source(1, Scalar::U32)?;
                self.emit(Operation::Elect, Slots { to, a: NONE, b, c: second });
            }
            "activemask" => {
                o.scalars();
                let to = self.target(0, Scalar::U32)?;
                self.emit(Operation::ActiveMask, Slots { to, ..Slots::NONE });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `d|p` or `d`; a half that is `_` or not there is a register nobody reads, or `NONE`.
    fn target_and_predicate(&mut self) -> Result<(u32, u32), LoadError> {
        let Operand::Pair(value, predicate) = self.operand(0)? else { return Ok((self.target(0, Scalar::U32)?, NONE)) };
        let to = match *value {
            "_" => self.new_word(),
            name => match self.find(name) {
                Some(super::Binding::Register(scalar, slot)) if scalar.bytes() == 4 => slot,
                _ => return self.error(format!("`{name}` is no 32-bit register")),
            },
        };
        let second = if *predicate == "_" { NONE } else { self.predicate(&Operand::Name(predicate))? };
        Ok((to, second))
    }

    fn barrier(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        o.ignore(&["cta", "aligned"]);
        if o.take("warp") {
            o.ignore(&["sync"]);
            let a = self.source(0, Scalar::U32)?;
            self.emit(Operation::WarpBarrier, Slots { a, ..Slots::NONE });
            return Ok(());
        }
        if o.take("cluster") {
            // A cluster of one block: its barrier is the block's, and arriving alone waits for nobody.
            o.ignore(&["arrive", "relaxed", "release", "acquire"]);
            if o.take("wait") {
                let (a, b) = (self.constant_word(16), NONE);
                self.emit(Operation::Barrier(Barrier::Sync), Slots { to: NONE, a, b, c: NONE });
            }
            return Ok(());
        }
        let reduction = o.take("red");
        o.ignore(&["sync"]);
        let barrier = match o.pick(&[("popc", Barrier::CountOnes), ("and", Barrier::And), ("or", Barrier::Or)]) {
            Some(barrier) if reduction => barrier,
            _ if o.take("arrive") => Barrier::Arrive,
            _ => Barrier::Sync,
        };
        let scalars = o.scalars();
        if !reduction {
            let a = self.source(0, Scalar::U32)?;
            let b = if self.line.operands.len() > 1 { self.source(1, Scalar::U32)? } else { NONE };
            self.emit(Operation::Barrier(barrier), Slots { to: NONE, a, b, c: NONE });
            return Ok(());
        }
        let Some(&scalar) = scalars.first() else { return self.error("no type is named") };
        let (to, a) = (self.target(0, scalar)?, self.source(1, Scalar::U32)?);
        let last = self.line.operands.len() - 1;
        let b = if last > 2 { self.source(2, Scalar::U32)? } else { NONE };
        let (c, invert) = self.signed_predicate(last)?;
        let c = if invert { self.inverse(c) } else { c };
        self.emit(Operation::Barrier(barrier), Slots { to, a, b, c });
        Ok(())
    }

    /// A predicate with the opposite value, for instructions that read it as it is.
    pub(super) fn inverse(&mut self, predicate: u32) -> u32 {
        let to = self.new_predicate();
        self.emit(Operation::Logic(crate::instruction::Logic::Not), Slots { to, a: predicate, b: predicate, c: NONE });
        to
    }

    fn fence(&mut self, o: &Opcode<'a>) {
        o.ignore(&["sc", "acq_rel", "acquire", "release", "sync_restrict::shared::cta", "sync_restrict::shared::cluster", "cluster"]);
        let proxy = o.take("proxy") | o.take("mbarrier_init");
        o.ignore(&["async", "async::generic", "alias", "global", "shared::cta", "shared::cluster", "async::global", "async::shared"]);
        o.ignore_beginning(&["tensormap"]);
        let block = o.take("cta");
        o.ignore(&["gl", "gpu", "sys"]);
        let fence = if proxy {
            Fence::Proxy
        } else if block {
            Fence::Block
        } else {
            Fence::Device
        };
        self.emit(Operation::Fence(fence), Slots::NONE);
    }

    fn shuffle(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        if !o.take("sync") {
            return self.error("shuffles without `.sync` are not supported");
        }
        o.scalars();
        let mode =
            o.pick(&[("up", ShuffleMode::Up), ("down", ShuffleMode::Down), ("bfly", ShuffleMode::Butterfly), ("idx", ShuffleMode::Index)]);
        let Some(mode) = mode else { return self.error("no mode is named") };
        let (to, in_range) = self.target_and_predicate()?;
        let [a, b, c, members] = [1, 2, 3, 4].map(|index| self.source(index, Scalar::U32));
        let shuffle = Shuffle { mode, members: members?, in_range };
        self.emit(Operation::Shuffle(Box::new(shuffle)), Slots { to, a: a?, b: b?, c: c? });
        Ok(())
    }

    fn vote(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        if !o.take("sync") {
            return self.error("votes without `.sync` are not supported");
        }
        o.scalars();
        let vote = o.pick(&[("all", Vote::All), ("any", Vote::Any), ("uni", Vote::Uniform), ("ballot", Vote::Ballot)]);
        let Some(vote) = vote else { return self.error("no mode is named") };
        let to = self.target(0, if vote == Vote::Ballot { Scalar::B32 } else { Scalar::Predicate })?;
        let (a, invert) = self.signed_predicate(1)?;
        let a = if invert { self.inverse(a) } else { a };
        let b = self.source(2, Scalar::U32)?;
        self.emit(Operation::Vote(vote), Slots { to, a, b, c: NONE });
        Ok(())
    }

    fn reduce(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        o.ignore(&["sync"]);
        let Some(&scalar) = o.scalars().first() else { return self.error("no type is named") };
        let reduce = match o.pick(&[("add", 0), ("min", 1), ("max", 2), ("and", 3), ("or", 4), ("xor", 5)]) {
            _ if scalar.float() => return self.error("the emulator reduces whole numbers alone"),
            Some(0) => Reduce::Add,
            Some(1) if scalar.signed() => Reduce::MinimumSigned,
            Some(2) if scalar.signed() => Reduce::MaximumSigned,
            Some(1) => Reduce::Minimum,
            Some(2) => Reduce::Maximum,
            Some(3) => Reduce::And,
            Some(4) => Reduce::Or,
            Some(_) => Reduce::Xor,
            None => return self.error("no operation is named"),
        };
        let (to, a, b) = (self.target(0, scalar)?, self.source(1, scalar)?, self.source(2, Scalar::U32)?);
        self.emit(Operation::Reduce(reduce), Slots { to, a, b, c: NONE });
        Ok(())
    }
}
