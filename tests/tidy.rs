//! The rules of the house, held by reading the sources as text: which room may import from which, where `unsafe`, clocks and the
//! environment may stand, how long files get, and that the map in ARCHITECTURE.md shows the house as it is.
//!
//! Invariant: every rule is a function from one file to its offences, and is itself shown an offence it must see (`rules_bite`).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// From the roof to the ground. A room imports from floors below its own; `main.rs` stands on top of all, `lib.rs` only lists them.
const FLOORS: [&[&str]; 6] = [
    &["train"],
    &["model", "bench"],
    &["parallel"],
    &["ops", "comm", "checkpoint"],
    &["plan", "data", "device"],
    &["config", "shape", "dtype", "elementary", "rng", "launch"],
];

/// Imports between rooms of one floor that we allow, with the reason. One that nobody uses any more has to go.
const NEIGHBOURS: &[(&str, &str)] = &[
    ("config", "dtype"),   // [train] names a dtype
    ("rng", "elementary"), // a normal is a logarithm and a sine
];

/// A macro is exported at the root of the crate, wherever it is written: (macro, its room).
const MACROS: &[(&str, &str)] = &[("dispatch", "dtype"), ("args", "device")];

/// Imports that point down and are forbidden all the same.
const STRANGERS: &[(&str, &str)] = &[
    ("checkpoint", "device"), // host bytes only: a checkpoint knows neither devices nor tensors
    ("plan", "launch"),       // decisions are pure: they see no process and no environment
    ("plan", "rng"),          // and nothing random
    ("ops", "config"),        // an operation is given values, not options
    ("device", "config"),
];

const UNSAFE: &[&str] = &[
    "src/device/cpu.rs",
    "src/launch/spawn.rs",
    "src/device/cpu/",
    "src/device/gpu/cuda/",
    "src/device/mapped.rs",
    "src/comm/nccl.rs",
    "src/comm/shared_memory.rs",
    "src/data/corpus.rs",
];
const ENVIRONMENT: &[&str] = &["src/launch/identity.rs"];
const CLOCKS: &[&str] = &["src/train/report.rs", "src/comm/", "src/launch/", "src/bench/"];

const LINES_OF_SOURCE: usize = 500;
const LINES_OF_TEST: usize = 600;
const LINES_OF_FUNCTION: usize = 70;

/// A file: as written, and with comments and the insides of literals blanked. Both have the same lines.
struct Source {
    path: String,
    raw: Vec<String>,
    code: Vec<String>,
    /// Whether a line belongs to an item under `#[cfg(test)]`.
    test: Vec<bool>,
}

/// Line number (from 1) and what is wrong there.
type Offence = (usize, String);

impl Source {
    fn new(path: &str, text: &str) -> Source {
        let lines = |text: &str| text.split('\n').map(str::to_owned).collect::<Vec<_>>();
        let code = lines(&blanked(text));
        let test = test_lines(&code);
        Source { path: path.to_owned(), raw: lines(text), code, test }
    }

    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| if place.ends_with('/') { self.path.starts_with(place) } else { self.path == *place })
    }

    /// `train` for `src/train/run.rs`, `config` for `src/config.rs`.
    fn room(&self) -> &str {
        let inside = self.path.strip_prefix("src/").expect("a path under src/");
        inside.split('/').next().expect("split gives one part at least").trim_end_matches(".rs")
    }

    /// Lines of code outside tests, numbered from 1.
    fn product(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code.iter().zip(&self.test).enumerate().filter(|(_, (_, test))| !**test).map(|(i, (line, _))| (i + 1, line.as_str()))
    }

    fn everywhere(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code.iter().enumerate().map(|(i, line)| (i + 1, line.as_str()))
    }
}

/// The text with comments, and the insides of strings and characters, replaced by blanks. Line breaks stay.
fn blanked(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = chars.clone();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut blank = |from: usize, to: usize| out[from..to].iter_mut().filter(|c| **c != '\n').for_each(|c| *c = ' ');
    let mut i = 0;
    while i < chars.len() {
        let end = match (at(i), at(i + 1)) {
            ('/', '/') => (i..chars.len()).find(|&j| at(j) == '\n').unwrap_or(chars.len()),
            ('/', '*') => block_comment_end(&chars, i),
            ('r', '"' | '#') if i == 0 || !is_word(at(i - 1)) || at(i - 1) == 'b' => raw_string_end(&chars, i).unwrap_or(i),
            ('"', _) => literal_end(&chars, i, '"'),
            ('\'', '\\') => literal_end(&chars, i, '\''),
            ('\'', _) if at(i + 2) == '\'' => i + 3,
            _ => i,
        };
        if end > i {
            let literal = at(i) != '/';
            if literal {
                blank(i + 1, end - 1)
            } else {
                blank(i, end)
            }
            i = end;
        } else {
            i += 1;
        }
    }
    out.into_iter().collect()
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i + 1 < chars.len() {
        match (chars[i], chars[i + 1]) {
            ('/', '*') => (depth, i) = (depth + 1, i + 2),
            ('*', '/') => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            return i;
        }
    }
    chars.len()
}

/// None: a raw identifier, not a string.
fn raw_string_end(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    let open = start + 1 + hashes;
    (chars.get(open) == Some(&'"')).then(|| {
        let closes = |&i: &usize| chars[i] == '"' && chars[i + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
        (open + 1..chars.len()).find(closes).map_or(chars.len(), |i| i + 1 + hashes)
    })
}

fn literal_end(chars: &[char], start: usize, quote: char) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != quote {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    (i + 1).min(chars.len())
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Marks the lines from each `#[cfg(test)]` to the end of the item it stands on.
fn test_lines(code: &[String]) -> Vec<bool> {
    let mut marks = vec![false; code.len()];
    for start in (0..code.len()).filter(|&i| code[i].trim_start().starts_with("#[cfg(test)]")) {
        let end = item_end(code, start);
        marks[start..=end].fill(true);
    }
    marks
}

/// The line on which the item that starts at `start` closes its braces, or ends in a semicolon before it opened any.
fn item_end(code: &[String], start: usize) -> usize {
    let (mut depth, mut inner) = (0, 0);
    for (i, line) in code.iter().enumerate().skip(start) {
        for c in line.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                '(' | '[' => inner += 1,
                ')' | ']' => inner -= 1,
                _ => {}
            }
            if (c == '}' && depth == 0) || (c == ';' && depth == 0 && inner == 0) {
                return i;
            }
        }
    }
    code.len() - 1
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word)
        .any(|(i, _)| !line[..i].chars().next_back().is_some_and(is_word) && !line[i + word.len()..].chars().next().is_some_and(is_word))
}

/// Every room that a file names by `crate::room` or `crate::{room, ...}`, with the line.
fn rooms_named(source: &Source) -> Vec<(usize, String)> {
    let text = source.code.join("\n");
    let word = |from: &str| {
        let name: String = from.chars().take_while(|c| is_word(*c)).collect();
        MACROS.iter().find(|(of, _)| *of == name).map_or(name, |(_, room)| room.to_string())
    };
    let mut rooms = Vec::new();
    for (i, _) in text.match_indices("crate::") {
        let line = text[..i].matches('\n').count() + 1;
        let rest = &text[i + "crate::".len()..];
        let Some(list) = rest.strip_prefix('{') else {
            rooms.push((line, word(rest)));
            continue;
        };
        let mut depth = 1;
        let mut fresh = true;
        for (j, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => fresh = true,
                c if fresh && is_word(c) => {
                    rooms.push((line, word(&list[j..])));
                    fresh = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    rooms
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

fn imports_point_down(source: &Source) -> Vec<Offence> {
    let here = source.room();
    let Some(mine) = floor(here) else {
        let known = here == "main" || here == "lib";
        return if known { Vec::new() } else { vec![(1, format!("the room `{here}` stands on no floor: give it one in tests/tidy.rs"))] };
    };
    let verdict = |room: &str| match floor(room) {
        None => Some(format!("`crate::{room}` is no room of the house")),
        Some(_) if room == here || NEIGHBOURS.contains(&(here, room)) => None,
        Some(_) if STRANGERS.contains(&(here, room)) => Some(format!("`{here}` must not know of `{room}`")),
        Some(theirs) if theirs == mine => Some(format!("`{here}` and `{room}` are on one floor: neither imports the other")),
        Some(theirs) if theirs < mine => Some(format!("`{here}` is below `{room}`: imports point down")),
        Some(_) => None,
    };
    let mut offences: Vec<_> = rooms_named(source).into_iter().filter_map(|(line, room)| Some((line, verdict(&room)?))).collect();
    offences
        .extend(source.everywhere().filter(|(_, line)| line.contains("super::super")).map(|(i, _)| (i, "name it from `crate::`".into())));
    offences
}

fn names_have_one_path(source: &Source) -> Vec<Offence> {
    let mut offences = Vec::new();
    for (i, line) in source.everywhere() {
        let item = line.trim_start();
        let public = item.starts_with("pub use ") || (item.starts_with("pub(") && item.contains(") use "));
        if public {
            offences.push((i, "no re-exports: a name has one path".to_owned()));
        }
        if public || item.starts_with("use ") {
            let statement: String = source.code[i - 1..=item_end(&source.code, i - 1)].concat();
            let glob = statement.contains('*') && !(source.test[i - 1] && statement.trim() == "use super::*;");
            if glob {
                offences.push((i, "no glob imports (but `use super::*` in a test module)".to_owned()));
            }
        }
    }
    offences
}

fn unsafe_is_where_it_may_be(source: &Source) -> Vec<Offence> {
    let mut offences = Vec::new();
    for (i, line) in source.everywhere() {
        if (has_word(line, "unsafe") || has_word(line, "unsafe_code")) && !source.is_in(UNSAFE) {
            offences.push((i, format!("`unsafe` belongs in {}", UNSAFE.join(", "))));
        } else if line.contains("unsafe {") || line.contains("unsafe impl") {
            let above = &source.raw[i.saturating_sub(9)..i];
            if !above.iter().any(|line| line.contains("SAFETY:")) {
                offences.push((i, "say in `// SAFETY:` just above why this is sound".to_owned()));
            }
        }
    }
    offences
}

fn outside_world_is_read_in_few_places(source: &Source) -> Vec<Offence> {
    let mut offences = Vec::new();
    for (i, line) in source.product() {
        if line.contains("env::") && !source.is_in(ENVIRONMENT) {
            offences.push((i, format!("the environment is read in {} only", ENVIRONMENT.join(", "))));
        }
        if ["Instant", "SystemTime"].iter().any(|word| has_word(line, word)) && !source.is_in(CLOCKS) {
            offences.push((i, format!("clocks are read in {} only", CLOCKS.join(", "))));
        }
    }
    offences
}

fn code_is_finished(source: &Source) -> Vec<Offence> {
    let mut offences = Vec::new();
    for (i, line) in source.everywhere() {
        for unfinished in ["todo!", "unimplemented!", "dbg!"] {
            if line.contains(unfinished) {
                offences.push((i, format!("`{unfinished}` is not finished code")));
            }
        }
        if line.contains(".unwrap()") {
            offences.push((i, "`expect(\"why it cannot fail\")`, or an error, in place of `unwrap()`".to_owned()));
        }
        if (line.contains("#[allow(") || line.contains("#![allow(")) && !line.contains("allow(unsafe_code)") {
            offences.push((i, "mend what the lint found in place of allowing it".to_owned()));
        }
    }
    let notes = ["TODO", "FIXME", "XXX"];
    let noted = source.raw.iter().enumerate().filter(|(_, line)| notes.iter().any(|note| has_word(line, note)));
    offences.extend(noted.map(|(i, _)| (i + 1, "an open end belongs in an issue".to_owned())));
    offences
}

fn files_are_introduced_and_short(source: &Source) -> Vec<Offence> {
    let limit = if source.path.starts_with("src/") { LINES_OF_SOURCE } else { LINES_OF_TEST };
    let lines = source.raw.len() - 1;
    let mut offences = Vec::new();
    if !source.raw[0].starts_with("//! ") {
        offences.push((1, "a file opens with `//! ` and what it is for".to_owned()));
    }
    if lines > limit {
        offences.push((limit + 1, format!("{lines} lines, at most {limit}: two things share this file")));
    }
    for (i, line) in source.product().filter(|_| source.path.starts_with("src/")) {
        let item = line.trim_start();
        if has_word(item, "fn") && item.ends_with('{') {
            let length = item_end(&source.code, i - 1) + 2 - i;
            if length > LINES_OF_FUNCTION {
                offences.push((i, format!("a function of {length} lines, at most {LINES_OF_FUNCTION}")));
            }
        }
    }
    offences
}

fn lib_only_lists(source: &Source) -> Vec<Offence> {
    let is_list = |line: &str| line.is_empty() || (line.starts_with("pub mod ") && line.ends_with(';'));
    let others = source.everywhere().filter(|(_, line)| source.path == "src/lib.rs" && !is_list(line.trim()));
    others.map(|(i, _)| (i, "lib.rs lists the rooms and does nothing else".to_owned())).collect()
}

type Rule = fn(&Source) -> Vec<Offence>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files under a folder of the repository, sorted by path.
fn files_under(folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap_or_else(|e| panic!("reading {folder}: {e}")) {
            let entry = entry.expect("a readable folder entry");
            let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                folders.push(path);
            } else if path.ends_with(".rs") {
                let text = fs::read_to_string(entry.path()).unwrap_or_else(|e| panic!("reading {path}: {e}"));
                found.push(Source::new(&path, &text));
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn hold(rule: Rule, folders: &[&str]) {
    let sources: Vec<_> = folders.iter().flat_map(|folder| files_under(folder)).collect();
    assert!(!sources.is_empty(), "no sources in {folders:?}");
    let offences: Vec<String> =
        sources.iter().flat_map(|source| rule(source).into_iter().map(|(line, what)| format!("{}:{line}: {what}", source.path))).collect();
    assert!(offences.is_empty(), "\n{}\n", offences.join("\n"));
}

#[test]
fn rooms_import_from_lower_floors_only() {
    hold(imports_point_down, &["src"]);
}

#[test]
fn allowed_neighbours_are_neighbours_still() {
    let used: BTreeSet<(String, String)> = files_under("src")
        .iter()
        .flat_map(|source| rooms_named(source).into_iter().map(|(_, room)| (source.room().to_owned(), room)))
        .collect();
    for (from, to) in NEIGHBOURS {
        assert!(floor(from) == floor(to), "tests/tidy.rs: `{from}` and `{to}` are not on one floor");
        assert!(used.contains(&(from.to_string(), to.to_string())), "tests/tidy.rs: `{from}` no longer imports `{to}`: take the pair out");
    }
}

#[test]
fn a_name_has_one_path() {
    hold(names_have_one_path, &["src"]);
}

#[test]
fn unsafe_code_is_confined_and_argued() {
    hold(unsafe_is_where_it_may_be, &["src"]);
}

#[test]
fn environment_and_clocks_are_confined() {
    hold(outside_world_is_read_in_few_places, &["src"]);
}

#[test]
fn nothing_is_half_done() {
    hold(code_is_finished, &["src"]);
}

#[test]
fn files_and_functions_are_short_and_introduced() {
    hold(files_are_introduced_and_short, &["src", "tests"]);
}

#[test]
fn lib_is_a_list() {
    hold(lib_only_lists, &["src"]);
}

/// The files of the tree in ARCHITECTURE.md: the fenced block whose first line is `src/`, two blanks of indent a level, a name, a few words.
fn tree_of_architecture(text: &str) -> BTreeSet<String> {
    let mut lines = text.lines().enumerate().skip_while(|(_, line)| *line != "src/").peekable();
    assert!(lines.peek().is_some(), "ARCHITECTURE.md: no fenced block that starts with the line `src/`");
    let mut folders: Vec<&str> = Vec::new();
    let mut files = BTreeSet::new();
    for (i, line) in lines.take_while(|(_, line)| !line.starts_with("```")) {
        let level = (line.len() - line.trim_start().len()) / 2;
        let (name, words) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        assert!(level <= folders.len(), "ARCHITECTURE.md:{}: `{name}` is indented too far", i + 1);
        folders.truncate(level);
        if name.ends_with('/') {
            folders.push(name);
        } else {
            assert!(!words.trim().is_empty(), "ARCHITECTURE.md:{}: `{name}` needs a few words on what it is", i + 1);
            assert!(files.insert(format!("{}{name}", folders.concat())), "ARCHITECTURE.md:{}: `{name}` stands there twice", i + 1);
        }
    }
    files
}

#[test]
fn the_tree_in_the_architecture_is_the_tree() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md at the root");
    let drawn = tree_of_architecture(&text);
    let real: BTreeSet<String> = files_under("src").into_iter().map(|source| source.path).collect();
    let missing: Vec<_> = real.difference(&drawn).map(|path| format!("{path}:1: not in the tree of ARCHITECTURE.md")).collect();
    let gone: Vec<_> =
        drawn.difference(&real).map(|path| format!("{path}: in the tree of ARCHITECTURE.md, but there is no such file")).collect();
    assert!(missing.is_empty() && gone.is_empty(), "\n{}\n", [missing, gone].concat().join("\n"));
}

#[test]
fn rules_bite() {
    let long = format!("//! x\nfn f() {{\n{}}}\n", "    g();\n".repeat(69));
    let cases: &[(Rule, &str, &str, usize)] = &[
        (imports_point_down, "src/ops/a.rs", "use crate::shape::Shape;\nuse crate::{dtype::{A, B},\n model::stage};\n", 2),
        (imports_point_down, "src/dtype.rs", "use crate::shape::Shape;\ncrate::dispatch!(x);\n", 1),
        (imports_point_down, "src/plan/a.rs", "// crate::train\nlet x = crate::device::Device::dry();\n", 2),
        (imports_point_down, "src/checkpoint/a.rs", "use crate::device::Device;\n", 1),
        (imports_point_down, "src/attic/a.rs", "//! x\n", 1),
        (imports_point_down, "src/ops/a.rs", "use super::super::train::run;\n", 1),
        (names_have_one_path, "src/ops/a.rs", "use a::b;\npub use c::d;\n", 2),
        (names_have_one_path, "src/ops/a.rs", "use a::{\n b::*,\n};\n", 1),
        (names_have_one_path, "src/ops/a.rs", "#[cfg(test)]\nmod tests {\n    use super::*;\n    use a::*;\n}\n", 4),
        (unsafe_is_where_it_may_be, "src/ops/a.rs", "let s = \"unsafe\"; // unsafe\nunsafe { f() }\n", 2),
        (unsafe_is_where_it_may_be, "src/device/cpu.rs", "unsafe { f() }\n", 1),
        (outside_world_is_read_in_few_places, "src/train/run.rs", "let c = '\"';\nlet x = std::env::var(\"X\");\n", 2),
        (outside_world_is_read_in_few_places, "src/train/run.rs", "let t = Instant::now();\n", 1),
        (code_is_finished, "src/ops/a.rs", "let s = r#\"x.unwrap()\"#;\nlet y = x.unwrap();\n", 2),
        (code_is_finished, "src/ops/a.rs", "#[allow(dead_code)]\nfn f() {}\n", 1),
        (files_are_introduced_and_short, "src/ops/a.rs", "use a::b;\n", 1),
        (files_are_introduced_and_short, "src/ops/a.rs", &long, 2),
        (lib_only_lists, "src/lib.rs", "//! x\npub mod a;\nfn f() {}\n", 3),
    ];
    for (rule, path, text, line) in cases {
        let offences = rule(&Source::new(path, text));
        assert_eq!(offences.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [*line], "in {path}:\n{text}\n{offences:?}");
    }
}
