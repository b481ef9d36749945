//! Checkpoints and drafters that cannot be used: every one gives an error of one line that names the
//! file and the tensor or field, what was expected and what was found. Never a panic.

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use model::draft::{Draft, DraftConfig, DraftOptions};
use model::{Checkpoint, Config, ModelError, Weights};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Damage to one entry of a header.
type Edit = fn(&mut Value);
/// What the error has to contain.
type Parts = &'static [&'static str];

const INDEX: &str = "model.safetensors.index.json";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../goldens")
        .join(name)
}

/// A copy of a golden directory, to be damaged.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(golden(name)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn json(&self, name: &str, edit: impl FnOnce(&mut Map<String, Value>)) -> &Self {
        let path = self.path(name);
        let mut value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(value.as_object_mut().unwrap());
        fs::write(path, value.to_string()).unwrap();
        self
    }

    /// Header and data of a shard.
    fn shard(&self, name: &str) -> (Map<String, Value>, Vec<u8>) {
        let bytes = fs::read(self.path(name)).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        (header, bytes[8 + length..].to_vec())
    }

    fn write_shard(&self, name: &str, header: &str, data: &[u8]) {
        let length = (header.len() as u64).to_le_bytes();
        let bytes = [&length, header.as_bytes(), data].concat();
        fs::write(self.path(name), bytes).unwrap();
    }

    fn header(&self, name: &str, edit: impl FnOnce(&mut Map<String, Value>)) -> &Self {
        let (mut header, data) = self.shard(name);
        edit(&mut header);
        self.write_shard(name, &Value::Object(header).to_string(), &data);
        self
    }

    /// Config, checkpoint, weights and scales, as a backend opens them.
    fn open(&self) -> Result<(), ModelError> {
        let config = Config::load(self.0.path())?;
        let checkpoint = Checkpoint::open(self.0.path())?;
        Weights::new(&config, &checkpoint)?;
        checkpoint.check_scales()
    }
}

/// The error is one line with all of these parts.
#[track_caller]
fn refused<T: Debug>(result: Result<T, ModelError>, parts: &[&str]) {
    let line = result.expect_err("has to be refused").to_string();
    assert_eq!(line.lines().count(), 1, "one line: {line}");
    assert!(line.len() < 500, "short: {line}");
    for part in parts {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
}

const SHARD: &str = "model.safetensors";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn undamaged_copies_open() {
    for name in ["flash-bf16-s1", "flash-fp8-split-s1", "fused-mxfp4-s1"] {
        Copy::of(&format!("mimo/{name}")).open().unwrap();
    }
}

#[test]
fn files() {
    let copy = Copy::of("mimo/flash-bf16-s1");
    let bytes = fs::read(copy.path(SHARD)).unwrap();
    let cases: [(&[u8], &[&str]); 6] = [
        (&[], &["at least 8 bytes, found 0"]),
        (&bytes[..7], &["at least 8 bytes, found 7"]),
        (&bytes[..100], &["header: expected the", "found 92"]),
        (
            &bytes[..bytes.len() - 1],
            &["bytes of tensor data", "found"],
        ),
        (&[0xFF; 64], &["header: expected at most 100000000 bytes"]),
        (
            b"\x04\0\0\0\0\0\0\0\xff\xfe{}",
            &["UTF-8 text", "byte at 0"],
        ),
    ];
    for (content, parts) in cases {
        fs::write(copy.path(SHARD), content).unwrap();
        refused(copy.open(), &[&[SHARD], parts].concat());
    }
    fs::write(copy.path(SHARD), [&bytes[..], &[0; 9]].concat()).unwrap();
    refused(copy.open(), &[SHARD, "bytes of tensor data", "found"]);
    fs::remove_file(copy.path(SHARD)).unwrap();
    refused(copy.open(), &[SHARD, "cannot open"]);
    fs::create_dir(copy.path(SHARD)).unwrap();
    refused(copy.open(), &[SHARD]);
    fs::remove_file(copy.path(INDEX)).unwrap();
    fs::remove_dir(copy.path(SHARD)).unwrap();
    refused(copy.open(), &["expected", INDEX, "found neither"]);
}

#[test]
fn headers() {
    let cases: [(Edit, Parts); 11] = [
        (
            |t| t["data_offsets"] = json!([0, 1u64 << 60]),
            &["[0, 1152921504606846976]"],
        ),
        (
            |t| t["data_offsets"] = json!([u64::MAX - 1, u64::MAX]),
            &["data_offsets from"],
        ),
        (
            |t| t["data_offsets"] = json!([4, 2]),
            &["data_offsets from", "[4, 2]"],
        ),
        (
            |t| t["data_offsets"] = json!([-1, 2]),
            &["data_offsets", "-1"],
        ),
        (|t| t["data_offsets"] = json!([2]), &["data_offsets"]),
        (
            |t| t["shape"][0] = json!(1),
            &["bytes for BF16 of shape [1, "],
        ),
        (
            |t| t["shape"] = json!([1u64 << 40, 1u64 << 40]),
            &["a size below 2^64 bits"],
        ),
        (|t| t["shape"] = json!("big"), &["\"big\""]),
        (|t| t["dtype"] = json!("F9"), &["F9"]),
        (
            |t| drop(t.as_object_mut().unwrap().remove("dtype")),
            &["dtype"],
        ),
        (|t| *t = json!(7), &["7"]),
    ];
    for (edit, parts) in cases {
        let copy = Copy::of("mimo/flash-bf16-s1");
        copy.header(SHARD, |header| edit(&mut header[Q]));
        refused(
            copy.open(),
            &[&[SHARD, "tensor `", "expected", "found"], parts].concat(),
        );
    }
    let copy = Copy::of("mimo/flash-bf16-s1");
    for (text, part) in [
        ("[]", "expected a JSON object of tensors"),
        ("{", "expected a JSON object of tensors"),
        ("", "expected a JSON object of tensors"),
        ("{\"__metadata__\": {\"x\": 1}}", "`__metadata__`"),
    ] {
        copy.write_shard(SHARD, text, &[]);
        refused(copy.open(), &[SHARD, part]);
    }
    copy.write_shard(SHARD, "{}", &[]);
    refused(copy.open(), &[INDEX, "tensor `", "no tensor of this name"]);
}

#[test]
fn overlaps_and_gaps() {
    for shift in [-2i64, 2] {
        let copy = Copy::of("mimo/flash-bf16-s1");
        copy.header(SHARD, |header| {
            let offset = |i: usize| header[Q]["data_offsets"][i].as_i64().unwrap();
            header[Q]["data_offsets"] = json!([offset(0) + shift, offset(1) + shift]);
        });
        refused(
            copy.open(),
            &[SHARD, "tensor `", "without overlap or gap", "found ["],
        );
    }
}

/// Valid files, but not this model: shapes, dtypes and names.
#[test]
fn tensors() {
    let cases: [(&str, &str, Edit, Parts); 6] = [
        (
            "flash-bf16-s1",
            Q,
            |t| {
                t["shape"] = json!([t["shape"][1], t["shape"][0]]);
            },
            &["expected shape [", "found ["],
        ),
        (
            "flash-bf16-s1",
            Q,
            |t| t["dtype"] = json!("F16"),
            &["BF16, F32", "found F16"],
        ),
        (
            "flash-bf16-s1",
            "model.norm.weight",
            |t| t["dtype"] = json!("I16"),
            &["BF16 or F32", "I16"],
        ),
        (
            "flash-bf16-s1",
            "model.norm.weight",
            |t| {
                t["shape"] = json!([1, t["shape"][0]]);
            },
            &["expected shape [", "found [1, "],
        ),
        (
            "flash-fp8-split-s1",
            "model.layers.0.self_attn.q_proj.weight_scale_inv",
            |t| {
                t["dtype"] = json!("I32");
            },
            &["expected F32, found I32"],
        ),
        (
            "fused-mxfp4-s1",
            "model.layers.1.mlp.experts.0.up_proj.weight_scale",
            |t| {
                t["shape"] = json!([t["shape"][1], t["shape"][0]]);
            },
            &["expected U8 of shape", "found U8 of shape"],
        ),
    ];
    for (golden, tensor, edit, parts) in cases {
        let copy = Copy::of(&format!("mimo/{golden}"));
        copy.header(SHARD, |header| edit(&mut header[tensor]));
        refused(copy.open(), &[&[SHARD, tensor], parts].concat());
    }
    for (golden, tensor) in [
        (
            "flash-bf16-s1",
            "model.layers.1.self_attn.attention_sink_bias",
        ),
        ("flash-bf16-s1", "lm_head.weight"),
        (
            "flash-fp8-split-s1",
            "model.layers.0.self_attn.k_proj.weight_scale_inv",
        ),
        (
            "fused-mxfp4-s1",
            "model.layers.1.mlp.experts.7.down_proj.weight_scale",
        ),
        (
            "fused-mxfp4-s1",
            "model.layers.1.mlp.gate.e_score_correction_bias",
        ),
    ] {
        let copy = Copy::of(&format!("mimo/{golden}"));
        let other = format!("{tensor}.renamed");
        copy.header(SHARD, |header| {
            let info = header.remove(tensor).expect(tensor);
            header.insert(other.clone(), info);
        });
        copy.json(INDEX, |index| {
            let map = index["weight_map"].as_object_mut().unwrap();
            map.remove(tensor);
            map.insert(other, json!(SHARD));
        });
        refused(
            copy.open(),
            &[tensor, "expected the tensor, found no tensor"],
        );
    }
}

/// A scale that stands for no number is refused before weights are packed.
#[test]
fn scales_that_are_no_numbers() {
    let bad: [(&str, &str, &[u8], &str); 3] = [
        (
            "fused-mxfp4-s1",
            "weight_scale",
            &[0xFF],
            "0xFF (NaN in E8M0) at element 0",
        ),
        (
            "flash-fp8-split-s1",
            "weight_scale_inv",
            &[0, 0, 0xC0, 0x7F],
            "NaN at element 0",
        ),
        (
            "flash-fp8-split-s1",
            "weight_scale_inv",
            &[0, 0, 0x80, 0xFF],
            "-inf at element 0",
        ),
    ];
    for (golden, ending, bytes, part) in bad {
        let copy = Copy::of(&format!("mimo/{golden}"));
        let (header, mut data) = copy.shard(SHARD);
        let ending = format!(".{ending}");
        let (name, info) = header.iter().find(|(n, _)| n.ends_with(&ending)).unwrap();
        let at = info["data_offsets"][0].as_u64().unwrap() as usize;
        data[at..at + bytes.len()].copy_from_slice(bytes);
        copy.write_shard(SHARD, &Value::Object(header.clone()).to_string(), &data);
        refused(copy.open(), &[SHARD, name, "expected scales", part]);
    }
}

#[test]
fn index() {
    let case = "mimo/fused-mxfp4-bf16-router-s2";
    let name = "lm_head.weight";
    for file in [
        "../lm.safetensors",
        "/etc/passwd",
        "a/b",
        ".",
        "..",
        "",
        "x/",
        "./x",
    ] {
        let copy = Copy::of(case);
        copy.json(INDEX, |index| index["weight_map"][name] = json!(file));
        let found = format!("found {}", json!(file));
        refused(
            copy.open(),
            &[INDEX, name, "a file in the same directory", &found],
        );
    }
    for value in [json!(3), json!(null), json!(["x"])] {
        let copy = Copy::of(case);
        copy.json(INDEX, |index| index["weight_map"][name] = value);
        refused(copy.open(), &[INDEX, name, "expected", "found"]);
    }
    let copy = Copy::of(case);
    copy.json(INDEX, |index| {
        index["weight_map"][name] = json!("gone.safetensors")
    });
    refused(copy.open(), &["gone.safetensors", "cannot open"]);
    copy.json(INDEX, |index| {
        index["weight_map"][name] = json!("model_pp0_ep0_shard0.safetensors");
    });
    refused(copy.open(), &[INDEX, name, "expected it in", "found it in"]);
    copy.json(INDEX, |index| {
        let map = index["weight_map"].as_object_mut().unwrap();
        map.insert("model.extra".to_owned(), map["model.norm.weight"].clone());
    });
    refused(copy.open(), &[INDEX]);
    for value in [json!([]), json!("x")] {
        copy.json(INDEX, |index| index["weight_map"] = value);
        refused(
            copy.open(),
            &[INDEX, "weight_map", "expected an object, found"],
        );
    }
    for (text, part) in [
        (&b"{}"[..], "weight_map"),
        (b"[1]", "found a list"),
        (b"", "JSON"),
        (b"\xff", "UTF-8"),
    ] {
        fs::write(copy.path(INDEX), text).unwrap();
        refused(copy.open(), &[INDEX, "expected", "found", part]);
    }
    // The same tensor in two files.
    let copy = Copy::of(case);
    let from = copy.path("model_pp0_ep0_shard0.safetensors");
    fs::copy(from, copy.path("again.safetensors")).unwrap();
    copy.json(INDEX, |index| {
        index["weight_map"]["again"] = json!("again.safetensors")
    });
    refused(
        copy.open(),
        &["tensor `", "expected one tensor of this name"],
    );
}

#[test]
fn config_fields() {
    let huge = json!(18_446_744_073_709_551_615u64);
    let cases = [
        ("model_type", json!("llama"), "found \"llama\""),
        (
            "model_type",
            json!(["mimo_v2"]),
            "expected text, found a list",
        ),
        ("hidden_size", json!(0), "a whole number from 1"),
        ("hidden_size", json!(-64), "a whole number from 1"),
        ("hidden_size", json!(64.5), "a whole number from 1"),
        ("hidden_size", json!("64"), "found \"64\""),
        ("hidden_size", huge.clone(), "found 18446744073709551615"),
        ("vocab_size", huge.clone(), "a whole number from 1"),
        ("vocab_size", json!(0), "a whole number from 1"),
        ("num_hidden_layers", json!(1e18), "a whole number from 1"),
        ("num_hidden_layers", json!(4), "a list of 4 zeros and ones"),
        (
            "num_attention_heads",
            json!(7),
            "a divisor of the 7 query heads",
        ),
        ("num_attention_heads", huge.clone(), "a whole number from 1"),
        ("head_dim", json!(1u64 << 40), "a whole number from 1"),
        ("partial_rotary_factor", json!(1.5), "a number from 0 to 1"),
        ("partial_rotary_factor", json!(-0.5), "a number from 0 to 1"),
        (
            "partial_rotary_factor",
            json!(0.3),
            "an even number of the 24 columns",
        ),
        (
            "partial_rotary_factor",
            json!("half"),
            "a number from 0 to 1",
        ),
        ("rope_theta", json!(0), "a number above 0"),
        ("swa_rope_theta", json!(-1), "a number"),
        ("layernorm_epsilon", json!(1e300), "a number of at least 0"),
        ("hybrid_layer_pattern", json!([0, 1, 2]), "found 2"),
        ("hybrid_layer_pattern", json!([0, 1]), "found 2 entries"),
        ("hybrid_layer_pattern", json!(1), "found a number"),
        ("moe_layer_freq", json!(0), "a whole number from 1"),
        ("sliding_window_size", json!(0), "a whole number from 1"),
        ("n_routed_experts", json!(1e12), "a whole number from 1"),
        ("num_experts_per_tok", json!(9), "from 1 to 8"),
        ("hidden_act", json!("gelu"), "expected silu"),
        ("scoring_func", json!("softmax"), "expected sigmoid"),
        ("n_group", json!(2), "expected 1, found 2"),
        ("n_shared_experts", json!(1), "nothing or null"),
        ("rope_scaling", json!({"type": "yarn"}), "nothing or null"),
        ("attention_bias", json!(true), "expected false"),
        ("tie_word_embeddings", json!("no"), "true or false"),
        ("attention_projection_layout", json!("odd"), "fused_qkv"),
        ("max_position_embeddings", json!(0), "a whole number from 1"),
        // Fused tensors have a shard for each KV head of the full layers.
        (
            "swa_num_key_value_heads",
            json!(1),
            "the 2 shards of fused QKV",
        ),
        ("num_key_value_heads", json!(8), "the 8 shards of fused QKV"),
    ];
    for (field, value, part) in cases {
        let copy = Copy::of("mimo/fused-mxfp4-s1");
        copy.json("config.json", |config| {
            drop(config.insert(field.to_owned(), value))
        });
        refused(
            copy.open(),
            &["config.json: field `", "expected", "found", part],
        );
    }
    for field in [
        "model_type",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "intermediate_size",
        "n_routed_experts",
    ] {
        let copy = Copy::of("mimo/fused-mxfp4-s1");
        copy.json("config.json", |config| drop(config.remove(field)));
        refused(copy.open(), &["config.json", field, "expected", "missing"]);
    }
}

/// Configurations that are possible but not this checkpoint's: always an error that names a tensor,
/// with no overflow on the way.
#[test]
fn config_and_weights_that_do_not_fit() {
    let largest = 1u64 << 20;
    for (golden, field, value) in [
        ("fused-mxfp4-s1", "hidden_size", largest),
        ("fused-mxfp4-s1", "hidden_size", 65),
        ("fused-mxfp4-s1", "moe_intermediate_size", 33),
        ("fused-mxfp4-s1", "moe_intermediate_size", largest),
        ("fused-mxfp4-s1", "head_dim", 26),
        ("fused-mxfp4-s1", "head_dim", largest),
        ("fused-mxfp4-s1", "swa_head_dim", largest),
        ("fused-mxfp4-s1", "v_head_dim", largest),
        ("fused-mxfp4-s1", "num_attention_heads", largest),
        ("fused-mxfp4-s1", "vocab_size", largest),
        ("fused-mxfp4-s1", "n_routed_experts", 65_536),
        ("fused-mxfp4-s1", "num_key_value_heads", 1),
        ("fused-fp8-s1", "num_attention_heads", largest),
        ("flash-fp8-split-s1", "num_attention_heads", largest),
        ("flash-fp8-split-s1", "swa_num_key_value_heads", 1),
    ] {
        let copy = Copy::of(&format!("mimo/{golden}"));
        copy.json("config.json", |config| {
            config.insert("partial_rotary_factor".to_owned(), json!(0));
            config.insert(field.to_owned(), json!(value));
        });
        refused(copy.open(), &["tensor `", "expected", "found"]);
    }
}

#[test]
fn config_files() {
    let copy = Copy::of("mimo/flash-bf16-s1");
    let path = copy.path("config.json");
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    let cases: [(&[u8], &str); 6] = [
        (b"", "expected a JSON object"),
        (b"[1, 2]", "found a list"),
        (b"{\"model_type\": ", "not JSON"),
        (b"\x89PNG\r\n", "expected UTF-8 text, found byte 0x89 at 0"),
        (deep.as_bytes(), "recursion"),
        (&[b' '; (4 << 20) + 1], "expected at most 4194304 bytes"),
    ];
    for (content, part) in cases {
        fs::write(&path, content).unwrap();
        refused(copy.open(), &["config.json", part]);
    }
    fs::remove_file(&path).unwrap();
    refused(copy.open(), &["config.json", "cannot open"]);
    refused(
        Config::load(Path::new("/nowhere")),
        &["/nowhere/config.json"],
    );
}

/// Quoted values are cut, and control characters of names are escaped.
#[test]
fn errors_stay_readable() {
    let copy = Copy::of("mimo/flash-bf16-s1");
    copy.json("config.json", |config| {
        config.insert("hidden_act".to_owned(), json!("x".repeat(100_000)));
    });
    refused(copy.open(), &["hidden_act", "xxx..."]);
    let copy = Copy::of("mimo/flash-bf16-s1");
    copy.header(SHARD, |header| {
        header.insert("a\n\u{1b}[31m".to_owned(), json!({"dtype": "BF16"}));
    });
    refused(copy.open(), &[SHARD, "a\\n\\u{1b}[31m", "missing field"]);
}

fn draft(copy: &Copy, target: &Config) -> Result<(), ModelError> {
    let draft = Draft::open(copy.0.path(), target, DraftOptions::default())?;
    draft.weights().map(drop)
}

#[test]
fn drafters() {
    let target = Config::load(&golden("dflash/xiaomi-s1")).unwrap();
    draft(&Copy::of("dflash/xiaomi-s1/dflash"), &target).unwrap();
    let own: [(&str, Value, &str); 13] = [
        (
            "vocab_size",
            json!(129),
            "expected at most 128, the target's vocabulary, found 129",
        ),
        ("output_multiplier", json!(0.196), "nothing or 1.0"),
        ("input_embedding_scale", json!(2), "nothing or 1.0"),
        ("final_logit_softcapping", json!(20), "nothing or 0.0"),
        ("selector_rank", json!(256), "DFlash2 is not supported"),
        (
            "hidden_size",
            json!(32),
            "expected 64, the target's hidden size, found 32",
        ),
        (
            "target_hidden_size",
            json!(6144),
            "expected 64, the target's hidden size",
        ),
        (
            "num_target_layers",
            json!(70),
            "expected 3, the target's layers, found 70",
        ),
        (
            "num_key_value_heads",
            json!(3),
            "a divisor of the 4 query heads",
        ),
        ("num_hidden_layers", json!(0), "a whole number from 1"),
        ("partial_rotary_factor", json!(2), "a number from 0 to 1"),
        ("rope_scaling", json!({"factor": 4}), "nothing or null"),
        (
            "dflash_config",
            json!([]),
            "expected an object, found a list",
        ),
    ];
    for (field, value, part) in own {
        let copy = Copy::of("dflash/xiaomi-s1/dflash");
        copy.json("config.json", |config| {
            drop(config.insert(field.to_owned(), value))
        });
        refused(draft(&copy, &target), &["config.json", field, part]);
    }
    let inner = [
        (
            "target_layer_ids",
            json!([0, 3]),
            "below the target's 3, found [0, 3]",
        ),
        ("target_layer_ids", json!([2, 0]), "ascending"),
        ("target_layer_ids", json!([1, 1]), "ascending"),
        ("target_layer_ids", json!([]), "ascending"),
        (
            "target_layer_ids",
            json!([0, -1]),
            "a list of whole numbers",
        ),
        (
            "mask_token_id",
            json!(128),
            "below the target's vocabulary of 128",
        ),
        ("block_size", json!(1), "a whole number from 2 to 64"),
        ("block_size", json!(65), "a whole number from 2 to 64"),
        ("mask_token_id", json!(-1), "a whole number from 0"),
        ("mask_token_id", json!(null), "missing"),
        ("conv_kernel_size", json!(2), "DFlash2 is not supported"),
        ("swa_window_size", json!(0), "a whole number from 1"),
        ("use_swa", json!(1), "true or false"),
        (
            "attention_value_scale",
            json!("x"),
            "a number of at least 0",
        ),
    ];
    for (field, value, part) in inner {
        let copy = Copy::of("dflash/xiaomi-s1/dflash");
        copy.json("config.json", |config| {
            config["dflash_config"][field] = value
        });
        let field = format!("dflash_config.{field}");
        refused(draft(&copy, &target), &["config.json", &field, part]);
    }
    let copy = Copy::of("dflash/xiaomi-s1/dflash");
    copy.json("config.json", |config| {
        config["intermediate_size"] = json!(96)
    });
    refused(
        draft(&copy, &target),
        &[SHARD, "mlp.gate_proj.weight", "expected shape [96, 64]"],
    );
    let copy = Copy::of("dflash/zlab-causal-sliding-s1");
    let target = Config::load(&golden("mimo/flash-bf16-s1")).unwrap();
    for (value, part) in [
        (json!(["full_attention"]), "one a layer"),
        (json!(["full_attention", 3]), "a list of texts"),
        (
            json!(["odd", "odd", "odd"]),
            "full_attention or sliding_attention",
        ),
    ] {
        copy.json("config.json", |config| {
            config.insert("num_hidden_layers".to_owned(), json!(3));
            config.insert("layer_types".to_owned(), value);
        });
        refused(draft(&copy, &target), &["config.json", "layer_types", part]);
    }
}

/// Windows that the package would compute and we do not, and settings beside `dflash_config`.
#[test]
fn drafter_settings() {
    let target = Config::load(&golden("mimo/flash-bf16-s1")).unwrap();
    for (field, value, part) in [
        ("use_sliding_window", json!(false), "true, as `layer_types`"),
        ("use_sliding_window", Value::Null, "true, as `layer_types`"),
        ("is_causal", json!(true), "false, or no full layers"),
    ] {
        let copy = Copy::of("dflash/zlab-causal-sliding-s1");
        copy.json("config.json", |config| {
            config.insert(field.to_owned(), value);
        });
        refused(draft(&copy, &target), &["config.json", field, part]);
    }
    let copy = Copy::of("dflash/zlab-causal-sliding-s1");
    let open = || DraftConfig::load(copy.0.path(), &target, DraftOptions::default()).unwrap();
    let before = open();
    copy.json("config.json", |config| {
        let own = config.remove("dflash_config").unwrap();
        config.extend(own.as_object().unwrap().clone());
    });
    assert_eq!(open(), before);
    // Defaults of the package: block 16; taps round(1 + i (layers - 4) / (draft layers - 1)).
    copy.json("config.json", |config| {
        config.remove("block_size");
        config.remove("target_layer_ids");
        config.insert("num_hidden_layers".to_owned(), json!(1));
        config.insert("layer_types".to_owned(), json!(["full_attention"]));
    });
    let defaults = open();
    assert_eq!((defaults.block_size, defaults.taps), (16, vec![2]));
}

/// A zip of stored entries, with sizes in both headers that may lie.
fn zip(entries: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, data, claimed) in entries {
        let at = file.len() as u32;
        let mut fields = vec![20, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        fields.extend(crc32(data).to_le_bytes());
        fields.extend(claimed.to_le_bytes());
        fields.extend(claimed.to_le_bytes());
        fields.extend((name.len() as u16).to_le_bytes());
        fields.extend([0, 0]);
        file.extend([&b"PK\x03\x04"[..], &fields, name.as_bytes(), data].concat());
        directory.extend(b"PK\x01\x02\x14\0");
        directory.extend(fields);
        directory.extend([0; 10]);
        directory.extend(at.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (start, count) = (file.len() as u32, entries.len() as u16);
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0, 0]);
    file
}

fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn mask_embeddings() {
    let target = Config::load(&golden("dflash/xiaomi-s1")).unwrap();
    let copy = Copy::of("dflash/xiaomi-s1/dflash");
    let name = "mask_embedding.pt";
    let entry = "mask_embedding/data/0";
    let pickle = b"\x80\x02ctorch\nBFloat16Storage\nq\x05.".as_slice();
    let kind = ("mask_embedding/data.pkl", pickle, pickle.len() as u32);
    fs::write(copy.path(name), zip(&[kind, (entry, &[0; 128], 128)])).unwrap();
    draft(&copy, &target).unwrap();
    let many: Vec<(String, &[u8], u32)> = (0..300).map(|i| (format!("{i}"), &[][..], 0)).collect();
    let many: Vec<(&str, &[u8], u32)> = many.iter().map(|(n, d, l)| (n.as_str(), *d, *l)).collect();
    let good = fs::read(golden("dflash/xiaomi-s1/dflash").join(name)).unwrap();
    let pickled = |text: &'static [u8]| {
        let kind = ("mask_embedding/data.pkl", text, text.len() as u32);
        zip(&[kind, (entry, &[0; 128], 128)])
    };
    let cases = [
        (b"not a zip".to_vec(), "expected a zip archive"),
        (Vec::new(), "expected a zip archive"),
        (good[..good.len() - 30].to_vec(), "expected a zip archive"),
        (vec![0; 2 << 20], "expected at most 1048832 bytes"),
        (zip(&[]), "expected an entry `*/data.pkl`, found none"),
        (zip(&[kind]), "expected an entry `*/data/0`, found none"),
        (
            zip(&[kind, ("x/data/1", &[0; 128], 128)]),
            "expected an entry `*/data/0`",
        ),
        (
            zip(&[kind, (entry, &[0; 128], 128), ("x/data/0", &[0; 128], 128)]),
            "expected one entry `*/data/0`, found 2",
        ),
        (zip(&many), "at most 256 entries, found 300"),
        (
            zip(&[kind, (entry, &[0; 127], 127)]),
            "expected 128 bytes for 64 numbers, found 127",
        ),
        (
            zip(&[kind, (entry, &[], 0)]),
            "expected 128 bytes for 64 numbers, found 0",
        ),
        (
            zip(&[kind, (entry, &[0xff; 128], 128)]),
            "expected finite numbers",
        ),
        (
            zip(&[kind, (entry, &[0; 1 << 19], 1 << 19)]),
            "expected at most 256 bytes, found more",
        ),
        (
            zip(&[("x/byteorder", b"big", 3), kind, (entry, &[0; 128], 128)]),
            "expected little, found \"big\"",
        ),
        // As many bytes as BF16 has, but another type.
        (
            pickled(b"ctorch\nHalfStorage\n"),
            "BFloat16Storage or FloatStorage, found HalfStorage",
        ),
        (pickled(b"}"), "found no storage"),
        (
            pickled(b"X\x0d\0\0\0mask_token_idq\x01K\x05ctorch\nBFloat16Storage\n"),
            "mask_token_id: expected 118, as in config.json, found 5",
        ),
        // Sizes that lie, as in a zip bomb: no more is read than a mask embedding has.
        (zip(&[kind, (entry, &[0; 300], u32::MAX - 1)]), name),
    ];
    for (content, part) in cases {
        fs::write(copy.path(name), content).unwrap();
        refused(draft(&copy, &target), &[name, part]);
    }
    let mut deflated = zip(&[(entry, &[0; 128], 128), kind]);
    let directory = deflated
        .windows(4)
        .position(|w| w == b"PK\x01\x02")
        .unwrap();
    (deflated[8], deflated[directory + 10]) = (8, 8);
    fs::write(copy.path(name), deflated).unwrap();
    refused(draft(&copy, &target), &[name, entry]);
}
