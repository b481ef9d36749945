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
from dflash.model import dflash_generate

from dflash_drafters import DRAFTS, TARGETS, Draft, draft_config, draft_weights, reference_drafter
from generate_mimo import Builder, index_metadata, oracle, place, run
from mimo_cases import CASES, Case, released_config, transformers_config
from number_formats import Stored, normal, rng_for, write_checkpoint, write_safetensors

VISIBLE = 0.005  # mean |difference of logit| every mistake must reach; the limit of the tests is 1e-3


# ---- drafting, two ways --------------------------------------------------------------------------


@torch.no_grad()
def draft_reference(model, features: np.ndarray, block: np.ndarray, start: int) -> np.ndarray:
    """Final hidden rows [B, hidden] by PyPI dflash: `features` [start, taps * hidden] at positions
    0..start, `block` [B, hidden] embeddings at positions start.."""
    positions = torch.arange(start + len(block))[None]
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


def visible(draft: Draft, layer: int, start: int, rows: int) -> np.ndarray:
    """[rows, start + rows] bool: which context and block positions each block row attends to."""
    types = draft.layer_types or ("sliding_attention" if draft.window else "full_attention",) * draft.layers
    delta = np.arange(start, start + rows)[:, None] - np.arange(start + rows)[None, :]
    sliding = types[layer] == "sliding_attention"
    causal = draft.is_causal if draft.is_causal is not None else sliding
    seen = np.ones(delta.shape, bool)
    if sliding:
        seen &= delta < draft.window
        seen &= -delta < draft.window
    return seen & (delta >= 0) if causal else seen


def attention_numpy(draft: Draft, w: dict[str, np.ndarray], layer: int, context, h, context_theta) -> np.ndarray:
    """[B, heads * head_dim]. `w` holds one layer's tensors, `context` [start, hidden], `h` [B, hidden]."""
    d, dims, start = draft.head_dim, int(draft.head_dim * draft.rotary), len(context)

    def heads(part, rows):
        out = rows @ w[f"{part}_proj.weight"].T + w.get(f"{part}_proj.bias", 0.0)
        return out.reshape(len(rows), -1, d)

    position = np.arange(start + len(h))
    q = rope(rms_norm(heads("q", h), w["q_norm.weight"], draft.eps), position[start:], draft.theta, dims)
    before = rms_norm(heads("k", context), w["k_norm.weight"], draft.eps)
    here = rms_norm(heads("k", h), w["k_norm.weight"], draft.eps)
    k = np.concatenate([rope(before, position[:start], context_theta, dims), rope(here, position[start:], draft.theta, dims)])
    v = np.concatenate([heads("v", context), heads("v", h)]) * draft.value_scale
    seen = visible(draft, layer, start, len(h))
    out = np.zeros((len(h), draft.heads, d))
    for head in range(draft.heads):
        group = head // (draft.heads // draft.kv)
        score = np.where(seen, q[:, head] @ k[:, group].T / math.sqrt(d), -np.inf)
        sink = w["attention_sink_bias"][head] if draft.xiaomi else -np.inf
        top = np.maximum(score.max(-1, keepdims=True), sink)
        e = np.exp(score - top)
        out[:, head] = (e / (e.sum(-1, keepdims=True) + np.exp(sink - top))) @ v[:, group]
    return out.reshape(len(h), -1)


def draft_numpy(draft: Draft, w: dict[str, np.ndarray], features: np.ndarray, block: np.ndarray, start: int, context_theta=None) -> np.ndarray:
    """The same in float64 numpy, with Xiaomi's additions; the plain definition."""
    context = rms_norm(features[:start] @ w["fc.weight"].T, w["hidden_norm.weight"], draft.eps)
    x = block.astype(np.float64)
    for i in range(draft.layers):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if k.startswith(f"layers.{i}.")}
        attention = {k.removeprefix("self_attn."): v for k, v in layer.items() if k.startswith("self_attn.")}
        h = rms_norm(x, layer["input_layernorm.weight"], draft.eps)
        out = attention_numpy(draft, attention, i, context, h, context_theta or draft.theta)
        x = x + out @ attention["o_proj.weight"].T + attention.get("o_proj.bias", 0.0)
        h = rms_norm(x, layer["post_attention_layernorm.weight"], draft.eps)
        gate = h @ layer["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
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
    name, target_seed = draft.target.rsplit("-s", 1)
    case = next(c for c in CASES if c.name == name)
    target = Target(case, int(target_seed), None, None, tied=False)
    assert (mimo / draft.target / "config.json").exists(), mimo / draft.target
    return target, f"../../mimo/{draft.target}"


# ---- goldens -------------------------------------------------------------------------------------


def hidden_rows(draft, weights, plain, target, features, block, start):
    if draft.xiaomi:
        return draft_numpy(draft, plain, features, block, start)
    return draft_reference(reference_drafter(draft, weights, len(target.case.pattern)), features, block, start)


def mistakes(draft: Draft, weights, plain, target: Target, tokens, mask_row, start: int):
    """Yields (label, final hidden rows) of a drafter with one thing wrong, at anchor `start`."""
    features = target.features(tokens, draft.taps)
    block = np.stack([target.embed[tokens[start]]] + [mask_row] * (draft.block - 1))
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
