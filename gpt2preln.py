"""GPT2PreLN: the GPT-2 of the 1gpu-llm releases, a bilingual English and Italian base model for one consumer GPU.

A decoder with learned positions, multi-head attention and a GELU feed-forward, all with biases (GPT-2, Radford et al.
2019), and a LayerNorm in front of each of them (pre-LN, arXiv 2002.04745). Sizes and recipe are those of the model card
nazdef/1gpu-llm-small-en-it-base; the arithmetic is that of `transformers.GPT2LMHeadModel`. `from_transformers` renames
its weights, OpenAI's own included (preset gpt2preln-gpt2).

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

def at_least_fp32(x):
    """x in fp32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def recompute(f, *args):
    """f(*args), whose inner values are not kept: the backward pass computes them again (arXiv 2205.05198)."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    """Causal multi-head attention with biases; queries, keys and values are fused into one matrix."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.out = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, mask=None, cache=None, layer=0):
        qkv = self.qkv(x).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2)  # (B, 3H, T, D)
        q, k, v = qkv.chunk(3, dim=1)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
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


class FeedForward(nn.Module):
    """W_down gelu(W_up x), four times as wide inside; GPT-2's GELU (arXiv 1606.08415) is the one with tanh."""

    def __init__(self, cfg):
        super().__init__()
        self.up = nn.Linear(cfg.d_model, 4 * cfg.d_model)
        self.down = nn.Linear(4 * cfg.d_model, cfg.d_model)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + feed-forward(LayerNorm(x))."""

    def __init__(self, cfg):
        super().__init__()
        self.attn_norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.ffn_norm = nn.LayerNorm(cfg.d_model, cfg.norm_eps)
        self.ffn = FeedForward(cfg)

    def forward(self, x, mask=None, cache=None, layer=0):
        x = x + self.attn(self.attn_norm(x), mask, cache, layer)
        return x + self.ffn(self.ffn_norm(x))


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

class GPT2PreLN(nn.Module):
    """Decoder-only language model. Raises ValueError for a sequence beyond the context or the cache."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.d_model % cfg.n_head:
            raise ValueError(f"n_head {cfg.n_head} must divide d_model {cfg.d_model}")
        self.cfg = cfg
        self.max_len = cfg.context_length  # tokens in the longest sequence
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = nn.Embedding(cfg.context_length, cfg.d_model)
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

        Each parameter must match exactly one end. Initialisation and train.py's optimizers both go by this table. A
        "matrix" is a linear map inside a block. Muon orthogonalises each map alone and therefore needs the rows. AdamW
        trains "embedding", "head" and "vector", without weight decay on vectors.
        """
        d = self.cfg.d_model
        table = {
            "embed.weight": ("embedding", None),
            "position.weight": ("embedding", None),
            "norm.weight": ("vector", None),
            "norm.bias": ("vector", None),
            "qkv.weight": ("matrix", (d, d, d)),
            "qkv.bias": ("vector", None),
        }
        for name in ("out", "up", "down"):
            table[f"{name}.weight"] = ("matrix", None)
            table[f"{name}.bias"] = ("vector", None)
        if not self.cfg.tied:
            table["head.weight"] = ("head", None)
        return table

    def init_weights(self):
        """normal(0, 0.02), divided by sqrt(2 layers) for matrices that write into the residual stream.

        Biases are 0, norms are 1.
        """
        for name, p in self.named_parameters():
            (role,) = [role for end, (role, _) in self.roles().items() if name.endswith(end)]
            if role == "vector":
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
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
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + self.head_weight.numel()
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
        mask, position = None, torch.arange(start, start + T, device=idx.device)
        if reset is not None:
            assert cache is None, "a cache holds one document"
            mask = within_documents(reset, self.embed.weight.dtype)
            position = position - torch.where(reset, position, 0).cummax(1).values  # since the document's beginning

        x = self.embed(idx) + self.position(position)  # (B, T, d)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.length += T

        if targets is not None:
            return None, chunked_loss(self.norm(x), self.head_weight, targets, loss_weights, reduction)
        if not all_logits:
            x = x[:, -1:]
        return F.linear(self.norm(x), self.head_weight), None

    def init_cache(self, batch_size, max_len=None, dtype=None):
        """An empty cache for batch_size sequences of up to max_len tokens; the default is the context.

        dtype is that of the keys and values; the default is that of the weights. Raises ValueError for a max_len
        beyond the context.
        """
        max_len = max_len or self.max_len
        if max_len > self.max_len:
            raise ValueError(f"a cache of {max_len} tokens is longer than the context of {self.max_len}")
        cfg, weight = self.cfg, self.embed.weight
        shape = (batch_size, cfg.n_head, max_len, cfg.d_model // cfg.n_head)
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


def names_in_transformers(n_layer):
    """Part of the model -> its name in `transformers.GPT2LMHeadModel`."""
    in_layer = {"attn_norm": "ln_1", "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj",
                "ffn_norm": "ln_2", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}
    names = {"embed": "transformer.wte", "position": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"}
    for i in range(n_layer):
        names |= {f"blocks.{i}.{ours}": f"transformer.h.{i}.{theirs}" for ours, theirs in in_layer.items()}
    return names


def to_transformers(state, cfg):
    """A state_dict under the names of `transformers.GPT2LMHeadModel`, whose Conv1D keeps matrices transposed."""
    names, theirs = names_in_transformers(cfg.n_layer), {}
    for name, value in state.items():
        part, kind = name.rsplit(".", 1)
        is_map = kind == "weight" and part.endswith(("attn.qkv", "attn.out", "ffn.up", "ffn.down"))
        theirs[f"{names[part]}.{kind}"] = value.T if is_map else value
    return theirs


def from_transformers(state):
    """The way back, from a state_dict of `transformers.GPT2LMHeadModel` or from the file of OpenAI's GPT-2 on the Hub.

    This gives a model of the preset gpt2preln-gpt2 OpenAI's weights:
    model.load_state_dict(from_transformers(GPT2LMHeadModel.from_pretrained("gpt2").state_dict()))
    """
    prefixes = ("transformer.", "lm_head.")  # the Hub's file leaves out the first one
    state = {name if name.startswith(prefixes) else f"transformer.{name}": value for name, value in state.items()}
    n_layer = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.h."))
    names, ours = {theirs: part for part, theirs in names_in_transformers(n_layer).items()}, {}
    for name, value in state.items():
        if re.search(r"\.attn\.(masked_)?bias$", name):
            continue  # old files hold the causal mask
        if name == "lm_head.weight" and torch.equal(value, state["transformer.wte.weight"]):
            continue  # tied: the same matrix again
        part, kind = name.rsplit(".", 1)
        is_map = kind == "weight" and part.endswith(("c_attn", "c_proj", "c_fc"))
        ours[f"{names[part]}.{kind}"] = value.T.contiguous() if is_map else value
    return ours


Config, Model = GPT2PreLNConfig, GPT2PreLN

# The card: source-balanced windows of 2,500, 6 x 16 of them a step, 2e-4 held for 8,000 steps; then, with
# --decay_only --decay_steps=800 from one of the kept checkpoints, down to 2e-5. The tail's best was step 8,600.
_RECIPE = dict(
    data="gpt2preln", tokenizer="bpe", order="balanced", pack="document",
    block_size=2500, batch_tokens=240_000, micro_batch=6, max_steps=8000,
    optimizer="adamw", lr=2e-4, weight_decay=0.1, grad_clip=1.0,
    schedule="wsd", warmup_steps=200, decay_fraction=0.0, final_lr_fraction=0.1, ema_beta=0.999,
    eval_every=200, eval_tokens=250_000, save_every=200, keep_every=1000)

PRESETS = {
    "gpt2preln": (GPT2PreLNConfig(), _RECIPE),
    "gpt2preln-medium": (
        GPT2PreLNConfig(n_layer=24, d_model=1024, n_head=16, tied=True),
        dict(_RECIPE, micro_batch=1)),
    "gpt2preln-gpt2": (  # OpenAI's weights fit
        GPT2PreLNConfig(vocab_size=50_257, context_length=1024, tied=True),
        dict(_RECIPE, block_size=1024, batch_tokens=245_760, micro_batch=15)),
}
