"""Files of one's own: which ones of a folder are read, in which encoding, and the rows that they hold.

.txt and .md files hold text. The others hold rows: .jsonl and .jsonl.gz a JSON object a line, .json an array of objects
or an object a line, and .parquet. However large a file is, little of it is in memory at a time.

A byte that cannot be decoded becomes MARK, half of a surrogate pair. No text that was decoded has one otherwise, so
that corpus/text.py can count them before it replaces them by U+FFFD.
"""
import codecs
import contextlib
import gzip
import io
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from common import UserError, nearest
from corpus.tokenizer import PIECE

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".json", ".parquet")  # of the files that can be read

LONGEST_ROW = 2 ** 28  # characters of an item of a JSON array; a broken item is not looked for beyond that


# ---------------------------------------------------------------------------------------------------- which files

def suffix_of(path):
    """The one of SUFFIXES that a file's name ends in, in small letters or capitals; '' if it is none of them."""
    name = Path(path).name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def readable_files(path):
    """The file, or the files below the folder that can be read, and how many of each kind are left out.

    The paths are in order. Hidden files and folders are not read. A .json file may be anything, so it is read only if
    it is named itself, or if the folder holds nothing else that can be read.
    """
    files, left_out = [path], Counter()
    if not path.is_file():
        files, hidden = files_below(path)
        left_out["hidden"] = hidden

    found = [p for p in files if suffix_of(p) and p.is_file()]
    rows_or_text = [p for p in found if suffix_of(p) != ".json"]
    found = rows_or_text or found
    for p in sorted(set(files).difference(found)):
        left_out[p.suffix.lower() or "without a suffix"] += 1
    return found, left_out


def files_below(folder):
    """The files in a folder, its subfolders and linked folders, sorted, and the number of hidden files and folders.

    No folder is read twice, so links may lead round in a circle.
    """
    def fail(error):
        raise error

    files, hidden, seen = [], 0, set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(files), hidden


# ---------------------------------------------------------------------------------------------------- encodings

MARK = "\udcff"
MOSTLY = 0.3  # a file is refused if more than this share of its bytes stands for no character; in Latin text it is less

# Byte order marks. That of UTF-32-LE begins as that of UTF-16-LE, and is looked for first
BOMS = [
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
]

codecs.register_error("mark", lambda error: (MARK * (error.end - error.start), error.end))


def check_encoding(encoding):
    """Raises UserError if Python knows no text encoding of this name."""
    try:
        io.TextIOWrapper(io.BytesIO(b"text"), encoding=encoding, errors="mark").read()
    except (LookupError, ValueError):  # no such encoding, or one that decodes something else than text
        from encodings.aliases import aliases
        hint = nearest(encoding, {*aliases, *aliases.values()})
        raise UserError(f"--encoding={encoding} is no text encoding{hint}") from None


def open_text(path, encoding=""):
    """The file, perhaps a .gz, opened as text. encoding: its encoding unless it has a byte order mark; empty: UTF-8.

    UTF-16 is recognised also without a byte order mark. As in Python's text mode, line ends become \\n. Raises
    UserError if the beginning of the file is mostly something else.
    """
    file = gzip.open(path) if suffix_of(path).endswith(".gz") else open(path, "rb")
    with whole_gzip(path):
        head = file.read(PIECE)
        file.seek(0)
    return io.TextIOWrapper(file, encoding=encoding_of(path, head, encoding), errors="mark")


def encoding_of(path, head, encoding):
    """The encoding of a file that begins with the bytes `head`, see open_text()."""
    for mark, name in BOMS:
        if head.startswith(mark):
            return name
    found = encoding or utf16_without_mark(head) or "utf-8"
    text = head.decode(found, "mark")
    no_text = (text.count(MARK) + text.count("\0")) / max(1, len(head))
    if no_text > MOSTLY:
        raise UserError(f"{path} is no text in {found}: {no_text:.0%} of its first bytes stand for no character; if it "
                        "is text, name its encoding, as in --encoding=cp1252 (or cp1251, shift_jis, gb18030...)")
    return found


def utf16_without_mark(head):
    """utf-16-le or utf-16-be if these bytes are certainly that, though no byte order mark says so; else ''."""
    pairs = np.frombuffer(head, np.uint8, len(head) // 2 * 2).reshape(-1, 2)
    if len(pairs) < 4:
        return ""
    zeros = np.count_nonzero(pairs == 0, axis=0)
    different = [len(np.unique(pairs[:, i])) for i in (0, 1)]
    printable = np.count_nonzero(((pairs >= 32) & (pairs < 127)).all(axis=1))
    for name, high, low in (("utf-16-le", 1, 0), ("utf-16-be", 0, 1)):
        # Spaces, line ends and digits have a zero as their high byte, and few characters have one as their low byte
        if zeros[high] * 100 < max(1, len(pairs)) or zeros[low] * 20 > zeros[high]:
            continue
        # Text in UTF-8 in which zeros stand is pairs of printable characters, and as varied at even as at odd places
        if printable * 2 > len(pairs) and different[high] * 2 > different[low]:
            continue
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(name)().decode(head)
            strange = [c for c in set(text) if unicodedata.category(c) in ("Cc", "Cn", "Co") and not c.isspace()]
            if not strange:
                return name
    return ""


# ---------------------------------------------------------------------------------------------------- rows

@contextlib.contextmanager
def whole_gzip(path):
    """Turns what is raised for a damaged .gz file into a UserError."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is not a whole gzip file: {e}") from None


DECODER = json.JSONDecoder(parse_int=float)  # int() refuses numbers of more than 4,300 digits


def json_rows(path, encoding):
    """Yields the rows of a .jsonl, .jsonl.gz or .json file: dicts, if the file is as it should be.

    A string that stands where a row should be is taken for {"text": string}. Raises UserError for what is not JSON.
    """
    with open_text(path, encoding) as f, whole_gzip(path):
        begun = array_begun(f) if suffix_of(path) == ".json" else None
        rows = json_lines(path, f) if begun is None else json_items(path, f, begun)
        for row in rows:
            yield {"text": row} if isinstance(row, str) else row


def json_lines(path, f):
    for i, line in enumerate(f, 1):
        if not line.strip():
            continue
        try:
            row = DECODER.decode(line)
        except (ValueError, RecursionError) as e:
            what = f"line {i} is not JSON"
            if suffix_of(path) == ".json" and i == 1:
                what = "is neither a JSON array of rows nor a row a line"
            raise UserError(f"{path} {what}: {e}") from None
        yield row


def array_begun(f):
    """What was read of the open file f behind a [, if it begins with that. Else None, and f is at its beginning."""
    while piece := f.read(PIECE):
        if begun := piece.lstrip():
            if begun.startswith("["):
                return begun[1:]
            break
    f.seek(0)
    return None


SPACE = re.compile(r"[ \t\n\r]*")
BEHIND_ITEM = re.compile(r"[ \t\n\r,\]]")


def json_items(path, f, text):
    """Yields the items of a JSON array as they are read. text: what was read of the open file f behind the [."""
    at, n = 0, 0
    while True:
        at = SPACE.match(text, at).end()
        if text[at:at + 1] == "]":
            rest = text[at + 1:]
            while rest and not rest.strip():
                rest = f.read(PIECE)
            if rest:
                raise UserError(f"{path} holds more behind its array, which ends with item {n}")
            return
        try:
            begin = at
            if n:
                if text[at:at + 1] != ",":
                    raise ValueError("no comma before it")
                begin = SPACE.match(text, at + 1).end()
            item, end = DECODER.raw_decode(text, begin)
            is_whole = bool(BEHIND_ITEM.match(text, end))  # 1 may be the beginning of 12 or 1.5
            problem = "the array does not end"
        except ValueError as e:
            is_whole, problem = False, e
        except RecursionError as e:
            raise UserError(f"{path} item {n + 1} is not JSON: {e}") from None
        if is_whole:
            yield item
            n, at = n + 1, end
            continue

        # read on, each time twice as much, so that a long item is not decoded too often
        text = text[at:]
        more = f.read(max(PIECE, len(text)))
        if not more or len(text) > LONGEST_ROW:
            raise UserError(f"{path} item {n + 1} is not JSON: {problem}")
        text, at = text + more, 0


def parquet_shape(path):
    """The names of a parquet file's columns, and how many rows it has."""
    import pyarrow.parquet
    with whole_parquet(path):
        file = pyarrow.parquet.ParquetFile(path)
        return file.schema_arrow.names, file.metadata.num_rows


def parquet_rows(path, names):
    """Yields the rows of a parquet file as dicts, with these columns alone."""
    import pyarrow.parquet
    with whole_parquet(path):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256, columns=names):
            yield from batch.to_pylist()


def parquet_texts(path, name):
    """Yields the values of one column of a parquet file. Strings may be no UTF-8, though the format asks for it."""
    import pyarrow.parquet
    with whole_parquet(path):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256, columns=[name]):
            try:
                values = batch.column(0).to_pylist()
            except UnicodeDecodeError:
                values = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                values = [value if value is None else value.decode("utf-8", "mark") for value in values]
            yield from values


@contextlib.contextmanager
def whole_parquet(path):
    """Turns what is raised for a damaged .parquet file into a UserError."""
    import pyarrow
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
        raise UserError(f"{path} cannot be read as parquet: {e}") from None
