//! Reads `[model]`: its keys, or those of a Hugging Face `config.json` with the keys given beside it on top.
//!
//! Invariant: what comes out is a model that exists: the widths of its heads fit, and its family has each key that was given.

use super::check::{divisors_near, multiples_near};
use super::reader::{DIM, Reader};
use super::{Family, Model, RopeScaling};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Families with a name in the interface that are not built yet.
const NOT_BUILT: [&str; 4] = ["mistral", "qwen2", "qwen3", "olmo2"];

/// The byte tokenizer's ids: 256 bytes and the end of a document.
const BYTE_IDS: usize = 257;

/// `None` where a required key is missing or wrong. `seq_len` is that of `[train]`, where it is known.
pub fn read(mut r: Reader, seq_len: Option<usize>, tokenizer: &str) -> Option<Model> {
    let init = r.text("init").map(PathBuf::from);
    let base = base(&mut r, init.as_deref());
    let from = |pick: fn(&Model) -> usize| base.as_ref().map(pick);
    let family = family(&mut r).or(base.as_ref().map(|base| base.family));
    let family = r.required("family", family, "\"llama\"");
    let hidden_size = r.whole("hidden_size", DIM).or(from(|base| base.hidden_size));
    let hidden_size = r.required("hidden_size", hidden_size, "384");
    let intermediate_size = r.whole("intermediate_size", DIM).or(from(|base| base.intermediate_size));
    let intermediate_size = match family {
        Some(Family::Gpt2) => intermediate_size.or(hidden_size.map(|hidden| 4 * hidden)),
        _ => r.required("intermediate_size", intermediate_size, "1024"),
    };
    let num_layers = r.whole("num_layers", 1..=1 << 14).or(from(|base| base.num_layers));
    let num_layers = r.required("num_layers", num_layers, "6");
    let num_heads = r.whole("num_heads", DIM).or(from(|base| base.num_heads));
    let num_heads = r.required("num_heads", num_heads, "6");
    let num_kv_heads = r.whole("num_kv_heads", DIM).or(from(|base| base.num_kv_heads)).or(num_heads);
    let head_dim = r.whole("head_dim", DIM).or(from(|base| base.head_dim));
    let head_dim = head_dim.or_else(|| split(&mut r, hidden_size?, num_heads?));
    let vocab_size = r.whole("vocab_size", 1..=1 << 31).or(from(|base| base.vocab_size));
    let vocab_size = match vocab_size {
        None if !r.has("vocab_size") => ids_of(&mut r, tokenizer),
        given => given,
    };
    let max_position_embeddings = r.whole("max_position_embeddings", 1..=1 << 31).or(from(|base| base.max_position_embeddings));
    let max_position_embeddings = max_position_embeddings.or(seq_len);
    let above_zero: fn(f64) -> bool = |x| x > 0.0;
    let rope_theta = r.number("rope_theta", |x| x >= 1.0, "of 1 or more").or(base.as_ref().map(|base| base.rope_theta));
    let rope_scaling = rope_scaling(&mut r).or(base.as_ref().and_then(|base| base.rope_scaling.clone()));
    let norm_eps = r.number("norm_eps", above_zero, "above 0").or(base.as_ref().map(|base| base.norm_eps));
    let tie = r.flag("tie_word_embeddings").or(base.as_ref().map(|base| base.tie_word_embeddings));
    let init_std = r.number("init_std", above_zero, "above 0").or(base.as_ref().map(|base| base.init_std));
    if family == Some(Family::Gpt2) {
        for key in ["rope_theta", "rope_scaling"].into_iter().filter(|key| r.has(key)).collect::<Vec<_>>() {
            r.problem(key, format!("`model.{key}` is not for gpt2, whose positions are learned"), "leave it out");
        }
    }
    r.finish();
    let model = Model {
        family: family?,
        hidden_size: hidden_size?,
        intermediate_size: intermediate_size?,
        num_layers: num_layers?,
        num_heads: num_heads?,
        num_kv_heads: num_kv_heads?,
        head_dim: head_dim?,
        vocab_size: vocab_size?,
        max_position_embeddings: max_position_embeddings?,
        rope_theta: if family? == Family::Gpt2 { 0.0 } else { rope_theta.filter(|theta| *theta > 0.0).unwrap_or(10000.0) },
        rope_scaling: rope_scaling.filter(|_| family != Some(Family::Gpt2)),
        norm_eps: norm_eps.unwrap_or(1e-5),
        tie_word_embeddings: tie.unwrap_or(family? == Family::Gpt2),
        init_std: init_std.unwrap_or(0.02),
        init,
    };
    heads(&mut r, &model);
    Some(model)
}

/// What `config` or `init` say of the model.
fn base(r: &mut Reader, init: Option<&Path>) -> Option<Model> {
    let config = r.text("config").map(PathBuf::from);
    let (key, path) = match (config, init) {
        (Some(path), _) => ("config", path),
        (None, Some(folder)) => {
            let path = folder.join("config.json");
            // A configuration that says all by itself needs the folder for its weights only.
            if r.has("family") && !path.exists() {
                return None;
            }
            ("init", path)
        }
        (None, None) => return None,
    };
    match Model::from_hugging_face(&path) {
        Ok(model) => Some(model),
        Err(error) => {
            let path = r.path_of(key);
            r.problem(key, format!("`{path}` cannot be used: {error:#}"), "it is a Hugging Face model of the family llama or gpt2");
            r.excuse_missing();
            None
        }
    }
}

fn family(r: &mut Reader) -> Option<Family> {
    if let Some(name) = r.take("family").and_then(|name| NOT_BUILT.into_iter().find(|other| name.as_str() == Some(other))) {
        let message = format!("`model.family` = \"{name}\" is not built yet");
        r.problem("family", message, "the families that work are llama and gpt2");
        return None;
    }
    r.choice("family")
}

/// The default of `head_dim`.
fn split(r: &mut Reader, hidden_size: usize, num_heads: usize) -> Option<usize> {
    if hidden_size.is_multiple_of(num_heads) {
        return Some(hidden_size / num_heads);
    }
    let message = format!("`model.hidden_size` = {hidden_size} does not divide into `model.num_heads` = {num_heads}");
    let help = format!(
        "num_heads {}, or hidden_size {}, or give head_dim",
        divisors_near(hidden_size as u64, num_heads as u64),
        multiples_near(num_heads as u64, hidden_size as u64)
    );
    r.problem("hidden_size", message, help);
    Some((hidden_size / num_heads).max(1))
}

/// The number of ids of a tokenizer.
fn ids_of(r: &mut Reader, tokenizer: &str) -> Option<usize> {
    if tokenizer == "bytes" {
        return Some(BYTE_IDS);
    }
    match largest_id(Path::new(tokenizer)) {
        Ok(largest) => Some(largest + 1),
        Err(error) => {
            let message = format!("`model.vocab_size` is not given, and `data.tokenizer` = \"{tokenizer}\" cannot tell it: {error:#}");
            r.problem("vocab_size", message, "give model.vocab_size, or the path of a tokenizer.json");
            None
        }
    }
}

/// The largest id in a `tokenizer.json`.
fn largest_id(path: &Path) -> Result<usize> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let json: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    let words = json["model"]["vocab"].as_object().into_iter().flat_map(|vocab| vocab.values());
    let added = json["added_tokens"].as_array().into_iter().flatten().map(|token| &token["id"]);
    let largest = words.chain(added).filter_map(serde_json::Value::as_u64).max();
    largest.map(|id| id as usize).with_context(|| format!("{} has no vocabulary", path.display()))
}

fn rope_scaling(r: &mut Reader) -> Option<RopeScaling> {
    let mut r = r.subsection("rope_scaling")?;
    let rope_type = r.choice("rope_type");
    let rope_type = r.required("rope_type", rope_type, "\"llama3\"");
    let factor = r.number("factor", |x| x >= 1.0, "of 1 or more");
    let factor = r.required("factor", factor, "8.0");
    let low = r.number("low_freq_factor", |x| x > 0.0, "above 0");
    let low = r.required("low_freq_factor", low, "1.0");
    let high = r.number("high_freq_factor", |x| x > 0.0, "above 0");
    let high = r.required("high_freq_factor", high, "4.0");
    let original = r.whole("original_max_position_embeddings", 1..=1 << 31);
    let original = r.required("original_max_position_embeddings", original, "8192");
    r.finish();
    let scaling = RopeScaling {
        rope_type: rope_type?,
        factor: factor?,
        low_freq_factor: low?,
        high_freq_factor: high?,
        original_max_position_embeddings: original?,
    };
    if scaling.high_freq_factor <= scaling.low_freq_factor {
        let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
        let message = format!("`model.rope_scaling.high_freq_factor` = {high} is not above `model.rope_scaling.low_freq_factor` = {low}");
        r.problem("high_freq_factor", message, "Llama 3 has 1.0 and 4.0");
    }
    Some(scaling)
}

/// What the family asks of the widths of its heads.
fn heads(r: &mut Reader, model: &Model) {
    let Model { hidden_size, num_heads, num_kv_heads, head_dim, .. } = *model;
    if !num_heads.is_multiple_of(num_kv_heads) {
        let message = format!("`model.num_heads` = {num_heads} does not divide into `model.num_kv_heads` = {num_kv_heads} groups");
        let help = format!(
            "num_kv_heads {}, or num_heads {}",
            divisors_near(num_heads as u64, num_kv_heads as u64),
            multiples_near(num_kv_heads as u64, num_heads as u64)
        );
        r.problem("num_kv_heads", message, help);
    }
    match model.family {
        Family::Llama if head_dim % 2 == 1 && r.clean("hidden_size") => {
            let message = format!("`model.head_dim` = {head_dim} is odd: rotary positions turn pairs");
            r.problem("head_dim", message, format!("head_dim {} or {}", head_dim - 1, head_dim + 1));
        }
        Family::Gpt2 if num_kv_heads != num_heads => {
            let message =
                format!("`model.num_kv_heads` = {num_kv_heads} is not `model.num_heads` = {num_heads}: gpt2 has no grouped heads");
            r.problem("num_kv_heads", message, "leave num_kv_heads out");
        }
        Family::Gpt2 if head_dim * num_heads != hidden_size && r.clean("hidden_size") => {
            let message =
                format!("`model.head_dim` = {head_dim} times `model.num_heads` = {num_heads} is not `model.hidden_size` = {hidden_size}");
            r.problem("head_dim", message, "leave head_dim out");
        }
        _ => {}
    }
}
