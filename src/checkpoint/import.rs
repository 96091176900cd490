//! Weights in the Hugging Face format: one safetensors file or several with an index, read as a checkpoint is or made into one.
//!
//! Invariant: a tensor that is there is either asked for, known to carry no weight, or named in an error.

use crate::checkpoint::boxes::{self, Area, Stored};
use crate::checkpoint::folder::{self, CHUNK, check_file_name};
use crate::checkpoint::index::{Facts, INDEX, Index, Kind, StoredBox, Tensor, Tensors, VERSION};
use crate::checkpoint::safetensors::{Entry, Found, Reader, Writer};
use crate::dtype::Dtype;
use crate::plan::layout::Piece;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const SHARDED: &str = "model.safetensors.index.json";
const HEAD: &str = "lm_head.weight";
/// The tensors that a tied head may be a copy of.
const EMBEDDINGS: [&str; 2] = ["model.embed_tokens.weight", "transformer.wte.weight"];

/// Weights under their public names.
pub struct HuggingFace {
    path: PathBuf,
    files: Vec<Reader>,
    /// For each public name the file and the name in it.
    tensors: BTreeMap<String, (usize, String)>,
}

#[derive(Deserialize)]
struct Sharded {
    weight_map: BTreeMap<String, String>,
}

impl HuggingFace {
    /// `path` is a folder as `transformers` saves one, or a safetensors file.
    pub fn open(path: &Path) -> Result<HuggingFace> {
        let kind = fs::metadata(path).with_context(|| format!("opening the weights in {}", path.display()))?;
        let (files, map) = if kind.is_file() {
            (vec![Reader::open(path)?], None)
        } else if path.join(SINGLE).is_file() {
            (vec![Reader::open(&path.join(SINGLE))?], None)
        } else if path.join(SHARDED).is_file() {
            let map = read_map(&path.join(SHARDED))?;
            let names: BTreeSet<&String> = map.values().collect();
            (names.into_iter().map(|name| Reader::open(&path.join(name))).collect::<Result<_>>()?, Some(map))
        } else {
            let pickled = path.join("pytorch_model.bin").exists() || path.join("pytorch_model.bin.index.json").exists();
            let hint = if pickled { "; save it again with safe_serialization=True, pickled weights are not read" } else { "" };
            bail!("{} holds neither {SINGLE} nor {SHARDED}{hint}", path.display());
        };
        let mut tensors = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for key in file.tensors.keys() {
                if let Some((other, _)) = tensors.insert(key.clone(), (number, key.clone())) {
                    bail!("{key:?} is in {} and in {}", files[other].path().display(), file.path().display());
                }
            }
        }
        if let Some(map) = map {
            check_map(path, &map, &files, &tensors)?;
        }
        tensors.retain(|key, (file, _)| !is_buffer(key, &files[*file].tensors[key]));
        // The first GPT-2 files were saved from the model without its head, one level deeper.
        let bare = tensors.contains_key("wte.weight") && !tensors.keys().any(|name| name.starts_with("transformer."));
        if bare {
            let prefixed = |(name, place)| if name == HEAD { (name, place) } else { (format!("transformer.{name}"), place) };
            tensors = tensors.into_iter().map(prefixed).collect();
        }
        Ok(HuggingFace { path: path.to_owned(), files, tensors })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Dims and dtype of a tensor.
    pub fn find(&self, name: &str) -> Result<(&[usize], Dtype)> {
        let (reader, found) = self.place(name)?;
        let dtype = found.dtype().with_context(|| format!("{name:?} in {}", reader.path().display()))?;
        Ok((&found.shape, dtype))
    }

    /// Fails, with all that is wrong, unless the tensors are those of the model: names and dims, none missing, none over.
    ///
    /// A head that is not asked for may be there if it is a copy of the embedding.
    pub fn check(&self, expected: &BTreeMap<String, Vec<usize>>) -> Result<()> {
        let mut problems = Vec::new();
        for (name, shape) in expected {
            match self.place(name) {
                Err(_) => problems.push(format!("{name:?} of the shape {shape:?} is missing")),
                Ok((reader, found)) if &found.shape != shape => problems.push(format!(
                    "{name:?} has the shape {:?} in {}, and the model has {shape:?}",
                    found.shape,
                    reader.path().display()
                )),
                Ok(_) => {}
            }
        }
        for name in self.tensors.keys().filter(|name| !expected.contains_key(*name)) {
            let (reader, found) = self.place(name)?;
            if name == HEAD && self.head_is_embedding(found)? {
                continue;
            }
            let tied = if name == HEAD { " (it is not a copy of the embedding, so the model is not a tied one)" } else { "" };
            problems.push(format!("{name:?} in {} is nothing the model has{tied}", reader.path().display()));
        }
        ensure!(problems.is_empty(), "the weights in {} are not those of the model:\n  {}", self.path.display(), problems.join("\n  "));
        Ok(())
    }

    /// Fills the pieces' ranges of `out`, a buffer of `dtype`. What lies between pieces stays as it is.
    pub fn read(&self, pieces: &[Piece], dtype: Dtype, out: &mut [u8]) -> Result<()> {
        for piece in pieces {
            let (reader, found) = self.place(&piece.name)?;
            let file = reader.path().display();
            let (there, asked) = (&found.shape, &piece.shape);
            ensure!(there == asked, "{:?} has the shape {there:?} in {file}, and the model has {asked:?}", piece.name);
            let stored_as = found.dtype().with_context(|| format!("{:?} in {file}", piece.name))?;
            let area = Area::whole(there).with_context(|| format!("{:?} in {file}", piece.name))?;
            boxes::read(&Stored { reader, begin: found.begin, dtype: stored_as, area }, piece, dtype, out)?;
        }
        Ok(())
    }

    fn place(&self, name: &str) -> Result<(&Reader, &Found)> {
        let place = self.tensors.get(name);
        let (file, key) = place.with_context(|| format!("{} holds no tensor {name:?}", self.path.display()))?;
        let reader = &self.files[*file];
        Ok((reader, reader.find(key)?))
    }

    fn head_is_embedding(&self, head: &Found) -> Result<bool> {
        let Some(name) = EMBEDDINGS.into_iter().find(|name| self.tensors.contains_key(*name)) else { return Ok(false) };
        let (reader, embedding) = self.place(name)?;
        if (&head.shape, head.dtype) != (&embedding.shape, embedding.dtype) {
            return Ok(false);
        }
        let (of_head, _) = self.place(HEAD)?;
        let (mut left, mut right) = (Vec::new(), Vec::new());
        let mut same = true;
        for_chunks(head, |at, bytes| {
            left.resize(bytes, 0);
            right.resize(bytes, 0);
            of_head.read_at(head.begin + at, &mut left)?;
            reader.read_at(embedding.begin + at, &mut right)?;
            same &= left == right;
            Ok(())
        })?;
        Ok(same)
    }
}

/// Makes a folder of Hugging Face weights a checkpoint: weights alone, in their own dtypes.
///
/// `out` must not be there yet; it is the folder of the checkpoint itself.
pub fn import(weights: &Path, out: &Path, facts: Facts) -> Result<()> {
    let source = HuggingFace::open(weights)?;
    let stage = folder::stage(out)?;
    write_checkpoint(&source, &stage, facts).inspect_err(|_| {
        // What failed is what gets reported, not that its leftovers could not be removed either.
        let _ = folder::remove_tree(&stage);
    })?;
    folder::publish(&stage, out)
}

fn write_checkpoint(source: &HuggingFace, stage: &Path, facts: Facts) -> Result<()> {
    let file = "weights-00000-of-00001.safetensors".to_owned();
    let mut entries = Vec::new();
    let mut tensors = BTreeMap::new();
    for name in source.names() {
        let (shape, dtype) = source.find(name)?;
        Area::whole(shape).with_context(|| format!("{name:?} in {}", source.path.display()))?;
        let stored = StoredBox { start: vec![0; shape.len()], size: shape.to_vec(), file: file.clone(), key: name.to_owned() };
        entries.push(Entry { key: name.to_owned(), dtype, shape: shape.to_vec() });
        tensors.insert(name.to_owned(), Tensor { dtype, shape: shape.to_vec(), boxes: vec![stored] });
    }
    entries.sort_by(|left, right| left.rank().cmp(&right.rank()));
    folder::check_space(stage, entries.iter().map(|entry| entry.bytes() as u64).sum())?;
    let mut writer = Writer::create(&stage.join(&file), &entries)?;
    let mut chunk = Vec::new();
    for entry in &entries {
        let (reader, found) = source.place(&entry.key)?;
        for_chunks(found, |at, bytes| {
            chunk.resize(bytes, 0);
            reader.read_at(found.begin + at, &mut chunk)?;
            writer.write(&chunk)
        })?;
    }
    let files = BTreeMap::from([(file, writer.finish()?.into())]);
    let index = Index { version: VERSION, incarnation: 0, facts, files, tensors: Tensors::from([(Kind::Weights, tensors)]) };
    index.check()?;
    let path = stage.join(INDEX);
    let mut file = folder::create_file(&path)?;
    file.write_all(&index.to_bytes()?).and_then(|()| file.sync_all()).with_context(|| format!("writing {}", path.display()))
}

/// Calls with the offset and length of every part of a tensor's bytes.
fn for_chunks(found: &Found, mut visit: impl FnMut(u64, usize) -> Result<()>) -> Result<()> {
    let length = found.end - found.begin;
    for at in (0..length).step_by(CHUNK) {
        visit(at, (length - at).min(CHUNK as u64) as usize)?;
    }
    Ok(())
}

/// Tensors of old files that are functions of nothing but their shape: the causal mask, and the frequencies of rotary positions.
fn is_buffer(name: &str, found: &Found) -> bool {
    let mask = name.ends_with(".attn.bias") && matches!(found.shape[..], [1, 1, rows, columns] if rows == columns);
    let masked = name.ends_with(".attn.masked_bias") && found.shape.iter().product::<usize>() == 1;
    mask || masked || name.ends_with(".rotary_emb.inv_freq")
}

fn read_map(path: &Path) -> Result<BTreeMap<String, String>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let sharded: Sharded = serde_json::from_slice(&bytes).with_context(|| format!("{} has no sound weight_map", path.display()))?;
    for file in sharded.weight_map.values() {
        check_file_name(file).with_context(|| format!("the weight_map of {}", path.display()))?;
    }
    Ok(sharded.weight_map)
}

/// Holds the map to what the files hold.
fn check_map(folder: &Path, map: &BTreeMap<String, String>, files: &[Reader], there: &BTreeMap<String, (usize, String)>) -> Result<()> {
    let path = folder.join(SHARDED);
    for (name, file) in map {
        let holder = there.get(name).map(|(number, _)| files[*number].path());
        ensure!(holder == Some(&folder.join(file)), "{} says that {name:?} is in {file}, and it is not", path.display());
    }
    if let Some(name) = there.keys().find(|name| !map.contains_key(*name)) {
        bail!("{name:?} is in {}, and {} does not say so", files[there[name].0].path().display(), path.display());
    }
    Ok(())
}
