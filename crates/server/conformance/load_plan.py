#!/usr/bin/env python3
"""Gate 7: what `kilotok serve` says before and while it loads a large checkpoint: load_plan.py KILOTOK MODEL_DIR

MODEL_DIR is a small checkpoint whose tokenizer and configuration are used. The large ones are synthetic: files of
zeros that take no room on disk (sparse), with the headers, names and shapes of the family. The first needs more
than 1 TB of memory and has to be refused at once; the second, of 6 GB, is loaded twice, and asked meanwhile.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

KILOTOK, MODEL = sys.argv[1:3]
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}


def fp8(tensors, stem, rows, columns):
    tensors[stem + ".weight"] = ("F8_E4M3", [rows, columns])
    tensors[stem + ".weight_scale_inv"] = ("F32", [-(-rows // 128), -(-columns // 128)])


def mxfp4(tensors, stem, rows, columns):
    tensors[stem + ".weight"] = ("U8", [rows, columns // 2])
    tensors[stem + ".weight_scale"] = ("U8", [rows, columns // 32])


def layer(config, i):
    hidden, heads, tensors = config["hidden_size"], config["num_attention_heads"], {}
    full, prefix = not config["hybrid_layer_pattern"][i], f"model.layers.{i}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = ("BF16", [hidden])
    kv = 1 if full else 2
    for name, rows in (("q", heads * 192), ("k", kv * 192), ("v", kv * 128)):
        fp8(tensors, f"{prefix}.self_attn.{name}_proj", rows, hidden)
    tensors[f"{prefix}.self_attn.o_proj.weight"] = ("BF16", [hidden, heads * 128])
    if not full:
        tensors[f"{prefix}.self_attn.attention_sink_bias"] = ("BF16", [heads])
    if not config["moe_layer_freq"][i]:
        inner = config["intermediate_size"]
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            fp8(tensors, f"{prefix}.mlp.{name}_proj", rows, columns)
        return tensors
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    tensors[f"{prefix}.mlp.gate.weight"] = ("BF16", [experts, hidden])
    tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = ("F32", [experts])
    for e in range(experts):
        stem = f"{prefix}.mlp.experts.{e}"
        mxfp4(tensors, f"{stem}.down_proj", hidden, inner)
        mxfp4(tensors, f"{stem}.gate_proj", inner, hidden)
        mxfp4(tensors, f"{stem}.up_proj", inner, hidden)
    return tensors


def shard(path, tensors):
    """A file of zeros with this header."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def checkpoint(directory, layers, hidden, heads, experts, inner):
    for name in os.listdir(MODEL):
        if name.endswith((".json", ".jinja")) and name != "config.json" and "safetensors" not in name:
            shutil.copy(os.path.join(MODEL, name), directory)
    own = json.load(open(os.path.join(MODEL, "config.json")))
    config = {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "vocab_size": own["vocab_size"],
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 1,
        "swa_num_attention_heads": heads, "swa_num_key_value_heads": 2, "head_dim": 192, "v_head_dim": 128,
        "swa_head_dim": 192, "swa_v_head_dim": 128, "hybrid_layer_pattern": [int(i % 4 != 0) for i in range(layers)],
        "sliding_window": 128, "sliding_window_size": 128, "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "partial_rotary_factor": 0.334, "rope_theta": 1e7, "swa_rope_theta": 1e4,
        "attention_value_scale": 0.707, "layernorm_epsilon": 1e-5, "hidden_act": "silu",
        "intermediate_size": inner * 8, "moe_intermediate_size": inner, "moe_layer_freq": [int(i > 0) for i in range(layers)],
        "n_routed_experts": experts, "num_experts_per_tok": 8, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "norm_topk_prob": True, "tie_word_embeddings": False, "max_position_embeddings": 32768,
    }
    json.dump(config, open(os.path.join(directory, "config.json"), "w"))
    ends = {name: ("BF16", [own["vocab_size"], hidden]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    ends["model.norm.weight"] = ("BF16", [hidden])
    index = {}
    for i in range(layers + 1):
        tensors, name = (layer(config, i) if i < layers else ends), f"model-{i:05}.safetensors"
        shard(os.path.join(directory, name), tensors)
        index.update(dict.fromkeys(tensors, name))
    json.dump({"weight_map": index}, open(os.path.join(directory, "model.safetensors.index.json"), "w"))


def serve(directory, *more):
    command = [KILOTOK, "serve", "-m", directory, "--port", "8462", "--max-model-len", "2048", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def get(path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:8462{path}") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def refused():
    with tempfile.TemporaryDirectory() as directory:
        checkpoint(directory, layers=70, hidden=6144, heads=128, experts=384, inner=4096)
        began = time.monotonic()
        process = serve(directory)
        _, text = process.communicate(timeout=60)
        print(f"1 TB: exit code {process.returncode} after {time.monotonic() - began:.2f} s\n{text.strip()}")
        return process.returncode == 2 and "TB" in text


def loaded(directory, name):
    began, before, seen = time.monotonic(), "", 0
    process = serve(directory)
    while (answer := get("/health"))[0] != 200:
        if process.poll() is not None:
            print(process.stderr.read())
            return False
        if answer[0] == 503 and answer[1] != before and time.monotonic() - began > seen:
            before, seen = answer[1], seen + 2
            print(f"  {time.monotonic() - began:.1f} s: {answer[0]} {answer[1]}")
        time.sleep(0.05)
    figures = [line for line in get("/metrics")[1].splitlines() if line.startswith("kilotok_weights_load")]
    process.terminate()
    print(f"{name}: ready after {time.monotonic() - began:.1f} s\n{process.stderr.read().strip()}\n" + "\n".join(figures))
    return process.wait(timeout=60) == 0 and before


if __name__ == "__main__":
    good = refused()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint(directory, layers=15, hidden=2048, heads=16, experts=128, inner=1024)
        good &= bool(loaded(directory, "6 GB")) & bool(loaded(directory, "6 GB again"))
    sys.exit(0 if good else 1)
