//! Instructions in which lanes take part together.

use crate::support::body;

/// Runs a line that leaves its result in %r2; %r0 is the thread, %r1 a number of its own.
fn lanes(line: &str) -> Vec<u32> {
    body(64, 1, &format!("mad.lo.u32 %r1, %r0, 7, 100;\n{line}\nst.global.b32 [%d0], %r2;"))
}

fn expect(line: &str, expected: impl Fn(u32) -> u32) {
    let expected: Vec<u32> = (0..64).map(expected).collect();
    assert_eq!(lanes(line), expected, "{line}");
}

fn number(thread: u32) -> u32 {
    thread * 7 + 100
}

#[test]
fn shuffles() {
    expect("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;", |t| number(t ^ 5));
    expect("shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;", |t| number((t & 32) | 3));
    expect("shfl.sync.up.b32 %r2, %r1, 2, 0, -1;", |t| if t % 32 < 2 { number(t) } else { number(t - 2) });
    expect("shfl.sync.down.b32 %r2, %r1, 4, 31, -1;", |t| if t % 32 > 27 { number(t) } else { number(t + 4) });
    // Segments of eight lanes.
    expect("shfl.sync.idx.b32 %r2, %r1, 1, 0x181F, -1;", |t| number((t & !7) | 1));
    expect("shfl.sync.down.b32 %r2, %r1, 3, 0x181F, -1;", |t| if t % 8 > 4 { number(t) } else { number(t + 3) });
    let in_range = "shfl.sync.up.b32 %r3|%p0, %r1, 2, 0, -1;\nselp.b32 %r2, 1, 0, %p0;";
    expect(in_range, |t| u32::from(t % 32 >= 2));
}

#[test]
fn shuffles_wait_for_the_lanes_they_name() {
    // Odd lanes take a longer way.
    let line =
        "and.b32 %r3, %r0, 1;\nsetp.eq.u32 %p0, %r3, 0;\n@%p0 bra A;\nadd.u32 %r1, %r1, 1000;\nA:\nshfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;";
    expect(line, |t| number(t ^ 1) + if t % 2 == 0 { 1000 } else { 0 });
    // Each half of the warp has a mask of its own.
    let line = "and.b32 %r3, %r0, 16;\nsetp.eq.u32 %p0, %r3, 0;\n@%p0 bra A;\nshfl.sync.bfly.b32 %r2, %r1, 2, 31, 0xFFFF0000;\nbra B;\nA:\n\
                shfl.sync.bfly.b32 %r2, %r1, 3, 31, 0x0000FFFF;\nB:";
    expect(line, |t| number(t ^ if t & 16 == 0 { 3 } else { 2 }));
}

#[test]
fn votes() {
    let third = "rem.u32 %r3, %r0, 3;\nsetp.eq.u32 %p0, %r3, 0;\n";
    let ballot = |warp: u32| (0..32).filter(|lane| (warp * 32 + lane).is_multiple_of(3)).fold(0u32, |mask, lane| mask | 1 << lane);
    expect(&format!("{third}vote.sync.ballot.b32 %r2, %p0, -1;"), |t| ballot(t / 32));
    expect(&format!("{third}vote.sync.ballot.b32 %r2, !%p0, -1;"), |t| !ballot(t / 32));
    expect(&format!("{third}vote.sync.any.pred %p1, %p0, -1;\nselp.b32 %r2, 1, 0, %p1;"), |_| 1);
    expect(&format!("{third}vote.sync.all.pred %p1, %p0, -1;\nselp.b32 %r2, 1, 0, %p1;"), |_| 0);
    expect("setp.lt.u32 %p0, %r0, 32;\nvote.sync.uni.pred %p1, %p0, -1;\nselp.b32 %r2, 1, 0, %p1;", |_| 1);
    expect("setp.lt.u32 %p0, %r0, 40;\nvote.sync.uni.pred %p1, %p0, -1;\nselp.b32 %r2, 1, 0, %p1;", |t| u32::from(t < 32));
}

#[test]
fn matches_reductions_and_leaders() {
    let same = |t: u32| (0..32).filter(|lane| lane % 4 == t % 4).fold(0u32, |mask, lane| mask | 1 << lane);
    expect("and.b32 %r3, %r0, 3;\nmatch.any.sync.b32 %r2, %r3, -1;", same);
    expect("and.b32 %r3, %r0, 3;\ncvt.u64.u32 %d2, %r3;\nmatch.any.sync.b64 %r2, %d2, -1;", same);
    expect("shr.u32 %r3, %r0, 5;\nmatch.all.sync.b32 %r2|%p0, %r3, -1;", |_| u32::MAX);
    expect("match.all.sync.b32 %r3|%p0, %r0, -1;\nselp.b32 %r2, 1, %r3, %p0;", |_| 0);
    let all = |t: u32| (t / 32 * 32..t / 32 * 32 + 32).map(number);
    expect("redux.sync.add.u32 %r2, %r1, -1;", |t| all(t).sum());
    expect("redux.sync.max.u32 %r2, %r1, -1;", |t| all(t).max().unwrap_or(0));
    expect("sub.s32 %r1, %r1, 200;\nredux.sync.min.s32 %r2, %r1, -1;", |t| all(t).map(|n| n as i32 - 200).min().unwrap_or(0) as u32);
    expect("redux.sync.or.b32 %r2, %r1, -1;", |t| all(t).fold(0, |a, b| a | b));
    expect("redux.sync.and.b32 %r2, %r1, -1;", |t| all(t).fold(!0, |a, b| a & b));
    expect("redux.sync.xor.b32 %r2, %r1, -1;", |t| all(t).fold(0, |a, b| a ^ b));
    expect("elect.sync %r3|%p0, 0xFFFFFFFF;\nselp.b32 %r2, 1, 0, %p0;", |t| u32::from(t % 32 == 0));
    expect("activemask.b32 %r2;", |_| u32::MAX);
    expect("mov.u32 %r2, %lanemask_lt;", |t| (1 << (t % 32)) - 1);
    expect("mov.u32 %r2, %lanemask_ge;", |t| u32::MAX << (t % 32));
    expect("mov.u32 %r2, %warpid;", |t| t / 32);
    expect("mov.u32 %r2, WARP_SZ;", |_| 32);
}

#[test]
fn barriers() {
    // Each thread reads what a thread of another warp wrote, twice through the same place.
    let exchange = ".shared .align 4 .b32 s[128];\nmov.u32 %r1, s;\nshl.b32 %r2, %r0, 2;\nadd.u32 %r3, %r1, %r2;\nxor.b32 %r4, %r2, 0x1A4;\nadd.u32 %r4, %r4, %r1;\n\
                    st.shared.u32 [%r3], %r0;\nbar.sync 0;\nld.shared.u32 %r5, [%r4];\nbar.sync 0;\nst.shared.u32 [%r3], %r5;\nbarrier.sync 0;\n\
                    ld.shared.u32 %r6, [%r4];\nshl.b32 %r6, %r6, 16;\nor.b32 %r6, %r6, %r5;\nst.global.u32 [%d0], %r6;";
    let expected: Vec<u32> = (0..128).map(|t| t << 16 | (t ^ 0x69)).collect();
    assert_eq!(body(128, 1, exchange), expected);
    // Warps 0 and 1 meet at barrier 3 alone; warp 2 arrives at 4 without waiting and warp 3 waits there.
    let named = ".shared .align 4 .b32 s[4];\nmov.u32 %r1, s;\nshr.u32 %r2, %r0, 5;\nsetp.lt.u32 %p0, %r2, 2;\nand.b32 %r3, %r0, 31;\nsetp.ne.u32 %p1, %r3, 0;\n\
                 shl.b32 %r4, %r2, 2;\nadd.u32 %r4, %r1, %r4;\n@%p1 bra A;\nst.shared.u32 [%r4], %r0;\nA:\n@%p0 bra B;\nsetp.eq.u32 %p2, %r2, 3;\n@%p2 bra C;\n\
                 bar.arrive 4, 64;\nmov.u32 %r5, 5;\nbra D;\nC:\nbar.sync 4, 64;\nld.shared.u32 %r5, [s+8];\nbra D;\nB:\nbar.sync 3, 64;\nxor.b32 %r4, %r2, 1;\n\
                 shl.b32 %r4, %r4, 2;\nadd.u32 %r4, %r4, %r1;\nld.shared.u32 %r5, [%r4];\nD:\nst.global.u32 [%d0], %r5;";
    let expected: Vec<u32> = (0..128).map(|t| [32, 0, 5, 64][t / 32]).collect();
    assert_eq!(body(128, 1, named), expected);
}

#[test]
fn barriers_that_reduce() {
    let line = "rem.u32 %r1, %r0, 3;\nsetp.eq.u32 %p0, %r1, 0;\nbar.red.popc.u32 %r2, 0, %p0;\nbar.red.and.pred %p1, 0, %p0;\nbar.red.or.pred %p2, 0, !%p0;\n\
                selp.b32 %r3, 1000, 0, %p1;\nselp.b32 %r4, 2000, 0, %p2;\nadd.u32 %r2, %r2, %r3;\nadd.u32 %r2, %r2, %r4;\nst.global.u32 [%d0], %r2;";
    assert_eq!(body(96, 1, line), [2032; 96]);
}

#[test]
fn lanes_meet_at_different_barriers_of_the_warp() {
    let line = ".shared .align 4 .b32 s[64];\nmov.u32 %r1, s;\nshl.b32 %r2, %r0, 2;\nadd.u32 %r2, %r2, %r1;\nst.shared.u32 [%r2], %r0;\nand.b32 %r3, %r0, 1;\n\
                setp.eq.u32 %p0, %r3, 0;\n@%p0 bra A;\nbar.warp.sync -1;\nbra B;\nA:\nbar.warp.sync -1;\nB:\nxor.b32 %r4, %r0, 1;\nshl.b32 %r4, %r4, 2;\n\
                add.u32 %r4, %r4, %r1;\nld.shared.u32 %r5, [%r4];\nst.global.u32 [%d0], %r5;";
    let expected: Vec<u32> = (0..64).map(|t| t ^ 1).collect();
    assert_eq!(body(64, 1, line), expected);
}
