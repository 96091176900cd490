//! What the kernels do, counted: instructions by class, turns of shared memory's banks, sectors and bytes of global memory.
//!
//! Each kernel runs once, on the emulator, at a small shape of the kind that training has, and its counts are those of
//! `tests/counters/baseline.txt`. A kernel that has become slower shows here before anybody has a GPU at hand. Counts that have fallen
//! fail, too: so the file stays true. `FERROTRON_BASELINE=write cargo test --release --test counters` writes it anew.
//!
//! Invariant: every kernel of f32 and of bf16 is counted, and what is less than ideal has its reason in `REASONS`.

use ferrotron::device::Device;
use ferrotron::device::gpu::driver::{Gemm, Operand, Order};
use ferrotron::device::gpu::emulated::{Counted, Emulated};
use ferrotron::device::gpu::kernels::{SOURCES, Source};
use ferrotron::device::gpu::matmul::{Edge, Launch, launch_in};
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::adamw::{self, Adam, Chance};
use ferrotron::ops::attention::{self, Heads, Mask};
use ferrotron::ops::exact::{LossTotal, SquareSum};
use ferrotron::ops::rope::{self, Scaling};
use ferrotron::ops::{activation, cross_entropy, elementwise, embedding, norm, reduce, select};
use ferrotron::plan::layout::Places;
use ferrotron::rng::Stream;
use ferrotron::shape::Shape;
use half::bf16;
use ptx_emulator::Counts;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

const BASELINE: &str = "tests/counters/baseline.txt";

/// Why kernels have bank conflicts or sectors that are not full: the beginning of their names, and what their sources say in full.
const REASONS: &[(&str, &str)] = &[
    ("attention_backward_dots", "an lse is one float of a sector that other heads' blocks share"),
    ("attention_backward_keys_64_f32", FLOATS),
    ("attention_backward_keys_128_f32", FLOATS),
    ("attention_backward_keys_256_f32", FLOATS),
    ("attention_backward_queries_64_f32", FLOATS),
    ("attention_backward_queries_128_f32", FLOATS),
    ("attention_backward_queries_256_f32", FLOATS),
    ("attention_forward_64_f32", FLOATS),
    ("attention_forward_128_f32", FLOATS),
    ("attention_forward_256_f32", FLOATS),
    ("embedding_sort", "each row goes to its place in the order, a few bytes a row"),
    ("rope_turn_bf16", "cosines and sines are f32: 32 bytes a thread in two accesses, of which the cache answers the second"),
];

const FLOATS: &str = "kernels of f32 store their sums one float at a time: they are made to be right, not fast";

/// What of a kernel is held against the baseline. Ratios are to the least that the same bytes need.
const COLUMNS: [&str; 13] = [
    "integer",
    "float",
    "conversion",
    "memory",
    "matrix",
    "synchronization",
    "control",
    "wavefronts",
    "wavefronts/ideal",
    "sectors",
    "sectors/ideal",
    "loaded/element",
    "stored/element",
];

/// A kernel and where it ran, or a line of it; its counts by column.
type Rows = BTreeMap<String, [String; COLUMNS.len()]>;

/// A shape at which ops run. The bytes of their kernels are told for each of `elements`.
struct Case {
    shape: &'static str,
    elements: usize,
    run: fn(&Device, Dtype),
}

const fn case(shape: &'static str, elements: usize, run: fn(&Device, Dtype)) -> Case {
    Case { shape, elements, run }
}

const ROWS: usize = 64;
const WIDTH: usize = 1024;
const ALL: usize = ROWS * WIDTH;

const CASES: &[Case] = &[
    case("64x1024", ALL, activations),
    case("65536", ALL, updates),
    case("2x128x1024", 2 * 128 * WIDTH, sums_of_rows),
    case("4x32000", 4 * 32_000, losses),
    case("64x1024", ALL, element_by_element),
    case("64x1024_of_512", ALL, embeddings),
    case("64x1024", ALL, norms),
    case("64x1024_and_residual", ALL, norms_with_residual),
    case("16x4096", ALL, searches),
    case("32x12_heads_of_128", 32 * 12 * 128, rotations),
    case("64x1024", ALL, selections),
    case("128x128x256", 128 * 128, products),
    case("256x2_of_32", 256 * 2 * 32, attentions::<32>),
    case("256x2_of_64", 256 * 2 * 64, attentions::<64>),
    case("256x2_of_96", 256 * 2 * 96, attentions::<96>),
    case("256x2_of_128", 256 * 2 * 128, attentions::<128>),
    case("256x2_of_256", 256 * 2 * 256, attentions::<256>),
];

fn random(device: &Device, shape: &[usize], dtype: Dtype) -> Tensor {
    let stream = Stream::new(1, "counters");
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| stream.normal(i as u64) as f32).collect();
    match dtype {
        Dtype::Bf16 => {
            let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            Tensor::from_slice(device, Shape::new(shape), &values)
        }
        _ => Tensor::from_slice(device, Shape::new(shape), &values),
    }
}

fn numbers(device: &Device, count: usize, end: u32) -> Tensor {
    let stream = Stream::new(2, "counters");
    let numbers: Vec<u32> = (0..count).map(|i| (stream.word(i as u64) % end as u64) as u32).collect();
    Tensor::from_slice(device, [count], &numbers)
}

fn activations(device: &Device, dtype: Dtype) {
    let (mut gate_up, dh) = (random(device, &[ROWS, 2 * WIDTH], dtype), random(device, &[ROWS, WIDTH], dtype));
    activation::swiglu_forward(gate_up.view());
    activation::swiglu_backward(dh.view(), gate_up.view_mut());
    activation::gelu_forward(dh.view());
    activation::gelu_backward(dh.view(), random(device, &[ROWS, WIDTH], dtype).view_mut());
}

fn updates(device: &Device, dtype: Dtype) {
    let [mut p, mut m, g] = [(); 3].map(|()| random(device, &[ALL], Dtype::F32));
    let (mut v, mut weights) = (device.zeros([ALL], Dtype::F32), device.zeros([ALL], dtype));
    let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, rate: 1e-2, decay: 0.1, step: 7, scale: 0.5 };
    if dtype == Dtype::F32 {
        adamw::step(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), &adam);
        SquareSum::default().add([g.view()]);
        LossTotal::default().add(g.view());
    }
    adamw::step_and_cast(p.view_mut(), m.view_mut(), v.view_mut(), g.view(), weights.view_mut(), &adam);
    if dtype != Dtype::F32 {
        let chance = Chance::new(1, "w", 7, Places { first: 0, length: ALL as u64, near: 1, far: 0 });
        adamw::step_by_chance(weights.view_mut(), m.view_mut(), v.view_mut(), g.view(), &adam, &chance);
    }
}

fn sums_of_rows(device: &Device, dtype: Dtype) {
    let (sequences, t) = (2, 128);
    let x = random(device, &[sequences * t, WIDTH], dtype);
    let mut dw = device.zeros([1, WIDTH], Dtype::F32);
    let r = random(device, &[x.shape().rows()], Dtype::F32);
    let stats = random(device, &[x.shape().rows(), 2], Dtype::F32);
    reduce::sum_rows(dw.view_mut(), x.view(), t);
    norm::rms_backward_weight(dw.view_mut(), x.view(), x.view(), r.view(), t);
    norm::layer_backward_weight(dw.view_mut(), x.view(), x.view(), stats.view(), t);
}

fn losses(device: &Device, dtype: Dtype) {
    let (n, v) = (4, 32_000);
    let (mut logits, targets) = (random(device, &[n, v], dtype), numbers(device, n, v as u32));
    let (max, parts) = cross_entropy::row_max(logits.view(), v);
    let sums = cross_entropy::sums(logits.view(), max.view(), &parts, targets.view(), 0, v);
    cross_entropy::losses(sums.view(), targets.view());
    cross_entropy::finish(logits.view_mut(), max.view(), sums.view(), targets.view(), 0, 0.5);
}

fn element_by_element(device: &Device, dtype: Dtype) {
    let (x, bias) = (random(device, &[ROWS, WIDTH], dtype), random(device, &[WIDTH], dtype));
    let [mut same, mut wide] = [dtype, Dtype::F32].map(|dtype| device.zeros([ROWS, WIDTH], dtype));
    elementwise::add(same.view_mut(), x.view());
    elementwise::accumulate(wide.view_mut(), x.view());
    elementwise::scale(same.view_mut(), 0.5);
    elementwise::add_row(same.view_mut(), bias.view());
    elementwise::cast(same.view_mut(), x.view());
    if dtype != Dtype::F32 {
        elementwise::cast(wide.view_mut(), x.view());
        elementwise::cast(same.view_mut(), wide.view());
    }
}

fn embeddings(device: &Device, dtype: Dtype) {
    let (ids, table) = (numbers(device, ROWS, 512), random(device, &[512, WIDTH], dtype));
    let (mut x, mut dw) = (random(device, &[ROWS, WIDTH], dtype), device.zeros([512, WIDTH], Dtype::F32));
    embedding::forward(ids.view(), table.view(), 0);
    embedding::positions_forward(x.view_mut(), table.view(), ids.view());
    embedding::backward(dw.view_mut(), x.view(), ids.view(), 0);
}

fn norms(device: &Device, dtype: Dtype) {
    let (x, w) = (random(device, &[ROWS, WIDTH], dtype), random(device, &[WIDTH], dtype));
    let (x, w) = (x.view(), w.view());
    let (_, r) = norm::rms_forward(x, w, 1e-5);
    norm::rms_again(x, w, r.view());
    norm::rms_backward(x, x, w, r.view());
    let (_, stats) = norm::layer_forward(x, w, w, 1e-5);
    norm::layer_again(x, w, w, stats.view());
    norm::layer_backward(x, x, w, stats.view());
}

fn norms_with_residual(device: &Device, dtype: Dtype) {
    let (mut x, w) = (random(device, &[ROWS, WIDTH], dtype), random(device, &[WIDTH], dtype));
    let (residual, w) = (random(device, &[ROWS, WIDTH], dtype), w.view());
    let residual = residual.view();
    let (_, r) = norm::rms_forward_add(x.view_mut(), residual, w, 1e-5);
    norm::rms_backward_add(x.view(), x.view(), w, r.view(), residual);
    let (_, stats) = norm::layer_forward_add(x.view_mut(), residual, w, w, 1e-5);
    norm::layer_backward_add(x.view(), x.view(), w, stats.view(), residual);
}

fn searches(device: &Device, dtype: Dtype) {
    let x = random(device, &[16, 4096], dtype);
    reduce::first_nonfinite(x.view());
    if dtype == Dtype::F32 {
        reduce::tree_rows(x.view());
    }
}

fn rotations(device: &Device, dtype: Dtype) {
    let (n, heads, dim) = (32, 12, 128);
    let table = rope::table(device, dim, 1e4, Scaling::None, 64);
    let mut qkv = random(device, &[n, heads * dim], dtype);
    rope::forward(qkv.view_mut(), heads, dim, table.view(), numbers(device, n, 64).view());
}

fn selections(device: &Device, dtype: Dtype) {
    select::swap_blocks(random(device, &[ROWS, WIDTH], dtype).view(), 4, 8);
}

/// In tiles of both sizes, of which a product of this size would have the small ones.
fn products(device: &Device, dtype: Dtype) {
    let (edge, k) = (128, 256);
    let (a, b) = (random(device, &[edge, k], dtype), random(device, &[edge, k], dtype));
    let (inner, outer) = (Order::SummedInner, Order::SummedOuter);
    for ([a_order, b_order], accumulate) in [([inner, inner], false), ([inner, outer], false), ([outer, outer], true)] {
        let operand = |x: &Tensor, order| Operand { address: x.view().address(), stride: if order == inner { k } else { edge }, order };
        let (a, b) = (operand(&a, a_order), operand(&b, b_order));
        let out = device.zeros([edge, edge], if accumulate { Dtype::F32 } else { dtype });
        let gemm = Gemm { dtype, m: edge, n: edge, k, a, b, out: out.view().address(), accumulate, bias: None };
        for tile in [Edge::Of64, Edge::Of128] {
            let Launch { kernel, grid, arguments } = launch_in(&gemm, tile).expect("a form that there is");
            let Device::Gpu(gpu) = device else { panic!("kernels run on GPUs") };
            gpu.launch(&kernel, grid, &arguments);
        }
    }
}

fn attentions<const DIM: usize>(device: &Device, dtype: Dtype) {
    // The kernels of f32 have fewer widths.
    if dtype == Dtype::F32 && ![64, 128, 256].contains(&DIM) {
        return;
    }
    let (t, heads) = (256, Heads { query: 2, kv: 1, dim: DIM });
    let (qkv, dout) = (random(device, &[t, 4 * DIM], dtype), random(device, &[t, 2 * DIM], dtype));
    let starts = Tensor::from_slice(device, [t], &vec![0u32; t]);
    let mask = Mask { t, starts: starts.view(), window: None };
    let (o, lse) = attention::forward(qkv.view(), heads, mask);
    attention::backward(dout.view(), qkv.view(), o.view(), lse.view(), heads, mask);
}

/// A device that counts. FERROTRON_PTX names a folder of kernels to be counted instead of the program's own.
fn device(counted: &Counted) -> Device {
    let emulated = Emulated::new(None, false, 1).with_counters(counted);
    Device::gpu(Box::new(match std::env::var_os("FERROTRON_PTX").map(PathBuf::from) {
        Some(folder) => emulated.with_ptx_of(&folder),
        None => emulated,
    }))
}

fn ratio(count: u64, ideal: u64) -> f64 {
    if ideal == 0 { 1.0 } else { count as f64 / ideal as f64 }
}

fn row(counts: &Counts, elements: usize) -> [String; COLUMNS.len()] {
    let decimals = |x: f64| format!("{x:.3}");
    let each = |bytes: u64| decimals(bytes as f64 / elements as f64);
    [
        counts.integer.to_string(),
        counts.float.to_string(),
        counts.conversion.to_string(),
        counts.memory.to_string(),
        counts.matrix.to_string(),
        counts.synchronization.to_string(),
        counts.control.to_string(),
        counts.shared_wavefronts.to_string(),
        decimals(ratio(counts.shared_wavefronts, counts.shared_wavefronts_ideal)),
        counts.global_sectors.to_string(),
        decimals(ratio(counts.global_sectors, counts.global_sectors_ideal)),
        each(counts.global_bytes_loaded),
        each(counts.global_bytes_stored),
    ]
}

/// All kernels of a dtype.
fn count(dtype: Dtype) -> Rows {
    let counted = Counted::default();
    let device = device(&counted);
    let mut rows = Rows::new();
    for case in CASES {
        (case.run)(&device, dtype);
        device.check().unwrap_or_else(|error| panic!("{} of {dtype}: {error:#}", case.shape));
        for (kernel, counters) in counted.take() {
            // A kernel of no dtype runs with every dtype, and where an op runs a kernel twice, one is like the other.
            let key = format!("{kernel} {}", case.shape);
            if rows.contains_key(&key) {
                continue;
            }
            explained(&kernel, case.shape, &counters.total);
            for ((file, line), counts) in counters.lines.iter().filter(|(_, counts)| is_less_than_ideal(counts)) {
                rows.insert(format!("{key}:{file}:{line}"), row(counts, case.elements));
            }
            rows.insert(key, row(&counters.total, case.elements));
        }
    }
    rows
}

/// A line of a kernel with a bank conflict or a sector that is not full: it stands in the baseline by itself.
fn is_less_than_ideal(counts: &Counts) -> bool {
    counts.shared_wavefronts > counts.shared_wavefronts_ideal || counts.global_sectors > counts.global_sectors_ideal
}

/// What is less than ideal has a reason.
fn explained(kernel: &str, shape: &str, counts: &Counts) {
    const SLACK: f64 = 0.02;
    let ratios = [
        ("bank conflicts", ratio(counts.shared_wavefronts, counts.shared_wavefronts_ideal)),
        ("sectors that are not full", ratio(counts.global_sectors, counts.global_sectors_ideal)),
    ];
    for (what, ratio) in ratios {
        let known = REASONS.iter().any(|(name, _)| kernel.starts_with(name));
        assert!(ratio <= 1.0 + SLACK || known, "{kernel} at {shape} has {what}: {ratio:.3} of the ideal, and REASONS has no reason for it");
    }
}

fn read(text: &str) -> Rows {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| {
            let mut words = line.split_whitespace().map(str::to_owned);
            let key = [words.next(), words.next()].map(|word| word.unwrap_or_else(|| panic!("{BASELINE}: a line is {line:?}"))).join(" ");
            let counts: Vec<String> = words.collect();
            let counts = counts.try_into().unwrap_or_else(|_| panic!("{BASELINE}: {key} has not {} columns", COLUMNS.len()));
            (key, counts)
        })
        .collect()
}

fn written(rows: &Rows) -> String {
    let mut text = String::from(
        "# What each kernel counts at one small shape: instructions of warps by class, turns of shared memory's banks, sectors of 32 bytes of\n\
         # global memory, and bytes of all lanes for each element of the shape. Under a kernel stand the source lines that have bank conflicts or\n\
         # sectors that are not full. tests/counters.rs says how to write this file anew.\n",
    );
    text += &format!("# kernel shape {}\n", COLUMNS.join(" "));
    for (key, counts) in rows {
        text += &format!("{key} {}\n", counts.join(" "));
    }
    text
}

/// In words, where `now` is not what `baseline` says.
fn differences(now: &Rows, baseline: &Rows) -> Vec<String> {
    let number = |text: &str| text.parse::<f64>().unwrap_or(f64::NAN);
    let mut all = Vec::new();
    for (key, counts) in now {
        let Some(before) = baseline.get(key) else {
            all.push(format!("{key} is not in the baseline"));
            continue;
        };
        for ((column, count), before) in COLUMNS.iter().zip(counts).zip(before) {
            if count != before {
                let way = if number(count) > number(before) { "rose" } else { "fell" };
                all.push(format!("{key}: {column} {way} from {before} to {count}"));
            }
        }
    }
    all.extend(baseline.keys().filter(|key| !now.contains_key(*key)).map(|key| format!("{key} did not run")));
    all
}

#[test]
fn kernels_count_what_the_baseline_says() {
    let now = std::thread::scope(|scope| {
        let bf16 = scope.spawn(|| count(Dtype::Bf16));
        let mut all = count(Dtype::F32);
        all.extend(bf16.join().expect("counting bf16 says itself what fails"));
        all
    });
    let counted: Vec<String> = now.keys().filter_map(|key| key.split_once(' ')).map(|(kernel, _)| kernel.to_owned()).collect();
    let missing: Vec<&str> = SOURCES
        .iter()
        // One instruction each: nobody waits for those (tests/instructions.rs).
        .filter(|source| source.name != "instructions")
        .flat_map(Source::kernels)
        .filter(|name| !name.contains("_f16") && !counted.iter().any(|kernel| kernel == name))
        .collect();
    assert!(missing.is_empty(), "no case of {} runs {missing:?}", file!());
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(BASELINE);
    if std::env::var("FERROTRON_BASELINE").is_ok_and(|value| value == "write") {
        fs::write(&path, written(&now)).unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
        return;
    }
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()));
    let differences = differences(&now, &read(&text));
    assert!(
        differences.is_empty(),
        "the counts are not those of the baseline:\n{}\nIf that is as it should be, write it anew: FERROTRON_BASELINE=write cargo test --release --test counters",
        differences.join("\n")
    );
}
