"""GPT2PreLN: the GPT-2 of the 1gpu-llm releases, a bilingual English and Italian base model for one consumer GPU.

A decoder with learned positions, multi-head attention and a GELU feed-forward, all with biases (GPT-2, Radford et al. 2019), and a
LayerNorm in front of each of them (pre-LN, arXiv 2002.04745). Sizes and recipe are those of the model card
nazdef/1gpu-llm-small-en-it-base; the arithmetic is that of `transformers.GPT2LMHeadModel`, whose weights `from_transformers` renames,
OpenAI's own included (preset gpt2preln-gpt2).

Symbols, after the papers:
    B  batch      T  tokens given in this call      S  tokens attended to (T plus what the cache holds)
    d  d_model    H  attention heads                D  width of a head      V  vocabulary

The file needs torch alone. Copied into another project it trains and generates:

    model = Model(Config())
    logits, loss = model(idx, targets)              # int64 (B, T) both
    idx = model.generate(idx, max_new_tokens=100)
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPT2PreLNConfig:
    vocab_size: int = 32_000  # tokens in the vocabulary
    context_length: int = 2500  # learned positions: the longest sequence
    n_layer: int = 12  # transformer blocks
    d_model: int = 768  # width of the residual stream
    n_head: int = 12  # attention heads; must divide d_model
    tied: bool = False  # one matrix for the embedding and the output head
    norm_eps: float = 1e-5  # added to the variance in LayerNorm


# ---------------------------------------------------------------------------------------------------- building blocks

class Attention(nn.Module):
    """Causal multi-head attention with biases; queries, keys and values fused into one matrix."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv, self.out = nn.Linear(cfg.d_model, 3 * cfg.d_model), nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, mask=None, cache=None, layer=0):
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2).chunk(3, dim=1)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
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


class FeedForward(nn.Module):
    """W_down gelu(W_up x), four times as wide inside; GPT-2's GELU (arXiv 1606.08415) is the one with tanh."""

    def __init__(self, cfg):
        super().__init__()
        self.up, self.down = nn.Linear(cfg.d_model, 4 * cfg.d_model), nn.Linear(4 * cfg.d_model, cfg.d_model)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm, self.attn = nn.LayerNorm(cfg.d_model, cfg.norm_eps), Attention(cfg)
        self.ffn_norm, self.ffn = nn.LayerNorm(cfg.d_model, cfg.norm_eps), FeedForward(cfg)

    def forward(self, x, mask=None, cache=None, layer=0):
        x = x + self.attn(self.attn_norm(x), mask, cache, layer)
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
    if len(chunks) == 1 or not torch.is_grad_enabled():  # nothing to save by recomputing the only one
        losses = [_chunk_loss(c, weight, t) for c, t in chunks]
    else:
        losses = [checkpoint(_chunk_loss, c, weight, t, use_reentrant=False, preserve_rng_state=False) for c, t in chunks]
    losses = torch.cat(losses).view_as(targets)
    weights = (targets >= 0).float() if loss_weights is None else loss_weights.float() * (targets >= 0)
    losses = losses * weights
    # no target at all gives 0, not nan
    return losses if reduction == "none" else losses.sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


# ---------------------------------------------------------------------------------------------------- the model

class GPT2PreLN(nn.Module):
    """Decoder-only language model. Raises ValueError for a sequence beyond the context or the cache."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.d_model % cfg.n_head:
            raise ValueError(f"n_head {cfg.n_head} must divide d_model {cfg.d_model}")
        self.cfg = cfg
        self.embed, self.position = nn.Embedding(cfg.vocab_size, cfg.d_model), nn.Embedding(cfg.context_length, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.head = None if cfg.tied else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.init_weights()

    @property
    def head_weight(self):
        """(V, d): the output head's own matrix, or the embedding's."""
        return self.embed.weight if self.head is None else self.head.weight

    def roles(self):
        """End of a parameter's name -> (role, rows of each map in a fused matrix).

        The one table that initialisation and train.py's optimizers go by. A "matrix" is a linear map inside a block (Muon
        orthogonalises each map alone, hence the rows); "embedding", "head" and "vector" go to AdamW, vectors without weight decay.
        """
        d, matrix, vector = self.cfg.d_model, ("matrix", None), ("vector", None)
        return {"embed.weight": ("embedding", None), "position.weight": ("embedding", None), "norm.weight": vector, "norm.bias": vector,
                "qkv.weight": ("matrix", (d, d, d)), "qkv.bias": vector, "out.weight": matrix, "out.bias": vector,
                "up.weight": matrix, "up.bias": vector, "down.weight": matrix, "down.bias": vector,
                **({} if self.cfg.tied else {"head.weight": ("head", None)})}

    def init_weights(self):
        """normal(0, 0.02); the projections that write into the residual stream start 1 / sqrt(2 layers) smaller. Biases 0, norms 1."""
        for name, p in self.named_parameters():
            (role, _), = (r for end, r in self.roles().items() if name.endswith(end))
            into_residual = name.endswith(("out.weight", "down.weight"))
            if role == "vector":
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            else:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.cfg.n_layer) if into_residual else 0.02)

    @property
    def n_params(self):
        """Number of parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations of training on one token in a window of T: 6 per weight of a matrix product (forward 2,
        backward 4) and 6 d T per layer for causal attention, whose queries see T / 2 keys on average."""
        matrices = sum(p.numel() for name, p in self.blocks.named_parameters() if p.ndim == 2) + self.head_weight.numel()
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
        mask, position = None, torch.arange(start, start + T, device=idx.device)
        if reset is not None:
            assert cache is None, "a cache holds one document"
            mask, position = within_documents(reset, self.embed.weight.dtype), position - torch.where(reset, position, 0).cummax(1).values
        x = self.embed(idx) + self.position(position)  # (B, T, d)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.length += T
        if targets is not None:
            return None, chunked_loss(self.norm(x), self.head_weight, targets, loss_weights, reduction)
        x = self.norm(x if all_logits else x[:, -1:])
        return F.linear(x, self.head_weight), None

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


def from_transformers(state):
    """The state_dict of a `transformers.GPT2LMHeadModel` under this file's names. Its Conv1D keeps matrices transposed.

    model.load_state_dict(from_transformers(GPT2LMHeadModel.from_pretrained("gpt2").state_dict())) gives preset gpt2preln-gpt2 OpenAI's weights.
    """
    names = {r"transformer\.": "", r"wte": "embed", r"wpe": "position", r"^h\.": "blocks.", r"ln_1": "attn_norm", r"ln_2": "ffn_norm", r"ln_f": "norm",
             r"attn\.c_attn": "attn.qkv", r"attn\.c_proj": "attn.out", r"mlp\.c_fc": "ffn.up", r"mlp\.c_proj": "ffn.down", r"lm_head": "head"}
    ours, tied = {}, torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    for name, value in state.items():
        if re.search(r"\.attn\.(masked_)?bias$", name) or tied and name == "lm_head.weight":  # a causal mask that old files hold; the same matrix again
            continue
        transposed = re.search(r"c_(attn|proj|fc)\.weight$", name)
        for theirs, own in names.items():
            name = re.sub(theirs, own, name)
        ours[name] = value.T.contiguous() if transposed else value
    return ours


Config, Model = GPT2PreLNConfig, GPT2PreLN

# The card: source-balanced windows of 2,500, 6 x 16 of them a step, 2e-4 held for 8,000 steps; then, with
# --decay_only --decay_steps=800 from one of the kept checkpoints, down to 2e-5. The tail's best was step 8,600.
_RECIPE = dict(data="gpt2preln", tokenizer="bpe", order="balanced", pack="document", block_size=2500, batch_tokens=240_000, micro_batch=6,
               max_steps=8000, optimizer="adamw", lr=2e-4, weight_decay=0.1, grad_clip=1.0, schedule="wsd", warmup_steps=200, decay_fraction=0.0,
               final_lr_fraction=0.1, ema_beta=0.999, eval_every=200, eval_tokens=250_000, save_every=200, keep_every=1000)
_GPT2 = dict(_RECIPE, block_size=1024, batch_tokens=245_760, micro_batch=15)
PRESETS = {
    "gpt2preln": (GPT2PreLNConfig(), _RECIPE),
    "gpt2preln-medium": (GPT2PreLNConfig(n_layer=24, d_model=1024, n_head=16, tied=True), dict(_RECIPE, micro_batch=1)),
    "gpt2preln-gpt2": (GPT2PreLNConfig(vocab_size=50_257, context_length=1024, tied=True), _GPT2),  # OpenAI's weights fit
}
