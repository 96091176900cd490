//! Signals to the launcher, which are requests to its ranks: their names, and the thread that hears them.
//!
//! Invariant: a signal that was being ignored stays ignored, so that `nohup` keeps what it promises.

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level::signal_name;
use std::fs;
use std::thread;

/// `SIGTERM` or `TERM`: those that ask a process to do something, not those that say what befell it.
pub fn signal(text: &str) -> Result<i32> {
    let name = text.trim().to_ascii_uppercase();
    Ok(match name.strip_prefix("SIG").unwrap_or(&name) {
        "TERM" => SIGTERM,
        "INT" => SIGINT,
        "HUP" => SIGHUP,
        "QUIT" => SIGQUIT,
        "USR1" => SIGUSR1,
        "USR2" => SIGUSR2,
        _ => bail!("expected signals among SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2, with commas between"),
    })
}

/// `SIGSEGV`, or `signal 64` for those without a name.
pub fn name(signal: i32) -> String {
    signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}

/// Whether a signal wants its ranks gone soon. The user's own signals are hints (Slurm sends SIGUSR1 minutes before a limit, and a
/// checkpoint may take those minutes).
pub fn presses(signal: i32) -> bool {
    signal != SIGUSR1 && signal != SIGUSR2
}

/// Calls `hear` with each of these signals from now on, on a thread of its own, until the handle is closed.
pub fn listen(signals: &[i32], hear: impl Fn(i32) + Send + 'static) -> Result<Handle> {
    let ignored = ignored_signals()?;
    let heard = signals.iter().filter(|signal| ignored & (1 << (**signal - 1)) == 0);
    let mut signals = Signals::new(heard).context("installing the launcher's signal handlers")?;
    let handle = signals.handle();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || signals.forever().for_each(hear))
        .context("starting the thread that hears signals")?;
    Ok(handle)
}

/// Bit `n - 1` is set when signal `n` is ignored.
fn ignored_signals() -> Result<u64> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).with_context(|| format!("{path} has no line SigIgn"))?;
    u64::from_str_radix(mask.trim(), 16).with_context(|| format!("{path}: SigIgn is {mask}, not a hexadecimal mask"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_with_and_without_sig() {
        assert_eq!(signal("SIGUSR1").ok(), Some(SIGUSR1));
        assert_eq!(signal(" term").ok(), Some(SIGTERM));
        assert!(signal("SIGKILL").is_err() && signal("").is_err());
        assert_eq!(name(11), "SIGSEGV");
    }
}
