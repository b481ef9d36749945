"""The MiMo-V2 layouts that the goldens cover, their config.json, and the oracle's configuration."""

import dataclasses

from transformers import MiMoV2FlashConfig


@dataclasses.dataclass
class Case:
    """One layout. Shapes are rows x columns; `kv` and `swa_kv` count KV heads of full and sliding layers."""

    name: str
    why: str
    model_type: str = "mimo_v2"
    fused: bool = True
    attention: str = "fp8"  # bf16 | fp8
    experts: str = "fp8"  # bf16 | fp8 | mxfp4
    hidden: int = 64
    heads: int = 8
    kv: int = 2
    swa_kv: int = 2
    head_dim: int = 24
    v_head_dim: int = 16
    pattern: tuple = (0, 1, 1, 0)  # 0 full, 1 sliding
    moe: tuple = (0, 1, 1, 1)
    inter: int = 96
    moe_inter: int = 32
    n_experts: int = 8
    top_k: int = 3
    vocab: int = 128
    window: int = 128
    theta: float = 1e7
    eps: float = 1e-5
    value_scale: float = 0.612
    bf16_router: bool = False
    embed_std: float = 0.5
    scatter: bool = False  # spread weights and scales over different files
    fallbacks: bool = False  # leave out the fields that have documented fallbacks
    score_std: float = 2.0
    sink_mean: float = 4.0
    lengths: tuple = (200, 23, 2)

    @property
    def shards(self) -> int:
        """Head shards of the checkpoint (its tp_size)."""
        return self.kv

    def kv_heads(self, layer: int) -> int:
        return self.swa_kv if self.pattern[layer] else self.kv


CASES = [
    Case(
        "flash-bf16",
        "mimo_v2_flash, split Q/K/V, BF16, true window of 128, 2 and 4 KV heads",
        model_type="mimo_v2_flash", fused=False, attention="bf16", experts="bf16",
        heads=4, kv=1, swa_kv=2, moe_inter=16, inter=64, theta=5e6, value_scale=0.707,
        pattern=(0, 1, 1, 0), moe=(0, 1, 1, 1), score_std=3.0, lengths=(200, 131, 23, 2),
    ),
    Case(
        "flash-fp8-split",
        "split Q/K/V in FP8, real head dims 192 and 128: 192 K rows a shard make 2 scale rows (4 in all, not ceil(384/128) = 3)",
        model_type="mimo_v2_flash", fused=False, experts="fp8", hidden=32, heads=4, kv=2, swa_kv=4, head_dim=192, v_head_dim=128,
        pattern=(0, 1), moe=(0, 1), n_experts=4, top_k=2, window=8, theta=5e6, value_scale=0.707, sink_mean=2.0,
        lengths=(40, 9),
    ),
    Case(
        "fused-fp8",
        "fused QKV in FP8, Pro style (equal KV heads), 136 rows a shard: 2 scale rows each, V split by a block edge; ragged columns; scattered files; tensors to ignore",
        experts="fp8", hidden=160, pattern=(0, 1), moe=(0, 1), n_experts=4, top_k=2, inter=64, window=16,
        scatter=True, sink_mean=2.0, lengths=(60, 7),
    ),
    Case(
        "fused-mxfp4",
        "fused QKV in FP8, routed experts MXFP4, F32 router, true window of 128",
        experts="mxfp4", pattern=(0, 1, 1), moe=(0, 1, 1), score_std=4.0, lengths=(200, 11),
    ),
    Case(
        "fused-mxfp4-bf16-router",
        "V2.6-Flash style: 2 and 4 KV heads (176 rows a sliding shard: K split by a block edge), BF16 router, eps 1e-6, small embeddings, unaligned data section",
        experts="mxfp4", swa_kv=4, bf16_router=True, eps=1e-6, embed_std=0.01, pattern=(0, 1, 0), moe=(0, 1, 1),
        window=8, value_scale=0.707, scatter=True, sink_mean=2.0, lengths=(64, 10),
    ),
    Case(
        "fallbacks-bf16",
        "4 KV heads on full and 2 on sliding layers; hybrid_block_size and an integer moe_layer_freq in place of the lists; value scale null",
        model_type="mimo_v2_flash", fused=False, attention="bf16", experts="bf16", hidden=48, kv=4, swa_kv=2, head_dim=18, v_head_dim=10,
        pattern=(1, 0, 1, 0), moe=(1, 0, 1, 0), inter=80, moe_inter=24, n_experts=5, top_k=2, vocab=97, window=5, value_scale=1.0,
        theta=1e6, fallbacks=True, sink_mean=2.0, lengths=(48, 6),
    ),
]


# ---- configuration -------------------------------------------------------------------------


def released_config(case: Case) -> dict:
    layers = len(case.pattern)
    flash = case.model_type == "mimo_v2_flash"
    config = {
        "architectures": ["MiMoV2FlashForCausalLM" if flash else "MiMoV2ForCausalLM"],
        "model_type": case.model_type,
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": case.heads,
        "swa_num_attention_heads": case.heads,
        "num_key_value_heads": case.kv,
        "swa_num_key_value_heads": case.swa_kv,
        "head_dim": case.head_dim,
        "swa_head_dim": case.head_dim,
        "v_head_dim": case.v_head_dim,
        "swa_v_head_dim": case.v_head_dim,
        "hybrid_layer_pattern": list(case.pattern),
        "sliding_window": case.window,
        "sliding_window_size": case.window,
        "attention_chunk_size": case.window,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "partial_rotary_factor": 0.334,
        "rope_theta": case.theta,
        "swa_rope_theta": 10000,
        "attention_value_scale": case.value_scale,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "layernorm_epsilon": case.eps,
        "hidden_act": "silu",
        "intermediate_size": case.inter,
        "moe_intermediate_size": case.moe_inter,
        "moe_layer_freq": list(case.moe),
        "n_routed_experts": case.n_experts,
        "n_shared_experts": None,
        "num_experts_per_tok": case.top_k,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
    }
    if case.fused:
        config["attention_projection_layout"] = "fused_qkv"
    if case.bf16_router:
        config["moe_router_dtype"] = "bfloat16"
    if case.attention == "fp8":
        config["quantization_config"] = quantization_config(case, layers)
    if case.fallbacks:
        del config["hybrid_layer_pattern"]
        config["attention_value_scale"] = None
        config["hybrid_block_size"] = 2
        config["moe_layer_freq"] = 2
    return config


def quantization_config(case: Case, layers: int) -> dict:
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(layers)]
        + ["model.decoder.self_attn.o_proj"],
    }
    if case.experts == "mxfp4":
        quantization |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    return quantization


def transformers_config(case: Case, window_keys: int) -> MiMoV2FlashConfig:
    rope = {"rope_type": "default", "partial_rotary_factor": 0.334}
    config = MiMoV2FlashConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.inter,
        num_hidden_layers=len(case.pattern),
        num_attention_heads=case.heads,
        num_key_value_heads=oracle_kv_heads(case),
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        max_position_embeddings=4096,
        rms_norm_eps=case.eps,
        rope_parameters={
            "full_attention": {**rope, "rope_theta": case.theta},
            "sliding_attention": {**rope, "rope_theta": 1e4},
        },
        moe_intermediate_size=case.moe_inter,
        num_experts_per_tok=case.top_k,
        n_routed_experts=case.n_experts,
        norm_topk_prob=True,
        routed_scaling_factor=None,
        layer_types=["sliding_attention" if p else "full_attention" for p in case.pattern],
        mlp_layer_types=["sparse" if m else "dense" for m in case.moe],
        attention_value_scale=case.value_scale,
        sliding_window=window_keys,
        attn_implementation="eager",
    )
    assert config.sliding_window == window_keys
    return config


def oracle_kv_heads(case: Case) -> int:
    """transformers fixes the KV heads of sliding layers at twice those of full layers. Heads are
    repeated to reach such a pair; under grouped-query attention that changes nothing."""
    for count in range(case.kv, case.heads + 1, case.kv):
        if (2 * count) % case.swa_kv == 0 and case.heads % (2 * count) == 0:
            return count
    raise ValueError(case)
