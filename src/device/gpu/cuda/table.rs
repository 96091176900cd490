//! The functions of the driver and of cuBLASLt that ferrotron calls, each looked up by its name when its library is loaded.
//!
//! The types are cudarc's, and the compiler holds every signature here to cudarc's. The functions are looked up here, for two reasons.
//! cudarc panics where a library or a function is missing; here that is an error. And it returns an `enum`, whose value is undefined
//! when a newer driver returns a code that cudarc has not heard of; here it is a number.
//!
//! Invariant: no call is made through a table before all of its functions were found.

#![allow(unsafe_code)]

use super::failure::Refusal;
use anyhow::{Context, Result};
use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};

/// A function of a C library, with the name it has there.
pub struct Function<F> {
    pub pointer: F,
    pub name: &'static str,
}

/// Calls a function of a table: `Ok`, or which call was refused with which code. Unsafe like every call of a C function.
macro_rules! call {
    ($function:expr $(, $argument:expr)* $(,)?) => {
        $crate::device::gpu::cuda::failure::outcome($function.name, ($function.pointer)($($argument),*))
    };
}

macro_rules! table {
    ($(#[$doc:meta])* $table:ident of $sys:ident, which return $status:ty; $($name:ident = $symbol:ident($($argument:ty),*);)*) => {
        $(#[$doc])*
        pub struct $table {
            $(pub $name: Function<unsafe extern "C" fn($($argument),*) -> u32>,)*
        }

        impl $table {
            pub fn of(library: &Library) -> Result<$table> {
                Ok($table { $($name: Function { pointer: symbol(library, stringify!($symbol))?, name: stringify!($symbol) },)* })
            }
        }

        $(const _: unsafe fn($($argument),*) -> $status = $sys::$symbol;)*
    };
}

table! {
    /// The driver, libcuda.
    Driver of cu, which return cu::CUresult;
    init = cuInit(c_uint);
    driver_version = cuDriverGetVersion(*mut c_int);
    device_count = cuDeviceGetCount(*mut c_int);
    device = cuDeviceGet(*mut cu::CUdevice, c_int);
    device_name = cuDeviceGetName(*mut c_char, c_int, cu::CUdevice);
    device_memory = cuDeviceTotalMem_v2(*mut usize, cu::CUdevice);
    device_attribute = cuDeviceGetAttribute(*mut c_int, cu::CUdevice_attribute, cu::CUdevice);
    device_bus_id = cuDeviceGetPCIBusId(*mut c_char, c_int, cu::CUdevice);
    context_retain = cuDevicePrimaryCtxRetain(*mut cu::CUcontext, cu::CUdevice);
    context_release = cuDevicePrimaryCtxRelease_v2(cu::CUdevice);
    context_set = cuCtxSetCurrent(cu::CUcontext);
    memory_info = cuMemGetInfo_v2(*mut usize, *mut usize);
    memory_allocate = cuMemAlloc_v2(*mut cu::CUdeviceptr, usize);
    memory_free = cuMemFree_v2(cu::CUdeviceptr);
    host_allocate = cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    host_free = cuMemFreeHost(*mut c_void);
    stream_create = cuStreamCreate(*mut cu::CUstream, c_uint);
    stream_destroy = cuStreamDestroy_v2(cu::CUstream);
    stream_synchronize = cuStreamSynchronize(cu::CUstream);
    stream_wait = cuStreamWaitEvent(cu::CUstream, cu::CUevent, c_uint);
    event_create = cuEventCreate(*mut cu::CUevent, c_uint);
    event_destroy = cuEventDestroy_v2(cu::CUevent);
    event_record = cuEventRecord(cu::CUevent, cu::CUstream);
    event_synchronize = cuEventSynchronize(cu::CUevent);
    module_load = cuModuleLoadDataEx(*mut cu::CUmodule, *const c_void, c_uint, *mut cu::CUjit_option, *mut *mut c_void);
    module_unload = cuModuleUnload(cu::CUmodule);
    module_function = cuModuleGetFunction(*mut cu::CUfunction, cu::CUmodule, *const c_char);
    function_set = cuFuncSetAttribute(cu::CUfunction, cu::CUfunction_attribute, c_int);
    launch = cuLaunchKernel(
        cu::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, cu::CUstream, *mut *mut c_void, *mut *mut c_void
    );
    copy_to_device = cuMemcpyHtoDAsync_v2(cu::CUdeviceptr, *const c_void, usize, cu::CUstream);
    copy_to_host = cuMemcpyDtoHAsync_v2(*mut c_void, cu::CUdeviceptr, usize, cu::CUstream);
    copy_on_device = cuMemcpyDtoDAsync_v2(cu::CUdeviceptr, cu::CUdeviceptr, usize, cu::CUstream);
    copy_rows = cuMemcpy2DAsync_v2(*const cu::CUDA_MEMCPY2D, cu::CUstream);
    fill = cuMemsetD8Async(cu::CUdeviceptr, c_uchar, usize, cu::CUstream);
}

table! {
    /// cuBLASLt.
    Products of lt, which return lt::cublasStatus_t;
    create = cublasLtCreate(*mut lt::cublasLtHandle_t);
    destroy = cublasLtDestroy(lt::cublasLtHandle_t);
    operation_create = cublasLtMatmulDescCreate(*mut lt::cublasLtMatmulDesc_t, lt::cublasComputeType_t, lt::cudaDataType_t);
    operation_set = cublasLtMatmulDescSetAttribute(
        lt::cublasLtMatmulDesc_t, lt::cublasLtMatmulDescAttributes_t, *const c_void, usize
    );
    operation_destroy = cublasLtMatmulDescDestroy(lt::cublasLtMatmulDesc_t);
    layout_create = cublasLtMatrixLayoutCreate(*mut lt::cublasLtMatrixLayout_t, lt::cudaDataType, u64, u64, i64);
    layout_destroy = cublasLtMatrixLayoutDestroy(lt::cublasLtMatrixLayout_t);
    preference_create = cublasLtMatmulPreferenceCreate(*mut lt::cublasLtMatmulPreference_t);
    preference_set = cublasLtMatmulPreferenceSetAttribute(
        lt::cublasLtMatmulPreference_t, lt::cublasLtMatmulPreferenceAttributes_t, *const c_void, usize
    );
    preference_destroy = cublasLtMatmulPreferenceDestroy(lt::cublasLtMatmulPreference_t);
    algorithms = cublasLtMatmulAlgoGetHeuristic(
        lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t,
        lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatmulPreference_t, c_int,
        *mut lt::cublasLtMatmulHeuristicResult_t, *mut c_int
    );
    algorithm_check = cublasLtMatmulAlgoCheck(
        lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t,
        lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, *const lt::cublasLtMatmulAlgo_t,
        *mut lt::cublasLtMatmulHeuristicResult_t
    );
    algorithm_get = cublasLtMatmulAlgoConfigGetAttribute(
        *const lt::cublasLtMatmulAlgo_t, lt::cublasLtMatmulAlgoConfigAttributes_t, *mut c_void, usize, *mut usize
    );
    multiply = cublasLtMatmul(
        lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, *const c_void, *const c_void, lt::cublasLtMatrixLayout_t, *const c_void,
        lt::cublasLtMatrixLayout_t, *const c_void, *const c_void, lt::cublasLtMatrixLayout_t, *mut c_void,
        lt::cublasLtMatrixLayout_t, *const lt::cublasLtMatmulAlgo_t, *mut c_void, usize, lt::cudaStream_t
    );
}

/// How a library says what its codes mean.
#[derive(Clone, Copy)]
pub enum Texts {
    Driver { name: unsafe extern "C" fn(u32, *mut *const c_char) -> u32, text: unsafe extern "C" fn(u32, *mut *const c_char) -> u32 },
    Products { name: unsafe extern "C" fn(u32) -> *const c_char, text: unsafe extern "C" fn(u32) -> *const c_char },
}

impl Texts {
    pub fn of_driver(library: &Library) -> Result<Texts> {
        Ok(Texts::Driver { name: symbol(library, "cuGetErrorName")?, text: symbol(library, "cuGetErrorString")? })
    }

    pub fn of_products(library: &Library) -> Result<Texts> {
        Ok(Texts::Products { name: symbol(library, "cublasLtGetStatusName")?, text: symbol(library, "cublasLtGetStatusString")? })
    }

    /// The name of a code and what it says of it, where the library knows it.
    pub fn of(&self, refusal: Refusal) -> (Option<String>, Option<String>) {
        let code = refusal.code;
        match *self {
            Texts::Driver { name, text } => {
                let said = |ask: unsafe extern "C" fn(u32, *mut *const c_char) -> u32| {
                    let mut said = std::ptr::null();
                    // SAFETY: the function takes any number, and leaves null or a text that lives as long as the library.
                    if unsafe { ask(code, &mut said) } == 0 { words(said) } else { None }
                };
                (said(name), said(text))
            }
            // SAFETY: both take any number, and return null or a text that lives as long as the library.
            Texts::Products { name, text } => unsafe { (words(name(code)), words(text(code))) },
        }
    }
}

/// The version of a loaded cuBLASLt, as 10000 a major version and 100 a minor one.
pub fn products_version(library: &Library) -> Result<usize> {
    let version: unsafe extern "C" fn() -> usize = symbol(library, "cublasLtGetVersion")?;
    // SAFETY: the function takes nothing and returns a number.
    Ok(unsafe { version() })
}

fn words(text: *const c_char) -> Option<String> {
    // SAFETY: a text that a library returns ends in a zero byte and is not changed.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F> {
    // SAFETY: whoever asks gives the type that the function of this name has; for tables the compiler checks it against cudarc's.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|symbol| *symbol).with_context(|| format!("it has no function {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_without_the_functions_is_refused_by_the_name_of_the_first() {
        // SAFETY: the C library is loaded already.
        let library = unsafe { Library::new("libc.so.6") }.expect("every process has one");
        let error = Driver::of(&library).map(drop).expect_err("no driver");
        assert_eq!(error.to_string(), "it has no function cuInit");
        assert!(Products::of(&library).is_err() && Texts::of_driver(&library).is_err() && products_version(&library).is_err());
    }
}
