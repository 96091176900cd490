//! What a real GPU has computed, by name: written where FERROTRON_RECORD says, and read from `tests/golden/gpu/*.bin`, to which every run
//! holds the emulator.
//!
//! A record is the length of its name as u32, the name, the length of the result in bytes as u64, a hash of it as u64, how many of its
//! first bytes follow as u32, and those; all little-endian. NaNs are written as one and the same.
//!
//! Invariant: a record is appended by one call, so a run that breaks off leaves whole records.

use super::gpu;
use ferrotron::device::Device;
use ferrotron::device::tensor::Tensor;
use ferrotron::dtype::Dtype;
use ferrotron::rng;
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

/// One result.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    pub bytes: usize,
    pub hash: u64,
    pub head: Vec<u8>,
}

/// The GPU that FERROTRON_GPU asks for, opened once, and whether it takes the emulator's place.
pub fn real() -> Option<(Device, bool)> {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let wish = std::env::var("FERROTRON_GPU").ok().filter(|wish| !wish.is_empty() && wish != "0")?;
    assert!(wish == "1" || wish == "only", "FERROTRON_GPU is {wish:?}: \"1\" is a GPU beside the emulator, \"only\" one in its place");
    Some((DEVICE.get_or_init(|| gpu::open(0, 1)).clone(), wish == "only"))
}

impl Record {
    /// Of a result, of which the first `keep` bytes stay.
    pub fn of(result: &Tensor, keep: usize) -> Record {
        let bytes = with_one_nan(result.dtype(), result.view().to_bytes());
        Record { bytes: bytes.len(), hash: rng::fnv1a(&bytes), head: bytes[..keep.min(bytes.len())].to_vec() }
    }

    fn encoded(&self, name: &str) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend((name.len() as u32).to_le_bytes());
        out.extend(name.as_bytes());
        out.extend((self.bytes as u64).to_le_bytes());
        out.extend(self.hash.to_le_bytes());
        out.extend((self.head.len() as u32).to_le_bytes());
        out.extend(&self.head);
        out
    }
}

/// NaNs differ in bits that no kernel promises.
fn with_one_nan(dtype: Dtype, mut bytes: Vec<u8>) -> Vec<u8> {
    let (size, infinity, nan) = match dtype {
        Dtype::F32 => (4, 0x7f80_0000u32, 0x7fff_ffffu32),
        Dtype::Bf16 => (2, 0x7f80, 0x7fff),
        Dtype::F16 => (2, 0x7c00, 0x7fff),
        Dtype::U32 => return bytes,
    };
    for element in bytes.chunks_exact_mut(size) {
        let value = element.iter().rev().fold(0u32, |value, &byte| value << 8 | byte as u32);
        if value & nan > infinity {
            element.copy_from_slice(&nan.to_le_bytes()[..size]);
        }
    }
    bytes
}

/// Appends a result of a real GPU to the file that FERROTRON_RECORD names, if it does.
pub fn record(name: &str, record: &Record) {
    static FILE: Mutex<()> = Mutex::new(());
    let Some(path) = std::env::var_os("FERROTRON_RECORD") else { return };
    let _alone = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = OpenOptions::new().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(&record.encoded(name)));
    written.unwrap_or_else(|error| panic!("writing {}: {error}", Path::new(&path).display()));
}

/// What GPUs have recorded under this name, with the name of the file.
pub fn recorded(name: &str) -> &'static [(String, Record)] {
    static RECORDS: OnceLock<HashMap<String, Vec<(String, Record)>>> = OnceLock::new();
    let records = RECORDS.get_or_init(|| {
        let mut records: HashMap<String, Vec<(String, Record)>> = HashMap::new();
        for (file, bytes) in files() {
            let all = parse(&bytes).unwrap_or_else(|| panic!("tests/golden/gpu/{file} ends within a record"));
            all.into_iter().for_each(|(name, record)| records.entry(name).or_default().push((file.clone(), record)));
        }
        // A file may have the same twice. A name that stands there for two things says nothing of either.
        for found in records.values_mut() {
            found.dedup();
            let files: Vec<String> = found.iter().map(|(file, _)| file.clone()).collect();
            found.retain(|(file, _)| files.iter().filter(|other| *other == file).count() == 1);
        }
        records
    });
    records.get(name).map_or(&[], Vec::as_slice)
}

/// The files that were recorded, and what is in them.
pub fn files() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gpu");
    let Ok(entries) = fs::read_dir(&folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|end| end == "bin"));
    let read = |path: &Path| fs::read(path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()));
    let mut files: Vec<_> =
        paths.map(|path| (path.file_name().map(|name| name.to_string_lossy().into()).unwrap_or_default(), read(&path))).collect();
    files.sort();
    files
}

fn parse(mut bytes: &[u8]) -> Option<Vec<(String, Record)>> {
    fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = bytes.split_at_checked(count)?;
        *bytes = rest;
        Some(taken)
    }
    let number = |bytes: &mut &[u8], size: usize| {
        let taken = take(bytes, size)?;
        Some(taken.iter().rev().fold(0u64, |value, &byte| value << 8 | byte as u64))
    };
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let length = number(&mut bytes, 4)? as usize;
        let name = String::from_utf8(take(&mut bytes, length)?.to_vec()).ok()?;
        let (size, hash, kept) = (number(&mut bytes, 8)? as usize, number(&mut bytes, 8)?, number(&mut bytes, 4)? as usize);
        records.push((name, Record { bytes: size, hash, head: take(&mut bytes, kept)?.to_vec() }));
    }
    Some(records)
}

#[test]
fn records_read_back() {
    let bytes = [0x7f80_0001u32, 0xffff_ffff, 1.0f32.to_bits()].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let one = with_one_nan(Dtype::F32, bytes);
    assert_eq!(one[..4], one[4..8]);
    let record = Record { bytes: 12, hash: rng::fnv1a(&one), head: one };
    let mut file = record.encoded("first");
    file.extend(record.encoded("second"));
    assert_eq!(parse(&file), Some(vec![("first".to_string(), record.clone()), ("second".to_string(), record)]));
    assert_eq!(parse(&file[..file.len() - 1]), None);
}
