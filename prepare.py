"""Text in, token files out: `python prepare.py NAME...` writes a folder that train.py, nanoGPT and `np.memmap` can read.

NAME is `pydocs` (this Python's own library and help topics: nothing to download) or `pydocs-chat` (questions and answers about that
library), a data set of the Hugging Face Hub or a mix of them (`python prepare.py --list`), or a file or folder of yours (.txt, .md,
.jsonl, .jsonl.gz, .parquet) with texts or chats, with language and kind behind an @ and a budget of training tokens behind a colon
if you like: `novels_it@it/books:50M`. Several names become several sources of one corpus, each with files of its own, and one
tokenizer that learns from them all. The folder data/NAME-TOKENIZER holds

    tokenizer.json                  a Hugging Face `tokenizers` file
    train.<i>-<source>.bin, val...  raw little-endian uint16 token ids (uint32 above 65,536), documents as <|bos|> text <|eos|>
    train.<i>-<source>.mask.bin     only of chats, and val...: a byte per token, 1 for a reply's, see encode_chats
    meta.json                       what it is made of, with counts of tokens, documents and UTF-8 bytes, sizes and checksums

The input is read as a stream, twice: once to sample the text that the tokenizer learns from (of the Hub's sets their beginning), once
to encode. Memory does not grow with it. Stopped by whatever while it encodes, the same command goes on where it was, and the result is
the same to the byte. Exact duplicates within a source are left out. Whether a document is training or validation text depends on the hash of its
text alone, not on the order of files or on what is added later; only a source so small that no hash falls below val_fraction lends
its lowest one. A chat of pydocs-chat goes where its module's source goes in pydocs.

The bottom of the import order: what every tool needs (flags, one-line errors, the progress line, the tokenizer rules) is here too.
"""
import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import errno
import functools
import gzip
import hashlib
import heapq
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import threading
import textwrap
import time
import tokenize
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


@dataclass
class Settings:
    out_dir: str = "data"  # folder in which the prepared folder is made
    name: str = ""  # the prepared folder's name; empty: NAME-TOKENIZER
    tokenizer: str = "bpe"  # bpe, hybrid (characters and frequent words), chunk (lowercase, by two or three), or a tokenizer.json to reuse
    vocab_size: int = 0  # tokens in a new tokenizer's vocabulary; 0: bpe 16,384, hybrid 2,111, chunk 4,466
    max_tokens: int = -1  # training tokens to take from each source that names no budget, such as 235M; 0: all; -1: all, or what --list says
    val_fraction: float = 0.05  # share of the documents that become validation text
    column: str = ""  # field of .jsonl and .parquet rows that holds the text; empty: text or content, and rows of chats are chats
    source_dir: str = ""  # read the Hub's data sets from copies of their repositories in this folder: DIR/ORG/NAME, DIR/NAME, or DIR itself
    list: bool = False  # show the data sets and mixes that can be named, and nothing else
    show: str = ""  # tell what this prepared folder holds, and nothing else
    plot: bool = False  # with --show: draw the lengths of the documents, FOLDER/lengths.png


# ---------------------------------------------------------------------------------------------------- shared by the tools

class UserError(Exception):
    """A mistake or a broken input that the user can mend: shown as one line on standard error, exit status 2."""


def number(text):
    """'235M' -> 235000000: an int, with _ or , between digits and K, M or B (10^3, 10^6, 10^9) behind it."""
    m = re.fullmatch(r"(-?\d[\d_,]*(?:\.\d+)?)([KMB]?)", text.strip(), re.I)
    value = Fraction(re.sub("[_,]", "", m[1])) * {"": 1, "K": 10 ** 3, "M": 10 ** 6, "B": 10 ** 9}[m[2].upper()] if m else 0.5
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def yes_or_no(text):
    try:
        return {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def nearest(word, words):
    """' (did you mean a or b?)', or nothing if no word is close."""
    close = difflib.get_close_matches(word, list(words), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def parse_flags(argv, *settings, description="", positional=None):
    """Reads --name=value flags, one for each field of the dataclass instances in `settings`; a field's comment is its help.

    Returns (given, words): the flags that were typed, name -> value, and the words without dashes (allowed if `positional`
    names them). Raises UserError for an unknown flag or a value of the wrong type.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if positional:
        parser.add_argument("words", nargs="*", metavar=positional[0], help=positional[1])
    flags = set()
    for s in settings:
        # the comment behind a field explains it to the reader of the code and, here, to the reader of --help
        notes = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(type(s)), re.M))
        for f in dataclasses.fields(s):
            if f.name in flags:
                continue
            flags.add(f.name)
            value = getattr(s, f.name)
            switch = value is None or isinstance(value, bool)  # None: neither yes nor no until the user says
            kind = yes_or_no if switch else number if isinstance(value, int) else type(value)
            extra = dict(nargs="?", const=True) if switch else {}
            if switch:
                parser.add_argument(f"--no-{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
            shown = f"{value:,}" if kind is number else "unset" if value is None else value
            parser.add_argument(f"--{f.name}", type=kind, metavar={yes_or_no: "BOOL", number: "INT"}.get(kind, kind.__name__.upper()),
                                help=f"{notes.get(f.name, '')} [{shown}]".replace("%", "%%"), **extra)
    namespace, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            flag = word.lstrip("-").split("=")[0]
            raise UserError(f"there is no flag --{flag}{nearest(flag, flags)}; --help lists them")
        if not positional:
            raise UserError(f"what is {word!r}? flags are written --name=value")
    given = vars(namespace)
    return given, [*given.pop("words", []), *unknown]  # argparse leaves the words behind a flag to us


def run_tool(main):
    """main(argv) with this project's manners: a user's mistake is one line on standard error and exit status 2."""
    tool = Path(sys.argv[0]).name
    try:
        if sys.version_info < (3, 11):
            raise UserError(f"this needs Python 3.11 or newer, and {sys.executable} is {platform.python_version()}")
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        print(f"\n{tool}: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        message = f"{e.filename or 'the output'}: {'no space left on the disk; nothing was written over' if full else e.strerror or e}"
    print(f"{tool}: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def clock(seconds):
    """125 -> '02:05', 7265 -> '2:01:05'."""
    m, s = divmod(round(seconds), 60)
    return f"{m:02d}:{s:02d}" if m < 60 else f"{m // 60}:{m % 60:02d}:{s:02d}"


class Progress:
    """One line that updates itself on a terminal. Elsewhere only `done` prints, so that logs stay short."""

    def __init__(self):
        self.live, self.last = sys.stdout.isatty(), 0.0

    def show(self, text):
        if self.live and time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            print(f"\r\x1b[K{text[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def done(self, text):
        print(("\r\x1b[K" if self.live else "") + text, flush=True)


# ---------------------------------------------------------------------------------------------------- tokenizers

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>")  # the İvme card's; ids 0 to 6
DEFAULT_VOCAB = {"bpe": 16_384, "hybrid": 2111, "chunk": 4466}
SAMPLE_BYTES = 32 * 2 ** 20  # text a tokenizer learns from, shared equally by the sources
# GPT-2's rule for cutting text into words, as in tokenizers' ByteLevel
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TRIGRAMS = ("the and ing ion tio ent ati for her ter hat tha ere ate his con res ver all ons nce men ith ted ers "
            "pro thi wit are ess not ive was ect rea com eve per int est sta cti ica ist ear ain one our iti rat").split()
# A chunk: such a trigram, else three characters of which the first, else the last is a space, else two characters, else one.
# Trigrams of one first letter share a branch, which is a quarter faster. [\s\S] is any character to every engine, a line end too
CHUNKS = "|".join(f"{a}(?:{'|'.join(t[1:] for t in TRIGRAMS if t[0] == a)})" for a in dict.fromkeys(t[0] for t in TRIGRAMS))
CHUNKS += r"| [\s\S]{2}|[\s\S]{2} |[\s\S]{2}|[\s\S]"
TASK = 2 ** 16  # characters that a thread of fast_encoder gets at a time
COUNTED_CHUNKS = 2 ** 19  # different ones that are counted at a time; pydocs has 7,400 of them, Chinese text far more


def load_tokenizer(source):
    """A tokenizer from a tokenizer.json's path or its text; UserError if it is none or lacks <|bos|> and <|eos|>.

    encode_special_tokens makes text that spells <|eos|> ordinary characters. The file cannot keep that setting, so every
    load goes through here.
    """
    try:
        tokenizer = Tokenizer.from_str(source) if source.lstrip().startswith("{") else Tokenizer.from_file(source)
    except Exception as e:  # tokenizers raises plain Exception for everything
        what = "the tokenizer" if source.lstrip().startswith("{") else source
        raise UserError(f"{what} is not a tokenizer.json of the tokenizers library: {e}") from None
    for token in ("<|bos|>", "<|eos|>"):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"the tokenizer {'' if source.lstrip().startswith('{') else source + ' '}has no {token}, which documents are framed with")
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()  # a file made for batches of one length would cut or pad the documents
    tokenizer.no_padding()
    return tokenizer


def added_tokens():
    return [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]


def train_bpe(texts, vocab_size):
    """Byte-level BPE (arXiv 1508.07909): special tokens, the 256 bytes, then merges in the order they were learned."""
    tokenizer = Tokenizer(models.BPE())
    # the trainer's time grows with the square of a word's length: a run of 512 characters is a word of its own while it learns
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\S{512}|\s{512}"), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=added_tokens(), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def train_hybrid(texts, vocab_size):
    """TinyMemoryLM's tokenizer: special tokens, the 256 bytes, and the most frequent words. A word in the vocabulary is one
    token, any other is spelled byte by byte; nothing is lost. A BPE without merges that looks whole words up does just that."""
    words = Tokenizer(models.WordLevel())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=vocab_size, show_progress=False))  # by frequency, then alphabet
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_rank = sorted(words.get_vocab(), key=words.get_vocab().get)
    vocab = [*SPECIAL_TOKENS, *alphabet, *(w for w in by_rank if len(w) > 1 and w not in SPECIAL_TOKENS)][:vocab_size]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(added_tokens())
    return tokenizer


def train_chunk(texts, vocab_size):
    """i3's tokenizer: lowercase text in chunks of two or three characters. Special tokens, the most frequent characters, in at most
    a quarter of the vocabulary, and the most frequent chunks. A chunk in the vocabulary is one token, any other is spelled by
    characters, and a character that is not there is <|unk|>. Text with few different chunks gives a smaller vocabulary."""
    lowercase, cut, most = normalizers.Lowercase(), re.compile(CHUNKS), max(COUNTED_CHUNKS, 4 * vocab_size)
    characters, chunks = Counter(), Counter()
    for text in texts:
        for i in range(0, len(text), PIECE):  # the list of a long document's chunks would take 30 times its size
            piece = lowercase.normalize_str(text[i:i + PIECE])
            characters.update(piece)
            chunks.update(cut.findall(piece))
            if len(chunks) > most:  # the rarer half goes, of equal ones the later: the same every time
                chunks = Counter(dict(chunks.most_common(most // 2)))

    def by_rank(counts):
        return sorted(counts, key=lambda x: (-counts[x], x))
    vocab = [*SPECIAL_TOKENS, *by_rank(characters)[:vocab_size // 4], *(c for c in by_rank(chunks) if len(c) > 1)][:vocab_size]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [], ignore_merges=True, unk_token="<|unk|>"))
    tokenizer.normalizer = lowercase
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(CHUNKS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(added_tokens())
    return tokenizer


TRAINERS = {"bpe": train_bpe, "hybrid": train_hybrid, "chunk": train_chunk}


def vocabulary_size(tokenizer):
    """One more than the highest id: a tokenizer from elsewhere may leave ids unused."""
    return 1 + max(tokenizer.get_vocab().values())


def unknown_id(tokenizer):
    """The token id that stands for text outside the vocabulary; None if the tokenizer can spell any text."""
    model = json.loads(tokenizer.to_str())["model"]
    return model["unk_id"] if "unk_id" in model else tokenizer.token_to_id(model.get("unk_token") or "")


def byte_of_character():
    """ByteLevel's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on. char -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def token_byte_counts(tokenizer):
    """UTF-8 bytes of text behind each token id, int64 (vocabulary size,); special tokens stand for none.

    So does <|unk|>: text that a tokenizer cannot spell adds no bytes, which can only raise bits per byte. The text is the
    normalized one: of İ, which has two bytes, chunk sees i̇, which has three.
    """
    is_bytes, special = byte_of_character(), {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    counts = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    byte_level = '"ByteLevel"' in tokenizer.to_str()
    for token, i in tokenizer.get_vocab().items():
        if i not in special:
            counts[i] = len(token) if byte_level and all(c in is_bytes for c in token) else len(tokenizer.decode([i]).encode())
    return counts


def fast_encoder(tokenizer):
    """A function texts -> list of id arrays, the ids of tokenizer.encode, by the quickest way there is.

    GPT-2-style byte-level BPE goes through tiktoken's merge loop, built from the same merges: 3 to 7 times faster. Ids are
    the same if every token's own text encodes to that token, by one merge only, which is checked. All else goes through encode_batch.
    """
    spec = json.loads(tokenizer.to_str())
    model, pre = spec["model"], spec["pre_tokenizer"] or {}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    byte = byte_of_character()
    tokens = sorted(byte, key=byte.get) + [a + b for a, b in merges]  # tiktoken merges the pair of lowest rank first
    plain = (model["type"] == "BPE" and merges and not spec["normalizer"] and pre.get("type") == "ByteLevel"
             and not pre["add_prefix_space"] and pre.get("use_regex", True) and not model["dropout"] and not model["ignore_merges"]
             and not model["continuing_subword_prefix"] and not model["end_of_word_suffix"]
             and len({a + b for a, b in merges}) == len(merges) and byte.keys() <= model["vocab"].keys()
             and all(t.special for t in tokenizer.get_added_tokens_decoder().values())  # others are found in the text first
             and all(len(tokenizer.model.tokenize(t)) == 1 for t in tokens))
    if not plain:
        return lambda texts: [np.array(e.ids, dtype=np.uint32) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    import tiktoken
    ranks = {bytes(byte[c] for c in t): rank for rank, t in enumerate(tokens)}
    ids = np.array([model["vocab"][t] for t in tokens], dtype=np.uint32)
    encoding = tiktoken.Encoding("prepare", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
    pool = ThreadPoolExecutor(os.cpu_count())  # the merge loop runs outside Python's lock

    def encode(texts):
        tasks, size = [[]], 0
        for text in texts:  # a task for each would take longer than a short text itself
            tasks[-1].append(text)
            size += len(text)
            if size >= TASK:
                tasks.append([])
                size = 0
        done = pool.map(lambda task: [ids[encoding.encode_to_numpy(t, disallowed_special=())] for t in task], tasks)
        return list(itertools.chain.from_iterable(done))
    return encode


# ---------------------------------------------------------------------------------------------------- reading documents

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
PIECE = 2 ** 16  # characters; a longer text file becomes several documents, cut at paragraph ends


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
    hub: object = None  # the HubSet that is streamed, at `revision` or from a copy in `folder`
    revision: str = ""
    folder: object = None

    def reader(self, state=None):
        if not self.hub:
            return Reader(self.documents, state)
        reader = HubReader(self.name, self.hub, self.revision, self.folder, None if self.hub.articles else state)
        if self.hub.articles:  # must stay in order; the set is small enough to be read again up to the place
            return Reader(lambda: articles(reader.rows(self.hub.configs[0][0], reader.state["parts"][0])), state)
        return reader


def library():
    """Module's name -> its source file, of the running Python's library without tests, installed packages, this machine's compiler
    flags and the help topics. Raises UserError where a Python was installed without its sources."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in sorted(root.rglob("*.py"))
             if not left_out.intersection(p.relative_to(root).parts) and not p.name.startswith("_sysconfigdata")
             and p.relative_to(root).parts[0] != "pydoc_data"}
    if not files:
        raise UserError(f"this Python has no library sources under {root}; give prepare.py a text file or folder of yours")
    return files


def library_texts(files):
    """(module's name, source text) of library()'s files but the 65 code pages that gencodec.py generates: a tenth of the text, tables without an end."""
    for module, p in files.items():
        with tokenize.open(p) as f:  # honours a coding line
            text = f.read()
        if "gencodec.py" not in text[:2000]:
            yield module, text


def pydocs():
    """The running Python's library: a document per module's source, and per help topic.

    Raises UserError where a Python was installed without its sources.
    """
    files = library()

    def documents():
        yield from (text for _, text in library_texts(files))
        from pydoc_data.topics import topics
        for key in sorted(topics):
            yield topics[key]
    return Source("pydocs", "en", "code", {"dataset": "pydocs", "python": platform.python_version()}, documents)


EMBEDDED = {"pydocs": pydocs}


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


def split_budget(word):
    """'novels@it/books:50M' -> ('novels@it/books', 50000000); None where there is none, 0: all."""
    m = None if os.path.exists(word) else re.fullmatch(r"(.+):(\d[\d_,.]*[KMB]?)", word, re.I)
    try:
        return (m[1], number(m[2])) if m else (word, None)
    except argparse.ArgumentTypeError as e:
        raise UserError(f"the budget behind {m[1]}: {e}") from None


def local_source(word, column):
    """A file or folder, with `@language/kind` behind it perhaps, as a Source. UserError if nothing readable is there."""
    path, _, label = (word, "", "") if os.path.exists(word) else word.rpartition("@")
    if not path or not os.path.exists(path):
        known = (*EMBEDDED, *HUB, *MIXES)
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


# ---------------------------------------------------------------------------------------------------- reading chats

class NoChat(ValueError):
    """A row that is no chat. Its text is the reason, a key of meta.json's `skipped`."""


def tidy(messages):
    """[(role, text)] as the chat format wants it: a system message perhaps, then user and assistant in turn, an assistant's at the end.

    Neighbours of one role become one message, an empty line between them; a question without a reply at the end goes, for nothing
    is learned from it. An empty text is a message like any other. Raises NoChat for other roles, text that is none, a system
    message further on, a reply that nobody asked for, and where no reply or no text is left.
    """
    chat = []
    for role, text in messages:
        if role not in ("system", "user", "assistant"):
            raise NoChat("role other than system, user and assistant")
        if not isinstance(text, str):
            raise NoChat("not text")
        if chat and chat[-1][0] == role:
            chat[-1] = (role, "\n\n".join(filter(None, (chat[-1][1], mended(text)))))
            continue
        if role == "system" and chat:
            raise NoChat("system message inside the chat")
        if role == "assistant" and (not chat or chat[-1][0] == "system"):
            raise NoChat("begins with a reply")
        chat.append((role, mended(text)))
    if chat and chat[-1][0] == "user":
        chat.pop()
    if not chat or chat[-1][0] != "assistant":
        raise NoChat("no reply")
    if not any(text.strip() for _, text in chat):
        raise NoChat("empty")
    return chat


def chat_messages(row):
    """The chat in a row as [(role, text)], see tidy(). Its layout is told by its shape: {"messages": [{"role", "content"}]}; alpaca's
    {"instruction", "input", "output"} and dolly's {"instruction", "context", "response"}, one question and its reply; TinyChat's
    line `[INST] user [/INST] reply [INST] ...`. Raises NoChat for anything else."""
    if isinstance(row, str):
        before, *parts = re.split(r"(\[/?INST\])", row)
        if before.strip() or not parts or any(mark != ("[INST]", "[/INST]")[i % 2] for i, mark in enumerate(parts[::2])):
            raise NoChat("[INST] and [/INST] not in turn")
        return tidy((("user", "assistant")[i % 2], text.strip()) for i, text in enumerate(parts[1::2]))
    if not isinstance(row, dict):
        raise NoChat("not a chat")
    if isinstance(row.get("messages"), list) and all(isinstance(m, dict) for m in row["messages"]):
        return tidy((m.get("role"), m.get("content")) for m in row["messages"])
    for extra, reply in (("input", "output"), ("context", "response")):
        if "instruction" in row and reply in row:
            return tidy([("user", row["instruction"]), *([("user", row[extra])] if str(row.get(extra) or "").strip() else []), ("assistant", row[reply])])
    raise NoChat("not a chat")


CHAT_COLUMNS = ("messages", "instruction", "input", "output", "context", "response")


def chat_rows(path, longest=-1):
    """The rows of a .jsonl, .jsonl.gz or .parquet file, or the lines of a text file, of at most `longest` characters, for chat_messages() to read."""
    if path.suffix not in (".txt", ".md"):
        yield from row_documents(path, "", chat=True)
        return
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        yield from (line for line in iter(lambda: f.readline(longest), "") if line.strip())


def is_chat(row):
    """Whether a row, or a line of a text file, has one of the layouts that chat_messages() reads."""
    if isinstance(row, str):
        return row.lstrip().startswith("[INST]")
    return isinstance(row.get("messages"), list) or "instruction" in row and ("output" in row or "response" in row)


def chat_document(messages, split_hash=None):
    """A tidy chat as a Document. Its messages, roles and all, make its hash; that decides the split too unless there is another."""
    own = text_hash(json.dumps(messages).encode())
    return Document("\n".join(t for _, t in messages), "".join(t for _, t in messages).encode(), own, own if split_hash is None else split_hash, messages)


# ---------------------------------------------------------------------------------------------------- pydocs-chat

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SENTENCE_END = r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)[.!?](?= |$)"
# What is asked, in the order of the turns of a chat: nothing that stands in a question is asked for behind it
QUESTIONS = {
    "where": ["Which module has a {noun} called {bare}?", "Where in the standard library do I find {bare}?", "In which module is the {noun} {bare}?"],
    "signature": ["What is the signature of {name}?", "How is {name} defined?", "How does the definition of the {noun} {name} begin?"],
    "summary": ["What does {name} do?", "What is the {noun} {name} for?", "Can you explain {name}?", "I found {name} in somebody's code. What is it?",
                "{signature}\n\nWhat does this {noun} of {owner} do?", "This is from {owner}:\n\n{signature}\n\nWhat is it for?"],
    "which": ["Which {noun} of {owner} is described as follows?\n\n{summary}", "Name the {noun} of {owner} with this description: {summary}",
              "I look for a {noun} of {owner}. {summary}"],
    "arguments": ["Which arguments does {name} take?", "What do I pass to {name}?", "{signature}\n\nWhich arguments does this {noun} of {owner} take?",
                  "Name the arguments of this {noun} of {owner}:\n\n{signature}"],
    **{kind: [f"Which {kind} does the {{noun}} {{name}} have?", f"What are the {kind} of {{name}}?"] for kind in ("functions", "classes", "methods")},
    "docstring": ["Show me the docstring of {name}.", "What does the documentation of the {noun} {name} say?", "Tell me more about {name}."]}
FOLLOW_UPS = {
    "signature": ["What is its signature?", "And how is it defined?"], "summary": ["What does it do?", "And what is it for?"],
    "docstring": ["Show me its docstring.", "Tell me more about it."],
    **{kind: [f"Which {kind} does it have?", f"And its {kind}?"] for kind in ("functions", "classes", "methods")}}
SYSTEM = ["You answer questions about Python's standard library.", "You are a helpful assistant who knows Python.", "Answer briefly and precisely."]


def prose(docstring):
    """The first sentences of a docstring, 300 characters at most, in one line; '' where neither of its first two paragraphs is sentences."""
    for paragraph in re.split(r"\n\s*\n", docstring)[:2]:
        text = " ".join(paragraph.split())
        if re.match(r"[A-Z][\w'`]*,? \S", text) and not re.search(r">>>|^[ *+|-]|\S {3,}\S|--|->|\$", paragraph, re.M):
            text += "" if text[-1] in ".!?:" else "."
            return max((text[:m.end()] for m in re.finditer(SENTENCE_END, text[:301])), key=len, default="")
    return ""


def paragraphs(docstring):
    """A docstring of several paragraphs up to the last one that ends within 500 characters; '' where that is less than two."""
    ends = [m.start() for m in re.finditer(r"\n\s*\n|\Z", docstring) if m.start() <= 500 and not docstring[:m.start()].endswith(":")]
    return docstring[:ends[-1]] if len(ends) > 1 else ""


def listing(subject, kind, names):
    """'textwrap.wrap', 'arguments', ['text', 'width'] -> 'textwrap.wrap takes 2 arguments: text and width.'; twelve names at most."""
    count = {0: f"no {kind}", 1: f"one {kind.removesuffix('es' if kind == 'classes' else 's')}"}.get(len(names), f"{len(names)} {kind}")
    names, among = names[:12], ", among them " if len(names) > 12 else ": " if names else ""
    return f"{subject} {'takes' if kind == 'arguments' else 'has'} {count}{among}{' and '.join(filter(None, (', '.join(names[:-1]), *names[-1:])))}."


def head(node, outer):
    """The lines that begin a definition: a method's class, decorators, name, arguments or bases, and a class's __init__."""
    def bodyless(x):
        x = copy.copy(x)
        x.body = [bodyless(y) for y in x.body if isinstance(x, ast.ClassDef) and getattr(y, "name", "") == "__init__"][:1]
        return x
    text = ast.unparse(bodyless(node)).replace("\n\n", "\n")
    return f"class {'.'.join(outer)}:\n{textwrap.indent(text, '    ')}" if outer else text


def is_property(node):
    return any(re.search(r"property|\.[gs]etter$|\.deleter$", ast.unparse(d)) for d in node.decorator_list)


def described(module, node, outer=()):
    """What can be asked about a module, class or function, then about each class and function in its body: dicts of name, noun, owner and
    `facts`, kind of question -> reply. What has no docstring and a private name is left out."""
    docstring, bare = (ast.get_docstring(node) or "").strip(), getattr(node, "name", "")  # a module's node has no name
    path = (*outer, *[bare] * bool(bare))
    name, owner = ".".join((module, *path)), ".".join((module, *outer)) if bare else "the standard library"
    inner = [x for x in node.body if isinstance(x, DEFINITIONS)]
    public = {x.name: isinstance(x, ast.ClassDef) for x in inner if not x.name.startswith("_") and not is_property(x)}
    functions, classes = ([name for name, is_class in public.items() if is_class == wanted] for wanted in (False, True))
    if isinstance(node, ast.Module):
        noun, lists = "module", dict(functions=functions, classes=classes)
    elif isinstance(node, ast.ClassDef):
        noun, lists = "class", dict(methods=functions)
    else:
        noun, a, inner = "property" if is_property(node) else "method" if outer else "function", node.args, []
        names = ["*" * (x is a.vararg) + "**" * (x is a.kwarg) + x.arg for x in ast.iter_child_nodes(a) if isinstance(x, ast.arg)]
        lists = dict(arguments=names[bool(outer) and "staticmethod" not in map(ast.unparse, node.decorator_list):])  # without self
    if docstring or not any(part.startswith("_") for part in path):
        facts = {kind: listing(name, kind, names) for kind, names in lists.items() if names or noun in ("function", "method")}
        facts |= dict(summary=prose(docstring), docstring=paragraphs(docstring), signature=head(node, outer) if bare else "", which=f"That is {name}.")
        if bare and not outer and not any(part.startswith("_") for part in name.split(".")):
            facts |= dict(bare=bare, where=f"{bare} is a {noun} of the module {module}.")
        yield dict(name=name, noun=noun, owner=owner, facts={k: v for k, v in facts.items() if v and len(v) <= 500})
    for x in inner:
        yield from described(module, x, path)


def dialogues(things):
    """Chats of one to three turns about the things of one module, as lists of (question, reply). Each fact is told once. How it is asked for,
    and whether behind another question, is up to the hash of the thing's name and the kind of question."""
    chats = []
    for thing in things:
        known, opened = thing | thing["facts"], False
        for kind in (k for k in QUESTIONS if k in thing["facts"]):
            pick = zlib.crc32(f"{thing['name']} {kind}".encode())
            joins = opened and kind in FOLLOW_UPS and len(chats[-1]) < 3 and pick % 3 > 0
            usable = [q for q in (FOLLOW_UPS if joins else QUESTIONS)[kind] if known.keys() >= {*re.findall(r"{(\w+)}", q)}]
            if not usable:
                continue
            if not joins and not (chats and not opened and len(chats[-1]) < 3 and pick % 3 == 0):  # a thing may follow the one before
                chats.append([])
            chats[-1].append((usable[pick // 3 % len(usable)].format(**known), thing["facts"][kind]))
            opened = True
    return chats


def pydocs_chat():
    """Questions and answers about the running Python's library, made from its sources' signatures and docstrings. A chat is training or
    validation text as its module is in pydocs. What two definitions have in common, a docstring say, is left out: no reply occurs twice,
    and none of a validation module in a training chat.

    Raises UserError where a Python was installed without its sources.
    """
    files = library()

    @functools.cache  # asked for twice: for the tokenizer's sample and to encode
    def modules():
        found = []
        for module, text in library_texts(files):
            things = {}
            for thing in described(module, ast.parse(text)):
                things.setdefault(thing["name"], thing)  # a setter has its getter's name: the first is meant
            found.append((text_hash(text.encode()), list(things.values())))
        told = Counter(fact for _, things in found for thing in things for fact in thing["facts"].values())
        for thing in (thing for _, things in found for thing in things):
            thing["facts"] = {kind: fact for kind, fact in thing["facts"].items() if told[fact] == 1}
        return found

    def documents():
        for hash, things in modules():
            for chat in dialogues(things):
                pick = zlib.crc32(chat[0][0].encode())
                system = [("system", SYSTEM[pick // 8 % len(SYSTEM)])] if pick % 8 == 0 else []
                yield chat_document([*system, *(message for turn in chat for message in zip(("user", "assistant"), turn))], hash)
    return Source("pydocs-chat", "en", "chat", {"dataset": "pydocs-chat", "python": platform.python_version()}, documents, chat=True)


EMBEDDED["pydocs-chat"] = pydocs_chat


# ---------------------------------------------------------------------------------------------------- the Hugging Face Hub

@dataclass
class HubSet:
    """A data set of the Hub: where its text lies, and what --list tells of it."""
    repo: str
    about: str
    licence: str
    language: str
    kind: str
    rows: str  # documents of the split, approximately
    tokens: str  # tokens of a GPT-2-like vocabulary, approximately
    disk: str  # size of the files that are read, approximately; they are streamed, never stored
    configs: tuple = ((None, 1),)  # each with its share of the documents
    columns: tuple = ("text",)  # those that are read; empty: the format has no choice (.txt, .jsonl)
    filters: tuple = ()  # as pyarrow writes them: (column, operator, value)
    budget: int = 0  # training tokens unless the user names a number; 0: all
    articles: bool = False  # rows are lines, which belong together up to the next title
    chat: bool = False  # rows are chats, see chat_messages()


M = 10 ** 6
# Figures: the sets' cards on the Hub; those with a ~ are estimates from their sizes
HUB = {
    "fineweb-hq": HubSet("epfml/FineWeb-HQ", "English web, the best tenth, score > 0.8", "ODC-By", "en", "web", "2.4B", "~2T", "TBs",
                         filters=(("quality_score", ">", 0.8),), budget=200 * M),
    "fineweb2-hq-it": HubSet("epfml/FineWeb2-HQ", "Italian web, the best tenth", "ODC-By", "it", "web", "21M", "~27B", "~270 GB",
                             configs=(("ita_Latn", 1),), budget=200 * M),
    "fineweb-edu": HubSet("HuggingFaceFW/fineweb-edu", "educational web pages, sample-10BT", "ODC-By", "en", "web", "9.7M", "10B", "28 GB",
                          configs=(("sample-10BT", 1),), budget=200 * M),
    "python-stack": HubSet("bigcode/python-stack-v1-functions-filtered", "Python functions with docstrings", "permissive", "en", "code", "~0.6M", "~0.13B", "0.2 GB",
                           columns=("content",)),
    "finemath": HubSet("HuggingFaceTB/finemath", "mathematics from the web, finemath-4plus", "ODC-By", "en", "math", "6.7M", "9.6B", "18 GB",
                       configs=(("finemath-4plus", 1),), budget=200 * M),
    "cosmopedia": HubSet("HuggingFaceTB/cosmopedia", "synthetic textbooks, stanford and wikihow", "Apache-2.0", "en", "books", "1.2M", "~1.4B", "3.8 GB",
                         configs=(("stanford", 1_020_024), ("wikihow", 179_191)), budget=200 * M),
    "wikipedia": HubSet("wikimedia/wikipedia", "English Wikipedia of 2023-11-01", "CC BY-SA", "en", "wiki", "6.4M", "4.6B", "12 GB",
                        configs=(("20231101.en", 1),), budget=200 * M),
    "wiki40b-en": HubSet("google/wiki40b", "cleaned English Wikipedia", "CC BY-SA", "en", "wiki", "2.9M", "~2.2B", "6.2 GB", configs=(("en", 1),), budget=200 * M),
    "wiki40b-it": HubSet("google/wiki40b", "cleaned Italian Wikipedia", "CC BY-SA", "it", "wiki", "0.73M", "~0.7B", "1.3 GB", configs=(("it", 1),), budget=200 * M),
    "wikitext": HubSet("Salesforce/wikitext", "good English Wikipedia articles, wikitext-103", "CC BY-SA", "en", "wiki", "28K", "118M", "0.3 GB",
                       configs=(("wikitext-103-raw-v1", 1),), articles=True),
    "tinystories": HubSet("roneneldan/TinyStories", "stories in the words of small children", "CDLA-Sharing", "en", "books", "2.1M", "470M", "1 GB"),
    "tinychat": HubSet("starhopp3r/TinyChat", "short chats in simple words", "CC BY-NC", "en", "chat", "1M", "~175M", "0.7 GB", columns=(), chat=True),
    "alpaca": HubSet("tatsu-lab/alpaca", "instructions and replies of a language model", "CC BY-NC", "en", "chat", "52K", "~4M", "24 MB",
                     columns=("instruction", "input", "output"), chat=True),
    "dolly": HubSet("databricks/databricks-dolly-15k", "instructions and replies by people", "CC BY-SA", "en", "chat", "15K", "~3M", "13 MB", columns=(), chat=True),
    "smol-smoltalk": HubSet("HuggingFaceTB/smol-smoltalk", "chats for models below a billion parameters", "Apache-2.0", "en", "chat", "460K", "~0.4B", "1 GB",
                            columns=("messages",), chat=True),
    "hq-sentences": HubSet("agentlans/high-quality-english-sentences", "single well-formed sentences", "ODC-By", "en", "web", "1.5M", "~48M", "0.1 GB", columns=()),
}
# Mix -> (what it feeds, its sources in the order of the training run with their budgets)
MIXES = {
    "ivme": ("ivme: its card's five sources in ascending quality",
             (("fineweb-hq", 710 * M), ("python-stack", 160 * M), ("finemath", 235 * M), ("cosmopedia", 395 * M), ("wikipedia", 80 * M))),
    "gpt2preln": ("gpt2preln: English and Italian as on its card, budgets for web and wiki alike (our reading; wiki40b-it ends at some 0.7B)",
                  (("fineweb-hq", 1_796_855_746), ("wiki40b-en", 1_796_855_746), ("fineweb2-hq-it", 1_652_941_754), ("wiki40b-it", 1_652_941_754))),
    "i3": ("i3-22m: its card's TinyChat, all of it", (("tinychat", 0),)),  # 0: all
    "i3-80m": ("i3-80m: its card's three sets, some 3M tokens in all; how much of each is our choice",
               (("tinystories", M), ("tinychat", M), ("hq-sentences", M))),
    "i3-200m": ("i3-200m: its card's four sets; how much of each is our choice",
                (("tinystories", M), ("tinychat", M), ("hq-sentences", M), ("wikitext", M))),
    "tinymemory": ("tinymemory, larger than pydocs; its card names no data, the choice is ours", (("tinystories", 40 * M), ("hq-sentences", 10 * M))),
}


def articles(rows):
    """Joins wikitext's lines into articles: a title is a line ` = Title = `, a heading in one has more signs of equality."""
    lines = []
    for line in rows:
        if re.fullmatch(r" = [^=].* = \n?", line) and lines:
            yield "".join(lines)
            lines = []
        lines.append(line)
    yield "".join(lines)


class HubReader:
    """Goes over a Hub set as a Reader does over local text, in blocks of BLOCK documents, each in a random order that depends on its
    number alone. `state` names the present block's beginning, as the `datasets` library can find it again, and the place in it.

    A dropped connection, a busy server and the like are tried again after growing pauses, TRIES times in a row. UserError says what did
    not work in the end, and what is wrong with a file that is not as it should be.
    """
    BLOCK, BLOCK_BYTES, TRIES, PAUSE = 10_000, 64 * 2 ** 20, 8, 1.0

    def __init__(self, name, spec, revision, folder, state=None):
        self.name, self.spec, self.revision, self.folder, self.stopped = name, spec, revision, folder, threading.Event()
        self.state = state or dict(block=0, taken=0, parts=[dict(rows=None, read=0, ended=False) for _ in spec.configs])

    def open(self, config, state):
        import datasets
        where = dict(path=str(self.folder)) if self.folder else dict(path=self.spec.repo, revision=self.revision)
        choice = dict(columns=list(self.spec.columns)) if self.spec.columns else {}
        if self.spec.filters:
            choice["filters"] = list(self.spec.filters)
        data = datasets.load_dataset(**where, name=config, split="train", streaming=True, **choice)
        if state:
            data.load_state_dict(state)
        return data

    def rows(self, config, part):
        """The texts of a config from where `part` says on; part is kept up to date."""
        tries = 0
        while True:
            try:
                data = self.open(config, part["rows"])
                with contextlib.closing(iter(data)) as rows:
                    for row in rows:
                        tries, state = 0, data.state_dict()
                        text = row if self.spec.chat and "text" not in row else row[self.spec.columns[0] if self.spec.columns else "text"]
                        part |= dict(rows=state, read=part["read"] + 1)
                        yield text
                        if self.stopped.is_set():  # nobody waits for more
                            return
                part["ended"] = True
                return
            except Exception as e:  # pyarrow, fsspec, the Hub's client and its HTTP library raise many types
                if not passing(e):
                    raise UserError(f"{self.name}: {self.spec.repo} cannot be read as expected ({type(e).__name__}: {str(e)[:300]})") from None
                tries += 1
                if tries > self.TRIES:
                    raise UserError(f"{self.name}: the connection to the Hugging Face Hub is lost ({type(e).__name__}: {str(e)[:200]}); "
                                    "the same command goes on from what is written") from None
                pause = min(60.0, self.PAUSE * 2 ** (tries - 1))
                Progress().done(f"{self.name:<12} {type(e).__name__}: {' '.join(str(e).split())[:120]}; trying again in {pause:.0f} s ({tries} of {self.TRIES})")
                if self.stopped.wait(pause):
                    return

    def __iter__(self):
        parts, block, taken = [dict(part) for part in self.state["parts"]], self.state["block"], self.state["taken"]
        streams = [self.rows(config, part) for (config, _), part in zip(self.spec.configs, parts)]
        while True:
            begin, texts, size = [dict(part) for part in parts], [], 0
            while len(texts) < self.BLOCK and size < self.BLOCK_BYTES and not all(part["ended"] for part in parts) and not self.stopped.is_set():
                # of several configs the one furthest behind its share
                i = min((i for i, part in enumerate(parts) if not part["ended"]), key=lambda i: parts[i]["read"] / self.spec.configs[i][1])
                for text in itertools.islice(streams[i], 1):
                    texts.append(text)
                    size += len(text if isinstance(text, str) else str(text))
            if not texts or self.stopped.is_set():
                return
            order = np.random.default_rng([0, block]).permutation(len(texts)).tolist()
            for k in range(taken, len(order)):
                self.state = dict(block=block, taken=k + 1, parts=begin)
                yield texts[order[k]]
            block, taken = block + 1, 0


def passing(error):
    """Whether an error may be gone in a while: the network's, and a server's that is busy or broken."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if "LocalEntryNotFoundError" in str(error):  # how the Hub's client says that it could not ask, and has no copy
        return True
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp")


def hub_setup():
    """The `datasets` library with its messages off and its own endless retries shortened; UserError if it is not installed."""
    try:
        import datasets
        import huggingface_hub.hf_file_system
    except ImportError as e:
        raise UserError(f"the Hub's data sets need the package {e.name}: pip install -r requirements.txt") from None
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1  # HubReader tries again, and says so
    huggingface_hub.hf_file_system.HfFileSystemFile.DEFAULT_BLOCK_SIZE = 2 ** 20  # with the default each read brings 5 MB of other columns along
    for log in (datasets.logging, huggingface_hub.utils.logging):
        log.set_verbosity(log.CRITICAL)
    datasets.disable_progress_bars()


def hub_revision(name, spec):
    """The commit of a data set's repository as it is now; UserError, within half a minute, if the Hub does not answer."""
    from huggingface_hub import HfApi
    begun = time.monotonic()
    while True:
        try:
            return HfApi().dataset_info(spec.repo, timeout=8).sha
        except Exception as e:
            if not passing(e):
                raise UserError(f"{name}: the Hugging Face Hub does not give {spec.repo} ({type(e).__name__}: {str(e)[:200]})") from None
            if time.monotonic() - begun > 5:
                raise UserError(f"{name}: the Hugging Face Hub cannot be reached for {spec.repo} ({type(e).__name__}); without it there are pydocs, which needs "
                                "no network, a text file or folder of yours, and --source_dir=DIR with a copy of the repository") from None
            time.sleep(2)


def hub_source(name, source_dir, several):
    """A Source for a name in HUB. Its revision is asked for when it is first read."""
    spec, folder = HUB[name], None
    if source_dir:
        places, name_there = [Path(source_dir) / spec.repo, Path(source_dir) / spec.repo.split("/")[1]], Path(source_dir).resolve().name
        if not several and (name_there == spec.repo.split("/")[1] or (Path(source_dir) / "README.md").exists()):  # the folder is the copy itself
            places.append(Path(source_dir))
        folder = next((p for p in places if p.is_dir()), None)
        if folder is None:
            raise UserError(f"--source_dir={source_dir} holds no copy of {spec.repo}: expected {' or '.join(map(str, places))}")
    stamp = [str(folder.resolve()), max(p.stat().st_mtime_ns for p in folder.rglob("*"))] if folder else 0
    origin = dict(dataset=spec.repo, configs=[c for c, _ in spec.configs], columns=list(spec.columns), filter=[list(f) for f in spec.filters])
    return Source(name, spec.language, spec.kind, origin, None, budget=spec.budget, chat=spec.chat, stamp=stamp, hub=spec, folder=folder)


def list_table():
    """The lines of --list."""
    rows = [("name", "what it is", "licence", "documents", "tokens", "files", "language", "default", "in the mixes")]
    rows += [("pydocs", "this Python's library and help topics, no download", "PSF", "600", "4M", "11 MB", "en/code", "all", ""),
             ("pydocs-chat", "questions and answers about that library, no download", "PSF", "31,000", "2.6M", "6 MB", "en/chat", "all", "")]
    for name, x in HUB.items():
        mixes = ", ".join(mix for mix, (_, parts) in MIXES.items() if name in dict(parts))
        rows.append((name, x.about, x.licence, x.rows, x.tokens, x.disk, f"{x.language}/{x.kind}", f"{x.budget // M}M tokens" if x.budget else "all", mixes))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    yield from ("  ".join(cell.ljust(n) for cell, n in zip(row, wide)).rstrip() for row in rows)
    for mix, (what, parts) in MIXES.items():
        total = sum(n for _, n in parts)
        yield ""
        yield f"{mix}: {what}" + f"; {total / M:,.0f}M tokens" * (total > 0)
        yield from (f"  {name:<{wide[0]}}  {n / M:>8,.0f}M  {n / total:.0%}" for name, n in parts if n)
    yield "\nA source that holds less than its budget gives all that it has."


# ---------------------------------------------------------------------------------------------------- the two passes

@dataclass
class Document:
    text: str  # of a chat its texts one below the other, for the tokenizer to learn from
    utf8: bytes
    hash: int  # 64 bits of the text alone: decides the sample, and finds duplicates
    split_hash: int  # decides the split: `hash`, and for a chat of pydocs-chat that of its module
    messages: list = None  # a chat's [(role, text)]


def text_hash(utf8):
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")


def mended(text):
    """The text as UTF-8 can hold it: halves of surrogate pairs out of JSON escapes are joined, those without a partner become U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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


def why_skipped(skipped):
    """{"empty": 3} -> '; left out: 3 empty', nothing where nothing was."""
    counts = ", ".join(f"{n:,} {what}" for what, n in skipped.items() if n)
    return f"; left out: {counts}" * bool(counts)


def scan(source, threshold, sample_bytes):
    """First pass: how much there is, a sample of the training text, and where the validation split lies.

    The sample is the documents of lowest rehashed hash that fit sample_bytes: even over all that is read, the same whatever its order,
    and never more than that in memory. Of a source with a budget no more is read than the budget can need, of a Hub set its beginning,
    sample_bytes or a megabyte. If no document's hash is below `threshold`, the split moves up to the lowest one, so that a small source has
    validation text too. Returns (texts, threshold, bytes, or None where there is more, documents).
    """
    sample, sampled, bar, total, lowest, highest, n, skipped = [], 0, 2 ** 64, 0, 2 ** 64, -1, 0, Counter()
    progress = Progress()
    for d in clean(source.reader(), chat=source.chat):
        if not isinstance(d, Document):
            skipped[d] += 1
            continue
        progress.show(f"{source.name:<12} reading, {total / 1e6:,.1f} MB")
        total, n, lowest, highest = total + len(d.utf8), n + 1, min(lowest, d.split_hash), max(highest, d.split_hash)
        key = d.hash * 0x9E3779B97F4A7C15 % 2 ** 64  # independent of the split's order
        if d.split_hash >= threshold and sample_bytes and key < bar:
            heapq.heappush(sample, (-key, d.text, len(d.utf8), d.split_hash))
            sampled += len(d.utf8)
            while sampled > sample_bytes and len(sample) > 1:
                bar = -sample[0][0]  # what ranks behind a document that did not fit stays out, even if it is short
                sampled -= heapq.heappop(sample)[2]
        if source.hub and total > max(sample_bytes, HUB_SCAN) and lowest < highest:
            total = None
            break
        if source.budget and total > 8 * source.budget and lowest < highest:  # no tokenizer here makes tokens that long: the budget ends before this
            break
    if not n or threshold and lowest == highest:
        raise UserError(f"{source.name} holds {'only one document' if n else 'no document'} of text; "
                        f"a training and a validation split need two different ones{why_skipped(skipped)}")
    if threshold:
        threshold = min(max(threshold, lowest + 1), highest)
    texts = [text for _, text, _, split_hash in sorted(sample, reverse=True) if split_hash >= threshold]
    return texts, threshold, total, n


def chat_ids(tokenizer):
    """Special token -> id, for encode_chats(). UserError where the tokenizer has none for the three roles."""
    ids = {token: tokenizer.token_to_id(token) for token in ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        raise UserError(f"the tokenizer has no {' and no '.join(missing)}, which chats are framed with; take bpe, hybrid or chunk")
    return ids


def encode_chats(chats, encode, ids):
    """Chats, tidy [(role, text)] each, as a list of (ids uint32 (n,), mask uint8 (n,)):

        <|bos|>[<|system|>text]<|user|>text<|assistant|>text<|eos|><|user|>text<|assistant|>text<|eos|>...

    The mask is 1 for a reply's tokens and its <|eos|>. `encode`: texts -> id arrays, called once for all chats; `ids`: see chat_ids().
    """
    if not chats:
        return []
    texts = iter(encode([text for chat in chats for _, text in chat]))
    single = {token: np.array([i], np.uint32) for token, i in ids.items()}
    pieces, flags, ends = [], [], []
    for chat in chats:
        pieces.append(single["<|bos|>"])
        flags.append(0)
        for role, _ in chat:
            reply = role == "assistant"
            pieces += [single[f"<|{role}|>"], next(texts), *([single["<|eos|>"]] if reply else [])]
            flags += [0, 1, 1] if reply else [0, 0]
        ends.append(len(pieces))
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    stops = np.cumsum(lengths)[np.array(ends) - 1].tolist()
    tokens, mask = np.concatenate(pieces), np.repeat(np.array(flags, np.uint8), lengths)
    return [(tokens[a:b], mask[a:b]) for a, b in zip([0, *stops], stops)]


HUB_SCAN = 2 ** 20  # bytes of a Hub set that the first pass reads at least
BATCH_BYTES = 4 * 2 ** 20  # text that is encoded at once: enough to keep every core busy, little to hold
SAVE_SECONDS = 10  # between two records of how far the work is


class Record:
    """progress.json in a folder that is being made: the settings asked for, the sources that are done, and where the present one is.
    It is replaced as a whole, after the token files that it speaks of have reached the disk."""

    def __init__(self, folder, asked):
        self.path = folder / "progress.json"
        try:
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self.data = {}
        self.resumed = self.data.get("asked") == asked
        if not self.resumed:
            self.data = dict(asked=asked, scans=None, done=[], source=None)

    def save(self, **changes):
        self.data |= changes
        part = self.path.with_suffix(".part")
        with open(part, "w", encoding="utf-8") as f:
            json.dump(self.data, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, self.path)


def encode_source(source, stem, folder, tokenizer, encode, dtype, threshold, total_bytes, record):
    """Second pass: writes train.<stem>.bin and val.<stem>.bin, beside them the masks of chats, and returns the source's entry for meta.json.

    Goes on where `record` says; it is brought up to date every few seconds. The next batch is read while one is encoded.
    """
    bos, eos = (np.array([tokenizer.token_to_id(token)], np.uint32) for token in ("<|bos|>", "<|eos|>"))
    chat = chat_ids(tokenizer) if source.chat else None
    unknown, normalizer, max_tokens = unknown_id(tokenizer), tokenizer.normalizer, source.budget
    where = record.data["source"] or dict(splits={s: dict(file=f"{s}.{stem}.bin", tokens=0, unknown=0, documents=0, bytes=0,
                                                          **(dict(mask=dict(file=f"{s}.{stem}.mask.bin")) if chat else {})) for s in ("train", "val")},
                                          skipped=dict.fromkeys(SKIPPED, 0), state=None, hashes=0, seen_bytes=0)
    splits, hashes = where["splits"], f"hashes.{stem}.bin"
    sizes = {x["file"]: tokens * width for x, tokens, width in token_files([splits], dtype.itemsize)} | {hashes: 8 * where["hashes"]}
    out = {file: open(folder / file, "ab") for file in sizes}
    for file, f in out.items():
        if os.path.getsize(f.name) < sizes[file]:
            raise UserError(f"{f.name} is shorter than progress.json beside it says; delete {folder} to start anew")
        f.truncate(sizes[file])  # what was written behind the record is written again
    first = max(0, (where["hashes"] - 1) // Seen.LIMIT * Seen.LIMIT - Seen.LIMIT)  # what comes before is forgotten by now
    seen = Seen(np.fromfile(folder / hashes, dtype="<u8", offset=8 * first).tolist())
    reader = source.reader(where["state"])
    progress, started, at_start, shares = Progress(), time.monotonic(), where["seen_bytes"], []

    def batches():
        """(what `clean` gives, the reader's state behind it), and None at the end"""
        batch, size = [], 0
        for x in clean(reader, seen, source.chat):
            batch.append(x)
            size += len(x.utf8) if isinstance(x, Document) else 0
            if size > BATCH_BYTES or len(batch) > 100_000:
                yield batch, reader.state
                batch, size = [], 0
        yield batch, reader.state
        yield None

    def full():  # the training budget is spent, and there is something to validate on
        return max_tokens and splits["train"]["tokens"] >= max_tokens and (splits["val"]["tokens"] or not threshold)

    pending, saved = batches(), time.monotonic()
    with ThreadPoolExecutor(1) as ahead:
        try:
            future = ahead.submit(next, pending)
            while not full() and (item := future.result()):
                batch, where["state"] = item
                future = ahead.submit(next, pending)
                pieces, documents = {file: [] for file in sizes}, [x for x in batch if isinstance(x, Document)]
                if chat:
                    encoded = iter(encode_chats([d.messages for d in documents], encode, chat))
                else:
                    encoded = ((np.concatenate((bos, ids, eos)), None) for ids in encode([d.text for d in documents]))
                for d in batch:
                    if not isinstance(d, Document):
                        where["skipped"][d] = where["skipped"].get(d, 0) + 1
                        continue
                    ids, mask = next(encoded)
                    split = "val" if d.split_hash < threshold else "train"
                    count = splits[split]
                    if split == "train" and max_tokens and count["tokens"] >= max_tokens:
                        continue
                    count["tokens"], count["documents"] = count["tokens"] + len(ids), count["documents"] + 1
                    count["unknown"] += 0 if unknown is None else int(np.count_nonzero(ids == unknown))
                    texts = [text for _, text in d.messages] if chat else [d.text]
                    # as token_byte_counts has them
                    count["bytes"] += sum(len(normalizer.normalize_str(text).encode()) for text in texts) if normalizer else len(d.utf8)
                    pieces[count["file"]].append(ids.astype(dtype))
                    if chat:
                        pieces[count["mask"]["file"]].append(mask)
                    where["seen_bytes"] += len(d.utf8)
                    if full():
                        break
                pieces[hashes].append(np.array([d.hash for d in documents], dtype="<u8"))
                for file, arrays in pieces.items():
                    if arrays:
                        out[file].write(np.concatenate(arrays).tobytes())
                where["hashes"] += len(documents)
                if time.monotonic() - saved > SAVE_SECONDS:
                    for f in out.values():
                        f.flush()
                        os.fsync(f.fileno())
                    record.save(source=where)
                    saved = time.monotonic()
                rate = (where["seen_bytes"] - at_start) / max(time.monotonic() - started, 1e-9)
                shares.append(max(splits["train"]["tokens"] / max_tokens if max_tokens else 0, where["seen_bytes"] / total_bytes if total_bytes else 0))
                left = f", {clock((time.monotonic() - started) * (1 - shares[-1]) / (shares[-1] - shares[0]))} left" if shares[-1] > shares[0] else ""
                progress.show(f"{source.name:<12} {where['seen_bytes'] / 1e6:,.1f} MB, {splits['train']['tokens'] / 1e6:,.1f}M tokens, {rate / 1e6:.1f} MB/s{left}")
        finally:
            reader.stopped.set()  # the thread that reads ahead need not wait for a lost connection
    for f in out.values():
        f.flush()
        os.fsync(f.fileno())
        f.close()
    for x, _, _ in token_files([splits]):
        with open(folder / x["file"], "rb") as f:
            x.update(file_size=os.path.getsize(f.name), sha256=hashlib.file_digest(f, "sha256").hexdigest())
    train, val, skipped = splits["train"], splits["val"], where["skipped"]
    share = (train["unknown"] + val["unknown"]) / max(1, train["tokens"] + val["tokens"])
    progress.done(f"{source.name:<12} {where['seen_bytes'] / 1e6:,.1f} MB, {train['documents'] + val['documents']:,} documents: {train['tokens']:,} training and "
                  f"{val['tokens']:,} validation tokens" + f", {share:.2%} unknown" * (unknown is not None) + why_skipped(skipped))
    return dict(name=source.name, language=source.language, kind=source.kind, origin=source.origin, budget=max_tokens, skipped=skipped, **splits)


def prepare(names, s):
    """Prepares the corpora `names` with Settings s and returns the folder. A folder with the same settings is left as it is."""
    if not names:
        raise UserError(f"name what to prepare: {', '.join(EMBEDDED)}, a data set or mix of --list, or a file or folder of yours")
    if not 0 <= s.val_fraction < 1:
        raise UserError(f"--val_fraction={s.val_fraction} is not a share from 0 up to 1")
    if s.max_tokens < -1 or s.vocab_size < 0:
        raise UserError("--max_tokens and --vocab_size cannot be negative")
    budgets = dict(map(split_budget, names))
    if len(budgets) < len(names):
        raise UserError("a name is given twice; one source is made of each")
    names, sources = list(budgets), []
    for name, budget in budgets.items():
        if name in MIXES and budget is not None:
            raise UserError(f"the sources of {name} have budgets of their own; --max_tokens gives all of them another one")
        for part, own in MIXES[name][1] if name in MIXES else ((name, budget),):
            several = len(budgets) > 1 or name in MIXES
            source = EMBEDDED[part]() if part in EMBEDDED else hub_source(part, s.source_dir, several) if part in HUB else local_source(part, s.column)
            asked_for = s.max_tokens if s.max_tokens >= 0 else None
            choices = (asked_for, own) if name in MIXES else (own, asked_for)
            sources.append(dataclasses.replace(source, budget=next((n for n in choices if n is not None), source.budget)))
    reuse = s.tokenizer not in TRAINERS
    if reuse and not os.path.isfile(s.tokenizer):
        raise UserError(f"--tokenizer={s.tokenizer} is neither {' nor '.join(TRAINERS)} nor a file{nearest(s.tokenizer, TRAINERS)}")
    if reuse and s.vocab_size:
        raise UserError("--vocab_size belongs to a new tokenizer, and --tokenizer names an existing one")
    if reuse and any(x.chat for x in sources):
        chat_ids(load_tokenizer(s.tokenizer))  # one without the roles' tokens is no use: better known before the text is read
    vocab_size = 0 if reuse else s.vocab_size or DEFAULT_VOCAB[s.tokenizer]
    least, why = len(SPECIAL_TOKENS) + 256, "the special tokens and the bytes alone are"
    if s.tokenizer == "chunk":
        least, why = 4 * 71, "a quarter of it is for single characters, and ASCII without capitals has 71 of them; take at least"
    if not reuse and vocab_size < least:
        raise UserError(f"--vocab_size={vocab_size} is too small: {why} {least}")

    folder = Path(s.out_dir) / (s.name or corpus_name(names, s.tokenizer, vocab_size))
    asked = dict(sources=[dict(name=x.name, language=x.language, kind=x.kind, **x.origin, **dict(budget=x.budget) if x.budget != max(0, s.max_tokens) else {})
                          for x in sources],
                 tokenizer=hashlib.sha256(Path(s.tokenizer).read_bytes()).hexdigest() if reuse else s.tokenizer,
                 vocab_size=vocab_size, max_tokens=max(0, s.max_tokens), val_fraction=s.val_fraction, column=s.column)
    if folder.exists():
        made = read_meta(folder)["settings"]
        if made == asked:
            print(f"{folder} is there already, made with these settings")
            return folder
        differs = ", ".join(f"{k} was {made.get(k)!r} and is now {asked[k]!r}" for k in asked if made.get(k) != asked[k])
        raise UserError(f"{folder} was made with other settings ({differs}); give --name for a second one, or delete it")

    part = folder.with_name(f".{folder.name}.part")  # renamed at the end: a folder that exists is whole
    record = Record(part, asked | dict(stamps=[x.stamp for x in sources]))
    if any(x.hub for x in sources):
        hub_setup()
    for i, x in enumerate(sources):  # what was begun goes on with the same commits
        if x.hub and not x.folder:
            x.revision = (record.data.get("revisions") or {}).get(x.name) or hub_revision(x.name, x.hub)
            x.origin = dict(x.origin, revision=x.revision)
    if record.resumed:
        Progress().done(f"going on       {part} holds {len(record.data['done'])} of {len(sources)} sources and perhaps a part of the next")
    else:
        threshold = int(s.val_fraction * 2 ** 64)
        scans = [scan(x, threshold, 0 if reuse else SAMPLE_BYTES // len(sources)) for x in sources]
        tokenizer = load_tokenizer(s.tokenizer) if reuse else None
        if not reuse:
            started, texts = time.monotonic(), [t for texts, *_ in scans for t in texts]
            tokenizer = TRAINERS[s.tokenizer](texts, vocab_size)
            Progress().done(f"tokenizer    {s.tokenizer}, {tokenizer.get_vocab_size():,} tokens, from {sum(map(len, texts)) / 1e6:,.1f} M characters "
                            f"in {time.monotonic() - started:.1f} s")
            del texts
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        record.save(scans=[(t, total) for _, t, total, _ in scans], revisions={x.name: x.revision for x in sources if x.hub})
        del scans  # the sample is no longer needed

    text = (part / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(text)
    dtype, encode = np.dtype("<u2" if vocabulary_size(tokenizer) <= 2 ** 16 else "<u4"), fast_encoder(tokenizer)
    for i, (source, (threshold, total)) in enumerate(zip(sources, record.data["scans"])):
        if i == len(record.data["done"]):
            entry = encode_source(source, f"{i}-{source.name}", part, tokenizer, encode, dtype, threshold, total, record)
            record.save(done=[*record.data["done"], entry], source=None)
    meta = dict(format=1, dtype=dtype.name, vocab_size=vocabulary_size(tokenizer),
                tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(), settings=asked, sources=record.data["done"])
    (part / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
    whole = {"tokenizer.json", "meta.json"} | {x["file"] for x, _, _ in token_files(meta["sources"])}
    for other in (p for p in part.iterdir() if p.name not in whole):  # progress.json, hashes, and what an end half-way left behind
        other.unlink()
    part.rename(folder)
    return folder


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


def show(folder, plot=False):
    """Tells what a prepared folder holds: its sources, how long their documents are, and the beginning of each one's first document."""
    folder, meta = Path(folder), read_meta(folder)
    tokenizer, dtype = load_tokenizer(str(folder / "tokenizer.json")), np.dtype(meta["dtype"]).newbyteorder("<")
    print(f"{folder}: {meta['settings']['tokenizer']} tokenizer of {meta['vocab_size']:,} tokens, {meta['dtype']}")
    rows, lengths, firsts = [("source", "language/kind", "split", "tokens", "documents", "bytes", "bytes/token", "characters/token", "from")], {}, []
    for x in meta["sources"]:
        origin = " ".join(str(v) for k, v in x["origin"].items() if k in ("dataset", "path", "python", "revision"))
        for split in ("train", "val"):
            n, tokens = x[split], np.fromfile(folder / x[split]["file"], dtype, 2 ** 20)
            characters = len(tokenizer.decode(tokens.tolist())) / max(1, len(tokens))  # of the first million
            rows.append((x["name"], f"{x['language']}/{x['kind']}", split, f"{n['tokens']:,}", f"{n['documents']:,}", f"{n['bytes']:,}",
                         f"{n['bytes'] / max(1, n['tokens']):.2f}", f"{characters:.2f}", origin))
        lengths[x["name"]] = np.diff(document_edges(read_tokens(folder / x["train"]["file"], dtype), tokenizer.token_to_id("<|bos|>")))
        first = np.fromfile(folder / x["train"]["file"], dtype, min(400, int(lengths[x["name"]][0]) if len(lengths[x["name"]]) else 0))
        firsts.append((x["name"], tokenizer.decode(first.tolist(), skip_special_tokens=False)))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print("\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, wide)).rstrip() for row in rows))
    for name, n in lengths.items():
        print(f"\n{name}, tokens per training document: " + (f"shortest {n.min():,}, median {int(np.median(n)):,}, longest {n.max():,}" if len(n) else "there is none"))
        counts = np.bincount(np.frexp(n)[1]) if len(n) else []  # powers of two
        for power, count in enumerate(counts):
            if count:
                print(f"  {2 ** (power - 1):>9,} to {2 ** power - 1:>9,}  {count:>9,}  {'#' * round(50 * count / max(counts))}")
    for name, text in firsts:
        print(f"\n{name} begins:\n{text}")
    if plot:
        draw_lengths(lengths, folder / "lengths.png")
        print(f"\nwrote {folder / 'lengths.png'}")


def draw_lengths(lengths, path):
    """Histograms over logarithmic bins, a line for each source."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=100, layout="constrained")
    every = np.concatenate([n for n in lengths.values() if len(n)] or [[1, 2]])
    bins = np.geomspace(every.min(), every.max() + 1, 60)
    for name, n in lengths.items():
        ax.hist(n, bins=bins, weights=n / max(1, n.sum()), histtype="step", lw=1.6, label=f"{name}: {len(n):,} documents, median {int(np.median(n)) if len(n) else 0:,}")
    ax.set(xscale="log", xlabel="tokens in a training document", ylabel="share of the source's tokens")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)
    plt.close(fig)


def main(argv):
    if argv == ["--list"]:
        print("\n".join(list_table()))
        return 0
    given, names = parse_flags(argv, Settings(), description=__doc__.split("\n")[0],
                               positional=("NAME", f"{', '.join(EMBEDDED)}, a data set or mix of --list, or a file or folder of yours, as PATH or PATH@language/kind, and :TOKENS behind it for a budget"))
    if given.get("list"):
        raise UserError("--list goes alone")
    if given.get("plot") and not given.get("show"):
        raise UserError("--plot draws what --show=FOLDER tells")
    if given.get("show"):
        show(given["show"], given.get("plot", False))
        return 0
    folder = prepare(names, Settings(**given))
    meta = read_meta(folder)
    files = [x["file"] for x, _, _ in token_files(meta["sources"])]
    made = meta["settings"]  # name the model that this kind of vocabulary is for, and its size where it is not the default
    model = {"bpe": " --model=ivme", "hybrid": " --model=tinymemory", "chunk": " --model=i3"}.get(made["tokenizer"], "")
    size = f" --vocab_size={meta['vocab_size']}" if model and made["vocab_size"] != DEFAULT_VOCAB[made["tokenizer"]] else ""
    if (made["tokenizer"], made["vocab_size"]) == ("bpe", 32_000):
        model, size = " --model=gpt2preln", ""
    print(f"wrote {folder}: {' '.join([*files[:6], *['...'] * (len(files) > 6)])} tokenizer.json meta.json        "
          f"next: python train.py{model} --data={folder}{size}")


if __name__ == "__main__":
    run_tool(main)
