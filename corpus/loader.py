"""From token files to batches."""
import math

import numpy as np
import torch

from common import UserError
from corpus.folder import document_edges, read_tokens


class Source:
    """One source of a prepared folder: its token files as memory maps, with a set of chats their masks too, and where it comes from."""

    def __init__(self, folder, entry, dtype, weight):
        self.name, self.language, self.kind, self.weight = entry["name"], entry["language"], entry["kind"], weight
        self.budget = entry["budget"] or entry["train"]["tokens"]
        self.fingerprint = [entry["name"], entry["train"]["sha256"]]
        self.train, self.val = (read_tokens(folder / entry[split]["file"], dtype) for split in ("train", "val"))
        self.train_mask, self.val_mask = (read_tokens(folder / entry[split]["mask"]["file"], "uint8") if "mask" in entry[split] else None
                                          for split in ("train", "val"))
        self.packed = {}  # (T, bos) -> what validation_rows found

    def validation_rows(self, T, bos=None):
        """The validation text in rows of T positions, always the same: (how many, their targets, number of a row -> its pieces), see `Loader`."""
        if (T, bos) not in self.packed:
            if bos is None:
                last = max(len(self.val) - 1, 0)
                self.packed[T, bos] = -(-last // T), last, lambda k: [(T * k, min(T, last - T * k))]
            else:
                first, pieces = document_rows(document_edges(self.val, bos), T)
                self.packed[T, bos] = len(first) - 1, int(pieces[:, 1].sum()), lambda k: pieces[first[k]:first[k + 1]].tolist()
        return self.packed[T, bos]


def document_rows(edges, T, rng=None):
    """Packs the documents between `edges` into rows of T positions. Returns (first (rows + 1,), pieces (n, 2)), both int64: row k consists
    of pieces[first[k]:first[k + 1]], each the number of its first token and of its positions.

    A document of n tokens has n - 1 positions: an input and the token behind it. One with more than T is cut into pieces of T and a
    shorter one, the last or, with rng, any of them, so that the cuts differ between epochs. Pieces go, the longest first, to the fullest
    row with room for them (best-fit packing, arXiv 2404.10830). The number of rows does not depend on rng.
    """
    positions = np.diff(edges) - 1
    cuts = -(-positions // T)  # pieces of each document
    document = np.repeat(np.arange(len(cuts)), cuts)
    i = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)  # number of a piece within its document
    rest = (positions - T * (cuts - 1))[document]
    short = (cuts - 1 if rng is None else rng.integers(np.maximum(cuts, 1)))[document]
    length = np.where(i == short, rest, T)
    start = edges[document] + T * i - (T - rest) * (i > short)  # pieces behind the short one begin earlier by what it lacks
    order = np.arange(len(length)) if rng is None else rng.permutation(len(length))
    order = order[np.argsort(-length[order], kind="stable")]

    row, rows = [], 0
    room, filled = [[] for _ in range(T + 1)], 0  # room[r]: the rows with r positions left; bit r of `filled`: there are any
    for n in length[order].tolist():
        fitting = filled >> n
        if fitting:
            r = n + (fitting & -fitting).bit_length() - 1  # the least room that is enough
            k = room[r].pop()
            if not room[r]:
                filled ^= 1 << r
        else:
            k, r, rows = rows, T, rows + 1
        row.append(k)
        if r > n:
            room[r - n].append(k)
            filled |= 1 << r - n
    row = np.array(row, dtype=np.int64)
    by_row = order[np.argsort(row, kind="stable")]
    return np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]), np.stack([start[by_row], length[by_row]], axis=1)


def fill_rows(tokens, rows, T):
    """Rows as lists of pieces, (first token, positions), of `tokens` -> inputs and targets, int64 (rows, T), -1 where a target does not
    count, and bool (rows, T), true where a piece begins or the padding does."""
    x, y, reset = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -1, np.int64), np.zeros((len(rows), T), bool)
    for r, pieces in enumerate(rows):
        at = 0
        for start, n in pieces:
            piece = tokens[start:start + n + 1]
            if len(piece) <= n:  # a window of a later epoch may wrap around
                piece = np.concatenate((piece, tokens[:n + 1 - len(piece)]))
            x[r, at:at + n], y[r, at:at + n], reset[r, at] = piece[:-1], piece[1:], True
            at += n
        reset[r, at:at + 1] = True
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(reset)


def mark_replies(mask, rows, T, opening=0):
    """A set of chats' mask and rows of pieces, see `fill_rows` -> uint8 (rows, T): 0 where the target is no part of a reply, 2 where it is
    one of the first `opening` tokens of its reply, else 1."""
    marks = np.zeros((len(rows), T), np.uint8)
    for r, pieces in enumerate(rows):
        at = 0
        for start, n in pieces:
            near = mask[np.arange(start + 1 - opening, start + n + 1) % len(mask)]
            seen = np.concatenate([[0], np.cumsum(near, dtype=np.int64)])
            begun = seen[opening:-1] - seen[:n] < opening  # of the `opening` tokens before the target not all belong to a reply
            marks[r, at:at + n] = near[opening:] * (1 + begun)
            at += n
    return torch.from_numpy(marks)


class Loader:
    """Deals out training rows of T positions, the same ones for the same seed; its whole state is how many each source has given.

    Without `bos` (--pack=stream) a row is a window of T + 1 tokens of a source's stream; windows overlap by one token, so that each
    token is a target once an epoch. With it (--pack=document) a row holds whole documents, which begin where that token stands, see
    `document_rows`; again each token is a target once, but for the first of a document. Every epoch deals the rows in a new order
    without replacement; from the second on the cuts are elsewhere, so that a token is not always seen behind the same context.

    Which source gives the next row: `sequential` goes through them in turn, once in the run and in proportion to their budgets;
    `random` and `balanced` take the one furthest behind its share of the tokens, which is its size (times its weight in --data) or
    the same for all.

    The share `replay` of the rows are windows of the `base` sources instead, which are drawn as `random` does.
    """

    def __init__(self, sources, order, T, total_rows, seed, bos=None, base=(), replay=0.0):
        self.own, base = len(sources), list(base) if replay else []
        self.sources, self.T, self.order, self.seed, self.replay = [*sources, *base], T, order, seed, replay
        self.taken, self.dealt = [0] * len(self.sources), {}
        self.edges = [None if bos is None else document_edges(s.train, bos) for s in sources] + [None] * len(base)  # None: windows
        self.per_epoch = [(len(s.train) - 1) // T if e is None else len(document_rows(e, T)[0]) - 1 for s, e in zip(self.sources, self.edges)]
        for s, n in zip(self.sources, self.per_epoch):
            if n < 1:
                raise UserError(f"the source {s.name} has {len(s.train):,} training tokens, fewer than one window of {T + 1}: prepare more, or lower --block_size")
        self.fill = np.array([1.0 if e is None else (len(s.train) - (len(e) - 1)) / (n * T)  # the rest is padding
                              for s, e, n in zip(self.sources, self.edges, self.per_epoch)])
        size = dict(random=lambda s: len(s.train) * s.weight, balanced=lambda s: s.weight, sequential=lambda s: s.budget * s.weight)
        share = np.array([size[order](s) for s in sources] + [size["random"](s) for s in base], dtype=np.float64)
        if not (share > 0).all():
            raise UserError("weights in --data and --base_data must be above 0")
        self.share, self.row_share = np.zeros_like(share), np.zeros_like(share)  # of the tokens and of the rows, within each group
        for group in (slice(self.own), slice(self.own, None)):
            self.share[group] = share[group] / share[group].sum()
            rows = self.share[group] / self.fill[group]
            self.row_share[group] = rows / rows.sum()
        self.set_length(total_rows)

    def set_length(self, total_rows):
        """How many rows the run takes, which `sequential` goes by."""
        self.turn_ends = np.round(np.cumsum(self.row_share[:self.own]) * (total_rows - math.floor(total_rows * self.replay)))  # when each source's turn is over

    def deal(self, source, epoch):
        """Number of a row in this epoch -> the pieces it consists of, [(first token, positions), ...]."""
        rng, n = np.random.default_rng([self.seed, source, epoch]), self.per_epoch[source]
        if self.edges[source] is None:
            size = len(self.sources[source].train)
            shift = int(rng.integers(size)) if epoch else 0
            starts = (shift + self.T * rng.permutation(n)) % size
            return lambda k: [(int(starts[k]), self.T)]
        first, pieces = document_rows(self.edges[source], self.T, rng if epoch else None)
        order = rng.permutation(n)
        return lambda k: pieces[first[order[k]]:first[order[k] + 1]].tolist()

    def next_row(self):
        """(source, pieces) of the next row."""
        i, own = sum(self.taken), self.own
        if math.floor((i + 1) * self.replay) > math.floor(i * self.replay):
            source = own + int(np.argmin((np.array(self.taken[own:]) + 0.5) / self.row_share[own:]))
        elif self.order == "sequential":
            source = min(int(np.searchsorted(self.turn_ends, sum(self.taken[:own]), side="right")), own - 1)
        else:
            source = int(np.argmin((np.array(self.taken[:own]) + 0.5) / self.row_share[:own]))
        epoch, k = divmod(self.taken[source], self.per_epoch[source])
        if self.dealt.get(source, (None,))[0] != epoch:
            self.dealt[source] = epoch, self.deal(source, epoch)
        self.taken[source] += 1
        return source, self.dealt[source][1](k)

    def tensors(self, dealt):
        """Rows as `next_row` gives them: inputs, targets and, if documents are packed, where they begin (else None), as `fill_rows` has them."""
        x, y, reset = map(torch.cat, zip(*(fill_rows(self.sources[source].train, [pieces], self.T) for source, pieces in dealt)))
        return x, y, reset if self.edges[0] is not None else None

    def batch(self, rows):
        """`tensors` of the next rows."""
        return self.tensors([self.next_row() for _ in range(rows)])

    def in_replies(self, source):
        """Whether only replies of this source count: it is a set of chats and no base data."""
        return source < self.own and self.sources[source].train_mask is not None

    def marks(self, dealt, opening):
        """Rows as `next_row` gives them -> `mark_replies`; where not only replies count, every target is marked 1."""
        return torch.cat([mark_replies(self.sources[source].train_mask, [pieces], self.T, opening) if self.in_replies(source)
                          else torch.ones(1, self.T, dtype=torch.uint8) for source, pieces in dealt])

    def state_dict(self):
        return dict(taken=list(self.taken), per_epoch=list(self.per_epoch), fingerprint=[s.fingerprint for s in self.sources])

    def load_state_dict(self, state):
        """Goes on where the loader of `state` was; with other rows (--block_size, --pack), at the same share of each epoch."""
        before = state.get("per_epoch", self.per_epoch)  # the first checkpoints of this format lack it
        self.taken = [taken if n == m else round(taken * n / m) for taken, n, m in zip(state["taken"], self.per_epoch, before)]
