//! Kernels at shapes of more than 2^32 elements: a number of elements or an offset that is kept in 32 bits goes wrong here.
//!
//! Ops are given tensors of sparse memory, most of which nobody touches, on a GPU that runs only the first, the middle and the last block of
//! each launch. An offset that has become negative is an access out of bounds, for between two tensors lie bytes that were given back; one
//! that has wrapped around misses the last elements, which are the only ones that are not zero: their results are looked at.

use anyhow::{Context, Result, ensure};
use ferrotron::device::Device;
use ferrotron::device::gpu::driver::{Argument, Driver, Event, Gemm, Grid, Stream};
use ferrotron::device::gpu::kernels::{self, Architecture};
use ferrotron::device::tensor::{Tensor, View};
use ferrotron::dtype::{Dtype, Element};
use ferrotron::ops::adamw::{self, Adam, Chance};
use ferrotron::ops::attention::{self, Heads, Mask};
use ferrotron::ops::exact::{LossTotal, SquareSum};
use ferrotron::ops::{activation, cross_entropy, elementwise, embedding, matmul, norm, reduce, rope, select};
use ferrotron::plan::layout::Places;
use half::{bf16, f16};
use ptx_emulator::{Launch, Memory, Module, Options};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// Between two tensors: an offset of 32 bits, taken for a negative one, reaches 2^31 elements back.
const HOLE: usize = 1 << 34;

/// A GPU of sparse memory, whose launches run a few of their blocks, at once.
#[derive(Debug, Default)]
struct Sampled {
    memory: Memory,
    modules: Mutex<HashMap<&'static str, Arc<Module>>>,
    pick: Pick,
}

/// Which blocks run.
#[derive(Clone, Copy, Default, Debug)]
enum Pick {
    /// The first, the middle and the last.
    #[default]
    Three,
    First,
    Last,
}

impl Sampled {
    fn blocks(&self, grid: Grid) -> Vec<u64> {
        /// Grids that stride are not larger: each of their blocks goes from one end of a tensor to the other.
        const STRIDING: u64 = 4096;
        let count: u64 = grid.blocks.iter().map(|&blocks| blocks as u64).product();
        let mut blocks = match self.pick {
            Pick::First => vec![0],
            Pick::Three if count != STRIDING => vec![0, count / 2, count - 1],
            Pick::Three | Pick::Last => vec![count - 1],
        };
        blocks.dedup();
        blocks
    }

    fn module(&self, kernel: &str) -> Result<Arc<Module>> {
        let source = kernels::find(kernel).with_context(|| format!("there is no kernel {kernel}"))?;
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if !modules.contains_key(source.name) {
            let own = std::env::var_os("FERROTRON_PTX").map(|folder| PathBuf::from(folder).join(format!("{}.sm_80.ptx", source.name)));
            let module = match own {
                Some(path) => Module::parse(&std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?)?,
                None => Module::parse(source.ptx(Architecture::Sm80))?,
            };
            modules.insert(source.name, Arc::new(module));
        }
        Ok(modules[source.name].clone())
    }
}

impl Driver for Sampled {
    fn name(&self) -> String {
        "sampled GPU".to_string()
    }

    fn products(&self) -> String {
        "nobody".to_string()
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.memory.free(self.memory.allocate_sparse(HOLE))?;
        Ok(self.memory.allocate_sparse(bytes))
    }

    fn free(&self, address: u64, _: usize) -> Result<()> {
        Ok(self.memory.free(address)?)
    }

    fn launch(&self, _: Stream, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        let arguments: Vec<&[u8]> = arguments.iter().map(Argument::bytes).collect();
        let module = self.module(kernel)?;
        let launch = Launch {
            kernel: module.kernel(kernel).with_context(|| format!("no kernel {kernel}"))?,
            grid: grid.blocks,
            block: [grid.threads, 1, 1],
            shared_bytes: grid.shared_bytes,
            arguments: &arguments,
            blocks: Some(&self.blocks(grid)),
        };
        ptx_emulator::launch(&self.memory, &launch, &Options::default())?;
        Ok(())
    }

    fn gemm(&self, _: &Gemm) -> Result<()> {
        anyhow::bail!("there is no library here, and these products are kernels of our own")
    }

    fn zero(&self, _: Stream, _: u64, bytes: usize) -> Result<()> {
        // Sparse memory is zero until somebody writes to it, and ops fill only what is new.
        ensure!(bytes > 0, "nothing to fill");
        Ok(())
    }

    fn copy(&self, _: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        Ok(self.memory.copy(to, from, bytes)?)
    }

    fn upload(&self, _: Stream, to: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.memory.write(to, bytes)?)
    }

    fn download(&self, _: Stream, from: u64, bytes: &mut [u8]) -> Result<()> {
        Ok(self.memory.read(from, bytes)?)
    }

    fn record(&self, _: Stream) -> Result<Event> {
        Ok(Event(0))
    }

    fn wait(&self, _: Stream, _: Event) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

/// Runs `work` on such a GPU; fails with what failed there.
fn sampled(pick: Pick, work: impl FnOnce(&Device)) {
    let device = Device::gpu(Box::new(Sampled { pick, ..Sampled::default() })).with_own_products();
    work(&device);
    checked(&device);
}

fn checked(device: &Device) {
    device.check().unwrap_or_else(|error| panic!("{error:#}"));
}

/// Rows of bf16: zeros but for the last, which is -1, 1, -1, 1, ...
fn rows(device: &Device, n: usize, c: usize) -> Tensor {
    rows_of(device, Dtype::Bf16, n, c)
}

fn rows_of(device: &Device, dtype: Dtype, n: usize, c: usize) -> Tensor {
    fn last<T: Element>(c: usize) -> Vec<T> {
        (0..c).map(|i| T::from_f32(if i % 2 == 0 { -1.0 } else { 1.0 })).collect()
    }
    let mut x = device.empty([n, c], dtype);
    let end = x.view_mut().part((n - 1) * c..n * c, [c]);
    match dtype {
        Dtype::F32 => end.write(&last::<f32>(c)),
        Dtype::Bf16 => end.write(&last::<bf16>(c)),
        Dtype::F16 => end.write(&last::<f16>(c)),
        Dtype::U32 => panic!("no floats"),
    }
    x
}

/// The last elements of a tensor, four bytes of them, have been computed from the last elements of others.
fn reached(what: &str, x: View<'_>) {
    checked(x.device());
    let (count, last) = (x.shape().numel(), 4 / x.dtype().bytes());
    let bytes = x.part(count - last..count, [last]).to_bytes();
    assert!(bytes.iter().any(|&byte| byte != 0), "{what}: the last elements of {} are still zero", x.shape());
}

/// So many that the last block of a grid that strides has the last elements.
const N: usize = (1 << 20) + (1 << 12);
const C: usize = 4096;

#[test]
fn elementwise_and_activation() {
    sampled(Pick::Three, |device| {
        let mut x = rows(device, N, C);
        let mut y = device.empty([N, C], Dtype::Bf16);
        elementwise::add(y.view_mut(), x.view());
        reached("add", y.view());
        elementwise::scale(y.view_mut(), 0.5);
        elementwise::add_row(y.view_mut(), rows(device, 1, C).reshape([C]).view());
        reached("add_row", y.view());
        reached("swiglu", activation::swiglu_forward(x.view()).view());
        drop(y);
        let dy = rows(device, N, C / 2);
        activation::swiglu_backward(dy.view(), x.view_mut());
        reached("swiglu backward", x.view());
        drop(dy);
        let mut y = activation::gelu_forward(x.view());
        reached("gelu", y.view());
        activation::gelu_backward(x.view(), y.view_mut());
        reached("gelu backward", y.view());
    });
}

#[test]
fn elementwise_in_floats() {
    sampled(Pick::Three, |device| {
        let x = rows(device, N, C);
        let mut wide = device.empty([N, C], Dtype::F32);
        elementwise::cast(wide.view_mut(), x.view());
        reached("cast", wide.view());
        elementwise::accumulate(wide.view_mut(), x.view());
        reached("accumulate", wide.view());
    });
}

#[test]
fn norm_rows() {
    sampled(Pick::Three, |device| {
        let (mut x, w) = (rows(device, N, C), rows(device, 1, C).reshape([C]));
        let (y, r) = norm::rms_forward(x.view(), w.view(), 1e-5);
        reached("rms", y.view());
        drop(y);
        reached("rms again", norm::rms_again(x.view(), w.view(), r.view()).view());
        let dy = rows(device, N, C);
        // The last row's gradient is that of its own direction, and none: the first half of its weights makes it another.
        let mut half = rows(device, 1, C).reshape([C]);
        half.view_mut().part(0..C / 2, [C / 2]).write(&vec![bf16::from_f32(2.0); C / 2]);
        reached("rms backward", norm::rms_backward(dy.view(), x.view(), half.view(), r.view()).view());
        let (y, stats) = norm::layer_forward(x.view(), w.view(), w.view(), 1e-5);
        reached("layer", y.view());
        drop(y);
        reached("layer again", norm::layer_again(x.view(), w.view(), w.view(), stats.view()).view());
        reached("layer backward", norm::layer_backward(dy.view(), x.view(), half.view(), stats.view()).view());
        reached("rms of a sum", norm::rms_forward_add(x.view_mut(), dy.view(), w.view(), 1e-5).0.view());
    });
}

#[test]
fn chunks_of_rows() {
    sampled(Pick::Three, |device| {
        let (sequences, t) = (16, 1 << 16);
        let x = rows(device, sequences * t, C + 8);
        let r = device.empty([sequences * t], Dtype::F32);
        let stats = device.empty([sequences * t, 2], Dtype::F32);
        let mut dw = device.zeros([1, C + 8], Dtype::F32);
        reduce::sum_rows(dw.view_mut(), x.view(), t);
        reached("sum of rows", dw.view());
        norm::rms_backward_weight(dw.view_mut(), x.view(), x.view(), r.view(), t);
        norm::layer_backward_weight(dw.view_mut(), x.view(), x.view(), stats.view(), t);
    });
    sampled(Pick::Three, |device| {
        let (chunks, c) = (512, (1 << 23) + 8);
        let mut dw = device.empty([chunks, c], Dtype::F32);
        dw.view_mut().part(chunks * c - 1..chunks * c, [1]).write(&[1.0f32]);
        reached("tree of rows", reduce::tree_rows(dw.view()).view());
        reduce::first_nonfinite(dw.view());
    });
}

#[test]
fn cross_entropy_of_rows() {
    sampled(Pick::Three, |device| {
        let (n, v) = (33_601, 128_256);
        let mut logits = rows(device, n, v);
        let targets = device.empty([n], Dtype::U32);
        let (max, parts) = cross_entropy::row_max(logits.view(), v);
        reached("maximum", max.view());
        let sums = cross_entropy::sums(logits.view(), max.view(), &parts, targets.view(), 0, v);
        reached("sums", sums.view());
        // Only some segments of the last row have been summed: what comes of them is not looked at, but where it goes.
        let ones = vec![1.0f32; 2];
        let mut given = device.empty([2 * n], Dtype::F32);
        given.view_mut().part(2 * n - 2..2 * n, [2]).write(&ones);
        cross_entropy::losses(given.view(), targets.view());
        cross_entropy::finish(logits.view_mut(), max.view(), given.view(), targets.view(), 0, 0.125);
        reached("gradient", logits.view());
    });
}

#[test]
fn embedding_of_large_tables() {
    sampled(Pick::Three, |device| {
        let (n, local) = (64, N);
        let table = rows(device, local, C);
        let ids = Tensor::from_slice(device, [n], &vec![local as u32 - 1; n]);
        reached("rows", embedding::forward(ids.view(), table.view(), 0).view());
        let mut x = device.empty([n, C], Dtype::Bf16);
        embedding::positions_forward(x.view_mut(), table.view(), ids.view());
        reached("rows added", x.view());
        let mut dw = device.empty([local, C], Dtype::F32);
        let ids = Tensor::from_slice(device, [1], &[local as u32 - 1]);
        embedding::backward(dw.view_mut(), rows(device, 1, C).view(), ids.view(), 0);
        reached("gradient", dw.view());
    });
    sampled(Pick::Three, |device| {
        let mut table = device.empty([8, C], Dtype::Bf16);
        table.view_mut().part(0..C, [C]).write(&vec![bf16::from_f32(1.0); C]);
        let ids = device.empty([N], Dtype::U32);
        reached("many rows", embedding::forward(ids.view(), table.view(), 0).view());
    });
}

#[test]
fn rope_and_select() {
    sampled(Pick::Three, |device| {
        let (heads, dim) = (C / 128, 128);
        let mut x = rows(device, N, C);
        let table = rope::table(device, dim, 1e4, rope::Scaling::None, 8);
        let mut positions = device.empty([N], Dtype::U32);
        positions.view_mut().part(N - 1..N, [1]).write(&[1u32]);
        rope::forward(x.view_mut(), heads, dim, table.view(), positions.view());
        // Turned by one: neither 1 nor -1 is left in the first pair.
        checked(device);
        let turned = x.view().part((N - 1) * C..(N - 1) * C + 1, [1]).to_vec::<bf16>()[0].to_f32();
        assert!(turned.abs() != 1.0 && turned != 0.0, "the last row begins with {turned}");
        let swapped = select::swap_blocks(x.view(), 4, 8);
        reached("blocks", swapped.view());
        drop(swapped);
        reached("columns", select::columns(x.view(), &[0..C / 2, C / 2..C]).view());
    });
}

/// Of each operand in its turn, and of what is computed, there are more than 2^32 elements.
#[test]
fn matmul_of_large_operands() {
    const WIDE: usize = (1 << 23) + (1 << 12);
    const FEW: usize = 1024;
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        let rows = |device: &Device, n: usize, c: usize| rows_of(device, dtype, n, c);
        let forward = |x: &Tensor, w: &Tensor| matmul::forward(x.view(), w.view(), matmul::WHOLE);
        sampled(Pick::Last, |device| {
            reached("many rows of x", forward(&rows(device, N, C), &rows(device, 64, C)).view());
            reached("many rows of w", forward(&rows(device, 64, C), &rows(device, N, C)).view());
            reached("a large y", forward(&rows(device, N, 40), &rows(device, C, 40)).view());
            let backward = |dy: &Tensor, w: &Tensor| matmul::backward_input(dy.view(), w.view());
            reached("many rows of dy", backward(&rows(device, N, C), &rows(device, C, 64)).view());
            reached("long rows of w", backward(&rows(device, 64, FEW), &rows(device, FEW, WIDE)).view());
            reached("a large dx", backward(&rows(device, N, 40), &rows(device, 40, C)).view());
            let weight = |dy: &Tensor, x: &Tensor| {
                let mut dw = device.zeros([dy.shape().columns(), x.shape().columns()], Dtype::F32);
                matmul::backward_weight(dw.view_mut(), dy.view(), x.view(), dy.shape().rows());
                dw
            };
            reached("long rows of dy", weight(&rows(device, FEW, WIDE), &rows(device, FEW, 64)).view());
            reached("long rows of x", weight(&rows(device, FEW, 64), &rows(device, FEW, WIDE)).view());
            reached("a large dw", weight(&rows(device, 40, N), &rows(device, 40, C)).view());
        });
    }
    sampled(Pick::Three, |device| {
        reached("many rows of x and w", matmul::forward(rows(device, N, 40).view(), rows(device, C, 40).view(), matmul::WHOLE).view());
    });
}

#[test]
fn adamw_of_long_slices() {
    sampled(Pick::Three, |device| {
        let count = (1 << 31) + 1024 * 4096;
        let [mut p, mut m, mut v, mut g] = [(); 4].map(|()| device.empty([count], Dtype::F32));
        let mut weights = device.empty([count], Dtype::Bf16);
        g.view_mut().part(count - 4..count, [4]).write(&[1.0f32; 4]);
        let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, rate: 1e-2, decay: 0.1, step: 7, scale: 0.5 };
        adamw::step_and_cast(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), weights.view_mut(), &adam);
        reached("weights", weights.view());
        reached("parameters", p.view());
        drop(p);
        let chance = Chance::new(1, "w", 7, Places { first: 0, length: count as u64, near: 1, far: 0 });
        let mut weights = device.empty([count], Dtype::Bf16);
        adamw::step_by_chance(weights.view_mut(), m.view_mut(), v.view_mut(), g.view(), &adam, &chance);
        reached("weights by chance", weights.view());
        let mut p = device.empty([count], Dtype::F32);
        adamw::step(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), &adam);
        reached("parameters of f32", p.view());
    });
}

#[test]
fn exact_sums_of_long_slices() {
    sampled(Pick::Three, |device| {
        let x = rows_of(device, Dtype::F32, N, C);
        let mut squares = SquareSum::default();
        squares.add([x.view()]);
        checked(device);
        assert!(squares.root() > 0.0, "the last of {} elements are not in the sum", N * C);
        let mut losses = LossTotal::default();
        // An odd number of them, which do not cancel.
        losses.add(x.view().part(N * C - C..N * C - 1, [C - 1]));
        checked(device);
        assert_ne!(losses.sum().units, 0, "the last losses are not in the sum");
    });
}

/// Many short sequences: their keys and values are where their rows are.
#[test]
fn attention_of_many_sequences() {
    let narrow = [Dtype::Bf16, Dtype::F16].into_iter().flat_map(|dtype| [32, 64, 96, 128, 256].map(|dim| (dtype, dim)));
    for (dtype, dim) in narrow.chain([64, 128, 256].map(|dim| (Dtype::F32, dim))) {
        sampled(Pick::Last, |device| {
            // One tile of queries is a sequence, so that the last block has the last rows.
            let t = if dtype == Dtype::F32 { 16 } else { 128 };
            let heads = Heads { query: 32, kv: 8, dim };
            let n = (1 << 20) * (128 / dim).max(1);
            let qkv = rows_of(device, dtype, n, heads.columns());
            let starts = device.empty([n], Dtype::U32);
            let mask = Mask { t, starts: starts.view(), window: None };
            let (o, lse) = attention::forward(qkv.view(), heads, mask);
            reached(&format!("outputs of {dtype} {dim}"), o.view());
            let dout = rows_of(device, dtype, n, heads.query * heads.dim);
            let dqkv = attention::backward(dout.view(), qkv.view(), o.view(), lse.view(), heads, mask);
            reached(&format!("gradients of {dtype} {dim}"), dqkv.view());
        });
    }
}

/// One long sequence, of which a row sees few. The first block has the last rows of the first head.
#[test]
fn attention_of_a_long_sequence() {
    sampled(Pick::First, |device| {
        let (t, heads) = (1 << 20, Heads { query: 32, kv: 8, dim: 128 });
        let qkv = rows(device, t, heads.columns());
        let starts = device.empty([t], Dtype::U32);
        let mask = Mask { t, starts: starts.view(), window: Some(100) };
        let (o, _) = attention::forward(qkv.view(), heads, mask);
        let last = (t - 1) * heads.query * heads.dim;
        reached("outputs", o.view().part(0..last + heads.dim, [last + heads.dim]));
    });
}
