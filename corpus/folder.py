"""Prepared folders: how they are named, what meta.json says, and how the token files are written and read.

meta.json names every token file with its numbers of tokens, documents and UTF-8 bytes, its size and its checksum.
read_meta() compares the sizes of the files, and the checksum of tokenizer.json. The checksums of the token files tell
a resumed run whether its data has changed, and check_tokens() whether a file was damaged. A meta.json looks as follows
(shortened):

    {"format": 1, "dtype": "uint16", "vocab_size": 2111, "tokenizer_sha256": "51c3...",
     "settings": {"sources": [...], "tokenizer": "hybrid", "vocab_size": 2111, ...},
     "sources": [{"name": "pydocs", "language": "en", "kind": "code", "origin": {...}, "budget": 0, "skipped": {...},
                  "undecodable": 0, "text": {"documents": 743, "sha256": "01ab..."},
                  "train": {"file": "train.0-pydocs.bin", "tokens": 4442664, "unknown": 0, "documents": 708,
                            "bytes": 10124203, "file_size": 8885328, "sha256": "6594..."},
                  "val": {...}}]}

`undecodable` bytes stood for no character. The checksum of `text` is that of the hashes of all its different documents.
A source of chats also has "mask": {"file", "file_size", "sha256"} in "train" and in "val", one that is a sample of many
files names them in "files", and some tokenizers from elsewhere bring "unknown_bytes" and "token_bytes", see
corpus/counts.py.

While a folder is made, its name begins with a dot and ends in .part, and a file beside it, which ends in .lock, keeps
other processes from making it too.
"""
import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import WINDOWS, Progress, UserError, lock
from corpus.files import suffix_of
from corpus.text import SKIPPED, Document, Seen, split_label
from corpus.tokenizer import DEFAULT_VOCAB, READY, TRAINERS


# ---------------------------------------------------------------------------------------------------- names

def corpus_name(names, tokenizer, vocab_size):
    """The name of the folder for some inputs and a tokenizer, such as 'pydocs-hybrid' or 'en+it-bpe-1000'.

    names: what was prepared, without budgets. tokenizer: a kind (bpe, gpt2...) or the path of a tokenizer.json or of a
    checkpoint. vocab_size: appended if it is neither 0 nor the default of that kind.
    """
    base = "+".join(base_name(name) for name in names)
    kind = tokenizer_name(tokenizer)
    if vocab_size and vocab_size != DEFAULT_VOCAB.get(kind):
        return f"{base}-{kind}-{vocab_size}"
    return f"{base}-{kind}"


def base_name(word):
    """'books/novels.jsonl' -> 'novels', 'novels@it/books' -> 'novels', 'ORG/NAME' -> 'NAME', 'pydocs' -> 'pydocs'."""
    name, _, _ = split_label(word)
    if not os.path.exists(name) and not suffix_of(name):
        return Path(name).name
    whole = Path(name).resolve().name
    return whole if os.path.isdir(name) else whole[:len(whole) - len(suffix_of(whole))]


def tokenizer_name(tokenizer):
    """The name of a kind of tokenizer, or of the file that holds one.

    Many files are called tokenizer.json or best.pt, so the name of their folder is used.
    """
    if tokenizer in TRAINERS or tokenizer in READY:
        return tokenizer
    path = Path(tokenizer)
    if path.name == "tokenizer.json" or path.suffix == ".pt":
        return path.resolve().parent.name
    return path.stem


# ---------------------------------------------------------------------------------------------------- meta.json

def token_dtype(vocab_size):
    """The type of the ids in token files: little-endian uint16, or uint32 if the vocabulary is larger than 65,536."""
    return np.dtype("<u2" if vocab_size <= 2 ** 16 else "<u4")


def token_files(sources, width=0):
    """Yields (entry, tokens, bytes per token) for each .bin and .mask.bin file of meta.json's sources.

    `width` is the number of bytes of a token id; a mask has one byte per token.
    """
    for source in sources:
        for split in ("train", "val"):
            entry = source[split]
            yield entry, entry["tokens"], width
            if "mask" in entry:
                yield entry["mask"], entry["tokens"], 1


def read_meta(folder):
    """Reads meta.json of a prepared folder. Raises UserError if it is missing, damaged, or does not fit its files."""
    folder = Path(folder)
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        check_types(meta)
        id_bytes = np.dtype(meta["dtype"]).itemsize
        files = [(entry["file"], entry["file_size"], tokens, width)
                 for entry, tokens, width in token_files(meta["sources"], id_bytes)]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a prepared folder: it has no meta.json") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}); prepare the folder again") from None
    if meta.get("format") != 1:
        raise UserError(f"{path} has format {meta.get('format')!r}; this version reads format 1")

    for name, size, tokens, width in files:
        check_file(folder / name, size, tokens, width)
    check_tokenizer(folder / "tokenizer.json", meta["tokenizer_sha256"])
    return meta


def check_types(meta):
    """Raises KeyError, TypeError or ValueError if meta.json lacks something that all tools need."""
    def check(entry, **types):
        for name, kind in types.items():
            if not isinstance(entry[name], kind):
                raise TypeError(f"{name!r} is not {kind.__name__}")

    check(meta, dtype=str, vocab_size=int, tokenizer_sha256=str, settings=dict, sources=list)
    check(meta["settings"], tokenizer=str, vocab_size=int)
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype {meta['dtype']!r}")
    for source in meta["sources"]:
        check(source, name=str, language=str, kind=str, origin=dict, budget=int, train=dict, val=dict)
        if "text" in source:  # older folders lack it
            check(source, text=dict)
            check(source["text"], documents=int, sha256=str)
        for entry in (source["train"], source["val"]):
            check(entry, file=str, tokens=int, documents=int, bytes=int, file_size=int, sha256=str)
            if "token_bytes" in entry:
                check(entry, token_bytes=int, unknown_bytes=int)
            if "mask" in entry:
                check(entry["mask"], file=str, file_size=int, sha256=str)


def check_file(path, size, tokens, width):
    """Raises UserError unless a token file has `size` bytes, and `size` is `tokens` times `width`."""
    if not path.exists():
        raise UserError(f"{path} is missing, though meta.json names it; prepare the folder again")
    actual = path.stat().st_size
    if actual != size or actual != tokens * width:
        unit = "byte" if width == 1 else "bytes"
        raise UserError(f"{path} has {actual:,} bytes, but meta.json says {tokens:,} tokens of {width} {unit}; "
                        "prepare the folder again")


def check_tokenizer(path, sha256):
    """Raises UserError unless tokenizer.json is there and has this checksum."""
    if not path.exists():
        raise UserError(f"{path} is missing; prepare the folder again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path} is not the one this folder was encoded with; prepare the folder again")


def check_tokens(folder, meta, largest=None):
    """Raises UserError, which names it, if a token file or mask of a prepared folder was changed or damaged.

    Each file is read and its checksum compared. largest: bytes up to which a file is read. A larger one is looked at in
    a few hundred places, and read only if there are zeros alone in one of them: so a copy that broke off is noticed.
    """
    for entry, _, _ in token_files(meta["sources"]):
        path = Path(folder) / entry["file"]
        if largest is not None and entry["file_size"] > largest and not has_gap(path):
            continue
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"]:
                raise UserError(f"{path} is damaged: its checksum is not that of meta.json; delete the folder and "
                                "prepare it again")


def has_gap(path, places=256, length=4096):
    """Whether one of some places of a file, spread evenly from its beginning to its end, holds nothing but zeros."""
    data = np.memmap(path, np.uint8, "r")
    begins = np.linspace(0, max(0, len(data) - length), places).astype(np.int64)
    return any(not data[begin:begin + length].any() for begin in begins)


# ---------------------------------------------------------------------------------------------------- reading

def read_tokens(path, dtype):
    """A token file as a memory map. An empty file cannot be mapped and gives an empty array."""
    if os.path.getsize(path) == 0:
        return np.empty(0, dtype)
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")


def document_edges(tokens, bos, eos=None):
    """Where the documents of a token file begin, and where the last one ends: int64 (documents + 1,).

    A document begins at each `bos`. GPT-2 has one token for bos and eos, and a document is then <|endoftext|> text
    <|endoftext|>. Give that id as `eos` too: a document begins at an <|endoftext|> that is the first token of the file,
    or that follows another one.
    """
    step = 2 ** 24  # a comparison of the whole file would need a byte per token
    found = [i + np.flatnonzero(tokens[i:i + step] == bos) for i in range(0, len(tokens), step)]
    begins = np.concatenate(found) if found else np.empty(0, np.int64)
    if eos is not None and eos == bos:
        follows_another = np.diff(begins, prepend=-1) == 1  # with -1, the first token of the file counts as such
        begins = begins[follows_another]
    return np.unique(np.concatenate([[0], begins, [len(tokens)]]))


# ---------------------------------------------------------------------------------------------------- writing

# Files of a folder that is being made. No other file is deleted
OWN = re.compile(r"(train|val|hashes)\.\d+-.+\.bin|(tokenizer|meta|progress)\.json(\.part)?")


def own_files(part):
    """The files of a folder that is being made. UserError if it holds others, which then stay where they are."""
    files = list(part.iterdir()) if part.is_dir() else []
    for path in files:
        if not OWN.fullmatch(path.name) or path.is_dir():
            raise UserError(f"{part} is where the work is done, and holds {path.name}, which prepare.py did not write: "
                            "move it away, or give another --name")
    return files


@contextlib.contextmanager
def alone(folder, tool="prepare.py"):
    """Inside, no other process makes this folder: it waits until another one that does is done."""
    new = [parent for parent in folder.parents if not parent.exists()]
    path = folder.with_name(f".{folder.name}.lock")
    told, vanished = False, 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = lock(path)
            if file is not None and (WINDOWS or os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
                break
        except FileNotFoundError:  # the other one has just removed the lock, or an empty folder
            vanished += 1
            if vanished > 10:  # or no folder can be made here, as in one that was deleted
                raise
        if not told:
            Progress().done(f"waiting      another {tool} is making {folder}")
            told = True
        time.sleep(0.1)
    try:
        yield
    finally:
        if WINDOWS:  # which does not remove an open file, so nobody else can have one of this name
            file.close()
            with contextlib.suppress(OSError):  # somebody else has opened it meanwhile
                path.unlink()
        else:
            path.unlink(missing_ok=True)
            file.close()
        for parent in new:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


class EncodedDocument(NamedTuple):
    """A document in tokens, with what meta.json counts of it."""
    document: Document
    ids: np.ndarray  # (n,), with the tokens that begin and end a document
    mask: np.ndarray | None  # uint8 (n,), of a chat: 1 for the tokens of replies
    counts: dict  # what TokenCounts counts: bytes, unknown...


def new_place(stem, chat):
    """How far the work on a source is when it begins: a dict that JSON can keep.

    SourceWriter brings everything in it up to date as it writes, except `state`: that is for encode_source()
    of corpus/passes.py to set.
    """
    splits = {}
    for split in ("train", "val"):
        splits[split] = dict(file=f"{split}.{stem}.bin", tokens=0, unknown=0, documents=0, bytes=0)
        if chat:
            splits[split]["mask"] = dict(file=f"{split}.{stem}.mask.bin")
    return dict(
        splits=splits,  # the entries for meta.json
        skipped=dict.fromkeys(SKIPPED, 0),  # reason -> rows that were left out
        undecodable=0,  # bytes that stand for no character
        state=None,  # of the source's reader
        hashes=0,  # how many are in the file of hashes
        seen_bytes=0)  # UTF-8 bytes of the documents that were written


class SourceWriter:
    """Writes the files of one source: tokens and masks of both splits, and the hashes of all its documents.

    The file of hashes exists only until the source is done: a resumed run reads it to recognise duplicates. Whatever
    was written after the last saved `place` is cut off and written again.

    threshold: documents with a split_hash below it are validation text. budget: training tokens to write; 0: all.
    place: see new_place(). Raises UserError if a file is shorter than `place` says.
    """

    def __init__(self, folder, stem, dtype, threshold, budget, place):
        self.folder = folder
        self.dtype = dtype
        self.threshold = threshold
        self.budget = budget
        self.place = place
        self.hashes_file = f"hashes.{stem}.bin"
        sizes = {entry["file"]: tokens * width
                 for entry, tokens, width in token_files([place["splits"]], dtype.itemsize)}
        sizes[self.hashes_file] = 8 * place["hashes"]
        self.files = {name: open(folder / name, "ab") for name in sizes}
        for name, f in self.files.items():
            if os.path.getsize(f.name) < sizes[name]:
                raise UserError(f"{f.name} is shorter than progress.json beside it says; delete {folder} to start anew")
            f.truncate(sizes[name])

    def hashes_before(self):
        """The documents that were written before a stop, as a Seen."""
        # Seen keeps the generation that is being filled and the one before; begin where the older one began
        generation = (self.place["hashes"] - 1) // Seen.LIMIT
        first = max(0, generation - 1) * Seen.LIMIT
        return Seen(np.fromfile(self.folder / self.hashes_file, dtype="<u8", offset=8 * first).tolist())

    def full(self):
        """Whether the budget is spent, and there is validation text."""
        train, val = self.place["splits"]["train"], self.place["splits"]["val"]
        spent = self.budget > 0 and train["tokens"] >= self.budget
        return spent and (val["tokens"] > 0 or self.threshold == 0)

    def write(self, batch, encoded):
        """Writes a batch, which ends early if the budget ends within it.

        batch: Documents and reasons why there is none, as clean() gives them. encoded: an iterator over the
        EncodedDocuments of its Documents.
        """
        skipped = self.place["skipped"]
        pieces = {name: [] for name in self.files}
        hashes = []
        for item in batch:
            if not isinstance(item, Document):
                skipped[item] = skipped.get(item, 0) + 1
                continue
            hashes.append(item.hash)
            self.take(next(encoded), pieces)
            if self.full():
                break

        pieces[self.hashes_file].append(np.array(hashes, dtype="<u8"))
        self.place["hashes"] += len(hashes)
        for name, arrays in pieces.items():
            if arrays:
                self.files[name].write(np.concatenate(arrays).tobytes())

    def take(self, encoded, pieces):
        """Counts an EncodedDocument and adds it to the pieces of its files, unless the budget is spent."""
        split = "val" if encoded.document.split_hash < self.threshold else "train"
        entry = self.place["splits"][split]
        if split == "train" and self.budget and entry["tokens"] >= self.budget:
            return
        entry["tokens"] += len(encoded.ids)
        entry["documents"] += 1
        for name, n in encoded.counts.items():
            entry[name] = entry.get(name, 0) + n
        self.place["undecodable"] += encoded.document.undecodable
        self.place["seen_bytes"] += len(encoded.document.utf8)
        pieces[entry["file"]].append(encoded.ids.astype(self.dtype))
        if encoded.mask is not None:
            pieces[entry["mask"]["file"]].append(encoded.mask)

    def sync(self):
        """Returns when all that was written is on the disk."""
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())

    def close(self):
        """Closes the files, and adds their sizes and checksums to the entries for meta.json."""
        self.sync()
        for f in self.files.values():
            f.close()
        for entry, _, _ in token_files([self.place["splits"]]):
            with open(self.folder / entry["file"], "rb") as f:
                entry["file_size"] = os.path.getsize(f.name)
                entry["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
        with open(self.folder / self.hashes_file, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        self.place["text"] = dict(documents=self.place["hashes"], sha256=sha256)
