//! Every parameter of a model: its public name, its dims, how tensor parallelism cuts it, how it starts and whether it decays.
//!
//! A new model family is a new function here and its blocks in `model/`. Dims are ours (`[out, in]` for every matrix); the public
//! tensor may be transposed (GPT-2's Conv1D) or hold several of our entries (GPT-2's `c_attn`).
//!
//! Invariant: the entries of a public tensor tile it.

use crate::config::{Family, Model};

/// How tensor parallelism cuts a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Every rank holds all of it.
    Whole,
    /// By rows: column-parallel, or the rows of a vocabulary.
    Rows,
    /// By columns: row-parallel.
    Columns,
    /// By rows that are this many heads. Where virtual shards are more than heads, neighbouring shards share a head: each computes
    /// with its own copy of the rows, and the gradient of the head is the sum of its copies'.
    Heads(usize),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Start {
    /// Normal with this standard deviation.
    Normal(f64),
    One,
    Zero,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// What the parameter is to its block: `gate`, `norm`. Unique within a unit.
    pub role: &'static str,
    /// The public tensor that holds it, as Hugging Face names it.
    pub name: String,
    pub public_shape: Vec<usize>,
    /// Where this entry begins in the public tensor.
    pub public_start: Vec<usize>,
    /// The public tensor is `[in, out]`.
    pub transposed: bool,
    /// Our dims: `[out, in]`, or `[length]`.
    pub dims: Vec<usize>,
    pub cut: Cut,
    pub start: Start,
    pub decay: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Embedding,
    /// Learned positions (GPT-2).
    Positions,
    Block(usize),
    /// The last norm.
    Norm,
    /// The matrix that makes logits. Tied: its values are the embedding's, its gradients are its own until they are reduced.
    Head {
        tied: bool,
    },
}

/// What is gathered, reduced and updated together.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    pub kind: Kind,
    pub entries: Vec<Entry>,
}

impl Unit {
    /// Numbers in all its entries.
    pub fn parameters(&self) -> u64 {
        self.entries.iter().map(|entry| entry.dims.iter().product::<usize>() as u64).sum()
    }
}

/// The units of a model, in the order in which a batch meets them. `no_decay`: patterns of public names that do not decay.
pub fn units(model: &Model, no_decay: &[String]) -> Vec<Unit> {
    let mut units = match model.family {
        Family::Llama => llama(model),
        Family::Gpt2 => gpt2(model),
    };
    for entry in units.iter_mut().flat_map(|unit| &mut unit.entries) {
        if no_decay.iter().any(|pattern| matches(pattern, &entry.name)) {
            entry.decay = false;
        }
    }
    units
}

/// Parameters of the model, a tied one counted once.
pub fn parameters(units: &[Unit]) -> u64 {
    units.iter().filter(|unit| unit.kind != Kind::Head { tied: true }).map(Unit::parameters).sum()
}

/// Whether `name` matches `pattern`, in which `*` stands for any run of characters.
pub fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => match name.strip_prefix(head) {
            None => false,
            Some(tail) => (0..=tail.len()).filter(|&i| tail.is_char_boundary(i)).any(|i| matches(rest, &tail[i..])),
        },
    }
}

fn llama(model: &Model) -> Vec<Unit> {
    let (c, f, v) = (model.hidden_size, model.intermediate_size, model.vocab_size);
    let (q, kv) = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim);
    let normal = Start::Normal(model.init_std);
    let matrix = |role, name: String, dims: [usize; 2], cut| Entry {
        role,
        name,
        public_shape: dims.to_vec(),
        public_start: vec![0, 0],
        transposed: false,
        dims: dims.to_vec(),
        cut,
        start: normal,
        decay: true,
    };
    let block = |i: usize| {
        let at = |name: &str| format!("model.layers.{i}.{name}.weight");
        Unit {
            kind: Kind::Block(i),
            entries: vec![
                vector("attention_norm", at("input_layernorm"), c, Cut::Whole, Start::One),
                matrix("q", at("self_attn.q_proj"), [q, c], Cut::Rows),
                matrix("k", at("self_attn.k_proj"), [kv, c], Cut::Heads(model.num_kv_heads)),
                matrix("v", at("self_attn.v_proj"), [kv, c], Cut::Heads(model.num_kv_heads)),
                matrix("o", at("self_attn.o_proj"), [c, q], Cut::Columns),
                vector("mlp_norm", at("post_attention_layernorm"), c, Cut::Whole, Start::One),
                matrix("gate", at("mlp.gate_proj"), [f, c], Cut::Rows),
                matrix("up", at("mlp.up_proj"), [f, c], Cut::Rows),
                matrix("down", at("mlp.down_proj"), [c, f], Cut::Columns),
            ],
        }
    };
    let tied = model.tie_word_embeddings;
    let embedding = "model.embed_tokens.weight".to_string();
    let head = if tied { embedding.clone() } else { "lm_head.weight".to_string() };
    let mut units = vec![Unit { kind: Kind::Embedding, entries: vec![matrix("embedding", embedding, [v, c], Cut::Rows)] }];
    units.extend((0..model.num_layers).map(block));
    let norm = vector("norm", "model.norm.weight".to_string(), c, Cut::Whole, Start::One);
    units.push(Unit { kind: Kind::Norm, entries: vec![norm] });
    units.push(Unit { kind: Kind::Head { tied }, entries: vec![matrix("head", head, [v, c], Cut::Rows)] });
    units
}

fn gpt2(model: &Model) -> Vec<Unit> {
    let (c, v) = (model.hidden_size, model.vocab_size);
    let table = |role, name: &str, rows, cut| Entry {
        role,
        name: name.to_string(),
        public_shape: vec![rows, c],
        public_start: vec![0, 0],
        transposed: false,
        dims: vec![rows, c],
        cut,
        start: Start::Normal(model.init_std),
        decay: true,
    };
    let mut units = vec![
        Unit { kind: Kind::Embedding, entries: vec![table("embedding", "transformer.wte.weight", v, Cut::Rows)] },
        Unit {
            kind: Kind::Positions,
            entries: vec![table("positions", "transformer.wpe.weight", model.max_position_embeddings, Cut::Whole)],
        },
    ];
    units.extend((0..model.num_layers).map(|layer| gpt2_block(model, layer)));
    let norm = vec![
        vector("norm", "transformer.ln_f.weight".to_string(), c, Cut::Whole, Start::One),
        vector("norm_bias", "transformer.ln_f.bias".to_string(), c, Cut::Whole, Start::Zero),
    ];
    units.push(Unit { kind: Kind::Norm, entries: norm });
    let tied = model.tie_word_embeddings;
    let head = if tied { "transformer.wte.weight" } else { "lm_head.weight" };
    units.push(Unit { kind: Kind::Head { tied }, entries: vec![table("head", head, v, Cut::Rows)] });
    units
}

fn gpt2_block(model: &Model, layer: usize) -> Unit {
    let (c, f) = (model.hidden_size, model.intermediate_size);
    let normal = Start::Normal(model.init_std);
    // Radford et al. 2019: what is added to the residual stream starts smaller, by the number of such additions.
    let residual = Start::Normal(model.init_std / (2.0 * model.num_layers as f64).sqrt());
    let at = |name: &str| format!("transformer.h.{layer}.{name}");
    // `part` of `parts` equal column ranges of a public [in, parts * out] tensor.
    let conv = |role, name: &str, [out, inner]: [usize; 2], part: usize, parts: usize, cut, start| Entry {
        role,
        name: at(name) + ".weight",
        public_shape: vec![inner, parts * out],
        public_start: vec![0, part * out],
        transposed: true,
        dims: vec![out, inner],
        cut,
        start,
        decay: true,
    };
    let bias = |role, name: &str, length, part: usize, parts: usize, cut| Entry {
        public_shape: vec![parts * length],
        public_start: vec![part * length],
        ..vector(role, at(name) + ".bias", length, cut, Start::Zero)
    };
    Unit {
        kind: Kind::Block(layer),
        entries: vec![
            conv("q", "attn.c_attn", [c, c], 0, 3, Cut::Rows, normal),
            conv("k", "attn.c_attn", [c, c], 1, 3, Cut::Rows, normal),
            conv("v", "attn.c_attn", [c, c], 2, 3, Cut::Rows, normal),
            conv("o", "attn.c_proj", [c, c], 0, 1, Cut::Columns, residual),
            conv("up", "mlp.c_fc", [f, c], 0, 1, Cut::Rows, normal),
            conv("down", "mlp.c_proj", [c, f], 0, 1, Cut::Columns, residual),
            vector("attention_norm", at("ln_1.weight"), c, Cut::Whole, Start::One),
            vector("attention_norm_bias", at("ln_1.bias"), c, Cut::Whole, Start::Zero),
            bias("q_bias", "attn.c_attn", c, 0, 3, Cut::Rows),
            bias("k_bias", "attn.c_attn", c, 1, 3, Cut::Rows),
            bias("v_bias", "attn.c_attn", c, 2, 3, Cut::Rows),
            bias("o_bias", "attn.c_proj", c, 0, 1, Cut::Whole),
            vector("mlp_norm", at("ln_2.weight"), c, Cut::Whole, Start::One),
            vector("mlp_norm_bias", at("ln_2.bias"), c, Cut::Whole, Start::Zero),
            bias("up_bias", "mlp.c_fc", f, 0, 1, Cut::Rows),
            bias("down_bias", "mlp.c_proj", c, 0, 1, Cut::Whole),
        ],
    }
}

fn vector(role: &'static str, name: String, length: usize, cut: Cut, start: Start) -> Entry {
    let (public_shape, public_start, dims) = (vec![length], vec![0], vec![length]);
    Entry { role, name, public_shape, public_start, transposed: false, dims, cut, start, decay: false }
}
