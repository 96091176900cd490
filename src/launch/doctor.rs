//! What this machine has that training could use, and what it lacks, as text for people.
//!
//! Invariant: it only looks: no library is loaded and no device opened here, and what cannot be read is said to be unknown. What a GPU's
//! driver answers is asked elsewhere (`device/gpu/cuda/probe.rs`, which loads it and does not wait for ever) and only shown.

use super::identity::{Environment, Identity};
use rustix::fs::{MemfdFlags, memfd_create, statvfs};
use rustix::process::{Resource, getrlimit};
use std::fs;
use std::path::{Path, PathBuf};

/// Where the loader looks for libraries besides `LD_LIBRARY_PATH`, on the distributions that clusters run.
pub const LIBRARY_FOLDERS: [&str; 10] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/lib64",
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/compat",
    "/usr/lib/wsl/lib",
    "/usr/local/nvidia/lib64",
];

/// The report, one fact a line. `gpu`: what the driver of GPUs says, each with its name.
pub fn report(environment: &Environment, gpu: &[(String, String)]) -> String {
    let machine = [
        ("version", env!("CARGO_PKG_VERSION").to_string()),
        ("processor", processor()),
        ("instructions", instructions()),
        ("memory", memory()),
        ("open files", limit(Resource::Nofile, 1.0, "")),
        ("locked memory", limit(Resource::Memlock, MIB, " MiB")),
        ("shared memory", shared_memory()),
        ("nvidia driver", driver()),
    ];
    let rest = [
        ("libnccl", library("libnccl.so", environment)),
        ("fabric", listing("/sys/class/infiniband", |_| true)),
        ("network", listing("/sys/class/net", |name| name != "lo")),
        ("identity", Identity::detect(environment).map_or_else(|error| format!("cannot be told: {error:#}"), |found| found.describe())),
    ];
    let gpu = gpu.iter().map(|(name, fact)| (name.as_str(), fact.clone()));
    machine.into_iter().chain(gpu).chain(rest).map(|(name, fact)| format!("{name:<14} {fact}\n")).collect()
}

const MIB: f64 = (1u64 << 20) as f64;
const GIB: f64 = (1u64 << 30) as f64;

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = field(&text, "model name").unwrap_or("unknown");
    let threads = std::thread::available_parallelism().map_or("an unknown number of".to_string(), |threads| threads.to_string());
    format!("{model}, {threads} threads usable")
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> String {
    let known = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    let words: Vec<String> = known.iter().map(|(name, there)| if *there { name.to_string() } else { format!("no {name}") }).collect();
    words.join(", ")
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> String {
    "those that every processor of its kind has".to_string()
}

fn memory() -> String {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let gib = |name: &str| {
        let kib = field(&text, name)?.split_whitespace().next()?.parse::<f64>().ok()?;
        Some(format!("{:.1} GiB", kib * 1024.0 / GIB))
    };
    let unknown = || "unknown".to_string();
    let free = gib("MemAvailable").unwrap_or_else(unknown);
    let total = gib("MemTotal").unwrap_or_else(unknown);
    // In a container the limit that counts is that of its control group.
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse::<f64>().ok());
    let limit = limit.map(|bytes| format!(", limited to {:.1} GiB here", bytes / GIB)).unwrap_or_default();
    format!("{total}, {free} of it free{limit}")
}

fn limit(resource: Resource, unit: f64, name: &str) -> String {
    let limit = getrlimit(resource);
    let show =
        |value: Option<u64>| value.map_or("no limit".to_string(), |value| format!("{}{name}", (value as f64 / unit * 10.0).round() / 10.0));
    match (limit.current, limit.maximum) {
        (None, _) => "no limit".to_string(),
        (current, maximum) => format!("{}, can be raised to {}", show(current), show(maximum)),
    }
}

/// What processes of this host can share: ranks use a memfd, libraries of GPUs want `/dev/shm`.
fn shared_memory() -> String {
    let ranks = match memfd_create("ferrotron-doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING) {
        Ok(_) => "ranks of this host can share memory".to_string(),
        Err(error) => format!("ranks of this host use sockets, there is no memfd ({error})"),
    };
    match statvfs("/dev/shm") {
        Ok(found) => format!("{ranks}; {:.1} GiB in /dev/shm", found.f_blocks as f64 * found.f_frsize as f64 / GIB),
        Err(_) => format!("{ranks}; no /dev/shm"),
    }
}

fn driver() -> String {
    let Ok(version) = fs::read_to_string("/proc/driver/nvidia/version") else { return "not found: no GPU will be used".to_string() };
    let devices = names("/dev").iter().filter(|name| name.strip_prefix("nvidia").is_some_and(is_number)).count();
    format!("{} ({devices} GPUs in /dev)", version.lines().next().unwrap_or("of an unknown version"))
}

/// The first file whose name begins with `prefix`, where the loader would look.
fn library(prefix: &str, environment: &Environment) -> String {
    let given = environment.get("LD_LIBRARY_PATH").map(String::as_str).unwrap_or_default();
    let folders: Vec<&str> = given.split(':').filter(|folder| !folder.is_empty()).chain(LIBRARY_FOLDERS).collect();
    let file = |folder: &&str| -> Option<PathBuf> {
        let name = names(folder).into_iter().find(|name| name.starts_with(prefix))?;
        Some(Path::new(folder).join(name))
    };
    match folders.iter().find_map(file) {
        Some(path) => path.display().to_string(),
        None => format!("not found: looked for {prefix}* in LD_LIBRARY_PATH and the usual folders"),
    }
}

fn listing(folder: &str, wanted: impl Fn(&str) -> bool) -> String {
    let found: Vec<String> = names(folder).into_iter().filter(|name| wanted(name)).collect();
    if found.is_empty() { format!("none in {folder}") } else { found.join(", ") }
}

/// The names in a folder, sorted; none where it cannot be read.
fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The value after `name` and a colon.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':').map(str::trim))
}
