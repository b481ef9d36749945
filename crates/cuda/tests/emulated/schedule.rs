//! Schedules: what the checker refuses, the bytes of MiMo-V2.5-Pro's rank 0 of 8, and the replay of
//! tiny checkpoints against the reference network on 1, 2 and 4 ranks.

use std::path::PathBuf;

use cuda::check::{Fault, check};
use cuda::replay::{Replay, largest_difference};
use cuda::schedule::{Buffer, Op, Schedule, Shard};
use model::config::{AttentionConfig, FfnConfig, LayerConfig, MoeConfig};
use model::reference::network::Network;
use model::{Checkpoint, Config, Weights};

fn shard(rank: usize, ranks: usize) -> Shard {
    Shard {
        rank,
        ranks,
        ctas: 120,
    }
}

/// MiMo-V2.5-Pro (spec/mimo-v2.md A.1), with `layers` layers.
fn pro(layers: usize) -> Config {
    let attention = AttentionConfig {
        heads: 128,
        kv_heads: 8,
        qk_dim: 192,
        v_dim: 128,
        rope_dims: 64,
        rope_theta: 1e4,
        window: Some(128),
        sinks: true,
        value_scale: 0.612,
    };
    let moe = FfnConfig::Moe(MoeConfig {
        experts: 384,
        active: 8,
        intermediate: 2048,
        norm_topk: true,
        scaling: 1.0,
    });
    let layer = |ffn: FfnConfig| LayerConfig {
        attention: attention.clone(),
        ffn,
    };
    let dense = FfnConfig::Dense {
        intermediate: 16384,
    };
    Config {
        model_type: "mimo_v2".into(),
        vocab_size: 152_576,
        hidden: 6144,
        eps: 1e-5,
        context_tokens: 1 << 20,
        tie_word_embeddings: false,
        fused_qkv: true,
        qkv_shards: 8,
        layers: (0..layers)
            .map(|l| layer(if l == 0 { dense.clone() } else { moe.clone() }))
            .collect(),
    }
}

#[test]
fn the_schedule_of_the_whole_model_passes() {
    let schedule = Schedule::new(&pro(70), shard(0, 8)).unwrap();
    assert_eq!(check(&schedule), Ok(()));
    assert_eq!(schedule.instructions.len(), 1 + 7 + 69 * 8 + 3);
    let bytes = |op: Op| {
        schedule
            .instructions
            .iter()
            .find(|i| i.op == op && i.layer == Some(1))
            .unwrap()
            .page_bytes
    };
    // gpu.md 1b: 20.8 MB of QKV and 12.6 MB of o_proj a rank; 20.05 MB an expert over 8 ranks.
    assert_eq!(bytes(Op::Qkv), 212 * 48 * 2064);
    assert_eq!(bytes(Op::OProj), 384 * 16 * 2064);
    assert_eq!((bytes(Op::GateUp) + bytes(Op::Down)) * 8, 20_054_016);
}

#[test]
fn the_checker_refuses_what_would_hang_or_race() {
    let good = Schedule::new(&pro(3), shard(0, 8)).unwrap();
    let at = |op: Op| good.instructions.iter().position(|i| i.op == op).unwrap();

    let mut missing = good.clone();
    missing.instructions[at(Op::Attention)].reads[0].1 += 100;
    assert!(matches!(
        check(&missing),
        Err(Fault::NeverWritten {
            op: Op::Attention,
            ..
        })
    ));

    let mut circle = good.clone();
    circle.instructions[at(Op::Qkv)]
        .reads
        .push((Buffer::Heads, 1));
    assert!(matches!(
        check(&circle),
        Err(Fault::Circle { op: Op::Qkv, .. })
    ));

    let mut twice = good.clone();
    twice.instructions[at(Op::OProj)].writes = vec![(Buffer::Heads, 1)];
    assert!(matches!(check(&twice), Err(Fault::WrittenTwice { .. })));

    let mut early = good.clone();
    let gate_up = early
        .instructions
        .iter_mut()
        .find(|i| i.pages_after.is_some())
        .unwrap();
    gate_up.reads.retain(|(b, _)| *b != Buffer::RouterLogits);
    assert!(matches!(
        check(&early),
        Err(Fault::UnknownPages { op: Op::GateUp, .. })
    ));

    let mut one_slot = good.clone();
    one_slot.slots = 1;
    assert!(matches!(check(&one_slot), Err(Fault::Overwrites { .. })));

    let mut large = good.clone();
    large.shared.stages += 4;
    let message = check(&large).unwrap_err().to_string();
    assert!(message.contains("232448 allowed"), "{message}");
}

#[test]
fn ranks_that_do_not_divide_the_model_are_refused() {
    let message = Schedule::new(&pro(2), shard(0, 16))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("key/value heads") && message.contains("16 ranks"),
        "{message}"
    );
    assert!(Schedule::new(&pro(2), shard(8, 8)).is_err());
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../goldens/mimo")
        .join(name)
}

/// Three steps of three rows on every number of ranks that divides the model.
fn replays_like_the_network(name: &str) {
    let dir = golden(name);
    let config = Config::load(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let weights = Weights::new(&config, &checkpoint).unwrap();
    let network = Network::new(&config, &weights);
    let mut replayed = 0;
    for ranks in [1, 2, 4] {
        let Ok(schedule) = Schedule::new(&config, shard(0, ranks)) else {
            continue;
        };
        check(&Schedule {
            shared: Schedule::new(&pro(2), shard(0, 8)).unwrap().shared,
            ..schedule.clone()
        })
        .unwrap();
        let mut replay = Replay::new(&config, &weights, &schedule);
        let mut cache = network.empty_cache();
        for step in 0..3usize {
            let tokens = [5 + step as u32, 17, 3 * step as u32 + 1];
            replay.run(&tokens, step * 3, usize::MAX);
            let expected: Vec<Vec<f32>> = tokens
                .iter()
                .enumerate()
                .map(|(row, &t)| {
                    network.logits(&network.forward(
                        t,
                        (step * 3 + row) as u32,
                        &mut cache,
                        |_, _| {},
                    ))
                })
                .collect();
            let rows: Vec<Vec<f32>> = (0..tokens.len())
                .map(|row| {
                    (0..ranks)
                        .flat_map(|rank| replay.buffer(rank, Buffer::Logits)[row].clone())
                        .collect()
                })
                .collect();
            let difference = largest_difference(&rows, &expected);
            assert!(
                difference < 1e-4,
                "{name}, {ranks} ranks, step {step}: {difference:.2e}"
            );
            for (row, logits) in rows.iter().enumerate() {
                let best = model::reference::sample::first_largest(logits).unwrap();
                assert_eq!(replay.buffer(0, Buffer::Tokens)[row], [best as f32]);
            }
        }
        replayed += 1;
    }
    assert!(
        replayed >= 2,
        "{name}: only {replayed} rank counts divide the model"
    );
}

#[test]
fn replay_of_the_fused_mxfp4_checkpoint_equals_the_network() {
    replays_like_the_network("fused-mxfp4-bf16-router-s1");
}

#[test]
fn replay_of_the_split_fp8_checkpoint_equals_the_network() {
    replays_like_the_network("flash-fp8-split-s1");
}
