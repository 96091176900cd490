//! Tokens per second of the same training step in candle, on the CPU in f32. One JSON line.
//!
//! ```text
//! cd benches/peers/candle
//! RUSTFLAGS="-C target-cpu=native" cargo run --release -- --model tiny --threads 2
//! RUSTFLAGS="-C target-cpu=native" cargo run --release -- --model gpt2-124m --threads 2 --steps 5
//! ```
//!
//! A step is forward, cross-entropy, backward, AdamW and reading the loss. It does less than ferrotron's: candle has no clipping by the
//! norm of all gradients, and its AdamW decays all parameters alike. Norms, softmax and rotary positions are candle's slow forms, because
//! its fused ones have no backward.

#[path = "../../measure.rs"]
mod measure;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, loss, ops, rotary_emb};
use measure::{Model, Options};

/// All that is trained.
struct Variables(Vec<Var>);

impl Variables {
    fn normal(&mut self, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
        self.add(Var::randn(0f32, 0.02, shape, &Device::Cpu)?)
    }

    fn constant(&mut self, value: f32, size: usize) -> Result<Tensor> {
        self.add(Var::from_tensor(&Tensor::full(value, size, &Device::Cpu)?)?)
    }

    fn add(&mut self, variable: Var) -> Result<Tensor> {
        self.0.push(variable.clone());
        Ok(variable.as_tensor().clone())
    }

    fn linear(&mut self, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        let weight = self.normal((outputs, inputs))?;
        Ok(Linear::new(weight, if bias { Some(self.constant(0.0, outputs)?) } else { None }))
    }

    fn norm(&mut self, model: &Model) -> Result<Norm> {
        let bias = if model.llama { None } else { Some(self.constant(0.0, model.width)?) };
        Ok(Norm { weight: self.constant(1.0, model.width)?, bias })
    }
}

struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            None => ops::rms_norm_slow(x, &self.weight, 1e-5),
            Some(bias) => ops::layer_norm_slow(x, &self.weight, bias, 1e-5),
        }
    }
}

struct Layer {
    norm_a: Norm,
    qkv: Linear,
    out: Linear,
    norm_b: Norm,
    up: Linear,
    down: Linear,
}

struct Decoder {
    model: Model,
    tokens: Tensor,
    positions: Option<Tensor>,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    rotary: (Tensor, Tensor),
    /// 0 where a token may look, minus infinity after it.
    mask: Tensor,
}

impl Decoder {
    fn new(model: Model, all: &mut Variables) -> Result<Decoder> {
        let (width, bias, time) = (model.width, !model.llama, model.time);
        let tokens = all.normal((model.vocabulary, width))?;
        let positions = if model.llama { None } else { Some(all.normal((model.positions, width))?) };
        let size = width / model.heads;
        let layer = |_| {
            Ok(Layer {
                norm_a: all.norm(&model)?,
                qkv: all.linear(width, (model.heads + 2 * model.kv_heads) * size, bias)?,
                out: all.linear(width, width, bias)?,
                norm_b: all.norm(&model)?,
                up: all.linear(width, if model.llama { 2 * model.hidden } else { model.hidden }, bias)?,
                down: all.linear(model.hidden, width, bias)?,
            })
        };
        let layers = (0..model.layers).map(layer).collect::<Result<Vec<_>>>()?;
        let norm = all.norm(&model)?;
        let head = if model.llama { all.linear(width, model.vocabulary, false)? } else { Linear::new(tokens.clone(), None) };
        let angle = |i: usize| (i / (size / 2)) as f32 / 1e4f32.powf((i % (size / 2)) as f32 / (size / 2) as f32);
        let angles = Tensor::from_iter((0..time * size / 2).map(angle), &Device::Cpu)?.reshape((time, size / 2))?;
        let mask = (0..time * time).map(|i| if i % time > i / time { f32::NEG_INFINITY } else { 0.0 });
        let mask = Tensor::from_iter(mask, &Device::Cpu)?.reshape((time, time))?;
        Ok(Decoder { model, tokens, positions, layers, norm, head, rotary: (angles.cos()?, angles.sin()?), mask })
    }

    fn loss(&self, inputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let (rows, time) = inputs.dims2()?;
        let mut x = self.tokens.index_select(&inputs.flatten_all()?, 0)?.reshape((rows, time, ()))?;
        if let Some(positions) = &self.positions {
            x = x.broadcast_add(&positions.narrow(0, 0, time)?)?;
        }
        for layer in &self.layers {
            x = (&x + self.attention(layer, &layer.norm_a.forward(&x)?)?)?;
            let up = layer.up.forward(&layer.norm_b.forward(&x)?)?;
            let up = if self.model.llama { ops::swiglu(&up)? } else { up.gelu()? };
            x = (x + layer.down.forward(&up)?)?;
        }
        let logits = self.head.forward(&self.norm.forward(&x)?)?;
        loss::cross_entropy(&logits.flatten_to(1)?, targets)
    }

    fn attention(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let (rows, time, width) = x.dims3()?;
        let Model { heads, kv_heads, .. } = self.model;
        let (qkv, size) = (layer.qkv.forward(x)?, width / heads);
        let part = |from: usize, count: usize| {
            let part = qkv.narrow(D::Minus1, from * size, count * size)?.reshape((rows, time, count, size))?.transpose(1, 2)?;
            part.contiguous()
        };
        let (mut q, mut k, mut v) = (part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?);
        if self.model.llama {
            let (cosine, sine) = &self.rotary;
            (q, k) = (rotary_emb::rope_slow(&q, cosine, sine)?, rotary_emb::rope_slow(&k, cosine, sine)?);
        }
        let each = heads / kv_heads;
        if each > 1 {
            // Every head of keys and values stands before the heads of queries that use it.
            let repeat = |x: Tensor| x.unsqueeze(2)?.expand((rows, kv_heads, each, time, size))?.reshape((rows, heads, time, size));
            (k, v) = (repeat(k)?, repeat(v)?);
        }
        let scores = (q.matmul(&k.t()?)? * (size as f64).powf(-0.5))?.broadcast_add(&self.mask)?;
        let y = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        layer.out.forward(&y.transpose(1, 2)?.contiguous()?.reshape((rows, time, width))?)
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut all = Variables(Vec::new());
    let decoder = Decoder::new(options.model, &mut all)?;
    let parameters = all.0.iter().map(|variable| variable.elem_count()).sum();
    let rates = ParamsAdamW { lr: 3e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(all.0, rates)?;
    let (inputs, targets) = options.tokens();
    let inputs = Tensor::from_vec(inputs, (options.model.rows, options.model.time), &Device::Cpu)?;
    let targets = Tensor::new(targets, &Device::Cpu)?.to_dtype(DType::U32)?;
    let mut step = || -> Result<f32> {
        let loss = decoder.loss(&inputs, &targets)?;
        optimizer.backward_step(&loss)?;
        loss.to_scalar()
    };
    options.measure("candle", "0.11.1", parameters, || step().expect("a step"));
    Ok(())
}
