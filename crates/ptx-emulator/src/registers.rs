//! The registers of one warp: every register is an array of 32 lanes.
//!
//! Invariant: a word that holds a type under 32 bits is zero above it. A write changes the lanes of its mask alone.

pub(crate) const LANES: usize = 32;

/// One bit per lane.
pub(crate) type Mask = u32;

#[derive(Clone, Debug)]
pub(crate) struct Registers {
    pub(crate) words: Vec<[u32; LANES]>,
    pub(crate) doubles: Vec<[u64; LANES]>,
    pub(crate) predicates: Vec<Mask>,
    /// The carry of `add.cc` and its kin.
    pub(crate) carry: Mask,
}

/// A value of one lane, and the file that holds it.
pub(crate) trait Lane: Copy {
    fn read(registers: &Registers, slot: u32) -> [Self; LANES];
    fn write(registers: &mut Registers, slot: u32, mask: Mask, value: impl Fn(usize) -> Self);
}

macro_rules! lane {
    ($type:ty, $file:ident, $from:expr, $into:expr) => {
        impl Lane for $type {
            #[inline(always)]
            fn read(registers: &Registers, slot: u32) -> [Self; LANES] {
                // A plain loop: `map` of an array is not vectorised.
                let lanes = &registers.$file[slot as usize];
                let mut values = [<$type>::default(); LANES];
                for (value, lane) in values.iter_mut().zip(lanes) {
                    *value = $from(*lane);
                }
                values
            }

            #[inline(always)]
            fn write(registers: &mut Registers, slot: u32, mask: Mask, value: impl Fn(usize) -> Self) {
                let lanes = &mut registers.$file[slot as usize];
                if mask == !0 {
                    for (lane, out) in lanes.iter_mut().enumerate() {
                        *out = $into(value(lane));
                    }
                } else {
                    for lane in each(mask) {
                        lanes[lane] = $into(value(lane));
                    }
                }
            }
        }
    };
}

lane!(u8, words, |x| x as u8, |x: u8| u32::from(x));
lane!(i8, words, |x| x as i8, |x: i8| u32::from(x as u8));
lane!(u16, words, |x| x as u16, |x: u16| u32::from(x));
lane!(i16, words, |x| x as i16, |x: i16| u32::from(x as u16));
lane!(u32, words, |x| x, |x: u32| x);
lane!(i32, words, |x| x as i32, |x: i32| x as u32);
lane!(f32, words, f32::from_bits, f32::to_bits);
lane!(u64, doubles, |x| x, |x: u64| x);
lane!(i64, doubles, |x| x as i64, |x: i64| x as u64);
lane!(f64, doubles, f64::from_bits, f64::to_bits);

/// The lanes of a mask, from the lowest.
#[inline(always)]
pub(crate) fn each(mask: Mask) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros() as usize;
        (rest != 0).then(|| {
            rest &= rest - 1;
            lane
        })
    })
}

pub(crate) fn first(mask: Mask) -> usize {
    mask.trailing_zeros() as usize
}

impl Registers {
    /// New registers hold all ones: a NaN, and an address nobody has.
    pub(crate) fn new(words: usize, doubles: usize, predicates: usize) -> Registers {
        Registers { words: vec![[!0; LANES]; words], doubles: vec![[!0; LANES]; doubles], predicates: vec![0; predicates], carry: 0 }
    }

    #[inline(always)]
    pub(crate) fn word(&self, slot: u32, lane: usize) -> u32 {
        self.words[slot as usize][lane]
    }

    #[inline(always)]
    pub(crate) fn double(&self, slot: u32, lane: usize) -> u64 {
        self.doubles[slot as usize][lane]
    }

    #[inline(always)]
    pub(crate) fn set_predicate(&mut self, slot: u32, mask: Mask, value: Mask) {
        let old = &mut self.predicates[slot as usize];
        *old = (*old & !mask) | (value & mask);
    }

    #[inline(always)]
    pub(crate) fn unary<A: Lane, T: Lane>(&mut self, to: u32, a: u32, mask: Mask, f: impl Fn(A) -> T) {
        let a = A::read(self, a);
        T::write(self, to, mask, |lane| f(a[lane]));
    }

    #[inline(always)]
    pub(crate) fn binary<A: Lane, B: Lane, T: Lane>(&mut self, to: u32, [a, b]: [u32; 2], mask: Mask, f: impl Fn(A, B) -> T) {
        let (a, b) = (A::read(self, a), B::read(self, b));
        T::write(self, to, mask, |lane| f(a[lane], b[lane]));
    }

    #[inline(always)]
    pub(crate) fn ternary<A: Lane, B: Lane, C: Lane, T: Lane>(
        &mut self,
        to: u32,
        [a, b, c]: [u32; 3],
        mask: Mask,
        f: impl Fn(A, B, C) -> T,
    ) {
        let (a, b, c) = (A::read(self, a), B::read(self, b), C::read(self, c));
        T::write(self, to, mask, |lane| f(a[lane], b[lane], c[lane]));
    }

    /// One bit per lane where the comparison holds, for all lanes.
    #[inline(always)]
    pub(crate) fn compare<A: Lane>(&self, [a, b]: [u32; 2], f: impl Fn(A, A) -> bool) -> Mask {
        let (a, b) = (A::read(self, a), A::read(self, b));
        let mut result = 0;
        for lane in 0..LANES {
            result |= u32::from(f(a[lane], b[lane])) << lane;
        }
        result
    }
}
