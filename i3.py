"""i3: language models made of RWKV-Mamba hybrid blocks, with attention blocks on top in the larger ones.

A hybrid block mixes over time with a selective state-space model (Mamba, arXiv 2312.00752) between RWKV's token shift and receptance
gate (arXiv 2305.13048, 2404.05892). Decoding a token costs the same however long the text is: a state instead of a growing
cache. Sizes are those of the model cards i3-22m, i3-80m and i3-200m; their code loops over time in Python, here
`kernels.selective_scan` does the work.

With x = LayerNorm(input) and xs = x one step earlier, a mixer computes (⊙: element by element, per channel):

    u, δ, b, c = four mixes  μ ⊙ x + (1 - μ) ⊙ xs
    Δ = softplus(W_up (W_down δ) + bias)         how far a step moves each channel's state: RWKV's data-dependent decay
    B = W_B b,  C = W_C c                        what is written to the state, what is read out of it
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t       A = -exp(A_log)
    y_t = C_t h_t + D u_t
    y = GroupNorm(y) ⊙ sigmoid(r ⊙ u + r_b)      a group is a head, at one time step; the gate is RWKV's receptance

Symbols: B batch, T tokens given in this call, d d_model, H heads, N d_state, V vocabulary.

The file needs torch and the folder kernels/ beside it. Copied into another project together they train and generate:

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

from kernels import selective_scan, selective_scan_step

NO_LIMIT = 2 ** 40  # tokens in a sequence, where nothing attends


@dataclass
class I3Config:
    vocab_size: int = 4466  # tokens in the vocabulary
    context_length: int = 256  # learned positions; the longest sequence if there are attention blocks
    n_layer: int = 24  # hybrid blocks
    n_attention: int = 0  # attention blocks on top of them
    d_model: int = 512  # width of the residual stream
    n_head: int = 16  # heads: groups of the mixer's GroupNorm, and attention's heads
    d_state: int = 64  # states of a channel (N)
    d_inner: int = 0  # channels of the scan, between two linear maps; 0: d_model, and no maps
    delta_rank: int = 64  # inner width of the low-rank map that gives Δ
    ffn_rank: int = 128  # inner width of the feed-forward's two low-rank maps; 0: dense maps
    head_rank: int = 64  # inner width of the low-rank output head; 0: a dense one
    scan: bool = True  # False: u passes by the state unchanged, to see what the scan is worth
    norm_eps: float = 1e-5  # added to the variance in LayerNorm and GroupNorm


# ---------------------------------------------------------------------------------------------------- building blocks

class LowRank(nn.Sequential):
    """d_in -> rank -> d_out; the inner projection has no bias, a bias would only be added to the outer one."""

    def __init__(self, d_in, rank, d_out):
        super().__init__(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out))


class FeedForward(nn.Module):
    """W_2 gelu(W_1 x), four times as wide inside."""

    def __init__(self, cfg):
        super().__init__()
        d, r = cfg.d_model, cfg.ffn_rank
        self.up, self.down = (LowRank(d, r, 4 * d), LowRank(4 * d, r, d)) if r else (nn.Linear(d, 4 * d), nn.Linear(4 * d, d))

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Mixer(nn.Module):
    """Token shift, selective scan, GroupNorm per head and token, receptance gate: the equations at the top of this file."""

    def __init__(self, cfg):
        super().__init__()
        d, inner, N = cfg.d_model, cfg.d_inner or cfg.d_model, cfg.d_state
        self.n_head, self.eps, self.scan = cfg.n_head, cfg.norm_eps, cfg.scan
        self.mix = nn.Parameter(torch.empty(4, d))  # μ of u, δ, b, c
        self.inner = nn.Linear(d, inner, bias=False) if cfg.d_inner else nn.Identity()
        self.outer = nn.Linear(inner, d, bias=False) if cfg.d_inner else nn.Identity()
        self.delta_down, self.delta_up = nn.Linear(d, cfg.delta_rank), nn.Linear(cfg.delta_rank, inner)
        self.B, self.C = nn.Linear(d, N), nn.Linear(d, N)
        self.A_log, self.D = nn.Parameter(torch.empty(inner, N)), nn.Parameter(torch.empty(inner))
        self.r, self.r_bias = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner))

    def forward(self, x, state=None, reset=None, mask=None):
        """x (B, T, d) -> (B, T, d). `state`, if given, is where x goes on from, and is moved to behind it; reset: see I3.forward."""
        before = x.new_zeros(x.size(0), 1, x.size(2)) if state is None else state.x.to(x.dtype)
        xs = torch.cat((before, x[:, :-1]), dim=1)
        if reset is not None:
            xs = xs.masked_fill(reset[:, :, None], 0)
        u, δ, b, c = (torch.lerp(xs, x, mix) for mix in self.mix)
        u = self.inner(u)  # (B, T, channels)
        y = self.scanned(u, δ, b, c, state, reset) if self.scan else u
        if state is not None:
            state.x.copy_(x[:, -1:].detach())
        y = F.group_norm(y.flatten(0, 1), self.n_head, self.norm_weight, self.norm_bias, self.eps).view_as(y)
        return self.outer(y * torch.addcmul(self.r_bias, self.r, u).sigmoid())

    def scanned(self, u, δ, b, c, state, reset):
        # the bias is what sets the time scale at the start: in bf16 it would be off by percents
        delta = F.softplus(F.linear(self.delta_down(δ), self.delta_up.weight).float() + self.delta_up.bias.float())
        A, B, C = -self.A_log.float().exp(), self.B(b), self.C(c)
        if state is None:
            return selective_scan(u, delta, A, B, C, self.D, reset=reset)
        if u.size(1) == 1:
            return selective_scan_step(state.h, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], self.D)[:, None]
        y, h = selective_scan(u, delta, A, B, C, self.D, h0=state.h, return_state=True)
        state.h.copy_(h.detach())
        return y


class Attention(nn.Module):
    """Causal multi-head attention with biases; queries, keys and values fused into one matrix."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv, self.out = nn.Linear(cfg.d_model, 3 * cfg.d_model), nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, state=None, reset=None, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2).chunk(3, dim=1)  # (B, H, T, d / H)
        if state is not None:
            k, v = state.append(k, v)  # (B, H, S, d / H)
        return self.out(causal_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def causal_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v for the last T of S positions: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    mask (B, 1, T, S), if given, is added to the scores in place of that triangle.
    """
    if v.device.type == "cpu" and v.dtype == torch.bfloat16:  # bf16 attention on a CPU costs up to twice as much as fp32
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float(), mask).type_as(v)
    T, S = q.size(2), k.size(2)
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


class Block(nn.Module):
    """x + mixer(LayerNorm(x)), then x + feed-forward(LayerNorm(x)); the mixer is a Mixer or an Attention."""

    def __init__(self, cfg, mixer):
        super().__init__()
        self.mixer_norm, self.mixer = nn.LayerNorm(cfg.d_model, cfg.norm_eps), mixer(cfg)
        self.ffn_norm, self.ffn = nn.LayerNorm(cfg.d_model, cfg.norm_eps), FeedForward(cfg)

    def forward(self, x, state=None, reset=None, mask=None):
        x = x + self.mixer(self.mixer_norm(x), state, reset, mask)
        return x + self.ffn(self.ffn_norm(x))


# ---------------------------------------------------------------------------------------------------- what decoding keeps

class MixerState:
    """A hybrid layer's memory of all tokens so far: the scan's state (B, channels, N) in fp32 and the last input (B, 1, d)."""

    def __init__(self, cfg, batch_size, dtype, device):
        self.h = torch.zeros(batch_size, cfg.d_inner or cfg.d_model, cfg.d_state, device=device)
        self.x = torch.zeros(batch_size, 1, cfg.d_model, dtype=dtype, device=device)


class AttentionState:
    """An attention layer's keys and values, (B, H, max_len, d / H) each; the first `length` are filled."""

    def __init__(self, cfg, batch_size, max_len, dtype, device):
        shape = (batch_size, cfg.n_head, max_len, cfg.d_model // cfg.n_head)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def append(self, k, v):
        """Stores k, v (B, H, T, D) behind what is there and returns all of both, (B, H, S, D)."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length].to(k.dtype), self.v[:, :, :self.length].to(v.dtype)


class Cache:
    """What the layers remember of `length` tokens. Without attention blocks its size is constant and max_len no limit."""

    def __init__(self, states, max_len):
        self.states, self.length, self.max_len = states, 0, max_len


# ---------------------------------------------------------------------------------------------------- loss in chunks

LOSS_CHUNK = 2 ** 24  # logits alive at once (64 MB in fp32); (B, T, V) at once would be the largest tensor of a step


def _chunk_loss(x, weight, bias, targets):
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets, ignore_index=-1, reduction="none")


def chunked_loss(x, weight, bias, targets, loss_weights=None, reduction="mean"):
    """Cross entropy of the logits x weight^T + bias, of which never more than LOSS_CHUNK exist at once.

    x (B, T, d), weight (V, d), bias (V), targets (B, T) with -1 ignored, loss_weights (B, T) or None.
    Returns fp32: the weighted mean over the targets that count ("mean"), or each token's loss times its weight, (B, T) ("none").
    Several chunks are recomputed in the backward pass, a single one is kept; the product is in the compute dtype, the softmax in fp32.
    """
    assert reduction in ("mean", "none"), reduction
    n = max(1, LOSS_CHUNK // weight.size(0))
    chunks = list(zip(x.flatten(0, 1).split(n), targets.flatten().split(n)))
    if len(chunks) == 1 or not torch.is_grad_enabled():  # nothing to save by recomputing the only one
        losses = [_chunk_loss(c, weight, bias, t) for c, t in chunks]
    else:
        losses = [checkpoint(_chunk_loss, c, weight, bias, t, use_reentrant=False, preserve_rng_state=False) for c, t in chunks]
    losses = torch.cat(losses).view_as(targets)
    weights = (targets >= 0).float() if loss_weights is None else loss_weights.float() * (targets >= 0)
    losses = losses * weights
    # no target at all gives 0, not nan
    return losses if reduction == "none" else losses.sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


# ---------------------------------------------------------------------------------------------------- the model

class I3(nn.Module):
    """Decoder-only language model. With attention blocks, a sequence beyond the context or the cache is a ValueError. Without
    them a sequence may be of any length: positions past the context take the last position's embedding."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.d_model % cfg.n_head or (cfg.d_inner or cfg.d_model) % cfg.n_head or cfg.n_layer + cfg.n_attention < 1:
            raise ValueError(f"n_head {cfg.n_head} must divide d_model {cfg.d_model} and d_inner {cfg.d_inner}, and there must be a block")
        self.cfg = cfg
        self.embed, self.position = nn.Embedding(cfg.vocab_size, cfg.d_model), nn.Embedding(cfg.context_length, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, Mixer if i < cfg.n_layer else Attention) for i in range(cfg.n_layer + cfg.n_attention))
        self.norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.head_down = nn.Linear(cfg.d_model, cfg.head_rank, bias=False) if cfg.head_rank else nn.Identity()
        self.head = nn.Linear(cfg.head_rank or cfg.d_model, cfg.vocab_size)
        self.names = [name for name, _ in self.named_parameters()]  # roles() is asked once for each, and walking the modules takes long
        self.init_weights()

    @property
    def max_len(self):
        """Longest sequence: the context, or no limit if nothing attends."""
        return self.cfg.context_length if self.cfg.n_attention else NO_LIMIT

    def roles(self):
        """End of a parameter's name -> (role, rows of each map in a fused matrix).

        The one table that initialisation and train.py's optimizers go by. A "matrix" is a linear map inside a block (Muon
        orthogonalises each map alone, hence the rows); "embedding", "head" and "vector" go to AdamW, vectors without weight decay.
        A_log and the four μ are tables of per-channel scalars, no maps.
        """
        d, matrix, vector = self.cfg.d_model, ("matrix", None), ("vector", None)
        table = {"embed.weight": ("embedding", None), "position.weight": ("embedding", None), "norm.weight": vector, "norm.bias": vector,
                 "head_down.weight": ("head", None), "head.weight": ("head", None), "head.bias": vector,
                 **{f"mixer.{name}": vector for name in ("mix", "A_log", "D", "r", "r_bias", "norm_weight", "norm_bias")},
                 **{f"mixer.{name}.weight": matrix for name in ("inner", "outer", "delta_down", "delta_up", "B", "C")},
                 **{f"mixer.{name}.bias": vector for name in ("delta_down", "delta_up", "B", "C")},
                 "qkv.weight": ("matrix", (d, d, d)), "qkv.bias": vector, "out.weight": matrix, "out.bias": vector,
                 **{f"ffn.{name}.weight": matrix for name in ("up", "up.0", "up.1", "down", "down.0", "down.1")},
                 **{f"ffn.{name}.bias": vector for name in ("up", "up.1", "down", "down.1")}}
        return {end: role for end, role in table.items() if any(name.endswith(end) for name in self.names)}

    def init_weights(self):
        """normal(0, 0.02); the projections that write into the residual stream start 1 / sqrt(2 layers) smaller, and the inner half of a
        low-rank map keeps the scale of its input, else the product of two small maps learns slowly. Biases 0, norms 1.

        The scan starts as Mamba's does: A_log = log(1..N), so that the states of a channel decay at N different speeds; the bias of Δ
        such that softplus makes it a step of 0.001 to 0.1, evenly over the channels' logarithms; D = 1. Each μ goes evenly from 0 (the
        token before) to 1 (this one) over the channels. r = 1, r_bias = 0.
        """
        small = 1 / math.sqrt(2 * len(self.blocks))
        for name, p in self.named_parameters():
            if name.endswith((".0.weight", "head_down.weight")):
                nn.init.normal_(p, std=p.size(1) ** -0.5)
            elif name.endswith(".weight") and p.ndim == 2:
                writes = name.endswith(("mixer.outer.weight", "out.weight", "ffn.down.weight", "ffn.down.1.weight"))
                nn.init.normal_(p, std=0.02 * small if writes else 0.02)
            else:
                nn.init.constant_(p, 1.0 if name.endswith(("norm.weight", "mixer.norm_weight", "mixer.r", "mixer.D")) else 0.0)
        with torch.no_grad():
            for mixer in (b.mixer for b in self.blocks if isinstance(b.mixer, Mixer)):
                N, channels, d = mixer.A_log.size(1), mixer.D.numel(), mixer.mix.size(1)
                mixer.A_log.copy_(torch.arange(1, N + 1).float().log().expand(channels, N))
                mixer.delta_up.bias.copy_(torch.logspace(-3, -1, channels)[torch.randperm(channels)].expm1().log())  # softplus^-1
                for mix in mixer.mix:
                    mix.copy_(torch.linspace(0, 1, d)[torch.randperm(d)])

    @property
    def n_params(self):
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations of training on one token in a window of T: 6 per weight of a matrix product (forward 2,
        backward 4) and 6 d T per attention layer, whose queries see T / 2 keys on average. The scan is not counted: what limits
        it are exponentials, 2 per channel and state (forward, and again in the backward pass), not products."""
        matrices = sum(p.numel() for name, p in self.named_parameters() for end, (role, _) in self.roles().items()
                       if name.endswith(end) and role in ("matrix", "head"))
        return 6 * matrices + 6 * self.cfg.n_attention * self.cfg.d_model * T

    def forward(self, idx, targets=None, loss_weights=None, reduction="mean", cache=None, all_logits=False, reset=None):
        """idx int64 (B, T) -> (logits, loss).

        With targets (B, T; -1 ignored) and perhaps loss_weights (B, T): (None, loss), see `chunked_loss`.
        Without: (logits of the last position (B, 1, V), or of all with all_logits=True, None).
        With a cache from `init_cache`, idx continues what the cache has seen, and the cache goes on.
        reset, bool (B, T), is true where a document begins: each one is read as if it stood alone (not together with a cache).
        """
        start, T = (0 if cache is None else cache.length), idx.size(1)
        limit = self.max_len if cache is None else cache.max_len
        if start + T > limit:
            raise ValueError(f"{start + T} tokens are more than the {'context' if cache is None else 'cache'} of {limit}")
        mask, position = None, torch.arange(start, start + T, device=idx.device)
        if reset is not None:
            assert cache is None, "a cache holds one document"
            mask = within_documents(reset, self.embed.weight.dtype) if self.cfg.n_attention else None
            position = position - torch.where(reset, position, 0).cummax(1).values
        x = self.embed(idx) + self.position(position.clamp(max=self.cfg.context_length - 1))  # (B, T, d)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.states[layer], reset, mask)
        if cache is not None:
            cache.length += T
        x = self.head_down(self.norm(x if all_logits or targets is not None else x[:, -1:]))
        if targets is not None:
            return None, chunked_loss(x, self.head.weight, self.head.bias, targets, loss_weights, reduction)
        return self.head(x), None

    def init_cache(self, batch_size, max_len=None, dtype=None):
        """An empty cache for batch_size sequences of up to max_len tokens (default: as many as the model can); dtype, the weights' by
        default, is that of keys, values and last inputs. Without attention blocks its size does not depend on max_len."""
        max_len, weight = max_len or self.max_len, self.embed.weight
        if max_len > self.max_len:
            raise ValueError(f"a cache of {max_len} tokens is longer than the context of {self.max_len}")
        own, size = (self.cfg, batch_size), (dtype or weight.dtype, weight.device)
        return Cache([MixerState(*own, *size) if isinstance(b.mixer, Mixer) else AttentionState(*own, max_len, *size) for b in self.blocks], max_len)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, stop_token=None, generator=None):
        """Continues idx (B, T) by up to max_new_tokens: returns (B, T + new). temperature 0 takes the likeliest token.

        top_k keeps the k likeliest tokens, top_p the smallest set of at least that probability (arXiv 1904.09751),
        repetition_penalty divides the odds of tokens already present (arXiv 1909.05858). Ends early once every row has
        produced stop_token. Where there are attention blocks and the context is full, its second half is read anew.
        """
        cache, new, C = None, idx, self.max_len
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


Config, Model = I3Config, I3

_I3_22M = (I3Config(), dict(
    # The card: chats, 17 hours on an RTX 3060 at some 10 s a step. It names neither batch nor optimizer; this is one pass over TinyChat.
    data="tinychat", tokenizer="chunk", block_size=256, batch_tokens=32_768, micro_batch=32, max_steps=4000, optimizer="adamw", lr=3e-4,
    weight_decay=0.1, grad_clip=1.0, schedule="cosine", warmup_steps=100, final_lr_fraction=0.1, ema_beta=0.999))
# d_inner is not on the cards: 528 and 1856 are what gives their numbers of parameters. Nor can the d_model of 512 on the 200M's be right.
PRESETS = {
    "i3": _I3_22M,
    "i3-22m": _I3_22M,
    "i3-80m": (I3Config(vocab_size=35_560, n_layer=10, n_attention=6, d_state=32, d_inner=528, delta_rank=32, ffn_rank=0, head_rank=0), dict(
        # the card: 3M tokens or more, batches of 4 windows
        data="i3-80m", tokenizer="chunk", block_size=256, batch_tokens=1024, micro_batch=4, max_steps=3000, optimizer="adamw", lr=3e-4,
        weight_decay=0.1, grad_clip=1.0, schedule="cosine", warmup_steps=100, final_lr_fraction=0.1, ema_beta=0.999)),
    "i3-200m": (I3Config(vocab_size=32_000, n_layer=10, n_attention=6, d_model=768, d_state=32, d_inner=1856, delta_rank=32, ffn_rank=0,
                         head_rank=0), dict(
        # the card: 250 steps of 4 windows; of the warm-up it only says that there is one
        data="i3-200m", tokenizer="bpe", block_size=256, batch_tokens=1024, micro_batch=4, max_steps=250, optimizer="adamw", lr=4e-4,
        weight_decay=0.1, grad_clip=1.0, schedule="cosine", warmup_steps=25, final_lr_fraction=0.1, ema_beta=0.999)),
}
