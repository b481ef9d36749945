//! config.json of the checkpoint: every field of MiMo-V2's, none left to a reader's default.

use formats::{fp8, mxfp4};
use serde_json::{Value, json};

use super::llama::Dense;
use super::{EXPERTS, Form};

/// config.json for these sizes and this form.
pub(super) fn config(dense: &Dense, form: Form) -> Value {
    let mut config = sizes(dense);
    let mut add = |part: Value| {
        if let (Value::Object(config), Value::Object(part)) = (&mut config, part) {
            config.extend(part);
        }
    };
    add(attention(dense));
    add(experts(dense, form));
    if form == Form::Mini {
        add(quantization());
    }
    config
}

fn sizes(dense: &Dense) -> Value {
    json!({
        "architectures": ["MiMoV2ForCausalLM"],
        "model_type": "mimo_v2",
        "vocab_size": dense.vocab,
        "hidden_size": dense.hidden,
        "num_hidden_layers": dense.layers,
        "layernorm_epsilon": shortest(dense.norm_eps as f32),
        "hidden_act": "silu",
        "intermediate_size": dense.intermediate,
        "tie_word_embeddings": true,
        "max_position_embeddings": dense.context,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    })
}

fn attention(dense: &Dense) -> Value {
    json!({
        "num_attention_heads": dense.heads,
        "num_key_value_heads": dense.kv_heads,
        "head_dim": dense.head_dim,
        "v_head_dim": dense.head_dim,
        "swa_num_attention_heads": dense.heads,
        "swa_num_key_value_heads": dense.kv_heads,
        "swa_head_dim": dense.head_dim,
        "swa_v_head_dim": dense.head_dim,
        "hybrid_layer_pattern": vec![0; dense.layers],
        "sliding_window": 128,
        "sliding_window_size": 128,
        "add_swa_attention_sink_bias": false,
        "add_full_attention_sink_bias": false,
        "partial_rotary_factor": 1.0,
        "rope_theta": dense.rope_theta,
        "swa_rope_theta": dense.rope_theta,
        "attention_value_scale": 1.0,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "attention_projection_layout": "split",
    })
}

fn experts(dense: &Dense, form: Form) -> Value {
    json!({
        "moe_layer_freq": vec![u8::from(form != Form::Dense); dense.layers],
        "moe_intermediate_size": dense.intermediate / EXPERTS,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS,
        "n_shared_experts": null,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": true,
        "routed_scaling_factor": null,
        "moe_router_dtype": if form == Form::Mini { "bfloat16" } else { "float32" },
    })
}

fn quantization() -> Value {
    json!({"quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [fp8::BLOCK, fp8::BLOCK],
        "ignored_layers": [],
        "store_dtype": "mxfp4",
        "mxfp4_block_size": mxfp4::BLOCK,
    }})
}

/// The f64 that prints like the f32 does: GGUF's 9.999999747378752e-06 is 1e-5.
fn shortest(x: f32) -> Value {
    x.to_string()
        .parse::<f64>()
        .map_or(Value::Null, Value::from)
}
