//! What the configuration names as data -> open corpora.
//!
//! `.bin` files are raw tokens; a folder with a manifest is a data set that `ferrotron prepare` wrote; all else is text, which is prepared
//! into the cache on first use.
//!
//! Invariant: a corpus holds no id that the model has no row for, and was cut by the tokenizer that the run has.

use crate::data::corpus::{Corpus, TokenType};
use crate::data::files;
use crate::data::prepare;
use crate::data::shards::{MANIFEST, Manifest};
use crate::data::tokenizer::Tokenizer;
use crate::rng;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One entry of `data.sources` or `data.validation`.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// A file, a folder or a pattern.
    pub path: PathBuf,
    /// Its part of the samples, against the weights of the other sources.
    pub weight: f64,
    /// How ids rest in raw `.bin` files that do not say it themselves.
    pub dtype: Option<TokenType>,
}

/// Opens every source, and prepares text into `cache` where that has not been done. `vocabulary` is the model's.
pub fn open(sources: &[Source], tokenizer: &Tokenizer, cache: &Path, vocabulary: usize) -> Result<Vec<(Arc<Corpus>, f64)>> {
    let mut corpora = Vec::with_capacity(sources.len());
    for source in sources {
        let Source { path, weight, .. } = source;
        ensure!(
            weight.is_finite() && *weight > 0.0,
            "data source {}: weight = {weight}, but a weight is a positive number; take the source out to leave it unread",
            path.display()
        );
        let corpus = open_one(source, tokenizer, cache, vocabulary).with_context(|| format!("data source {}", path.display()))?;
        corpora.push((Arc::new(corpus), *weight));
    }
    Ok(corpora)
}

fn open_one(source: &Source, tokenizer: &Tokenizer, cache: &Path, vocabulary: usize) -> Result<Corpus> {
    let Source { path, dtype, .. } = source;
    if path.join(MANIFEST).is_file() {
        refuse_dtype(*dtype, "its manifest says it")?;
        return open_prepared(path, tokenizer, vocabulary);
    }
    let paths = files::expand(path)?;
    let is_raw = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "bin");
    match (paths.iter().find(|path| is_raw(path)), paths.iter().find(|path| !is_raw(path))) {
        (Some(_), None) => Corpus::open(&paths, *dtype, vocabulary),
        (Some(raw), Some(text)) => bail!(
            "it matches tokens ({}) and other files ({}): give each kind a source of its own, as in {}",
            raw.display(),
            text.display(),
            raw.with_file_name("*.bin").display()
        ),
        _ => {
            refuse_dtype(*dtype, "the tokenizer decides it for text")?;
            check_vocabulary(tokenizer.name(), tokenizer.vocabulary(), vocabulary)?;
            let folder = cache.join(cache_name(path, tokenizer)?);
            prepare::prepare(std::slice::from_ref(path), tokenizer, &folder)?;
            open_prepared(&folder, tokenizer, vocabulary)
        }
    }
}

fn open_prepared(folder: &Path, tokenizer: &Tokenizer, vocabulary: usize) -> Result<Corpus> {
    let Some(manifest) = Manifest::read(folder)? else {
        bail!("{} was written by another version of this program: prepare it again", folder.join(MANIFEST).display());
    };
    ensure!(
        manifest.tokenizer_fingerprint == format!("{:016x}", tokenizer.fingerprint()),
        "{} was made with the tokenizer \"{}\" ({}), but data.tokenizer is \"{}\" ({:016x}): prepare it again, or change the key",
        folder.display(),
        manifest.tokenizer,
        manifest.tokenizer_fingerprint,
        tokenizer.name(),
        tokenizer.fingerprint()
    );
    check_vocabulary(&manifest.tokenizer, manifest.vocabulary, vocabulary)?;
    Corpus::open(&manifest.paths(folder)?, Some(manifest.dtype), vocabulary)
}

fn check_vocabulary(tokenizer: &str, ids: usize, vocabulary: usize) -> Result<()> {
    ensure!(
        ids <= vocabulary,
        "the tokenizer \"{tokenizer}\" has {ids} ids, but model.vocab_size = {vocabulary}: set it to {ids} or more (a multiple of 64 is fastest)"
    );
    Ok(())
}

fn refuse_dtype(dtype: Option<TokenType>, reason: &str) -> Result<()> {
    match dtype {
        Some(dtype) => bail!("dtype = \"{dtype}\" is for raw .bin files only; {reason}"),
        None => Ok(()),
    }
}

/// The cache of a source has its own folder, by what is written in the configuration and from where: whether the files behind it have
/// changed is for the manifest in it to say.
fn cache_name(path: &Path, tokenizer: &Tokenizer) -> Result<String> {
    let absolute = std::path::absolute(path).with_context(|| format!("looking for {}", path.display()))?;
    let key = rng::fnv1a(absolute.as_os_str().as_encoded_bytes()) ^ tokenizer.fingerprint().rotate_left(1);
    Ok(format!("{}-{key:016x}", tokenizer.name()))
}
