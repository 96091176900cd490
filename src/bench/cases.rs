//! The operations that are measured, at the sizes of models that people train.
//!
//! Invariant: a case knows what it must do at least: floating-point operations of products, or bytes of operands that are read and written
//! once. So its share of the machine's limit says how much is left to gain.

use crate::device::Device;
use crate::device::tensor::Tensor;
use crate::dtype::Dtype;
use crate::ops::adamw::{self, Adam};
use crate::ops::attention::{self, Heads, Mask};
use crate::ops::exact::SquareSum;
use crate::ops::{activation, cross_entropy, elementwise, embedding, matmul, norm, reduce, rope};
use crate::rng::Stream;
use half::{bf16, f16};
use std::hint::black_box;

/// What bounds an operation, and how much of it there is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Work {
    /// Operations, of which a multiply-add is two.
    Flops(f64),
    Bytes(f64),
}

pub struct Case {
    pub name: String,
    pub dtype: Dtype,
    pub work: Work,
    /// Makes the operands, which may be large.
    pub prepare: Box<dyn FnOnce() -> Run + Send>,
}

/// Does the operation once.
pub type Run = Box<dyn FnMut() + Send>;

/// Sizes of a model, and how many tokens it meets at once.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub sequences: usize,
    pub t: usize,
    pub c: usize,
    pub f: usize,
    pub heads: Heads,
    pub v: usize,
}

impl Sizes {
    /// GPT-2 124M, four sequences of 256 tokens.
    pub const SMALL: Sizes = Sizes { sequences: 4, t: 256, c: 768, f: 3072, heads: Heads { query: 12, kv: 12, dim: 64 }, v: 50304 };
    /// Llama 3 8B, two sequences of 4096 tokens.
    pub const LARGE: Sizes = Sizes { sequences: 2, t: 4096, c: 4096, f: 14336, heads: Heads { query: 32, kv: 8, dim: 128 }, v: 128256 };

    fn n(&self) -> usize {
        self.sequences * self.t
    }
}

/// All operations of a step, in the order of a forward pass, on tensors of `dtype`.
pub fn cases(device: &Device, sizes: Sizes, dtype: Dtype) -> Vec<Case> {
    let made = Made { device: device.clone(), sizes, dtype };
    let mut all = Vec::new();
    made.embeddings(&mut all);
    made.norms(&mut all);
    let Sizes { c, f, heads, .. } = sizes;
    for (o, i) in [(heads.columns(), c), (c, heads.query * heads.dim), (f, c), (c, f)] {
        made.matmul(&mut all, o, i);
    }
    made.rope(&mut all);
    made.attentions(&mut all);
    made.activations(&mut all);
    made.matmul(&mut all, sizes.v, c);
    made.cross_entropy(&mut all);
    made.sums(&mut all);
    made.optimizer(&mut all);
    all
}

#[derive(Clone)]
struct Made {
    device: Device,
    sizes: Sizes,
    dtype: Dtype,
}

impl Made {
    fn random(&self, shape: [usize; 2]) -> Tensor {
        random(&self.device, self.dtype, shape)
    }

    fn floats(&self, shape: [usize; 2]) -> Tensor {
        random(&self.device, Dtype::F32, shape)
    }

    fn vector(&self) -> Tensor {
        self.random([1, self.sizes.c]).reshape([self.sizes.c])
    }

    fn zeros(&self, n: usize) -> Tensor {
        self.device.zeros([n], Dtype::U32)
    }

    fn case(&self, all: &mut Vec<Case>, name: &str, work: Work, prepare: impl FnOnce(&Made) -> Run + Send + 'static) {
        let made = self.clone();
        all.push(Case { name: name.to_string(), dtype: self.dtype, work, prepare: Box::new(move || prepare(&made)) });
    }

    /// Bytes of `elements` of the dtype and `floats` f32.
    fn bytes(&self, elements: usize, floats: usize) -> Work {
        Work::Bytes((elements * self.dtype.bytes() + 4 * floats) as f64)
    }

    fn ids(&self) -> Tensor {
        let stream = Stream::new(1, "ids");
        let ids: Vec<u32> = (0..self.sizes.n()).map(|i| (stream.word(i as u64) % self.sizes.v as u64) as u32).collect();
        Tensor::from_slice(&self.device, [ids.len()], &ids)
    }

    fn embeddings(&self, all: &mut Vec<Case>) {
        let (n, Sizes { c, v, .. }) = (self.sizes.n(), self.sizes);
        self.case(all, &format!("embedding {n} x {c}"), self.bytes(2 * n * c, 0), move |made| {
            let (table, ids) = (made.random([v, c]), made.ids());
            Box::new(move || drop(black_box(embedding::forward(ids.view(), table.view(), 0))))
        });
        self.case(all, &format!("embedding backward {n} x {c}"), self.bytes(n * c, 2 * n * c), move |made| {
            let (dy, ids, mut dw) = (made.random([n, c]), made.ids(), made.floats([v, c]));
            Box::new(move || embedding::backward(dw.view_mut(), dy.view(), ids.view(), 0))
        });
    }

    fn norms(&self, all: &mut Vec<Case>) {
        let (n, c, t) = (self.sizes.n(), self.sizes.c, self.sizes.t);
        let size = format!("{n} x {c}");
        self.case(all, &format!("rms norm {size}"), self.bytes(2 * n * c, n), move |made| {
            let (x, w) = (made.random([n, c]), made.vector());
            Box::new(move || drop(black_box(norm::rms_forward(x.view(), w.view(), 1e-5))))
        });
        self.case(all, &format!("rms norm backward {size}"), self.bytes(3 * n * c, n), move |made| {
            let (x, dy, w) = (made.random([n, c]), made.random([n, c]), made.vector());
            let (_, r) = norm::rms_forward(x.view(), w.view(), 1e-5);
            Box::new(move || drop(black_box(norm::rms_backward(dy.view(), x.view(), w.view(), r.view()))))
        });
        self.case(all, &format!("rms norm backward of the weight {size}"), self.bytes(2 * n * c, n), move |made| {
            let (x, dy, w, mut dw) = (made.random([n, c]), made.random([n, c]), made.vector(), made.floats([1, c]));
            let (_, r) = norm::rms_forward(x.view(), w.view(), 1e-5);
            Box::new(move || norm::rms_backward_weight(dw.view_mut(), dy.view(), x.view(), r.view(), t))
        });
        self.case(all, &format!("layer norm {size}"), self.bytes(2 * n * c, 2 * n), move |made| {
            let (x, w, b) = (made.random([n, c]), made.vector(), made.vector());
            Box::new(move || drop(black_box(norm::layer_forward(x.view(), w.view(), b.view(), 1e-5))))
        });
        self.case(all, &format!("layer norm backward {size}"), self.bytes(3 * n * c, 2 * n), move |made| {
            let (x, dy, w, b) = (made.random([n, c]), made.random([n, c]), made.vector(), made.vector());
            let (_, stats) = norm::layer_forward(x.view(), w.view(), b.view(), 1e-5);
            Box::new(move || drop(black_box(norm::layer_backward(dy.view(), x.view(), w.view(), stats.view()))))
        });
    }

    fn matmul(&self, all: &mut Vec<Case>, o: usize, i: usize) {
        let (n, t) = (self.sizes.n(), self.sizes.t);
        let work = Work::Flops(2.0 * n as f64 * o as f64 * i as f64);
        self.case(all, &format!("matmul {n} x {o} x {i}"), work, move |made| {
            let (x, w) = (made.random([n, i]), made.random([o, i]));
            Box::new(move || drop(black_box(matmul::forward(x.view(), w.view(), matmul::WHOLE))))
        });
        self.case(all, &format!("matmul backward of the input {n} x {i} x {o}"), work, move |made| {
            let (dy, w) = (made.random([n, o]), made.random([o, i]));
            Box::new(move || drop(black_box(matmul::backward_input(dy.view(), w.view()))))
        });
        self.case(all, &format!("matmul backward of the weight {o} x {i} x {n}"), work, move |made| {
            let (dy, x, mut dw) = (made.random([n, o]), made.random([n, i]), made.floats([o, i]));
            Box::new(move || matmul::backward_weight(dw.view_mut(), dy.view(), x.view(), t))
        });
    }

    fn rope(&self, all: &mut Vec<Case>) {
        let (n, t, heads) = (self.sizes.n(), self.sizes.t, self.sizes.heads);
        let turned = heads.query + heads.kv;
        let elements = n * turned * heads.dim;
        self.case(all, &format!("rope {n} x {turned} heads of {}", heads.dim), self.bytes(2 * elements, t * heads.dim), move |made| {
            let table = rope::table(&made.device, heads.dim, 10_000.0, rope::Scaling::None, t);
            let positions: Vec<u32> = (0..n).map(|row| (row % t) as u32).collect();
            let positions = Tensor::from_slice(&made.device, [n], &positions);
            let mut qkv = made.random([n, heads.columns()]);
            Box::new(move || rope::forward(qkv.view_mut(), turned, heads.dim, table.view(), positions.view()))
        });
    }

    /// At the model's size; on a CPU also with short and long rows, and with groups of query heads.
    fn attentions(&self, all: &mut Vec<Case>) {
        let Sizes { sequences, t, heads, .. } = self.sizes;
        self.attention(all, sequences, t, heads);
        if !self.device.is_gpu() {
            self.attention(all, 4 * sequences, t / 4, heads);
            self.attention(all, sequences / 4, 4 * t, heads);
            self.attention(all, 4 * sequences, t, Heads { query: 6, kv: 2, ..heads });
        }
    }

    fn attention(&self, all: &mut Vec<Case>, sequences: usize, t: usize, heads: Heads) {
        let n = sequences * t;
        let size = format!("{sequences} x {t}, {} heads of {} on {}", heads.query, heads.dim, heads.kv);
        // Two products forward, five backward, each over the half of the scores that is seen.
        let product = (sequences * heads.query) as f64 * (t * t) as f64 * heads.dim as f64;
        self.case(all, &format!("attention {size}"), Work::Flops(2.0 * product), move |made| {
            let (qkv, starts) = (made.random([n, heads.columns()]), made.zeros(n));
            Box::new(move || drop(black_box(attention::forward(qkv.view(), heads, Mask { t, starts: starts.view(), window: None }))))
        });
        self.case(all, &format!("attention backward {size}"), Work::Flops(5.0 * product), move |made| {
            let (qkv, starts, dout) = (made.random([n, heads.columns()]), made.zeros(n), made.random([n, heads.query * heads.dim]));
            let (o, lse) = attention::forward(qkv.view(), heads, Mask { t, starts: starts.view(), window: None });
            Box::new(move || {
                let mask = Mask { t, starts: starts.view(), window: None };
                drop(black_box(attention::backward(dout.view(), qkv.view(), o.view(), lse.view(), heads, mask)))
            })
        });
    }

    fn activations(&self, all: &mut Vec<Case>) {
        let (n, f) = (self.sizes.n(), self.sizes.f);
        self.case(all, &format!("swiglu {n} x {f}"), self.bytes(3 * n * f, 0), move |made| {
            let gate_up = made.random([n, 2 * f]);
            Box::new(move || drop(black_box(activation::swiglu_forward(gate_up.view()))))
        });
        self.case(all, &format!("swiglu backward {n} x {f}"), self.bytes(5 * n * f, 0), move |made| {
            // Gradients of zero, and so are gates and ups from the first time on: denormal numbers would take longer.
            let (mut gate_up, dh) = (made.random([n, 2 * f]), made.device.zeros([n, f], made.dtype));
            Box::new(move || activation::swiglu_backward(black_box(dh.view()), gate_up.view_mut()))
        });
        self.case(all, &format!("gelu {n} x {f}"), self.bytes(2 * n * f, 0), move |made| {
            let x = made.random([n, f]);
            Box::new(move || drop(black_box(activation::gelu_forward(x.view()))))
        });
        self.case(all, &format!("gelu backward {n} x {f}"), self.bytes(3 * n * f, 0), move |made| {
            let (mut x, dy) = (made.random([n, f]), made.random([n, f]));
            Box::new(move || activation::gelu_backward(black_box(dy.view()), x.view_mut()))
        });
    }

    fn cross_entropy(&self, all: &mut Vec<Case>) {
        // As many rows as the head does at a time.
        let (n, v) = (self.sizes.n().min(1024), self.sizes.v);
        // Read for the maximum and the sums together, then for the gradient, which is written.
        self.case(all, &format!("cross-entropy and its gradient {n} x {v}"), self.bytes(3 * n * v, 4 * n), move |made| {
            let (mut logits, targets) = (made.random([n, v]), made.ids());
            Box::new(move || {
                let targets = targets.view().part(0..n, [n]);
                let (max, parts) = cross_entropy::row_max(logits.view(), v);
                let sums = cross_entropy::sums(logits.view(), max.view(), &parts, targets, 0, v);
                black_box(cross_entropy::losses(sums.view(), targets));
                cross_entropy::finish(logits.view_mut(), max.view(), sums.view(), targets, 0, 1.0);
            })
        });
    }

    fn sums(&self, all: &mut Vec<Case>) {
        let (n, c, t) = (self.sizes.n(), self.sizes.c, self.sizes.t);
        self.case(all, &format!("bias gradient {n} x {c}"), self.bytes(n * c, 2 * c), move |made| {
            let (dy, mut db) = (made.random([n, c]), made.floats([1, c]));
            Box::new(move || reduce::sum_rows(db.view_mut(), dy.view(), t))
        });
        self.case(all, &format!("add {n} x {c}"), self.bytes(3 * n * c, 0), move |made| {
            let (mut y, x) = (made.random([n, c]), made.random([n, c]));
            Box::new(move || elementwise::add(y.view_mut(), x.view()))
        });
        let count = self.sizes.c * self.sizes.f;
        self.case(all, &format!("sum of squares {count}"), Work::Bytes(4.0 * count as f64), move |made| {
            let g = made.floats([1, count]);
            Box::new(move || {
                let mut sum = SquareSum::default();
                sum.add([g.view()]);
                black_box(sum);
            })
        });
    }

    fn optimizer(&self, all: &mut Vec<Case>) {
        // More than caches hold.
        let count = (self.sizes.c * self.sizes.f * 8).min(1 << 28);
        let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, rate: 1e-6, decay: 0.1, step: 10, scale: 1.0 };
        self.case(all, &format!("adamw {count}"), self.bytes(count, 7 * count), move |made| {
            let [mut p, mut m, mut v, g] = [(); 4].map(|()| made.floats([1, count]));
            let mut weights = made.random([1, count]);
            Box::new(move || {
                let [p, m, v] = [&mut p, &mut m, &mut v].map(Tensor::view_mut);
                adamw::step_and_cast(p, m, v, g.view(), weights.view_mut(), &adam);
            })
        });
    }
}

/// Numbers between -1 and 1.
pub fn random(device: &Device, dtype: Dtype, shape: [usize; 2]) -> Tensor {
    let stream = Stream::new(1, "bench");
    let count = shape[0] * shape[1];
    // Some random numbers, again and again: making more would take longer than measuring.
    let some: Vec<f32> = (0..count.min(1 << 18) as u64).map(|i| (stream.word(i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect();
    let some = match dtype {
        Dtype::Bf16 => Tensor::from_slice(device, [some.len()], &some.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
        Dtype::F16 => Tensor::from_slice(device, [some.len()], &some.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()),
        _ => Tensor::from_slice(device, [some.len()], &some),
    };
    let mut all = device.empty(shape, dtype);
    for start in (0..count).step_by(some.shape().numel().max(1)) {
        let each = some.shape().numel().min(count - start);
        all.view_mut().part(start..start + each, [each]).copy_from(some.view().part(0..each, [each]));
    }
    all
}
