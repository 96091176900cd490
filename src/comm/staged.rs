//! Collectives of tensors that lie on a GPU, over a transport that sends from the host's memory.
//!
//! A tensor is copied to the host, goes through the inner group there, and comes back: the same calls in the same order as without, and
//! the same sums, so the same bits. Copies run on a stream of their own, which waits for what computes the tensor and is waited for by
//! what uses it. A tensor on the host passes through untouched.
//!
//! Invariant: nothing that a failed device left behind is sent to another rank.

use crate::comm::{Group, Pending, Reduction, call};
use crate::device::Device;
use crate::device::gpu::Gpu;
use crate::device::gpu::driver::Stream;
use crate::device::tensor::Tensor;
use anyhow::{Result, bail};
use std::sync::Arc;

pub struct Staged {
    inner: Arc<dyn Group>,
    host: Device,
}

impl Staged {
    /// `host`: a CPU whose memory the transport sends from.
    pub fn new(inner: Arc<dyn Group>, host: Device) -> Staged {
        Staged { inner, host }
    }

    /// Calls the inner group with a copy of `x` on the host, filled with what is on the device where the call `sends` it.
    fn through(&self, x: Tensor, sends: bool, group_call: impl FnOnce(Tensor) -> Result<Pending>) -> Result<Pending> {
        let Device::Gpu(gpu) = x.device().clone() else { return group_call(x) };
        let mut copy = self.host.empty(x.shape(), x.dtype());
        if sends {
            download(&gpu, &x, &mut copy)?;
        }
        let pending = group_call(copy)?;
        Ok(Pending::later(move || {
            let copy = pending.wait()?;
            upload(&gpu, &x, &copy)?;
            Ok(x)
        }))
    }
}

fn download(gpu: &Gpu, x: &Tensor, copy: &mut Tensor) -> Result<()> {
    let queue = gpu.queue();
    queue.order(Stream::Compute, Stream::Copies);
    let address = x.view().address();
    queue.run(|driver| driver.download(Stream::Copies, address, call::bytes_mut(copy)));
    ok(gpu)
}

fn upload(gpu: &Gpu, x: &Tensor, copy: &Tensor) -> Result<()> {
    let queue = gpu.queue();
    // The memory of x may have been another tensor's, which compute has yet to be done with.
    queue.order(Stream::Compute, Stream::Copies);
    let address = x.view().address();
    queue.run(|driver| driver.upload(Stream::Copies, address, call::bytes(copy)));
    queue.order(Stream::Copies, Stream::Compute);
    ok(gpu)
}

fn ok(gpu: &Gpu) -> Result<()> {
    match gpu.queue().failed() {
        Some(failure) => bail!("{failure}"),
        None => Ok(()),
    }
}

impl Group for Staged {
    fn size(&self) -> usize {
        self.inner.size()
    }

    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn all_reduce(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        self.through(x, true, |x| self.inner.all_reduce(x, reduction))
    }

    fn reduce_scatter(&self, x: Tensor, reduction: Reduction) -> Result<Pending> {
        self.through(x, true, |x| self.inner.reduce_scatter(x, reduction))
    }

    fn all_gather(&self, x: Tensor) -> Result<Pending> {
        self.through(x, true, |x| self.inner.all_gather(x))
    }

    fn all_to_all(&self, x: Tensor) -> Result<Pending> {
        self.through(x, true, |x| self.inner.all_to_all(x))
    }

    fn send(&self, to: usize, x: Tensor) -> Result<Pending> {
        self.through(x, true, |x| self.inner.send(to, x))
    }

    fn receive(&self, from: usize, x: Tensor) -> Result<Pending> {
        self.through(x, false, |x| self.inner.receive(from, x))
    }

    fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.inner.exchange(mine)
    }
}
