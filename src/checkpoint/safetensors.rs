//! One safetensors file: written as a stream, read by position.
//!
//! The `safetensors` crate defines and checks the header. Its writer makes files of mode 0600, syncs nothing and orders metadata at
//! random, and its reader wants the whole file in memory; so both ends are here.
//!
//! Invariant: equal tensors give equal bytes, and what a header claims is compared with the size of the file before it is believed.

use crate::checkpoint::folder::{self, CHUNK};
use crate::dtype::Dtype;
use ::safetensors::tensor::{Dtype as FileDtype, Metadata, TensorInfo};
use anyhow::{Context, Result, anyhow, bail, ensure};
use crc_fast::{CrcAlgorithm, Digest};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const _: () = assert!(cfg!(target_endian = "little"), "the files hold little-endian numbers, and so does memory here");

/// What the format allows.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Data begin at a multiple of this, so that they can be mapped or read past the page cache.
const ALIGNMENT: usize = 4096;

/// The size and the CRC-64/NVME of a whole file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSum {
    pub bytes: u64,
    pub crc64: u64,
}

/// A tensor to be written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub key: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Entry {
    /// The order of tensors in a file: wide elements first, so that all are aligned; then by name.
    pub fn rank(&self) -> (Reverse<usize>, &str) {
        (Reverse(self.dtype.bytes()), &self.key)
    }

    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }
}

/// Writes one file: the data of all entries follow in the order of the entries.
pub struct Writer {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    digest: Digest,
    written: u64,
    expected: u64,
}

impl Writer {
    /// `entries` are in the order of `Entry::rank`, all different.
    pub fn create(path: &Path, entries: &[Entry]) -> Result<Writer> {
        let header = header(entries).with_context(|| format!("writing {}", path.display()))?;
        let expected = header.len() as u64 + entries.iter().map(|entry| entry.bytes() as u64).sum::<u64>();
        let digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        let file = folder::create_file(path)?;
        let mut writer = Writer { file, path: path.to_owned(), buffer: Vec::new(), digest, written: 0, expected };
        writer.write(&header)?;
        Ok(writer)
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.buffer.len() + bytes.len() > CHUNK {
            self.flush()?;
        }
        if bytes.len() >= CHUNK {
            return self.put(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Returns when the file has reached the disk. Its name has not: the folder is the caller's to sync.
    pub fn finish(mut self) -> Result<FileSum> {
        self.flush()?;
        assert_eq!(self.written, self.expected, "bytes written to {} and bytes announced in its header", self.path.display());
        self.file.sync_all().with_context(|| format!("syncing {}", self.path.display()))?;
        Ok(FileSum { bytes: self.written, crc64: self.digest.finalize() })
    }

    fn flush(&mut self) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.put(&buffer)?;
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.digest.update(bytes);
        self.file.write_all(bytes).with_context(|| format!("writing {} after {} bytes", self.path.display(), self.written))?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// Length, JSON and spaces.
fn header(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut tensors = Vec::with_capacity(entries.len());
    let mut at = 0usize;
    for (index, entry) in entries.iter().enumerate() {
        if let Some(next) = entries.get(index + 1) {
            ensure!(entry.rank() < next.rank(), "the tensors {:?} and {:?} are out of order or the same", entry.key, next.key);
        }
        let end = at + entry.bytes();
        let info = TensorInfo { dtype: file_dtype(entry.dtype), shape: entry.shape.clone(), data_offsets: (at, end) };
        tensors.push((entry.key.clone(), info));
        at = end;
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), tensors).map_err(|error| anyhow!("making the header: {error}"))?;
    let mut bytes = vec![0; 8];
    serde_json::to_writer(&mut bytes, &metadata).context("making the header")?;
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), b' ');
    let length = bytes.len() as u64 - 8;
    ensure!(length <= HEADER_BYTES_MAX, "{} tensors make a header of {length} bytes; {HEADER_BYTES_MAX} are allowed", entries.len());
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// A tensor found in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub dtype: FileDtype,
    pub shape: Vec<usize>,
    /// Where its bytes begin and end in the file.
    pub begin: u64,
    pub end: u64,
}

impl Found {
    /// The dtype, if it is one that this program computes with.
    pub fn dtype(&self) -> Result<Dtype> {
        match self.dtype {
            FileDtype::F32 => Ok(Dtype::F32),
            FileDtype::BF16 => Ok(Dtype::Bf16),
            FileDtype::F16 => Ok(Dtype::F16),
            FileDtype::U32 => Ok(Dtype::U32),
            other => bail!("its dtype is {other}; F32, BF16, F16 and U32 can be read"),
        }
    }
}

/// An open file whose header has been checked.
#[derive(Debug)]
pub struct Reader {
    file: File,
    path: PathBuf,
    pub tensors: BTreeMap<String, Found>,
}

impl Reader {
    /// Opens a file of a checkpoint, where a link has no business.
    pub fn open_strictly(path: &Path) -> Result<Reader> {
        Reader::from_file(open_strictly(path)?, path)
    }

    /// Opens a file that may be a link, as those in the cache of the Hugging Face hub are.
    pub fn open(path: &Path) -> Result<Reader> {
        Reader::from_file(File::open(path).with_context(|| format!("opening {}", path.display()))?, path)
    }

    fn from_file(file: File, path: &Path) -> Result<Reader> {
        let tensors = read_header(&file).with_context(|| format!("{} is not a sound safetensors file", path.display()))?;
        Ok(Reader { file, path: path.to_owned(), tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensor under `key`.
    pub fn find(&self, key: &str) -> Result<&Found> {
        self.tensors.get(key).with_context(|| format!("{} holds no tensor {key:?}", self.path.display()))
    }

    /// Fills `out` from the bytes at `position`.
    pub fn read_at(&self, position: u64, out: &mut [u8]) -> Result<()> {
        let reading = || format!("reading {} bytes at {position} of {}", out.len(), self.path.display());
        let context = reading();
        self.file.read_exact_at(out, position).context(context)
    }
}

/// Opens a regular file, and nothing else.
pub fn open_strictly(path: &Path) -> Result<File> {
    // Without NONBLOCK, opening a pipe that somebody left there would wait for a writer.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path);
    let file = opened.with_context(|| format!("opening {} (a link is refused)", path.display()))?;
    let kind = file.metadata().with_context(|| format!("looking at {}", path.display()))?;
    ensure!(kind.is_file(), "{} is not a regular file", path.display());
    Ok(file)
}

/// Reads a whole file for its sum.
pub fn sum(path: &Path) -> Result<FileSum> {
    let mut file = open_strictly(path)?;
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    let length = file.metadata().with_context(|| format!("looking at {}", path.display()))?.len();
    let mut buffer = vec![0; CHUNK.min(length.max(1) as usize)];
    let mut bytes = 0;
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => return Ok(FileSum { bytes, crc64: digest.finalize() }),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).with_context(|| format!("reading {} after {bytes} bytes", path.display())),
        };
        digest.update(&buffer[..count]);
        bytes += count as u64;
    }
}

fn read_header(file: &File) -> Result<BTreeMap<String, Found>> {
    let size = file.metadata().context("looking at it")?.len();
    ensure!(size >= 8, "it has {size} bytes; the length of its header alone takes 8");
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).context("reading the length of its header")?;
    let length = u64::from_le_bytes(length);
    ensure!(length <= HEADER_BYTES_MAX, "its header claims {length} bytes; the format allows {HEADER_BYTES_MAX}");
    ensure!(length <= size - 8, "its header claims {length} bytes, and the whole file has {size}");
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, 8).context("reading its header")?;
    ensure!(text.first() == Some(&b'{'), "its header does not begin with '{{'");
    let header: Header = serde_json::from_slice(&text).context("its header is not what the format asks for")?;
    let metadata = Metadata::new(None, header.tensors).map_err(|error| anyhow!("its header contradicts itself: {error}"))?;
    let (claimed, there) = (metadata.data_len() as u64, size - 8 - length);
    ensure!(claimed == there, "its header claims {claimed} bytes of data, and {there} are there");
    let mut found = BTreeMap::new();
    for (key, info) in metadata.tensors() {
        let elements = info.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim.max(1)));
        ensure!(elements.is_some_and(|count| count < 1 << 56), "the shape {:?} of {key:?} is absurd", info.shape);
        let (begin, end) = (8 + length + info.data_offsets.0 as u64, 8 + length + info.data_offsets.1 as u64);
        found.insert(key, Found { dtype: info.dtype, shape: info.shape.clone(), begin, end });
    }
    Ok(found)
}

/// The tensors of a header in the order of their data. Two of one name are an error, which a map would hide.
struct Header {
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut seen = HashSet::new();
        let mut tensors = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                return Err(serde::de::Error::custom(format!("the name {key:?} appears twice")));
            }
            if key == "__metadata__" {
                map.next_value::<HashMap<String, String>>()?;
            } else {
                tensors.push((key, map.next_value::<TensorInfo>()?));
            }
        }
        tensors.sort_by(|(left_key, left), (right_key, right)| (left.data_offsets, left_key).cmp(&(right.data_offsets, right_key)));
        Ok(Header { tensors })
    }
}

fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::Bf16 => FileDtype::BF16,
        Dtype::F16 => FileDtype::F16,
        Dtype::U32 => FileDtype::U32,
    }
}
