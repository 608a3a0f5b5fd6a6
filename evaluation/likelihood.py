"""Log-likelihoods of many short texts, as benchmarks need them: fast on a CPU, and the same for each text, whatever
others it is computed together with.

A row is a text's tokens and how many of the last ones are scored. Rows are alike: the two sentences of a pair begin
with the same words, the four answers to a question follow the same question. So rows that share a beginning are put
into groups, and a group's shared tokens are read once, into the model's cache, which every row of the group then
continues. Groups with equally long beginnings are computed together, the longest first.
"""
import contextlib
import copy
import sys
import time
from dataclasses import dataclass

import torch

from common import UserError, clock

LOGITS = 16_000_000  # numbers that the head gives at once on a CPU; in bf16 malloc keeps that much for the next time
SOFTMAX = 2 ** 21  # numbers that the softmax reads at once on a CPU, so that they stay in its cache
MOST_TOKENS = dict(cpu=2 ** 11, mps=2 ** 13, cuda=2 ** 16)  # tokens at once: with more of them it gets no faster
MOST_ROWS = 64  # rows of a group
WORTH_SHARING = 16  # tokens that rows must share for a pass of their own; the pairs of sentences of BLiMP share fewer
STEP = 8  # shared tokens are rounded down to a multiple of it, so that more groups fit together


# ---------------------------------------------------------------------------------------------------- groups of rows

@dataclass
class Group:
    """Rows that begin with the same `shared` + 1 tokens. The first `shared` of them are read once for all."""
    shared: int
    rows: list  # of (tokens, number of the last tokens that are scored)

    @property
    def longest(self):
        """Tokens that the model reads of the longest row behind the shared ones."""
        return max(len(tokens) for tokens, _ in self.rows) - 1 - self.shared


def common_beginning(a, b):
    """Number of tokens with which both a and b begin."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n


def in_groups(rows):
    """Different rows -> list of Group. Rows that begin alike are neighbours in the order of the alphabet.

    A group of n rows saves n - 1 times the shared tokens. The next row joins it if that saves no less than before.
    """
    groups = []
    for row in sorted(rows):
        tokens, _ = row
        alone = len(tokens) - 2  # a row of its own could share all but the last token that the model reads
        if groups:
            group = groups[-1]
            n = len(group.rows)
            shared = min(group.shared, alone, common_beginning(group.rows[0][0], tokens) - 1)
            if n < MOST_ROWS and shared >= WORTH_SHARING and n * shared >= (n - 1) * group.shared:
                group.rows.append(row)
                group.shared = shared
                continue
        groups.append(Group(alone, [row]))
    for group in groups:
        group.shared = group.shared // STEP * STEP if len(group.rows) > 1 else 0
    return groups


def expanded(cache, rows):
    """A copy of a model's cache whose row i is this one's row rows[i]. rows: int64 tensor."""
    if isinstance(cache, torch.Tensor):
        return cache[rows]
    if isinstance(cache, list):
        return [expanded(part, rows) for part in cache]
    if not hasattr(cache, "__dict__"):
        return cache
    new = copy.copy(cache)
    for name, part in vars(cache).items():
        setattr(new, name, expanded(part, rows))
    return new


# ---------------------------------------------------------------------------------------------------- scoring

class Scorer:
    """Scores rows with a model. model: in eval mode on on.device. on: machine.Device, whose dtype is the compute type.

    batch_tokens: tokens that are computed at once; 0: as many as the device has room for. On a GPU that runs out of
    memory it is halved. progress: common.Progress to show the rows that are done and the time left; None: silent.
    """

    def __init__(self, model, on, batch_tokens=0, progress=None):
        self.model, self.on, self.progress = model, on, progress
        self.terminal = sys.stdout
        self.batch_tokens = batch_tokens or self.room_for()

    def room_for(self):
        """Tokens that can be computed at once."""
        logits = LOGITS
        if self.on.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.on.device)
            logits = free // 4 // 8  # each is 8 bytes: it is copied to fp32, and the copy is changed once
        return max(1, min(MOST_TOKENS[self.on.device.type], logits // self.model.cfg.vocab_size))

    @torch.no_grad()
    def score(self, rows):
        """[(tokens, n)] -> [(log-likelihood of the last n tokens in nats, whether each of them is the likeliest)].

        tokens: a tuple of n + 1 ids at least. Equal rows are computed once. Raises UserError for rows that do not fit
        into memory.
        """
        groups = sorted(in_groups(set(rows)), key=lambda group: (group.shared, group.longest), reverse=True)
        n_rows, begun, results = sum(len(group.rows) for group in groups), time.monotonic(), {}
        at = 0
        with self.on.autocast():  # once around all of it: the weights in bf16 are kept until its end
            while at < len(groups):
                batch = self.next_batch(groups, at)
                done = self.within_memory(batch)
                if done is None:
                    self.take_less()
                    continue
                results |= done
                at += len(batch)
                seconds = time.monotonic() - begun
                left = clock(seconds * (n_rows - len(results)) / len(results))
                self.show(f"{len(results):,} of {n_rows:,} texts, {len(results) / seconds:,.0f} a second, {left} left")
        return [results[row] for row in rows]

    def within_memory(self, batch):
        """`score_together`, or None if the device has too little memory for it."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self.score_together(batch)

    def take_less(self):
        """Halves what is computed at once."""
        if self.batch_tokens == 1:
            raise UserError("the device has too little memory for this model and a single text; use --device=cpu")
        self.batch_tokens //= 2
        torch.cuda.empty_cache()

    def next_batch(self, groups, at):
        """The groups from groups[at] on that are computed together: they share equally many tokens."""
        batch, rows = [], 0
        for group in groups[at:]:
            rows += len(group.rows)
            if batch and (group.shared != batch[0].shared or rows * batch[0].longest > self.batch_tokens):
                break
            batch.append(group)
        return batch

    def score_together(self, batch):
        """Groups that share equally many tokens -> {row: its result}."""
        device, shared, longest = self.on.device, batch[0].shared, max(group.longest for group in batch)
        rows = [row for group in batch for row in group.rows]
        cache, beginning = None, None

        # what the rows of each group share
        if shared:
            idx = torch.tensor([group.rows[0][0][:shared + 1] for group in batch], device=device)
            cache = self.model.init_cache(len(batch), shared + longest)
            is_scored = any(len(tokens) - n <= shared for tokens, n in rows)
            beginning = self.read(idx[:, :-1], idx[:, 1:], cache, is_scored)
            group_of_row = torch.tensor([i for i, group in enumerate(batch) for _ in group.rows], device=device)
            cache = expanded(cache, group_of_row)
            beginning = [part[group_of_row] for part in beginning]
        elif len(rows) * longest > self.batch_tokens:  # the rows are read in several pieces
            cache = self.model.init_cache(len(rows), longest)

        # what follows; a padded position comes after all others, so that they do not see it
        idx = torch.zeros(len(rows), longest + 1, dtype=torch.int64)
        for row, (tokens, _) in zip(idx, rows):
            row[:len(tokens) - shared] = torch.tensor(tokens[shared:])
        idx = idx.to(device)
        logprobs, greedy = self.read(idx[:, :-1], idx[:, 1:], cache)
        if beginning:
            logprobs, greedy = (torch.cat(parts, dim=1) for parts in zip(beginning, (logprobs, greedy)))

        # the sums over each row's scored tokens
        logprobs, greedy = logprobs.cpu(), greedy.cpu()
        ends = torch.tensor([[len(tokens) - 1] for tokens, _ in rows])
        scored = torch.tensor([[n] for _, n in rows])
        position = torch.arange(shared + longest)
        counts = (position >= ends - scored) & (position < ends)
        sums = logprobs.double().where(counts, 0).sum(1).tolist()
        return dict(zip(rows, zip(sums, (greedy | ~counts).all(1).tolist())))

    def read(self, idx, targets, cache, is_scored=True):
        """The model reads idx (B, T), a piece at a time if it is long, and adds to the cache, if there is one.

        Returns of targets (B, T): their log-probabilities, fp32 (B, T), and whether each is the likeliest token.
        Without is_scored the output head is spared, and these are zeros.
        """
        logprobs = torch.zeros(idx.shape, device=idx.device)
        greedy = torch.zeros(idx.shape, dtype=torch.bool, device=idx.device)
        width = max(1, self.batch_tokens // len(idx))
        for begin in range(0, idx.size(1), width):
            piece = slice(begin, begin + width)
            logits, _ = self.model(idx[:, piece], cache=cache, all_logits=is_scored)
            if is_scored:
                logprobs[:, piece], greedy[:, piece] = self.compare(logits, targets[:, piece])
        return logprobs, greedy

    def compare(self, logits, targets):
        """logits (B, T, V), targets (B, T) -> log-probability, fp32 (B, T), and whether it is the likeliest token."""
        n, V = logits[..., 0].numel(), logits.size(-1)
        if self.on.device.type == "cpu":
            n = max(1, SOFTMAX // V)
        room = torch.empty(n, V, device=logits.device)  # used again and again: fresh memory costs more than the sums
        logprobs, greedy = [], []
        for some, wanted in zip(logits.flatten(0, 1).split(n), targets.flatten().split(n)):
            x = room[:len(some)].copy_(some)
            x -= x.amax(1, keepdim=True)
            chosen = x.gather(1, wanted[:, None])[:, 0]
            hits = chosen == 0
            # of several equal maxima the first counts; argmax takes long, so that it looks only where there are several
            several = hits.nonzero()[:, 0]
            several = several[(x[several] == 0).count_nonzero(1) > 1]
            hits[several] = some[several].argmax(1) == wanted[several]
            greedy.append(hits)
            logprobs.append(chosen - x.exp_().sum(1).log())
        return torch.cat(logprobs).view_as(targets), torch.cat(greedy).view_as(targets)

    def show(self, text):
        """Shows a line of progress, even where standard output is caught."""
        if self.progress is not None:
            with contextlib.redirect_stdout(self.terminal):
                self.progress.show(text)

    def clear(self):
        """Removes the line of progress."""
        if self.progress is not None:
            with contextlib.redirect_stdout(self.terminal):
                self.progress.clear()
