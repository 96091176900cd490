//! A model's description as Hugging Face's `config.json`, read and written.
//!
//! Read are the Hub's spelling (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`);
//! written is the Hub's, which both load.
//!
//! Invariant: a file that describes another computation than ours is refused by the name of the key that says so; what is written
//! reads back equal.

use super::choice::Choice;
use super::{Family, Model, RopeScaling, RopeType};
use crate::dtype::Dtype;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use std::path::Path;

impl Model {
    /// Reads `config.json` at `path`. All that is wrong with it is in the error, one line each.
    pub fn from_hugging_face(path: &Path) -> Result<Model> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let value: Value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        let Value::Object(keys) = value else { bail!("{} is not a JSON object", path.display()) };
        let mut file = File { keys, problems: Vec::new() };
        let model = match file.text("model_type").as_deref() {
            Some("llama") => llama(&mut file),
            Some("gpt2") => gpt2(&mut file),
            other => {
                let families: Vec<&str> = Family::NAMES.iter().map(|(name, _)| *name).collect();
                bail!("{}: model_type is {other:?}; the families that work are {}", path.display(), families.join(" and "))
            }
        };
        if !file.problems.is_empty() {
            bail!("{}: {}", path.display(), file.problems.join("; "));
        }
        Ok(model)
    }

    /// The content of `config.json` for weights stored as `dtype`.
    pub fn to_hugging_face(&self, dtype: Dtype) -> Value {
        let torch_dtype = match dtype {
            Dtype::Bf16 => "bfloat16",
            Dtype::F16 => "float16",
            Dtype::F32 | Dtype::U32 => "float32",
        };
        // No end-of-document id: that is a fact of the tokenizer, which this file cannot know.
        let mut value = json!({
            "vocab_size": self.vocab_size,
            "initializer_range": self.init_std,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": torch_dtype,
            "use_cache": true,
            "bos_token_id": null,
            "eos_token_id": null,
            "transformers_version": "4.51.0",
        });
        let family = match self.family {
            Family::Llama => self.llama_keys(),
            Family::Gpt2 => self.gpt2_keys(),
        };
        let (Value::Object(all), Value::Object(family)) = (&mut value, family) else { unreachable!("both are written as objects above") };
        all.extend(family);
        value
    }

    fn llama_keys(&self) -> Value {
        let rope_scaling = self.rope_scaling.as_ref().map(|scaling| {
            json!({
                "rope_type": scaling.rope_type.name(),
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            })
        });
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_scaling,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "mlp_bias": false,
            "pretraining_tp": 1,
        })
    }

    fn gpt2_keys(&self) -> Value {
        json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_positions": self.max_position_embeddings,
            "n_ctx": self.max_position_embeddings,
            "layer_norm_epsilon": self.norm_eps,
            "activation_function": "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "scale_attn_weights": true,
            "scale_attn_by_inverse_layer_idx": false,
            "reorder_and_upcast_attn": false,
        })
    }
}

fn llama(file: &mut File) -> Model {
    file.refuse_unless("hidden_act", |value| value == "silu" || value == "swish", "only \"silu\" is built");
    for key in ["attention_bias", "mlp_bias"] {
        file.refuse_unless(key, |value| value == &json!(false), "our llama has no biases");
    }
    file.refuse_unless("attention_dropout", is_zero, "dropout is not built: set it to 0");
    file.refuse_unless("sliding_window", |_| false, "attention over a window is not built");
    file.refuse_unless("quantization_config", |_| false, "quantised weights are not read");
    file.refuse_unless("partial_rotary_factor", |value| value.as_f64() == Some(1.0), "rotary positions turn the whole head");
    file.refuse_unless("layer_types", all_full, "every layer attends to everything before it");
    let hidden_size = file.required("hidden_size");
    let num_heads = file.required("num_attention_heads");
    let (rope_theta, rope_scaling) = rope(file);
    Model {
        family: Family::Llama,
        hidden_size,
        intermediate_size: file.required("intermediate_size"),
        num_layers: file.required("num_hidden_layers"),
        num_heads,
        num_kv_heads: file.whole("num_key_value_heads").unwrap_or(num_heads),
        head_dim: file.whole("head_dim").unwrap_or(hidden_size / num_heads),
        vocab_size: file.required("vocab_size"),
        // What transformers takes where the file is silent.
        max_position_embeddings: file.whole("max_position_embeddings").unwrap_or(2048),
        rope_theta,
        rope_scaling,
        norm_eps: file.number("rms_norm_eps").unwrap_or(1e-6),
        tie_word_embeddings: file.flag("tie_word_embeddings").unwrap_or(false),
        init_std: file.number("initializer_range").unwrap_or(0.02),
        init: None,
    }
}

fn gpt2(file: &mut File) -> Model {
    let tanh = |value: &Value| value == "gelu_new" || value == "gelu_pytorch_tanh";
    file.refuse_unless("activation_function", tanh, "only \"gelu_new\" (the tanh form) is built");
    for key in ["attn_pdrop", "embd_pdrop", "resid_pdrop"] {
        file.refuse_unless(key, is_zero, "dropout is not built: set it to 0");
    }
    file.refuse_unless("scale_attn_weights", |value| value == &json!(true), "scores are always scaled");
    file.refuse_unless("scale_attn_by_inverse_layer_idx", |value| value == &json!(false), "scores are scaled alike in every layer");
    file.refuse_unless("add_cross_attention", |value| value == &json!(false), "there is no encoder to attend to");
    let hidden_size = file.required("n_embd");
    let num_heads = file.required("n_head");
    Model {
        family: Family::Gpt2,
        hidden_size,
        intermediate_size: file.whole("n_inner").unwrap_or(4 * hidden_size),
        num_layers: file.required("n_layer"),
        num_heads,
        num_kv_heads: num_heads,
        head_dim: hidden_size / num_heads,
        vocab_size: file.required("vocab_size"),
        max_position_embeddings: file.required("n_positions"),
        rope_theta: 0.0,
        rope_scaling: None,
        norm_eps: file.number("layer_norm_epsilon").unwrap_or(1e-5),
        tie_word_embeddings: file.flag("tie_word_embeddings").unwrap_or(true),
        init_std: file.number("initializer_range").unwrap_or(0.02),
        init: None,
    }
}

/// (theta, scaling), from `rope_parameters` or from `rope_theta` and `rope_scaling`.
fn rope(file: &mut File) -> (f64, Option<RopeScaling>) {
    let key = if file.given("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
    let outer_theta = file.number("rope_theta");
    let Some(Value::Object(keys)) = file.given(key).cloned() else { return (outer_theta.unwrap_or(10000.0), None) };
    let mut inner = File { keys, problems: Vec::new() };
    let theta = inner.number("rope_theta").or(outer_theta).unwrap_or(10000.0);
    // Old files say `type` where newer ones say `rope_type`.
    let kind = inner.text("rope_type").or_else(|| inner.text("type"));
    let scaling = match kind.as_deref() {
        None | Some("default") => None,
        Some("llama3") => Some(RopeScaling {
            rope_type: RopeType::Llama3,
            factor: inner.required_number("factor"),
            low_freq_factor: inner.required_number("low_freq_factor"),
            high_freq_factor: inner.required_number("high_freq_factor"),
            original_max_position_embeddings: inner.required("original_max_position_embeddings"),
        }),
        Some(other) => {
            inner.problems.push(format!("rope_type is \"{other}\": only \"default\" and \"llama3\" are built"));
            None
        }
    };
    file.problems.extend(inner.problems.into_iter().map(|problem| format!("{key}: {problem}")));
    (theta, scaling)
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn all_full(value: &Value) -> bool {
    value.as_array().is_some_and(|layers| layers.iter().all(|layer| layer == "full_attention"))
}

/// The keys of a `config.json`, and what is wrong with them. A key that is null is a key that is not given.
struct File {
    keys: Map<String, Value>,
    problems: Vec<String>,
}

impl File {
    fn given(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn refuse_unless(&mut self, key: &str, works: impl Fn(&Value) -> bool, why: &str) {
        if let Some(value) = self.given(key).filter(|value| !works(value)) {
            let problem = format!("{key} is {value}: {why}");
            self.problems.push(problem);
        }
    }

    fn typed<T>(&mut self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let value = self.given(key)?;
        let read = read(value);
        if read.is_none() {
            let problem = format!("{key} is {value}, not {expected}");
            self.problems.push(problem);
        }
        read
    }

    fn whole(&mut self, key: &str) -> Option<usize> {
        self.typed(key, "a whole number from 1 to 2097152", |value| {
            value.as_u64().filter(|value| (1..=1 << 21).contains(value)).map(|value| value as usize)
        })
    }

    fn number(&mut self, key: &str) -> Option<f64> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn flag(&mut self, key: &str) -> Option<bool> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn text(&mut self, key: &str) -> Option<String> {
        self.typed(key, "text", |value| value.as_str().map(str::to_string))
    }

    /// 1 stands for a value that is missing: the file is refused afterwards, and 1 divides without harm.
    fn required(&mut self, key: &str) -> usize {
        self.miss(key);
        self.whole(key).unwrap_or(1)
    }

    fn required_number(&mut self, key: &str) -> f64 {
        self.miss(key);
        self.number(key).unwrap_or(1.0)
    }

    fn miss(&mut self, key: &str) {
        if self.given(key).is_none() {
            self.problems.push(format!("{key} is missing"));
        }
    }
}
