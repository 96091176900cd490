//! Matrix products by the program's own kernels, `cuda/matmul.cu`: which of them does a product, and how it is launched.
//!
//! Invariant: which tiles a product is cut into changes no bit of it, so `Edge` is a matter of time alone.

use crate::args;
use crate::device::gpu::driver::{Argument, Gemm, Grid, Order};
use crate::device::gpu::kernel;
use crate::dtype::Dtype;
use anyhow::{Result, bail, ensure};

/// Rows and columns of the tile of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Edge {
    Of64,
    Of128,
}

/// Large tiles are taken where there are as many: GPUs have about so many multiprocessors, each of which shall have one.
const ENOUGH_TILES: usize = 128;

/// One launch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Launch {
    pub kernel: String,
    pub grid: Grid,
    pub arguments: [Argument; 9],
}

impl Edge {
    pub fn length(self) -> usize {
        match self {
            Edge::Of64 => 64,
            Edge::Of128 => 128,
        }
    }

    /// The one that is faster for a result of m x n.
    pub fn of(m: usize, n: usize) -> Edge {
        if Edge::Of128.tiles(m, n) >= ENOUGH_TILES { Edge::Of128 } else { Edge::Of64 }
    }

    fn tiles(self, m: usize, n: usize) -> usize {
        m.div_ceil(self.length()).saturating_mul(n.div_ceil(self.length()))
    }

    /// Threads of a block and its shared memory: stages of a and b (see `Tiling` and `FmaTiling`).
    fn block(self, dtype: Dtype) -> (u32, usize) {
        if dtype == Dtype::F32 { (256, 3 * 2 * 16 * (self.length() + 4) * 4) } else { (128, 4 * 2 * 32 * self.length() * 2) }
    }
}

/// The launch of `gemm`, in tiles of the edge that suits it.
pub fn launch(gemm: &Gemm) -> Result<Launch> {
    launch_in(gemm, Edge::of(gemm.m, gemm.n))
}

/// The same in tiles of this edge.
pub fn launch_in(gemm: &Gemm, edge: Edge) -> Result<Launch> {
    let Gemm { dtype, m, n, k, a, b, out, .. } = *gemm;
    ensure!(k > 0, "a product of {m} x {n} sums over nothing");
    let form = match (a.order, b.order, gemm.accumulate, gemm.bias) {
        (Order::SummedInner, Order::SummedInner, false, _) => "forward",
        (Order::SummedInner, Order::SummedOuter, false, None) => "backward_input",
        (Order::SummedOuter, Order::SummedOuter, true, None) => "backward_weight",
        (of_a, of_b, accumulate, bias) => bail!(
            "there is no kernel for a product of {of_a:?} and {of_b:?} that {} with{} a bias: matmul.cu has forward, backward_input and \
             backward_weight",
            if accumulate { "adds up" } else { "writes" },
            if bias.is_some() { "" } else { "out" }
        ),
    };
    let (threads, shared) = edge.block(dtype);
    let tiles = edge.tiles(m, n);
    ensure!(tiles <= i32::MAX as usize, "a product of {m} x {n} has {tiles} tiles, more than a launch can have blocks");
    let grid = Grid::blocks(tiles, threads).with_shared(shared as u32);
    let arguments = args![out, a.address, b.address, gemm.bias.unwrap_or(0), m, n, k, a.stride, b.stride];
    Ok(Launch { kernel: kernel(&format!("matmul_{form}_{}", edge.length()), dtype), grid, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::gpu::driver::Operand;
    use crate::device::gpu::kernels;

    fn gemm(dtype: Dtype, orders: [Order; 2], accumulate: bool, m: usize, n: usize) -> Gemm {
        let [a, b] = orders.map(|order| Operand { address: 256, stride: 8, order });
        Gemm { dtype, m, n, k: 8, a, b, out: 512, accumulate, bias: None }
    }

    #[test]
    fn every_form_has_kernels_of_both_edges() {
        let forms = [([Order::SummedInner; 2], false), ([Order::SummedInner, Order::SummedOuter], false), ([Order::SummedOuter; 2], true)];
        let mut names = Vec::new();
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for (orders, accumulate) in forms {
                for (m, n) in [(1, 1), (64, 65), (2048, 1024)] {
                    let launch = launch(&gemm(dtype, orders, accumulate, m, n)).expect("a form that there is");
                    assert!(kernels::find(&launch.kernel).is_some(), "{}", launch.kernel);
                    names.push((launch.kernel, launch.grid.blocks[0]));
                }
            }
        }
        assert_eq!(names.iter().map(|(_, blocks)| *blocks).take(3).collect::<Vec<_>>(), [1, 2, 128]);
        names.sort();
        names.dedup_by(|a, b| a.0 == b.0);
        assert_eq!(names.len(), kernels::SOURCES.iter().find(|source| source.name == "matmul").expect("a source").kernels().count());
    }

    #[test]
    fn another_form_is_refused_with_a_sentence() {
        let error = launch(&gemm(Dtype::Bf16, [Order::SummedOuter, Order::SummedInner], false, 4, 4)).expect_err("no such kernel");
        assert!(
            error.to_string().starts_with("there is no kernel for a product of SummedOuter and SummedInner that writes without a bias")
        );
    }
}
