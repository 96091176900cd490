//! Causal attention, block by block: o = softmax(q k^T / sqrt(d)) v without the matrix of scores in memory.
//!
//! A row of `qkv` is the query heads, then the key heads, then the value heads, each `dim` wide; query heads that share a key head are
//! neighbours. Row q of a sequence sees key k when starts[q] <= k <= q, and with a window w also q - w < k.
//!
//! Scores, statistics and sums are f32; weights and their gradients are rounded to the dtype before they are multiplied, as one does on
//! matrix units. Forward goes over keys in blocks and keeps a running maximum. Backward redoes the weights from `lse`. Exponentials are
//! powers of two. On a GPU it is the same with blocks of other sizes (`attention_kernels.rs`); on a CPU see `attention_forward.rs` and
//! `attention_backward.rs`.
//!
//! Invariant: the bits of a row depend on its sequence, its position and its head's inputs, never on the other heads, sequences or threads
//! of a call; gradients of a key head add its query heads in order.

use crate::device::Device;
use crate::device::tensor::{Tensor, View};
use crate::dispatch;
use crate::dtype::Dtype;
use crate::ops::attention_backward::{Given, Scratch};
use crate::ops::attention_forward::Attention;
use crate::ops::attention_kernels::{Kernels, Rows};

/// The widest head that the buffers of a thread are sure to hold.
const WIDEST: usize = 2048;

/// Numbers of heads, and how wide each is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    pub query: usize,
    pub kv: usize,
    pub dim: usize,
}

impl Heads {
    /// Columns of `qkv`.
    pub fn columns(&self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }

    /// Query heads of a key head.
    pub fn group(&self) -> usize {
        self.query / self.kv
    }
}

/// Which keys a row sees.
#[derive(Clone, Copy)]
pub struct Mask<'a> {
    /// Rows of a sequence.
    pub t: usize,
    /// u32[n]: the first position of its sequence that a row sees.
    pub starts: View<'a>,
    /// With a window w, row q sees keys from q - w + 1 on.
    pub window: Option<usize>,
}

/// qkv[n, (query + 2 kv) dim] -> o[n, query dim], lse f32[n, query].
pub fn forward(qkv: View<'_>, heads: Heads, mask: Mask<'_>) -> (Tensor, Tensor) {
    let n = check(qkv, heads, mask);
    let mut o = qkv.device().empty([n, heads.query * heads.dim], qkv.dtype());
    let mut lse = qkv.device().empty([n, heads.query], Dtype::F32);
    match qkv.device() {
        Device::Cpu(cpu) => dispatch!(qkv.dtype(), T => {
            let attention = Attention::<T>::new(cpu, qkv, heads, mask);
            attention.forward(cpu, o.view_mut().into_slice(), lse.view_mut().into_slice());
        }),
        Device::Gpu(gpu) => Kernels { gpu, qkv, heads, mask }.forward(o.view_mut(), lse.view_mut()),
        Device::Dry(_) => {}
    }
    (o, lse)
}

/// The gradient of `qkv`, from that of `o` and from what `forward` gave.
pub fn backward(dout: View<'_>, qkv: View<'_>, o: View<'_>, lse: View<'_>, heads: Heads, mask: Mask<'_>) -> Tensor {
    let n = check(qkv, heads, mask);
    for (name, x) in [("dout", dout), ("o", o)] {
        assert_eq!(x.shape().numel(), n * heads.query * heads.dim, "{name} {} for {n} rows of {heads:?}", x.shape());
        assert_eq!(x.dtype(), qkv.dtype(), "{name} in the dtype of qkv");
    }
    assert_eq!((lse.shape().numel(), lse.dtype()), (n * heads.query, Dtype::F32), "lse of {n} rows of {heads:?}");
    let device = qkv.device();
    let mut dqkv = device.empty([n, heads.columns()], qkv.dtype());
    let mut scratch = Scratch::new(device, n, heads, mask.t);
    let mut rows = Rows::new(device, n, heads, mask.t);
    match device {
        Device::Cpu(cpu) => dispatch!(qkv.dtype(), T => {
            let Scratch { dq, dots } = scratch.as_mut().expect("a CPU has it");
            let attention = Attention::<T>::new(cpu, qkv, heads, mask);
            attention.dots(cpu, dout.slice(), o.slice(), dots.view_mut().into_slice());
            let given = Given { dout: dout.slice(), lse: lse.slice(), dots: dots.view().slice() };
            let dq = dq.as_mut().map(|dq| dq.view_mut().into_slice());
            attention.backward(cpu, &given, dq, dqkv.view_mut().into_slice());
        }),
        Device::Gpu(gpu) => {
            let rows = rows.as_mut().expect("a GPU has them");
            Kernels { gpu, qkv, heads, mask }.backward(dqkv.view_mut(), dout, o, lse, rows);
        }
        Device::Dry(_) => {}
    }
    dqkv
}

fn check(qkv: View<'_>, heads: Heads, mask: Mask<'_>) -> usize {
    let Mask { t, starts, window } = mask;
    assert!(heads.kv > 0 && heads.query.is_multiple_of(heads.kv), "query heads in groups of one size: {heads:?}");
    assert!((1..=WIDEST).contains(&heads.dim), "heads of 1 to {WIDEST}: {heads:?}");
    assert_eq!(qkv.shape().columns(), heads.columns(), "qkv {} for {heads:?}", qkv.shape());
    let n = qkv.shape().rows();
    assert!(t > 0 && n.is_multiple_of(t), "{n} rows in sequences of {t}");
    assert_eq!((starts.shape().numel(), starts.dtype()), (n, Dtype::U32), "one start for each of {n} rows");
    assert!(window != Some(0), "a window sees at least the row itself");
    n
}
