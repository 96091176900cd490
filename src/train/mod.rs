//! One training run.

pub mod corpora;
pub mod evaluate;
pub mod fit;
pub mod forecast;
pub mod generate;
pub mod hardware;
pub mod learning_rate;
pub mod loss_scale;
pub mod promise;
pub mod rehearsal;
pub mod report;
pub mod resume;
pub mod run;
pub mod step;
pub mod team;
