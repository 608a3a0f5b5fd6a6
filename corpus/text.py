"""Documents: where they come from, and what becomes of them before they are encoded.

A TextSource is something that one can read text from: a file or folder here, one of corpus/pydocs.py's sets, or a data
set of corpus/hub.py. Its reader() goes over the texts (or over the rows of chats) one by one and always knows how far
it is, so that a run that was stopped can be resumed. clean() turns what was read into Documents. For an empty text, a
row that is no chat, or an exact duplicate, it yields the reason instead.

Each Document carries a hash of its text. The hash decides whether it is training or validation text, so the split does
not depend on the order of files or on what is added later.
"""
import argparse
import ast
import copy
import hashlib
import itertools
import json
import math
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common import UserError, mended, nearest, number
from corpus.chats import NoChat, chat_columns, chat_messages, is_chat
from corpus.files import (
    SUFFIXES, TEXT_SUFFIXES, json_rows, open_text, parquet_rows, parquet_shape, parquet_texts, readable_files,
    suffix_of,
)
from corpus.samples import begun, drawn_order, in_turns, wanted_for
from corpus.tokenizer import PIECE


# ---------------------------------------------------------------------------------------------------- sources

@dataclass
class TextSource:
    name: str  # in file names and tables
    language: str
    kind: str  # web, wiki, books, code, math, chat or text
    origin: dict  # where the text came from, for meta.json
    documents: object = None  # () -> iterator over texts or chats, always the same ones
    budget: int = 0  # training tokens to take; 0: all
    chat: bool = False  # the texts are chats: rows that chat_messages() reads, or Documents

    def reader(self, state=None, wanted=None):
        """Goes over the texts, from `state` on. wanted: how much text is needed, if not what the budget says."""
        return Reader(self.documents, state)

    def local_files(self):
        """The files here that the text is read from."""
        return []

    def stamp(self):
        """When a local file was last changed, its contents, name or rights, in nanoseconds."""
        times = [(stat.st_mtime_ns, stat.st_ctime_ns) for stat in map(os.stat, self.local_files())]
        return max(map(max, times), default=0)

    def files_read(self, state):
        """For a sample of some of the files: the names of those that were read until `state`. Else None."""
        return None


class Reader:
    """Goes over the texts or chats of a source.

    state: how far it is, in a form that JSON can keep; a new Reader continues from there. Here it is the number of
    texts that were read. They are read again and skipped, which costs little compared to encoding them.
    """

    def __init__(self, documents, state=None):
        self.state = state or 0
        self.stopped = threading.Event()  # set when nobody waits for more texts; a reader of the Hub looks at it
        self.texts = itertools.islice(documents(), self.state, None)

    def __iter__(self):
        for text in self.texts:
            self.state += 1
            yield text


# ---------------------------------------------------------------------------------------------------- documents

@dataclass
class Document:
    text: str  # for the tokenizer to learn from; of a chat, its texts in lines one below the other
    utf8: bytes  # the text alone
    hash: int  # 64 bits; decides what the tokenizer learns from, and finds duplicates
    split_hash: int  # 64 bits; decides between training and validation text
    messages: list = None  # of a chat: [(role, text)]
    undecodable: int = 0  # bytes of its text that stand for no character


def text_hash(utf8):
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")


def chat_document(messages, split_hash=None):
    """A tidy chat, [(role, text)], as a Document.

    Its hash covers the roles too. The same hash decides the split, unless the caller names another one.
    """
    mended_texts = [without_halves(text) for _, text in messages]
    messages = [(role, text) for (role, _), (text, _) in zip(messages, mended_texts)]
    texts = [text for text, _ in mended_texts]
    own = text_hash(json.dumps(messages).encode())
    if split_hash is None:
        split_hash = own
    undecodable = sum(n for _, n in mended_texts)
    return Document("\n".join(texts), "".join(texts).encode(), own, split_hash, messages, undecodable)


def without_halves(text):
    """The text as UTF-8 can hold it, and how many halves of surrogate pairs became U+FFFD.

    Such a half is what corpus/files.py makes of a byte that cannot be decoded. JSON can bring others.
    """
    whole = mended(text)
    if whole is text:
        return text, 0
    return whole, whole.count("\ufffd") - text.count("\ufffd")


class Seen:
    """Remembers the hashes of the last 4 to 8 million documents. Memory is bounded: a gigabyte at the very most."""
    LIMIT = 2 ** 22

    def __init__(self, hashes=()):
        self.new = set()
        self.old = set()
        for h in hashes:
            self.add(h)

    def add(self, h):
        """Remembers the hash h; returns whether it is new."""
        if h in self.new or h in self.old:
            return False
        if len(self.new) >= self.LIMIT:
            self.old, self.new = self.new, set()
        self.new.add(h)
        return True


SKIPPED = ("empty", "not text", "duplicate")  # why a text is left out


def clean(texts, seen=None, chat=False):
    """Turns texts (with `chat`, rows of chats) into Documents.

    For each text or row it yields a Document, or a str that says why there is none: one of SKIPPED, or the text of a
    NoChat. seen: a Seen that finds duplicates; None: they stay.
    """
    for text in texts:
        found = chat_or_reason(text) if chat else text_or_reason(text)
        if isinstance(found, Document) and seen is not None and not seen.add(found.hash):
            found = "duplicate"
        yield found


def chat_or_reason(row):
    if isinstance(row, Document):
        return row
    try:
        return chat_document(chat_messages(row))
    except NoChat as e:
        return str(e)


def text_or_reason(text):
    if text is None:
        return "empty"
    if not isinstance(text, str):
        return "not text"
    text = without_marks(text)
    if not text.strip():
        return "empty"
    text, undecodable = without_halves(text)
    utf8 = text.encode()
    own = text_hash(utf8)
    return Document(text, utf8, own, own, undecodable=undecodable)


def without_marks(text):
    """An article of wiki40b (Guo et al. 2020) without the words that mark its structure; any other text as it is.

    Empty lines set headings and paragraphs apart instead. Some files hold the article as Python writes bytes, b'...'.
    An article of that form that is damaged is also taken as it is.
    """
    if not re.match(r"""(?:b["'])?(?:\\n|\s)*_START_ARTICLE_""", text[:1000]):
        return text
    if text.startswith("b"):
        try:
            text = ast.literal_eval(text).decode()
        except (ValueError, SyntaxError):
            return text
    text = re.sub(r"\s*_START_(?:ARTICLE|SECTION|PARAGRAPH)_\s*", "\n\n", text)
    return text.replace("_NEWLINE_", "\n").strip()


# ---------------------------------------------------------------------------------------------------- layouts

LOOK = 20  # rows or lines from which a file's layout is judged


class Layout(NamedTuple):
    """How the rows of a file are to be read."""
    chat: bool  # whether they are chats
    column: str  # the one that holds the text, or TinyChat's line; empty: the whole row is a chat


class NoColumn(UserError):
    """There is no column of the name that was asked for, or none that holds text or chats."""


def layout_of(where, rows, names, column):
    """The Layout of rows, judged by most of them; those that say nothing, such as one of nulls, do not count.

    rows: some of them, as dicts. names: their columns. column: the one that the user named, which then holds text.
    Raises NoColumn, which says `where` the rows are.
    """
    text_column = column or next((name for name in ("text", "content") if name in names), "")
    found = Counter()
    for row in rows:
        text = row.get(text_column)
        if not column and is_chat(row):
            found[Layout(chat=True, column="")] += 1
        elif isinstance(text, str):
            found[Layout(chat=not column and is_chat(text), column=text_column)] += 1
    if found:
        return found.most_common(1)[0][0]
    if not text_column and chat_columns(names):
        return Layout(chat=True, column="")
    there = ", ".join(map(repr, names))
    if text_column not in names:
        raise NoColumn(f"{where} has no column {text_column or 'text'!r}, it has {there}; choose one with --column")
    if column and any(row.get(column) is not None for row in rows):  # of another one, what is no text is counted
        raise NoColumn(f"{where} holds no text in its column {text_column!r}, it has {there}; choose one with --column")
    return Layout(chat=False, column=text_column)


def file_layout(path, column, encoding):
    """The Layout of a file, judged by its first rows or lines; None if there are none. Raises UserError as above."""
    suffix = suffix_of(path)
    if suffix in TEXT_SUFFIXES:
        with open_text(path, encoding) as f:
            lines = f.read(PIECE).splitlines(keepends=True)
        chats = [is_chat(line) for line in itertools.islice(instruction_lines(lines), LOOK)]
        return Layout(chat=not column and sum(chats) * 2 > len(chats), column="") if chats else None

    if suffix == ".parquet":
        names, n_rows = parquet_shape(path)
        if n_rows == 0:
            return None
        telling = [name for name in names if name in (column, "text", "content", *chat_columns(names))]
        rows = []
        if len(telling) == 1:
            rows = [{telling[0]: value} for value in itertools.islice(parquet_texts(path, telling[0]), LOOK)]
        elif telling:
            rows = list(itertools.islice(parquet_rows(path, telling), LOOK))
    else:
        first = list(itertools.islice(json_rows(path, encoding), LOOK))
        rows = [row for row in first if isinstance(row, dict)]
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not first:
            return None
        if not rows:
            raise UserError(f"{path} {'item' if suffix == '.json' else 'line'} 1 is not a JSON object")
    return layout_of(path, rows, names, column)


# ---------------------------------------------------------------------------------------------------- reading files

def file_texts(path, layout, encoding, limit):
    """The texts or the rows of chats in a file of this layout. limit: see text_documents()."""
    suffix = suffix_of(path)
    if suffix in TEXT_SUFFIXES and layout.chat:
        with open_text(path, encoding) as f:
            yield from instruction_lines(f)
    elif suffix in TEXT_SUFFIXES:
        yield from text_documents(path, limit, encoding)
    elif suffix == ".parquet" and layout.column:
        yield from parquet_texts(path, layout.column)
    elif suffix == ".parquet":
        yield from parquet_rows(path, chat_columns(parquet_shape(path)[0]))
    else:
        for row in json_rows(path, encoding):
            yield row.get(layout.column) if layout.column and isinstance(row, dict) else row


def text_documents(path, limit=PIECE, encoding=""):
    """The text of a file, in documents of at most `limit` characters.

    A document ends after a paragraph; if none ends in its second half, after a line; if none, after a word. See
    open_text() for line ends and encodings.
    """
    rest = ""
    with open_text(path, encoding) as f:
        while read := f.read(PIECE):
            rest += read
            while len(rest) > limit:
                cut = last_break(rest, limit)
                yield rest[:cut]
                rest = rest[cut:]
    yield rest


def cut_documents(text, limit=PIECE):
    """The documents of a text that is in memory, cut as text_documents() does it."""
    at = 0
    while len(text) - at > limit:
        end = at + last_break(text[at:at + limit], limit)
        yield text[at:end]
        at = end
    yield text[at:]


def last_break(text, limit):
    """Where to cut a text that is longer than `limit`: an index from limit // 2 to limit."""
    for end in ("\n\n", "\n", " "):
        i = text.rfind(end, limit // 2, limit)
        if i >= 0:
            return i + len(end)
    return limit


def instruction_lines(lines):
    """Joins the lines of a Llama-2 chat, from its <s> to its </s> or from <<SYS>> to [/INST]. Yields no empty line."""
    chat = []
    for line in lines:
        if chat and (line.startswith("<s>") or len(chat) >= 10_000):  # the chat before it has no end
            yield "".join(chat)
            chat = []
        if not chat and not line.strip():
            continue
        chat.append(line)
        begin = chat[0].lstrip()
        open_document = begin.startswith("<s>") and not line.rstrip().endswith("</s>")
        open_system = "<<SYS>>" in begin and not any("[/INST]" in part for part in chat)
        if not open_document and not open_system:
            yield "".join(chat)
            chat = []
    if chat:
        yield "".join(chat)


# ---------------------------------------------------------------------------------------------------- what users name

def split_budget(word):
    """'novels@it/books:50M' -> ('novels@it/books', 50000000), and without a budget -> (word, None); 0 means all.

    Raises UserError if the budget is not a whole number.
    """
    m = re.fullmatch(r"(.+):(\d[\d_,.]*[KMB]?)", word, re.I)
    if m is None or os.path.exists(word):  # a file's name may end like a budget
        return word, None
    try:
        return m[1], number(m[2])
    except argparse.ArgumentTypeError as e:
        raise UserError(f"the budget behind {m[1]}: {e}") from None


def split_label(word):
    """'novels@it/books' -> ('novels', 'it', 'books'), with '' for what is not given."""
    name, at, label = word.rpartition("@")
    if not at or os.path.exists(word):  # a file's name may have an @ in it
        return word, "", ""
    language, _, kind = label.partition("/")
    return name, language, kind


@dataclass
class LocalSource(TextSource):
    """A file or folder here."""
    layouts: dict = field(default_factory=dict)  # path -> its Layout
    root: Path = None  # the folder, or that of the file
    encoding: str = ""  # of files without a byte order mark
    left_out: Counter = field(default_factory=Counter)  # kind of file -> how many are there and not read
    seed: int = 0  # draws the order of the files

    def is_sample(self):
        """Whether a budget may end before several files do, so that all are to give some of it: a token has a byte of
        text at least, and a byte of a compressed file seldom holds more than ten."""
        return len(self.layouts) > 1 and 0 < self.budget < 10 * self.origin["file_bytes"]

    def reader(self, state=None, wanted=None):
        # one short file must still give documents for both splits
        limit = PIECE
        if self.origin["files"] == 1:
            limit = min(PIECE, max(1024, self.origin["file_bytes"] // 32))

        paths = {path.relative_to(self.root).as_posix(): path for path in self.layouts}
        names, portion = list(paths), math.inf
        if self.is_sample():
            names = drawn_order(names, self.seed)
            portion = wanted_for(self.budget).first_portion(len(names))

        def read(name, n):
            n = n or 0
            texts = file_texts(paths[name], self.layouts[paths[name]], self.encoding, limit)
            for i, text in enumerate(itertools.islice(texts, n, None), n + 1):
                yield text, i
        return FilesReader(names, portion, read, state)

    def local_files(self):
        return list(self.layouts)

    def files_read(self, state):
        return list(state["files"]) if self.is_sample() else None


class FilesReader:
    """Goes over the texts of files as in_turns() does. A state tells how many texts of each file were read."""

    def __init__(self, names, portion, read, state):
        self.place = state or begun()
        self.stopped = threading.Event()
        self.texts = in_turns(names, portion, self.place, read)

    def __iter__(self):
        return self.texts

    @property
    def state(self):
        return copy.deepcopy(self.place)


def local_source(word, column, known=(), encoding="", seed=0):
    """A file or folder as a LocalSource. word: PATH, or PATH@language/kind.

    column: the one that holds the text of a row; empty: text or content, unless the rows are chats. encoding: see
    open_text(). known: the names of other sources, to guess what the user meant. Raises UserError if there is nothing
    that can be read.
    """
    path, language, kind = split_label(word)
    if not os.path.exists(path):
        hint = nearest(word, known) or ", such as pydocs, which needs no network"
        raise UserError(f"{word!r} is neither a file or folder here, nor a corpus of --list, "
                        f"nor ORG/NAME of the Hugging Face Hub{hint}")
    path = Path(path)
    files, left_out = readable_files(path)
    if not files:
        what = "holds no" if path.is_dir() else "is not a"
        raise UserError(f"{path} {what} file that prepare.py reads ({', '.join(SUFFIXES)})")
    layouts, problems = {}, []
    for p in files:
        try:
            layouts[p] = file_layout(p, column, encoding)
        except NoColumn as e:  # a mix of chats and text is the more useful error, so this one waits
            problems.append(e)
    chats = [p for p, layout in layouts.items() if layout and layout.chat]
    texts = [p for p, layout in layouts.items() if layout and not layout.chat]
    if chats and texts:
        raise UserError(f"{path} holds chats ({chats[0].name}) as well as text ({texts[0].name}); "
                        "name them one by one, or read all as text with --column")
    if problems:
        raise problems[0]
    return LocalSource(
        name=source_name(path),
        language=language or "und",  # undetermined, in ISO 639
        kind=kind or ("chat" if chats else "text"),
        origin={"path": str(path), "files": len(files), "file_bytes": sum(p.stat().st_size for p in files)},
        chat=bool(chats),
        layouts={p: layout or Layout(chat=bool(chats), column="") for p, layout in layouts.items()},
        root=path if path.is_dir() else path.parent,
        encoding=encoding,
        left_out=left_out,
        seed=seed,
    )


def source_name(path):
    """The name of a file without its suffix, or of a folder, with _ for characters that file names should not have."""
    name = path.resolve().name
    if path.is_file():
        name = path.name[:len(path.name) - len(suffix_of(path))]
    return re.sub(r"[^\w-]+", "_", name)
