//! What a rank that fails leaves behind for people and for its launcher: `failure.json` in the run's folder, and the error file that
//! torchrun and our launcher read.
//!
//! Invariant: the first rank of a start that writes is `first`; what the others saw is kept beside it. Failing to write is never a
//! failure of its own.

use crate::launch::identity::Identity;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Records that this rank has failed with `error`, causes and all. Writes into `run_dir` only where that is there.
pub fn record(run_dir: &Path, identity: &Identity, error: &anyhow::Error) {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let because: Vec<String> = error.chain().map(ToString::to_string).collect();
    let mine = json!({"rank": identity.rank, "host_rank": identity.node_rank, "why": because, "time": seconds});
    if run_dir.is_dir() {
        // Nobody is left to tell that this could not be written; the error itself is printed in any case.
        join_others(&run_dir.join("failure.json"), &start_of(identity), mine).ok();
    }
    if let Some(file) = &identity.error_file {
        let text = json!({"message": {"message": format!("{error:#}"), "extraInfo": {"timestamp": seconds.to_string()}}});
        let fresh = file.with_extension("new");
        fs::write(&fresh, text.to_string()).and_then(|()| fs::rename(&fresh, file)).ok();
    }
}

/// What tells one start of a job from another.
fn start_of(identity: &Identity) -> String {
    let job = identity.job.as_deref().unwrap_or("alone");
    format!("{job} at {}:{}, start {}", identity.master_addr, identity.master_port, identity.restarts)
}

fn join_others(path: &Path, start: &str, mine: Value) -> std::io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    let before = read(&mut file)?;
    let told = match before {
        Some(mut told) if told["start"] == start && mine["rank"] != told["first"]["rank"] => {
            if let Some(others) = told["others"].as_array_mut() {
                others.push(mine);
            }
            told
        }
        _ => json!({"start": start, "first": mine, "others": []}),
    };
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(format!("{told:#}\n").as_bytes())?;
    file.sync_all()
}

fn read(file: &mut File) -> std::io::Result<Option<Value>> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::identity::Environment;

    fn rank(rank: usize) -> Identity {
        let variables = [("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string()), ("WORLD_SIZE", "3".to_string())];
        let environment: Environment = variables.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        Identity::detect(&environment).expect("an identity")
    }

    #[test]
    fn the_first_is_first_and_the_others_are_kept() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/failure-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a temporary folder");
        record(&dir, &rank(2), &anyhow::anyhow!("the disk is gone").context("reading step 3"));
        record(&dir, &rank(0), &anyhow::anyhow!("rank 2 has left"));
        let told: Value = serde_json::from_str(&fs::read_to_string(dir.join("failure.json")).expect("written")).expect("JSON");
        assert_eq!(told["first"]["rank"], 2);
        assert_eq!(told["first"]["why"], json!(["reading step 3", "the disk is gone"]));
        assert_eq!(told["others"][0]["why"], json!(["rank 2 has left"]));
        record(&dir, &rank(2), &anyhow::anyhow!("again"));
        let told: Value = serde_json::from_str(&fs::read_to_string(dir.join("failure.json")).expect("written")).expect("JSON");
        assert_eq!(told["first"]["why"], json!(["again"]), "a start that fails anew is told anew");
        fs::remove_dir_all(&dir).expect("it was made here");
    }
}
