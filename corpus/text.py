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
import gzip
import hashlib
import itertools
import json
import os
import re
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

from common import UserError, mended, nearest, number
from corpus.chats import CHAT_COLUMNS, NoChat, chat_messages, is_chat
from corpus.tokenizer import PIECE

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")  # of the files that can be read


# ---------------------------------------------------------------------------------------------------- sources

@dataclass
class TextSource:
    name: str  # in file names and tables
    language: str
    kind: str  # web, wiki, books, code, math, chat or text
    origin: dict  # where the text came from, for meta.json
    documents: object  # () -> iterator over texts or chats; called once to sample, once to encode
    budget: int = 0  # training tokens to take; 0: all
    stamp: object = 0  # changes when a local file changes: then work on the old text is not resumed but begun anew
    chat: bool = False  # `documents` gives chats: rows that chat_messages() reads, or Documents

    def reader(self, state=None):
        return Reader(self.documents, state)


class Reader:
    """Goes over the texts or chats of a source.

    state: how far it is, in a form that JSON can keep; a new Reader continues from there. Here it is the number of
    texts that were read. They are read again and skipped: with local text that costs little compared to encoding it.
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


def text_hash(utf8):
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")


def chat_document(messages, split_hash=None):
    """A tidy chat, [(role, text)], as a Document.

    Its hash covers the roles too. The same hash decides the split, unless the caller names another one.
    """
    texts = [text for _, text in messages]
    own = text_hash(json.dumps(messages).encode())
    if split_hash is None:
        split_hash = own
    return Document("\n".join(texts), "".join(texts).encode(), own, split_hash, messages)


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
    text = mended(text)
    utf8 = text.encode()
    own = text_hash(utf8)
    return Document(text, utf8, own, own)


def without_marks(text):
    """An article of wiki40b (Guo et al. 2020) without the words that mark its structure; any other text as it is.

    Empty lines set headings and paragraphs apart instead. Some files hold the article as Python writes bytes, b'...'.
    An article of that form that is damaged is also taken as it is.
    """
    if not re.match(r"""(?:b["'])?(?:\\n|\s)*_START_ARTICLE_""", text):
        return text
    if text.startswith("b"):
        try:
            text = ast.literal_eval(text).decode()
        except (ValueError, SyntaxError):
            return text
    text = re.sub(r"\s*_START_(?:ARTICLE|SECTION|PARAGRAPH)_\s*", "\n\n", text)
    return text.replace("_NEWLINE_", "\n").strip()


# ---------------------------------------------------------------------------------------------------- reading files

def text_documents(path, limit=PIECE):
    """The text of a file, in documents of at most `limit` characters.

    A document ends after a paragraph; if none ends in its second half, after a line; if none, after a word. As in
    Python's text mode, line ends become \\n. A byte order mark is removed, and bytes that are not UTF-8 become U+FFFD.
    """
    rest = ""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        while read := f.read(PIECE):
            rest += read
            while len(rest) > limit:
                cut = last_break(rest, limit)
                yield rest[:cut]
                rest = rest[cut:]
    yield rest


def last_break(text, limit):
    """Where to cut a text that is longer than `limit`: an index from limit // 2 to limit."""
    for end in ("\n\n", "\n", " "):
        i = text.rfind(end, limit // 2, limit)
        if i >= 0:
            return i + len(end)
    return limit


def row_documents(path, column, chat=False):
    """The texts in the rows of a .jsonl, .jsonl.gz or .parquet file; with `chat` the rows themselves, as dicts.

    column: the one that holds the text; empty: text or content. Raises UserError, which names the broken line or the
    missing column.
    """
    if str(path).endswith(".parquet"):
        yield from parquet_documents(path, column, chat)
    else:
        yield from json_documents(path, column, chat)


def parquet_documents(path, column, chat):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if chat:
            names = [name for name in CHAT_COLUMNS if name in columns]
        else:
            names = [text_column(path, columns, column)]
        for batch in file.iter_batches(batch_size=256, columns=names):
            yield from batch.to_pylist() if chat else batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as parquet: {e}") from None


def json_documents(path, column, chat):
    open_text = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", errors="replace") as f:
            for i, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path} line {i} is not a JSON object")
                yield row if chat else row[text_column(path, row, column)]
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} line {i} is not JSON: {e}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is not a whole gzip file: {e}") from None


def text_column(path, columns, wanted):
    """The column to read: the wanted one; if none is named, text or content. UserError if it is not there."""
    name = wanted or next((name for name in ("text", "content") if name in columns), "text")
    if name not in columns:
        there = ", ".join(map(repr, columns))
        raise UserError(f"{path} has no column {name!r}, it has {there}; choose one with --column")
    return name


def chat_rows(path, longest=-1):
    """What chat_messages() reads: the rows of a .jsonl, .jsonl.gz or .parquet file, or the lines of a text file.

    longest: characters of a line that are read at once; -1: all.
    """
    if path.suffix not in TEXT_SUFFIXES:
        yield from row_documents(path, "", chat=True)
        return
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        while line := f.readline(longest):
            if line.strip():
                yield line


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


def local_source(word, column, known=()):
    """A file or folder as a TextSource. word: PATH, or PATH@language/kind.

    column: see row_documents(); if it is named, rows of chats are text too. known: the names of other sources, to
    guess what the user meant. Raises UserError if there is nothing that can be read.
    """
    path, language, kind = split_label(word)
    if not os.path.exists(path):
        hint = nearest(word, known) or ", such as pydocs, which needs no network"
        raise UserError(f"{word!r} is neither a file or folder here, nor a corpus of --list, "
                        f"nor ORG/NAME of the Hugging Face Hub{hint}")
    path = Path(path)
    files = readable_files(path)
    size = sum(p.stat().st_size for p in files)
    chat = not column and all_chats(path, files)

    # one short file must still give documents for both splits
    limit = PIECE
    if len(files) == 1:
        limit = min(PIECE, max(1024, size // 32))

    def documents():
        for p in files:
            if chat:
                yield from chat_rows(p)
            elif p.suffix in TEXT_SUFFIXES:
                yield from text_documents(p, limit)
            else:
                yield from row_documents(p, column)

    return TextSource(
        name=source_name(path),
        language=language or "und",  # undetermined, in ISO 639
        kind=kind or ("chat" if chat else "text"),
        origin={"path": str(path), "files": len(files), "file_bytes": size},
        documents=documents,
        stamp=max(p.stat().st_mtime_ns for p in files),
        chat=chat,
    )


def readable_files(path):
    """The file, or the files in the folder and its subfolders, in the order of their paths; hidden ones are left out.

    Raises UserError if there is none of a kind that can be read.
    """
    files = [path]
    if not path.is_file():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not is_hidden(p.relative_to(path))]
    files = [p for p in files if p.name.endswith(SUFFIXES)]
    if not files:
        what = "holds no" if path.is_dir() else "is not a"
        raise UserError(f"{path} {what} file that prepare.py reads ({', '.join(SUFFIXES)})")
    return files


def is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def all_chats(path, files):
    """Whether the files hold chats, judged by the first row or line of each. Empty files count as neither.

    Raises UserError if some hold chats and others text.
    """
    chats, texts = [], []
    for p in files:
        first = next(chat_rows(p, longest=PIECE), None)
        if first is not None:
            side = chats if is_chat(first) else texts
            side.append(p)
    if chats and texts:
        raise UserError(f"{path} holds chats ({chats[0].name}) as well as text ({texts[0].name}); "
                        "name them one by one, or read all as text with --column")
    return bool(chats)


def source_name(path):
    """The name of a file without its suffix, or of a folder, with _ for characters that file names should not have."""
    name = path.resolve().name
    if path.is_file():
        suffix = max((s for s in SUFFIXES if path.name.endswith(s)), key=len)
        name = path.name.removesuffix(suffix)
    return re.sub(r"[^\w-]+", "_", name)
