//! The machine contract of the command line, on the golden checkpoints: what is printed, where, and
//! the exit codes.

mod kilotok;

use kilotok::{golden, ids, json, run};
use serde_json::Value;

const CASES: [&str; 4] = [
    "flash-bf16-s1",
    "fused-fp8-s1",
    "fused-mxfp4-s1",
    "fallbacks-bf16-s1",
];

fn expected(case: &str) -> Value {
    let text = std::fs::read_to_string(golden(&format!("mimo/{case}/expected.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

/// Bounds of the issue: mean absolute log-probability, by device.
#[test]
fn score_equals_the_oracle() {
    for case in CASES {
        let sequence = &expected(case)["sequences"][1];
        let model = golden(&format!("mimo/{case}"));
        for (device, bound) in kilotok::DEVICES {
            let out = json(&[
                "score",
                "--model",
                &model,
                "--token-ids",
                &ids(&sequence["token_ids"]),
                "--device",
                device,
                "--json",
            ]);
            let (found, wanted) = (
                numbers(&out["next_token_logprobs"]),
                numbers(&sequence["next_token_logprobs"]),
            );
            assert_eq!(found.len(), wanted.len());
            let error: f64 = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).sum();
            assert!(
                error / (wanted.len() as f64) < bound,
                "{case} {device}: {error}"
            );
            let gaps = numbers(&sequence["top2_gap"]);
            let argmax = numbers(&out["argmax"])
                .into_iter()
                .zip(numbers(&sequence["argmax"]));
            for ((found, wanted), gap) in argmax.zip(gaps) {
                assert!(gap <= 0.1 || found == wanted, "{case} {device}");
            }
        }
    }
}

#[test]
fn generate_prints_the_contract() {
    let model = golden("mimo/flash-bf16-s1");
    for (device, _) in kilotok::DEVICES {
        let common = [
            "generate",
            "--model",
            &model,
            "--token-ids",
            "1,2,3",
            "--max-tokens",
            "5",
            "--device",
            device,
        ];
        let out = json(&[&common[..], &["--json", "--temperature", "0"]].concat());
        assert_eq!(out["token_ids"].as_array().unwrap().len(), 5);
        assert_eq!(out["finish_reason"], "length");
        assert!(out["text"].is_string());
        for key in [
            "prompt_tokens",
            "generated_tokens",
            "ttft_ms",
            "decode_ms",
            "tokens_per_second",
            "acceptance_length",
        ] {
            assert!(out["stats"][key].is_number(), "{key}");
        }
        assert_eq!(
            (
                &out["stats"]["prompt_tokens"],
                &out["stats"]["generated_tokens"]
            ),
            (&3.into(), &5.into())
        );
        // Without --json: ids of a model without tokenizer, one line of statistics on the other side.
        let plain = run(&common);
        assert_eq!(plain.code, 0);
        assert_eq!(plain.stdout.trim(), ids(&out["token_ids"]));
        assert_eq!(plain.stderr.trim().lines().count(), 1, "{}", plain.stderr);
    }
}

#[test]
fn same_seed_same_bytes() {
    let model = golden("mimo/flash-bf16-s1");
    let tokens = |seed: &str| {
        let common = [
            "generate",
            "--model",
            &model,
            "--token-ids",
            "5,6",
            "-n",
            "12",
            "--device",
            "reference",
            "--json",
        ];
        json(
            &[
                &common[..],
                &["--temperature", "1.5", "--top-p", "0.95", "--seed", seed],
            ]
            .concat(),
        )["token_ids"]
            .clone()
    };
    assert_eq!(tokens("7"), tokens("7"));
    assert_ne!(tokens("7"), tokens("8"));
}

#[test]
fn drafting_changes_nothing_and_is_accounted_for() {
    let model = golden("dflash/pair-s1");
    let trace = tempfile::NamedTempFile::new().unwrap();
    let trace = trace.path().to_str().unwrap();
    for (device, _) in kilotok::DEVICES {
        let common = [
            "generate",
            "--model",
            &model,
            "--token-ids",
            "1,2,3,4",
            "-n",
            "24",
            "--device",
            device,
            "--json",
        ];
        let plain = json(&[&common[..], &["--no-draft"]].concat());
        let drafted = json(&[&common[..], &["--draft-width", "4", "--trace", trace]].concat());
        assert_eq!(plain["token_ids"], drafted["token_ids"], "{device}");
        let draft = &drafted["stats"]["draft"];
        let histogram = numbers(&draft["acceptance_histogram"]);
        assert_eq!(
            histogram.iter().sum::<f64>(),
            draft["steps"].as_f64().unwrap()
        );
        let lines = std::fs::read_to_string(trace).unwrap();
        assert_eq!(
            lines.lines().count() as f64,
            draft["steps"].as_f64().unwrap()
        );
        for line in lines.lines() {
            let step: Value = serde_json::from_str(line).unwrap();
            let drafted = step["drafted"].as_array().unwrap().len() as u64;
            assert_eq!(step["width"].as_u64().unwrap(), drafted + 1);
            assert!(step["accepted"].as_u64().unwrap() <= drafted);
        }
    }
}

#[test]
fn bench_says_what_is_synthetic_and_what_simulated() {
    let common = [
        "bench",
        "decode",
        "--device",
        "reference",
        "--context",
        "4",
        "--steps",
        "4",
        "--rows",
        "1,2",
        "--json",
    ];
    let out = json(&[&common[..], &["--model", "synthetic:moe-tiny"]].concat());
    assert_eq!(
        (&out["synthetic"], out["results"].as_array().unwrap().len()),
        (&true.into(), 2)
    );
    assert!(out["plain_read_gb_per_s"].as_f64().unwrap() > 0.0);
    let draft = golden("dflash/pair-s1/dflash");
    let model = golden("dflash/pair-s1");
    let more = [
        "--model",
        &model,
        "--draft",
        &draft,
        "--simulate-acceptance",
        "1.5",
    ];
    let out = json(&[&common[..], &more].concat());
    assert_eq!(
        (&out["simulated"], &out["synthetic"]),
        (&true.into(), &false.into())
    );
}

#[test]
fn inspect_counts_a_checkpoint_and_its_config_alike() {
    let model = golden("mimo/fused-mxfp4-s1");
    let whole = json(&["inspect", "--model", &model, "--json"]);
    let config = json(&[
        "inspect",
        "--model",
        &format!("{model}/config.json"),
        "--json",
    ]);
    assert!(whole["checkpoint_bytes"].as_u64().unwrap() > 0);
    for key in ["parameters", "kv_bytes_per_token", "kv_bytes_per_sequence"] {
        assert_eq!(whole[key], config[key], "{key}");
    }
}

#[test]
fn doctor_tests_a_drafting_pair() {
    let model = golden("dflash/pair-s1");
    let out = json(&[
        "doctor",
        "--model",
        &model,
        "--device",
        "reference",
        "--json",
    ]);
    assert_eq!(out["self_test"]["problems"], Value::Array(Vec::new()));
    assert!(out["self_test"]["acceptance_length"].as_f64().unwrap() > 1.0);
    assert!(out["read_gb_per_s"]["all_threads"].as_f64().unwrap() > 0.0);
}

#[test]
fn completions_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let out = run(&["completions", shell]);
        assert!(out.code == 0 && out.stdout.contains("generate"), "{shell}");
    }
}
