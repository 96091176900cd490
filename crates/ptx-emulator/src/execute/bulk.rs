//! `cp.async.bulk`: copies of tiles and of plain bytes by the machine's own engine.
//!
//! Invariant: without a seed a copy into shared memory is carried out when nobody can go on without it, one to global memory when it
//! is waited for or its lane exits. With a seed, at random times before that.

use super::Flow;
use super::atomic::changed;
use super::memory::{Doing, addresses, lost, misaligned_global, read_bytes, shared_index};
use crate::address::{PARAMETER_WINDOW, in_window};
use crate::copies::BulkCopy;
use crate::fault::{Fault, FaultKind};
use crate::instruction::{Address, NONE, Operation};
use crate::machine::{At, Machine};
use crate::registers::each;
use crate::syntax::Space;
use crate::tensor_map::{TensorMap, swizzled};
use crate::transfer::{Bulk, BulkDirection};
use crate::watch::check::Remote;
use crate::watch::clocks::{ENGINE, Viewer, WHOLE};

pub(super) fn begin(machine: &mut Machine<'_>, at: At, bulk: &Bulk) -> Result<Flow, Fault> {
    let registers = &machine.warps[at.warp].registers;
    let of = |address: &Address| addresses(registers, address);
    let (shared, global, mbarrier) = (of(&bulk.shared), of(&bulk.global), bulk.mbarrier.as_ref().map(of));
    for lane in each(at.mask) {
        let registers = &machine.warps[at.warp].registers;
        let mut copy = BulkCopy::new(at.warp, lane, at.pc, bulk);
        copy.coordinates.extend(bulk.coordinates.iter().map(|slot| registers.word(*slot, lane) as i32));
        copy.group = machine.warps[at.warp].stores.open[lane];
        copy.shared = shared[lane] as u32;
        copy.global = global[lane];
        copy.bytes = if bulk.bytes == NONE {
            let map = map(machine, at, &copy)?;
            if map.sizes.len() != bulk.coordinates.len() {
                let message = format!("has {} coordinates for a tensor of {} dimensions", bulk.coordinates.len(), map.sizes.len());
                return Err(machine.fault(at, lane, FaultKind::Protocol, message));
            }
            map.tile_bytes()
        } else {
            registers.word(bulk.bytes, lane) as usize
        };
        let align = if bulk.bytes == NONE { 128 } else { 16 };
        if !copy.bytes.is_multiple_of(16) || !copy.shared.is_multiple_of(align) {
            let message =
                format!("copies {} bytes at shared address {:#x}; {align} must divide the address, 16 the size", copy.bytes, copy.shared);
            return Err(machine.fault(at, lane, FaultKind::Misaligned, message));
        }
        for end in [0, copy.bytes.saturating_sub(16)] {
            shared_index(machine, at, lane, shared[lane] + end as u64, 16, Doing::Changing)?;
        }
        copy.clock = machine.checking(|check, _| check.clocks.begin_copy(at.warp));
        if let Some(mbarrier) = &mbarrier {
            copy.mbarrier = mbarrier[lane] as u32;
            let index = machine.mbarrier(at, lane, copy.mbarrier)?;
            if machine.checked() && !machine.mbarriers[index].fenced {
                let message = "reports to an mbarrier that no fence has made known since its initialisation";
                return Err(machine.fault(at, lane, FaultKind::MissingFence, message));
            }
            machine.bulk.push_back(copy);
        } else {
            machine.warps[at.warp].stores.waiting.push(copy);
        }
    }
    Ok(Flow::Next)
}

pub(super) fn wait(machine: &mut Machine<'_>, at: At, groups: u32) -> Result<Flow, Fault> {
    for copy in machine.warps[at.warp].stores.due(at.mask, groups) {
        carry_out(machine, &copy)?;
    }
    Ok(Flow::Next)
}

/// The tensor map of a copy: in the parameters or in global memory.
fn map(machine: &Machine<'_>, at: At, copy: &BulkCopy) -> Result<TensorMap, Fault> {
    let mut bytes = [0; 128];
    if in_window(copy.global, PARAMETER_WINDOW) {
        let offset = (copy.global - PARAMETER_WINDOW) as usize;
        if let Some(parameter) = machine.setup.parameters.get(offset..offset + 128) {
            bytes.copy_from_slice(parameter);
        }
    } else {
        match machine.global.find(copy.global, 128) {
            Some((allocation, offset)) => allocation.read(offset, &mut bytes),
            None => return Err(lost(machine, at, copy.lane, copy.global, 128, Doing::Reading)),
        }
    }
    TensorMap::decode(&bytes).ok_or_else(|| {
        let message = format!("finds no tensor map of the emulator at {:#x}", copy.global);
        machine.fault(at, copy.lane, FaultKind::Protocol, message)
    })
}

/// 16 bytes of a copy in shared memory, and the part of them that is inside the tensor: elements side by side, as a tile's rows are
/// multiples of 16 bytes.
#[derive(Clone, Copy)]
struct Piece {
    shared: u32,
    /// Bytes of the piece before the part.
    skip: usize,
    bytes: usize,
    /// Where the part begins in global memory.
    global: u64,
    /// What its address must be a multiple of.
    align: u64,
}

fn pieces(machine: &Machine<'_>, at: At, copy: &BulkCopy, bulk: &Bulk) -> Result<Vec<Piece>, Fault> {
    if bulk.bytes != NONE {
        let plain = |offset: usize| Piece {
            shared: copy.shared + offset as u32,
            skip: 0,
            bytes: 16,
            global: copy.global + offset as u64,
            align: 16,
        };
        return Ok((0..copy.bytes).step_by(16).map(plain).collect());
    }
    let map = map(machine, at, copy)?;
    let size = map.element_bytes as usize;
    let count = 16 / size;
    let piece = |number: usize| {
        let shared = swizzled(copy.shared + 16 * number as u32, map.swizzle.mode());
        let mut rest = number * count;
        let mut coordinates = [0; 5];
        for (dimension, edge) in map.tile.iter().enumerate() {
            coordinates[dimension] = i64::from(copy.coordinates[dimension]) + (rest % *edge as usize) as i64;
            rest /= *edge as usize;
        }
        // Of the elements from the first coordinate on, those from 0 to the size of the innermost dimension.
        let first = coordinates[0];
        let skip = (-first).clamp(0, count as i64);
        let end = (map.sizes[0] as i64).saturating_sub(first).clamp(skip, count as i64);
        coordinates[0] += skip;
        let begin = if end > skip { map.element(&coordinates[..map.sizes.len()]) } else { None };
        let bytes = if begin.is_some() { (end - skip) as usize * size } else { 0 };
        Piece { shared, skip: skip as usize * size, bytes, global: begin.unwrap_or(0), align: size as u64 }
    };
    Ok((0..copy.bytes / 16).map(piece).collect())
}

pub(crate) fn carry_out(machine: &mut Machine<'_>, copy: &BulkCopy) -> Result<(), Fault> {
    let at = At { warp: copy.warp, pc: copy.pc, mask: 1 << copy.lane };
    let Operation::Bulk(bulk) = &machine.kernel.code[copy.pc as usize].operation else {
        unreachable!("a bulk copy was begun by such an instruction")
    };
    for piece in pieces(machine, at, copy, bulk)? {
        let load = bulk.direction == BulkDirection::ToShared;
        let index = shared_index(machine, at, copy.lane, u64::from(piece.shared), 16, if load { Doing::Writing } else { Doing::Reading })?;
        look(machine, at, copy, &piece, bulk.direction)?;
        if load {
            machine.shared[index..index + 16].fill(0);
        }
        if piece.bytes > 0 {
            transfer(machine, at, copy, bulk, &piece, index + piece.skip)?;
        }
    }
    if bulk.direction == BulkDirection::ToShared {
        let index = machine.mbarrier(at, copy.lane, copy.mbarrier)?;
        machine.bytes_came(index, copy.bytes, copy.clock.as_ref().map(|(clock, _)| clock));
    }
    Ok(())
}

/// Moves the part of a piece that is inside the tensor between global memory and its place in shared memory.
fn transfer(machine: &mut Machine<'_>, at: At, copy: &BulkCopy, bulk: &Bulk, piece: &Piece, begin: usize) -> Result<(), Fault> {
    let place = begin..begin + piece.bytes;
    let doing = if bulk.direction == BulkDirection::ToShared { Doing::Reading } else { Doing::Writing };
    if !piece.global.is_multiple_of(piece.align) {
        return Err(misaligned_global(machine, at, copy.lane, piece.global, piece.align as usize, doing));
    }
    let Some((allocation, offset)) = machine.global.find(piece.global, piece.bytes as u64) else {
        return Err(lost(machine, at, copy.lane, piece.global, piece.bytes, doing));
    };
    if machine.setup.trusting && bulk.direction != BulkDirection::ToShared {
        allocation.trust();
    }
    match bulk.direction {
        BulkDirection::ToShared => allocation.read(offset, &mut machine.shared[place]),
        BulkDirection::ToGlobal => allocation.write_bytes(offset, &machine.shared[place]),
        BulkDirection::Reduce(operator) => {
            let size = bulk.scalar.bytes();
            for at in (0..piece.bytes).step_by(size) {
                let value = read_bytes(&machine.shared, begin + at, size);
                let change = |old: u64| changed(operator, bulk.scalar, old, value, 0);
                allocation.update(offset + at as u64, size, machine.setup.crowded, change);
            }
        }
    }
    Ok(())
}

/// Shows the accesses of a piece to the checks.
fn look(machine: &mut Machine<'_>, at: At, copy: &BulkCopy, piece: &Piece, direction: BulkDirection) -> Result<(), Fault> {
    let Some((clock, segment)) = copy.clock else { return Ok(()) };
    let viewer = Viewer { clock, actor: ENGINE, lane: WHOLE };
    let (here, there) = match direction {
        BulkDirection::ToShared => (Doing::Writing, Doing::Reading),
        BulkDirection::ToGlobal => (Doing::Reading, Doing::Writing),
        BulkDirection::Reduce(_) => (Doing::Reading, Doing::Changing),
    };
    let shared = Remote { space: Space::Shared, doing: here, begin: u64::from(piece.shared), bytes: 16, viewer, segment };
    machine.checking(|check, machine| check.remote(machine, at, &shared)).unwrap_or(Ok(()))?;
    if piece.bytes > 0 && machine.global.find(piece.global, piece.bytes as u64).is_some() {
        let global = Remote { space: Space::Global, doing: there, begin: piece.global, bytes: piece.bytes, ..shared };
        machine.checking(|check, machine| check.remote(machine, at, &global)).unwrap_or(Ok(()))?;
    }
    Ok(())
}

impl Machine<'_> {
    /// Carries out one of the copies into shared memory that are under way. False: there is none.
    pub(crate) fn land_one(&mut self) -> Result<bool, Fault> {
        let count = self.bulk.len();
        let index = self.random.as_mut().map_or(0, |random| random.below(count));
        let Some(copy) = self.bulk.remove(index) else { return Ok(false) };
        carry_out(self, &copy)?;
        Ok(true)
    }

    /// Carries out the stores that exiting lanes left under way.
    pub(crate) fn finish_stores(&mut self, at: At) -> Result<(), Fault> {
        for lane in each(at.mask) {
            for copy in self.warps[at.warp].stores.all_of(lane) {
                carry_out(self, &copy)?;
            }
        }
        Ok(())
    }
}
