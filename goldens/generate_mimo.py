"""Tiny random MiMo-V2 checkpoints in the released layouts, with log-probabilities by transformers.

    python generate_mimo.py --seed N --out DIR [--case NAME ...] [--sensitivity]

Owns: the checkpoints and `expected.json` under goldens/mimo (file formats: README.md beside this).
The weights that transformers 5.23 (`mimo_v2_flash`, float32, eager attention) sees are decoded from
the stored bytes by number_formats.py and de-interleaved here; nothing of the crates is used.
`--sensitivity` also writes how far each deliberate mistake moves the log-probabilities, and fails
when one does not: a golden that cannot fail proves nothing.
"""

import argparse
import copy
import dataclasses
import json
import math
import pathlib

import numpy as np
import torch
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from number_formats import (
    Stored,
    fp8_block_decode,
    fp8_block_encode,
    mxfp4_decode,
    mxfp4_encode,
    normal,
    rng_for,
    write_checkpoint,
)

VISIBLE = 3e-3  # mean |difference of log-probability| that every mistake must reach; the limit of the tests is 1e-3


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


# ---- weights -------------------------------------------------------------------------------


class Builder:
    """Makes stored tensors and, next to them, the f32 values they stand for."""

    def __init__(self, case: Case, seed: int):
        self.case, self.seed = case, seed
        self.stored: dict[str, Stored] = {}
        self.plain: dict[str, np.ndarray] = {}
        self.mistakes: dict[str, dict[str, np.ndarray]] = {}

    def draw(self, name: str, shape, std: float, mean: float = 0.0) -> np.ndarray:
        return normal(self.seed, f"{self.case.name}/{name}", shape, std, mean)

    def rng(self, name: str):
        return rng_for(self.seed, f"{self.case.name}/{name}/gain")

    def keep(self, name: str, tensor: Stored) -> None:
        self.stored[name] = tensor
        self.plain[name] = tensor.value()

    def matrix(self, name: str, x: np.ndarray, kind: str, shard_rows: int | None = None) -> np.ndarray:
        """Stores `NAME.weight` (and its scale) as `kind`; returns the decoded values."""
        if kind == "bf16":
            stored = Stored.bf16(x)
            self.stored[f"{name}.weight"] = stored
            return stored.value()
        if kind == "mxfp4":
            gains = np.exp2(self.rng(name).uniform(-1.5, 1.5, (x.shape[0], x.shape[1] // 32)))
            packed, scale = mxfp4_encode(x * np.repeat(gains, 32, axis=1).astype(np.float32))
            self.stored[f"{name}.weight"] = Stored("U8", packed)
            self.stored[f"{name}.weight_scale"] = Stored("U8", scale)
            self.mistake("nibbles swapped", name, mxfp4_decode((packed >> 4) | (packed << 4), scale))
            self.mistake("scale exponent off by one", name, mxfp4_decode(packed, scale - 1))
            return mxfp4_decode(packed, scale)
        shard_rows = shard_rows or x.shape[0]
        codes, scales = fp8_block_encode(x, shard_rows, self.rng(name))
        self.stored[f"{name}.weight"] = Stored("F8_E4M3", codes)
        self.stored[f"{name}.weight_scale_inv"] = Stored("F32", scales)
        flat_rows = -(-x.shape[0] // 128)
        if flat_rows != scales.shape[0]:
            self.mistake("scale grid not restarted", name, fp8_block_decode(codes, scales[:flat_rows], x.shape[0]))
        return fp8_block_decode(codes, scales, shard_rows)

    def mistake(self, label: str, name: str, value: np.ndarray) -> None:
        self.mistakes.setdefault(label, {})[name] = value

    def attention(self, i: int) -> None:
        case, p = self.case, f"model.layers.{i}.self_attn"
        kv = case.kv_heads(i)
        a = math.sqrt(case.score_std) / math.sqrt(case.hidden)
        q = self.draw(f"{p}.q", (case.heads * case.head_dim, case.hidden), a)
        k = self.draw(f"{p}.k", (kv * case.head_dim, case.hidden), a)
        v = self.draw(f"{p}.v", (kv * case.v_head_dim, case.hidden), 1.5 / math.sqrt(case.hidden))
        if case.fused:
            self.fused_qkv(p, q, k, v, kv)
        else:
            for part, x in (("q", q), ("k", k), ("v", v)):
                rows = x.shape[0] // case.shards
                self.plain[f"{p}.{part}_proj.weight"] = self.matrix(f"{p}.{part}_proj", x, case.attention, rows)
        width = case.heads * case.v_head_dim
        o = self.draw(f"{p}.o", (case.hidden, width), 2.0 / math.sqrt(width))
        self.plain[f"{p}.o_proj.weight"] = self.matrix(f"{p}.o_proj", o, "bf16")
        if case.pattern[i]:
            sinks = self.draw(f"{p}.sink", (case.heads,), 1.5, case.sink_mean)
            self.keep(f"{p}.attention_sink_bias", Stored.bf16(sinks))

    def fused_qkv(self, p: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, kv: int) -> None:
        """Shard r is [Q_r | K_r | V_r]; the scale grid restarts with each shard."""
        case = self.case
        parts = [x.reshape(case.shards, -1, case.hidden) for x in (q, k, v)]
        rows = [x.shape[1] for x in parts]
        fused = np.concatenate(parts, axis=1).reshape(-1, case.hidden)
        name = f"{p}.qkv_proj"
        decoded = self.matrix(name, fused, case.attention, sum(rows))
        wrong = self.mistakes.get("scale grid not restarted", {}).pop(name, None)
        self.plain |= self.split_shards(p, decoded, rows)
        if wrong is not None:
            for key, x in self.split_shards(p, wrong, rows).items():
                self.mistake("scale grid not restarted", key, x)
        flat = np.split(decoded, np.cumsum([len(q), len(k)]))
        for part, x in zip("qkv", flat):
            self.mistake("fused rows read as [Q|K|V]", f"{p}.{part}_proj.weight", x)

    def split_shards(self, p: str, fused: np.ndarray, rows: list[int]) -> dict[str, np.ndarray]:
        shards = fused.reshape(self.case.shards, sum(rows), self.case.hidden)
        parts = np.split(shards, np.cumsum(rows)[:2], axis=1)
        return {f"{p}.{n}_proj.weight": x.reshape(-1, self.case.hidden) for n, x in zip("qkv", parts)}

    def swiglu(self, p: str, inter: int, kind: str) -> None:
        hidden = self.case.hidden
        for part, shape in (("down", (hidden, inter)), ("gate", (inter, hidden)), ("up", (inter, hidden))):
            std = (2.0 if part == "down" else 1.2) / math.sqrt(shape[1])
            name = f"{p}.{part}_proj"
            self.plain[f"{name}.weight"] = self.matrix(name, self.draw(name, shape, std), kind)

    def mlp(self, i: int) -> None:
        case, p = self.case, f"model.layers.{i}.mlp"
        if not case.moe[i]:
            self.swiglu(p, case.inter, case.attention)
            return
        router = self.draw(f"{p}.gate", (case.n_experts, case.hidden), 1.3 / math.sqrt(case.hidden))
        self.keep(f"{p}.gate.weight", Stored.bf16(router) if case.bf16_router else Stored.f32(router))
        self.keep(f"{p}.gate.e_score_correction_bias", Stored.f32(self.draw(f"{p}.bias", (case.n_experts,), 0.15)))
        for e in range(case.n_experts):
            self.swiglu(f"{p}.experts.{e}", case.moe_inter, case.experts)

    def build(self) -> None:
        case = self.case
        self.keep("model.embed_tokens.weight", Stored.bf16(self.draw("embed", (case.vocab, case.hidden), case.embed_std)))
        for i in range(len(case.pattern)):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                name = f"model.layers.{i}.{norm}.weight"
                self.keep(name, Stored.bf16(self.draw(name, (case.hidden,), 0.2, 1.0)))
            self.attention(i)
            self.mlp(i)
        self.keep("model.norm.weight", Stored.bf16(self.draw("norm", (case.hidden,), 0.2, 1.0)))
        head = self.draw("lm_head", (case.vocab, case.hidden), 2.0 / math.sqrt(case.hidden))
        self.keep("lm_head.weight", Stored.bf16(head))


# ---- files ---------------------------------------------------------------------------------


def place(case: Case, stored: dict[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Which file holds which tensor. Scattered: three files, scales never beside their weights."""
    if not case.scatter:
        return {"model.safetensors": stored}
    names = [f"model_pp0_ep{r}_shard0.safetensors" for r in range(3)]
    files: dict[str, dict[str, Stored]] = {name: {} for name in names}
    for i, (name, tensor) in enumerate(stored.items()):
        # A scale follows its weight in the list, so counting alone moves it to the next file.
        files[names[i % 3]][name] = tensor
    files["model_mtp.safetensors"] = {
        "model.mtp.layers.0.enorm.weight": Stored.bf16(np.ones(case.hidden, np.float32)),
        "visual.patch_embed.weight": Stored.bf16(np.ones((3, 5), np.float32)),
    }
    return files


def index_metadata(case: Case) -> dict:
    metadata = {"tp_size": case.shards} if case.fused else {}
    return metadata | ({"save_format": "mxfp4"} if case.experts == "mxfp4" else {})


# ---- the oracle ----------------------------------------------------------------------------


def oracle(case: Case, plain: dict[str, np.ndarray], config: MiMoV2FlashConfig) -> MiMoV2FlashForCausalLM:
    """transformers' model in float32 with the decoded weights; every parameter is set, none is left over."""
    model = MiMoV2FlashForCausalLM(config).float().eval()
    state = {}
    for name, parameter in model.state_dict().items():
        state[name] = torch.from_numpy(oracle_tensor(case, plain, name)).reshape(parameter.shape)
    model.load_state_dict(state, strict=True)
    return model


def oracle_tensor(case: Case, plain: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name.endswith("self_attn.sinks"):
        return plain[name.replace("sinks", "attention_sink_bias")]
    if ".mlp.experts." in name:
        p = name.rsplit(".", 1)[0]
        read = lambda e, part: plain[f"{p}.{e}.{part}_proj.weight"]
        if name.endswith("gate_up_proj"):
            return np.stack([np.concatenate([read(e, "gate"), read(e, "up")]) for e in range(case.n_experts)])
        return np.stack([read(e, "down") for e in range(case.n_experts)])
    if name.endswith((".k_proj.weight", ".v_proj.weight")):
        layer = int(name.split(".")[2])
        have = case.kv_heads(layer)
        want = oracle_kv_heads(case) * (2 if case.pattern[layer] else 1)
        dim = case.head_dim if ".k_proj." in name else case.v_head_dim
        return np.repeat(plain[name].reshape(have, dim, case.hidden), want // have, axis=0)
    return plain[name]


@torch.no_grad()
def run(model, tokens: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """logits [n, vocab] f32 and the residual stream after every layer, [n, hidden] each."""
    outputs, hooks = [], []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out)))
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return logits, [x.reshape(len(tokens), -1).numpy() for x in outputs]


def logprobs(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    x = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return x[np.arange(len(tokens) - 1), tokens[1:]]


def numbers(x: np.ndarray) -> list[float]:
    return [float(f"{v:.8g}") for v in np.asarray(x, np.float64).ravel()]


def sequence_record(model, tokens: list[int]) -> dict:
    logits, layers = run(model, tokens)
    n = len(tokens)
    top = np.sort(logits, axis=-1)
    rows = sorted({0, n // 2, n - 1})
    return {
        "token_ids": tokens,
        "next_token_logprobs": numbers(logprobs(logits, tokens)),
        "argmax": logits.argmax(-1).tolist(),
        "top2_gap": numbers(top[:, -1] - top[:, -2]),
        "logits": [{"position": p, "values": numbers(logits[p])} for p in rows],
        "layer_outputs_last": [numbers(x[-1]) for x in layers],
    }


def tokens_for(case: Case, seed: int, index: int, length: int) -> list[int]:
    return rng_for(seed, f"{case.name}/tokens/{index}").integers(0, case.vocab, length).tolist()


# ---- how far mistakes move the numbers ---------------------------------------------------------


def mistakes(case: Case, builder: Builder):
    """Yields (label, plain weights, config): each is one mistake that an implementation could make."""
    keys = case.window + 1

    def weights(change):
        plain = dict(builder.plain)
        for name in plain:
            new = change(name, plain[name])
            if new is not None:
                plain[name] = new
        return plain

    def config(**fields):
        new = transformers_config(case, keys)
        for field, value in fields.items():
            setattr(new, field, value)
        return new

    right = lambda: transformers_config(case, keys)
    of = lambda suffix, f: lambda name, x: f(x) if name.endswith(suffix) else None
    rope = right().rope_parameters
    yield "no sinks", weights(of("attention_sink_bias", lambda x: x * 0 - 1e9)), right()
    yield "sinks scaled by 1/sqrt(head_dim)", weights(of("attention_sink_bias", lambda x: x / np.float32(math.sqrt(case.head_dim)))), right()
    yield "window one key short", builder.plain, transformers_config(case, keys - 1)
    yield "window one key long", builder.plain, transformers_config(case, keys + 1)
    if case.value_scale != 1.0:
        yield "no value scale", builder.plain, config(attention_value_scale=1.0)
    for label, layer_type, theta in (("full", "full_attention", 1e4), ("sliding", "sliding_attention", case.theta)):
        wrong = copy.deepcopy(rope)
        wrong[layer_type]["rope_theta"] = theta
        yield f"theta of the other kind on {label} layers", builder.plain, config(rope_parameters=wrong)
    wrong = copy.deepcopy(rope)
    for part in wrong.values():
        part["partial_rotary_factor"] = 1.0
    yield "all dims rotated", builder.plain, config(rope_parameters=wrong)
    yield "no correction bias", weights(of("e_score_correction_bias", lambda x: x * 0)), right()
    yield "no renormalisation", builder.plain, config(norm_topk_prob=False)
    yield "one expert fewer", builder.plain, config(num_experts_per_tok=case.top_k - 1)
    if case.embed_std < 0.1:
        yield "epsilon ten times larger", builder.plain, config(rms_norm_eps=case.eps * 10)
    for label, values in builder.mistakes.items():
        named = {k if k.endswith(".weight") else f"{k}.weight": v for k, v in values.items()}
        yield label, {**builder.plain, **named}, right()


def sensitivity(case: Case, builder: Builder, sequences: list[dict]) -> dict[str, float]:
    """Mean |difference| of the log-probabilities of the longest sequence, per mistake."""
    tokens = sequences[0]["token_ids"]
    expected = np.array(sequences[0]["next_token_logprobs"])
    table = {}
    for label, plain, config in mistakes(case, builder):
        logits, _ = run(oracle(case, plain, config), tokens)
        table[label] = float(f"{np.abs(logprobs(logits, tokens) - expected).mean():.4g}")
    weak = {k: v for k, v in table.items() if v < VISIBLE}
    assert not weak, f"{case.name}: not visible: {weak}"
    return table


# ---- main ----------------------------------------------------------------------------------


def generate(case: Case, seed: int, out: pathlib.Path, with_sensitivity: bool) -> None:
    builder = Builder(case, seed)
    builder.build()
    folder = out / f"{case.name}-s{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    unpadded = ("model_pp0_ep1_shard0.safetensors",) if case.bf16_router else ()
    write_checkpoint(folder, place(case, builder.stored), index_metadata(case), unpadded)
    (folder / "config.json").write_text(json.dumps(released_config(case), indent=2) + "\n")

    model = oracle(case, builder.plain, transformers_config(case, case.window + 1))
    sequences = [sequence_record(model, tokens_for(case, seed, i, n)) for i, n in enumerate(case.lengths)]
    short = oracle(case, builder.plain, transformers_config(case, case.window))
    tokens = sequences[0]["token_ids"]
    logits, _ = run(short, tokens)
    record = {
        "case": case.name,
        "why": case.why,
        "seed": seed,
        "made_by": {"transformers": "5.23.0", "torch": torch.__version__.split("+")[0], "dtype": "float32", "attention": "eager"},
        "window_keys": case.window + 1,
        "sequences": sequences,
        "window_128_reading": {
            "window_keys": case.window,
            "sequence": 0,
            "next_token_logprobs": numbers(logprobs(logits, tokens)),
            "argmax": logits.argmax(-1).tolist(),
        },
    }
    all_logits = run(model, tokens)[0]
    line = f"{folder.name}: logits std {all_logits.std(-1).mean():.2f}"
    if with_sensitivity:
        record["sensitivity"] = sensitivity(case, builder, sequences)
        line += ", weakest mistake " + str(min(record["sensitivity"].items(), key=lambda kv: kv[1]))
    (folder / "expected.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{line}, {size} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--case", nargs="*", choices=[c.name for c in CASES])
    parser.add_argument("--sensitivity", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        if not arguments.case or case.name in arguments.case:
            generate(case, arguments.seed, arguments.out, arguments.sensitivity)


if __name__ == "__main__":
    main()
