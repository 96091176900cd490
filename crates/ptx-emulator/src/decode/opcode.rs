//! An opcode and its qualifiers, as they are asked for.
//!
//! Invariant: a qualifier that nobody asked for makes the instruction unsupported, so that no form is executed as if it were another.

use crate::scalar::Scalar;
use std::cell::Cell;

pub(super) struct Opcode<'a> {
    parts: Vec<&'a str>,
    /// One bit per part that was asked for.
    used: Cell<u64>,
}

impl<'a> Opcode<'a> {
    pub(super) fn new(text: &'a str) -> Opcode<'a> {
        Opcode { parts: text.split('.').collect(), used: Cell::new(1) }
    }

    pub(super) fn name(&self) -> &'a str {
        self.parts[0]
    }

    fn mark(&self, index: usize) {
        self.used.set(self.used.get() | 1 << index);
    }

    /// Whether a qualifier is there.
    pub(super) fn take(&self, qualifier: &str) -> bool {
        let found = self.parts.iter().skip(1).position(|part| *part == qualifier);
        found.is_some_and(|index| {
            self.mark(index + 1);
            true
        })
    }

    /// Qualifiers that change nothing here.
    pub(super) fn ignore(&self, qualifiers: &[&str]) {
        for (index, part) in self.parts.iter().enumerate() {
            if qualifiers.contains(part) {
                self.mark(index);
            }
        }
    }

    /// Qualifiers with these beginnings change nothing here.
    pub(super) fn ignore_beginning(&self, beginnings: &[&str]) {
        for (index, part) in self.parts.iter().enumerate() {
            if beginnings.iter().any(|beginning| part.starts_with(beginning)) {
                self.mark(index);
            }
        }
    }

    /// What the first of the choices that is there stands for.
    pub(super) fn pick<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        choices.iter().find(|(word, _)| self.take(word)).map(|(_, value)| *value)
    }

    /// The types among the qualifiers, in their order.
    pub(super) fn scalars(&self) -> Vec<Scalar> {
        let scalars = self.parts.iter().enumerate().skip(1);
        scalars
            .filter_map(|(index, part)| {
                let scalar = Scalar::parse(part)?;
                self.mark(index);
                Some(scalar)
            })
            .collect()
    }

    /// The qualifier with this beginning, without it.
    pub(super) fn after(&self, beginning: &str) -> Option<&'a str> {
        let (index, part) = self.parts.iter().enumerate().skip(1).find(|(_, part)| part.starts_with(beginning))?;
        self.mark(index);
        Some(&part[beginning.len()..])
    }

    /// Whether the first qualifier that begins like this comes before the first that begins like that.
    pub(super) fn before(&self, this: &str, that: &str) -> bool {
        let position = |beginning: &str| self.parts.iter().position(|part| part.starts_with(beginning));
        position(this).unwrap_or(usize::MAX) < position(that).unwrap_or(usize::MAX)
    }

    /// The first qualifier that nobody asked for.
    pub(super) fn unused(&self) -> Option<&'a str> {
        self.parts.iter().enumerate().find(|(index, _)| self.used.get() >> index & 1 == 0).map(|(_, part)| *part)
    }
}
