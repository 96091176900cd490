//! The driver of a real GPU on top of a made-up one: what it asks for, in which order, and what it says when that is refused.
//!
//! Invariant: what is shown here is shown of every line but the C functions themselves.

use super::context::Context;
use super::fake::{self, Launch, state};
use super::fake_products;
use super::pinned::PIECE;
use super::{Cuda, bytes_with_slack};
use crate::args;
use crate::device::gpu::Gpu;
use crate::device::gpu::driver::{Driver, Event, Gemm, Grid, Operand, Order, Stream};
use crate::dtype::Dtype;

const MIB: usize = 1 << 20;

fn gpu(bytes: usize) -> Cuda {
    let started = fake::driver();
    let (facts, gpus) = started.gpu_of(0).expect("a GPU");
    assert_eq!((gpus, facts.bytes), (1, 1 << 30));
    let context = Context::open(started, facts, 2).expect("a context");
    Cuda::new(context, Some(fake_products::products()), bytes, "set less".to_string()).expect("memory")
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|place| (place * 31 % 251) as u8).collect()
}

#[test]
fn bytes_go_to_the_gpu_and_back_through_few_buffers() {
    let gpu = gpu(64 * MIB);
    assert_eq!(gpu.name(), "GPU 0 (Fake GPU, 0000:3b:00.0, shared by 2 ranks)");
    for count in [1, PIECE - 1, PIECE, 11 * PIECE + 5] {
        let (there, again) = (gpu.allocate(count).expect("room"), gpu.allocate(count).expect("room"));
        let mut sent = bytes(count);
        gpu.upload(Stream::Compute, there, &sent).expect("queued");
        let expected = std::mem::take(&mut sent);
        gpu.copy(Stream::Compute, again, there, count).expect("queued");
        gpu.zero(Stream::Compute, there, count).expect("queued");
        let mut back = vec![1; count];
        gpu.download(Stream::Compute, again, &mut back).expect("there");
        assert!(back == expected, "{count} bytes");
        gpu.download(Stream::Compute, there, &mut back).expect("there");
        assert!(back.iter().all(|&byte| byte == 0));
        gpu.free(there, count).expect("given out");
        gpu.free(again, count).expect("given out");
        assert!(gpu.free(again, count).is_err());
    }
}

#[test]
fn an_event_orders_streams_however_many_came_after_it() {
    for later in [0, 1, 300] {
        let gpu = gpu(64 * MIB);
        let there = gpu.allocate(4096).expect("room");
        gpu.upload(Stream::Compute, there, &bytes(4096)).expect("queued");
        let event = gpu.record(Stream::Compute).expect("recorded");
        for _ in 0..later {
            gpu.record(Stream::Copies).expect("recorded");
        }
        gpu.wait(Stream::Copies, event).expect("queued");
        let mut back = vec![0; 4096];
        gpu.download(Stream::Copies, there, &mut back).expect("there");
        assert!(back == bytes(4096), "{later} later events");
        assert_eq!(event, Event(1));
    }
}

#[test]
fn a_launch_passes_its_arguments_by_address() {
    let gpu = gpu(64 * MIB);
    let grid = Grid { blocks: [3, 2, 1], threads: 256, shared_bytes: 0 };
    gpu.launch(Stream::Compute, "elementwise_add_f32", grid, &args![0x1122_3344_5566u64, 7usize, 9usize]).expect("queued");
    let large = grid.with_shared(100 << 10);
    for _ in 0..2 {
        gpu.launch(Stream::Copies, "elementwise_add_f32", large, &args![1u64, 2usize, 3usize]).expect("queued");
    }
    let words = vec![0x1122_3344_5566, 7, 9];
    let first = Launch { kernel: "elementwise_add_f32".to_string(), grid: [3, 2, 1], threads: 256, shared: 0, words };
    state(|fake| {
        assert_eq!(fake.launches[0], first);
        assert_eq!((fake.launches[2].shared, fake.calls["function_set"], fake.calls["module_load"]), (100 << 10, 1, 1));
    });
    let refused = |kernel: &str, arguments: &[_]| gpu.launch(Stream::Compute, kernel, grid, arguments).expect_err("wrong").to_string();
    assert_eq!(refused("no_such_kernel", &[]), "there is no kernel no_such_kernel");
    assert!(refused("elementwise_add_f32", &args![1u64]).contains("takes arguments of [8, 8, 8] bytes and was given [8]"));
}

#[test]
fn what_the_driver_refuses_is_told_with_its_words() {
    let gpu = gpu(64 * MIB);
    let launch = || gpu.launch(Stream::Compute, "elementwise_add_f32", Grid::blocks(1, 32), &args![0u64, 0u64, 0usize]);
    state(|fake| fake.refused.insert("module_load", 218));
    let error = format!("{:#}", launch().expect_err("refused"));
    assert!(
        error.contains("loading the kernels of elementwise.cu") && error.contains("the driver says: ptxas fatal: a planted one"),
        "{error}"
    );
    state(|fake| fake.refused.clear());
    launch().expect("queued");
    state(|fake| fake.refused.insert("launch", 700));
    let error = launch().expect_err("refused").to_string();
    assert!(error.starts_with("launch (elementwise_add_f32) failed: what CUDA says, what CUDA says, 700; work that was queued"), "{error}");
    state(|fake| fake.refused.insert("event_synchronize", 999));
    let error = gpu.download(Stream::Compute, gpu.allocate(8).expect("room"), &mut [0; 8]).expect_err("refused").to_string();
    assert!(error.contains("event_synchronize (download)") && error.contains("fell off the bus"), "{error}");
}

#[test]
fn memory_grows_by_segments_and_ends_with_a_sentence() {
    let gpu = gpu(bytes_with_slack(100 * MIB));
    assert_eq!(state(|fake| fake.memory.len()), 1);
    let first = gpu.allocate(100 * MIB).expect("room");
    // The first segment is 128 MiB: this does not fit into what is left.
    let second = gpu.allocate(40 * MIB).expect("room");
    assert_eq!(state(|fake| fake.memory.len()), 2);
    let error = gpu.allocate(900 * MIB).expect_err("too much").to_string();
    assert_eq!(
        error,
        "out of memory: 960.0 MiB asked for, 140.0 MiB of this rank's 192.0 MiB taken, the largest free range is 28.0 MiB, and the GPU \
         itself has 832.0 MiB left; set less"
    );
    gpu.free(first, 100 * MIB).expect("given out");
    gpu.free(second, 40 * MIB).expect("given out");
    assert_eq!(gpu.allocate(128 * MIB).expect("the first segment is whole again"), first);
}

fn floats(gpu: &Cuda, values: &[f32], off: usize) -> u64 {
    let address = gpu.allocate(4 * (values.len() + off)).expect("room") + 4 * off as u64;
    gpu.upload(Stream::Compute, address, bytemuck::cast_slice(values)).expect("queued");
    address
}

#[test]
fn products_take_one_algorithm_a_key_and_are_right() {
    let gpu = gpu(64 * MIB);
    let number = |place: usize| (place * 13 % 11) as f32 - 5.0;
    // (m, n, k, columns beyond the matrix, elements beyond an aligned address)
    for (m, n, k, more, off) in [(8, 16, 32, 0, 0), (3, 5, 32, 0, 0), (7, 16, 32, 4, 1), (9, 9, 30, 2, 0)] {
        let values: Vec<f32> = (0..(m.max(n) + 1) * (k + more)).map(number).collect();
        let (a, b) = (floats(&gpu, &values, off), floats(&gpu, &values, 0));
        let (bias, before) = (floats(&gpu, &values[..n], off), vec![2.0; m * n]);
        let operand = |address| Operand { address, stride: k + more, order: Order::SummedInner };
        let gemm = Gemm {
            dtype: Dtype::F32,
            m,
            n,
            k,
            a: operand(a),
            b: operand(b),
            out: floats(&gpu, &before, off),
            accumulate: false,
            bias: None,
        };
        for gemm in [gemm, Gemm { accumulate: true, ..gemm }, Gemm { bias: Some(bias), ..gemm }] {
            gpu.upload(Stream::Compute, gemm.out, bytemuck::cast_slice(&before)).expect("queued");
            let taken = gpu.lock().arena.bytes_taken();
            gpu.gemm(&gemm).expect("queued");
            assert_eq!(gpu.lock().arena.bytes_taken(), taken, "scratch is given back");
            let mut out = vec![0f32; m * n];
            gpu.download(Stream::Compute, gemm.out, bytemuck::cast_slice_mut(&mut out)).expect("there");
            for (place, &out) in out.iter().enumerate() {
                let (i, j) = (place / n, place % n);
                let sum: f32 = (0..k).map(|l| values[i * (k + more) + l] * values[j * (k + more) + l]).sum();
                let beside = if gemm.accumulate { 2.0 } else { 0.0 } + if gemm.bias.is_some() { values[j] } else { 0.0 };
                assert_eq!(out, sum + beside, "({i}, {j}) of {gemm:?}");
            }
        }
    }
    // Sums over 30 are lengthened to 32: all sizes have the same three keys.
    assert_eq!(state(|fake| fake.calls["algorithms"]), 3);
    let nothing = Operand { address: 0, stride: 0, order: Order::SummedInner };
    let gemm = Gemm { dtype: Dtype::F32, m: 1, n: 1, k: 0, a: nothing, b: nothing, out: 0, accumulate: false, bias: None };
    assert!(gpu.gemm(&gemm).is_err());
}

#[test]
fn without_a_library_products_are_launches() {
    let started = fake::driver();
    let (facts, _) = started.gpu_of(0).expect("a GPU");
    let context = Context::open(started, facts, 1).expect("a context");
    let gpu = Gpu::new(Box::new(Cuda::new(context, None, 64 * MIB, "set less".to_string()).expect("memory")));
    let operand = Operand { address: 1 << 20, stride: 200, order: Order::SummedInner };
    let gemm =
        Gemm { dtype: Dtype::Bf16, m: 130, n: 60, k: 200, a: operand, b: operand, out: 2 << 20, accumulate: false, bias: Some(3 << 20) };
    let own = gpu.with_own_products();
    assert_eq!((own.products().as_str(), gpu.products().as_str()), ("ferrotron's own kernels", "nobody"));
    own.gemm(&gemm);
    own.check().expect("a launch");
    let words = vec![2 << 20, 1 << 20, 1 << 20];
    let expected = Launch { kernel: "matmul_forward_64_bf16".to_string(), grid: [3, 1, 1], threads: 128, shared: 32 << 10, words };
    state(|fake| assert_eq!(fake.launches, [expected]));
    // Nobody does what nobody was asked to find.
    gpu.gemm(&gemm);
    let error = gpu.check().expect_err("no library").to_string();
    assert!(error.contains("a product is asked of cuBLASLt, which was not loaded"), "{error}");
}

#[test]
fn all_that_was_taken_is_given_back() {
    {
        let gpu = gpu(64 * MIB);
        gpu.allocate(100 * MIB).expect("room");
        gpu.launch(Stream::Compute, "elementwise_add_f32", Grid::blocks(1, 32), &args![0u64, 0u64, 0usize]).expect("queued");
        let there = floats(&gpu, &[1.0; 64], 0);
        let operand = Operand { address: there, stride: 8, order: Order::SummedOuter };
        let out = floats(&gpu, &[0.0; 64], 0);
        let gemm = Gemm { dtype: Dtype::F32, m: 8, n: 8, k: 8, a: operand, b: operand, out, accumulate: true, bias: None };
        gpu.gemm(&gemm).expect("queued");
    }
    state(|fake| {
        assert!(fake.memory.is_empty() && fake.host.is_empty());
        for (one, other) in
            [("event_create", "event_destroy"), ("create a thing", "destroy a thing"), ("context_retain", "context_release")]
        {
            assert_eq!(fake.calls[one], fake.calls[other], "{one}, {other}");
        }
        assert_eq!((fake.calls["stream_destroy"], fake.calls["module_unload"], fake.calls["destroy"]), (2, 1, 1));
    });
}
