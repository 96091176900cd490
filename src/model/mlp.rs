//! mlp
