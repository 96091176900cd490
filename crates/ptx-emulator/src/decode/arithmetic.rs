//! Instructions on whole numbers, bits and predicates.
//!
//! Invariant: sources and destination lie in the files of their types; counts of shifts and fields are words whatever the type.

use super::Decoder;
use super::opcode::Opcode;
use crate::fault::LoadError;
use crate::instruction::{Answer, Carry, Class, Compare, Condition, Integer, Kind, Logic, NONE, Operation, Slots, Test, WordOperator};
use crate::scalar::Scalar;
use crate::syntax::Operand;

pub(super) fn kind(scalar: Scalar) -> Option<Kind> {
    Some(match scalar {
        Scalar::U16 | Scalar::B16 => Kind::U16,
        Scalar::S16 => Kind::S16,
        Scalar::U32 | Scalar::B32 => Kind::U32,
        Scalar::S32 => Kind::S32,
        Scalar::U64 | Scalar::B64 => Kind::U64,
        Scalar::S64 => Kind::S64,
        _ => return None,
    })
}

impl<'a> Decoder<'a> {
    pub(super) fn arithmetic(&mut self, o: &Opcode<'a>) -> Result<bool, LoadError> {
        match o.name() {
            "setp" | "set" => self.compare(o)?,
            "cvt" => self.convert(o)?,
            "testp" => self.classify(o)?,
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "neg" | "abs" | "and" | "or" | "xor" | "not"
            | "shl" | "shr" | "popc" | "clz" | "brev" | "bfind" | "bfe" | "bfi" | "prmt" | "shf" | "lop3" | "sad" | "addc" | "subc"
            | "mul24" | "mad24" | "dp4a" | "copysign" | "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => {
                let scalars = o.scalars();
                let Some(&scalar) = scalars.last() else { return self.error("no type is named") };
                match scalar {
                    Scalar::Predicate => self.logic(o)?,
                    Scalar::F32 | Scalar::F64 => self.float(o, scalar)?,
                    Scalar::F16 | Scalar::Bf16 | Scalar::F16x2 | Scalar::Bf16x2 => self.half(o, scalar)?,
                    _ => self.integer(o, scalar, &scalars)?,
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn logic(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        let operator = match o.name() {
            "and" => Logic::And,
            "or" => Logic::Or,
            "xor" => Logic::Xor,
            "not" => Logic::Not,
            _ => return self.error("the emulator has no such instruction on predicates"),
        };
        let (to, a) = (self.target(0, Scalar::Predicate)?, self.source(1, Scalar::Predicate)?);
        let b = if operator == Logic::Not { a } else { self.source(2, Scalar::Predicate)? };
        self.emit(Operation::Logic(operator), Slots { to, a, b, c: NONE });
        Ok(())
    }

    fn integer(&mut self, o: &Opcode<'a>, scalar: Scalar, scalars: &[Scalar]) -> Result<(), LoadError> {
        let Some(kind) = kind(scalar) else { return self.error("the emulator has no such instruction on this type") };
        if o.take("cc") || matches!(o.name(), "addc" | "subc") {
            return self.carry(o, scalar);
        }
        if o.take("wide") {
            return self.wide(o, scalar, kind);
        }
        let saturating = o.take("sat");
        let high = o.take("hi");
        o.ignore(&["lo"]);
        let operator = match o.name() {
            "add" if saturating => Integer::AddSaturating,
            "sub" if saturating => Integer::SubtractSaturating,
            _ if saturating => return self.error("the emulator has no saturating form of this"),
            "add" => Integer::Add,
            "sub" => Integer::Subtract,
            "mul" => {
                if high {
                    Integer::MultiplyHigh
                } else {
                    Integer::Multiply
                }
            }
            "mad" => {
                if high {
                    Integer::MultiplyAddHigh
                } else {
                    Integer::MultiplyAdd
                }
            }
            "div" => Integer::Divide,
            "rem" => Integer::Remainder,
            "min" => Integer::Minimum,
            "max" => Integer::Maximum,
            "and" => Integer::And,
            "or" => Integer::Or,
            "xor" => Integer::Xor,
            "not" => Integer::Not,
            "neg" => Integer::Negate,
            "abs" => Integer::Absolute,
            "shl" => Integer::ShiftLeft,
            "shr" => Integer::ShiftRight,
            "popc" => Integer::CountOnes,
            "clz" => Integer::CountLeadingZeros,
            "brev" => Integer::ReverseBits,
            "bfind" => Integer::FindLeadingOne,
            "sad" => Integer::SumOfDifferences,
            "bfe" => Integer::ExtractField,
            _ => return self.word_operation(o, scalar, scalars, high),
        };
        let to_scalar = match operator {
            Integer::CountOnes | Integer::CountLeadingZeros | Integer::FindLeadingOne => Scalar::U32,
            _ => scalar,
        };
        let to = self.target(0, to_scalar)?;
        let a = self.source(1, scalar)?;
        let b = match operator {
            Integer::Not | Integer::Negate | Integer::Absolute | Integer::ReverseBits => NONE,
            Integer::CountOnes | Integer::CountLeadingZeros | Integer::FindLeadingOne => NONE,
            Integer::ShiftLeft | Integer::ShiftRight | Integer::ExtractField => self.source(2, Scalar::U32)?,
            _ => self.source(2, scalar)?,
        };
        let c = match operator {
            Integer::MultiplyAdd | Integer::MultiplyAddHigh | Integer::SumOfDifferences => self.source(3, scalar)?,
            Integer::ExtractField => self.source(3, Scalar::U32)?,
            _ => NONE,
        };
        self.emit(Operation::Integer(operator, kind), Slots { to, a, b, c });
        Ok(())
    }

    /// `mul.wide` and `mad.wide`: the result has twice the bits.
    fn wide(&mut self, o: &Opcode<'a>, scalar: Scalar, kind: Kind) -> Result<(), LoadError> {
        let result = match scalar.bytes() {
            2 => Scalar::U32,
            4 => Scalar::U64,
            _ => return self.error("the result would have 128 bits"),
        };
        let (to, a, b) = (self.target(0, result)?, self.source(1, scalar)?, self.source(2, scalar)?);
        let adds = o.name() == "mad";
        let c = if adds { self.source(3, result)? } else { NONE };
        self.emit(Operation::Wide(kind, adds), Slots { to, a, b, c });
        Ok(())
    }

    fn carry(&mut self, o: &Opcode<'a>, scalar: Scalar) -> Result<(), LoadError> {
        if !matches!(o.name(), "add" | "addc" | "sub" | "subc") {
            return self.error("the emulator has carries for additions and subtractions alone");
        }
        let carry =
            Carry { subtract: o.name().starts_with("sub"), takes: o.name().ends_with('c'), gives: o.take("cc"), wide: scalar.bytes() == 8 };
        let (to, a, b) = (self.target(0, scalar)?, self.source(1, scalar)?, self.source(2, scalar)?);
        self.emit(Operation::Carry(carry), Slots { to, a, b, c: NONE });
        Ok(())
    }

    fn word_operation(&mut self, o: &Opcode<'a>, scalar: Scalar, scalars: &[Scalar], high: bool) -> Result<(), LoadError> {
        if o.name() == "bfi" {
            let (to, a, b) = (self.target(0, scalar)?, self.source(1, scalar)?, self.source(2, scalar)?);
            let (position, length) = (self.source(3, Scalar::U32)?, self.source(4, Scalar::U32)?);
            let wide = scalar.bytes() == 8;
            self.emit(Operation::InsertField(Box::new([a, b, position, length]), wide), Slots { to, ..Slots::NONE });
            return Ok(());
        }
        if scalar.bytes() != 4 {
            return self.error("the emulator has this for 32 bits alone");
        }
        let operator = match o.name() {
            "prmt" => match o.pick(&[("f4e", 0), ("b4e", 1), ("rc8", 2), ("ecl", 3), ("ecr", 4), ("rc16", 5)]) {
                Some(mode) => WordOperator::PermuteMode(mode),
                None => WordOperator::Permute,
            },
            "shf" => {
                let left = o.take("l");
                o.ignore(&["r"]);
                let clamp = o.take("clamp");
                o.ignore(&["wrap"]);
                WordOperator::Funnel(left, clamp)
            }
            "lop3" => match self.operand(4)? {
                Operand::Integer(table) => WordOperator::Logic3(*table as u8),
                other => return self.error(format!("{other:?} is no table")),
            },
            "dp4a" => WordOperator::DotBytes(scalars[0].signed(), scalar.signed()),
            "mul24" | "mad24" if !high => WordOperator::Multiply24(scalar.signed(), o.name() == "mad24"),
            _ => return self.error("the emulator has no such instruction on whole numbers"),
        };
        let (to, a, b) = (self.target(0, scalar)?, self.source(1, scalar)?, self.source(2, scalar)?);
        let c = if o.name() == "mul24" { a } else { self.source(3, Scalar::U32)? };
        self.emit(Operation::Word(operator), Slots { to, a, b, c });
        Ok(())
    }

    fn classify(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        let test = o.pick(&[
            ("finite", Test::Finite),
            ("infinite", Test::Infinite),
            ("number", Test::Number),
            ("notanumber", Test::NotANumber),
            ("normal", Test::Normal),
            ("subnormal", Test::Subnormal),
        ]);
        let (Some(test), Some(&scalar)) = (test, o.scalars().first()) else { return self.error("no test or no type is named") };
        let (to, a) = (self.target(0, Scalar::Predicate)?, self.source(1, scalar)?);
        self.emit(Operation::Classify(Class { test, wide: scalar.bytes() == 8 }), Slots { to, a, ..Slots::NONE });
        Ok(())
    }

    fn compare(&mut self, o: &Opcode<'a>) -> Result<(), LoadError> {
        let scalars = o.scalars();
        let Some(&scalar) = scalars.last() else { return self.error("no type is named") };
        let Some(condition) = condition(o, scalar) else { return self.error("no comparison is named") };
        let combine = o.pick(&[("and", Logic::And), ("or", Logic::Or), ("xor", Logic::Xor)]).unwrap_or(Logic::None);
        let flush = o.take("ftz");
        let pair = matches!(scalar, Scalar::F16x2 | Scalar::Bf16x2);
        let (answer, to, second) = match (o.name(), self.operand(0)?) {
            ("set", _) if pair => return self.error("the emulator has no `set` on pairs"),
            ("set", _) => (Answer::Word(scalars[0] == Scalar::F32), self.target(0, scalars[0])?, NONE),
            (_, Operand::Pair(first, second)) => {
                let (first, second) = (self.predicate(&Operand::Name(first))?, self.predicate(&Operand::Name(second))?);
                (Answer::Predicate, first, second)
            }
            _ if pair => return self.error("a comparison of pairs needs two predicates"),
            _ => (Answer::Predicate, self.target(0, Scalar::Predicate)?, NONE),
        };
        let (a, b) = (self.source(1, scalar)?, self.source(2, scalar)?);
        let (c, invert) = if combine == Logic::None { (NONE, false) } else { self.signed_predicate(3)? };
        let compare = Compare { condition, scalar, flush, combine, invert, answer, second };
        self.emit(Operation::Compare(compare), Slots { to, a, b, c });
        Ok(())
    }
}

fn condition(o: &Opcode<'_>, scalar: Scalar) -> Option<Condition> {
    let ordered = [
        ("eq", Condition::Equal),
        ("ne", Condition::NotEqual),
        ("lt", Condition::Less),
        ("le", Condition::LessEqual),
        ("gt", Condition::Greater),
        ("ge", Condition::GreaterEqual),
    ];
    let whole = [("lo", Condition::Less), ("ls", Condition::LessEqual), ("hi", Condition::Greater), ("hs", Condition::GreaterEqual)];
    let unordered = [
        ("equ", Condition::EqualUnordered),
        ("neu", Condition::NotEqualUnordered),
        ("ltu", Condition::LessUnordered),
        ("leu", Condition::LessEqualUnordered),
        ("gtu", Condition::GreaterUnordered),
        ("geu", Condition::GreaterEqualUnordered),
        ("num", Condition::Numbers),
        ("nan", Condition::AnyNan),
    ];
    o.pick(&ordered).or_else(|| if scalar.float() { o.pick(&unordered) } else { o.pick(&whole) })
}
