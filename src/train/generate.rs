//! Sampling text from a trained model.
//!
//! Plain: every new token runs the whole window through the model again. A window longer than the model was built for slides.

use crate::checkpoint::load::{self, Checkpoint};
use crate::comm::groups::Groups;
use crate::config::{Config, Model};
use crate::data::loader::Batch;
use crate::data::tokenizer::Tokenizer;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::plan::Plan;
use crate::rng::Stream;
use crate::train::resume;
use crate::train::step::Trainer;
use anyhow::{Context, Result, anyhow, bail};
use std::path::Path;

#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0: always the likeliest token.
    pub temperature: f64,
    /// Only the likeliest so many; 0: all.
    pub top_k: usize,
    pub seed: u64,
}

/// A model that can be asked for text.
pub struct Speaker {
    trainer: Trainer,
    tokenizer: Tokenizer,
    device: Device,
}

impl Speaker {
    /// From a checkpoint, a run's folder (its newest sound checkpoint), or a Hugging Face folder.
    pub fn open(from: &Path) -> Result<Speaker> {
        if from.join("config.json").is_file() {
            return Speaker::from_hugging_face(from);
        }
        let checkpoint = if from.join("checkpoints").is_dir() {
            let (checkpoint, _) = load::newest_verified(&from.join("checkpoints"))?
                .with_context(|| format!("{}: the run has no checkpoint yet", from.display()))?;
            checkpoint
        } else {
            Checkpoint::open(from).context("expected a checkpoint's folder, a run's folder, or one with a config.json")?
        };
        let config =
            Config::parse("the checkpoint's configuration", &checkpoint.index.facts.config, &[]).map_err(|p| anyhow!(p.render(false)))?.0;
        let mut speaker = Speaker::new(&config)?;
        resume::load_weights(&mut speaker.trainer, &checkpoint)?;
        Ok(speaker)
    }

    fn from_hugging_face(folder: &Path) -> Result<Speaker> {
        let file = folder.join("config.json");
        let t = Model::from_hugging_face(&file)?.max_position_embeddings.min(2048);
        let quote = |path: &Path| toml::Value::String(path.display().to_string());
        let (model, init) = (quote(&file), quote(folder));
        let text = format!(
            "[train]\nsteps = 1\nseq_len = {t}\nglobal_batch_size = 1\ndtype = \"f32\"\n[model]\nconfig = {model}\ninit = {init}\n"
        );
        let config = Config::parse("the folder's configuration", &text, &[]).map_err(|p| anyhow!(p.render(false)))?.0;
        let mut speaker = Speaker::new(&config)?;
        resume::start(&mut speaker.trainer, &config)?;
        Ok(speaker)
    }

    /// One rank, f32 weights, nothing of training but the forward pass.
    fn new(config: &Config) -> Result<Speaker> {
        let mut config = config.clone();
        (config.train.dtype, config.optimizer.stochastic_rounding) = (Dtype::F32, false);
        (config.train.global_batch_size, config.train.micro_batch_size) = (1, 1);
        let parallel = &mut config.parallel;
        (parallel.tp, parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.pp_chunks) = (1, 1, 1, -1, 1);
        parallel.pp_schedule = "1f1b".to_string();
        (config.geometry.shards, config.geometry.lanes) = (1, 1);
        let plan = Plan::new(&config, 1, None).map_err(|problems| anyhow!("{problems:?}"))?;
        let device = Device::cpu(std::thread::available_parallelism().map_or(1, usize::from));
        let tokenizer = Tokenizer::from_name(&config.data.tokenizer)?;
        Ok(Speaker { trainer: Trainer::new(&config, plan, 0, &device, Groups::solo())?, tokenizer, device })
    }

    /// Continues `prompt` by up to `count` tokens, whose bytes are given to `show` one after the other; ends early at an end of text.
    pub fn speak(&mut self, prompt: &[u8], count: usize, sampling: Sampling, show: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        speak(&mut self.trainer, &self.tokenizer, prompt, count, sampling, show)?;
        self.device.memory().trim();
        Ok(())
    }
}

/// Whether this rank alone can say what the model says: all of it is here, and no weights are gathered to be read.
pub fn is_whole(plan: &Plan) -> bool {
    let mesh = &plan.mesh;
    mesh.tp == 1 && mesh.pp == 1 && plan.schedule.placement.chunks == 1 && (plan.zero < 3 || mesh.shard == 1)
}

/// Continues `prompt` by a model that `is_whole`, as `Speaker::speak` does.
pub fn speak(
    trainer: &mut Trainer,
    tokenizer: &Tokenizer,
    prompt: &[u8],
    count: usize,
    sampling: Sampling,
    show: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut tokens = Vec::new();
    tokenizer.encode(prompt, &mut tokens);
    if tokens.is_empty() {
        bail!("the prompt is empty: give the model something to continue");
    }
    let stream = Stream::new(sampling.seed, "generate");
    for index in 0..count {
        let window = &tokens[tokens.len().saturating_sub(trainer.plan.t)..];
        let logits = trainer.stage.logits(&one_row(window))?;
        let vocabulary = logits.len() / window.len();
        let token = sample(&logits[logits.len() - vocabulary..], sampling, stream.uniform(index as u64));
        if Some(token) == tokenizer.end_of_text() {
            break;
        }
        tokens.push(token);
        show(&tokenizer.decode(&[token]))?;
    }
    Ok(())
}

fn one_row(tokens: &[u32]) -> Batch {
    let t = tokens.len();
    Batch {
        rows: vec![0],
        seq_len: t,
        inputs: tokens.to_vec(),
        targets: vec![0; t],
        positions: (0..t as u32).collect(),
        starts: vec![0; t],
    }
}

/// The token at which the cumulated probability passes `uniform`.
fn sample(logits: &[f32], sampling: Sampling, uniform: f64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if sampling.temperature <= 0.0 {
        return order[0] as u32;
    }
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let highest = logits[order[0]] as f64;
    let weights: Vec<f64> = order.iter().map(|&i| ((logits[i] as f64 - highest) / sampling.temperature).exp()).collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    for (&token, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    order[order.len() - 1] as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_follow_the_probabilities() {
        let logits = [0.0, f32::ln(3.0), f32::NEG_INFINITY];
        let plain = Sampling { temperature: 1.0, top_k: 0, seed: 0 };
        let ones = (0..1000).filter(|i| sample(&logits, plain, *i as f64 / 1000.0) == 1).count();
        assert!(ones.abs_diff(750) <= 1, "{ones} of 1000 with probability 3/4");
        assert_eq!(sample(&logits, Sampling { top_k: 1, ..plain }, 0.999), 1);
        assert_eq!(sample(&logits, Sampling { temperature: 0.0, ..plain }, 0.0), 1);
    }
}
