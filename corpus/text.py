"""Documents: local files, cleaning, duplicates."""
import argparse
import ast
import contextlib
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

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass
class Source:
    name: str  # in file names and tables
    language: str
    kind: str  # web, wiki, books, code, math, chat or text
    origin: dict  # where the text came from, as meta.json tells it
    documents: object  # () -> iterator of texts or chats; called once for the tokenizer's sample and once to encode
    budget: int = 0  # training tokens to take; 0: --max_tokens
    stamp: object = 0  # changes when a local file is written to, so that a half-made folder is not continued with other text
    chat: bool = False  # `documents` are chats: rows that chat_messages() reads, or Documents

    def reader(self, state=None):
        return Reader(self.documents, state)



@dataclass
class Document:
    text: str  # of a chat its texts one below the other, for the tokenizer to learn from
    utf8: bytes
    hash: int  # 64 bits of the text alone: decides the sample, and finds duplicates
    split_hash: int  # decides the split: `hash`, and for a chat of pydocs-chat that of its module
    messages: list = None  # a chat's [(role, text)]


def text_hash(utf8):
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")


def chat_document(messages, split_hash=None):
    """A tidy chat as a Document. Its messages, roles and all, make its hash; that decides the split too unless there is another."""
    own = text_hash(json.dumps(messages).encode())
    return Document("\n".join(t for _, t in messages), "".join(t for _, t in messages).encode(), own, own if split_hash is None else split_hash, messages)


class Reader:
    """Goes over the texts or chats of a source. `state` is where it is, as JSON can keep it; another Reader goes on from there, here by
    counting: to read local text again costs little beside encoding it."""

    def __init__(self, documents, state=None):
        self.state, self.stopped = state or 0, threading.Event()
        self.texts = itertools.islice(documents(), self.state, None)

    def __iter__(self):
        for text in self.texts:
            self.state += 1
            yield text


class Seen:
    """The hashes of the documents that went by, of the last 4 to 8 million of them: memory is bounded, a gigabyte at the very most."""
    LIMIT = 2 ** 22

    def __init__(self, hashes=()):
        self.new, self.old = set(), set()
        for h in hashes:
            self.add(h)

    def add(self, h):
        """Whether h is new; it is remembered."""
        if h in self.new or h in self.old:
            return False
        if len(self.new) >= self.LIMIT:
            self.old, self.new = self.new, set()
        self.new.add(h)
        return True


def text_documents(path, limit=PIECE):
    """The text of a file in documents of at most `limit` characters, cut behind a paragraph, else a line, else a word.

    Line ends become \\n and a byte order mark goes, as Python's text mode has it; bytes that are no UTF-8 become U+FFFD.
    """
    rest = ""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        while chunk := f.read(PIECE):
            rest += chunk
            while len(rest) > limit:
                cuts = (rest.rfind(end, limit // 2, limit) + len(end) for end in ("\n\n", "\n", " ") if rest.rfind(end, limit // 2, limit) >= 0)
                cut = next(cuts, limit)
                yield rest[:cut]
                rest = rest[cut:]
    yield rest


def row_documents(path, column, chat=False):
    """The texts in the rows of a .jsonl, .jsonl.gz or .parquet file; of chats the rows. UserError names the broken line or the missing column."""
    def pick(columns):
        name = column or next((c for c in ("text", "content") if c in columns), "text")
        if name not in columns:
            raise UserError(f"{path} has no column {name!r}, it has {', '.join(map(repr, columns))}; choose one with --column")
        return name

    if str(path).endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet
        try:
            file = pyarrow.parquet.ParquetFile(path)
            names = [x for x in CHAT_COLUMNS if x in file.schema_arrow.names] if chat else [pick(file.schema_arrow.names)]
            for batch in file.iter_batches(batch_size=256, columns=names):
                yield from batch.to_pylist() if chat else batch.column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path} cannot be read as parquet: {e}") from None
        return
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", errors="replace") as f:
            for i, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path} line {i} is not a JSON object")
                    yield row if chat else row[pick(row)]
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} line {i} is not JSON: {e}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is not a whole gzip file: {e}") from None


def chat_rows(path, longest=-1):
    """The rows of a .jsonl, .jsonl.gz or .parquet file, or the lines of a text file, of at most `longest` characters, for chat_messages() to read."""
    if path.suffix not in (".txt", ".md"):
        yield from row_documents(path, "", chat=True)
        return
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        yield from (line for line in iter(lambda: f.readline(longest), "") if line.strip())


def split_budget(word):
    """'novels@it/books:50M' -> ('novels@it/books', 50000000); None where there is none, 0: all."""
    m = None if os.path.exists(word) else re.fullmatch(r"(.+):(\d[\d_,.]*[KMB]?)", word, re.I)
    try:
        return (m[1], number(m[2])) if m else (word, None)
    except argparse.ArgumentTypeError as e:
        raise UserError(f"the budget behind {m[1]}: {e}") from None


def local_source(word, column, known=()):
    """A file or folder, with `@language/kind` behind it perhaps, as a Source. UserError if nothing readable is there."""
    path, _, label = (word, "", "") if os.path.exists(word) else word.rpartition("@")
    if not path or not os.path.exists(path):
        raise UserError(f"{word!r} is neither a file or folder here nor a corpus of --list{nearest(word, known) or ', such as pydocs, which needs no network'}")
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES)
                                                  and not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not files or not files[0].name.endswith(SUFFIXES):
        raise UserError(f"{path} {'holds no' if path.is_dir() else 'is not a'} file that prepare.py reads ({', '.join(SUFFIXES)})")
    size = sum(p.stat().st_size for p in files)
    # a file of chats is told by its first row or line; one without any is neither
    firsts = {} if column else {p: row for p in files if (row := next(chat_rows(p, longest=PIECE), None)) is not None}
    chats, texts = ([p for p, row in firsts.items() if is_chat(row) == wanted] for wanted in (True, False))
    if chats and texts:
        raise UserError(f"{path} holds chats ({chats[0].name}) as well as text ({texts[0].name}); name them one by one, or read all as text with --column")
    # one short file must still give documents for both splits
    limit = PIECE if len(files) > 1 else min(PIECE, max(1024, size // 32))

    def documents():
        for p in files:
            yield from chat_rows(p) if chats else text_documents(p, limit) if p.suffix in (".txt", ".md") else row_documents(p, column)
    language, _, kind = label.partition("/")
    name = path.name[:-len(next(s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)))] if path.is_file() else path.resolve().name
    return Source(re.sub(r"[^\w-]+", "_", name), language or "und", kind or ("chat" if chats else "text"),
                  {"path": str(path), "files": len(files), "file_bytes": size}, documents, stamp=max(p.stat().st_mtime_ns for p in files), chat=bool(chats))


def wiki40b_text(text):
    """An article of wiki40b (Guo et al. 2020) without the words that mark its structure: headings and paragraphs are set apart by empty
    lines, and where a file holds Python's notation of the bytes, b'...', the text itself."""
    if text.startswith("b"):
        text = ast.literal_eval(text).decode()
    text = re.sub(r"\s*_START_(?:ARTICLE|SECTION|PARAGRAPH)_\s*", "\n\n", text)
    return text.replace("_NEWLINE_", "\n").strip()

SKIPPED = ("empty", "not text", "duplicate")  # why a text is left out


def clean(texts, seen=None, chat=False):
    """Texts, or with `chat` rows of chats, as Documents, or, in place of one that is left out, the reason: no text, only white space, what
    makes a row no chat or, given `seen`, that it occurred before. Articles of wiki40b lose their markers."""
    for text in texts:
        if chat:
            try:
                d = text if isinstance(text, Document) else chat_document(chat_messages(text))
            except NoChat as e:
                yield str(e)
            else:
                yield d if seen is None or seen.add(d.hash) else "duplicate"
            continue
        if not isinstance(text, str) or not text.strip():
            yield "empty" if isinstance(text, str) or text is None else "not text"
            continue
        if re.match(r"""(?:b["'])?(?:\\n|\s)*_START_ARTICLE_""", text):
            with contextlib.suppress(ValueError, SyntaxError):  # damaged: taken as it is
                text = wiki40b_text(text)
            if not text:
                yield "empty"
                continue
        text = mended(text)
        utf8 = text.encode()
        own = text_hash(utf8)
        d = Document(text, utf8, own, own)
        yield d if seen is None or seen.add(d.hash) else "duplicate"
