//! Vectors of sums in registers, and the one step of arithmetic that matrix products are made of.
//!
//! Invariant: `link` is one fused multiply-add in f32 on every kind of lanes, or the two of `vdpbf16ps` in its order and with its flushing
//! (see `micro`).
#![allow(unsafe_code)]

use crate::dtype::Element;
use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m256bh, __m256i, __m512, __m512bh, __m512i, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_storeu_ps, _mm256_storeu_si256, _mm512_add_ps, _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_fpclass_ps_mask, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

/// The widest lanes.
const MOST: usize = 16;

/// A vector of sums and the arithmetic on it.
pub trait Lanes: Copy {
    type Units: Copy;
    const WIDTH: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    /// The values of `WIDTH` elements.
    #[inline(always)]
    unsafe fn widened(from: *const bf16) -> Self {
        let mut floats = [0f32; MOST];
        for (lane, float) in floats.iter_mut().enumerate().take(Self::WIDTH) {
            // SAFETY: the caller vouches for `WIDTH` elements.
            *float = unsafe { *from.add(lane) }.to_f32();
        }
        // SAFETY: there are `WIDTH` of them.
        unsafe { Self::load(floats.as_ptr()) }
    }
    /// The sums, rounded to nearest even.
    #[inline(always)]
    unsafe fn round(self, to: *mut bf16) {
        let mut floats = [0f32; MOST];
        // SAFETY: there are `WIDTH` of them, and the caller vouches for as many places.
        unsafe {
            self.store(floats.as_mut_ptr());
            for (lane, float) in floats.iter().enumerate().take(Self::WIDTH) {
                *to.add(lane) = Element::from_f32(*float);
            }
        }
    }
    /// What a chain that goes on from these sums starts with.
    #[inline(always)]
    unsafe fn begin(self) -> Self {
        self
    }
    unsafe fn units(from: *const u32) -> Self::Units;
    unsafe fn splat(unit: u32) -> Self::Units;
    /// The next link of the chain.
    unsafe fn link(self, a: Self::Units, b: Self::Units) -> Self;
}

/// Eight f32 in plain Rust.
#[derive(Clone, Copy)]
pub struct Plain([f32; 8]);

impl Lanes for Plain {
    type Units = [f32; 8];
    const WIDTH: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Plain([0.0; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for eight elements.
        Plain(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for eight elements.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Plain(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }
    #[inline(always)]
    unsafe fn units(from: *const u32) -> [f32; 8] {
        // SAFETY: the caller vouches for eight units.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(unit: u32) -> [f32; 8] {
        [f32::from_bits(unit); 8]
    }
    #[inline(always)]
    unsafe fn link(self, a: [f32; 8], b: [f32; 8]) -> Self {
        Plain(std::array::from_fn(|lane| a[lane].mul_add(b[lane], self.0[lane])))
    }
}

/// Eight sums of products of bf16, with the flushing of `vdpbf16ps`.
#[derive(Clone, Copy)]
pub struct Flushing([f32; 8]);

impl Lanes for Flushing {
    type Units = [f32; 8];
    const WIDTH: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Flushing([0.0; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for eight elements.
        Flushing(unsafe { Plain::load(from) }.0)
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for eight elements.
        unsafe { Plain(self.0).store(to) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Flushing(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }
    #[inline(always)]
    unsafe fn begin(self) -> Self {
        Flushing(self.0.map(|sum| if sum.is_subnormal() { 0f32.copysign(sum) } else { sum }))
    }
    #[inline(always)]
    unsafe fn units(from: *const u32) -> [f32; 8] {
        // SAFETY: the caller vouches for eight units.
        unsafe { Plain::units(from) }
    }
    #[inline(always)]
    unsafe fn splat(unit: u32) -> [f32; 8] {
        [f32::from_bits(unit); 8]
    }
    #[inline(always)]
    unsafe fn link(self, a: [f32; 8], b: [f32; 8]) -> Self {
        Flushing(std::array::from_fn(|lane| link_flushing(a[lane], b[lane], self.0[lane])))
    }
}

/// One of the two links of a `vdpbf16ps` element: `a` and `b` are bf16 without denormals, `sum` is not denormal.
///
/// A result is too small when it is below 2^-126 after rounding to 24 bits, that is when it lies below 2^-126 - 2^-151. The product is
/// exact in f64 (16 bits), and so is the sum wherever it comes close to that limit.
#[inline(always)]
fn link_flushing(a: f32, b: f32, sum: f32) -> f32 {
    const LIMIT: f64 = f32::MIN_POSITIVE as f64 * (1.0 - 1.0 / (1u64 << 25) as f64);
    let exact = a as f64 * b as f64 + sum as f64;
    let rounded = a.mul_add(b, sum);
    if exact.abs() < LIMIT { 0f32.copysign(rounded) } else { rounded }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for __m256 {
    type Units = __m256;
    const WIDTH: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: only called from functions that have AVX2 and FMA, as all of this impl.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for eight elements.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for eight elements.
        unsafe { _mm256_storeu_ps(to, self) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as for `zero`.
        unsafe { _mm256_add_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn units(from: *const u32) -> __m256 {
        // SAFETY: the caller vouches for eight units.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(unit: u32) -> __m256 {
        // SAFETY: as for `zero`.
        unsafe { _mm256_set1_ps(f32::from_bits(unit)) }
    }
    #[inline(always)]
    unsafe fn link(self, a: __m256, b: __m256) -> Self {
        // SAFETY: as for `zero`.
        unsafe { _mm256_fmadd_ps(a, b, self) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for __m512 {
    type Units = __m512;
    const WIDTH: usize = 16;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: only called from functions that have AVX-512, as all of this impl.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_storeu_ps(to, self) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as for `zero`.
        unsafe { _mm512_add_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn units(from: *const u32) -> __m512 {
        // SAFETY: the caller vouches for sixteen units.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(unit: u32) -> __m512 {
        // SAFETY: as for `zero`.
        unsafe { _mm512_set1_ps(f32::from_bits(unit)) }
    }
    #[inline(always)]
    unsafe fn link(self, a: __m512, b: __m512) -> Self {
        // SAFETY: as for `zero`.
        unsafe { _mm512_fmadd_ps(a, b, self) }
    }
}

/// Sixteen sums that take units of two bf16.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Dots(__m512);

#[cfg(target_arch = "x86_64")]
impl Lanes for Dots {
    type Units = __m512i;
    const WIDTH: usize = 16;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: only called from functions that have AVX-512 and its bf16 part, as all of this impl.
        Dots(unsafe { _mm512_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for sixteen elements.
        Dots(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as for `zero`.
        Dots(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    /// By the processor's own conversion, which takes a denormal for zero: plain arithmetic does vectors that have one.
    #[inline(always)]
    unsafe fn round(self, to: *mut bf16) {
        const DENORMAL: i32 = 0x20;
        // SAFETY: as for `zero`; the caller vouches for sixteen places, and the two types are the same 256 bits.
        unsafe {
            if _mm512_fpclass_ps_mask::<DENORMAL>(self.0) != 0 {
                let mut floats = [0f32; 16];
                self.store(floats.as_mut_ptr());
                floats.iter().enumerate().for_each(|(lane, float)| *to.add(lane) = Element::from_f32(*float));
            } else {
                let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0));
                _mm256_storeu_si256(to.cast(), rounded);
            }
        }
    }
    #[inline(always)]
    unsafe fn units(from: *const u32) -> __m512i {
        // SAFETY: the caller vouches for sixteen units.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(unit: u32) -> __m512i {
        // SAFETY: as for `zero`.
        unsafe { _mm512_set1_epi32(unit.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn link(self, a: __m512i, b: __m512i) -> Self {
        // SAFETY: as for `zero`; the two types are the same 512 bits.
        Dots(unsafe { _mm512_dpbf16_ps(self.0, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b)) })
    }
}
