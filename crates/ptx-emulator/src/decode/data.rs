//! Instructions that move values: between registers, between types, and between registers and memory; and branches.
//!
//! Invariant: an access names its state space, or is generic and finds it by address.

use super::Decoder;
use super::opcode::Opcode;
use crate::address::{LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW};
use crate::fault::LoadError;
use crate::instruction::{Access, Address, Atomic, AtomicOperator, Integer, Kind, NONE, Operation, Order, Parts, Slots};
use crate::scalar::Scalar;
use crate::syntax::{Operand, Space};

/// Qualifiers about caches, which change no value.
const CACHES: &[&str] = &["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified"];

impl<'a> Decoder<'a> {
    pub(super) fn data(&mut self, o: &Opcode<'a>) -> Result<bool, LoadError> {
        match o.name() {
            "mov" => self.mov(o)?,
            "selp" => self.select(o)?,
            "ld" | "ldu" => self.load_or_store(o, true)?,
            "st" => self.load_or_store(o, false)?,
            "atom" | "red" => self.atomic(o)?,
            "cvta" => self.cvta(o)?,
            "isspacep" => {
                let Some(space) = space_of(o) else { return self.error("no state space is named") };
                let (to, a) = (self.target(0, Scalar::Predicate)?, self.source(1, Scalar::U64)?);
                self.emit(Operation::InSpace(space), Slots { to, a, ..Slots::NONE });
            }
            "prefetch" | "prefetchu" | "applypriority" | "discard" => {
                space_of(o);
                o.ignore(&["L1", "L2", "tensormap"]);
                o.ignore_beginning(&["L2::", "L1::"]);
            }
            "createpolicy" => {
                o.ignore_beginning(&["fractional", "range", "L2::", "b64", "cvt"]);
                let (to, zero) = (self.target(0, Scalar::B64)?, self.constant_double(0));
                self.emit(Operation::MoveDouble, Slots { to, a: zero, ..Slots::NONE });
            }
            "bra" => {
                o.ignore(&["uni"]);
                let Operand::Name(label) = self.operand(0)? else { return self.error("a branch needs a label") };
                self.jump_later(vec![label]);
                self.emit(Operation::Branch(0), Slots::NONE);
            }
            "brx" => {
                o.ignore(&["idx", "uni"]);
                let a = self.source(0, Scalar::U32)?;
                let Operand::Name(name) = self.operand(1)? else { return self.error("a branch table needs a name") };
                let Some(labels) = self.targets(name) else { return self.error(format!("branch table `{name}` is nowhere")) };
                self.jump_later(labels);
                self.emit(Operation::BranchTable(Box::default()), Slots { a, ..Slots::NONE });
            }
            "call" => {
                o.ignore(&["uni"]);
                self.call()?;
            }
            "ret" => {
                o.ignore(&["uni"]);
                self.return_or_exit();
            }
            "exit" => self.emit(Operation::Exit, Slots::NONE),
            "trap" => self.emit(Operation::Trap("trap"), Slots::NONE),
            "brkpt" => self.emit(Operation::Trap("brkpt"), Slots::NONE),
            "nanosleep" | "pmevent" | "setmaxnreg" | "griddepcontrol" => {
                o.ignore(&["u32", "inc", "dec", "sync", "aligned", "launch_dependents", "wait", "mask"]);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn mov(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        let Some(&scalar) = o.scalars().first() else { return self.error("no type is named") };
        let (to, from) = (self.operand(0)?, self.operand(1)?);
        if let (Operand::List(parts), _) | (_, Operand::List(parts)) = (to, from) {
            return self.pack_or_unpack(scalar, parts, matches!(to, Operand::List(_)));
        }
        let operation = match scalar.bytes() {
            0 => Operation::MovePredicate,
            8 => Operation::MoveDouble,
            _ => Operation::MoveWord,
        };
        if let Operand::Name("%clock" | "%clock_hi" | "%clock64" | "%globaltimer" | "%globaltimer_lo") = from {
            let to = self.target(0, scalar)?;
            // A double in `to`, a word in `a`.
            let slots = if scalar.bytes() == 8 { Slots { to, ..Slots::NONE } } else { Slots { a: to, ..Slots::NONE } };
            self.emit(Operation::Clock, slots);
            return Ok(());
        }
        let (to, a) = (self.target(0, scalar)?, self.source(1, scalar)?);
        self.emit(operation, Slots { to, a, ..Slots::NONE });
        Ok(())
    }

    fn pack_or_unpack(&mut self, scalar: Scalar, parts: &'a [Operand<'a>], unpack: bool) -> Result<(), LoadError> {
        let wide = scalar.bytes() == 8;
        let bits = 8 * scalar.bytes() as u32 / parts.len().max(1) as u32;
        let part = match bits {
            8 => Scalar::B8,
            16 => Scalar::B16,
            32 => Scalar::B32,
            _ => return self.error(format!("a vector of {} parts", parts.len())),
        };
        let mut slots = Vec::new();
        for operand in parts {
            slots.push(if unpack { self.target_of(operand, part)? } else { self.word(operand, part)? });
        }
        let parts = Box::new(Parts { bits, wide, slots });
        if unpack {
            let a = self.source(1, scalar)?;
            self.emit(Operation::Unpack(parts), Slots { a, ..Slots::NONE });
        } else {
            let to = self.target(0, scalar)?;
            self.emit(Operation::Pack(parts), Slots { to, ..Slots::NONE });
        }
        Ok(())
    }

    fn select(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        let Some(&scalar) = o.scalars().first() else { return self.error("no type is named") };
        let (to, a, b) = (self.target(0, scalar)?, self.source(1, scalar)?, self.source(2, scalar)?);
        let c = self.source(3, Scalar::Predicate)?;
        let operation = if scalar.bytes() == 8 { Operation::SelectDouble } else { Operation::SelectWord };
        self.emit(operation, Slots { to, a, b, c });
        Ok(())
    }

    fn cvta(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        let Some(&scalar) = o.scalars().first() else { return self.error("no type is named") };
        if scalar.bytes() != 8 {
            return self.error("addresses of 32 bits are not supported");
        }
        let operator = if o.take("to") { Integer::Subtract } else { Integer::Add };
        let window = match space_of(o) {
            Some(Space::Shared) => SHARED_WINDOW,
            Some(Space::Local) => LOCAL_WINDOW,
            Some(Space::Parameter) => PARAMETER_WINDOW,
            Some(Space::Global | Space::Constant) => 0,
            None => return self.error("no state space is named"),
        };
        let (to, a, b) = (self.target(0, scalar)?, self.source(1, scalar)?, self.constant_double(window));
        self.emit(Operation::Integer(operator, Kind::U64), Slots { to, a, b, c: NONE });
        Ok(())
    }

    fn load_or_store(&mut self, o: &Opcode<'a>, load: bool) -> Result<(), LoadError> {
        let Some(&scalar) = o.scalars().first() else { return self.error("no type is named") };
        let mut space = space_of(o);
        let order = order(o).unwrap_or(Order::Weak);
        o.ignore(CACHES);
        o.ignore_beginning(&["L1::", "L2::", "level::"]);
        let count = o.pick(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
        let (address, value) = if load { (1, 0) } else { (0, 1) };
        let Operand::Address(base, ..) = self.operand(address)? else { return self.error("no address is named") };
        // Parameters of functions written out in place are variables in local memory.
        if space == Some(Space::Parameter)
            && matches!(**base, Operand::Name(name) if matches!(self.find(name), Some(super::Binding::Local(_))))
        {
            space = Some(Space::Local);
        }
        let place = self.address(self.operand(address)?)?;
        let mut elements = Vec::new();
        for operand in self.list(self.operand(value)?) {
            elements.push(self.element(operand, scalar, load)?);
        }
        if elements.len() != count {
            return self.error(format!("{} registers for {count} elements", elements.len()));
        }
        let access = Box::new(Access { space, address: place, scalar, elements, order });
        self.emit(if load { Operation::Load(access) } else { Operation::Store(access) }, Slots::NONE);
        Ok(())
    }

    fn atomic(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        let Some(&scalar) = o.scalars().first() else { return self.error("no type is named") };
        let space = space_of(o);
        let order = order(o).unwrap_or(Order::Relaxed);
        o.ignore_beginning(&["level::", "L2::"]);
        o.ignore(&["noftz"]);
        o.ignore(&["v2", "v4", "v8"]); // counted by their registers
        let operator = o.pick(&[
            ("add", AtomicOperator::Add),
            ("min", AtomicOperator::Minimum),
            ("max", AtomicOperator::Maximum),
            ("and", AtomicOperator::And),
            ("or", AtomicOperator::Or),
            ("xor", AtomicOperator::Xor),
            ("exch", AtomicOperator::Exchange),
            ("cas", AtomicOperator::CompareExchange),
            ("inc", AtomicOperator::Increment),
            ("dec", AtomicOperator::Decrement),
        ]);
        let Some(operator) = operator else { return self.error("no operation is named") };
        let ordered = !matches!(operator, AtomicOperator::Add | AtomicOperator::Minimum | AtomicOperator::Maximum);
        if scalar.float() && ordered && operator != AtomicOperator::Exchange {
            return self.error("this operation is for whole numbers");
        }
        let first = usize::from(o.name() == "atom");
        let address = self.address(self.operand(first)?)?;
        let mut values = Vec::new();
        for operand in self.list(self.operand(first + 1)?) {
            values.push(self.source_of(operand, scalar)?);
        }
        let mut results = Vec::new();
        if first == 1 {
            for operand in self.list(self.operand(0)?) {
                results.push(self.target_of(operand, scalar)?);
            }
        }
        let replacement = if operator == AtomicOperator::CompareExchange { self.source(first + 2, scalar)? } else { NONE };
        let atomic = Atomic { space, address, scalar, operator, results, values, replacement, order };
        self.emit(Operation::Atomic(Box::new(atomic)), Slots::NONE);
        Ok(())
    }

    pub(super) fn source_of(&mut self, operand: &'a Operand<'a>, scalar: Scalar) -> Result<u32, LoadError> {
        if scalar.bytes() == 8 { self.double(operand) } else { self.word(operand, scalar) }
    }

    /// An address whose space the opcode fixes, as the slot-and-offset form of a shared address.
    pub(super) fn shared_address(&mut self, index: usize) -> Result<Address, LoadError> {
        self.address(self.operand(index)?)
    }
}

/// The order an opcode names, and its scope, which is taken for the whole device.
fn order(o: &Opcode<'_>) -> Option<Order> {
    o.ignore(&["weak", "cta", "cluster", "gpu", "sys"]);
    o.pick(&[
        ("relaxed", Order::Relaxed),
        ("volatile", Order::Relaxed),
        ("mmio", Order::Relaxed),
        ("acquire", Order::Acquire),
        ("release", Order::Release),
        ("acq_rel", Order::AcquireRelease),
    ])
}

pub(super) fn space_of(o: &Opcode<'_>) -> Option<Space> {
    o.pick(&[
        ("param", Space::Parameter),
        ("param::entry", Space::Parameter),
        ("param::func", Space::Parameter),
        ("global", Space::Global),
        ("shared", Space::Shared),
        ("shared::cta", Space::Shared),
        ("shared::cluster", Space::Shared),
        ("local", Space::Local),
        ("const", Space::Constant),
    ])
}
