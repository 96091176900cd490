//! How ranks ended, which of them is to blame, and what the launcher's exit code is.
//!
//! Invariant: a rank that ended because others had failed, or because it was asked to, is never called the cause.

use crate::launch::requests;
use serde_json::Value;
use signal_hook::consts::SIGKILL;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// Bad configuration or arguments: nothing was done, and trying again changes nothing.
pub const BAD_ARGUMENTS: i32 = 2;
/// Stopped on request with a checkpoint saved, to be queued again.
pub const STOPPED: i32 = 98;
/// Failed, and trying again is of no use.
pub const GIVEN_UP: i32 = 99;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    Code(i32),
    Signal(i32),
}

impl How {
    pub fn of(status: ExitStatus) -> How {
        match (status.code(), status.signal()) {
            (Some(code), _) => How::Code(code),
            (None, Some(signal)) => How::Signal(signal),
            (None, None) => unreachable!("{status:?} is neither an exit nor a death, and only those are waited for"),
        }
    }

    /// As shells tell it.
    pub fn code(self) -> i32 {
        match self {
            How::Code(code) => code,
            How::Signal(signal) => 128 + signal,
        }
    }

    fn failed(self) -> bool {
        !matches!(self, How::Code(0 | STOPPED))
    }
}

/// One rank's end.
#[derive(Clone, Debug)]
pub struct Ending {
    pub rank: usize,
    pub pid: u32,
    pub how: How,
    /// The signals that the launcher had sent to it.
    pub sent: Vec<i32>,
    /// Since the start of the attempt.
    pub after: Duration,
    /// When it failed, in seconds since 1970: by its own report if it wrote one.
    pub second: u64,
    /// Why, in its own words.
    pub message: Option<String>,
    pub last_lines: Vec<String>,
    pub folder: Option<PathBuf>,
}

impl Ending {
    /// Whether a signal sent explains the end.
    fn obeyed(&self) -> bool {
        matches!(self.how, How::Signal(signal) if self.sent.contains(&signal))
    }

    fn describe(&self) -> String {
        match self.how {
            How::Code(0) => "done".to_owned(),
            How::Code(STOPPED) => format!("stopped on request, with a checkpoint (exit code {STOPPED})"),
            How::Code(code) => format!("exit code {code}"),
            How::Signal(SIGKILL) if self.obeyed() => "did not stop when asked to and was killed".to_owned(),
            How::Signal(SIGKILL) => "killed by SIGKILL, not by the launcher (out of memory? see dmesg)".to_owned(),
            How::Signal(signal) if self.obeyed() => format!("ended by {} from the launcher", requests::name(signal)),
            How::Signal(signal) => format!("killed by {}", requests::name(signal)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub code: i32,
    /// The failure that brought about the others, as an index of the endings.
    pub cause: Option<usize>,
}

impl Outcome {
    pub fn is_worth_a_restart(self) -> bool {
        self.cause.is_some() && ![BAD_ARGUMENTS, GIVEN_UP].contains(&self.code)
    }
}

/// `endings`: of all ranks, in the order in which they ended. `requested`: the last signal from outside, if there was any.
pub fn judge(endings: &[Ending], requested: Option<i32>) -> Outcome {
    let first = |by_itself: fn(&Ending) -> bool| {
        let failures = endings.iter().enumerate().filter(|(_, ending)| ending.how.failed() && !ending.obeyed() && by_itself(ending));
        failures.min_by_key(|(order, ending)| (ending.second, *order)).map(|(order, _)| order)
    };
    // Who failed before anybody was told to stop comes before who failed at stopping.
    let cause = first(|ending| ending.sent.is_empty()).or_else(|| first(|_| true));
    let any = |test: fn(&Ending) -> bool| endings.iter().any(test);
    let code = match (cause, requested) {
        (Some(cause), _) => endings[cause].how.code(),
        (None, Some(signal)) if any(|ending| ending.how.failed()) => 128 + signal,
        (None, _) if any(|ending| ending.how == How::Code(STOPPED)) => STOPPED,
        (None, _) => 0,
    };
    Outcome { code, cause }
}

/// What to tell the user, or nothing when all went well.
pub fn report(endings: &[Ending], outcome: Outcome) -> Option<String> {
    let stopped = endings.iter().filter(|ending| ending.how == How::Code(STOPPED)).count();
    let failed = endings.iter().any(|ending| ending.how.failed());
    if !failed && (stopped == 0 || stopped == endings.len()) {
        return None;
    }
    let mut lines = Vec::new();
    if let Some(cause) = outcome.cause.map(|index| &endings[index]) {
        lines.push(format!(
            "rank {} failed first: {}, {:.1} s after the start (pid {})",
            cause.rank,
            cause.describe(),
            cause.after.as_secs_f64(),
            cause.pid
        ));
        lines.extend(cause.message.iter().map(|message| format!("  it reported: {}", message.trim().replace('\n', "\n  "))));
        lines.extend(cause.last_lines.iter().map(|line| format!("  its stderr ended: {line}")));
        lines.extend(cause.folder.iter().map(|folder| format!("  its files: {}", folder.display())));
    }
    if !failed {
        lines.push("some ranks finished and others stopped on request: they do not agree on where the run ends".to_owned());
    }
    let mut alike: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, ending) in endings.iter().enumerate() {
        if outcome.cause != Some(index) {
            alike.entry(ending.describe()).or_default().push(ending.rank);
        }
    }
    lines.extend(alike.into_iter().map(|(end, ranks)| format!("{}: {end}", name_ranks(ranks))));
    Some(lines.join("\n"))
}

/// `rank 3`, `ranks 0, 2-7`.
fn name_ranks(mut ranks: Vec<usize>) -> String {
    ranks.sort_unstable();
    let runs: Vec<String> = ranks
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match run {
            [one] => one.to_string(),
            [one, two] => format!("{one}, {two}"),
            [first, .., last] => format!("{first}-{last}"),
            [] => unreachable!("chunk_by gives no empty chunk"),
        })
        .collect();
    format!("{} {}", if ranks.len() == 1 { "rank" } else { "ranks" }, runs.join(", "))
}

/// What a rank wrote into its `TORCHELASTIC_ERROR_FILE`: why it failed, and when in seconds since 1970 if it says so.
pub fn read_error_file(path: &Path) -> Option<(String, Option<u64>)> {
    // A rank that was killed leaves no file, and half a file says nothing that could be trusted.
    parse_error(&fs::read(path).ok()?)
}

/// torch writes the first form, and reads both: `{"message": {"message": .., "extraInfo": {"timestamp": ".."}}}` and
/// `{"message": .., "timestamp": ..}`.
fn parse_error(file: &[u8]) -> Option<(String, Option<u64>)> {
    let file: Value = serde_json::from_slice(file).ok()?;
    let message = &file["message"];
    let text = message.as_str().or_else(|| message["message"].as_str())?;
    let time = [&message["extraInfo"]["timestamp"], &file["timestamp"]].into_iter().find(|time| !time.is_null());
    let seconds = time.and_then(|time| time.as_f64().or_else(|| time.as_str()?.trim().parse().ok()));
    Some((text.to_owned(), seconds.map(|seconds: f64| seconds as u64)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::consts::{SIGINT, SIGSEGV, SIGTERM};

    fn ending(rank: usize, how: How, sent: Option<i32>) -> Ending {
        let sent = sent.into_iter().collect();
        let (after, message, last_lines, folder) = (Duration::from_secs(1), None, Vec::new(), None);
        Ending { rank, pid: 1, how, sent, after, second: 100, message, last_lines, folder }
    }

    #[test]
    fn the_first_failure_is_the_cause_and_gives_the_code() {
        let endings = [
            ending(0, How::Code(0), None),
            ending(3, How::Signal(SIGSEGV), None),
            ending(1, How::Code(1), None),
            ending(2, How::Signal(SIGTERM), Some(SIGTERM)),
        ];
        assert_eq!(judge(&endings, None), Outcome { code: 139, cause: Some(1) });
        let text = report(&endings, judge(&endings, None)).expect("a failure is told");
        assert!(text.starts_with("rank 3 failed first: killed by SIGSEGV, 1.0 s after"), "{text}");
        assert!(text.contains("rank 2: ended by SIGTERM from the launcher") && text.contains("rank 0: done"), "{text}");
    }

    #[test]
    fn a_rank_that_reports_an_earlier_failure_is_the_cause() {
        let mut endings = [ending(0, How::Code(1), None), ending(1, How::Code(7), None)];
        endings[1].second = 99;
        assert_eq!(judge(&endings, None), Outcome { code: 7, cause: Some(1) });
    }

    #[test]
    fn requests_are_answered_by_the_ranks() {
        let codes = |hows: &[How], sent: i32| {
            let endings: Vec<_> = hows.iter().enumerate().map(|(rank, how)| ending(rank, *how, Some(sent))).collect();
            judge(&endings, Some(SIGTERM)).code
        };
        assert_eq!(codes(&[How::Code(98), How::Code(98)], SIGTERM), 98);
        assert_eq!(codes(&[How::Code(0), How::Code(98)], SIGTERM), 98);
        assert_eq!(codes(&[How::Code(0), How::Code(0)], SIGTERM), 0);
        assert_eq!(codes(&[How::Code(98), How::Signal(SIGTERM)], SIGTERM), 143);
        assert_eq!(codes(&[How::Code(98), How::Signal(SIGKILL)], SIGKILL), 143);
        assert_eq!(codes(&[How::Code(98), How::Code(1)], SIGTERM), 1);
        let interrupted = [ending(0, How::Signal(SIGKILL), Some(SIGKILL))];
        assert_eq!(judge(&interrupted, Some(SIGINT)).code, 130);
    }

    #[test]
    fn what_a_restart_cannot_mend_is_not_restarted() {
        let worth = |code: i32| judge(&[ending(0, How::Code(code), None)], None).is_worth_a_restart();
        assert!(worth(1) && worth(7));
        assert!(!worth(0) && !worth(STOPPED) && !worth(BAD_ARGUMENTS) && !worth(GIVEN_UP));
    }

    #[test]
    fn ranks_that_disagree_are_told() {
        let mixed = [ending(0, How::Code(0), None), ending(1, How::Code(98), None)];
        assert!(report(&mixed, judge(&mixed, None)).is_some_and(|text| text.contains("do not agree")));
        let agreed = [ending(0, How::Code(98), None), ending(1, How::Code(98), None)];
        assert_eq!(report(&agreed, judge(&agreed, None)), None);
    }

    #[test]
    fn error_files_have_two_forms() {
        let long = br#"{"message": {"message": "bad loss", "extraInfo": {"py_callstack": "", "timestamp": "1795158345"}}}"#;
        assert_eq!(parse_error(long), Some(("bad loss".to_owned(), Some(1795158345))));
        assert_eq!(parse_error(br#"{"message": "bad", "timestamp": 12.7}"#), Some(("bad".to_owned(), Some(12))));
        assert_eq!(parse_error(br#"{"message": "bad"}"#), Some(("bad".to_owned(), None)));
        assert_eq!(parse_error(br#"{"message": {"mess"#), None);
    }

    #[test]
    fn ranks_are_named_in_runs() {
        assert_eq!(name_ranks(vec![3]), "rank 3");
        assert_eq!(name_ranks(vec![7, 0, 2, 3, 4, 6]), "ranks 0, 2-4, 6, 7");
    }
}
