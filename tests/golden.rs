//! What `ferrotron plan` prints for every file in `configs/`, to the byte, on the smallest world that fits it.
//!
//! Invariant: every configuration has a text in `tests/golden/`, and every text there has its configuration.

use ferrotron::config::Config;
use ferrotron::plan::Plan;
use ferrotron::train::forecast;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Names, without their ending, of the files of a folder.
fn names(folder: &str, ending: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(root().join(folder)).unwrap_or_else(|error| panic!("reading {folder}: {error}"));
    let paths = entries.map(|entry| entry.expect("a readable folder").path());
    let of_kind = paths.filter(|path: &PathBuf| path.extension().is_some_and(|extension| extension == ending));
    of_kind.map(|path| path.file_stem().expect("a file has a name").to_string_lossy().into_owned()).collect()
}

fn planned(name: &str) -> (Config, Plan) {
    let path = root().join(format!("configs/{name}.toml"));
    let (config, source) = Config::load(&path, &[]).unwrap_or_else(|problems| panic!("{problems}"));
    let parallel = &config.parallel;
    let world = parallel.tp * parallel.pp * parallel.dp_replicate * parallel.dp_shard.max(1) as usize;
    let plan = Plan::new(&config, world, None).unwrap_or_else(|problems| panic!("{}", source.render(&problems)));
    (config, plan)
}

#[test]
fn plans_of_the_configurations_read_as_they_did() {
    let fresh = root().join("target/golden-new");
    fs::create_dir_all(&fresh).expect("a writable target folder");
    let configurations = names("configs", "toml");
    let orphans: Vec<_> = names("tests/golden", "txt").difference(&configurations).cloned().collect();
    assert!(orphans.is_empty(), "texts in tests/golden without a configuration: {orphans:?}");
    let mut changed = Vec::new();
    for name in &configurations {
        let (config, plan) = planned(name);
        let text = forecast::text(&config, &plan).expect("a plan can be told");
        let expected = fs::read_to_string(root().join(format!("tests/golden/{name}.txt"))).unwrap_or_default();
        fs::write(fresh.join(format!("{name}.txt")), &text).expect("a writable target folder");
        if text != expected {
            let same = text.lines().zip(expected.lines()).take_while(|(a, b)| a == b).count();
            let line = |text: &str| text.lines().nth(same).unwrap_or("(end)").to_string();
            changed.push(format!("{name}.txt, line {}:\n  was {}\n  is  {}", same + 1, line(&expected), line(&text)));
        }
    }
    let help = "if that is right: cp target/golden-new/*.txt tests/golden/";
    assert!(changed.is_empty(), "\n{}\n{help}", changed.join("\n"));
}

#[test]
fn json_and_drawing_tell_the_same_plan() {
    let (config, plan) = planned("llama3.1-405b");
    let json = forecast::json(&config, &plan).expect("a plan can be told");
    assert_eq!((json["world"].as_u64(), json["parameters"].as_u64()), (Some(16384), Some(405_853_388_800)));
    assert_eq!(json["stages"].as_array().map(Vec::len), Some(16));
    assert_eq!(json["memory_bytes"].as_array().map(Vec::len), Some(16));
    assert_eq!(json["traffic_per_step"][1]["groups"]["tp"]["all_gather"]["calls"], 768);
    let drawing = forecast::svg(&plan);
    assert!(drawing.contains("16 stages on 16 ranks, 16 micro-batches: bubble 48.6 %"));
}
