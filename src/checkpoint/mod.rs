//! Checkpoints: boxes of global tensors under their public names, in ordinary safetensors files with one index.
//!
//! ```text
//! checkpoints/
//!   step-00000100/            a checkpoint: index.json, and {weights,master,exp_avg,exp_avg_sq}-RRRRR-of-WWWWW.safetensors
//!   step-00000200.3-1.tmp/    an attempt of incarnation 3 that is not committed; nobody reads it
//!   latest                    the name of the checkpoint that was committed last, for people and scripts
//!   incarnation  lock         which start of the run may write here
//! ```
//!
//! Invariant: no padding, no layout and no device reaches the disk, so what any layout wrote any other reads; and a folder without
//! the suffix `.tmp` holds a whole checkpoint, from the rename that names it until it is renamed away.

pub mod boxes;
pub mod commit;
pub mod diff;
pub mod export;
pub mod folder;
pub mod import;
pub mod index;
pub mod inspect;
pub mod load;
pub mod safetensors;
pub mod save;
