//! Every schedule, exhaustively for small pipelines: valid on links of any size, with the published bubbles and live activations;
//! and the simulator refuses what is broken.

use std::collections::{HashMap, HashSet};

use ferrotron::plan::schedule::passes::Reductions;
use ferrotron::plan::schedule::{Action, NAMES, Pass, Placement, Route, Schedule, Slot, by_name, text};
use ferrotron::plan::simulate::{Costs, Links, Proof, simulate};
use ferrotron::rng::Stream;
use proptest::prelude::{ProptestConfig, prop_assert, proptest};

/// Every schedule with every number of chunks it allows, up to four.
fn variants() -> Vec<(&'static str, usize)> {
    let every = NAMES.iter().flat_map(|&name| (1..=4).map(move |chunks| (name, chunks)));
    every.filter(|&(name, chunks)| by_name(name, 2, 2, chunks).is_ok()).collect()
}

/// Input and weight gradients take a forward pass's time each, chunks together one unit for each pass: what the papers call equal costs.
fn unit_proof(name: &str, ranks: usize, micros: usize, chunks: usize) -> Proof {
    let schedule = by_name(name, ranks, micros, chunks).expect("the schedule exists").complete(Reductions::Last);
    let unit = 1.0 / chunks as f64;
    simulate(&schedule, &Costs::equal(ranks * chunks, unit, unit, unit), Links::Unbounded).expect("the schedule is valid")
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-9
}

#[test]
fn every_schedule_is_valid_on_every_small_pipeline() {
    assert_eq!(variants().len(), 3 + 2 * 3 + 2, "{:?}", variants());
    for (name, chunks) in variants() {
        for (ranks, micros) in (1..=8).flat_map(|ranks| (1..=16).map(move |micros| (ranks, micros))) {
            let schedule = by_name(name, ranks, micros, chunks).expect("the variant is allowed");
            let costs = Costs::equal(ranks * chunks, 1.0, 1.0, 1.0);
            for reductions in [Reductions::Last, Reductions::Every(1), Reductions::Every(3)] {
                let complete = schedule.complete(reductions);
                for links in [Links::Unbounded, Links::Holding(1), Links::Holding(2)] {
                    let proof = simulate(&complete, &costs, links);
                    let proof =
                        proof.unwrap_or_else(|why| panic!("{name}, {ranks} ranks, {micros} micros, {chunks} chunks, {links:?}: {why}"));
                    if let Links::Holding(messages) = links {
                        assert!(proof.link_peak <= messages, "{name}: {} messages in a link of {messages}", proof.link_peak);
                    }
                }
            }
            let compute_only =
                |list: &Vec<Action>| list.iter().all(|a| !matches!(a, Action::Receive(..) | Action::Send(..) | Action::Hand { .. }));
            assert!(schedule.actions.iter().all(compute_only), "{name} writes transfers itself");
            assert_eq!(text::from_text(&text::to_text(&schedule)).expect("what we write we read"), schedule);
        }
    }
}

#[test]
fn bubbles_are_the_published_ones() {
    for (ranks, micros) in (1..=8).flat_map(|ranks| (1..=16).map(move |micros| (ranks, micros))) {
        let (p, m) = (ranks as f64, micros as f64);
        for name in ["gpipe", "1f1b"] {
            let bubble = unit_proof(name, ranks, micros, 1).bubble_fraction;
            assert!(close(bubble, (p - 1.0) / (m + p - 1.0)), "{name}, {ranks} ranks, {micros} micros: bubble {bubble}");
        }
        let zero_bubble = unit_proof("zero_bubble", ranks, micros, 1);
        let one_forward = unit_proof("1f1b", ranks, micros, 1);
        assert!(zero_bubble.seconds_total <= one_forward.seconds_total, "ZB-H1 is slower than 1F1B on {ranks} ranks, {micros} micros");
        if micros >= ranks {
            assert!(close(zero_bubble.seconds_total, 3.0 * m + p - 1.0), "ZB-H1, {ranks}, {micros}: {}", zero_bubble.seconds_total);
            for (name, chunks) in ["interleaved", "breadth_first"].iter().flat_map(|name| (2..=4).map(move |chunks| (name, chunks))) {
                let bubble = unit_proof(name, ranks, micros, chunks).bubble_fraction;
                let v = chunks as f64;
                assert!(close(bubble, (p - 1.0) / (v * m + p - 1.0)), "{name}, {ranks} ranks, {micros} micros, {chunks} chunks: {bubble}");
            }
        }
        // In halves of a unit, since two chunks share the time of one.
        if micros >= 2 * ranks - 1 {
            let halves = 2.0 * unit_proof("zbv", ranks, micros, 2).seconds_total;
            assert!(close(halves, 6.0 * m + p - 1.0), "ZB-V, {ranks} ranks, {micros} micros: {halves} halves");
        }
        if micros >= 2 * ranks {
            let halves = 2.0 * unit_proof("dualpipe_v", ranks, micros, 2).seconds_total;
            assert!(close(halves, 6.0 * m + p - 1.0), "DualPipeV, {ranks} ranks, {micros} micros: {halves} halves");
        }
    }
    assert!(unit_proof("zbv", 8, 256, 2).bubble_fraction < 0.005);
}

/// ZB-V's claim is not only that the sum is small: no rank idles between its first action and its last.
#[test]
fn zbv_ranks_never_idle_once_started() {
    for ranks in 1..=8 {
        for list in unit_proof("zbv", ranks, 2 * ranks + 3, 2).timeline {
            assert!(list.windows(2).all(|pair| close(pair[0].end, pair[1].start)), "{ranks} ranks");
        }
    }
}

#[test]
fn live_activations_are_the_published_ones() {
    for (ranks, micros) in (1..=8).flat_map(|ranks| (1..=16).map(move |micros| (ranks, micros))) {
        let each = |of: &dyn Fn(usize) -> usize| (0..ranks).map(of).collect::<Vec<_>>();
        assert_eq!(unit_proof("gpipe", ranks, micros, 1).live_peak, each(&|_| micros));
        assert_eq!(unit_proof("1f1b", ranks, micros, 1).live_peak, each(&|rank| (ranks - rank).min(micros)));
        assert_eq!(unit_proof("zero_bubble", ranks, micros, 1).live_peak, each(&|_| ranks.min(micros)));
        for chunks in 2..=4 {
            assert_eq!(unit_proof("breadth_first", ranks, micros, chunks).live_peak, each(&|_| micros * chunks));
            let group = if micros < ranks { ranks } else { micros.div_ceil(micros / ranks) };
            for (rank, &peak) in unit_proof("interleaved", ranks, micros, chunks).live_peak.iter().enumerate() {
                let published = (2 * (ranks - 1 - rank) + (chunks - 1) * group + 1).min(micros * chunks);
                assert!(peak == published || (micros < ranks && peak < published), "interleaved: {peak} live, published {published}");
            }
        }
        assert!(unit_proof("zbv", ranks, micros, 2).live_peak.iter().all(|&peak| peak <= 2 * ranks));
        assert!(unit_proof("dualpipe_v", ranks, micros, 2).live_peak.iter().all(|&peak| peak <= 2 * ranks + 1));
    }
}

#[test]
fn a_placement_is_a_bijection_whose_neighbours_are_neighbours() {
    for (ranks, chunks, route) in (1..=5).flat_map(|r| (1..=4).flat_map(move |c| [(r, c, Route::Loop), (r, c, Route::Vee)])) {
        let placement = Placement { ranks, chunks, route };
        for stage in 0..placement.stages() {
            let (rank, chunk) = placement.place(stage);
            assert_eq!(placement.stage(rank, chunk), stage);
            let next = placement.destination(Pass::Forward, rank, chunk);
            assert_eq!(next, (stage + 1 < placement.stages()).then(|| placement.place(stage + 1)));
            assert_eq!(next, placement.source(Pass::Backward, rank, chunk));
            if let (Some((to, at)), Route::Vee) = (next, route) {
                assert!(to.abs_diff(rank) <= 1, "a vee never jumps");
                assert_eq!(placement.destination(Pass::Backward, to, at), Some((rank, chunk)));
            }
        }
    }
}

#[test]
fn transfers_take_time_and_links_carry_one_message_at_a_time() {
    let costs = Costs { transfer: 5.0, ..Costs::equal(2, 1.0, 1.0, 1.0) };
    let proof = |name, micros| {
        let schedule = by_name(name, 2, micros, 1).expect("the schedule exists").complete(Reductions::Last);
        simulate(&schedule, &costs, Links::Unbounded).expect("the schedule is valid")
    };
    assert_eq!(proof("1f1b", 1).seconds_total, 1.0 + 5.0 + 1.0 + 2.0 + 5.0 + 2.0);
    // Three activations leave at 1, 2 and 3 and arrive at 6, 11 and 16; the last forward ends at 17, gradients at 19, 21, 23 leave likewise.
    assert_eq!(proof("gpipe", 3).seconds_total, 19.0 + 3.0 * 5.0 + 2.0);
    assert_eq!(proof("gpipe", 3).link_peak, 3);
}

#[test]
fn large_schedules_complete_and_prove() {
    for (name, chunks) in [("interleaved", 4), ("breadth_first", 4), ("zbv", 2), ("zero_bubble", 1)] {
        let proof = unit_proof(name, 16, 512, chunks);
        assert!(proof.bubble_fraction < 0.03, "{name}: {}", proof.bubble_fraction);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Costs never decide whether a schedule runs, and slower parts never make a faster whole.
    #[test]
    fn random_costs_neither_stop_a_schedule_nor_break_monotony(
        which in 0usize..11, ranks in 1usize..7, micros in 1usize..12, seed: u64, slower in 0usize..4, holding in 0usize..3,
    ) {
        let (name, chunks) = variants()[which];
        let stages = ranks * chunks;
        let stream = Stream::new(seed, "costs");
        let draw = |from: usize| (0..stages).map(|stage| stream.uniform((from + stage) as u64).powi(3)).collect::<Vec<f64>>();
        let transfer = stream.uniform(u64::MAX);
        let costs = Costs { forward: draw(0), backward_input: draw(stages), backward_weight: draw(2 * stages), transfer };
        let links = if holding == 0 { Links::Unbounded } else { Links::Holding(holding) };
        let schedule = by_name(name, ranks, micros, chunks).expect("the variant is allowed").complete(Reductions::Last);
        let proof = simulate(&schedule, &costs, links).expect("costs cannot break a schedule");

        let one_micro: f64 = [&costs.forward, &costs.backward_input].iter().flat_map(|c| c.iter()).sum();
        prop_assert!(proof.seconds_total >= one_micro - 1e-9, "faster than one micro-batch alone");
        prop_assert!(proof.bubble_by_rank.iter().all(|bubble| (0.0..=1.0).contains(bubble)));
        for list in &proof.timeline {
            prop_assert!(list.windows(2).all(|pair| pair[0].end <= pair[1].start), "a rank does two things at once");
        }

        let mut slow = costs.clone();
        let stage = (stream.word(7) % stages as u64) as usize;
        match slower {
            0 => slow.forward[stage] += 1.0,
            1 => slow.backward_input[stage] += 1.0,
            2 => slow.backward_weight[stage] += 1.0,
            _ => slow.transfer += 1.0,
        }
        let slow = simulate(&schedule, &slow, links).expect("costs cannot break a schedule");
        prop_assert!(slow.seconds_total >= proof.seconds_total - 1e-9, "{} < {}", slow.seconds_total, proof.seconds_total);
        let tighter = simulate(&schedule, &costs, Links::Holding(1)).expect("one message is enough");
        prop_assert!(tighter.seconds_total >= proof.seconds_total - 1e-9, "smaller links made it faster");
    }

    /// An action removed, doubled or moved: the simulator accepts what the declared rules accept, and nothing else.
    #[test]
    fn broken_schedules_are_refused(which in 0usize..11, ranks in 1usize..5, micros in 1usize..5, seed: u64, kind in 0usize..4) {
        let (name, chunks) = variants()[which];
        let reductions = if seed % 2 == 0 { Reductions::Last } else { Reductions::Every(2) };
        let mut schedule = by_name(name, ranks, micros, chunks).expect("the variant is allowed").complete(reductions);
        prop_assert!(valid(&schedule), "the declared rules refuse {name}");
        let stream = Stream::new(seed, "mutation");
        let list = &mut schedule.actions[(stream.word(0) % ranks as u64) as usize];
        let (a, b) = ((stream.word(1) % list.len() as u64) as usize, (stream.word(2) % list.len() as u64) as usize);
        match kind {
            0 => { list.remove(a); }
            1 => { let copy = list[a]; list.insert(b, copy); }
            2 => list.swap(a, b),
            _ => list.swap(a.saturating_sub(1), a),
        }
        for links in [Links::Unbounded, Links::Holding(10_000)] {
            let verdict = simulate(&schedule, &Costs::equal(ranks * chunks, 1.0, 1.0, 1.0), links);
            prop_assert!(kind > 1 || verdict.is_err(), "{name} with an action too few or too many was accepted");
            prop_assert!(verdict.is_ok() == valid(&schedule), "{name}: {verdict:?}, declared valid: {}", valid(&schedule));
        }
    }
}

/// An action by rank and place in its list.
type Node = (usize, usize);
/// What an action does to which slot: no list has the same twice.
type Deed = (&'static str, Slot);

/// The rules a second time, declared rather than run: exactly the right actions, in an order that one order of everything extends.
fn valid(schedule: &Schedule) -> bool {
    let mut before: Vec<(Node, Node)> = Vec::new();
    let mut sent: HashMap<(usize, usize, Pass), Vec<(Slot, Node)>> = HashMap::new();
    let mut received = sent.clone();
    for (rank, list) in schedule.actions.iter().enumerate() {
        let at: HashMap<Deed, usize> = list.iter().enumerate().map(|(place, action)| (deed(action), place)).collect();
        let rules = rules(schedule, rank, &at);
        let expected: HashSet<Deed> = rules.iter().flatten().copied().collect();
        let kept = |[first, second]: &[Deed; 2]| matches!((at.get(first), at.get(second)), (Some(a), Some(b)) if a < b);
        if at.len() != list.len() || at.len() != expected.len() || !rules.iter().all(kept) {
            return false;
        }
        before.extend((1..list.len()).map(|place| ((rank, place - 1), (rank, place))));
        for (place, action) in list.iter().enumerate() {
            match *action {
                Action::Send(pass, slot) => {
                    let (to, chunk) = schedule.placement.destination(pass, rank, slot.chunk).expect("the rules expect this");
                    sent.entry((rank, to, pass)).or_default().push((Slot { chunk, ..slot }, (rank, place)));
                }
                Action::Receive(pass, slot) => {
                    let (from, _) = schedule.placement.source(pass, rank, slot.chunk).expect("the rules expect this");
                    received.entry((from, rank, pass)).or_default().push((slot, (rank, place)));
                }
                _ => {}
            }
        }
    }
    for (link, messages) in &sent {
        let Some(taken) = received.get(link) else { return false };
        if !messages.iter().map(|message| message.0).eq(taken.iter().map(|message| message.0)) {
            return false;
        }
        before.extend(messages.iter().zip(taken).map(|(out, into)| (out.1, into.1)));
    }
    sent.len() == received.len() && has_order(&schedule.actions, &before)
}

/// What must stand before what in a rank's list, where `at` tells which slots run backward in one action. Every deed of the rank is in it.
fn rules(schedule: &Schedule, rank: usize, at: &HashMap<Deed, usize>) -> Vec<[Deed; 2]> {
    let placement = &schedule.placement;
    let split = |slot| !at.contains_key(&("whole", slot));
    let weight = |slot| (if split(slot) { "weight" } else { "whole" }, slot);
    let mut rules = Vec::new();
    for (chunk, micro) in (0..placement.chunks).flat_map(|chunk| (0..schedule.micros).map(move |micro| (chunk, micro))) {
        let slot = Slot { chunk, micro };
        let input = (if split(slot) { "input" } else { "whole" }, slot);
        rules.push([("forward", slot), input]);
        rules.extend(split(slot).then(|| [input, weight(slot)]));
        rules.extend((micro > 0).then(|| [weight(Slot { chunk, micro: micro - 1 }), weight(slot)]));
        for (pass, compute, [receive, send, hand]) in [
            (Pass::Forward, ("forward", slot), ["receive F", "send F", "hand F"]),
            (Pass::Backward, input, ["receive B", "send B", "hand B"]),
        ] {
            let source = placement.source(pass, rank, chunk);
            let needs = source.map(|(from, chunk)| if from == rank { (hand, Slot { chunk, micro }) } else { (receive, slot) });
            rules.extend(needs.map(|needs| [needs, compute]));
            let destination = placement.destination(pass, rank, chunk);
            rules.extend(destination.map(|(to, _)| [compute, (if to == rank { hand } else { send }, slot)]));
        }
    }
    rules
}

fn deed(action: &Action) -> Deed {
    let name = match action {
        Action::Receive(Pass::Forward, _) => "receive F",
        Action::Receive(Pass::Backward, _) => "receive B",
        Action::Send(Pass::Forward, _) => "send F",
        Action::Send(Pass::Backward, _) => "send B",
        Action::Hand { pass: Pass::Forward, .. } => "hand F",
        Action::Hand { pass: Pass::Backward, .. } => "hand B",
        Action::Forward(_) => "forward",
        Action::Backward { .. } => "whole",
        Action::BackwardInput(_) => "input",
        Action::BackwardWeight { .. } => "weight",
    };
    (name, action.slot())
}

/// Whether the relation has no circle (Kahn's algorithm).
fn has_order(actions: &[Vec<Action>], before: &[(Node, Node)]) -> bool {
    let mut waits: HashMap<Node, usize> = HashMap::new();
    let mut after: HashMap<Node, Vec<Node>> = HashMap::new();
    for &(first, second) in before {
        *waits.entry(second).or_default() += 1;
        after.entry(first).or_default().push(second);
    }
    let all = actions.iter().enumerate().flat_map(|(rank, list)| (0..list.len()).map(move |place| (rank, place)));
    let mut ready: Vec<_> = all.filter(|node| !waits.contains_key(node)).collect();
    let mut done = 0;
    while let Some(node) = ready.pop() {
        done += 1;
        for next in after.remove(&node).unwrap_or_default() {
            let left = waits.get_mut(&next).expect("a node that waits is counted");
            *left -= 1;
            if *left == 0 {
                ready.push(next);
            }
        }
    }
    done == actions.iter().map(Vec::len).sum::<usize>()
}

/// What the simulator says of a user's file.
fn refusal(file: &str) -> String {
    let schedule = text::from_text(file).expect("the file is well written").complete(Reductions::Last);
    let stages = schedule.placement.stages();
    simulate(&schedule, &Costs::equal(stages, 1.0, 1.0, 1.0), Links::Unbounded).expect_err("the schedule is wrong").to_string()
}

#[test]
fn refusals_name_rank_and_action() {
    let deadlock = refusal("F0.0 B0.0 F0.1 B0.1\nF0.1 B0.1 F0.0 B0.0");
    let said = "deadlock: rank 0 at action 2 (receive B0.0), rank 1 at action 1 (receive F0.1) can never go on";
    assert_eq!(deadlock, said);
    assert_eq!(refusal("F0.0 F0.1 B0.1 B0.0").split(':').next(), Some("rank 0, action 2 (B0.1)"));
    assert_eq!(refusal("F0.0 F0.0 B0.0"), "rank 0, action 1 (F0.0): this slot has run forward before");
    assert_eq!(refusal("F0.0 W0.0 I0.0"), "rank 0, action 1 (W0.0): the gradient of this slot's input has not been computed");
    assert_eq!(refusal("F0.0 F0.1 B0.0 I0.1"), "rank 0 ends without slot 0.1's gradient of its weights");

    let mut unreduced = by_name("1f1b", 1, 2, 1).expect("the schedule exists").complete(Reductions::Last);
    if let Some(Action::Backward { reduce, .. }) = unreduced.actions[0].last_mut() {
        *reduce = false;
    }
    let why = simulate(&unreduced, &Costs::equal(1, 1.0, 1.0, 1.0), Links::Unbounded).expect_err("nothing is reduced").to_string();
    assert_eq!(why, "rank 0, action 3 (B0.1): this is the chunk's last weight gradient, and it is not reduced");
    let costs = simulate(&unreduced, &Costs::equal(2, 1.0, 1.0, 1.0), Links::Unbounded).expect_err("two stages' costs for one");
    assert_eq!(costs.to_string(), "forward costs are given for 2 stages of 1");
}

/// A schedule whose rank 1 takes micro-batches in another order than rank 0 sends them: the messages wait in the inbox.
#[test]
fn messages_needed_out_of_order_are_received_in_order() {
    let schedule = text::from_text("F0.1 F0.0 B0.0 B0.1\nF0.0 F0.1 B0.0 B0.1").expect("it is well written").complete(Reductions::Last);
    simulate(&schedule, &Costs::equal(2, 1.0, 1.0, 1.0), Links::Holding(1)).expect("it can run");
    let slot = |micro| Slot { chunk: 0, micro };
    assert_eq!(
        schedule.actions[1][..3],
        [Action::Receive(Pass::Forward, slot(1)), Action::Receive(Pass::Forward, slot(0)), Action::Forward(slot(0))]
    );
}

#[test]
fn names_and_chunks_that_do_not_fit_are_refused() {
    let error = |name, chunks| by_name(name, 2, 2, chunks).expect_err("it does not fit").to_string();
    assert!(error("1f2b", 1).contains("neither a schedule (gpipe, 1f1b, interleaved,"), "{}", error("1f2b", 1));
    assert!(error("zbv", 1).contains("set pp_chunks to 2, or choose gpipe, 1f1b or zero_bubble"), "{}", error("zbv", 1));
    assert!(error("1f1b", 3).contains("set pp_chunks to 1, or choose interleaved or breadth_first"), "{}", error("1f1b", 3));
    assert!(by_name("1f1b", 2, 0, 1).is_err());
}
