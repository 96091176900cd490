//! Matrix instructions against plain sums of products. Small whole numbers make every sum exact, so that the order of k is free.

use crate::support::{HEADER, Random, download, parse, run, text, upload, words};
use ptx_emulator::{Memory, Options, Swizzle, TensorMap};

fn bf16(value: i32) -> u16 {
    ((value as f32).to_bits() >> 16) as u16
}

/// Exact for whole numbers up to 2048.
fn f16(value: i32) -> u16 {
    let bits = (value as f32).to_bits();
    if value == 0 { 0 } else { (bits >> 16 & 0x8000) as u16 | ((((bits >> 23) & 255) - 112) << 10) as u16 | (bits >> 13 & 0x3FF) as u16 }
}

fn encode(value: i32, kind: &str) -> Vec<u8> {
    match kind {
        "bf16" => bf16(value).to_le_bytes().to_vec(),
        "f16" => f16(value).to_le_bytes().to_vec(),
        _ => (value as f32).to_bits().to_le_bytes().to_vec(),
    }
}

/// Rows × columns small whole numbers.
fn numbers(random: &mut Random, count: usize) -> Vec<i32> {
    (0..count).map(|_| (random.next() % 9) as i32 - 4).collect()
}

/// m16n8k`depth`: each lane gathers its fragments from row-major matrices in memory by the formulas of the manual.
fn mma(kind: &str, depth: usize, wide: bool) {
    let mut random = Random(depth as u64);
    let (a, b, c) = (numbers(&mut random, 16 * depth), numbers(&mut random, depth * 8), numbers(&mut random, 16 * 8));
    let (per_register, size) = if kind == "tf32" { (1, 4) } else { (2, 2) };
    let (na, nb, nc) = (depth / 2 / per_register, depth / 4 / per_register, if wide { 4 } else { 2 });
    // Fragments as the manual lists them: register by register, lane by lane.
    let mut fragments = Vec::new();
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        for i in 0..na {
            let (row, column) = (g + 8 * (i % 2), per_register * (t + 4 * (i / 2)));
            fragments.extend((0..per_register).flat_map(|e| encode(a[row * depth + column + e], kind)));
        }
        for i in 0..nb {
            let row = per_register * (t + 4 * i);
            fragments.extend((0..per_register).flat_map(|e| encode(b[(row + e) * 8 + g], kind)));
        }
        for i in 0..4 {
            let value = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
            fragments.extend(encode(value, if wide { "f32" } else { "f16" }));
        }
    }
    assert_eq!(fragments.len(), 32 * (size * per_register * (na + nb) + if wide { 16 } else { 8 }));
    let list = |from: usize, count: usize| (from..from + count).map(|i| format!("%r{i}")).collect::<Vec<_>>().join(", ");
    let count = na + nb + nc;
    let loads: String = (0..count).map(|i| format!("ld.global.b32 %r{}, [%d2+{}];\n", 10 + i, 4 * i)).collect();
    let stores: String = (0..nc).map(|i| format!("st.global.b32 [%d4+{}], %r{};\n", 4 * i, 2 + i)).collect();
    let sum = if wide { "f32" } else { "f16" };
    let module = parse(&text(
        ".param .u64 in, .param .u64 out",
        &format!(
            "ld.param.u64 %d0, [in];\nld.param.u64 %d1, [out];\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %d3, %r0, {};\nadd.s64 %d2, %d0, %d3;\n\
             mul.wide.u32 %d3, %r0, {};\nadd.s64 %d4, %d1, %d3;\n{loads}mma.sync.aligned.m16n8k{depth}.row.col.{sum}.{kind}.{kind}.{sum} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n{stores}",
            4 * count,
            4 * nc,
            list(2, nc),
            list(10, na),
            list(10 + na, nb),
            list(10 + na + nb, nc),
        ),
    ));
    let memory = Memory::new();
    let (input, out) = (upload(&memory, &fragments), words(&memory, &vec![0; 32 * nc]));
    run(&module, &memory, [1, 32, 0], &[&input.to_le_bytes(), &out.to_le_bytes()], &Options::default()).expect("the kernel is sound");
    let got = download(&memory, out, 32 * nc);
    for lane in 0..32 {
        for i in 0..4 {
            let (row, column) = (lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2);
            let expected = (0..depth).fold(c[row * 8 + column], |sum, k| sum + a[row * depth + k] * b[k * 8 + column]);
            let (got, expected) = if wide {
                (got[lane * nc + i], (expected as f32).to_bits())
            } else {
                (got[lane * nc + i / 2] >> (16 * (i % 2)) & 0xFFFF, u32::from(f16(expected)))
            };
            assert_eq!(got, expected, "{kind} k{depth} row {row} column {column}");
        }
    }
}

#[test]
fn products_of_a_warp() {
    for depth in [8, 16] {
        mma("bf16", depth, true);
        mma("f16", depth, true);
        mma("f16", depth, false);
    }
    mma("tf32", 4, true);
    mma("tf32", 8, true);
}

#[test]
fn tf32_ignores_the_low_bits() {
    let fragment = "mov.b32 %r1, 0x3F801FFF;\nmov.b32 %r2, 0f3F800000;\nmov.b32 %r3, 0;\n\
                    mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r4, %r5, %r6, %r7}, {%r1, %r1}, {%r2}, {%r3, %r3, %r3, %r3};\nst.global.b32 [%d0], %r4;";
    assert_eq!(crate::support::body(32, 1, fragment), [4f32.to_bits(); 32]);
}

/// Words 0, 1, 2... in shared memory, loaded as matrices and stored back transposed.
#[test]
fn matrices_between_memory_and_registers() {
    for (count, transposed) in [(1, false), (2, true), (4, false), (4, true)] {
        let trans = if transposed { ".trans" } else { "" };
        let list = (10..10 + count).map(|i| format!("%r{i}")).collect::<Vec<_>>().join(", ");
        let stores: String = (0..count).map(|i| format!("st.global.b32 [%d0+{}], %r{};\n", 4 * i, 10 + i)).collect();
        let loads: String = (0..4).map(|i| format!("ld.shared.b32 %r{}, [%r2+{}];\n", 20 + i, 4 * i)).collect();
        let stores_back: String = (0..4).map(|i| format!("st.global.b32 [%d0+{}], %r{};\n", 16 + 4 * i, 20 + i)).collect();
        // 32 rows of 16 bytes; row r of lane r. Element e of all is the number e.
        let fill: String = (0..4).map(|i| format!("mad.lo.u32 %r3, %r0, 8, {};\nadd.u32 %r4, %r3, 1;\nshl.b32 %r4, %r4, 16;\nor.b32 %r3, %r3, %r4;\nst.shared.b32 [%r2+{}], %r3;\n", 2 * i, 4 * i)).collect();
        let got = crate::support::body(
            32,
            8,
            &format!(
                ".shared .align 16 .b8 s[512];\nmov.u32 %r1, s;\nshl.b32 %r2, %r0, 4;\nadd.u32 %r2, %r2, %r1;\n{fill}bar.warp.sync -1;\n\
                 ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{list}}}, [%r2];\n{stores}bar.warp.sync -1;\n\
                 stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [%r2], {{{list}}};\nbar.warp.sync -1;\n{loads}{stores_back}"
            ),
        );
        for (lane, words) in got.chunks(8).enumerate() {
            let (g, t) = (lane / 4, lane % 4 * 2);
            for (m, word) in words[..count].iter().enumerate() {
                let element = |row: usize, column: usize| (m * 64 + row * 8 + column) as u32;
                let expected = if transposed { [element(t, g), element(t + 1, g)] } else { [element(g, t), element(g, t + 1)] };
                assert_eq!([word & 0xFFFF, word >> 16], expected, "x{count}{trans} lane {lane} matrix {m}");
            }
            // Lane's row as it lies in memory afterwards: stored transposed.
            for (i, word) in words[4..].iter().enumerate() {
                let (m, row) = (lane / 8, lane % 8);
                let element = |column: usize| {
                    let (r, c) = if transposed || m >= count { (row, column) } else { (column, row) };
                    (m * 64 + r * 8 + c) as u32
                };
                assert_eq!([word & 0xFFFF, word >> 16], [element(2 * i), element(2 * i + 1)], "x{count}{trans} row {lane}");
            }
        }
    }
}

/// D[64, n] = A[64, 16·steps] B[n, 16·steps]ᵀ (or B[16·steps, n]) with A and B brought by tensor copies with a 128-byte swizzle.
struct Group {
    columns: usize,
    transposed: bool,
    registers: bool,
    sum: &'static str,
}

impl Group {
    fn text(&self) -> String {
        let n = self.columns;
        let sums = if self.sum == "f32" { n / 2 } else { n / 4 };
        let list = (0..sums).map(|i| format!("%s{i}")).collect::<Vec<_>>().join(", ");
        let zero: String = (0..sums).map(|i| format!("mov.b32 %s{i}, 0;\n")).collect();
        let kind = if self.sum == "f32" { "bf16" } else { "f16" };
        let mut products = String::new();
        for step in 0..4 {
            let b_offset = if self.transposed { step * 2048 / 16 } else { step * 2 };
            let (a, flags) = if self.registers {
                // The fragment by plain loads: register i holds row g + 8 (i odd), columns 2t + 8 (i over 1).
                for i in 0..4 {
                    products += &format!("ld.global.b32 %r{}, [%d7+{}];\n", 20 + i, 2 * (step * 16 + 8 * (i / 2)) + 128 * 8 * (i % 2));
                }
                ("{%r20, %r21, %r22, %r23}".to_owned(), format!("p, 1, 1, {}", u8::from(self.transposed)))
            } else {
                products += &format!("add.s64 %d5, %d3, {};\n", step * 2);
                ("%d5".to_owned(), format!("p, 1, 1, 0, {}", u8::from(self.transposed)))
            };
            products += &format!(
                "add.s64 %d6, %d4, {b_offset};\nsetp.ne.b32 p, {step}, 0;\nwgmma.fence.sync.aligned;\nwgmma.mma_async.sync.aligned.m64n{n}k16.{}.{kind}.{kind} {{{list}}}, {a}, %d6, {flags};\n\
                 wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n",
                self.sum
            );
        }
        let stores: String = (0..sums).map(|i| format!("st.global.b32 [%d2+{}], %s{i};\n", 4 * i)).collect();
        let stride = 1024;
        let leading = if self.transposed { 8192 } else { 16 };
        let descriptor = |register: &str, from: &str, leading: u64, stride: u64| {
            let fields = (leading / 16) << 16 | (stride / 16) << 32 | 1 << 62;
            format!(
                "and.b32 %r10, {from}, 0x3FFFF;\nshr.u32 %r10, %r10, 4;\ncvt.u64.u32 {register}, %r10;\nor.b64 {register}, {register}, {fields};\n"
            )
        };
        let b_tiles: String = if self.transposed {
            (0..n / 64).map(|i| format!("add.u32 %r11, %r7, {};\ncp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r11], [%d1, {{{}, 0}}], [%r8];\n", i * 8192, i * 64)).collect()
        } else {
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], [%d1, {0, 0}], [%r8];\n".to_owned()
        };
        let bytes = 8192 + 128 * n;
        let body = format!(
            ".extern .shared .align 1024 .b8 s[];\n.reg .pred p, q;\n.reg .b32 %s<{sums}>;\nmov.b64 %d0, map_a;\ncvta.param.u64 %d0, %d0;\nmov.b64 %d1, map_b;\n\
             cvta.param.u64 %d1, %d1;\nld.param.u64 %d2, [out];\nld.param.u64 %d7, [plain_a];\nmov.u32 %r0, %tid.x;\nmov.u32 %r6, s;\nadd.u32 %r7, %r6, 8192;\nadd.u32 %r8, %r7, {b_bytes};\n\
             setp.ne.u32 q, %r0, 0;\n@q bra READY;\nmbarrier.init.shared::cta.b64 [%r8], 1;\nfence.mbarrier_init.release.cluster;\nREADY:\nbar.sync 0;\n@q bra LOADED;\n\
             mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], {bytes};\n\
             cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%d0, {{0, 0}}], [%r8];\n{b_tiles}LOADED:\n\
             W:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%r8], 0;\n@!p bra W;\n{}{}{zero}\
             shr.u32 %r12, %r0, 5;\nand.b32 %r13, %r0, 31;\nshr.u32 %r14, %r13, 2;\nand.b32 %r13, %r13, 3;\nmad.lo.u32 %r14, %r12, 16, %r14;\nmul.lo.u32 %r14, %r14, 128;\n\
             mad.lo.u32 %r14, %r13, 4, %r14;\ncvt.u64.u32 %d8, %r14;\nadd.s64 %d7, %d7, %d8;\n{products}\
             mul.wide.u32 %d8, %r0, {};\nadd.s64 %d2, %d2, %d8;\n{stores}",
            descriptor("%d3", "%r6", 16, 1024),
            descriptor("%d4", "%r7", leading, stride),
            4 * sums,
            b_bytes = 128 * n,
        );
        text(".param .align 64 .b8 map_a[128], .param .align 64 .b8 map_b[128], .param .u64 plain_a, .param .u64 out", &body)
    }

    fn check(&self) {
        let (n, depth) = (self.columns, 64);
        let kind = if self.sum == "f32" { "bf16" } else { "f16" };
        let mut random = Random(n as u64);
        let (a, b) = (numbers(&mut random, 64 * depth), numbers(&mut random, n * depth));
        let memory = Memory::new();
        let matrix = |values: &[i32]| upload(&memory, &values.iter().flat_map(|value| encode(*value, kind)).collect::<Vec<_>>());
        // B by columns of the product, or by k.
        let at = |column: usize, k: usize| if self.transposed { b[k * n + column] } else { b[column * depth + k] };
        let map = |address: u64, columns: usize, rows: usize, tile: [u32; 2]| {
            let (sizes, strides) = (vec![columns as u64, rows as u64], vec![2 * columns as u64]);
            TensorMap { address, element_bytes: 2, sizes, strides, tile: tile.to_vec(), swizzle: Swizzle::Bytes128 }
                .encode()
                .expect("the map is sound")
        };
        let (da, db) = (matrix(&a), matrix(&b));
        let map_b = if self.transposed { map(db, n, depth, [64, 64]) } else { map(db, depth, n, [64, n as u32]) };
        let sums = if self.sum == "f32" { n / 2 } else { n / 4 };
        let out = words(&memory, &vec![0; 128 * sums]);
        let arguments: [&[u8]; 4] = [&map(da, depth, 64, [64, 64]), &map_b, &da.to_le_bytes(), &out.to_le_bytes()];
        let module = parse(&self.text());
        for options in
            [Options::default(), Options { seed: Some(5), ..Options::default() }, Options { checked: true, ..Options::default() }]
        {
            let shared = 8192 + 128 * n as u32 + 8;
            run(&module, &memory, [1, 128, shared], &arguments, &options).unwrap_or_else(|fault| panic!("{fault}"));
            let got = download(&memory, out, 128 * sums);
            for thread in 0..128 {
                for pair in 0..n / 4 {
                    for i in 0..2 {
                        let (row, column) = (thread / 32 * 16 + thread % 32 / 4 + 8 * (pair % 2), pair / 2 * 8 + thread % 4 * 2 + i);
                        let expected: i32 = (0..depth).map(|k| a[row * depth + k] * at(column, k)).sum();
                        let (got, expected) = if self.sum == "f32" {
                            (got[thread * sums + 2 * pair + i], (expected as f32).to_bits())
                        } else {
                            (got[thread * sums + pair] >> (16 * i) & 0xFFFF, u32::from(f16(expected)))
                        };
                        assert_eq!(got, expected, "n{n} row {row} column {column}");
                    }
                }
            }
        }
    }
}

#[test]
fn products_of_a_group_of_warps() {
    let group = Group { columns: 64, transposed: false, registers: false, sum: "f32" };
    group.check();
    Group { columns: 8, ..group }.check();
    Group { columns: 128, ..group }.check();
    Group { columns: 128, transposed: true, ..group }.check();
    Group { registers: true, ..group }.check();
    Group { sum: "f16", ..group }.check();
    assert!(group.text().starts_with(HEADER));
}
