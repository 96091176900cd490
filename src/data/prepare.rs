//! Text -> token shards, in one pass with constant memory.
//!
//! A document is a file, or a line of a `.jsonl` file (its field "text"). Each is followed by the tokenizer's end of text.
//!
//! Invariant: the shards are a function of the texts and the tokenizer; the same, unchanged sources are not read twice.

use crate::data::files;
use crate::data::shards::{Heading, MANIFEST, Manifest, ShardWriter, SourceFile};
use crate::data::tokenizer::Tokenizer;
use crate::rng;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// 512 MiB of u16: few files, and each small enough to copy and to check.
const SHARD_TOKENS: usize = 1 << 28;

const CHUNK_BYTES: usize = 1 << 20;

/// A line is held in memory; one longer than this is taken for a file that is no `.jsonl`.
const LINE_BYTES: usize = 256 << 20;

/// A folder of token shards.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub folder: PathBuf,
    pub manifest: Manifest,
    /// Whether it was there already, made from the same sources by the same tokenizer.
    pub reused: bool,
}

/// Writes the texts that `inputs` mean (files, folders, patterns) as token shards to the folder `out`, or finds them there.
///
/// Several processes may prepare the same texts for the same folder at once: each gets a complete data set. It is cheaper to let one do it.
pub fn prepare(inputs: &[PathBuf], tokenizer: &Tokenizer, out: &Path) -> Result<Prepared> {
    prepare_in_shards(inputs, tokenizer, out, SHARD_TOKENS)
}

/// `prepare` with shards of another size.
pub fn prepare_in_shards(inputs: &[PathBuf], tokenizer: &Tokenizer, out: &Path, shard_tokens: usize) -> Result<Prepared> {
    ensure!(!inputs.is_empty(), "nothing to prepare: name at least one text file, folder or pattern");
    ensure!(!out.exists() || out.is_dir(), "{} is a file; the shards need a folder", out.display());
    let mut paths = Vec::new();
    for input in inputs {
        paths.extend(files::expand(input)?);
    }
    if let Some((path, kind)) = paths.iter().find_map(|path| Some((path, files::packed(path)?))) {
        bail!("{} is {kind}, not text: text files and .jsonl are read, uncompressed", path.display());
    }
    let sources = paths.iter().map(|path| SourceFile::look(path)).collect::<Result<Vec<SourceFile>>>()?;
    let heading = heading(tokenizer, sources);
    if let Some(manifest) = Manifest::read(out)?
        && manifest.made_as(&heading)
        && manifest.paths(out).is_ok()
    {
        return Ok(Prepared { folder: out.to_path_buf(), manifest, reused: true });
    }
    let sources = heading.sources.clone();
    let writer = ShardWriter::create(out, heading, shard_tokens)?;
    let mut text = TextWriter { tokenizer, writer, chunk: Vec::new(), tokens: Vec::new(), documents: 0 };
    for source in &sources {
        text.add(source)?;
    }
    ensure!(text.documents > 0, "there is no text in {}: {} files, all empty", inputs[0].display(), sources.len());
    let documents = text.documents;
    let manifest = text.writer.commit(documents).with_context(|| format!("writing {}", out.join(MANIFEST).display()))?;
    Ok(Prepared { folder: out.to_path_buf(), manifest, reused: false })
}

fn heading(tokenizer: &Tokenizer, sources: Vec<SourceFile>) -> Heading {
    let tokenizer_fingerprint = format!("{:016x}", tokenizer.fingerprint());
    let described = serde_json::to_vec(&(&tokenizer_fingerprint, &sources)).expect("names and numbers can be written as JSON");
    Heading {
        tokenizer: tokenizer.name().to_string(),
        tokenizer_fingerprint,
        vocabulary: tokenizer.vocabulary(),
        end_of_text: tokenizer.end_of_text(),
        sources,
        fingerprint: rng::fnv1a(&described),
    }
}

struct TextWriter<'a> {
    tokenizer: &'a Tokenizer,
    writer: ShardWriter,
    /// Kept between calls for their memory only.
    chunk: Vec<u8>,
    tokens: Vec<u32>,
    documents: usize,
}

impl TextWriter<'_> {
    fn add(&mut self, source: &SourceFile) -> Result<()> {
        let path = Path::new(&source.path);
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl")) {
            self.add_lines(path, BufReader::with_capacity(CHUNK_BYTES, file))?;
        } else {
            self.add_file(path, file)?;
        }
        let now = SourceFile::look(path)?;
        ensure!(now == *source, "{} changed while it was read; start again when it is complete", path.display());
        Ok(())
    }

    /// A file as one document; an empty one is none.
    fn add_file(&mut self, path: &Path, mut file: File) -> Result<()> {
        self.chunk.resize(CHUNK_BYTES, 0);
        let mut any = false;
        loop {
            let count = file.read(&mut self.chunk).with_context(|| format!("reading {}", path.display()))?;
            if count == 0 {
                break;
            }
            any = true;
            self.tokens.clear();
            self.tokenizer.encode(&self.chunk[..count], &mut self.tokens);
            self.writer.write(&self.tokens)?;
        }
        if any { self.end_document() } else { Ok(()) }
    }

    /// Each line as one document; blank lines and empty texts are none.
    fn add_lines(&mut self, path: &Path, mut lines: impl BufRead) -> Result<()> {
        #[derive(Deserialize)]
        struct Document {
            text: String,
        }
        let mut line = Vec::new();
        for number in 1usize.. {
            line.clear();
            let at = || format!("{}, line {number}", path.display());
            let count = lines.by_ref().take(LINE_BYTES as u64 + 1).read_until(b'\n', &mut line).with_context(at)?;
            if count == 0 {
                break;
            }
            ensure!(count <= LINE_BYTES, "{}: longer than {} MiB; is each document on a line of its own?", at(), LINE_BYTES >> 20);
            if line.trim_ascii().is_empty() {
                continue;
            }
            let document: Document = match serde_json::from_slice(&line) {
                Ok(document) => document,
                Err(error) => {
                    // Its own message ends with "at line 1 column c", and that line is not the file's.
                    let message = error.to_string();
                    let what = message.split(" at line ").next().unwrap_or(&message);
                    bail!(
                        "{}, column {}: expected a JSON object with a string \"text\", as in {{\"text\": \"...\"}}: {what}",
                        at(),
                        error.column()
                    );
                }
            };
            if !document.text.is_empty() {
                self.tokens.clear();
                self.tokenizer.encode(document.text.as_bytes(), &mut self.tokens);
                self.writer.write(&self.tokens)?;
                self.end_document()?;
            }
        }
        Ok(())
    }

    fn end_document(&mut self) -> Result<()> {
        self.documents += 1;
        match self.tokenizer.end_of_text() {
            Some(token) => self.writer.write(&[token]),
            None => Ok(()),
        }
    }
}
