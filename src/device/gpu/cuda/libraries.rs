//! Where the libraries of CUDA are, and loading them.
//!
//! In order: the folders that the user points at, the wheels of an active Python environment (cuBLASLt only), the loader's own path, the
//! folders where distributions put them. What is found in a folder is loaded by its absolute path. A library is never unloaded: the
//! driver is not made for it.
//!
//! Invariant: a library that is not there is an error that says where it was looked for; nothing panics and nothing is downloaded.

#![allow(unsafe_code)]

use crate::launch::doctor::LIBRARY_FOLDERS;
use crate::launch::identity::CudaPlaces;
use anyhow::{Result, bail};
use libloading::Library;
use std::fs;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

/// The driver's library. It comes with the driver and with nothing else.
pub const DRIVER: &[&str] = &["libcuda.so.1"];

/// Folders of a Python environment's `site-packages` that hold cuBLASLt: of the wheels for CUDA 13, and for 12.
const WHEELS: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cublas/lib"];

/// Folders to look in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Search {
    given: Vec<PathBuf>,
    environments: Vec<PathBuf>,
    usual: Vec<PathBuf>,
}

/// A library that is loaded, and where it was.
#[derive(Debug)]
pub struct Loaded {
    library: ManuallyDrop<Library>,
    pub path: PathBuf,
}

/// The names of a cuBLASLt that a driver of the major version `driver` can run, the newest first.
pub fn products(driver: i32) -> &'static [&'static str] {
    match driver {
        ..12 => &[],
        12 => &["libcublasLt.so.12"],
        13.. => &["libcublasLt.so.13", "libcublasLt.so.12"],
    }
}

impl Search {
    pub fn new(places: &CudaPlaces) -> Search {
        let usual = LIBRARY_FOLDERS.iter().chain(&["/run/opengl-driver/lib", "/usr/local/cuda/targets/x86_64-linux/lib"]);
        Search { given: places.given.clone(), environments: places.environments.clone(), usual: usual.map(PathBuf::from).collect() }
    }

    /// What to give to the loader, in order: files that are there, and bare names, which it looks up itself.
    fn candidates(&self, names: &[&str]) -> Vec<PathBuf> {
        let files = |folders: &[PathBuf]| -> Vec<PathBuf> {
            let files = folders.iter().flat_map(|folder| names.iter().map(move |name| folder.join(name)));
            files.filter(|file| file.is_file()).collect()
        };
        let wheels: Vec<PathBuf> = self.environments.iter().flat_map(|environment| of_environment(environment)).collect();
        let bare = names.iter().map(PathBuf::from);
        let mut all: Vec<PathBuf> = files(&self.given);
        // An environment may carry a library for other drivers than this machine's, but never the driver itself.
        all.extend(if names == DRIVER { Vec::new() } else { files(&wheels) });
        all.extend(bare);
        all.extend(files(&self.usual));
        all
    }

    /// The places in words.
    fn looked(&self, names: &[&str]) -> String {
        let list = |folders: &[PathBuf]| folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ");
        let mut places = Vec::new();
        if !self.given.is_empty() {
            places.push(format!("FERROTRON_CUDA_LIBRARIES ({})", list(&self.given)));
        }
        if !self.environments.is_empty() && names != DRIVER {
            places.push(format!("the Python environment {}", list(&self.environments)));
        }
        places.push("the loader's path".to_string());
        places.push(list(&self.usual));
        places.join(", ")
    }

    /// Loads the first of `names` that can be. `title`: what it is; `help`: what to do where there is none.
    pub fn load(&self, title: &str, names: &[&str], help: &str) -> Result<Loaded> {
        let mut refused = Vec::new();
        for candidate in self.candidates(names) {
            // SAFETY: loading runs the library's own initialisation; NVIDIA's libraries are made to be loaded this way.
            match unsafe { Library::new(&candidate) } {
                Ok(library) => return Ok(Loaded { library: ManuallyDrop::new(library), path: path_of(&candidate) }),
                // A file that is there and cannot be loaded is worth telling, a name that the loader does not know is not.
                Err(error) if candidate.is_absolute() => refused.push(format!("{}: {}", candidate.display(), causes(&error))),
                Err(_) => {}
            }
        }
        let names = names.join(" or ");
        if refused.is_empty() {
            bail!("{title} ({names}) was not found: looked in {}; {help}", self.looked(&names.split(" or ").collect::<Vec<_>>()));
        }
        bail!("{title} ({names}) cannot be loaded: {}; {help}", refused.join("; "));
    }
}

impl Loaded {
    pub fn library(&self) -> &Library {
        &self.library
    }
}

/// Where a Python environment may hold libraries of CUDA.
fn of_environment(environment: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for lib in ["lib", "lib64"] {
        let lib = environment.join(lib);
        let mut pythons: Vec<PathBuf> = fs::read_dir(&lib).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        pythons.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
        pythons.sort();
        for python in pythons {
            folders.extend(WHEELS.iter().map(|wheel| python.join("site-packages").join(wheel)));
        }
        // Packages of conda lie here.
        folders.push(lib);
    }
    folders.push(environment.join("targets/x86_64-linux/lib"));
    folders
}

/// The file that the loader took: of a bare name only the process's map of memory tells.
fn path_of(candidate: &Path) -> PathBuf {
    if candidate.is_absolute() {
        return candidate.to_owned();
    }
    let name = candidate.to_string_lossy();
    let stem = name.split(".so").next().unwrap_or(&name);
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let files = maps.lines().filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    let mut files = files.filter(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{stem}.so"))));
    files.next().unwrap_or(candidate).to_owned()
}

fn causes(error: &dyn std::error::Error) -> String {
    let innermost = std::iter::successors(Some(error), |error| error.source()).last().unwrap_or(error);
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str, files: &[&str]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("ferrotron-libraries-{name}-{}", std::process::id()));
        fs::remove_dir_all(&root).ok();
        fs::create_dir_all(&root).expect("a folder of the test's own");
        for file in files {
            let file = root.join(file);
            fs::create_dir_all(file.parent().expect("below the root")).expect("a folder of the test's own");
            fs::write(&file, "not a library").expect("a file of the test's own");
        }
        root
    }

    fn search(root: &Path) -> Search {
        let at = |name: &str| vec![root.join(name)];
        Search { given: at("given"), environments: at("venv"), usual: at("usr/lib64") }
    }

    #[test]
    fn places_are_looked_at_in_order() {
        let wheel = "venv/lib/python3.11/site-packages/nvidia/cu13/lib/libcublasLt.so.13";
        let old = "venv/lib/python3.11/site-packages/nvidia/cublas/lib/libcublasLt.so.12";
        let files =
            ["given/libcublasLt.so.12", wheel, old, "venv/lib/libcublasLt.so.12", "usr/lib64/libcublasLt.so.13", "usr/lib64/libcuda.so.1"];
        let root = tree("order", &files);
        let found = search(&root).candidates(products(13));
        let expected = [files[0], wheel, old, files[3], "libcublasLt.so.13", "libcublasLt.so.12", files[4]];
        let expected: Vec<PathBuf> = expected.iter().map(|file| if file.contains('/') { root.join(file) } else { file.into() }).collect();
        assert_eq!(found, expected);
        // A driver for CUDA 12 runs no library for 13.
        assert!(search(&root).candidates(products(12)).iter().all(|file| file.to_string_lossy().ends_with(".12")));
        assert!(products(11).is_empty());
        // The driver is not taken from a Python environment.
        assert_eq!(search(&root).candidates(DRIVER), [PathBuf::from("libcuda.so.1"), root.join("usr/lib64/libcuda.so.1")]);
        fs::remove_dir_all(root).ok();
    }

    #[test]
    fn what_is_missing_or_broken_is_one_sentence() {
        let root = tree("missing", &["given/libno-such-thing.so.7"]);
        let load =
            |names: &[&str]| search(&root).load("the library of this test", names, "install it").expect_err("no library").to_string();
        let missing = load(&["libno-such-other-thing.so.7"]);
        let given = root.join("given");
        let expected = format!(
            "the library of this test (libno-such-other-thing.so.7) was not found: looked in FERROTRON_CUDA_LIBRARIES ({}), the Python \
             environment {}, the loader's path, {}; install it",
            given.display(),
            root.join("venv").display(),
            root.join("usr/lib64").display()
        );
        assert_eq!(missing, expected);
        let broken = load(&["libno-such-thing.so.7"]);
        assert!(broken.contains("cannot be loaded") && broken.contains("given/libno-such-thing.so.7: "), "{broken}");
        fs::remove_dir_all(root).ok();
    }

    #[test]
    fn a_library_on_the_loaders_path_is_found_with_its_place() {
        let root = tree("loader", &[]);
        let loaded = search(&root).load("the C library", &["libc.so.6"], "").expect("every process has one");
        assert!(loaded.path.is_absolute(), "{}", loaded.path.display());
        fs::remove_dir_all(root).ok();
    }
}
