//! Who a process is, under every launcher: the variables below were seen under torchrun 2.13, Slurm 22.05 and Open MPI 4.1.

use ferrotron::launch::identity::{CudaPlaces, Environment, Identity, hosts, task_counts, wants_color};
use proptest::prelude::{prop, prop_assert, prop_assert_eq, proptest};

fn environment(variables: &str) -> Environment {
    let pairs = variables.split_whitespace().map(|pair| pair.split_once('=').expect("NAME=value"));
    pairs.map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

fn found(variables: &str) -> Identity {
    Identity::detect(&environment(variables)).unwrap_or_else(|error| panic!("{variables}: {error:#}"))
}

fn refused(variables: &str) -> String {
    let result = Identity::detect(&environment(variables));
    format!("{:#}", result.expect_err("these variables must be refused"))
}

const TORCHRUN: &str = "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 GROUP_WORLD_SIZE=2 MASTER_ADDR=10.0.0.1 \
                        MASTER_PORT=29501 TORCHELASTIC_RESTART_COUNT=2 TORCHELASTIC_RUN_ID=job7 TORCHELASTIC_USE_AGENT_STORE=True \
                        TORCHELASTIC_ERROR_FILE=/tmp/error.json";

const SRUN: &str = "SLURM_JOB_ID=4242 SLURM_STEP_ID=0 SLURM_PROCID=2 SLURM_LOCALID=1 SLURM_NODEID=0 SLURM_NTASKS=4 \
                    SLURM_STEP_NUM_TASKS=4 SLURM_STEP_TASKS_PER_NODE=2(x2) SLURM_STEP_NODELIST=gpu[07-08] SLURM_TASKS_PER_NODE=2(x2)";

#[test]
fn alone_without_a_launcher() {
    let identity = found("HOME=/root MASTER_PORT=1");
    assert_eq!((identity.rank, identity.world, identity.local_world, identity.source.as_str()), (0, 1, 1, "alone"));
}

#[test]
fn a_rank_of_torchrun() {
    let identity = found(TORCHRUN);
    assert_eq!((identity.rank, identity.local_rank, identity.world, identity.local_world, identity.node_rank), (3, 1, 4, 2, 1));
    assert_eq!((identity.master_addr.as_str(), identity.master_port, identity.master_port_taken), ("10.0.0.1", 29501, true));
    assert_eq!((identity.restarts, identity.job.as_deref()), (2, Some("job7")));
    assert_eq!(identity.error_file.as_deref(), Some(std::path::Path::new("/tmp/error.json")));
    assert_eq!(identity.describe(), "rank 3 of 4 (RANK, LOCAL_RANK and WORLD_SIZE)");
}

#[test]
fn a_task_of_srun_dealt_in_turn() {
    // Under --distribution=cyclic rank 2 is the second of node 0, not the first of node 1.
    let identity = found(SRUN);
    assert_eq!((identity.rank, identity.local_rank, identity.world, identity.local_world, identity.node_rank), (2, 1, 4, 2, 0));
    assert_eq!((identity.master_addr.as_str(), identity.master_port), ("gpu07", 64242));
    assert_eq!((identity.restarts, identity.job.as_deref(), identity.source.as_str()), (0, Some("4242"), "Slurm step 4242.0"));
    assert_eq!(found(&format!("{SRUN} SLURM_RESTART_COUNT=1 MASTER_ADDR=head MASTER_PORT=7")).master_port, 7);
}

#[test]
fn a_batch_shell_is_no_rank() {
    let identity = found("SLURM_JOB_ID=4242 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4");
    assert_eq!(identity.world, 1);
    assert!(identity.source.contains("srun"), "{}", identity.source);
    assert_eq!(found("SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1").world, 1);
}

#[test]
fn a_launcher_inside_a_slurm_task_wins_and_a_contradiction_is_refused() {
    assert_eq!(found(&format!("{TORCHRUN} {SRUN}")).rank, 3);
    let same = "RANK=2 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=gpu07";
    assert_eq!(found(&format!("{same} {SRUN}")).rank, 2);
    assert_eq!(found(&format!("RANK=2 WORLD_SIZE=4 {SRUN}")).source, "Slurm step 4242.0");
    let message = refused(&format!("RANK=1 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=4 {SRUN}"));
    assert!(message.contains("disagree") && message.contains("say rank 1") && message.contains("says rank 2"), "{message}");
}

#[test]
fn ranks_of_pods_are_not_ranks_of_processes() {
    let message = refused("RANK=1 WORLD_SIZE=2 MASTER_ADDR=job-master-0 MASTER_PORT=23456");
    assert!(message.contains("--nnodes 2 --node-rank 1"), "{message}");
}

#[test]
fn mpi_has_ranks_but_no_master() {
    let ompi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2";
    let identity = found(ompi);
    assert_eq!((identity.rank, identity.world, identity.master_addr.as_str()), (1, 2, "127.0.0.1"));
    assert_eq!(found("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2").source, "MPICH");
    let spread = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1";
    assert!(refused(spread).contains("MASTER_ADDR"));
}

#[test]
fn what_cannot_be_is_refused() {
    for (variables, part) in [
        ("RANK=4 LOCAL_RANK=0 WORLD_SIZE=4", "rank 4 of a world of 4"),
        ("RANK=0 LOCAL_RANK=2 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a", "local rank 2 of 2"),
        ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4", "4 ranks on this node"),
        ("RANK=zero LOCAL_RANK=0 WORLD_SIZE=2", "RANK is \"zero\""),
        ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_PORT=70000", "MASTER_PORT is \"70000\""),
        ("LOCAL_RANK=0", "RANK and WORLD_SIZE is not set"),
        ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2", "MASTER_ADDR"),
        ("SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID"),
    ] {
        let message = refused(variables);
        assert!(message.contains(part), "{variables}: {message}");
    }
}

#[test]
fn hostlists_expand_as_slurm_expands_them() {
    for (list, expanded) in [
        ("gpu[009-011]", "gpu009 gpu010 gpu011"),
        ("n[9-011]", "n9 n10 n11"),
        ("n[07]", "n07"),
        ("rack[1-2]n[1-2]", "rack1n1 rack1n2 rack2n1 rack2n2"),
        ("n[1-2],n1, ,login", "n1 n2 n1 login"),
        ("n[1-2]-ib", "n1-ib n2-ib"),
        ("n[1,3-4]", "n1 n3 n4"),
        ("", ""),
    ] {
        let hosts = hosts(list).unwrap_or_else(|error| panic!("{list}: {error:#}"));
        assert_eq!(hosts, expanded.split_whitespace().collect::<Vec<_>>(), "{list}");
    }
    for wrong in ["n[2-1]", "n[]", "n[a]", "n[1", "n1]", "n[[1]]", "n[1-]", "n[+1]", "n[0-999999999]", "n[1-1000]r[1-1000]"] {
        assert!(hosts(wrong).is_err(), "{wrong} must be refused");
    }
}

#[test]
fn task_counts_expand() {
    assert_eq!(task_counts("2(x2),1").expect("well-formed"), [2, 2, 1]);
    for wrong in ["", "2(x", "2(xa)", "a", "1(x99999999)"] {
        assert!(task_counts(wrong).is_err(), "{wrong} must be refused");
    }
}

#[test]
fn color_is_for_terminals_that_want_it() {
    assert!(wants_color(&environment("TERM=xterm"), true));
    assert!(!wants_color(&environment("TERM=xterm"), false));
    assert!(!wants_color(&environment("NO_COLOR=1"), true));
    assert!(!wants_color(&environment("TERM=dumb"), true));
}

proptest! {
    /// Writing any hosts in brackets and reading them gives the hosts.
    #[test]
    fn hostlists_round_trip(prefix in "[a-z-]{1,6}", width in 1usize..5, numbers in prop::collection::vec(0u64..9999, 1..20)) {
        let group: Vec<String> = numbers.iter().map(|number| format!("{number:0width$}")).collect();
        let expected: Vec<String> = group.iter().map(|number| format!("{prefix}{number}")).collect();
        prop_assert_eq!(hosts(&format!("{prefix}[{}]", group.join(","))).expect("well-formed"), expected.clone());
        prop_assert_eq!(hosts(&expected.join(",")).expect("well-formed"), expected);
    }

    /// A range has all its numbers, in order, at least as wide as its first.
    #[test]
    fn ranges_are_whole(low in 0u64..2000, count in 1u64..300, width in 1usize..6) {
        let high = low + count - 1;
        let first = format!("{low:0width$}");
        let hosts = hosts(&format!("n[{first}-{high}]")).expect("well-formed");
        prop_assert_eq!(hosts.len() as u64, count);
        for (host, number) in hosts.iter().zip(low..) {
            prop_assert_eq!(host[1..].parse::<u64>().expect("digits"), number);
            prop_assert!(host.len() > first.len());
        }
    }

    /// No text makes the parser panic or run away.
    #[test]
    fn any_text_is_read_or_refused(text in "[a-c0-9\\[\\],() x-]{0,24}") {
        let _ = hosts(&text);
        let _ = task_counts(&text);
    }
}

#[test]
fn folders_of_cuda_are_where_the_user_points_and_in_active_environments() {
    let places = |variables: &str| CudaPlaces::detect(&environment(variables));
    let words = |paths: &[std::path::PathBuf]| paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
    let found = places("FERROTRON_CUDA_LIBRARIES=/a:/b: CONDA_PREFIX=/conda VIRTUAL_ENV=/venv");
    assert_eq!((words(&found.given), words(&found.environments)), (vec!["/a".into(), "/b".into()], vec!["/venv".into(), "/conda".into()]));
    assert_eq!(places("FERROTRON_CUDA_LIBRARIES= VIRTUAL_ENV="), CudaPlaces::default());
}
