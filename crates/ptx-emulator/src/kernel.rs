//! A kernel ready to run: decoded code, the size of its register files and the layout of its memory.
//!
//! Invariant: `sites` has one entry per instruction of `code`, and the last instruction of `code` is an exit.

use crate::instruction::Instruction;
use std::sync::Arc;

/// Where an instruction comes from.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub(crate) opcode: Box<str>,
    pub(crate) ptx_line: u32,
    pub(crate) file: u32,
    pub(crate) line: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    ThreadX,
    ThreadY,
    ThreadZ,
    ThreadsX,
    ThreadsY,
    ThreadsZ,
    BlockX,
    BlockY,
    BlockZ,
    BlocksX,
    BlocksY,
    BlocksZ,
    Lane,
    Warp,
    Warps,
    MaskEqual,
    MaskLess,
    MaskLessEqual,
    MaskGreater,
    MaskGreaterEqual,
    SharedDynamic,
    SharedTotal,
    Zero,
    One,
    /// The address of dynamic shared memory.
    DynamicBegin,
}

/// The variables of a module in global memory: laid out once, instantiated in each `Memory` that runs a kernel of it.
#[derive(Debug)]
pub(crate) struct Image {
    /// Tells modules apart.
    pub(crate) number: u64,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// A kernel of a module.
#[derive(Debug)]
pub struct Kernel {
    pub(crate) name: String,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) parameter_sizes: Vec<usize>,
    pub(crate) parameter_bytes: usize,
    pub(crate) max_threads: Option<u32>,
    pub(crate) code: Vec<Instruction>,
    pub(crate) sites: Vec<Site>,
    pub(crate) words: usize,
    pub(crate) doubles: usize,
    pub(crate) predicates: usize,
    pub(crate) constant_words: Vec<(u32, u32)>,
    pub(crate) constant_doubles: Vec<(u32, u64)>,
    pub(crate) constant_predicates: Vec<(u32, bool)>,
    pub(crate) special_words: Vec<(u32, Special)>,
    /// Doubles with the address of dynamic shared memory plus an offset.
    pub(crate) dynamic_doubles: Vec<(u32, u64)>,
    /// Doubles with the address of a module variable: offset into the image.
    pub(crate) image_doubles: Vec<(u32, u64)>,
    pub(crate) shared_static: usize,
    pub(crate) dynamic_align: usize,
    pub(crate) local_bytes: usize,
    pub(crate) image: Arc<Image>,
    pub(crate) files: Arc<std::collections::HashMap<u32, String>>,
}

impl Kernel {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The sizes of the arguments in bytes.
    pub fn parameters(&self) -> &[usize] {
        &self.parameter_sizes
    }

    /// From `__launch_bounds__`.
    pub fn max_threads(&self) -> Option<u32> {
        self.max_threads
    }

    /// Static shared memory of a block, in bytes.
    pub fn shared_bytes(&self) -> usize {
        self.shared_static
    }
}
