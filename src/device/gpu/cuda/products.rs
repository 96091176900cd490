//! Matrix products by cuBLASLt, with one algorithm for each `Key` and descriptors that are made once for each sizes.
//!
//! An algorithm is asked for once, for sizes that no call has a part in (`CANONICAL` by `CANONICAL`), and then used for all sizes: the same
//! tiles go over k in the same steps, so that an element's bits do not depend on m and n. An algorithm that cuts k into parts, adds parts
//! in memory or wants scratch memory is never taken. What an algorithm then does with its tiles is NVIDIA's; `promise.rs` compares
//! bits over m and n when a run begins, and the program's own products (`cuda/matmul.cu`) have no need of it.
//!
//! Sums are in f32 and f32 is not cut to TF32. A bias is added before the only rounding, by the product itself.
//!
//! Invariant: the algorithm of a key does not change as long as the program runs.

#![allow(unsafe_code)]

use super::context::Context;
use super::failure::{self, Refusal};
use super::probe::{Found, library_version};
use super::recipe::{Columns, Key, Sizes, out_dtype};
use super::table::{Products, Texts};
use crate::device::gpu::driver::Stream;
use crate::dtype::Dtype;
use anyhow::{Error, Result, bail};
use cudarc::cublaslt::sys as lt;
use cudarc::cublaslt::sys::cublasLtMatmulAlgoConfigAttributes_t as Of;
use cudarc::cublaslt::sys::cublasLtMatmulDescAttributes_t as Set;
use cudarc::cublaslt::sys::cublasLtMatmulPreferenceAttributes_t as Prefer;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{addr_of, from_ref, null_mut};

/// m and n of the product that an algorithm is chosen for: large enough that it is one for large products, which take the time.
const CANONICAL: usize = 4096;

/// Algorithms that are considered for a key.
const CANDIDATES: usize = 16;

/// Descriptors are made anew when there are more: sampling text asks for ever other sizes.
const MOST_PLANS: usize = 4096;

pub struct Multiplier {
    table: Products,
    texts: Texts,
    handle: lt::cublasLtHandle_t,
    operations: HashMap<Key, Operation>,
    plans: HashMap<Sizes, Plan>,
    /// As 10000 a major version and 100 a minor one.
    version: usize,
}

/// A thing of cuBLASLt's that is destroyed when nobody has it any more.
struct Owned<T: Copy> {
    handle: T,
    destroy: unsafe extern "C" fn(T) -> u32,
}

type Description = Owned<lt::cublasLtMatmulDesc_t>;
type Layout = Owned<lt::cublasLtMatrixLayout_t>;

struct Operation {
    description: Description,
    algorithm: lt::cublasLtMatmulAlgo_t,
}

/// How cuBLASLt is told of the matrices of one product.
struct Plan {
    a: Layout,
    b: Layout,
    d: Layout,
}

// SAFETY: the handles are the library's, which may be called from any thread.
unsafe impl Send for Multiplier {}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: the handle is this one's alone.
        unsafe { (self.destroy)(self.handle) };
    }
}

impl Multiplier {
    pub fn new(found: Found, context: &Context) -> Result<Multiplier> {
        let Found { products: table, texts, version, .. } = found;
        let mut handle = null_mut();
        // The library makes a handle for the context that is bound to the thread.
        context.bound(None, |_| Ok(()))?;
        // SAFETY: the library writes a handle to where it is told to.
        unsafe { call!(table.create, &mut handle) }.map_err(|refusal| failure::sentence(refusal, None, Some(&texts)))?;
        Ok(Multiplier { table, texts, handle, operations: HashMap::new(), plans: HashMap::new(), version })
    }

    pub fn name(&self) -> String {
        format!("cuBLASLt {}", library_version(self.version))
    }

    /// Queues a product of cuBLASLt's A and B into D on the stream of `Compute`.
    pub fn multiply(&mut self, context: &Context, sizes: &Sizes, [a, b, d]: [u64; 3], bias: u64) -> Result<()> {
        context.bound(None, |_| Ok(()))?;
        self.prepare(sizes, bias)?;
        let (Operation { description, algorithm }, plan) = (&self.operations[&sizes.key], &self.plans[sizes]);
        if sizes.key.bias {
            self.set(description, Set::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias).map_err(|refusal| self.sentence(refusal, &sizes.key))?;
        }
        let (one, before) = (1f32, if sizes.key.accumulate { 1f32 } else { 0f32 });
        // SAFETY: descriptors and the algorithm were checked together; the addresses are of matrices as described, on the GPU; the
        // factors are read before the call returns, and without a workspace none is used.
        let queued = unsafe {
            call!(
                self.table.multiply,
                self.handle,
                description.handle,
                from_ref(&one).cast(),
                a as *const c_void,
                plan.a.handle,
                b as *const c_void,
                plan.b.handle,
                from_ref(&before).cast(),
                d as *const c_void,
                plan.d.handle,
                d as *mut c_void,
                plan.d.handle,
                algorithm,
                null_mut(),
                0,
                context.stream(Stream::Compute).cast(),
            )
        };
        queued.map_err(|refusal| self.sentence(refusal, &sizes.key))
    }

    /// Makes algorithm and descriptors, unless they are there.
    fn prepare(&mut self, sizes: &Sizes, bias: u64) -> Result<()> {
        let key = sizes.key;
        if !self.operations.contains_key(&key) {
            let operation = self.operation(sizes, bias)?;
            self.operations.insert(key, operation);
        }
        if self.plans.contains_key(sizes) {
            return Ok(());
        }
        let plan = self.plan(sizes).map_err(|refusal| self.sentence(refusal, &key))?;
        let operation = &self.operations[&key];
        if let Err(refusal) = self.check(&operation.description, &plan, &operation.algorithm) {
            let (m, n) = (sizes.d.columns, sizes.d.rows);
            return Err(self.sentence(refusal, &key).context(format!(
                "the algorithm of {} cannot do {m} x {n}; another one may give other bits, so none is taken",
                words(&key)
            )));
        }
        if self.plans.len() >= MOST_PLANS {
            self.plans.clear();
        }
        self.plans.insert(*sizes, plan);
        Ok(())
    }

    /// The description of a key's products, and their algorithm. `bias`: any address of one, for a check of its alignment.
    fn operation(&self, sizes: &Sizes, bias: u64) -> Result<Operation> {
        let key = sizes.key;
        let refused = |refusal| self.sentence(refusal, &key);
        let description = self.describe(sizes).map_err(refused)?;
        if key.bias {
            self.set(&description, Set::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias).map_err(refused)?;
        }
        let canonical = self.plan(&key.sizes(CANONICAL, CANONICAL)).map_err(refused)?;
        // Of several, one is taken that does few rows and columns as well: what it cannot do later would be an error.
        let few = 16 / key.dtype.bytes();
        let corners = [(few, few), (few, CANONICAL), (CANONICAL, few)].map(|(m, n)| self.plan(&key.sizes(m, n)));
        let corners = corners.into_iter().collect::<Result<Vec<Plan>, Refusal>>().map_err(refused)?;
        let candidates = self.candidates(&description, &canonical).map_err(refused)?;
        let count = candidates.len();
        let mut whole = Vec::new();
        for algorithm in candidates {
            if self.is_whole(&algorithm).map_err(refused)? && self.check(&description, &canonical, &algorithm).is_ok() {
                whole.push(algorithm);
            }
        }
        let everywhere =
            |algorithm: &&lt::cublasLtMatmulAlgo_t| corners.iter().all(|plan| self.check(&description, plan, algorithm).is_ok());
        if let Some(&algorithm) = whole.iter().find(everywhere).or(whole.first()) {
            return Ok(Operation { description, algorithm });
        }
        bail!(
            "cuBLASLt has no algorithm for {} that adds in one order: none of the {count} that it proposes does without cutting k and without \
             scratch memory; another release of cuBLASLt may have one",
            words(&key)
        )
    }

    fn describe(&self, sizes: &Sizes) -> Result<Description, Refusal> {
        let key = &sizes.key;
        let mut handle = null_mut();
        // SAFETY: the library writes a handle to where it is told to.
        unsafe {
            call!(self.table.operation_create, &mut handle, lt::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt::cudaDataType_t::CUDA_R_32F)
        }?;
        let description = Owned { handle, destroy: self.table.operation_destroy.pointer };
        let [a, b] = sizes.transposed().map(i32::from);
        self.set(&description, Set::CUBLASLT_MATMUL_DESC_TRANSA, &a)?;
        self.set(&description, Set::CUBLASLT_MATMUL_DESC_TRANSB, &b)?;
        if key.bias {
            self.set(&description, Set::CUBLASLT_MATMUL_DESC_EPILOGUE, &(lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32))?;
            self.set(&description, Set::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(format(key.dtype) as i32))?;
        }
        Ok(description)
    }

    fn plan(&self, sizes: &Sizes) -> Result<Plan, Refusal> {
        let layout = |dtype: Dtype, columns: Columns| {
            let mut handle = null_mut();
            let Columns { rows, columns, leading } = columns;
            // SAFETY: the library writes a handle to where it is told to.
            unsafe { call!(self.table.layout_create, &mut handle, format(dtype), rows as u64, columns as u64, leading as i64) }?;
            Ok(Owned { handle, destroy: self.table.layout_destroy.pointer })
        };
        let dtype = sizes.key.dtype;
        Ok(Plan { a: layout(dtype, sizes.a)?, b: layout(dtype, sizes.b)?, d: layout(out_dtype(&sizes.key), sizes.d)? })
    }

    /// What the library proposes, its best guess first.
    fn candidates(&self, description: &Description, plan: &Plan) -> Result<Vec<lt::cublasLtMatmulAlgo_t>, Refusal> {
        let mut handle = null_mut();
        // SAFETY: the library writes a handle to where it is told to.
        unsafe { call!(self.table.preference_create, &mut handle) }?;
        let preference = Owned { handle, destroy: self.table.preference_destroy.pointer };
        let prefer = |attribute, value: &[u8]| {
            // SAFETY: the library reads as many bytes as it is told.
            unsafe { call!(self.table.preference_set, preference.handle, attribute, value.as_ptr().cast(), value.len()) }
        };
        prefer(Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &0u64.to_ne_bytes())?;
        let no_reduction = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        prefer(Prefer::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_reduction.to_ne_bytes())?;
        for attribute in [
            Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            prefer(attribute, &16u32.to_ne_bytes())?;
        }
        let mut found: Vec<MaybeUninit<lt::cublasLtMatmulHeuristicResult_t>> = Vec::new();
        found.resize_with(CANDIDATES, MaybeUninit::zeroed);
        let mut count: c_int = 0;
        // SAFETY: all handles are alive; the library writes at most as many results as there is room for, and their number.
        unsafe {
            call!(
                self.table.algorithms,
                self.handle,
                description.handle,
                plan.a.handle,
                plan.b.handle,
                plan.d.handle,
                plan.d.handle,
                preference.handle,
                CANDIDATES as c_int,
                found.as_mut_ptr().cast(),
                &mut count,
            )
        }?;
        let usable = found[..count.clamp(0, CANDIDATES as c_int) as usize].iter().filter(|result| usable(result));
        // SAFETY: the algorithm is plain numbers, and was written; the field beside it that need not be an `enum`'s value is not read.
        Ok(usable.map(|result| unsafe { (*result.as_ptr()).algo }).collect())
    }

    /// Whether an algorithm adds all of k in one go.
    fn is_whole(&self, algorithm: &lt::cublasLtMatmulAlgo_t) -> Result<bool, Refusal> {
        let get = |attribute| {
            let mut value: c_int = 0;
            // SAFETY: the library writes as many bytes as there are, at most.
            unsafe { call!(self.table.algorithm_get, algorithm, attribute, (&raw mut value).cast(), size_of::<c_int>(), null_mut()) }?;
            Ok(value)
        };
        Ok(get(Of::CUBLASLT_ALGO_CONFIG_SPLITK_NUM)? <= 1 && get(Of::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)? == 0)
    }

    /// Whether the algorithm can do a product of these sizes, without scratch memory.
    fn check(&self, description: &Description, plan: &Plan, algorithm: &lt::cublasLtMatmulAlgo_t) -> Result<(), Refusal> {
        let mut result = MaybeUninit::<lt::cublasLtMatmulHeuristicResult_t>::zeroed();
        let function = &self.table.algorithm_check;
        // SAFETY: all handles are alive; the library writes a result to where it is told to.
        unsafe {
            call!(
                function,
                self.handle,
                description.handle,
                plan.a.handle,
                plan.b.handle,
                plan.d.handle,
                plan.d.handle,
                algorithm,
                result.as_mut_ptr(),
            )
        }?;
        let unsupported = lt::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED as u32;
        failure::outcome(function.name, if usable(&result) { 0 } else { unsupported })
    }

    fn set<T>(&self, description: &Description, attribute: lt::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), Refusal> {
        // SAFETY: the library reads as many bytes as it is told.
        unsafe { call!(self.table.operation_set, description.handle, attribute, from_ref(value).cast(), size_of::<T>()) }
    }

    fn sentence(&self, refusal: Refusal, key: &Key) -> Error {
        failure::sentence(refusal, Some(&words(key)), Some(&self.texts))
    }

    /// Gives up the library's things, while the context is still there.
    pub fn release(&mut self) {
        self.plans.clear();
        self.operations.clear();
        if !self.handle.is_null() {
            // SAFETY: nothing made with the handle is left. What fails here has failed before and been told.
            unsafe { call!(self.table.destroy, self.handle) }.ok();
            self.handle = null_mut();
        }
    }
}

/// Whether a result is of an algorithm that works, without scratch memory.
fn usable(result: &MaybeUninit<lt::cublasLtMatmulHeuristicResult_t>) -> bool {
    let result = result.as_ptr();
    // SAFETY: the result was zeros, over which the library wrote. Its state is read as the number that it is.
    unsafe { addr_of!((*result).state).cast::<u32>().read() == 0 && (*result).workspaceSize == 0 }
}

fn format(dtype: Dtype) -> lt::cudaDataType_t {
    match dtype {
        Dtype::F32 => lt::cudaDataType_t::CUDA_R_32F,
        Dtype::Bf16 => lt::cudaDataType_t::CUDA_R_16BF,
        Dtype::F16 => lt::cudaDataType_t::CUDA_R_16F,
        Dtype::U32 => panic!("whole numbers are not multiplied"),
    }
}

/// `a product of bf16 over k = 4096 with a bias`.
fn words(key: &Key) -> String {
    let more = if key.accumulate { ", added to f32" } else { "" };
    let bias = if key.bias { " with a bias" } else { "" };
    format!("a product of {} over k = {}{bias}{more}", key.dtype, key.k)
}
