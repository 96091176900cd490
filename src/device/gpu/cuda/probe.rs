//! Whether this machine has a GPU that ferrotron can use; if not, why, in one sentence.
//!
//! Invariant: the driver is asked for its version before anything else is asked of it, and nothing here panics on what it answers.

#![allow(unsafe_code)]

use super::failure::{self, Refusal, outcome};
use super::libraries::{DRIVER, Loaded, Search, products};
use super::table::{Driver, Products, Texts, products_version};
use anyhow::{Context, Error, Result, bail, ensure};
use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
};
use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// CUDA 12.8, release 570: the oldest driver that reads the kernels' PTX (its language is version 8.7).
const OLDEST_DRIVER: i32 = 12080;

/// The newest version of CUDA whose libraries are known here.
const NEWEST_MAJOR: i32 = 13;

/// The oldest GPUs that compute in bf16.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// How long people wait for a driver's answer. Starting it takes seconds on a node with many GPUs.
const PATIENCE: Duration = Duration::from_secs(60);

const INSTALL: &str = "install NVIDIA's driver of release 570 or newer, or point FERROTRON_CUDA_LIBRARIES at the folder that has it; \
                       device.kind = \"cpu\" needs none";

/// The driver, loaded and started.
pub struct Started {
    pub driver: Driver,
    pub texts: Texts,
    pub path: PathBuf,
    /// As 1000 a major version and 10 a minor one.
    pub version: i32,
}

/// cuBLASLt, loaded.
pub struct Found {
    pub products: Products,
    pub texts: Texts,
    pub path: PathBuf,
    /// As 10000 a major version and 100 a minor one.
    pub version: usize,
}

/// One GPU, as its driver describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    pub ordinal: usize,
    pub name: String,
    pub bus_id: String,
    pub bytes: usize,
    pub capability: (i32, i32),
}

/// Loads and starts the driver.
pub fn start(search: &Search) -> Result<Started> {
    let loaded = search.load("NVIDIA's driver", DRIVER, INSTALL)?;
    let at = |error: Error| error.context(format!("{} is not a driver that ferrotron can use", loaded.path.display()));
    let (driver, texts) = (Driver::of(loaded.library()), Texts::of_driver(loaded.library()));
    started(driver.map_err(at)?, texts.map_err(at)?, loaded.path.clone())
}

/// Whether NVIDIA's driver is in this machine's kernel.
pub fn is_installed() -> bool {
    Path::new("/proc/driver/nvidia").exists() || Path::new("/dev/nvidiactl").exists() || Path::new("/dev/dxg").exists()
}

/// Starts a driver whose functions are known.
pub fn started(driver: Driver, texts: Texts, path: PathBuf) -> Result<Started> {
    let refused = |refusal: Refusal| failure::sentence(refusal, None, Some(&texts));
    let mut version: c_int = 0;
    // SAFETY: the driver writes a number to where it is told to.
    unsafe { call!(driver.driver_version, &mut version) }.map_err(refused)?;
    check_version(version)?;
    // SAFETY: without flags, as it has to be.
    unsafe { call!(driver.init, 0) }.map_err(refused)?;
    Ok(Started { driver, texts, path, version })
}

/// A driver also says the newest version of CUDA that it can do.
fn check_version(version: i32) -> Result<()> {
    ensure!(
        version >= OLDEST_DRIVER,
        "NVIDIA's driver is too old: it does CUDA {}, and the kernels need {}, which is release 570 or newer; update the driver, or set \
         device.kind = \"cpu\"",
        version_words(version),
        version_words(OLDEST_DRIVER)
    );
    Ok(())
}

pub fn version_words(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Of cuBLASLt.
pub fn library_version(version: usize) -> String {
    format!("{}.{}", version / 10000, version % 10000 / 100)
}

/// Loads a cuBLASLt for a driver of this major version.
fn products_for(major: i32, search: &Search) -> Result<Found> {
    let help = format!(
        "it comes with the CUDA toolkit {major} and with the Python package nvidia-cublas (nvidia-cublas-cu12 for CUDA 12): activate its \
         environment, or point FERROTRON_CUDA_LIBRARIES at the folder that has it"
    );
    let loaded: Loaded = search.load("cuBLASLt", products(major), &help)?;
    let library = loaded.library();
    let found = || -> Result<Found> {
        let (products, texts) = (Products::of(library)?, Texts::of_products(library)?);
        Ok(Found { products, texts, path: loaded.path.clone(), version: products_version(library)? })
    };
    found().with_context(|| format!("{} is not a cuBLASLt that ferrotron can use", loaded.path.display()))
}

impl Started {
    /// Loads the cuBLASLt that goes with the driver.
    pub fn products(&self, search: &Search) -> Result<Found> {
        products_for(self.version / 1000, search)
    }

    /// The GPUs that this process may use, those that are too old included.
    pub fn gpus(&self) -> Result<Vec<Facts>> {
        let mut count: c_int = 0;
        // SAFETY: the driver writes a number to where it is told to.
        let counted = unsafe { call!(self.driver.device_count, &mut count) };
        counted.map_err(|refusal| self.refused(refusal))?;
        (0..count as usize).map(|ordinal| self.facts(ordinal)).collect()
    }

    fn facts(&self, ordinal: usize) -> Result<Facts> {
        let refused = |refusal: Refusal| self.refused(refusal).context(format!("asking about GPU {ordinal}"));
        let (mut device, mut bytes, mut major, mut minor): (c_int, usize, c_int, c_int) = (0, 0, 0, 0);
        let (mut name, mut bus_id) = ([0 as c_char; 256], [0 as c_char; 32]);
        let driver = &self.driver;
        // SAFETY: the driver writes a number to where it is told to.
        unsafe { call!(driver.device, &mut device, ordinal as c_int) }.map_err(refused)?;
        // SAFETY: as above; of texts it writes at most as many bytes as it is told that there is room for, the last one zero.
        unsafe {
            call!(driver.device_memory, &mut bytes, device)
                .and_then(|()| call!(driver.device_attribute, &mut major, MAJOR, device))
                .and_then(|()| call!(driver.device_attribute, &mut minor, MINOR, device))
                .and_then(|()| call!(driver.device_name, name.as_mut_ptr(), name.len() as c_int - 1, device))
                .and_then(|()| call!(driver.device_bus_id, bus_id.as_mut_ptr(), bus_id.len() as c_int - 1, device))
        }
        .map_err(refused)?;
        Ok(Facts { ordinal, name: text(&name), bus_id: text(&bus_id), bytes, capability: (major, minor) })
    }

    /// The GPU of the rank that is `local_rank` on its node: ranks beyond the number of GPUs share them.
    pub fn gpu_of(&self, local_rank: usize) -> Result<(Facts, usize)> {
        let gpus = self.gpus()?;
        choose(&gpus, local_rank).map(|facts| (facts, gpus.len()))
    }

    pub fn refused(&self, refusal: Refusal) -> Error {
        failure::sentence(refusal, None, Some(&self.texts))
    }
}

fn choose(gpus: &[Facts], local_rank: usize) -> Result<Facts> {
    if gpus.is_empty() {
        let none = outcome("cuDeviceGetCount", failure::NO_DEVICE).expect_err("a code that is none of success");
        return Err(failure::sentence(none, None, None)).context("the driver finds no GPU");
    }
    let gpu = &gpus[local_rank % gpus.len()];
    if gpu.capability < OLDEST_CAPABILITY {
        bail!(
            "GPU {} ({}) has compute capability {}.{}, which has no bf16: 8.0 or newer is needed (A100, RTX 30 and later); choose others by \
             CUDA_VISIBLE_DEVICES, or set device.kind = \"cpu\"",
            gpu.ordinal,
            gpu.name,
            gpu.capability.0,
            gpu.capability.1
        );
    }
    Ok(gpu.clone())
}

fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|&byte| byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(|_| "unknown".to_string(), |text| text.to_string_lossy().into_owned())
}

/// What there is and what is missing, for people: (what, how it is). A driver that does not answer is told, not waited for.
pub fn report(search: Search) -> Vec<(String, String)> {
    let (sender, receiver) = mpsc::channel();
    // The thread is left behind where the driver hangs: nothing could end it.
    std::thread::spawn(move || sender.send(facts(&search)).ok());
    let silent = || vec![("cuda".to_string(), format!("the driver has not answered within {} seconds", PATIENCE.as_secs()))];
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| silent())
}

fn facts(search: &Search) -> Vec<(String, String)> {
    let missing = |error: Error| format!("{error:#}");
    let products = |major| {
        let found = products_for(major, search);
        let by = if found.is_ok() { "cuBLASLt" } else { "ferrotron's own kernels" };
        let version = |found: Found| format!("{}, {}", library_version(found.version), found.path.display());
        let taken = format!("by {by}, where device.matmul is \"auto\"");
        [("libcublaslt".to_string(), found.map_or_else(missing, version)), ("matmul".to_string(), taken)]
    };
    let started = match start(search) {
        Ok(started) => started,
        // Login nodes have no driver, but often the libraries that other nodes use.
        Err(error) => {
            let [library, _] = products(NEWEST_MAJOR);
            return vec![("cuda".to_string(), missing(error)), library];
        }
    };
    let mut facts = vec![("cuda".to_string(), format!("{}, by {}", version_words(started.version), started.path.display()))];
    match started.gpus() {
        Ok(gpus) if gpus.is_empty() => facts.push(("gpu".to_string(), choose(&gpus, 0).map_or_else(missing, |gpu| gpu.name))),
        Ok(gpus) => facts.extend(gpus.iter().map(|gpu| {
            let use_ = choose(std::slice::from_ref(gpu), 0).map_or_else(|error| format!("; {error:#}"), |_| String::new());
            let gib = gpu.bytes as f64 / (1u64 << 30) as f64;
            let (major, minor) = gpu.capability;
            (
                format!("gpu {}", gpu.ordinal),
                format!("{}, {gib:.1} GiB, compute capability {major}.{minor}, {}{use_}", gpu.name, gpu.bus_id),
            )
        })),
        Err(error) => facts.push(("gpu".to_string(), missing(error))),
    }
    facts.extend(products(started.version / 1000));
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(ordinal: usize, capability: (i32, i32)) -> Facts {
        Facts { ordinal, name: "Tesla V100".to_string(), bus_id: "0000:3b:00.0".to_string(), bytes: 1 << 34, capability }
    }

    #[test]
    fn an_old_driver_and_an_old_gpu_are_named() {
        let error = check_version(12040).expect_err("too old").to_string();
        assert!(error.contains("CUDA 12.4") && error.contains("12.8") && error.contains("570"), "{error}");
        assert!(check_version(12080).is_ok() && check_version(13000).is_ok());
        let error = choose(&[gpu(0, (7, 0))], 0).expect_err("no bf16").to_string();
        assert!(error.starts_with("GPU 0 (Tesla V100) has compute capability 7.0, which has no bf16"), "{error}");
        let error = format!("{:#}", choose(&[], 0).expect_err("no GPU"));
        assert!(error.contains("the driver finds no GPU") && error.contains("CUDA_VISIBLE_DEVICES"), "{error}");
    }

    #[test]
    fn ranks_share_the_gpus_in_turn() {
        let gpus = [gpu(0, (8, 0)), gpu(1, (9, 0))];
        let chosen: Vec<usize> = (0..4).map(|rank| choose(&gpus, rank).expect("new enough").ordinal).collect();
        assert_eq!(chosen, [0, 1, 0, 1]);
    }

    #[test]
    fn a_library_that_is_no_driver_is_refused_without_a_panic() {
        let folder = std::env::temp_dir().join(format!("ferrotron-probe-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder of the test's own");
        std::fs::write(folder.join("libcuda.so.1"), "text").expect("a file of the test's own");
        let places = crate::launch::identity::CudaPlaces { given: vec![folder.clone()], environments: Vec::new() };
        let facts = report(Search::new(&places));
        std::fs::remove_dir_all(folder).ok();
        assert_eq!(facts[0].0, "cuda");
        // Where there is a driver besides, it is used.
        assert!(facts.len() > 2 || facts[0].1.contains("libcuda.so.1 (") || facts[0].1.contains("cannot be loaded"), "{facts:?}");
    }
}
