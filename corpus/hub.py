"""Data sets of the Hugging Face Hub: a catalogue, mixes, any other data set by its name, and how they are streamed.

HUB is the catalogue: names that prepare.py knows, with the columns, filters and budgets that suit them. MIXES are lists
of such names. find_source() takes any other data set, ORG/NAME, and finds out from its first row what to read.

Nothing is downloaded as a whole. The `datasets` library opens a set as a stream of rows, and reads only the columns
that are needed if the files are parquet. HubReader goes over that stream in blocks, tries again when the connection
drops, and can continue from a state that it kept. A set is read at one commit of its repository, so that a resumed run
meets the same rows.
"""
import contextlib
import itertools
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Progress, UserError, columns, nearest
from corpus.chats import CHAT_COLUMNS, is_chat
from corpus.text import SUFFIXES, Reader, TextSource, split_label, text_column

# ---------------------------------------------------------------------------------------------------- the catalogue

@dataclass
class HubSet:
    """A data set of the Hub: where its text is, and what --list says about it."""
    repo: str
    about: str
    licence: str
    language: str
    kind: str
    rows: str = ""  # documents of the split, approximately
    tokens: str = ""  # tokens of a GPT-2-like vocabulary, approximately
    disk: str = ""  # size of the files that are read, approximately; they are streamed, never stored
    configs: tuple = ((None, 1),)  # names of configurations, each with its share of the documents
    read_columns: tuple = ("text",)  # those that are read; empty: all, as the format (.txt, .jsonl) offers no choice
    text_field: str = "text"  # field of a row that holds the text, or TinyChat's line; empty: the whole row is a chat
    filters: tuple = ()  # as pyarrow writes them: (column, operator, value)
    budget: int = 0  # training tokens unless the user names a number; 0: all
    articles: bool = False  # rows are lines, which belong together up to the next title
    chat: bool = False  # rows are chats, see chat_messages()


M = 10 ** 6

# The figures are those of the sets' cards on the Hub. Those with a ~ are estimates from their sizes.
HUB = {
    "fineweb-hq": HubSet(
        "epfml/FineWeb-HQ", "English web, the best tenth, score > 0.8", "ODC-By", "en", "web", "2.4B", "~2T", "TBs",
        filters=(("quality_score", ">", 0.8),), budget=200 * M),
    "fineweb2-hq-it": HubSet(
        "epfml/FineWeb2-HQ", "Italian web, the best tenth", "ODC-By", "it", "web", "21M", "~27B", "~270 GB",
        configs=(("ita_Latn", 1),), budget=200 * M),
    "fineweb-edu": HubSet(
        "HuggingFaceFW/fineweb-edu", "educational web pages, sample-10BT", "ODC-By", "en", "web",
        "9.7M", "10B", "28 GB", configs=(("sample-10BT", 1),), budget=200 * M),
    "python-stack": HubSet(
        "bigcode/python-stack-v1-functions-filtered", "Python functions with docstrings", "permissive", "en", "code",
        "~0.6M", "~0.13B", "0.2 GB", read_columns=("content",), text_field="content"),
    "finemath": HubSet(
        "HuggingFaceTB/finemath", "mathematics from the web, finemath-4plus", "ODC-By", "en", "math",
        "6.7M", "9.6B", "18 GB", configs=(("finemath-4plus", 1),), budget=200 * M),
    "cosmopedia": HubSet(
        "HuggingFaceTB/cosmopedia", "synthetic textbooks, stanford and wikihow", "Apache-2.0", "en", "books",
        "1.2M", "~1.4B", "3.8 GB", configs=(("stanford", 1_020_024), ("wikihow", 179_191)), budget=200 * M),
    "wikipedia": HubSet(
        "wikimedia/wikipedia", "English Wikipedia of 2023-11-01", "CC BY-SA", "en", "wiki", "6.4M", "4.6B", "12 GB",
        configs=(("20231101.en", 1),), budget=200 * M),
    "wiki40b-en": HubSet(
        "google/wiki40b", "cleaned English Wikipedia", "CC BY-SA", "en", "wiki", "2.9M", "~2.2B", "6.2 GB",
        configs=(("en", 1),), budget=200 * M),
    "wiki40b-it": HubSet(
        "google/wiki40b", "cleaned Italian Wikipedia", "CC BY-SA", "it", "wiki", "0.73M", "~0.7B", "1.3 GB",
        configs=(("it", 1),), budget=200 * M),
    "wikitext": HubSet(
        "Salesforce/wikitext", "good English Wikipedia articles, wikitext-103", "CC BY-SA", "en", "wiki",
        "28K", "118M", "0.3 GB", configs=(("wikitext-103-raw-v1", 1),), articles=True),
    "tinystories": HubSet(
        "roneneldan/TinyStories", "stories in the words of small children", "CDLA-Sharing", "en", "books",
        "2.1M", "470M", "1 GB"),
    "tinychat": HubSet(
        "starhopp3r/TinyChat", "short chats in simple words", "CC BY-NC", "en", "chat", "1M", "~175M", "0.7 GB",
        read_columns=(), chat=True),
    "alpaca": HubSet(
        "tatsu-lab/alpaca", "instructions and replies of a language model", "CC BY-NC", "en", "chat",
        "52K", "~4M", "24 MB", read_columns=("instruction", "input", "output"), text_field="", chat=True),
    "dolly": HubSet(
        "databricks/databricks-dolly-15k", "instructions and replies by people", "CC BY-SA", "en", "chat",
        "15K", "~3M", "13 MB", read_columns=(), text_field="", chat=True),
    "smol-smoltalk": HubSet(
        "HuggingFaceTB/smol-smoltalk", "chats for models below a billion parameters", "Apache-2.0", "en", "chat",
        "460K", "~0.4B", "1 GB", read_columns=("messages",), text_field="", chat=True),
    "hq-sentences": HubSet(
        "agentlans/high-quality-english-sentences", "single well-formed sentences", "ODC-By", "en", "web",
        "1.5M", "~48M", "0.1 GB", read_columns=()),
}

# Mix -> (what it feeds, its sources in the order of the training run with their budgets; 0 is all)
MIXES = {
    "ivme": (
        "ivme: its card's five sources in ascending quality",
        (("fineweb-hq", 710 * M), ("python-stack", 160 * M), ("finemath", 235 * M), ("cosmopedia", 395 * M),
         ("wikipedia", 80 * M))),
    "gpt2preln": (
        "gpt2preln: English and Italian as on its card, budgets for web and wiki alike "
        "(our reading; wiki40b-it ends at about 0.7B)",
        (("fineweb-hq", 1_796_855_746), ("wiki40b-en", 1_796_855_746),
         ("fineweb2-hq-it", 1_652_941_754), ("wiki40b-it", 1_652_941_754))),
    "i3": (
        "i3-22m: its card's TinyChat, all of it",
        (("tinychat", 0),)),
    "i3-80m": (
        "i3-80m: its card's three sets, about 3M tokens in all; how much of each is our choice",
        (("tinystories", M), ("tinychat", M), ("hq-sentences", M))),
    "i3-200m": (
        "i3-200m: its card's four sets; how much of each is our choice",
        (("tinystories", M), ("tinychat", M), ("hq-sentences", M), ("wikitext", M))),
    "tinymemory": (
        "tinymemory, larger than pydocs; its card names no data, the choice is ours",
        (("tinystories", 40 * M), ("hq-sentences", 10 * M))),
}


def list_table():
    """The lines of --list: a table of all names, the parts of each mix, and what else can be named."""
    rows = [
        ("name", "what it is", "licence", "documents", "tokens", "files", "language", "default", "in the mixes"),
        ("pydocs", "this Python's library and help topics, no download", "PSF",
         "740", "4M", "11 MB", "en/code", "all", ""),
        ("pydocs-chat", "questions and answers about that library, no download", "PSF",
         "31,000", "2.6M", "6 MB", "en/chat", "all", ""),
    ]
    for name, spec in HUB.items():
        default = f"{spec.budget // M}M tokens" if spec.budget else "all"
        mixes = ", ".join(mix for mix, (_, parts) in MIXES.items() if name in dict(parts))
        rows.append((name, spec.about, spec.licence, spec.rows, spec.tokens, spec.disk, f"{spec.language}/{spec.kind}",
                     default, mixes))
    yield from columns(rows)

    width = max(len(row[0]) for row in rows)
    for mix, (about, parts) in MIXES.items():
        total = sum(budget for _, budget in parts)
        yield ""
        yield f"{mix}: {about}; {total / M:,.0f}M tokens" if total else f"{mix}: {about}"
        for name, budget in parts:
            if budget:
                yield f"  {name:<{width}}  {budget / M:>8,.0f}M  {budget / total:.0%}"
    yield ""
    yield "A source that holds less than its budget gives all that it has."
    yield "Any other data set of the Hub works by its name, ORG/NAME; --config and --column say what to read of it."


# ---------------------------------------------------------------------------------------------------- sources

@dataclass
class HubSource(TextSource):
    """A data set of the Hub, streamed at `revision` or read from a copy of its repository in `folder`."""
    hub: HubSet = None
    revision: str = ""
    folder: Path = None

    def reader(self, state=None):
        if not self.hub.articles:
            return HubReader(self.name, self.hub, self.revision, self.folder, state)
        # The lines of an article must stay in order. A resumed run reads the set again from its beginning: it is small
        line_reader = HubReader(self.name, self.hub, self.revision, self.folder)
        lines = line_reader.texts(self.hub.configs[0][0], line_reader.state["parts"][0])
        reader = Reader(lambda: articles(lines), state)
        reader.stopped = line_reader.stopped
        return reader


def hub_source(name, source_dir, several):
    """A name of the catalogue as a source. It needs no network yet: its commit is asked for before it is read.

    source_dir: a folder with copies of repositories, or empty. several: whether there are other sources beside it.
    """
    spec = HUB[name]
    return source_of_spec(name, spec, local_copy(spec.repo, source_dir, several))


def source_of_spec(name, spec, folder, revision="", origin_columns=None):
    """A HubSource. Its origin is what meta.json reports; its stamp changes when a file of a local copy is written to.

    origin_columns: the columns that the origin names, if they are not spec.read_columns. In a .jsonl file, one column
    may hold the text (so the origin names it) though all of them are read.
    """
    origin = dict(
        dataset=spec.repo,
        configs=[config for config, _ in spec.configs],
        columns=list(spec.read_columns if origin_columns is None else origin_columns),
        filter=[list(condition) for condition in spec.filters])
    stamp = 0
    if folder:
        stamp = [str(folder.resolve()), max((path.stat().st_mtime_ns for path in folder.rglob("*")), default=0)]
    return HubSource(
        name, spec.language, spec.kind, origin, documents=None, budget=spec.budget, stamp=stamp, chat=spec.chat,
        hub=spec, revision=revision, folder=folder)


def local_copy(repo, source_dir, several):
    """The folder of a repository's copy, None without --source_dir. Raises UserError if --source_dir holds no copy.

    --source_dir itself is taken for the copy if it looks like one, unless `several` sources are to be found in it.
    """
    if not source_dir:
        return None
    root, short = Path(source_dir), repo.split("/")[1]
    places = [root / repo, root / short]
    is_the_copy = root.resolve().name == short or (root / "README.md").exists()
    if is_the_copy and not several:
        places.append(root)
    for place in places:
        if place.is_dir():
            return place
    expected = " or ".join(map(str, places))
    raise UserError(f"--source_dir={source_dir} holds no copy of {repo}: expected {expected}")


def articles(lines):
    """Joins wikitext's lines into articles. A title is a line ` = Title = `; a heading has more equals signs."""
    article = []
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n?", line) and article:
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


# ---------------------------------------------------------------------------------------------------- other data sets

def hub_name(word):
    """'ORG/NAME@it/web' -> ('ORG/NAME', 'it', 'web'), with '' for what is not given. None if it is no such name."""
    repo, language, kind = split_label(word)
    part = r"[A-Za-z0-9][\w.-]*"
    if not re.fullmatch(f"{part}/{part}", repo, re.ASCII) or repo.endswith(SUFFIXES):
        return None
    return repo, language, kind


def find_source(word, config, column, source_dir, several):
    """A data set that is not in the catalogue as a source. `word` is what hub_name() reads.

    config: the name of its configuration; empty: its only one, or its default. column: the field that holds the text;
    empty: the rows are chats if the first one is, else `text` or `content`. Raises UserError if there is no such data
    set, configuration or column, or no split called train. Needs the network, unless --source_dir holds a copy.
    """
    hub_setup()
    repo, language, kind = hub_name(word)
    name = re.sub(r"[^\w-]+", "_", repo.split("/")[1])
    folder = local_copy(repo, source_dir, several)
    revision = "" if folder else hub_revision(name, repo)
    patience = Patience(name, repo)
    while True:
        try:
            found = inspect_rows(repo, location(repo, revision, folder), config, column)
            break
        except UserError:
            raise
        except Exception as e:
            patience.wait(e)

    spec = HubSet(
        repo, about="", licence="", language=language or "und", kind=kind or ("chat" if found.chat else "text"),
        configs=((config or None, 1),), read_columns=tuple(found.columns) if found.can_choose else (),
        text_field=found.text_field, chat=found.chat)
    return source_of_spec(name, spec, folder, revision, origin_columns=found.columns)


class RowLayout(NamedTuple):
    """How the rows of a data set are to be read."""
    columns: list  # those that are needed
    text_field: str  # the one that holds the text; empty: the whole row is a chat
    chat: bool  # whether the rows are chats
    can_choose: bool  # whether the format can read some columns without the others


def inspect_rows(repo, where, config, column):
    """The RowLayout of a data set, found out from its configurations, its splits and its first row.

    where: see location(). config, column: as for find_source(). Raises UserError as find_source() does.
    """
    import datasets
    configs = datasets.get_dataset_config_names(**where)
    if config and config not in configs:
        raise UserError(f"{repo} has no configuration {config!r}{nearest(config, configs)}; it has {some_of(configs)}")
    if not config and datasets.get_dataset_default_config_name(**where) is None:
        raise UserError(f"{repo} has several configurations: {some_of(configs)}; choose one with --config")

    builder = datasets.load_dataset_builder(**where, name=config or None)
    splits = builder.as_streaming_dataset()
    if "train" not in splits:
        raise UserError(f"{repo} has no split called train; it has {some_of(splits)}")

    # A parquet file names its columns without a row being read. A row may be large, so only a part of it is read.
    can_choose = hasattr(builder.config, "columns")
    if can_choose:
        names = splits["train"].column_names
        telling = [name for name in names if name in (column, "text", "content", *CHAT_COLUMNS)]
        row = {}
        if telling:
            rows = datasets.load_dataset(
                **where, name=config or None, split="train", streaming=True, columns=telling)
            row = next(iter(rows), {})
    else:
        row = next(iter(splits["train"]), {})
        names = list(row)
        if not names:
            raise UserError(f"{repo} has no rows")

    if not column and is_chat(row):
        needed = [name for name in CHAT_COLUMNS if name in names]
        return RowLayout(needed, text_field="", chat=True, can_choose=can_choose)
    text = text_column(repo, names, column)
    chat = not column and isinstance(row.get(text), str) and is_chat(row[text])  # a line of TinyChat's kind
    return RowLayout([text], text_field=text, chat=chat, can_choose=can_choose)


def some_of(names):
    """The names in quotes, the first 20 of many."""
    names = list(names)
    shown = ", ".join(map(repr, names[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


# ---------------------------------------------------------------------------------------------------- streaming

class HubReader:
    """Goes over a data set of the Hub as a Reader goes over local text.

    It reads blocks of BLOCK documents, and gives those of a block in a random order that depends on the block's number
    alone. (The library's own shuffle buffer cannot be continued exactly after a stop.) `state` is where the present
    block begins, in a form from which `datasets` can continue, and the place in the block.

    Raises UserError for a file that is not as it should be, and if the network does not come back.
    """
    BLOCK = 10_000  # documents in a block, or fewer if they are long:
    BLOCK_CHARACTERS = 64 * 2 ** 20  # a block ends with the document that reaches this number

    def __init__(self, name, spec, revision, folder, state=None):
        self.name = name
        self.spec = spec
        self.where = location(spec.repo, revision, folder)
        self.stopped = threading.Event()  # set when nobody waits for more texts
        if state is None:
            parts = [dict(rows=None, read=0, ended=False) for _ in spec.configs]
            state = dict(block=0, taken=0, parts=parts)
        self.state = state

    def __iter__(self):
        parts = [dict(part) for part in self.state["parts"]]
        block = self.state["block"]
        taken = self.state["taken"]
        streams = [self.texts(config, part) for (config, _), part in zip(self.spec.configs, parts)]
        while True:
            begin = [dict(part) for part in parts]
            texts = self.next_block(streams, parts)
            if not texts or self.stopped.is_set():
                return
            order = np.random.default_rng([0, block]).permutation(len(texts)).tolist()
            for k in range(taken, len(order)):
                self.state = dict(block=block, taken=k + 1, parts=begin)
                yield texts[order[k]]
            block += 1
            taken = 0

    def next_block(self, streams, parts):
        """The next texts or chats, in the order of the rows; none at the end of the data set."""
        texts, size = [], 0
        while len(texts) < self.BLOCK and size < self.BLOCK_CHARACTERS and not self.stopped.is_set():
            open_ones = [i for i, part in enumerate(parts) if not part["ended"]]
            if not open_ones:
                break
            # of several configurations, the one that has given least of its share gives the next row
            i = min(open_ones, key=lambda i: parts[i]["read"] / self.spec.configs[i][1])
            for text in itertools.islice(streams[i], 1):  # one, or none if the stream ends here
                texts.append(text)
                size += len(text if isinstance(text, str) else str(text))
        return texts

    def texts(self, config, part):
        """The texts or chats of a configuration, from the row that `part` names; `part` is kept up to date."""
        patience = Patience(self.name, self.spec.repo, self.stopped)
        while True:
            try:
                data = self.open(config, part["rows"])
                with contextlib.closing(iter(data)) as rows:
                    for row in rows:
                        patience.reset()
                        part["rows"] = data.state_dict()
                        part["read"] += 1
                        yield row[self.spec.text_field] if self.spec.text_field else row
                        if self.stopped.is_set():
                            return
                part["ended"] = True
                return
            except Exception as e:  # pyarrow, fsspec, the Hub's client and its HTTP library raise many types
                patience.wait(e)
                if self.stopped.is_set():
                    return

    def open(self, config, state):
        """The stream of a configuration's rows, from the place that `state`, of the `datasets` library, names."""
        import datasets
        choice = {}
        if self.spec.read_columns:
            choice["columns"] = list(self.spec.read_columns)
        if self.spec.filters:
            choice["filters"] = list(self.spec.filters)
        data = datasets.load_dataset(**self.where, name=config, split="train", streaming=True, **choice)
        if state:
            data.load_state_dict(state)
        return data


def location(repo, revision, folder):
    """Where a data set is, as arguments of the `datasets` library: a local folder, or a commit of a repository."""
    if folder:
        return dict(path=str(folder))
    return dict(path=repo, revision=revision)


def hub_setup():
    """Sets up the `datasets` library: no messages, and none of its own endless retries. UserError if it is missing."""
    try:
        import datasets
        import huggingface_hub.hf_file_system
    except ImportError as e:
        raise UserError(f"the Hub's data sets need the package {e.name}: pip install -r requirements.txt") from None
    # Patience tries again, and says so
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    # With the default, each read also fetches 5 MB of other columns
    huggingface_hub.hf_file_system.HfFileSystemFile.DEFAULT_BLOCK_SIZE = 2 ** 20
    for log in (datasets.logging, huggingface_hub.utils.logging):
        log.set_verbosity(log.CRITICAL)
    datasets.disable_progress_bars()


def hub_revision(name, repo):
    """The commit of a repository's main branch now. UserError, within half a minute, if the Hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    begun = time.monotonic()
    while True:
        try:
            return HfApi().dataset_info(repo, timeout=8).sha
        except RepositoryNotFoundError:
            raise UserError(
                f"{name}: the Hugging Face Hub has no public data set {repo}, and there is no such file or folder "
                "here; names of data sets look like HuggingFaceTB/finemath, see https://huggingface.co/datasets"
            ) from None
        except Exception as e:
            kind = type(e).__name__
            if not may_pass(e):
                raise UserError(f"{name}: the Hugging Face Hub does not give {repo} ({kind}: {str(e)[:200]})") from None
            if time.monotonic() - begun > 5:
                raise UserError(
                    f"{name}: the Hugging Face Hub cannot be reached for {repo} ({kind}); without it there are pydocs, "
                    "which needs no network, a text file or folder of yours, and --source_dir=DIR with a copy of the "
                    "repository") from None
            time.sleep(2)


# ---------------------------------------------------------------------------------------------------- the network

class Patience:
    """Decides what follows an error of the network: another try after a pause, or the end."""
    TRIES = 8  # failures in a row before it gives up
    PAUSE = 1.0  # seconds after the first failure; they double with each further one, up to a minute

    def __init__(self, name, repo, stopped=None):
        self.name = name
        self.repo = repo
        self.stopped = stopped or threading.Event()  # ends a pause early
        self.failures = 0

    def reset(self):
        """Something came through."""
        self.failures = 0

    def wait(self, error):
        """Pauses if the error may pass. Raises UserError if it will not, or if it came too often."""
        kind, message = type(error).__name__, " ".join(str(error).split())
        if not may_pass(error):
            raise UserError(f"{self.name}: {self.repo} cannot be read as expected ({kind}: {message[:300]})") from None
        self.failures += 1
        if self.failures > self.TRIES:
            raise UserError(f"{self.name}: the connection to the Hugging Face Hub is lost ({kind}: {message[:200]}); "
                            "run the same command again; it keeps what is already encoded") from None
        pause = min(60.0, self.PAUSE * 2 ** (self.failures - 1))
        Progress().done(f"{self.name:<12} {kind}: {message[:120]}; "
                        f"trying again in {pause:.0f} s ({self.failures} of {self.TRIES})")
        self.stopped.wait(pause)


def may_pass(error):
    """Whether an error may be gone in a while: it is one of the network, or of a server that is busy or broken."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if "LocalEntryNotFoundError" in str(error):  # the Hub's client could not ask, and has no copy
        return True
    library = type(error).__module__.partition(".")[0]
    return (isinstance(error, (ConnectionError, TimeoutError))
            or library in ("httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp"))
