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
use crate::instruction::{Address, Bulk, BulkDirection, NONE, Operation};
use crate::machine::{At, Machine};
use crate::registers::each;
use crate::syntax::Space;
use crate::tensor_map::{TensorMap, swizzled};
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

/// 16 bytes of a copy: where they lie in shared memory, and the global address of each element that is inside the tensor.
struct Piece {
    shared: u32,
    elements: Vec<Option<u64>>,
    element_bytes: usize,
}

fn pieces(machine: &Machine<'_>, at: At, copy: &BulkCopy, bulk: &Bulk) -> Result<Vec<Piece>, Fault> {
    if bulk.bytes != NONE {
        let plain = |offset: usize| Piece {
            shared: copy.shared + offset as u32,
            elements: vec![Some(copy.global + offset as u64)],
            element_bytes: 16,
        };
        return Ok((0..copy.bytes).step_by(16).map(plain).collect());
    }
    let map = map(machine, at, copy)?;
    let size = map.element_bytes as usize;
    let per_piece = 16 / size;
    let piece = |number: usize| {
        let element = |i: usize| {
            let mut rest = number * per_piece + i;
            let coordinates: Vec<i64> = (0..map.sizes.len())
                .map(|dimension| {
                    let edge = map.tile[dimension] as usize;
                    let within = rest % edge;
                    rest /= edge;
                    i64::from(copy.coordinates[dimension]) + within as i64
                })
                .collect();
            map.element(&coordinates)
        };
        let shared = swizzled(copy.shared + 16 * number as u32, map.swizzle.mode());
        Piece { shared, elements: (0..per_piece).map(element).collect(), element_bytes: size }
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
        for (i, address) in piece.elements.iter().enumerate() {
            let place = index + i * piece.element_bytes;
            match address {
                Some(address) => element(machine, at, copy, bulk, [*address, place as u64, piece.element_bytes as u64])?,
                None if load => machine.shared[place..place + piece.element_bytes].fill(0),
                None => {}
            }
        }
    }
    if bulk.direction == BulkDirection::ToShared {
        let index = machine.mbarrier(at, copy.lane, copy.mbarrier)?;
        machine.bytes_came(index, copy.bytes, copy.clock.as_ref().map(|(clock, _)| clock));
    }
    Ok(())
}

/// Moves one element between its global address and its place in shared memory.
fn element(machine: &mut Machine<'_>, at: At, copy: &BulkCopy, bulk: &Bulk, [address, place, bytes]: [u64; 3]) -> Result<(), Fault> {
    let place = place as usize..(place + bytes) as usize;
    let doing = if bulk.direction == BulkDirection::ToShared { Doing::Reading } else { Doing::Writing };
    if !address.is_multiple_of(bytes) {
        return Err(misaligned_global(machine, at, copy.lane, address, bytes as usize, doing));
    }
    let Some((allocation, offset)) = machine.global.find(address, bytes) else {
        return Err(lost(machine, at, copy.lane, address, bytes as usize, doing));
    };
    match bulk.direction {
        BulkDirection::ToShared => allocation.read(offset, &mut machine.shared[place]),
        BulkDirection::ToGlobal => {
            allocation.write_bytes(offset, &machine.shared[place]);
            if machine.setup.trusting {
                allocation.trust();
            }
        }
        BulkDirection::Reduce(operator) => {
            let size = bulk.scalar.bytes();
            for at in (0..bytes as usize).step_by(size) {
                let value = read_bytes(&machine.shared, place.start + at, size);
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
    for address in piece.elements.iter().flatten() {
        let global = Remote { space: Space::Global, doing: there, begin: *address, bytes: piece.element_bytes, ..shared };
        if machine.global.find(*address, piece.element_bytes as u64).is_some() {
            machine.checking(|check, machine| check.remote(machine, at, &global)).unwrap_or(Ok(()))?;
        }
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
