"""The DFlash drafters that the goldens cover: weights, config.json, and the reference package's model."""

import dataclasses
import math

import torch
from dflash.model import DFlashDraftModel
from transformers import Qwen3Config

from mimo_cases import Case
from number_formats import Stored, normal


@dataclasses.dataclass
class Draft:
    """One drafter. `window` 0 means full attention in every layer."""

    name: str
    why: str
    target: str  # folder under --mimo, or the name of a case in TARGETS
    taps: tuple
    mask: int
    xiaomi: bool = False
    hidden: int = 64
    heads: int = 4
    kv: int = 2
    head_dim: int = 16
    inter: int = 64
    layers: int = 2
    block: int = 8
    layer_types: tuple | None = None
    window: int = 0
    is_causal: bool | None = None
    bias: bool = False
    theta: float = 1e6
    eps: float = 1e-6
    rotary: float = 1.0
    value_scale: float = 1.0
    length: int = 40
    anchors: tuple = (1, 9, 24, 39)


TARGETS = {
    "xiaomi-target": Case(
        "xiaomi-target", "fused FP8 + MXFP4 target with `dflash/` beside it", experts="mxfp4", heads=4,
        pattern=(0, 1, 0), moe=(0, 1, 1), n_experts=4, top_k=2, inter=64, window=16, sink_mean=2.0,
    ),
    "pair-target": Case(
        "pair-target", "16-token vocabulary, tied embedding", model_type="mimo_v2_flash", fused=False, attention="bf16",
        experts="bf16", hidden=32, heads=4, kv=1, swa_kv=2, head_dim=12, v_head_dim=8, pattern=(0, 1, 0, 1), moe=(0, 1, 1, 0),
        inter=48, moe_inter=16, n_experts=4, top_k=2, vocab=16, window=8, embed_std=0.3, sink_mean=2.0,
    ),
}
DRAFTS = [
    Draft("zlab-full", "Qwen3 style, full non-causal attention, no layer_types, block 16", "flash-bf16-s1", taps=(0, 1, 2), mask=127, block=16),
    Draft(
        "zlab-causal-sliding", "sliding layers without `is_causal` are causal, the full layer is not; biases on q, k, v and o",
        "flash-bf16-s1", taps=(1, 3), mask=126, layers=3, layer_types=("sliding_attention", "full_attention", "sliding_attention"), window=6, bias=True, theta=1e7,
    ),
    Draft(
        "zlab-noncausal-sliding", "`is_causal` false: symmetric window, visible iff |q - k| < W",
        "flash-bf16-s1", taps=(0, 2), mask=125, layer_types=("sliding_attention", "sliding_attention"), window=6, is_causal=False, eps=1e-5,
    ),
    Draft(
        "xiaomi", "Xiaomi's: symmetric window, sinks, value scale, half the dims rotated, mask_embedding.pt, last tap = last layer",
        "xiaomi-target", taps=(0, 2), mask=118, xiaomi=True, window=12, is_causal=False, theta=1e4, eps=1e-5, rotary=0.5, value_scale=0.612,
    ),
    Draft(
        "pair", "drafter of the 16-token pair", "pair-target", taps=(0, 2), mask=15, hidden=32, head_dim=8, inter=32, layers=1, block=8, theta=1e4,
    ),
]


# ---- drafter weights and configuration -----------------------------------------------------------


def draft_weights(draft: Draft, seed: int) -> dict[str, Stored]:
    """Every tensor of a drafter in the released names, BF16."""
    out = {}

    def add(name, shape, std, mean=0.0):
        out[name] = Stored.bf16(normal(seed, f"{draft.name}/{name}", shape, std, mean))

    h, wide = draft.hidden, draft.heads * draft.head_dim
    kv = draft.kv * draft.head_dim
    add("fc.weight", (h, h * len(draft.taps)), 1 / math.sqrt(h * len(draft.taps)))
    add("hidden_norm.weight", (h,), 0.2, 1.0)
    add("norm.weight", (h,), 0.2, 1.0)
    for i in range(draft.layers):
        p = f"layers.{i}"
        add(f"{p}.input_layernorm.weight", (h,), 0.2, 1.0)
        add(f"{p}.post_attention_layernorm.weight", (h,), 0.2, 1.0)
        for part, rows, cols, std in (("q", wide, h, 1.0), ("k", kv, h, 1.0), ("v", kv, h, 1.5), ("o", h, wide, 1.5)):
            add(f"{p}.self_attn.{part}_proj.weight", (rows, cols), std / math.sqrt(cols))
            if draft.bias:
                add(f"{p}.self_attn.{part}_proj.bias", (rows,), 0.5)
        add(f"{p}.self_attn.q_norm.weight", (draft.head_dim,), 0.3, 1.3)
        add(f"{p}.self_attn.k_norm.weight", (draft.head_dim,), 0.3, 1.3)
        if draft.xiaomi:
            add(f"{p}.self_attn.attention_sink_bias", (draft.heads,), 1.0, 2.0)
        add(f"{p}.mlp.gate_proj.weight", (draft.inter, h), 1.2 / math.sqrt(h))
        add(f"{p}.mlp.up_proj.weight", (draft.inter, h), 1.2 / math.sqrt(h))
        add(f"{p}.mlp.down_proj.weight", (h, draft.inter), 1.5 / math.sqrt(draft.inter))
    return out


def draft_config(draft: Draft, target: Case, target_layers: int) -> dict:
    config = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "hidden_size": draft.hidden,
        "intermediate_size": draft.inter,
        "num_hidden_layers": draft.layers,
        "num_attention_heads": draft.heads,
        "num_key_value_heads": draft.kv,
        "head_dim": draft.head_dim,
        "block_size": draft.block,
        "num_target_layers": target_layers,
        "vocab_size": target.vocab,
        "max_position_embeddings": 4096,
        "rope_theta": draft.theta,
        "rms_norm_eps": draft.eps,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": draft.bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dflash_config": {"target_layer_ids": list(draft.taps), "mask_token_id": draft.mask},
    }
    if draft.layer_types:
        config |= {"layer_types": list(draft.layer_types), "use_sliding_window": True, "sliding_window": draft.window}
    if draft.is_causal is not None and not draft.xiaomi:
        config["is_causal"] = draft.is_causal
    if draft.xiaomi:
        config |= {
            "v_head_dim": draft.head_dim,
            "partial_rotary_factor": draft.rotary,
            "sliding_window": draft.window,
            "vocab_size": target.vocab - 8,  # smaller than the target's, as released; the target's counts
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        config["dflash_config"] |= {
            "num_anchors": 4096,
            "block_size": draft.block,
            "loss_decay_gamma": 7.0,
            "use_swa": True,
            "swa_window_size": draft.window,
            "backbone_rotary_base": 5000000,
            "attention_value_scale": draft.value_scale,
            "attention_sink_bias": True,
        }
    return config


def qwen3_config(draft: Draft, target_layers: int) -> Qwen3Config:
    fields = dict(
        hidden_size=draft.hidden, intermediate_size=draft.inter, num_hidden_layers=draft.layers, vocab_size=8,
        num_attention_heads=draft.heads, num_key_value_heads=draft.kv, head_dim=draft.head_dim, rms_norm_eps=draft.eps,
        attention_bias=draft.bias, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": draft.theta},
    )
    if draft.layer_types:
        fields |= {"layer_types": list(draft.layer_types), "sliding_window": draft.window, "use_sliding_window": True}
    config = Qwen3Config(**fields)
    config.num_target_layers = target_layers
    config.block_size = draft.block
    config.dflash_config = {"target_layer_ids": list(draft.taps), "mask_token_id": draft.mask}
    if draft.is_causal is not None:
        config.is_causal = draft.is_causal
    if draft.layer_types:
        assert config.sliding_window == draft.window and config.layer_types == list(draft.layer_types)
    return config


def reference_drafter(draft: Draft, weights: dict[str, Stored], target_layers: int) -> DFlashDraftModel:
    model = DFlashDraftModel(qwen3_config(draft, target_layers)).float().eval()
    state = {k: torch.from_numpy(v.value()) for k, v in weights.items() if "sink" not in k}
    model.load_state_dict(state, strict=True)
    return model
