//! train

pub mod evaluate;
pub mod learning_rate;
pub mod loss_scale;
pub mod rehearsal;
pub mod report;
pub mod run;
pub mod step;
