"""Text from a trained model: `python sample.py --ckpt=out/tinymemory/best.pt --prompt="def "`, or a chat with a tuned one: `python sample.py --chat`.

One sample is shown as it is generated, several are generated together and shown when all are done. Tokens are decoded through
the model's cache, one at a time. Beyond the model's context generation goes on: when the context is full, its second half is
read anew and the first is forgotten, as Model.generate does; a model without attention keeps its state and has no such end. The
same seed gives the same text on the same kind of device.

--chat keeps the conversation in the cache and reads only what is new. Each line of the terminal or of a pipe is a message; when the context
is full, the oldest turns are forgotten. Ctrl-C ends a reply, /help lists the commands.
"""
import contextlib
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UserError, mended, parse_flags, replacing, run_tool
from corpus.chats import chat_ids

from machine import find_device
from run import load_checkpoint


@dataclass
class Settings:
    ckpt: str = "out/tinymemory/best.pt"  # checkpoint to sample from
    prompt: str = ""  # text to continue; empty: standard input if it is piped, else a new document; with --chat the first message
    chat: bool = False  # a conversation, with messages from the terminal or a pipe; --ckpt is then out/tinymemory-sft/best.pt unless given
    system: str = ""  # with --chat: instructions before the first message
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
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, no_repeat_ngram_size=0, generator=None,
           cache=None, exempt=()):
    """Yields the next token of every row, int64 (B,), max_new_tokens times, continuing idx (B, T).

    Applied in this order: repetition penalty and n-gram ban (both count the prompt, and neither meets the tokens in `exempt`), temperature (0: likeliest token), top_k, top_p,
    min_p. generator: torch.Generator on the model's device. Only the last tokens of idx are read, as many as the model can.
    cache: one that has read the first tokens of idx already and now reads on; idx must fit into it.
    """
    fresh, V = cache is None, model.cfg.vocab_size
    cache = model.init_cache(idx.size(0)) if fresh else cache
    C = cache.max_len  # the context; without an end for a model that keeps a state in place of a context
    idx = idx[:, -C:] if fresh else idx
    new = idx[:, cache.length:]
    seen = torch.zeros(idx.size(0), V, dtype=torch.bool, device=idx.device).scatter_(1, idx, True)
    ngrams = [SeenNgrams(no_repeat_ngram_size, row) for row in idx.tolist()] if no_repeat_ngram_size else []
    for _ in range(max_new_tokens):
        if cache.length == C:
            cache, new = model.init_cache(idx.size(0)), idx[:, -(C // 2):]
        logits = model(new, cache=cache)[0][:, -1].float()
        free = logits[:, list(exempt)]
        if repetition_penalty != 1:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        for row, ngram in zip(logits, ngrams):
            row[ngram.banned()] = -math.inf
        logits[:, list(exempt)] = free
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


# ---------------------------------------------------------------------------------------------------- chat

class Chat:
    """A conversation: its messages as prepare.py frames them, `<|bos|>[<|system|>text]<|user|>text<|assistant|>text<|eos|><|user|>...`, and a
    cache that has read them. Text never becomes a special token, so no message can open a turn. UserError if the tokenizer has none for the roles.

    When the context is full, the oldest turns are forgotten until the rest fits into half of it, or the last turn alone into most of it, or
    the end of that turn into half; the system's message stays. UserError if it fills half of the context by itself.
    """

    def __init__(self, model, tokenizer, system="", **sampling):
        self.model, self.tokenizer, self.system, self.sampling, self.special = model, tokenizer, system, sampling, chat_ids(tokenizer)
        self.reset()

    def reset(self):
        """Forgets everything but the system's message."""
        self.messages = [dict(role="system", content=self.system)] if self.system else []
        self.ids = [self.special["<|bos|>"], *([self.special["<|system|>"], *self.encode(self.system)] if self.system else [])]
        self.start = len(self.ids)  # where the first turn begins
        self.cache, self.forgot = self.model.init_cache(1), False
        if self.start + 2 > self.cache.max_len // 2:
            raise UserError(f"the system's message has {self.start:,} tokens, the model reads {self.cache.max_len:,}; half of them are for the chat")

    def encode(self, text):
        return self.tokenizer.encode(mended(text), add_special_tokens=False).ids

    def make_room(self):
        """Forgets the oldest turns if the tokens do not fit into the cache."""
        ids, n, C, user, assistant = self.ids, len(self.ids), self.cache.max_len, self.special["<|user|>"], self.special["<|assistant|>"]
        if n > C:
            keep, turns = C // 2 - self.start, [i for i in range(self.start, n) if ids[i] == user]
            begin, who = next((i for i in turns if n - i <= keep), turns[-1] if turns else self.start), []
            if self.start + n - begin > C * 7 // 8:  # a turn loses its beginning, but not its frame
                begin = n - keep + 1
                who = [next(t for t in reversed(ids[:begin]) if t in (user, assistant))]
            self.ids = ids[:self.start] + who + ids[begin:]
            self.cache, self.forgot = self.model.init_cache(1), True

    def reply(self, message, max_new_tokens, stop="", stopped=lambda: False):
        """Yields the reply to `message` in pieces of text. It ends with <|eos|> or another token that belongs to no reply, at `stop`, after
        max_new_tokens, or as soon as stopped() is true; in each case, and if the caller leaves or is interrupted, the chat can go on.
        `cut` says afterwards whether it was max_new_tokens."""
        eos, device = self.special["<|eos|>"], next(self.model.parameters()).device
        self.messages.append(dict(role="user", content=message))
        self.ids += [self.special["<|user|>"], *self.encode(message), self.special["<|assistant|>"]]
        text, said, answer, whole, self.cut = Text(self.tokenizer, eos, stop), [], dict(role="assistant", content=""), False, False
        self.messages.append(answer)
        try:
            while not (whole or text.done or self.cut):
                self.make_room()
                n = min(max_new_tokens - len(said), self.cache.max_len - len(self.ids) + 1)
                for token in map(int, stream(self.model, torch.tensor([self.ids], device=device), n, cache=self.cache, exempt=(eos,), **self.sampling)):
                    if token in self.special.values():
                        whole = True
                        break
                    self.ids.append(token)
                    said.append(token)
                    yield text.add(token)
                    if text.done or stopped():
                        whole = True
                        break
                self.cut = not whole and len(said) >= max_new_tokens
            yield text.finish()
            if stop and text.text != self.tokenizer.decode(said):  # the text ends before `stop`, and so do the tokens
                self.ids = self.ids[:max(self.start, len(self.ids) - len(said))] + self.encode(text.text)
                self.cache = self.model.init_cache(1)
        except KeyboardInterrupt:  # perhaps in the middle of a layer: read all anew
            self.cache = self.model.init_cache(1)
            raise
        finally:
            text.finish()
            self.ids.append(eos)  # what was cut off ends here as well
            answer["content"] = text.text


COMMANDS = """/reset         begins a new chat
/save [FILE]   adds this chat to FILE (chats.jsonl), a line {"messages": [...]} that prepare.py reads
/help          this list
/exit          ends, as Ctrl-D does. Ctrl-C ends a reply
A line that ends with a backslash goes on in the next."""


def save_chat(path, messages, saved):
    """Adds the chat as a line to the file; `saved`, path -> its line of the last time there, which is replaced."""
    old = Path(path).read_bytes() if os.path.exists(path) else b""
    old = old.removesuffix(saved.get(path, b""))  # somebody else may have written behind it
    old += b"\n" * (bool(old) and not old.endswith(b"\n"))
    line = (json.dumps(dict(messages=messages), ensure_ascii=False) + "\n").encode(errors="replace")
    with replacing(path) as f:
        f.write(old + line)
    saved[path] = line


def read_message(live):
    """The next message, a line or several that end with a backslash; None at the end of the input."""
    lines = []
    while not lines or lines[-1].endswith("\\"):
        try:
            line = input(("  " if lines else "> ") if live else "")
        except EOFError:
            if not lines:
                return None
            break
        lines.append(line.removesuffix("\r"))
    return "\n".join([line[:-1] for line in lines[:-1]] + lines[-1:])


def converse(chat, s, first=None):
    """Reads messages and commands from standard input until it ends, and writes replies to standard output."""
    live, saved, told = bool(sys.stdin and sys.stdin.isatty()), {}, False

    def note(text):
        print(text, file=sys.stderr, flush=True)
    if live:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # history and editing of the line, where the system has it
        note("Ctrl-D ends the chat, /help lists the commands")
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        if first is None:
            try:
                line = read_message(live) if sys.stdin else None
            except KeyboardInterrupt:
                if not live:
                    raise
                print()
                continue
            if line is None:
                if live:
                    print()
                return 0
            command, _, argument = line.strip().partition(" ") if re.fullmatch(r"/[a-z]+( .*)?", line.strip()) else ("", "", "")  # no path
        else:
            line, first, command = first, None, ""
            if live:
                print(f"> {line}")
        if not line.strip():
            continue
        if command == "/exit":
            return 0
        if command == "/reset":
            chat.reset()
            saved, told = {}, False
            note("a new chat")
        elif command == "/save":
            path = os.path.expanduser(argument.strip() or "chats.jsonl")
            if not any(m["role"] == "user" for m in chat.messages):
                note("there is nothing to save yet")
                continue
            try:
                save_chat(path, chat.messages, saved)
                note(f"saved {len(chat.messages)} messages to {path}")
            except (OSError, ValueError) as e:
                note(f"{path}: {getattr(e, 'strerror', None) or e}; the chat was not saved")
        elif command:
            note(COMMANDS if command == "/help" else f"there is no command {command}\n{COMMANDS}")
        else:
            stop = []

            def on_signal(number, frame):
                stop.append(number)
                if len(stop) == 2:  # it does not wait for the next token
                    raise KeyboardInterrupt
            previous = signal.signal(signal.SIGINT, on_signal)
            try:
                for piece in chat.reply(line, s.max_new_tokens, s.stop, lambda: bool(stop)):
                    print(piece, end="", flush=True)
                print(flush=True)
                if chat.cut:
                    note(f"(cut after {s.max_new_tokens:,} tokens, see --max_new_tokens)")
                if chat.forgot and not told:
                    told = True
                    note(f"(the model reads {chat.cache.max_len:,} tokens at most: the beginning of this chat is forgotten)")
            except KeyboardInterrupt:
                if not live:
                    raise
                print()
            finally:
                signal.signal(signal.SIGINT, previous)


def main(argv):
    given, _ = parse_flags(argv, Settings(), description=__doc__.split("\n")[0])
    s = Settings(**given)
    if s.chat and "ckpt" not in given:
        s.ckpt = "out/tinymemory-sft/best.pt"
        if not os.path.exists(s.ckpt):
            raise UserError(f"there is no {s.ckpt} to chat with: python train.py --model=tinymemory-sft makes it, --ckpt names another")
    if s.chat and s.num_samples != 1 or s.system and not s.chat:
        raise UserError("--num_samples does not go with --chat" if s.chat else "--system belongs to --chat")
    sound = dict(num_samples=s.num_samples > 0, max_new_tokens=s.max_new_tokens > 0, temperature=s.temperature >= 0, top_k=s.top_k >= 0,
                 top_p=0 < s.top_p <= 1, min_p=0 <= s.min_p <= 1, repetition_penalty=s.repetition_penalty > 0,
                 no_repeat_ngram_size=s.no_repeat_ngram_size >= 0)
    for name, good in sound.items():
        if not good:
            raise UserError(f"--{name}={getattr(s, name)} makes no sense; --help says what it does")
    device = find_device(s.device)
    model, tokenizer, checkpoint = load_checkpoint(s.ckpt, device, s.ema)
    generator, sampling = torch.Generator(device).manual_seed(s.seed), {
        k: getattr(s, k) for k in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")}
    if s.chat:
        return converse(Chat(model, tokenizer, s.system, generator=generator, **sampling), s, s.prompt or None)
    prompt = mended(s.prompt)
    if "prompt" not in given and sys.stdin and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    bos, eos = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")
    ids = [bos, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    if len(ids) > model.cfg.context_length:
        print(f"the prompt has {len(ids):,} tokens, the model reads the last {model.cfg.context_length:,}", file=sys.stderr)

    started, texts = time.monotonic(), [Text(tokenizer, eos, s.stop) for _ in range(s.num_samples)]
    if s.num_samples == 1:
        print(prompt, end="", flush=True)
    idx, produced = torch.tensor([ids] * s.num_samples, device=device), 0
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
