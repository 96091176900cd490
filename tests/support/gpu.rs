//! A real GPU for tests, where the variable FERROTRON_GPU asks for one: `1` beside the emulator, `only` in its place.
//!
//! Invariant: a test that is asked to use a GPU uses one or fails; it never passes without.

use ferrotron::device::Device;
use ferrotron::device::gpu::cuda::context::Context;
use ferrotron::device::gpu::cuda::libraries::Search;
use ferrotron::launch::identity::{self, CudaPlaces};

/// What a device takes of the GPU at first; it takes more when it has need of it.
const BYTES: usize = 256 << 20;

/// The GPU of one of `world` ranks, which share those that there are.
pub fn open(rank: usize, world: usize) -> Device {
    let search = Search::new(&CudaPlaces::detect(&identity::environment()));
    let opened = Context::find(&search, rank, world).and_then(|context| {
        let help = "these tests take little: see who else computes there".to_string();
        // Where there is no library, what is tested are the program's own products.
        let library = context.products(&search).ok();
        Device::cuda(context, library, BYTES, help)
    });
    opened.unwrap_or_else(|error| panic!("FERROTRON_GPU asks for a GPU, but {error:#}"))
}
