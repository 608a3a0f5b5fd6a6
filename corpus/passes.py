"""The two passes over the text of a corpus, and the record that lets a stopped program go on.

    first_pass       how much text there is, where the validation split lies, and a sample: it trains the tokenizer
    second_pass      encodes the text, source by source, into token files
    finish           meta.json, and the folder's name
"""
import hashlib
import heapq
import json
import math
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from common import Progress, UserError, clock, replacing
from corpus.chats import chat_ids, encode_chats
from corpus.counts import TokenCounts
from corpus.folder import EncodedDocument, SourceWriter, new_place, own_files, token_dtype, token_files
from corpus.hub import HubSource
from corpus.samples import Wanted
from corpus.text import Document, LocalSource, clean
from corpus.tokenizer import TRAINERS, bos_eos, fast_encoder, load_tokenizer, vocabulary_size

SAMPLE_BYTES = 32 * 2 ** 20  # text that a tokenizer learns from, shared equally by the sources
HUB_SCAN = 2 ** 20  # bytes of a Hub data set that the first pass reads at least
BATCH_BYTES = 4 * 2 ** 20  # text that is encoded at once: enough to keep every core busy, and little memory
BATCH_ROWS = 100_000  # rows that are encoded at once at most
WITHOUT_TEXT = 100_000  # rows without a document at the beginning, after which no more are read
SAVE_SECONDS = 10  # between two records of how far the work is


def stems(sources):
    """(stem, source) of each: the stem is '0-pydocs', what its files are called after."""
    return [(f"{i}-{source.name}", source) for i, source in enumerate(sources)]


# ---------------------------------------------------------------------------------------------------- the record

class Record:
    """progress.json in a folder that is being made: what was asked for, which sources are done, and where the present
    one is. It is replaced as a whole, after the token files that it speaks of have reached the disk."""

    def __init__(self, folder, asked):
        self.path = folder / "progress.json"
        try:
            self.data = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            self.data = {}
        self.resumed = self.data.get("asked") == asked
        if not self.resumed:
            self.data = dict(asked=asked, scans=None, done=[], source=None)

    def save(self, **changes):
        self.data |= changes
        with replacing(self.path) as f:
            f.write(json.dumps(self.data).encode())


# ---------------------------------------------------------------------------------------------------- the first pass

def first_pass(sources, tokenizer_plan, val_fraction, part, record):
    """Scans the sources, trains the tokenizer unless it exists, and begins the folder with it."""
    for source in sources:
        say_what_is_read(source)
    threshold = int(val_fraction * 2 ** 64)
    tokenizer_json = tokenizer_plan.text
    sample_bytes = 0 if tokenizer_json else SAMPLE_BYTES // len(sources)
    scans = [scan(source, threshold, sample_bytes) for source in sources]
    if not tokenizer_json:
        texts = [text for found in scans for text in found.texts]
        tokenizer = train_tokenizer(tokenizer_plan.label, tokenizer_plan.vocab_size, texts)
        tokenizer_json = tokenizer.to_str(pretty=True)

    for path in own_files(part):
        path.unlink()
    part.mkdir(parents=True, exist_ok=True)
    with replacing(part / "tokenizer.json") as f:
        f.write(tokenizer_json.encode())
    revisions = {stem: source.revision for stem, source in stems(sources) if isinstance(source, HubSource)}
    record.save(scans=[(found.threshold, found.total_bytes) for found in scans], revisions=revisions)


def say_what_is_read(source):
    """A line about the files of a folder: how many are read, and how many of each kind are left out."""
    if not isinstance(source, LocalSource) or os.path.isfile(source.origin["path"]):
        return
    left_out = [f"{n:,} {kind}" for kind, n in source.left_out.most_common() if n]
    if len(left_out) > 8:
        left_out[8:] = ["..."]
    n = source.origin["files"]
    files = "1 file" if n == 1 else f"{n:,} files"
    what = "; not read: " + ", ".join(left_out) if left_out else ", none left out"
    Progress().done(f"{source.name:<12} {files}{what}")


def train_tokenizer(kind, vocab_size, texts):
    started = time.monotonic()
    tokenizer = TRAINERS[kind](texts, vocab_size)
    Progress().done(f"tokenizer    {kind}, {tokenizer.get_vocab_size():,} tokens, "
                    f"from {sum(map(len, texts)) / 1e6:,.1f} M characters in {time.monotonic() - started:.1f} s")
    return tokenizer


class Scan(NamedTuple):
    """What the first pass finds in a source."""
    texts: list  # the sample for the tokenizer
    threshold: int  # documents with a lower split_hash are validation text
    total_bytes: int | None  # UTF-8 bytes of the source, or of as much of it as its budget can need; None: not known


def scan(source, threshold, sample_bytes):
    """First pass over a source: how much there is, a sample of its training text, and where its validation split lies.

    No more is read than the source's budget can need, and of a Hub data set, from all over it, no more than
    sample_bytes, or a megabyte if that is more.

    `threshold` moves just above the lowest hash if no hash is below it, and down to the highest hash if all are below.
    So a small source has both splits too. (A threshold of 0 stays: there is no validation text then.) Raises UserError
    if there are not enough documents for that.
    """
    most = math.inf  # A token has fewer than 8 bytes on average, so the budget will be spent before this place
    if source.budget:
        most = 8 * source.budget
    hub_most = max(sample_bytes, HUB_SCAN)
    sample = Sample(sample_bytes)
    lowest, highest = 2 ** 64, -1
    total, n = 0, 0
    skipped = Counter()
    progress = Progress()
    wanted = Wanted(min(most, hub_most), min(most, hub_most))
    for document in clean(source.reader(wanted=wanted), chat=source.chat):
        if not isinstance(document, Document):
            skipped[document] += 1
            if n == 0 and skipped.total() == WITHOUT_TEXT:
                break
            continue
        progress.show(f"{source.name:<12} reading, {total / 1e6:,.1f} MB")
        n += 1
        total += len(document.utf8)
        lowest = min(lowest, document.split_hash)
        highest = max(highest, document.split_hash)
        if document.split_hash >= threshold:
            sample.add(document)

        if lowest == highest:  # fewer than two different documents: go on
            continue
        if isinstance(source, HubSource) and total >= hub_most:
            total = None
            break
        if total >= most:
            break

    if n == 0 or (threshold and lowest == highest):
        found = "only one document" if n else "no document"
        raise UserError(f"{source.name} holds {found} of text; "
                        f"a training and a validation split need two different ones{why_skipped(skipped)}")
    if threshold:
        threshold = min(max(threshold, lowest + 1), highest)
    return Scan(sample.texts(threshold), threshold, total)


class Sample:
    """The documents that a tokenizer learns from: those of the lowest rank that fit `limit` bytes.

    A document's rank is its hash, hashed again. So the sample is spread evenly over all that is read, it is the same
    whatever the order, and there is never more than that in memory.
    """

    def __init__(self, limit):
        self.limit = limit
        self.size = 0
        self.bar = 2 ** 64  # documents of this rank and higher stay out
        self.heap = []  # (-rank, text, bytes, split_hash): the highest rank comes first

    def add(self, document):
        # Fibonacci hashing: an order unlike that of the split, which uses the same hash
        rank = document.hash * 0x9E3779B97F4A7C15 % 2 ** 64
        if self.limit == 0 or rank >= self.bar:
            return
        text, size = document.text, len(document.utf8)
        if size > self.limit:  # the beginning of a long document is enough
            text, size = document.utf8[:self.limit].decode(errors="ignore"), self.limit
        heapq.heappush(self.heap, (-rank, text, size, document.split_hash))
        self.size += size
        while self.size > self.limit and len(self.heap) > 1:
            # documents of a higher rank than one that did not fit stay out, even short ones
            self.bar = -self.heap[0][0]
            self.size -= heapq.heappop(self.heap)[2]

    def texts(self, threshold):
        """The texts in the order of their ranks, without those that turned out to be validation text."""
        return [text for _, text, _, split_hash in sorted(self.heap, reverse=True) if split_hash >= threshold]


def why_skipped(skipped):
    """{"empty": 3} -> '; left out: 3 empty', and '' if nothing was left out."""
    counts = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n)
    return f"; left out: {counts}" if counts else ""


# ---------------------------------------------------------------------------------------------------- the second pass

def second_pass(sources, part, record):
    """Encodes the sources one after the other, beginning where the record says."""
    encoder = Encoder(load_tokenizer((part / "tokenizer.json").read_text(encoding="utf-8")))
    for i, (stem, source) in enumerate(stems(sources)):
        if i == len(record.data["done"]):
            threshold, total_bytes = record.data["scans"][i]
            entry = encode_source(source, stem, part, encoder, threshold, total_bytes, record)
            record.save(done=[*record.data["done"], entry], source=None)


def encode_source(source, stem, folder, encoder, threshold, total_bytes, record):
    """Writes the token files of one source, with their masks if it holds chats. Returns its entry for meta.json.

    It begins where the record says, and brings the record up to date every few seconds. The next batch is read while
    one is encoded.
    """
    place = record.data["source"] or new_place(stem, source.chat)
    writer = SourceWriter(folder, stem, encoder.dtype, threshold, source.budget, place)
    reader = source.reader(place["state"])
    upcoming = batches(reader, writer.hashes_before(), source.chat, source.budget)
    time_left = TimeLeft(source, total_bytes, place)
    progress = Progress()
    saved_at = time.monotonic()
    with ThreadPoolExecutor(1) as ahead:
        try:
            future = ahead.submit(next, upcoming, None)
            while not writer.full() and (read := future.result()):
                future = ahead.submit(next, upcoming, None)
                batch, place["state"] = read
                documents = [item for item in batch if isinstance(item, Document)]
                writer.write(batch, encoder.encoded(documents, source.chat))
                if time.monotonic() - saved_at > SAVE_SECONDS:
                    writer.sync()
                    record.save(source=place)
                    saved_at = time.monotonic()
                progress.show(time_left.line(place))
        finally:
            reader.stopped.set()  # the thread that reads ahead need not wait for a lost connection
    writer.close()
    progress.done(summary(source, place, encoder.counts))
    entry = dict(name=source.name, language=source.language, kind=source.kind, origin=source.origin,
                 budget=source.budget, skipped=place["skipped"], undecodable=place["undecodable"], text=place["text"])
    if files := source.files_read(place["state"]):
        entry["files"] = files
    return entry | place["splits"]


def batches(reader, seen, chat, budget):
    """Yields (list of what clean() gives, the reader's state after it), for BATCH_BYTES of text at a time.

    Of a small budget less at a time, so that not much more is read than it needs.
    """
    batch, size = [], 0
    full = min(BATCH_BYTES, budget or BATCH_BYTES)
    for item in clean(reader, seen, chat):
        batch.append(item)
        if isinstance(item, Document):
            size += len(item.utf8)
        if size > full or len(batch) > BATCH_ROWS:
            yield batch, reader.state
            batch, size = [], 0
    yield batch, reader.state


class Encoder:
    """Turns documents into tokens. It is the same for all sources of a folder."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.encode = fast_encoder(tokenizer)
        self.bos, self.eos = (np.array([i], np.uint32) for i in bos_eos(tokenizer))
        self.counts = TokenCounts(tokenizer)
        self.dtype = token_dtype(vocabulary_size(tokenizer))

    def encoded(self, documents, chat):
        """Yields an EncodedDocument for each document: <|bos|> text <|eos|>, or a chat as encode_chats() frames it."""
        if chat:
            pairs = encode_chats([document.messages for document in documents], self.encode, chat_ids(self.tokenizer))
        else:
            all_ids = self.encode([document.text for document in documents])
            pairs = ((np.concatenate((self.bos, ids, self.eos)), None) for ids in all_ids)
        for document, (ids, mask) in zip(documents, pairs):
            # what frames a text may also be the tokenizer's token for unknown text
            texts, bare = [document.text], ids[1:-1]
            if chat:
                texts, bare = [text for _, text in document.messages], ids
            yield EncodedDocument(document, ids, mask, self.counts.of(texts, len(document.utf8), bare))


class TimeLeft:
    """How fast the encoding of a source goes, and about how long it still takes."""

    def __init__(self, source, total_bytes, place):
        self.source = source
        self.total_bytes = total_bytes  # None if nobody knows
        self.bytes_at_start = place["seen_bytes"]
        self.started = time.monotonic()
        self.first_fraction = None  # how much was done after the first batch

    def line(self, place):
        """The line of progress at this place."""
        seen_bytes, tokens = place["seen_bytes"], place["splits"]["train"]["tokens"]
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (seen_bytes - self.bytes_at_start) / seconds
        line = f"{self.source.name:<12} {seen_bytes / 1e6:,.1f} MB, {tokens / 1e6:,.1f}M tokens, {rate / 1e6:.1f} MB/s"

        # The source ends with its budget or with its text, whichever comes first
        of_budget = tokens / self.source.budget if self.source.budget else 0
        of_text = seen_bytes / self.total_bytes if self.total_bytes else 0
        fraction = max(of_budget, of_text)
        if self.first_fraction is None:
            self.first_fraction = fraction
        if fraction > self.first_fraction:
            left = seconds * (1 - fraction) / (fraction - self.first_fraction)
            line += f", {clock(left)} left"
        return line


def summary(source, place, counts):
    """The line that stays on the terminal when a source is done."""
    train, val = place["splits"]["train"], place["splits"]["val"]
    documents = train["documents"] + val["documents"]
    line = (f"{source.name:<12} {place['seen_bytes'] / 1e6:,.1f} MB, {documents:,} documents: "
            f"{train['tokens']:,} training and {val['tokens']:,} validation tokens")
    if counts.knows_unknown:
        unknown, pieces = train["unknown"] + val["unknown"], train["tokens"] + val["tokens"]
        if counts.leaves_out:  # there is no token for what is unknown
            pieces += unknown
        line += f", {unknown / max(1, pieces):.2%} unknown"
    if place["undecodable"]:
        line += f", {place['undecodable']:,} undecodable bytes (see --encoding)"
    return line + why_skipped(place["skipped"])


def finish(part, folder, asked, record):
    """Writes meta.json, removes what only the work needed, and gives the folder its name."""
    text = (part / "tokenizer.json").read_text(encoding="utf-8")
    vocab_size = vocabulary_size(load_tokenizer(text))
    sources = record.data["done"]
    meta = dict(
        format=1,
        dtype=token_dtype(vocab_size).name,
        vocab_size=vocab_size,
        tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(),
        settings=asked,
        sources=sources)
    with replacing(part / "meta.json") as f:  # a path may hold bytes that are no characters: JSON has escapes for them
        f.write(json.dumps(meta, indent=1, ensure_ascii=False).encode(errors="backslashreplace"))

    keep = {"tokenizer.json", "meta.json"} | {entry["file"] for entry, _, _ in token_files(sources)}
    for path in own_files(part):  # others are progress.json, hashes, and what a run left that was stopped
        if path.name not in keep:
            path.unlink()
    part.rename(folder)
