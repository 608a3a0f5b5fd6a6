"""Fine-tuning on chats: `python finetune.py` (the preset tinymemory-sft, from the quick start's model), or
`python finetune.py --init_from=out/ivme/best.pt --data=CHATS`. Only the tokens of the replies count in the loss.

The loop, the optimizers and most of the settings are train.py's. This file brings what is learned from a chat, with the
four tricks that the card of TinyMemoryLM names (CompactAI/TMLM-Haiku-1; the formulas are ours, the card has none):

    word boost          target tokens of more than one character weigh more
    response start      so do the first tokens of each reply
    replay              a fraction of the rows are windows of what the model was trained on before
    context relevance   a reply must be less likely under the prompt of another chat than under its own
"""
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

import machine
import report
import run
import train
from common import UserError, run_tool
from corpus.folder import document_edges
from corpus.loader import Loader, fill_rows, row_tensors
from objective import Batch, Pretraining, evaluate


@dataclass(frozen=True)
class Settings(train.Settings):
    model: str = "tinymemory-sft"  # preset of an architecture file; with --init_from it is the checkpoint's
    pack: str = "document"  # document: whole chats, which do not see each other; stream: windows of the token stream
    loss_on: str = "responses"  # responses: only the replies of chats count; all: everything that is said
    response_start_tokens: int = 8  # this many tokens at the beginning of each reply ...
    response_start_weight: float = 1.0  # ... have this weight; 1: off
    base_data: str = ""  # is replayed, and shows what is forgotten; not given: what the checkpoint was trained on
    replay: float = 0.0  # fraction of the rows that are windows of the base data; 0: off
    relevance: float = 0.0  # extra rows, as a fraction of the batch, that pair a reply with the wrong prompt; 0: off
    relevance_margin: float = 1.0  # by how much the wrong prompt is to be worse, in nats per token of the reply


# ---------------------------------------------------------------------------------------------------- what counts

def mark_replies(mask, rows, T, opening=0):
    """Which targets belong to a reply, uint8 (rows, T): 0: to none; 2: to its first `opening` tokens; 1: to the rest.

    mask: of a set of chats, 1 for the tokens of replies. rows: lists of pieces, see corpus/loader.py.
    """
    marks = np.zeros((len(rows), T), np.uint8)
    for r, pieces in enumerate(rows):
        at = 0
        for start, n in pieces:
            # the mask of the targets, and of the `opening` tokens before them
            near = mask[np.arange(start + 1 - opening, start + n + 1) % len(mask)]
            sums = np.concatenate([[0], np.cumsum(near, dtype=np.int64)])
            replied = sums[opening:-1] - sums[:n]  # how many of the `opening` tokens before a target are a reply's
            just_begun = replied < opening
            marks[r, at:at + n] = near[opening:] * (1 + just_begun)
            at += n
    return torch.from_numpy(marks)


def token_weights(y, marks, boost=None, start_weight=1.0):
    """Relative weight of each target, float (rows, T): 0 where y is -1, else 1, times boost[token], times start_weight
    where a reply begins (marks is 2). boost: float (V,) or None.

    Only the ratios matter: a batch's loss is the sum of weight x loss over the sum of the weights.
    """
    weights = (y >= 0).float()
    if boost is not None:
        weights *= boost[y]  # where y is -1: the last token's boost, times 0
    if start_weight != 1:
        weights[marks == 2] *= start_weight
    return weights


# ---------------------------------------------------------------------------------------------------- replay

class WithReplay:
    """Deals rows of the chats' loader `own` and, for a fraction `replay` of all rows, of the base data's loader `base`.

    It has what the loop uses of a Loader. The base sources are numbered after the own ones. The replayed rows are
    spread evenly over the run.
    """

    def __init__(self, own, base, replay):
        self.own, self.base, self.replay = own, base, replay
        self.sources = [*own.sources, *base.sources]
        self.per_epoch = own.per_epoch + base.per_epoch

    def set_length(self, total_rows):
        self.own.set_length(total_rows - math.floor(total_rows * self.replay))

    def next_row(self):
        i = sum(self.own.taken) + sum(self.base.taken)
        if math.floor((i + 1) * self.replay) > math.floor(i * self.replay):
            source, pieces = self.base.next_row()
            return len(self.own.sources) + source, pieces
        return self.own.next_row()

    def next_rows(self, n):
        return [self.next_row() for _ in range(n)]

    def tensors(self, rows):
        x, y, reset = row_tensors(self.sources, rows, self.own.T)
        return x, y, None if self.own.frame is None else reset

    def state_dict(self):
        own, base = self.own.state_dict(), self.base.state_dict()
        return {key: own[key] + base.get(key, []) for key in own}

    def load_state_dict(self, state):
        n = len(self.own.sources)
        self.own.load_state_dict({key: values[:n] for key, values in state.items()})
        self.base.load_state_dict({key: values[n:] for key, values in state.items()})


# ---------------------------------------------------------------------------------------------------- context relevance

@dataclass
class Reply:
    """A reply in a batch: its row, the position of its first target there, the chat before it, and its own tokens."""
    row: int
    at: int
    context: np.ndarray
    tokens: np.ndarray


def find_reply(mask, k, T):
    """(first token, last + 1) of reply number k in a chat with this mask, counting around; None if there is no reply.

    At most T / 2 tokens of it, so that a row of T has room for a prompt.
    """
    begins = np.flatnonzero((mask == 1) & (np.concatenate([[0], mask[:-1]]) == 0))
    if not len(begins):
        return None
    first = int(begins[k % len(begins)])
    outside = np.flatnonzero(mask[first:] == 0)
    length = int(outside[0]) if len(outside) else len(mask) - first
    return first, first + min(length, T // 2)


def draw_replies(rows, sources, is_chat, bos, T, rng):
    """One reply, drawn by rng, of each chat that begins in the rows (see Loader.next_row): list of Reply.

    is_chat: number of a source -> whether it is a set of chats.
    """
    replies = []
    for row, (source, pieces) in enumerate(rows):
        if not is_chat(source):
            continue
        tokens, mask, at = sources[source].train, sources[source].train_mask, 0
        for start, n in pieces:
            if tokens[start] == bos:
                found = find_reply(mask[start:start + n + 1], int(rng.integers(2 ** 32)), T)
                if found:
                    first, end = found
                    context, reply = tokens[start:start + first], tokens[start + first:start + end]
                    replies.append(Reply(row, at + first - 1, context, reply))
            at += n
    return replies


def pack_replies(pairs, T, n_rows=None):
    """Rows of T positions that hold (context, reply) pairs of token arrays; only the tokens of replies are targets.

    Returns x, y, reset as `make_tensors` does, and number, int64 (rows, T): i + 1 where the target is part of the reply
    of pairs[i], else 0. A pair goes to the first row that has room; a context that is too long for a row loses its
    beginning. n_rows: make this many rows, and leave out what finds no room in them.
    """
    pairs = [(context[max(0, len(context) + len(reply) - 1 - T):], reply) for context, reply in pairs]
    begins = np.cumsum([0] + [len(context) + len(reply) for context, reply in pairs])
    rows = [[] for _ in range(n_rows or 0)]
    used = [0] * len(rows)
    spans = []  # (row, slice of the reply's targets, number)
    for i, (context, reply) in enumerate(pairs):
        n = len(context) + len(reply) - 1
        row = next((k for k, positions in enumerate(used) if positions + n <= T), None)
        if row is None and n_rows is not None:
            continue
        if row is None:
            row = len(rows)
            rows.append([])
            used.append(0)
        first = used[row] + len(context) - 1
        spans.append((row, slice(first, first + len(reply)), i + 1))
        rows[row].append((int(begins[i]), n))
        used[row] += n

    tokens = np.concatenate([np.empty(0, np.int64), *(part for pair in pairs for part in pair)])
    x, y, reset = fill_rows(tokens, rows, T)
    number = torch.zeros_like(y)
    for row, span, i in spans:
        number[row, span] = i
    return x, torch.where(number > 0, y, -1), reset, number


def wrong_prompts(replies, rows, n_rows, T, rng):
    """Replies of a micro-batch under the prompts of other chats, in n_rows extra rows.

    replies: all of the batch. rows: numbers of the micro-batch's rows, whose replies are taken.
    Returns x, y, reset, number of the extra rows, see `pack_replies`, and own, int64 (len(rows), T): for each
    position of the original rows, the number of the same reply there, and 0 where there is none.
    """
    here = [k for k, reply in enumerate(replies) if reply.row in rows]
    here = [replies[k] for k in rng.permutation(here).astype(int)]
    pairs = []
    if len(replies) > 1:
        for reply in here:
            other = reply
            while other is reply:
                other = replies[int(rng.integers(len(replies)))]
            pairs.append((other.context, reply.tokens))
    x, y, reset, number = pack_replies(pairs, T, n_rows)

    own = torch.zeros(len(rows), T, dtype=torch.int64)
    for i in number.unique().tolist():
        if i:
            reply = here[i - 1]
            own[rows.index(reply.row), reply.at:reply.at + len(reply.tokens)] = i
    return x, y, reset, number, own


def reply_sums(values, number, n):
    """Sums of values (rows, T) over the positions of each of n replies: number int64 (rows, T) -> (n,)."""
    return values.new_zeros(n + 1).index_add(0, number.flatten(), values.flatten())[1:]


def relevance_loss(own, wrong, lengths, margin):
    """Sum over replies of max(0, margin - (wrong - own) / length) x length, for the idea in TinyMemoryLM's card.

    own, wrong: nats (n,) of each reply's tokens under its own prompt and under another chat's. lengths: their number.
    """
    return (margin * lengths - (wrong - own)).clamp(min=0).sum()


def validation_replies(sources, tokens, bos, T):
    """(context, reply) of validation chats spread evenly, about `tokens` tokens of each source (0: all)."""
    pairs = []
    for source in sources:
        if not source.is_chat:
            continue
        edges = document_edges(source.val, bos)
        n = len(edges) - 1
        take = n
        if tokens and n:
            take = min(n, math.ceil(tokens * n / len(source.val)))
        for k in range(take):
            start, end = edges[k * n // take:][:2]
            found = find_reply(source.val_mask[start:end], k, T)  # now the first reply of a chat, now the second
            if found:
                pairs.append((source.val[start:start + found[0]], source.val[start + found[0]:start + found[1]]))
    return pairs


@torch.no_grad()
def relevance(model, sources, tokens, T, rows, on, bos, world):
    """(accuracy, gap) over validation chats, about `tokens` tokens of each source (0: all), one reply of each.

    accuracy: the fraction of replies that are likelier under their own prompt than under another chat's. gap: by how
    much on average, in nats per token. A prompt is all that comes before the reply. Both are nan with fewer than two
    replies. rows: rows at once; on: machine.Device. Draws no random numbers.
    """
    pairs = validation_replies(sources, tokens, bos, T)
    n = len(pairs)
    if n < 2:
        return math.nan, math.nan
    wrong = [(pairs[(i + n // 2) % n][0], reply) for i, (_, reply) in enumerate(pairs)]

    sums = torch.zeros(2, dtype=torch.float64)  # of the replies that won, of the gaps
    mine = range(world.rank, n, world.size)
    for first in range(0, len(mine), 256):  # this many at a time, each beside its rival
        some = mine[first:first + 256]
        x, y, reset, number = pack_replies([pairs[i] for i in some] + [wrong[i] for i in some], T)
        nats = torch.zeros(2 * len(some))
        for i in range(0, len(x), rows):
            part = slice(i, i + rows)
            with on.autocast():
                losses = model(x[part].to(on.device), y[part].to(on.device), reduction="none",
                               reset=reset[part].to(on.device))[1]
            nats += reply_sums(losses.float().cpu(), number[part], len(nats))
        gap = nats[len(some):] - nats[:len(some)]
        lengths = torch.tensor([len(pairs[i][1]) for i in some])
        sums += torch.stack([(gap > 0).sum(), (gap / lengths).sum()])
    return tuple((world.sum(sums) / n).tolist())


# --------------------------------------------------------------------------------------------------- what is trained on

@dataclass
class ChatMicro:
    """Rows that are computed at once. After the batch's own rows come those with wrong prompts, if there are any."""
    x: torch.Tensor  # int64 (rows + extra rows, T)
    y: torch.Tensor
    reset: torch.Tensor | None
    weights: torch.Tensor  # float (rows, T)
    of_chats: torch.Tensor  # bool (rows, 1): whether the row holds chats, of which only the replies count
    n_compared: int = 0  # replies that stand in the extra rows too
    number: torch.Tensor | None = None  # int64 (extra rows, T), see pack_replies
    own: torch.Tensor | None = None  # int64 (rows, T), see wrong_prompts

    def to(self, device):
        """The same on another device."""
        return ChatMicro(*(value.to(device, non_blocking=device.type == "cuda") if torch.is_tensor(value) else value
                           for value in vars(self).values()))


class FineTuning(Pretraining):
    """What fine-tuning on replies does in train.py's loop, in place of Pretraining."""

    tool = "finetune.py"
    is_text = False
    measured, measured_text = "replies", "validation chats' replies"
    measures_start = True  # where forgetting begins

    def __init__(self, plan, world, on):
        super().__init__(plan, world, on)
        self.extra_rows = self.s.relevance

    def measured_sources(self):
        chats = [source for source in self.sources if source.is_chat]
        if not chats:
            raise UserError(f"fine-tuning needs a set of chats, and {self.plan.settings.data} holds none; "
                            "train.py trains on text")
        return chats

    def make_loader(self, s):
        """The chats' loader, with replay of the base data if there is to be some."""
        self.base, self.base_spec = self.find_base(s)
        if s.replay and not self.base:
            raise UserError("--replay needs --base_data")
        total_rows = s.max_steps * self.rows
        own = Loader(self.sources, s.order, self.T, total_rows, s.seed, self.frame)
        if not s.replay:
            return own
        base = Loader(self.base, "random", self.T, total_rows, s.seed, first_number=len(self.sources))
        return WithReplay(own, base, s.replay)

    def find_base(self, s):
        """(sources of the base data, their names as in --data): --base_data, or what the checkpoint was trained on."""
        spec = s.base_data
        nothing_said = not spec and not s.resume and "base_data" not in self.plan.given
        if nothing_said and self.plan.start:
            before = self.plan.start["train"]
            spec = before.get("base_data", "")
            if not spec and not run.is_fine_tuning(before):
                spec = before.get("data", "")
        if not spec:
            return [], ""
        try:
            sources, _ = run.find_data(spec, s.tokenizer, self.vocab_size, self.world, self.tokenizer_text,
                                       self.plan.start_path or self.plan.settings.data, "the chats'")
        except UserError as e:
            if s.replay or "base_data" in self.plan.given:
                raise
            print(f"the base data is not here, so forgetting is not measured: {e}")
            return [], s.base_data
        return sources, spec

    def settled(self, s):
        return super().settled(replace(s, base_data=self.base_spec))

    def rows_per_epoch(self, s):
        """With the replayed rows: an epoch is one pass over the chats."""
        return sum(self.loader.per_epoch[:len(self.sources)]) / (1 - s.replay)

    def is_chat(self, source):
        """Whether only replies count in the rows of this source: it is a set of chats and not base data."""
        return source < len(self.sources) and self.sources[source].is_chat

    def next_batch(self, step):
        s, world, device = self.s, self.world, self.on.device
        rows, (x, y, reset) = self.read_next()
        numbers = range(world.rank, self.rows, world.size)  # of the rows that this process computes
        mine = [rows[i] for i in numbers]
        self.check_ids(x, y)

        # what counts, how much, and the sums of it over all processes
        marks = torch.cat([self.marks(source, pieces) for source, pieces in mine])
        y[marks == 0] = -1
        weights = token_weights(y, marks, self.boost, s.response_start_weight)
        of_chats = torch.tensor([self.is_chat(source) for source, _ in mine])
        in_reply = y[of_chats] >= 0
        sums = torch.stack([(y >= 0).sum().double(), weights.sum().double(), in_reply.sum().double()])
        targets, weight, reply_targets = world.sum(sums).tolist()
        self.weight, self.reply_targets = weight or 1.0, max(1, reply_targets)

        # micro-batches, with replies under the wrong prompts, which each process draws for itself
        rng = np.random.default_rng([s.seed, step, world.rank, 1])
        replies = []
        if s.relevance:
            replies = draw_replies(rows, self.loader.sources, self.is_chat, self.bos, self.T, rng)
        micros = []
        for i in range(0, len(mine), self.micro):
            part = slice(i, i + self.micro)
            own_reset = None if reset is None else reset[part]
            micro = ChatMicro(x[part], y[part], own_reset, weights[part], of_chats[part, None])
            if s.relevance:
                self.add_wrong_prompts(micro, replies, list(numbers[part]), rng)
            micros.append(micro.to(device))
        self.plain, self.contrast, self.nats = (torch.zeros((), device=device) for _ in range(3))
        return Batch(micros, int(targets), y[of_chats][in_reply])

    def add_wrong_prompts(self, micro, replies, numbers, rng):
        """Extra rows for a micro-batch of the rows `numbers`, in which its replies stand under other chats' prompts."""
        n_rows = int(self.micro * self.s.relevance + rng.random())  # rounded so that the mean is right
        *extra, number, own = wrong_prompts(replies, numbers, n_rows, self.T, rng)
        if n_rows:
            micro.x, micro.y, micro.reset = map(torch.cat, zip((micro.x, micro.y, micro.reset), extra))
            micro.number, micro.own = number, own
            micro.n_compared = int(number.max())  # known here, so that nobody has to ask the GPU for it

    def marks(self, source, pieces):
        """mark_replies of a row; all ones if every target counts, as in base data."""
        if not self.is_chat(source):
            return torch.ones(1, self.T, dtype=torch.uint8)
        return mark_replies(self.sources[source].train_mask, [pieces], self.T, self.s.response_start_tokens)

    def loss(self, net, micro):
        losses = net(micro.x, micro.y, reduction="none", reset=micro.reset)[1]
        contrast = torch.zeros_like(self.contrast)
        if micro.number is not None:
            n = micro.n_compared
            losses, under_wrong = losses.split((len(micro.weights), len(micro.number)))
            lengths = reply_sums(torch.ones_like(under_wrong), micro.number, n)
            own, wrong = reply_sums(losses, micro.own, n), reply_sums(under_wrong, micro.number, n)
            contrast = relevance_loss(own, wrong, lengths, self.s.relevance_margin) / self.reply_targets
        plain = (losses * micro.weights).sum() / self.weight

        self.plain += plain.detach()
        self.contrast += contrast.detach()
        self.nats += (losses.detach() * micro.of_chats).sum()
        return plain + contrast

    def numbers(self, batch, loss):
        """The loss without context relevance, which is logged by itself, and bits per byte of the replies."""
        plain, contrast, nats = (float(self.world.sum(x.cpu())) for x in (self.plain, self.contrast, self.nats))
        numbers = dict(train_loss=plain, train_bits_per_byte=self.bits_per_byte(nats, batch.counted))
        if self.s.relevance:
            numbers["relevance_loss"] = contrast
        return numbers

    def measure(self, model, tokens):
        """Losses of the replies, of the base data (what is forgotten of it), and context relevance."""
        common = tokens, self.T, self.micro, self.on
        result = evaluate(model, self.sources, *common, self.bytes_per_token, self.world, self.frame, mark_replies)
        if math.isnan(result["loss"]["mixed"]):  # long prompts, short replies, few rows
            raise UserError(f"no reply is in the validation rows that --eval_tokens={tokens} takes; "
                            "raise it, or the length of the rows")
        if self.base:
            base = evaluate(model, self.base, *common, self.bytes_per_token, self.world)
            for name in ("loss", "bits_per_byte"):
                result[name]["base"] = base[name]["mixed"]
        accuracy, gap = relevance(model, self.sources, *common, self.bos, self.world)
        return result | dict(relevance_accuracy=accuracy, relevance_gap=gap)

    def table(self, result):
        lines = report.loss_table(result, self.sources, "all replies")
        if math.isfinite(result["relevance_accuracy"]):  # else there are fewer than two validation chats
            lines.append(f"{'relevance':<12} {result['relevance_accuracy']:.1%} of replies are likelier under their "
                         f"own prompt than under another's, by {result['relevance_gap']:.2f} nats/token on average")
        return lines

    def sample(self, model):
        """A question, --sample_prompt or the first one of the validation chats, and the model's reply."""
        user, assistant = (self.tokenizer.token_to_id(f"<|{role}|>") for role in ("user", "assistant"))
        if self.s.sample_prompt:
            question = self.tokenizer.encode(self.s.sample_prompt, add_special_tokens=False).ids
            prompt = [self.bos, user, *question, assistant]
        else:
            prompt = self.first_question(assistant)
            if not prompt:
                return []
        reply = self.generate(model, prompt)[len(prompt):]
        return ["user: " + self.tokenizer.decode(prompt[prompt.index(user):]),
                "assistant: " + self.tokenizer.decode(reply)]

    def first_question(self, assistant):
        """The beginning of a validation chat up to its first reply, which fits into a row; empty if the first chats
        are all longer."""
        chats = next(source.val for source in self.measured_sources() if len(source.val))[:2 ** 16]
        edges = document_edges(chats, self.bos, self.eos)
        for begin, end in zip(edges, edges[1:]):
            chat = chats[begin:min(end, begin + self.T)].tolist()
            if assistant in chat:
                return chat[:chat.index(assistant) + 1]
        return []

    def about(self):
        s = self.s
        if s.replay:
            lines = report.source_lines(self.loader.own, 1 - s.replay)
            lines += [line + ", replayed" for line in report.source_lines(self.loader.base, s.replay)]
        else:
            lines = report.source_lines(self.loader)

        tricks = []
        if s.word_boost != 1:
            tricks.append(f"word boost {s.word_boost:g}")
        if s.response_start_weight != 1:
            tricks.append(f"first {s.response_start_tokens} tokens x {s.response_start_weight:g}")
        if s.replay:
            tricks.append(f"replay {s.replay:g}")
        if s.relevance:
            tricks.append(f"relevance {s.relevance:g}, margin {s.relevance_margin:g}")
        rates = f"lr {s.lr:g}"
        if s.optimizer != "adamw":
            rates = f"muon_lr {s.muon_lr:g}, {rates}"
        lines.append(f"{'fine-tuning':<12} {s.init_from or 'random weights'}, on replies; "
                     f"{', '.join(tricks) or 'no tricks'}; {rates}, {s.warmup_steps} steps of warm-up")
        return lines


# --------------------------------------------------------------------------------------------------- which run is meant

# What fine-tuning does otherwise than a recipe for pretraining
EPOCHS = 3  # passes over the chats
RATE = 0.25  # factor of the learning rates
TOKENS = 32_768  # tokens in a step at most


def needs_gentler(plan):
    """Whether a recipe for pretraining has to become gentler: it is too strong for a model that is trained already."""
    s = plan.settings
    return plan.kind == "new" and not s.resume and bool(s.init_from) and not run.is_fine_tuning(plan.recipe)


def gentler(s, given):
    """A recipe for pretraining as one for fine-tuning: short, at a quarter of the rates, small steps of whole chats."""
    batch_tokens = s.batch_tokens
    if batch_tokens > TOKENS or batch_tokens % s.block_size:
        rows = max(1, min(batch_tokens, TOKENS) // s.block_size)
        batch_tokens = s.block_size << (rows.bit_length() - 1)  # a power of two of rows, for 2, 4 or 8 GPUs
    changes = dict(pack="document", lr=RATE * s.lr, muon_lr=RATE * s.muon_lr, order="random", schedule="wsd",
                   decay_fraction=1.0, decay_steps=0, final_lr_fraction=0.0, batch_tokens=batch_tokens,
                   epochs=0.0 if "max_steps" in given else EPOCHS)
    if "max_steps" in given:  # with --epochs it is not known yet, see Pretraining.settled
        changes["warmup_steps"] = min(s.warmup_steps, s.max_steps // 10)
    return replace(s, **{name: value for name, value in changes.items() if name not in given})


def adapt(plan):
    """What the flags mean for fine-tuning; UserError for what does not go together."""
    s, given = plan.settings, plan.given
    if not plan.recorded and not s.init_from and "init_from" not in given:
        raise UserError(f"--model={s.model} names no checkpoint to start from: give --init_from=CHECKPOINT, "
                        "or --init_from= for random weights")
    if needs_gentler(plan):
        if s.block_size < 1:
            raise UserError(f"--block_size={s.block_size} must be above 0")
        s = gentler(s, given)
    if s.replay >= 1 or s.relevance > 1:
        raise UserError("--replay must be below 1 and --relevance at most 1")
    if s.loss_on == "all":
        off = dict(replay=0.0, relevance=0.0, response_start_weight=1.0, base_data="")
        for name, value in off.items():
            if name in given and getattr(s, name) != value:
                raise UserError(f"--{name} goes only with --loss_on=responses")
        s = replace(s, **off)
    needs = dict(response_start_tokens=("response_start_weight", 1.0), relevance_margin=("relevance", 0.0))
    for name, (partner, off) in needs.items():
        if name in given and getattr(s, name) != getattr(Settings, name) and getattr(s, partner) == off:
            raise UserError(f"--{name} does nothing without --{partner}")
    if s.relevance and s.pack != "document":
        raise UserError("--relevance compares replies under whole prompts: it needs --pack=document")
    plan.settings = s


def default_out(model, kind):
    name = f"{model}-decay" if kind == "decay" else model
    return f"out/{name}" if model.endswith("-sft") else f"out/{name}-sft"


def main(argv):
    with machine.World().one_voice():
        description = " ".join((__doc__ or "").split("\n\n")[0].split())
        choices = train.choices() | dict(loss_on=("responses", "all"))
        plan = run.plan_run(argv, Settings, choices, default_out, description, adapt)
        return train.train(plan, Pretraining if plan.settings.loss_on == "all" else FineTuning)


if __name__ == "__main__":
    run_tool(main)
