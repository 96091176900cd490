//! Adam with decoupled weight decay (Loshchilov, Hutter, ICLR'19), on any range of the flat buffers.
//!
//! ```text
//! g' = scale g     p *= 1 - rate decay     m += (1 - beta1) (g' - m)     v = beta2 v + (1 - beta2) g' g'
//! p -= rate / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//! ```
//!
//! p, m, v, g are f32; the scalars are computed in f64 and rounded to f32 once. Narrower weights are p, rounded; or there is no p but the
//! weights themselves, which are then rounded by chance: an update that is less than the last place comes to pass now and then.
//!
//! Invariant: element by element, and chance is a function of an element's place in its tensor, so bits do not depend on how tensors are cut
//! into ranges. On a GPU (`cuda/adamw.cu`) they are the same.

use crate::args;
use crate::device::Device;
use crate::device::cpu::Cpu;
use crate::device::gpu::driver::{Argument, Grid};
use crate::device::gpu::kernel;
use crate::device::tensor::{View, ViewMut};
use crate::dispatch;
use crate::dtype::{Dtype, Element};
use crate::ops::rows::{Rows, over_rows};
use crate::plan::layout::Places;
use crate::rng::Stream;
use half::{bf16, f16};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub rate: f64,
    pub decay: f64,
    /// Counts updates, this one included: 1 at the first.
    pub step: u64,
    /// What gradients are multiplied by first: clipping, and the inverse of the loss scale.
    pub scale: f32,
}

/// What chance is drawn from: a tensor's own stream for each update, and where the elements of a slice lie in the tensor.
#[derive(Clone, Copy, Debug)]
pub struct Chance {
    stream: Stream,
    places: Places,
}

impl Chance {
    /// Of update `step` of the tensor `name`.
    pub fn new(seed: u64, name: &str, step: u64, places: Places) -> Chance {
        Chance { stream: Stream::new(seed, &format!("rounding of {name} in update {step}")), places }
    }

    /// The words of the elements from `start` on, which are of one run.
    #[inline(always)]
    fn words(&self, start: u64, words: &mut [u32; BLOCK]) {
        let Places { first, length, near, far } = self.places;
        let first = first + start / length * far + start % length * near;
        for (i, word) in words.iter_mut().enumerate() {
            let number = first + i as u64 * near;
            let [a, b, c, d] = self.stream.block(number / 4);
            let (low, high) = if number & 1 == 0 { (a, c) } else { (b, d) };
            *word = if number & 2 == 0 { low } else { high };
        }
    }
}

/// Elements whose words are drawn together.
const BLOCK: usize = 64;

/// The scalars of one update.
#[derive(Clone, Copy)]
struct Scalars {
    scale: f32,
    keep: f32,
    blend: f32,
    beta2: f32,
    fresh: f32,
    rate: f32,
    root: f32,
    eps: f32,
}

impl Adam {
    fn scalars(&self) -> Scalars {
        assert!(self.step > 0, "updates are counted from 1");
        Scalars {
            scale: self.scale,
            keep: (1.0 - self.rate * self.decay) as f32,
            blend: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            fresh: (1.0 - self.beta2) as f32,
            rate: (-self.rate / (1.0 - integer_power(self.beta1, self.step))) as f32,
            root: (1.0 - integer_power(self.beta2, self.step)).sqrt() as f32,
            eps: self.eps as f32,
        }
    }
}

impl Scalars {
    /// As the kernels take them, last.
    fn arguments(self) -> [Argument; 8] {
        args![self.scale, self.keep, self.blend, self.beta2, self.fresh, self.rate, self.root, self.eps]
    }
}

/// One update of p, m and v, all f32 of one length, by the gradient g.
pub fn step(mut p: ViewMut<'_>, mut m: ViewMut<'_>, mut v: ViewMut<'_>, g: View<'_>, adam: &Adam) {
    check(&p, &m, &v, g);
    let scalars = adam.scalars();
    match g.device() {
        Device::Cpu(cpu) => {
            let gs = g.slice::<f32>();
            let state = (Rows::new(m.slice_mut::<f32>(), 1), Rows::new(v.slice_mut::<f32>(), 1));
            over_rows(
                cpu,
                gs.len(),
                4,
                (Rows::new(p.slice_mut::<f32>(), 1), state),
                #[inline(always)]
                |range, (p, (m, v))| {
                    for (((p, m), v), g) in p.elements.iter_mut().zip(m.elements).zip(v.elements).zip(&gs[range]) {
                        (*p, *m, *v) = update(*p, *m, *v, *g, scalars);
                    }
                },
            );
        }
        Device::Gpu(gpu) => {
            let count = g.shape().numel();
            gpu.launch("adamw_step", grid(count), &[&args![&p, &m, &v, g, count][..], &scalars.arguments()].concat());
        }
        Device::Dry(_) => {}
    }
}

/// The same, and `weights` = p, rounded to their dtype, in the same pass over memory.
pub fn step_and_cast(mut p: ViewMut<'_>, mut m: ViewMut<'_>, mut v: ViewMut<'_>, g: View<'_>, mut weights: ViewMut<'_>, adam: &Adam) {
    check(&p, &m, &v, g);
    assert_eq!(weights.shape().numel(), g.shape().numel(), "weights as long as their gradient");
    let scalars = adam.scalars();
    match g.device() {
        Device::Cpu(cpu) => dispatch!(weights.dtype(), T => {
            let gs = g.slice::<f32>();
            let state = (Rows::new(m.slice_mut::<f32>(), 1), Rows::new(v.slice_mut::<f32>(), 1));
            let out = (Rows::new(p.slice_mut::<f32>(), 1), Rows::new(weights.slice_mut::<T>(), 1));
            over_rows(
                cpu,
                gs.len(),
                5,
                (out, state),
                #[inline(always)]
                |range, ((p, weights), (m, v))| {
                    let operands = p.elements.iter_mut().zip(weights.elements).zip(m.elements).zip(v.elements).zip(&gs[range]);
                    for ((((p, w), m), v), g) in operands {
                        (*p, *m, *v) = update(*p, *m, *v, *g, scalars);
                        *w = <T as Element>::from_f32(*p);
                    }
                },
            );
        }),
        Device::Gpu(gpu) => {
            let count = g.shape().numel();
            let arguments = [&args![&p, &m, &v, g, &weights, count][..], &scalars.arguments()].concat();
            gpu.launch(&kernel("adamw_step_and_cast", weights.dtype()), grid(count), &arguments);
        }
        Device::Dry(_) => {}
    }
}

/// One update of weights in bf16 or f16 that have no f32 form besides: p is what they are, and they become p, rounded by chance.
pub fn step_by_chance(weights: ViewMut<'_>, m: ViewMut<'_>, v: ViewMut<'_>, g: View<'_>, adam: &Adam, chance: &Chance) {
    check(&m, &m, &v, g);
    assert_eq!(weights.shape().numel(), g.shape().numel(), "weights as long as their gradient");
    let scalars = adam.scalars();
    match (g.device(), weights.dtype()) {
        (Device::Cpu(cpu), Dtype::Bf16) => step_by_chance_on_cpu::<bf16>(cpu, weights, [m, v], g.slice(), scalars, chance),
        (Device::Cpu(cpu), Dtype::F16) => step_by_chance_on_cpu::<f16>(cpu, weights, [m, v], g.slice(), scalars, chance),
        (Device::Cpu(_), dtype) => panic!("weights in {dtype} are not rounded"),
        (Device::Gpu(gpu), dtype) => {
            let count = g.shape().numel();
            let (seed, tag) = chance.stream.seed_and_tag();
            let Places { first, length, near, far } = chance.places;
            let chance = args![seed, tag, first, length, near, far];
            let arguments = [&args![&weights, &m, &v, g, count][..], &scalars.arguments(), &chance].concat();
            gpu.launch(&kernel("adamw_step_by_chance", dtype), grid(count), &arguments);
        }
        (Device::Dry(_), _) => {}
    }
}

fn step_by_chance_on_cpu<T: ByChance>(
    cpu: &Cpu,
    mut weights: ViewMut<'_>,
    [mut m, mut v]: [ViewMut<'_>; 2],
    gs: &[f32],
    scalars: Scalars,
    chance: &Chance,
) {
    let state = (Rows::new(m.slice_mut::<f32>(), 1), Rows::new(v.slice_mut::<f32>(), 1));
    over_rows(
        cpu,
        gs.len(),
        8,
        (Rows::new(weights.slice_mut::<T>(), 1), state),
        #[inline(always)]
        |range, (weights, (m, v))| {
            let mut words = [0; BLOCK];
            let mut start = range.start;
            let (mut weights, mut m, mut v) = (weights.elements, m.elements, v.elements);
            while start < range.end {
                let of_run = chance.places.length - start as u64 % chance.places.length;
                let count = of_run.min((range.end - start).min(BLOCK) as u64) as usize;
                chance.words(start as u64, &mut words);
                let gs = &gs[start..start + count];
                let operands = head(&mut weights, count).iter_mut().zip(head(&mut m, count)).zip(head(&mut v, count));
                for (((w, m), v), (g, word)) in operands.zip(gs.iter().zip(&words)) {
                    let p;
                    (p, *m, *v) = update(w.to_f32(), *m, *v, *g, scalars);
                    *w = T::by_chance(p, *word);
                }
                start += count;
            }
        },
    );
}

/// Takes the first `count` elements off a slice.
#[inline(always)]
fn head<'a, T>(slice: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    slice.split_off_mut(..count).expect("operands are of one length")
}

/// Blocks for `count` elements, as `cuda/adamw.cu` goes over them.
fn grid(count: usize) -> Grid {
    Grid::over(count, 1024, 256)
}

/// Rounding that keeps the mean.
trait ByChance: Element {
    /// `x` rounded to the neighbour that `word`, drawn evenly from all, says.
    fn by_chance(x: f32, word: u32) -> Self;
}

impl ByChance for bf16 {
    #[inline(always)]
    fn by_chance(x: f32, word: u32) -> bf16 {
        // Adding chance to the bits that are cut off carries into those that are kept as often as it should.
        if x.is_finite() { bf16::from_bits(((x.to_bits() + (word >> 16)) >> 16) as u16) } else { Element::from_f32(x) }
    }
}

impl ByChance for f16 {
    #[inline(always)]
    fn by_chance(x: f32, word: u32) -> f16 {
        let (sign, rest) = ((x.to_bits() >> 16) & 0x8000, x.to_bits() & 0x7fff_ffff);
        if rest >= 0x4780_0000 {
            return Element::from_f32(x);
        }
        let magnitude = if rest < 0x3880_0000 {
            // Denormal: in units of 2^-24, with 32 bits of what is cut off.
            let units = f32::from_bits(rest) * 16_777_216.0;
            let cut = ((units - units.trunc()) * 4_294_967_296.0) as u32;
            units as u32 + (word < cut) as u32
        } else {
            // The bias of the exponent differs by 112.
            (rest - (112 << 23) + (word >> 19)) >> 13
        };
        f16::from_bits((sign | magnitude) as u16)
    }
}

#[inline(always)]
fn update(p: f32, m: f32, v: f32, g: f32, with: Scalars) -> (f32, f32, f32) {
    let g = g * with.scale;
    // Both forms are the same line; each is exact at its own end, which is how PyTorch's lerp chooses, too.
    let m = if with.blend < 0.5 { m + with.blend * (g - m) } else { g - (g - m) * (1.0 - with.blend) };
    let v = v * with.beta2 + (with.fresh * g) * g;
    let p = p * with.keep + (with.rate * m) / (v.sqrt() / with.root + with.eps);
    (p, m, v)
}

/// base^exponent by squaring: the same bits everywhere, to about exponent * 1e-16 at worst.
fn integer_power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square, mut rest) = (1.0, base, exponent);
    while rest > 0 {
        if rest % 2 == 1 {
            result *= square;
        }
        square *= square;
        rest /= 2;
    }
    result
}

fn check(p: &ViewMut<'_>, m: &ViewMut<'_>, v: &ViewMut<'_>, g: View<'_>) {
    let count = g.shape().numel();
    assert_eq!([p.shape().numel(), m.shape().numel(), v.shape().numel()], [count; 3], "weights and moments as long as their gradient");
    assert_eq!([p.dtype(), m.dtype(), v.dtype(), g.dtype()], [Dtype::F32; 4], "weights, moments and gradient of an update");
}
