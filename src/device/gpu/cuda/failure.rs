//! What the driver refuses, as a sentence: the call, CUDA's own words, and what helps.
//!
//! Invariant: a code that nobody has heard of yet is told by its number; no code panics.

use super::table::Texts;
use anyhow::{Error, anyhow};
use std::fmt;

/// A call that returned something other than success.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub call: &'static str,
    pub code: u32,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed with code {}", self.call, self.code)
    }
}

impl std::error::Error for Refusal {}

pub fn outcome(call: &'static str, code: u32) -> Result<(), Refusal> {
    if code == 0 { Ok(()) } else { Err(Refusal { call, code }) }
}

/// Memory that cannot be had.
pub const OUT_OF_MEMORY: u32 = 2;
/// No GPU that this process may see.
pub const NO_DEVICE: u32 = 100;

/// What a code of the driver means for a run, and what helps; nothing where CUDA's words say enough.
fn advice(code: u32) -> Option<&'static str> {
    Some(match code {
        34 => "what was found is the stub that programs are linked with, not the driver: take its folder out of LD_LIBRARY_PATH",
        46 => "another process has the GPU for itself (nvidia-smi -c tells and sets the compute mode), or it is being reset",
        NO_DEVICE => "there is no GPU, it fell off the bus (see nvidia-smi and Xid messages in dmesg), or CUDA_VISIBLE_DEVICES hides it",
        101 => "the GPU is gone, as when it falls off the bus (see nvidia-smi and Xid messages in dmesg)",
        209 | 218 | 222 => "a driver of release 570 or newer reads the kernels' PTX",
        221 => "libnvidia-ptxjitcompiler.so.1, a part of the driver that turns PTX into machine code, is not installed",
        214 | 220 | 226 => {
            "the hardware has failed: the node should be drained and its GPU reset; start again from the last checkpoint elsewhere"
        }
        700 | 714..=719 => {
            "work that was queued before it went wrong, which ends all work of this process on the GPU; compute-sanitizer names the kernel, \
             and a GPU with Xid messages in dmesg may be at fault itself"
        }
        702 => "a kernel ran for too long on a GPU that also drives a display",
        802 => "the fabric manager of the node's NVSwitch is not running or not ready",
        803 | 804 => "libcuda and the driver in the kernel are of different releases: reboot, or take cuda/compat out of LD_LIBRARY_PATH",
        805..=810 => "the MPS server of this node has failed or has too many clients",
        999 => "the driver is out of order or the GPU fell off the bus (see nvidia-smi and Xid messages in dmesg)",
        _ => return None,
    })
}

/// One sentence: the call and what it was for, what CUDA says, what helps.
pub fn sentence(refusal: Refusal, what: Option<&str>, texts: Option<&Texts>) -> Error {
    let (name, text) = texts.map_or((None, None), |texts| texts.of(refusal));
    let what = what.map(|what| format!(" ({what})")).unwrap_or_default();
    let code = name.map_or(format!("code {}", refusal.code), |name| format!("{name}, {}", refusal.code));
    let text = text.map(|text| format!("{text}, ")).unwrap_or_default();
    let helps = if matches!(texts, Some(Texts::Products { .. })) { None } else { advice(refusal.code) };
    let helps = helps.map(|helps| format!("; {helps}")).unwrap_or_default();
    anyhow!("{}{what} failed: {text}{code}{helps}", refusal.call)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_names_the_call_its_purpose_the_code_and_what_helps() {
        let refusal = outcome("cuLaunchKernel", 700).expect_err("not a success");
        let text = sentence(refusal, Some("norm_rms_forward_bf16"), None).to_string();
        assert!(text.starts_with("cuLaunchKernel (norm_rms_forward_bf16) failed: code 700; work that was queued before it"), "{text}");
        assert_eq!(sentence(Refusal { call: "cuX", code: 123_456 }, None, None).to_string(), "cuX failed: code 123456");
        assert!((0..2000).all(|code| advice(code).is_none_or(|text| !text.ends_with('.'))));
        assert_eq!(outcome("cuInit", 0), Ok(()));
    }
}
