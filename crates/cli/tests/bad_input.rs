//! Input that cannot be used: exit code 2, one line that names what and where, nothing on standard
//! output, never a panic.

mod kilotok;

use std::fs;
use std::path::{Path, PathBuf};

use kilotok::{Output, golden, run, run_with};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of a golden checkpoint, to be damaged.
struct Copy {
    dir: TempDir,
}

impl Copy {
    fn of(case: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(golden(&format!("mimo/{case}"))).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with("expected.json") {
                fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The first shard.
    fn shard(&self) -> PathBuf {
        let mut shards: Vec<PathBuf> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        shards.sort();
        shards.swap_remove(0)
    }

    fn edit_config(&self, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let path = self.path("config.json");
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(config.as_object_mut().unwrap());
        fs::write(&path, config.to_string()).unwrap();
    }

    /// Rewrites the header of the first shard that has a tensor whose name contains `tensor`.
    fn edit_header(&self, tensor: &str, edit: impl FnOnce(&mut Value)) {
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|e| e != "safetensors") {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
            let name = header
                .as_object()
                .unwrap()
                .keys()
                .find(|name| name.contains(tensor))
                .cloned();
            let Some(name) = name else { continue };
            edit(&mut header[&name]);
            let text = header.to_string();
            let mut out = (text.len() as u64).to_le_bytes().to_vec();
            out.extend(text.as_bytes());
            out.extend(&bytes[8 + length..]);
            return fs::write(&path, out).unwrap();
        }
        panic!("no tensor {tensor}");
    }

    fn score(&self) -> Output {
        run(&[
            "score",
            "--model",
            self.dir.path().to_str().unwrap(),
            "--token-ids",
            "1,2,3",
            "--device",
            "reference",
        ])
    }
}

/// Exit code 2, one line with all of these parts.
fn refused(output: &Output, parts: &[&str]) {
    assert_eq!(output.code, 2, "{output:?}");
    assert_eq!(output.stdout, "", "{output:?}");
    let line = output.stderr.trim_end();
    assert!(
        line.starts_with("kilotok: ") && line.lines().count() == 1,
        "{output:?}"
    );
    for part in parts {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
}

#[test]
fn shards() {
    let copy = Copy::of("flash-bf16-s1");
    let shard = copy.shard();
    let name = shard.file_name().unwrap().to_str().unwrap();
    let bytes = fs::read(&shard).unwrap();
    fs::remove_file(&shard).unwrap();
    refused(&copy.score(), &[name, "cannot open"]);
    for length in [0, 7, 100, bytes.len() - 1] {
        fs::write(&shard, &bytes[..length]).unwrap();
        refused(&copy.score(), &[name]);
    }
    let mut long = bytes.clone();
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&shard, &long).unwrap();
    refused(&copy.score(), &[name]);
    long[..8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    fs::write(&shard, &long).unwrap();
    refused(&copy.score(), &[name]);
}

#[test]
fn headers() {
    let tensor = "layers.0.self_attn.q_proj.weight";
    type Edit = fn(&mut Value);
    let damage: [(&str, Edit); 4] = [
        ("offsets out of range", |t| {
            t["data_offsets"] = json!([0, 1u64 << 60])
        }),
        ("overlapping offsets", |t| {
            t["data_offsets"] = json!([0, 16])
        }),
        ("wrong shape", |t| {
            t["shape"] = json!([t["shape"][1], t["shape"][0]])
        }),
        ("wrong dtype", |t| t["dtype"] = json!("I16")),
    ];
    for (what, edit) in damage {
        let copy = Copy::of("flash-bf16-s1");
        copy.edit_header(tensor, edit);
        let output = copy.score();
        refused(&output, &[".safetensors"]);
        if what == "wrong shape" || what == "wrong dtype" {
            refused(&output, &[tensor, "expected", "found"]);
        }
    }
}

#[test]
fn index() {
    let copy = Copy::of("fused-fp8-s1");
    let path = copy.path("model.safetensors.index.json");
    let index: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let name = index["weight_map"]
        .as_object()
        .unwrap()
        .keys()
        .find(|n| n.ends_with("scale_inv"))
        .unwrap()
        .clone();
    let mut damaged = index.clone();
    damaged["weight_map"][&name] = "../elsewhere.safetensors".into();
    fs::write(&path, damaged.to_string()).unwrap();
    refused(&copy.score(), &["index.json", &name, "expected", "found"]);
    fs::write(&path, "{").unwrap();
    refused(&copy.score(), &["index.json"]);
    fs::write(&path, [0xff, 0xfe]).unwrap();
    refused(&copy.score(), &["index.json", "UTF-8"]);
}

#[test]
fn missing_scale() {
    let copy = Copy::of("fused-fp8-s1");
    let tensor = "experts.0.up_proj.weight_scale_inv";
    let path = copy.path("model.safetensors.index.json");
    fs::remove_file(&path).unwrap();
    // One file with everything but the scale.
    let mut views: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for entry in fs::read_dir(copy.dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = fs::read(&path).unwrap();
            for (name, view) in safetensors::SafeTensors::deserialize(&bytes)
                .unwrap()
                .tensors()
            {
                if !name.ends_with(tensor) {
                    views.push((
                        name,
                        view.dtype(),
                        view.shape().to_vec(),
                        view.data().to_vec(),
                    ));
                }
            }
        }
    }
    let tensors = views.iter().map(|(name, dtype, shape, data)| {
        (
            name,
            safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap(),
        )
    });
    let bytes = safetensors::serialize(tensors, None).unwrap();
    fs::write(copy.path("model.safetensors"), bytes).unwrap();
    refused(&copy.score(), &[tensor, "expected", "found"]);
}

#[test]
fn config() {
    let copy = Copy::of("flash-bf16-s1");
    copy.edit_config(|config| config["model_type"] = "llama".into());
    refused(&copy.score(), &["config.json", "model_type", "llama"]);
    let copy = Copy::of("flash-bf16-s1");
    copy.edit_config(|config| {
        config.remove("hidden_size");
    });
    refused(&copy.score(), &["config.json", "hidden_size", "missing"]);
    fs::remove_file(copy.path("config.json")).unwrap();
    refused(&copy.score(), &["config.json"]);
    refused(
        &run(&["score", "--model", "/nowhere", "--token-ids", "1"]),
        &["/nowhere"],
    );
}

#[test]
fn damaged_weights() {
    let copy = Copy::of("flash-bf16-s1");
    for entry in fs::read_dir(copy.dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let mut bytes = fs::read(&path).unwrap();
            let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[data..].fill(0xff);
            fs::write(&path, bytes).unwrap();
        }
    }
    let model = copy.dir.path().to_str().unwrap();
    for (device, _) in kilotok::DEVICES {
        for command in ["score", "generate"] {
            let arguments = [
                command,
                "--model",
                model,
                "--token-ids",
                "1,2",
                "--device",
                device,
            ];
            refused(
                &run(&[&arguments[..], &["--json"]].concat()),
                &["not finite"],
            );
        }
    }
}

#[test]
fn tokens_and_prompts() {
    let model = golden("mimo/fallbacks-bf16-s1");
    let score = |ids: &str| {
        run(&[
            "score",
            "--model",
            &model,
            "--device",
            "reference",
            "--token-ids",
            ids,
        ])
    };
    refused(&score("1,2,97"), &["token 97", "97"]);
    let generate = |more: &[&str], stdin: &[u8]| {
        run_with(
            &[
                &["generate", "--model", &model, "--device", "reference"],
                more,
            ]
            .concat(),
            stdin,
        )
    };
    refused(&generate(&["--token-ids", "1,97"], b""), &["97"]);
    refused(
        &generate(&["--token-ids", "1,2,3,4,5", "--max-model-len", "4"], b""),
        &["5", "4"],
    );
    refused(&generate(&[""], b""), &["empty prompt"]);
    refused(&generate(&[], b" \n"), &["empty prompt"]);
    refused(
        &generate(&[], b"ab\xffcd"),
        &["standard input", "UTF-8", "0xff at 2"],
    );
    refused(&generate(&["--file", "/nowhere"], b""), &["/nowhere"]);
    refused(&generate(&["hello"], b""), &["tokenizer.json"]);
    refused(
        &generate(&["--token-ids", "1", "--trace", "/nowhere/x"], b""),
        &["/nowhere/x"],
    );
    refused(
        &generate(&["--token-ids", "1", "--draft", "/nowhere"], b""),
        &["--draft /nowhere"],
    );
    refused(
        &generate(&["--token-ids", "1", "--kv", "fp8"], b""),
        &["--kv fp8", "--device cuda", "--device reference"],
    );
    refused(
        &generate(&["--token-ids", "1", "--activations", "wide"], b""),
        &["--activations wide", "--device cuda", "--device reference"],
    );
    let bench = ["bench", "decode", "--model", &model, "--kv", "fp8"];
    refused(&run(&bench), &["--kv fp8", "--device cpu"]);
    let bench = ["bench", "decode", "--model", &model, "--timeline", "x.svg"];
    refused(&run(&bench), &["--timeline", "--device cpu"]);
    let bench = ["bench", "decode", "--model", &model, "--only-experts"];
    refused(&run(&bench), &["--only-experts", "--device cpu"]);
    let bench = ["bench", "decode", "--device", "cuda", "--gpus"];
    refused(&run(&bench), &["--gpus", "--load dummy", "checkpoint"]);
}

#[test]
fn tokenizer_that_does_not_fit() {
    let copy = Copy::of("fallbacks-bf16-s1");
    let tokenizer = golden("tokenizer/mimo_subset_tokenizer.json");
    fs::copy(Path::new(&tokenizer), copy.path("tokenizer.json")).unwrap();
    let model = copy.dir.path().to_str().unwrap();
    let output = run(&[
        "generate",
        "--model",
        model,
        "--device",
        "reference",
        "--raw",
        "Hello",
    ]);
    refused(&output, &["tokenizer.json", "vocab_size 97"]);
}

#[test]
fn wrong_flags_say_how_to_get_help() {
    let output = run(&["generate", "--temperature", "hot", "hi"]);
    assert_eq!(output.code, 2);
    assert!(output.stderr.contains("--temperature") && output.stderr.contains("--help"));
}
