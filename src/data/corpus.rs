//! Token files, read as one long row of ids.
//!
//! The files are read at a position, not mapped: a map of a file that is cut short under a running job ends the process with SIGBUS,
//! a read ends with an error that can say which file it was. What is read again comes from the page cache either way.
//!
//! Invariant: every id that `read` gives is below the vocabulary; a file that is not what it was when the corpus was opened is an error
//! that names it.

use crate::rng;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// How many files stay open between reads: far below the usual limit of 1024 a process, however many shards there are.
const FILES_KEPT_OPEN: usize = 64;

/// llm.c puts 256 i32 before the tokens: a magic number, a version, the number of tokens, zeros.
const LLM_C_HEADER_BYTES: u64 = 1024;

/// How a token id rests in a file: little-endian, nothing between the ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    U16,
    U32,
}

impl TokenType {
    pub fn bytes(self) -> usize {
        match self {
            TokenType::U16 => 2,
            TokenType::U32 => 4,
        }
    }

    /// The narrowest type that holds every id of a vocabulary.
    pub fn for_vocabulary(vocabulary: usize) -> TokenType {
        if vocabulary <= 1 << 16 { TokenType::U16 } else { TokenType::U32 }
    }

    /// Writes ids as they rest in a file. They are of a vocabulary that this type is for.
    pub fn narrow(self, tokens: &[u32], bytes: &mut [u8]) {
        match self {
            TokenType::U16 => {
                for (pair, &token) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(tokens) {
                    *pair = u16::try_from(token).expect("a vocabulary of up to 65536 ids has ids of 16 bits").to_le_bytes();
                }
            }
            TokenType::U32 => {
                for (four, token) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(tokens) {
                    *four = token.to_le_bytes();
                }
            }
        }
    }

    fn widen(self, bytes: &[u8], tokens: &mut [u32]) {
        match self {
            TokenType::U16 => {
                for (token, pair) in tokens.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *token = u32::from(u16::from_le_bytes(*pair));
                }
            }
            TokenType::U32 => {
                for (token, four) in tokens.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *token = u32::from_le_bytes(*four);
                }
            }
        }
    }
}

impl fmt::Display for TokenType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenType::U16 => "u16",
            TokenType::U32 => "u32",
        })
    }
}

/// The token files of one source, joined in the order given.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<TokenFile>,
    tokens: usize,
    vocabulary: usize,
    /// The files last read, the newest at the end.
    open: Mutex<Vec<(usize, Arc<File>)>>,
}

#[derive(Debug)]
struct TokenFile {
    path: PathBuf,
    dtype: TokenType,
    bytes: u64,
    /// Byte offset of the first token: behind a header, if there is one.
    start: u64,
    /// Number of tokens in the files before this one.
    first: usize,
    tokens: usize,
}

impl Corpus {
    /// Opens token files. `dtype` says how their ids rest where the file itself does not (llm.c and Megatron files do); without it
    /// `.u32.bin` holds u32 and every other name u16, as nanoGPT writes them.
    pub fn open(paths: &[PathBuf], dtype: Option<TokenType>, vocabulary: usize) -> Result<Corpus> {
        ensure!(!paths.is_empty(), "a corpus needs at least one token file");
        let mut files: Vec<TokenFile> = Vec::with_capacity(paths.len());
        let mut tokens = 0;
        for path in paths {
            let file = TokenFile::open(path, dtype, tokens)?;
            tokens += file.tokens;
            files.push(file);
        }
        Ok(Corpus { files, tokens, vocabulary, open: Mutex::new(Vec::new()) })
    }

    /// The number of tokens in all files.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many samples of `seq_len` inputs there are: sample i is tokens `i * seq_len ..= (i + 1) * seq_len`, so that neighbours share
    /// the token that is the last target of one and the first input of the next.
    pub fn samples(&self, seq_len: usize) -> usize {
        self.tokens.saturating_sub(1) / seq_len
    }

    /// What the corpus is called in messages: its first file.
    pub fn name(&self) -> String {
        let first = self.files[0].path.display();
        match self.files.len() {
            1 => first.to_string(),
            count => format!("{first} and {} more", count - 1),
        }
    }

    /// Where a token lies: its file and the byte offset in it.
    pub fn locate(&self, token: usize) -> (&Path, u64) {
        assert!(token < self.tokens, "token {token} of a corpus of {}", self.tokens);
        let file = &self.files[self.file_of(token)];
        (&file.path, file.offset_of(token - file.first))
    }

    /// Fills `out` with the tokens from `start` on. The range must lie in the corpus.
    pub fn read(&self, start: usize, out: &mut [u32]) -> Result<()> {
        assert!(start + out.len() <= self.tokens, "tokens {start} .. {} of a corpus of {}", start + out.len(), self.tokens);
        let mut bytes = Vec::new();
        let mut filled = 0;
        while filled < out.len() {
            let index = self.file_of(start + filled);
            let file = &self.files[index];
            let local = start + filled - file.first;
            let count = (file.tokens - local).min(out.len() - filled);
            bytes.resize(count * file.dtype.bytes(), 0);
            self.read_bytes(index, file.offset_of(local), &mut bytes)?;
            file.dtype.widen(&bytes, &mut out[filled..filled + count]);
            self.check_vocabulary(file, local, &out[filled..filled + count])?;
            filled += count;
        }
        Ok(())
    }

    /// A number that differs, in all likelihood, when the tokens differ: made from the length of every file and from both its ends. It does
    /// not depend on where the files lie.
    pub fn fingerprint(&self) -> Result<u64> {
        const END_BYTES: usize = 1024;
        let mut seen = Vec::new();
        let mut end = Vec::new();
        for (index, file) in self.files.iter().enumerate() {
            seen.extend_from_slice(&(file.tokens as u64).to_le_bytes());
            end.resize(END_BYTES.min(file.tokens * file.dtype.bytes()), 0);
            for offset in [file.start, file.bytes - end.len() as u64] {
                self.read_bytes(index, offset, &mut end)?;
                seen.extend_from_slice(&rng::fnv1a(&end).to_le_bytes());
            }
        }
        Ok(rng::fnv1a(&seen))
    }

    fn file_of(&self, token: usize) -> usize {
        self.files.partition_point(|file| file.first <= token) - 1
    }

    fn read_bytes(&self, index: usize, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let TokenFile { path, bytes: expected, .. } = &self.files[index];
        let file = self.handle(index)?;
        let metadata = file.metadata().with_context(|| format!("reading {} at byte {offset}", path.display()))?;
        ensure!(metadata.nlink() > 0, "reading {} at byte {offset}: the file was removed or replaced while it was in use", path.display());
        ensure!(
            metadata.len() == *expected,
            "reading {} at byte {offset}: the file had {expected} bytes when it was opened and has {} now; it must not change during a run",
            path.display(),
            metadata.len()
        );
        file.read_exact_at(bytes, offset).with_context(|| format!("reading {} bytes of {} at byte {offset}", bytes.len(), path.display()))
    }

    /// The open file of an index; opens it, and closes the one unused for longest, when need be.
    fn handle(&self, index: usize) -> Result<Arc<File>> {
        let mut open = self.open.lock().expect("no code panics while it holds this lock");
        if let Some(place) = open.iter().rposition(|(kept, _)| *kept == index) {
            let entry = open.remove(place);
            let file = entry.1.clone();
            open.push(entry);
            return Ok(file);
        }
        let path = &self.files[index].path;
        let file = File::open(path)
            .with_context(|| format!("{} was there when the corpus was opened and cannot be opened again", path.display()))?;
        let file = Arc::new(file);
        if open.len() == FILES_KEPT_OPEN {
            open.remove(0);
        }
        open.push((index, file.clone()));
        Ok(file)
    }

    fn check_vocabulary(&self, file: &TokenFile, local: usize, tokens: &[u32]) -> Result<()> {
        // The largest id first: a plain loop that the compiler turns into vector code; the search runs only when there is something to say.
        let largest = tokens.iter().copied().max().unwrap_or(0);
        if (largest as usize) < self.vocabulary {
            return Ok(());
        }
        let place = tokens.iter().position(|&token| token as usize >= self.vocabulary).expect("the largest id is beyond the vocabulary");
        bail!(
            "{}, byte {}: token id {} is beyond the vocabulary of {} ids (read as {}; is this the dtype and the tokenizer it was written with?)",
            file.path.display(),
            file.offset_of(local + place),
            tokens[place],
            self.vocabulary,
            file.dtype
        );
    }
}

impl TokenFile {
    fn open(path: &Path, dtype: Option<TokenType>, first: usize) -> Result<TokenFile> {
        let mut file = File::open(path).with_context(|| format!("opening the token file {}", path.display()))?;
        let metadata = file.metadata().with_context(|| format!("looking at {}", path.display()))?;
        ensure!(metadata.is_file(), "{} is not a file; tokens are read from files", path.display());
        let bytes = metadata.len();
        let (found, start) = match llm_c_header(path, &mut file, bytes)? {
            Some(header) => (Some(header), LLM_C_HEADER_BYTES),
            None => (megatron_type(path)?, 0),
        };
        if let (Some(wanted), Some(found)) = (dtype, found) {
            ensure!(wanted == found, "{}: dtype = \"{wanted}\" is asked for, but the file says it holds {found}", path.display());
        }
        let named = if path.to_string_lossy().ends_with(".u32.bin") { TokenType::U32 } else { TokenType::U16 };
        let dtype = found.or(dtype).unwrap_or(named);
        ensure!(bytes > start, "the token file {} holds no tokens", path.display());
        ensure!(
            (bytes - start).is_multiple_of(dtype.bytes() as u64),
            "{} has {bytes} bytes, which is no whole number of {dtype} tokens ({} bytes each): it was cut short, or it is not a file of {dtype}",
            path.display(),
            dtype.bytes()
        );
        let tokens = (bytes - start) as usize / dtype.bytes();
        Ok(TokenFile { path: path.to_path_buf(), dtype, bytes, start, first, tokens })
    }

    /// The byte at which the token `local` of this file starts.
    fn offset_of(&self, local: usize) -> u64 {
        self.start + (local * self.dtype.bytes()) as u64
    }
}

/// What the header of llm.c says the tokens are, if the file has one.
fn llm_c_header(path: &Path, file: &mut File, bytes: u64) -> Result<Option<TokenType>> {
    if bytes < LLM_C_HEADER_BYTES {
        return Ok(None);
    }
    let mut words = [[0; 4]; 3];
    file.read_exact(words.as_flattened_mut()).with_context(|| format!("reading the first bytes of {}", path.display()))?;
    let [magic, version, tokens] = words.map(u32::from_le_bytes);
    let dtype = match (magic, version) {
        (20240520, 1) => TokenType::U16,
        (20240801, 7) => TokenType::U32,
        _ => return Ok(None),
    };
    let expected = LLM_C_HEADER_BYTES + u64::from(tokens) * dtype.bytes() as u64;
    ensure!(
        bytes == expected,
        "{}: its llm.c header speaks of {tokens} tokens of {dtype}, which is a file of {expected} bytes, but it has {bytes}",
        path.display()
    );
    Ok(Some(dtype))
}

/// The type that a Megatron index beside the file says its tokens have. Only the type is taken from it: the documents lie in the `.bin`
/// one after the other, and are read so.
fn megatron_type(path: &Path) -> Result<Option<TokenType>> {
    const MAGIC: &[u8] = b"MMIDIDX\0\0";
    const TYPE_OFFSET: usize = 17;
    let index = path.with_extension("idx");
    if !fs::exists(&index).with_context(|| format!("looking for {}", index.display()))? {
        return Ok(None);
    }
    let mut start = [0; TYPE_OFFSET + 1];
    let read = File::open(&index).and_then(|mut file| file.read_exact(&mut start));
    read.with_context(|| format!("reading the index {} that lies beside {}", index.display(), path.display()))?;
    ensure!(start.starts_with(MAGIC), "{} lies beside {} but is no Megatron index", index.display(), path.display());
    match start[TYPE_OFFSET] {
        8 => Ok(Some(TokenType::U16)),
        // i32, but ids are not negative; one that is fails the check against the vocabulary.
        4 => Ok(Some(TokenType::U32)),
        code => bail!("{}: its tokens have the type code {code}; 8 (u16) and 4 (i32) are read", index.display()),
    }
}
