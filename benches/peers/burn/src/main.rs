//! Tokens per second of the same training step in burn, on its CPU backend flex in f32. One JSON line.
//!
//! ```text
//! cd benches/peers/burn
//! RUSTFLAGS="-C target-cpu=native" cargo run --release -- --model tiny --threads 2
//! RUSTFLAGS="-C target-cpu=native" cargo run --release -- --model gpt2-124m --threads 2 --steps 5
//! ```
//!
//! A step is forward, cross-entropy, backward, AdamW and reading the loss. It does less than ferrotron's: burn clips each gradient by
//! itself, not by the norm of all, so nothing is clipped here, and one AdamW decays all parameters alike.

#[path = "../../measure.rs"]
mod measure;

use burn::module::{Module, Param};
use burn::nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::{gelu_approximate, silu};
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Int, Tensor, TensorData, module};
use measure::{Model, Options};

const NORMAL: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

fn linear(inputs: usize, outputs: usize, bias: bool, device: &Device) -> Linear {
    let mut linear = LinearConfig::new(inputs, outputs).with_bias(bias).with_initializer(NORMAL).init(device);
    linear.bias = bias.then(|| Initializer::Zeros.init([outputs], device));
    linear
}

/// One of the two.
#[derive(Module, Debug)]
struct Norm {
    rms: Option<RmsNorm>,
    layer: Option<LayerNorm>,
}

impl Norm {
    fn new(model: &Model, device: &Device) -> Norm {
        Norm {
            rms: model.llama.then(|| RmsNormConfig::new(model.width).init(device)),
            layer: (!model.llama).then(|| LayerNormConfig::new(model.width).init(device)),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match (&self.rms, &self.layer) {
            (Some(norm), _) => norm.forward(x),
            (_, Some(norm)) => norm.forward(x),
            _ => unreachable!(),
        }
    }
}

#[derive(Module, Debug)]
struct Layer {
    norm_a: Norm,
    qkv: Linear,
    out: Linear,
    norm_b: Norm,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Decoder {
    tokens: Embedding,
    positions: Option<Param<Tensor<2>>>,
    layers: Vec<Layer>,
    norm: Norm,
    head: Option<Linear>,
}

impl Decoder {
    fn new(model: &Model, device: &Device) -> Decoder {
        let (width, bias) = (model.width, !model.llama);
        let layer = |_| Layer {
            norm_a: Norm::new(model, device),
            qkv: linear(width, (model.heads + 2 * model.kv_heads) * (width / model.heads), bias, device),
            out: linear(width, width, bias, device),
            norm_b: Norm::new(model, device),
            up: linear(width, if model.llama { 2 * model.hidden } else { model.hidden }, bias, device),
            down: linear(model.hidden, width, bias, device),
        };
        Decoder {
            tokens: EmbeddingConfig::new(model.vocabulary, width).with_initializer(NORMAL).init(device),
            positions: (!model.llama).then(|| NORMAL.init([model.positions, width], device)),
            layers: (0..model.layers).map(layer).collect(),
            norm: Norm::new(model, device),
            head: model.llama.then(|| linear(width, model.vocabulary, false, device)),
        }
    }

    fn loss(&self, model: &Model, batch: &Batch) -> Tensor<1> {
        let mut x = self.tokens.forward(batch.inputs.clone());
        if let Some(positions) = &self.positions {
            x = x + positions.val().narrow(0, 0, model.time).unsqueeze();
        }
        for layer in &self.layers {
            x = x.clone() + layer.attention(model, batch, layer.norm_a.forward(x));
            x = x.clone() + layer.mlp(layer.norm_b.forward(x));
        }
        let x = self.norm.forward(x);
        let logits = match &self.head {
            Some(head) => head.forward(x),
            None => module::linear(x, self.tokens.weight.val().transpose(), None),
        };
        batch.cross_entropy.forward(logits.flatten(0, 1), batch.targets.clone())
    }
}

impl Layer {
    fn attention(&self, model: &Model, batch: &Batch, x: Tensor<3>) -> Tensor<3> {
        let Model { rows, time, width, heads, kv_heads, .. } = *model;
        let (qkv, size) = (self.qkv.forward(x), width / heads);
        let part = |from: usize, count: usize| -> Tensor<4> {
            qkv.clone().narrow(2, from * size, count * size).reshape([rows, time, count, size]).swap_dims(1, 2)
        };
        let (mut q, mut k, mut v) = (part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads));
        if model.llama {
            (q, k) = (batch.rotate(q), batch.rotate(k));
        }
        let each = heads / kv_heads;
        if each > 1 {
            // Every head of keys and values stands before the heads of queries that use it.
            let repeat =
                |x: Tensor<4>| x.unsqueeze_dim::<5>(2).expand([rows, kv_heads, each, time, size]).reshape([rows, heads, time, size]);
            (k, v) = (repeat(k), repeat(v));
        }
        let y = module::attention(q, k, v, None, None, AttentionModuleOptions { is_causal: true, ..Default::default() });
        self.out.forward(y.swap_dims(1, 2).reshape([rows, time, width]))
    }

    fn mlp(&self, x: Tensor<3>) -> Tensor<3> {
        let up = self.up.forward(x);
        self.down.forward(match &self.norm_b.rms {
            None => gelu_approximate(up),
            Some(_) => {
                let [gate, up] = up.chunk(2, 2).try_into().expect("two halves");
                silu(gate) * up
            }
        })
    }
}

/// What a step reads and does not train.
struct Batch {
    inputs: Tensor<2, Int>,
    targets: Tensor<1, Int>,
    cross_entropy: CrossEntropyLoss,
    /// Of each position and pair of a head's numbers.
    cosine: Tensor<4>,
    sine: Tensor<4>,
}

impl Batch {
    fn new(options: &Options, device: &Device) -> Batch {
        let Model { rows, time, width, heads, .. } = options.model;
        let (inputs, targets) = options.tokens();
        let integers = |tokens: Vec<u32>| tokens.into_iter().map(i64::from).collect::<Vec<_>>();
        let half = width / heads / 2;
        let angles = (0..time * half).map(|i| (i / half) as f32 / 1e4f32.powf((i % half) as f32 / half as f32)).collect::<Vec<_>>();
        let angles = Tensor::<4>::from_data(TensorData::new(angles, [1, 1, time, half]), device);
        Batch {
            inputs: Tensor::from_data(TensorData::new(integers(inputs), [rows, time]), device),
            targets: Tensor::from_data(TensorData::new(integers(targets), [rows * time]), device),
            cross_entropy: CrossEntropyLossConfig::new().init(device),
            cosine: angles.clone().cos(),
            sine: angles.sin(),
        }
    }

    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [a, b] = x.chunk(2, 3).try_into().expect("two halves");
        let (cosine, sine) = (self.cosine.clone(), self.sine.clone());
        Tensor::cat(vec![a.clone() * cosine.clone() - b.clone() * sine.clone(), b * cosine + a * sine], 3)
    }
}

fn main() {
    let options = Options::parse();
    let device = Device::flex().autodiff();
    let batch = Batch::new(&options, &device);
    let mut kept = Some(Decoder::new(&options.model, &device));
    let parameters = kept.as_ref().map_or(0, |decoder| decoder.num_params());
    let mut optimizer = AdamWConfig::new().with_beta_2(0.95).with_epsilon(1e-8).with_weight_decay(0.1).init();
    options.measure("burn", "0.22.1", parameters, || {
        let decoder = kept.take().expect("it is put back by every step");
        let loss = decoder.loss(&options.model, &batch);
        let value = loss.clone().into_scalar::<f32>();
        let gradients = GradientsParams::from_grads(loss.backward(), &decoder);
        kept = Some(optimizer.step(3e-4, decoder, gradients)); // the only handle, so that weights may change in place
        value
    });
}
