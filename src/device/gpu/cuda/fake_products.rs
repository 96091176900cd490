//! A cuBLASLt for tests: what the C functions are documented to do, on this machine's memory and on the streams of `fake.rs`.
//!
//! Invariant: a function gets what the real one gets; what the real one may not be given is a failed assertion here.

#![allow(unsafe_code)]

use super::fake::{Work, called, handle, queue, write};
use super::probe::Found;
use super::table::{Function, Products, Texts};
use cudarc::cublaslt::sys as lt;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::path::PathBuf;

extern "C" fn create(to: *mut lt::cublasLtHandle_t) -> u32 {
    write(to, handle(0))
}
extern "C" fn destroy(_: lt::cublasLtHandle_t) -> u32 {
    called("destroy")
}

/// What a description or a layout holds.
type Attributes = HashMap<u32, Vec<u8>>;

extern "C" fn operation_create(to: *mut lt::cublasLtMatmulDesc_t, compute: lt::cublasComputeType_t, scale: lt::cudaDataType_t) -> u32 {
    assert_eq!((compute, scale), (lt::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt::cudaDataType_t::CUDA_R_32F));
    called("create a thing");
    write(to, Box::into_raw(Box::<Attributes>::default()).cast())
}
extern "C" fn operation_set(
    operation: lt::cublasLtMatmulDesc_t,
    attribute: lt::cublasLtMatmulDescAttributes_t,
    value: *const c_void,
    bytes: usize,
) -> u32 {
    // SAFETY: the handle is one of `operation_create`, and as many bytes can be read as is said.
    let (attributes, value) = unsafe { (&mut *operation.cast::<Attributes>(), std::slice::from_raw_parts(value.cast::<u8>(), bytes)) };
    attributes.insert(attribute as u32, value.to_vec());
    0
}
extern "C" fn operation_destroy(operation: lt::cublasLtMatmulDesc_t) -> u32 {
    // SAFETY: the handle is one of `operation_create`.
    drop(unsafe { Box::from_raw(operation.cast::<Attributes>()) });
    called("destroy a thing")
}

#[derive(Clone, Copy)]
struct Matrix {
    dtype: lt::cudaDataType,
    rows: u64,
    columns: u64,
    leading: i64,
}

extern "C" fn layout_create(to: *mut lt::cublasLtMatrixLayout_t, dtype: lt::cudaDataType, rows: u64, columns: u64, leading: i64) -> u32 {
    called("create a thing");
    write(to, Box::into_raw(Box::new(Matrix { dtype, rows, columns, leading })).cast())
}
extern "C" fn layout_destroy(layout: lt::cublasLtMatrixLayout_t) -> u32 {
    // SAFETY: the handle is one of `layout_create`.
    drop(unsafe { Box::from_raw(layout.cast::<Matrix>()) });
    called("destroy a thing")
}
extern "C" fn preference_create(to: *mut lt::cublasLtMatmulPreference_t) -> u32 {
    called("create a thing");
    write(to, handle(0))
}
extern "C" fn preference_set(
    _: lt::cublasLtMatmulPreference_t,
    attribute: lt::cublasLtMatmulPreferenceAttributes_t,
    _: *const c_void,
    bytes: usize,
) -> u32 {
    let workspace = attribute == lt::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    assert_eq!(bytes, if workspace { 8 } else { 4 });
    0
}
extern "C" fn preference_destroy(_: lt::cublasLtMatmulPreference_t) -> u32 {
    called("destroy a thing")
}

/// The algorithms there are: one that cuts k, one that wants scratch memory, one with which nothing is wrong.
const ALGORITHMS: [u64; 3] = [1, 2, 3];
const SOUND: u64 = 3;

fn result(id: u64) -> lt::cublasLtMatmulHeuristicResult_t {
    // SAFETY: a result is plain numbers, of which zeros are one.
    let mut result: lt::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
    result.algo.data[0] = id;
    result.workspaceSize = if id == 2 { 1 << 20 } else { 0 };
    result
}
extern "C" fn algorithms(
    _: lt::cublasLtHandle_t,
    _: lt::cublasLtMatmulDesc_t,
    _: lt::cublasLtMatrixLayout_t,
    _: lt::cublasLtMatrixLayout_t,
    c: lt::cublasLtMatrixLayout_t,
    d: lt::cublasLtMatrixLayout_t,
    _: lt::cublasLtMatmulPreference_t,
    most: c_int,
    to: *mut lt::cublasLtMatmulHeuristicResult_t,
    count: *mut c_int,
) -> u32 {
    assert!(c == d && most as usize >= ALGORITHMS.len());
    for (place, &id) in ALGORITHMS.iter().enumerate() {
        write(to.wrapping_add(place), result(id));
    }
    write(count, ALGORITHMS.len() as c_int);
    called("algorithms")
}
extern "C" fn algorithm_check(
    _: lt::cublasLtHandle_t,
    _: lt::cublasLtMatmulDesc_t,
    _: lt::cublasLtMatrixLayout_t,
    _: lt::cublasLtMatrixLayout_t,
    _: lt::cublasLtMatrixLayout_t,
    _: lt::cublasLtMatrixLayout_t,
    algorithm: *const lt::cublasLtMatmulAlgo_t,
    to: *mut lt::cublasLtMatmulHeuristicResult_t,
) -> u32 {
    // SAFETY: it is one of ours.
    write(to, result(unsafe { (*algorithm).data[0] }));
    called("algorithm_check")
}
extern "C" fn algorithm_get(
    algorithm: *const lt::cublasLtMatmulAlgo_t,
    attribute: lt::cublasLtMatmulAlgoConfigAttributes_t,
    to: *mut c_void,
    bytes: usize,
    _: *mut usize,
) -> u32 {
    assert_eq!(bytes, 4);
    // SAFETY: it is one of ours.
    let id = unsafe { (*algorithm).data[0] };
    let split = attribute == lt::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_SPLITK_NUM;
    write(to.cast::<c_int>(), if split { 1 + 3 * c_int::from(id == 1) } else { 0 })
}
extern "C" fn multiply(
    _: lt::cublasLtHandle_t,
    operation: lt::cublasLtMatmulDesc_t,
    alpha: *const c_void,
    a: *const c_void,
    of_a: lt::cublasLtMatrixLayout_t,
    b: *const c_void,
    of_b: lt::cublasLtMatrixLayout_t,
    beta: *const c_void,
    c: *const c_void,
    of_c: lt::cublasLtMatrixLayout_t,
    d: *mut c_void,
    of_d: lt::cublasLtMatrixLayout_t,
    algorithm: *const lt::cublasLtMatmulAlgo_t,
    workspace: *mut c_void,
    bytes: usize,
    stream: lt::cudaStream_t,
) -> u32 {
    assert!(c == d.cast_const() && of_c == of_d && workspace.is_null() && bytes == 0);
    // SAFETY: handles are of the functions above; factors are f32.
    let (attributes, [x, y, z], alpha, beta, id) = unsafe {
        let layouts = [of_a, of_b, of_d].map(|layout| *layout.cast::<Matrix>());
        let [alpha, beta] = [alpha, beta].map(|factor| *factor.cast::<f32>());
        ((*operation.cast::<Attributes>()).clone(), layouts, alpha, beta, (*algorithm).data[0])
    };
    assert_eq!((id, alpha, x.dtype), (SOUND, 1.0, lt::cudaDataType_t::CUDA_R_32F));
    let number = |id: lt::cublasLtMatmulDescAttributes_t| {
        attributes.get(&(id as u32)).map(|value| value.iter().rev().fold(0u64, |x, &b| x << 8 | b as u64))
    };
    let op_a = number(lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA) == Some(1);
    let op_b = number(lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB) == Some(1);
    let bias = (number(lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE) == Some(4))
        .then(|| number(lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER).expect("a bias"));
    let (a, b, d) = (a as u64, b as u64, d as u64);
    let work = move || {
        let at = |start: u64, of: Matrix, transposed: bool, i: u64, j: u64| {
            let (row, column) = if transposed { (j, i) } else { (i, j) };
            assert!(row < of.rows && column < of.columns);
            // SAFETY: it is an element of the matrix as described.
            unsafe { ((start + 4 * (row + column * of.leading as u64)) as *const f32).read() }
        };
        let k = if op_a { x.rows } else { x.columns };
        for i in 0..z.rows {
            for j in 0..z.columns {
                let sum: f32 = (0..k).map(|l| at(a, x, op_a, i, l) * at(b, y, op_b, l, j)).sum();
                let to = (d + 4 * (i + j * z.leading as u64)) as *mut f32;
                // SAFETY: as above; a bias has an element for each row.
                unsafe {
                    let before = if beta == 0.0 { 0.0 } else { beta * to.read() };
                    to.write(sum + before + bias.map_or(0.0, |bias| ((bias + 4 * i) as *const f32).read()));
                }
            }
        }
    };
    queue(stream.cast(), Work::Do(Box::new(work)));
    called("multiply")
}

extern "C" fn no_status_text(_: u32) -> *const c_char {
    c"what cuBLASLt says".as_ptr()
}

pub fn products() -> Found {
    let products = made!(Products: create, destroy, operation_create, operation_set, operation_destroy, layout_create, layout_destroy,
        preference_create, preference_set, preference_destroy, algorithms, algorithm_check, algorithm_get, multiply);
    let texts = Texts::Products { name: no_status_text, text: no_status_text };
    Found { products, texts, path: PathBuf::from("libcublasLt.so.13"), version: 130_000 }
}
