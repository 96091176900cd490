//! Loads, stores and atomics in every space.

use crate::support::{Case, body, download, parse, run, text, upload, words};
use ptx_emulator::{Memory, Options};

#[test]
fn loads_extend_and_stores_cut() {
    // A word at shared address 1024 + 4 tid, read back in other widths.
    let begin = ".shared .align 16 .b8 s[512];\nmov.u32 %r1, s;\nshl.b32 %r2, %r0, 2;\nadd.u32 %r1, %r1, %r2;\nmul.lo.u32 %r3, %r0, 0x9E3779B1;\nst.shared.b32 [%r1], %r3;\n";
    let value = |thread: usize| (thread as u32).wrapping_mul(0x9E37_79B1);
    type Read = fn(u32) -> u32;
    let reads: [(&str, Read); 6] = [
        ("ld.shared.u8 %r4, [%r1];", |v| v & 0xFF),
        ("ld.shared.s8 %r4, [%r1+3];", |v| (v as i32 >> 24) as u32),
        ("ld.shared.u16 %r4, [%r1+2];", |v| v >> 16),
        ("ld.shared.s16 %r4, [%r1];", |v| v as i16 as u32),
        ("ld.volatile.shared.b32 %r4, [%r1];", |v| v),
        ("st.shared.u8 [%r1+1], 0x77;\nld.shared.b32 %r4, [%r1];", |v| (v & 0xFFFF_00FF) | 0x7700),
    ];
    for (line, read) in reads {
        let got = body(96, 1, &format!("{begin}{line}\nst.global.b32 [%d0], %r4;"));
        let expected: Vec<u32> = (0..96).map(|thread| read(value(thread))).collect();
        assert_eq!(got, expected, "{line}");
    }
    Case { line: "ld.global.s8 %o, [%d0];", bits: [32, 32, 32, 16] }.check(&[0x80], |_, _| Ok(()));
}

#[test]
fn generic_addresses_find_their_space() {
    let got = body(
        64,
        4,
        ".shared .align 4 .b32 s[64];\n.local .align 4 .b8 l[16];\nmov.u64 %d2, s;\ncvta.shared.u64 %d2, %d2;\nmul.wide.u32 %d3, %r0, 4;\n\
         add.s64 %d2, %d2, %d3;\nadd.u32 %r1, %r0, 100;\nst.b32 [%d2], %r1;\nmov.u64 %d4, l;\ncvta.local.u64 %d4, %d4;\nst.b32 [%d4+8], %r0;\n\
         ld.b32 %r2, [%d2];\nld.b32 %r3, [%d4+8];\nisspacep.shared %p0, %d2;\nisspacep.local %p1, %d4;\nisspacep.global %p2, %d0;\n\
         isspacep.global %p3, %d2;\nselp.b32 %r4, 1, 0, %p0;\nselp.b32 %r5, 2, 0, %p1;\nselp.b32 %r6, 4, 0, %p2;\nselp.b32 %r7, 8, 0, %p3;\n\
         or.b32 %r4, %r4, %r5;\nor.b32 %r4, %r4, %r6;\nor.b32 %r4, %r4, %r7;\ncvta.to.shared.u64 %d5, %d2;\ncvt.u32.u64 %r8, %d5;\n\
         sub.u32 %r8, %r8, %r0;\nsub.u32 %r8, %r8, %r0;\nsub.u32 %r8, %r8, %r0;\nsub.u32 %r8, %r8, %r0;\nst.v4.b32 [%d0], {%r2, %r3, %r4, %r8};",
    );
    for (thread, out) in got.chunks(4).enumerate() {
        assert_eq!(out, [thread as u32 + 100, thread as u32, 7, 1024]);
    }
}

#[test]
fn vectors_and_parts() {
    let got = body(
        32,
        4,
        "mov.b32 %r1, {0x1234, 0x5678};\nmov.b64 %d2, {%r1, %r0};\nmov.b64 {%h0, %h1, %h2, %h3}, %d2;\nmov.b32 %r2, {%h1, %h0};\n\
         st.global.v2.b64 [%d0], {%d2, 7};\nld.global.v2.b32 {%r3, %r4}, [%d0];\nst.global.v2.u16 [%d0+8], {%h2, 9};\nst.global.b32 [%d0+12], %r2;",
    );
    for (thread, out) in got.chunks(4).enumerate() {
        assert_eq!(out, [0x5678_1234, thread as u32, thread as u32 | 9 << 16, 0x1234_5678]);
    }
}

#[test]
fn tables_and_parameters() {
    let module = parse(&format!(
        ".const .align 4 .b32 primes[4] = {{2, 3, 5, 7}};\n.global .align 4 .u32 total = 40;\n{}",
        text(
            ".param .u64 out, .param .align 8 .b8 pair[16]",
            "ld.param.u64 %d0, [out];\nld.param.b32 %r1, [pair+4];\nld.param.u64 %d3, [pair+8];\nmov.u64 %d1, primes;\nld.const.b32 %r2, [%d1+8];\n\
             ld.const.b32 %r3, [primes+12];\natom.global.add.u32 %r4, [total], 1;\nst.global.v2.b32 [%d0], {%r1, %r2};\nst.global.v2.b32 [%d0+8], {%r3, %r4};\n\
             st.global.b64 [%d0+16], %d3;"
        )
        .replace(crate::support::HEADER, "")
    ));
    let memory = Memory::new();
    let out = words(&memory, &[0; 6]);
    let mut pair = [0; 16];
    pair[4..8].copy_from_slice(&77u32.to_le_bytes());
    pair[8..].copy_from_slice(&(1u64 << 40).to_le_bytes());
    for launch in 0..3 {
        run(&module, &memory, [1, 1, 0], &[&out.to_le_bytes(), &pair], &Options::default()).expect("the kernel is sound");
        assert_eq!(download(&memory, out, 6), [77, 5, 7, 40 + launch, 0, 256], "variables live on from launch to launch");
    }
}

/// All threads of three blocks change one word; what is left does not depend on the order.
fn atomic(line: &str, initial: u64, expected: u64) {
    let module = parse(&text(
        ".param .u64 out",
        &format!(
            "ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmad.lo.u32 %r0, %r1, 64, %r0;\ncvt.u64.u32 %d1, %r0;\n{line}"
        ),
    ));
    let options = [None, Some(1), Some(2)].map(|seed| Options { seed, ..Options::default() });
    let many = Options { threads: 2, ..Options::default() };
    for options in options.into_iter().chain([many, Options { checked: true, ..Options::default() }]) {
        let memory = Memory::new();
        let out = upload(&memory, &initial.to_le_bytes());
        run(&module, &memory, [3, 64, 0], &[&out.to_le_bytes()], &options).unwrap_or_else(|fault| panic!("{line}: {fault}"));
        let got = download(&memory, out, 2);
        assert_eq!(u64::from(got[0]) | u64::from(got[1]) << 32, expected, "{line} ({options:?})");
    }
}

#[test]
fn atomics() {
    atomic("red.global.add.u32 [%d0], %r0;", 5, 5 + 191 * 96);
    atomic("atom.global.add.u64 %d2, [%d0], %d1;", 1 << 40, (1 << 40) + 191 * 96);
    atomic("red.relaxed.gpu.global.add.u64 [%d0], 3;", 0, 3 * 192);
    atomic("atom.global.max.s32 %r3, [%d0], %r0;", 0xFFFF_FFF0, 191);
    atomic("atom.global.min.u32 %r3, [%d0], %r0;", 100, 0);
    atomic("red.global.max.u64 [%d0], %d1;", 0, 191);
    atomic("red.global.or.b32 [%d0], %r0;", 0x100, 0x1FF);
    atomic("red.global.and.b32 [%d0], %r0;", 0xFFFF, 0);
    atomic("red.global.xor.b32 [%d0], 1;", 7, 7);
    atomic("atom.global.inc.u32 %r3, [%d0], 9;", 0, 192 % 10);
    atomic("atom.global.dec.u32 %r3, [%d0], 9;", 0, 8);
    atomic("red.global.add.f32 [%d0], 0f3F000000;", u64::from(1f32.to_bits()), u64::from(97f32.to_bits()));
    atomic("red.global.add.f64 [%d0], 0d3FE0000000000000;", 0, 96f64.to_bits());
    atomic("mov.b32 %r3, 0x3F803F80;\nred.global.add.noftz.bf16x2 [%d0], %r3;", 0, 0x4340_4340);
    atomic("mov.b32 %r3, 0x3C003C00;\nred.global.add.noftz.f16x2 [%d0], %r3;", 0, 0x5A00_5A00);
    atomic("mov.b16 %h0, 0x3C00;\nred.global.add.noftz.f16 [%d0+2], %h0;", 0xABCD_0000_1111, 0xABCD_5A00_1111);
    atomic(
        "mov.b32 %f0, 0f3F800000;\nred.global.add.v2.f32 [%d0], {%f0, %f0};",
        0,
        u64::from(192f32.to_bits()) << 32 | u64::from(192f32.to_bits()),
    );
    // A lock that each thread takes in turn: compare and swap until it is ours.
    atomic(
        "L:\natom.global.cas.b32 %r3, [%d0], 0, 1;\nsetp.ne.u32 %p0, %r3, 0;\n@%p0 bra L;\nmembar.gl;\nld.volatile.global.u32 %r4, [%d0+4];\n\
         add.u32 %r4, %r4, 1;\nst.volatile.global.u32 [%d0+4], %r4;\nmembar.gl;\natom.global.exch.b32 %r3, [%d0], 0;",
        0,
        192 << 32,
    );
}

#[test]
fn atomics_of_shared_memory() {
    let got = body(
        128,
        1,
        ".shared .align 8 .b64 s[2];\nsetp.ne.u32 %p0, %r0, 0;\n@%p0 bra L;\nst.shared.b64 [s], 0;\nst.shared.b64 [s+8], 0;\nL:\nbar.sync 0;\n\
         red.shared.add.u32 [s], %r0;\natom.shared.cas.b64 %d2, [s+8], 0, 9;\nbar.sync 0;\nld.shared.u32 %r1, [s];\nld.shared.u32 %r2, [s+8];\n\
         add.u32 %r1, %r1, %r2;\nst.global.u32 [%d0], %r1;",
    );
    assert_eq!(got, [127 * 64 + 9; 128]);
}

#[test]
fn sparse_allocations_hold_more_than_there_is() {
    let module = parse(&text(
        ".param .u64 big",
        "ld.param.u64 %d0, [big];\nmov.u32 %r1, %ctaid.x;\nmul.wide.u32 %d1, %r1, 1048576;\nadd.s64 %d0, %d0, %d1;\nld.global.u32 %r2, [%d0];\n\
         add.u32 %r2, %r2, %r1;\nst.global.u32 [%d0], %r2;",
    ));
    let memory = Memory::new();
    let bytes = 1usize << 34;
    let big = memory.allocate_sparse(bytes);
    let blocks = [0, 9000, 16383];
    let argument = big.to_le_bytes();
    let launch = ptx_emulator::Launch {
        kernel: crate::support::kernel(&module),
        grid: [16384, 1, 1],
        block: [1, 1, 1],
        shared_bytes: 0,
        arguments: &[&argument],
        blocks: Some(&blocks),
    };
    ptx_emulator::launch(&memory, &launch, &Options { checked: true, ..Options::default() }).expect("the blocks are in bounds");
    for block in blocks {
        assert_eq!(download(&memory, big + (block << 20), 1), [block as u32]);
    }
    memory.fill(big, 0, bytes).expect("the range was allocated");
    assert_eq!(download(&memory, big + (9000 << 20), 1), [0]);
}

#[test]
fn host_copies() {
    let memory = Memory::new();
    let (a, b) = (upload(&memory, &(0..100).collect::<Vec<u8>>()), memory.allocate(100));
    assert!(a % 256 == 0 && b % 256 == 0 && b > a + 100);
    memory.copy(b + 3, a + 1, 90).expect("in bounds");
    memory.fill(b + 10, 0xAB, 5).expect("in bounds");
    let mut got = [0; 100];
    memory.read(b, &mut got).expect("in bounds");
    let expected: Vec<u8> = (0..100)
        .map(|i| match i {
            10..=14 => 0xAB,
            3..=92 => i - 2,
            _ => 0xFF,
        })
        .collect();
    assert_eq!(got.as_slice(), expected);
    memory.copy(a + 1, a, 50).expect("ranges may overlap");
    memory.read(a, &mut got[..52]).expect("in bounds");
    assert_eq!((got[0], got[1], got[50], got[51]), (0, 0, 49, 51));
}
