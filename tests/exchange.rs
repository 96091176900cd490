//! Checkpoints to and from the Hugging Face format, and what is said of them.

#[path = "support/checkpoints.rs"]
mod checkpoints;

use checkpoints::{KINDS, Scratch, check, facts, flat, save, save_well, simple_cut, value, writers};
use ferrotron::checkpoint::diff::diff;
use ferrotron::checkpoint::export::{Options, export};
use ferrotron::checkpoint::import::{HuggingFace, import};
use ferrotron::checkpoint::index::Kind;
use ferrotron::checkpoint::inspect::inspect;
use ferrotron::checkpoint::load::{Checkpoint, by_step, newest_verified};
use ferrotron::checkpoint::safetensors::{Entry, Writer};
use ferrotron::dtype::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

fn saved(scratch: &Scratch) -> Checkpoint {
    save_well(&mut writers(&scratch.0, 2, |_| ()), &simple_cut(2), 3);
    let checkpoint = by_step(&scratch.0, 3).expect("a checkpoint");
    check(&checkpoint, &simple_cut(1), 3);
    checkpoint
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON")
}

#[test]
fn what_is_exported_comes_back() {
    let scratch = Scratch::new("export");
    let checkpoint = saved(&scratch);
    let out = scratch.0.join("deep/hf");
    let config = json!({ "model_type": "gpt2", "torch_dtype": "float16" });
    export(&checkpoint, &out, &config, Some(&json!({ "eos_token_id": 1 })), Options::new(Dtype::F32)).expect("an export");
    assert_eq!(read_json(&out.join("config.json")), json!({ "model_type": "gpt2", "torch_dtype": "float32" }));
    assert_eq!(read_json(&out.join("generation_config.json"))["eos_token_id"], 1);
    let folder = HuggingFace::open(&out).expect("a sound folder");
    for (pieces, elements) in simple_cut(3) {
        let mut bytes = checkpoints::encode(&vec![-999.0; elements], Dtype::Bf16);
        folder.read(&pieces, Dtype::Bf16, &mut bytes).expect("it is there");
        assert!(bytes == flat(Kind::Master, 3, Dtype::Bf16, &pieces, elements), "the master weights, in public orientation");
    }
    let single = HuggingFace::open(&out.join("model.safetensors")).expect("the file alone");
    assert_eq!(single.names().collect::<Vec<_>>(), ["h.0.c_attn.weight", "model.up.weight", "norm.weight"]);
    assert!(diff(checkpoint.folder(), &out).expect("comparable").equal);
    let again = export(&checkpoint, &out, &config, None, Options::new(Dtype::F32)).expect_err("it is there").to_string();
    assert!(again.contains("not an empty folder"), "{again}");

    let step = scratch.0.join("imported/step-00000000");
    import(&out, &step, facts(0)).expect("an import");
    let (imported, skipped) = newest_verified(&scratch.0.join("imported")).expect("sound").expect("there");
    assert!(skipped.is_empty() && imported.has(Kind::Weights) && !imported.has(Kind::Master));
    assert!(diff(&step, &out).expect("comparable").equal);
}

#[test]
fn large_models_are_cut_into_files() {
    let scratch = Scratch::new("shards");
    let checkpoint = saved(&scratch);
    let out = scratch.0.join("hf");
    let options = Options { dtype: Dtype::Bf16, shard_bytes: 150 };
    export(&checkpoint, &out, &json!({ "dtype": "float32" }), None, options).expect("an export");
    assert_eq!(read_json(&out.join("config.json")), json!({ "dtype": "bfloat16" }));
    let index = read_json(&out.join("model.safetensors.index.json"));
    assert_eq!(index["metadata"], json!({ "total_parameters": 139, "total_size": 278 }));
    let map = json!({
        "h.0.c_attn.weight": "model-00001-of-00003.safetensors",
        "model.up.weight": "model-00002-of-00003.safetensors",
        "norm.weight": "model-00003-of-00003.safetensors",
    });
    assert!(index["weight_map"] == map || index["weight_map"]["norm.weight"] == "model-00002-of-00002.safetensors", "{index}");
    let compared = diff(checkpoint.folder(), &out).expect("comparable");
    assert!(compared.equal, "{}", compared.text);
    let text = fs::read_to_string(out.join("model.safetensors.index.json")).expect("a file");
    fs::write(out.join("model.safetensors.index.json"), text.replace("\"model-0", "\"../model-0")).expect("a file");
    let error = format!("{:#}", HuggingFace::open(&out).err().expect("a path that leads out"));
    assert!(error.contains("plain name"), "{error}");
}

fn write_folder(folder: &Path, tensors: &[(&str, &[usize], Dtype)]) {
    fs::create_dir_all(folder).expect("a folder");
    let mut entries: Vec<Entry> =
        tensors.iter().map(|(key, shape, dtype)| Entry { key: (*key).to_owned(), dtype: *dtype, shape: shape.to_vec() }).collect();
    entries.sort_by(|left, right| left.rank().cmp(&right.rank()));
    let mut writer = Writer::create(&folder.join("model.safetensors"), &entries).expect("a file");
    for entry in &entries {
        // Two tensors whose names end alike hold the same, so that a head can be a copy.
        let name = if entry.key.contains("lm_head") { "wte.weight" } else { &entry.key };
        let count: usize = entry.shape.iter().product();
        let numbers: Vec<f32> = (0..count).map(|index| value(Kind::Weights, 1, name, index)).collect();
        writer.write(&checkpoints::encode(&numbers, entry.dtype)).expect("a write");
    }
    writer.finish().expect("a file");
}

#[test]
fn old_gpt2_files_are_read_and_what_does_not_fit_is_named() {
    let scratch = Scratch::new("gpt2");
    let mask: (&str, &[usize], Dtype) = ("h.0.attn.bias", &[1, 1, 4, 4], Dtype::F32);
    let tensors = [
        ("wte.weight", &[6, 2][..], Dtype::F32),
        ("h.0.attn.c_attn.weight", &[2, 6], Dtype::F16),
        mask,
        ("h.0.attn.masked_bias", &[], Dtype::F32),
        ("lm_head.weight", &[6, 2], Dtype::F32),
    ];
    write_folder(&scratch.0, &tensors);
    let folder = HuggingFace::open(&scratch.0).expect("a sound folder");
    let expected =
        BTreeMap::from([("transformer.wte.weight".to_owned(), vec![6, 2]), ("transformer.h.0.attn.c_attn.weight".to_owned(), vec![2, 6])]);
    folder.check(&expected).expect("the mask carries no weight, and the head is the embedding");
    let mut other = expected.clone();
    other.insert("transformer.h.0.attn.c_attn.weight".to_owned(), vec![6, 2]);
    other.insert("transformer.wpe.weight".to_owned(), vec![4, 2]);
    other.remove("transformer.wte.weight");
    let error = folder.check(&other).expect_err("nothing fits").to_string();
    let problems = [
        "\"transformer.wpe.weight\" of the shape [4, 2] is missing",
        "the shape [2, 6] in",
        "the model has [6, 2]",
        "\"transformer.wte.weight\" in",
    ];
    for problem in problems {
        assert!(error.contains(problem), "{problem:?} in: {error}");
    }
    fs::remove_file(scratch.0.join("model.safetensors")).expect("a file");
    fs::write(scratch.0.join("pytorch_model.bin"), "pickle").expect("a file");
    let error = HuggingFace::open(&scratch.0).err().expect("only pickled weights").to_string();
    assert!(error.contains("safe_serialization=True"), "{error}");
}

#[test]
fn differences_are_counted_and_measured() {
    let scratch = Scratch::new("diff");
    let left = saved(&scratch);
    let other = Scratch::new("diff");
    for result in save(&mut writers(&other.0, 3, |_| ()), &simple_cut(3), 3) {
        result.expect("a save");
    }
    let right = by_step(&other.0, 3).expect("a checkpoint");
    let same = diff(left.folder(), right.folder()).expect("comparable");
    assert!(same.equal && same.text.contains("all 12 tensors are equal"), "{}", same.text);
    save_well(&mut writers(&other.0, 3, |_| ()), &simple_cut(3), 4);
    let next = diff(left.folder(), by_step(&other.0, 4).expect("a checkpoint").folder()).expect("comparable");
    assert!(!next.equal);
    for line in ["step: 3 | 4", "tokens: 3000 | 4000", "12 of 12 tensors differ", "norm.weight: 7 of 7 elements differ, by "] {
        assert!(next.text.contains(line), "{line:?} in: {}", next.text);
    }
}

#[test]
fn a_checkpoint_tells_what_it_holds() {
    let scratch = Scratch::new("inspect");
    let text = inspect(&saved(&scratch));
    for (kind, dtype) in KINDS {
        let lines: Vec<&str> = text.lines().filter(|line| line.split_whitespace().next() == Some(kind.name())).collect();
        assert_eq!(lines.len(), 4, "a sum and three tensors: {text}");
        assert!(lines[2].contains(dtype.name()) && lines[2].contains("[12, 6]") && lines[2].ends_with("2  model.up.weight"), "{text}");
    }
    for line in ["step         3", "geometry     shards 2, lanes 4, order lanes", "files        8 of"] {
        assert!(text.contains(line), "{line:?} in: {text}");
    }
}
