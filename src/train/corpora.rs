//! The data of a run, as its configuration names it.

use crate::config::{Config, DataOrder, DataSource};
use crate::data::files;
use crate::data::loader::{Loader, LoaderSpec};
use crate::data::sampler::Order;
use crate::data::sources::{self, Source};
use crate::data::tokenizer::Tokenizer;
use crate::train::evaluate::Validation;
use crate::train::step::Trainer;
use anyhow::{Context, Result};
use std::path::Path;

/// Sources that name no file: (key, what is wrong).
pub fn missing(config: &Config) -> Vec<(String, String)> {
    let mut missing = Vec::new();
    let validation: &[DataSource] = if config.eval.interval == 0 { &[] } else { &config.data.validation };
    for (key, sources) in [("data.sources", config.data.sources.as_slice()), ("data.validation", validation)] {
        for (index, source) in sources.iter().enumerate() {
            if let Err(error) = files::expand(Path::new(&source.path)) {
                missing.push((format!("{key}.{index}"), format!("{error:#}")));
            }
        }
    }
    missing
}

pub fn training(config: &Config, trainer: &Trainer) -> Result<Loader> {
    let order = match config.data.order {
        DataOrder::Shuffled => Order::Shuffled,
        DataOrder::Sequential => Order::Sequential,
    };
    loader(config, trainer, &config.data.sources, order)
}

/// None where nothing is to be measured.
pub fn validation(config: &Config, trainer: &Trainer) -> Result<Option<Validation>> {
    if config.eval.interval == 0 || config.data.validation.is_empty() {
        return Ok(None);
    }
    let loader = loader(config, trainer, &config.data.validation, Order::Sequential).context("data.validation")?;
    let windows = loader.sampler().samples_before_repeat();
    Ok(Some(Validation { loader, windows, steps: config.eval.steps }))
}

fn loader(config: &Config, trainer: &Trainer, sources: &[DataSource], order: Order) -> Result<Loader> {
    let tokenizer = Tokenizer::from_name(&config.data.tokenizer)?;
    let sources: Vec<Source> =
        sources.iter().map(|source| Source { path: source.path.clone().into(), weight: source.weight, dtype: None }).collect();
    Loader::new(LoaderSpec {
        sources: sources::open(&sources, &tokenizer, &config.data.cache, config.model.vocab_size)?,
        order,
        seed: config.run.seed,
        seq_len: config.train.seq_len,
        global_batch: config.train.global_batch_size,
        rows: trainer.rank.rows.clone(),
        document_mask: if config.data.document_mask { tokenizer.end_of_text() } else { None },
    })
}
