//! Tokens to functions, variables and statements. Nothing is looked up here: names stay names.
//!
//! Invariant: what is not understood is an error with its line; nothing is skipped but debug sections, linkage and the header.

use crate::fault::LoadError;
use crate::scalar::Scalar;
use crate::token::{Placed, Token, tokens};
use std::collections::HashMap;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand<'a> {
    Name(&'a str),
    /// A predicate, inverted.
    Not(&'a str),
    Integer(i64),
    Single(u32),
    Double(u64),
    /// A symbol and bytes past it.
    Sum(&'a str, i64),
    /// `[base + offset, more...]`
    Address(Box<Operand<'a>>, i64, Vec<Operand<'a>>),
    List(Vec<Operand<'a>>),
    /// `d|p`
    Pair(&'a str, &'a str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Parameter,
    Global,
    Shared,
    Local,
    Constant,
}

#[derive(Clone, Debug)]
pub(crate) struct Variable<'a> {
    pub(crate) name: &'a str,
    pub(crate) space: Space,
    pub(crate) align: usize,
    /// None for `extern` arrays, whose size the launch gives.
    pub(crate) bytes: Option<usize>,
    pub(crate) initial: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(crate) struct Guard<'a> {
    pub(crate) name: &'a str,
    /// Lanes run the instruction where the predicate has this value.
    pub(crate) when: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Line<'a> {
    pub(crate) guard: Option<Guard<'a>>,
    pub(crate) opcode: &'a str,
    pub(crate) operands: Vec<Operand<'a>>,
    pub(crate) line: u32,
}

#[derive(Clone, Debug)]
pub(crate) enum Statement<'a> {
    Open,
    Close,
    Label(&'a str),
    Targets(&'a str, Vec<&'a str>),
    /// `.reg .b32 %r<9>`: one name, or as many as the count says.
    Registers(Scalar, &'a str, Option<u32>),
    Variable(Variable<'a>),
    Location(u32, u32),
    Instruction(Line<'a>),
}

#[derive(Clone, Debug)]
pub(crate) struct Function<'a> {
    pub(crate) name: &'a str,
    pub(crate) results: Vec<Variable<'a>>,
    pub(crate) parameters: Vec<Variable<'a>>,
    pub(crate) max_threads: Option<u32>,
    pub(crate) body: Vec<Statement<'a>>,
}

#[derive(Debug, Default)]
pub(crate) struct Program<'a> {
    pub(crate) files: HashMap<u32, &'a str>,
    pub(crate) variables: Vec<Variable<'a>>,
    pub(crate) entries: Vec<Function<'a>>,
    pub(crate) functions: HashMap<&'a str, Function<'a>>,
}

struct Parser<'a> {
    tokens: Vec<Placed<'a>>,
    at: usize,
}

pub(crate) fn parse(text: &str) -> Result<Program<'_>, LoadError> {
    let mut parser = Parser { tokens: tokens(text)?, at: 0 };
    let mut program = Program::default();
    while parser.at < parser.tokens.len() {
        parser.item(&mut program)?;
    }
    Ok(program)
}

impl<'a> Parser<'a> {
    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |t| t.line)
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T, LoadError> {
        Err(LoadError::new(self.line(), message.into()))
    }

    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).map(|t| t.token)
    }

    fn next(&mut self) -> Result<Token<'a>, LoadError> {
        let Some(token) = self.peek() else { return self.error("the text ends in the middle of a statement") };
        self.at += 1;
        Ok(token)
    }

    fn accept(&mut self, sign: u8) -> bool {
        let found = self.peek() == Some(Token::Sign(sign));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: u8) -> Result<(), LoadError> {
        if self.accept(sign) {
            return Ok(());
        }
        self.error(format!("`{}` is missing before {:?}", sign as char, self.peek()))
    }

    fn word(&mut self) -> Result<&'a str, LoadError> {
        match self.peek() {
            Some(Token::Word(word)) => {
                self.at += 1;
                Ok(word)
            }
            other => self.error(format!("a name is missing before {other:?}")),
        }
    }

    fn integer(&mut self) -> Result<i64, LoadError> {
        let negative = self.accept(b'-');
        match self.next()? {
            Token::Integer(value) => Ok(if negative { value.wrapping_neg() } else { value }),
            other => self.error(format!("a whole number is missing before {other:?}")),
        }
    }

    fn skip_past(&mut self, sign: u8) -> Result<(), LoadError> {
        while self.next()? != Token::Sign(sign) {}
        Ok(())
    }

    fn item(&mut self, program: &mut Program<'a>) -> Result<(), LoadError> {
        match self.next()? {
            Token::File { number, name } => {
                program.files.insert(number, name);
            }
            Token::Location { .. } | Token::Sign(b';') => {}
            Token::Word(".version" | ".target" | ".address_size" | ".visible" | ".extern" | ".weak" | ".common") => {}
            Token::Word(".pragma") => self.skip_past(b';')?,
            Token::Word(".section") => {
                self.skip_past(b'{')?;
                self.skip_past(b'}')?;
            }
            Token::Word(".entry") => {
                let function = self.function(Vec::new())?;
                program.entries.push(function);
            }
            Token::Word(".func") => {
                let results = if self.peek() == Some(Token::Sign(b'(')) { self.parameters()? } else { Vec::new() };
                let function = self.function(results)?;
                if !function.body.is_empty() {
                    program.functions.insert(function.name, function);
                }
            }
            Token::Word(word) => match space(word) {
                Some(space) => {
                    let variable = self.variable(space)?;
                    program.variables.push(variable);
                    self.expect(b';')?;
                }
                None => return self.error(format!("`{word}` is no declaration this emulator knows")),
            },
            other => return self.error(format!("{other:?} begins no declaration")),
        }
        Ok(())
    }

    /// After `.entry` or `.func (results)`; a declaration without a body has an empty one.
    fn function(&mut self, results: Vec<Variable<'a>>) -> Result<Function<'a>, LoadError> {
        let name = self.word()?;
        let parameters = if self.peek() == Some(Token::Sign(b'(')) { self.parameters()? } else { Vec::new() };
        let mut function = Function { name, results, parameters, max_threads: None, body: Vec::new() };
        loop {
            match self.next()? {
                Token::Sign(b';') => return Ok(function),
                Token::Sign(b'{') => break,
                Token::Word(".maxntid" | ".reqntid") => {
                    let mut threads = self.integer()?;
                    while self.accept(b',') {
                        threads *= self.integer()?;
                    }
                    function.max_threads = Some(threads as u32);
                }
                _ => {} // .minnctapersm, .noreturn and other hints
            }
        }
        let mut depth = 1;
        while depth > 0 {
            self.statement(&mut function.body, &mut depth)?;
        }
        Ok(function)
    }

    fn parameters(&mut self) -> Result<Vec<Variable<'a>>, LoadError> {
        self.expect(b'(')?;
        let mut parameters = Vec::new();
        while !self.accept(b')') {
            self.accept(b',');
            let word = self.word()?;
            if word == ".reg" {
                return self.error("parameters in registers are not supported, only `.param`");
            }
            parameters.push(self.variable(Space::Parameter)?);
        }
        Ok(parameters)
    }

    /// After the state space: `.align 8 .b8 name[16] = {...}`
    fn variable(&mut self, space: Space) -> Result<Variable<'a>, LoadError> {
        let (mut align, mut element, mut vector) = (None, None, 1);
        let name = loop {
            match self.word()? {
                ".align" => align = Some(self.integer()? as usize),
                ".ptr" | ".global" | ".shared" | ".local" | ".const" | ".attribute" | ".managed" => {}
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                word if word.starts_with('.') => match Scalar::parse(&word[1..]) {
                    Some(scalar) => element = Some(scalar),
                    None => return self.error(format!("`{word}` is no type this emulator knows")),
                },
                name => break name,
            }
        };
        let Some(element) = element else { return self.error(format!("`{name}` has no type")) };
        let mut bytes = Some(element.bytes() * vector);
        while self.accept(b'[') {
            if self.accept(b']') {
                bytes = None;
            } else {
                let count = self.integer()? as usize;
                bytes = bytes.map(|b| b * count);
                self.expect(b']')?;
            }
        }
        let mut initial = Vec::new();
        if self.accept(b'=') {
            self.initial(element.bytes(), &mut initial)?;
        }
        let align = align.unwrap_or(element.bytes() * vector).max(1);
        Ok(Variable { name, space, align, bytes, initial })
    }

    fn initial(&mut self, element: usize, bytes: &mut Vec<u8>) -> Result<(), LoadError> {
        if self.accept(b'{') {
            while !self.accept(b'}') {
                self.initial(element, bytes)?;
                self.accept(b',');
            }
            return Ok(());
        }
        let negative = self.accept(b'-');
        let value = match self.next()? {
            Token::Integer(value) if negative => value.wrapping_neg() as u64,
            Token::Integer(value) => value as u64,
            Token::Single(bits) => u64::from(bits),
            Token::Double(bits) => bits,
            other => return self.error(format!("{other:?} cannot stand in an initial value")),
        };
        bytes.extend_from_slice(&value.to_le_bytes()[..element]);
        Ok(())
    }

    fn statement(&mut self, body: &mut Vec<Statement<'a>>, depth: &mut u32) -> Result<(), LoadError> {
        let line = self.line();
        match self.next()? {
            Token::Sign(b'{') => {
                *depth += 1;
                body.push(Statement::Open);
            }
            Token::Sign(b'}') => {
                *depth -= 1;
                body.push(Statement::Close);
            }
            Token::Sign(b';') => {}
            Token::Location { file, line } => body.push(Statement::Location(file, line)),
            Token::Word(".extern") => {}
            Token::Word(".pragma") => self.skip_past(b';')?,
            Token::Word(".reg") => self.registers(body)?,
            Token::Word(word) if space(word).is_some() => {
                let space = space(word).expect("just asked");
                body.push(Statement::Variable(self.variable(space)?));
                self.expect(b';')?;
            }
            Token::Word(label) if self.peek() == Some(Token::Sign(b':')) => {
                self.at += 1;
                if self.peek() == Some(Token::Word(".branchtargets")) {
                    self.at += 1;
                    body.push(Statement::Targets(label, self.targets()?));
                } else {
                    body.push(Statement::Label(label));
                }
            }
            Token::Word(opcode) => {
                let operands = self.operands(b';')?;
                body.push(Statement::Instruction(Line { guard: None, opcode, operands, line }));
            }
            Token::Sign(b'@') => {
                let when = !self.accept(b'!');
                let guard = Some(Guard { name: self.word()?, when });
                let opcode = self.word()?;
                let operands = self.operands(b';')?;
                body.push(Statement::Instruction(Line { guard, opcode, operands, line }));
            }
            other => return self.error(format!("{other:?} begins no statement")),
        }
        Ok(())
    }

    fn targets(&mut self) -> Result<Vec<&'a str>, LoadError> {
        let mut labels = vec![self.word()?];
        while self.accept(b',') {
            labels.push(self.word()?);
        }
        self.expect(b';')?;
        Ok(labels)
    }

    fn registers(&mut self, body: &mut Vec<Statement<'a>>) -> Result<(), LoadError> {
        let word = self.word()?;
        let Some(scalar) = Scalar::parse(&word[1..]) else { return self.error(format!("`{word}` is no type of registers")) };
        loop {
            let name = self.word()?;
            let count = if self.accept(b'<') {
                let count = self.integer()?;
                self.expect(b'>')?;
                Some(count as u32)
            } else {
                None
            };
            body.push(Statement::Registers(scalar, name, count));
            if !self.accept(b',') {
                return self.expect(b';');
            }
        }
    }

    fn operands(&mut self, end: u8) -> Result<Vec<Operand<'a>>, LoadError> {
        let mut operands = Vec::new();
        while !self.accept(end) {
            if !self.accept(b',') {
                operands.push(self.operand()?);
            }
        }
        Ok(operands)
    }

    fn operand(&mut self) -> Result<Operand<'a>, LoadError> {
        Ok(match self.next()? {
            Token::Integer(value) => Operand::Integer(value),
            Token::Single(bits) => Operand::Single(bits),
            Token::Double(bits) => Operand::Double(bits),
            Token::Sign(b'-') => match self.operand()? {
                Operand::Integer(value) => Operand::Integer(value.wrapping_neg()),
                Operand::Single(bits) => Operand::Single(bits ^ 0x8000_0000),
                Operand::Double(bits) => Operand::Double(bits ^ (1 << 63)),
                other => return self.error(format!("`-` stands before {other:?}")),
            },
            Token::Sign(b'!') => Operand::Not(self.word()?),
            Token::Sign(b'{') => Operand::List(self.operands(b'}')?),
            Token::Sign(b'(') => Operand::List(self.operands(b')')?),
            Token::Sign(b'[') => self.address()?,
            Token::Word(name) if self.accept(b'|') => Operand::Pair(name, self.word()?),
            Token::Word(name) if self.accept(b'+') => Operand::Sum(name, self.integer()?),
            Token::Word(name) => Operand::Name(name),
            other => return self.error(format!("{other:?} is no operand")),
        })
    }

    fn address(&mut self) -> Result<Operand<'a>, LoadError> {
        let (base, mut offset) = match self.operand()? {
            Operand::Sum(name, offset) => (Operand::Name(name), offset),
            base => (base, 0),
        };
        let mut more = Vec::new();
        while !self.accept(b']') {
            // A minus sign is part of the number.
            if self.accept(b'+') || self.peek() == Some(Token::Sign(b'-')) {
                offset += self.integer()?;
            } else if self.accept(b',') {
                more.push(self.operand()?);
            } else {
                return self.error(format!("{:?} stands inside an address", self.peek()));
            }
        }
        Ok(Operand::Address(Box::new(base), offset, more))
    }
}

fn space(word: &str) -> Option<Space> {
    Some(match word {
        ".param" => Space::Parameter,
        ".global" => Space::Global,
        ".shared" => Space::Shared,
        ".local" => Space::Local,
        ".const" => Space::Constant,
        _ => return None,
    })
}
