//! One message between two ranks, as it goes over a socket: a header, the numbers, and a checksum of each.
//!
//! Invariant: what `read` returns is what `write` was given, to the bit; a change on the way is an error that says which call it hit.

use crate::comm::Reduction;
use crate::comm::call::{self, Call, Operation};
use crate::device::memory::{Buffer, Memory};
use crate::device::tensor::Tensor;
use crate::dtype::Dtype;
use crate::shape::Shape;
use anyhow::{Context, Result, bail, ensure};
use crc_fast::{CrcAlgorithm, Digest};
use std::io::{Read, Write};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a header.
pub const HEADER: usize = 72;
/// Bytes checked and handed on at a time: they are still in the cache when the second of the two happens.
const CHUNK: usize = 256 << 10;
/// Messages up to this size leave in one piece.
pub const SMALL: usize = 32 << 10;
/// More than any message can have: a larger length is a sign of confusion.
const LARGEST: u64 = 1 << 40;

/// Which message of a call this is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// The first messages of a collective: its slices, or, of the first call of a group, none.
    Scatter = 0,
    /// The reduced slices of an all-reduce.
    Gather = 1,
    /// A send.
    Point = 2,
    /// The last message of a connection.
    Goodbye = 3,
    /// The slices of the first call of a group.
    Slices = 4,
    /// Memory to share, where there is some.
    Offer = 5,
    /// Whether it could be opened.
    Verdict = 6,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub group: u64,
    pub phase: Phase,
    /// Number of the collective in its group, or of the send on its link.
    pub number: u64,
    pub call: Call,
}

/// The bytes of a message, lent until they are written.
pub enum Payload {
    Nothing,
    Tensor(Arc<Tensor>, Range<usize>),
    Buffer(Arc<Buffer>),
}

impl Payload {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Payload::Nothing => &[],
            Payload::Tensor(x, range) => &call::bytes(x)[range.clone()],
            Payload::Buffer(buffer) => buffer.bytes(),
        }
    }
}

impl Header {
    /// `length`: of the numbers that follow.
    pub fn encode(&self, length: usize) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.group.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..24].copy_from_slice(&(length as u64).to_le_bytes());
        bytes[24] = self.phase as u8;
        bytes[25] = operation_code(self.call.operation);
        if let Some((dtype, shape)) = self.call.tensor {
            bytes[26] = 1 + dtype as u8;
            bytes[27] = shape.rank() as u8;
            for (i, dim) in shape.dims().iter().enumerate() {
                bytes[32 + 8 * i..40 + 8 * i].copy_from_slice(&(*dim as u64).to_le_bytes());
            }
        }
        let checksum = checksum(&bytes[..64]);
        bytes[64..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER]) -> Result<(Header, usize)> {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        ensure!(checksum(&bytes[..64]) == number(64), "the header of a message is corrupt");
        let phases = [Phase::Scatter, Phase::Gather, Phase::Point, Phase::Goodbye, Phase::Slices, Phase::Offer, Phase::Verdict];
        let phase = *phases.get(bytes[24] as usize).context("a message of an unknown phase")?;
        let dtypes = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::U32];
        let tensor = match bytes[26] {
            0 => None,
            code => {
                let dtype = *dtypes.get(code as usize - 1).context("a message of an unknown dtype")?;
                ensure!(bytes[27] <= 4, "a message with {} dims", bytes[27]);
                let dims: Vec<usize> = (0..bytes[27] as usize).map(|i| number(32 + 8 * i) as usize).collect();
                Some((dtype, Shape::new(&dims)))
            }
        };
        ensure!(number(16) <= LARGEST, "a message of {} bytes", number(16));
        let call = Call { operation: operation_of(bytes[25])?, tensor };
        Ok((Header { group: number(0), phase, number: number(8), call }, number(16) as usize))
    }
}

fn operation_code(operation: Operation) -> u8 {
    match operation {
        Operation::AllReduce(Reduction::Sum) => 0,
        Operation::AllReduce(Reduction::Max) => 1,
        Operation::ReduceScatter(Reduction::Sum) => 2,
        Operation::ReduceScatter(Reduction::Max) => 3,
        Operation::AllGather => 4,
        Operation::AllToAll => 5,
        Operation::Exchange => 6,
        Operation::Send => 7,
        Operation::Receive => 8,
    }
}

fn operation_of(code: u8) -> Result<Operation> {
    Ok(match code {
        0 => Operation::AllReduce(Reduction::Sum),
        1 => Operation::AllReduce(Reduction::Max),
        2 => Operation::ReduceScatter(Reduction::Sum),
        3 => Operation::ReduceScatter(Reduction::Max),
        4 => Operation::AllGather,
        5 => Operation::AllToAll,
        6 => Operation::Exchange,
        7 => Operation::Send,
        8 => Operation::Receive,
        other => bail!("a message of an unknown operation {other}"),
    })
}

pub fn write(stream: &mut impl Write, header: &Header, bytes: &[u8]) -> Result<()> {
    let head = header.encode(bytes.len());
    if bytes.len() <= SMALL {
        let mut all = Vec::with_capacity(HEADER + bytes.len() + 8);
        all.extend(head);
        all.extend(bytes);
        all.extend(checksum(bytes).to_le_bytes());
        return Ok(stream.write_all(&all)?);
    }
    stream.write_all(&head)?;
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    for chunk in bytes.chunks(CHUNK) {
        digest.update(chunk);
        stream.write_all(chunk)?;
    }
    Ok(stream.write_all(&digest.finalize().to_le_bytes())?)
}

pub fn read(stream: &mut impl Read, memory: &Arc<Memory>) -> Result<(Header, Buffer)> {
    let mut head = [0; HEADER];
    stream.read_exact(&mut head)?;
    let (header, length) = Header::decode(&head)?;
    let mut buffer = Memory::allocate(memory, length);
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    for chunk in buffer.bytes_mut().chunks_mut(CHUNK) {
        stream.read_exact(chunk)?;
        digest.update(chunk);
    }
    let mut expected = [0; 8];
    stream.read_exact(&mut expected)?;
    ensure!(digest.finalize() == u64::from_le_bytes(expected), "the numbers of call {}, {}, are corrupt", header.number, header.call);
    Ok((header, buffer))
}

fn checksum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: usize) -> (Header, Vec<u8>, Vec<u8>) {
        let call = Call { operation: Operation::ReduceScatter(Reduction::Max), tensor: Some((Dtype::F16, Shape::new(&[3, 1 << 40, 5]))) };
        let header = Header { group: 0x0123_4567_89ab_cdef, phase: Phase::Gather, number: 77, call };
        let bytes: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
        let mut wire = Vec::new();
        write(&mut wire, &header, &bytes).expect("written to memory");
        (header, bytes, wire)
    }

    #[test]
    fn a_message_arrives_as_it_was_sent() {
        let memory = Arc::new(Memory::of_host());
        for length in [0, 1, SMALL, SMALL + 1, 3 * CHUNK, 3 * CHUNK + 5] {
            let (header, bytes, wire) = message(length);
            let (back, buffer) = read(&mut wire.as_slice(), &memory).expect("intact");
            assert!(back == header && buffer.bytes() == bytes, "{length} bytes");
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let memory = Arc::new(Memory::of_host());
        let (_, _, wire) = message(100);
        for bit in 0..8 * wire.len() {
            let mut bad = wire.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let Err(error) = read(&mut bad.as_slice(), &memory) else { panic!("bit {bit} is not noticed") };
            assert!(error.to_string().contains("corrupt"), "bit {bit}: {error}");
        }
        for length in 0..wire.len() {
            assert!(read(&mut &wire[..length], &memory).is_err(), "cut after {length} bytes");
        }
    }
}
