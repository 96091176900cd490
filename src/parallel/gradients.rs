//! The gradients of one unit, from the first micro-batch of a step to their sum over all data-parallel ranks.
//!
//! What is added, in which order, is the run's geometry (`plan::Order`):
//!
//! - `Lanes`: a lane adds up its sequences; lanes are added in a balanced binary tree, those of this rank here, the rest by the
//!   groups; one reduction a step.
//! - `Rows`: the i-th micro-batch of every lane is added over the lanes in that tree, a reduction each; these sums are added in order.
//!
//! Gradients of vectors that are sums over rows of the stream (norms, biases of the stream) are added up for each virtual shard of
//! the rows apart, and these sums in a tree at the end of a lane: so they are the same whether or not the rows are cut over tp.
//! Gradients of heads that virtual shards share are added then, too (`copies.rs`).
//!
//! Invariant: a unit goes Clean -> Adding -> (Reducing -> Adding)* -> Reducing -> Total -> Clean; every transition is asserted.

use crate::comm::{Group, Pending, Reduction};
use crate::device::Device;
use crate::device::tensor::{Tensor, View, ViewMut};
use crate::dtype::Dtype;
use crate::ops::{elementwise, embedding, reduce};
use crate::parallel::copies;
use crate::parallel::flat::{Fresh, Grads, StreamRows};
use crate::plan::Order;
use crate::plan::layout::UnitLayout;
use crate::shape::Shape;
use anyhow::Result;
use std::ops::Range;
use std::sync::Arc;

/// How this rank adds up gradients.
#[derive(Clone)]
pub struct Rules {
    pub order: Order,
    /// Lanes of the canonical sum that this rank owns.
    pub lanes: usize,
    /// Virtual shards into which this rank cuts the rows of its stream.
    pub chunks: usize,
    /// Whole buffers stay from step to step (stages 0 and 1, in the order of lanes, with one lane).
    pub keep: bool,
    /// The sum is cut over the shard group (stages 1 to 3).
    pub sliced: bool,
    pub shard: Arc<dyn Group>,
    pub replica: Arc<dyn Group>,
    /// Sums the vectors of a sequence-parallel stream; a group of one where the stream is whole.
    pub stream: Arc<dyn Group>,
    /// The tensor-parallel ranks, which may share heads.
    pub tensor: Arc<dyn Group>,
}

pub struct Gradients {
    device: Device,
    numel: usize,
    /// The slice of the flat buffer whose sum this rank needs.
    mine: Range<usize>,
    /// Of the lane, or micro-batch, that is being added: the flat buffer, and `[chunks, length]` of each vector of the stream.
    sum: Option<Tensor>,
    /// What of `sum` counts as zero.
    fresh: Vec<Fresh>,
    /// What counts as zero stays so up to the total: it goes into a sum that knows of it (`add_tied`).
    sparse: bool,
    stream: Option<Tensor>,
    /// Sums of subtrees of this rank's lanes, with their height.
    lanes: Vec<(usize, Tensor)>,
    reducing: Option<Reducing>,
    /// Where `mine` lies in it is `total_start`.
    total: Option<Tensor>,
    total_start: usize,
    complete: bool,
}

/// The two halves of a reduction.
enum Reducing {
    /// Over the shard group: the whole buffer.
    OverShards(Pending),
    /// Over the replicas: the slice; and the whole buffer around it, where that is kept.
    OverReplicas { slice: Option<Pending>, whole: Option<Tensor> },
}

impl Rules {
    /// Whether this rank adds up all there is, in one sum.
    fn alone(&self) -> bool {
        self.order == Order::Lanes && self.lanes == 1 && self.shard.size() == 1 && self.replica.size() == 1
    }

    /// Whether gradients can wait for the next step: their buffers stay anyway, and nobody waits for the weights that come of them.
    pub fn can_wait(&self) -> bool {
        self.keep && (!self.sliced || self.shard.size() == 1)
    }

    /// Whether something follows the end of a reduction over the shard group: a slice stays of a whole buffer, or replicas add up theirs.
    pub fn goes_on(&self) -> bool {
        self.shard.size() > 1 && ((self.sliced && !self.keep) || self.replica.size() > 1)
    }
}

impl Gradients {
    /// `tied`: in the end these are added to those of another unit on this rank.
    pub fn new(device: &Device, rules: &Rules, layout: &UnitLayout, mine: Range<usize>, tied: bool) -> Gradients {
        let sum = rules.keep.then(|| cleared(device, layout));
        Gradients {
            device: device.clone(),
            numel: layout.numel,
            mine,
            sum,
            fresh: vec![Fresh::All; layout.places.len()],
            sparse: tied && rules.alone(),
            stream: None,
            lanes: Vec::new(),
            reducing: None,
            total: None,
            total_start: 0,
            complete: false,
        }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Buffers to add a micro-batch's gradients to.
    pub fn adding<'a>(&'a mut self, rules: &Rules, layout: &'a UnitLayout) -> Result<Grads<'a>> {
        assert!(!self.complete, "a gradient arrives after the step's sum is complete");
        if self.reducing.is_some() {
            self.over_replicas(rules)?;
            self.take_reduction()?;
        }
        let device = &self.device;
        let sum = self.sum.get_or_insert_with(|| cleared(device, layout));
        let grads = Grads::new(sum.view_mut(), layout, &mut self.fresh);
        if !uses_stream(rules) || layout.stream_length() == 0 {
            return Ok(grads);
        }
        let length = rules.chunks * layout.stream_length();
        let stream = self.stream.get_or_insert_with(|| device.zeros([length], Dtype::F32));
        Ok(grads.with_stream(StreamRows { flat: stream.view_mut(), chunks: rules.chunks }))
    }

    /// The buffers now hold all of one lane (or, in the order of rows, one micro-batch of it).
    pub fn end_lane(&mut self, rules: &Rules, layout: &UnitLayout) -> Result<()> {
        if let Some(sum) = self.sum.as_mut().filter(|_| !self.sparse) {
            Grads::new(sum.view_mut(), layout, &mut self.fresh).settle();
            // The next lane begins anew.
            self.fresh.fill(Fresh::All);
        }
        if let Some(stream) = self.stream.take() {
            let sum = self.sum.as_mut().expect("the stream is part of a sum");
            fold_stream(sum, stream, rules, layout)?;
        }
        if let Some(sum) = &mut self.sum {
            copies::fold(sum, layout, rules.tensor.as_ref())?;
        }
        if rules.lanes > 1 {
            self.lanes.push((0, self.sum.take().expect("a lane that added something")));
            while let [.., (low, _), (high, _)] = self.lanes[..]
                && low == high
            {
                self.fold_lanes();
            }
        }
        Ok(())
    }

    /// The sum of this rank's lanes is there: starts adding it up over the data-parallel ranks.
    pub fn reduce(&mut self, rules: &Rules) -> Result<()> {
        while self.lanes.len() > 1 {
            self.fold_lanes();
        }
        let sum = self.lanes.pop().map(|(_, sum)| sum).or_else(|| self.sum.take()).expect("a reduction of what was added");
        let pending =
            if rules.sliced { rules.shard.reduce_scatter(sum, Reduction::Sum) } else { rules.shard.all_reduce(sum, Reduction::Sum) };
        assert!(self.reducing.is_none(), "one reduction of a unit at a time");
        self.reducing = Some(Reducing::OverShards(pending?));
        if rules.shard.size() == 1 {
            // A group of one has nothing to wait for.
            self.over_replicas(rules)?;
        }
        Ok(())
    }

    /// Waits for the last reduction: `mine` is then complete.
    pub fn finish(&mut self) -> Result<()> {
        assert!(self.reducing.is_some() && self.sum.is_none(), "a step ends with the reduction of every unit under way");
        self.take_reduction()?;
        self.complete = true;
        Ok(())
    }

    /// The step's gradient of the slice.
    pub fn mine(&self) -> View<'_> {
        assert!(self.complete, "a gradient is read before its sum is complete");
        let length = self.mine.len();
        self.total.as_ref().expect("complete").view().part(self.total_start..self.total_start + length, [length])
    }

    pub fn mine_mut(&mut self) -> ViewMut<'_> {
        assert!(self.complete, "a gradient is written before its sum is complete");
        let length = self.mine.len();
        let range = self.total_start..self.total_start + length;
        self.total.as_mut().expect("complete").view_mut().part(range, [length])
    }

    /// Adds the step's gradient of a tied unit, which is used up.
    pub fn add_tied(&mut self, tied: &mut Gradients, layout: &UnitLayout) {
        if !self.sparse {
            return elementwise::add(self.mine_mut(), tied.mine());
        }
        // Where this gradient has few rows it is added to the other, which then takes its place.
        assert_eq!((self.mine.clone(), self.numel), (tied.mine.clone(), tied.numel), "tied units of one layout");
        let mut sums = tied.mine_mut();
        for (place, fresh) in layout.places.iter().zip(&self.fresh) {
            let shape = Shape::new(&place.dims);
            let (sums, terms) = (sums.again().part(place.flat.clone(), shape), self.mine().part(place.flat.clone(), shape));
            match fresh {
                Fresh::Nothing => elementwise::add(sums, terms),
                Fresh::Rows(rows) => embedding::add_rows(sums, terms, rows),
                Fresh::All => {}
            }
        }
        std::mem::swap(&mut self.total, &mut tied.total);
        self.fresh.fill(Fresh::All);
    }

    /// Hands out the step's gradient, and where the slice lies in it: an update reads it, and then gives it back.
    pub fn take(&mut self) -> (Tensor, Range<usize>) {
        assert!(self.complete, "a gradient is read before its sum is complete");
        self.complete = false;
        let start = std::mem::take(&mut self.total_start);
        (self.total.take().expect("complete"), start..start + self.mine.len())
    }

    /// Forgets what was handed out.
    pub fn give_back(&mut self, rules: &Rules, total: Tensor) {
        if rules.keep {
            self.sum = Some(total);
        }
    }

    /// Forgets the step.
    pub fn clear(&mut self, rules: &Rules) {
        assert!(self.lanes.is_empty() && self.reducing.is_none(), "a step leaves nothing behind");
        if self.complete {
            let (total, _) = self.take();
            self.give_back(rules, total);
        }
    }

    /// Bytes of the buffers at this moment.
    pub fn bytes(&self) -> usize {
        let single = [&self.sum, &self.stream, &self.total].into_iter().flatten();
        single.chain(self.lanes.iter().map(|(_, sum)| sum)).map(Tensor::bytes).sum()
    }

    /// Adds the last two lane sums into one.
    fn fold_lanes(&mut self) {
        let (_, right) = self.lanes.pop().expect("two lanes to add");
        let (height, mut left) = self.lanes.pop().expect("two lanes to add");
        elementwise::add(left.view_mut(), right.view());
        self.lanes.push((height + 1, left));
    }

    /// Waits for the reduction over the shard group, if one is under way, and starts the one over the replicas.
    pub fn over_replicas(&mut self, rules: &Rules) -> Result<()> {
        let Some(Reducing::OverShards(_)) = self.reducing else { return Ok(()) };
        let Some(Reducing::OverShards(pending)) = self.reducing.take() else { unreachable!("just seen") };
        let whole = pending.wait()?;
        let (slice, whole) = if self.mine.len() == self.numel {
            (Some(whole), None)
        } else if rules.keep && rules.replica.size() == 1 {
            (None, Some(whole))
        } else {
            let mut slice = self.device.empty([self.mine.len()], Dtype::F32);
            slice.view_mut().copy_from(whole.view().part(self.mine.clone(), [self.mine.len()]));
            (Some(slice), rules.keep.then_some(whole))
        };
        let slice = slice.map(|slice| rules.replica.all_reduce(slice, Reduction::Sum)).transpose()?;
        self.reducing = Some(Reducing::OverReplicas { slice, whole });
        Ok(())
    }

    /// Adds what was reduced to the step's total.
    fn take_reduction(&mut self) -> Result<()> {
        let Some(Reducing::OverReplicas { slice, whole }) = self.reducing.take() else { panic!("a reduction ends over the replicas") };
        let slice = slice.map(Pending::wait).transpose()?;
        match (slice, whole) {
            (slice, Some(mut whole)) => {
                if let Some(slice) = slice {
                    whole.view_mut().part(self.mine.clone(), [self.mine.len()]).copy_from(slice.view());
                }
                (self.total, self.total_start) = (Some(whole), self.mine.start);
            }
            (Some(slice), None) => match &mut self.total {
                Some(total) => elementwise::add(total.view_mut(), slice.view()),
                None => self.total = Some(slice),
            },
            (None, None) => panic!("a reduction brings a slice or the buffer around it"),
        }
        Ok(())
    }
}

/// A buffer in which all gradients are fresh. Only its padding is written: a sum of buffers is to have zeros there, too.
fn cleared(device: &Device, layout: &UnitLayout) -> Tensor {
    let mut sum = device.empty([layout.numel], Dtype::F32);
    sum.view_mut().part(layout.used..layout.numel, [layout.numel - layout.used]).fill_zero();
    sum
}

/// Whether vectors of the stream are added up apart from the flat buffer.
fn uses_stream(rules: &Rules) -> bool {
    rules.chunks > 1 || rules.stream.size() > 1
}

/// The tree over the virtual shards of the rows, those of this rank first; the result goes to its place in the flat buffer.
fn fold_stream(sum: &mut Tensor, stream: Tensor, rules: &Rules, layout: &UnitLayout) -> Result<()> {
    let mut folded = sum.device().empty([layout.stream_length()], Dtype::F32);
    let places: Vec<_> = layout.stream_places().collect();
    for (place, offset) in &places {
        let length = place.flat.len();
        let rows = stream.view().part(rules.chunks * offset..rules.chunks * (offset + length), [rules.chunks, length]);
        let row = reduce::tree_rows(rows);
        folded.view_mut().part(*offset..offset + length, [length]).copy_from(row.view());
    }
    let folded = rules.stream.all_reduce(folded, Reduction::Sum)?.wait()?;
    for (place, offset) in &places {
        let length = place.flat.len();
        sum.view_mut().part(place.flat.clone(), [length]).copy_from(folded.view().part(*offset..offset + length, [length]));
    }
    Ok(())
}
