//! A checkpoint made into a folder that `transformers` loads.
//!
//! Invariant: the folder appears whole or not at all, and the same checkpoint gives the same bytes.

use crate::checkpoint::boxes::slabs;
use crate::checkpoint::folder::{self, create_file};
use crate::checkpoint::index::Kind;
use crate::checkpoint::load::Checkpoint;
use crate::checkpoint::safetensors::{Entry, Writer};
use crate::dtype::Dtype;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Bytes of a tensor that are in memory at once.
const SLAB: usize = 64 << 20;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub dtype: Dtype,
    /// A file takes tensors until the next would make it larger than this.
    pub shard_bytes: u64,
}

impl Options {
    /// Files of 5 GB, as is usual.
    pub fn new(dtype: Dtype) -> Options {
        Options { dtype, shard_bytes: 5_000_000_000 }
    }
}

/// Writes master weights where there are some, else weights, to a new folder `out`.
///
/// `config` becomes `config.json`, with `torch_dtype` as exported; a model it calls tied is written without its head.
pub fn export(checkpoint: &Checkpoint, out: &Path, config: &Value, generation: Option<&Value>, options: Options) -> Result<()> {
    ensure!(options.dtype != Dtype::U32, "weights are exported as f32, bf16 or f16, not as u32");
    let stage = folder::stage(out)?;
    write(checkpoint, &stage, config, generation, options).inspect_err(|_| {
        // What failed is what gets reported, not that its leftovers could not be removed either.
        let _ = folder::remove_tree(&stage);
    })?;
    folder::publish(&stage, out)
}

fn write(checkpoint: &Checkpoint, stage: &Path, config: &Value, generation: Option<&Value>, options: Options) -> Result<()> {
    let kind = if checkpoint.has(Kind::Master) { Kind::Master } else { Kind::Weights };
    ensure!(checkpoint.has(kind), "{} holds no weights", checkpoint.folder().display());
    let tied = config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
    let entries: Vec<Entry> = checkpoint
        .tensors(kind)
        .filter(|(name, _)| !(tied && *name == "lm_head.weight"))
        .map(|(name, tensor)| Entry { key: name.to_owned(), dtype: options.dtype, shape: tensor.shape.clone() })
        .collect();
    let total: u64 = entries.iter().map(|entry| entry.bytes() as u64).sum();
    folder::check_space(stage, total)?;
    let shards = shards(&entries, options.shard_bytes);
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        write_shard(checkpoint, kind, &stage.join(&name), shard)?;
        weight_map.extend(shard.iter().map(|entry| (entry.key.clone(), name.clone())));
    }
    if shards.len() > 1 {
        let parameters: usize = entries.iter().map(|entry| entry.shape.iter().product::<usize>()).sum();
        let metadata = json!({ "total_parameters": parameters, "total_size": total });
        write_json(&stage.join("model.safetensors.index.json"), &json!({ "metadata": metadata, "weight_map": weight_map }))?;
    }
    let mut config = config.clone();
    let fields = config.as_object_mut().context("config.json must be an object")?;
    // Newer files spell the key `dtype`; whichever is there must not contradict the weights.
    let key = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    fields.insert(key.to_owned(), json!(torch_name(options.dtype)));
    write_json(&stage.join("config.json"), &config)?;
    generation.map_or(Ok(()), |generation| write_json(&stage.join("generation_config.json"), generation))
}

/// Consecutive entries, as many to a file as fit.
fn shards(entries: &[Entry], bytes: u64) -> Vec<&[Entry]> {
    let mut shards = Vec::new();
    let (mut first, mut filled) = (0, 0);
    for (number, entry) in entries.iter().enumerate() {
        let size = entry.bytes() as u64;
        if number > first && filled + size > bytes {
            shards.push(&entries[first..number]);
            (first, filled) = (number, 0);
        }
        filled += size;
    }
    shards.push(&entries[first..]);
    shards
}

fn write_shard(checkpoint: &Checkpoint, kind: Kind, path: &Path, entries: &[Entry]) -> Result<()> {
    let mut writer = Writer::create(path, entries)?;
    let mut buffer = Vec::new();
    for entry in entries {
        for slab in slabs(&entry.key, &entry.shape, SLAB / entry.dtype.bytes())? {
            buffer.resize(slab.flat.end * entry.dtype.bytes(), 0);
            checkpoint.read(kind, &[slab], entry.dtype, &mut buffer)?;
            writer.write(&buffer)?;
        }
    }
    writer.finish()?;
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).with_context(|| format!("writing {}", path.display()))?;
    let mut file = create_file(path)?;
    file.write_all(format!("{text}\n").as_bytes()).and_then(|()| file.sync_all()).with_context(|| format!("writing {}", path.display()))
}

fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::U32 => "uint32",
    }
}
