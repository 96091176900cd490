//! Functions of a program to kernels: names become slots, labels become indices, calls are written out in place.
//!
//! Invariant: a kernel that is returned can be executed: every opcode, qualifier and operand of it is known.

mod arithmetic;
mod asynchronous;
mod body;
mod data;
mod float;
mod group;
mod matrix;
mod opcode;
mod operands;
mod sync;

use crate::address::SHARED_BEGIN;
use crate::compact::compact;
use crate::fault::LoadError;
use crate::instruction::{Instruction, NONE, Operation, Slots};
use crate::kernel::{Image, Kernel, Parameter, Site, Special};
use crate::scalar::Scalar;
use crate::syntax::{Function, Line, Operand, Program, Space, Variable};
use opcode::Opcode;
use std::collections::HashMap;
use std::sync::Arc;

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Binding {
    Register(Scalar, u32),
    /// Shared address.
    Shared(u32),
    DynamicShared,
    Local(u64),
    Parameter(usize),
    /// Offset into the image of the module.
    Image(u64),
}

/// `%r<9>`: nine registers from one slot on.
#[derive(Clone, Copy, Debug)]
struct Range {
    scalar: Scalar,
    begin: u32,
    count: u32,
}

#[derive(Default)]
struct Scope<'a> {
    number: u32,
    names: HashMap<&'a str, Binding>,
    ranges: HashMap<&'a str, Range>,
    targets: HashMap<&'a str, Vec<&'a str>>,
}

/// A branch whose label may still come.
struct Pending<'a> {
    at: usize,
    scopes: Vec<u32>,
    labels: Vec<&'a str>,
    line: u32,
}

/// What all kernels of a module share.
pub(crate) struct Shared<'a> {
    pub(crate) program: &'a Program<'a>,
    pub(crate) image: Arc<Image>,
    pub(crate) image_offsets: HashMap<&'a str, u64>,
    pub(crate) files: Arc<HashMap<u32, String>>,
}

struct Decoder<'a> {
    module: &'a Shared<'a>,
    kernel: Kernel,
    scopes: Vec<Scope<'a>>,
    /// The scopes below belong to the callers and are not seen.
    floor: usize,
    next_scope: u32,
    labels: HashMap<(u32, &'a str), usize>,
    pending: Vec<Pending<'a>>,
    /// Instructions that stand for `ret` of the functions being written out: they branch to the function's end.
    returns: Vec<Vec<usize>>,
    /// The functions being written out, to see recursion.
    calls: Vec<&'a str>,
    constant_words: HashMap<u32, u32>,
    constant_doubles: HashMap<u64, u32>,
    specials: HashMap<Special, u32>,
    place: (u32, u32),
    guard: (u32, bool),
    line: &'a Line<'a>,
}

const NO_LINE: &Line<'static> = &Line { guard: None, opcode: "", operands: Vec::new(), line: 0 };

/// Decodes one entry function.
pub(crate) fn kernel<'a>(module: &'a Shared<'a>, entry: &'a Function<'a>) -> Result<Kernel, LoadError> {
    let kernel = Kernel {
        name: entry.name.to_owned(),
        parameters: Vec::new(),
        parameter_sizes: Vec::new(),
        parameter_bytes: 0,
        max_threads: entry.max_threads,
        code: Vec::new(),
        sites: Vec::new(),
        words: 0,
        doubles: 0,
        predicates: 0,
        constant_words: Vec::new(),
        constant_doubles: Vec::new(),
        constant_predicates: Vec::new(),
        special_words: Vec::new(),
        dynamic_doubles: Vec::new(),
        image_doubles: Vec::new(),
        shared_static: 0,
        dynamic_align: 16,
        local_bytes: 0,
        image: Arc::clone(&module.image),
        files: Arc::clone(&module.files),
    };
    let mut decoder = Decoder {
        module,
        kernel,
        scopes: vec![Scope::default()],
        floor: 0,
        next_scope: 1,
        labels: HashMap::new(),
        pending: Vec::new(),
        returns: Vec::new(),
        calls: Vec::new(),
        constant_words: HashMap::new(),
        constant_doubles: HashMap::new(),
        specials: HashMap::new(),
        place: (0, 0),
        guard: (NONE, true),
        line: NO_LINE,
    };
    for variable in &module.program.variables {
        decoder.declare(variable)?;
    }
    decoder.parameters(&entry.parameters)?;
    decoder.body(&entry.body)?;
    decoder.guard = (NONE, true);
    decoder.emit(Operation::Exit, Slots::NONE);
    decoder.resolve()?;
    let mut kernel = decoder.kernel;
    compact(&mut kernel);
    Ok(kernel)
}

fn align_up(value: usize, align: usize) -> usize {
    value.div_ceil(align) * align
}

impl<'a> Decoder<'a> {
    fn error<T>(&self, message: impl Into<String>) -> Result<T, LoadError> {
        Err(self.failure(message))
    }

    fn failure(&self, message: impl Into<String>) -> LoadError {
        let message = message.into();
        let opcode = self.line.opcode;
        LoadError::new(self.line.line, if opcode.is_empty() { message } else { format!("`{opcode}`: {message}") })
    }

    fn parameters(&mut self, parameters: &[Variable<'a>]) -> Result<(), LoadError> {
        for parameter in parameters {
            let Some(bytes) = parameter.bytes else { return self.error(format!("parameter `{}` has no size", parameter.name)) };
            let offset = align_up(self.kernel.parameter_bytes, parameter.align);
            self.kernel.parameters.push(Parameter { offset, bytes });
            self.kernel.parameter_sizes.push(bytes);
            self.kernel.parameter_bytes = offset + bytes;
            self.bind(parameter.name, Binding::Parameter(offset));
        }
        Ok(())
    }

    fn bind(&mut self, name: &'a str, binding: Binding) {
        self.scopes.last_mut().expect("the scope of the kernel is there until the end").names.insert(name, binding);
    }

    /// Gives a variable its place in its space.
    fn declare(&mut self, variable: &Variable<'a>) -> Result<(), LoadError> {
        let name = variable.name;
        let binding = match (variable.space, variable.bytes) {
            (Space::Shared, None) => {
                self.kernel.dynamic_align = self.kernel.dynamic_align.max(variable.align);
                Binding::DynamicShared
            }
            (Space::Shared, Some(bytes)) => {
                let offset = align_up(self.kernel.shared_static, variable.align);
                self.kernel.shared_static = offset + bytes;
                Binding::Shared(SHARED_BEGIN + offset as u32)
            }
            (Space::Local | Space::Parameter, Some(bytes)) => {
                let offset = align_up(self.kernel.local_bytes, variable.align.max(16));
                self.kernel.local_bytes = offset + bytes;
                Binding::Local(offset as u64)
            }
            (Space::Global | Space::Constant, _) => match self.module.image_offsets.get(name) {
                Some(offset) => Binding::Image(*offset),
                None => return self.error(format!("variable `{name}` belongs to another module")),
            },
            (Space::Local | Space::Parameter, None) => return self.error(format!("variable `{name}` has no size")),
        };
        self.bind(name, binding);
        Ok(())
    }

    fn emit(&mut self, operation: Operation, slots: Slots) {
        let (guard, when) = self.guard;
        let (file, line) = self.place;
        self.kernel.code.push(Instruction { operation, slots, guard, when });
        self.kernel.sites.push(Site { opcode: self.line.opcode.into(), ptx_line: self.line.line, file, line });
    }

    fn instruction(&mut self, line: &'a Line<'a>) -> Result<(), LoadError> {
        self.line = line;
        self.guard = match &line.guard {
            None => (NONE, true),
            Some(guard) => (self.predicate(&Operand::Name(guard.name))?, guard.when),
        };
        let opcode = Opcode::new(line.opcode);
        let known = self.data(&opcode)?
            || self.arithmetic(&opcode)?
            || self.sync(&opcode)?
            || self.matrix(&opcode)?
            || self.asynchronous(&opcode)?;
        if !known {
            return self.error("the emulator has no such instruction");
        }
        match opcode.unused() {
            Some(qualifier) => self.error(format!("the emulator does not know the qualifier `.{qualifier}` here")),
            None => Ok(()),
        }
    }

    fn operand(&self, index: usize) -> Result<&'a Operand<'a>, LoadError> {
        self.line.operands.get(index).ok_or_else(|| self.failure(format!("operand {} is missing", index + 1)))
    }
}
