//! Which layers a family's units become on one rank.

use crate::config::{Family, Model, RopeScaling};
use crate::device::Device;
use crate::device::tensor::Tensor;
use crate::model::attention::Attention;
use crate::model::block::Block;
use crate::model::embedding::{Embedding, Positions};
use crate::model::head::Head;
use crate::model::mlp::{Activation, Mlp};
use crate::model::norm::Norm;
use crate::ops::attention::Heads;
use crate::ops::rope;
use crate::parallel::tensor_parallel::Region;
use crate::plan::catalog::Kind;
use crate::plan::layout::UnitLayout;
use crate::plan::{Plan, RankPlan};

/// The layers of a rank.
pub struct Parts {
    pub embedding: Option<Embedding>,
    pub positions: Option<Positions>,
    pub chunks: Vec<Vec<Block>>,
    pub head: Option<Head>,
}

pub fn parts(plan: &Plan, rank: &RankPlan, region: &Region) -> Parts {
    let mut parts = Parts { embedding: None, positions: None, chunks: Vec::new(), head: None };
    let mut last_norm = None;
    let vocabulary = plan.model.vocab_size;
    for chunk in &rank.chunks {
        let mut blocks = Vec::new();
        for unit in chunk.clone() {
            let layout = &rank.units[unit].1;
            match rank.kind(plan, unit) {
                Kind::Embedding => {
                    let (table, first) = (layout.find("embedding"), rank.share.range(vocabulary).start);
                    parts.embedding = Some(Embedding { unit, table, region: region.clone(), first });
                }
                Kind::Positions => parts.positions = Some(Positions { unit, table: layout.find("positions") }),
                Kind::Block(_) => blocks.push(block(plan, layout, unit, region)),
                Kind::Norm => last_norm = Some((unit, Norm::new(layout, "norm", plan.model.norm_eps))),
                Kind::Head { .. } => {
                    let (norm_unit, norm) = last_norm.take().expect("the last norm comes before the head");
                    parts.head = Some(Head {
                        norm_unit,
                        norm,
                        unit,
                        table: layout.find("head"),
                        region: region.clone(),
                        first: rank.share.range(vocabulary).start,
                        width: rank.share.width(vocabulary),
                    });
                }
            }
        }
        parts.chunks.push(blocks);
    }
    parts
}

/// cos and sin of every position, where the family rotates.
pub fn rope_table(model: &Model, t: usize, device: &Device) -> Option<Tensor> {
    let scaling = match &model.rope_scaling {
        None => rope::Scaling::None,
        Some(RopeScaling { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, .. }) => rope::Scaling::Llama3 {
            factor: *factor,
            low: *low_freq_factor,
            high: *high_freq_factor,
            original: *original_max_position_embeddings,
        },
    };
    (model.family == Family::Llama).then(|| rope::table(device, model.head_dim, model.rope_theta, scaling, t))
}

fn block(plan: &Plan, layout: &UnitLayout, unit: usize, region: &Region) -> Block {
    let model = &plan.model;
    let share = region.share();
    let find = |role: &str| layout.find(role);
    let norm = |role: &str| Norm::new(layout, role, model.norm_eps);
    let heads = Heads { query: share.heads(model.num_heads), kv: share.heads(model.num_kv_heads), dim: model.head_dim };
    let find_all = |roles: [&str; 3]| roles.iter().flat_map(|role| layout.find_all(role)).collect::<Vec<_>>();
    let biased = model.family == Family::Gpt2;
    let attention = Attention {
        norm: norm("attention_norm"),
        qkv: find_all(["q", "k", "v"]),
        qkv_bias: biased.then(|| find_all(["q_bias", "k_bias", "v_bias"])),
        o: find("o"),
        o_bias: biased.then(|| find("o_bias")),
        region: region.clone(),
        heads,
        window: None,
    };
    let (activation, wide) = match model.family {
        Family::Llama => (Activation::SwiGlu, vec![find("gate"), find("up")]),
        Family::Gpt2 => (Activation::Gelu, vec![find("up")]),
    };
    let mlp = Mlp {
        norm: norm("mlp_norm"),
        wide,
        wide_bias: biased.then(|| find("up_bias")),
        activation,
        down: find("down"),
        down_bias: biased.then(|| find("down_bias")),
        region: region.clone(),
    };
    Block { unit, attention, mlp, recompute: plan.recompute }
}
