//! Parameters seen inside the flat buffer of their unit.
//!
//! Invariant: a view made here is exactly the parameter's place in the layout; stacked parameters are neighbours without a gap.

use crate::device::tensor::{Tensor, View, ViewMut};
use crate::ops::embedding::{self, RowSums};
use crate::ops::matmul::{self, Sum};
use crate::ops::reduce;
use crate::plan::layout::{Place, UnitLayout};
use crate::shape::Shape;
use std::ops::Range;
use std::sync::Arc;

/// Index of a parameter within its unit.
pub type ParamId = usize;

/// The weights of one unit, whole.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    flat: View<'a>,
    layout: &'a UnitLayout,
}

/// The f32 gradients of one unit, to be added to.
pub struct Grads<'a> {
    flat: ViewMut<'a>,
    layout: &'a UnitLayout,
    fresh: &'a mut [Fresh],
    /// Where given, nothing is added now: the work is noted here.
    deferred: Option<&'a mut Vec<Deferred>>,
    /// Where given, the vectors of the stream are added up here, each virtual shard of the rows apart.
    stream: Option<StreamRows<'a>>,
}

/// What of a parameter's gradient counts as zero although something else stands there. What adds the first term may write instead:
/// clearing the buffer would write all of it once more.
#[derive(Clone, PartialEq, Debug)]
pub enum Fresh {
    Nothing,
    /// Of a table: the rows whose number is not 0.
    Rows(Vec<u32>),
    All,
}

/// `[chunks, length]` of each vector of the stream, one after the other.
pub struct StreamRows<'a> {
    pub flat: ViewMut<'a>,
    pub chunks: usize,
}

/// Gradients still to be added: what the weight half of a split backward pass runs on.
pub type Deferred = Box<dyn FnOnce(&mut Grads<'_>) + Send>;

impl<'a> Weights<'a> {
    pub fn new(flat: View<'a>, layout: &'a UnitLayout) -> Weights<'a> {
        assert_eq!(flat.shape().numel(), layout.numel, "weights of another layout");
        Weights { flat, layout }
    }

    pub fn get(&self, id: ParamId) -> View<'a> {
        let place = &self.layout.places[id];
        self.flat.part(place.flat.clone(), Shape::new(&place.dims))
    }

    /// Neighbouring matrices (or vectors) as one taller one.
    pub fn stack(&self, ids: &[ParamId]) -> View<'a> {
        let (range, shape) = stacked(self.layout, ids);
        self.flat.part(range, shape)
    }
}

impl<'a> Grads<'a> {
    pub fn new(flat: ViewMut<'a>, layout: &'a UnitLayout, fresh: &'a mut [Fresh]) -> Grads<'a> {
        assert_eq!(flat.shape().numel(), layout.numel, "gradients of another layout");
        assert_eq!(fresh.len(), layout.places.len(), "parameters of another layout");
        Grads { flat, layout, fresh, deferred: None, stream: None }
    }

    pub fn with_stream(self, stream: StreamRows<'a>) -> Grads<'a> {
        Grads { stream: Some(stream), ..self }
    }

    /// From now on all work goes into `list` instead.
    pub fn deferring(self, list: &'a mut Vec<Deferred>) -> Grads<'a> {
        Grads { deferred: Some(list), ..self }
    }

    /// Adds gradients: now, or, in a backward pass of the input alone, later.
    pub fn add(&mut self, work: impl FnOnce(&mut Grads<'_>) + Send + 'static) {
        match &mut self.deferred {
            Some(list) => list.push(Box::new(work)),
            None => work(self),
        }
    }

    /// Stacked matrices w [o, i]: dw += dy^T x, with dy [n, o] and x [n, i]. `t`: rows of one sequence.
    pub fn add_matrices(&mut self, ids: &[ParamId], dy: &Arc<Tensor>, x: &Arc<Tensor>, t: usize) {
        let (ids, dy, x) = (ids.to_vec(), dy.clone(), x.clone());
        self.add(move |g| matmul::backward_weight(g.matrices(&ids), dy.view(), x.view(), t));
    }

    /// A bias of the stream: db += the sum of the rows of dy [n, o].
    pub fn add_stream_bias(&mut self, id: ParamId, dy: &Arc<Tensor>, t: usize) {
        let dy = dy.clone();
        self.add(move |g| reduce::sum_rows(g.stream(id), dy.view(), t));
    }

    /// Stacked biases that are cut over tensor parallelism.
    pub fn add_biases(&mut self, ids: &[ParamId], dy: &Arc<Tensor>, t: usize) {
        let (ids, dy) = (ids.to_vec(), dy.clone());
        self.add(move |g| reduce::sum_rows(g.columns(&ids), dy.view(), t));
    }

    pub fn get(&mut self, id: ParamId) -> ViewMut<'_> {
        self.clear(&[id]);
        let place = &self.layout.places[id];
        self.flat.again().part(place.flat.clone(), Shape::new(&place.dims))
    }

    /// Stacked matrices, for what can begin a sum.
    pub fn matrices(&mut self, ids: &[ParamId]) -> Sum<'_> {
        let fresh = ids.iter().all(|&id| self.fresh[id] == Fresh::All);
        if fresh {
            ids.iter().for_each(|&id| self.fresh[id] = Fresh::Nothing);
        } else {
            self.clear(ids);
        }
        let (range, shape) = stacked(self.layout, ids);
        Sum { view: self.flat.again().part(range, shape), fresh }
    }

    /// A table of which few rows get a gradient: on the CPU the others are left alone.
    pub fn rows(&mut self, id: ParamId) -> RowSums<'_> {
        if self.flat.device().is_gpu() {
            return self.get(id).into();
        }
        let place = &self.layout.places[id];
        if self.fresh[id] == Fresh::All {
            self.fresh[id] = Fresh::Rows(vec![1; place.dims[0]]);
        }
        let view = self.flat.again().part(place.flat.clone(), Shape::new(&place.dims));
        let fresh = match &mut self.fresh[id] {
            Fresh::Rows(rows) => Some(&mut rows[..]),
            _ => None,
        };
        RowSums { view, fresh }
    }

    /// Gradients that count as zero become zero.
    fn clear(&mut self, ids: &[ParamId]) {
        for &id in ids {
            let place = &self.layout.places[id];
            let all = self.flat.again().part(place.flat.clone(), Shape::new(&place.dims));
            match std::mem::replace(&mut self.fresh[id], Fresh::Nothing) {
                Fresh::Nothing => {}
                Fresh::Rows(rows) => embedding::clear(all, &rows),
                Fresh::All => all.fill_zero(),
            }
        }
    }

    /// No gradient is fresh any more: the buffer holds what it stands for.
    pub fn settle(mut self) {
        self.clear(&(0..self.fresh.len()).collect::<Vec<_>>());
    }

    /// The gradient of a vector that all tensor-parallel ranks hold and that is a sum over rows of the stream: `[chunks, c]`, a row
    /// for each virtual shard of the rows.
    pub fn stream(&mut self, id: ParamId) -> ViewMut<'_> {
        let place = &self.layout.places[id];
        let length = place.flat.len();
        if self.stream.is_none() {
            self.clear(&[id]);
        }
        match &mut self.stream {
            None => self.flat.again().part(place.flat.clone(), [1, length]),
            Some(StreamRows { flat, chunks }) => {
                let at = |p: &&Place| p.flat == place.flat;
                let (_, offset) = self.layout.stream_places().find(|(p, _)| at(p)).expect("a vector that every rank holds");
                flat.again().part(*chunks * offset..*chunks * (offset + length), [*chunks, length])
            }
        }
    }

    /// The gradient of stacked vectors that are cut over tensor parallelism, sums over all rows: `[1, o_tp]`.
    pub fn columns(&mut self, ids: &[ParamId]) -> ViewMut<'_> {
        self.clear(ids);
        let (range, shape) = stacked(self.layout, ids);
        self.flat.again().part(range, [1, shape.numel()])
    }
}

fn stacked(layout: &UnitLayout, ids: &[ParamId]) -> (Range<usize>, Shape) {
    let first = &layout.places[ids[0]];
    let mut end = first.flat.start;
    for &id in ids {
        let place = &layout.places[id];
        assert_eq!(place.flat.start, end, "{} does not follow its neighbour", place.entry.role);
        assert_eq!(place.dims[1..], first.dims[1..], "{} has other columns", place.entry.role);
        end = place.flat.end;
    }
    let rows = ids.iter().map(|&id| layout.places[id].dims[0]).sum();
    let shape = if first.dims.len() == 1 { Shape::new(&[rows]) } else { Shape::new(&[rows, first.dims[1]]) };
    (first.flat.start..end, shape)
}
