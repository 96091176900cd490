//! The weights of one unit as a rank holds them, whole or as its slice, and the gathers that make them whole.
//!
//! A gather is started early and waited for when the weights are read, so that it runs beside the computation in between.
//!
//! Invariant: weights that are read are whole and nobody's gather writes to them; a slice is written only when no gather reads it.

use crate::comm::{Group, Pending};
use crate::device::Device;
use crate::device::tensor::{Tensor, View, ViewMut};
use anyhow::Result;
use std::ops::Range;

pub enum WeightBuffer {
    /// A unit tied to another of this rank has none of its own.
    Nothing,
    Whole(Gathered),
    /// Only this rank's slice; the whole is there while it is used.
    Sharded {
        mine: Tensor,
        whole: Option<Gathered>,
    },
}

/// A whole buffer, or the gather that it comes back from.
pub struct Gathered {
    here: Option<Tensor>,
    under_way: Option<Pending>,
}

impl Gathered {
    pub fn here(whole: Tensor) -> Gathered {
        Gathered { here: Some(whole), under_way: None }
    }

    fn start(whole: Tensor, group: &dyn Group) -> Result<Gathered> {
        Ok(Gathered { here: None, under_way: Some(group.all_gather(whole)?) })
    }

    fn settle(&mut self) -> Result<()> {
        if let Some(pending) = self.under_way.take() {
            self.here = Some(pending.wait()?);
        }
        Ok(())
    }

    fn tensor(&self) -> &Tensor {
        self.here.as_ref().expect("weights are read after their gather was waited for")
    }

    fn tensor_mut(&mut self) -> &mut Tensor {
        self.here.as_mut().expect("weights are written after their gather was waited for")
    }
}

impl WeightBuffer {
    /// Of a buffer that is settled.
    pub fn bytes(&self) -> usize {
        match self {
            WeightBuffer::Nothing => 0,
            WeightBuffer::Whole(whole) => whole.tensor().bytes(),
            WeightBuffer::Sharded { mine, whole } => mine.bytes() + whole.as_ref().map_or(0, |whole| whole.tensor().bytes()),
        }
    }

    /// Bytes of the slice, where it lies in a file.
    pub fn bytes_offloaded(&self) -> usize {
        if let WeightBuffer::Sharded { mine, .. } = self { mine.bytes_offloaded() } else { 0 }
    }

    /// Whether whole weights are here for a while only, on their way or in use.
    pub fn is_visiting(&self) -> bool {
        matches!(self, WeightBuffer::Sharded { whole: Some(_), .. })
    }

    /// Starts to gather what is not whole and not yet being gathered. `range`: where the slice lies among `numel` elements.
    pub fn start(&mut self, device: &Device, group: &dyn Group, numel: usize, range: &Range<usize>) -> Result<()> {
        if let WeightBuffer::Sharded { mine, whole: whole @ None } = self {
            let mut empty = device.empty([numel], mine.dtype());
            empty.view_mut().part(range.clone(), [range.len()]).copy_from(mine.view());
            *whole = Some(Gathered::start(empty, group)?);
        }
        Ok(())
    }

    /// After this rank's slice of whole weights has changed: starts to give it to the others and to take theirs.
    pub fn spread(&mut self, group: &dyn Group) -> Result<()> {
        match self {
            WeightBuffer::Whole(whole) => {
                whole.settle()?;
                let own = whole.here.take().expect("just settled");
                *whole = Gathered::start(own, group)?;
            }
            // They are gathered before the next use.
            WeightBuffer::Sharded { whole, .. } => assert!(whole.is_none(), "weights change while somebody uses them"),
            WeightBuffer::Nothing => panic!("a unit tied to another of this rank has no weights"),
        }
        Ok(())
    }

    /// Waits for a gather that is under way.
    pub fn settle(&mut self) -> Result<()> {
        match self {
            WeightBuffer::Whole(whole) | WeightBuffer::Sharded { whole: Some(whole), .. } => whole.settle(),
            WeightBuffer::Sharded { whole: None, .. } | WeightBuffer::Nothing => Ok(()),
        }
    }

    /// Lets go of what was gathered for a while.
    pub fn release(&mut self) {
        if let WeightBuffer::Sharded { whole, .. } = self {
            *whole = None;
        }
    }

    pub fn whole(&self) -> View<'_> {
        match self {
            WeightBuffer::Whole(whole) | WeightBuffer::Sharded { whole: Some(whole), .. } => whole.tensor().view(),
            WeightBuffer::Sharded { whole: None, .. } | WeightBuffer::Nothing => panic!("weights are used before they are gathered"),
        }
    }

    /// The slice `range` that this rank answers for.
    pub fn mine(&self, range: &Range<usize>) -> View<'_> {
        match self {
            WeightBuffer::Whole(whole) => whole.tensor().view().part(range.clone(), [range.len()]),
            WeightBuffer::Sharded { mine, .. } => mine.view(),
            WeightBuffer::Nothing => panic!("a unit tied to another of this rank has no weights"),
        }
    }

    pub fn mine_mut(&mut self, range: &Range<usize>) -> ViewMut<'_> {
        match self {
            WeightBuffer::Whole(whole) => whole.tensor_mut().view_mut().part(range.clone(), [range.len()]),
            WeightBuffer::Sharded { mine, .. } => mine.view_mut(),
            WeightBuffer::Nothing => panic!("a unit tied to another of this rank has no weights"),
        }
    }
}
