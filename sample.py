"""Text from a trained model: `python sample.py --prompt="def "`, or a conversation with a fine-tuned one:
`python sample.py --chat`. --ckpt names the model; without it, it is the best of the latest pretraining run, with --chat
of the latest fine-tuning run.

One sample is shown while it is generated. Several are generated together and shown when all are done. Tokens are
decoded one at a time, through the model's cache. The model looks back over at most as many tokens as a row of its
training had (--context), because it has never learned to look back further. When this window is full, its first half
is forgotten and its second half is read again, as Model.generate does. A model without attention keeps a state and has
no such end. The same seed gives the same text on the same kind of device.

If no rule of sampling is given (--temperature, --top_k, --top_p, --min_p, --repetition_penalty,
--no_repeat_ngram_size), and `python eval.py --bundle` has found out which ones suit the model, those are used. They are
in recommended_decoding_params.json, in the folder bundle/ beside the checkpoint, or directly beside it. A chat does not
use them.

On a CPU, a compiled step computes the tokens of models with Llama's blocks, see kernels/decode.py. It is built, in five
seconds, when a long sample or a chat first repays it, and KERNELS=reference leaves it out.

--chat keeps the conversation in the cache and reads only what is new. Each line of the terminal, or of a pipe, is a
message. When the context is full, the oldest turns are forgotten. Ctrl-C ends a reply, and /help lists the commands.
"""
import json
import math
import re
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import UserError, mended, parse_flags, run_tool
from corpus.chats import chat_ids
from corpus.tokenizer import bos_eos
from machine import find_device
from run import is_fine_tuning, load_checkpoint
from runfolder import RECOMMENDED, recorded_settings
from terminal import Conversation, note


@dataclass
class Settings:
    ckpt: str = ""  # checkpoint to sample from; empty: the best of the latest pretraining run, or --chat: fine-tuning
    prompt: str = ""  # text to continue; --chat: the first message; not given: piped input; empty: new document
    chat: bool = False  # a conversation at the terminal or through a pipe
    system: str = ""  # with --chat: instructions before the first message
    num_samples: int = 1  # continuations of the prompt, 10,000 at most
    max_new_tokens: int = 256  # length of each
    temperature: float = 0.8  # divides the logits; 0 always takes the likeliest token
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens that has this probability; 1: all
    min_p: float = 0.0  # keep tokens of at least this fraction of the likeliest one's probability; 0: all
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred less likely
    no_repeat_ngram_size: int = 0  # never repeat a sequence of this many tokens; 0: no limit
    stop: str = ""  # end a sample before this text
    context: int = 0  # tokens that the model looks back over, 2 or more; 0: as many as a row of its training had
    seed: int = 1337  # same seed, same text
    ema: bool | None = None  # averaged weights, --no-ema the raw ones; unset: those with the lower validation loss
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: str = "float32"  # type of the weights: float32, or bfloat16, which is quicker to read


# ---------------------------------------------------------------------------------------------------- choosing a token

def penalize_repetition(logits, seen, penalty):
    """Logits (B, V) of the tokens that are marked in `seen`, bool (B, V): positive ones are divided by the penalty, the
    others multiplied (arXiv 1909.05858)."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def keep_likely(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Logits (B, V) with -inf for the tokens that are left out by top-k, nucleus (arXiv 1904.09751) and min-p sampling
    (arXiv 2407.01082), in this order."""
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        p, order = likeliest(logits.softmax(-1), top_p)
        stays = p.cumsum(-1) - p < top_p  # with the token that reaches top_p
        stays[:, 0] = True  # and the likeliest one always
        logits = logits.masked_fill(~torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, stays), -math.inf)
    if min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.max(-1, keepdim=True).values, -math.inf)
    return logits


def likeliest(p, share):
    """The largest of each row of p (B, V), as many as have this share of it in every row: (values, indices), sorted.
    Seldom many are needed, and sorting all would take longer than the model."""
    n = 64
    while n < p.size(-1):
        values, indices = p.topk(n)
        if (values.sum(-1) >= share).all():
            return values, indices
        n *= 8
    return p.sort(descending=True)


def draw(p, generator):
    """A token (B, 1) from each row of probabilities p (B, V): where a random number lies among their sums.
    torch.multinomial would draw a number for every token of the vocabulary."""
    if p.is_cuda:  # where sums of many numbers at once need not be in order, and an excluded token might be drawn
        return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
    sums = p.cumsum(-1)
    at = torch.rand(len(p), 1, device=p.device, generator=generator) * sums[:, -1:]
    at *= 1 - 2 ** -23  # below the last sum, also where the product was rounded up
    return torch.searchsorted(sums, at, right=True)


class SeenNgrams:
    """Knows which tokens would complete an n-gram that the row holds already. It looks them up in a dictionary, so that
    a step need not search the row."""

    def __init__(self, n, row):
        self.n, self.row = n, []
        self.next = defaultdict(set)  # n - 1 tokens -> the tokens that came behind them
        for token in row:
            self.add(token)

    def last(self):
        """The last n - 1 tokens of the row; None if it has fewer."""
        begin = len(self.row) - (self.n - 1)
        return tuple(self.row[begin:]) if begin >= 0 else None

    def add(self, token):
        if self.last() is not None:
            self.next[self.last()].add(token)
        self.row.append(token)

    def banned(self):
        return list(self.next.get(self.last(), ()))


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           no_repeat_ngram_size=0, generator=None, cache=None, exempt=(), step=None):
    """Yields the next token of every row, int64 (B,), max_new_tokens times, continuing idx (B, T).

    Applied in this order: repetition penalty and n-gram ban (both count the prompt, and neither applies to the tokens
    in `exempt`), temperature (0: the likeliest token), top_k, top_p, min_p. generator: torch.Generator on the model's
    device. Only the last tokens of idx are read, as many as the model can. cache: one that has read the first tokens
    of idx already and now reads on; idx must fit into it. step: what `quick_step` gives for the model, or None.
    """
    exempt = list(exempt)
    is_new = cache is None
    if is_new:
        cache = model.init_cache(idx.size(0))
    C = cache.max_len  # the context; of a model that keeps a state instead, there is no end to it
    if is_new:
        idx = idx[:, -C:]
    new = idx[:, cache.length:]

    # what the rules against repetition have to know
    seen = torch.zeros(idx.size(0), model.cfg.vocab_size, dtype=torch.bool, device=idx.device).scatter_(1, idx, True)
    ngrams = []
    if no_repeat_ngram_size:
        ngrams = [SeenNgrams(no_repeat_ngram_size, row) for row in idx.tolist()]

    for _ in range(max_new_tokens):
        if cache.length == C:
            cache, new = model.init_cache(idx.size(0)), idx[:, -(C // 2):]
        if step is None or new.size(1) > 1:
            logits = model(new, cache=cache)[0][:, -1].float()
        else:
            logits = step(new, cache)[:, -1]

        # against repetition
        untouched = logits[:, exempt]
        if repetition_penalty != 1:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        for row, ngram in zip(logits, ngrams):
            row[ngram.banned()] = -math.inf
        logits[:, exempt] = untouched

        # the choice
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            finite = min(max(temperature, 1e-30), 1e30)  # beyond that, fp32 would divide zero by zero or inf by inf
            p = keep_likely(logits / finite, top_k, top_p, min_p).softmax(-1)
            new = draw(p, generator)

        idx = torch.cat((idx[:, 1 - C:], new), dim=1)
        seen.scatter_(1, new, True)
        for ngram, token in zip(ngrams, new[:, 0].tolist()):
            ngram.add(token)
        yield new[:, 0]


MOST_ROWS = 16  # sequences at once for which `quick_step` is the quicker way
PATIENCE = 2.0  # seconds until somebody whose standard input has no end is told what is waited for


def quick_step(model, tokens, dtype=torch.float32):
    """A function that gives the next logits several times faster than the model on a CPU, or None: kernels/decode.py.

    tokens: how many will be sampled. It is compiled only if they would take more than 10 seconds without it.
    """
    if next(model.parameters()).device.type != "cpu":
        return None
    from kernels.decode import compiled_step
    a_token = 0.003 + 3e-10 * sum(p.numel() for p in model.parameters())  # seconds, as measured with two sizes
    return compiled_step(model, dtype, may_build=tokens * a_token > 10)


def generate(model, idx, max_new_tokens, stop_token=None, **sampling):
    """idx (B, T) -> (B, T + new): all that `stream` yields, behind idx.

    A row that has produced stop_token is filled up with it. The end comes early if all rows have.
    """
    rows = [idx]
    done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    for token in stream(model, idx, max_new_tokens, **sampling):
        if stop_token is not None:
            token = token.masked_fill(done, stop_token)
            done |= token == stop_token
        rows.append(token[:, None])
        if done.all():
            break
    return torch.cat(rows, dim=1)


# ---------------------------------------------------------------------------------------------------- showing text

class Text:
    """One sample's text, which grows token by token: together it is what decoding all tokens at once gives.

    `add` returns what is safe to show: nothing that further tokens may change, and nothing that may turn out to be the
    beginning of the stop text. `done` says whether the end token or the stop text has come. before: the tokens of the
    prompt, as a token may be written in another way at the beginning of a text than behind others.
    """
    WINDOW = 64  # tokens that are decoded at most before the first ones are forgotten
    CONTEXT = 16  # tokens that are kept then: a token's text depends on its neighbours alone

    def __init__(self, tokenizer, eos, stop="", before=()):
        self.tokenizer, self.eos, self.stop = tokenizer, eos, stop
        self.special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.window = list(before)[-self.CONTEXT:]
        self.taken = len(tokenizer.decode(self.window))  # characters of the window's text that are not to be shown anew
        self.text = ""
        self.shown = 0  # characters of it
        self.done = False

    def add(self, token):
        if self.done:
            return ""
        if token == self.eos:
            return self.finish()
        if token in self.special:  # it has no text, and does not end a character that was begun
            return ""
        self.window.append(token)
        if self.may_change():
            return ""
        piece = self.take()
        if len(self.window) > self.WINDOW:
            self.window = self.window[-self.CONTEXT:]
            self.taken = len(self.tokenizer.decode(self.window))
        return piece

    def may_change(self):
        """Whether the next token may change how the last one is decoded: it may be a part of a character.

        A tokenizer with byte fallback writes bytes as <0x0A> and decodes all that follow each other together.
        """
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", self.tokenizer.id_to_token(self.window[-1]) or "")
        return is_byte or self.tokenizer.decode(self.window).endswith("\ufffd")

    def take(self):
        """Moves what is new in the window into the text."""
        text = self.tokenizer.decode(self.window)
        self.text += text[self.taken:]
        self.taken = len(text)
        if not self.stop:
            return self.show(len(self.text))

        at = self.text.find(self.stop, max(0, self.shown - len(self.stop)))
        if at >= 0:
            self.text, self.done = self.text[:at], True
            return self.show(at)
        begun = [n for n in range(1, len(self.stop)) if self.text.endswith(self.stop[:n])]
        return self.show(len(self.text) - max(begun, default=0))

    def finish(self):
        """The rest, when no more tokens come."""
        if self.done:
            return ""
        piece = self.take()
        self.done = True
        return piece + self.show(len(self.text))

    def show(self, end):
        piece = self.text[self.shown:end]
        self.shown = max(self.shown, end)
        return piece


# ---------------------------------------------------------------------------------------------------- chat

class Chat:
    """A conversation: its messages, framed as prepare.py does it, and a cache that has read them.

        <|bos|>[<|system|>text]<|user|>text<|assistant|>text<|eos|><|user|>text<|assistant|>text<|eos|>...

    Text never becomes a special token, so no message can open a turn. When the context is full, the oldest turns are
    forgotten until the rest fits into half of it, or until only the last turn is left, which may fill most of it. A
    turn that is longer still loses its beginning. The system's message stays. Raises UserError if that message fills
    half of the context by itself, and if the tokenizer has no tokens for the roles.
    """

    def __init__(self, model, tokenizer, system="", **sampling):
        self.model, self.tokenizer, self.system, self.sampling = model, tokenizer, system, sampling
        self.special = chat_ids(tokenizer)
        self.reset()

    def reset(self):
        """Forgets everything but the system's message."""
        self.messages = []
        self.ids = [self.special["<|bos|>"]]
        if self.system:
            self.messages.append(dict(role="system", content=self.system))
            self.ids += [self.special["<|system|>"], *self.encode(self.system)]
        self.start = len(self.ids)  # where the first turn begins
        self.cache = self.model.init_cache(1)
        self.forgot = False  # whether the beginning of the chat is forgotten
        self.cut = False  # whether the last reply ended because of max_new_tokens
        if self.start + 2 > self.cache.max_len // 2:
            raise UserError(f"the system's message has {self.start:,} tokens, the model reads {self.cache.max_len:,}; "
                            "half of them are for the chat")

    def encode(self, text):
        return self.tokenizer.encode(mended(text), add_special_tokens=False).ids

    def make_room(self):
        """Forgets the oldest turns if the tokens do not fit into the cache."""
        ids, n, C = self.ids, len(self.ids), self.cache.max_len
        if n <= C:
            return
        keep = C // 2 - self.start  # tokens of the turns for which half of the context has room
        user, assistant = self.special["<|user|>"], self.special["<|assistant|>"]

        # keep the turns from the first one on that fits with all behind it, or else the last one
        turns = [i for i in range(self.start, n) if ids[i] == user] or [self.start]
        fitting = [i for i in turns if n - i <= keep] or turns[-1:]
        begin = fitting[0]

        # a turn that is too long by itself loses its beginning, but not the token that says who speaks
        role = []
        if self.start + n - begin > C * 7 // 8:
            begin = n - keep + 1
            role = [next(token for token in reversed(ids[:begin]) if token in (user, assistant))]
        self.ids = ids[:self.start] + role + ids[begin:]
        self.cache = self.model.init_cache(1)
        self.forgot = True

    def next_tokens(self, n):
        """Yields the next n tokens that the model says, or as many as the cache has room for."""
        room = self.cache.max_len - len(self.ids) + 1
        idx = torch.tensor([self.ids], device=next(self.model.parameters()).device)
        eos = self.special["<|eos|>"]
        yield from map(int, stream(self.model, idx, min(n, room), cache=self.cache, exempt=(eos,), **self.sampling))

    def reply(self, message, max_new_tokens, stop="", stopped=lambda: False):
        """Yields the reply to `message` in pieces of text.

        It ends with <|eos|> or another token that belongs to no reply, at the text `stop`, after max_new_tokens, or as
        soon as stopped() is true. In each case, and if the caller leaves or is interrupted, the chat can go on. `cut`
        says afterwards whether it was max_new_tokens.
        """
        self.messages.append(dict(role="user", content=message))
        self.ids += [self.special["<|user|>"], *self.encode(message), self.special["<|assistant|>"]]
        answer = dict(role="assistant", content="")
        self.messages.append(answer)

        text = Text(self.tokenizer, self.special["<|eos|>"], stop)
        said = []  # the reply's tokens
        is_whole = self.cut = False
        try:
            while not (is_whole or self.cut):
                self.make_room()
                for token in self.next_tokens(max_new_tokens - len(said)):
                    if token in self.special.values():
                        is_whole = True
                        break
                    self.ids.append(token)
                    said.append(token)
                    yield text.add(token)
                    if text.done or stopped():
                        is_whole = True
                        break
                self.cut = not is_whole and len(said) >= max_new_tokens
            yield text.finish()
            if stop and text.text != self.tokenizer.decode(said):  # the text ends before `stop`, and so do the tokens
                self.ids = self.ids[:max(self.start, len(self.ids) - len(said))] + self.encode(text.text)
                self.cache = self.model.init_cache(1)
        except KeyboardInterrupt:  # it may come in the middle of a layer, so that all must be read anew
            self.cache = self.model.init_cache(1)
            raise
        finally:
            text.finish()
            self.ids.append(self.special["<|eos|>"])  # a reply that was cut off ends here as well
            answer["content"] = text.text


# ---------------------------------------------------------------------------------------------------- the tool

def latest_best(chat):
    """best.pt of the pretraining run or, for a chat, of the fine-tuning run under out/ that wrote it last."""
    runs = [path.parent for path in Path("out").glob("*/best.pt")]
    runs = [folder for folder in runs if is_fine_tuning(recorded_settings(folder)) == chat]
    if not runs:
        what, tool = ("fine-tuning run", "finetune.py") if chat else ("pretraining run", "train.py")
        raise UserError(f"there is no {what} under out/ yet: python {tool} makes one, --ckpt names a checkpoint")
    return str(max(runs, key=lambda folder: (folder / "best.pt").stat().st_mtime) / "best.pt")


RULES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


def recommended_rules(ckpt):
    """(file, rules) that eval.py recommends for a checkpoint: RECOMMENDED in bundle/ beside it, or beside it.

    The rules are a dict of some of RULES. (None, {}) if there is no such file. Raises UserError if it is damaged.
    """
    folder = Path(ckpt).parent
    paths = [path for path in (folder / "bundle" / RECOMMENDED, folder / RECOMMENDED) if path.exists()]
    if not paths:
        return None, {}
    try:
        found = json.loads(paths[0].read_text(encoding="utf-8"))
        rules = {name: type(getattr(Settings, name))(found[name]) for name in RULES if name in found}
        if not found.get("do_sample", True):
            rules["temperature"] = 0.0
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{paths[0]} is damaged ({e}): delete it, or say how to sample, such as --temperature=0.8"
                        ) from None
    return paths[0], rules


def read_settings(argv):
    """(Settings, names of the flags that were typed). Raises UserError for what cannot be meant."""
    description = " ".join((__doc__ or "").split("\n\n")[0].split())
    given, _ = parse_flags(argv, Settings(), description=description)
    s = Settings(**given)
    if not s.ckpt:
        s.ckpt = latest_best(s.chat)
        note(f"[{s.ckpt}]")
    if not s.chat and not set(RULES) & set(given):
        path, rules = recommended_rules(s.ckpt)
        s = replace(s, **rules)
        if path:
            flags = " ".join(f"--{name}={value}" for name, value in rules.items())
            note(f"[sampling as {path} recommends: {flags}]")
    if s.chat and s.num_samples != 1:
        raise UserError("--num_samples does not go with --chat")
    if s.system and not s.chat:
        raise UserError("--system belongs to --chat")

    if s.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype={s.dtype} is neither float32 nor bfloat16")
    makes_sense = dict(
        seed=abs(s.seed) < 2 ** 63, context=s.context >= 0 and s.context != 1,
        num_samples=0 < s.num_samples <= 10_000, max_new_tokens=s.max_new_tokens > 0,
        temperature=s.temperature >= 0, top_k=s.top_k >= 0, top_p=0 < s.top_p <= 1, min_p=0 <= s.min_p <= 1,
        repetition_penalty=s.repetition_penalty > 0, no_repeat_ngram_size=s.no_repeat_ngram_size >= 0)
    for name, good in makes_sense.items():
        if not good:
            raise UserError(f"--{name}={getattr(s, name)} makes no sense; --help says what it does")
    return s, set(given)


def set_context(model, s, checkpoint):
    """Lets an attention model read s.context tokens at once, or as many as a row of its training had."""
    longest = model.cfg.context_length
    if model.max_len > longest:
        if s.context:
            raise UserError("--context is for models with attention; this one keeps a state, which has no end")
        return
    if s.context > longest:
        raise UserError(f"--context={s.context} is longer than the model's context of {longest}")
    model.max_len = s.context or min(longest, checkpoint["train"].get("block_size", longest))


def write_samples(model, tokenizer, prompt, s, sampling):
    """Continues the prompt s.num_samples times and prints it. Returns how many tokens were generated."""
    bos, eos = bos_eos(tokenizer)
    ids = [bos, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    if len(ids) > model.max_len:
        note(f"the prompt has {len(ids):,} tokens, the model reads the last {model.max_len:,}")
    texts = [Text(tokenizer, eos, s.stop, before=ids[1:]) for _ in range(s.num_samples)]
    is_only_one = s.num_samples == 1
    if is_only_one:
        print(prompt, end="", flush=True)

    produced = 0
    idx = torch.tensor([ids] * s.num_samples, device=next(model.parameters()).device)
    for tokens in stream(model, idx, s.max_new_tokens, **sampling):
        produced += sum(not text.done for text in texts)
        pieces = [text.add(token) for text, token in zip(texts, tokens.tolist())]
        if is_only_one:
            print(pieces[0], end="", flush=True)
        if all(text.done for text in texts):
            break

    if is_only_one:
        print(texts[0].finish())
        return produced
    for i, text in enumerate(texts, 1):
        text.finish()
        print(f"--- sample {i} of {s.num_samples}\n{prompt}{text.text}")
    return produced


def main(argv):
    s, given = read_settings(argv)
    device = find_device(s.device)
    model, tokenizer, checkpoint = load_checkpoint(s.ckpt, device, s.ema)
    set_context(model, s, checkpoint)
    sampling = {rule: getattr(s, rule) for rule in RULES}
    sampling["generator"] = torch.Generator(device).manual_seed(s.seed)
    wanted = 10 * s.max_new_tokens if s.chat else s.max_new_tokens  # a chat has several replies
    sampling["step"] = None
    if s.num_samples <= MOST_ROWS:
        sampling["step"] = quick_step(model, wanted, getattr(torch, s.dtype))
    if s.dtype == "bfloat16" and sampling["step"] is None:
        model.bfloat16()
    if s.chat:
        Conversation(Chat(model, tokenizer, s.system, **sampling), s).go_on(s.prompt)
        return 0

    prompt = mended(s.prompt)
    if "prompt" not in given and sys.stdin and not sys.stdin.isatty():
        waiting = threading.Timer(PATIENCE, note, ["the prompt is read from standard input, which has not ended yet; "
                                                   "--prompt= begins a new document instead"])
        waiting.daemon = True  # Ctrl-C ends both
        waiting.start()
        prompt = sys.stdin.read().removesuffix("\n")
        waiting.cancel()
    started = time.monotonic()
    produced = write_samples(model, tokenizer, prompt, s, sampling)
    if sys.stderr.isatty():
        seconds = time.monotonic() - started
        note(f"[{checkpoint['model_name']} step {checkpoint['step']:,}: {produced:,} tokens, "
             f"{produced / seconds:,.0f} tok/s]")
    return 0


if __name__ == "__main__":
    run_tool(main)
