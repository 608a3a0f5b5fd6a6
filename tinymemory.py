"""TinyMemoryLM: 1.7 million parameters that train in minutes on a laptop's CPU.

Pre-norm RMSNorm (arXiv 1910.07467), multi-head attention with RMSNorm on every query and key head (QK-norm, arXiv 2010.04245),
rotary positions (RoPE, arXiv 2104.09864), SwiGLU feed-forward (arXiv 2002.05202), one matrix for the embedding and the
output head, no biases, over a vocabulary of characters and frequent words. Sizes are those of the model card
CompactAI/TMLM-Haiku-1; the arithmetic is that of `transformers.Qwen3ForCausalLM`, to which the weights map one to one.

Symbols, after the papers:
    B  batch      T  tokens given in this call      S  tokens attended to (T plus what the cache holds)
    d  d_model    H  attention heads                D  width of a head      V  vocabulary

The file needs torch alone. Copied into another project it trains and generates:

    model = Model(Config())
    logits, loss = model(idx, targets)              # int64 (B, T) both
    idx = model.generate(idx, max_new_tokens=100)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class TinyMemoryConfig:
    vocab_size: int = 2111  # tokens in the vocabulary
    context_length: int = 2048  # longest sequence the model attends over
    n_layer: int = 6  # transformer blocks
    d_model: int = 160  # width of the residual stream
    n_head: int = 4  # attention heads
    d_ff: int = 256  # width of the feed-forward's hidden layer
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm


# ---------------------------------------------------------------------------------------------------- building blocks

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def rope_tables(context_length, head_dim, theta):
    """Cosines and sines of the rotary angles t * theta^(-2i/D), each (context_length, D / 2), fp32."""
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(context_length).float(), frequency)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates the pairs (x_i, x_{i + D/2}) of x (B, heads, T, D) by the angles of their positions.

    Pairing the two halves, not neighbours, is Llama's layout in `transformers`; the other one would need its weights permuted.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # fp32, as the tables


class Attention(nn.Module):
    """Causal multi-head attention whose queries and keys are normalised per head, which bounds the scores (arXiv 2010.04245)."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.d_model // cfg.n_head
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim, cfg.norm_eps), RMSNorm(self.head_dim, cfg.norm_eps)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, 3H, T, D)
        q, k, v = qkv.chunk(3, dim=1)
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
        y = causal_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def causal_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v for the last T of S positions: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    mask (B, 1, T, S), if given, is added to the scores in place of that triangle.
    """
    if v.device.type == "cpu" and v.dtype == torch.bfloat16:  # bf16 attention on a CPU costs up to twice as much as fp32
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float(), mask).type_as(v)
    T, S, q, k = q.size(2), k.size(2), q.type_as(v), k.type_as(v)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.type_as(v))
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # is_causal would align the triangle with the first key, but these queries are the last T positions
    mask = None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def within_documents(reset, dtype):
    """reset, bool (B, T), true where a document begins -> mask (B, 1, T, T) for attention: 0 within a document and up to the query, else -inf.

    It has the dtype that attention computes in (under autocast not the weights' `dtype`; on a CPU always fp32), so that one serves all
    layers: of a bool mask, or one in another dtype, each layer would keep a copy for the backward pass.
    """
    device, document = reset.device.type, reset.cumsum(1)
    if device != "cpu" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    B, T = reset.shape
    # in rows of a multiple of 8 numbers: CUDA's memory-efficient attention would copy others, again for every layer
    mask = torch.zeros(B, 1, T, -(-T // 8) * 8, dtype=dtype, device=reset.device)[..., :T]
    unseen = (document[:, :, None] != document[:, None, :]) | torch.ones(T, T, dtype=torch.bool, device=reset.device).triu(1)
    return mask.masked_fill_(unseen[:, None], -math.inf)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x), gate and up fused into one matrix (arXiv 2002.05202)."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up = nn.Linear(cfg.d_model, 2 * cfg.d_ff, bias=False)
        self.down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.d_model, cfg.norm_eps), Attention(cfg)
        self.ffn_norm, self.ffn = RMSNorm(cfg.d_model, cfg.norm_eps), SwiGLU(cfg)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache, layer)
        return x + self.ffn(self.ffn_norm(x))


class Cache:
    """Keys and values of the tokens seen so far, per layer (B, H, max_len, D); `length` positions are filled."""

    def __init__(self, n_layer, shape, dtype, device):
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.length, self.max_len = 0, shape[2]

    def append(self, layer, k, v):
        """Stores k, v (B, H, T, D) behind what is there and returns all of both, (B, H, S, D)."""
        S = self.length + k.size(2)
        self.k[layer][:, :, self.length:S], self.v[layer][:, :, self.length:S] = k, v
        return self.k[layer][:, :, :S].to(k.dtype), self.v[layer][:, :, :S].to(v.dtype)


# ---------------------------------------------------------------------------------------------------- loss in chunks

LOSS_CHUNK = 2 ** 24  # logits alive at once (64 MB in fp32); (B, T, V) at once would be the largest tensor of a step


def _chunk_loss(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1, reduction="none")


def chunked_loss(x, weight, targets, loss_weights=None, reduction="mean"):
    """Cross entropy of the head's logits x weight^T, of which never more than LOSS_CHUNK exist at once.

    x (B, T, d), weight (V, d), targets (B, T) with -1 ignored, loss_weights (B, T) or None.
    Returns fp32: the weighted mean over the targets that count ("mean"), or each token's loss times its weight, (B, T) ("none").
    Several chunks are recomputed in the backward pass, a single one is kept; the product is in the compute dtype, the softmax in fp32.
    """
    assert reduction in ("mean", "none"), reduction
    n = max(1, LOSS_CHUNK // weight.size(0))
    chunks = list(zip(x.flatten(0, 1).split(n), targets.flatten().split(n)))
    if len(chunks) == 1:  # nothing to save by recomputing the only one
        losses = _chunk_loss(x.flatten(0, 1), weight, targets.flatten()).view_as(targets)
    else:
        losses = torch.cat([checkpoint(_chunk_loss, c, weight, t, use_reentrant=False, preserve_rng_state=False) for c, t in chunks]).view_as(targets)
    weights = (targets >= 0).float() if loss_weights is None else loss_weights.float() * (targets >= 0)
    losses = losses * weights
    # no target at all gives 0, not nan
    return losses if reduction == "none" else losses.sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


# ---------------------------------------------------------------------------------------------------- the model

class TinyMemoryLM(nn.Module):
    """Decoder-only language model. Raises ValueError for a sequence beyond the context or the cache."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.d_model % (2 * cfg.n_head):
            raise ValueError(f"n_head {cfg.n_head} must divide d_model {cfg.d_model} into heads of an even width")
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)  # also the output head
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        cos, sin = rope_tables(cfg.context_length, cfg.d_model // cfg.n_head, cfg.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def roles(self):
        """End of a parameter's name -> (role, rows of each map in a fused matrix).

        The one table that initialisation and train.py's optimizers go by. A "matrix" is a linear map inside a block (Muon
        orthogonalises each map alone, hence the rows); "embedding" and "vector" go to AdamW, vectors without weight decay.
        """
        c = self.cfg
        return {"embed.weight": ("embedding", None), "norm.weight": ("vector", None),
                "qkv.weight": ("matrix", (c.d_model,) * 3), "out.weight": ("matrix", None),
                "gate_up.weight": ("matrix", (c.d_ff, c.d_ff)), "down.weight": ("matrix", None)}

    def init_weights(self):
        """normal(0, 0.02); the projections that write into the residual stream start 1 / sqrt(2 layers) smaller, norms at one."""
        for name, p in self.named_parameters():
            (role, _), = (r for end, r in self.roles().items() if name.endswith(end))
            into_residual = name.endswith(("out.weight", "down.weight"))
            if role == "vector":
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.cfg.n_layer) if into_residual else 0.02)

    @property
    def n_params(self):
        """Number of parameters; the tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations of training on one token in a window of T: 6 per weight of a matrix product (forward 2,
        backward 4) and 6 d T per layer for causal attention, whose queries see T / 2 keys on average."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if not name.endswith("norm.weight"))
        return 6 * matrices + 6 * self.cfg.n_layer * self.cfg.d_model * T

    def forward(self, idx, targets=None, loss_weights=None, reduction="mean", cache=None, all_logits=False, reset=None):
        """idx int64 (B, T) -> (logits, loss).

        With targets (B, T; -1 ignored) and perhaps loss_weights (B, T): (None, loss), see `chunked_loss`.
        Without: (logits of the last position (B, 1, V), or of all with all_logits=True, None).
        With a cache from `init_cache`, idx continues what the cache has seen, and its keys and values are added.
        reset, bool (B, T), is true where a document begins: each one is read as if it stood alone (not together with a cache).
        """
        start, T = (0 if cache is None else cache.length), idx.size(1)
        limit = self.cfg.context_length if cache is None else cache.max_len
        if start + T > limit:
            raise ValueError(f"{start + T} tokens are more than the {'context' if cache is None else 'cache'} of {limit}")
        assert reset is None or cache is None, "a cache holds one document"
        mask = None if reset is None else within_documents(reset, self.embed.weight.dtype)
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]  # angles count only relative to each other
        x = self.embed(idx)  # (B, T, d)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, cache, layer)
        if cache is not None:
            cache.length += T
        if targets is not None:
            return None, chunked_loss(self.norm(x), self.embed.weight, targets, loss_weights, reduction)
        x = self.norm(x if all_logits else x[:, -1:])
        return F.linear(x, self.embed.weight), None

    def init_cache(self, batch_size, max_len=None, dtype=None):
        """An empty cache for batch_size sequences of up to max_len tokens (default: the context); dtype defaults to the weights'."""
        c, max_len = self.cfg, max_len or self.cfg.context_length
        if max_len > c.context_length:
            raise ValueError(f"a cache of {max_len} tokens is longer than the context of {c.context_length}")
        shape = (batch_size, c.n_head, max_len, c.d_model // c.n_head)
        return Cache(c.n_layer, shape, dtype or self.embed.weight.dtype, self.embed.weight.device)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, stop_token=None, generator=None):
        """Continues idx (B, T) by up to max_new_tokens: returns (B, T + new). temperature 0 takes the likeliest token.

        top_k keeps the k likeliest tokens, top_p the smallest set of at least that probability (arXiv 1904.09751),
        repetition_penalty divides the odds of tokens already present (arXiv 1909.05858). Ends early once every row has
        produced stop_token. When the context is full its second half is read anew, so generation can go on for ever.
        """
        cache, new, C = None, idx, self.cfg.context_length
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache is None or cache.length + new.size(1) > C:
                cache, new = self.init_cache(idx.size(0)), idx[:, -(C if cache is None else C // 2):]
            logits = self(new, cache=cache)[0][:, -1].float()  # (B, V)
            if repetition_penalty != 1.0:
                seen = logits.gather(1, idx)
                logits.scatter_(1, idx, torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty))
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits /= temperature
                if top_k is not None:
                    logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
                if top_p is not None:
                    p, order = logits.softmax(-1).sort(descending=True)
                    beyond = p.cumsum(-1) - p >= top_p
                    beyond[:, 0] = False  # the likeliest token always stays
                    logits.scatter_(1, order, logits.gather(1, order).masked_fill(beyond, -math.inf))
                new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            if stop_token is not None:
                done |= new[:, 0] == stop_token
                if done.all():
                    break
        return idx


Config, Model = TinyMemoryConfig, TinyMemoryLM

# The card gives sizes but no recipe. This one is sized for about three minutes on two CPU cores.
PRESETS = {
    "tinymemory": (TinyMemoryConfig(), dict(
        data="pydocs", tokenizer="hybrid", order="random", block_size=256, batch_tokens=2048, micro_batch=8, max_steps=720,
        optimizer="muon", muon_lr=0.02, lr=3e-3, weight_decay=0.1, grad_clip=1.0, schedule="wsd", warmup_steps=20, decay_fraction=0.45,
        final_lr_fraction=0.0, ema_beta=0.98, eval_every=120, eval_tokens=16_384, save_every=120, log_every=10, sample_prompt="def ")),
    # Instruction tuning with the card's word boost, response start, replay and context relevance; it names them without figures: these are ours
    "tinymemory-sft": (TinyMemoryConfig(), dict(
        data="pydocs-chat", tokenizer="hybrid", init_from="out/tinymemory/best.pt", loss_on="responses", pack="document",
        word_boost=1.5, response_start_tokens=8, response_start_weight=2.0, replay=0.15, relevance=0.25, relevance_margin=1.0,
        order="random", block_size=512, batch_tokens=4096, micro_batch=8, max_steps=240,
        optimizer="muon", muon_lr=0.01, lr=1.5e-3, weight_decay=0.1, grad_clip=1.0, schedule="wsd", warmup_steps=10, decay_fraction=1.0,
        final_lr_fraction=0.0, ema_beta=0.98, eval_every=60, eval_tokens=16_384, final_eval_tokens=65_536, save_every=120, log_every=10,
        sample_prompt="What does shutil.which do?")),
}
