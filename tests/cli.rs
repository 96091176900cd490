//! The program as a user runs it: exit codes, and what goes to which stream.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs the program with nothing in its environment that names a rank.
fn ferrotron(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotron"));
    command.args(arguments).env_clear().current_dir(env!("CARGO_MANIFEST_DIR"));
    command.output().expect("the program starts")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("no signal ended it")
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli").join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).expect("clearing the folder of a test");
    }
    std::fs::create_dir_all(&folder).expect("the folder of a test");
    folder
}

/// A model that trains in a moment.
fn tiny(folder: &Path) -> PathBuf {
    let text = format!(
        "[run]\ndir = {:?}\n[model]\nfamily = \"llama\"\nhidden_size = 16\nintermediate_size = 32\nnum_layers = 1\nnum_heads = 2\n\
         [data]\nsources = [\"Cargo.toml\"]\n[train]\nsteps = 2\nseq_len = 16\nglobal_batch_size = 2\ndtype = \"f32\"\n",
        folder.join("run").display().to_string()
    );
    let path = folder.join("tiny.toml");
    std::fs::write(&path, text).expect("writing a configuration");
    path
}

#[test]
fn help_names_every_command() {
    let help = ferrotron(&["--help"]);
    assert_eq!(code(&help), 0);
    for command in ["train", "launch", "plan", "prepare", "checkpoint", "generate", "doctor", "completions"] {
        assert!(out(&help).contains(command), "{}", out(&help));
    }
    assert_eq!(code(&ferrotron(&["--version"])), 0);
}

#[test]
fn wrong_arguments_are_2() {
    for arguments in
        [&[][..], &["trian"], &["train"], &["train", "a.toml", "--sett", "x"], &["plan", "a.toml", "--world", "0"], &["completions", "cmd"]]
    {
        let output = ferrotron(arguments);
        assert_eq!(code(&output), 2, "{arguments:?}: {}", err(&output));
    }
    assert!(err(&ferrotron(&["trian"])).contains("train"));
}

#[test]
fn a_wrong_configuration_is_2_and_writes_nothing() {
    let folder = folder("wrong");
    let path = tiny(&folder);
    let path = path.to_str().expect("a path of ours");
    let output = ferrotron(&["train", path, "--set", "train.stepps=3", "--set", "optimizer.lr=-1"]);
    assert_eq!(code(&output), 2);
    assert_eq!(err(&output).matches("error:").count(), 2, "{}", err(&output));
    assert!(err(&output).contains("did you mean `steps`?") && !err(&output).contains('\u{1b}'), "{}", err(&output));
    let output = ferrotron(&["train", path, "--set", "data.sources=[]"]);
    assert_eq!((code(&output), err(&output).contains("nothing to train on")), (2, true), "{}", err(&output));
    // Two ranks cannot be cut three ways: what planning finds is shown like what loading finds.
    let output = ferrotron(&["plan", path, "--world", "2", "--set", "parallel.tp=3"]);
    assert_eq!((code(&output), err(&output).contains("--set parallel.tp=3")), (2, true), "{}", err(&output));
    assert!(!folder.join("run").exists());
    assert_eq!(code(&ferrotron(&["train", "no/such.toml"])), 2);
    let output = ferrotron(&["launch", "--nproc-per-node", "2", "train", path, "--set", "train.steps=x"]);
    assert_eq!((code(&output), err(&output).matches("error:").count()), (2, 1), "told once, not by each rank: {}", err(&output));
    assert_eq!(code(&ferrotron(&["launch", "trian", path])), 2);
}

/// On a machine with a GPU there is nothing to be told.
#[test]
fn a_gpu_that_is_not_there_is_told_under_its_key() {
    if Path::new("/dev/nvidiactl").exists() || Path::new("/dev/dxg").exists() {
        return;
    }
    let folder = folder("no-gpu");
    let path = tiny(&folder);
    let path = path.to_str().expect("a path of ours");
    let output = ferrotron(&["train", path, "--set", "device.kind=cuda"]);
    let text = err(&output);
    assert_eq!((code(&output), folder.join("run").exists()), (2, false), "{text}");
    for part in
        ["`device.kind` = \"cuda\", but NVIDIA's driver (libcuda.so.1) was not found", "--set device.kind=cuda", "570", "FERROTRON_CUDA"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Where a folder is pointed at, it is among those that are named; what is no library is told as such.
    let pointed = |file: Option<&str>| {
        if let Some(file) = file {
            std::fs::write(folder.join("libcuda.so.1"), file).expect("a file of the test's own");
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotron"));
        command.arg("doctor").env_clear().env("FERROTRON_CUDA_LIBRARIES", &folder);
        out(&command.output().expect("the program starts"))
    };
    let named = format!("FERROTRON_CUDA_LIBRARIES ({})", folder.display());
    assert!(pointed(None).contains(&named), "{}", pointed(None));
    let broken = pointed(Some("text"));
    assert!(broken.contains("cannot be loaded") && broken.contains(&folder.join("libcuda.so.1").display().to_string()), "{broken}");
    // What is found by itself is left out in silence.
    let output = ferrotron(&["train", path]);
    assert_eq!((code(&output), err(&output).contains("GPU")), (0, false), "{}", err(&output));
}

#[test]
fn a_run_says_who_does_its_products() {
    let folder = folder("products");
    let path = tiny(&folder);
    let run = |matmul: &str| {
        ferrotron(&[
            "train",
            path.to_str().expect("a path of ours"),
            "--set",
            "device.kind=emulated",
            "--set",
            &format!("device.matmul={matmul}"),
        ])
    };
    let refused = run("cublaslt");
    let text = err(&refused);
    assert_eq!((code(&refused), folder.join("run").exists()), (2, false), "{text}");
    assert!(text.contains("`device.matmul` = \"cublaslt\", but an emulated GPU has no library"), "{text}");
    let own = run("own");
    assert_eq!((code(&own), err(&own).contains("matrix products by ferrotron's own kernels\n")), (0, true), "{}", err(&own));
}

#[test]
fn plan_needs_nothing_but_the_configuration() {
    let output = ferrotron(&["plan", "configs/quickstart.toml"]);
    assert_eq!((code(&output), out(&output).contains("1673088")), (0, true), "{}{}", out(&output), err(&output));
    let output = ferrotron(&["plan", "configs/quickstart.toml", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON on stdout");
    assert_eq!(json["parameters"], 1_673_088);
}

#[test]
fn a_run_leaves_what_it_promises() {
    let folder = folder("run");
    let path = tiny(&folder);
    let output = ferrotron(&["train", path.to_str().expect("a path of ours")]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert!(err(&output).contains("step 2/2  loss "), "{}", err(&output));
    let run = folder.join("run");
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics.jsonl");
    assert_eq!(metrics.lines().count(), 2);
    let written = run.join("config.toml");
    assert_eq!(code(&ferrotron(&["plan", written.to_str().expect("a path of ours")])), 0, "config.toml is a configuration");
    let step = run.join("checkpoints/step-00000002");
    let step = step.to_str().expect("a path of ours");
    assert!(out(&ferrotron(&["checkpoint", "verify", step])).contains("is sound"));
    assert!(out(&ferrotron(&["checkpoint", "inspect", step])).contains("step         2"));
    let (exported, imported) = (folder.join("hf"), folder.join("imported"));
    let (exported, imported) = (exported.to_str().expect("a path of ours"), imported.to_str().expect("a path of ours"));
    for arguments in
        [&["export", step, exported][..], &["import", exported, imported], &["diff", exported, imported], &["diff", step, exported]]
    {
        let output = ferrotron(&[&["checkpoint"], arguments].concat());
        assert_eq!(code(&output), 0, "{arguments:?}: {}{}", out(&output), err(&output));
    }
}

#[test]
fn a_failure_is_1_and_tells_its_causes() {
    let output = ferrotron(&["checkpoint", "verify", "no/such/folder"]);
    assert_eq!((code(&output), err(&output).starts_with("error: ")), (1, true), "{}", err(&output));
    let output = ferrotron(&["checkpoint", "diff", "src", "tests"]);
    assert_eq!((code(&output), err(&output).lines().skip(1).all(|line| line.starts_with("  because: "))), (1, true), "{}", err(&output));
}

#[test]
fn doctor_and_completions_work_anywhere() {
    let output = ferrotron(&["doctor"]);
    assert_eq!((code(&output), out(&output).contains("rank 0 of 1 (alone)")), (0, true), "{}", out(&output));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(out(&ferrotron(&["completions", shell])).contains("ferrotron"), "{shell}");
    }
}

#[test]
fn checks_of_a_gpu_end_at_once_where_there_is_none() {
    if ["/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg"].iter().any(|sign| Path::new(sign).exists()) {
        println!("this machine has a driver: scripts/gpu_check.sh would check it");
        return;
    }
    let reports = folder("reports");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu_check.sh");
    let output = Command::new("bash").arg(script).arg(&reports).output().expect("bash starts");
    assert_eq!((code(&output), out(&output).as_str()), (2, ""));
    assert!(err(&output).starts_with("there is no GPU here") && err(&output).lines().count() == 1, "{}", err(&output));
    assert_eq!(std::fs::read_dir(&reports).expect("the folder of the test").count(), 0, "no report without a GPU");
    // Neither does the benchmark print a number.
    let output = ferrotron(&["bench", "--device", "cuda"]);
    assert_eq!((code(&output), out(&output).as_str()), (1, ""));
    assert!(err(&output).contains("NVIDIA's driver"), "{}", err(&output));
}
