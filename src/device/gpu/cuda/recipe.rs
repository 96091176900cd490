//! What a matrix product asks of cuBLASLt, as plain data: which algorithm is its own, how row-major matrices are described to a library
//! that knows columns only, and how a matrix that lies awkwardly is copied to where it does not.
//!
//! cuBLASLt computes D = op(A) op(B), all in columns. A matrix in rows of `stride` is, to it, the transposed matrix in columns of leading
//! dim `stride`. So out[m, n] in rows is D[n, m] in columns, and D = op(b) op(a): its A is our b, its B our a.
//!
//! | ours              | in memory        | to cuBLASLt   | op         |
//! |-------------------|------------------|---------------|------------|
//! | b, `SummedInner`  | [n, k] in rows   | A is k x n    | transposed |
//! | b, `SummedOuter`  | [k, n] in rows   | A is n x k    | as it is   |
//! | a, `SummedInner`  | [m, k] in rows   | B is k x m    | as it is   |
//! | a, `SummedOuter`  | [k, m] in rows   | B is m x k    | transposed |
//! | out               | [m, n] in rows   | D is n x m    |            |
//!
//! Its bias has one element for each row of D, which is ours: one for each n.
//!
//! The bits of an element may depend on neither m nor n, nor on where matrices lie. So one algorithm serves all products of a `Key`, and
//! because fast algorithms want addresses and lengths of whole 16 bytes, an operand that has others is first copied to where it has them,
//! with zeros behind its rows. A zero more in a sum changes no bit of it.
//!
//! Invariant: the algorithm is a function of the key, and nothing that a rank's share of a matrix changes is part of the key.

use crate::device::gpu::driver::{Gemm, Operand, Order};
use crate::dtype::Dtype;
use anyhow::Result;

/// What fast algorithms want addresses and the lengths of rows to be multiples of.
const BYTES_ALIGNED: usize = 16;

/// Copies of operands that grow with m are kept below this, by computing a block of m after the other.
const BYTES_OF_BLOCK: usize = 64 << 20;

/// What chooses an algorithm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    pub dtype: Dtype,
    pub k: usize,
    pub a: Order,
    pub b: Order,
    pub accumulate: bool,
    pub bias: bool,
}

/// A matrix as cuBLASLt is told of it: in columns, `leading` elements from one to the next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Columns {
    pub rows: usize,
    pub columns: usize,
    pub leading: usize,
}

/// The sizes of a product that cuBLASLt is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Sizes {
    pub key: Key,
    pub a: Columns,
    pub b: Columns,
    pub d: Columns,
}

/// One thing to queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Zero {
        address: u64,
        bytes: usize,
    },
    /// `rows` rows of `width` bytes.
    CopyRows {
        to: u64,
        to_pitch: usize,
        from: u64,
        from_pitch: usize,
        width: usize,
        rows: usize,
    },
    /// Addresses of cuBLASLt's A, B, D and bias.
    Product {
        sizes: Sizes,
        a: u64,
        b: u64,
        d: u64,
        bias: u64,
    },
}

impl Key {
    /// The sizes for which the key's algorithm is chosen.
    pub fn sizes(self, m: usize, n: usize) -> Sizes {
        let inner = |order, outer| if order == Order::SummedInner { self.k } else { outer };
        Sizes::new(self, m, n, [inner(self.a, m), inner(self.b, n), n])
    }
}

impl Sizes {
    /// `strides`: of our a, b and out.
    fn new(key: Key, m: usize, n: usize, strides: [usize; 3]) -> Sizes {
        let of = |order, outer, leading| match order {
            Order::SummedInner => Columns { rows: key.k, columns: outer, leading },
            Order::SummedOuter => Columns { rows: outer, columns: key.k, leading },
        };
        let [ours_a, ours_b, out] = strides;
        Sizes { key, a: of(key.b, n, ours_b), b: of(key.a, m, ours_a), d: Columns { rows: n, columns: m, leading: out } }
    }

    /// Whether cuBLASLt is to transpose its A and its B.
    pub fn transposed(&self) -> [bool; 2] {
        [self.key.b == Order::SummedInner, self.key.a == Order::SummedOuter]
    }
}

/// The format of what a product writes.
pub fn out_dtype(key: &Key) -> Dtype {
    if key.accumulate { Dtype::F32 } else { key.dtype }
}

/// The steps of `gemm`. `room` gives scratch memory, which may be given back once the steps are queued.
pub fn steps(gemm: &Gemm, room: &mut dyn FnMut(usize) -> Result<u64>) -> Result<Vec<Step>> {
    let mut recipe = Recipe::new(gemm);
    let b = recipe.whole_b(room)?;
    let bias = recipe.whole_bias(room)?;
    let block = recipe.block();
    let rooms = recipe.rooms_of_block(block, room)?;
    for start in (0..gemm.m).step_by(block) {
        recipe.part(start, block.min(gemm.m - start), &b, bias, rooms);
    }
    Ok(recipe.steps)
}

struct Recipe<'g> {
    gemm: &'g Gemm,
    /// Which matrices are copied.
    a: bool,
    b: bool,
    out: bool,
    /// n and k as cuBLASLt gets them.
    n: usize,
    k: usize,
    steps: Vec<Step>,
}

impl<'g> Recipe<'g> {
    fn new(gemm: &'g Gemm) -> Recipe<'g> {
        let unit = BYTES_ALIGNED / gemm.dtype.bytes();
        let inner = |operand: &Operand| operand.order == Order::SummedInner;
        let lies_well = |operand: &Operand, outer: usize| {
            let extent = if inner(operand) { gemm.k } else { outer };
            operand.address.is_multiple_of(BYTES_ALIGNED as u64) && operand.stride.is_multiple_of(unit) && extent.is_multiple_of(unit)
        };
        // A sum is lengthened for all its operands, and a row of out for all its columns.
        let longer_k = (inner(&gemm.a) || inner(&gemm.b)) && !gemm.k.is_multiple_of(unit);
        let longer_n = !gemm.n.is_multiple_of(unit);
        Recipe {
            gemm,
            a: longer_k || !lies_well(&gemm.a, gemm.m),
            b: longer_k || longer_n || !lies_well(&gemm.b, gemm.n),
            out: longer_n || !gemm.out.is_multiple_of(BYTES_ALIGNED as u64),
            n: gemm.n.next_multiple_of(unit),
            k: if longer_k { gemm.k.next_multiple_of(unit) } else { gemm.k },
            steps: Vec::new(),
        }
    }

    fn unit(&self) -> usize {
        BYTES_ALIGNED / self.gemm.dtype.bytes()
    }

    fn key(&self) -> Key {
        let Gemm { dtype, a, b, accumulate, bias, .. } = *self.gemm;
        Key { dtype, k: self.k, a: a.order, b: b.order, accumulate, bias: bias.is_some() }
    }

    /// Bytes of a row of out where it is, and in a copy.
    fn pitches(&self) -> (usize, usize) {
        let size = out_dtype(&self.key()).bytes();
        (self.gemm.n * size, self.n * size)
    }

    /// How many of m are computed at once: all, or few enough for their copies; whole 64, so that a part lies as well as the whole.
    fn block(&self) -> usize {
        let copied = |copies: bool, bytes: usize| if copies { bytes } else { 0 };
        let each = copied(self.a, self.k * self.gemm.dtype.bytes()) + copied(self.out, self.pitches().1);
        let fitting = BYTES_OF_BLOCK.checked_div(each).unwrap_or(usize::MAX);
        if fitting >= self.gemm.m { self.gemm.m.max(1) } else { (fitting / 64 * 64).max(64) }
    }

    /// The `m` of a block as cuBLASLt gets it: where columns of a copy of a are rows of out, there are as many as suits.
    fn longer(&self, m: usize) -> usize {
        if self.a && self.gemm.a.order == Order::SummedOuter { m.next_multiple_of(self.unit()) } else { m }
    }

    /// Whether out's rows go to a copy first. Rows that m was lengthened by have to go somewhere, too.
    fn detours(&self, m: usize) -> bool {
        self.out || self.longer(m) != m
    }

    /// Scratch for the copies of a and of out of one block, which the next one uses again.
    fn rooms_of_block(&self, m: usize, room: &mut dyn FnMut(usize) -> Result<u64>) -> Result<[u64; 2]> {
        let longer = m.next_multiple_of(self.unit());
        let a = if self.a { room(longer * self.k.next_multiple_of(self.unit()) * self.gemm.dtype.bytes())? } else { 0 };
        let detours = self.out || (self.a && self.gemm.a.order == Order::SummedOuter);
        let out = if detours { room(longer * self.pitches().1)? } else { 0 };
        Ok([a, out])
    }

    fn whole_b(&mut self, room: &mut dyn FnMut(usize) -> Result<u64>) -> Result<Operand> {
        let Gemm { b, n, dtype, .. } = *self.gemm;
        if !self.b {
            return Ok(b);
        }
        let address = room(self.n * self.k.next_multiple_of(self.unit()) * dtype.bytes())?;
        Ok(self.copy(&b, n, self.n, address))
    }

    fn whole_bias(&mut self, room: &mut dyn FnMut(usize) -> Result<u64>) -> Result<u64> {
        let Some(bias) = self.gemm.bias else { return Ok(0) };
        if self.n == self.gemm.n && bias.is_multiple_of(BYTES_ALIGNED as u64) {
            return Ok(bias);
        }
        let (width, bytes) = (self.gemm.n * self.gemm.dtype.bytes(), self.n * self.gemm.dtype.bytes());
        let address = room(bytes)?;
        self.rows([address, bias], [bytes, width], width, [1, 1]);
        Ok(address)
    }

    /// Copies `operand`, which has `outer` rows or columns, to `address`, as one of `longer` that lies well.
    fn copy(&mut self, operand: &Operand, outer: usize, longer: usize, address: u64) -> Operand {
        let size = self.gemm.dtype.bytes();
        let (columns, rows, stride) = match operand.order {
            Order::SummedInner => (self.gemm.k, [longer, outer], self.k),
            Order::SummedOuter => (outer, [self.k, self.gemm.k], longer),
        };
        self.rows([address, operand.address], [stride * size, operand.stride * size], columns * size, rows);
        Operand { address, stride, order: operand.order }
    }

    /// Copies rows of `width` bytes. Behind each, and for rows that there are more of in the copy, there are zeros.
    fn rows(&mut self, [to, from]: [u64; 2], [to_pitch, from_pitch]: [usize; 2], width: usize, [all, rows]: [usize; 2]) {
        if to_pitch != width || all != rows {
            self.steps.push(Step::Zero { address: to, bytes: all * to_pitch });
        }
        self.steps.push(Step::CopyRows { to, to_pitch, from, from_pitch, width, rows });
    }

    /// The rows `start..start + m` of out.
    fn part(&mut self, start: usize, m: usize, b: &Operand, bias: u64, [room_a, room_out]: [u64; 2]) {
        let Gemm { a, dtype, .. } = *self.gemm;
        let first = start * if a.order == Order::SummedInner { a.stride } else { 1 } * dtype.bytes();
        let mine = Operand { address: a.address + first as u64, ..a };
        let longer = self.longer(m);
        let mine = if self.a { self.copy(&mine, m, longer, room_a) } else { mine };
        let (width, pitch) = self.pitches();
        let home = self.gemm.out + (start * width) as u64;
        let detours = self.detours(m);
        if detours && self.gemm.accumulate {
            self.rows([room_out, home], [pitch, width], width, [longer, m]);
        }
        let d = if detours { room_out } else { home };
        let sizes = Sizes::new(self.key(), longer, self.n, [mine.stride, b.stride, self.n]);
        self.steps.push(Step::Product { sizes, a: b.address, b: mine.address, d, bias });
        if detours {
            self.steps.push(Step::CopyRows { to: home, to_pitch: width, from: room_out, from_pitch: pitch, width, rows: m });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};

    /// f32 numbers at made-up addresses, and what cuBLASLt's documentation says that its steps do with them.
    struct Host {
        bytes: Vec<f32>,
        end: u64,
    }

    const BASE: u64 = 1 << 20;

    impl Host {
        fn new() -> Host {
            Host { bytes: Vec::new(), end: BASE }
        }

        /// Room at an address that is `off` elements past a multiple of 256 bytes, filled with what nobody may read.
        fn room(&mut self, elements: usize, off: usize) -> u64 {
            let start = self.end.next_multiple_of(256) + 4 * off as u64;
            self.end = start + 4 * elements as u64;
            self.bytes.resize(((self.end - BASE) / 4) as usize, f32::NAN);
            start
        }

        fn at(&mut self, address: u64) -> &mut [f32] {
            assert!(address.is_multiple_of(4) && address >= BASE);
            &mut self.bytes[((address - BASE) / 4) as usize..]
        }

        fn write(&mut self, address: u64, values: &[f32]) {
            self.at(address)[..values.len()].copy_from_slice(values);
        }

        /// The element (i, j) of op(X), of a matrix X in columns.
        fn element(&mut self, address: u64, x: Columns, transposed: bool, (i, j): (usize, usize)) -> f32 {
            let (row, column) = if transposed { (j, i) } else { (i, j) };
            assert!(row < x.rows && column < x.columns && x.leading >= x.rows, "({row}, {column}) of {x:?}");
            self.at(address)[row + column * x.leading]
        }

        fn run(&mut self, step: &Step) {
            match *step {
                Step::Zero { address, bytes } => self.at(address)[..bytes / 4].fill(0.0),
                Step::CopyRows { to, to_pitch, from, from_pitch, width, rows } => {
                    assert!(to_pitch >= width && from_pitch >= width);
                    for row in 0..rows as u64 {
                        let line = self.at(from + row * from_pitch as u64)[..width / 4].to_vec();
                        self.write(to + row * to_pitch as u64, &line);
                    }
                }
                Step::Product { sizes, a, b, d, bias } => self.product(sizes, [a, b, d], bias),
            }
        }

        fn product(&mut self, sizes: Sizes, [a, b, d]: [u64; 3], bias: u64) {
            let [op_a, op_b] = sizes.transposed();
            let (rows, columns) = (sizes.d.rows, sizes.d.columns);
            for x in [a, b, d] {
                assert_eq!(x % 16, 0);
            }
            for x in [sizes.a, sizes.b, sizes.d] {
                assert!(x.leading % 4 == 0 && x.rows % 4 == 0, "{x:?} does not lie well");
            }
            assert_eq!(bias == 0, !sizes.key.bias);
            assert_eq!(bias % 16, 0);
            for i in 0..rows {
                for j in 0..columns {
                    let term = |l| self.element(a, sizes.a, op_a, (i, l)) * self.element(b, sizes.b, op_b, (l, j));
                    let sum: f32 = (0..sizes.key.k).map(term).sum();
                    let bias = if sizes.key.bias { self.at(bias)[i] } else { 0.0 };
                    let at = d + 4 * (i + j * sizes.d.leading) as u64;
                    let before = if sizes.key.accumulate { self.at(at)[0] } else { 0.0 };
                    self.at(at)[0] = before + sum + bias;
                }
            }
        }
    }

    fn number(place: usize) -> f32 {
        (place * 7919 % 17) as f32 - 8.0
    }

    /// Lays out an operand, and its value at (outer, k).
    fn operand(host: &mut Host, order: Order, outer: usize, k: usize, more: usize, off: usize) -> Operand {
        let (rows, columns) = if order == Order::SummedInner { (outer, k) } else { (k, outer) };
        let stride = columns + more;
        let address = host.room(rows.saturating_sub(1) * stride + columns, off);
        for row in 0..rows {
            let values: Vec<f32> = (0..columns).map(|column| number(row * stride + column + off)).collect();
            host.write(address + 4 * (row * stride) as u64, &values);
        }
        Operand { address, stride, order }
    }

    fn value(host: &mut Host, x: &Operand, outer: usize, k: usize) -> f32 {
        let place = if x.order == Order::SummedInner { outer * x.stride + k } else { k * x.stride + outer };
        host.at(x.address)[place]
    }

    fn order(inner: bool) -> Order {
        if inner { Order::SummedInner } else { Order::SummedOuter }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        /// Whatever way matrices lie, the steps give the product, touch nothing beside it, and ask for one algorithm.
        #[test]
        fn steps_are_the_product(
            (m, n, k) in (1usize..40, 1usize..20, 1usize..20),
            orders in any::<[bool; 2]>(),
            more in [0usize..6, 0usize..6],
            off in [0usize..5, 0usize..5, 0usize..5, 0usize..5],
            accumulate in any::<bool>(),
            biased in any::<bool>(),
        ) {
            let biased = biased && !accumulate;
            let mut host = Host::new();
            let a = operand(&mut host, order(orders[0]), m, k, more[0], off[0]);
            let b = operand(&mut host, order(orders[1]), n, k, more[1], off[1]);
            let guard = host.room(8, 0);
            let out = host.room(m * n, off[2]);
            let behind = host.room(8, 0);
            let before: Vec<f32> = (0..m * n).map(|place| number(place + 3)).collect();
            host.write(out, &before);
            let bias = biased.then(|| host.room(n, off[3]));
            let biases: Vec<f32> = (0..n).map(|place| number(place + 1)).collect();
            bias.into_iter().for_each(|bias| host.write(bias, &biases));
            let gemm = Gemm { dtype: Dtype::F32, m, n, k, a, b, out, accumulate, bias };
            let queued = steps(&gemm, &mut |bytes| Ok(host.room(bytes / 4, 0))).expect("room");
            queued.iter().for_each(|step| host.run(step));
            for i in 0..m {
                for j in 0..n {
                    let sum: f32 = (0..k).map(|l| value(&mut host, &a, i, l) * value(&mut host, &b, j, l)).sum();
                    let more = if accumulate { before[i * n + j] } else { 0.0 } + if biased { biases[j] } else { 0.0 };
                    prop_assert_eq!(host.at(out)[i * n + j], sum + more, "({}, {})", i, j);
                }
            }
            prop_assert!([guard, behind].iter().all(|&guard| host.at(guard)[..8].iter().all(|x| x.is_nan())));
        }
    }

    /// The keys of the products among the steps of `gemm`.
    fn keys(gemm: &Gemm) -> Vec<Key> {
        let mut end = BASE;
        let queued = steps(gemm, &mut |bytes| {
            end += bytes.next_multiple_of(256) as u64;
            Ok(end - bytes.next_multiple_of(256) as u64)
        });
        let queued = queued.expect("room");
        queued.iter().filter_map(|step| if let Step::Product { sizes, .. } = step { Some(sizes.key) } else { None }).collect()
    }

    #[test]
    fn a_key_knows_nothing_of_m_n_strides_and_addresses() {
        let inner = |address, stride| Operand { address, stride, order: Order::SummedInner };
        let base = Gemm {
            dtype: Dtype::Bf16,
            m: 4096,
            n: 1024,
            k: 768,
            a: inner(0x1000, 768),
            b: inner(0x2000, 768),
            out: 0x3000,
            accumulate: false,
            bias: None,
        };
        let key = keys(&base)[0];
        let others =
            [Gemm { m: 3, n: 7, ..base }, Gemm { a: inner(0x1002, 1000), ..base }, Gemm { b: inner(0x2002, 769), out: 0x3002, ..base }];
        for other in others {
            assert!(!keys(&other).is_empty() && keys(&other).iter().all(|other| *other == key), "{other:?}");
        }
        assert_eq!(steps(&base, &mut |_| panic!("no copies")).expect("steps").len(), 1);
        // k is lengthened to whole 16 bytes where a row has it, and is what it is elsewhere.
        assert_eq!(keys(&Gemm { k: 767, ..base })[0].k, 768);
        let outer = |stride| Operand { address: 0x1000, stride, order: Order::SummedOuter };
        assert_eq!(keys(&Gemm { k: 767, a: outer(4096), b: outer(1024), ..base })[0].k, 767);
    }

    #[test]
    fn copies_that_grow_with_m_come_in_blocks() {
        let inner = |stride| Operand { address: 0x1000, stride, order: Order::SummedInner };
        // A vocabulary of GPT-2's size, in rows that are no multiple of 16 bytes.
        let gemm = Gemm {
            dtype: Dtype::Bf16,
            m: 8192,
            n: 50257,
            k: 768,
            a: inner(768),
            b: inner(768),
            out: 0x1000,
            accumulate: false,
            bias: None,
        };
        let (mut end, mut largest) = (BASE, 0);
        let queued = steps(&gemm, &mut |bytes| {
            largest = largest.max(bytes);
            end += bytes.next_multiple_of(256) as u64;
            Ok(end)
        });
        let products = queued.expect("room").iter().filter(|step| matches!(step, Step::Product { .. })).count();
        assert!(products > 1 && products < 20, "{products} blocks");
        assert!(largest <= 78 << 20, "{largest} bytes");
    }
}
