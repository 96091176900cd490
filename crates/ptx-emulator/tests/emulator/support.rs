//! Kernels written by the tests: one instruction between loads and a store, or a whole body.
//!
//! Invariant: a failure names the instruction and its inputs.

use ptx_emulator::{Counters, Fault, Kernel, Launch, LoadError, Memory, Module, Options, launch};

pub const HEADER: &str = ".version 8.7\n.target sm_90a\n.address_size 64\n";

/// splitmix64
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
}

/// A kernel `test` with these parameters and this body, which may use registers of every type:
/// predicates %p, words %r, halves %h, f32 %f, doubles %d, f64 %g, nine of each.
pub fn text(parameters: &str, body: &str) -> String {
    format!(
        "{HEADER}.visible .entry test({parameters})\n{{\n.reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<40>;\n.reg .f32 %f<9>;\n\
         .reg .b64 %d<9>;\n.reg .f64 %g<9>;\n{body}\nret;\n}}\n"
    )
}

pub fn parse(text: &str) -> Module {
    Module::parse(text).unwrap_or_else(|error: LoadError| panic!("{error}\n{text}"))
}

pub fn kernel(module: &Module) -> &Kernel {
    module.kernels().next().expect("the text has a kernel")
}

/// Runs the only kernel of a module.
pub fn run(module: &Module, memory: &Memory, shape: [u32; 3], arguments: &[&[u8]], options: &Options) -> Result<Counters, Fault> {
    let [grid, block, shared_bytes] = shape;
    let kernel = kernel(module);
    launch(memory, &Launch { kernel, grid: [grid, 1, 1], block: [block, 1, 1], shared_bytes, arguments, blocks: None }, options)
}

pub fn upload(memory: &Memory, bytes: &[u8]) -> u64 {
    let address = memory.allocate(bytes.len());
    memory.write(address, bytes).expect("just allocated");
    address
}

pub fn words(memory: &Memory, values: &[u32]) -> u64 {
    upload(memory, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

pub fn download(memory: &Memory, address: u64, count: usize) -> Vec<u32> {
    let mut bytes = vec![0; 4 * count];
    memory.read(address, &mut bytes).expect("the range was allocated");
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("chunks of four"))).collect()
}

/// Runs a body with one parameter, `out`, in one block, in the fixed order, in random orders, and checked; all must agree.
/// Gives the words of `out`, one per thread and `per_thread`, which are 0 beforehand. `%d0` holds the address for the thread.
pub fn body(threads: u32, per_thread: usize, body: &str) -> Vec<u32> {
    let begin =
        format!("ld.param.u64 %d0, [out];\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %d1, %r0, {};\nadd.s64 %d0, %d0, %d1;\n", 4 * per_thread);
    let module = parse(&text(".param .u64 out", &format!("{begin}{body}")));
    let mut results = Vec::new();
    let options = [None, Some(1), Some(2), Some(3)].map(|seed| Options { seed, ..Options::default() });
    for options in options.into_iter().chain([Options { checked: true, ..Options::default() }]) {
        let memory = Memory::new();
        let count = threads as usize * per_thread;
        let out = words(&memory, &vec![0; count]);
        run(&module, &memory, [1, threads, 0], &[&out.to_le_bytes()], &options)
            .unwrap_or_else(|fault| panic!("{fault} ({options:?})\n{body}"));
        results.push(download(&memory, out, count));
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "the order changes the result of\n{body}\n{results:?}");
    results.swap_remove(0)
}

/// An instruction on `%a`, `%b`, `%c` to `%o`, each of so many bits.
pub struct Case<'a> {
    pub line: &'a str,
    pub bits: [u32; 4],
}

impl Case<'_> {
    fn module(&self) -> Module {
        let [a, b, c, o] = self.bits;
        let mut lines =
            String::from("mov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ntid.x;\nmad.lo.s32 %r0, %r1, %r2, %r0;\n");
        for (name, bits) in [("a", a), ("b", b), ("c", c), ("o", o)] {
            lines += &format!(
                ".reg .b{bits} %{name};\nld.param.u64 %d0, [{name}];\nmul.wide.u32 %d1, %r0, {};\nadd.s64 %d0, %d0, %d1;\n",
                bits / 8
            );
            lines += &if name == "o" { format!("{}\n", self.line) } else { format!("ld.global.b{bits} %{name}, [%d0];\n") };
        }
        lines += &format!("st.global.b{o} [%d0], %o;\n");
        parse(&text(".param .u64 a, .param .u64 b, .param .u64 c, .param .u64 o", &lines))
    }

    /// Compares the emulator with `expected` on all combinations of the special inputs and on random ones.
    pub fn check(&self, special: &[u64], agrees: impl Fn([u64; 3], u64) -> Result<(), String>) {
        let mut random = Random(self.line.len() as u64);
        let mut inputs: Vec<[u64; 3]> = Vec::new();
        for (i, a) in special.iter().enumerate() {
            for (j, b) in special.iter().enumerate() {
                inputs.push([*a, *b, special[(i * 7 + j * 3) % special.len()]]);
            }
        }
        inputs.extend((0..512).map(|i| {
            let mut one = |near: bool| {
                if near { special[random.next() as usize % special.len()].wrapping_add(random.next() % 3) } else { random.next() }
            };
            [one(i % 3 == 0), one(i % 5 == 0), one(i % 7 == 0)]
        }));
        inputs.resize(inputs.len().next_multiple_of(64), [0; 3]);
        let bytes = |bits: u32| bits as usize / 8;
        let memory = Memory::new();
        let addresses: Vec<u64> = (0..3)
            .map(|i| {
                upload(&memory, &inputs.iter().flat_map(|input| input[i].to_le_bytes()[..bytes(self.bits[i])].to_vec()).collect::<Vec<_>>())
            })
            .collect();
        let out = memory.allocate(inputs.len() * bytes(self.bits[3]));
        let arguments: Vec<[u8; 8]> = addresses.iter().chain([&out]).map(|address| address.to_le_bytes()).collect();
        let arguments: Vec<&[u8]> = arguments.iter().map(|argument| argument.as_slice()).collect();
        run(&self.module(), &memory, [inputs.len() as u32 / 64, 64, 0], &arguments, &Options::default())
            .unwrap_or_else(|fault| panic!("{}: {fault}", self.line));
        let mut results = vec![0; inputs.len() * bytes(self.bits[3])];
        memory.read(out, &mut results).expect("the output was allocated");
        for (input, result) in inputs.iter().zip(results.chunks_exact(bytes(self.bits[3]))) {
            let cut = |value: u64, bits: u32| if bits == 64 { value } else { value & ((1 << bits) - 1) };
            let input: [u64; 3] = std::array::from_fn(|i| cut(input[i], self.bits[i]));
            let mut got = [0; 8];
            got[..result.len()].copy_from_slice(result);
            let got = u64::from_le_bytes(got);
            if let Err(expected) = agrees(input, got) {
                panic!("{} of {input:#x?} gave {got:#x}, expected {expected}", self.line);
            }
        }
    }

    /// The same, where the result must be exactly this.
    pub fn equals(&self, special: &[u64], expected: impl Fn([u64; 3]) -> u64) {
        let cut = if self.bits[3] == 64 { u64::MAX } else { (1 << self.bits[3]) - 1 };
        self.check(special, |input, got| {
            let expected = expected(input) & cut;
            if got == expected { Ok(()) } else { Err(format!("{expected:#x}")) }
        });
    }
}
