//! Text as token ids, and back.
//!
//! Invariant: `decode(encode(text))` is `text`, byte for byte, whatever the bytes are; every id that `encode` gives is below `vocabulary`.

use crate::rng;
use anyhow::{Result, bail};

const BYTES_END_OF_TEXT: u32 = 256;
const END_OF_TEXT: &str = "<|endoftext|>";

/// The ways of cutting text that this program knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tokenizer {
    /// One id for each byte, and 256 for the end of a text.
    Bytes,
}

impl Tokenizer {
    /// The tokenizer that the key `data.tokenizer` names.
    pub fn from_name(name: &str) -> Result<Tokenizer> {
        if name == "bytes" {
            return Ok(Tokenizer::Bytes);
        }
        let looks_like_a_file = name.ends_with(".json") || name.ends_with(".model") || name.contains('/');
        if looks_like_a_file {
            bail!(
                "data.tokenizer = \"{name}\": tokenizer files are not read yet; set data.tokenizer = \"bytes\", \
                 or cut the text elsewhere and name the token ids as raw .bin files (u16 or u32) in data.sources"
            );
        }
        bail!("data.tokenizer = \"{name}\" is not known; \"bytes\" is");
    }

    /// How many ids there are; a model needs at least so many rows in its embedding.
    pub fn vocabulary(&self) -> usize {
        match self {
            Tokenizer::Bytes => BYTES_END_OF_TEXT as usize + 1,
        }
    }

    /// Appends the ids of `text`, without an end of text.
    pub fn encode(&self, text: &[u8], tokens: &mut Vec<u32>) {
        match self {
            Tokenizer::Bytes => tokens.extend(text.iter().map(|&byte| u32::from(byte))),
        }
    }

    /// The text of `tokens`. An id that stands for no text (a model may have more rows than the tokenizer has ids) shows as U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        match self {
            Tokenizer::Bytes => {
                let mut text = Vec::with_capacity(tokens.len());
                for &token in tokens {
                    match u8::try_from(token) {
                        Ok(byte) => text.push(byte),
                        Err(_) if token == BYTES_END_OF_TEXT => text.extend_from_slice(END_OF_TEXT.as_bytes()),
                        Err(_) => text.extend_from_slice("\u{FFFD}".as_bytes()),
                    }
                }
                text
            }
        }
    }

    /// The id that stands after each document.
    pub fn end_of_text(&self) -> Option<u32> {
        match self {
            Tokenizer::Bytes => Some(BYTES_END_OF_TEXT),
        }
    }

    pub fn name(&self) -> &str {
        match self {
            Tokenizer::Bytes => "bytes",
        }
    }

    /// Differs between tokenizers that would give different ids: what was prepared with one is not read with another.
    pub fn fingerprint(&self) -> u64 {
        match self {
            Tokenizer::Bytes => rng::fnv1a(b"bytes, end of text 256"),
        }
    }
}
