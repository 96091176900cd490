//! A loaded PTX text: its kernels, and the variables they share.
//!
//! Invariant: everything in a module can be executed; what cannot be was refused by `parse`.

use crate::decode;
use crate::fault::LoadError;
use crate::kernel::{Image, Kernel};
use crate::syntax::{Program, Space, parse};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A PTX text, decoded.
#[derive(Debug)]
pub struct Module {
    kernels: Vec<Kernel>,
}

impl Module {
    /// Decodes a text. An instruction that cannot be executed is an error that names it and its line.
    pub fn parse(text: &str) -> Result<Module, LoadError> {
        let program = parse(text)?;
        let (image, image_offsets) = image(&program)?;
        let files = program.files.iter().map(|(number, name)| (*number, name.rsplit('/').next().unwrap_or(name).to_owned())).collect();
        let shared = decode::Shared { program: &program, image: Arc::new(image), image_offsets, files: Arc::new(files) };
        let kernels = program.entries.iter().map(|entry| decode::kernel(&shared, entry)).collect::<Result<_, _>>()?;
        Ok(Module { kernels })
    }

    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.iter().find(|kernel| kernel.name == name)
    }

    pub fn kernels(&self) -> impl Iterator<Item = &Kernel> {
        self.kernels.iter()
    }
}

/// Lays out the global variables and constants of a module one after the other.
fn image<'a>(program: &Program<'a>) -> Result<(Image, HashMap<&'a str, u64>), LoadError> {
    // A number per module; it tells images apart and orders nothing.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let (mut bytes, mut offsets) = (Vec::new(), HashMap::new());
    for variable in program.variables.iter().filter(|variable| matches!(variable.space, Space::Global | Space::Constant)) {
        let Some(size) = variable.bytes else {
            return Err(LoadError::new(0, format!("variable `{}` has no size: external variables are not supported", variable.name)));
        };
        let offset = bytes.len().div_ceil(variable.align.max(16)) * variable.align.max(16);
        bytes.resize(offset, 0);
        bytes.extend_from_slice(&variable.initial);
        bytes.resize(offset + size, 0);
        offsets.insert(variable.name, offset as u64);
    }
    Ok((Image { number: NUMBER.fetch_add(1, Ordering::Relaxed), bytes }, offsets))
}
