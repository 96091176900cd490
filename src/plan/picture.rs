//! Pictures of a proved schedule, a row for each pipeline rank, time from left to right: letters for a terminal, SVG for a page.
//!
//! `F` is a forward pass, `B` a backward pass, or split: `I` the gradient of the input, `W` that of the weights.
//!
//! Invariant: a picture shows the proof's spans where they are; what is too narrow to be drawn loses its label first, then itself.

use std::fmt::Write;

use super::schedule::{Action, Slot};
use super::simulate::{Proof, Span};

/// Rows of at most `width` columns (no fewer than 40), each line ended. A busy column that shows no label is `-`, an idle one blank.
///
/// Labels are letter and micro-batch; with several chunks `F1.3` is chunk 1, micro-batch 3, shortened to `f3` (lower case: odd chunks).
pub fn text(proof: &Proof, width: usize) -> String {
    let chunks = chunks(proof);
    let name = format!("rank {}", proof.timeline.len() - 1).len();
    let tail = |rank: usize| format!("  idle {:>3.0} %  live {}", 100.0 * proof.bubble_by_rank[rank], proof.live_peak[rank]);
    let tail_width = (0..proof.timeline.len()).map(|rank| tail(rank).len()).max().unwrap_or(0);
    let columns = width.max(40).saturating_sub(name + 2 + tail_width).max(1);
    let shortest = spans(proof).map(|span| span.end - span.start).filter(|&seconds| seconds > 0.0).fold(f64::INFINITY, f64::min);
    let fitting = if proof.seconds_total > 0.0 { columns as f64 / proof.seconds_total } else { 0.0 };
    // Whole columns for the shortest span, where it has one: equal spans then look equal.
    let scale = if shortest * fitting >= 1.0 && shortest.is_finite() { (shortest * fitting).floor() / shortest } else { fitting };
    let columns = columns.min((proof.seconds_total * scale).ceil() as usize);
    let cell = |span: &Span| ((span.start * scale).round() as usize, ((span.end * scale).round() as usize).min(columns));
    let roomy = spans(proof).all(|span| full_label(&span.action, chunks).len() <= cell(span).1.saturating_sub(cell(span).0));

    let mut picture = format!("{} s, bubble {:.1} %\n", number(proof.seconds_total), 100.0 * proof.bubble_fraction);
    for (rank, list) in proof.timeline.iter().enumerate() {
        let mut row = vec![' '; columns];
        for span in list {
            let (start, end) = cell(span);
            let Some(cells) = row.get_mut(start..end) else { continue };
            let label = if roomy { full_label(&span.action, chunks) } else { short_label(&span.action, cells.len()) };
            cells.fill('-');
            cells.iter_mut().zip(label.chars()).for_each(|(column, letter)| *column = letter);
        }
        let row: String = row.into_iter().collect();
        let _ = writeln!(picture, "{:<name$}  {row}{}", format!("rank {rank}"), tail(rank));
    }
    picture
}

const LEFT: f64 = 70.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 74.0;
const ROW: f64 = 28.0;
const GAP: f64 = 5.0;

/// A whole SVG file. `title` is put before the bubble fraction in the heading.
pub fn svg(proof: &Proof, title: &str) -> String {
    let chunks = chunks(proof);
    let mut lengths: Vec<f64> = spans(proof).map(|span| span.end - span.start).collect();
    lengths.sort_by(f64::total_cmp);
    let typical = lengths.get(lengths.len() / 2).copied().unwrap_or(0.0);
    // Half of the boxes are at least 20 wide, so that their numbers can be read, unless the whole would be wider than 8000.
    let total = if proof.seconds_total > 0.0 { proof.seconds_total } else { 1.0 };
    let chart = if typical > 0.0 { (20.0 * total / typical).clamp(800.0, 8000.0) } else { 800.0 };
    let scale = chart / total;
    let bottom = TOP + proof.timeline.len() as f64 * (ROW + GAP);
    let (width, height) = (LEFT + chart + RIGHT, bottom + 36.0);

    let mut page = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"26\" font-size=\"17\" font-weight=\"bold\">{}: bubble {:.1} %, {} s</text>\n",
        escaped(title),
        100.0 * proof.bubble_fraction,
        number(proof.seconds_total)
    );
    legend(&mut page, proof, chunks);
    axis(&mut page, total, scale, bottom);
    for (rank, list) in proof.timeline.iter().enumerate() {
        let y = TOP + rank as f64 * (ROW + GAP);
        let middle = y + ROW / 2.0 + 4.0;
        let _ = writeln!(page, "<text x=\"{:.0}\" y=\"{middle}\" text-anchor=\"end\">rank {rank}</text>", LEFT - 8.0);
        let _ = writeln!(page, "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{chart:.2}\" height=\"{ROW}\" fill=\"#eeeeee\"/>");
        for span in list.iter().filter(|span| span.end > span.start) {
            span_box(&mut page, span, y, scale, chunks);
        }
        let (idle, live) = (100.0 * proof.bubble_by_rank[rank], proof.live_peak[rank]);
        let _ = writeln!(page, "<text x=\"{:.2}\" y=\"{middle}\">idle {idle:.0} %, live {live}</text>", LEFT + chart + 8.0);
    }
    page.push_str("</svg>\n");
    page
}

fn span_box(page: &mut String, span: &Span, y: f64, scale: f64, chunks: usize) {
    let (x, width) = (LEFT + span.start * scale, (span.end - span.start) * scale);
    let (fill, ink) = colours(&span.action, chunks);
    let _ = writeln!(
        page,
        "<rect x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"{ROW}\" fill=\"{fill}\" stroke=\"#ffffff\" stroke-width=\"0.8\">\
         <title>{} from {} to {} s</title></rect>",
        span.action,
        number(span.start),
        number(span.end)
    );
    let label = span.action.slot().micro.to_string();
    if width >= 7.0 * label.len() as f64 + 3.0 {
        let (x, y) = (x + width / 2.0, y + ROW / 2.0 + 4.0);
        let _ = writeln!(page, "<text x=\"{x:.2}\" y=\"{y}\" text-anchor=\"middle\" fill=\"{ink}\" pointer-events=\"none\">{label}</text>");
    }
}

/// A sample of every pass and chunk that the picture has.
fn legend(page: &mut String, proof: &Proof, chunks: usize) {
    let mut x = LEFT;
    for (letter, name) in [('F', "forward"), ('B', "backward"), ('I', "gradient of input"), ('W', "gradient of weights")] {
        if !spans(proof).any(|span| letter_of(&span.action) == letter) {
            continue;
        }
        for chunk in 0..chunks {
            let slot = Slot { chunk, micro: 0 };
            let sample = match letter {
                'F' => Action::Forward(slot),
                'B' => Action::Backward { slot, reduce: false },
                'I' => Action::BackwardInput(slot),
                _ => Action::BackwardWeight { slot, reduce: false },
            };
            let (fill, ink) = colours(&sample, chunks);
            let number = if chunks > 1 { chunk.to_string() } else { String::new() };
            let _ = writeln!(
                page,
                "<rect x=\"{x}\" y=\"42\" width=\"18\" height=\"16\" fill=\"{fill}\"/>\
                 <text x=\"{}\" y=\"54\" text-anchor=\"middle\" fill=\"{ink}\">{number}</text>",
                x + 9.0
            );
            x += 20.0;
        }
        let name = if chunks > 1 { format!("{name}, chunk") } else { name.to_string() };
        let _ = writeln!(page, "<text x=\"{}\" y=\"54\">{name}</text>", x + 4.0);
        x += 24.0 + 6.6 * name.len() as f64;
    }
}

/// Ticks at round numbers of seconds, about every 100 units of width.
fn axis(page: &mut String, total: f64, scale: f64, bottom: f64) {
    let wanted = 100.0 / scale;
    let power = 10f64.powf(wanted.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|digit| digit * power).find(|&step| step >= wanted).unwrap_or(10.0 * power);
    for tick in 0..=(total / step + 1e-9) as usize {
        let x = LEFT + tick as f64 * step * scale;
        let _ = writeln!(
            page,
            "<line x1=\"{x:.2}\" y1=\"{bottom}\" x2=\"{x:.2}\" y2=\"{}\" stroke=\"#666666\"/>\
             <text x=\"{x:.2}\" y=\"{}\" text-anchor=\"middle\" fill=\"#444444\">{} s</text>",
            bottom + 5.0,
            bottom + 20.0,
            number(tick as f64 * step)
        );
    }
}

/// Fill and ink: a hue for each pass, paler from chunk to chunk.
fn colours(action: &Action, chunks: usize) -> (String, &'static str) {
    let hue: [f64; 3] = match action {
        Action::Forward(_) => [38.0, 84.0, 160.0],
        Action::Backward { .. } => [30.0, 120.0, 62.0],
        Action::BackwardInput(_) => [16.0, 124.0, 134.0],
        _ => [196.0, 92.0, 16.0],
    };
    let paler = 0.57 * action.slot().chunk as f64 / (chunks.max(2) - 1) as f64;
    let [red, green, blue] = hue.map(|part| (part + (255.0 - part) * paler).round() as u8);
    (format!("#{red:02x}{green:02x}{blue:02x}"), if paler < 0.35 { "#ffffff" } else { "#111111" })
}

fn spans(proof: &Proof) -> impl Iterator<Item = &Span> {
    proof.timeline.iter().flatten()
}

fn chunks(proof: &Proof) -> usize {
    1 + spans(proof).map(|span| span.action.slot().chunk).max().unwrap_or(0)
}

fn letter_of(action: &Action) -> char {
    match action {
        Action::Forward(_) => 'F',
        Action::Backward { .. } => 'B',
        Action::BackwardInput(_) => 'I',
        Action::BackwardWeight { .. } => 'W',
        Action::Receive(..) | Action::Send(..) | Action::Hand { .. } => '-',
    }
}

fn full_label(action: &Action, chunks: usize) -> String {
    if chunks > 1 { action.to_string() } else { format!("{}{}", letter_of(action), action.slot().micro) }
}

/// Letter and micro-batch where both fit, else the letter.
fn short_label(action: &Action, columns: usize) -> String {
    let Slot { chunk, micro } = action.slot();
    let letter = letter_of(action);
    let letter = if chunk % 2 == 1 { letter.to_ascii_lowercase() } else { letter };
    let label = format!("{letter}{micro}");
    if label.len() <= columns { label } else { letter.to_string() }
}

/// Four digits behind the point at most, none that say nothing.
fn number(seconds: f64) -> String {
    let digits = format!("{seconds:.4}");
    digits.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::schedule::by_name;
    use crate::plan::schedule::passes::Reductions;
    use crate::plan::simulate::{Costs, Links, simulate};

    fn proof(name: &str, ranks: usize, micros: usize, chunks: usize) -> Proof {
        let schedule = by_name(name, ranks, micros, chunks).expect("the schedule exists").complete(Reductions::Last);
        simulate(&schedule, &Costs::equal(ranks * chunks, 1.0, 1.0, 1.0), Links::Unbounded).expect("the schedule is valid")
    }

    #[test]
    fn text_of_a_small_schedule() {
        let expected = "\
12 s, bubble 25.0 %
rank 0  F0-F1-      B0----F2-B1----   B2----  idle  25 %  live 2
rank 1     F0-B0----F1-B1----F2-B2----        idle  25 %  live 1
";
        assert_eq!(text(&proof("1f1b", 2, 3, 1), 70), expected);
    }

    #[test]
    fn text_keeps_to_its_width_whatever_it_shows() {
        for (name, ranks, micros, chunks) in [("zbv", 4, 9, 2), ("interleaved", 12, 40, 4), ("1f1b", 1, 1, 1), ("gpipe", 3, 200, 1)] {
            for width in [40, 80, 133, 400] {
                let picture = text(&proof(name, ranks, micros, chunks), width);
                assert_eq!(picture.lines().count(), ranks + 1);
                assert!(picture.lines().all(|line| line.chars().count() <= width), "{name} in {width}:\n{picture}");
            }
        }
        assert!(text(&proof("zbv", 2, 2, 2), 400).contains("F1.0"));
        assert!(text(&proof("zbv", 2, 2, 2), 80).contains("f0"));
    }

    #[test]
    fn svg_draws_every_span_once() {
        let proof = proof("zbv", 3, 5, 2);
        let page = svg(&proof, "a < b & c");
        assert!(page.starts_with("<svg") && page.ends_with("</svg>\n") && page.contains("a &lt; b &amp; c: bubble"));
        assert_eq!(page.matches("<title>").count(), proof.timeline.iter().map(Vec::len).sum::<usize>());
        assert!(page.contains("<title>W1.4 from"));
    }

    #[test]
    fn free_work_is_no_reason_to_panic() {
        let schedule = by_name("1f1b", 2, 2, 1).expect("the schedule exists").complete(Reductions::Last);
        let proof = simulate(&schedule, &Costs::equal(2, 0.0, 0.0, 0.0), Links::Unbounded).expect("the schedule is valid");
        assert!(text(&proof, 80).starts_with("0 s, bubble 0.0 %"));
        assert!(!svg(&proof, "free").contains("NaN"));
    }
}
