//! Schedules as text, so that users can write their own and read ours.
//!
//! ```text
//! # 1F1B for two ranks and three micro-batches
//! route loop
//! F0.0 F0.1 B0.0 F0.2 B0.1 B0.2
//! F0.0 B0.0 F0.1 B0.1 F0.2 B0.2
//! ```
//!
//! One line for each rank, from the first; a word is a letter, then `chunk.micro`, both counted from 0. `F` forward, `B` backward, or
//! split: `I` gradient of the input, `W` gradient of the weights. `#` starts a comment, blank lines do not count. The line
//! `route loop` (the default) or `route vee`, before the lists, says how stages run through the ranks, see [`Route`].
//! Transfers and reductions are not written: passes add them. The numbers of ranks, chunks and micro-batches follow from the lists.
//!
//! Invariant: `from_text(to_text(s)) == s` for every schedule of compute actions.

use anyhow::{Context, Result, bail, ensure};

use super::{Action, Placement, Route, Schedule, Slot};

/// Reads a schedule. Whether it can run is for the simulator to say.
pub fn from_text(text: &str) -> Result<Schedule> {
    let mut route = None;
    let mut actions: Vec<Vec<Action>> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line_number = index + 1;
        let words: Vec<&str> = line.split('#').next().unwrap_or_default().split_whitespace().collect();
        match words[..] {
            [] => {}
            ["route", ref rest @ ..] => {
                ensure!(actions.is_empty() && route.is_none(), "line {line_number}: `route` stands once, before the lists");
                route = Some(match rest {
                    ["loop"] => Route::Loop,
                    ["vee"] => Route::Vee,
                    _ => bail!("line {line_number}: `{}`: expected `route loop` or `route vee`", words.join(" ")),
                });
            }
            _ => {
                let read = |(place, word): (usize, &&str)| action(word).with_context(|| format!("line {line_number}, word {}", place + 1));
                actions.push(words.iter().enumerate().map(read).collect::<Result<_>>()?);
            }
        }
    }
    ensure!(!actions.is_empty(), "the schedule has no list: expected a line such as `F0.0 B0.0` for each rank");
    let slots = || actions.iter().flatten().map(Action::slot);
    let chunks = 1 + slots().map(|slot| slot.chunk).max().unwrap_or(0);
    let micros = 1 + slots().map(|slot| slot.micro).max().unwrap_or(0);
    let placement = Placement { ranks: actions.len(), chunks, route: route.unwrap_or(Route::Loop) };
    let named = placement.stages().saturating_mul(micros);
    let written: usize = actions.iter().map(Vec::len).sum();
    ensure!(
        written >= 2 * named,
        "{} ranks, {chunks} chunks and {micros} micro-batches need at least {} actions, the lists have {written}",
        placement.ranks,
        2 * named
    );
    Ok(Schedule { placement, micros, actions })
}

/// Writes the compute actions; transfers and reductions are left out.
pub fn to_text(schedule: &Schedule) -> String {
    let route = if schedule.placement.route == Route::Loop { "loop" } else { "vee" };
    let computes = |action: &&Action| !matches!(action, Action::Receive(..) | Action::Send(..) | Action::Hand { .. });
    let line = |list: &Vec<Action>| list.iter().filter(computes).map(Action::to_string).collect::<Vec<_>>().join(" ");
    let lines: Vec<String> = schedule.actions.iter().map(line).collect();
    format!("route {route}\n{}\n", lines.join("\n"))
}

fn action(word: &str) -> Result<Action> {
    let expected = || format!("`{word}`: expected F, B, I or W, then chunk.micro, such as F0.3");
    let mut letters = word.chars();
    let letter = letters.next().with_context(expected)?;
    let (chunk, micro) = letters.as_str().split_once('.').with_context(expected)?;
    let number = |digits: &str| digits.parse::<u32>().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit())).with_context(expected);
    let slot = Slot { chunk: number(chunk)? as usize, micro: number(micro)? as usize };
    Ok(match letter {
        'F' => Action::Forward(slot),
        'B' => Action::Backward { slot, reduce: false },
        'I' => Action::BackwardInput(slot),
        'W' => Action::BackwardWeight { slot, reduce: false },
        _ => bail!(expected()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_word_is_named_with_its_place() {
        let cases = [
            ("F0.0 B0.0\n# c\nF0.0 X0.0", "line 3, word 2: `X0.0`: expected F, B, I or W"),
            ("F0.0 B0", "line 1, word 2: `B0`: expected"),
            ("F0.+1", "line 1, word 1: `F0.+1`: expected"),
            ("F0.99999999999", "line 1, word 1"),
            ("é0.1", "line 1, word 1: `é0.1`"),
            ("route up", "line 1: `route up`: expected `route loop` or `route vee`"),
            ("F0.0 B0.0\nroute vee", "line 2: `route` stands once"),
            ("# nothing", "no list"),
            ("F0.4000000000", "need at least 8000000002 actions, the lists have 1"),
        ];
        for (text, says) in cases {
            let error = format!("{:#}", from_text(text).expect_err(text));
            assert!(error.contains(says), "{text:?} gave {error:?}, not {says:?}");
        }
    }

    #[test]
    fn comments_and_blank_lines_do_not_count() {
        let schedule = from_text("# two ranks\n\nroute loop # default\nF0.0 B0.0 # first\n\nF0.0 I0.0 W0.0\n").expect("it is well written");
        assert_eq!((schedule.placement.ranks, schedule.placement.chunks, schedule.micros), (2, 1, 1));
        assert_eq!(to_text(&schedule), "route loop\nF0.0 B0.0\nF0.0 I0.0 W0.0\n");
    }
}
