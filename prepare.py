"""Text in, token files out: `python prepare.py NAME...` writes a folder that train.py can read, and nanoGPT too if the
files are renamed.

NAME is one of these. A budget of training tokens may follow it, after a colon (`finemath:50M`), unless it is a mix:

    pydocs           this Python's own library and help topics, with nothing to download
    pydocs-chat      questions and answers about that library
    finemath, ivme   a data set of the Hugging Face Hub that is known here, or a mix of them: `python prepare.py --list`
    ORG/NAME         any other data set of the Hub, with --config, --split and --column where they are needed
    PATH             a file or folder of yours with texts or chats (.txt, .md, .jsonl, .jsonl.gz, .json, .parquet)

PATH and ORG/NAME take a language and a kind after an @: `novels_it@it/books:50M`. Several names become several
sources of one corpus. Each has files of its own, and one tokenizer learns from them all. data/NAME-TOKENIZER holds:

    tokenizer.json                  a file of the Hugging Face `tokenizers` library
    train.<i>-<source>.bin, val...  raw little-endian uint16 token ids (uint32 if the vocabulary is larger than 65,536),
                                    documents as <|bos|> text <|eos|> (for gpt2, <|endoftext|> is both)
    train.<i>-<source>.mask.bin     only for chats, and val...: a byte per token, 1 for a reply's, see encode_chats()
    meta.json                       the settings and where the text is from; counts, sizes and checksums of the files

The input is read as a stream, twice: first for a sample of the text, from which the tokenizer learns (of a Hub data set
only a part is read for that), then to encode it. Memory is bounded, whatever the size of the input: the hashes that
tell duplicates need a gigabyte at most. If the program is stopped while it encodes, the same command resumes the work,
and the result is the same to the byte. If two of them make the same folder, one waits for the other. A budget that
needs only a part of a set of files takes parts from all over it: of 64 files at least, or of all if there are fewer.

Exact duplicates within a source are left out; each document is compared with the last 4 million at least. Whether a
document is training or validation text depends on the hash of its text alone, not on the order of files or on what is
added later. There is one exception: if the hashes of all documents of a source fall below val_fraction, or none does,
the threshold moves until each split has a document (with a val_fraction of 0, all of it is training text). A chat of
pydocs-chat goes where its module's source goes in pydocs.
"""
import dataclasses
import hashlib
import heapq
import itertools
import json
import math
import os
import shlex
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Progress, UserError, clock, nearest, parse_flags, replacing, run_tool
from corpus.catalogue import HUB, MIXES, list_table
from corpus.chats import chat_ids, encode_chats
from corpus.counts import TokenCounts
from corpus.describe import is_reused, show
from corpus.files import check_encoding
from corpus.folder import (
    EncodedDocument, SourceWriter, alone, check_tokens, corpus_name, new_place, own_files, read_meta, token_dtype,
    token_files,
)
from corpus.foreign import LARGEST_VOCABULARY
from corpus.hub import HubSource, find_source, hub_name, hub_revision, hub_setup, hub_source
from corpus.pydocs import EMBEDDED
from corpus.samples import Wanted
from corpus.text import Document, LocalSource, Seen, clean, local_source, split_budget, split_label
from corpus.tokenizer import (
    DEFAULT_VOCAB, READY, SPECIAL_TOKENS, TRAINERS, bos_eos, byte_of_character, fast_encoder, load_tokenizer,
    read_tokenizer, tokenizer_text, train_hybrid, vocabulary_size,  # train_hybrid: for those who import it from here
)


@dataclass
class Settings:
    out_dir: str = "data"  # folder in which the prepared folder is made
    name: str = ""  # the prepared folder's name; empty: NAME-TOKENIZER
    tokenizer: str = "bpe"  # bpe, hybrid, chunk or gpt2, or a tokenizer.json or checkpoint whose tokenizer is reused
    vocab_size: int = 0  # tokens in a new tokenizer's vocabulary; 0: bpe 16,384, hybrid 2,111, chunk 4,466
    max_tokens: int = -1  # training tokens of each source without a :BUDGET, also in a mix; 0: all; -1: as --list says
    val_fraction: float = 0.05  # fraction of the documents that become validation text
    column: str = ""  # field that holds the text of a row; empty: text or content, and rows of chats are chats
    encoding: str = ""  # encoding of your text files, such as cp1252; empty: UTF-8, and what their first bytes tell
    config: str = ""  # configuration of the data sets that are given as ORG/NAME; empty: their only or default one
    split: str = "train"  # split of the data sets that are given as ORG/NAME
    source_dir: str = ""  # read the Hub's data sets from copies of them here: DIR/ORG/NAME, DIR/NAME, or DIR itself
    seed: int = 0  # draws which part of a large set a budget takes, and the order of the Hub's documents
    list: bool = False  # show the data sets and mixes that can be named, and nothing else
    show: str = ""  # check and describe this prepared folder, and nothing else
    verify: str = ""  # check whether the files of this prepared folder are as they were written, and nothing else


SAMPLE_BYTES = 32 * 2 ** 20  # text that a tokenizer learns from, shared equally by the sources
HUB_SCAN = 2 ** 20  # bytes of a Hub data set that the first pass reads at least
BATCH_BYTES = 4 * 2 ** 20  # text that is encoded at once: enough to keep every core busy, and little memory
BATCH_ROWS = 100_000  # rows that are encoded at once at most
WITHOUT_TEXT = 100_000  # rows without a document at the beginning, after which no more are read
LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255, and the lock beside it has a longer one
SAVE_SECONDS = 10  # between two records of how far the work is

LOWERCASE_ASCII = 95 - 26 + 2  # characters of ASCII without capitals: the printable ones, tab and line end


# ---------------------------------------------------------------------------------------------------- the whole of it

def prepare(names, s):
    """Prepares the corpora `names` as Settings s says, and returns the folder.

    A folder that was made with the same settings is left as it is. Raises UserError for a mistake in the names or the
    settings, for input that cannot be read, and if the folder was made with other settings.
    """
    check_settings(names, s)
    tokenizer_plan = plan_tokenizer(s)
    sources = plan_sources(names, s)
    if tokenizer_plan.tokenizer is not None and any(source.chat for source in sources):
        chat_ids(tokenizer_plan.tokenizer)  # raises UserError if it lacks the tokens of the roles
    asked = settings_asked(sources, tokenizer_plan, s)

    words = [split_budget(name)[0] for name in names]
    folder = Path(s.out_dir) / (s.name or corpus_name(words, s.tokenizer, tokenizer_plan.vocab_size))
    if len(os.fsencode(folder.name)) > LONGEST_NAME:
        raise UserError(f"the name of the prepared folder would be made of {len(names)} names and be too long: give "
                        "--name, or name the folder that holds the files, which makes them one source")
    if not folder.exists():
        with alone(folder):
            if not folder.exists():  # another process may have made it in the meantime
                make(folder, sources, tokenizer_plan, s.val_fraction, asked)
                return folder
    check_made_alike(folder, asked, sources)
    return folder


def make(folder, sources, tokenizer_plan, val_fraction, asked):
    """Makes the folder, or goes on with what was begun. `asked`: the settings as meta.json keeps them."""
    # The work is done in a hidden folder, which is renamed at the end: a folder that exists is whole
    part = folder.with_name(f".{folder.name}.part")
    own_files(part)  # raises UserError if somebody else's are there
    stamps = stamps_of(sources)
    record = Record(part, asked | dict(stamps=stamps))
    choose_revisions(sources, record)
    if record.resumed:
        done = len(record.data["done"])
        Progress().done(f"resuming     {part} holds {done} of {len(sources)} sources and perhaps a part of the next")
    else:
        first_pass(sources, tokenizer_plan, val_fraction, part, record)
    second_pass(sources, part, record)

    for source, before, after in zip(sources, stamps, stamps_of(sources)):
        if before != after:
            raise UserError(f"the text of {source.name} was changed while it was read; run the same command again")
    finish(part, folder, asked, record)


def stamps_of(sources):
    """Where the local text of each source is, and when it was changed. Work on other text is not resumed."""
    return [[source.stamp(), *map(os.path.abspath, source.local_files()[:1])] for source in sources]


# ---------------------------------------------------------------------------------------------------- what is asked for

def check_settings(names, s):
    """Raises UserError for names and numbers that make no sense."""
    if not names:
        raise UserError(f"name what to prepare: {', '.join(EMBEDDED)}, a data set or mix of --list, ORG/NAME for any "
                        "other data set of the Hugging Face Hub, or a file or folder of yours")
    if not 0 <= s.val_fraction < 1:
        raise UserError(f"--val_fraction={s.val_fraction} is not a fraction from 0 up to 1")
    if s.max_tokens < -1 or s.vocab_size < 0 or s.seed < 0:
        raise UserError("--max_tokens must be -1 or more, --vocab_size and --seed 0 or more")
    if s.vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"--vocab_size={s.vocab_size} is more than {LARGEST_VOCABULARY:,}")
    if s.encoding:
        check_encoding(s.encoding)


def plan_sources(names, s):
    """The names as sources with their budgets: one for each name, and for a mix one for each of its parts."""
    budgets = dict(map(split_budget, names))
    if len(budgets) < len(names):
        raise UserError("a name is given twice; one source is made of each")
    if s.config and not any(is_of_the_hub(name) for name in budgets):
        known = [name for name in budgets if name in HUB or name in MIXES]
        why = f"; {known[0]} has a configuration of its own" if known else ""
        raise UserError(f"--config is for data sets that are given as ORG/NAME{why}")
    if s.split != Settings.split and not any(is_of_the_hub(name) for name in budgets):
        raise UserError("--split is for data sets that are given as ORG/NAME")
    if s.encoding and not any(map(is_local, budgets)):
        raise UserError("--encoding is for files of yours")
    if s.column and not any(is_local(name) or is_of_the_hub(name) for name in budgets):
        raise UserError("--column is for files of yours, and for data sets that are given as ORG/NAME")
    if s.source_dir and not any(name in HUB or name in MIXES or is_of_the_hub(name) for name in budgets):
        raise UserError("--source_dir is for data sets of the Hugging Face Hub")

    # What the user wrote after a name decides first, then --max_tokens, then what the mix or the catalogue says
    asked = None if s.max_tokens < 0 else s.max_tokens
    sources = []
    for name, own in budgets.items():
        if name not in MIXES:
            source = make_source(name, s, several=len(budgets) > 1)
            sources.append(with_budget(source, own, asked))
            continue
        if own is not None:
            raise UserError(f"the sources of {name} have budgets of their own; "
                            "--max_tokens gives all of them another one")
        parts = MIXES[name][1]
        for part, budget in parts:
            source = make_source(part, s, several=len(budgets) > 1 or len(parts) > 1)
            sources.append(with_budget(source, asked, budget))
    return sources


def make_source(name, s, several):
    """One name as a source. UserError if there is no such thing. several: whether there are other sources beside it."""
    if name in EMBEDDED:
        return EMBEDDED[name]()
    if name in HUB:
        return hub_source(name, s.source_dir, several, s.seed)
    if is_of_the_hub(name):
        return find_source(name, s.config, s.split, s.column, s.source_dir, several, s.seed)
    return local_source(name, s.column, (*EMBEDDED, *HUB, *MIXES), s.encoding, s.seed)


def is_local(name):
    """Whether this is a file or folder, or is taken for one."""
    return not (name in EMBEDDED or name in HUB or name in MIXES or is_of_the_hub(name))


def is_of_the_hub(name):
    """Whether this is ORG/NAME, with @language/kind perhaps, and no file or folder here."""
    path, _, _ = split_label(name)
    return not os.path.exists(path) and hub_name(name) is not None


def with_budget(source, *choices):
    """The source with the first budget that is not None; otherwise it keeps its own."""
    for budget in choices:
        if budget is not None:
            return dataclasses.replace(source, budget=budget)
    return source


class TokenizerPlan(NamedTuple):
    """The tokenizer that was asked for."""
    label: str  # what meta.json's settings say: its kind, or the checksum of the text of an existing one
    vocab_size: int  # of a new one; 0 if it exists
    tokenizer: object = None  # the existing tokenizer; None if it is to be trained
    text: str = ""  # its tokenizer.json


def plan_tokenizer(s):
    """Checks --tokenizer and --vocab_size, and loads the tokenizer if it exists. Raises UserError for a mistake."""
    if s.tokenizer in TRAINERS:
        vocab_size = s.vocab_size or DEFAULT_VOCAB[s.tokenizer]
        check_vocab_size(s.tokenizer, vocab_size)
        return TokenizerPlan(s.tokenizer, vocab_size)

    kinds = [*TRAINERS, *READY]
    if s.tokenizer not in READY and not os.path.isfile(s.tokenizer):
        hint = nearest(s.tokenizer, kinds)
        raise UserError(f"--tokenizer={s.tokenizer} is neither {' nor '.join(kinds)} nor a file{hint}")
    if s.vocab_size:
        raise UserError("--vocab_size belongs to a new tokenizer, and --tokenizer names an existing one")
    if s.tokenizer in READY:
        tokenizer = READY[s.tokenizer]()
        return TokenizerPlan(s.tokenizer, 0, tokenizer, tokenizer.to_str(pretty=True))
    tokenizer = load_tokenizer(s.tokenizer)
    text = read_tokenizer(s.tokenizer).to_str(pretty=True)
    return TokenizerPlan(tokenizer_checksum(s.tokenizer), 0, tokenizer, text)


def check_vocab_size(kind, vocab_size):
    """Raises UserError if a new tokenizer of this kind needs a larger vocabulary."""
    if kind == "chunk":
        least = 4 * LOWERCASE_ASCII
        if vocab_size < least:
            raise UserError(f"--vocab_size={vocab_size} is too small: a quarter of it is for single characters, and "
                            f"ASCII without capitals has {LOWERCASE_ASCII} of them; take at least {least}")
        return
    least = len(SPECIAL_TOKENS) + len(byte_of_character())
    if vocab_size < least:
        raise UserError(f"--vocab_size={vocab_size} is too small: the special tokens and the bytes alone are {least}")


def tokenizer_checksum(path):
    """The sha256 of a tokenizer.json, or of the text of one that a checkpoint holds."""
    content = tokenizer_text(path).encode() if path.endswith(".pt") else Path(path).read_bytes()
    return hashlib.sha256(content).hexdigest()


def settings_asked(sources, tokenizer_plan, s):
    """The settings that meta.json keeps: everything that the folder's contents depend on."""
    entries = []
    for source in sources:
        entry = dict(name=source.name, language=source.language, kind=source.kind, **source.origin)
        if source.budget != max(0, s.max_tokens):
            entry["budget"] = source.budget
        entries.append(entry)
    asked = dict(sources=entries, tokenizer=tokenizer_plan.label, vocab_size=tokenizer_plan.vocab_size,
                 max_tokens=max(0, s.max_tokens), val_fraction=s.val_fraction, column=s.column)
    for name in ("encoding", "seed"):  # older folders have neither
        if getattr(s, name):
            asked[name] = getattr(s, name)
    return asked


def check_made_alike(folder, asked, sources):
    """Raises UserError unless the folder, which is there already, was made with the settings `asked` of this text."""
    meta = read_meta(folder)
    made = meta["settings"]
    if made != asked:
        changes = [f"{k} was {made.get(k)!r} and is now {asked.get(k)!r}"
                   for k in made | asked if made.get(k) != asked.get(k)]
        raise UserError(f"{folder} was made with other settings ({', '.join(changes)}); "
                        "give --name for a second one, or delete it")

    # A file that was written to afterwards may be a copy of the old one, so the text itself decides
    made_at = (folder / "meta.json").stat().st_mtime_ns
    for source, entry in zip(sources, meta["sources"]):
        if source.stamp() >= made_at and "text" in entry and text_checksum(source, entry) != entry["text"]["sha256"]:
            raise UserError(f"the text of {source.name} has changed since {folder} was made of it; "
                            "delete the folder to make it anew, or give --name for a second one")
    print(f"{folder} is there already, made with these settings")


def text_checksum(source, entry):
    """The sha256 of the hashes of the different documents of a source, as many as the folder was made of."""
    if isinstance(source, HubSource):
        hub_setup()
    checksum = hashlib.sha256()
    n_documents = entry["text"]["documents"] if source.budget else None
    documents = (item for item in clean(source.reader(), Seen(), source.chat) if isinstance(item, Document))
    for document in itertools.islice(documents, n_documents):
        checksum.update(document.hash.to_bytes(8, "little"))
    return checksum.hexdigest()


def choose_revisions(sources, record):
    """Decides at which commit each data set of the Hub is read: as before, if the work was begun, else the newest."""
    if any(isinstance(source, HubSource) for source in sources):
        hub_setup()
    begun = record.data.get("revisions") or {}
    for stem, source in stems(sources):
        if isinstance(source, HubSource) and not source.folder:
            source.revision = begun.get(stem) or source.revision or hub_revision(source.name, source.hub.repo)
            source.origin = dict(source.origin, revision=source.revision)


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


# ---------------------------------------------------------------------------------------------------- the tool

def next_command(folder, meta, s):
    """The command that trains a model on the folder.

    For a new tokenizer: train the model whose default tokenizer this is. For the tokenizer of an existing model: go on
    training that model, with finetune.py if there are chats.
    """
    data = shlex.quote(f"--data={folder}")
    if is_reused(meta):
        chats = any("mask" in source["train"] for source in meta["sources"])
        tool = "finetune.py" if chats else "train.py"
        checkpoint = s.tokenizer if s.tokenizer.endswith(".pt") else "CHECKPOINT"
        return f"python {tool} {shlex.quote(f'--init_from={checkpoint}')} {data}"

    kind, vocab_size = meta["settings"]["tokenizer"], meta["settings"]["vocab_size"]
    if (kind, vocab_size) == ("bpe", 32_000):
        return f"python train.py --model=gpt2preln {data}"
    model = {"bpe": "ivme", "hybrid": "tinymemory", "chunk": "i3", "gpt2": "gpt2preln-gpt2"}[kind]
    command = f"python train.py --model={model} {data}"
    if vocab_size not in (0, DEFAULT_VOCAB[kind]):
        command += f" --vocab_size={meta['vocab_size']}"
    return command


def main(argv):
    what = (f"{', '.join(EMBEDDED)}, a data set or mix of --list, ORG/NAME for any other data set of the Hub, or a "
            "file or folder of yours; @language/kind may follow the last two, and :TOKENS, a budget, all but mixes")
    given, names = parse_flags(argv, Settings(), description=(__doc__ or "").split("\n")[0], positional=("NAME", what))
    s = Settings(**given)
    if s.list:
        if len(argv) > 1:
            raise UserError("--list goes alone")
        print("\n".join(list_table()))
        return 0
    if names and (s.show or s.verify):
        raise UserError(f"--show and --verify prepare nothing: leave out {' '.join(names)}")
    if s.show:
        show(s.show)
        return 0
    if s.verify:
        check_tokens(s.verify, read_meta(s.verify))
        print(f"{s.verify} is whole: all files have the checksums that meta.json names")
        return 0

    folder = prepare(names, s)
    meta = read_meta(folder)
    files = [entry["file"] for entry, _, _ in token_files(meta["sources"])]
    if len(files) > 6:
        files = [*files[:6], "..."]
    print(f"{folder} holds {' '.join(files)} tokenizer.json meta.json        next: {next_command(folder, meta, s)}")
    return 0


if __name__ == "__main__":
    run_tool(main)
