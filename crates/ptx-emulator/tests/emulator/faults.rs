//! One launch, or one text, for every kind of fault. Each is paired with what the message must say.

use crate::support::{HEADER, kernel, parse, run, text, upload, words};
use ptx_emulator::{Fault, FaultKind, Launch, Memory, Module, Options, launch};

const PLAIN: Options = Options { seed: None, checked: false, counters: false, threads: 1 };
const CHECKED: Options = Options { checked: true, ..PLAIN };

/// A body whose `%d0` is the address of 256 zero words and `%r0` the thread.
fn module(body: &str) -> Module {
    parse(&text(".param .u64 out", &format!("ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\n{body}")))
}

fn outcome(body: &str, [grid, block]: [u32; 2], options: &Options) -> Result<(), Fault> {
    let memory = Memory::new();
    let out = words(&memory, &[0; 256]);
    run(&module(body), &memory, [grid, block, 0], &[&out.to_le_bytes()], options).map(drop)
}

/// The fault of a body, in the fixed order and under random orders.
fn fault(body: &str, shape: [u32; 2], options: &Options, kind: FaultKind, says: &str) {
    for seed in [None, Some(1), Some(2)] {
        let options = Options { seed, ..*options };
        let fault = outcome(body, shape, &options).expect_err(body);
        assert_eq!(fault.kind(), kind, "{fault}");
        assert!(fault.to_string().contains(says), "{fault}\ndoes not say: {says}");
        let place = fault.place().expect("a fault of a kernel has a place");
        assert!(place.kernel == "test" && place.ptx_line > 4 && !place.instruction.is_empty(), "{place:?}");
    }
}

/// A fault that only checked runs see.
fn checked(body: &str, shape: [u32; 2], kind: FaultKind, says: &str) {
    outcome(body, shape, &PLAIN).unwrap_or_else(|fault| panic!("unchecked: {fault}"));
    fault(body, shape, &CHECKED, kind, says);
}

fn clean(body: &str, shape: [u32; 2]) {
    for seed in [None, Some(1), Some(2), Some(3)] {
        outcome(body, shape, &Options { seed, ..CHECKED }).unwrap_or_else(|fault| panic!("{fault}\n{body}"));
    }
}

#[test]
fn texts_that_cannot_be_loaded() {
    let refused = |body: &str, says: &str| {
        let error = Module::parse(&text("", body)).err().unwrap_or_else(|| panic!("{body} was loaded"));
        assert!(error.to_string().contains(says), "{error}\ndoes not say: {says}");
        assert_eq!(error.line(), 12, "{error}");
    };
    refused("frobnicate.u32 %r0, %r1;", "`frobnicate.u32`");
    refused("add.u32.sideways %r0, %r1, %r2;", "`.sideways`");
    refused("add.u32 %r0, %r1;", "operand 3 is missing");
    refused("add.u32 %r0, %r1, %d2;", "`%d2`");
    refused("add.u32 %r0, %r1, %unknown;", "`%unknown`");
    refused("bra NOWHERE;", "`NOWHERE`");
    refused("div.rz.f32 %f0, %f1, %f2;", "rounds");
    refused("tex.2d.v4.f32.f32 {%f0,%f1,%f2,%f3}, [t, {%f0,%f1}];", "`tex.2d.v4.f32.f32`");
    refused("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f0}, {%r0}, {%r0}, {%f0};", "m16n8k16");
    refused("ld.global.v4.f32 {%f0, %f1}, [%d0];", "2 registers for 4");
    refused("call.uni missing, ();", "`missing`");
    refused("shfl.up.b32 %r0, %r1, 1, 0;", "`.sync`");
    assert!(Module::parse(&format!("{HEADER}.visible .entry test( {{")).is_err());
    assert!(Module::parse(&format!("{HEADER}.texref t;")).is_err());
    assert!(Module::parse(".entry").is_err());
}

#[test]
fn launches_that_do_not_fit() {
    let module = parse(&format!(
        "{HEADER}.visible .entry test(.param .u64 a, .param .u32 b)\n.maxntid 128, 1, 1\n{{\n.shared .b8 s[40000];\n.extern .shared .align 16 .b8 d[];\nret;\n}}\n"
    ));
    let kernel = kernel(&module);
    assert_eq!((kernel.name(), kernel.parameters(), kernel.max_threads(), kernel.shared_bytes()), ("test", &[8, 4][..], Some(128), 40000));
    let memory = Memory::new();
    let good = Launch { kernel, grid: [1, 1, 1], block: [128, 1, 1], shared_bytes: 0, arguments: &[&[0; 8], &[0; 4]], blocks: None };
    assert!(launch(&memory, &good, &PLAIN).is_ok());
    let refused = |bad: Launch<'_>, says: &str| {
        let fault = launch(&memory, &bad, &PLAIN).expect_err(says);
        assert_eq!(fault.kind(), FaultKind::Launch);
        assert!(fault.to_string().contains(says), "{fault}");
    };
    refused(Launch { arguments: &[&[0; 8]], ..good }, "1 arguments, the kernel takes 2");
    refused(Launch { arguments: &[&[0; 8], &[0; 8]], ..good }, "argument 1 has 8 bytes, the kernel expects 4");
    refused(Launch { block: [129, 1, 1], ..good }, "at most 128");
    refused(Launch { block: [0, 1, 1], ..good }, "block");
    refused(Launch { grid: [1, 65536, 1], ..good }, "grid");
    refused(Launch { shared_bytes: 200_000, ..good }, "232448");
    refused(Launch { blocks: Some(&[1]), ..good }, "block 1 of a grid of 1");
    let large = parse(&format!("{HEADER}.visible .entry test()\n{{\n.shared .b8 s[49153];\nret;\n}}\n"));
    refused(Launch { kernel: crate::support::kernel(&large), arguments: &[], ..good }, "49152");
}

#[test]
fn bounds_and_alignment() {
    fault(
        "ld.global.u32 %r1, [%d0+1024];",
        [1, 1],
        &PLAIN,
        FaultKind::OutOfBounds,
        "reads 4 bytes at 0x10000000000400, 0 bytes past the end of an allocation of 1024 bytes",
    );
    fault("st.global.v2.u32 [%d0+1020], {%r0, %r0};", [1, 1], &PLAIN, FaultKind::Misaligned, "writes 8 bytes");
    fault(
        "red.global.add.u32 [%d0+2000], 1;",
        [1, 1],
        &PLAIN,
        FaultKind::OutOfBounds,
        "changes 4 bytes at 0x100000000007d0, 976 bytes past",
    );
    fault("ld.global.u64 %d1, [%d0+-8];", [1, 1], &PLAIN, FaultKind::OutOfBounds, "no device address");
    fault("mov.u64 %d1, 0;\nld.u32 %r1, [%d1];", [1, 1], &PLAIN, FaultKind::OutOfBounds, "no device address");
    fault("ld.global.u32 %r1, [%d0+2];", [1, 1], &PLAIN, FaultKind::Misaligned, "no multiple of 4");
    fault(".shared .b8 s[64];\nld.shared.u32 %r1, [s+64];", [1, 1], &PLAIN, FaultKind::OutOfBounds, "the block's 64 bytes");
    fault(".shared .b8 s[64];\nmov.u32 %r1, 0;\nst.shared.u32 [%r1], 1;", [1, 1], &PLAIN, FaultKind::OutOfBounds, "shared address 0x0");
    fault(".local .b8 l[16];\nst.local.u32 [l+16], 1;", [1, 1], &PLAIN, FaultKind::OutOfBounds, "the thread's 16 bytes");
    fault("ld.param.u32 %r1, [out+8];", [1, 1], &PLAIN, FaultKind::OutOfBounds, "8 bytes of parameters");
    fault(
        ".shared .align 16 .b8 s[512];\nmov.u32 %r1, s;\nmad.lo.u32 %r1, %r0, 16, %r1;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1+16];",
        [1, 32],
        &PLAIN,
        FaultKind::OutOfBounds,
        "thread (31, 0, 0)",
    );
    fault(
        ".shared .align 16 .b8 s[64];\ncp.async.ca.shared.global [s], [%d0+1028], 4;",
        [1, 1],
        &PLAIN,
        FaultKind::OutOfBounds,
        "4 bytes past",
    );
}

#[test]
fn faults_name_source_block_and_thread() {
    let body = "ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\n.loc 3 41 7\nsetp.ne.u32 %p0, %r0, 37;\n@%p0 exit;\nmov.u32 %r1, %ctaid.x;\n\
                setp.eq.u32 %p1, %r1, 2;\n@%p1 trap;";
    let module = parse(&format!(".file 3 \"/a/b/norm.cu\"\n{}", text(".param .u64 out", body)));
    let memory = Memory::new();
    let out = words(&memory, &[0; 4]);
    let fault = run(&module, &memory, [4, 64, 0], &[&out.to_le_bytes()], &PLAIN).expect_err("block 2 traps");
    assert_eq!(fault.to_string(), "test at norm.cu:41: block (2, 0, 0) thread (37, 0, 0), trap, trap");
    assert_eq!((fault.kind(), fault.message()), (FaultKind::Trap, "trap"));
    assert_eq!(fault.place().and_then(|place| place.source.clone()), Some(("norm.cu".to_owned(), 41)));
}

#[test]
fn memory_given_back() {
    let module = module("ld.global.u32 %r1, [%d0+4];");
    let memory = Memory::new();
    let out = words(&memory, &[0; 4]);
    memory.free(out).expect("allocated above");
    let fault = run(&module, &memory, [1, 1, 0], &[&out.to_le_bytes()], &PLAIN).expect_err("the memory was freed");
    assert_eq!(fault.kind(), FaultKind::Freed);
    assert!(fault.to_string().contains("4 bytes into an allocation of 16 bytes that was freed"), "{fault}");
    assert_eq!(memory.read(out, &mut [0]).map_err(|fault| fault.kind()), Err(FaultKind::Freed));
    assert_eq!(memory.free(out).map_err(|fault| fault.kind()), Err(FaultKind::Freed));
    let next = memory.allocate(8);
    assert_ne!(next, out);
    assert_eq!(memory.free(next + 4).map_err(|fault| fault.kind()), Err(FaultKind::OutOfBounds));
    assert_eq!(memory.write(next + 4, &[0; 5]).map_err(|fault| fault.kind()), Err(FaultKind::OutOfBounds));
}

#[test]
fn deadlocks_and_divergence() {
    fault(
        "setp.lt.u32 %p0, %r0, 32;\n@%p0 bra A;\nbar.sync 1, 64;\nbra B;\nA:\nbar.sync 2, 64;\nB:",
        [1, 64],
        &PLAIN,
        FaultKind::Deadlock,
        "waits for ever: warp 0 lanes 0xffffffff at PTX line",
    );
    fault(
        "setp.lt.u32 %p0, %r0, 16;\n@%p0 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 0;\nB:",
        [1, 32],
        &PLAIN,
        FaultKind::Divergence,
        "cannot come together",
    );
    fault(
        "setp.lt.u32 %p0, %r0, 16;\n@%p0 bra A;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\nbra B;\nA:\nbar.warp.sync -1;\nB:",
        [1, 32],
        &PLAIN,
        FaultKind::Divergence,
        "cannot come together",
    );
    fault("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xFFFF;", [1, 32], &PLAIN, FaultKind::Divergence, "does not name");
    fault(
        "setp.lt.u32 %p0, %r0, 16;\nselp.b32 %r1, -1, 0x0FFFFFFF, %p0;\nvote.sync.any.pred %p1, %p0, %r1;",
        [1, 32],
        &PLAIN,
        FaultKind::Divergence,
        "0x0fffffff",
    );
    fault("bar.sync 3, 33;", [1, 64], &PLAIN, FaultKind::Divergence, "33 threads");
    fault("bar.sync 17;", [1, 64], &PLAIN, FaultKind::Divergence, "barrier 17");
    fault(
        "setp.lt.u32 %p0, %r0, 32;\n@%p0 bra A;\nbar.sync 0, 64;\nbra B;\nA:\nbar.sync 0, 96;\nB:",
        [1, 64],
        &PLAIN,
        FaultKind::Divergence,
        "expects",
    );
    fault(
        "setp.lt.u32 %p0, %r0, 3;\n@%p0 exit;\nmma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f0,%f1,%f2,%f3}, {%r1,%r2}, {%r3}, {%f0,%f1,%f2,%f3};",
        [1, 32],
        &PLAIN,
        FaultKind::Divergence,
        "all 32 lanes",
    );
    checked("setp.lt.u32 %p0, %r0, 32;\n@%p0 exit;\nbar.sync 0;", [1, 64], FaultKind::Divergence, "of which 32 have exited");
    checked("setp.lt.u32 %p0, %r0, 8;\n@%p0 exit;\nshfl.sync.idx.b32 %r1, %r0, 3, 31, -1;", [1, 32], FaultKind::Divergence, "reads lane 3");
}

#[test]
fn mbarriers_and_groups_against_their_rules() {
    fault(".shared .b64 b;\nmbarrier.arrive.shared.b64 _, [b];", [1, 1], &PLAIN, FaultKind::Protocol, "nobody has initialised");
    fault(
        ".shared .b64 b;\nmbarrier.init.shared.b64 [b], 1;\nmbarrier.init.shared.b64 [b], 1;",
        [1, 1],
        &PLAIN,
        FaultKind::Protocol,
        "second time",
    );
    fault(
        ".shared .b64 b;\nmbarrier.init.shared.b64 [b], 2;\nmbarrier.arrive.shared.b64 _, [b], 3;",
        [1, 1],
        &PLAIN,
        FaultKind::Protocol,
        "expects 2 more",
    );
    fault(
        ".shared .b64 b;\nmbarrier.init.shared.b64 [b], 2;\nmbarrier.arrive.shared.b64 _, [b];\nW:\nmbarrier.try_wait.parity.shared.b64 %p0, [b], 0;\n@!%p0 bra W;",
        [1, 1],
        &PLAIN,
        FaultKind::Deadlock,
        "mbarrier.try_wait",
    );
    fault(
        ".shared .align 16 .b8 s[64];\ncp.async.cg.shared.global [s], [%d0], 16, 17;",
        [1, 1],
        &PLAIN,
        FaultKind::Protocol,
        "copies 17 bytes to 16",
    );
    let product = "mov.u64 %d1, 0;\nsetp.eq.u32 %p0, %r0, %r0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0,%f1,%f2,%f3}, %d1, %d1, %p0, 1, 1, 0, 0;";
    fault(product, [1, 128], &PLAIN, FaultKind::Protocol, "wgmma.fence");
    fault(&format!("wgmma.fence.sync.aligned;\n{product}"), [1, 96], &PLAIN, FaultKind::Protocol, "four warps");
    let open = "mov.b64 %d1, 64;\nsetp.eq.u32 %p0, %r0, %r0;\n.shared .align 16 .b8 s[4096];\nwgmma.fence.sync.aligned;\n\
                wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0,%f1,%f2,%f3}, %d1, %d1, %p0, 1, 1, 0, 0;\nwgmma.commit_group.sync.aligned;";
    let left = outcome(open, [1, 128], &PLAIN).expect_err("nobody waits for the product");
    assert!(left.to_string().contains("not waited for"), "{left}");
}

const SHARED: &str =
    ".shared .align 16 .b32 s[256];\nmov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, 4, %r1;\nxor.b32 %r3, %r0, 33;\nmad.lo.u32 %r3, %r3, 4, %r1;\n";

/// All of it written, so that a race is not a read of nothing in some orders.
const WRITTEN: &str = "st.shared.u32 [%r2], 9;\nbar.sync 0;\n";

#[test]
fn races_in_shared_memory() {
    let exchange = |between: &str| format!("{SHARED}{WRITTEN}st.shared.u32 [%r2], %r0;\n{between}\nld.shared.u32 %r4, [%r3];");
    checked(&exchange(""), [1, 64], FaultKind::Race, "nothing orders the two");
    clean(&exchange("bar.sync 0;"), [1, 64]);
    checked(&exchange("bar.warp.sync -1;"), [1, 64], FaultKind::Race, "nothing orders the two");
    // Within a warp the lanes need a meeting as well.
    let neighbours = |between: &str| exchange(between).replace("33;", "1;");
    checked(&neighbours(""), [1, 64], FaultKind::Race, "nothing orders the two");
    clean(&neighbours("bar.warp.sync -1;"), [1, 64]);
    // Reading before the next write.
    let reused = |between: &str| {
        format!("{SHARED}st.shared.u32 [%r2], %r0;\nbar.sync 0;\nld.shared.u32 %r4, [%r3];\n{between}\nst.shared.u32 [%r2], %r4;")
    };
    checked(&reused(""), [1, 64], FaultKind::Race, "");
    clean(&reused("bar.sync 0;"), [1, 64]);
    checked(&format!("{SHARED}st.shared.u32 [s], 1;"), [1, 32], FaultKind::Race, "writes 4 bytes at shared address 0x400");
    clean(&format!("{SHARED}setp.eq.u32 %p0, %r0, 0;\n@%p0 st.shared.u32 [s], 0;\nbar.sync 0;\nred.shared.add.u32 [s], 1;"), [1, 64]);
    // Neighbouring halves of a word are no race.
    clean(
        ".shared .align 4 .b8 h[128];\nmov.u32 %r1, h;\nmad.lo.u32 %r1, %r0, 2, %r1;\nmov.b16 %h0, 5;\nst.shared.u16 [%r1], %h0;",
        [1, 64],
    );
}

#[test]
fn races_between_blocks() {
    checked("ld.global.u32 %r1, [%d0];\nadd.u32 %r1, %r1, 1;\nst.global.u32 [%d0], %r1;", [2, 1], FaultKind::Race, "of block number");
    clean("red.global.add.u32 [%d0], 1;", [4, 32]);
    // The last block sums what all wrote: with a fence before the ticket and one after it.
    let last = |before: &str, after: &str| {
        format!(
            "mov.u32 %r1, %ctaid.x;\nmul.wide.u32 %d1, %r1, 4;\nadd.s64 %d1, %d0, %d1;\nst.global.u32 [%d1+4], %r1;\n{before}\natom.global.add.u32 %r2, [%d0], 1;\n\
             setp.ne.u32 %p0, %r2, 3;\n@%p0 exit;\n{after}\nld.global.u32 %r3, [%d0+4];\nld.global.u32 %r4, [%d0+8];\nld.global.u32 %r5, [%d0+12];\nld.global.u32 %r6, [%d0+16];"
        )
    };
    checked(&last("", "membar.gl;"), [4, 1], FaultKind::Race, "of block number");
    clean(&last("membar.gl;", "membar.gl;"), [4, 1]);
    checked(&last("membar.gl;", ""), [4, 1], FaultKind::Race, "of block number");
    checked(&last("membar.cta;", "membar.gl;"), [4, 1], FaultKind::Race, "");
    clean(&last("fence.acq_rel.gpu;", "fence.acq_rel.gpu;"), [4, 1]);
    clean(&last("", "").replace("atom.global", "atom.acq_rel.gpu.global"), [4, 1]);
}

#[test]
fn reads_of_what_nobody_wrote() {
    checked(&format!("{SHARED}ld.shared.u32 %r4, [%r2];"), [1, 32], FaultKind::Uninitialised, "of which nobody has written all");
    checked(&format!("{SHARED}st.shared.u16 [%r2], 1;\nld.shared.u32 %r4, [%r2];"), [1, 32], FaultKind::Uninitialised, "reads 4 bytes");
    let module = module("ld.global.u32 %r1, [%d0+8];");
    let memory = Memory::new();
    let new = memory.allocate(64);
    let attempt = |memory: &Memory| run(&module, memory, [1, 1, 0], &[&new.to_le_bytes()], &CHECKED).map_err(|fault| fault.kind());
    assert_eq!(attempt(&memory).err(), Some(FaultKind::Uninitialised));
    memory.write(new + 8, &[1; 3]).expect("in bounds");
    assert_eq!(attempt(&memory).err(), Some(FaultKind::Uninitialised));
    memory.copy(new + 11, new + 8, 1).expect("in bounds");
    assert!(attempt(&memory).is_ok());
    let never = memory.allocate(8);
    memory.copy(new + 8, never, 4).expect("in bounds");
    assert_eq!(attempt(&memory).err(), Some(FaultKind::Uninitialised), "a copy of nothing is nothing");
}

#[test]
fn what_a_launch_wrote_the_next_may_read() {
    let (writes, reads) = (
        module("mul.wide.u32 %d1, %r0, 4;\nadd.s64 %d0, %d0, %d1;\nst.global.u32 [%d0], %r0;"),
        module("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0];"),
    );
    for options in [PLAIN, CHECKED] {
        let memory = Memory::new();
        let new = memory.allocate(64);
        run(&writes, &memory, [1, 4, 0], &[&new.to_le_bytes()], &options).expect("sound");
        run(&reads, &memory, [1, 1, 0], &[&new.to_le_bytes()], &CHECKED).expect("all four words were written");
    }
}

#[test]
fn copies_under_way() {
    let copy = ".shared .align 16 .b8 t[1024];\nmov.u32 %r1, t;\nmad.lo.u32 %r1, %r0, 16, %r1;\nst.shared.v4.u32 [%r1], {9, 9, 9, 9};\nbar.sync 0;\nmul.wide.u32 %d1, %r0, 16;\nadd.s64 %d0, %d0, %d1;\n\
                cp.async.cg.shared.global [%r1], [%d0], 16;\ncp.async.commit_group;\n";
    checked(&format!("{copy}ld.shared.u32 %r2, [%r1];"), [1, 32], FaultKind::InFlight, "a copy of lane 0 of warp 0");
    checked(&format!("{copy}st.shared.u32 [%r1+4], %r0;"), [1, 32], FaultKind::InFlight, "under way");
    clean(&format!("{copy}cp.async.wait_group 0;\nld.shared.u32 %r2, [%r1];"), [1, 32]);
    // Another thread's copy needs its wait and a barrier.
    let other = "xor.b32 %r3, %r0, 32;\nmov.u32 %r4, t;\nmad.lo.u32 %r3, %r3, 16, %r4;\n";
    let unordered = format!("{copy}cp.async.wait_all;\n{other}ld.shared.u32 %r2, [%r3];");
    for seed in [None, Some(1), Some(2)] {
        let fault = outcome(&unordered, [1, 64], &Options { seed, ..CHECKED }).expect_err("the other thread may still wait");
        assert!(matches!(fault.kind(), FaultKind::Race | FaultKind::InFlight), "{fault}");
    }
    clean(&format!("{copy}cp.async.wait_all;\nbar.sync 0;\n{other}ld.shared.u32 %r2, [%r3];"), [1, 64]);
}

#[test]
fn the_asynchronous_proxy_needs_its_fence() {
    let store = |fence: &str| {
        format!(
            ".shared .align 128 .b32 s[4];\nst.shared.v4.b32 [s], {{1, 2, 3, 4}};\n{fence}\ncp.async.bulk.global.shared::cta.bulk_group [%d0], [s], 16;\n\
             cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;"
        )
    };
    checked(&store(""), [1, 1], FaultKind::MissingFence, "fence.proxy.async");
    clean(&store("fence.proxy.async.shared::cta;"), [1, 1]);
    let load = |fence: &str| {
        format!(
            ".shared .align 128 .b32 s[4];\n.shared .b64 b;\nmbarrier.init.shared.b64 [b], 1;\n{fence}\nmbarrier.arrive.expect_tx.shared.b64 _, [b], 16;\n\
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%d0], 16, [b];\nW:\nmbarrier.try_wait.parity.shared.b64 %p0, [b], 0;\n@!%p0 bra W;\n\
             ld.shared.u32 %r1, [s];"
        )
    };
    checked(&load(""), [1, 1], FaultKind::MissingFence, "mbarrier");
    clean(&load("fence.mbarrier_init.release.cluster;"), [1, 1]);
    let early = load("fence.proxy.async;").replace("W:\nmbarrier.try_wait.parity.shared.b64 %p0, [b], 0;\n@!%p0 bra W;", "");
    assert!(outcome(&early, [1, 1], &CHECKED).is_err_and(|fault| matches!(fault.kind(), FaultKind::Race | FaultKind::Uninitialised)));
}

#[test]
fn tensor_maps_are_known() {
    let module = parse(&text(
        ".param .align 64 .b8 map[128]",
        ".shared .align 128 .b8 s[128];\n.shared .b64 b;\nmov.b64 %d0, map;\ncvta.param.u64 %d0, %d0;\nmbarrier.init.shared.b64 [b], 1;\n\
         cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%d0, {0}], [b];",
    ));
    let memory = Memory::new();
    upload(&memory, &[0; 16]);
    let fault = run(&module, &memory, [1, 1, 0], &[&[0; 128]], &PLAIN).expect_err("zeros are no map");
    assert!(fault.kind() == FaultKind::Protocol && fault.to_string().contains("no tensor map"), "{fault}");
}
