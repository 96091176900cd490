//! What a launch counts.

use crate::support::{HEADER, parse, run, text, words};
use ptx_emulator::{Counters, Memory, Options};

#[test]
fn instructions_accesses_and_lines() {
    let body = ".shared .align 4 .b32 s[1024];\n.loc 1 10 3\nld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\n.loc 1 11 3\nmul.wide.u32 %d1, %r0, 64;\n\
                add.s64 %d0, %d0, %d1;\nmov.u32 %r1, s;\nmad.lo.u32 %r1, %r0, 8, %r1;\n.loc 1 12 5\nst.shared.u32 [%r1], %r0;\nbar.sync 0;\nld.shared.f32 %f0, [%r1];\n\
                add.f32 %f0, %f0, 0f3F800000;\ncvt.rn.bf16.f32 %h0, %f0;\n.loc 1 13 5, function_name $L, inlined_at 1 99 9\nst.global.f32 [%d0], %f0;";
    let module = parse(&format!(".file 1 \"/somewhere/kernel.cu\"\n{}", text(".param .u64 out", body)));
    let memory = Memory::new();
    let out = words(&memory, &[0; 1024]);
    let count = |counters: bool| {
        run(&module, &memory, [1, 64, 0], &[&out.to_le_bytes()], &Options { counters, ..Options::default() }).expect("the kernel is sound")
    };
    assert_eq!(count(false), Counters::default());
    let counters = count(true);
    let total = counters.total;
    assert_eq!((total.float, total.conversion, total.memory, total.synchronization, total.control), (2, 2, 6, 2, 2));
    assert_eq!(total.instructions(), total.integer + 14);
    assert_eq!((total.shared_wavefronts, total.shared_wavefronts_ideal), (8, 4), "every other bank");
    assert_eq!((total.global_sectors, total.global_sectors_ideal), (64, 8), "a sector for each thread");
    assert_eq!((total.global_bytes_loaded, total.global_bytes_stored), (0, 256));
    let line = |number: u32| counters.lines[&("kernel.cu".to_owned(), number)];
    assert_eq!(line(12).shared_wavefronts, 8);
    assert_eq!(line(13).global_sectors, 64);
    assert_eq!(counters.lines.len(), 4);
    let without = parse(&format!("{HEADER}.visible .entry plain()\n{{\nret;\n}}\n"));
    let counters = run(&without, &memory, [1, 1, 0], &[], &Options { counters: true, ..Options::default() }).expect("the kernel is sound");
    assert_eq!(counters.lines.keys().next(), Some(&("plain".to_owned(), 6)));
}
