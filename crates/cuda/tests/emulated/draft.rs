//! The drafter and whole runs in the resident kernel, on the emulator: drafts against
//! `model::reference::DraftNetwork`, drafted text against plain text, stop ids, the ring.

use cuda::images::Kv;
use cuda::layout::{FaultRecord, HostWords, StepState};
use cuda::load::{DraftSource, draft_formats};
use cuda::program::{Bases, DraftFormats, DraftWhat, Formats, Program, Settings, What};
use cuda::replay::{Replay, largest_difference};
use cuda::ring::{Given, Ring, RingWord};
use cuda::schedule::{Buffer, Pass, Schedule, Shard};
use cuda::strips::Format;
use cuda_emulator::{Bug, Grid, resident_with_host, with};
use model::Config;
use model::draft::{Draft, DraftConfig, DraftOptions};
use model::reference::network::{Cache, Network};
use model::reference::{DraftNetwork, sample};

use crate::group::{CONTEXT, CTAS, Group, Model};

/// Target and drafter of the definition with their caches.
struct Reference {
    network: Network,
    drafter: DraftNetwork,
    cache: Cache,
    context: Cache,
}

impl Reference {
    fn new(model: &Model) -> Self {
        let (draft, config) = (model.draft.as_ref().unwrap(), eight_rows(model));
        let weights = draft.weights().unwrap();
        let drafter = DraftNetwork::new(&config, &weights, draft.mask_embedding.clone());
        let network = Network::new(&model.config, &model.weights());
        Self {
            cache: network.empty_cache(),
            context: drafter.empty_cache(),
            network,
            drafter,
        }
    }

    /// Logits of a block's rows after the anchor.
    fn block(&self, anchor: u32, position: usize) -> Vec<Vec<f32>> {
        let (network, width) = (&self.network, self.drafter.block_size());
        self.drafter
            .block(network, anchor, position as u32, width, &self.context)
    }

    fn append(&mut self, token: u32, position: usize) {
        let (mut features, taps) = (Vec::new(), self.drafter.taps().to_vec());
        let see = |layer: usize, row: &[f32]| {
            if taps.contains(&layer) {
                features.extend_from_slice(row);
            }
        };
        self.network
            .forward(token, position as u32, &mut self.cache, see);
        self.drafter
            .append_context(&features, position as u32, &mut self.context);
    }
}

/// A ring for the emulated kernel: ordinary memory, the same protocol.
struct HostRing {
    ring: Ring,
    _words: Vec<RingWord>,
    _host: Box<HostWords>,
}

fn host_ring(words: usize) -> HostRing {
    let mut memory = vec![RingWord::default(); words];
    let mut host = Box::<HostWords>::default();
    // SAFETY: both live as long as the reader; only the emulated kernel writes the words.
    let ring = unsafe { Ring::new(memory.as_mut_ptr(), words, &raw mut *host) };
    HostRing {
        ring,
        _words: memory,
        _host: host,
    }
}

impl Group {
    fn each(&mut self, set: impl Fn(&mut StepState)) {
        self.ranks.iter_mut().for_each(|r| set(r.step_state()));
    }

    /// Computes the prompt but its last token, in steps of up to 8 rows, without drafting.
    fn prefill(&mut self, prompt: &[u32]) {
        let computed = &prompt[..prompt.len() - 1];
        for (n, rows) in computed.chunks(8).enumerate() {
            self.set(rows, n * 8, 0);
            let mut args = self.args(1);
            for (args, rank) in args.iter_mut().zip(&self.ranks) {
                args.begin = rank.program.verify_begin as i32;
            }
            let grid = grid(n as u64 + 11);
            // SAFETY: the addresses are those of the ranks' arenas, sized by the program.
            let launch = || unsafe { resident_with_host(&args, grid, &mut || ()) };
            with(&self.switches(), launch).unwrap();
        }
    }

    /// The state of a run that begins.
    fn start(&mut self, prompt: &[u32], run: &Run<'_>) {
        let (position, anchor) = (prompt.len() as i32 - 1, prompt[prompt.len() - 1] as i32);
        self.each(|s| {
            *s = StepState {
                rows: run.width,
                block: run.block,
                block_max: run.block,
                width: run.width,
                limit: run.limit,
                left: run.count,
                position,
                chain: 2,
                stop_count: run.stops.len() as i32,
                ..StepState::default()
            };
            s.tokens[0] = anchor;
            for (to, stop) in s.stops.iter_mut().zip(run.stops) {
                *to = *stop;
            }
        });
    }

    /// A run from the prompt's last token: what the host took out of rank 0's ring.
    pub(crate) fn generate(&mut self, prompt: &[u32], steps: u32, run: &Run<'_>) -> Vec<Given> {
        self.prefill(prompt);
        self.start(prompt, run);
        let mut host = host_ring(run.ring_words);
        let before = self.steps;
        let mut args = self.args(steps);
        (args[0].ring, args[0].host) = host.ring.addresses();
        args[0].ring_words = run.ring_words as i32;
        for (args, rank) in args.iter_mut().zip(&self.ranks) {
            args.begin = if run.width > 1 {
                0
            } else {
                rank.program.verify_begin as i32
            };
        }
        let mut out = Vec::new();
        let mut drain = || out.extend(std::iter::from_fn(|| host.ring.take()));
        // SAFETY: as above; the ring outlives the launch.
        let launch = || unsafe { resident_with_host(&args, grid(run.seed), &mut drain) };
        with(&self.switches(), launch).unwrap();
        drain();
        self.steps = before + self.ranks[0].step_state().steps as u32;
        out
    }
}

fn grid(seed: u64) -> Grid {
    Grid {
        ctas: CTAS as i32,
        seed,
        bug: Bug::None,
    }
}

pub(crate) struct Run<'a> {
    pub(crate) width: i32,
    pub(crate) block: i32,
    pub(crate) count: i32,
    pub(crate) limit: i32,
    pub(crate) ring_words: usize,
    pub(crate) stops: &'a [i32],
    pub(crate) seed: u64,
}

pub(crate) const RUN: Run<'static> = Run {
    width: 8,
    block: 8,
    count: 24,
    limit: CONTEXT as i32,
    ring_words: 8,
    stops: &[],
    seed: 5,
};

pub(crate) fn tokens(given: &[Given]) -> Vec<u32> {
    given.iter().map(|g| g.token).collect()
}

/// The drafter as a step of 8 rows takes it.
fn eight_rows(model: &Model) -> DraftConfig {
    let draft = model.draft.as_ref().unwrap();
    DraftConfig {
        block_size: draft.config.block_size.min(8),
        ..draft.config.clone()
    }
}

/// Runs `passes` of a step on `tokens` and gives the logits over all ranks.
fn replay_logits(
    replay: &mut Replay<'_>,
    schedule: &Schedule,
    passes: &[Pass],
    tokens: &[u32],
    position: usize,
) -> Vec<Vec<f32>> {
    for (n, i) in schedule.instructions.iter().enumerate() {
        if passes.contains(&i.pass) {
            replay.instruction(n, tokens, position);
        }
    }
    let of = |row: usize| {
        let ranks = 0..schedule.shard.ranks;
        let part = |rank| replay.buffer(rank, Buffer::Logits)[row].clone();
        ranks.flat_map(part).collect()
    };
    (0..tokens.len()).map(of).collect()
}

/// Drafts of a step after every few tokens of a text: the replay in f32 equals the definition, the
/// device equals the replay with the device's roundings.
fn drafts_match(target: &str, draft: &str, ranks: usize) {
    let steps = [3, 1, 8, 8, 8, 5];
    drafts_of_match(&Model::drafted(target, draft), draft, ranks, &steps);
}

fn drafts_of_match(model: &Model, draft: &str, ranks: usize, steps: &[usize]) {
    let (vocab, config) = (model.config.vocab_size as u32, eight_rows(model));
    let shard = |ranks| Shard {
        rank: 0,
        ranks,
        ctas: CTAS,
    };
    let weights = model.weights();
    let drafter = model.draft.as_ref().unwrap();
    let (table, mask) = (
        drafter.weights().unwrap(),
        drafter.mask_embedding.as_deref(),
    );
    let schedules =
        [ranks, 1].map(|r| Schedule::with_draft(&model.config, Some(&config), shard(r)).unwrap());
    let replay = |n: usize| {
        Replay::new(&model.config, &weights, &schedules[n]).with_draft(&config, &table, mask)
    };
    let (mut plain, mut rounded) = (replay(0), replay(1).as_device(model.numbers));
    let mut reference = Reference::new(model);
    let text: Vec<u32> = (0..40u32)
        .map(|i| (i * i * 7 + i * 5 + 3) % vocab)
        .collect();
    let mut group = model.group(ranks);
    let begin = group.ranks[0].program.verify_begin;
    let mut position = 0;
    for &rows in steps {
        let tokens = &text[position..position + rows];
        group.set(tokens, position, 0);
        group.walk(begin, usize::MAX);
        let after = [Pass::Verify, Pass::Context];
        replay_logits(&mut plain, &schedules[0], &after, tokens, position);
        replay_logits(&mut rounded, &schedules[1], &after, tokens, position);
        for (at, &token) in tokens.iter().enumerate() {
            reference.append(token, position + at);
        }
        position += rows;
        let block = vec![text[position]; config.block_size as usize];
        group.set(&block[..1], position, 0);
        group.each(|s| s.block = block.len() as i32);
        group.walk(0, begin);
        let plain = replay_logits(&mut plain, &schedules[0], &[Pass::Draft], &block, position);
        let near = replay_logits(
            &mut rounded,
            &schedules[1],
            &[Pass::Draft],
            &block,
            position,
        );
        let expected = reference.block(block[0], position);
        let found = (0..block.len()).map(|row| group.logits(row, vocab as usize));
        let found: Vec<_> = found.collect();
        let name = format!("{draft}, {ranks} ranks, position {position}");
        let away = largest_difference(&plain[1..], &expected);
        assert!(away < 1e-4, "{name}: replay {away:.1e}");
        let away = largest_difference(&found[1..], &near[1..]);
        // As for the target: later a value may land on the other side of a bf16 rounding.
        let most = if position == 3 { 1e-2 } else { 3e-2 };
        assert!(away < most, "{name}: device {away:.1e}");
        for (row, logits) in found.iter().enumerate().skip(1) {
            let best = sample::first_largest(logits).unwrap();
            for rank in &mut group.ranks {
                assert_eq!(
                    rank.step_state().tokens[row],
                    best as i32,
                    "{name} row {row}"
                );
            }
        }
    }
}

impl Group {
    /// One step, of which only instructions `begin..end` are executed.
    fn walk(&mut self, begin: usize, end: usize) {
        let mut args = self.args(1);
        for args in &mut args {
            args.begin = begin as i32;
            args.end = args.end.min(end.min(i32::MAX as usize) as i32);
        }
        let seed = u64::from(self.steps) * 3 + 1;
        // SAFETY: the addresses are those of the ranks' arenas, sized by the program.
        unsafe { resident_with_host(&args, grid(seed), &mut || ()) }.unwrap();
    }
}

#[test]
fn drafts_of_the_released_layout_match_the_definition() {
    drafts_match("dflash/xiaomi-s1", "dflash/xiaomi-s1/dflash", 1);
    drafts_match("dflash/xiaomi-s1", "dflash/xiaomi-s1/dflash", 2);
}

#[test]
fn drafts_of_full_causal_and_symmetric_layers_match_the_definition() {
    drafts_match("mimo/flash-bf16-s1", "dflash/zlab-full-s1", 1);
    drafts_match("mimo/flash-bf16-s1", "dflash/zlab-causal-sliding-s1", 1);
    drafts_match("mimo/flash-bf16-s1", "dflash/zlab-noncausal-sliding-s1", 1);
}

/// Three blocks of columns of the taps: one and two of two ranks, none of some of four and eight.
#[test]
fn drafts_on_two_to_eight_ranks_match_the_definition() {
    let model = Model::synthetic_drafted();
    drafts_of_match(&model, "synthetic", 2, &[3, 8]);
    drafts_of_match(&model, "synthetic", 4, &[3, 8]);
    drafts_of_match(&model, "synthetic", 8, &[3]);
}

/// Taps that straddle the ranks' columns, and biases in parts.
#[test]
fn drafts_on_two_ranks_match_the_definition() {
    for draft in ["dflash/zlab-full-s1", "dflash/zlab-causal-sliding-s1"] {
        let model = Model::drafted_for_three_layers("mimo/fused-mxfp4-bf16-router-s1", draft);
        drafts_of_match(&model, draft, 2, &[3, 1, 8, 8]);
    }
}

#[test]
fn a_run_gives_the_text_of_plain_decoding() {
    for (target, draft, count, prompts) in [
        ("dflash/pair-s1", "dflash/pair-s1/dflash", 24, 2),
        ("trained", "trained/dflash", 12, 1),
    ] {
        let model = Model::drafted(target, draft);
        let run = Run { count, ..RUN };
        for prompt in [&[8u32, 13, 2, 4, 4, 1, 9, 9, 7, 2][..], &[3, 5, 10]]
            .iter()
            .take(prompts)
        {
            let plain = model
                .group(1)
                .generate(prompt, 40, &Run { width: 1, ..run });
            let drafted = model.group(1).generate(prompt, 40, &run);
            assert_eq!(tokens(&plain).len(), count as usize);
            assert_eq!(tokens(&plain), tokens(&drafted), "{target}");
            let last = drafted[drafted.len() - 1];
            assert_eq!(last.reason_name(), "COUNT");
            let positions: Vec<u32> = drafted.iter().map(|g| g.position).collect();
            let first = prompt.len() as u32;
            assert_eq!(positions, (first..first + count as u32).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_run_gives_the_text_of_plain_decoding_with_keys_and_values_in_e4m3() {
    let model = pair().with(Kv::Fp8);
    let run = Run { count: 24, ..RUN };
    let prompt = [8u32, 13, 2, 4, 4, 1, 9, 9, 7, 2];
    let text = |width, ranks| {
        let run = Run { width, ..run };
        let given = model.group(ranks).generate(&prompt, 40, &run);
        tokens(&given)
    };
    let plain = text(1, 1);
    assert_eq!(plain.len(), 24);
    assert_eq!(plain, text(8, 1));
}

/// The 16-token pair, whose drafter is right now and then.
pub(crate) fn pair() -> Model {
    Model::drafted("dflash/pair-s1", "dflash/pair-s1/dflash")
}

pub(crate) const PROMPT: [u32; 3] = [8, 13, 2];

#[test]
fn a_run_on_two_ranks_equals_one_on_one_rank() {
    let model = Model::drafted("dflash/xiaomi-s1", "dflash/xiaomi-s1/dflash");
    let run = Run { count: 10, ..RUN };
    let one = model.group(1).generate(&PROMPT, 10, &run);
    let two = model.group(2).generate(&PROMPT, 10, &run);
    assert_eq!(tokens(&one), tokens(&two));
}

#[test]
fn stop_ids_count_and_context_end_a_run_on_the_device() {
    let text = tokens(&pair().group(1).generate(&PROMPT, 40, &RUN));
    // The golden text is 4 nine times, then 0: tokens 0 to 8 are accepted in blocks.
    let other = text.iter().position(|&t| t != text[0]).unwrap();
    let stops = [text[other] as i32];
    let mut group = pair().group(1);
    let stopped = group.generate(
        &PROMPT,
        40,
        &Run {
            stops: &stops,
            ..RUN
        },
    );
    assert_eq!(tokens(&stopped), text[..=other]);
    assert_eq!(stopped[other].reason_name(), "STOP_ID");
    let state = *group.ranks[0].step_state();
    assert_eq!(state.position as usize, PROMPT.len() - 1 + stopped.len());
    assert!(
        state.steps < 40,
        "the device went on for {} steps",
        state.steps
    );
    // The same memory goes on from where the run ended, as a new run.
    let whole = [&PROMPT[..], &text[..=other]].concat();
    let rest = group.generate(&whole, 40, &Run { count: 6, ..RUN });
    assert_eq!(tokens(&rest), text[other + 1..other + 7]);

    let run = Run { count: 5, ..RUN };
    let counted = pair().group(1).generate(&PROMPT, 40, &run);
    assert_eq!(tokens(&counted), text[..5]);
    assert_eq!(counted[4].reason_name(), "COUNT");

    let limit = PROMPT.len() as i32 + 11;
    let full = pair().group(1).generate(&PROMPT, 40, &Run { limit, ..RUN });
    assert_eq!(tokens(&full), text[..11]);
    assert_eq!(full[10].reason_name(), "CONTEXT");
}

#[test]
fn a_host_that_takes_nothing_is_a_fault_and_one_that_says_stop_ends_the_run() {
    let mut group = pair().group(1);
    group.prefill(&PROMPT);
    for stop in [true, false] {
        let mut host = host_ring(8);
        host.ring.stop(stop);
        group.start(&PROMPT, &RUN);
        let mut args = group.args(40);
        (args[0].ring, args[0].host) = host.ring.addresses();
        args[0].ring_words = 8;
        let (mut record, mut calls) = (FaultRecord::default(), 0);
        args[0].fault = (&raw mut record) as u64;
        // SAFETY: the addresses are those of the rank's arena; ring and record outlive the launch.
        let end = unsafe { resident_with_host(&args, grid(3), &mut || calls += 1) };
        let given: Vec<Given> = std::iter::from_fn(|| host.ring.take()).collect();
        if stop {
            assert_eq!(end, Ok(()));
            assert_eq!(group.ranks[0].step_state().steps, 1);
            assert_eq!(given[given.len() - 1].reason_name(), "HOST");
            group.steps -= 39;
        } else {
            let report = end.unwrap_err();
            assert!(report.contains("did not take tokens"), "{report}");
            assert!(calls > 0 && given.len() <= 8);
        }
    }
}

#[test]
fn accepted_drafts_can_be_simulated_for_benchmarks() {
    let mut group = pair().group(1);
    group.prefill(&PROMPT);
    group.start(&PROMPT, &RUN);
    group.each(|s| (s.simulate, s.limit, s.chain) = (4, 0, 2));
    let args = group.args(3);
    // SAFETY: the addresses are those of the rank's arena, sized by the program.
    unsafe { resident_with_host(&args, grid(3), &mut || ()) }.unwrap();
    let state = group.ranks[0].step_state();
    assert_eq!((state.kept, state.drafted), (9, 21));
    assert_eq!(state.position as usize, PROMPT.len() - 1 + 3 * 4);
}

/// Rank 0 of 8 of MiMo-V2.5-Pro with its drafter, as `kilotok bench decode --load dummy` takes it: shapes only.
#[test]
fn the_drafter_of_the_whole_model_fits() {
    let read = |name: &str| {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/tests/released/");
        std::fs::read_to_string(format!("{dir}{name}")).unwrap()
    };
    let config = Config::from_json(&read("mimo_v2_5_pro_fp4.json")).unwrap();
    let draft = read("draft_mimo_v2_5_pro.json");
    let draft = DraftConfig::from_json(&draft, &config, DraftOptions::default()).unwrap();
    let shard = Shard {
        rank: 0,
        ranks: 8,
        ctas: 132,
    };
    let with = |draft: Option<&DraftConfig>| {
        let schedule = Schedule::with_draft(&config, draft, shard).unwrap();
        cuda::check::check(&schedule).unwrap();
        let own = draft.map(|d| DraftFormats::uniform(d, Format::Bf16));
        let formats = Formats::release(&config, Format::Fp8).with_draft(own);
        Program::new(
            &config,
            &schedule,
            &formats,
            Settings::new(1088),
            Bases::NOWHERE,
        )
        .unwrap()
    };
    let (plain, drafted) = (with(None), with(Some(&draft)));
    let bytes = drafted.weight_bytes - plain.weight_bytes;
    // 5.54 GB over 8 ranks (dflash.md C.3), and keys and values of the context a second time.
    assert!((692_000_000..720_000_000).contains(&bytes), "{bytes}");
    assert_eq!(drafted.block, 8);
    let passes = |pass: i32| {
        drafted
            .instructions
            .iter()
            .filter(|i| i.pass == pass)
            .count()
    };
    assert_eq!((passes(1), passes(2)), (1 + 5 * 7 + 2, 4));
    assert_eq!(passes(0), plain.instructions.len());
}

/// Every piece of the shipped drafter (FP8, taps of 576 columns) packs, and `fc` comes back.
#[test]
fn the_shipped_drafter_packs() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/kilotok-mini");
    let config = Config::load(&dir).unwrap();
    let draft = Draft::open(&dir.join("dflash"), &config, DraftOptions::default()).unwrap();
    let weights = draft.weights().unwrap();
    let formats = draft_formats(&draft, &weights);
    let shard = Shard {
        rank: 0,
        ranks: 1,
        ctas: 132,
    };
    let schedule = Schedule::with_draft(&config, Some(&formats.config), shard).unwrap();
    let all = Formats::release(&config, Format::Fp8).with_draft(Some(formats.clone()));
    let program =
        Program::new(&config, &schedule, &all, Settings::new(64), Bases::NOWHERE).unwrap();
    let source = DraftSource {
        formats: &formats,
        weights: &weights,
        mask_embedding: draft.mask_embedding.as_deref(),
        rank: 0,
        ranks: 1,
    };
    let mut row = vec![0.0; weights.fc.cols];
    for piece in &program.pieces {
        let Some(bytes) = source.piece(piece).unwrap() else {
            continue;
        };
        assert_eq!(bytes.len(), piece.bytes);
        let (What::Draft(DraftWhat::Fc), Some(tiles)) = (piece.what, piece.tiles) else {
            continue;
        };
        for r in [0, 17, 575] {
            weights.fc.row(r).decode(&mut row);
            let packed = (0..row.len()).map(|k| tiles.value(&bytes, r, k));
            assert!(packed.eq(row.iter().copied()), "row {r}");
        }
    }
}
