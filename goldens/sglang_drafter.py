"""Runs sglang 0.5.23's DFlash draft model (srt/models/dflash.py) on a CPU, for one golden.

Owns: importing that model without a GPU, and feeding it one block. The model class, its projections,
norms, rotary embedding, value scale and context K/V methods are sglang's; attention itself needs a CUDA
backend there, so `RadixAttention.forward` is replaced by transformers' eager attention with sinks
(`mimo_v2_flash`) under the window and direction that the sglang layer was built with.
Modules that only CUDA paths call (STAND_INS) are replaced by empty ones when they are not installed.
Set SGLANG_SOURCE to the unzipped wheel if sglang is not installed.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from unittest import mock

import numpy as np
import torch

STAND_INS = {
    "compressed_tensors", "pynvml", "sentencepiece", "sgl_kernel", "torch_memory_saver",
    "torchcodec", "torchvision", "triton_kernels", "tvm_ffi", "xgrammar",
}


class _StandInType(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn


class StandIn(metaclass=_StandInType):
    """Anything a module might define at import: a decorator, a base class, a type in an annotation."""

    def __init__(self, *_args, **_kwargs):
        pass

    def __init_subclass__(cls, **_kwargs):
        pass

    def __class_getitem__(cls, _key):
        return cls

    def __call__(self, *args, **_kwargs):
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    @classmethod
    def __get_pydantic_core_schema__(cls, _source, _handler):
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _StandInModule(types.ModuleType):
    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last in sys.meta_path: only what no other finder has. Asked for by sglang alone, so that
    no other package believes that an optional dependency is there."""

    def find_spec(self, name, _path, _target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        top = name.split(".")[0]
        if top not in STAND_INS or f"{os.sep}sglang{os.sep}" not in frame.f_code.co_filename:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StandInModule(spec.name)

    def exec_module(self, module):
        pass


def load():
    """The module sglang.srt.models.dflash, with one rank and no tensor parallelism."""
    if "SGLANG_SOURCE" in os.environ:
        sys.path.insert(0, os.environ["SGLANG_SOURCE"])
    sys.meta_path.append(_Finder())
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    warnings.filterwarnings("ignore")
    import sglang.srt.models.dflash as module
    from sglang.srt import runtime_context

    runtime_context.get_parallel().override_permanently(tp_size=1, tp_rank=0, tp_group=None)
    return module


_MODULE = None


def build(config: dict, weights):
    """The draft model with every checkpoint tensor loaded by sglang's own `load_weights`."""
    global _MODULE
    _MODULE = _MODULE or load()
    from transformers import Qwen3Config

    extra = ("dflash_config", "num_target_layers", "partial_rotary_factor", "is_causal", "v_head_dim", "block_size")
    known = {k: v for k, v in config.items() if k not in (*extra, "architectures", "auto_map", "model_type", "rope_theta", "torch_dtype")}
    qwen3 = Qwen3Config(**known, rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]})
    for name in extra:
        if name in config:
            setattr(qwen3, name, config[name])
    model = _MODULE.DFlashDraftModel(qwen3).float().eval()
    tensors = {k: torch.from_numpy(v.value()) for k, v in weights.items()}
    before = {k: p.clone() for k, p in model.named_parameters()}
    model.load_weights(iter(tensors.items()))
    same = [k for k, p in model.named_parameters() if torch.equal(p, before[k])]
    assert not same, f"not loaded: {same}"
    return model


@torch.no_grad()
def draft_sglang(config: dict, draft, weights, features: np.ndarray, block: np.ndarray, start: int) -> np.ndarray:
    """Final hidden rows [B, hidden]. The window is given as in V2.6's configuration (`layer_types`,
    `is_causal` false): this version of sglang does not read `dflash_config.use_swa`."""
    config = config | {
        "layer_types": ["sliding_attention"] * draft.layers,
        "use_sliding_window": True,
        "sliding_window": draft.window,
        "is_causal": False,
    }
    model = build(config, weights)
    context = model.project_target_hidden(torch.from_numpy(features[:start]))
    before, here = torch.arange(start), torch.arange(start, start + len(block))
    cache = []
    for layer in model.layers:
        attention = layer.self_attn
        k, v = attention.kv_proj_only(model.prepare_context_hidden_for_kv(layer, context))
        k = attention.apply_k_rope(before, attention.apply_k_norm(k))
        cache.append((k.view(start, -1, attention.head_dim), v.view(start, -1, attention.head_dim)))
    with mock.patch.object(_MODULE.RadixAttention, "forward", attention_over(cache, start)):
        out = model(input_ids=None, positions=here, forward_batch=None, input_embeds=torch.from_numpy(block))
    return out.hidden_states.numpy()


def attention_over(cache, start: int):
    """A replacement of RadixAttention.forward that sees the cached context, then the block."""
    from sglang.srt.layers.radix_attention import AttentionType
    from transformers.models.mimo_v2_flash.modeling_mimo_v2_flash import eager_attention_forward

    def forward(self, q, k, v, _forward_batch, sinks=None, **_kwargs):
        rows, d = q.shape[0], self.head_dim
        keys, values = cache[self.layer_id]
        k = torch.cat([keys, k.reshape(rows, -1, d)])[None].transpose(1, 2)
        v = torch.cat([values, v.reshape(rows, -1, d)])[None].transpose(1, 2)
        delta = torch.arange(start, start + rows)[:, None] - torch.arange(start + rows)[None, :]
        visible = delta >= 0 if self.attn_type == AttentionType.DECODER else torch.ones_like(delta, dtype=torch.bool)
        if self.sliding_window_size >= 0:
            visible = visible & (delta.abs() <= self.sliding_window_size)
        mask = torch.zeros(delta.shape).masked_fill(~visible, -torch.inf)[None, None]
        module = types.SimpleNamespace(num_key_value_groups=q.shape[1] // d // k.shape[1], sinks=sinks, training=False)
        out, _ = eager_attention_forward(module, q.view(rows, -1, d)[None].transpose(1, 2), k, v, mask, self.scaling)
        return out.reshape(rows, -1)

    return forward
