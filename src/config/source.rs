//! The text a configuration came from, and problems shown under the line they are about.
//!
//! Invariant: a problem names its key by path (`parallel.tp`), never by offset; the source knows where each key stands, so whoever
//! finds a problem, now or after the whole file has been read, gets the same rendering.

use annotate_snippets::{Annotation, AnnotationKind, Group, Level, Renderer, Snippet};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use toml::de::{DeTable, DeValue};

/// Something wrong with a configuration.
#[derive(Clone, PartialEq, Debug)]
pub struct Problem {
    /// Path of the key it is about, such as `parallel.tp`. It need not stand in the file.
    pub key: String,
    /// One line. Keys in backticks are pointed at too, where they stand in the same text.
    pub message: String,
    /// What would work.
    pub help: Option<String>,
}

impl Problem {
    pub fn new(key: &str, message: impl Into<String>) -> Problem {
        Problem { key: key.to_string(), message: message.into(), help: None }
    }

    pub fn help(self, help: impl Into<String>) -> Problem {
        Problem { help: Some(help.into()), ..self }
    }
}

/// All problems of a configuration, with the text to show them in. Its `Display` is the plain rendering.
#[derive(Clone, Debug)]
pub struct Problems {
    pub source: Source,
    pub problems: Vec<Problem>,
}

impl Problems {
    /// `color`: whether to use the colors of a terminal.
    pub fn render(&self, color: bool) -> String {
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        let parts: Vec<String> = self.problems.iter().map(|problem| self.source.render_one(&renderer, problem)).collect();
        parts.join("\n\n")
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Problems {}

/// The file and the `--set` arguments of a configuration, and where in them each key stands.
#[derive(Clone, Debug)]
pub struct Source {
    /// (name, text): the file, then one for each argument.
    texts: Vec<(String, String)>,
    places: BTreeMap<String, Place>,
}

#[derive(Clone, Debug)]
struct Place {
    text: usize,
    span: Range<usize>,
}

impl Source {
    pub fn new(name: &str, text: &str) -> Source {
        Source { texts: vec![(name.to_string(), text.to_string())], places: BTreeMap::new() }
    }

    /// The plain rendering of `problems`, for those found after loading.
    pub fn render(&self, problems: &[Problem]) -> String {
        Problems { source: self.clone(), problems: problems.to_vec() }.to_string()
    }

    /// Reads the file's text into a table, and notes where its keys stand.
    pub fn parse(&mut self, problems: &mut Vec<Problem>) -> toml::Table {
        let text = self.texts[0].1.clone();
        let (table, errors) = DeTable::parse_recoverable(&text);
        for error in &errors {
            self.syntax(0, error, problems);
        }
        if !errors.is_empty() {
            return toml::Table::new();
        }
        self.note_table("", table.get_ref());
        match toml::from_str(&text) {
            Ok(table) => table,
            Err(error) => {
                self.syntax(0, &error, problems);
                toml::Table::new()
            }
        }
    }

    /// Applies `section.key=value` on `table`. A value that is no TOML and has no quote or bracket is text.
    pub fn set(&mut self, argument: &str, table: &mut toml::Table, problems: &mut Vec<Problem>) {
        let shown = format!("--set {argument}");
        let whole = "--set ".len()..shown.len();
        self.texts.push(("command line".to_string(), shown));
        let text = self.texts.len() - 1;
        let marker = format!("--set #{text}");
        self.places.insert(marker.clone(), Place { text, span: whole.clone() });
        let example = "write it as section.key=value, for instance --set train.steps=100";
        let Some((path, value)) = argument.split_once('=') else {
            problems.push(Problem::new(&marker, format!("`{argument}` has no `=`")).help(example));
            return;
        };
        let value = match value_of(value.trim()) {
            Ok(value) => value,
            Err(message) => {
                problems.push(Problem::new(&marker, format!("the value of `{path}` is not TOML: {message}")).help(example));
                return;
            }
        };
        let keys: Vec<&str> = path.trim().split('.').collect();
        let section = keys.len() == 1 && value.is_table();
        if keys.iter().any(|key| key.is_empty()) || (keys.len() == 1 && !section) {
            problems.push(Problem::new(&marker, format!("`{path}` is not the path of a key")).help(example));
            return;
        }
        let path = keys.join(".");
        let below = format!("{path}.");
        self.places.retain(|key, _| *key != path && !key.starts_with(&below));
        self.places.insert(path, Place { text, span: whole });
        insert(table, &keys, value);
    }

    fn syntax(&mut self, text: usize, error: &toml::de::Error, problems: &mut Vec<Problem>) {
        let key = format!("syntax #{}", problems.len());
        if let Some(span) = error.span() {
            self.places.insert(key.clone(), Place { text, span });
        }
        problems.push(Problem::new(&key, format!("this is not TOML: {}", error.message().trim())));
    }

    fn note_table(&mut self, prefix: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            let path = if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
            self.note(&path, key.span().start.min(value.span().start), value);
        }
    }

    fn note(&mut self, path: &str, start: usize, value: &toml::Spanned<DeValue<'_>>) {
        let text = &self.texts[0].1;
        let end = value.span().end.max(start);
        // A value over several lines is pointed at by its first one.
        let line_end = text[start..end].find('\n').map_or(end, |length| start + length);
        self.places.insert(path.to_string(), Place { text: 0, span: start..line_end });
        match value.get_ref() {
            DeValue::Table(table) => self.note_table(path, table),
            DeValue::Array(array) => {
                for (index, item) in array.iter().enumerate() {
                    self.note(&format!("{path}.{index}"), item.span().start, item);
                }
            }
            _ => {}
        }
    }

    /// Where `key` stands, or else the closest section around it.
    fn place(&self, key: &str) -> Option<&Place> {
        let mut key = key;
        loop {
            if let Some(place) = self.places.get(key) {
                return Some(place);
            }
            key = key.rsplit_once('.')?.0;
        }
    }

    /// `problems` in the order in which their keys stand in the file and in the arguments.
    pub fn sorted(&self, mut problems: Vec<Problem>) -> Vec<Problem> {
        problems.sort_by_key(|problem| self.place(&problem.key).map(|place| (place.text, place.span.start)));
        problems
    }

    fn snippet(&self, place: &Place) -> Snippet<'_, Annotation<'_>> {
        let (name, text) = &self.texts[place.text];
        Snippet::source(text).path(name).fold(true)
    }

    fn render_one(&self, renderer: &Renderer, problem: &Problem) -> String {
        let mut group = Group::with_title(Level::ERROR.primary_title(problem.message.as_str()));
        if let Some(place) = self.place(&problem.key) {
            let mentioned = problem.message.split('`').skip(1).step_by(2).filter(|key| **key != problem.key);
            let others: Vec<&Place> = mentioned.filter_map(|key| self.places.get(key)).filter(|other| other.span != place.span).collect();
            let (near, far): (Vec<&Place>, Vec<&Place>) = others.into_iter().partition(|other| other.text == place.text);
            let near = near.iter().map(|other| AnnotationKind::Context.span(other.span.clone()));
            group = group.element(self.snippet(place).annotation(AnnotationKind::Primary.span(place.span.clone())).annotations(near));
            for other in far {
                group = group.element(self.snippet(other).annotation(AnnotationKind::Context.span(other.span.clone())));
            }
        } else if let Some((name, _)) = self.texts.first() {
            group = group.element(annotate_snippets::Origin::path(name));
        }
        if let Some(help) = &problem.help {
            group = group.element(Level::HELP.message(help.as_str()));
        }
        renderer.render(&[group])
    }
}

fn value_of(text: &str) -> Result<toml::Value, String> {
    let quoted = text.starts_with(['"', '\'', '[', '{']);
    match toml::from_str::<toml::Table>(&format!("value = {text}")) {
        Ok(table) if table.len() == 1 => Ok(table.into_iter().next().expect("the table has one entry").1),
        Err(error) if quoted => Err(error.message().trim().to_string()),
        _ if text.is_empty() => Err("there is none".to_string()),
        _ => Ok(toml::Value::String(text.to_string())),
    }
}

/// Puts `value` at the path `keys`; what stands in the way of a table gives way to it.
fn insert(table: &mut toml::Table, keys: &[&str], value: toml::Value) {
    let (first, rest) = keys.split_first().expect("a path has at least one key");
    if rest.is_empty() {
        table.insert(first.to_string(), value);
        return;
    }
    let slot = table.entry(first.to_string()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    if !slot.is_table() {
        *slot = toml::Value::Table(toml::Table::new());
    }
    insert(slot.as_table_mut().expect("it has just been made one"), rest, value);
}
