//! PTX text cut into tokens.
//!
//! Invariant: every token carries the line of the text it stands on, and `.loc` and `.file` lines, which end without a semicolon,
//! come out as one token each, so that the parser never has to look at line breaks.

use crate::fault::LoadError;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Token<'a> {
    /// A name, an opcode with its qualifiers, or a directive with its dot.
    Word(&'a str),
    Integer(i64),
    /// The bits of a `0f` literal.
    Single(u32),
    /// The bits of a `0d` literal or of a decimal fraction.
    Double(u64),
    Sign(u8),
    Text(&'a str),
    Location {
        file: u32,
        line: u32,
    },
    File {
        number: u32,
        name: &'a str,
    },
}

pub(crate) struct Placed<'a> {
    pub(crate) token: Token<'a>,
    pub(crate) line: u32,
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
    line: u32,
    tokens: Vec<Placed<'a>>,
}

pub(crate) fn tokens(text: &str) -> Result<Vec<Placed<'_>>, LoadError> {
    let mut cursor = Cursor { text, at: 0, line: 1, tokens: Vec::with_capacity(text.len() / 4) };
    while cursor.skip_blanks()? {
        let token = cursor.next()?;
        cursor.tokens.push(Placed { token, line: cursor.line });
    }
    Ok(cursor.tokens)
}

impl<'a> Cursor<'a> {
    fn byte(&self, ahead: usize) -> u8 {
        self.text.as_bytes().get(self.at + ahead).copied().unwrap_or(0)
    }

    fn error(&self, message: String) -> LoadError {
        LoadError::new(self.line, message)
    }

    /// False at the end of the text.
    fn skip_blanks(&mut self) -> Result<bool, LoadError> {
        loop {
            match (self.byte(0), self.byte(1)) {
                (0, _) if self.at >= self.text.len() => return Ok(false),
                (b'\n', _) => {
                    self.line += 1;
                    self.at += 1;
                }
                (b' ' | b'\t' | b'\r' | 0, _) => self.at += 1,
                (b'/', b'/') => self.at += self.rest_of_line().len(),
                (b'/', b'*') => {
                    let rest = &self.text[self.at..];
                    let length = rest.find("*/").ok_or_else(|| self.error("a comment is not closed".to_owned()))? + 2;
                    self.line += rest[..length].matches('\n').count() as u32;
                    self.at += length;
                }
                _ => return Ok(true),
            }
        }
    }

    fn rest_of_line(&self) -> &'a str {
        let rest = &self.text[self.at..];
        &rest[..rest.find('\n').unwrap_or(rest.len())]
    }

    fn next(&mut self) -> Result<Token<'a>, LoadError> {
        let first = self.byte(0);
        if first.is_ascii_digit() {
            return self.number();
        }
        if first.is_ascii_alphabetic() || b"_$%.".contains(&first) {
            let word = self.word();
            return match word {
                ".loc" => self.location(),
                ".file" => self.file(),
                ".version" | ".target" | ".address_size" => {
                    self.at += self.rest_of_line().len();
                    Ok(Token::Word(word))
                }
                _ => Ok(Token::Word(word)),
            };
        }
        if first == b'"' {
            let rest = &self.text[self.at + 1..];
            let length = rest.find('"').ok_or_else(|| self.error("a string is not closed".to_owned()))?;
            self.at += length + 2;
            return Ok(Token::Text(&rest[..length]));
        }
        if !first.is_ascii_graphic() {
            return Err(self.error(format!("byte {first:#04x} is no part of PTX")));
        }
        self.at += 1;
        Ok(Token::Sign(first))
    }

    fn word(&mut self) -> &'a str {
        let bytes = self.text.as_bytes();
        let begin = self.at;
        self.at += 1;
        loop {
            let byte = self.byte(0);
            if byte.is_ascii_alphanumeric() || b"_$.%".contains(&byte) {
                self.at += 1;
            } else if byte == b':' && self.byte(1) == b':' {
                self.at += 2; // shared::cta
            } else {
                break;
            }
        }
        debug_assert!(self.at <= bytes.len());
        &self.text[begin..self.at]
    }

    fn number(&mut self) -> Result<Token<'a>, LoadError> {
        let begin = self.at;
        let digits = |c: &Cursor<'a>| c.byte(0).is_ascii_alphanumeric();
        while digits(self) || (self.byte(0) == b'.' && self.byte(1).is_ascii_digit()) {
            let exponent = matches!(self.byte(0), b'e' | b'E') && self.text[begin..self.at].contains('.');
            self.at += 1;
            if exponent && matches!(self.byte(0), b'+' | b'-') {
                self.at += 1;
            }
        }
        let text = &self.text[begin..self.at];
        let wrong = |c: &Cursor<'a>| c.error(format!("`{text}` is no number"));
        let radix = |digits: &str, radix: u32| u64::from_str_radix(digits.trim_end_matches('U'), radix).ok();
        let token = match text.as_bytes() {
            [b'0', b'f' | b'F', ..] => u32::from_str_radix(&text[2..], 16).ok().map(Token::Single),
            [b'0', b'd' | b'D', ..] => radix(&text[2..], 16).map(Token::Double),
            [b'0', b'x' | b'X', ..] => radix(&text[2..], 16).map(|v| Token::Integer(v as i64)),
            [b'0', b'b' | b'B', ..] => radix(&text[2..], 2).map(|v| Token::Integer(v as i64)),
            _ if text.contains('.') => text.parse::<f64>().ok().map(|v| Token::Double(v.to_bits())),
            _ => radix(text, 10).map(|v| Token::Integer(v as i64)),
        };
        token.ok_or_else(|| wrong(self))
    }

    fn location(&mut self) -> Result<Token<'a>, LoadError> {
        let rest = self.rest_of_line();
        self.at += rest.len();
        let mut numbers = rest.split_whitespace().map(|word| word.trim_end_matches(',').parse::<u32>());
        match (numbers.next(), numbers.next()) {
            (Some(Ok(file)), Some(Ok(line))) => Ok(Token::Location { file, line }),
            _ => Err(self.error(format!("`.loc{rest}` names no file and line"))),
        }
    }

    fn file(&mut self) -> Result<Token<'a>, LoadError> {
        let rest = self.rest_of_line();
        self.at += rest.len();
        let number = rest.split_whitespace().next().and_then(|word| word.parse().ok());
        match (number, rest.split('"').nth(1)) {
            (Some(number), Some(name)) => Ok(Token::File { number, name }),
            _ => Err(self.error(format!("`.file{rest}` has no number and name"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_numbers_and_lines() {
        let text = ".loc 1 23 4, function_name $L, inlined_at 1 2 3\n.file 1 \"a/b.cu\"\nst.shared::cta.u32 [%r1+-4], 0f3F800000; // x\n$L__BB0_1:";
        let placed = tokens(text).expect("the text is well formed");
        let got: Vec<_> = placed.iter().map(|p| p.token).collect();
        assert_eq!(got[0], Token::Location { file: 1, line: 23 });
        assert_eq!(got[1], Token::File { number: 1, name: "a/b.cu" });
        assert_eq!(got[2], Token::Word("st.shared::cta.u32"));
        assert_eq!(got[got.len() - 2], Token::Word("$L__BB0_1"));
        assert_eq!(placed[placed.len() - 1].line, 4);
        assert!(got.contains(&Token::Single(0x3F80_0000)));
    }

    #[test]
    fn a_bad_number_names_its_line() {
        let error = tokens("\n\nmov 12zz").err().expect("12zz is no number");
        assert!(error.to_string().contains("line 3"), "{error}");
    }
}
