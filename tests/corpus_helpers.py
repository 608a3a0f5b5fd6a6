"""What the tests of the data tools share: texts that trip tokenizers up, small files of text, and prepared folders
read without the help of the tools that wrote them."""
import gzip
import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import tiktoken
from hypothesis import settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import prepare
from corpus.chats import SHOWN
from corpus.folder import read_meta
from corpus.tokenizer import (END_OF_TEXT, GPT2_WORDS, SPECIAL_TOKENS, added_tokens, byte_of_character, load_tokenizer,
                              train_bpe)

KINDS = {"bpe": 1000, "hybrid": 900, "chunk": 1100}  # tokenizer -> size of its vocabulary in the tests
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = list(SPECIAL_TOKENS)
properties = settings(deadline=None, max_examples=150)

# Any Unicode text, mixed with what trips tokenizers up: special tokens spelled out, contractions, every kind of white
# space and line end, NUL, combining marks, joined emoji, characters outside the BMP, noncharacters, a byte order mark,
# and ordinary words.
TRICKY = [
    *SPECIAL, "<|endoftext|>", "<|", "|>", "bos",
    "'s", "'RE", "'ll", "'",
    " ", "  ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u180e", "\u2003",
    "\u200b", "\u2028", "\u2029", "\u202f", "\u3000", "\ufeff", "\x00",
    "e\u0301", "\u0301", "\u0930\u094d", "\U0001f469\u200d\U0001f4bb", "\U0001d7d8", "\U00020000", "\uffff",
    "\U0010ffff", "\u0130vme", "\u216b", "\xb2", "\u0663",
    "the", " self", " return", "1",
]
TEXT = st.one_of(
    st.text(),
    st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=4)), max_size=20).map("".join),
)


# ---------------------------------------------------------------------------------------------------- input files

def document(i):
    """A text of its own for every i: a few words, with characters of one to four bytes."""
    rng = random.Random(i)
    words = ["house", "caffè", "sea\n", "İvme", "\U0001f600", "12", "you're", "\t--"]
    return " ".join([f"Text {i}:", *(rng.choice(words) for _ in range(rng.randint(5, 60)))])


def write_rows(path, rows):
    """Writes rows (dicts, or lines of text) into a file of the kind that its name ends in."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        data = "".join(line + "\n" for line in lines).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_jsonl(path, texts, **more):
    """Writes texts as the rows of a .jsonl file, each with the columns `more` beside it; returns the path as a str."""
    return str(write_rows(path, [{"text": text, **more} for text in texts]))


# ---------------------------------------------------------------------------------------------------- prepared folders

def run(names, out_dir, **given):
    """prepare() with a small vocabulary; returns (folder, meta)."""
    if isinstance(names, (str, Path)):
        names = [names]
    if given.get("tokenizer", "bpe") in KINDS:
        given = {"vocab_size": 300, **given}
    folder = prepare.prepare([str(name) for name in names], prepare.Settings(out_dir=str(out_dir), **given))
    return folder, read_meta(folder)


def split_ids(folder, split, source=0):
    """A .bin file cut into documents where a <|bos|> stands; returns (tokenizer, all ids, documents)."""
    meta = json.loads((folder / "meta.json").read_text())
    path = folder / meta["sources"][source][split]["file"]
    ids = np.fromfile(path, dtype={"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    starts = np.flatnonzero(ids == tokenizer.token_to_id("<|bos|>"))
    documents = np.split(ids, starts)
    assert len(documents.pop(0)) == 0  # nothing before the first <|bos|>
    for d in documents:
        special = d[(d < len(SPECIAL)) & (d != tokenizer.token_to_id("<|unk|>"))]
        assert d[-1] == tokenizer.token_to_id("<|eos|>") and len(special) == 2
    return tokenizer, ids, documents


def texts_of(folder, split, source=0):
    """The texts of a .bin file's documents."""
    tokenizer, _, documents = split_ids(folder, split, source)
    return tokenizer.decode_batch([d[1:-1].tolist() for d in documents])


def masked(folder, split, source=0):
    """A chat set's files cut into chats: [(text of the tokens with mask 1, text of the other tokens)]."""
    entry = json.loads((folder / "meta.json").read_text())["sources"][source][split]
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    ids = np.fromfile(folder / entry["file"], "<u2")
    mask = np.fromfile(folder / entry["mask"]["file"], np.uint8)
    assert len(ids) == len(mask) == entry["tokens"] and set(mask.tolist()) <= {0, 1}
    assert hashlib.sha256(mask.tobytes()).hexdigest() == entry["mask"]["sha256"]
    assert entry["mask"]["file_size"] == len(mask)
    starts = [*np.flatnonzero(ids == tokenizer.token_to_id("<|bos|>")).tolist(), len(ids)]
    assert starts[0] == 0 and entry["documents"] == len(starts) - 1

    def text_where(value, a, b):
        return tokenizer.decode(ids[a:b][mask[a:b] == value].tolist(), skip_special_tokens=False)
    return [(text_where(1, a, b), text_where(0, a, b)) for a, b in itertools.pairwise(starts)]


def expected(chats):
    """What masked() should find of chats, [(role, text)] each."""
    found = []
    for chat in chats:
        learned, rest = "", "<|bos|>"
        for role, text in chat:
            if role == "assistant":
                learned += f"{text}<|eos|>"
                rest += "<|assistant|>"
            elif role == SHOWN:
                rest += f"<|assistant|>{text}<|eos|>"
            else:
                rest += f"<|{role}|>{text}"
        found.append((learned, rest))
    return found


def snapshot(folder, times=False):
    """name -> contents of a folder's files, with `times` -> (time of the last change, contents)."""
    files = {}
    for path in folder.iterdir():
        files[path.name] = (path.stat().st_mtime_ns, path.read_bytes()) if times else path.read_bytes()
    return files


# ---------------------------------------------------------------------------------------------------- tokenizers

def byte_level(merges, alphabet=ALPHABET, words=(), **options):
    """A byte-level BPE made by hand."""
    vocab = {}
    for token in [*SPECIAL, *alphabet, *(a + b for a, b in merges), *words]:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(added_tokens())
    return tokenizer


def loaded(tokenizer):
    """The tokenizer as it comes back from its file."""
    return load_tokenizer(tokenizer.to_str())


def library_ids(tokenizer, text):
    """The ids that the `tokenizers` library itself gives."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def normalized(tokenizer, text):
    return tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text


def size(texts):
    """UTF-8 bytes of the texts together."""
    return sum(len(text.encode()) for text in texts)


def small_gpt2(texts=None, vocab_size=600):
    """A tiktoken.Encoding like its "gpt2", with few merges: the bytes in GPT-2's order, the merges, <|endoftext|>."""
    trained = train_bpe(texts or [document(i) for i in range(200)], vocab_size)
    byte = byte_of_character()
    rank = {bytes([b]): i for i, b in enumerate(byte.values())}
    for a, b in json.loads(trained.to_str())["model"]["merges"]:
        rank.setdefault(bytes(byte[char] for char in a + b), len(rank))
    return tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, mergeable_ranks=rank, special_tokens={END_OF_TEXT: len(rank)})
