//! A folder of token shards: what it says of itself, and how it is written.
//!
//! The manifest names the shards, and is renamed into place last: a folder without it is not a data set, whatever else lies there. A writer
//! that loses to another one takes its own files back; what a killed writer left behind goes away with the next one that succeeds.
//!
//! Invariant: a shard that a manifest names is complete and on disk, and nobody changes it afterwards.

use crate::data::corpus::TokenType;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "ferrotron tokens";
const VERSION: u32 = 1;

/// Bytes that are written to a shard in one go.
const WAITING_BYTES: usize = 1 << 20;

/// What lies in a folder of shards, and what it was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: String,
    pub version: u32,
    pub tokenizer: String,
    /// Of the tokenizer, in hexadecimal: JSON numbers lose the low bits of a u64 in many readers.
    pub tokenizer_fingerprint: String,
    pub vocabulary: usize,
    pub end_of_text: Option<u32>,
    pub dtype: TokenType,
    pub tokens: usize,
    pub documents: usize,
    pub shards: Vec<Shard>,
    pub sources: Vec<SourceFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    pub file: String,
    pub tokens: usize,
}

/// A text file as it was when it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    pub path: String,
    pub bytes: u64,
    /// Seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

impl SourceFile {
    pub fn look(path: &Path) -> Result<SourceFile> {
        let at = || format!("looking at {}", path.display());
        let metadata = fs::metadata(path).with_context(at)?;
        let absolute = std::path::absolute(path).with_context(at)?;
        let path = absolute.to_str().with_context(|| format!("{}: the name is not UTF-8; rename it", path.display()))?.to_string();
        Ok(SourceFile { path, bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

impl Manifest {
    /// Reads the manifest of a folder; none when there is none, or one of a version that this program no longer reads.
    pub fn read(folder: &Path) -> Result<Option<Manifest>> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let path = folder.join(MANIFEST);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let head = serde_json::from_slice::<Head>(&text).ok().filter(|head| head.format == FORMAT);
        let Some(head) = head else {
            bail!("{} was not written by `ferrotron prepare`: take another folder, or delete it", path.display());
        };
        if head.version != VERSION {
            return Ok(None);
        }
        serde_json::from_slice(&text).map(Some).with_context(|| format!("{}: delete the folder and prepare it again", path.display()))
    }

    /// The shards as files, in order; an error if one is not as it was written.
    pub fn paths(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::with_capacity(self.shards.len());
        for shard in &self.shards {
            ensure!(is_plain_name(&shard.file), "{}: \"{}\" is not the name of a file", folder.join(MANIFEST).display(), shard.file);
            let path = folder.join(&shard.file);
            let bytes = fs::metadata(&path).with_context(|| format!("looking at the shard {}", path.display()))?.len();
            let expected = (shard.tokens * self.dtype.bytes()) as u64;
            ensure!(
                bytes == expected,
                "the shard {} has {bytes} bytes, and {} says {expected}: delete the folder and prepare it again",
                path.display(),
                MANIFEST
            );
            paths.push(path);
        }
        Ok(paths)
    }
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('/') && name != "." && name != ".."
}

/// What is known of a data set before its first token is.
pub struct Heading {
    pub tokenizer: String,
    pub tokenizer_fingerprint: String,
    pub vocabulary: usize,
    pub end_of_text: Option<u32>,
    pub sources: Vec<SourceFile>,
    /// Data sets of one folder with other sources or another tokenizer have another one.
    pub fingerprint: u64,
}

/// Writes shards under names that nobody reads, until `commit`.
pub struct ShardWriter {
    folder: PathBuf,
    /// Unique in the folder, also among writers on other machines.
    stem: String,
    heading: Heading,
    dtype: TokenType,
    shard_tokens: usize,
    /// Held, with a lock on it, as long as this writer lives: by it others tell its files from those of a writer that was killed.
    _alive: File,
    current: Option<File>,
    shards: Vec<Shard>,
    tokens: usize,
    /// Bytes of the current shard that are still to be written: a document may be small.
    waiting: Vec<u8>,
}

impl ShardWriter {
    /// Starts a data set in a folder, which is made if need be. Shards hold at most `shard_tokens` tokens.
    pub fn create(folder: &Path, heading: Heading, shard_tokens: usize) -> Result<ShardWriter> {
        assert!(shard_tokens > 0, "a shard of no tokens");
        fs::create_dir_all(folder).with_context(|| format!("making the folder {}", folder.display()))?;
        let (stem, alive) = reserve(folder, heading.fingerprint)?;
        let dtype = TokenType::for_vocabulary(heading.vocabulary);
        let folder = folder.to_path_buf();
        Ok(ShardWriter {
            folder,
            stem,
            heading,
            dtype,
            shard_tokens,
            _alive: alive,
            current: None,
            shards: Vec::new(),
            tokens: 0,
            waiting: Vec::new(),
        })
    }

    pub fn write(&mut self, mut tokens: &[u32]) -> Result<()> {
        while !tokens.is_empty() {
            if self.shards.last().is_none_or(|shard| shard.tokens == self.shard_tokens) {
                self.start_shard()?;
            }
            let shard = self.shards.last_mut().expect("a shard was started");
            let (now, later) = tokens.split_at((self.shard_tokens - shard.tokens).min(tokens.len()));
            let filled = self.waiting.len();
            self.waiting.resize(filled + now.len() * self.dtype.bytes(), 0);
            self.dtype.narrow(now, &mut self.waiting[filled..]);
            shard.tokens += now.len();
            self.tokens += now.len();
            if self.waiting.len() >= WAITING_BYTES {
                self.write_waiting()?;
            }
            tokens = later;
        }
        Ok(())
    }

    fn write_waiting(&mut self) -> Result<()> {
        if let (Some(file), Some(shard)) = (&mut self.current, self.shards.last()) {
            let at = || format!("writing {}", self.folder.join(temporary(&shard.file)).display());
            file.write_all(&self.waiting).with_context(at)?;
        }
        self.waiting.clear();
        Ok(())
    }

    /// Makes the data set visible, unless another writer has made the same one visible meanwhile: then that one is given back.
    pub fn commit(mut self, documents: usize) -> Result<Manifest> {
        self.finish_shard()?;
        let heading = &self.heading;
        let manifest = Manifest {
            format: FORMAT.to_string(),
            version: VERSION,
            tokenizer: heading.tokenizer.clone(),
            tokenizer_fingerprint: heading.tokenizer_fingerprint.clone(),
            vocabulary: heading.vocabulary,
            end_of_text: heading.end_of_text,
            dtype: self.dtype,
            tokens: self.tokens,
            documents,
            shards: self.shards.clone(),
            sources: heading.sources.clone(),
        };
        if let Some(theirs) = Manifest::read(&self.folder)?
            && theirs.made_as(heading)
            && theirs.paths(&self.folder).is_ok()
        {
            return Ok(theirs);
        }
        for shard in &self.shards {
            let path = self.folder.join(&shard.file);
            fs::rename(self.folder.join(temporary(&shard.file)), &path).with_context(|| format!("naming the shard {}", path.display()))?;
        }
        sync_folder(&self.folder)?;
        let path = self.folder.join(MANIFEST);
        let unfinished = self.folder.join(manifest_draft(&self.stem));
        let text = serde_json::to_vec_pretty(&manifest).expect("a manifest has only what JSON can hold");
        let written = File::create(&unfinished).and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()));
        written.with_context(|| format!("writing {}", unfinished.display()))?;
        fs::rename(&unfinished, &path).with_context(|| format!("naming {}", path.display()))?;
        // From here on the shards are the manifest's: `drop` takes back those of this list.
        self.shards.clear();
        sync_folder(&self.folder)?;
        sweep(&self.folder, self.heading.fingerprint)?;
        Ok(manifest)
    }

    fn start_shard(&mut self) -> Result<()> {
        self.finish_shard()?;
        let suffix = match self.dtype {
            TokenType::U16 => "bin",
            TokenType::U32 => "u32.bin",
        };
        let file = format!("{}-{:05}.{suffix}", self.stem, self.shards.len());
        let path = self.folder.join(temporary(&file));
        self.current = Some(File::create(&path).with_context(|| format!("creating {}", path.display()))?);
        self.shards.push(Shard { file, tokens: 0 });
        Ok(())
    }

    fn finish_shard(&mut self) -> Result<()> {
        self.write_waiting()?;
        if let Some(file) = self.current.take() {
            file.sync_all().with_context(|| format!("writing shards to {}", self.folder.display()))?;
        }
        Ok(())
    }
}

impl Drop for ShardWriter {
    /// Takes back what was not committed. What cannot be removed harms nobody, and `sweep` tries again later.
    fn drop(&mut self) {
        for shard in &self.shards {
            fs::remove_file(self.folder.join(temporary(&shard.file))).ok();
            fs::remove_file(self.folder.join(&shard.file)).ok();
        }
        fs::remove_file(self.folder.join(manifest_draft(&self.stem))).ok();
        fs::remove_file(self.folder.join(format!("{}.lock", self.stem))).ok();
    }
}

impl Manifest {
    /// Whether this data set has the same tokenizer and the same, unchanged sources.
    pub fn made_as(&self, heading: &Heading) -> bool {
        self.tokenizer_fingerprint == heading.tokenizer_fingerprint && self.sources == heading.sources
    }
}

fn temporary(file: &str) -> String {
    format!("{file}.tmp")
}

fn manifest_draft(stem: &str) -> String {
    format!("{stem}.json.tmp")
}

/// Takes a stem for file names that no writer in this folder has, and a locked file that shows that its owner lives.
fn reserve(folder: &Path, fingerprint: u64) -> Result<(String, File)> {
    for attempt in 0.. {
        let stem = format!("tokens-{fingerprint:016x}-{}-{attempt}", std::process::id());
        let path = folder.join(format!("{stem}.lock"));
        let alive = match File::options().write(true).create_new(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error).with_context(|| format!("creating {}", path.display())),
        };
        // Some file systems know no locks: then nobody can lock this file, so nobody takes its owner for dead either.
        let taken = matches!(alive.try_lock(), Err(fs::TryLockError::WouldBlock));
        let swept = alive.metadata().with_context(|| format!("looking at {}", path.display()))?.nlink() == 0;
        if taken || swept {
            continue;
        }
        let used = ["bin", "u32.bin"].iter().any(|suffix| folder.join(format!("{stem}-00000.{suffix}")).exists());
        if !used {
            return Ok((stem, alive));
        }
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    unreachable!("there are more names than writers")
}

/// Removes what the data set just committed replaces: shards of other sources, and unfinished files of writers that no longer live. A
/// finished data set of the same sources may be in use by whoever committed it a moment ago, and stays.
fn sweep(folder: &Path, fingerprint: u64) -> Result<()> {
    let own = format!("tokens-{fingerprint:016x}-");
    let mut names: Vec<String> = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))? {
        let name = entry.with_context(|| format!("listing {}", folder.display()))?.file_name();
        names.extend(name.into_string().ok().filter(|name| name.starts_with("tokens-")));
    }
    // A file may be gone by now because another writer sweeps too; that is as good as removing it.
    let remove = |name: &String| drop(fs::remove_file(folder.join(name)));
    for lock in names.iter().filter(|name| name.ends_with(".lock")) {
        let Ok(file) = File::open(folder.join(lock)) else { continue };
        if file.try_lock().is_ok() {
            let stem = lock.strip_suffix(".lock").expect("only such names are looked at");
            let left = |name: &&String| name.strip_prefix(stem).is_some_and(|end| end.starts_with(['-', '.']) && end.ends_with(".tmp"));
            names.iter().filter(left).for_each(remove);
            remove(lock);
        }
    }
    for name in names.iter().filter(|name| name.ends_with(".bin") && !name.starts_with(&own)) {
        remove(name);
    }
    Ok(())
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|file| file.sync_all()).with_context(|| format!("writing the folder {}", folder.display()))
}
