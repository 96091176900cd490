//! Reads the keys of one section, and remembers which it was asked for: the others are unknown keys.
//!
//! Invariant: reading never stops at a problem. A key that is missing or wrong reads as `None`, and what is wrong is in `problems`.

use super::choice::Choice;
use super::source::Problem;
use std::ops::RangeInclusive;
use toml::{Table, Value};

/// Dims of a model: large enough for any, small enough that the product of three fits a u64.
pub const DIM: RangeInclusive<i64> = 1..=(1 << 21);
/// Things of which there may be none.
pub const COUNT: RangeInclusive<i64> = 0..=(1 << 40);
/// Things of which there is at least one.
pub const SOME: RangeInclusive<i64> = 1..=(1 << 40);

/// Names that users of other trainers know, and what they are called here.
const ELSEWHERE: &[(&str, &str)] = &[
    ("num_hidden_layers", "num_layers"),
    ("n_layer", "num_layers"),
    ("num_attention_heads", "num_heads"),
    ("n_head", "num_heads"),
    ("num_key_value_heads", "num_kv_heads"),
    ("num_query_groups", "num_kv_heads"),
    ("n_embd", "hidden_size"),
    ("n_inner", "intermediate_size"),
    ("ffn_hidden_size", "intermediate_size"),
    ("n_positions", "max_position_embeddings"),
    ("rms_norm_eps", "norm_eps"),
    ("layer_norm_epsilon", "norm_eps"),
    ("initializer_range", "init_std"),
    ("model_type", "family"),
    ("sequence_length", "seq_len"),
    ("local_batch_size", "micro_batch_size"),
    ("batch_size", "global_batch_size"),
    ("activation_checkpoint", "recompute"),
    ("tensor_parallel_degree", "tp"),
    ("pipeline_parallel_degree", "pp"),
    ("pipeline_parallel_schedule", "pp_schedule"),
    ("data_parallel_replicate_degree", "dp_replicate"),
    ("data_parallel_shard_degree", "dp_shard"),
    ("zero_stage", "zero"),
    ("learning_rate", "lr"),
    ("max_norm", "grad_clip"),
    ("clip_grad", "grad_clip"),
    ("gradient_clipping", "grad_clip"),
    ("keep_latest_k", "keep"),
];

/// What reading the sections of a configuration has found.
#[derive(Default)]
pub struct Findings {
    pub problems: Vec<Problem>,
    /// (section, key) that a reader asked for.
    known: Vec<(String, &'static str)>,
    /// (section, key) that no reader asked for.
    unknown: Vec<(String, String)>,
}

impl Findings {
    pub fn of(problems: Vec<Problem>) -> Findings {
        Findings { problems, ..Findings::default() }
    }

    /// Whether nothing is wrong with the key at `path`.
    pub fn clean(&self, path: &str) -> bool {
        self.problems.iter().all(|problem| problem.key != path)
    }

    /// Turns unknown keys into problems. Comes last, when the keys of all sections are known.
    pub fn report_unknown_keys(&mut self) {
        for (section, key) in std::mem::take(&mut self.unknown) {
            let here: Vec<&str> = self.known.iter().filter(|(path, _)| *path == section).map(|(_, key)| *key).collect();
            let path = format!("{section}.{key}");
            let problem = Problem::new(&path, format!("unknown key `{path}`")).help(self.meant(&key, &here, &section));
            self.problems.push(problem);
        }
    }

    fn meant(&self, key: &str, here: &[&str], section: &str) -> String {
        let elsewhere = ELSEWHERE.iter().find(|(theirs, _)| *theirs == key).map(|(_, ours)| *ours);
        if let Some(name) = elsewhere.filter(|name| here.contains(name)) {
            return format!("it is called `{name}` here");
        }
        if let Some((other, name)) = self.known.iter().find(|(_, known)| *known == key || Some(*known) == elsewhere) {
            return format!("did you mean `{name}` of [{other}]?");
        }
        match nearest(key, here) {
            Some(name) => format!("did you mean `{name}`?"),
            None => format!("[{section}] has {}", here.join(", ")),
        }
    }
}

pub struct Reader<'a> {
    path: String,
    table: Table,
    /// Whether a required key may be missing, because where it would have come from could not be read.
    excused: bool,
    findings: &'a mut Findings,
}

impl<'a> Reader<'a> {
    /// Takes the section at `path` out of `parent`; a missing one is empty.
    pub fn section(parent: &mut Table, path: &str, findings: &'a mut Findings) -> Reader<'a> {
        let table = match parent.remove(path) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                let message = format!("`{path}` must be a section, not {}", described(&other));
                findings.problems.push(Problem::new(path, message).help(format!("write [{path}] above its keys")));
                Table::new()
            }
        };
        Reader { path: path.to_string(), table, excused: false, findings }
    }

    /// The table at `key` as a section of its own, if it is there.
    pub fn subsection(&mut self, key: &'static str) -> Option<Reader<'_>> {
        match self.take(key)? {
            Value::Table(table) => Some(Reader { path: self.path_of(key), table, excused: false, findings: &mut *self.findings }),
            other => self.wrong(key, "a table { ... }", &other),
        }
    }

    /// Item `index` of the list at `key` as a section of its own.
    pub fn item(&mut self, key: &str, index: usize, table: Table) -> Reader<'_> {
        Reader { path: format!("{}.{key}.{index}", self.path), table, excused: false, findings: &mut *self.findings }
    }

    /// Whether nothing is wrong so far with `key`.
    pub fn clean(&self, key: &str) -> bool {
        self.findings.clean(&self.path_of(key))
    }

    pub fn path_of(&self, key: &str) -> String {
        format!("{}.{key}", self.path)
    }

    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    pub fn problem(&mut self, key: &str, message: impl Into<String>, help: impl Into<String>) {
        let path = self.path_of(key);
        self.findings.problems.push(Problem::new(&path, message).help(help));
    }

    /// From now on a missing key is no problem of its own.
    pub fn excuse_missing(&mut self) {
        self.excused = true;
    }

    /// The value of a required key; without one there is a problem, unless the key was there and wrong.
    pub fn required<T>(&mut self, key: &'static str, value: Option<T>, example: &str) -> Option<T> {
        if value.is_none() && !self.excused && !self.table.contains_key(key) {
            let path = self.path_of(key);
            self.problem(key, format!("`{path}` is missing"), format!("add it to [{}], for instance {key} = {example}", self.path));
        }
        value
    }

    pub fn whole<T: TryFrom<i64>>(&mut self, key: &'static str, range: RangeInclusive<i64>) -> Option<T> {
        let value = match self.take(key)? {
            Value::Integer(value) => value,
            other => return self.wrong(key, "a whole number", &other),
        };
        if let (true, Ok(value)) = (range.contains(&value), T::try_from(value)) {
            return Some(value);
        }
        let (path, least, most) = (self.path_of(key), range.start(), range.end());
        // A bound that only keeps products from overflowing is not worth naming to somebody far below it.
        let bounds = if value < *least && *most > 1 << 20 { format!("of {least} or more") } else { format!("from {least} to {most}") };
        self.problem(key, format!("`{path}` = {value} is out of range"), format!("it is a whole number {bounds}"));
        None
    }

    /// `holds`: the condition, `words`: the same in words, as in "it is a number " + words.
    pub fn number(&mut self, key: &'static str, holds: fn(f64) -> bool, words: &str) -> Option<f64> {
        let value = match self.take(key)? {
            Value::Float(value) => value,
            Value::Integer(value) => value as f64,
            other => return self.wrong(key, "a number", &other),
        };
        if value.is_finite() && holds(value) {
            return Some(value);
        }
        let path = self.path_of(key);
        self.problem(key, format!("`{path}` = {value} is out of range"), format!("it is a number {words}"));
        None
    }

    pub fn text(&mut self, key: &'static str) -> Option<String> {
        match self.take(key)? {
            Value::String(text) if !text.trim().is_empty() => Some(text),
            Value::String(_) => {
                let path = self.path_of(key);
                self.problem(key, format!("`{path}` is empty"), "leave the key out to get its default");
                None
            }
            other => self.wrong(key, "text", &other),
        }
    }

    pub fn flag(&mut self, key: &'static str) -> Option<bool> {
        match self.take(key)? {
            Value::Boolean(flag) => Some(flag),
            other => self.wrong(key, "true or false", &other),
        }
    }

    pub fn choice<C: Choice>(&mut self, key: &'static str) -> Option<C> {
        let names: Vec<&str> = C::NAMES.iter().map(|(name, _)| *name).collect();
        let text = match self.take(key)? {
            Value::String(text) => text,
            other => return self.wrong(key, &format!("one of {}", names.join(", ")), &other),
        };
        if let Some((_, value)) = C::NAMES.iter().find(|(name, _)| *name == text) {
            return Some(*value);
        }
        let path = self.path_of(key);
        let guess = nearest(&text, &names).map(|name| format!("did you mean \"{name}\"? ")).unwrap_or_default();
        self.problem(key, format!("`{path}` = \"{text}\" is not known"), format!("{guess}it is one of {}", names.join(", ")));
        None
    }

    pub fn list(&mut self, key: &'static str) -> Option<Vec<Value>> {
        match self.take(key)? {
            Value::Array(items) => Some(items),
            other => self.wrong(key, "a list [ ... ]", &other),
        }
    }

    /// The value itself, for keys of several types.
    pub fn take(&mut self, key: &'static str) -> Option<Value> {
        self.findings.known.push((self.path.clone(), key));
        self.table.get(key).cloned()
    }

    /// Reports a value of the wrong type.
    pub fn wrong<T>(&mut self, key: &str, expected: &str, found: &Value) -> Option<T> {
        let path = self.path_of(key);
        self.findings.problems.push(Problem::new(&path, format!("`{path}` must be {expected}, not {}", described(found))));
        None
    }

    /// Ends the reading of this section: the keys that nobody asked for are unknown.
    pub fn finish(&mut self) {
        let asked = |key: &str| self.findings.known.iter().any(|(path, known)| *path == self.path && *known == key);
        let unknown: Vec<String> = self.table.keys().filter(|key| !asked(key)).cloned().collect();
        self.findings.unknown.extend(unknown.into_iter().map(|key| (self.path.clone(), key)));
    }
}

/// The known name that `name` was probably meant to be.
pub fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let scored = known.iter().map(|candidate| (strsim::jaro_winkler(name, candidate), *candidate));
    scored.filter(|(score, _)| *score > 0.75).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, candidate)| candidate)
}

/// A value as a sentence calls it.
fn described(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the text \"{text}\""),
        Value::Integer(value) => format!("the whole number {value}"),
        Value::Float(value) => format!("the number {value:?}"),
        Value::Boolean(value) => format!("{value}"),
        Value::Datetime(value) => format!("the date {value}"),
        Value::Array(_) => "a list".to_string(),
        Value::Table(_) => "a table".to_string(),
    }
}
