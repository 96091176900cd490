//! The files that a path, a folder or a pattern means.
//!
//! A pattern knows `*` and `?` (within one name) and `**` (any folders, none too); a leading dot must be written, as in a shell.
//!
//! Invariant: the order is by path, so it is the same on every rank; a name that means no file is an error that says the name.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// How much of a file is looked at to tell text from the rest: as git does, a zero byte in it means it is not text.
const SNIFFED_BYTES: u64 = 8000;

/// The files that `pattern` means, sorted. A folder stands for all text files under it, at any depth.
pub fn expand(pattern: &Path) -> Result<Vec<PathBuf>> {
    match fs::metadata(pattern) {
        Ok(metadata) if metadata.is_dir() => return text_files(pattern),
        Ok(_) => return Ok(vec![pattern.to_path_buf()]),
        Err(error) if !has_wildcard(pattern) => {
            let hint = if pattern.starts_with("~") { "; `~` is left to the shell, write the whole path" } else { "" };
            return Err(error).with_context(|| format!("{}: cannot be opened{hint}", pattern.display()));
        }
        Err(_) => {}
    }
    let mut base = PathBuf::new();
    let mut parts = Vec::new();
    for component in pattern.components() {
        match component {
            Component::Normal(name) => parts.push(name.to_string_lossy().into_owned()),
            // Only what stands before the first name may be taken as it is.
            _ if parts.is_empty() => base.push(component),
            _ => parts.push(component.as_os_str().to_string_lossy().into_owned()),
        }
    }
    if parts.last().is_some_and(|last| last == "**") {
        parts.push("*".to_string());
    }
    let mut found = Found::default();
    descend(&base, &parts, &mut Vec::new(), &mut found)?;
    if found.files.is_empty() {
        let folders = if found.folders > 0 { " (it matches folders; add `/**` for the files under them)" } else { "" };
        bail!("the pattern {} matches no file{folders}", pattern.display());
    }
    Ok(found.files.into_iter().collect())
}

/// Whether the path is a pattern: it has `*` or `?`.
pub fn has_wildcard(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().iter().any(|byte| matches!(byte, b'*' | b'?'))
}

#[derive(Default)]
struct Found {
    files: BTreeSet<PathBuf>,
    folders: usize,
}

/// Finds what `parts` mean under `folder`. `above` has the identities of the folders on the way, so that a circle of links ends.
fn descend(folder: &Path, parts: &[String], above: &mut Vec<(u64, u64)>, found: &mut Found) -> Result<()> {
    let Some((part, rest)) = parts.split_first() else { return Ok(()) };
    if part == "**" {
        descend(folder, rest, above, found)?;
        above.push(identity(folder)?);
        for inner in folders_under(folder, above)? {
            descend(&inner, parts, above, found)?;
        }
        above.pop();
        return Ok(());
    }
    let candidates = if part.contains(['*', '?']) {
        let wanted: Vec<char> = part.chars().collect();
        let mut names = entries(folder)?;
        names.retain(|name| matches(&wanted, &name.chars().collect::<Vec<char>>()));
        names.into_iter().map(|name| folder.join(name)).collect()
    } else {
        vec![folder.join(part)]
    };
    for path in candidates {
        // A link that leads nowhere and a name that is not there match nothing.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        match (metadata.is_dir(), rest.is_empty()) {
            (true, true) => found.folders += 1,
            (true, false) => descend(&path, rest, above, found)?,
            (false, true) => drop(found.files.insert(path)),
            (false, false) => {}
        }
    }
    Ok(())
}

/// All text files under a folder, sorted; hidden ones, token files and packed ones are not taken.
fn text_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    collect_text(folder, &mut Vec::new(), &mut files)?;
    files.sort();
    ensure!(
        !files.is_empty(),
        "the folder {} holds no text file; token files are named by a pattern, as in {}",
        folder.display(),
        folder.join("*.bin").display()
    );
    Ok(files)
}

fn collect_text(folder: &Path, above: &mut Vec<(u64, u64)>, files: &mut Vec<PathBuf>) -> Result<()> {
    for name in entries(folder)? {
        let path = folder.join(&name);
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_file() && !name.starts_with('.') && packed(&path).is_none() && looks_like_text(&path)? {
            files.push(path);
        }
    }
    above.push(identity(folder)?);
    for inner in folders_under(folder, above)? {
        collect_text(&inner, above, files)?;
    }
    above.pop();
    Ok(())
}

/// What a file is, by its name, when it is surely not text: raw tokens or a container that must be opened elsewhere first.
pub fn packed(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "bin" => Some("raw tokens"),
        "gz" | "zst" | "bz2" | "xz" | "lz4" | "zip" | "tar" | "tgz" => Some("compressed"),
        "parquet" | "arrow" => Some("a table of columns"),
        "npy" | "npz" | "pt" | "pth" | "safetensors" | "pkl" => Some("arrays of numbers"),
        "mds" | "ds" | "idx" | "index" => Some("part of another program's data set"),
        _ => None,
    }
}

fn looks_like_text(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    file.take(SNIFFED_BYTES).read_to_end(&mut start).with_context(|| format!("reading {}", path.display()))?;
    Ok(!start.contains(&0))
}

/// The folders directly under `folder` that are not hidden and not one of those `above`.
fn folders_under(folder: &Path, above: &[(u64, u64)]) -> Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for name in entries(folder)? {
        let path = folder.join(&name);
        if !name.starts_with('.') && path.is_dir() && !above.contains(&identity(&path)?) {
            folders.push(path);
        }
    }
    Ok(folders)
}

/// Device and number of a folder: the same by whatever path it is reached.
fn identity(folder: &Path) -> Result<(u64, u64)> {
    let metadata = fs::metadata(or_dot(folder)).with_context(|| format!("looking at {}", or_dot(folder).display()))?;
    Ok((metadata.dev(), metadata.ino()))
}

/// The sorted names in a folder. Names that are not UTF-8 cannot be written in a configuration and are left out.
fn entries(folder: &Path) -> Result<Vec<String>> {
    let at = || format!("listing {}", or_dot(folder).display());
    let mut names = Vec::new();
    for entry in fs::read_dir(or_dot(folder)).with_context(at)? {
        names.extend(entry.with_context(at)?.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

fn or_dot(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

/// Whether a name fits a pattern of `*` (any characters) and `?` (one character).
fn matches(pattern: &[char], name: &[char]) -> bool {
    if name.first() == Some(&'.') && pattern.first() != Some(&'.') {
        return false;
    }
    let (mut p, mut n) = (0, 0);
    // Where to go on when the text after the last `*` does not fit: that `*` then takes one character more.
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            retry = Some((p + 1, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((after_star, taken)) = retry {
            retry = Some((after_star, taken + 1));
            p = after_star;
            n = taken + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_as_in_a_shell() {
        let fits = |pattern: &str, name: &str| matches(&pattern.chars().collect::<Vec<_>>(), &name.chars().collect::<Vec<_>>());
        for (pattern, name, expected) in [
            ("*.txt", "a.txt", true),
            ("*.txt", "a.txt.gz", false),
            ("*", "anything", true),
            ("*", ".hidden", false),
            (".*", ".hidden", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a?c", "aäc", true),
            ("*a*b*", "xxaxxaxb", true),
            ("*a*b", "xxaxxb-", false),
            ("part-*-of-*.txt", "part-1-of-2.txt", true),
            ("", "", true),
            ("**", "ab", true),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} against {name}");
        }
    }
}
