//! Speed of matmul and attention, as a share of what the machine gives at that moment.
//!
//! `cargo bench --bench ops -- [words]` runs the lines whose text has all of the words, e.g. `bf16 nt`.
//!
//! Invariant: between the rounds of a measurement stand bursts of the machine's own peak on as many threads.
#![allow(unsafe_code)]

mod machine;

use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::ops::attention::{self, Heads, Mask};
use ferrotron::ops::matmul;
use ferrotron::rng::Stream;
use half::bf16;
use machine::{peak, processor_seconds};
use std::hint::black_box;

/// x w^T, dy w and dy^T x (in one sequence, and in sequences of 256 rows), as rows of C, columns of C, length of the sums: the sizes of GPT-2 124M and three squares.
const MATMULS: [(&str, [usize; 3]); 26] = [
    ("nt", [1024, 1024, 1024]),
    ("nt", [2048, 2048, 2048]),
    ("nt", [1024, 768, 768]),
    ("nn", [1024, 768, 768]),
    ("tn", [1024, 768, 768]),
    ("nt", [1024, 2304, 768]),
    ("nn", [1024, 2304, 768]),
    ("tn", [1024, 2304, 768]),
    ("nt", [1024, 3072, 768]),
    ("nn", [1024, 3072, 768]),
    ("tn", [1024, 3072, 768]),
    ("nt", [1024, 768, 3072]),
    ("nn", [1024, 768, 3072]),
    ("tn", [1024, 768, 3072]),
    ("nt", [1024, 50304, 768]),
    ("nn", [1024, 50304, 768]),
    ("tn", [1024, 50304, 768]),
    ("nt", [4096, 384, 384]),
    ("nn", [4096, 384, 384]),
    ("tn", [4096, 384, 384]),
    ("tn256", [4096, 384, 384]),
    ("tn256", [1024, 3072, 768]),
    ("nt", [1, 3072, 768]),
    ("nt", [1, 50304, 768]),
    ("nt", [8, 3072, 768]),
    ("nt", [64, 3072, 768]),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    for threads in [1, 2] {
        let device = Device::cpu(threads);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (form, sizes) in MATMULS {
                let [n, o, i] = sizes;
                let line = format!("{dtype} {form} {n:5} {o:5} {i:5} threads {threads}");
                if words.iter().all(|word| line.split_whitespace().any(|part| part == word)) {
                    one_matmul(&device, threads, dtype, form, sizes, &line);
                }
            }
            for [sequences, t, heads, dim] in [[1, 1024, 12, 64], [4, 256, 12, 64], [4, 64, 12, 64], [16, 256, 6, 64], [1, 2048, 8, 128]] {
                let line = format!("{dtype} attention {sequences} x {t:4} heads {heads} of {dim} threads {threads}");
                if words.iter().all(|word| line.split_whitespace().any(|part| part == word)) {
                    one_attention(&device, threads, dtype, [sequences, t, heads, dim], &line);
                }
            }
        }
    }
}

fn random(device: &Device, dtype: Dtype, shape: [usize; 2]) -> Tensor {
    let stream = Stream::new(1, "bench");
    let values = (0..(shape[0] * shape[1]) as u64).map(|i| (stream.word(i) >> 40) as f32 / (1 << 23) as f32 - 1.0);
    match dtype {
        Dtype::Bf16 => Tensor::from_slice(device, shape, &values.map(bf16::from_f32).collect::<Vec<_>>()),
        _ => Tensor::from_slice(device, shape, &values.collect::<Vec<_>>()),
    }
}

fn one_matmul(device: &Device, threads: usize, dtype: Dtype, form: &str, [n, o, i]: [usize; 3], line: &str) {
    let (x, w, dy) = (random(device, dtype, [n, i]), random(device, dtype, [o, i]), random(device, dtype, [n, o]));
    let mut dw = device.zeros([o, i], Dtype::F32);
    measure(device, threads, dtype, line, 2.0 * (n * o * i) as f64, || match form {
        "nt" => drop(black_box(matmul::forward(x.view(), w.view(), i))),
        "nn" => drop(black_box(matmul::backward_input(dy.view(), w.view()))),
        "tn" => matmul::backward_weight(dw.view_mut(), dy.view(), x.view(), n),
        _ => matmul::backward_weight(dw.view_mut(), dy.view(), x.view(), 256),
    });
}

fn one_attention(device: &Device, threads: usize, dtype: Dtype, [sequences, t, query, dim]: [usize; 4], line: &str) {
    let heads = Heads { query, kv: query, dim };
    let n = sequences * t;
    let (qkv, starts) = (random(device, dtype, [n, heads.columns()]), device.zeros([n], Dtype::U32));
    let mask = Mask { t, starts: starts.view(), window: None };
    let (o, lse) = attention::forward(qkv.view(), heads, mask);
    // Two products forward, five backward, each over the half of the scores that is seen.
    let product = (sequences * query * t * t * dim) as f64;
    measure(device, threads, dtype, &format!("{line} forward"), 2.0 * product, || {
        drop(black_box(attention::forward(qkv.view(), heads, mask)))
    });
    measure(device, threads, dtype, &format!("{line} backward"), 5.0 * product, || {
        drop(black_box(attention::backward(o.view(), qkv.view(), o.view(), lse.view(), heads, mask)))
    });
}

/// Prints the best of many short rounds, as GFLOP/s and as a share of the best peak between them. Time is what the processor spent on
/// us, over the threads: what others do to the machine meanwhile takes less part in it.
fn measure(device: &Device, threads: usize, dtype: Dtype, line: &str, flops: f64, mut work: impl FnMut() + Send) {
    let Device::Cpu(cpu) = device else { unreachable!("the benchmark runs on the processor") };
    let repeats = (2e9 * threads as f64 / flops).ceil().clamp(1.0, 200.0) as usize;
    let (mut rate, mut most) = (0f64, 0f64);
    cpu.install(&mut work);
    let begin = processor_seconds();
    for round in 0.. {
        most = most.max(peak(threads, dtype));
        cpu.install(|| {
            let start = processor_seconds();
            (0..repeats).for_each(|_| work());
            rate = rate.max(flops * (repeats * threads) as f64 / (processor_seconds() - start) / 1e9);
        });
        if round >= 5 && processor_seconds() - begin > 0.5 * threads as f64 {
            break;
        }
    }
    println!("{line}: {rate:6.0} GFLOP/s, {:3.0} % of the peak", 100.0 * rate / most);
}
