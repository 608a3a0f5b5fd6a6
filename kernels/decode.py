"""A quick step of sampling on a CPU: decode.cpp reads each weight once, without Python between the products.

    step = compiled_step(model)                     None if the model is of another kind, or nothing can be compiled
    logits = step(tokens, cache)                    int64 (B, 1) -> fp32 (B, 1, V); the cache grows by one position

It serves models whose blocks are Llama's: ivme.py's, tinymemory.py's and what is made of them. Whether a model computes
exactly that is not guessed from its names: its own forward pass and the compiled step must agree on the first tokens of
a text and on the last one that the context has room for.
"""
import ctypes
import functools

import torch

from . import build

ADDRESS = ctypes.c_void_p  # of a tensor's numbers


class Layer(ctypes.Structure):
    _fields_ = [(name, ADDRESS) for name in ("attn_norm", "q_norm", "k_norm", "ffn_norm", "qkv", "out", "gate_up",
                                            "down", "k", "v")]


class Model(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("n_layer", "d", "H", "K", "D", "F", "V", "is_bf16")),
                ("eps", ctypes.c_float), *((name, ADDRESS) for name in ("embed", "norm", "cos", "sin")),
                ("layers", ctypes.POINTER(Layer))]


PARTS = {"attn_norm": "attn_norm", "q_norm": "attn.q_norm", "k_norm": "attn.k_norm", "ffn_norm": "ffn_norm",
         "qkv": "attn.qkv", "out": "attn.out", "gate_up": "ffn.gate_up", "down": "ffn.down"}  # Layer's -> a block's
OPTIONAL = ("q_norm", "k_norm")


@functools.cache
def function():
    """decode.cpp's step, built if need be; None if it cannot be had, which a line then tells."""
    try:
        step = ctypes.CDLL(str(build.library("decode"))).step
    except (build.CannotBuild, OSError) as e:
        build.say(f"kernels      {e}, so sampling is several times slower")
        return None
    n = ctypes.c_int64
    step.argtypes = [ctypes.POINTER(Model), ctypes.c_void_p, n, n, n, ctypes.c_int, ctypes.c_void_p]
    step.restype = None
    return step


class CompiledStep:
    """See above. weights: name -> parameter of the model. dtype: the type in which matrices are kept and read."""

    def __init__(self, model, weights, dtype):
        cfg = model.cfg
        self.function, self.weights, self.cos, self.sin = function(), {}, model.cos, model.sin
        for name, p in weights.items():
            p = p.detach()
            self.weights[name] = p.to(dtype).contiguous() if p.dim() == 2 else p.contiguous()
        self.layers = (Layer * cfg.n_layer)()
        for i, layer in enumerate(self.layers):
            for part, name in PARTS.items():
                if (weight := self.weights.get(f"blocks.{i}.{name}.weight")) is not None:
                    setattr(layer, part, weight.data_ptr())
        heads = getattr(cfg, "n_kv_head", cfg.n_head)
        self.model = Model(cfg.n_layer, cfg.d_model, cfg.n_head, heads, cfg.d_model // cfg.n_head, cfg.d_ff,
                           cfg.vocab_size, dtype == torch.bfloat16, cfg.norm_eps,
                           self.weights["embed.weight"].data_ptr(), self.weights["norm.weight"].data_ptr(),
                           self.cos.data_ptr(), self.sin.data_ptr(), self.layers)

    def __call__(self, tokens, cache):
        assert cache.length < cache.max_len and cache.k[0].dtype == torch.float32
        layers = type(self.layers).from_buffer_copy(self.layers)  # of this call: threads may have a cache each
        model = Model.from_buffer_copy(self.model)
        model.layers = layers
        for layer, k, v in zip(layers, cache.k, cache.v):
            layer.k, layer.v = k.data_ptr(), v.data_ptr()
        tokens = tokens.contiguous()
        logits = torch.empty(len(tokens), 1, model.V)
        self.function(model, tokens.data_ptr(), len(tokens), cache.length, cache.max_len,
                      torch.get_num_threads(), logits.data_ptr())
        cache.length += 1
        return logits


def is_llama(model):
    """Whether the parameters have the names and shapes of Llama's blocks, and nothing else is there."""
    cfg = model.cfg
    try:
        d, D, heads = cfg.d_model, cfg.d_model // cfg.n_head, getattr(cfg, "n_kv_head", cfg.n_head)
        shapes = {"embed.weight": (cfg.vocab_size, d), "norm.weight": (d,)}
        block = dict(attn_norm=(d,), q_norm=(D,), k_norm=(D,), ffn_norm=(d,), qkv=((cfg.n_head + 2 * heads) * D, d),
                     out=(d, cfg.n_head * D), gate_up=(2 * cfg.d_ff, d), down=(d, cfg.d_ff))
        tables = all(table.shape == (cfg.context_length, D // 2) and table.dtype == torch.float32
                     and table.is_contiguous() for table in (model.cos, model.sin)) and cfg.norm_eps > 0
    except (AttributeError, TypeError, ZeroDivisionError):
        return False
    optional = set()
    for i in range(cfg.n_layer):
        names = {part: f"blocks.{i}.{name}.weight" for part, name in PARTS.items()}
        shapes |= {names[part]: shape for part, shape in block.items()}
        optional |= {names[part] for part in OPTIONAL}
    there = {name: tuple(p.shape) for name, p in model.named_parameters()}
    fp32_on_cpu = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    return (tables and fp32_on_cpu and shapes.keys() - optional <= there.keys() <= shapes.keys()
            and all(shapes[name] == shape for name, shape in there.items()))


@torch.no_grad()
def compiled_step(model, dtype=torch.float32, may_build=True):
    """A function (tokens, cache) -> logits that does what the model does, or None; see above.

    dtype: in bf16 the matrices are rounded, as they are in training with autocast, and read twice as fast. may_build:
    whether to build decode.cpp if it is not there yet, which takes 5 seconds.
    """
    if build.choice() == "reference" or not is_llama(model) or model.training:
        return None
    if not (may_build or build.path_of("decode").exists()) or function() is None:
        return None
    weights = dict(model.named_parameters())
    exact = CompiledStep(model, weights, torch.float32)

    # Is it the same arithmetic? The last position comes behind keys and values that are random
    end = model.max_len - 1
    generator = torch.Generator().manual_seed(0)
    caches = [model.init_cache(2) for _ in range(2)]
    for a, b in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v):
        b.copy_(a.normal_(generator=generator))
    for position in (*range(min(3, end)), end):
        tokens = torch.randint(model.cfg.vocab_size, (2, 1), generator=generator)
        for cache in caches:
            cache.length = position
        if not torch.allclose(exact(tokens, caches[1]), model(tokens, cache=caches[0])[0], rtol=1e-3, atol=1e-3):
            return None
    return exact if dtype == torch.float32 else CompiledStep(model, weights, dtype)
