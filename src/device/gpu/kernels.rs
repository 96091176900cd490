//! The kernels that this program brings along: PTX, made of `cuda/*.cu` by `scripts/kernels.py`.
//!
//! A driver turns PTX into machine code, so one text serves every GPU of an architecture and later ones.

use std::collections::HashMap;
use std::sync::OnceLock;

/// One file of kernels.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub name: &'static str,
    sm_80: &'static str,
    sm_90a: &'static str,
}

/// Whose instructions the PTX may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    /// Compute capability 8.0 and everything after it.
    Sm80,
    /// Compute capability 9.0 and nothing else.
    Sm90a,
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(Source {
            name: $name,
            sm_80: include_str!(concat!("../../../cuda/ptx/", $name, ".sm_80.ptx")),
            sm_90a: include_str!(concat!("../../../cuda/ptx/", $name, ".sm_90a.ptx")),
        }),*]
    };
}

pub const SOURCES: &[Source] = sources![
    "activation",
    "adamw",
    "attention_backward",
    "attention_forward",
    "chunks",
    "cross_entropy",
    "elementwise",
    "embedding",
    "exact",
    "instructions",
    "matmul",
    "norm",
    "reduce",
    "rope",
    "select"
];

impl Source {
    pub fn ptx(&self, architecture: Architecture) -> &'static str {
        match architecture {
            Architecture::Sm80 => self.sm_80,
            Architecture::Sm90a => self.sm_90a,
        }
    }

    /// The names of the kernels in it.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        let names = self.sm_80.lines().filter_map(|line| line.split_once(".entry "));
        names.map(|(_, rest)| rest.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
    }
}

/// The file that has `kernel`.
pub fn find(kernel: &str) -> Option<&'static Source> {
    // The texts are megabytes, and every launch asks.
    static FILES: OnceLock<HashMap<&str, &Source>> = OnceLock::new();
    let files = FILES.get_or_init(|| SOURCES.iter().flat_map(|source| source.kernels().map(move |kernel| (kernel, source))).collect());
    files.get(kernel).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_begin_with_the_name_of_their_file_and_are_there_once() {
        let mut names: Vec<&str> = SOURCES.iter().flat_map(Source::kernels).collect();
        for source in SOURCES {
            assert!(source.kernels().count() > 0, "no kernels in {}", source.name);
            source.kernels().for_each(|kernel| assert!(kernel.starts_with(&format!("{}_", source.name)), "{kernel} in {}.cu", source.name));
            assert!(source.kernels().eq(SOURCES.iter().find(|other| other.name == source.name).expect("itself").kernels()));
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(find("elementwise_add_bf16").is_some_and(|source| source.name == "elementwise"));
        assert!(find("elementwise_add").is_none());
    }
}
