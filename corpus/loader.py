"""From token files to batches: which tokens make the next training row, and in which order.

A prepared folder holds token files, one pair for each source of text. `TokenSource` maps a pair into memory. `Loader`
deals out training rows from all sources. A row of T positions consists of pieces, (first token, number of positions),
of one source; `make_tensors` makes inputs and targets of them. There are two kinds of rows:

    --pack=stream     a row is one window of T + 1 tokens, cut from the stream without looking at documents
    --pack=document   a row holds whole documents, which do not see each other; see `document_rows`

The same seed gives the same rows, whatever the number of processes. The loader's whole state is how many rows each
source has given, so a run can go on anywhere.
"""
import math

import numpy as np
import torch

from common import UserError
from corpus.counts import byte_scale
from corpus.folder import document_edges, read_tokens
from corpus.tokenizer import token_byte_counts


class TokenSource:
    """The token files of one source as memory maps, with the masks that a set of chats has beside them.

    entry: what meta.json has about the source. weight: its factor in --data (NAME:WEIGHT).
    """

    def __init__(self, folder, entry, dtype, weight):
        self.name, self.language, self.kind = entry["name"], entry["language"], entry["kind"]
        self.weight = weight
        self.budget = entry["budget"] or entry["train"]["tokens"]
        self.fingerprint = [entry["name"], entry["train"]["sha256"]]  # a resumed run must find the same data
        self.entries = [entry["train"], entry["val"]]
        self.train = read_tokens(folder / entry["train"]["file"], dtype)
        self.val = read_tokens(folder / entry["val"]["file"], dtype)
        self.train_mask = self.val_mask = None
        if "mask" in entry["train"]:
            self.train_mask = read_tokens(folder / entry["train"]["mask"]["file"], "uint8")
            self.val_mask = read_tokens(folder / entry["val"]["mask"]["file"], "uint8")
        self.validation_cache = {}  # (T, frame) -> what validation_rows found

    @property
    def is_chat(self):
        return self.train_mask is not None

    def validation_rows(self, T, frame=None):
        """The validation text in rows of T positions, the same every time: (number of rows, their targets, row).

        row(k) gives the pieces of row number k. frame: (bos, eos) to pack whole documents, None for windows.
        """
        found = self.validation_cache
        if (T, frame) not in found:
            if frame is None:
                targets = max(len(self.val) - 1, 0)
                n_rows = math.ceil(targets / T)
                found[T, frame] = n_rows, targets, lambda k: [(T * k, min(T, targets - T * k))]
            else:
                first, pieces = document_rows(document_edges(self.val, *frame), T)
                targets = int(pieces[:, 1].sum())
                found[T, frame] = len(first) - 1, targets, lambda k: pieces[first[k]:first[k + 1]].tolist()
        return found[T, frame]

    def spread_rows(self, tokens, T, frame=None):
        """Validation rows with about `tokens` targets, spread evenly over the text; all of them if `tokens` is 0.

        Returns (rows as lists of pieces, whether they are all that there are).
        """
        n_rows, targets, row = self.validation_rows(T, frame)
        take = n_rows
        if tokens and n_rows:
            take = min(n_rows, math.ceil(tokens * n_rows / targets))
        return [row(i * n_rows // take) for i in range(take)], take == n_rows


def open_sources(folders):
    """[(folder, its meta.json, weight), ...] -> a TokenSource for each source in them.

    Two folders may bring sources of one name; a number behind it then tells them apart.
    """
    sources = [TokenSource(folder, entry, meta["dtype"], weight)
               for folder, meta, weight in folders for entry in meta["sources"]]
    for name in [source.name for source in sources]:
        same = [source for source in sources if source.name == name]
        if len(same) > 1:
            for i, source in enumerate(same):
                source.name += f"-{i}"
    return sources


def bytes_per_token(tokenizer, sources):
    """UTF-8 bytes of text that each token id stands for, float64 (vocabulary size,), to count bits per byte with.

    They are whole numbers for most tokenizers. Those of a tokenizer from elsewhere are scaled, if need be, so that all
    tokens of the sources together stand for the text that meta.json has counted.
    """
    scale = byte_scale([entry for source in sources for entry in source.entries])
    return torch.from_numpy(token_byte_counts(tokenizer) * scale)


# ---------------------------------------------------------------------------------------------------- rows

def cut_documents(edges, T, rng=None):
    """Cuts the documents between `edges` into pieces of at most T positions: (first token, positions), int64 (n,) each.

    A document of n tokens has n - 1 positions: an input and the token after it. A document with more than T positions
    becomes pieces of T and a shorter one. The shorter one is the last or, with rng, any of them, so that the cuts
    differ between epochs.
    """
    # of each document
    positions = np.diff(edges) - 1
    n_pieces = -(-positions // T)  # rounded up; 0 for a document of one token
    short = n_pieces - 1  # which of its pieces is the shorter one: the last ...
    if rng is not None:
        short = rng.integers(np.maximum(n_pieces, 1))  # ... or any
    missing = T * n_pieces - positions  # what the shorter piece lacks
    pieces_before = np.cumsum(n_pieces) - n_pieces  # in the documents before it

    # of each piece
    document = np.repeat(np.arange(len(n_pieces)), n_pieces)  # the document that it belongs to
    number = np.arange(len(document)) - pieces_before[document]  # its number within that document
    length = np.where(number == short[document], T - missing[document], T)
    start = edges[document] + T * number
    start = np.where(number > short[document], start - missing[document], start)  # those behind it move up
    return start, length


def best_fit(lengths, T):
    """Number of the row that each piece goes to: the fullest row that still has room for it (arXiv 2404.10830).

    lengths: positions of each piece, at most T, the longest first. Returns (rows as a list, number of rows).
    """
    row_of, n_rows = [], 0
    rows_with = [[] for _ in range(T + 1)]  # rows_with[r]: the rows that have r positions left
    rooms = 0  # bit r is set if rows_with[r] is not empty: the search below is then one operation
    for n in lengths:
        enough = rooms >> n  # whose bit 0 stands for a room of n
        if enough:
            lowest = enough & -enough  # only the lowest bit that is set
            room = n + lowest.bit_length() - 1  # the least room that is enough
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            row, room = n_rows, T
            n_rows += 1
        row_of.append(row)
        if room > n:
            rows_with[room - n].append(row)
            rooms |= 1 << (room - n)
    return row_of, n_rows


def document_rows(edges, T, rng=None):
    """Packs the documents between `edges` into rows of T positions, with little padding.

    Returns (first, pieces), both int64: row k consists of pieces[first[k]:first[k + 1]], and a piece is (number of its
    first token, number of its positions). The number of rows does not depend on rng, which shuffles the pieces.
    """
    start, length = cut_documents(edges, T, rng)
    order = np.arange(len(length))
    if rng is not None:
        order = rng.permutation(len(length))
    order = order[np.argsort(-length[order], kind="stable")]  # the longest first

    row_of, n_rows = best_fit(length[order].tolist(), T)
    row_of = np.array(row_of, dtype=np.int64)
    by_row = order[np.argsort(row_of, kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n_rows))])
    return first, np.stack([start[by_row], length[by_row]], axis=1)


def fill_rows(tokens, rows, T):
    """`make_tensors` for rows of one token array. rows: the pieces of each row."""
    return make_tensors([(tokens, pieces) for pieces in rows], T)


def row_tensors(sources, rows, T):
    """`make_tensors` for rows of the training text: (number of the source, pieces) each."""
    return make_tensors([(sources[i].train, pieces) for i, pieces in rows], T)


def make_tensors(rows, T):
    """Rows, (token array, pieces) each -> (inputs, targets, reset), torch tensors of shape (rows, T).

    Inputs and targets are int64; a target is -1 where it does not count. reset is bool: true where a piece begins and
    where the padding begins.
    """
    x = np.zeros((len(rows), T), np.int64)
    y = np.full((len(rows), T), -1, np.int64)
    reset = np.zeros((len(rows), T), bool)
    for r, (tokens, pieces) in enumerate(rows):
        at = 0
        for start, n in pieces:
            piece = tokens[start:start + n + 1]
            if len(piece) <= n:  # a window of a later epoch may reach over the end of the file
                piece = np.concatenate((piece, tokens[:n + 1 - len(piece)]))
            x[r, at:at + n] = piece[:-1]
            y[r, at:at + n] = piece[1:]
            reset[r, at] = True
            at += n
        reset[r, at:at + 1] = True
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(reset)


# ---------------------------------------------------------------------------------------------------- the loader

class Loader:
    """Deals out training rows of T positions; its whole state is how many rows each source has given.

    sources: list of TokenSource.
    order: which source gives the next row. "random" takes the source that is furthest behind its share of the tokens,
        which is its size times its weight. "balanced" does the same with equal shares. "sequential" goes through the
        sources in turn, once in the run and in proportion to their budgets.
    total_rows: rows that the run takes; "sequential" needs it.
    frame: (bos, eos) token ids to pack whole documents, which begin at bos; None cuts windows from the stream.
    first_number: number of the first source, which seeds its order.

    Each token is a target once in an epoch, but for the first of the stream or of a packed document, and for the end
    of a stream that does not fill a row. Each epoch deals the rows in a new order without replacement. From the second
    epoch on the cuts are elsewhere, so that a token does not always follow the same context.
    Raises UserError for a source that is shorter than a row, and for weights that are not above 0.
    """

    def __init__(self, sources, order, T, total_rows, seed, frame=None, first_number=0):
        self.sources, self.order, self.T, self.seed = sources, order, T, seed
        self.frame, self.first_number = frame, first_number
        self.taken = [0] * len(sources)  # rows that each source has given
        self.current = {}  # number of a source -> (its epoch, the rows of that epoch): see shuffled()

        # how many rows an epoch of each source has, and which part of them is text and not padding
        self.edges = [None if frame is None else document_edges(s.train, *frame) for s in sources]
        self.per_epoch = [self.count_rows(i) for i in range(len(sources))]
        self.fill = np.array([self.filled(i) for i in range(len(sources))])

        # the shares of the sources, of tokens and of rows
        size = dict(random=lambda s: len(s.train) * s.weight,
                    balanced=lambda s: s.weight,
                    sequential=lambda s: s.budget * s.weight)[order]
        share = np.array([size(s) for s in sources], dtype=np.float64)
        if not (share > 0).all():
            raise UserError("weights in --data and --base_data must be above 0")
        self.share = share / share.sum()
        rows = self.share / self.fill  # padding holds no tokens, so a padded source needs more rows
        self.row_share = rows / rows.sum()
        self.set_length(total_rows)

    def count_rows(self, i):
        """Rows in an epoch of source number i."""
        tokens = self.sources[i].train
        if self.edges[i] is None:
            n = (len(tokens) - 1) // self.T
        else:
            n = len(document_rows(self.edges[i], self.T)[0]) - 1
        if n < 1:
            raise UserError(f"the source {self.sources[i].name} has {len(tokens):,} training tokens, fewer than one "
                            f"window of {self.T + 1}: prepare more, or lower --block_size")
        return n

    def filled(self, i):
        """Fraction of the positions of source number i that hold a token; the rest is padding."""
        if self.edges[i] is None:
            return 1.0
        n_documents = len(self.edges[i]) - 1  # the last token of each is no input, so it fills no position
        return (len(self.sources[i].train) - n_documents) / (self.per_epoch[i] * self.T)

    def set_length(self, total_rows):
        """Says how many rows the run takes. "sequential" gives each source its turn accordingly."""
        # after how many rows of the run each source's turn is over
        self.turn_ends = np.round(np.cumsum(self.row_share) * total_rows)

    def shuffled(self, i, epoch):
        """The rows of source number i in the order of this epoch, as a function: number of a row -> its pieces."""
        rng = np.random.default_rng([self.seed, self.first_number + i, epoch])
        n = self.per_epoch[i]
        if self.edges[i] is None:
            size = len(self.sources[i].train)
            shift = int(rng.integers(size)) if epoch else 0
            starts = (shift + self.T * rng.permutation(n)) % size
            return lambda k: [(int(starts[k]), self.T)]
        first, pieces = document_rows(self.edges[i], self.T, rng if epoch else None)
        order = rng.permutation(n)
        return lambda k: pieces[first[order[k]]:first[order[k] + 1]].tolist()

    def next_row(self):
        """(number of the source, pieces) of the next row."""
        i = 0
        if self.order == "sequential":
            i = int(np.searchsorted(self.turn_ends, sum(self.taken), side="right"))
            i = min(i, len(self.sources) - 1)
        elif len(self.sources) > 1:
            due = (np.array(self.taken) + 0.5) / self.row_share  # when, in rows of the run, each one's next row is due
            i = int(np.argmin(due))
        epoch, k = divmod(self.taken[i], self.per_epoch[i])
        if i not in self.current or self.current[i][0] != epoch:
            self.current[i] = epoch, self.shuffled(i, epoch)
        _, pieces_of = self.current[i]
        self.taken[i] += 1
        return i, pieces_of(k)

    def next_rows(self, n):
        """The next n rows, as `next_row` gives them."""
        return [self.next_row() for _ in range(n)]

    def tensors(self, rows):
        """Rows as `next_row` gives them -> (inputs, targets, reset), see `make_tensors`; reset is None for windows."""
        x, y, reset = row_tensors(self.sources, rows, self.T)
        return x, y, None if self.frame is None else reset

    def state_dict(self):
        state = dict(taken=list(self.taken), per_epoch=list(self.per_epoch),
                     fingerprint=[s.fingerprint for s in self.sources])
        if self.order == "sequential":
            state["turn_ends"] = self.turn_ends.tolist()
        return state

    def load_state_dict(self, state):
        """Goes on where the loader that gave `state` was.

        If the length of rows has changed, so has their number: each source then goes on at the same part of its epoch.
        """
        old_per_epoch = state.get("per_epoch", self.per_epoch)  # the first checkpoints of this format lack it
        self.taken = []
        for taken, old, new in zip(state["taken"], old_per_epoch, self.per_epoch):
            self.taken.append(taken if new == old else round(taken * new / old))

        # in a run that has become longer or shorter, turns that are over stay, and what is left of the others stretches
        if self.order == "sequential" and "turn_ends" in state and self.per_epoch == old_per_epoch:
            old_ends, now = np.array(state["turn_ends"]), sum(self.taken)
            stretch = (self.turn_ends[-1] - now) / max(1, old_ends[-1] - now)
            self.turn_ends = np.where(old_ends <= now, old_ends, np.round(now + (old_ends - now) * stretch))
