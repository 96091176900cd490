//! Reading a checkpoint: any box of any tensor, whatever boxes it was saved in; and finding the newest sound one.
//!
//! Invariant: nothing is read from a folder whose index and file sizes do not fit, and every error names the file.

use crate::checkpoint::boxes::{self, Area, Stored};
use crate::checkpoint::folder::{self, Name};
use crate::checkpoint::index::{INDEX, Index, Kind, Tensor};
use crate::checkpoint::safetensors::{self, Reader};
use crate::dtype::Dtype;
use crate::plan::layout::Piece;
use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::{IntoParallelIterator, ParallelIterator};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A checkpoint whose index is sound and whose files have the sizes it gives.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    pub index: Index,
}

/// What `verify` looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    pub files: usize,
    pub tensors: usize,
    pub bytes: u64,
}

/// A checkpoint that was passed over, and why.
#[derive(Debug)]
pub struct Skipped {
    pub folder: PathBuf,
    pub reason: String,
}

impl Checkpoint {
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        if !folder::exists(&folder.join(INDEX))? {
            bail!("{} is not a checkpoint: it has no {INDEX}{}", folder.display(), nearest(folder)?);
        }
        let index = Index::read(folder)?;
        for (name, sum) in &index.files {
            let path = folder.join(name);
            let kind = fs::symlink_metadata(&path).with_context(|| format!("{} is listed in {INDEX}", path.display()))?;
            ensure!(kind.is_file(), "{} is not a regular file; links are not followed in a checkpoint", path.display());
            ensure!(kind.len() == sum.bytes, "{} has {} bytes, and {INDEX} says {}", path.display(), kind.len(), sum.bytes);
        }
        for entry in fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))? {
            let path = entry.with_context(|| format!("listing {}", folder.display()))?.path();
            let listed = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| index.files.contains_key(name));
            let ours = path.extension().is_some_and(|extension| extension == "safetensors");
            ensure!(listed || !ours, "{} is not listed in {INDEX}: it belongs to something else", path.display());
        }
        Ok(Checkpoint { folder: folder.to_owned(), index })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether there are tensors of this kind; an imported checkpoint has weights alone.
    pub fn has(&self, kind: Kind) -> bool {
        self.index.tensors.contains_key(&kind)
    }

    /// The tensors of a kind by name; none if there are none.
    pub fn tensors(&self, kind: Kind) -> impl Iterator<Item = (&str, &Tensor)> {
        self.index.tensors.get(&kind).into_iter().flatten().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Reads every byte, holds it to the checksums, and holds every file's header to the index.
    pub fn verify(&self) -> Result<Report> {
        self.verify_share(0, 1)?;
        let tensors = self.index.tensors.values().map(BTreeMap::len).sum();
        Ok(Report { files: self.index.files.len(), tensors, bytes: self.index.bytes() })
    }

    /// Verifies every `ranks`-th file, beginning with the one numbered `rank`, so that many ranks can share the work.
    pub fn verify_share(&self, rank: usize, ranks: usize) -> Result<()> {
        assert!(rank < ranks, "rank {rank} of {ranks}");
        let boxes = self.boxes_by_file();
        let files: Vec<_> = self.index.files.iter().skip(rank).step_by(ranks).collect();
        files.into_par_iter().try_for_each(|(name, stored)| {
            let path = self.folder.join(name);
            let sum = safetensors::sum(&path)?;
            ensure!(sum.bytes == stored.bytes, "{} has {} bytes, and {INDEX} says {}", path.display(), sum.bytes, stored.bytes);
            let (found, said) = (sum.crc64, stored.crc64);
            ensure!(found == said, "{} was altered: its checksum is {found:016x}, and {INDEX} says {said:016x}", path.display());
            let reader = Reader::open_strictly(&path)?;
            let boxes = &boxes[name.as_str()];
            for (tensor, stored) in boxes {
                check_box(&reader, tensor, &stored.key, &stored.size)?;
            }
            let (there, listed) = (reader.tensors.len(), boxes.len());
            ensure!(there == listed, "{} holds {there} tensors, and {INDEX} lists {listed}", path.display());
            Ok(())
        })
    }

    /// Fills the pieces' ranges of `out`, a buffer of `dtype`, from the tensors of `kind`. What lies between pieces stays as it is.
    pub fn read(&self, kind: Kind, pieces: &[Piece], dtype: Dtype, out: &mut [u8]) -> Result<()> {
        let tensors = self.index.tensors.get(&kind).with_context(|| format!("{} holds no {kind}", self.folder.display()))?;
        // Files are opened one after the other: a checkpoint of many ranks has more of them than a process may hold open.
        let mut wanted: BTreeMap<&str, Vec<(&Piece, &Tensor, usize)>> = BTreeMap::new();
        for piece in pieces {
            let tensor = tensors
                .get(&piece.name)
                .with_context(|| format!("{} holds no tensor {:?} of {kind}", self.folder.display(), piece.name))?;
            let (there, asked) = (&tensor.shape, &piece.shape);
            ensure!(there == asked, "{:?} has the shape {there:?} in {}, not {asked:?}", piece.name, self.folder.display());
            for (number, stored) in tensor.boxes.iter().enumerate() {
                wanted.entry(&stored.file).or_default().push((piece, tensor, number));
            }
        }
        let mut copied = 0;
        for (file, boxes) in wanted {
            let mut reader = None;
            for (piece, tensor, number) in boxes {
                let stored = &tensor.boxes[number];
                let area = Area::of(&tensor.shape, &stored.start, &stored.size)?;
                if area.intersection(&boxes::area_of(piece, out.len() / dtype.bytes())?).is_none() {
                    continue;
                }
                let reader: &Reader = match &mut reader {
                    Some(reader) => reader,
                    empty => empty.insert(Reader::open_strictly(&self.folder.join(file))?),
                };
                let begin = check_box(reader, tensor, &stored.key, &stored.size)?;
                copied += boxes::read(&Stored { reader, begin, dtype: tensor.dtype, area }, piece, dtype, out)?;
            }
        }
        let wanted: u128 = pieces.iter().map(|piece| piece.flat.len() as u128).sum();
        assert_eq!(copied, wanted, "elements copied from boxes that tile, and elements asked for");
        Ok(())
    }

    fn boxes_by_file(&self) -> BTreeMap<&str, Vec<(&Tensor, &crate::checkpoint::index::StoredBox)>> {
        let mut boxes: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for tensor in self.index.tensors.values().flat_map(BTreeMap::values) {
            for stored in &tensor.boxes {
                boxes.entry(stored.file.as_str()).or_default().push((tensor, stored));
            }
        }
        boxes
    }
}

/// Holds what a file says of a box to what the index says; gives the position of its bytes.
fn check_box(reader: &Reader, tensor: &Tensor, key: &str, size: &[usize]) -> Result<u64> {
    let found = reader.find(key)?;
    let file = reader.path().display();
    let dtype = found.dtype().with_context(|| format!("{key:?} in {file}"))?;
    ensure!(dtype == tensor.dtype, "{key:?} in {file} is {dtype}, and {INDEX} says {}", tensor.dtype);
    ensure!(found.shape == size, "{key:?} in {file} has the shape {:?}, and {INDEX} says {size:?}", found.shape);
    Ok(found.begin)
}

/// Opens the checkpoint of a step.
pub fn by_step(checkpoints: &Path, step: u64) -> Result<Checkpoint> {
    let name = if folder::exists(&checkpoints.join(Name::Step(step).text()))? { Name::Step(step) } else { Name::Replaced(step) };
    let folder = checkpoints.join(name.text());
    if !folder::exists(&folder)? {
        let steps = checkpoint_names(checkpoints)?.into_iter().map(|name| name.text()).collect::<Vec<_>>().join(", ");
        let there = if steps.is_empty() { "no checkpoint is there".to_owned() } else { format!("there are {steps}") };
        bail!("{} holds no checkpoint of step {step}: {there}", checkpoints.display());
    }
    Checkpoint::open(&folder)
}

/// The newest checkpoint that verifies in full, and those that are newer and do not.
///
/// None: there is no checkpoint at all. Checkpoints of which not one verifies are an error, so that no run starts over by mistake.
pub fn newest_verified(checkpoints: &Path) -> Result<Option<(Checkpoint, Vec<Skipped>)>> {
    let (sound, mut skipped) = newest_first(checkpoints)?;
    for checkpoint in sound {
        match checkpoint.verify() {
            Ok(_) => return Ok(Some((checkpoint, skipped))),
            Err(error) => skipped.push(Skipped { folder: checkpoint.folder, reason: format!("{error:#}") }),
        }
    }
    if skipped.is_empty() {
        return Ok(None);
    }
    let reasons: Vec<String> = skipped.iter().map(|skipped| format!("\n  {}: {}", skipped.folder.display(), skipped.reason)).collect();
    bail!("{} holds checkpoints, and not one is sound; none of them is used:{}", checkpoints.display(), reasons.concat())
}

/// All checkpoints whose index is sound, the one that was committed last first; and the others.
///
/// A later incarnation is newer whatever its step: a run that went back to step 50 leaves an abandoned step 100 behind.
pub fn newest_first(checkpoints: &Path) -> Result<(Vec<Checkpoint>, Vec<Skipped>)> {
    let (mut sound, mut skipped) = (Vec::new(), Vec::new());
    for name in checkpoint_names(checkpoints)? {
        let folder = checkpoints.join(name.text());
        let (Name::Step(step) | Name::Replaced(step)) = name else { continue };
        match open_as(&folder, step) {
            Ok(checkpoint) => sound.push((name, checkpoint)),
            Err(error) => skipped.push(Skipped { folder, reason: format!("{error:#}") }),
        }
    }
    sound.sort_by_key(|(name, checkpoint)| {
        Reverse((checkpoint.index.incarnation, checkpoint.index.facts.step, matches!(name, Name::Step(_))))
    });
    Ok((sound.into_iter().map(|(_, checkpoint)| checkpoint).collect(), skipped))
}

fn open_as(folder: &Path, step: u64) -> Result<Checkpoint> {
    let kind = fs::symlink_metadata(folder).with_context(|| format!("looking at {}", folder.display()))?;
    ensure!(kind.is_dir(), "{} is not a folder; links are not followed here", folder.display());
    let checkpoint = Checkpoint::open(folder)?;
    let said = checkpoint.index.facts.step;
    ensure!(said == step, "{} holds the checkpoint of step {said}", folder.display());
    Ok(checkpoint)
}

fn checkpoint_names(checkpoints: &Path) -> Result<BTreeSet<Name>> {
    let names = folder::names(checkpoints)?;
    Ok(names.into_iter().filter(|name| matches!(name, Name::Step(_) | Name::Replaced(_))).collect())
}

/// What to write instead, when a folder of checkpoints was given for a checkpoint.
fn nearest(folder: &Path) -> Result<String> {
    if !folder.is_dir() {
        return Ok(" (and is no folder)".to_owned());
    }
    let names = checkpoint_names(folder)?;
    Ok(names.last().map(|name| format!("; {} would be one", folder.join(name.text()).display())).unwrap_or_default())
}
