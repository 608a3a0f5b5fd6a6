"""Text from a trained model: `python sample.py --ckpt=out/tinymemory/best.pt --prompt="def "`.

One sample is shown as it is generated, several are generated together and shown when all are done. Tokens are decoded through
the model's cache, one at a time. Beyond the model's context generation goes on: when the context is full, its second half is
read anew and the first is forgotten, as Model.generate does; a model without attention keeps its state and has no such end. The
same seed gives the same text on the same kind of device.
"""
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

import torch

from prepare import UserError, parse_flags, run_tool
from train import Settings as TrainSettings
from train import load_checkpoint, pick_device


@dataclass
class Settings:
    ckpt: str = "out/tinymemory/best.pt"  # checkpoint to sample from
    prompt: str = ""  # text to continue; empty: standard input if it is piped, else a new document
    num_samples: int = 1  # continuations of the prompt
    max_new_tokens: int = 256  # length of each
    temperature: float = 0.8  # divides the logits; 0 always takes the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens that has this probability; 1: all
    min_p: float = 0.0  # keep tokens of at least this share of the likeliest one's probability; 0: all
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred less likely
    no_repeat_ngram_size: int = 0  # never repeat a sequence of so many tokens; 0: no limit
    stop: str = ""  # end a sample before this text
    seed: int = 1337  # same seed, same text
    ema: bool | None = None  # averaged weights, --no-ema the raw ones; unset: those with the lower validation loss
    device: str = "auto"  # cpu, cuda, cuda:1, mps


# ---------------------------------------------------------------------------------------------------- choosing a token

def penalize_repetition(logits, seen, penalty):
    """Logits (B, V) of the tokens marked in seen, bool (B, V): positive ones divided by penalty, others multiplied (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Logits (B, V) with -inf for what top-k, nucleus (arXiv 1904.09751) and min-p (arXiv 2407.01082) sampling leave out, in this order."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p  # the token that reaches top_p stays
        beyond[:, 0] = False  # and the likeliest one always
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)
    if min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.max(-1, keepdim=True).values, -math.inf)
    return logits


class SeenNgrams:
    """Which tokens would complete an n-gram that the row already holds; one dictionary look-up a step instead of a search."""

    def __init__(self, n, row):
        self.n, self.row, self.next = n, [], defaultdict(set)
        for token in row:
            self.add(token)

    def add(self, token):
        if len(self.row) >= self.n - 1:
            self.next[tuple(self.row[len(self.row) - self.n + 1:])].add(token)
        self.row.append(token)

    def banned(self):
        return list(self.next.get(tuple(self.row[len(self.row) - self.n + 1:]), ())) if len(self.row) >= self.n - 1 else []


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, no_repeat_ngram_size=0, generator=None):
    """Yields the next token of every row, int64 (B,), max_new_tokens times, continuing idx (B, T).

    Applied in this order: repetition penalty and n-gram ban (both count the prompt), temperature (0: likeliest token), top_k, top_p,
    min_p. generator: torch.Generator on the model's device. Only the last tokens of idx are read, as many as the model can.
    """
    cache, V = model.init_cache(idx.size(0)), model.cfg.vocab_size
    C = cache.max_len  # the context; without an end for a model that keeps a state in place of a context
    new = idx = idx[:, -C:]
    seen = torch.zeros(idx.size(0), V, dtype=torch.bool, device=idx.device).scatter_(1, idx, True)
    ngrams = [SeenNgrams(no_repeat_ngram_size, row) for row in idx.tolist()] if no_repeat_ngram_size else []
    for _ in range(max_new_tokens):
        if cache.length == C:
            cache, new = model.init_cache(idx.size(0)), idx[:, -(C // 2):]
        logits = model(new, cache=cache)[0][:, -1].float()
        if repetition_penalty != 1:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        for row, ngram in zip(logits, ngrams):
            row[ngram.banned()] = -math.inf
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(keep_likely(logits / temperature, top_k, top_p, min_p).softmax(-1), 1, generator=generator)
        idx = torch.cat((idx[:, 1 - C:], new), dim=1)
        seen.scatter_(1, new, True)
        for ngram, token in zip(ngrams, new[:, 0].tolist()):
            ngram.add(token)
        yield new[:, 0]


def generate(model, idx, max_new_tokens, stop_token=None, **sampling):
    """idx (B, T) -> (B, T + new): `stream` collected. A row that produced stop_token is filled up with it; ends early when all have."""
    out, done = [idx], torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    for token in stream(model, idx, max_new_tokens, **sampling):
        if stop_token is not None:
            token = token.masked_fill(done, stop_token)
            done |= token == stop_token
        out.append(token[:, None])
        if done.all():
            break
    return torch.cat(out, dim=1)


# ---------------------------------------------------------------------------------------------------- showing text

class Text:
    """One sample's text, grown token by token. `add` returns what is safe to show: whole characters, and nothing that may turn out
    to be the beginning of the stop text. `done` once the end token or the stop text came."""

    def __init__(self, tokenizer, eos, stop=""):
        self.tokenizer, self.eos, self.stop = tokenizer, eos, stop
        self.pending, self.text, self.shown, self.done = [], "", 0, False

    def add(self, token):
        if self.done:
            return ""
        if token == self.eos:
            return self.finish()
        self.pending.append(token)
        # a character of up to four bytes may still be coming
        return "" if self.tokenizer.decode(self.pending).endswith("\ufffd") and len(self.pending) < 4 else self.take()

    def take(self):
        """Moves the pending tokens into the text."""
        self.text, self.pending = self.text + self.tokenizer.decode(self.pending), []
        at = self.text.find(self.stop, max(0, self.shown - len(self.stop))) if self.stop else -1
        if at >= 0:
            self.text, self.done = self.text[:at], True
            return self.show(at)
        return self.show(len(self.text) - max((n for n in range(1, len(self.stop)) if self.text.endswith(self.stop[:n])), default=0))

    def finish(self):
        """The rest, when no more tokens come."""
        if self.done:
            return ""
        piece = self.take()
        self.done = True
        return piece + self.show(len(self.text))

    def show(self, end):
        piece, self.shown = self.text[self.shown:end], max(self.shown, end)
        return piece


def main(argv):
    given, _ = parse_flags(argv, Settings(), description=__doc__.split("\n")[0])
    s = Settings(**given)
    sound = dict(num_samples=s.num_samples > 0, max_new_tokens=s.max_new_tokens > 0, temperature=s.temperature >= 0, top_k=s.top_k >= 0,
                 top_p=0 < s.top_p <= 1, min_p=0 <= s.min_p <= 1, repetition_penalty=s.repetition_penalty > 0,
                 no_repeat_ngram_size=s.no_repeat_ngram_size >= 0)
    for name, good in sound.items():
        if not good:
            raise UserError(f"--{name}={getattr(s, name)} makes no sense; --help says what it does")
    device, *_ = pick_device(TrainSettings(device=s.device), 0)
    model, tokenizer, checkpoint = load_checkpoint(s.ckpt, device, s.ema)
    prompt = s.prompt
    if "prompt" not in given and sys.stdin and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    bos, eos = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")
    ids = [bos, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    if len(ids) > model.cfg.context_length:
        print(f"the prompt has {len(ids):,} tokens, the model reads the last {model.cfg.context_length:,}", file=sys.stderr)

    started, texts = time.monotonic(), [Text(tokenizer, eos, s.stop) for _ in range(s.num_samples)]
    if s.num_samples == 1:
        print(prompt, end="", flush=True)
    sampling = {k: getattr(s, k) for k in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")}
    idx, generator, produced = torch.tensor([ids] * s.num_samples, device=device), torch.Generator(device).manual_seed(s.seed), 0
    for tokens in stream(model, idx, s.max_new_tokens, generator=generator, **sampling):
        produced += sum(not t.done for t in texts)
        pieces = [t.add(token) for t, token in zip(texts, tokens.tolist())]
        if s.num_samples == 1:
            print(pieces[0], end="", flush=True)
        if all(t.done for t in texts):
            break
    if s.num_samples == 1:
        print(texts[0].finish())
    else:
        for i, t in enumerate(texts, 1):
            t.finish()
            print(f"--- sample {i} of {s.num_samples}\n{prompt}{t.text}")
    if sys.stderr.isatty():
        seconds = time.monotonic() - started
        print(f"[{checkpoint['model_name']} step {checkpoint['step']:,}: {produced:,} tokens, {produced / seconds:,.0f} tok/s]", file=sys.stderr)


if __name__ == "__main__":
    run_tool(main)
