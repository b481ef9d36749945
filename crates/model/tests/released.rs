//! The released configurations as mimo-v2.md A.1 and dflash.md C.3 and C.4 give them (fixtures in
//! `released/`, written from there), and the released 1T layout without its data: sparse files with
//! real headers, as large as the release.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use model::config::{AttentionConfig, FfnConfig, MoeConfig};
use model::draft::{DraftConfig, DraftOptions, DraftWindow};
use model::weights::{Encoding, FfnWeights, Matrix, Row};
use model::{Checkpoint, Config, Weights};
use serde_json::{Map, Value, json};

fn text(name: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/released");
    std::fs::read_to_string(dir.join(format!("{name}.json"))).unwrap()
}

fn released(name: &str) -> Config {
    Config::from_json(&text(name)).unwrap()
}

fn full_layers(config: &Config) -> Vec<usize> {
    let layers = config.layers.iter().enumerate();
    layers
        .filter(|(_, layer)| layer.attention.window.is_none())
        .map(|(i, _)| i)
        .collect()
}

/// Every resolved field of a layer, from the table's columns.
fn check_layers(config: &Config, heads: usize, kv: [usize; 2], theta: f32, scale: f32) {
    for layer in &config.layers {
        let sliding = layer.attention.window.is_some();
        let expected = AttentionConfig {
            heads,
            kv_heads: kv[usize::from(sliding)],
            qk_dim: 192,
            v_dim: 128,
            rope_dims: 64,
            rope_theta: if sliding { 10_000.0 } else { theta },
            window: sliding.then_some(128),
            sinks: sliding,
            value_scale: scale,
        };
        assert_eq!(layer.attention, expected);
    }
}

fn check_ffn(config: &Config, experts: usize) {
    let dense = FfnConfig::Dense {
        intermediate: 16384,
    };
    let moe = FfnConfig::Moe(MoeConfig {
        experts,
        active: 8,
        intermediate: 2048,
        norm_topk: true,
        scaling: 1.0,
    });
    assert_eq!(config.layers[0].ffn, dense);
    assert!(config.layers[1..].iter().all(|layer| layer.ffn == moe));
}

#[test]
fn mimo_v2_flash() {
    let config = released("mimo_v2_flash");
    assert_eq!(config.model_type, "mimo_v2_flash");
    assert_eq!((config.vocab_size, config.hidden), (152_576, 4096));
    assert_eq!((config.layers.len(), config.context_tokens), (48, 262_144));
    assert_eq!((config.eps, config.tie_word_embeddings), (1e-5, false));
    assert_eq!((config.fused_qkv, config.qkv_shards), (false, 4));
    assert_eq!(full_layers(&config), [0, 5, 11, 17, 23, 29, 35, 41, 47]);
    check_layers(&config, 64, [4, 8], 5e6, 0.707);
    check_ffn(&config, 256);
}

#[test]
fn mimo_v2_5_pro() {
    let config = released("mimo_v2_5_pro");
    assert_eq!(config.model_type, "mimo_v2");
    assert_eq!((config.vocab_size, config.hidden), (152_576, 6144));
    let (layers, context) = (config.layers.len(), config.context_tokens);
    assert_eq!((layers, context), (70, 1_048_576));
    assert_eq!((config.eps, config.tie_word_embeddings), (1e-5, false));
    assert_eq!((config.fused_qkv, config.qkv_shards), (true, 8));
    let full = [0, 7, 15, 23, 31, 39, 47, 55, 62, 69];
    assert_eq!(full_layers(&config), full);
    check_layers(&config, 128, [8, 8], 1e7, 0.612);
    check_ffn(&config, 384);
    assert_eq!(config, released("mimo_v2_5_pro_fp4"));
}

#[test]
fn mimo_v2_6_flash() {
    let config = released("mimo_v2_6_flash");
    assert_eq!((config.vocab_size, config.hidden), (152_576, 4096));
    let (layers, context) = (config.layers.len(), config.context_tokens);
    assert_eq!((layers, context), (48, 1_048_576));
    assert_eq!((config.eps, config.tie_word_embeddings), (1e-6, false));
    assert_eq!((config.fused_qkv, config.qkv_shards), (true, 4));
    assert_eq!(full_layers(&config), [0, 5, 11, 17, 23, 29, 35, 41, 47]);
    check_layers(&config, 64, [4, 8], 1e7, 0.707);
    check_ffn(&config, 256);
}

fn drafter(name: &str, target: &Config) -> DraftConfig {
    DraftConfig::from_json(&text(name), target, DraftOptions::default()).unwrap()
}

#[test]
fn mimo_drafters() {
    let pro = drafter("draft_mimo_v2_5_pro", &released("mimo_v2_5_pro_fp4"));
    let attention = AttentionConfig {
        heads: 128,
        kv_heads: 8,
        qk_dim: 128,
        v_dim: 128,
        rope_dims: 64,
        rope_theta: 10_000.0,
        window: None,
        sinks: true,
        value_scale: 0.612,
    };
    let expected = DraftConfig {
        block_size: 8,
        hidden: 6144,
        intermediate: 16384,
        eps: 1e-5,
        taps: vec![0, 15, 31, 47, 69],
        mask_token: 151_669,
        biases: false,
        attention: attention.clone(),
        // `backbone_rotary_base` (5e6) is a stale field: dflash.md C.3.
        context_rope_theta: 10_000.0,
        layers: vec![DraftWindow::Symmetric(1024); 5],
    };
    assert_eq!(pro, expected);
    let flash = drafter("draft_mimo_v2_6_flash", &released("mimo_v2_6_flash"));
    let expected = DraftConfig {
        hidden: 4096,
        eps: 1e-6,
        taps: vec![0, 11, 23, 35, 47],
        mask_token: 151_675,
        attention: AttentionConfig {
            heads: 64,
            ..attention
        },
        ..expected
    };
    assert_eq!(flash, expected);
    let options = DraftOptions {
        context_rope_theta: Some(5e6),
    };
    let text = text("draft_mimo_v2_5_pro");
    let other = DraftConfig::from_json(&text, &released("mimo_v2_5_pro"), options).unwrap();
    assert_eq!(other.context_rope_theta, 5e6);
    assert_eq!(other.attention.rope_theta, 10_000.0);
}

/// z-lab's are for targets of other families: one of that size in MiMo's words stands in.
fn stand_in() -> Config {
    let mut target: Value = serde_json::from_str(&text("mimo_v2_flash")).unwrap();
    target["num_hidden_layers"] = json!(36);
    target["hybrid_layer_pattern"] = json!(vec![0; 36]);
    target["moe_layer_freq"] = json!(vec![0; 36]);
    target["vocab_size"] = json!(151_936);
    Config::from_json(&target.to_string()).unwrap()
}

#[test]
fn zlab_drafters() {
    let qwen = drafter("draft_qwen3_8b", &stand_in());
    let expected = DraftConfig {
        block_size: 16,
        hidden: 4096,
        intermediate: 12288,
        eps: 1e-6,
        taps: vec![1, 9, 17, 25, 33],
        mask_token: 151_669,
        biases: false,
        attention: AttentionConfig {
            heads: 32,
            kv_heads: 8,
            qk_dim: 128,
            v_dim: 128,
            rope_dims: 128,
            rope_theta: 1e6,
            window: None,
            sinks: false,
            value_scale: 1.0,
        },
        context_rope_theta: 1e6,
        layers: vec![DraftWindow::Full; 5],
    };
    assert_eq!(qwen, expected);
    // In the style of gpt-oss's drafters: biases, sliding layers that are causal as nothing says
    // otherwise.
    let biases = drafter("draft_biases", &stand_in());
    let mut windows = vec![DraftWindow::Causal(2048); 4];
    windows.push(DraftWindow::Full);
    assert_eq!((biases.biases, biases.layers), (true, windows));
    assert_eq!((biases.block_size, biases.attention.qk_dim), (10, 64));
}

/// A tensor of the inventory: name, dtype, bytes an element, shape.
type Stored = (String, &'static str, u64, Vec<u64>);

const HIDDEN: u64 = 6144;
const QKV_ROWS: u64 = 27136;

fn fp8(out: &mut Vec<Stored>, stem: &str, shape: [u64; 2], scale_rows: u64) {
    out.push((format!("{stem}.weight"), "F8_E4M3", 1, shape.to_vec()));
    let scales = vec![scale_rows, shape[1].div_ceil(128)];
    out.push((format!("{stem}.weight_scale_inv"), "F32", 4, scales));
}

fn swiglu(out: &mut Vec<Stored>, prefix: &str, intermediate: u64) {
    let rows = intermediate / 128;
    fp8(
        out,
        &format!("{prefix}.gate_proj"),
        [intermediate, HIDDEN],
        rows,
    );
    fp8(
        out,
        &format!("{prefix}.up_proj"),
        [intermediate, HIDDEN],
        rows,
    );
    fp8(
        out,
        &format!("{prefix}.down_proj"),
        [HIDDEN, intermediate],
        48,
    );
}

fn bf16(name: String, shape: &[u64]) -> Stored {
    (name, "BF16", 2, shape.to_vec())
}

fn attention(out: &mut Vec<Stored>, layer: &str, sinks: bool) {
    fp8(
        out,
        &format!("{layer}.self_attn.qkv_proj"),
        [QKV_ROWS, HIDDEN],
        216,
    );
    out.push(bf16(
        format!("{layer}.self_attn.o_proj.weight"),
        &[HIDDEN, 16384],
    ));
    if sinks {
        out.push(bf16(
            format!("{layer}.self_attn.attention_sink_bias"),
            &[128],
        ));
    }
}

/// The tensors of MiMo-V2.5-Pro in FP8 (mimo-v2.md A.3), one list a file.
fn pro_inventory() -> Vec<Vec<Stored>> {
    let full = [0, 7, 15, 23, 31, 39, 47, 55, 62, 69];
    let mut files = vec![Vec::new(); 10];
    let out = &mut files[8];
    for name in ["model.embed_tokens", "lm_head"] {
        out.push(bf16(format!("{name}.weight"), &[152_576, HIDDEN]));
    }
    out.push(bf16("model.norm.weight".to_owned(), &[HIDDEN]));
    for i in 0..70 {
        let layer = format!("model.layers.{i}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            out.push(bf16(format!("{layer}.{norm}.weight"), &[HIDDEN]));
        }
        attention(out, &layer, !full.contains(&i));
        if i > 0 {
            let gate = format!("{layer}.mlp.gate");
            out.push((format!("{gate}.weight"), "F32", 4, vec![384, HIDDEN]));
            out.push((
                format!("{gate}.e_score_correction_bias"),
                "F32",
                4,
                vec![384],
            ));
        }
    }
    swiglu(out, "model.layers.0.mlp", 16384);
    for (i, e) in (1..70).flat_map(|i| (0..384).map(move |e| (i, e))) {
        let prefix = format!("model.layers.{i}.mlp.experts.{e}");
        swiglu(&mut files[e % 8], &prefix, 2048);
    }
    for i in 0..3 {
        let layer = format!("model.mtp.layers.{i}");
        let out = &mut files[9];
        out.push(bf16(
            format!("{layer}.eh_proj.weight"),
            &[HIDDEN, 2 * HIDDEN],
        ));
        for norm in [
            "enorm",
            "hnorm",
            "input_layernorm",
            "pre_mlp_layernorm",
            "final_layernorm",
        ] {
            out.push(bf16(format!("{layer}.{norm}.weight"), &[HIDDEN]));
        }
        attention(out, &layer, true);
        swiglu(out, &format!("{layer}.mlp"), 16384);
    }
    files
}

/// Writes files with these tensors and no data; calls `mark(file, name, start)` for each tensor.
fn write_sparse(dir: &Path, files: &[Vec<Stored>], mark: impl Fn(&File, &str, u64)) {
    let mut map = Map::new();
    for (n, tensors) in files.iter().enumerate() {
        let name = format!("model_{n}.safetensors");
        let (mut header, mut end) = (Map::new(), 0);
        for (tensor, dtype, size, shape) in tensors {
            let start = end;
            end += size * shape.iter().product::<u64>();
            let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            header.insert(tensor.clone(), info);
            map.insert(tensor.clone(), name.clone().into());
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = File::create(dir.join(&name)).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes())
            .unwrap();
        file.write_all(&header).unwrap();
        let (data, mut start) = (8 + header.len() as u64, 0);
        file.set_len(data + end).unwrap();
        for (tensor, _, size, shape) in tensors {
            mark(&file, tensor, data + start);
            start += size * shape.iter().product::<u64>();
        }
    }
    let index = json!({"metadata": {"tp_size": 8}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Stored rows at the edges of Q, K and V in each of the 8 shards of 3392 rows, and around the
/// block of rows 3200..3328, which straddles K and V.
fn marked_rows() -> Vec<u64> {
    let in_shard = [0, 3071, 3072, 3199, 3200, 3263, 3264, 3327, 3328, 3391];
    (0..8)
        .flat_map(|shard| in_shard.map(|row| shard * 3392 + row))
        .collect()
}

/// The first code bytes of a marked row spell its number; scale row s of the grid holds s + 1.
fn mark_qkv(file: &File, tensor: &str, start: u64) {
    match tensor {
        "model.layers.1.self_attn.qkv_proj.weight" => {
            for row in marked_rows() {
                let number = (row as u32).to_le_bytes();
                file.write_all_at(&number, start + row * HIDDEN).unwrap();
            }
        }
        "model.layers.1.self_attn.qkv_proj.weight_scale_inv" => {
            let scales = (0..216 * 48).map(|i| (i / 48 + 1) as f32);
            let bytes: Vec<u8> = scales.flat_map(f32::to_le_bytes).collect();
            file.write_all_at(&bytes, start).unwrap();
        }
        _ => {}
    }
}

/// The number that marks row `row` of `matrix`, and its scale row.
fn stored_place(matrix: &Matrix<'_>, row: usize) -> (u32, u32) {
    let Row::Fp8 { codes, scales } = matrix.row(row) else {
        panic!("FP8");
    };
    assert_eq!((codes.len(), scales.len()), (6144, 48 * 4));
    let number = u32::from_le_bytes(codes[..4].try_into().unwrap());
    let scale = f32::from_le_bytes(scales[..4].try_into().unwrap());
    (number, scale as u32 - 1)
}

/// 962 GiB in 159,581 tensors open without being read, count to the element, and the fused QKV
/// rows are where A.4 says.
#[test]
fn mimo_v2_5_pro_layout() {
    let files = pro_inventory();
    let tensors = files.iter().flatten();
    let elements = |shape: &[u64]| shape.iter().product::<u64>();
    assert_eq!(files.iter().map(Vec::len).sum::<usize>(), 159_581);
    let total: u64 = tensors.map(|(.., shape)| elements(shape)).sum();
    assert_eq!(total, 1_023_244_718_976);

    let dir = tempfile::tempdir().unwrap();
    write_sparse(dir.path(), &files, mark_qkv);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().count(), 159_581);
    let gib = checkpoint.bytes() as f64 / f64::from(1 << 30);
    assert_eq!(format!("{gib:.2}"), "962.40");
    let config = released("mimo_v2_5_pro");
    let weights = Weights::new(&config, &checkpoint).unwrap();

    let layer = &weights.layers[1];
    assert_eq!(layer.q.encoding(), Encoding::Fp8);
    assert_eq!(
        (layer.q.rows, layer.k.rows, layer.v.rows),
        (24576, 1536, 1024)
    );
    for shard in 0..8 {
        // Logical row of the part, stored row in the shard, scale row in the shard.
        let places = [
            (&layer.q, 3072, [(0, 0, 0), (3071, 3071, 23)].as_slice()),
            (
                &layer.k,
                192,
                &[
                    (0, 3072, 24),
                    (127, 3199, 24),
                    (128, 3200, 25),
                    (191, 3263, 25),
                ],
            ),
            (
                &layer.v,
                128,
                &[
                    (0, 3264, 25),
                    (63, 3327, 25),
                    (64, 3328, 26),
                    (127, 3391, 26),
                ],
            ),
        ];
        for (matrix, rows, places) in places {
            for (row, stored, scale) in places {
                let found = stored_place(matrix, shard * rows + row);
                let shard = shard as u32;
                assert_eq!(found, (shard * 3392 + stored, shard * 27 + scale));
            }
        }
    }
    let FfnWeights::Moe {
        router, experts, ..
    } = &layer.ffn
    else {
        panic!("routed");
    };
    assert_eq!((router.encoding(), experts.len()), (Encoding::F32, 384));
}
