"""Prepared folders."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from common import UserError
from corpus.hub import HUB, MIXES
from corpus.pydocs import EMBEDDED
from corpus.tokenizer import DEFAULT_VOCAB, TRAINERS


def corpus_name(names, tokenizer, vocab_size):
    """pydocs, hybrid, 2111 -> 'pydocs-hybrid'; a vocabulary size that is not the default is appended."""
    base = "+".join(n if n in (*EMBEDDED, *HUB, *MIXES) else Path(n.rpartition("@")[0] if "@" in n and not os.path.exists(n) else n).resolve().name.split(".")[0] for n in names)
    path = Path(tokenizer)
    kind = tokenizer if tokenizer in TRAINERS else path.resolve().parent.name if path.name == "tokenizer.json" else path.stem
    return f"{base}-{kind}" + (f"-{vocab_size}" if vocab_size and vocab_size != DEFAULT_VOCAB[kind] else "")


def token_files(sources, width=0):
    """What meta.json has about each .bin and .mask.bin of its sources: (entry, tokens, bytes per token); `width` is that of an id."""
    for x in (source[split] for source in sources for split in ("train", "val")):
        yield x, x["tokens"], width
        if "mask" in x:
            yield x["mask"], x["tokens"], 1


def read_meta(folder):
    """meta.json of a prepared folder. UserError if it is missing, unreadable, or does not fit the files beside it."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        files = [(x["file"], x["file_size"], *counts) for x, *counts in token_files(meta["sources"], np.dtype(meta["dtype"]).itemsize)]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a prepared folder: it has no meta.json") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}); prepare the folder again") from None
    if meta.get("format") != 1:
        raise UserError(f"{path} has format {meta.get('format')!r}; this version reads format 1")
    for file, size, tokens, width in files:
        file = Path(folder) / file
        if not file.exists():
            raise UserError(f"{file} is missing, though meta.json names it; prepare the folder again")
        if file.stat().st_size != size or size != tokens * width:
            raise UserError(f"{file} has {file.stat().st_size:,} bytes, but meta.json says {tokens:,} tokens of {width} byte{'s' * (width > 1)}; "
                            "prepare the folder again")
    tokenizer = Path(folder) / "tokenizer.json"
    if not tokenizer.exists() or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != meta["tokenizer_sha256"]:
        raise UserError(f"{tokenizer} is {'not the one this folder was encoded with' if tokenizer.exists() else 'missing'}; prepare the folder again")
    return meta


def read_tokens(path, dtype):
    """A token file as a memory map; an empty one, which cannot be mapped, as an empty array."""
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r") if os.path.getsize(path) else np.empty(0, dtype)


def document_edges(tokens, bos):
    """Where the documents of a token file begin, and where the last one ends: int64 (documents + 1,)."""
    step = 2 ** 24  # a comparison of the whole file would need a byte per token
    begins = [i + np.flatnonzero(tokens[i:i + step] == bos) for i in range(0, len(tokens), step)]
    return np.unique(np.concatenate([[0], *begins, [len(tokens)]]))
