//! Decoded instructions: what to do, and the register slots to do it with.
//!
//! Invariant: every slot is inside the files of its kernel; every branch target is an index into its code.

use crate::scalar::Scalar;
use crate::syntax::Space;
use crate::transfer::{Bulk, CopyAsync, Mbarrier};

/// A slot that is not there.
pub(crate) const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Slots {
    pub(crate) to: u32,
    pub(crate) a: u32,
    pub(crate) b: u32,
    pub(crate) c: u32,
}

impl Slots {
    pub(crate) const NONE: Slots = Slots { to: NONE, a: NONE, b: NONE, c: NONE };
}

#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub(crate) operation: Operation,
    pub(crate) slots: Slots,
    /// A predicate, or `NONE`.
    pub(crate) guard: u32,
    pub(crate) when: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    MoveWord,
    MoveDouble,
    MovePredicate,
    Pack(Box<Parts>),
    Unpack(Box<Parts>),
    SelectWord,
    SelectDouble,
    Integer(Integer, Kind),
    /// `mul.wide` and, where true, `mad.wide`, by the kind of the factors.
    Wide(Kind, bool),
    Word(WordOperator),
    InsertField(Box<[u32; 4]>, bool),
    Carry(Carry),
    Float(Float, FloatFlags),
    Double(Float),
    Half(Float, HalfFlags),
    Classify(Class),
    Compare(Compare),
    Logic(Logic),
    Convert(Convert),
    /// Two f32 into one word, `a` above `b`.
    ConvertPair(Convert),
    Load(Box<Access>),
    Store(Box<Access>),
    Atomic(Box<Atomic>),
    InSpace(Space),
    /// Instructions of this warp so far, as a clock.
    Clock,
    Branch(u32),
    BranchTable(Box<[u32]>),
    Exit,
    Trap(&'static str),
    Barrier(Barrier),
    WarpBarrier,
    Fence(Fence),
    Shuffle(Box<Shuffle>),
    Vote(Vote),
    /// `match.any` or, where true, `match.all`; the second slot is the predicate.
    Match(bool, bool),
    Reduce(Reduce),
    Elect,
    ActiveMask,
    Multiply(Box<Multiply>),
    LoadMatrix(Box<MatrixMove>),
    StoreMatrix(Box<MatrixMove>),
    CopyAsync(Box<CopyAsync>),
    CopyCommit,
    /// Until at most so many groups are on their way.
    CopyWait(u32),
    Mbarrier(Box<Mbarrier>),
    Bulk(Box<Bulk>),
    BulkCommit,
    BulkWait(u32),
    GroupFence,
    GroupCommit,
    GroupWait(u32),
    GroupMultiply(Box<GroupMultiply>),
}

/// A register cut into parts of so many bits, the lowest first.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) bits: u32,
    pub(crate) wide: bool,
    pub(crate) slots: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Integer {
    Add,
    Subtract,
    Multiply,
    MultiplyHigh,
    MultiplyAdd,
    MultiplyAddHigh,
    Divide,
    Remainder,
    Minimum,
    Maximum,
    And,
    Or,
    Xor,
    Not,
    Negate,
    Absolute,
    ShiftLeft,
    ShiftRight,
    CountOnes,
    CountLeadingZeros,
    ReverseBits,
    FindLeadingOne,
    AddSaturating,
    SubtractSaturating,
    SumOfDifferences,
    ExtractField,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WordOperator {
    Permute,
    PermuteMode(u8),
    /// `shf`, to the left and with clamped counts where true.
    Funnel(bool, bool),
    /// `lop3` with its table.
    Logic3(u8),
    /// `dp4a`, with signed `a` and `b` where true.
    DotBytes(bool, bool),
    /// `mul24`/`mad24`, signed where true; the addend is added where the second is true.
    Multiply24(bool, bool),
}

/// Chains of additions of wide numbers, on words or, where `wide`, on doubles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Carry {
    pub(crate) subtract: bool,
    pub(crate) takes: bool,
    pub(crate) gives: bool,
    pub(crate) wide: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Float {
    Add,
    Subtract,
    Multiply,
    Divide,
    MultiplyAdd,
    Minimum,
    Maximum,
    MinimumNan,
    MaximumNan,
    Negate,
    Absolute,
    CopySign,
    Reciprocal,
    SquareRoot,
    ReciprocalSquareRoot,
    Exponential,
    Logarithm,
    Sine,
    Cosine,
    Tangent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Nearest,
    Zero,
    Down,
    Up,
    /// To nearest, halves away from zero.
    Away,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FloatFlags {
    pub(crate) flush: bool,
    pub(crate) saturate: bool,
    pub(crate) rounding: Rounding,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HalfFormat {
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HalfFlags {
    pub(crate) format: HalfFormat,
    pub(crate) pair: bool,
    pub(crate) flush: bool,
    pub(crate) saturate: bool,
    pub(crate) relu: bool,
}

/// `testp` on f32, or on f64 where true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) test: Test,
    pub(crate) wide: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    Finite,
    Infinite,
    Number,
    NotANumber,
    Normal,
    Subnormal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    EqualUnordered,
    NotEqualUnordered,
    LessUnordered,
    LessEqualUnordered,
    GreaterUnordered,
    GreaterEqualUnordered,
    Numbers,
    AnyNan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
    Not,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Predicate,
    /// `set`: all ones or, where true, 1.0.
    Word(bool),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Compare {
    pub(crate) condition: Condition,
    pub(crate) scalar: Scalar,
    pub(crate) flush: bool,
    /// The result combined with predicate `c`, inverted where `invert`.
    pub(crate) combine: Logic,
    pub(crate) invert: bool,
    pub(crate) answer: Answer,
    /// The second predicate gets the combination of the inverse result.
    pub(crate) second: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Convert {
    pub(crate) to: Scalar,
    pub(crate) from: Scalar,
    pub(crate) rounding: Rounding,
    /// To a whole number of the same floating type.
    pub(crate) integral: bool,
    pub(crate) flush: bool,
    pub(crate) saturate: bool,
    pub(crate) relu: bool,
}

/// A register of a load, a store or an atomic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Element {
    pub(crate) slot: u32,
    pub(crate) wide: bool,
    /// Bits a load extends to: the width of the register.
    pub(crate) bits: u32,
}

/// An address operand: `a` holds it in a word or a double, or nobody does and `offset` is all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub(crate) slot: u32,
    pub(crate) wide: bool,
    pub(crate) offset: i64,
}

/// How an access stands to accesses of other threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Weak,
    /// Also `volatile`, and atomics that name no order.
    Relaxed,
    Acquire,
    Release,
    AcquireRelease,
}

#[derive(Clone, Debug)]
pub(crate) struct Access {
    /// None: a generic address.
    pub(crate) space: Option<Space>,
    pub(crate) address: Address,
    pub(crate) scalar: Scalar,
    pub(crate) elements: Vec<Element>,
    pub(crate) order: Order,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomicOperator {
    Add,
    Minimum,
    Maximum,
    And,
    Or,
    Xor,
    Exchange,
    CompareExchange,
    Increment,
    Decrement,
}

#[derive(Clone, Debug)]
pub(crate) struct Atomic {
    pub(crate) space: Option<Space>,
    pub(crate) address: Address,
    pub(crate) scalar: Scalar,
    pub(crate) operator: AtomicOperator,
    /// Results, empty for `red`.
    pub(crate) results: Vec<u32>,
    pub(crate) values: Vec<u32>,
    /// For compare-exchange: the value to store.
    pub(crate) replacement: u32,
    pub(crate) order: Order,
}

/// `bar`: number and thread count (or `NONE`) are words in `a` and `b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Barrier {
    Sync,
    Arrive,
    CountOnes,
    And,
    Or,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fence {
    Block,
    Device,
    /// Between ordinary and asynchronous accesses.
    Proxy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

/// Value in `a`, lane operand in `b`, clamp in `c`.
#[derive(Clone, Debug)]
pub(crate) struct Shuffle {
    pub(crate) mode: ShuffleMode,
    pub(crate) members: u32,
    pub(crate) in_range: u32,
}

/// Predicate in `a`, members in `b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// `redux`: value in `a`, members in `b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduce {
    Add,
    MinimumSigned,
    MaximumSigned,
    Minimum,
    Maximum,
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatrixType {
    F16,
    Bf16,
    Tf32,
}

/// `mma.sync` m16n8k`depth`.
#[derive(Clone, Debug)]
pub(crate) struct Multiply {
    pub(crate) depth: usize,
    pub(crate) factor: MatrixType,
    /// Sums in f32, else packed f16.
    pub(crate) wide_sum: bool,
    pub(crate) d: Vec<u32>,
    pub(crate) a: Vec<u32>,
    pub(crate) b: Vec<u32>,
    pub(crate) c: Vec<u32>,
}

/// `ldmatrix` and `stmatrix`: one register per 8×8 matrix of 16-bit elements.
#[derive(Clone, Debug)]
pub(crate) struct MatrixMove {
    pub(crate) address: Address,
    pub(crate) transposed: bool,
    pub(crate) registers: Vec<u32>,
}

/// An operand of `wgmma`.
#[derive(Clone, Debug)]
pub(crate) enum GroupFactor {
    Descriptor(u32),
    Registers(Vec<u32>),
}

/// `wgmma.mma_async` m64n`columns`k`depth`.
#[derive(Clone, Debug)]
pub(crate) struct GroupMultiply {
    pub(crate) columns: usize,
    pub(crate) depth: usize,
    pub(crate) factor: MatrixType,
    pub(crate) wide_sum: bool,
    pub(crate) d: Vec<u32>,
    pub(crate) a: GroupFactor,
    pub(crate) b: u32,
    /// Where this predicate is false, the old sum counts as zero.
    pub(crate) keep: u32,
    pub(crate) negate: [bool; 2],
    pub(crate) transposed: [bool; 2],
}
