//! Copies under way, and the barriers that tell when they are done.

use crate::support::{download, parse, run, text, words};
use ptx_emulator::{Memory, Options, Swizzle, TensorMap};

fn every_way() -> impl Iterator<Item = Options> {
    let seeds = [None, Some(1), Some(2), Some(3)].map(|seed| Options { seed, ..Options::default() });
    seeds.into_iter().chain([Options { checked: true, ..Options::default() }])
}

#[test]
fn copies_arrive_when_they_are_waited_for() {
    // Two groups; the second half of the second one's bytes is zero, and thread 5's copy is left out.
    let module = parse(&text(
        ".param .u64 in, .param .u64 out",
        ".shared .align 16 .b8 s[2048];\nld.param.u64 %d0, [in];\nld.param.u64 %d1, [out];\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %d2, %r0, 16;\nadd.s64 %d0, %d0, %d2;\n\
         add.s64 %d1, %d1, %d2;\nadd.s64 %d1, %d1, %d2;\nmov.u32 %r1, s;\nshl.b32 %r2, %r0, 4;\nadd.u32 %r1, %r1, %r2;\nsetp.eq.u32 %p0, %r0, 5;\nselp.b32 %r3, 0, 8, %p0;\n\
         cp.async.cg.shared.global [%r1], [%d0], 16;\ncp.async.commit_group;\ncp.async.ca.shared.global.L2::128B [%r1+1024], [%d0], 8, %r3;\n\
         cp.async.ca.shared.global [%r1+1032], [%d0], 8, 0;\ncp.async.commit_group;\ncp.async.wait_group 1;\nld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1];\n\
         cp.async.wait_all;\nld.shared.v4.b32 {%r8, %r9, %r10, %r11}, [%r1+1024];\nst.global.v4.b32 [%d1], {%r4, %r5, %r6, %r7};\nst.global.v4.b32 [%d1+16], {%r8, %r9, %r10, %r11};",
    ));
    for options in every_way() {
        let memory = Memory::new();
        let (input, out) = (words(&memory, &(0..256).collect::<Vec<_>>()), words(&memory, &[9; 512]));
        run(&module, &memory, [1, 64, 0], &[&input.to_le_bytes(), &out.to_le_bytes()], &options).unwrap_or_else(|fault| panic!("{fault}"));
        for (thread, got) in download(&memory, out, 512).chunks(8).enumerate() {
            let first = 4 * thread as u32;
            let second = if thread == 5 { [0, 0] } else { [first, first + 1] };
            assert_eq!(got, [first, first + 1, first + 2, first + 3, second[0], second[1], 0, 0]);
        }
    }
}

#[test]
fn phases_of_an_mbarrier() {
    // Warp 0 produces four numbers, warp 1 consumes them; each waits for the other.
    let module = parse(&text(
        ".param .u64 out",
        ".shared .align 8 .b64 full;\n.shared .align 8 .b64 empty;\n.shared .align 4 .b32 box;\n.reg .b64 %state;\nld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\nsetp.ne.u32 %p0, %r0, 0;\n@%p0 bra A;\n\
         mbarrier.init.shared.b64 [full], 1;\nmbarrier.init.shared.b64 [empty], 1;\nA:\nbar.sync 0;\nmov.u32 %r1, 0;\nsetp.gt.u32 %p1, %r0, 31;\n@%p1 bra CONSUME;\n@%p0 bra END;\n\
         P:\nand.b32 %r2, %r1, 1;\nxor.b32 %r2, %r2, 1;\nPW:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [empty], %r2;\n@!%p2 bra PW;\nmul.lo.u32 %r3, %r1, 11;\nst.shared.u32 [box], %r3;\n\
         mbarrier.arrive.shared.b64 %state, [full];\nadd.u32 %r1, %r1, 1;\nsetp.lt.u32 %p3, %r1, 4;\n@%p3 bra P;\nbra END;\n\
         CONSUME:\nsetp.ne.u32 %p4, %r0, 32;\n@%p4 bra END;\nC:\nand.b32 %r2, %r1, 1;\nCW:\nmbarrier.test_wait.parity.shared.b64 %p2, [full], %r2;\n@!%p2 bra CW;\nld.shared.u32 %r3, [box];\n\
         mul.wide.u32 %d1, %r1, 4;\nadd.s64 %d1, %d0, %d1;\nst.global.u32 [%d1], %r3;\nmbarrier.arrive.shared::cta.b64 _, [empty];\nadd.u32 %r1, %r1, 1;\nsetp.lt.u32 %p3, %r1, 4;\n@%p3 bra C;\nEND:",
    ));
    for options in every_way() {
        let memory = Memory::new();
        let out = words(&memory, &[9; 4]);
        run(&module, &memory, [1, 64, 0], &[&out.to_le_bytes()], &options).unwrap_or_else(|fault| panic!("{fault} {options:?}"));
        assert_eq!(download(&memory, out, 4), [0, 11, 22, 33]);
    }
}

#[test]
fn states_and_copies_that_arrive() {
    let module = parse(&text(
        ".param .u64 in, .param .u64 out",
        ".shared .align 8 .b64 bar;\n.shared .align 16 .b8 s[512];\nld.param.u64 %d0, [in];\nld.param.u64 %d1, [out];\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %d2, %r0, 8;\nadd.s64 %d0, %d0, %d2;\n\
         add.s64 %d1, %d1, %d2;\nmov.u32 %r1, s;\nshl.b32 %r2, %r0, 3;\nadd.u32 %r3, %r1, %r2;\nxor.b32 %r2, %r2, 0x1F8;\nadd.u32 %r4, %r1, %r2;\nsetp.ne.u32 %p0, %r0, 0;\n@%p0 bra A;\n\
         mbarrier.init.shared.b64 [bar], 64;\nA:\nbar.sync 0;\ncp.async.ca.shared.global [%r3], [%d0], 8;\ncp.async.mbarrier.arrive.noinc.shared.b64 [bar];\n\
         W:\nmbarrier.test_wait.parity.shared.b64 %p1, [bar], 0;\n@!%p1 bra W;\nld.shared.v2.b32 {%r5, %r6}, [%r4];\nbar.sync 0;\nmbarrier.arrive.shared.b64 %d3, [bar];\n\
         V:\nmbarrier.try_wait.shared.b64 %p1, [bar], %d3;\n@!%p1 bra V;\nst.global.v2.b32 [%d1], {%r5, %r6};",
    ));
    for options in every_way() {
        let memory = Memory::new();
        let (input, out) = (words(&memory, &(0..128).collect::<Vec<_>>()), words(&memory, &[9; 128]));
        run(&module, &memory, [1, 64, 0], &[&input.to_le_bytes(), &out.to_le_bytes()], &options)
            .unwrap_or_else(|fault| panic!("{fault} {options:?}"));
        let expected: Vec<u32> = (0..128).map(|i| ((i / 2) ^ 63) * 2 + i % 2).collect();
        assert_eq!(download(&memory, out, 128), expected);
    }
}

/// A tile of a tensor of 20 × 10 words in, over its edge, and out again to another tensor, once stored and once added.
#[test]
fn tiles_over_the_edge() {
    let module = parse(&text(
        ".param .align 64 .b8 from[128], .param .align 64 .b8 to[128], .param .u64 out",
        ".shared .align 128 .b8 s[512];\n.shared .align 8 .b64 bar;\nmov.b64 %d0, from;\ncvta.param.u64 %d0, %d0;\nmov.b64 %d1, to;\ncvta.param.u64 %d1, %d1;\nld.param.u64 %d2, [out];\n\
         mov.u32 %r1, s;\nmov.u32 %r2, bar;\nmbarrier.init.shared.b64 [%r2], 1;\nfence.mbarrier_init.release.cluster;\nmbarrier.arrive.expect_tx.shared.b64 _, [%r2], 512;\n\
         mov.u32 %r3, 16;\nmov.u32 %r4, -2;\ncp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%d0, {%r3, %r4}], [%r2];\n\
         W:\nmbarrier.try_wait.parity.shared.b64 %p0, [%r2], 0;\n@!%p0 bra W;\nfence.proxy.async.shared::cta;\n\
         cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%d1, {%r3, %r4}], [%r1];\ncp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%d2], [%r1], 512;\n\
         cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;",
    ));
    let map = |address: u64, swizzle: Swizzle| {
        TensorMap { address, element_bytes: 4, sizes: vec![20, 10], strides: vec![80], tile: vec![16, 8], swizzle }
            .encode()
            .expect("the map is sound")
    };
    for swizzle in [Swizzle::None, Swizzle::Bytes64] {
        for options in every_way() {
            let memory = Memory::new();
            let (from, to) = (words(&memory, &(1000..1200).collect::<Vec<_>>()), words(&memory, &[7; 200]));
            let out = words(&memory, &[1; 128]);
            let arguments: [&[u8]; 3] = [&map(from, swizzle), &map(to, swizzle), &out.to_le_bytes()];
            run(&module, &memory, [1, 1, 0], &arguments, &options).unwrap_or_else(|fault| panic!("{fault} {options:?}"));
            let copied: Vec<u32> = (0..200).map(|i| if i % 20 >= 16 && i / 20 < 6 { 1000 + i } else { 7 }).collect();
            assert_eq!(download(&memory, to, 200), copied);
            let added = download(&memory, out, 128);
            // Where the swizzle puts 16 bytes: two rows of 64 bytes to 128, of which bits 4 and 5 change by bits 7 and 8.
            let place = |byte: usize| if swizzle == Swizzle::None { byte } else { byte ^ (byte >> 7 & 3) << 4 };
            for i in 0..128 {
                let (row, column) = (i / 16, i % 16);
                let inside = row >= 2 && column < 4;
                let expected = 1 + if inside { 1000 + (row as u32 - 2) * 20 + 16 + column as u32 } else { 0 };
                assert_eq!(added[place(4 * i) / 4], expected, "row {row} column {column}");
            }
        }
    }
}
