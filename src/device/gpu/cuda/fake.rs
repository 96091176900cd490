//! A driver for tests: what the C functions are documented to do, on this machine's memory.
//!
//! Streams are as lazy as they may be: work is done when somebody waits for it. The state is the calling thread's, so tests do not meet.
//!
//! Invariant: a function gets what the real one gets; what the real one may not be given is a failed assertion here.

#![allow(unsafe_code)]

use super::probe::{Started, started};
use super::table::{Driver, Function, Texts};
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

pub enum Work {
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
pub fn called(name: &'static str) -> u32 {
    state(|fake| {
        *fake.calls.entry(name).or_default() += 1;
        fake.refused.get(name).copied().unwrap_or(0)
    })
}

/// Handles are numbers from 1.
pub fn handle<T>(place: usize) -> *mut T {
    std::ptr::without_provenance_mut(place + 1)
}

fn place<T>(handle: *mut T) -> usize {
    handle.addr().checked_sub(1).expect("a handle that is not null")
}

pub fn queue(stream: cu::CUstream, work: Work) {
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

pub fn write<T>(to: *mut T, value: T) -> u32 {
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

extern "C" fn no_text(_: u32, to: *mut *const c_char) -> u32 {
    write(to, c"what CUDA says".as_ptr())
}
/// A table of functions that are called like its fields.
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
