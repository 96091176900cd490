//! Configurations: what is wrong is said, all at once, in words that help; what is right means what it says.

use ferrotron::config::source::Problem;
use ferrotron::config::{Config, Family, Model, Resume, ScheduleKind};
use ferrotron::dtype::Dtype;
use std::path::{Path, PathBuf};

/// The least that is a configuration.
const GOOD: &str = "\
[model]
family = \"llama\"
hidden_size = 64
intermediate_size = 128
num_layers = 2
num_heads = 4

[train]
steps = 10
seq_len = 32
global_batch_size = 8
";

fn good(text: &str, overrides: &[&str]) -> Config {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    Config::parse("good.toml", text, &overrides).unwrap_or_else(|problems| panic!("{text}\n{problems}")).0
}

fn bad(text: &str, overrides: &[&str]) -> String {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    match Config::parse("bad.toml", text, &overrides) {
        Ok(_) => panic!("this must be refused: {text} {overrides:?}"),
        Err(problems) => problems.to_string(),
    }
}

/// A folder for the files of one test.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("config").join(name);
    std::fs::create_dir_all(&folder).expect("the folder of a test");
    folder
}

#[test]
fn defaults_are_filled_in() {
    let config = good(GOOD, &[]);
    let model = &config.model;
    assert_eq!((model.num_kv_heads, model.head_dim, model.vocab_size, model.max_position_embeddings), (4, 16, 257, 32));
    assert_eq!((model.rope_theta, model.norm_eps, model.tie_word_embeddings), (10000.0, 1e-5, false));
    assert_eq!((config.run.name.as_str(), config.run.dir.as_path()), ("good", Path::new("runs/good")));
    assert_eq!(config.data.cache, Path::new("runs/good/cache"));
    assert_eq!((config.train.dtype, config.train.micro_batch_size, config.parallel.dp_shard), (Dtype::Bf16, 1, -1));
    assert_eq!((config.schedule.kind, config.schedule.min_lr, config.eval.interval), (ScheduleKind::Cosine, 3e-5, 0));
    let gpt2 = good(&GOOD.replace("llama", "gpt2").replace("intermediate_size = 128", ""), &[]).model;
    assert_eq!((gpt2.intermediate_size, gpt2.tie_word_embeddings, gpt2.rope_theta), (256, true, 0.0));
}

#[test]
fn set_takes_any_toml_and_bare_words() {
    let sets = ["train.dtype=f16", "train.tokens=\"1.5M\"", "checkpoint.resume=20", "data.sources=[\"a\", {path=\"b\", weight=2}]"];
    let config = good(&GOOD.replace("steps = 10\n", ""), &sets);
    // 1.5 M tokens in steps of 8 × 32, the last one whole.
    assert_eq!((config.train.dtype, config.train.steps, config.checkpoint.resume), (Dtype::F16, 5860, Resume::Step(20)));
    assert_eq!(config.data.sources[1].weight, 2.0);
    let config = good(GOOD, &["train.steps=5", "train.steps=7", "train.loss_scale.initial=2", "run.dir=a/b", "eval.interval=0"]);
    assert_eq!((config.train.steps, config.train.loss_scale.initial, config.run.dir.as_path()), (7, 2.0, Path::new("a/b")));
}

#[test]
fn what_is_written_loads_back_equal() {
    let gpt2 = GOOD.replace("llama", "gpt2");
    let scaled =
        "model.rope_scaling={rope_type=\"llama3\",factor=8,low_freq_factor=1,high_freq_factor=4,original_max_position_embeddings=16}";
    let sets =
        ["checkpoint.resume=/some/where", "optimizer.no_decay=[\"*norm*\"]", "train.stop_after=3", "optimizer.eps=1.2345678901234567e-9"];
    for config in [good(GOOD, &[]), good(&gpt2, &[]), good(GOOD, &[scaled]), good(GOOD, &sets)] {
        assert_eq!(good(&config.to_toml(), &[]), config);
    }
}

/// Parameters by the book, not by the catalog that trains them.
fn parameters(model: &Model) -> usize {
    let (c, f, v) = (model.hidden_size, model.intermediate_size, model.vocab_size);
    let head = if model.tie_word_embeddings { 0 } else { v * c };
    match model.family {
        Family::Llama => {
            let (q, kv) = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim);
            v * c + model.num_layers * (2 * c * q + 2 * c * kv + 3 * c * f + 2 * c) + c + head
        }
        Family::Gpt2 => {
            let block = 4 * c * c + 4 * c + 2 * c * f + f + c + 4 * c;
            v * c + model.max_position_embeddings * c + model.num_layers * block + 2 * c + head
        }
    }
}

#[test]
fn shipped_configurations_load_and_have_the_published_sizes() {
    let shipped = [("quickstart", 1_673_088), ("gpt2-124m", 124_439_808), ("llama3.2-1b", 1_235_814_400), ("llama3.1-8b", 8_030_261_248)];
    for (name, size) in shipped {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(format!("{name}.toml"));
        let (config, _) = Config::load(&path, &[]).unwrap_or_else(|problems| panic!("{problems}"));
        assert_eq!((config.run.name.as_str(), parameters(&config.model)), (name, size));
        assert!(config.problems_for_training().is_empty());
    }
}

#[test]
fn all_problems_come_at_once_and_in_order() {
    let text = "\
[model]
family = \"mistral\"
hiden_size = 64
intermediate_size = \"big\"
num_layers = 2
num_heads = 4

[train]
steps = 10
seq_len = 32
global_batch_size = 10
micro_batch_size = 4
lr = 1e-3

[shedule]
warmup_steps = 5
";
    let expected = "\
error: `model.hidden_size` is missing
 --> bad.toml:1:1
  |
1 | [model]
  | ^^^^^^^
  |
  = help: add it to [model], for instance hidden_size = 384

error: `model.family` = \"mistral\" is not built yet
 --> bad.toml:2:1
  |
2 | family = \"mistral\"
  | ^^^^^^^^^^^^^^^^^^
  |
  = help: the families that work are llama and gpt2

error: unknown key `model.hiden_size`
 --> bad.toml:3:1
  |
3 | hiden_size = 64
  | ^^^^^^^^^^^^^^^
  |
  = help: did you mean `hidden_size`?

error: `model.intermediate_size` must be a whole number, not the text \"big\"
 --> bad.toml:4:1
  |
4 | intermediate_size = \"big\"
  | ^^^^^^^^^^^^^^^^^^^^^^^^^

error: `train.global_batch_size` = 10 is not a multiple of `train.micro_batch_size` = 4
  --> bad.toml:12:1
   |
11 | global_batch_size = 10
   | ----------------------
12 | micro_batch_size = 4
   | ^^^^^^^^^^^^^^^^^^^^
   |
   = help: micro_batch_size 2 or 5, or global_batch_size 8 or 12

error: unknown key `train.lr`
  --> bad.toml:13:1
   |
13 | lr = 1e-3
   | ^^^^^^^^^
   |
   = help: did you mean `lr` of [optimizer]?

error: unknown section `shedule`
  --> bad.toml:15:1
   |
15 | [shedule]
   | ^^^^^^^^^
   |
   = help: did you mean [schedule]?";
    assert_eq!(bad(text, &[]), expected);
}

#[test]
fn a_problem_of_an_argument_points_at_the_argument() {
    let expected = "\
error: unknown key `train.stepps`
 --> command line:1:7
  |
1 | --set train.stepps=4
  |       ^^^^^^^^^^^^^^
  |
  = help: did you mean `steps`?

error: `train.global_batch_size` = 8 is not a multiple of `train.micro_batch_size` = 3
  --> command line:1:7
   |
 1 | --set train.micro_batch_size=3
   |       ^^^^^^^^^^^^^^^^^^^^^^^^
   |
  ::: bad.toml:11:1
   |
11 | global_batch_size = 8
   | ---------------------
   |
   = help: micro_batch_size 2 or 4, or global_batch_size 6 or 9";
    assert_eq!(bad(GOOD, &["train.stepps=4", "train.micro_batch_size=3"]), expected);
}

#[test]
fn each_mistake_is_told_with_what_would_work() {
    for (set, message, help) in [
        (
            "model.num_heads=5",
            "`model.hidden_size` = 64 does not divide into `model.num_heads` = 5",
            "num_heads 4 or 8, or hidden_size 60 or 65",
        ),
        (
            "model.num_kv_heads=3",
            "`model.num_heads` = 4 does not divide into `model.num_kv_heads` = 3 groups",
            "num_kv_heads 2 or 4, or num_heads 3 or 6",
        ),
        ("model.head_dim=15", "`model.head_dim` = 15 is odd", "head_dim 14 or 16"),
        ("model.num_hidden_layers=3", "unknown key `model.num_hidden_layers`", "it is called `num_layers` here"),
        ("model.max_position_embeddings=16", "`train.seq_len` = 32 is above `model.max_position_embeddings` = 16", "seq_len 16 or less"),
        ("model.family=lama", "`model.family` = \"lama\" is not known", "did you mean \"llama\"?"),
        ("model.rope_scaling={rope_type=\"llama3\"}", "`model.rope_scaling.factor` is missing", "factor = 8.0"),
        ("train.steps=0", "`train.steps` = 0 is out of range", "a whole number of 1 or more"),
        ("train.steps=1.5", "`train.steps` must be a whole number, not the number 1.5", ""),
        ("train.tokens=10B", "both `train.tokens` and `train.steps` are given", "leave one of them out"),
        ("train.dtype=bf61", "`train.dtype` = \"bf61\" is not known", "did you mean \"bf16\"? it is one of f32, bf16, f16"),
        ("train.loss_scale={inital=1}", "unknown key `train.loss_scale.inital`", "did you mean `initial`?"),
        (
            "train.loss_scale.min=1e9",
            "`train.loss_scale.min` = 1000000000 is above `train.loss_scale.initial` = 65536",
            "min 65536 or less",
        ),
        ("optimizer.lr=0", "`optimizer.lr` = 0 is out of range", "a number above 0"),
        ("optimizer.lr=true", "`optimizer.lr` must be a number, not true", ""),
        ("optimizer.beta2=1", "`optimizer.beta2` = 1 is out of range", "from 0 to below 1"),
        ("optimizer.no_decay=[1]", "`optimizer.no_decay.0` must be the name of a tensor, not the whole number 1", ""),
        ("schedule.min_lr=1e-3", "`schedule.min_lr` = 1e-3 is above `optimizer.lr` = 3e-4", "min_lr 3e-4 or less"),
        (
            "schedule={kind=\"wsd\",wsd_decay_steps=8,warmup_steps=4}",
            "are more than the 10 steps of the schedule",
            "wsd_decay_steps 6 or less",
        ),
        ("eval.interval=5", "`eval.interval` = 5, but `data.validation` is empty", "interval = 0"),
        ("parallel.zero=4", "`parallel.zero` = 4 is out of range", "from 0 to 3"),
        ("parallel.tp=0", "`parallel.tp` = 0 is out of range", "from 1 to"),
        ("parallel.dp_shard=0", "`parallel.dp_shard` = 0 is out of range", "-1: the rest of the world"),
        ("parallel.pp_schedule=1f2b", "`parallel.pp_schedule` = \"1f2b\" is not known", "did you mean \"1f1b\"?"),
        ("data.sources=7", "`data.sources` must be a list of paths, not the whole number 7", ""),
        ("data.sources=[{path=\"a\",weight=-1}]", "`data.sources.0.weight` = -1 is out of range", "above 0"),
        (
            "data.tokenizer=none.json",
            "`model.vocab_size` is not given, and `data.tokenizer` = \"none.json\" cannot tell it",
            "give model.vocab_size",
        ),
        ("checkpoint.resume=true", "`checkpoint.resume` must be \"auto\", \"none\", a step or a path, not true", ""),
        ("log.intervall=3", "unknown key `log.intervall`", "did you mean `interval`?"),
        ("device.kind=gpu", "`device.kind` = \"gpu\" is not known", "auto, cpu, cuda, emulated"),
        ("device.matmul=cublas", "`device.matmul` = \"cublas\" is not known", "auto, cublaslt, own"),
        ("steps=3", "`steps` is not the path of a key", "section.key=value"),
        ("train.steps", "`train.steps` has no `=`", "section.key=value"),
        ("run.name=", "the value of `run.name` is not TOML: there is none", "section.key=value"),
        ("data.sources=[1", "the value of `data.sources` is not TOML: unclosed array", "section.key=value"),
    ] {
        let got = bad(GOOD, &[set]);
        assert!(got.contains(message) && got.contains(help), "{set}: {got}");
        assert_eq!(got.matches("error:").count(), if set.contains("rope_scaling") { 4 } else { 1 }, "{set}: {got}");
    }
}

#[test]
fn text_that_is_no_toml_is_told_wholly_and_alone() {
    let got = bad("[model]\nfamily = \nnum_layers = 3 4\nhidden_size = 'x\n", &[]);
    assert!(got.contains("bad.toml:2:10") && got.contains("bad.toml:3:") && !got.contains("missing"), "{got}");
    assert!(got.matches("error: this is not TOML").count() >= 3, "{got}");
    assert!(bad("checkpoint = 3\n", &[]).contains("`checkpoint` must be a section, not the whole number 3"));
    assert!(bad("[model]\nfamily = 'llama'\nfamily = 'gpt2'\n", &[]).contains("duplicate key"));
    let unreadable = Config::load(Path::new("no/such.toml"), &[]).expect_err("there is no such file").to_string();
    assert!(unreadable.contains("cannot be read") && unreadable.contains("no/such.toml"), "{unreadable}");
}

#[test]
fn problems_found_later_are_shown_in_the_text_too() {
    let text = format!("{GOOD}\n[parallel]\ntp = 3\n");
    let (_, source) = Config::parse("run.toml", &text, &["parallel.pp=2".to_string()]).unwrap_or_else(|problems| panic!("{problems}"));
    let problem = Problem::new("parallel.tp", "`parallel.tp` = 3 does not fit `parallel.pp` = 2").help("tp 2");
    let got = source.render(&[problem, Problem::new("parallel.zero", "elsewhere")]);
    assert!(got.contains("run.toml:14:1") && got.contains("--set parallel.pp=2") && got.contains("help: tp 2"), "{got}");
    assert!(got.contains("[parallel]"), "a key that is not there is shown at its section: {got}");
}

#[test]
fn hugging_face_reads_back_what_it_wrote() {
    let scaled =
        "model.rope_scaling={rope_type=\"llama3\",factor=32,low_freq_factor=1,high_freq_factor=4,original_max_position_embeddings=8}";
    let gpt2 = GOOD.replace("llama", "gpt2");
    for (name, model) in [("plain", good(GOOD, &[]).model), ("scaled", good(GOOD, &[scaled]).model), ("gpt2", good(&gpt2, &[]).model)] {
        let path = folder("round_trip").join(format!("{name}.json"));
        let json = model.to_hugging_face(Dtype::Bf16);
        assert_eq!(json["torch_dtype"], "bfloat16");
        std::fs::write(&path, json.to_string()).expect("writing config.json");
        assert_eq!(Model::from_hugging_face(&path).unwrap_or_else(|error| panic!("{error:#}")), model);
        let run = format!(
            "[model]\nconfig = {:?}\nnum_layers = 5\n[train]\nsteps = 1\nseq_len = 8\nglobal_batch_size = 1\n",
            path.display().to_string()
        );
        assert_eq!(good(&run, &[]).model, Model { num_layers: 5, ..model });
    }
}

#[test]
fn hugging_face_is_read_in_both_spellings() {
    let path = folder("spellings").join("config.json");
    let read = |extra: &str| {
        let common = "\"model_type\": \"llama\", \"hidden_size\": 2048, \"intermediate_size\": 8192, \"num_hidden_layers\": 16, \
                      \"num_attention_heads\": 32, \"vocab_size\": 128256, \"head_dim\": null";
        std::fs::write(&path, format!("{{{common}{extra}}}")).expect("writing config.json");
        Model::from_hugging_face(&path).map_err(|error| format!("{error:#}"))
    };
    let numbers = "\"factor\": 32.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192";
    let old =
        read(&format!(", \"rope_theta\": 500000.0, \"rope_scaling\": {{\"type\": \"llama3\", {numbers}}}")).expect("the old spelling");
    let new = read(&format!(", \"rope_parameters\": {{\"rope_theta\": 500000.0, \"rope_type\": \"llama3\", {numbers}}}"))
        .expect("the new spelling");
    assert_eq!(old, new);
    assert_eq!((old.rope_theta, old.head_dim, old.num_kv_heads), (500000.0, 64, 32));
    assert_eq!(read(", \"rope_parameters\": {\"rope_theta\": 7.0, \"rope_type\": \"default\"}").map(|model| model.rope_scaling), Ok(None));
    for (extra, parts) in [
        (", \"attention_bias\": true, \"hidden_act\": \"gelu\"", &["attention_bias is true", "hidden_act is \"gelu\""][..]),
        (", \"attention_dropout\": 0.1", &["attention_dropout is 0.1"]),
        (", \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0}", &["rope_scaling", "yarn"]),
        (", \"rope_scaling\": {\"rope_type\": \"llama3\"}", &["rope_scaling: factor is missing", "low_freq_factor is missing"]),
        (", \"sliding_window\": 4096", &["sliding_window is 4096"]),
        (", \"num_key_value_heads\": \"8\"", &["num_key_value_heads is \"8\""]),
    ] {
        let message = read(extra).expect_err(extra);
        assert!(parts.iter().all(|part| message.contains(part)), "{extra}: {message}");
    }
    std::fs::write(&path, "{\"model_type\": \"gpt2\", \"resid_pdrop\": 0.1, \"n_embd\": 8}").expect("writing config.json");
    let message = format!("{:#}", Model::from_hugging_face(&path).expect_err("dropout and missing keys"));
    assert!(["resid_pdrop is 0.1", "n_layer is missing", "n_positions is missing"].iter().all(|part| message.contains(part)), "{message}");
}

#[test]
fn a_tokenizer_file_tells_the_vocabulary() {
    let path = folder("tokenizer").join("tokenizer.json");
    std::fs::write(&path, r#"{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 5, "content": "<end>"}]}"#).expect("writing");
    assert_eq!(good(GOOD, &[&format!("data.tokenizer={}", path.display())]).model.vocab_size, 6);
}

#[test]
fn rounding_by_chance_is_for_weights_that_are_rounded() {
    assert!(!good(GOOD, &["train.dtype=bf16"]).optimizer.stochastic_rounding);
    let chance = good(GOOD, &["train.dtype=bf16", "optimizer.stochastic_rounding=true"]);
    assert!(Config::parse("again.toml", &chance.to_toml(), &[]).expect("it loads back").0.optimizer.stochastic_rounding);
    let refused = bad(GOOD, &["train.dtype=f32", "optimizer.stochastic_rounding=true"]);
    assert!(refused.contains("with `train.dtype` = \"f32\" no weight is rounded") && refused.contains("dtype = \"bf16\""), "{refused}");
}

#[test]
fn places_of_state_and_limits_of_memory() {
    let sets = ["parallel.zero=3", "parallel.offload_optimizer=/nvme", "parallel.offload_weights=/nvme", "device.memory=1.5GiB"];
    let config = good(GOOD, &sets);
    assert_eq!((config.parallel.offload_weights.folder(), config.device.memory), (Some(Path::new("/nvme")), Some(3 << 29)));
    assert_eq!(Config::parse("again.toml", &config.to_toml(), &[]).expect("it loads back").0.device.memory, Some(3 << 29));
    assert_eq!(good(GOOD, &["parallel.offload_optimizer=none"]).parallel.offload_optimizer.folder(), None);
    let host = bad(GOOD, &["parallel.offload_optimizer=host"]);
    assert!(host.contains("on the CPU the host's memory is the device's own") && host.contains("name a folder"), "{host}");
    let whole = bad(GOOD, &["parallel.offload_weights=/nvme"]);
    assert!(whole.contains("`parallel.offload_weights` is set, but with `parallel.zero` = 1"), "{whole}");
    for memory in ["0", "-1", "lots", "8 apples", "nan"] {
        let refused = bad(GOOD, &[&format!("device.memory=\"{memory}\"")]);
        assert!(refused.contains("`device.memory` is not a number of bytes"), "{memory}: {refused}");
    }
}
