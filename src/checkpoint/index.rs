//! What a checkpoint holds: the facts of the run at that step, every box of every tensor, and the sum of every file.
//!
//! The file is one JSON object. Its first line holds the checksum of all that follows the line, so that a flipped bit in a step number
//! is found like one in a weight.
//!
//! Invariant: an index that was read names only plain files beside it, and its boxes tile every tensor exactly once.

use crate::checkpoint::boxes::{Area, check_tiling};
use crate::checkpoint::folder::check_file_name;
use crate::checkpoint::safetensors::{FileSum, open_strictly};
use crate::dtype::Dtype;
use anyhow::{Context, Result, bail, ensure};
use crc_fast::{CrcAlgorithm, checksum};
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::path::Path;

pub const INDEX: &str = "index.json";
/// Changes when a program that knows the old number would misread the new files.
pub const VERSION: u32 = 1;

/// What the numbers of a tensor are for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// What the model computes with.
    Weights,
    /// The same in f32, which the optimizer updates.
    Master,
    /// The optimizer's mean of gradients.
    ExpAvg,
    /// The optimizer's mean of squared gradients.
    ExpAvgSq,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Weights, Kind::Master, Kind::ExpAvg, Kind::ExpAvgSq];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Weights => "weights",
            Kind::Master => "master",
            Kind::ExpAvg => "exp_avg",
            Kind::ExpAvgSq => "exp_avg_sq",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The run's canonical sums, which a resumed run keeps.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    pub shards: usize,
    pub lanes: usize,
    pub order: String,
}

/// What a checkpoint says of the run. All ranks of a save hand over the same.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// Optimizer steps that are done.
    pub step: u64,
    /// Tokens seen so far.
    pub tokens: u64,
    pub seed: u64,
    pub geometry: Geometry,
    /// What the training loop carries from step to step (the loss scale); this floor only keeps it.
    pub state: serde_json::Value,
    /// The whole configuration in force, as TOML.
    pub config: String,
}

/// A box of a tensor, and where it lies.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredBox {
    pub start: Vec<usize>,
    pub size: Vec<usize>,
    pub file: String,
    /// The name of the box inside the file.
    pub key: String,
}

/// A global tensor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tensor {
    #[serde(serialize_with = "dtype_to_text", deserialize_with = "dtype_from_text")]
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub boxes: Vec<StoredBox>,
}

impl Tensor {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().fold(self.dtype.bytes() as u64, |product, &dim| product.saturating_mul(dim as u64))
    }
}

/// The size and checksum of a file, in the index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredSum {
    pub bytes: u64,
    #[serde(serialize_with = "sum_to_text", deserialize_with = "sum_from_text")]
    pub crc64: u64,
}

impl From<FileSum> for StoredSum {
    fn from(sum: FileSum) -> StoredSum {
        StoredSum { bytes: sum.bytes, crc64: sum.crc64 }
    }
}

/// Tensors by kind and public name.
pub type Tensors = BTreeMap<Kind, BTreeMap<String, Tensor>>;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    pub version: u32,
    /// Which start of the run wrote this.
    pub incarnation: u64,
    pub facts: Facts,
    pub files: BTreeMap<String, StoredSum>,
    pub tensors: Tensors,
}

impl Index {
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        seal(self)
    }

    /// Reads the index of the checkpoint in `folder` and checks all of it that needs no other file.
    pub fn read(folder: &Path) -> Result<Index> {
        let path = folder.join(INDEX);
        let bytes = read_file(&path)?;
        Index::from_bytes(&bytes).with_context(|| format!("{} is not a sound index", path.display()))
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Index> {
        let body = open_seal(bytes)?;
        let version: Version = serde_json::from_slice(&body).context("the version of its format is not given")?;
        if version.version != VERSION {
            bail!("its format is version {}, and this program reads version {VERSION}: use the program that wrote it", version.version);
        }
        let index: Index = serde_json::from_slice(&body)?;
        index.check()?;
        Ok(index)
    }

    /// Holds files and tensors to each other.
    pub fn check(&self) -> Result<()> {
        for file in self.files.keys() {
            check_file_name(file)?;
        }
        let mut keys = BTreeSet::new();
        for (kind, tensors) in &self.tensors {
            for (name, tensor) in tensors {
                check_tensor(tensor).with_context(|| format!("tensor {name:?} of {kind}"))?;
                for stored in &tensor.boxes {
                    ensure!(
                        self.files.contains_key(&stored.file),
                        "tensor {name:?} of {kind} lies in {:?}, which is not listed",
                        stored.file
                    );
                    let first = keys.insert((stored.file.as_str(), stored.key.as_str()));
                    ensure!(first, "{:?} of the file {:?} is given to two boxes", stored.key, stored.file);
                }
            }
        }
        let used: BTreeSet<&str> = keys.iter().map(|(file, _)| *file).collect();
        if let Some(file) = self.files.keys().find(|file| !used.contains(file.as_str())) {
            bail!("the file {file:?} is listed, and no tensor lies in it");
        }
        Ok(())
    }

    /// Bytes of all files but the index.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|sum| sum.bytes).fold(0, u64::saturating_add)
    }
}

fn check_tensor(tensor: &Tensor) -> Result<()> {
    let areas: Vec<Area> = tensor.boxes.iter().map(|stored| Area::of(&tensor.shape, &stored.start, &stored.size)).collect::<Result<_>>()?;
    check_tiling(&tensor.shape, &areas)
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

const SEAL: &str = "{\"crc64\":\"";
const SEAL_END: &str = "\",\n";

/// A JSON object of one line per member, whose first member is the checksum of all that follows the first line.
pub fn seal<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let text = serde_json::to_string(value).context("writing JSON")?;
    let body = format!("{}\n", text.strip_prefix('{').context("only an object can be sealed")?);
    let sum = checksum(CrcAlgorithm::Crc64Nvme, body.as_bytes());
    Ok(format!("{SEAL}{sum:016x}{SEAL_END}{body}").into_bytes())
}

/// The object without the checksum, after holding it to the checksum.
fn open_seal(bytes: &[u8]) -> Result<Vec<u8>> {
    let head = SEAL.len() + 16 + SEAL_END.len();
    ensure!(bytes.len() > head, "it has {} bytes and was cut off", bytes.len());
    let (seal, body) = bytes.split_at(head);
    let expected = format!("{SEAL}{:016x}{SEAL_END}", checksum(CrcAlgorithm::Crc64Nvme, body));
    ensure!(seal == expected.as_bytes(), "its checksum does not fit its content: it was cut off or altered");
    Ok([b"{", body].concat())
}

/// Reads what `seal` wrote.
pub fn unseal<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let body = open_seal(&read_file(path)?).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&body).with_context(|| format!("reading {}", path.display()))
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_strictly(path)?.read_to_end(&mut bytes).with_context(|| format!("reading {}", path.display()))?;
    Ok(bytes)
}

fn dtype_to_text<S: Serializer>(dtype: &Dtype, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}

fn dtype_from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dtype, D::Error> {
    let text = String::deserialize(deserializer)?;
    let known = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::U32];
    let found = known.into_iter().find(|dtype| dtype.name() == text);
    found.ok_or_else(|| D::Error::custom(format!("{text:?} is not a dtype: f32, bf16, f16 and u32 are")))
}

fn sum_to_text<S: Serializer>(sum: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{sum:016x}"))
}

fn sum_from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let sum = u64::from_str_radix(&text, 16).ok().filter(|sum| format!("{sum:016x}") == text);
    sum.ok_or_else(|| D::Error::custom(format!("{text:?} is not a checksum of sixteen hexadecimal digits")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Index {
        let geometry = Geometry { shards: 2, lanes: 4, order: "lanes".to_owned() };
        let state = serde_json::json!({ "loss_scale": 65536.0 });
        let facts = Facts { step: 7, tokens: 70, seed: 1, geometry, state, config: "[run]\nname = \"x\"\n".to_owned() };
        let stored = |row, file: &str| StoredBox { start: vec![row, 0], size: vec![2, 3], file: file.to_owned(), key: format!("w{row}") };
        let tensor = Tensor { dtype: Dtype::Bf16, shape: vec![4, 3], boxes: vec![stored(0, "a"), stored(2, "b")] };
        let sum = StoredSum { bytes: 4108, crc64: 0x0123 };
        Index {
            version: VERSION,
            incarnation: 3,
            facts,
            files: BTreeMap::from([("a".to_owned(), sum), ("b".to_owned(), sum)]),
            tensors: BTreeMap::from([(Kind::ExpAvgSq, BTreeMap::from([("w".to_owned(), tensor)]))]),
        }
    }

    fn refused(change: impl FnOnce(&mut Index)) -> String {
        let mut index = sample();
        change(&mut index);
        format!("{:#}", Index::from_bytes(&index.to_bytes().expect("JSON")).expect_err("an unsound index"))
    }

    fn tensor(index: &mut Index) -> &mut Tensor {
        index.tensors.get_mut(&Kind::ExpAvgSq).and_then(|tensors| tensors.get_mut("w")).expect("the tensor")
    }

    #[test]
    fn reads_what_it_wrote_and_is_json() {
        let bytes = sample().to_bytes().expect("JSON");
        assert_eq!(Index::from_bytes(&bytes).expect("sound"), sample());
        let json: serde_json::Value = serde_json::from_slice(&bytes).expect("ordinary JSON");
        assert_eq!(json["facts"]["step"], 7);
        assert_eq!(json["tensors"]["exp_avg_sq"]["w"]["dtype"], "bf16");
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_found() {
        let bytes = sample().to_bytes().expect("JSON");
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            Index::from_bytes(&flipped).expect_err("a flipped bit");
        }
        for length in 0..bytes.len() {
            Index::from_bytes(&bytes[..length]).expect_err("a truncation");
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        assert!(refused(|index| index.version = 9).contains("version 9"));
        assert!(refused(|index| tensor(index).boxes[1].start[0] = 1).contains("overlap"));
        assert!(refused(|index| tensor(index).boxes[1].start[0] = 3).contains("leaves the shape"));
        assert!(refused(|index| tensor(index).shape[0] = 5).contains("cover 12 of the 15"));
        assert!(refused(|index| tensor(index).boxes[0].file = "c".to_owned()).contains("not listed"));
        assert!(refused(|index| tensor(index).boxes.truncate(1)).contains("\"w\" of exp_avg_sq"));
        for name in ["../a", "a/b", "..", "", ".hidden"] {
            let message = refused(|index| {
                index.files.insert(name.to_owned(), StoredSum { bytes: 0, crc64: 0 });
            });
            assert!(message.contains("plain name"), "{message}");
        }
        let unused = refused(|index| {
            index.files.insert("spare".to_owned(), StoredSum { bytes: 0, crc64: 0 });
        });
        assert!(unused.contains("no tensor lies in it"), "{unused}");
    }
}
