"""What pretraining trains on and how it is measured: the rows of a step, their loss, the log's numbers, validation.

train.py's loop asks a task for the next batch and for the loss of each micro-batch, so another objective is a class
like `Pretraining`: finetune.py has one for chats. The order of the rows is in corpus/loader.py.
"""
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

import report
import run
from common import UserError
from corpus.loader import Loader, bytes_per_token, fill_rows
from corpus.tokenizer import bos_eos, load_tokenizer


@dataclass
class Batch:
    """The rows of one optimizer step that fall to this process, in micro-batches."""
    micros: list  # of Micro
    targets: int  # tokens that are trained on, over all processes
    counted: torch.Tensor  # this process's targets, on the CPU, whose bits per byte the log shows


@dataclass
class Micro:
    """Rows that are computed at once."""
    x: torch.Tensor  # int64 (rows, T)
    y: torch.Tensor  # int64 (rows, T)
    reset: torch.Tensor | None  # bool (rows, T)
    weights: torch.Tensor | None  # float (rows, T)
    share: float  # of the whole step's weight: the micro-batches' losses, times their shares, add up to the step's loss


def word_boosts(tokenizer, n_tokens, factor):
    """Weight of each target token, float (V,): `factor` for those of more than one character (TinyMemoryLM's card)."""
    return torch.tensor([1.0 if len(tokenizer.decode([i])) < 2 else factor for i in range(n_tokens)])


class Pretraining:
    """What is trained on, and how. finetune.py extends it.

    The loop calls next_batch, loss (of a micro-batch) and numbers (for the log); train.Trainer calls measure and
    sample, and tells about the task with the other attributes. next_batch sets the sums of a step to zero, loss adds
    to them, numbers reports them. A step has `rows` rows of T positions (--batch_tokens, --block_size), over all
    processes; a process computes `micro` of them at once.
    """

    tool = "train.py"
    is_text = True  # and not chats
    measured, measured_text = "validation", "validation text"
    measures_start = False  # whether there is an evaluation before the first step
    extra_rows = 0.0  # rows that are computed beside those of the batch, as a fraction of them

    def __init__(self, plan, world, on):
        self.plan, self.world, self.on, self.vocab_size = plan, world, on, plan.cfg.vocab_size
        s = plan.settings

        # the data and its tokenizer, which is the one of the checkpoint that is started from
        text = plan.start["tokenizer"] if plan.start else None
        self.sources, self.tokenizer_text = run.find_data(
            s.data, s.tokenizer, self.vocab_size, world, text, plan.start_path)
        self.tokenizer = load_tokenizer(self.tokenizer_text)
        self.bos, self.eos = bos_eos(self.tokenizer)
        self.frame = (self.bos, self.eos) if s.pack == "document" else None
        self.bytes_per_token = bytes_per_token(self.tokenizer, self.sources)
        self.boost = None
        if s.word_boost != 1:
            self.boost = word_boosts(self.tokenizer, len(self.bytes_per_token), s.word_boost)
        if not any(len(source.val) > 1 for source in self.measured_sources()):
            raise UserError(f"{s.data} has no validation text; prepare it with --val_fraction above 0")

        # the batch is the same for any number of processes, and a micro-batch divides the rows of one
        self.T, self.rows = s.block_size, s.batch_tokens // s.block_size
        if self.rows % world.size:
            raise UserError(f"the {self.rows} windows of a step cannot be shared out evenly to {world.size} processes; "
                            "change --batch_tokens")
        mine = self.rows // world.size
        self.micro = max(m for m in range(1, min(s.micro_batch, mine) + 1) if mine % m == 0)
        self.loader = self.make_loader(s)
        self.s = self.settled(s)  # --epochs needs the number of rows, which the loader has counted
        self.loader.set_length(self.s.max_steps * self.rows)
        self.place = None  # the loader's state behind the step's rows, which a checkpoint keeps
        self.reads_ahead = self.is_pinned = on.device.type == "cuda"
        self.reader, self.ahead = ThreadPoolExecutor(1), None

    def measured_sources(self):
        return self.sources

    def make_loader(self, s):
        return Loader(self.sources, s.order, self.T, s.max_steps * self.rows, s.seed, self.frame)

    def settled(self, s):
        """The settings, now final: --epochs becomes a number of steps, with a warm-up of at most a tenth of them."""
        if s.epochs:
            max_steps = math.ceil(s.epochs * self.rows_per_epoch(s) / self.rows)
            s = replace(s, epochs=0.0, max_steps=max_steps)
            if "warmup_steps" not in self.plan.given:
                s = replace(s, warmup_steps=min(s.warmup_steps, max_steps // 10))
        return s

    def rows_per_epoch(self, s):
        return sum(self.loader.per_epoch)

    def check_ids(self, *tensors):
        """UserError, on every process, if one of them holds a token id that the model does not have."""
        highest = self.world.max(max(int(x.max()) for x in tensors))
        if highest >= self.vocab_size:
            raise UserError(f"the data holds token id {highest}, the model's vocabulary ends at {self.vocab_size - 1}; "
                            "prepare the data again")

    def read_next(self):
        """(rows of the next step, the tensors of those that fall to this process). Every process draws all rows and
        reads only its own. For a GPU they are read while it computes the step before."""
        if not self.reads_ahead:
            rows, tensors, self.place = self.read()
            return rows, tensors
        self.ahead = self.ahead or self.reader.submit(self.read)
        rows, tensors, self.place = self.ahead.result()
        self.ahead = self.reader.submit(self.read)
        return rows, tensors

    def read(self):
        rows = self.loader.next_rows(self.rows)
        tensors = self.loader.tensors(rows[self.world.rank::self.world.size])
        if self.is_pinned:  # from pinned memory a copy needs nobody to wait for it
            tensors = [x if x is None else x.pin_memory() for x in tensors]
        return rows, tensors, self.loader.state_dict()

    def next_batch(self, step):
        rows, (x, y, reset) = self.read_next()
        targets = sum(n for _, pieces in rows for _, n in pieces)
        self.check_ids(x, y)
        counts = (y >= 0).float()
        weights, whole = counts, targets
        if self.boost is not None:
            weights = counts * self.boost[y]  # where y is -1: the last token's boost, times 0
            whole = float(self.world.sum(weights.sum().double()))

        micros = []
        for i in range(0, len(x), self.micro):
            part = slice(i, i + self.micro)
            moved = [None if t is None else t[part].to(self.on.device, non_blocking=self.is_pinned)
                     for t in (x, y, reset, None if self.boost is None else weights)]
            micros.append(Micro(*moved, share=float(weights[part].sum()) / whole))
        self.nats = torch.zeros((), device=self.on.device)
        return Batch(micros, targets, y[y >= 0])

    def loss(self, net, micro):
        """A micro-batch's part of the step's loss. The parts of all micro-batches and processes add up to the mean."""
        if micro.weights is None:
            return net(micro.x, micro.y, reset=micro.reset)[1] * micro.share
        losses = net(micro.x, micro.y, loss_weights=micro.weights, reduction="none", reset=micro.reset)[1]
        tiny = torch.finfo(torch.float32).tiny
        self.nats += (losses.detach() / micro.weights.clamp(min=tiny)).sum()  # without the weights
        return losses.sum() / micro.weights.sum().clamp(min=tiny) * micro.share

    def numbers(self, batch, loss):
        """Numbers for the log: the loss, and bits per byte of the step's text, whatever its tokens weigh.

        loss: the parts of this process, whose sum over the processes is the step's.
        """
        loss = float(self.world.sum(loss.cpu()))
        nats = loss * batch.targets
        if self.boost is not None:
            nats = float(self.world.sum(self.nats.cpu()))
        return dict(train_loss=loss, train_bits_per_byte=self.bits_per_byte(nats, batch.counted))

    def bits_per_byte(self, nats, targets):
        """nats of all processes and targets of this one -> bits per byte; nan if all characters are unknown."""
        n_bytes = float(self.world.sum(self.bytes_per_token[targets].sum().double()))
        return nats / math.log(2) / (n_bytes or math.nan)

    def measure(self, model, tokens):
        """Validation losses of the present weights, see `evaluate`, over `tokens` tokens of each source."""
        return evaluate(model, self.sources, tokens, self.T, self.micro, self.on, self.bytes_per_token, self.world,
                        self.frame)

    def sample(self, model):
        """Some text of the present weights, as paragraphs."""
        prompt = [self.bos, *self.tokenizer.encode(self.s.sample_prompt, add_special_tokens=False).ids]
        return [self.tokenizer.decode(self.generate(model, prompt))]

    def generate(self, model, prompt):
        """Token ids of the prompt and what the model writes after it; the same every time."""
        generator = torch.Generator(self.on.device).manual_seed(self.s.seed)
        idx = torch.tensor([prompt], device=self.on.device)
        # of a small model's texts a tenth would end in a loop, with this penalty a fiftieth (MEASUREMENTS.md)
        return model.generate(idx, self.s.sample_tokens, temperature=0.8, repetition_penalty=1.1, stop_token=self.eos,
                              generator=generator)[0].tolist()

    def table(self, result):
        """A result of `measure` as lines for the terminal."""
        return report.loss_table(result, self.sources)

    def about(self):
        """Lines that tell what is trained on."""
        return report.source_lines(self.loader)


# ---------------------------------------------------------------------------------------------------- validation

@torch.no_grad()
def evaluate(model, sources, tokens, T, rows, on, bytes_per_token, world, frame=None, mark=None):
    """Validation losses: {"loss": {"mixed": x, "language": {...}, "source": {...}}, "bits_per_byte": the same}.

    tokens: validation tokens of each source that count, in rows of T targets, spread evenly and the same every time;
    0: all. rows: rows at once. on: machine.Device. bytes_per_token: float (V,). frame: see `Loader`.
    mark: (mask, rows of pieces, T) -> (rows, T); if given, only targets that it marks count in sets of chats, and
    "mixed" is over these sets alone.

    Losses are means in nats per token. Bits per byte are nats / ln 2 / UTF-8 bytes of text. "mixed" gives each source
    the same share: one with less text than the others counts with all it has, weighted up. Draws no random numbers.
    """
    sums = torch.zeros(len(sources), 3, dtype=torch.float64)  # nats, tokens and bytes of each source
    factor = torch.ones(len(sources), 1, dtype=torch.float64)  # a short source counts as if it had more text
    longest = max(source.validation_rows(T, frame)[1] for source in sources)
    wanted = min(tokens, longest) if tokens else longest
    for i, source in enumerate(sources):
        chosen, are_all = source.spread_rows(tokens, T, frame)
        targets = source.validation_rows(T, frame)[1]
        if are_all and targets:
            factor[i] = max(1.0, wanted / targets)
        chosen = chosen[world.rank::world.size]
        for first in range(0, len(chosen), rows):
            some = chosen[first:first + rows]
            x, y, reset = fill_rows(source.val, some, T)
            if mark is not None and source.is_chat:
                y[mark(source.val_mask, some, T) == 0] = -1
            reset = None if frame is None else reset.to(on.device)
            with on.autocast():
                losses = model(x.to(on.device), y.to(on.device), reduction="none", reset=reset)[1]
            if on.device.type == "mps":  # it has no fp64
                losses = losses.cpu()
            counted = y[y >= 0]
            sums[i, 0] += losses.double().sum().cpu()
            sums[i, 1] += len(counted)
            sums[i, 2] += float(bytes_per_token[counted].sum())
    mixed, sums = [source for source in sources if mark is None or source.is_chat], world.sum(sums)
    if mark is not None:  # how much of a row counts differs from set to set
        factor = sums[:, 1:2].max() / sums[:, 1:2].clamp(min=1)
    return report.grouped(sums * factor, sources, mixed)
