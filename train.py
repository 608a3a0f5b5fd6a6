"""Training, for every architecture: `python train.py` (quick start), `python train.py --model=ivme`, `torchrun --nproc_per_node=8 train.py ...`.

Reads top to bottom: settings, data, Muon, schedule and EMA, checkpoints, evaluation, set-up, the loop. An architecture file brings
its model, its sizes and its recipe (PRESETS); this file brings everything that is the same for all. Each field of Settings and
of the model's config is a flag, --name=value, and a flag overrides the recipe. Where --init_from meets a set of chats, it fine-tunes on their replies.

What a run writes to out/RUN: ckpt.pt (latest, for --resume), best.pt (lowest validation loss) and best_validation.json (what that
is, by source and language), step_N.pt (--keep_every), metrics.jsonl, loss.png, config.json.
"""
import contextlib
import errno
import functools
import hashlib
import importlib
import json
import lzma
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint

import prepare
from common import Progress, UserError, clock, nearest, parse_flags, replacing, run_tool, yes_or_no
from corpus.folder import corpus_name, document_edges, read_meta
from corpus.loader import Loader, Source, fill_rows, mark_replies
from corpus.pydocs import EMBEDDED
from corpus.text import SUFFIXES
from corpus.tokenizer import DEFAULT_VOCAB, TRAINERS, load_tokenizer, token_byte_counts


@dataclass
class Settings:
    model: str = "tinymemory"  # preset of an architecture file: tinymemory, ivme, i3, i3-80m, gpt2preln, ..., or one of your own
    data: str = ""  # prepared folders, or names under data/, as NAME or NAME:WEIGHT,NAME:WEIGHT; empty: the recipe's
    tokenizer: str = "bpe"  # tokenizer that a bare name in --data means: pydocs with hybrid is data/pydocs-hybrid
    out: str = ""  # folder of the run; empty: out/MODEL
    resume: bool = False  # go on from the run's ckpt.pt with its recorded settings
    overwrite: bool = False  # start anew in a folder that holds a run, deleting that run
    init_from: str = ""  # start from this checkpoint's weights
    decay_only: bool = False  # with --init_from: keep optimizer, EMA and data position too, and run --decay_steps of decay
    eval_only: bool = False  # with --init_from: only measure that checkpoint's validation losses, over --final_eval_tokens
    # batches
    order: str = "random"  # random: windows of all sources; sequential: source after source; balanced: equal shares
    pack: str = "auto"  # stream: rows are windows of the token stream; document: whole documents that do not see each other; auto: document for tuning
    block_size: int = 256  # tokens in a training row; at most the model's context
    batch_tokens: int = 4096  # tokens in an optimizer step, over all processes
    micro_batch: int = 16  # rows that a process computes at once; the rest of a step is accumulated
    grad_checkpoint: bool = False  # keep only the blocks' inputs for the backward pass: less memory, a third more work
    max_steps: int = 600  # optimizer steps of the run
    epochs: float = 0.0  # in place of --max_steps: passes over the training data
    # what counts in the loss; weights are relative, their mean is 1
    loss_on: str = "auto"  # all: every token; responses: of chats their replies alone; auto: responses where --init_from meets a set of chats
    word_boost: float = 1.0  # weight of target tokens of more than one character; 1: off
    response_start_tokens: int = 8  # so many tokens at the beginning of each reply ...
    response_start_weight: float = 1.0  # ... have this weight; 1: off
    base_data: str = ""  # what tuning replays, and on which it measures forgetting; as --data; not given: what the checkpoint was trained on
    replay: float = 0.0  # share of the rows that are windows of the base data; 0: off
    relevance: float = 0.0  # so many more rows, as a share, hold replies under other chats' prompts, where they are to be less likely; 0: off
    relevance_margin: float = 1.0  # by how much, in nats per token of the reply
    # optimizer
    optimizer: str = "muon"  # muon: matrices of the blocks by Muon, the rest by AdamW; adamw: everything by AdamW
    muon_lr: float = 0.02  # peak learning rate of Muon
    lr: float = 3e-4  # peak learning rate of AdamW
    weight_decay: float = 0.1  # decoupled; not on vectors
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no limit
    schedule: str = "wsd"  # learning rate: wsd (warm-up, stable, linear decay), cosine, constant
    warmup_steps: int = 20  # steps of linear warm-up, for every schedule
    decay_fraction: float = 0.2  # share of the steps that decay (wsd)
    decay_steps: int = 0  # number of steps that decay (wsd); 0: decay_fraction says it
    final_lr_fraction: float = 0.0  # learning rate at the end, as a share of the peak (wsd, cosine)
    ema_beta: float = 0.999  # decay of the weights' moving average; 0: none is kept
    # evaluation, saving, showing
    eval_every: int = 100  # steps between evaluations; 0: only at the end
    eval_tokens: int = 32_768  # validation tokens per source in each of them, spread evenly; 0: all
    final_eval_tokens: int = 4_000_000  # the same for the last evaluation, of best.pt; 0: all
    save_every: int = 100  # steps between checkpoints; 0: only at the end
    keep_every: int = 0  # steps between checkpoints that stay, as step_N.pt; 0: none
    log_every: int = 10  # steps between rows of metrics.jsonl and lines of the log
    sample_every: int = 0  # steps between samples; 0: only at the end
    sample_prompt: str = ""  # text that a sample continues; empty: a new document
    sample_tokens: int = 200  # length of a sample; 0: none
    # machine
    seed: int = 1337  # of initial weights and batch order
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: str = "auto"  # compute type: bfloat16, float32; auto: bfloat16 where the hardware is fast at it
    compile: str = "auto"  # torch.compile: on, off; auto: on CUDA, and on a CPU for runs long enough to repay it
    deterministic: bool = False  # repeatable to the bit on CUDA as well; a CPU always is


CHOICES = dict(order=("random", "sequential", "balanced"), pack=("auto", "stream", "document"),
               loss_on=("auto", "all", "responses"), optimizer=("muon", "adamw"), schedule=("wsd", "cosine", "constant"),
               dtype=("auto", "bfloat16", "float32"), compile=("auto", "on", "off"))


# ---------------------------------------------------------------------------------------------------- data


def find_data(spec, tokenizer, vocab_size, is_main, barrier, like=None, whose="the checkpoint's"):
    """--data -> (sources, tokenizer.json's text). Prepares a missing embedded corpus; any other is a UserError with the command to type.

    like: text of the tokenizer that the data must have, `whose` it is, for the error; without, the first folder's. A bare name means the
    folder that was encoded with it.
    """
    def files_of(text):
        there = sorted([*Path("data").glob("[!.]*/tokenizer.json"), *Path("data").glob("tokenizer-*.json")], key=lambda p: (len(str(p)), str(p)))
        return [p for p in there if p.read_text(encoding="utf-8") == text] or [Path("data") / f"tokenizer-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"]
    folders, same = [], files_of(like) if like is not None else []

    def keep_tokenizer():  # so that the command that an error names can be typed
        if is_main and not same[0].exists():
            same[0].parent.mkdir(exist_ok=True)
            same[0].write_text(like, encoding="utf-8")
    for item in spec.split(","):
        name, _, weight = item.rpartition(":") if re.fullmatch(r".+:[0-9.]+", item) else (item, "", "1")
        encoder = tokenizer
        named = Path("data") / corpus_name([name], tokenizer, vocab_size if tokenizer in TRAINERS else 0)
        folder = next((f for f in (Path(name), Path("data") / name) if (f / "meta.json").exists()), None)
        if folder is None:
            fitting = [named] if like is None else [f for f in (named, *(Path("data") / corpus_name([name], str(p), 0) for p in same))
                                                    if (f / "tokenizer.json").exists() and (f / "tokenizer.json").read_text(encoding="utf-8") == like]
            folder = next((f for f in fitting if (f / "meta.json").exists()), None)
        if folder is None and same:
            encoder, named = str(same[0]), Path("data") / corpus_name([name], str(same[0]), 0)
            keep_tokenizer()
        text = next((f for f in (name, *(name + end for end in SUFFIXES)) if os.path.exists(f)), name)  # `chats` may be chats.jsonl
        command = f"python prepare.py {text} --tokenizer={encoder}"
        if DEFAULT_VOCAB.get(encoder) not in (None, vocab_size):
            command += f" --vocab_size={vocab_size}"
        if folder is None and name in EMBEDDED and (encoder in TRAINERS or same):
            folder = named
            if is_main:
                print(f"{name}: preparing {folder} (once)", flush=True)
                prepare.prepare([name], prepare.Settings(tokenizer=encoder, vocab_size=0 if same else vocab_size))
            barrier()
        if folder is None and os.path.exists(name):
            raise UserError(f"{name} is not a prepared folder; make one of it: {command}")
        if folder is None:
            there = [p.parent.name for p in Path("data").glob("*/meta.json")]
            raise UserError(f"there is no prepared data {name!r}{nearest(name, [*there, *EMBEDDED])}; prepare it: {command}")
        folders.append((folder, read_meta(folder), float(weight)))
        if like is None:
            like, whose = (folder / "tokenizer.json").read_text(encoding="utf-8"), f"{folder}'s"
            same = files_of(like)
    for folder, meta, _ in folders:
        if (folder / "tokenizer.json").read_text(encoding="utf-8") != like:
            keep_tokenizer()
            raise UserError(f"{folder} was not encoded with {whose} tokenizer; prepare its text with --tokenizer={same[0]}")
        if meta["vocab_size"] > vocab_size:
            raise UserError(f"{folder} has a vocabulary of {meta['vocab_size']:,} tokens, the model of {vocab_size:,}: prepare it with --vocab_size={vocab_size}, "
                            f"or give the model --vocab_size={meta['vocab_size']}")
    sources = [Source(folder, entry, meta["dtype"], weight) for folder, meta, weight in folders for entry in meta["sources"]]
    for s in sources:  # two folders may bring sources of one name
        same = [t for t in sources if t.name == s.name]
        if len(same) > 1:
            for i, t in enumerate(same):
                t.name += f"-{i}"
    return sources, like


# ---------------------------------------------------------------------------------------------------- loss weights, context relevance

def token_weights(y, marks=None, boost=None, start_weight=1.0):
    """Relative weight of each target, float (rows, T): 0 where y is -1, else 1, times boost[token] (V,), times start_weight where a reply
    begins (marks is 2, see `mark_replies`): word boost and response start of TinyMemoryLM's card (CompactAI/TMLM-Haiku-1). What counts is
    their ratio: a batch's loss is the sum of weight x loss over the sum of weights."""
    w = (y >= 0).float()
    if boost is not None:
        w *= boost[y]  # where y is -1 the last token's, times 0
    if start_weight != 1:
        w[marks == 2] *= start_weight
    return w


@dataclass
class Reply:
    """A reply in a batch's rows: where it is, `at` being the position of its first target, what comes before it in its chat, and its tokens."""
    row: int
    at: int
    context: np.ndarray
    tokens: np.ndarray


def find_reply(mask, k, T):
    """(first, last + 1) of the reply number k, counted around, in a chat with this mask, or None if it has none. At most T / 2 tokens
    of it, so that there is room for a prompt in a row of T."""
    begins = np.flatnonzero((mask == 1) & (np.concatenate([[0], mask[:-1]]) == 0))
    if not len(begins):
        return None
    first = int(begins[k % len(begins)])
    beyond = np.flatnonzero(mask[first:] == 0)
    return first, first + min(int(beyond[0]) if len(beyond) else len(mask) - first, T // 2)


def replies_of(dealt, loader, bos, rng):
    """One reply, drawn by rng, of each chat that begins in the rows `dealt` (see `Loader.next_row`): list of Reply."""
    replies = []
    for row, (source, pieces) in enumerate(dealt):
        tokens, mask, at = loader.sources[source].train, loader.sources[source].train_mask, 0
        for start, n in pieces if loader.in_replies(source) else ():
            found = find_reply(mask[start:start + n + 1], int(rng.integers(2 ** 32)), loader.T) if tokens[start] == bos else None
            if found:
                first, end = found
                replies.append(Reply(row, at + first - 1, tokens[start:start + first], tokens[start + first:start + end]))
            at += n
    return replies


def pack_replies(pairs, T, n_rows=None):
    """(context, reply) token arrays -> x, y, reset as `fill_rows`, of which only the replies' tokens are targets, and number, int64 (rows, T):
    i + 1 where the target is part of the reply of pairs[i], else 0.

    Each goes to the first row that has room; a context that does not fit into a row loses its beginning. n_rows: so many rows, and what
    finds no room there is left out.
    """
    rows, marks, used = [[] for _ in range(n_rows or 0)], [], [0] * (n_rows or 0)
    pairs = [(context[max(0, len(context) + len(reply) - 1 - T):], reply) for context, reply in pairs]
    ends = np.cumsum([0] + [len(c) + len(r) for c, r in pairs])
    for i, (context, reply) in enumerate(pairs):
        n = len(context) + len(reply) - 1
        row = next((k for k, there in enumerate(used) if there + n <= T), None)
        if row is None and n_rows is None:
            row = len(rows)
            rows.append([])
            used.append(0)
        if row is not None:
            first = used[row] + len(context) - 1
            marks.append((row, slice(first, first + len(reply)), i + 1))
            rows[row].append((int(ends[i]), n))
            used[row] += n
    x, y, reset = fill_rows(np.concatenate([np.empty(0, np.int64), *(a for pair in pairs for a in pair)]), rows, T)
    number = torch.zeros_like(y)
    for row, span, i in marks:
        number[row, span] = i
    return x, torch.where(number > 0, y, -1), reset, number


def wrong_prompts(replies, rows, n_rows, T, rng):
    """The replies in `rows` of a batch under other chats' prompts: (x, y, reset, number) of n_rows more rows, see `pack_replies`, and
    number (len(rows), T) of the same replies where they are under their own."""
    at_home = torch.zeros(len(rows), T, dtype=torch.int64)
    here = [replies[k] for k in rng.permutation([k for k, reply in enumerate(replies) if reply.row in rows]).astype(int)]
    pairs = []
    for reply in here if len(replies) > 1 else ():
        other = replies[int(rng.integers(len(replies)))]
        while other is reply:
            other = replies[int(rng.integers(len(replies)))]
        pairs.append((other.context, reply.tokens))
    *packed, number = pack_replies(pairs, T, n_rows)
    for i in number.unique().tolist():
        if i:
            reply = here[i - 1]
            at_home[rows.index(reply.row), reply.at:reply.at + len(reply.tokens)] = i
    return *packed, number, at_home


def reply_sums(values, number, n):
    """Sums of values (rows, T) over the positions of each reply: number (rows, T) -> (n,)."""
    return values.new_zeros(n + 1).index_add(0, number.flatten(), values.flatten())[1:]


def relevance_loss(own, wrong, lengths, margin):
    """Context relevance, which TinyMemoryLM's card names without a formula: sum over replies of max(0, margin - (wrong - own) / length) x length.
    own, wrong: nats (n,) of each reply's `lengths` tokens under its own prompt and under another chat's."""
    return (margin * lengths - (wrong - own)).clamp(min=0).sum()


# ---------------------------------------------------------------------------------------------------- optimizers

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic's coefficients: steep at zero, singular values end within 0.7 and 1.2


def orthogonalize(stack, dtype):
    """Newton-Schulz: the nearest semi-orthogonal matrix to each of stack (n, rows, columns), roughly; shape kept, fp32 (Muon, Jordan 2024).

    Five steps of X <- aX + bAX + cA^2 X with A = XX^T push all singular values near 1. Tall matrices are transposed, which makes A small.
    """
    a, b, c = NEWTON_SCHULZ
    tall = stack.size(1) > stack.size(2)
    x = (stack.mT if tall else stack).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values at most 1, where the iteration converges
    for _ in range(5):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Muon:
    """MomentUm Orthogonalized by Newton-Schulz, for the matrices inside the blocks (https://kellerjordan.github.io/posts/muon).

    m <- 0.95 m + 0.05 g;  u = 0.05 g + 0.95 m (Nesterov);  w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) orthogonalize(u)

    matrices: list of (name, parameter, rows of each map in a fused one or None). A fused matrix is orthogonalised map by map.
    Matrices of one shape go through Newton-Schulz as one stack; with several processes each does its share of every stack.
    The arithmetic is `torch.optim.Muon`'s. Momentum is fp32 and whole on every process, so any one of them can save it.
    """

    def __init__(self, matrices, weight_decay=0.1, momentum=0.95, dtype=torch.float32):
        self.names, self.params = [m[0] for m in matrices], [m[1] for m in matrices]
        self.momentum, self.weight_decay, self.dtype = momentum, weight_decay, dtype
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.stacks = {}  # (rows, columns) -> [(index of the parameter, first row)]
        for i, (_, p, parts) in enumerate(matrices):
            first = 0
            for rows in parts or (p.size(0),):
                self.stacks.setdefault((rows, p.size(1)), []).append((i, first))
                first += rows
            assert first == p.size(0), f"{self.names[i]}: parts {parts} do not make up {p.size(0)} rows"

    @torch.no_grad()
    def step(self, lr):
        """One update from the parameters' .grad with learning rate lr."""
        grads = [p.grad for p in self.params]
        torch._foreach_lerp_(self.buffers, grads, 1 - self.momentum)
        updates = torch._foreach_lerp(grads, self.buffers, self.momentum)
        torch._foreach_mul_(self.params, 1 - lr * self.weight_decay)
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for (rows, columns), members in self.stacks.items():
            stack = torch.stack([updates[i][first:first + rows] for i, first in members])
            if world == 1:
                stack = orthogonalize(stack, self.dtype)
            else:
                each = -(-len(members) // world)  # the last share is padded with zeros, which stay zero
                stack = torch.nn.functional.pad(stack, (0, 0, 0, 0, 0, each * world - len(members)))
                mine = orthogonalize(stack[rank * each:(rank + 1) * each], self.dtype).contiguous()
                dist.all_gather_into_tensor(stack, mine)
            scale = max(1, rows / columns) ** 0.5  # tall maps: keeps the change of the output's size the same
            for (i, first), update in zip(members, stack):
                self.params[i][first:first + rows].add_(update, alpha=-lr * scale)

    def state_dict(self):
        return dict(zip(self.names, self.buffers))

    def load_state_dict(self, state):
        for name, buffer in zip(self.names, self.buffers):
            buffer.copy_(state[name])


class Optimizers:
    """Muon and AdamW behind one step. Who gets what is the model's own table, `roles()`: exactly one line must fit a parameter."""

    def __init__(self, model, s, muon_dtype):
        groups = dict(matrix=[], embedding=[], head=[], vector=[])
        for name, p in model.named_parameters():
            fits = [role for end, role in model.roles().items() if name.endswith(end)]
            assert len(fits) == 1 and fits[0][0] in groups, f"roles() must name {name} exactly once as one of {list(groups)}, found {fits}"
            groups[fits[0][0]].append((name, p, fits[0][1]))
        matrices = groups.pop("matrix") if s.optimizer == "muon" else []
        decayed = [p for role, members in groups.items() for _, p, _ in members if role != "vector"]
        vectors = [p for _, p, _ in groups["vector"]]
        self.muon = Muon(matrices, s.weight_decay, dtype=muon_dtype) if matrices else None
        # fused: one kernel for all tensors, where the device has it
        self.adamw = torch.optim.AdamW([dict(params=decayed, weight_decay=s.weight_decay), dict(params=vectors, weight_decay=0.0)],
                                       lr=s.lr, betas=(0.9, 0.95), eps=1e-8, fused=decayed[0].device.type in ("cpu", "cuda"))
        self.peak, self.n_matrices, self.n_other = (s.muon_lr, s.lr), len(matrices), len(decayed) + len(vectors)

    def step(self, factor):
        """One update with `factor` times the peak learning rates; returns the larger of the two rates."""
        for group in self.adamw.param_groups:
            group["lr"] = self.peak[1] * factor
        self.adamw.step()
        if self.muon:
            self.muon.step(self.peak[0] * factor)
        return self.peak[0 if self.muon else 1] * factor

    def state_dict(self):
        return dict(adamw=self.adamw.state_dict(), muon=self.muon.state_dict() if self.muon else {})

    def load_state_dict(self, state):
        self.adamw.load_state_dict(state["adamw"])
        if self.muon:
            self.muon.load_state_dict(state["muon"])


def checkpoint_blocks(model):
    """From now on the model's blocks keep only their inputs for the backward pass and compute the rest again (arXiv 1604.06174)."""
    def recomputed(forward, *args):
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)
    for block in model.blocks:
        block.forward = functools.partial(recomputed, block.forward)


# ---------------------------------------------------------------------------------------------------- schedule, EMA

def decay_steps(s):
    return s.decay_steps or round(s.decay_fraction * s.max_steps)


def lr_factor(step, s):
    """Share of the peak learning rate for update number `step` (from 0) of s.max_steps.

    Warm-up is linear over warmup_steps. wsd (arXiv 2405.18392): 1, then linear to final_lr_fraction, which the step after the last
    would have. cosine (arXiv 1608.03983): half a wave from the end of warm-up to final_lr_fraction. constant: 1.
    """
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps
    if s.schedule == "wsd":
        left = min(1.0, (s.max_steps - step) / max(1, decay_steps(s)))
    elif s.schedule == "cosine":
        left = 0.5 + 0.5 * math.cos(math.pi * (step - s.warmup_steps) / max(1, s.max_steps - s.warmup_steps))
    else:
        return 1.0
    return s.final_lr_fraction + (1 - s.final_lr_fraction) * left


@torch.no_grad()
def ema_update(ema, params, step, beta):
    """ema <- b ema + (1 - b) params with b = min(beta, (1 + step) / (10 + step)), so that a short run is not averaged with its start."""
    torch._foreach_lerp_(ema, params, 1 - min(beta, (1 + step) / (10 + step)))


@contextlib.contextmanager
def weights(params, values):
    """Inside, the parameters hold `values`; behind it, to the bit, what they held before. None changes nothing."""
    saved = [p.detach().clone() for p in params] if values is not None else []
    with torch.no_grad():
        if values is not None:
            torch._foreach_copy_(params, values)
        try:
            yield
        finally:
            if values is not None:
                torch._foreach_copy_(params, saved)


# ---------------------------------------------------------------------------------------------------- checkpoints

FORMAT = 1
KEYS = ("format", "step", "tokens", "model_name", "cfg", "train", "model", "ema", "use_ema", "optimizer", "rng", "loader", "tokenizer", "metrics")


def save_checkpoint(path, checkpoint):
    with replacing(path) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as e:  # torch's writer hides what the system said
            raise e.__context__ if isinstance(e.__context__, OSError) else OSError(errno.ENOSPC, str(e), str(path)) from None


def read_checkpoint(path):
    """The checkpoint's dict, tensors on the CPU. UserError if it is missing, damaged, or not one of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a checkpoint in it, such as {Path(path) / 'best.pt'}") from None
    except Exception as e:  # torch raises many types for a damaged file
        raise UserError(f"{path} is damaged or not a checkpoint ({type(e).__name__})") from None
    missing = [k for k in KEYS if k not in checkpoint] if isinstance(checkpoint, dict) else KEYS
    if missing or checkpoint["format"] != FORMAT:
        why = f"it lacks {', '.join(missing[:4])}" if missing else f"its format is {checkpoint['format']!r}, not {FORMAT}"
        raise UserError(f"{path} is not a checkpoint of this train.py: {why}")
    return checkpoint


def find_preset(name):
    """Preset name -> (architecture module, config, recipe): `i3-80m` is in i3.py. UserError lists the presets there are."""
    stem, here = name.split("-")[0], Path(__file__).parent
    files = [p.stem for p in sorted(here.glob("*.py")) if re.search(r"^PRESETS\b", p.read_text(encoding="utf-8"), re.M)]
    if stem not in files:
        presets = [preset for f in files for preset in importlib.import_module(f).PRESETS]
        raise UserError(f"there is no model {name!r}{nearest(name, presets)}; there are {', '.join(presets)}")
    module = importlib.import_module(stem)
    if name not in module.PRESETS:
        raise UserError(f"{stem}.py has no preset {name!r}{nearest(name, module.PRESETS)}; it has {', '.join(module.PRESETS)}")
    return module, *module.PRESETS[name]


def load_checkpoint(path, device="cpu", ema=None):
    """A trained model, ready to use: (model in eval mode on `device`, tokenizer, the checkpoint's dict).

    ema True or False picks the averaged or the raw weights; None those with the lower validation loss, as the checkpoint says.
    Raises UserError for a file that is missing, damaged or foreign, and for ema=True where no average was kept.
    """
    checkpoint = read_checkpoint(path)
    module, *_ = find_preset(checkpoint["model_name"])
    ema = checkpoint["use_ema"] if ema is None else ema
    if ema and not checkpoint["ema"]:
        raise UserError(f"{path} holds no EMA weights (its run had --ema_beta=0)")
    try:
        model = module.Model(module.Config(**checkpoint["cfg"]))
        model.load_state_dict(checkpoint["model"] | (checkpoint["ema"] if ema else {}))
    except (TypeError, RuntimeError) as e:
        raise UserError(f"{path} does not fit {module.__name__}.py as it is now: {str(e).splitlines()[0]}") from None
    return model.to(device).eval(), load_tokenizer(checkpoint["tokenizer"]), checkpoint


# ---------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(run, sources, tokens, T, rows, autocast, bytes_per_token, device, world=1, rank=0, bos=None, responses=False):
    """Validation loss of the present weights: {"source": {name: (loss, bits per byte)}, "language": {...}, "mixed": (loss, bits per byte)}.

    A source is cut into rows of T targets as in training, the same every time; `tokens` of them, spread evenly, count (0: all). Losses
    are means in nats per token over a group's rows, bits per byte are its nats / ln 2 / UTF-8 bytes. Draws no random numbers.
    responses: of sets of chats only replies count, and "mixed" is over these sets.
    """
    sums = torch.zeros(len(sources), 3, dtype=torch.float64)  # nats, tokens, bytes
    for total, source in zip(sums, sources):
        n, targets, row = source.validation_rows(T, bos)
        take = min(n, -(-tokens * n // targets)) if tokens and n else n  # so many rows hold `tokens` targets, padding or not
        chosen = [row(i * n // take) for i in range(take)][rank::world]
        for first in range(0, len(chosen), rows):
            x, y, reset = fill_rows(source.val, chosen[first:first + rows], T)
            if responses and source.val_mask is not None:
                y[mark_replies(source.val_mask, chosen[first:first + rows], T) == 0] = -1
            with autocast():
                losses = run(x.to(device), y.to(device), reduction="none", reset=reset.to(device) if bos is not None else None)[1]
            total[0] += losses.double().sum().cpu() if device.type != "mps" else losses.cpu().double().sum()  # no doubles on MPS
            kept = y[y >= 0]
            total[1] += len(kept)
            total[2] += float(bytes_per_token[kept].sum())
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
        sums = sums.cpu()

    def result(chosen):
        nats, n, size = sums[chosen].sum(0).tolist()
        return (nats / n if n else math.nan, nats / math.log(2) / size if size else math.nan)
    languages = sorted({s.language for s in sources})
    return dict(mixed=result([i for i, s in enumerate(sources) if s.val_mask is not None or not responses]),
                language={x: result([i for i, s in enumerate(sources) if s.language == x]) for x in languages},
                source={s.name: result([i]) for i, s in enumerate(sources)})


@torch.no_grad()
def relevance(run, sources, tokens, T, rows, autocast, bos, device, world=1, rank=0):
    """(accuracy, gap) over the validation chats, as many as have `tokens` tokens (0: all), with one reply of each: the share of replies that are
    likelier under their own prompt than under another chat's, and by how much on average, in nats per token of the reply. A prompt is all
    that comes before the reply. nan if there are fewer than two. Draws no random numbers."""
    pairs = []
    for source in sources:
        if source.val_mask is None:
            continue
        edges = document_edges(source.val, bos)
        n = len(edges) - 1
        take = min(n, -(-tokens * n // len(source.val))) if tokens and n else n
        for k in range(take):
            start, end = edges[k * n // take:][:2]
            found = find_reply(source.val_mask[start:end], k, T)  # now the first reply of a chat, now the second
            if found:
                pairs.append((source.val[start:start + found[0]], source.val[start + found[0]:start + found[1]]))
    n = len(pairs)
    if n < 2:
        return math.nan, math.nan
    wrong = [(pairs[(i + n // 2) % n][0], reply) for i, (_, reply) in enumerate(pairs)]
    sums = torch.zeros(2, dtype=torch.float64)
    mine = range(rank, n, world)
    for first in range(0, len(mine), 256):  # so many at a time, each beside its rival
        some = mine[first:first + 256]
        x, y, reset, number = pack_replies([pairs[i] for i in some] + [wrong[i] for i in some], T)
        nats = torch.zeros(2 * len(some))
        for part in (slice(i, i + rows) for i in range(0, len(x), rows)):
            with autocast():
                losses = run(x[part].to(device), y[part].to(device), reduction="none", reset=reset[part].to(device))[1]
            nats += reply_sums(losses.float().cpu(), number[part], len(nats))
        gap = nats[len(some):] - nats[:len(some)]
        sums += torch.stack([(gap > 0).sum(), (gap / torch.tensor([len(pairs[i][1]) for i in some])).sum()])
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return tuple((sums / n).tolist())


def split_result(result, i):
    """Of evaluate's (loss, bits per byte) pairs the losses (i = 0) or the bits (i = 1), for metrics.jsonl."""
    return {k: v[i] if isinstance(v, tuple) else {n: pair[i] for n, pair in v.items()} for k, v in result.items() if k != "relevance"}


def relevances(results):
    """Of {"raw": result, "ema": result} what metrics.jsonl says about relevance."""
    return {name: {k: r["relevance"][i] for k, r in results.items()} for i, name in enumerate(("relevance_accuracy", "relevance_gap"))
            if all("relevance" in r and math.isfinite(r["relevance"][i]) for r in results.values())}


def best_validation(result, sources, **about):
    """What best_validation.json says: the losses in nats per token by which the best step was chosen, under the names that the 1gpu-llm
    card gives them, their perplexities, and bits per byte."""
    def finite(x):  # JSON knows no NaN
        return x if math.isfinite(x) else None

    def perplexity(loss):
        return finite(math.exp(min(loss, 700)))
    groups = dict(mixed=result["mixed"], **result["language"], **({"base": result["base"]} if "base" in result else {}))
    about |= dict(zip(("relevance_accuracy", "relevance_gap"), map(finite, result["relevance"]))) if "relevance" in result else {}
    return dict(about, **{f"val_loss_{k}": finite(loss) for k, (loss, _) in groups.items()}, **{f"ppl_{k}": perplexity(loss) for k, (loss, _) in groups.items()},
                **{f"bits_per_byte_{k}": finite(bits) for k, (_, bits) in groups.items()},
                sources={s.name: dict(language=s.language, kind=s.kind, val_loss=finite(loss), ppl=perplexity(loss), bits_per_byte=finite(bits))
                         for s, (loss, bits) in zip(sources, result["source"].values())})


def table(result, sources):
    """Lines of the terminal: loss, perplexity and bits per byte of each source, of each language, of all."""
    rows = [(s.name, f"{s.language}/{s.kind}", *result["source"][s.name]) for s in sources]
    rows += [(language, "language", *pair) for language, pair in result["language"].items() if len(result["language"]) > 1]
    rows += [("mixed", "all replies" if "relevance" in result else "all sources", *result["mixed"])] * (len(sources) > 1)
    rows += [("base", "base data", *result["base"])] if "base" in result else []
    wide = max(len(r[1]) for r in rows)
    lines = [f"{name:<12} {what:<{wide}}  loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):,.1f}  {bits:.3f} bits/byte" for name, what, loss, bits in rows]
    accuracy, gap = result.get("relevance", (math.nan, math.nan))
    if math.isfinite(accuracy):  # else there are fewer than two validation chats
        lines.append(f"{'relevance':<12} {accuracy:.1%} of replies are likelier under their own prompt than under another's, by {gap:.2f} nats/token on average")
    return lines


def xz_bits_per_byte(sources, tokenizer, limit=8_000_000):
    """What `xz -9` makes of the validation text, for scale: a language model is a compressor. None above `limit` bytes."""
    if sum(len(s.val) for s in sources) > limit:  # a token is a byte at least, nearly always more
        return None
    text = "".join(tokenizer.decode(s.val.tolist()) for s in sources).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text) if 0 < len(text) <= limit else None


def read_rows(path):
    """The rows of metrics.jsonl; a last line that a crash cut short is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def draw_loss(rows, path, title, xz=None):
    """loss.png: bits per byte of the training batches and of the validation text, over the tokens trained on. Of tuning (rows with
    relevance_accuracy) the same for replies, and beside it the base data's bits per byte and the relevance accuracy."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path}: it is drawn by matplotlib, which is not installed")
        Path(path).unlink(missing_ok=True)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    train, val = [r for r in rows if "train_loss" in r], [r for r in rows if "val_loss" in r and not r.get("final")]
    colors = dict(raw="#33658a", ema="#d1495b")

    def curves(value):
        points = {kind: [(r["tokens"] / 1e6, value(r, kind)) for r in val] for kind in colors}
        return {kind: [p for p in some if p[1] is not None] for kind, some in points.items()}
    beside = {"bits per byte of the base data": curves(lambda r, kind: r["val_bits_per_byte"].get(kind, {}).get("base")),
              "relevance accuracy": curves(lambda r, kind: r.get("relevance_accuracy", {}).get(kind))}
    beside = {name: drawn for name, drawn in beside.items() if any(drawn.values())}
    fig, axes = plt.subplots(1, 1 + len(beside), figsize=(8 + 2 * len(beside), 4.5), dpi=100, layout="constrained", squeeze=False,
                             width_ratios=[1 + 0.5 * bool(beside)] + [1] * len(beside))
    ax, *others = axes[0]
    for other, (name, drawn) in zip(others, beside.items()):
        for kind, points in drawn.items():
            if points:
                other.plot(*zip(*points), color=colors[kind], marker="o", ms=3.5, lw=1.6, label=f"{points[-1][1]:.3f} at the end")
        other.set(xlabel="million training tokens", title=name)
        other.grid(alpha=0.25)
        other.legend(frameon=False)
        other.spines[["top", "right"]].set_visible(False)
    ax.plot([r["tokens"] / 1e6 for r in train], [r["train_bits_per_byte"] for r in train], color="#b9c7d6", lw=1, label="training batches")
    for kind, points in curves(lambda r, kind: r["val_bits_per_byte"].get(kind, {}).get("mixed")).items():
        if points:
            label = f"validation, {'EMA' if kind == 'ema' else 'raw'} weights: {points[-1][1]:.3f} at the end"
            ax.plot(*zip(*points), color=colors[kind], marker="o", ms=3.5, lw=1.6, label=label)
    if xz:
        ax.axhline(xz, color="#888888", lw=1, ls="--", label=f"xz -9 on the validation text: {xz:.3f}")
    bits = [r["val_bits_per_byte"][k]["mixed"] for r in val for k in r["val_bits_per_byte"]]
    low = min((b for b in bits if not math.isnan(b)), default=1)  # NaN: every character is unknown
    least = min((r["train_bits_per_byte"] for r in train if r["train_bits_per_byte"] > 0), default=low) if beside else low  # batches of few replies scatter
    ax.set(xlabel="million training tokens", ylabel="bits per byte" + " of replies" * bool(beside), title=title, ylim=(0.9 * min(low, least), max(3.2 * low, 1.1 * (xz or 0))))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    with replacing(path) as f:
        fig.savefig(f, format="png")
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------- set-up

def flag_value(argv, name):
    """The value of --name, the last if there are several, in argv before it is parsed: some flags decide which flags there are."""
    for i, word in reversed(list(enumerate(argv))):
        if word == f"--{name}":
            return argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else "true"
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def check_rows(s):
    if s.batch_tokens % s.block_size:
        raise UserError(f"--batch_tokens={s.batch_tokens} is not a multiple of --block_size={s.block_size}")


def settings_from(argv):
    """argv -> (module, config, Settings, checkpoint to start from or None, checkpoint to resume or None, names of the flags given).

    Defaults come from Settings, then the preset's recipe; with --resume from the run's record; flags override.
    """
    resume = yes_or_no(flag_value(argv, "resume") or "false")
    init_from = flag_value(argv, "init_from")
    parent = read_checkpoint(init_from) if init_from and not resume else None
    name = flag_value(argv, "model") or (parent["model_name"] if parent else Settings.model)
    checkpoint = None
    if resume:
        out = Path(flag_value(argv, "out") or f"out/{name}")
        if not (out / "config.json").exists():
            raise UserError(f"there is no run to resume in {out}; --out names its folder")
        try:
            record = json.loads((out / "config.json").read_text())
            name, cfg, base = record["model"], record["cfg"], Settings(**record["train"])
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{out / 'config.json'} is damaged ({e}); start anew with --overwrite") from None
        module, *_ = find_preset(name)
        cfg = module.Config(**cfg)
        if init_from and init_from != base.init_from:
            raise UserError(f"the run in {out} starts from {base.init_from or 'random weights'}; --resume goes on with it as it is, --out names its folder")
        if (out / "ckpt.pt").exists():
            checkpoint = read_checkpoint(out / "ckpt.pt")
        elif there := [*out.glob("best.pt"), *out.glob("step_*.pt")]:  # they hold all that is needed too
            checkpoint = max(map(read_checkpoint, there), key=lambda c: c["step"])
        elif base.init_from:
            parent = read_checkpoint(base.init_from)
    else:
        module, cfg, recipe = find_preset(name)
        base = Settings(model=name, **{k: v for k, v in recipe.items() if k != "model"})
        if base.init_from and init_from is None:
            init_from = base.init_from
            if not os.path.exists(init_from) and not {"--help", "-h"} & set(argv):
                raise UserError(f"{name} starts from {init_from}, which is not there: run python train.py --model={Path(init_from).parent.name} first, or give --init_from")
            parent = read_checkpoint(init_from) if os.path.exists(init_from) else None
        if parent:
            if parent["model_name"].split("-")[0] != name.split("-")[0]:
                raise UserError(f"--init_from={init_from} holds a {parent['model_name']}, not a {name}")
            cfg = module.Config(**parent["cfg"])
            if any(yes_or_no(flag_value(argv, flag) or "false") for flag in ("decay_only", "eval_only")):
                base = replace(Settings(**parent["train"]), out="", init_from=init_from, overwrite=False, resume=False, decay_only=False)
    given, _ = parse_flags(argv, base, cfg, description=f"{__doc__.split(chr(10))[0]} Defaults in brackets are those of --model={name}.")
    given.pop("resume", None)
    if given.get("loss_on") == "auto":
        given.pop("loss_on")  # what the recipe or the record says
    shape = {k: given.pop(k) for k in list(given) if k in {f.name for f in fields(cfg)}}
    if resume or parent:
        differs = [f"{k} is {getattr(cfg, k)}" for k, v in shape.items() if getattr(cfg, k) != v]
        if differs:
            raise UserError(f"{'the run' if resume else init_from} has another shape: {', '.join(differs)}")
    cfg = replace(cfg, **shape)
    s = replace(base, resume=resume, **given)
    if parent and "tokenizer" not in given:
        s.tokenizer = parent["train"]["tokenizer"]  # names in its recipe's --data go with it
    if "max_steps" in given and "epochs" not in given:
        s.epochs = 0.0
    if "block_size" not in given:
        s.block_size = min(s.block_size, cfg.context_length)
    if "sample_prompt" not in given and given.get("data", base.data) != base.data:
        s.sample_prompt = ""  # the recipe's prompt belongs to the recipe's data
    if resume and given.get("model", name) != name:
        raise UserError(f"the run in {out} is a {name}, not a {given['model']}")
    for field, allowed in CHOICES.items():
        if getattr(s, field) not in allowed:
            value = getattr(s, field)
            raise UserError(f"--{field}={value} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
    positive = ("block_size", "batch_tokens", "micro_batch", "max_steps", "log_every")
    for field in fields(s):
        value = getattr(s, field.name)
        if type(value) in (int, float) and (value < 0 or field.name in positive and value == 0 or not math.isfinite(value)):
            raise UserError(f"--{field.name}={value} must be {'above' if field.name in positive else 'at least'} 0")
    if s.ema_beta >= 1 or s.decay_fraction > 1:
        raise UserError("--ema_beta must be below 1 and --decay_fraction at most 1")
    if s.replay >= 1 or s.relevance > 1:
        raise UserError("--replay must be below 1 and --relevance at most 1")
    if s.block_size > cfg.context_length:
        raise UserError(f"--block_size={s.block_size} is longer than the model's context of {cfg.context_length}; "
                        f"--context_length={s.block_size} makes a model that fits")
    if not s.init_from:  # else it depends on the data, see tuning_settings
        check_rows(s)
    for flag in ("decay_only", "eval_only"):
        if getattr(s, flag) and not (resume or given.get("init_from")):
            raise UserError(f"--{flag} needs --init_from=CHECKPOINT")
    if s.eval_only and (resume or s.decay_only):
        raise UserError("--eval_only measures one checkpoint and trains nothing: leave --resume and --decay_only away")
    if s.decay_only and not resume:
        if not s.decay_steps or s.epochs:
            raise UserError("--decay_only needs --decay_steps" + ", and has no --epochs" * bool(s.epochs))
        s.schedule, s.warmup_steps, s.max_steps = "wsd", 0, parent["step"] + s.decay_steps
    if not s.data:
        raise UserError(f"--model={name} names no data of its own: give --data")
    if not s.init_from:  # else its data decides, see train()
        s.out = s.out or f"out/{name}"
    return module, cfg, s, parent, checkpoint, set(given)


def pick_device(s, local_rank):
    """(device, compute dtype, compile?) for the settings. UserError if the device is not there or cannot do it."""
    name = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={s.device} is not a device; use cpu, cuda, cuda:1 or mps") from None
    here = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not here.get(device.type):
        raise UserError(f"--device={s.device}: this torch has no such device here; use --device=cpu")
    if device.type == "cuda":
        index = device.index if device.index is not None else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(f"there is no device cuda:{index}: this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = device.type == "cpu" and bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32, "auto": torch.bfloat16 if fast else torch.float32}[s.dtype]
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++", "cl") if c and shutil.which(c)), None)
    if s.compile == "on" and device.type == "cpu" and not compiler:
        raise UserError("--compile=on needs a C++ compiler on a CPU, and none was found; --compile=off trains without")
    if device.type == "cpu" or s.deterministic:
        # compiled CPU code was seen to differ from run to run without this
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device, dtype, compiler


# Dense bf16 matrix products per second without sparsity, from the makers' data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "L4": 121e12}
COMPILE_PAYS = 1e14  # FLOPs of a run from which compiling on a CPU (about half a minute) is repaid: some 15 minutes on two cores


# ---------------------------------------------------------------------------------------------------- the run

def main(argv):
    module, cfg, s, parent, checkpoint, given = settings_from(argv)
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    is_main = rank == 0
    if not is_main:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    device, dtype, compiler = pick_device(s, local_rank)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train(module, cfg, s, parent, checkpoint, given, rank, world, device, dtype, compiler)
    except UserError:
        if is_main:
            raise
        return 2  # every process met the same mistake; one line is enough
    finally:
        for number, handler in handlers.items():  # for whoever calls this as a function
            signal.signal(number, handler or signal.SIG_DFL)
        if world > 1:
            dist.destroy_process_group()


# What fine-tuning on chats does otherwise than the recipe of the model, unless the recipe is one for tuning or flags say something else
TUNING_EPOCHS, TUNING_RATE, TUNING_TOKENS = 3, 0.25, 32_768  # passes over the replies; share of the learning rates; most tokens of a step


def tuning_settings(s, given):
    """Settings for fine-tuning on chats: the recipe's, but short, gentle, in small steps, and with rows of whole chats."""
    rows = max(1, min(s.batch_tokens, TUNING_TOKENS) // s.block_size)
    small = s.batch_tokens <= TUNING_TOKENS and s.batch_tokens % s.block_size == 0
    own = dict(loss_on="responses", pack="document", lr=TUNING_RATE * s.lr, muon_lr=TUNING_RATE * s.muon_lr, order="random", schedule="wsd",
               decay_fraction=1.0, decay_steps=0, final_lr_fraction=0.0, epochs=0.0 if "max_steps" in given else TUNING_EPOCHS,
               batch_tokens=s.batch_tokens if small else s.block_size << rows.bit_length() - 1)  # a power of two of rows, for 2, 4 or 8 GPUs
    return replace(s, **{k: v for k, v in own.items() if k not in given})


def train(module, cfg, s, parent, checkpoint, given, rank, world, device, dtype, compiler):
    is_main = rank == 0
    barrier = dist.barrier if world > 1 else lambda: None
    resumed = checkpoint is not None
    start = checkpoint if resumed else parent  # where weights come from, if from anywhere

    # data, and whether it is chats to be tuned on
    sources, tokenizer_text = find_data(s.data, s.tokenizer, cfg.vocab_size, is_main, barrier, start and start["tokenizer"])
    tokenizer = load_tokenizer(tokenizer_text)
    chats = [x for x in sources if x.train_mask is not None]
    begins, for_tuning = not (s.decay_only or s.eval_only or s.resume), module.PRESETS[s.model][1].get("loss_on", "auto") != "auto"
    gentle = bool(chats and s.init_from) and begins and not for_tuning  # a recipe for pretraining is too strong
    if gentle:
        s = tuning_settings(s, given)
    elif s.loss_on == "auto":
        s = replace(s, loss_on="all")
    tuning = s.loss_on == "responses" and bool(chats)
    if s.eval_only:
        s = replace(s, replay=0.0, relevance=0.0)
    elif not tuning:
        if s.loss_on == "responses":
            raise UserError(f"--loss_on=responses needs a set of chats, and {s.data} holds none")
        off = dict(replay=0.0, relevance=0.0, response_start_weight=1.0, base_data="")
        for name in off:
            if name in given and getattr(s, name) != off[name]:
                raise UserError(f"--{name} belongs to tuning on the replies of chats: it needs --loss_on=responses and a set of chats")
        s = replace(s, **off)  # a recipe for tuning has some
    if not any(len(x.val) > 1 for x in (chats if tuning else sources)):
        raise UserError(f"{s.data} has no validation text{' of chats' * tuning}; prepare it with --val_fraction above 0")
    s = replace(s, pack=("document" if tuning else "stream") if s.pack == "auto" else s.pack,
                out=s.out or f"out/{s.model}" + "-decay" * s.decay_only + "-sft" * ((tuning or gentle) and not s.model.endswith("-sft")))
    if s.relevance and s.pack != "document":
        raise UserError("--relevance compares replies under whole prompts: it needs --pack=document")
    out = Path(s.out)
    if not (s.resume or s.eval_only or s.overwrite) and any(out.glob("*.pt")):
        raise UserError(f"{out} holds a run: --resume --out={out} goes on with it, --out names another folder, --overwrite deletes it")
    base = []
    if tuning and (s.base_data or not (s.resume or "base_data" in given)):
        before = start["train"] if start else {}
        spec = s.base_data or before.get("base_data") or before.get("data", "") * (before.get("loss_on") != "responses")
        try:
            base = find_data(spec, s.tokenizer, cfg.vocab_size, is_main, barrier, tokenizer_text, "the chats'")[0] if spec else []
        except UserError as e:
            if s.replay or "base_data" in given:
                raise
            print(f"no base data, so what is forgotten of it is not measured: {e}")
        else:
            s = replace(s, base_data=spec)
    if s.replay and not base:
        raise UserError("--replay needs --base_data")

    # rows of T positions, the same global batch for any number of processes
    if not s.eval_only:
        check_rows(s)
    T, rows = s.block_size, s.batch_tokens // s.block_size
    if rows % world and not s.eval_only:
        raise UserError(f"the {rows} windows of a step cannot be shared out evenly to {world} processes; change --batch_tokens")
    micro = s.micro_batch if s.eval_only else next(m for m in range(min(s.micro_batch, rows // world), 0, -1) if rows // world % m == 0)
    bos, eos = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")
    loader = None if s.eval_only else Loader(sources, s.order, T, s.max_steps * rows, s.seed, bos if s.pack == "document" else None, base, s.replay)
    short = gentle or bool(s.epochs)  # its length depends on the data
    if s.epochs and loader:
        s = replace(s, epochs=0.0, max_steps=math.ceil(s.epochs * sum(loader.per_epoch[:loader.own]) / (1 - s.replay) / rows))
        loader.set_length(s.max_steps * rows)
    if short and "warmup_steps" not in given:
        s = replace(s, warmup_steps=min(s.warmup_steps, s.max_steps // 10))
    bytes_per_token = torch.from_numpy(token_byte_counts(tokenizer)).float()
    boost, weighted = None, s.word_boost != 1 or s.response_start_weight != 1
    if s.word_boost != 1:
        boost = torch.tensor([1.0 if len(tokenizer.decode([i])) < 2 else s.word_boost for i in range(len(bytes_per_token))])

    # model and optimizers
    torch.manual_seed(s.seed)
    try:
        model = module.Model(cfg).to(device)
    except ValueError as e:
        raise UserError(f"--model={s.model}: {e}") from None
    if start:
        use = start["model"] | (start["ema"] if start["use_ema"] and not (resumed or s.decay_only or s.eval_only) else {})
        model.load_state_dict(use)
    if s.grad_checkpoint:
        checkpoint_blocks(model)
    params, names = list(model.parameters()), [n for n, _ in model.named_parameters()]
    # Newton-Schulz needs few digits; bf16 there is faster wherever bf16 is
    optimizers = None if s.eval_only else Optimizers(model, s, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    ema = [p.detach().clone() for p in params] if s.ema_beta else None
    step, tokens, elapsed, use_ema, best = 0, 0, 0.0, False, dict(loss=math.inf, step=0)
    torch.manual_seed(s.seed + rank)  # dropout, if a fork has any, differs between processes
    if start and (resumed or s.decay_only):
        if [list(f) for f in start["loader"]["fingerprint"]] != [x.fingerprint for x in loader.sources]:
            raise UserError(f"the data of {s.data}{' or ' * bool(s.base_data) + s.base_data} has changed since the checkpoint, so its place in it is lost; "
                            "use the data it was trained on" + ", and as much --replay" * tuning)
        step, tokens, use_ema = start["step"], start["tokens"], start["use_ema"]
        loader.load_state_dict(start["loader"])
        optimizers.load_state_dict(start["optimizer"])
        if ema is not None and start["ema"]:
            ema = [start["ema"][n].to(device) for n in names]
        if len(start["rng"]) == world:
            torch.set_rng_state(start["rng"][rank]["cpu"])
            if device.type == "cuda" and "cuda" in start["rng"][rank]:
                torch.cuda.set_rng_state(start["rng"][rank]["cuda"])
        if resumed:
            best, elapsed = start["metrics"]["best"] if (out / "best.pt").exists() else best, start["metrics"]["elapsed"]
    flops = model.flops_per_token(T)
    long_enough = device.type == "cpu" and bool(compiler) and flops * s.batch_tokens * s.max_steps > COMPILE_PAYS
    compiled = s.compile == "on" or s.compile == "auto" and (device.type == "cuda" or long_enough)
    run = torch.compile(model, dynamic=False) if compiled else model
    if world > 1:
        run = torch.nn.parallel.DistributedDataParallel(run, device_ids=[device.index] if device.type == "cuda" else None)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()

    def measure(n_tokens):  # not compiled: its shapes vary
        args = n_tokens, T, micro, autocast
        result = evaluate(model, sources, *args, bytes_per_token, device, world, rank, bos if s.pack == "document" else None, tuning)
        if base:
            result["base"] = evaluate(model, base, *args, bytes_per_token, device, world, rank)["mixed"]
        if tuning:
            result["relevance"] = relevance(model, sources, *args, bos, device, world, rank)
        return result

    def sample():
        prompt, wide = [bos, *tokenizer.encode(s.sample_prompt, add_special_tokens=False).ids], "\n             "
        if tuning:  # a chat: --sample_prompt or, if there is none, the first question of the validation text
            user, assistant = tokenizer.token_to_id("<|user|>"), tokenizer.token_to_id("<|assistant|>")
            chat = next(x.val for x in chats if len(x.val))[:2 ** 16].tolist()
            prompt = [bos, user, *prompt[1:], assistant] if s.sample_prompt else chat[:chat.index(assistant) + 1]
        ids = model.generate(torch.tensor([prompt], device=device), s.sample_tokens, temperature=0.8, top_p=0.95, stop_token=eos,
                             generator=torch.Generator(device).manual_seed(s.seed))[0].tolist()
        if tuning:
            progress.done("sample       user: " + tokenizer.decode(prompt[prompt.index(user):]).replace("\n", wide))
            ids = ids[len(prompt):]
        progress.done("             assistant: " * tuning + "sample       " * (not tuning) + tokenizer.decode(ids).replace("\n", wide))

    progress = Progress()
    if s.eval_only:
        model.eval()
        for kind, values in (("raw", None), *([("EMA", [parent["ema"][n].to(device) for n in names])] if parent["ema"] else ())):
            with weights(params, values):
                result = measure(s.final_eval_tokens)
            progress.done(f"{s.init_from}, step {parent['step']:,}, {kind} weights{' (the chosen ones)' * ((kind == 'EMA') == parent['use_ema'])}")
            for line in table(result, sources):
                progress.done("  " + line)
        return 0

    # the run's folder
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.part", *(() if resumed else ("ckpt.pt", "best.pt", "best_validation.json", "step_*.pt", "loss.png"))):
            for old in out.glob(pattern):
                old.unlink()
        kept = [r for r in read_rows(out / "metrics.jsonl") if r["step"] <= step and not r.get("final")] if resumed else []
        with replacing(out / "metrics.jsonl") as f:
            f.write("".join(json.dumps(r) + "\n" for r in kept).encode())  # the steps since the checkpoint come again
        with replacing(out / "config.json") as f:
            settings = dict(model=s.model, cfg=asdict(cfg), train=asdict(replace(s, resume=False, overwrite=False)))
            f.write(json.dumps(settings, indent=1).encode())
    barrier()

    def record(row):
        if is_main:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def save(*paths):
        rng = dict(cpu=torch.get_rng_state()) | (dict(cuda=torch.cuda.get_rng_state()) if device.type == "cuda" else {})
        every_rng = [rng]
        if world > 1:
            every_rng = [None] * world
            dist.all_gather_object(every_rng, rng)
        if is_main:
            state = dict(format=FORMAT, step=step, tokens=tokens, model_name=s.model, cfg=asdict(cfg), train=asdict(s), model=model.state_dict(),
                         ema=dict(zip(names, ema)) if ema is not None else {}, use_ema=use_ema, optimizer=optimizers.state_dict(), rng=every_rng,
                         loader=loader.state_dict(), tokenizer=tokenizer_text,
                         metrics=dict(best=best, elapsed=elapsed))
            for path in paths:
                save_checkpoint(path, state)

    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{s.model:<12} {model.n_params / 1e6:,.2f}M parameters ({Path(module.__file__).name}), "
          f"context {cfg.context_length:,}, training on {'windows' if s.pack == 'stream' else 'rows'} of {T:,}")
    for i, (x, n, fill) in enumerate(zip(loader.sources, loader.per_epoch, loader.fill)):
        print(f"{x.name:<12} {x.language}/{x.kind}, {len(x.train):,} training and {len(x.val):,} validation tokens, "
              + (f"{loader.share[i]:.0%} of the run" if not s.replay else
                 f"{loader.row_share[i] * (1 - s.replay):.0%} of the rows" if i < loader.own else f"{loader.row_share[i] * s.replay:.0%} of the rows, replayed")
              + f", whole documents in {n:,} rows, {1 - fill:.2%} of them padding" * (loader.edges[i] is not None))
    if tuning or gentle:
        tricks = [f"word boost {s.word_boost:g}"] * (s.word_boost != 1)
        tricks += [f"first {s.response_start_tokens} tokens x {s.response_start_weight:g}"] * (s.response_start_weight != 1)
        tricks += [f"replay {s.replay:g}"] * (s.replay > 0) + [f"relevance {s.relevance:g}, margin {s.relevance_margin:g}"] * (s.relevance > 0)
        print(f"{'tuning':<12} {s.init_from or 'random weights'}, on {'replies' if tuning else 'all of the chats'}; {', '.join(tricks) or 'no tricks'}; "
              + f"muon_lr {s.muon_lr:g}, " * (s.optimizer == "muon") + f"lr {s.lr:g}, {s.warmup_steps} steps of warm-up")
    print(f"{device.type:<12} {str(dtype)[6:]}{', compiled' * compiled}, {f'{world} x ' * (world > 1)}{chip}; "
          f"Muon {optimizers.n_matrices} matrices, AdamW {optimizers.n_other} tensors; "
          f"{s.max_steps:,} steps of {s.batch_tokens:,} tokens, {rows // world // micro} x {micro} rows each")
    if resumed:
        print(f"resumed      {out} at step {step:,}")

    # Ctrl-C and SIGTERM end the step, save and leave; a second one ends at once
    stop = []
    def on_signal(number, frame):
        if stop:
            sys.exit(128 + number)
        stop.append(number)
    previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}

    def assess():
        """Evaluates the raw and the averaged weights and records both: {"raw": result, "ema": result}, see `measure`."""
        model.eval()
        results = dict(raw=measure(s.eval_tokens))
        if ema is not None and step:
            with weights(params, ema):
                results["ema"] = measure(s.eval_tokens)
        model.train()
        record(dict(step=step, tokens=tokens, val_loss={k: split_result(r, 0) for k, r in results.items()},
                    val_bits_per_byte={k: split_result(r, 1) for k, r in results.items()},
                    **relevances(results), elapsed=elapsed))
        return results

    def summary(results, winner):
        by_language = results[winner]["language"]
        return (f"eval {step:>6,}  {'replies' if tuning else 'validation'} {results['raw']['mixed'][1]:.3f} bits/byte"
                + (f", EMA {results['ema']['mixed'][1]:.3f}" if "ema" in results else "")
                + "".join(f"  {name} {bits:.3f}" for name, (_, bits) in by_language.items() if len(by_language) > 1)
                + (f"  base {results[winner]['base'][1]:.3f}" if base else "") + (f"  relevance {results[winner]['relevance'][0]:.1%}" if relevances(results) else ""))

    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in chip), None)
    model.train()
    if tuning and not step:  # where forgetting begins
        before = assess()
        if math.isnan(before["raw"]["mixed"][0]):  # long prompts, short replies, few rows
            raise UserError(f"no reply is in the validation rows that --eval_tokens={s.eval_tokens} takes; raise it, or --block_size")
        progress.done(summary(before, "raw"))
    mark, mark_step, mark_tokens, saved_step = time.monotonic(), step, tokens, step if resumed else -1
    while step < s.max_steps:
        # one optimizer step
        dealt = [loader.next_row() for _ in range(rows)]
        x, y, reset = loader.tensors(dealt)
        if max(x.max(), y.max()) >= cfg.vocab_size:
            raise UserError(f"the data holds token id {int(max(x.max(), y.max()))}, the model's vocabulary ends at {cfg.vocab_size - 1}; "
                            "prepare the data again")
        marks = loader.marks(dealt, s.response_start_tokens) if tuning else None
        if tuning:
            y[marks == 0] = -1
        in_replies = torch.tensor([not tuning or loader.in_replies(source) for source, _ in dealt])
        targets, shown = y[y >= 0], y[in_replies][y[in_replies] >= 0]  # trained on; whose bits per byte are shown: of replies alone, not of what is replayed
        loss_weights = token_weights(y, marks, boost, s.response_start_weight)
        whole = float(loss_weights.sum()) or 1.0  # over all processes, so that the mean is the same for any number of them
        shares = [float(w.sum()) / whole for w in loss_weights[rank::world].split(micro)]
        rivals = [None] * len(shares)
        if s.relevance:
            rng = np.random.default_rng([s.seed, step, rank, 1])
            replies = replies_of(dealt, loader, bos, rng)
            rivals = [wrong_prompts(replies, mine, int(micro * s.relevance + rng.random()), T, rng)  # rounded so that the mean is right
                      for mine in (list(range(rank, rows, world)[i * micro:(i + 1) * micro]) for i in range(len(shares)))]
            spoken = max(1, int((y[in_replies] >= 0).sum()))
        replied = in_replies[:, None].expand_as(y)
        x, y, reset, loss_weights, replied = (None if t is None else t[rank::world].to(device) for t in (x, y, reset, loss_weights, replied))
        loss, contrast, nats = torch.zeros((), device=device), torch.zeros((), device=device), torch.zeros((), device=device)
        for i, share in enumerate(shares):
            part = slice(i * micro, (i + 1) * micro)
            with contextlib.nullcontext() if i + 1 == len(shares) or world == 1 else run.no_sync():  # gradients travel once a step
                batch, part_contrast = [x[part], y[part], None if reset is None else reset[part]], torch.zeros_like(contrast)
                if not tuning:
                    with autocast():
                        part_loss = run(*batch[:2], loss_weights=loss_weights[part] if weighted else None, reset=batch[2])[1] * share
                else:
                    rival = rivals[i] if rivals[i] is not None and len(rivals[i][0]) else None
                    if rival:
                        batch = [torch.cat((own, other.to(device))) for own, other in zip(batch, rival)]
                    with autocast():
                        losses = run(*batch[:2], reduction="none", reset=batch[2])[1]
                    if rival:
                        number, at_home, n = rival[3].to(device), rival[4].to(device), int(rival[3].max())
                        losses, under_wrong = losses.split((micro, len(number)))
                        lengths = reply_sums(torch.ones_like(under_wrong), number, n)
                        own, wrong = reply_sums(losses, at_home, n), reply_sums(under_wrong, number, n)
                        part_contrast = relevance_loss(own, wrong, lengths, s.relevance_margin) / spoken
                    part_loss = (losses * loss_weights[part]).sum() / whole
                    nats += (losses.detach() * replied[part]).sum()
                ((part_loss + part_contrast) * world).backward()  # DDP averages over the processes; the loss is a sum of shares
            loss += part_loss.detach()
            contrast += part_contrast.detach()
        for p in params:
            if p.grad is None:  # a part that is switched off
                p.grad = torch.zeros_like(p)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(params, s.grad_clip or math.inf, foreach=True))
        if not math.isfinite(grad_norm):
            kept = f"{out / 'ckpt.pt'} holds step {saved_step}" if saved_step >= 0 else "no checkpoint was written yet"
            raise UserError(f"the loss is not finite at step {step + 1} (loss {float(loss):.3g}, gradient norm {grad_norm}): stopped; {kept}. "
                            "A lower learning rate or --dtype=float32 may help")
        lr = optimizers.step(lr_factor(step, s))
        for p in params:
            p.grad = None
        if ema is not None:
            ema_update(ema, params, step, s.ema_beta)
        step, tokens = step + 1, tokens + len(targets)

        stopping = bool(stop)
        if world > 1:  # a signal may reach the processes in different steps
            anyone = torch.tensor([stopping], dtype=torch.int32, device=device)
            dist.all_reduce(anyone)
            stopping = bool(anyone)

        if step % s.log_every == 0 or step == s.max_steps:
            if world > 1:
                dist.all_reduce(loss)
                dist.all_reduce(contrast)
                dist.all_reduce(nats)
            seconds = time.monotonic() - mark
            rate = (tokens - mark_tokens) / seconds
            elapsed += seconds
            bits = (float(nats) if tuning else float(loss) * len(targets)) / math.log(2) / (float(bytes_per_token[shown].sum()) or math.nan)  # 0: all are unknown
            record(dict(step=step, tokens=tokens, train_loss=float(loss), train_bits_per_byte=bits, lr=lr,
                        grad_norm=grad_norm, tokens_per_s=rate, elapsed=elapsed) | (dict(relevance_loss=float(contrast)) if s.relevance else {}))
            line = (f"step {step:>6,}/{s.max_steps:,}  loss {float(loss):.3f}  {bits:.2f} bits/byte  "
                    + f"relevance {float(contrast):.3f}  " * bool(s.relevance) + f"{rate / 1e3:.1f}k tok/s  "
                    f"{clock((s.max_steps - step) * seconds / (step - mark_step))} left  lr {lr:.2g}  |g| {grad_norm:.2f}"  # the end is cut off in a narrow terminal
                    + (f"  MFU {(1 + s.relevance) * s.batch_tokens * (step - mark_step) / seconds * flops / peak / world:.0%}" if peak and dtype == torch.bfloat16 else ""))
            (progress.show if progress.live else progress.done)(line)
            mark, mark_step, mark_tokens = time.monotonic(), step, tokens

        if step == s.max_steps or s.eval_every and step % s.eval_every == 0:
            begun = time.monotonic()
            results = assess()
            winner = min(results, key=lambda k: results[k]["mixed"][0])
            use_ema = winner == "ema"
            better = results[winner]["mixed"][0] < best["loss"]
            if better:
                best = dict(loss=results[winner]["mixed"][0], step=step)
            progress.done(summary(results, winner) + "  best" * better)
            if better:
                save(out / "best.pt")
                kept = s.keep_every and step % s.keep_every == 0
                if is_main:
                    with replacing(out / "best_validation.json") as f:
                        f.write(json.dumps(best_validation(results[winner], sources, step=step, tokens=tokens, weights=winner, checkpoint=f"step_{step}.pt"
                                                           if kept else "best.pt", eval_tokens=s.eval_tokens), indent=1).encode())
            mark += time.monotonic() - begun  # speed is that of training alone

        begun = time.monotonic()
        if stopping or step == s.max_steps or s.save_every and step % s.save_every == 0:
            save(out / "ckpt.pt")
            saved_step = step
        if s.keep_every and step % s.keep_every == 0:
            save(out / f"step_{step}.pt")
        if s.sample_tokens and s.sample_every and step % s.sample_every == 0 and step < s.max_steps and is_main:
            sample()
        mark += time.monotonic() - begun
        if stopping:
            progress.done(f"stopped at step {step:,} of {s.max_steps:,}, saved {out / 'ckpt.pt'}        "
                          f"next: python train.py --resume --out={out}")
            return 0

    for number, handler in previous.items():  # from here on there is nothing to save
        signal.signal(number, handler)
    # the best weights of the run, on the whole validation text
    final = read_checkpoint(out / "best.pt")
    model.load_state_dict(final["model"] | (final["ema"] if final["use_ema"] else {}))
    model.eval()
    result, kind = measure(s.final_eval_tokens), "ema" if final["use_ema"] else "raw"
    if is_main:
        xz = None if tuning else xz_bits_per_byte(sources, tokenizer)
        record(dict(step=final["step"], tokens=final["tokens"], final=True, val_loss={kind: split_result(result, 0)},
                    val_bits_per_byte={kind: split_result(result, 1)}, **relevances({kind: result}),
                    xz_bits_per_byte=xz, elapsed=elapsed))
        draw_loss(read_rows(out / "metrics.jsonl"), out / "loss.png", f"{s.model} on {', '.join(x.name for x in sources)}", xz)
        print(f"best         step {final['step']:,}{' (EMA)' * final['use_ema']}: {result['mixed'][1]:.3f} bits/byte over the validation "
              + ("chats' replies" if tuning else "text") + (f"; xz -9 needs {xz:.3f}" if xz else ""))
        if len(sources) > 1 or tuning:
            print("\n".join(table(result, sources)))
        if s.sample_tokens:
            sample()
        shown = " --chat" if tuning else f' --prompt="{s.sample_prompt}"' if s.sample_prompt else ""
        picture = " loss.png" * (out / "loss.png").exists()
        print(f"wrote {out}: best.pt best_validation.json ckpt.pt metrics.jsonl{picture} config.json        next: python sample.py --ckpt={out / 'best.pt'}{shown}")
    barrier()
    return 0


if __name__ == "__main__":
    run_tool(main)
