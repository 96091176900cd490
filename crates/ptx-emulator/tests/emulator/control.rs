//! Branches, loops, calls, and exits.

use crate::support::{HEADER, body, download, parse, run, text, words};
use ptx_emulator::{Launch, Memory, Options, launch};

#[test]
fn loops_of_different_lengths() {
    // The Collatz sequence of each thread's number.
    let got = body(
        96,
        1,
        "add.u32 %r1, %r0, 1;\nmov.u32 %r2, 0;\nL:\nsetp.eq.u32 %p0, %r1, 1;\n@%p0 bra E;\nadd.u32 %r2, %r2, 1;\nand.b32 %r3, %r1, 1;\nsetp.eq.u32 %p1, %r3, 0;\n\
         @%p1 bra H;\nmad.lo.u32 %r1, %r1, 3, 1;\nbra.uni L;\nH:\nshr.u32 %r1, %r1, 1;\nbra L;\nE:\nst.global.u32 [%d0], %r2;",
    );
    let steps = |mut n: u32| {
        (0..)
            .find(|_| {
                n == 1 || {
                    n = if n.is_multiple_of(2) { n / 2 } else { 3 * n + 1 };
                    false
                }
            })
            .unwrap_or(0)
    };
    assert_eq!(got, (1..=96).map(steps).collect::<Vec<u32>>());
}

#[test]
fn tables_of_branches() {
    let got = body(
        64,
        1,
        "rem.u32 %r1, %r0, 3;\nT: .branchtargets A, B, C;\nbrx.idx %r1, T;\nA:\nmov.u32 %r2, 10;\nbra E;\nB:\nmov.u32 %r2, 20;\nbra E;\nC:\nmov.u32 %r2, 30;\nE:\n\
         st.global.u32 [%d0], %r2;",
    );
    assert_eq!(got, (0..64).map(|t| t % 3 * 10 + 10).collect::<Vec<u32>>());
}

#[test]
fn guards_skip_and_labels_have_scopes() {
    let got = body(
        32,
        1,
        "mov.u32 %r1, 5;\nsetp.gt.u32 %p0, %r0, 9;\n@%p0 mov.u32 %r1, 6;\n@!%p0 add.u32 %r1, %r1, %r0;\n{\n.reg .pred %p0;\n.reg .b32 x;\nmov.b32 x, %r1;\nL:\n\
         add.u32 x, x, 1;\nsetp.lt.u32 %p0, x, 20;\n@%p0 bra L;\nmov.b32 %r1, x;\n}\n{\nbra L;\nL:\n}\n@%p0 exit;\nst.global.u32 [%d0], %r1;",
    );
    assert_eq!(got, (0..32).map(|t| if t > 9 { 0 } else { 20 }).collect::<Vec<u32>>());
}

#[test]
fn functions_are_written_out_where_they_are_called() {
    let functions = ".visible .func (.param .b32 result) square(.param .b32 x)\n{\n.reg .b32 %r<3>;\n.reg .pred %p;\nld.param.u32 %r1, [x];\n\
                     setp.gt.u32 %p, %r1, 20;\n@%p bra BIG;\nmul.lo.u32 %r2, %r1, %r1;\nst.param.b32 [result], %r2;\nret;\nBIG:\nst.param.b32 [result+0], 1;\nret;\n}\n\
                     .func (.param .b32 sum) sum_of_squares(.param .b32 a, .param .b32 b)\n{\n.reg .b32 %r<5>;\nld.param.u32 %r1, [a];\nld.param.u32 %r2, [b];\n\
                     {\n.param .b32 p;\n.param .b32 q;\nst.param.b32 [p], %r1;\ncall.uni (q), square, (p);\nld.param.b32 %r3, [q];\n}\n\
                     {\n.param .b32 p;\n.param .b32 q;\nst.param.b32 [p], %r2;\ncall.uni (q), square, (p);\nld.param.b32 %r4, [q];\n}\n\
                     add.u32 %r3, %r3, %r4;\nst.param.b32 [sum], %r3;\nret;\n}\n";
    let kernel = text(
        ".param .u64 out",
        "ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %d1, %r0, 4;\nadd.s64 %d0, %d0, %d1;\n{\n.param .b32 a;\n.param .b32 b;\n.param .b32 s;\n\
         st.param.b32 [a], %r0;\nst.param.b32 [b], 3;\ncall.uni (s), sum_of_squares, (a, b);\nld.param.b32 %r1, [s];\n}\nst.global.u32 [%d0], %r1;",
    );
    let module = parse(&format!("{HEADER}{functions}{}", kernel.replace(HEADER, "")));
    let memory = Memory::new();
    let out = words(&memory, &[0; 32]);
    run(&module, &memory, [1, 32, 0], &[&out.to_le_bytes()], &Options::default()).expect("the kernel is sound");
    assert_eq!(download(&memory, out, 32), (0..32).map(|t| if t > 20 { 10 } else { t * t + 9 }).collect::<Vec<u32>>());
}

#[test]
fn special_registers_in_three_dimensions() {
    let module = parse(&text(
        ".param .u64 out",
        "ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, %tid.y;\nmov.u32 %r2, %tid.z;\nmov.u32 %r3, %ntid.x;\nmov.u32 %r4, %ntid.y;\n\
         mov.u32 %r5, %ctaid.x;\nmov.u32 %r6, %ctaid.y;\nmov.u32 %r7, %ctaid.z;\nmov.u32 %r8, %nctaid.x;\nmov.u32 %r9, %nctaid.y;\nmov.u32 %r10, %ntid.z;\n\
         mad.lo.u32 %r11, %r2, %r4, %r1;\nmad.lo.u32 %r11, %r11, %r3, %r0;\nmad.lo.u32 %r12, %r7, %r9, %r6;\nmad.lo.u32 %r12, %r12, %r8, %r5;\n\
         mul.lo.u32 %r13, %r3, %r4;\nmul.lo.u32 %r13, %r13, %r10;\nmad.lo.u32 %r13, %r12, %r13, %r11;\nmul.wide.u32 %d1, %r13, 4;\nadd.s64 %d0, %d0, %d1;\n\
         st.global.u32 [%d0], %r13;",
    ));
    let memory = Memory::new();
    let out = words(&memory, &vec![0; 36 * 24]);
    let argument = out.to_le_bytes();
    let shape = Launch {
        kernel: crate::support::kernel(&module),
        grid: [4, 3, 2],
        block: [3, 4, 3],
        shared_bytes: 0,
        arguments: &[&argument],
        blocks: None,
    };
    for threads in [1, 2] {
        launch(&memory, &shape, &Options { threads, ..Options::default() }).expect("the kernel is sound");
        assert_eq!(download(&memory, out, 36 * 24), (0..36 * 24).collect::<Vec<u32>>());
    }
}

#[test]
fn lanes_that_spin_do_not_keep_others_from_running() {
    // Lane 0 and warp 1 are waited for in loops.
    let got = body(
        64,
        1,
        ".shared .align 4 .b32 s[2];\nsetp.eq.u32 %p0, %r0, 0;\n@%p0 st.shared.u32 [s], 0;\n@%p0 st.shared.u32 [s+4], 0;\nbar.sync 0;\n\
         setp.eq.u32 %p1, %r0, 0;\n@%p1 bra L0;\nsetp.eq.u32 %p2, %r0, 40;\n@%p2 bra L40;\nW:\nld.volatile.shared.u32 %r1, [s];\nsetp.eq.u32 %p3, %r1, 0;\n@%p3 bra W;\n\
         bra E;\nL0:\nV:\nld.volatile.shared.u32 %r1, [s+4];\nsetp.eq.u32 %p3, %r1, 0;\n@%p3 bra V;\nst.volatile.shared.u32 [s], 7;\nmov.u32 %r1, 8;\nbra E;\n\
         L40:\nst.volatile.shared.u32 [s+4], 1;\nmov.u32 %r1, 9;\nE:\nst.global.u32 [%d0], %r1;",
    );
    assert_eq!(
        got,
        (0..64)
            .map(|t| match t {
                0 => 8,
                40 => 9,
                _ => 7,
            })
            .collect::<Vec<u32>>()
    );
}
