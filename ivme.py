"""İvme-Conversate 22M: a Llama-like decoder small enough to train in an evening.

Pre-norm RMSNorm (arXiv 1910.07467), rotary positions (RoPE, arXiv 2104.09864), grouped-query attention
(GQA, arXiv 2305.13245), SwiGLU feed-forward (arXiv 2002.05202), one matrix for the embedding and the output head,
no biases. Sizes and recipe are those of the model card IvmeLabs/Ivme-Conversate-22M-Base; the arithmetic is that of
`transformers.LlamaForCausalLM`, to which the weights map one to one.

Symbols, after the papers:
    B  batch      T  tokens given in this call      S  tokens attended to (T plus what the cache holds)
    d  d_model    H  query heads                    K  key and value heads, each shared by H / K query heads
    D  width of a head                              V  vocabulary

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
class IvmeConfig:
    vocab_size: int = 16_384  # tokens in the vocabulary
    context_length: int = 1024  # longest sequence the model attends over
    n_layer: int = 10  # transformer blocks
    d_model: int = 384  # width of the residual stream
    n_head: int = 6  # query heads
    n_kv_head: int = 2  # key and value heads; must divide n_head
    d_ff: int = 1024  # width of the feed-forward's hidden layer
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm


# ---------------------------------------------------------------------------------------------------- building blocks

def at_least_fp32(x):
    """x in fp32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def recompute(f, *args):
    """f(*args), whose inner values are not kept: the backward pass computes them again (arXiv 2205.05198)."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, d, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        weight = at_least_fp32(self.weight)
        return F.rms_norm(at_least_fp32(x), weight.shape, weight, self.eps).type_as(x)


def rope_tables(context_length, head_dim, theta):
    """Cosines and sines of the rotary angles t * theta^(-2i/D), each (context_length, D / 2), fp32."""
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(context_length).float(), frequency)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates the pairs (x_i, x_{i + D/2}) of x (B, heads, T, D) by the angles of their positions.

    A pair takes one number from each half of x: this is Llama's layout in `transformers`. If pairs were neighbours,
    its weights would have to be permuted.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # fp32, as the tables


class Attention(nn.Module):
    """Causal grouped-query attention: H query heads share K = n_kv_head key and value heads (arXiv 2305.13245)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        self.head_dim = cfg.d_model // cfg.n_head
        self.qkv = nn.Linear(cfg.d_model, (cfg.n_head + 2 * cfg.n_kv_head) * self.head_dim, bias=False)
        self.out = nn.Linear(cfg.n_head * self.head_dim, cfg.d_model, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, D)
        y = causal_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def causal_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v for the last T of S positions: q (B, H, T, D), k, v (B, K, S, D) -> (B, H, T, D).
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
    if mask is not None or (v.is_cuda and v.dtype == torch.float32):
        # quick attention with a mask, or in fp32 on CUDA, has no shared heads: every query head gets a copy
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S and mask is None, enable_gqa=True)


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


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x), gate and up fused into one matrix (arXiv 2002.05202)."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up = nn.Linear(cfg.d_model, 2 * cfg.d_ff, bias=False)
        self.down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x):
        return recompute(self.gated_down, self.gate_up(x))

    def gated_down(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(RMSNorm(x)), then x + feed-forward(RMSNorm(x)).

    The norms and the gate are recomputed in the backward pass. A step at B 8, T 1024 would otherwise need more than
    3 GB in bf16. No matrix product is computed twice.
    """

    def __init__(self, cfg):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.ffn = SwiGLU(cfg)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        x = x + self.attn(recompute(self.attn_norm, x), cos, sin, mask, cache, layer)
        return x + self.ffn(recompute(self.ffn_norm, x))


class Cache:
    """Keys and values of the tokens seen so far, per layer (B, heads, max_len, D); `length` positions are filled."""

    def __init__(self, n_layer, shape, dtype, device):
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.length = 0
        self.max_len = shape[2]

    def append(self, layer, k, v):
        """Stores k and v (B, heads, T, D) behind what is there, and returns all of both, (B, heads, S, D)."""
        S = self.length + k.size(2)
        self.k[layer][:, :, self.length:S] = k
        self.v[layer][:, :, self.length:S] = v
        return self.k[layer][:, :, :S].to(k.dtype), self.v[layer][:, :, :S].to(v.dtype)


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

class IvmeConversate(nn.Module):
    """Decoder-only language model. Raises ValueError for a sequence beyond the context or the cache."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.d_model % cfg.n_head or cfg.n_head % cfg.n_kv_head or cfg.d_model // cfg.n_head % 2:
            raise ValueError(f"n_head {cfg.n_head} must divide d_model {cfg.d_model} into heads of an even width, "
                             f"and n_kv_head {cfg.n_kv_head} must divide n_head")
        self.cfg = cfg
        self.max_len = cfg.context_length  # tokens in the longest sequence
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)  # also the output head
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        cos, sin = rope_tables(cfg.context_length, cfg.d_model // cfg.n_head, cfg.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def roles(self):
        """End of a parameter's name -> (role, rows of each map in a fused matrix).

        Each parameter must match exactly one end: "norm.weight" stands for all norms. Initialisation and train.py's
        optimizers both go by this table. A "matrix" is a linear map inside a block. Muon orthogonalises each map alone
        and therefore needs the rows. AdamW trains "embedding" and "vector", without weight decay on vectors.
        """
        cfg = self.cfg
        q_rows, kv_rows = cfg.d_model, cfg.n_kv_head * (cfg.d_model // cfg.n_head)
        return {
            "embed.weight": ("embedding", None),
            "norm.weight": ("vector", None),
            "qkv.weight": ("matrix", (q_rows, kv_rows, kv_rows)),
            "out.weight": ("matrix", None),
            "gate_up.weight": ("matrix", (cfg.d_ff, cfg.d_ff)),
            "down.weight": ("matrix", None),
        }

    def init_weights(self):
        """normal(0, 0.02), divided by sqrt(2 layers) for matrices that write into the residual stream; norms are 1."""
        for name, p in self.named_parameters():
            (role,) = [role for end, (role, _) in self.roles().items() if name.endswith(end)]
            if role == "vector":
                nn.init.ones_(p)
            elif name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.cfg.n_layer))
            else:
                nn.init.normal_(p, std=0.02)

    @property
    def n_params(self):
        """Number of parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """FLOP of training on one token in a window of T: 6 per weight of a matrix product (forward 2, backward 4), and
        6 d T per layer for causal attention, whose queries see T / 2 keys on average."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if not name.endswith("norm.weight"))
        return 6 * matrices + 6 * self.cfg.n_layer * self.cfg.d_model * T

    def forward(self, idx, targets=None, loss_weights=None, reduction="mean", cache=None, all_logits=False, reset=None):
        """idx int64 (B, T) -> (logits, loss).

        With targets (B, T; -1 ignored) and perhaps loss_weights (B, T): (None, loss), see `chunked_loss`.
        Without: (logits of the last position (B, 1, V), or of all with all_logits=True, None).
        With a cache from `init_cache`, idx continues what the cache has seen, and its keys and values are added.
        reset, bool (B, T), is true where a document begins: each is read as if it stood alone. It excludes a cache.
        Raises ValueError for a sequence beyond the context or the cache.
        """
        T = idx.size(1)
        start, limit, what = (0, self.max_len, "context") if cache is None else (cache.length, cache.max_len, "cache")
        if start + T > limit:
            raise ValueError(f"{start + T} tokens are more than the {what} of {limit}")
        mask = None
        if reset is not None:
            assert cache is None, "a cache holds one document"
            mask = within_documents(reset, self.embed.weight.dtype)
        # the positions go on counting over documents, because rotary angles only matter relative to each other
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]

        x = self.embed(idx)  # (B, T, d)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, cache, layer)
        if cache is not None:
            cache.length += T

        if targets is not None:
            return None, chunked_loss(self.norm(x), self.embed.weight, targets, loss_weights, reduction)
        if not all_logits:
            x = x[:, -1:]
        return F.linear(self.norm(x), self.embed.weight), None

    def init_cache(self, batch_size, max_len=None, dtype=None):
        """An empty cache for batch_size sequences of up to max_len tokens; the default is the context.

        dtype is that of the keys and values; the default is that of the weights. Raises ValueError for a max_len
        beyond the context.
        """
        max_len = max_len or self.max_len
        if max_len > self.max_len:
            raise ValueError(f"a cache of {max_len} tokens is longer than the context of {self.max_len}")
        cfg, weight = self.cfg, self.embed.weight
        shape = (batch_size, cfg.n_kv_head, max_len, cfg.d_model // cfg.n_head)
        return Cache(cfg.n_layer, shape, dtype or weight.dtype, weight.device)

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


# Part of a block -> its name in a layer of `transformers`, which keeps the maps of a fused matrix apart
IN_TRANSFORMERS = {
    "attn_norm": ("input_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
}


def to_transformers(state, cfg):
    """A state_dict under the names of `transformers.LlamaForCausalLM`, whose output head is the embedding."""
    kv_rows = cfg.n_kv_head * (cfg.d_model // cfg.n_head)
    rows = {"attn.qkv": (cfg.d_model, kv_rows, kv_rows), "ffn.gate_up": (cfg.d_ff, cfg.d_ff)}
    theirs = {"model.embed_tokens.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"]}
    for i in range(cfg.n_layer):
        for part, names in IN_TRANSFORMERS.items():
            weight = state[f"blocks.{i}.{part}.weight"]
            maps = weight.split(rows.get(part, len(weight)))
            theirs |= {f"model.layers.{i}.{name}.weight": own for name, own in zip(names, maps, strict=True)}
    return theirs


def from_transformers(state):
    """The way back: a state_dict of this file from one of `transformers`. KeyError if a weight is missing."""
    ours = {"embed.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    n_layer = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
    for i in range(n_layer):
        for part, names in IN_TRANSFORMERS.items():
            ours[f"blocks.{i}.{part}.weight"] = torch.cat([state[f"model.layers.{i}.{name}.weight"] for name in names])
    return ours


Config, Model = IvmeConfig, IvmeConversate

# The card's run: 1,447 steps of 1,048,576 tokens over the five sources in ascending quality.
_CARD = dict(
    data="ivme", tokenizer="bpe", order="sequential",
    block_size=1024, batch_tokens=1_048_576, micro_batch=32, max_steps=1447,
    optimizer="muon", muon_lr=0.02, lr=3e-4, weight_decay=0.1, grad_clip=1.0,
    schedule="wsd", warmup_steps=100, decay_fraction=0.2, final_lr_fraction=0.0, ema_beta=0.999)
PRESETS = {
    "ivme": (IvmeConfig(), _CARD),
    # The same model, data and number of tokens. Shuffled sources, a high rate for embeddings, and smaller steps with
    # half of Muon's rate were better in short runs; the longer decay was as good. Together they beat the card's recipe
    # in half an hour on two cores (MEASUREMENTS.md). At 1.5 billion tokens they have not been compared yet.
    "ivme-tuned": (IvmeConfig(), dict(
        _CARD, order="random", batch_tokens=262_144, max_steps=5788, muon_lr=0.01, lr=1e-2, decay_fraction=0.45,
        ema_beta=0.99)),
}
