//! Memory of the host, in pages as large as the system gives.
//!
//! Invariant: zero at first, every buffer starts at a cache line, and no two share one.
#![allow(unsafe_code)]

use memmap2::{MmapOptions, MmapRaw};
use std::sync::{Arc, Mutex, PoisonError};

/// From here on a buffer is a mapping of its own. Smaller ones are parts of one, so that they lie in huge pages, too: a system takes
/// longer to hand out a small page than a step of a small model takes to fill it.
const LARGE: usize = 4 << 20;
const SLAB: usize = 2 * LARGE;

/// The mapping that small buffers are cut from, and how much of it is given out.
static SLAB_IN_USE: Mutex<Option<(Arc<MmapRaw>, usize)>> = Mutex::new(None);

/// No bytes are at a cache line, too.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Bytes of a mapping that nobody else has. It goes back to the system with the last buffer in it.
#[derive(Debug, Default)]
pub struct Pages(Option<Part>);

#[derive(Debug)]
struct Part {
    map: Arc<MmapRaw>,
    start: usize,
    bytes: usize,
}

impl Pages {
    /// A multiple of 64 bytes.
    pub fn zeroed(bytes: usize) -> Pages {
        assert!(bytes.is_multiple_of(64), "{bytes} bytes are not whole cache lines");
        Pages(match bytes {
            0 => None,
            LARGE.. => Some(Part { map: Arc::new(mapped(bytes)), start: 0, bytes }),
            _ => Some(part_of_slab(bytes)),
        })
    }

    pub fn bytes(&self) -> &[u8] {
        let Some(Part { map, start, bytes }) = &self.0 else { return bytemuck::cast_slice::<Line, u8>(&[]) };
        // SAFETY: the part lies within its mapping, which it keeps alive, and is this buffer's alone; the system has filled it with zeros.
        unsafe { std::slice::from_raw_parts(map.as_ptr().add(*start), *bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let Some(Part { map, start, bytes }) = &self.0 else { return bytemuck::cast_slice_mut::<Line, u8>(&mut []) };
        // SAFETY: likewise; and whoever has this buffer mutably is the only one who sees the part.
        unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().add(*start), *bytes) }
    }
}

fn part_of_slab(bytes: usize) -> Part {
    let mut slab = SLAB_IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
    let (map, given) = slab.take().filter(|(_, given)| given + bytes <= SLAB).unwrap_or_else(|| (Arc::new(mapped(SLAB)), 0));
    *slab = Some((map.clone(), given + bytes));
    Part { map, start: given, bytes }
}

fn mapped(bytes: usize) -> MmapRaw {
    // Where there is no memory left, an allocation ends the process, too.
    let map =
        MmapOptions::new().len(bytes).map_anon().unwrap_or_else(|why| panic!("the system gives no {bytes} more bytes of memory: {why}"));
    // Advice: a system without huge pages goes on with small ones.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    map.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_and_aligned() {
        for bytes in [0, 64, LARGE - 64, LARGE, LARGE + 192] {
            let mut pages = Pages::zeroed(bytes);
            assert_eq!(pages.bytes_mut().len(), bytes);
            assert!(pages.bytes().iter().all(|&byte| byte == 0));
            assert!((pages.bytes().as_ptr() as usize).is_multiple_of(64) && (pages.bytes_mut().as_ptr() as usize).is_multiple_of(64));
        }
    }

    #[test]
    fn buffers_are_apart() {
        let sizes = [64, 4096, LARGE - 64, 64 * 1001, LARGE - 64, LARGE - 64, LARGE, 128];
        let mut all: Vec<Pages> = sizes.map(Pages::zeroed).into();
        for (mark, pages) in all.iter_mut().enumerate() {
            pages.bytes_mut().fill(mark as u8 + 1);
        }
        all.remove(2);
        for (mark, pages) in [0, 1, 3, 4, 5, 6, 7].into_iter().zip(&all) {
            assert!(pages.bytes().len() == sizes[mark] && pages.bytes().iter().all(|&byte| byte == mark as u8 + 1), "{mark}");
        }
        assert!(Pages::zeroed(LARGE - 64).bytes().iter().all(|&byte| byte == 0), "what was given back is not given out again");
    }
}
