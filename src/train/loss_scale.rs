//! loss_scale
