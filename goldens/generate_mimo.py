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
import json
import math
import pathlib

import numpy as np
import torch
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from mimo_cases import CASES, Case, oracle_kv_heads, released_config, transformers_config
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
        changed = {name: change(name, x) for name, x in builder.plain.items()}
        return {name: builder.plain[name] if x is None else x for name, x in changed.items()}

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
