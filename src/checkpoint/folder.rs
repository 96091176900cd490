//! The folder that holds the checkpoints of a run: names in it, and changes to it that survive a power cut.
//!
//! Invariant: a file or folder appears under its final name only after its content has reached the disk.

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{OFlags, statvfs};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Bytes that are read or written at once.
pub const CHUNK: usize = 8 << 20;

/// What the name of an entry of the folder says. Names that say nothing here belong to somebody else and are left alone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Name {
    /// `step-00000100`: a checkpoint.
    Step(u64),
    /// `step-00000100.replaced`: a checkpoint that is being replaced by a later one of the same step. It counts until it is gone.
    Replaced(u64),
    /// `step-00000100.3-1.tmp`: the attempt numbered 1 of incarnation 3 to save.
    Attempt { step: u64, incarnation: u64, number: u64 },
    /// `step-00000100.deleted.tmp`: a checkpoint whose deletion has begun.
    Deleted(u64),
}

impl Name {
    pub fn parse(text: &str) -> Option<Name> {
        let (digits, rest) = text.strip_prefix("step-")?.split_at_checked(8)?;
        // Steps past eight digits make the name longer.
        let more = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, rest) = (format!("{digits}{}", &rest[..more]), &rest[more..]);
        let step: u64 = digits.parse().ok()?;
        let name = match rest {
            "" => Name::Step(step),
            ".replaced" => Name::Replaced(step),
            ".deleted.tmp" => Name::Deleted(step),
            _ => {
                let (incarnation, number) = rest.strip_prefix('.')?.strip_suffix(".tmp")?.split_once('-')?;
                Name::Attempt { step, incarnation: incarnation.parse().ok()?, number: number.parse().ok()? }
            }
        };
        (name.text() == text).then_some(name)
    }

    pub fn text(self) -> String {
        match self {
            Name::Step(step) => format!("step-{step:08}"),
            Name::Replaced(step) => format!("step-{step:08}.replaced"),
            Name::Deleted(step) => format!("step-{step:08}.deleted.tmp"),
            Name::Attempt { step, incarnation, number } => format!("step-{step:08}.{incarnation}-{number}.tmp"),
        }
    }
}

/// Every entry of `checkpoints` whose name is one of ours, in order. A folder that is not there has none.
pub fn names(checkpoints: &Path) -> Result<Vec<Name>> {
    let entries = match fs::read_dir(checkpoints) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("listing {}", checkpoints.display())),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", checkpoints.display()))?;
        names.extend(entry.file_name().to_str().and_then(Name::parse));
    }
    names.sort();
    Ok(names)
}

/// Makes what the folder lists survive a power cut.
pub fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|file| file.sync_all()).with_context(|| format!("syncing the folder {}", folder.display()))
}

/// Creates the folder and the ones above it that are missing.
pub fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating the folder {}", folder.display()))?;
    let kind = fs::symlink_metadata(folder).with_context(|| format!("looking at {}", folder.display()))?;
    ensure!(kind.is_dir(), "{} is not a folder; links are not followed here", folder.display());
    Ok(())
}

pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("renaming {} to {}", from.display(), to.display()))
}

/// Whether there is anything under this name, a broken link included.
pub fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("looking at {}", path.display())),
    }
}

/// Opens a file anew for writing; what was there is gone. A link is not followed.
pub fn create_file(path: &Path) -> Result<File> {
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let options = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path);
    options.with_context(|| format!("creating {}", path.display()))
}

/// Puts `bytes` under `path` in one step: readers see the old content or all of the new one, also after a power cut.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().with_context(|| format!("{} has no folder", path.display()))?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let beside = PathBuf::from(beside);
    let mut file = create_file(&beside)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).with_context(|| format!("writing {}", beside.display()))?;
    drop(file);
    rename(&beside, path)?;
    sync(folder)
}

/// A new folder beside `out`, to be filled and then published as `out`, which is not there yet or is an empty folder.
pub fn stage(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().with_context(|| format!("{} cannot be the name of a new folder", out.display()))?;
    if exists(out)? {
        let empty = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
        ensure!(empty, "{} exists and is not an empty folder; it will not be written over", out.display());
    }
    let mut name = name.to_owned();
    name.push(".tmp");
    let stage = out.with_file_name(name);
    fs::create_dir_all(parent(out)).with_context(|| format!("creating the folder {}", parent(out).display()))?;
    fs::create_dir(&stage)
        .with_context(|| format!("creating {} (if it was left by a call that was cut short, remove it)", stage.display()))?;
    Ok(stage)
}

/// Gives the folder its name, once all that is in it has reached the disk.
pub fn publish(stage: &Path, out: &Path) -> Result<()> {
    sync(stage)?;
    rename(stage, out)?;
    sync(parent(out))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes a checkpoint: it loses its name first, so that it is never seen in parts.
pub fn discard(checkpoints: &Path, name: Name) -> Result<()> {
    let (Name::Step(step) | Name::Replaced(step)) = name else {
        return remove_tree(&checkpoints.join(name.text()));
    };
    let aside = checkpoints.join(Name::Deleted(step).text());
    remove_tree(&aside)?;
    rename(&checkpoints.join(name.text()), &aside)?;
    sync(checkpoints)?;
    remove_tree(&aside)
}

/// Removes a folder and what is in it. That it is gone already is fine.
pub fn remove_tree(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(|| format!("removing {}", folder.display())),
        _ => Ok(()),
    }
}

/// Fails when the file system that holds `folder` has not got room for `bytes` and a tenth more.
///
/// Root's reserve does not count as room. Writing can still fail later: others write there too.
pub fn check_space(folder: &Path, bytes: u64) -> Result<()> {
    let status = statvfs(folder).with_context(|| format!("asking how much room there is in {}", folder.display()))?;
    let free = status.f_bavail.saturating_mul(status.f_frsize);
    let needed = bytes.saturating_add(bytes / 10);
    if free < needed {
        bail!(
            "not enough room in {}: {} needed ({} and a tenth more), {} free, {} missing",
            folder.display(),
            mebibytes(needed),
            mebibytes(bytes),
            mebibytes(free),
            mebibytes(needed - free)
        );
    }
    Ok(())
}

/// A number of bytes for people.
pub fn mebibytes(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{bytes} bytes"),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64),
        _ => format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}

/// Refuses what could lead out of its folder.
pub fn check_file_name(name: &str) -> Result<()> {
    let plain = !name.is_empty() && !name.contains(['/', '\\', '\0']) && name != "." && name != ".." && !name.starts_with('.');
    ensure!(plain, "{name:?} is not the plain name of a file in the same folder");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for name in [
            Name::Step(0),
            Name::Step(123_456_789_012),
            Name::Replaced(7),
            Name::Deleted(7),
            Name::Attempt { step: 100, incarnation: 3, number: 12 },
        ] {
            assert_eq!(Name::parse(&name.text()), Some(name));
        }
        for other in
            ["step-", "step-1", "step-000000001", "step-00000001.tmp", "step-00000001.-1.tmp", "step-00000001x", "latest", "stép-00000001"]
        {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }

    #[test]
    fn room_is_asked_for_before_it_is_needed() {
        let folder = std::env::temp_dir();
        check_space(&folder, 1).expect("one byte fits");
        let error = check_space(&folder, u64::MAX / 2).expect_err("exabytes do not fit").to_string();
        assert!(error.contains("missing") && error.contains(&folder.display().to_string()), "{error}");
    }
}
