//! Checkpoints under faults: killed or failing at every system call of a save, a full disk, altered files, hostile headers.
//!
//! The sweeps run this very program again as the process that saves, under a tracer; so they need Linux on x86-64 and the permission
//! to trace one's own children.

#[path = "support/checkpoints.rs"]
mod checkpoints;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "support/trace.rs"]
mod trace;

use checkpoints::{KINDS, Scratch, check, facts, save, save_well, shards, simple_cut, writers};
use ferrotron::checkpoint::folder;
use ferrotron::checkpoint::load::{Checkpoint, by_step, newest_verified};
use ferrotron::checkpoint::safetensors::Reader;
use ferrotron::checkpoint::save::{Options, Writer};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const FOLDER: &str = "FERROTRON_FAULTS_FOLDER";
const STEPS: &str = "FERROTRON_FAULTS_STEPS";
/// Its exit status when the process that saves could not even begin.
const NOT_BEGUN: i32 = 3;

/// Not a test of its own: the process that the sweeps kill. Two ranks save the steps, and say on stderr how each save went.
#[test]
fn the_process_that_saves() {
    let (Some(folder), Ok(steps)) = (env::var_os(FOLDER), env::var(STEPS)) else { return };
    let made: anyhow::Result<Vec<Writer>> = (0..2)
        .map(|rank| {
            let checkpoints = PathBuf::from(&folder);
            Writer::new(Options { checkpoints, rank, world: 2, incarnation: 1, keep: 1, deadline: Duration::from_secs(2) })
        })
        .collect();
    let mut writers = match made {
        Ok(writers) => writers,
        Err(error) => {
            eprintln!("begin: {error:#}");
            std::process::exit(NOT_BEGUN);
        }
    };
    for step in steps.split(',').map(|step| step.parse().expect("a step")) {
        for (rank, writer) in writers.iter_mut().enumerate() {
            writer.save(facts(step), shards(&simple_cut(2), rank, step, &KINDS)).expect("arguments are sound");
        }
        for (rank, writer) in writers.iter_mut().enumerate() {
            match writer.finish() {
                Ok(()) => eprintln!("step {step} rank {rank}: saved"),
                Err(error) => eprintln!("step {step} rank {rank}: {error:#}"),
            }
        }
    }
}

/// A folder with the checkpoint of step 10, and the command that saves more to it.
fn prepared(template: &Path, steps: &str) -> (Scratch, Command) {
    let scratch = Scratch::new("sweep");
    copy(template, &scratch.0);
    let mut command = Command::new(env::current_exe().expect("this program"));
    command.args(["--exact", "the_process_that_saves", "--nocapture", "--test-threads=1"]);
    command.env(FOLDER, &scratch.0).env(STEPS, steps).env("RUST_BACKTRACE", "0");
    (scratch, command)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() { copy(&entry.path(), &target) } else { fs::copy(entry.path(), target).map(drop).expect("a copy") }
    }
}

fn template() -> Scratch {
    let scratch = Scratch::new("template");
    save_well(&mut writers(&scratch.0, 2, |_| ()), &simple_cut(2), 10);
    scratch
}

/// The newest checkpoint is sound and holds one of these steps; and the run goes on from there, and leaves nothing behind.
fn recovers(checkpoints: &Path, allowed: &[u64], case: &str) {
    let (checkpoint, skipped) =
        newest_verified(checkpoints).unwrap_or_else(|error| panic!("{case}: {error:#}")).unwrap_or_else(|| panic!("{case}: none is left"));
    assert!(skipped.is_empty(), "{case}: {skipped:?}");
    let step = checkpoint.index.facts.step;
    assert!(allowed.contains(&step), "{case}: step {step}");
    check(&checkpoint, &simple_cut(1), step);
    let mut next = writers(checkpoints, 1, |options| (options.incarnation, options.keep) = (2, 1));
    for result in save(&mut next, &simple_cut(1), 90) {
        result.unwrap_or_else(|error| panic!("{case}: the next start cannot save: {error:#}"));
    }
    let names: Vec<String> = folder::names(checkpoints).expect("a folder").into_iter().map(folder::Name::text).collect();
    assert_eq!(names, ["step-00000090"], "{case}");
    check(&by_step(checkpoints, 90).expect("just saved"), &simple_cut(1), 90);
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod sweeps {
    use super::{NOT_BEGUN, check, newest_verified, prepared, recovers, simple_cut, template};
    use crate::checkpoints::Scratch;
    use crate::trace::{Fault, Traced, run};

    fn traced(template: &Scratch, steps: &str, fault: Option<(usize, Fault)>) -> (Scratch, Traced) {
        let (scratch, mut command) = prepared(&template.0, steps);
        let traced = run(&mut command, &scratch.0, fault);
        (scratch, traced.expect("tracing one's own child must be permitted for this test: see ptrace(2) and kernel.yama.ptrace_scope"))
    }

    /// Runs with the fault at the first call, at the second, and so on until no call is left.
    fn sweep(steps: &str, stride: usize, fault: Fault, look: impl Fn(&Scratch, &Traced, &str)) -> usize {
        let template = template();
        let mut number = 1;
        loop {
            let (scratch, traced) = traced(&template, steps, Some((number, fault)));
            if traced.calls.len() < number {
                assert_eq!(traced.status, Some(0), "a run without a fault: {}", traced.output);
                println!("{fault:?} at each of {} calls of saving {steps}, every {stride}. one", number - 1);
                return number;
            }
            look(&scratch, &traced, &format!("{fault:?} at call {number}, {:?}, of saving {steps}", traced.calls[number - 1]));
            number += stride;
        }
    }

    fn killed(steps: &str, fault: Fault, allowed: &[u64]) {
        let cases = sweep(steps, 1, fault, |scratch, traced, case| {
            assert_eq!(traced.status, None, "{case}: it was killed");
            recovers(&scratch.0, allowed, case);
        });
        assert!(cases > 60, "a save of two ranks makes more than {cases} calls: the tracer misses some");
    }

    #[test]
    fn killed_before_any_call_of_a_save() {
        killed("20", Fault::Kill, &[10, 20]);
    }

    #[test]
    fn killed_before_any_call_of_a_replacement() {
        killed("10", Fault::Kill, &[10]);
    }

    #[test]
    fn killed_in_the_middle_of_any_write() {
        killed("20", Fault::Torn, &[10, 20]);
    }

    #[test]
    fn a_write_that_is_cut_short_is_completed() {
        sweep("20", 1, Fault::Short, |scratch, traced, case| {
            assert_eq!(traced.status, Some(0), "{case}: {}", traced.output);
            assert_eq!(traced.output.matches("saved").count(), 2, "{case}: {}", traced.output);
            recovers(&scratch.0, &[20], case);
        });
    }

    /// How the save of a step went: rank 0 commits, so it knows.
    fn saved(traced: &Traced, step: u64) -> bool {
        traced.output.contains(&format!("step {step} rank 0: saved"))
    }

    fn failing(errno: i32, stride: usize) {
        sweep("20,30", stride, Fault::Errno(errno), |scratch, traced, case| {
            let output = &traced.output;
            assert!(!output.contains("panicked"), "{case}: {output}");
            if traced.status == Some(NOT_BEGUN) {
                assert!(output.contains(&*scratch.0.to_string_lossy()), "{case}: the error names no file: {output}");
                return recovers(&scratch.0, &[10], case);
            }
            assert_eq!(traced.status, Some(0), "{case}: {output}");
            assert!(saved(traced, 20) || saved(traced, 30), "{case}: one fault costs one save at most: {output}");
            for line in output.lines().filter(|line| line.starts_with("step") && !line.ends_with("saved")) {
                assert!(
                    line.contains("step-000000") || line.contains("latest") || line.contains(&*scratch.0.to_string_lossy()),
                    "{case}: {line}"
                );
            }
            let (newest, skipped) = newest_verified(&scratch.0).expect("sound").expect("there");
            assert!(skipped.is_empty(), "{case}: {skipped:?}");
            let step = newest.index.facts.step;
            assert!(step >= if saved(traced, 30) { 30 } else { 20 }, "{case}: step {step} is the newest: {output}");
            check(&newest, &simple_cut(1), step);
            recovers(&scratch.0, &[20, 30], case);
        });
    }

    #[test]
    fn any_call_fails_for_want_of_room() {
        failing(libc::ENOSPC, 1);
    }

    #[test]
    fn any_call_fails_in_the_device() {
        failing(libc::EIO, 1);
    }

    #[test]
    fn any_call_fails_by_quota() {
        failing(libc::EDQUOT, 3);
    }

    /// Not everything can be retried, but this can.
    #[test]
    fn an_interrupted_call_costs_one_save_at_most() {
        failing(libc::EINTR, 3);
    }

    /// From some call on nothing works any more: every save fails, and what was there stays.
    #[test]
    fn a_disk_that_stays_full_costs_no_checkpoint() {
        sweep("20,30", 9, Fault::ErrnoFromHere(libc::ENOSPC), |scratch, traced, case| {
            assert!(!traced.output.contains("panicked"), "{case}: {}", traced.output);
            assert!(traced.status.is_some(), "{case}");
            recovers(&scratch.0, &[10, 20, 30], case);
        });
    }
}

/// Where the process may mount one, a disk that is really full.
#[test]
fn a_full_disk_is_reported_and_room_that_returns_is_used() {
    let scratch = Scratch::new("full");
    let disk = scratch.0.join("disk");
    fs::create_dir(&disk).expect("a folder");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "none"]).arg(&disk).output();
    match mounted {
        Ok(output) if output.status.success() => {}
        Ok(output) => return println!("skipped: no file system can be mounted here: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => return println!("skipped: mount cannot be run: {error}"),
    }
    let mounted = Mounted(&disk);
    let checkpoints = mounted.0.join("checkpoints");
    let mut writers = writers(&checkpoints, 1, |_| ());
    save_well(&mut writers, &simple_cut(1), 1);
    let ballast = disk.join("ballast");
    // All but three pages: the check beforehand says so.
    fs::write(&ballast, vec![1; 200 << 10]).expect("room for it");
    let free = |kept: usize| fs::write(&ballast, vec![1; (200 << 10) - kept]).expect("room for it");
    let mut filled = 200 << 10;
    while fs::write(&ballast, vec![1; filled]).is_ok() {
        filled += 4096;
    }
    let error = format!("{:#}", save(&mut writers, &simple_cut(1), 2).remove(0).expect_err("no room"));
    assert!(error.contains("not enough room") && error.contains("missing") && error.contains("checkpoints"), "{error}");
    // Room for the numbers, which is checked, but not for the headers around them.
    free(0);
    while fs::write(&ballast, vec![1; filled]).is_err() {
        filled -= 4096;
    }
    fs::write(&ballast, vec![1; filled - 8192]).expect("room for it");
    let error = format!("{:#}", save(&mut writers, &simple_cut(1), 3).remove(0).expect_err("no room"));
    assert!(error.contains("os error 28") && error.contains(".safetensors"), "{error}");
    check(&newest_verified(&checkpoints).expect("sound").expect("there").0, &simple_cut(1), 1);
    fs::remove_file(&ballast).expect("a file");
    save_well(&mut writers, &simple_cut(1), 4);
    // No room for names, though there is for bytes.
    let mut spent = 0;
    while fs::write(disk.join(format!("file-{spent}")), "").is_ok() {
        spent += 1;
    }
    let error = format!("{:#}", save(&mut writers, &simple_cut(1), 5).remove(0).expect_err("no room"));
    assert!(error.contains("os error 28") && error.contains("step-00000005"), "{error}");
    for file in 0..spent {
        fs::remove_file(disk.join(format!("file-{file}"))).expect("a file");
    }
    save_well(&mut writers, &simple_cut(1), 6);
    check(&newest_verified(&checkpoints).expect("sound").expect("there").0, &simple_cut(1), 6);
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// A generator good enough to pick places.
struct Places(u64);

impl Places {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn files(checkpoint: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(checkpoint).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

/// The error of opening and verifying, which must come.
fn refused(checkpoint: &Path, case: &str) -> String {
    let verified = Checkpoint::open(checkpoint).and_then(|checkpoint| checkpoint.verify());
    format!("{:#}", verified.err().unwrap_or_else(|| panic!("{case} was accepted")))
}

fn names(error: &str, file: &Path) -> bool {
    error.contains(file.file_name().and_then(|name| name.to_str()).expect("a name"))
}

#[test]
fn every_altered_file_is_found_and_named() {
    let template = template();
    let checkpoint = template.0.join("step-00000010");
    let files = files(&checkpoint);
    let mut places = Places(2024);
    for number in 0..2000 {
        let file = &files[places.below(files.len() as u64) as usize];
        let whole = fs::read(file).expect("a file");
        let mut bytes = whole.clone();
        let at = places.below(bytes.len() as u64) as usize;
        let case = match number % 2 {
            0 => {
                let bit = places.below(8);
                bytes[at] ^= 1 << bit;
                format!("bit {bit} of byte {at} of {}", file.display())
            }
            _ => {
                bytes.truncate(at);
                format!("{} cut to {at} bytes", file.display())
            }
        };
        fs::write(file, bytes).expect("a file");
        let error = refused(&checkpoint, &case);
        assert!(names(&error, file), "{case}: {error}");
        fs::write(file, whole).expect("a file");
    }
    Checkpoint::open(&checkpoint).and_then(|checkpoint| checkpoint.verify()).expect("all as it was");
}

#[test]
fn files_that_are_missing_too_many_swapped_or_links_are_refused() {
    let template = template();
    let checkpoint = template.0.join("step-00000010");
    let files = files(&checkpoint);
    let aside = template.0.join("aside");
    for file in &files {
        fs::rename(file, &aside).expect("a rename");
        assert!(names(&refused(&checkpoint, "a missing file"), file));
        std::os::unix::fs::symlink(&aside, file).expect("a link");
        let error = refused(&checkpoint, "a link");
        assert!(names(&error, file) && error.contains("link"), "{error}");
        fs::remove_file(file).expect("a link");
        fs::rename(&aside, file).expect("a rename");
        let mut bytes = fs::read(file).expect("a file");
        bytes.push(b' ');
        fs::write(file, &bytes).expect("a file");
        assert!(names(&refused(&checkpoint, "one byte more"), file));
        fs::write(file, &bytes[..bytes.len() - 1]).expect("a file");
    }
    let safetensors: Vec<&PathBuf> = files
        .iter()
        .filter(|file| names("x.safetensors index.json", file) || file.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    let (first, second) = (safetensors[0], safetensors[1]);
    fs::rename(first, &aside).and_then(|()| fs::rename(second, first)).and_then(|()| fs::rename(&aside, second)).expect("a swap");
    refused(&checkpoint, "two files in each other's place");
    fs::rename(first, &aside).and_then(|()| fs::rename(second, first)).and_then(|()| fs::rename(&aside, second)).expect("a swap");
    fs::copy(first, checkpoint.join("more.safetensors")).expect("a copy");
    assert!(refused(&checkpoint, "a file too many").contains("more.safetensors"));
    fs::remove_file(checkpoint.join("more.safetensors")).expect("a file");
    // A sound checkpoint under the name of another step.
    fs::rename(&checkpoint, template.0.join("step-00000099")).expect("a rename");
    let error = format!("{:#}", newest_verified(&template.0).expect_err("the only one is not what it says"));
    assert!(error.contains("holds the checkpoint of step 10") && error.contains("not one is sound"), "{error}");
    assert!(newest_verified(&template.0.join("nowhere")).expect("no folder is no error").is_none());
}

/// A file whose header is this text.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn hostile_headers_are_errors() {
    let scratch = Scratch::new("hostile");
    let one = |dtype: &str, shape: &str, from: &str, to: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let two = |first: &str, second: &str| {
        format!(r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{first}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{second}}}}}"#)
    };
    let mut huge = vec![0xff; 16];
    huge[..8].copy_from_slice(&(1u64 << 62).to_le_bytes());
    let mut large = vec![b' '; 64];
    large[..8].copy_from_slice(&200_000_000u64.to_le_bytes());
    let mut allowed_but_absent = vec![b' '; 64];
    allowed_but_absent[..8].copy_from_slice(&99_999_999u64.to_le_bytes());
    let mut not_text = with_header("{\"a\"}", 0);
    not_text[10] = 0xff;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("seven bytes", vec![0; 7]),
        ("a length of 2^62", huge),
        ("a length of 200 MB", large),
        ("a length past the end", allowed_but_absent),
        ("an empty header", with_header("", 4)),
        ("a header that is no object", with_header("[1,2]", 0)),
        ("spaces before the object", with_header(" {}", 0)),
        ("text that is not UTF-8", not_text),
        ("deep nesting", with_header(&format!("{{\"a\":{}", "[".repeat(100_000)), 0)),
        ("an unknown dtype", with_header(&one("F31", "[1]", "0", "4"), 4)),
        ("a negative dim", with_header(&one("F32", "[-1]", "0", "4"), 4)),
        ("a dim that is no integer", with_header(&one("F32", "[1.5]", "0", "4"), 4)),
        ("dims whose product overflows", with_header(&one("F32", "[4294967296,4294967296,4294967296]", "0", "4"), 4)),
        ("no elements in an absurd shape", with_header(&one("F32", "[0,9223372036854775808]", "0", "0"), 0)),
        ("an absurd shape with a zero", with_header(&one("F32", "[4294967296,0,4294967296]", "0", "0"), 0)),
        ("a length that is not the shape's", with_header(&one("F32", "[2]", "0", "4"), 4)),
        ("offsets the wrong way round", with_header(&one("F32", "[1]", "4", "0"), 4)),
        ("offsets past the end", with_header(&one("F32", "[2]", "0", "8"), 4)),
        ("bytes that nobody claims", with_header(&one("F32", "[1]", "0", "4"), 8)),
        ("a hole", with_header(&two("[0,4]", "[8,12]"), 12)),
        ("an overlap", with_header(&two("[0,4]", "[2,6]"), 6)),
        ("one range for two", with_header(&two("[0,4]", "[0,4]"), 4)),
        ("one name for two", with_header(&two("[0,4]", "[4,8]").replace("\"b\"", "\"a\""), 8)),
        ("two kinds of metadata", with_header(r#"{"__metadata__":{},"__metadata__":{}}"#, 0)),
        ("metadata that is no text", with_header(r#"{"__metadata__":{"a":1}}"#, 0)),
        ("a field too many times", with_header(r#"{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 1)),
        ("a field too few", with_header(r#"{"a":{"dtype":"U8","shape":[1]}}"#, 1)),
    ];
    let file = scratch.0.join("hostile.safetensors");
    for (case, bytes) in cases {
        fs::write(&file, bytes).expect("a file");
        let error = format!("{:#}", Reader::open(&file).err().unwrap_or_else(|| panic!("{case} was accepted")));
        assert!(error.contains("hostile.safetensors"), "{case}: {error}");
    }
    fs::write(&file, with_header(&two("[0,4]", "[4,8]"), 8)).expect("a file");
    assert_eq!(Reader::open(&file).expect("this one is sound").tensors.len(), 2);
}

/// Bytes of a sound header changed at random: any answer but a panic, and no tensor that leaves the file.
#[test]
fn random_headers_never_panic() {
    let scratch = Scratch::new("random");
    let template = template();
    let sound = fs::read(template.0.join("step-00000010/master-00000-of-00002.safetensors")).expect("a file");
    let file = scratch.0.join("random.safetensors");
    let mut places = Places(7);
    for _ in 0..3000 {
        let mut bytes = sound.clone();
        for _ in 0..=places.below(4) {
            let at = places.below(400) as usize;
            bytes[at] = b"0123456789{}[]\",:- \\aF\xff"[places.below(23) as usize];
        }
        fs::write(&file, &bytes).expect("a file");
        let Ok(reader) = Reader::open(&file) else { continue };
        for found in reader.tensors.values() {
            assert!(found.begin <= found.end && found.end <= bytes.len() as u64, "{found:?}");
        }
    }
}
