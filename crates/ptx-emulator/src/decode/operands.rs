//! Operands to slots. Immediates, special registers and addresses of variables become slots that are filled before a block starts.
//!
//! Invariant: a slot that is returned belongs to the file of the type it was asked for.

use super::{Binding, Decoder};
use crate::fault::LoadError;
use crate::instruction::{Address, Element, NONE, Operation, Slots};
use crate::kernel::Special;
use crate::scalar::Scalar;
use crate::syntax::Operand;

impl<'a> Decoder<'a> {
    /// What a name stands for here.
    pub(super) fn find(&self, name: &str) -> Option<Binding> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = name[stem.len()..].parse::<u32>().ok();
        self.scopes[self.floor..].iter().rev().find_map(|scope| {
            let ranged = || {
                let range = scope.ranges.get(stem)?;
                number.filter(|n| *n < range.count).map(|n| Binding::Register(range.scalar, range.begin + n))
            };
            scope.names.get(name).copied().or_else(ranged)
        })
    }

    pub(super) fn new_word(&mut self) -> u32 {
        self.kernel.words += 1;
        self.kernel.words as u32 - 1
    }

    pub(super) fn new_double(&mut self) -> u32 {
        self.kernel.doubles += 1;
        self.kernel.doubles as u32 - 1
    }

    pub(super) fn new_predicate(&mut self) -> u32 {
        self.kernel.predicates += 1;
        self.kernel.predicates as u32 - 1
    }

    pub(super) fn constant_word(&mut self, value: u32) -> u32 {
        if let Some(slot) = self.constant_words.get(&value) {
            return *slot;
        }
        let slot = self.new_word();
        self.constant_words.insert(value, slot);
        self.kernel.constant_words.push((slot, value));
        slot
    }

    pub(super) fn constant_double(&mut self, value: u64) -> u32 {
        if let Some(slot) = self.constant_doubles.get(&value) {
            return *slot;
        }
        let slot = self.new_double();
        self.constant_doubles.insert(value, slot);
        self.kernel.constant_doubles.push((slot, value));
        slot
    }

    fn special_word(&mut self, special: Special) -> u32 {
        if let Some(slot) = self.specials.get(&special) {
            return *slot;
        }
        let slot = self.new_word();
        self.specials.insert(special, slot);
        self.kernel.special_words.push((slot, special));
        slot
    }

    fn unknown<T>(&self, name: &str) -> Result<T, LoadError> {
        self.error(format!("`{name}` is not declared and is no special register the emulator knows"))
    }

    /// A source in a word.
    pub(super) fn word(&mut self, operand: &'a Operand<'a>, scalar: Scalar) -> Result<u32, LoadError> {
        let mask = if scalar.bytes() < 4 { (1u64 << (8 * scalar.bytes())) - 1 } else { u64::from(u32::MAX) };
        match operand {
            Operand::Integer(value) => Ok(self.constant_word((*value as u64 & mask) as u32)),
            Operand::Single(bits) => Ok(self.constant_word(*bits)),
            Operand::Double(bits) => Ok(self.constant_word((f64::from_bits(*bits) as f32).to_bits())),
            Operand::Name(name) => match self.find(name) {
                Some(Binding::Register(scalar, slot)) if matches!(scalar.bytes(), 1..=4) => Ok(slot),
                Some(Binding::Register(..)) => self.error(format!("register `{name}` is not of 32 bits or less")),
                Some(Binding::Shared(address)) => Ok(self.constant_word(address)),
                Some(Binding::DynamicShared) => Ok(self.special_word(Special::DynamicBegin)),
                Some(other) => self.error(format!("the address of `{name}` ({other:?}) does not fit 32 bits")),
                None if *name == "WARP_SZ" => Ok(self.constant_word(32)),
                None => match special(name) {
                    Some(special) => Ok(self.special_word(special)),
                    None => self.unknown(name),
                },
            },
            Operand::Sum(name, offset) => match self.find(name) {
                Some(Binding::Shared(address)) => Ok(self.constant_word(address.wrapping_add(*offset as u32))),
                other => self.error(format!("`{name}` ({other:?}) plus a number does not fit 32 bits")),
            },
            other => self.error(format!("{other:?} stands where a 32-bit value should")),
        }
    }

    /// A source in a double.
    pub(super) fn double(&mut self, operand: &'a Operand<'a>) -> Result<u32, LoadError> {
        let (name, offset) = match operand {
            Operand::Integer(value) => return Ok(self.constant_double(*value as u64)),
            Operand::Double(bits) => return Ok(self.constant_double(*bits)),
            Operand::Single(bits) => return Ok(self.constant_double(f64::from(f32::from_bits(*bits)).to_bits())),
            Operand::Name(name) => (name, 0),
            Operand::Sum(name, offset) => (name, *offset as u64),
            other => return self.error(format!("{other:?} stands where a 64-bit value should")),
        };
        match self.find(name) {
            Some(Binding::Register(scalar, slot)) if scalar.bytes() == 8 && offset == 0 => Ok(slot),
            Some(Binding::Register(..)) => self.error(format!("register `{name}` is not of 64 bits")),
            Some(Binding::Shared(address)) => Ok(self.constant_double(u64::from(address).wrapping_add(offset))),
            Some(Binding::Local(address)) => Ok(self.constant_double(address.wrapping_add(offset))),
            Some(Binding::Parameter(address)) => Ok(self.constant_double((address as u64).wrapping_add(offset))),
            Some(Binding::DynamicShared) => {
                let slot = self.new_double();
                self.kernel.dynamic_doubles.push((slot, offset));
                Ok(slot)
            }
            Some(Binding::Image(address)) => {
                let slot = self.new_double();
                self.kernel.image_doubles.push((slot, address.wrapping_add(offset)));
                Ok(slot)
            }
            None => self.unknown(name),
        }
    }

    /// A source in the file of its type.
    pub(super) fn source(&mut self, index: usize, scalar: Scalar) -> Result<u32, LoadError> {
        let operand = self.operand(index)?;
        match scalar.bytes() {
            0 => self.predicate(operand),
            8 => self.double(operand),
            _ => self.word(operand, scalar),
        }
    }

    /// A destination in the file of its type; `_` becomes a register nobody reads.
    pub(super) fn target(&mut self, index: usize, scalar: Scalar) -> Result<u32, LoadError> {
        let operand = self.operand(index)?;
        self.target_of(operand, scalar)
    }

    pub(super) fn target_of(&mut self, operand: &'a Operand<'a>, scalar: Scalar) -> Result<u32, LoadError> {
        match operand {
            Operand::Name("_") => Ok(match scalar.bytes() {
                0 => self.new_predicate(),
                8 => self.new_double(),
                _ => self.new_word(),
            }),
            Operand::Name(name) => match self.find(name) {
                Some(Binding::Register(..)) => match scalar.bytes() {
                    0 => self.predicate(operand),
                    8 => self.double(operand),
                    _ => self.word(operand, scalar),
                },
                _ => self.error(format!("`{name}` is no register")),
            },
            other => self.error(format!("{other:?} stands where a register should")),
        }
    }

    pub(super) fn predicate(&mut self, operand: &Operand<'_>) -> Result<u32, LoadError> {
        match operand {
            Operand::Name(name) => match self.find(name) {
                Some(Binding::Register(Scalar::Predicate, slot)) => Ok(slot),
                _ => self.error(format!("`{name}` is no predicate")),
            },
            Operand::Integer(value) => {
                let slot = self.new_predicate();
                self.kernel.constant_predicates.push((slot, *value != 0));
                Ok(slot)
            }
            other => self.error(format!("{other:?} stands where a predicate should")),
        }
    }

    /// A predicate that may be inverted: slot and whether it is.
    pub(super) fn signed_predicate(&mut self, index: usize) -> Result<(u32, bool), LoadError> {
        match self.operand(index)? {
            Operand::Not(name) => Ok((self.predicate(&Operand::Name(name))?, true)),
            operand => Ok((self.predicate(operand)?, false)),
        }
    }

    /// A word, also where a 64-bit register holds it: the low half then.
    pub(super) fn low_word(&mut self, operand: &'a Operand<'a>, scalar: Scalar) -> Result<u32, LoadError> {
        if !self.is_double(operand) {
            return self.word(operand, scalar);
        }
        let (from, low, high) = (self.double(operand)?, self.new_word(), self.new_word());
        let parts = crate::instruction::Parts { bits: 32, wide: true, slots: vec![low, high] };
        self.emit(Operation::Unpack(Box::new(parts)), Slots { a: from, ..Slots::NONE });
        Ok(low)
    }

    /// Whether an operand is a 64-bit register.
    pub(super) fn is_double(&self, operand: &Operand<'_>) -> bool {
        let Operand::Name(name) = operand else { return false };
        matches!(self.find(name), Some(Binding::Register(scalar, _)) if scalar.bytes() == 8)
    }

    /// `{a, b}` or a single operand.
    pub(super) fn list(&self, operand: &'a Operand<'a>) -> &'a [Operand<'a>] {
        match operand {
            Operand::List(list) => list,
            single => std::slice::from_ref(single),
        }
    }

    /// The registers of a list, all words.
    pub(super) fn words(&mut self, index: usize, scalar: Scalar) -> Result<Vec<u32>, LoadError> {
        let list = self.list(self.operand(index)?);
        list.iter().map(|operand| self.word(operand, scalar)).collect()
    }

    pub(super) fn address(&mut self, operand: &'a Operand<'a>) -> Result<Address, LoadError> {
        let Operand::Address(base, offset, _) = operand else { return self.error(format!("{operand:?} is no address")) };
        let fixed = |address: u64| Address { slot: NONE, wide: true, offset: (address as i64).wrapping_add(*offset) };
        if let Operand::Integer(value) = **base {
            return Ok(fixed(value as u64));
        }
        let Operand::Name(name) = **base else { return self.error(format!("{base:?} is no address")) };
        match self.find(name) {
            Some(Binding::Register(scalar, slot)) => match scalar.bytes() {
                8 => Ok(Address { slot, wide: true, offset: *offset }),
                4 => Ok(Address { slot, wide: false, offset: *offset }),
                _ => self.error(format!("register `{name}` is too narrow for an address")),
            },
            Some(Binding::Shared(address)) => Ok(fixed(u64::from(address))),
            Some(Binding::Local(address)) => Ok(fixed(address)),
            Some(Binding::Parameter(address)) => Ok(fixed(address as u64)),
            Some(Binding::DynamicShared | Binding::Image(_)) => {
                let slot = self.double(base)?;
                Ok(Address { slot, wide: true, offset: *offset })
            }
            None => self.unknown(name),
        }
    }

    /// A register of a load (a destination) or of a store.
    pub(super) fn element(&mut self, operand: &'a Operand<'a>, scalar: Scalar, load: bool) -> Result<Element, LoadError> {
        if scalar.bytes() == 8 {
            let slot = if load { self.target_of(operand, scalar)? } else { self.double(operand)? };
            return Ok(Element { slot, wide: true, bits: 64 });
        }
        if !load {
            return Ok(Element { slot: self.low_word(operand, scalar)?, wide: false, bits: 32 });
        }
        if self.is_double(operand) {
            return Ok(Element { slot: self.double(operand)?, wide: true, bits: 64 });
        }
        let bits = match operand {
            Operand::Name(name) => match self.find(name) {
                Some(Binding::Register(scalar, _)) => 8 * scalar.bytes() as u32,
                _ => 32,
            },
            _ => 32,
        };
        Ok(Element { slot: self.target_of(operand, scalar)?, wide: false, bits })
    }
}

fn special(name: &str) -> Option<Special> {
    Some(match name {
        "%tid.x" => Special::ThreadX,
        "%tid.y" => Special::ThreadY,
        "%tid.z" => Special::ThreadZ,
        "%ntid.x" => Special::ThreadsX,
        "%ntid.y" => Special::ThreadsY,
        "%ntid.z" => Special::ThreadsZ,
        "%ctaid.x" => Special::BlockX,
        "%ctaid.y" => Special::BlockY,
        "%ctaid.z" => Special::BlockZ,
        "%nctaid.x" => Special::BlocksX,
        "%nctaid.y" => Special::BlocksY,
        "%nctaid.z" => Special::BlocksZ,
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%nwarpid" => Special::Warps,
        "%lanemask_eq" => Special::MaskEqual,
        "%lanemask_lt" => Special::MaskLess,
        "%lanemask_le" => Special::MaskLessEqual,
        "%lanemask_gt" => Special::MaskGreater,
        "%lanemask_ge" => Special::MaskGreaterEqual,
        "%dynamic_smem_size" => Special::SharedDynamic,
        "%total_smem_size" => Special::SharedTotal,
        // Every block is a cluster of its own, on one multiprocessor.
        "%smid" | "%gridid" | "%cluster_ctarank" | "%cluster_ctaid.x" | "%cluster_ctaid.y" | "%cluster_ctaid.z" => Special::Zero,
        "%nsmid" | "%cluster_nctarank" | "%cluster_nctaid.x" | "%cluster_nctaid.y" | "%cluster_nctaid.z" => Special::One,
        _ => return None,
    })
}
