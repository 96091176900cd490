//! The walk over the statements of a body, and calls of device functions written out in place.
//!
//! Invariant: a label is seen from its own scope and the scopes inside it, never from another function.

use super::{Binding, Decoder, Pending, Range, Scope};
use crate::fault::LoadError;
use crate::instruction::{NONE, Operation, Slots};
use crate::scalar::Scalar;
use crate::syntax::{Operand, Statement};

impl<'a> Decoder<'a> {
    pub(super) fn body(&mut self, body: &'a [Statement<'a>]) -> Result<(), LoadError> {
        self.open();
        for statement in body {
            match statement {
                Statement::Open => self.open(),
                Statement::Close => {
                    self.scopes.pop();
                }
                Statement::Label(label) => {
                    let scope = self.scopes.last().expect("a body is inside a scope").number;
                    self.labels.insert((scope, *label), self.kernel.code.len());
                }
                Statement::Targets(label, labels) => {
                    self.scopes.last_mut().expect("a body is inside a scope").targets.insert(*label, labels.clone());
                }
                Statement::Registers(scalar, name, count) => self.registers(*scalar, name, *count),
                Statement::Variable(variable) => self.declare(variable)?,
                Statement::Location(file, line) => {
                    if *line != 0 {
                        self.place = (*file, *line);
                    }
                }
                Statement::Instruction(line) => self.instruction(line)?,
            }
        }
        Ok(())
    }

    fn open(&mut self) {
        self.scopes.push(Scope { number: self.next_scope, ..Scope::default() });
        self.next_scope += 1;
    }

    fn registers(&mut self, scalar: Scalar, name: &'a str, count: Option<u32>) {
        let files = match scalar.bytes() {
            0 => &mut self.kernel.predicates,
            8 => &mut self.kernel.doubles,
            _ => &mut self.kernel.words,
        };
        let begin = *files as u32;
        *files += count.unwrap_or(1) as usize;
        let scope = self.scopes.last_mut().expect("a body is inside a scope");
        match count {
            None => drop(scope.names.insert(name, Binding::Register(scalar, begin))),
            Some(count) => drop(scope.ranges.insert(name, Range { scalar, begin, count })),
        }
    }

    /// Leaves an index to be filled in when all labels are known.
    pub(super) fn jump_later(&mut self, labels: Vec<&'a str>) {
        let scopes = self.scopes[self.floor..].iter().rev().map(|scope| scope.number).collect();
        self.pending.push(Pending { at: self.kernel.code.len(), scopes, labels, line: self.line.line });
    }

    pub(super) fn targets(&self, name: &str) -> Option<Vec<&'a str>> {
        self.scopes[self.floor..].iter().rev().find_map(|scope| scope.targets.get(name).cloned())
    }

    /// Fills in the targets of all branches.
    pub(super) fn resolve(&mut self) -> Result<(), LoadError> {
        for pending in std::mem::take(&mut self.pending) {
            let mut targets = Vec::new();
            for label in &pending.labels {
                let found = pending.scopes.iter().find_map(|scope| self.labels.get(&(*scope, *label)));
                let Some(index) = found else { return Err(LoadError::new(pending.line, format!("label `{label}` is nowhere"))) };
                targets.push(*index as u32);
            }
            self.kernel.code[pending.at].operation = match &self.kernel.code[pending.at].operation {
                Operation::BranchTable(_) => Operation::BranchTable(targets.into()),
                _ => Operation::Branch(targets[0]),
            };
        }
        Ok(())
    }

    /// `call (results), function, (arguments)`: the body of the function is written here, its parameters bound to the caller's
    /// variables, which lie in local memory.
    pub(super) fn call(&mut self) -> Result<(), LoadError> {
        let operands = &self.line.operands;
        let position = operands.iter().position(|operand| matches!(operand, Operand::Name(_)));
        let Some((index, Operand::Name(name))) = position.map(|index| (index, &operands[index])) else {
            return self.error("the called function has no name");
        };
        if *name == "vprintf" {
            return Ok(()); // what it returns is not looked at by any caller we met
        }
        if *name == "__assertfail" {
            self.emit(Operation::Trap("a device-side assertion failed"), Slots::NONE);
            return Ok(());
        }
        let Some(function) = self.module.program.functions.get(name) else {
            return self.error(format!("function `{name}` has no body in this module, and indirect calls are not supported"));
        };
        if self.calls.contains(name) {
            return self.error(format!("function `{name}` calls itself; recursion is not supported"));
        }
        let list = |operand: Option<&'a Operand<'a>>| match operand {
            Some(Operand::List(list)) => list.as_slice(),
            _ => &[],
        };
        let results = list(index.checked_sub(1).and_then(|before| operands.get(before)));
        let arguments = list(operands.get(index + 1));
        let formals: Vec<&str> = function.results.iter().chain(&function.parameters).map(|formal| formal.name).collect();
        if formals.len() != results.len() + arguments.len() {
            return self.error(format!("function `{name}` takes other arguments"));
        }
        let mut bindings = Vec::new();
        for (formal, actual) in formals.into_iter().zip(results.iter().chain(arguments)) {
            match actual {
                Operand::Name(actual) if matches!(self.find(actual), Some(Binding::Local(_))) => {
                    bindings.push((formal, self.find(actual).expect("just found")));
                }
                other => return self.error(format!("{other:?} is no variable in parameter space")),
            }
        }
        self.write_out(name, &function.body, bindings)
    }

    fn write_out(&mut self, name: &'a str, body: &'a [Statement<'a>], bindings: Vec<(&'a str, Binding)>) -> Result<(), LoadError> {
        if self.guard.0 != NONE {
            return self.error("calls under a predicate are not supported");
        }
        let (floor, height, line) = (self.floor, self.scopes.len(), self.line);
        self.floor = height;
        self.open();
        for (formal, binding) in bindings {
            self.bind(formal, binding);
        }
        for variable in &self.module.program.variables {
            if self.find(variable.name).is_none() {
                let global = self.scopes[0].names.get(variable.name).copied();
                let Some(binding) = global else { continue };
                self.bind(variable.name, binding);
            }
        }
        self.calls.push(name);
        self.returns.push(Vec::new());
        self.body(body)?;
        let end = self.kernel.code.len() as u32;
        for at in self.returns.pop().expect("pushed above") {
            self.kernel.code[at].operation = Operation::Branch(end);
        }
        self.calls.pop();
        self.scopes.truncate(height);
        self.floor = floor;
        self.line = line;
        Ok(())
    }

    /// `ret`: out of the kernel, or to the end of the function being written out.
    pub(super) fn return_or_exit(&mut self) {
        let at = self.kernel.code.len();
        match self.returns.last_mut() {
            Some(returns) => {
                returns.push(at);
                self.emit(Operation::Branch(0), Slots::NONE);
            }
            None => self.emit(Operation::Exit, Slots::NONE),
        }
    }
}
