"""Tiny random DFlash drafters in the released layouts, with draft logits by the reference package.

    python generate_dflash.py --seed N --out DIR --mimo MIMO_DIR [--sglang]

Owns: goldens/dflash (formats: README.md). Qwen3-style drafters are run by PyPI `dflash` 0.1.0 on taps of
the MiMo targets beside them (run by transformers). Xiaomi's variant is defined twice: `draft_numpy` here,
checked against `dflash` on what the two have in common, and, with `--sglang`, sglang 0.5.23's model code.
Each drafter's deliberate mistakes must move its logits, or generation fails.
"""

import argparse
import dataclasses
import json
import math
import pathlib

import numpy as np
import torch
from dflash.model import DFlashDraftModel, dflash_generate
from transformers import Qwen3Config

from generate_mimo import (
    Builder,
    Case,
    index_metadata,
    numbers,
    oracle,
    place,
    released_config,
    run,
    transformers_config,
)
from number_formats import Stored, normal, rng_for, write_checkpoint, write_safetensors

VISIBLE = 0.005  # mean |difference of logit| every mistake must reach; the limit of the tests is 1e-3


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


def qwen3_config(draft: Draft, target_layers: int, **changes) -> Qwen3Config:
    fields = dict(
        hidden_size=draft.hidden, intermediate_size=draft.inter, num_hidden_layers=draft.layers, vocab_size=8,
        num_attention_heads=draft.heads, num_key_value_heads=draft.kv, head_dim=draft.head_dim, rms_norm_eps=draft.eps,
        attention_bias=draft.bias, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": draft.theta},
    )
    if draft.layer_types:
        fields |= {"layer_types": list(draft.layer_types), "sliding_window": draft.window, "use_sliding_window": True}
    config = Qwen3Config(**(fields | {k: v for k, v in changes.items() if k in ("sliding_window", "rope_parameters")}))
    config.num_target_layers = target_layers
    config.block_size = draft.block
    config.dflash_config = {"target_layer_ids": list(draft.taps), "mask_token_id": draft.mask}
    is_causal = changes.get("is_causal", draft.is_causal)
    if is_causal is not None:
        config.is_causal = is_causal
    if draft.layer_types:
        assert config.sliding_window == changes.get("sliding_window", draft.window) and config.layer_types == list(draft.layer_types)
    return config


def reference_drafter(draft: Draft, weights: dict[str, Stored], target_layers: int, **changes) -> DFlashDraftModel:
    model = DFlashDraftModel(qwen3_config(draft, target_layers, **changes)).float().eval()
    state = {k: torch.from_numpy(v.value()) for k, v in weights.items() if "sink" not in k}
    model.load_state_dict(state, strict=True)
    return model


# ---- drafting, two ways --------------------------------------------------------------------------


@torch.no_grad()
def draft_reference(model, features: np.ndarray, block: np.ndarray, start: int, shift: int = 0) -> np.ndarray:
    """Final hidden rows [B, hidden] by PyPI dflash: `features` [start, taps * hidden] at positions
    0..start, `block` [B, hidden] embeddings at positions start.."""
    positions = torch.arange(start + len(block))[None]
    positions[:, start:] += shift
    rows = model(
        position_ids=positions, noise_embedding=torch.from_numpy(block)[None], target_hidden=torch.from_numpy(features[:start])[None]
    )
    return rows[0].numpy()


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x, positions, theta, dims):
    """x [n, heads, head_dim]: rotates pairs (i, i + dims / 2) of the first `dims`."""
    frequency = theta ** (-np.arange(0, dims, 2) / dims)
    angle = positions[:, None, None] * frequency
    a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest], -1)


def draft_numpy(draft: Draft, w: dict[str, np.ndarray], features: np.ndarray, block: np.ndarray, start: int, context_theta=None) -> np.ndarray:
    """The same in float64 numpy, with Xiaomi's additions; the plain definition."""
    d, dims = draft.head_dim, int(draft.head_dim * draft.rotary)
    context = rms_norm(features[:start] @ w["fc.weight"].T, w["hidden_norm.weight"], draft.eps)
    position = np.arange(start + len(block))
    types = draft.layer_types or ("sliding_attention" if draft.window else "full_attention",) * draft.layers
    x = block.astype(np.float64)
    for i in range(draft.layers):
        at = lambda name: w[f"layers.{i}.{name}"]
        bias = lambda part: w.get(f"layers.{i}.self_attn.{part}_proj.bias", 0.0)
        project = lambda part, rows: rows @ at(f"self_attn.{part}_proj.weight").T + bias(part)
        h = rms_norm(x, at("input_layernorm.weight"), draft.eps)
        both = np.concatenate([context, h])
        q = rms_norm(project("q", h).reshape(len(h), -1, d), at("self_attn.q_norm.weight"), draft.eps)
        k = rms_norm(project("k", both).reshape(len(both), -1, d), at("self_attn.k_norm.weight"), draft.eps)
        v = project("v", both).reshape(len(both), -1, d) * draft.value_scale
        q = rope(q, position[start:], draft.theta, dims)
        k = np.concatenate([rope(k[:start], position[:start], context_theta or draft.theta, dims), rope(k[start:], position[start:], draft.theta, dims)])
        visible = np.ones((len(h), len(both)), bool)
        delta = position[start:, None] - position[None, :]
        sliding = types[i] == "sliding_attention"
        if sliding:
            visible &= delta < draft.window
        if draft.is_causal if draft.is_causal is not None else sliding:
            visible &= delta >= 0
        elif sliding:
            visible &= -delta < draft.window
        out = np.zeros((len(h), draft.heads, d))
        for head in range(draft.heads):
            g = head // (draft.heads // draft.kv)
            score = np.where(visible, q[:, head] @ k[:, g].T / math.sqrt(d), -np.inf)
            sink = at("self_attn.attention_sink_bias")[head] if draft.xiaomi else -np.inf
            top = np.maximum(score.max(-1, keepdims=True), sink)
            e = np.exp(score - top)
            out[:, head] = (e / (e.sum(-1, keepdims=True) + np.exp(sink - top))) @ v[:, g]
        x = x + project("o", out.reshape(len(h), -1))
        h = rms_norm(x, at("post_attention_layernorm.weight"), draft.eps)
        gate = h @ at("mlp.gate_proj.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ at("mlp.up_proj.weight").T)) @ at("mlp.down_proj.weight").T
    return rms_norm(x, w["norm.weight"], draft.eps)


# ---- targets -------------------------------------------------------------------------------------


class Target:
    """A MiMo checkpoint rebuilt from its case and seed, and its transformers model."""

    def __init__(self, case: Case, seed: int, folder: pathlib.Path | None, dim_mask: int | None, tied: bool):
        self.case, self.folder = case, folder
        builder = Builder(case, seed)
        builder.build()
        embed = builder.plain["model.embed_tokens.weight"]
        if dim_mask is not None:  # as released: the mask token's row is all but zero
            embed[dim_mask] *= 1e-5
        builder.stored["model.embed_tokens.weight"] = Stored.bf16(embed)
        self.embed = builder.plain["model.embed_tokens.weight"] = builder.stored["model.embed_tokens.weight"].value()
        if tied:
            del builder.stored["lm_head.weight"]
            builder.plain["lm_head.weight"] = self.embed
        self.head = builder.plain["lm_head.weight"]
        self.model = oracle(case, builder.plain, transformers_config(case, case.window + 1))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(folder, place(case, builder.stored), index_metadata(case))
            config = released_config(case) | ({"tie_word_embeddings": True} if tied else {})
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def features(self, tokens: list[int], taps: tuple, offset: int = 0) -> np.ndarray:
        """[n, taps * hidden]: residual stream after layer i (i = -1: the embeddings)."""
        _, layers = run(self.model, tokens)
        states = [self.embed[tokens]] + layers
        return np.concatenate([states[t + 1 + offset] for t in taps], -1)


def open_target(draft: Draft, seed: int, mimo: pathlib.Path, out: pathlib.Path) -> tuple[Target, str]:
    if draft.target in TARGETS:
        folder = out / f"{draft.name}-s{seed}"
        mask = draft.mask if draft.xiaomi else None
        return Target(TARGETS[draft.target], seed, folder, mask, tied=draft.name == "pair"), "."
    from generate_mimo import CASES

    name, target_seed = draft.target.rsplit("-s", 1)
    case = next(c for c in CASES if c.name == name)
    target = Target(case, int(target_seed), None, None, tied=False)
    assert (mimo / draft.target / "config.json").exists(), mimo / draft.target
    return target, f"../../mimo/{draft.target}"


# ---- goldens -------------------------------------------------------------------------------------


def hidden_rows(draft, weights, plain, target, features, block, start, **how):
    if draft.xiaomi:
        return draft_numpy(draft, plain, features, block, start, **how)
    return draft_reference(reference_drafter(draft, weights, len(target.case.pattern)), features, block, start, **how)


def mistakes(draft: Draft, weights, plain, target: Target, tokens, mask_row, start: int):
    """Yields (label, final hidden rows) of a drafter with one thing wrong, at anchor `start`."""
    features = target.features(tokens, draft.taps)
    block = np.stack([target.embed[tokens[start]]] + [mask_row] * (draft.block - 1))
    layers = len(target.case.pattern)
    run_plain = lambda **changes: draft_numpy(dataclasses.replace(draft, **changes), plain, features, block, start)
    yield "taps one layer early", draft_numpy(draft, plain, target.features(tokens, draft.taps, -1), block, start)
    yield "context rows one position late", draft_numpy(draft, plain, np.roll(features, 1, axis=0), block, start)
    yield "causal inside the block", run_plain(is_causal=True)
    if draft.window:
        yield "window one short", run_plain(window=draft.window - 1)
        yield "window one long", run_plain(window=draft.window + 1)
        yield "no window", run_plain(layer_types=("full_attention",) * draft.layers, window=0)
    if draft.layer_types and draft.is_causal is None:
        yield "sliding layers not causal", run_plain(is_causal=False)
    if draft.bias:
        yield "no bias", draft_numpy(draft, {k: v * (not k.endswith("o_proj.bias")) for k, v in plain.items()}, features, block, start)
    yield "other theta", run_plain(theta=draft.theta * 50)
    yield "no q_norm weight", draft_numpy(draft, {k: (v * 0 + 1 if "q_norm" in k else v) for k, v in plain.items()}, features, block, start)
    other = np.stack([block[0]] + [target.embed[(draft.mask + 1) % len(target.embed)]] * (draft.block - 1))
    yield "another token's row for the mask", draft_numpy(draft, plain, features, other, start)
    if draft.xiaomi:
        zero = np.stack([block[0]] + [target.embed[draft.mask]] * (draft.block - 1))
        yield "the target's mask row, no mask_embedding.pt", draft_numpy(draft, plain, features, zero, start)
        yield "no sinks", draft_numpy(draft, {k: v - (1e9 if "sink" in k else 0) for k, v in plain.items()}, features, block, start)
        yield "no value scale", run_plain(value_scale=1.0)
        yield "all dims rotated", run_plain(rotary=1.0)
        yield "backbone base on the context's K", draft_numpy(draft, plain, features, block, start, context_theta=5e6)
        yield "final norm applied to the last tap", draft_numpy(draft, plain, normed_last(draft, target, tokens), block, start)


def normed_last(draft: Draft, target: Target, tokens) -> np.ndarray:
    features = target.features(tokens, draft.taps)
    weight = target.model.model.norm.weight.detach().numpy()
    last = rms_norm(features[:, -draft.hidden :], weight, target.case.eps)
    return np.concatenate([features[:, : -draft.hidden], last], -1)


def generate(draft: Draft, seed: int, mimo: pathlib.Path, out: pathlib.Path, with_sglang: bool) -> None:
    target, target_path = open_target(draft, seed, mimo, out)
    case = target.case
    folder = out / f"{draft.name}-s{seed}"
    home = folder / "dflash" if target_path == "." else folder
    home.mkdir(parents=True, exist_ok=True)
    weights = draft_weights(draft, seed)
    if draft.name == "pair":
        weights = fit(draft, weights, target, seed)
    plain = {k: v.value().astype(np.float64) for k, v in weights.items()}
    write_safetensors(home / "model.safetensors", weights)
    (home / "config.json").write_text(json.dumps(draft_config(draft, case, len(case.pattern)), indent=2) + "\n")
    mask_row = target.embed[draft.mask]
    if draft.xiaomi:
        stored = Stored.bf16(normal(seed, f"{draft.name}/mask", (draft.hidden,), 0.5))
        mask_row = stored.value()
        embedding = torch.from_numpy(mask_row.copy()).bfloat16()
        torch.save({"mask_token_id": draft.mask, "embedding": embedding}, home / "mask_embedding.pt")

    tokens = rng_for(seed, f"{draft.name}/tokens").integers(0, min(case.vocab, draft.mask), draft.length).tolist()
    features = target.features(tokens, draft.taps).astype(np.float32)
    tensors = {"taps": Stored.f32(features)}
    steps, weakest, agreement = [], {}, 0.0
    for number, start in enumerate(draft.anchors):
        width = draft.block if number != 1 else 3  # one narrower block: fewer tokens remain than a block holds
        block = np.stack([target.embed[tokens[start]]] + [mask_row] * (width - 1)).astype(np.float32)
        rows = hidden_rows(draft, weights, plain, target, features, block, start)
        again = draft_numpy(draft, plain, features, block, start)
        agreement = max(agreement, float(np.abs(rows - again).max()))
        if with_sglang and draft.xiaomi:
            from sglang_drafter import draft_sglang

            other = draft_sglang(draft_config(draft, case, len(case.pattern)), draft, weights, features, block, start)
            agreement = max(agreement, float(np.abs(rows - other).max()))
        logits = (rows @ target.head.T).astype(np.float32)
        tensors[f"step.{number}.hidden"] = Stored.f32(rows)
        tensors[f"step.{number}.logits"] = Stored.f32(logits[1:])
        steps.append({"anchor_position": start, "width": width, "draft_argmax": logits[1:].argmax(-1).tolist()})
        if start == max(draft.anchors):
            for label, wrong in mistakes(draft, weights, plain, target, tokens, mask_row, start):
                weakest[label] = float(f"{np.abs(wrong @ target.head.T - logits)[1:].mean():.4g}")
    assert agreement < 1e-4, (draft.name, agreement)
    assert min(weakest.values()) > VISIBLE, (draft.name, weakest)
    by = "numpy float64 in generate_dflash.py" + (" and sglang 0.5.23 model code (float32)" if with_sglang else "") if draft.xiaomi else "dflash 0.1.0 (float32)"
    record = {
        "case": draft.name, "why": draft.why, "seed": seed, "made_by": by, "target": target_path,
        "draft": "dflash" if target_path == "." else ".", "target_layer_ids": list(draft.taps), "mask_token_id": draft.mask,
        "block_size": draft.block, "token_ids": tokens, "steps": steps, "max_difference_between_definitions": float(f"{agreement:.2g}"), "sensitivity": weakest,
    }
    write_safetensors(folder / "expected.safetensors", tensors)
    if draft.name == "pair":
        record["greedy"] = greedy_records(draft, weights, target, seed)
    (folder / "expected.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder.name}: definitions differ by {agreement:.1e}, weakest mistake {min(weakest.items(), key=lambda kv: kv[1])}, {size} bytes", flush=True)


# ---- a drafter that is right now and then --------------------------------------------------------


def fit(draft: Draft, weights: dict[str, Stored], target: Target, seed: int) -> dict[str, Stored]:
    """Fits the pair's drafter briefly to the target's own greedy text, so that acceptance is neither
    1 nor the whole block. Only a fixture: the recipe is not the project's."""
    torch.manual_seed(seed)
    texts = [greedy(target, rng_for(seed, f"fit/{i}").integers(0, draft.mask, 1 + i % 12).tolist(), 40) for i in range(48)]
    features = [torch.from_numpy(target.features(t, draft.taps).astype(np.float32)) for t in texts]
    model = reference_drafter(draft, weights, len(target.case.pattern)).train()
    embed, head = torch.from_numpy(target.embed), torch.from_numpy(target.head)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    pick = rng_for(seed, "fit/anchors")
    for _ in range(700):
        i = int(pick.integers(len(texts)))
        start = int(pick.integers(1, len(texts[i]) - draft.block))
        block = torch.tensor([texts[i][start]] + [draft.mask] * (draft.block - 1))
        rows = model(position_ids=torch.arange(start + draft.block)[None], noise_embedding=embed[block][None], target_hidden=features[i][None, :start])
        wanted = torch.tensor(texts[i][start + 1 : start + draft.block])
        loss = torch.nn.functional.cross_entropy(rows[0, 1:] @ head.T, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: Stored.bf16(model.state_dict()[k].numpy()) for k in weights}


def greedy(target: Target, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(run(target.model, tokens)[0][-1].argmax()))
    return tokens


# ---- the whole loop, by the reference package ------------------------------------------------------


def greedy_records(draft: Draft, weights, target: Target, seed: int) -> list[dict]:
    """Greedy generation with drafting by `dflash_generate`, and without by argmax of full passes."""
    import dflash.model as reference

    reference._cuda_time = lambda: 0.0
    drafter = reference_drafter(draft, weights, len(target.case.pattern))
    drafter.block_size, drafter.mask_token_id = draft.block, draft.mask
    out = []
    for i, length in enumerate((1, 3, 7, 12, 20, 33)):
        prompt = rng_for(seed, f"pair/prompt/{i}").integers(0, draft.mask, length).tolist()
        result = dflash_generate(drafter, target.model, torch.tensor([prompt]), 48, None, return_stats=True)
        generated = result.output_ids[0, length:].tolist()
        plain = list(prompt)
        gap = math.inf
        for _ in range(48):
            logits = run(target.model, plain)[0][-1]
            top = np.sort(logits)
            gap = min(gap, float(top[-1] - top[-2]))
            plain.append(int(logits.argmax()))
        assert generated == plain[length:], (generated, plain[length:])
        out.append({"prompt": prompt, "generated": generated, "acceptance_lengths": result.acceptance_lengths, "smallest_top2_gap": float(f"{gap:.3g}")})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--mimo", type=pathlib.Path, required=True)
    parser.add_argument("--case", nargs="*", choices=[d.name for d in DRAFTS])
    parser.add_argument("--sglang", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for draft in DRAFTS:
        if not arguments.case or draft.name in arguments.case:
            generate(draft, arguments.seed, arguments.mimo, arguments.out, arguments.sglang)


if __name__ == "__main__":
    main()
