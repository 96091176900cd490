//! What happened before what: vector clocks over the warps of a block, and what blocks learn of each other.
//!
//! Invariant: an access of warp w at w's time t happened before everything of a warp whose clock has w at t or later.

use std::collections::HashMap;

/// 32 warps, and the asynchronous copies as one more.
pub(crate) const ACTORS: usize = 33;
pub(crate) const ENGINE: usize = 32;

pub(crate) type Clock = [u32; ACTORS];

pub(crate) fn join(into: &mut Clock, from: &Clock) {
    for (into, from) in into.iter_mut().zip(from) {
        *into = (*into).max(*from);
    }
}

/// Stands for the lane where a warp acts as one.
pub(crate) const WHOLE: u8 = 32;

/// Who looks at memory: a lane, a warp, or a copy with the clock of the one who began it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Viewer {
    pub(crate) clock: Clock,
    pub(crate) actor: usize,
    pub(crate) lane: u8,
}

/// A stretch of a warp's time in which nothing was synchronised. Cells refer to it by number; 0 is nobody's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Segment {
    pub(crate) block: u64,
    pub(crate) actor: u8,
    pub(crate) time: u32,
    /// Counts the meetings of the lanes of the warp.
    pub(crate) epoch: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct WarpClock {
    pub(crate) clock: Clock,
    pub(crate) epoch: u32,
    pub(crate) segment: u32,
    /// What an atomic of this warp publishes: its clock at the last fence.
    pub(crate) fenced: Option<Clock>,
    /// The same, at the last fence that other blocks see.
    pub(crate) fenced_device: Option<Clock>,
    /// What it read of others' publications and has not yet made its own by a fence.
    pub(crate) heard: Vec<(u64, Clock)>,
    /// The number of accesses of the launch when it last executed `fence.proxy.async`.
    pub(crate) proxy_fence: u32,
}

/// What a block published through an address: to itself, and to other blocks.
#[derive(Debug)]
struct Published {
    block: u64,
    within: Clock,
    beyond: Option<Clock>,
}

/// The clocks of the warps of the running block.
#[derive(Debug, Default)]
pub(crate) struct Clocks {
    pub(crate) block: u64,
    pub(crate) warps: Vec<WarpClock>,
    pub(crate) segments: Vec<Segment>,
    /// Bulk copies so far: the time of the asynchronous engine.
    copies: u32,
    /// What this block knows of others.
    pub(crate) known: HashMap<u64, Clock>,
    /// What was published through an address, by block.
    published: HashMap<(bool, u64), Vec<Published>>,
}

impl Clocks {
    pub(crate) fn new() -> Clocks {
        Clocks { segments: vec![Segment::default()], ..Clocks::default() }
    }

    pub(crate) fn begin(&mut self, block: u64, warps: usize) {
        self.block = block;
        self.known.clear();
        // What was published through shared memory went with its block.
        self.published.retain(|(shared, _), _| !shared);
        let fresh =
            WarpClock { clock: [0; ACTORS], epoch: 0, segment: 0, fenced: None, fenced_device: None, heard: Vec::new(), proxy_fence: 0 };
        self.warps = vec![fresh; warps];
        for warp in 0..warps {
            self.warps[warp].clock[warp] = 1;
            self.renew(warp);
        }
    }

    fn renew(&mut self, warp: usize) {
        let own = &self.warps[warp];
        let segment = Segment { block: self.block, actor: warp as u8, time: own.clock[warp], epoch: own.epoch };
        self.warps[warp].segment = self.segments.len() as u32;
        self.segments.push(segment);
    }

    /// A copy begins: the clock it and what waits for it have, and the segment of its accesses.
    pub(crate) fn begin_copy(&mut self, warp: usize) -> (Clock, u32) {
        let mut clock = self.release(warp);
        self.copies += 1;
        clock[ENGINE] = self.copies;
        self.segments.push(Segment { block: self.block, actor: ENGINE as u8, time: self.copies, epoch: 0 });
        (clock, self.segments.len() as u32 - 1)
    }

    /// What others may know of a warp's past from here on; the warp's time goes on.
    pub(crate) fn release(&mut self, warp: usize) -> Clock {
        let clock = self.warps[warp].clock;
        self.warps[warp].clock[warp] += 1;
        self.renew(warp);
        clock
    }

    pub(crate) fn acquire(&mut self, warp: usize, clock: &Clock) {
        let own = self.warps[warp].clock[warp];
        join(&mut self.warps[warp].clock, clock);
        self.warps[warp].clock[warp] = own;
    }

    /// The lanes of a warp have met.
    pub(crate) fn meet(&mut self, warp: usize) {
        self.warps[warp].epoch += 1;
        self.renew(warp);
    }

    /// A fence: what was heard is known, what was done can be published.
    pub(crate) fn fence(&mut self, warp: usize, device: bool) {
        let clock = self.release(warp);
        self.warps[warp].fenced = Some(clock);
        if device {
            self.warps[warp].fenced_device = Some(clock);
        }
        for (block, clock) in std::mem::take(&mut self.warps[warp].heard) {
            if block == self.block {
                self.acquire(warp, &clock);
            } else if device {
                join(self.known.entry(block).or_insert([0; ACTORS]), &clock);
            }
        }
    }

    /// A strong write to an address publishes what the writer's last fence covers.
    pub(crate) fn publish(&mut self, warp: usize, shared: bool, address: u64) {
        let own = &self.warps[warp];
        let (Some(within), beyond) = (own.fenced, own.fenced_device) else { return };
        let entries = self.published.entry((shared, address)).or_default();
        match entries.iter_mut().find(|entry| entry.block == self.block) {
            Some(entry) => {
                join(&mut entry.within, &within);
                if let Some(clock) = &beyond {
                    join(entry.beyond.get_or_insert([0; ACTORS]), clock);
                }
            }
            None => entries.push(Published { block: self.block, within, beyond }),
        }
    }

    /// A strong read of an address hears what was published through it.
    pub(crate) fn hear(&mut self, warp: usize, shared: bool, address: u64) {
        let Some(entries) = self.published.get(&(shared, address)) else { return };
        let heard = &mut self.warps[warp].heard;
        for Published { block, within, beyond } in entries {
            let Some(clock) = (if *block == self.block { Some(within) } else { beyond.as_ref() }) else { continue };
            match heard.iter_mut().find(|(other, _)| other == block) {
                Some((_, old)) => join(old, clock),
                None => heard.push((*block, *clock)),
            }
        }
    }

    /// Whether an access in a segment, by a lane, happened before what the viewer does now.
    pub(crate) fn ordered(&self, segment: u32, before: u8, viewer: &Viewer) -> bool {
        let Segment { block, actor, time, epoch } = self.segments[segment as usize];
        if segment == 0 {
            return true;
        }
        if block != self.block {
            return self.known.get(&block).is_some_and(|clock| clock[usize::from(actor)] >= time);
        }
        if usize::from(actor) == viewer.actor && viewer.actor != ENGINE {
            return before == viewer.lane || viewer.lane == WHOLE || before == WHOLE || epoch < self.warps[viewer.actor].epoch;
        }
        viewer.clock[usize::from(actor)] >= time
    }
}
