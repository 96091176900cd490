//! What the tests of the data floor share.
//!
//! Invariant: a test has a folder of its own, empty at its start.

use ferrotron::data::corpus::Corpus;
use ferrotron::data::prepare::{self, Prepared};
use ferrotron::data::sources::Source;
use ferrotron::data::tokenizer::Tokenizer;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// An empty folder for one test.
pub fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("data").join(test);
    if folder.exists() {
        fs::remove_dir_all(&folder).expect("an old test folder can be removed");
    }
    fs::create_dir_all(&folder).expect("a test folder can be made");
    folder
}

pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> PathBuf {
    fs::create_dir_all(path.parent().expect("a file in a folder")).expect("a folder can be made");
    fs::write(path, bytes).expect("a test file can be written");
    path.to_path_buf()
}

pub fn u16_file(path: &Path, tokens: impl IntoIterator<Item = u16>) -> PathBuf {
    write(path, tokens.into_iter().flat_map(u16::to_le_bytes).collect::<Vec<u8>>())
}

pub fn u32_file(path: &Path, tokens: impl IntoIterator<Item = u32>) -> PathBuf {
    write(path, tokens.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>())
}

pub fn read_all(corpus: &Corpus) -> Vec<u32> {
    let mut tokens = vec![0; corpus.tokens()];
    corpus.read(0, &mut tokens).expect("the whole corpus can be read");
    tokens
}

/// The whole message of a failure, which must hold all of `parts`.
pub fn fails<T>(result: anyhow::Result<T>, parts: &[&str]) -> String {
    let message = format!("{:#}", result.err().expect("this must fail"));
    for part in parts {
        assert!(message.contains(part), "`{part}` is missing in: {message}");
    }
    message
}

pub fn prepare(inputs: &[&Path], out: &Path) -> anyhow::Result<Prepared> {
    prepare::prepare(&inputs.iter().map(|input| input.to_path_buf()).collect::<Vec<_>>(), &Tokenizer::Bytes, out)
}

pub fn prepared_tokens(prepared: &Prepared) -> Vec<u32> {
    let paths = prepared.manifest.paths(&prepared.folder).expect("the shards are there");
    read_all(&Corpus::open(&paths, Some(prepared.manifest.dtype), prepared.manifest.vocabulary).expect("the shards open"))
}

pub fn source(path: &Path) -> Source {
    Source { path: path.to_path_buf(), weight: 1.0, dtype: None }
}

pub fn encode(text: &str) -> Vec<u32> {
    let mut tokens = Vec::new();
    Tokenizer::Bytes.encode(text.as_bytes(), &mut tokens);
    tokens
}

/// The names in a folder.
pub fn names_in(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).expect("the folder is there");
    entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
}
