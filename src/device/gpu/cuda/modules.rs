//! Kernels as the driver has them: PTX is loaded when the first kernel of its file is launched, and turned into machine code by the driver,
//! which keeps that in its cache on disk.
//!
//! Invariant: a kernel is launched with as many arguments, of the same sizes, as its PTX declares.

#![allow(unsafe_code)]

use super::context::Context;
use crate::device::gpu::driver::{Argument, Grid, Stream};
use crate::device::gpu::kernels::{self, Architecture};
use anyhow::{Context as _, Result, anyhow, ensure};
use cudarc::driver::sys as cu;
use cudarc::driver::sys::CUjit_option_enum::{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr::{null_mut, without_provenance_mut};

/// Dynamic shared memory that a kernel may have without asking.
const SHARED_UNASKED: u32 = 48 << 10;

/// Bytes for what the driver has to say of PTX that it refuses.
const LOG: usize = 8 << 10;

pub struct Modules {
    architecture: Architecture,
    modules: HashMap<&'static str, cu::CUmodule>,
    functions: HashMap<String, Function>,
}

struct Function {
    handle: cu::CUfunction,
    /// Bytes of each argument.
    sizes: Vec<usize>,
    /// Dynamic shared memory that a launch may have.
    shared: u32,
}

// SAFETY: the handles are the driver's, which may be called from any thread.
unsafe impl Send for Modules {}

/// Whose instructions a GPU of this compute capability has.
pub fn architecture(capability: (i32, i32)) -> Architecture {
    if capability == (9, 0) { Architecture::Sm90a } else { Architecture::Sm80 }
}

impl Modules {
    pub fn new(architecture: Architecture) -> Modules {
        Modules { architecture, modules: HashMap::new(), functions: HashMap::new() }
    }

    /// Queues `kernel` on `stream`.
    pub fn launch(&mut self, context: &Context, stream: Stream, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        if !self.functions.contains_key(kernel) {
            let function = self.function(context, kernel)?;
            self.functions.insert(kernel.to_string(), function);
        }
        let function = self.functions.get_mut(kernel).with_context(|| format!("there is no kernel {kernel}"))?;
        check_arguments(kernel, &function.sizes, arguments)?;
        let Function { handle, shared, .. } = *function;
        let stream = context.stream(stream);
        context.bound(Some(kernel), |driver| {
            if grid.shared_bytes > shared {
                let attribute = cu::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is alive.
                unsafe { call!(driver.function_set, handle, attribute, grid.shared_bytes as i32) }?;
                function.shared = grid.shared_bytes;
            }
            let mut addresses: Vec<*mut c_void> = arguments.iter().map(|argument| argument.bytes().as_ptr().cast_mut().cast()).collect();
            let [x, y, z] = grid.blocks;
            // SAFETY: there are as many addresses as the kernel has arguments, each of as many bytes, which the driver reads and copies.
            unsafe {
                call!(driver.launch, handle, x, y, z, grid.threads, 1, 1, grid.shared_bytes, stream, addresses.as_mut_ptr(), null_mut())
            }
        })
    }

    fn function(&mut self, context: &Context, kernel: &str) -> Result<Function> {
        let source = kernels::find(kernel).with_context(|| format!("there is no kernel {kernel}"))?;
        let text = source.ptx(self.architecture);
        let sizes = parameters(text, kernel).with_context(|| format!("the PTX of {}.cu does not declare {kernel}", source.name))?;
        let module = match self.modules.get(source.name) {
            Some(&module) => module,
            None => {
                let module = load(context, text).with_context(|| format!("loading the kernels of {}.cu", source.name))?;
                self.modules.insert(source.name, module);
                module
            }
        };
        let name = CString::new(kernel).expect("a name that was found in a text of ours");
        let mut handle = null_mut();
        // SAFETY: the module is alive, the name ends in a zero byte; the driver writes a function to where it is told to.
        context.bound(Some(kernel), |driver| unsafe { call!(driver.module_function, &mut handle, module, name.as_ptr()) })?;
        Ok(Function { handle, sizes, shared: SHARED_UNASKED })
    }

    /// Gives the modules back; no kernel may be running.
    pub fn release(&mut self, context: &Context) {
        self.functions.clear();
        for (_, module) in self.modules.drain() {
            // What fails here has failed before and been told.
            // SAFETY: nobody uses the module any more.
            context.bound(None, |driver| unsafe { call!(driver.module_unload, module) }).ok();
        }
    }
}

fn load(context: &Context, text: &str) -> Result<cu::CUmodule> {
    let text = CString::new(text).context("the PTX has a zero byte in it")?;
    let mut log = vec![0u8; LOG];
    let mut module = null_mut();
    let mut options = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // A number is passed in the place of an address.
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), without_provenance_mut(LOG - 1)];
    let loaded = context.bound(None, |driver| {
        let count = options.len() as u32;
        // SAFETY: the text ends in a zero byte, the log has room for as many bytes as is said, and there is a value for each option.
        unsafe { call!(driver.module_load, &mut module, text.as_ptr().cast(), count, options.as_mut_ptr(), values.as_mut_ptr()) }
    });
    loaded.map(|()| module).map_err(|error| {
        let said = CStr::from_bytes_until_nul(&log).map(|said| said.to_string_lossy().trim().to_string()).unwrap_or_default();
        if said.is_empty() { error } else { anyhow!("{error}; the driver says: {said}") }
    })
}

fn check_arguments(kernel: &str, sizes: &[usize], arguments: &[Argument]) -> Result<()> {
    let given: Vec<usize> = arguments.iter().map(|argument| argument.bytes().len()).collect();
    ensure!(given == sizes, "{kernel} takes arguments of {sizes:?} bytes and was given {given:?}");
    Ok(())
}

/// Bytes of each argument that the PTX declares for `kernel`.
fn parameters(text: &str, kernel: &str) -> Option<Vec<usize>> {
    let declared =
        text.split(".entry ").skip(1).find_map(|entry| entry.trim_start().strip_prefix(kernel)?.trim_start().strip_prefix('('))?;
    let list = declared.split_once(')')?.0;
    let parameters = list.split(',').map(str::trim).filter(|parameter| !parameter.is_empty());
    parameters
        .map(|parameter| {
            let words: Vec<&str> = parameter.split_whitespace().collect();
            let bits = words.iter().find_map(|word| {
                let digits = word.strip_prefix('.')?.strip_prefix(['u', 's', 'b', 'f'])?;
                digits.parse::<usize>().ok()
            })?;
            let count = words.last()?.split_once('[').map_or(Some(1), |(_, count)| count.trim_end_matches(']').parse().ok())?;
            Some(bits / 8 * count)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args;
    use crate::device::gpu::kernels::SOURCES;

    #[test]
    fn parameters_are_read_from_the_ptx() {
        let text = ".visible .entry one(\n\t.param .u64 one_param_0,\n\t.param .f32 one_param_1,\n\t.param .align 8 .b8 one_param_2[24]\n)\n\
                    .maxntid 256\n{ ret; }\n.visible .entry one_more(\n)\n{ ret; }\n";
        assert_eq!(parameters(text, "one"), Some(vec![8, 4, 24]));
        assert_eq!(parameters(text, "one_more"), Some(vec![]));
        assert_eq!(parameters(text, "on"), None);
        for source in SOURCES {
            for architecture in [Architecture::Sm80, Architecture::Sm90a] {
                source
                    .kernels()
                    .for_each(|kernel| assert!(parameters(source.ptx(architecture), kernel).is_some_and(|p| !p.is_empty()), "{kernel}"));
            }
        }
    }

    #[test]
    fn arguments_of_other_sizes_are_refused() {
        assert!(check_arguments("k", &[8, 4], &args![1usize, 2.0f32]).is_ok());
        let error = check_arguments("k", &[8, 4], &args![1usize, 2usize]).expect_err("too long").to_string();
        assert_eq!(error, "k takes arguments of [8, 4] bytes and was given [8, 8]");
    }

    #[test]
    fn hopper_gets_its_own_text() {
        assert_eq!(
            [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)].map(architecture).map(|a| a == Architecture::Sm90a),
            [false, false, true, false, false]
        );
    }
}
