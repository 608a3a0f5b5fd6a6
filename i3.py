"""i3: language models made of RWKV-Mamba hybrid blocks, with attention blocks on top in the larger ones.

A hybrid block mixes over time with a selective state-space model (Mamba, arXiv 2312.00752) between RWKV's token shift
and receptance gate (arXiv 2305.13048, 2404.05892). Decoding a token costs the same however long the text is, because
the block keeps a state instead of a growing cache. Sizes are those of the model cards i3-22m, i3-80m and i3-200m. Their
code loops over time in Python; here `kernels.selective_scan` does the work.

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

from kernels import MAX_STATES, selective_scan, selective_scan_step

NO_LIMIT = 2 ** 40  # tokens in the longest sequence of a model that has no attention


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

def at_least_fp32(x):
    """x in fp32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def recompute(f, *args):
    """f(*args), whose inner values are not kept: the backward pass computes them again (arXiv 2205.05198)."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


class FeedForward(nn.Module):
    """W_2 gelu(W_1 x), four times as wide inside. A low-rank map has no inner bias, because it has an outer one."""

    def __init__(self, cfg):
        super().__init__()
        d, r = cfg.d_model, cfg.ffn_rank
        self.up = nn.Sequential(nn.Linear(d, r, bias=False), nn.Linear(r, 4 * d)) if r else nn.Linear(d, 4 * d)
        self.down = nn.Sequential(nn.Linear(4 * d, r, bias=False), nn.Linear(r, d)) if r else nn.Linear(4 * d, d)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Mixer(nn.Module):
    """Token shift, selective scan, GroupNorm per head and token, receptance gate: the equations at this file's top."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.eps, self.scan = cfg.n_head, cfg.norm_eps, cfg.scan
        d, inner, N = cfg.d_model, cfg.d_inner or cfg.d_model, cfg.d_state
        self.mix = nn.Parameter(torch.empty(4, d))  # μ of u, δ, b, c
        self.inner = nn.Linear(d, inner, bias=False) if cfg.d_inner else nn.Identity()
        self.outer = nn.Linear(inner, d, bias=False) if cfg.d_inner else nn.Identity()
        self.delta_down, self.delta_up = nn.Linear(d, cfg.delta_rank), nn.Linear(cfg.delta_rank, inner)
        self.B, self.C = nn.Linear(d, N), nn.Linear(d, N)
        self.A_log, self.D = nn.Parameter(torch.empty(inner, N)), nn.Parameter(torch.empty(inner))
        self.r, self.r_bias = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner))

    def forward(self, x, state=None, reset=None, mask=None):
        """x (B, T, d) -> (B, T, d). x continues from `state`, if given, which then moves on to the end of x."""
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
        # Δ in fp32: its bias sets the time scale at the start, and rounded to bf16 it would be off by percents
        delta = at_least_fp32(F.linear(self.delta_down(δ), self.delta_up.weight)) + at_least_fp32(self.delta_up.bias)
        delta = F.softplus(delta)
        A, B, C = -at_least_fp32(self.A_log).exp(), self.B(b), self.C(c)
        if state is None:
            return selective_scan(u, delta, A, B, C, self.D, reset=reset)
        if u.size(1) == 1:
            return selective_scan_step(state.h, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], self.D)[:, None]
        y, h = selective_scan(u, delta, A, B, C, self.D, h0=state.h, return_state=True)
        state.h.copy_(h.detach())
        return y


class Attention(nn.Module):
    """Causal multi-head attention with biases; queries, keys and values are fused into one matrix."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, state=None, reset=None, mask=None):
        qkv = self.qkv(x).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2)  # (B, 3H, T, D)
        q, k, v = qkv.chunk(3, dim=1)
        if state is not None:
            k, v = state.append(k, v)  # (B, H, S, D)
        return self.out(causal_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def causal_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v for the last T of S positions: q (B, H, T, D), k, v (B, H, S, D) -> (B, H, T, D).
    A mask (B, 1, T, S), if given, is added to the scores and replaces the causal triangle."""
    if v.device.type == "cpu" and v.dtype == torch.bfloat16:  # in bf16 a CPU takes up to twice as long as in fp32
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float(), mask).type_as(v)
    T, S = q.size(2), k.size(2)
    q, k = q.type_as(v), k.type_as(v)
    if mask is not None:
        mask = mask.type_as(v)
    elif 1 < T < S:  # is_causal would align the triangle with the first key, but these queries are the last T positions
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S and mask is None)


def within_documents(reset, dtype):
    """Attention mask (B, 1, T, T) for packed documents: -inf at later tokens and at other documents, else 0.

    reset, bool (B, T), is true where a document begins; dtype is that of the weights. The mask has the dtype that
    attention computes in, so that one mask serves all layers: of any other mask, bool included, each layer would keep
    a copy for the backward pass. Under autocast this is autocast's dtype, but on a CPU fp32, see `causal_attention`.
    """
    device = reset.device
    if device.type != "cpu" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    # rows of a multiple of 8 numbers: CUDA's memory-efficient attention would copy other rows, again in every layer
    B, T = reset.shape
    mask = torch.zeros(B, 1, T, math.ceil(T / 8) * 8, dtype=dtype, device=device)[..., :T]
    document = reset.cumsum(1)  # number of the document that each token belongs to
    later = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
    unseen = (document[:, :, None] != document[:, None, :]) | later
    return mask.masked_fill_(unseen[:, None], -math.inf)


class Block(nn.Module):
    """x + mixer(LayerNorm(x)), then x + feed-forward(LayerNorm(x)); the mixer is a Mixer or an Attention."""

    def __init__(self, cfg, mixer):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.mixer = mixer(cfg)
        self.ffn_norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.ffn = FeedForward(cfg)

    def forward(self, x, state=None, reset=None, mask=None):
        x = x + self.mixer(self.mixer_norm(x), state, reset, mask)
        return x + self.ffn(self.ffn_norm(x))


# ---------------------------------------------------------------------------------------------------- decoding's memory

class MixerState:
    """What a hybrid layer keeps of the tokens so far: the scan's state h (B, channels, N), the last x (B, 1, d)."""

    def __init__(self, cfg, batch_size, dtype, weight):
        self.h = at_least_fp32(weight.new_zeros(batch_size, cfg.d_inner or cfg.d_model, cfg.d_state))
        self.x = torch.zeros(batch_size, 1, cfg.d_model, dtype=dtype, device=weight.device)


class AttentionState:
    """An attention layer's keys and values, (B, H, max_len, D) each; the first `length` are filled."""

    def __init__(self, cfg, batch_size, max_len, dtype, device):
        shape = (batch_size, cfg.n_head, max_len, cfg.d_model // cfg.n_head)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def append(self, k, v):
        """Stores k and v (B, H, T, D) behind what is there, and returns all of both, (B, H, S, D)."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length].to(k.dtype), self.v[:, :, :self.length].to(v.dtype)


class Cache:
    """What the layers keep of `length` tokens. Without attention blocks the size is constant and max_len no limit."""

    def __init__(self, states, max_len):
        self.states, self.length, self.max_len = states, 0, max_len


# ---------------------------------------------------------------------------------------------------- loss in chunks

LOSS_CHUNK = 2 ** 24  # logits in memory at once (64 MB in fp32); (B, T, V) of them would be a step's largest tensor


def chunk_loss(x, weight, bias, targets):
    return F.cross_entropy(at_least_fp32(F.linear(x, weight, bias)), targets, ignore_index=-1, reduction="none")


def chunked_loss(x, weight, targets, loss_weights=None, reduction="mean", bias=None):
    """Cross entropy of the logits x weight^T + bias, of which at most LOSS_CHUNK exist at once.

    x (B, T, d), weight (V, d), bias (V) or None, targets (B, T) of which -1 is ignored, loss_weights (B, T) or None.
    Returns the weighted mean over the targets that count ("mean"), or each token's loss times its weight, (B, T)
    ("none"). The product is in the compute dtype, softmax and loss are in fp32.
    """
    assert reduction in ("mean", "none"), reduction
    flat_x, flat_targets = x.flatten(0, 1), targets.flatten()
    n = max(1, LOSS_CHUNK // weight.size(0))  # positions in a chunk
    if flat_targets.numel() <= n:  # recomputing a single chunk would save nothing
        losses = chunk_loss(flat_x, weight, bias, flat_targets)
    else:
        chunks = zip(flat_x.split(n), flat_targets.split(n))
        losses = torch.cat([recompute(chunk_loss, c, weight, bias, t) for c, t in chunks])
    weights = (targets >= 0).to(losses.dtype)
    if loss_weights is not None:
        weights = weights * loss_weights.to(losses.dtype)
    losses = losses.view_as(targets) * weights
    if reduction == "none":
        return losses
    return losses.sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)  # without any target 0, not nan


# ---------------------------------------------------------------------------------------------------- the model

class I3(nn.Module):
    """Decoder-only language model. With attention blocks, a sequence beyond context or cache is a ValueError. Without
    them a sequence may have any length: positions past the context take the last position's embedding."""

    def __init__(self, cfg):
        super().__init__()
        n_blocks = cfg.n_layer + cfg.n_attention
        if cfg.d_model % cfg.n_head or cfg.d_inner % cfg.n_head or n_blocks < 1 or cfg.d_state > MAX_STATES:
            raise ValueError(f"n_head {cfg.n_head} must divide d_model {cfg.d_model} and d_inner {cfg.d_inner}; there "
                             f"must be a block, and d_state {cfg.d_state} be at most {MAX_STATES}")
        self.cfg, self.max_len = cfg, cfg.context_length if cfg.n_attention else NO_LIMIT  # longest sequence in tokens
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = nn.Embedding(cfg.context_length, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, m) for m in [Mixer] * cfg.n_layer + [Attention] * cfg.n_attention)
        self.norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.head_down = nn.Linear(cfg.d_model, cfg.head_rank, bias=False) if cfg.head_rank else nn.Identity()
        self.head = nn.Linear(cfg.head_rank or cfg.d_model, cfg.vocab_size)
        self.names = [name for name, _ in self.named_parameters()]  # for roles(), which is called once for each
        self.init_weights()

    def roles(self):
        """End of a parameter's name -> (role, rows of each map in a fused matrix), for train.py's optimizers.

        A "matrix" is a linear map inside a block. Muon orthogonalises each map alone and therefore needs the rows.
        AdamW trains "embedding", "head" and "vector", without weight decay on vectors. A_log and μ are no maps.
        """
        maps = [f"mixer.{name}" for name in ("inner", "outer", "delta_down", "delta_up", "B", "C", "qkv", "out")]
        maps += [f"ffn.{name}" for name in ("up", "up.0", "up.1", "down", "down.0", "down.1")]
        vectors = [f"mixer.{name}" for name in ("mix", "A_log", "D", "r", "r_bias", "norm_weight", "norm_bias")]
        vectors += [f"{name}.bias" for name in ("norm", "head", *maps)] + ["norm.weight"]
        table = {
            **dict.fromkeys(("embed.weight", "position.weight"), ("embedding", None)),
            **dict.fromkeys(("head_down.weight", "head.weight"), ("head", None)),
            **dict.fromkeys([f"{name}.weight" for name in maps], ("matrix", None)),
            **dict.fromkeys(vectors, ("vector", None)),
            "mixer.qkv.weight": ("matrix", (self.cfg.d_model,) * 3),
        }
        return {end: role for end, role in table.items() if any(name.endswith(end) for name in self.names)}

    def init_weights(self):
        """normal(0, 0.02), divided by sqrt(2 layers) for matrices that write into the residual stream; the inner half
        of a low-rank map keeps its input's scale, because the product of two small maps would learn slowly.

        The scan starts as Mamba's does. A_log = log(1..N): a channel's states decay at N different speeds. Softplus of
        Δ's bias gives steps of 0.001 to 0.1, even over the channels on a logarithmic scale. Each μ goes evenly from 0
        (the token before) to 1 (this one) over the channels. D, r and the norms' weights are 1, other biases 0.
        """
        for name, p in self.named_parameters():
            if name.endswith((".0.weight", "head_down.weight")):
                nn.init.normal_(p, std=p.size(1) ** -0.5)
            elif name.endswith(("mixer.outer.weight", "out.weight", "ffn.down.weight", "ffn.down.1.weight")):
                nn.init.normal_(p, std=0.02 * (1 / math.sqrt(2 * len(self.blocks))))
            elif name.endswith(".weight") and p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith(("norm.weight", "mixer.norm_weight", "mixer.r", "mixer.D")):
                nn.init.ones_(p)
            else:
                nn.init.zeros_(p)
        with torch.no_grad():
            for mixer in (block.mixer for block in self.blocks[:self.cfg.n_layer]):
                N, channels, d = mixer.A_log.size(1), mixer.D.numel(), mixer.mix.size(1)
                mixer.A_log.copy_(torch.arange(1, N + 1).float().log().expand(channels, N))
                step = torch.logspace(-3, -1, channels)[torch.randperm(channels)]
                mixer.delta_up.bias.copy_(step.expm1().log())  # softplus^-1
                for mix in mixer.mix:
                    mix.copy_(torch.linspace(0, 1, d)[torch.randperm(d)])

    @property
    def n_params(self):
        """Number of parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """FLOP of training on one token in a window of T: 6 per weight of a matrix product (forward 2, backward 4), and
        6 d T per attention layer, whose queries see T / 2 keys on average. The scan is not counted: its time goes into
        exponentials, 2 per channel and state (one forward, one backward), not into products."""
        ends = tuple(end for end, (role, _) in self.roles().items() if role in ("matrix", "head"))
        matrices = sum(p.numel() for name, p in self.named_parameters() if name.endswith(ends))
        return 6 * matrices + 6 * self.cfg.n_attention * self.cfg.d_model * T

    def forward(self, idx, targets=None, loss_weights=None, reduction="mean", cache=None, all_logits=False, reset=None):
        """idx int64 (B, T) -> (logits, loss).

        With targets (B, T; -1 ignored) and perhaps loss_weights (B, T): (None, loss), see `chunked_loss`.
        Without: (logits of the last position (B, 1, V), or of all with all_logits=True, None).
        With a cache from `init_cache`, idx continues what the cache has seen, and the cache moves on.
        reset, bool (B, T), is true where a document begins: each is read as if it stood alone. It excludes a cache.
        Raises ValueError for a sequence beyond the context or the cache.
        """
        T = idx.size(1)
        start, limit, what = (0, self.max_len, "context") if cache is None else (cache.length, cache.max_len, "cache")
        if start + T > limit:
            raise ValueError(f"{start + T} tokens are more than the {what} of {limit}")
        mask, position = None, torch.arange(start, start + T, device=idx.device)
        if reset is not None:
            assert cache is None, "a cache holds one document"
            if self.cfg.n_attention:
                mask = within_documents(reset, self.embed.weight.dtype)
            position = position - torch.where(reset, position, 0).cummax(1).values  # since the document's beginning

        x = self.embed(idx) + self.position(position.clamp(max=self.cfg.context_length - 1))  # (B, T, d)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.states[layer], reset, mask)
        if cache is not None:
            cache.length += T

        if targets is None and not all_logits:
            x = x[:, -1:]
        x = self.head_down(self.norm(x))
        if targets is not None:
            return None, chunked_loss(x, self.head.weight, targets, loss_weights, reduction, self.head.bias)
        return self.head(x), None

    def init_cache(self, batch_size, max_len=None, dtype=None):
        """An empty cache for batch_size sequences of up to max_len tokens (default: self.max_len; more: ValueError).
        dtype, by default that of the weights, is that of keys, values and last inputs."""
        max_len = max_len or self.max_len
        if max_len > self.max_len:
            raise ValueError(f"a cache of {max_len} tokens is longer than the context of {self.max_len}")
        cfg, weight = self.cfg, self.embed.weight
        dtype = dtype or weight.dtype
        states = [MixerState(cfg, batch_size, dtype, weight) for _ in range(cfg.n_layer)]
        states += [AttentionState(cfg, batch_size, max_len, dtype, weight.device) for _ in range(cfg.n_attention)]
        return Cache(states, max_len)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0,
                 stop_token=None, generator=None):
        """Continues idx (B, T) by up to max_new_tokens: returns (B, T + new). temperature 0 takes the likeliest token.

        top_k keeps the k likeliest tokens, top_p the smallest set of at least that probability (arXiv 1904.09751),
        repetition_penalty makes tokens already present less likely (arXiv 1909.05858). Ends early once every row has
        produced stop_token. When the context is full, its second half is read anew: generation can go on for ever.
        """
        cache, new = None, idx
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache is None:
                cache, new = self.init_cache(idx.size(0)), idx[:, -self.max_len:]
            elif cache.length + new.size(1) > self.max_len:
                cache, new = self.init_cache(idx.size(0)), idx[:, -(self.max_len // 2):]
            logits = self(new, cache=cache)[0][:, -1].float()  # (B, V)
            new = next_token(logits, idx, temperature, top_k, top_p, repetition_penalty, generator)
            idx = torch.cat((idx, new), dim=1)
            if stop_token is not None:
                done |= new[:, 0] == stop_token
                if done.all():
                    break
        return idx


def next_token(logits, text, temperature, top_k, top_p, repetition_penalty, generator):
    """Draws the token (B, 1) behind text (B, T) from its logits (B, V), which are changed; see `generate`."""
    if repetition_penalty != 1.0:
        seen = logits.gather(1, text)
        logits.scatter_(1, text, torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty))
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits /= temperature
    if top_k is not None:
        logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p  # where likelier tokens have that probability already
        beyond[:, 0] = False  # the likeliest token always stays
        logits.scatter_(1, order, logits.gather(1, order).masked_fill(beyond, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


Config, Model = I3Config, I3

_RECIPE = dict(block_size=256, optimizer="adamw", lr=3e-4, weight_decay=0.1, grad_clip=1.0, schedule="cosine",
               warmup_steps=100, final_lr_fraction=0.1, ema_beta=0.999)
# The card: chats, 17 hours on an RTX 3060 at some 10 s a step; no batch, no optimizer. Ours is one pass over TinyChat.
_22M = (I3Config(), dict(
    _RECIPE, data="tinychat", tokenizer="chunk", batch_tokens=32_768, micro_batch=32, max_steps=4000))
# The cards: the 80M saw 3M tokens or more in batches of 4 windows, the 200M 250 such batches after an unknown warm-up.
# d_inner is not on them: 528 and 1856 give their numbers of parameters. Nor can the 200M's d_model of 512 be right.
_LARGE = dict(n_layer=10, n_attention=6, d_state=32, delta_rank=32, ffn_rank=0, head_rank=0)
_WINDOWS = dict(_RECIPE, batch_tokens=1024, micro_batch=4)
PRESETS = {
    "i3": _22M, "i3-22m": _22M,
    # The same with Muon and WSD: at 2M parameters 2.15 bits per byte, where AdamW ends at 2.80 (MEASUREMENTS.md)
    "i3-tuned": (I3Config(), dict(
        _22M[1], optimizer="muon", muon_lr=0.02, lr=3e-3, schedule="wsd", decay_fraction=0.45, final_lr_fraction=0.0)),
    "i3-80m": (I3Config(vocab_size=35_560, d_inner=528, **_LARGE), dict(
        _WINDOWS, data="i3-80m", tokenizer="chunk", max_steps=3000)),
    "i3-200m": (I3Config(vocab_size=32_000, d_model=768, d_inner=1856, **_LARGE), dict(
        _WINDOWS, data="i3-200m", tokenizer="bpe", max_steps=250, lr=4e-4, warmup_steps=25)),
}
