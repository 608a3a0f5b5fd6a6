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
    train.<i>-<source>.mask.bin     only for chats, and val...: a byte per token, 1 for a reply's, see corpus/chats.py
    meta.json                       the settings and where the text is from; counts, sizes and checksums of the files

The input is read as a stream, twice (corpus/passes.py): first for a sample of the text, from which the tokenizer
learns (of a Hub data set only a part is read for that), then to encode it. Memory is bounded, whatever the size of the
input: the hashes that tell duplicates need a gigabyte at most. If the program is stopped while it encodes, the same
command resumes the work, and the result is the same to the byte. If two of them make the same folder, one waits for the
other. A budget that needs only a part of a set of files takes parts from all over it: of 64 files at least, or of all
if there are fewer.

Exact duplicates within a source are left out; each document is compared with the last 4 million at least. Whether a
document is training or validation text depends on the hash of its text alone, not on the order of files or on what is
added later. There is one exception: if the hashes of all documents of a source fall below val_fraction, or none does,
the threshold moves until each split has a document (with a val_fraction of 0, all of it is training text). A chat of
pydocs-chat goes where its module's source goes in pydocs.
"""
import dataclasses
import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import Progress, UserError, nearest, parse_flags, quoted, run_tool
from corpus.catalogue import HUB, MIXES, list_table
from corpus.chats import chat_ids
from corpus.describe import is_reused, show
from corpus.files import check_encoding
from corpus.folder import alone, check_tokens, corpus_name, own_files, read_meta, token_files
from corpus.foreign import LARGEST_VOCABULARY
from corpus.hub import HubSource, find_source, hub_name, hub_revision, hub_setup, hub_source
from corpus.passes import Record, finish, first_pass, second_pass, stems
from corpus.pydocs import EMBEDDED
from corpus.text import Document, Seen, clean, local_source, split_budget, split_label
from corpus.tokenizer import (
    DEFAULT_VOCAB, READY, SPECIAL_TOKENS, TRAINERS, byte_of_character, load_tokenizer, read_tokenizer, tokenizer_text,
    train_hybrid,  # for those who import it from here
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


LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255, and the lock beside it has a longer one

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


# ---------------------------------------------------------------------------------------------------- the tool

def next_command(folder, meta, s):
    """The command that trains a model on the folder.

    For a new tokenizer: train the model whose default tokenizer this is. For the tokenizer of an existing model: go on
    training that model, with finetune.py if there are chats.
    """
    data = quoted(f"--data={folder}")
    if is_reused(meta):
        chats = any("mask" in source["train"] for source in meta["sources"])
        tool = "finetune.py" if chats else "train.py"
        checkpoint = s.tokenizer if s.tokenizer.endswith(".pt") else "CHECKPOINT"
        return f"python {tool} {quoted(f'--init_from={checkpoint}')} {data}"

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
    description = " ".join((__doc__ or "").split("\n\n")[0].split())
    given, names = parse_flags(argv, Settings(), description=description, positional=("NAME", what))
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
