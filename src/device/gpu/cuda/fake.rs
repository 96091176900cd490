//! A driver and a cuBLASLt for tests: what the C functions are documented to do, on this machine's memory.
//!
//! Streams are as lazy as they may be: work is done when somebody waits for it. The state is the calling thread's, so tests do not meet.
//!
//! Invariant: a function gets what the real one gets; what the real one may not be given is a failed assertion here.

#![allow(unsafe_code)]

use super::probe::{Found, Started, started};
use super::table::{Driver, Function, Products, Texts};
use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};
use std::path::PathBuf;

#[derive(Default)]
pub struct Fake {
    streams: Vec<Queue>,
    /// The stream of an event, and how much of its work the event stands for.
    events: Vec<(usize, usize)>,
    pub memory: HashMap<u64, Vec<u64>>,
    pub host: HashMap<usize, Vec<u64>>,
    modules: Vec<String>,
    functions: Vec<String>,
    pub launches: Vec<Launch>,
    /// Calls that are refused, with which code.
    pub refused: HashMap<&'static str, u32>,
    pub bytes_free: usize,
    pub calls: HashMap<&'static str, usize>,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    queued: usize,
    done: usize,
}

enum Work {
    Do(Box<dyn FnOnce()>),
    Wait(usize, usize),
}

#[derive(Clone, PartialEq, Debug)]
pub struct Launch {
    pub kernel: String,
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
    /// The first 8 bytes at the address of each of the first `words` arguments.
    pub words: Vec<u64>,
}

thread_local! {
    static STATE: RefCell<Fake> = RefCell::new(Fake { bytes_free: 1 << 30, ..Fake::default() });
}

pub fn state<T>(work: impl FnOnce(&mut Fake) -> T) -> T {
    STATE.with(|state| work(&mut state.borrow_mut()))
}

/// Counts a call, and tells how it is to end.
fn called(name: &'static str) -> u32 {
    state(|fake| {
        *fake.calls.entry(name).or_default() += 1;
        fake.refused.get(name).copied().unwrap_or(0)
    })
}

/// Handles are numbers from 1.
fn handle<T>(place: usize) -> *mut T {
    std::ptr::without_provenance_mut(place + 1)
}

fn place<T>(handle: *mut T) -> usize {
    handle.addr().checked_sub(1).expect("a handle that is not null")
}

fn queue(stream: cu::CUstream, work: Work) {
    state(|fake| {
        let queue = &mut fake.streams[place(stream)];
        queue.work.push_back(work);
        queue.queued += 1;
    });
}

/// Does the work of a stream until `position` of it is done.
fn finish(stream: usize, position: usize) {
    while let Some(work) = state(|fake| {
        let queue = &mut fake.streams[stream];
        if queue.done < position { queue.work.pop_front() } else { None }
    }) {
        match work {
            Work::Do(work) => work(),
            Work::Wait(other, position) => finish(other, position),
        }
        state(|fake| fake.streams[stream].done += 1);
    }
}

fn write<T>(to: *mut T, value: T) -> u32 {
    // SAFETY: callers pass where they want it.
    unsafe { to.write(value) };
    0
}

fn write_text(to: *mut c_char, room: c_int, text: &str) -> u32 {
    assert!(room as usize > text.len());
    text.bytes().chain([0]).enumerate().fold(0, |code, (place, byte)| code + write(to.wrapping_add(place), byte as c_char))
}

extern "C" fn init(flags: c_uint) -> u32 {
    assert_eq!(flags, 0);
    called("init")
}
extern "C" fn driver_version(to: *mut c_int) -> u32 {
    write(to, 13000)
}
extern "C" fn device_count(to: *mut c_int) -> u32 {
    write(to, 1)
}
extern "C" fn device(to: *mut cu::CUdevice, ordinal: c_int) -> u32 {
    write(to, ordinal + 10)
}
extern "C" fn device_name(to: *mut c_char, room: c_int, device: cu::CUdevice) -> u32 {
    assert_eq!(device, 10);
    write_text(to, room, "Fake GPU")
}
extern "C" fn device_memory(to: *mut usize, _: cu::CUdevice) -> u32 {
    write(to, 1 << 30)
}
extern "C" fn device_attribute(to: *mut c_int, attribute: cu::CUdevice_attribute, _: cu::CUdevice) -> u32 {
    write(to, if attribute == cu::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR { 9 } else { 0 })
}
extern "C" fn device_bus_id(to: *mut c_char, room: c_int, _: cu::CUdevice) -> u32 {
    write_text(to, room, "0000:3b:00.0")
}
extern "C" fn context_retain(to: *mut cu::CUcontext, _: cu::CUdevice) -> u32 {
    called("context_retain");
    write(to, handle(0))
}
extern "C" fn context_release(_: cu::CUdevice) -> u32 {
    called("context_release")
}
extern "C" fn context_set(context: cu::CUcontext) -> u32 {
    assert_eq!(place(context), 0);
    0
}
extern "C" fn memory_info(free: *mut usize, total: *mut usize) -> u32 {
    write(total, 1 << 30);
    write(free, state(|fake| fake.bytes_free))
}
extern "C" fn memory_allocate(to: *mut u64, bytes: usize) -> u32 {
    if state(|fake| fake.bytes_free) < bytes {
        return 2;
    }
    // Room to start at a multiple of 256, as the driver does.
    let memory = vec![u64::MAX; bytes / 8 + 32];
    let start = (memory.as_ptr() as u64).next_multiple_of(256);
    state(|fake| {
        fake.bytes_free -= bytes;
        fake.memory.insert(start, memory);
    });
    write(to, start)
}
extern "C" fn memory_free(start: u64) -> u32 {
    state(|fake| fake.memory.remove(&start)).map_or(1, |_| 0)
}
extern "C" fn host_allocate(to: *mut *mut c_void, bytes: usize, flags: c_uint) -> u32 {
    assert_eq!(flags, cu::CU_MEMHOSTALLOC_PORTABLE);
    let mut memory = vec![0u64; bytes / 8];
    let start: *mut c_void = memory.as_mut_ptr().cast();
    state(|fake| fake.host.insert(start.addr(), memory));
    write(to, start)
}
extern "C" fn host_free(start: *mut c_void) -> u32 {
    state(|fake| fake.host.remove(&start.addr())).map_or(1, |_| 0)
}
extern "C" fn stream_create(to: *mut cu::CUstream, flags: c_uint) -> u32 {
    assert_eq!(flags, 1);
    write(
        to,
        handle(state(|fake| {
            fake.streams.push(Queue::default());
            fake.streams.len() - 1
        })),
    )
}
extern "C" fn stream_destroy(_: cu::CUstream) -> u32 {
    called("stream_destroy")
}
extern "C" fn stream_synchronize(stream: cu::CUstream) -> u32 {
    finish(place(stream), state(|fake| fake.streams[place(stream)].queued));
    called("stream_synchronize")
}
extern "C" fn stream_wait(stream: cu::CUstream, event: cu::CUevent, _: c_uint) -> u32 {
    let (other, position) = state(|fake| fake.events[place(event)]);
    queue(stream, Work::Wait(other, position));
    0
}
extern "C" fn event_create(to: *mut cu::CUevent, flags: c_uint) -> u32 {
    assert_eq!(flags, 2);
    called("event_create");
    write(
        to,
        handle(state(|fake| {
            fake.events.push((0, 0));
            fake.events.len() - 1
        })),
    )
}
extern "C" fn event_destroy(_: cu::CUevent) -> u32 {
    called("event_destroy")
}
extern "C" fn event_record(event: cu::CUevent, stream: cu::CUstream) -> u32 {
    state(|fake| fake.events[place(event)] = (place(stream), fake.streams[place(stream)].queued));
    called("event_record")
}
extern "C" fn event_synchronize(event: cu::CUevent) -> u32 {
    let (stream, position) = state(|fake| fake.events[place(event)]);
    finish(stream, position);
    called("event_synchronize")
}
extern "C" fn module_load(
    to: *mut cu::CUmodule,
    text: *const c_void,
    count: c_uint,
    options: *mut cu::CUjit_option,
    values: *mut *mut c_void,
) -> u32 {
    // SAFETY: there are as many options and values as is said, and the text ends in a zero byte.
    let (options, values, text) = unsafe {
        (
            std::slice::from_raw_parts(options, count as usize),
            std::slice::from_raw_parts(values, count as usize),
            CStr::from_ptr(text.cast()).to_str().expect("PTX"),
        )
    };
    assert_eq!(options[0], cu::CUjit_option::CU_JIT_ERROR_LOG_BUFFER);
    assert_eq!(options[1], cu::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES);
    let code = called("module_load");
    if code != 0 {
        return write_text(values[0].cast(), values[1].addr() as c_int, "ptxas fatal: a planted one") + code;
    }
    write(
        to,
        handle(state(|fake| {
            fake.modules.push(text.to_string());
            fake.modules.len() - 1
        })),
    )
}
extern "C" fn module_unload(_: cu::CUmodule) -> u32 {
    called("module_unload")
}
extern "C" fn module_function(to: *mut cu::CUfunction, module: cu::CUmodule, name: *const c_char) -> u32 {
    // SAFETY: the name ends in a zero byte.
    let name = unsafe { CStr::from_ptr(name) }.to_str().expect("a name").to_string();
    assert!(state(|fake| fake.modules[place(module)].contains(&name)));
    write(
        to,
        handle(state(|fake| {
            fake.functions.push(name);
            fake.functions.len() - 1
        })),
    )
}
extern "C" fn function_set(_: cu::CUfunction, attribute: cu::CUfunction_attribute, _: c_int) -> u32 {
    assert_eq!(attribute, cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
    called("function_set")
}
extern "C" fn launch(
    function: cu::CUfunction,
    x: c_uint,
    y: c_uint,
    z: c_uint,
    threads: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared: c_uint,
    stream: cu::CUstream,
    arguments: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> u32 {
    assert!(extra.is_null() && threads_y == 1 && threads_z == 1 && place(stream) < 2);
    // SAFETY: the kernel that tests launch has three arguments of 8 bytes.
    let words = (0..3).map(|argument| unsafe { (*arguments.wrapping_add(argument)).cast::<u64>().read_unaligned() }).collect();
    state(|fake| {
        let kernel = fake.functions[place(function)].clone();
        fake.launches.push(Launch { kernel, grid: [x, y, z], threads, shared, words });
    });
    called("launch")
}

fn queue_copy(to: u64, from: u64, bytes: usize, stream: cu::CUstream) {
    // SAFETY: both ranges are this machine's memory; whether they still are when the copy is done is what tests look at.
    queue(stream, Work::Do(Box::new(move || unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) })));
}
extern "C" fn copy_to_device(to: u64, from: *const c_void, bytes: usize, stream: cu::CUstream) -> u32 {
    assert!(bytes > 0);
    queue_copy(to, from as u64, bytes, stream);
    called("copy_to_device")
}
extern "C" fn copy_to_host(to: *mut c_void, from: u64, bytes: usize, stream: cu::CUstream) -> u32 {
    assert!(bytes > 0);
    queue_copy(to as u64, from, bytes, stream);
    called("copy_to_host")
}
extern "C" fn copy_on_device(to: u64, from: u64, bytes: usize, stream: cu::CUstream) -> u32 {
    queue_copy(to, from, bytes, stream);
    called("copy_on_device")
}
extern "C" fn copy_rows(copy: *const cu::CUDA_MEMCPY2D, stream: cu::CUstream) -> u32 {
    // SAFETY: the description is read before the call returns.
    let copy = unsafe { copy.read() };
    assert!(copy.srcPitch >= copy.WidthInBytes && copy.dstPitch >= copy.WidthInBytes);
    for row in 0..copy.Height as u64 {
        let (to, from) = (copy.dstDevice + row * copy.dstPitch as u64, copy.srcDevice + row * copy.srcPitch as u64);
        queue_copy(to, from, copy.WidthInBytes, stream);
    }
    called("copy_rows")
}
extern "C" fn fill(start: u64, byte: c_uchar, bytes: usize, stream: cu::CUstream) -> u32 {
    // SAFETY: as of copies.
    queue(stream, Work::Do(Box::new(move || unsafe { std::ptr::write_bytes(start as *mut u8, byte, bytes) })));
    called("fill")
}

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

extern "C" fn no_text(_: u32, to: *mut *const c_char) -> u32 {
    write(to, c"what CUDA says".as_ptr())
}
extern "C" fn no_status_text(_: u32) -> *const c_char {
    c"what cuBLASLt says".as_ptr()
}

macro_rules! made {
    ($table:ident: $($name:ident),* $(,)?) => { $table { $($name: Function { pointer: $name, name: stringify!($name) },)* } };
}

pub fn driver() -> Started {
    let driver = made!(Driver: init, driver_version, device_count, device, device_name, device_memory, device_attribute, device_bus_id,
        context_retain, context_release, context_set, memory_info, memory_allocate, memory_free, host_allocate, host_free, stream_create,
        stream_destroy, stream_synchronize, stream_wait, event_create, event_destroy, event_record, event_synchronize, module_load,
        module_unload, module_function, function_set, launch, copy_to_device, copy_to_host, copy_on_device, copy_rows, fill);
    started(driver, Texts::Driver { name: no_text, text: no_text }, PathBuf::from("libcuda.so.1")).expect("a driver that is new enough")
}

pub fn products() -> Found {
    let products = made!(Products: create, destroy, operation_create, operation_set, operation_destroy, layout_create, layout_destroy,
        preference_create, preference_set, preference_destroy, algorithms, algorithm_check, algorithm_get, multiply);
    let texts = Texts::Products { name: no_status_text, text: no_status_text };
    Found { products, texts, path: PathBuf::from("libcublasLt.so.13"), version: 130_000 }
}
