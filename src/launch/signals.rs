//! Requests to stop: SIGTERM, SIGUSR1 (Slurm's warning before a limit) and the first Ctrl-C set a flag, a second Ctrl-C exits at once.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code of a process that Ctrl-C ended: 128 + SIGINT.
const INTERRUPTED: i32 = 130;

#[derive(Clone, Debug, Default)]
pub struct StopRequest(Arc<AtomicBool>);

impl StopRequest {
    /// From now on these signals set the flag instead of ending the process.
    pub fn listen() -> Result<StopRequest> {
        let request = StopRequest::default();
        let again = Arc::new(AtomicBool::new(false));
        // The order matters: the conditional exit looks at the flag before the next line's handler sets it.
        flag::register_conditional_shutdown(SIGINT, INTERRUPTED, again.clone()).context("installing the handler of Ctrl-C")?;
        flag::register(SIGINT, again).context("installing the handler of Ctrl-C")?;
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            flag::register(signal, request.0.clone()).with_context(|| format!("installing the handler of signal {signal}"))?;
        }
        Ok(request)
    }

    pub fn made(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
