//! State that lies in a file instead of the device's memory, and is read and written through a map of it.
//!
//! The file has no name from the moment it is open, so that nothing of it outlives the process, however that ends. All of its blocks are
//! allocated before anything is mapped: a page without a block behind it would be a signal in the middle of a step, not an error.
//!
//! Invariant: the parts given out do not overlap, and nobody else can open the file.
#![allow(unsafe_code)]

use anyhow::{Context, Result, bail, ensure};
use memmap2::{MmapMut, MmapOptions};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// A multiple of the page size of every machine that we know: each part of the file is mapped by itself.
const PAGE: usize = 1 << 16;

/// One rank's file of state.
#[derive(Debug)]
pub struct OffloadFile {
    file: File,
    folder: PathBuf,
    bytes: usize,
    taken: usize,
}

/// A part of the file, zero at first.
#[derive(Debug)]
pub struct Mapped(MmapMut);

/// What a part of `bytes` takes of the file.
pub fn bytes_taken(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE)
}

impl OffloadFile {
    /// `bytes`: what all parts take together.
    pub fn create(folder: &Path, bytes: usize) -> Result<OffloadFile> {
        let shown = folder.display();
        ensure!(folder.is_dir(), "the folder {shown} is not there: make it, on the disk that is to hold the state");
        let mut file = nameless(folder)?;
        let status = statvfs(folder).with_context(|| format!("asking how much room there is in {shown}"))?;
        let free = status.f_bavail.saturating_mul(status.f_frsize);
        ensure!(free >= bytes as u64, "not enough room in {shown}: this rank needs {bytes} bytes, and {free} are free");
        allocate(&mut file, bytes).with_context(|| format!("allocating {bytes} bytes in {shown}, of which {free} were free"))?;
        Ok(OffloadFile { file, folder: folder.to_path_buf(), bytes, taken: 0 })
    }

    /// The next `bytes` of the file.
    pub fn take(&mut self, bytes: usize) -> Result<Mapped> {
        let (start, length) = (self.taken, bytes_taken(bytes));
        assert!(start + length <= self.bytes, "{length} more bytes after {start} of {}", self.bytes);
        self.taken += length;
        // SAFETY: the file has no name and this process does not give its descriptor away, so nobody else writes to it or cuts it short;
        // parts do not overlap, since `taken` only grows; all blocks are there, since `create` allocated them.
        let map = unsafe { MmapOptions::new().offset(start as u64).len(length).map_mut(&self.file) };
        Ok(Mapped(map.with_context(|| format!("mapping {length} bytes of a file in {}", self.folder.display()))?))
    }
}

impl Mapped {
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// A new file in `folder` whose name is gone again.
fn nameless(folder: &Path) -> Result<File> {
    for number in 0.. {
        let path = folder.join(format!("ferrotron-offload-{}-{number}", std::process::id()));
        match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path).with_context(|| format!("taking away the name of {}", path.display()))?;
                return Ok(file);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("the folder {} cannot be written to", folder.display())),
        }
    }
    bail!("no name is free in {}", folder.display())
}

fn allocate(file: &mut File, bytes: usize) -> Result<()> {
    match fallocate(&*file, FallocateFlags::empty(), 0, (bytes as u64).max(1)) {
        // A file system that cannot promise blocks gives them to what is written.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = vec![0; 1 << 20];
            for start in (0..bytes).step_by(zeros.len()) {
                file.write_all(&zeros[..zeros.len().min(bytes - start)])?;
            }
            Ok(file.sync_data()?)
        }
        outcome => Ok(outcome?),
    }
}
