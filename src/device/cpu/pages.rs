//! Memory of the host, in pages as large as the system gives.
//!
//! Invariant: zero at first, and every buffer starts at a cache line.

use memmap2::MmapMut;

/// From here on a buffer is a mapping of its own, for which huge pages are asked: below, most of one would be wasted.
const LARGE: usize = 4 << 20;

/// One cache line.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; 64]);

#[derive(Debug)]
pub struct Pages(Kind);

#[derive(Debug)]
enum Kind {
    Small(Vec<Line>),
    Large(MmapMut),
}

/// No bytes.
impl Default for Pages {
    fn default() -> Pages {
        Pages(Kind::Small(Vec::new()))
    }
}

impl Pages {
    /// A multiple of 64 bytes.
    pub fn zeroed(bytes: usize) -> Pages {
        assert!(bytes.is_multiple_of(64), "{bytes} bytes are not whole cache lines");
        if bytes < LARGE {
            return Pages(Kind::Small(vec![Line([0; 64]); bytes / 64]));
        }
        // Where there is no memory left, an allocation ends the process, too.
        let map = MmapMut::map_anon(bytes).unwrap_or_else(|why| panic!("the system gives no {bytes} more bytes of memory: {why}"));
        // Advice: a system without huge pages goes on with small ones.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Pages(Kind::Large(map))
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Kind::Small(lines) => bytemuck::cast_slice(lines),
            Kind::Large(map) => map,
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Kind::Small(lines) => bytemuck::cast_slice_mut(lines),
            Kind::Large(map) => map,
        }
    }
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
            assert_eq!(bytemuck::cast_slice::<u8, Line>(pages.bytes()).len(), bytes / 64);
        }
    }
}
