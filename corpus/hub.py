"""Data sets of the Hugging Face Hub: those of the catalogue and any other by its name, and how they are streamed.

find_source() takes any data set, ORG/NAME, and finds out from its first rows what to read.

Nothing is downloaded as a whole. The `datasets` library opens a set as a stream of rows, and reads only the columns
that are needed if the files are parquet. HubReader goes over that stream in blocks, tries again when the connection
drops, and can continue from a state that it kept. A set is read at one commit of its repository, so that a resumed run
meets the same rows.

A set with a budget is not read from its beginning. Its files come in an order that is drawn from the seed, and a
portion is taken from each in turn: see corpus/samples.py.
"""
import contextlib
import copy
import itertools
import math
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Progress, UserError, nearest
from corpus.catalogue import HUB, HubSet
from corpus.chats import chat_columns
from corpus.files import SUFFIXES
from corpus.samples import Wanted, begun, drawn_order, in_turns, wanted_for
from corpus.text import LOOK, Reader, TextSource, cut_documents, layout_of, split_label


# ---------------------------------------------------------------------------------------------------- sources

@dataclass
class HubSource(TextSource):
    """A data set of the Hub, streamed at `revision` or read from a copy of its repository in `folder`."""
    hub: HubSet = None
    revision: str = ""
    folder: Path = None
    seed: int = 0  # draws the order of the files, and of the documents in a block

    def reader(self, state=None, wanted=None):
        if not self.hub.articles:
            return HubReader(self, wanted or wanted_for(self.budget), state)
        # The lines of an article must stay in order. A resumed run reads the set again from its beginning: it is small
        line_reader = HubReader(self, wanted_for(0))
        lines = line_reader.texts(0, line_reader.state["parts"][0])
        reader = Reader(lambda: articles(lines), state)
        reader.stopped = line_reader.stopped
        return reader

    def local_files(self):
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file()] if self.folder else []

    def files_read(self, state):
        return None if self.hub.articles else state["files"]


def hub_source(name, source_dir, several, seed=0):
    """A name of the catalogue as a source. It needs no network yet: its commit is asked for before it is read.

    source_dir: a folder with copies of repositories, or empty. several: whether there are other sources beside it.
    """
    spec = HUB[name]
    return source_of_spec(name, spec, local_copy(spec.repo, source_dir, several), seed=seed)


def source_of_spec(name, spec, folder, revision="", origin_columns=None, seed=0):
    """A HubSource. Its origin is what meta.json reports.

    origin_columns: the columns that the origin names, if they are not spec.read_columns. In a .jsonl file, one column
    may hold the text (so the origin names it) though all of them are read.
    """
    origin = dict(
        dataset=spec.repo,
        configs=[config for config, _ in spec.configs],
        columns=list(spec.read_columns if origin_columns is None else origin_columns),
        filter=[list(condition) for condition in spec.filters])
    if spec.split != "train":
        origin["split"] = spec.split
    return HubSource(
        name, spec.language, spec.kind, origin, budget=spec.budget, chat=spec.chat, hub=spec, revision=revision,
        folder=folder, seed=seed)


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


def find_source(word, config, split, column, source_dir, several, seed=0):
    """A data set that is not in the catalogue as a source. `word` is what hub_name() reads.

    config: the name of its configuration; empty: its only one, or its default. split: the one to read. column: the
    field that holds the text; empty: the rows are chats if most of the first ones are, else `text` or `content`. Raises
    UserError if there is no such data set, configuration, split or column. Needs the network without a copy in
    source_dir.
    """
    hub_setup()
    repo, language, kind = hub_name(word)
    name = re.sub(r"[^\w-]+", "_", repo.split("/")[1])
    folder = local_copy(repo, source_dir, several)
    revision = "" if folder else hub_revision(name, repo)
    patience = Patience(name, repo)
    while True:
        try:
            found = inspect_rows(repo, location(repo, revision, folder), config, split, column)
            break
        except UserError:
            raise
        except Exception as e:
            patience.wait(e)

    spec = HubSet(
        repo, about="", licence="", language=language or "und", kind=kind or ("chat" if found.chat else "text"),
        configs=((config or None, 1),), read_columns=tuple(found.columns) if found.can_choose else (),
        text_field=found.text_field, chat=found.chat, split=split, whole_files=found.whole_files)
    return source_of_spec(name, spec, folder, revision, found.columns, seed)


class RowLayout(NamedTuple):
    """How the rows of a data set are to be read."""
    columns: list  # those that are needed
    text_field: str  # the one that holds the text; empty: the whole row is a chat
    chat: bool  # whether the rows are chats
    can_choose: bool  # whether the format can read some columns without the others
    whole_files: bool  # whether the rows are lines of text files that are to be read as a whole


def inspect_rows(repo, where, config, split, column):
    """The RowLayout of a data set, found out from its configurations, its splits and its first rows.

    where: see location(). config, split, column: as for find_source(). Raises UserError as find_source() does.
    """
    import datasets
    configs = datasets.get_dataset_config_names(**where)
    if config and config not in configs:
        raise UserError(f"{repo} has no configuration {config!r}{nearest(config, configs)}; it has {some_of(configs)}")
    if not config and datasets.get_dataset_default_config_name(**where) is None:
        raise UserError(f"{repo} has several configurations: {some_of(configs)}; choose one with --config")

    builder = datasets.load_dataset_builder(**where, name=config or None)
    splits = builder.as_streaming_dataset()
    if split not in splits:
        raise UserError(f"{repo} has no split called {split}{nearest(split, splits)}; it has {some_of(splits)}; choose "
                        "one with --split")

    # A parquet file names its columns without a row being read. A row may be large, so only a part of it is read.
    can_choose = hasattr(builder.config, "columns")
    rows = splits[split]
    if can_choose:
        names = rows.column_names
        telling = [name for name in names if name in (column, "text", "content", *chat_columns(names))]
        rows = []
        if telling:
            rows = datasets.load_dataset(
                **where, name=config or None, split=split, streaming=True, columns=telling)
        rows = list(itertools.islice(rows, LOOK))
    else:
        rows = list(itertools.islice(rows, LOOK))
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not names:
            raise UserError(f"{repo} has no rows")

    layout = layout_of(repo, rows, names, column)
    needed = [layout.column] if layout.column else chat_columns(names)
    # the library makes a row of each line of a text file, unless somebody asks for its column of lines
    whole_files = hasattr(builder.config, "sample_by") and not layout.chat and not column
    return RowLayout(needed, text_field=layout.column, chat=layout.chat, can_choose=can_choose, whole_files=whole_files)


def some_of(names):
    """The names in quotes, the first 20 of many."""
    names = list(names)
    shown = ", ".join(map(repr, names[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


# ---------------------------------------------------------------------------------------------------- streaming

class HubReader:
    """Goes over a data set of the Hub as a Reader goes over local text.

    It reads blocks of BLOCK documents, and gives those of a block in a random order that depends on the seed and the
    block's number alone. (The library's own shuffle buffer cannot be continued exactly after a stop.) `state` is where
    the present block begins, in a form from which `datasets` can continue, the place in the block, and the names of the
    files that were read until the block's end.

    wanted: how much is wanted, which then comes from all over the set, unless it is all. Raises UserError for a file
    that is not as it should be, and if the network does not come back.
    """
    BLOCK = 10_000  # documents in a block, or fewer if they are long or few are wanted:
    BLOCK_CHARACTERS = 64 * 2 ** 20  # a block ends with the document that reaches this number

    def __init__(self, source, wanted, state=None):
        self.name, self.spec, self.seed = source.name, source.hub, source.seed
        self.where = location(self.spec.repo, source.revision, source.folder)
        self.root = source.folder.resolve().as_posix() + "/" if source.folder else f"@{source.revision}/"
        self.wanted = wanted
        self.block_characters = min(self.BLOCK_CHARACTERS, wanted.least or math.inf)
        self.opened = {}  # number of a configuration -> what open() gives
        self.stopped = threading.Event()  # set when nobody waits for more texts
        if state is None:
            parts = [dict(begun(), read=0, ended=False) for _ in self.spec.configs]
            state = dict(block=0, taken=0, parts=parts, files=[])
        self.state = state

    def __iter__(self):
        parts = copy.deepcopy(self.state["parts"])
        block = self.state["block"]
        taken = self.state["taken"]
        streams = [self.texts(i, part) for i, part in enumerate(parts)]
        while True:
            begin = copy.deepcopy(parts)
            texts = self.next_block(streams, parts)
            if not texts or self.stopped.is_set():
                return
            files = [name for part in parts for name in part["files"]]
            order = np.random.default_rng([self.seed, block]).permutation(len(texts)).tolist()
            for k in range(taken, len(order)):
                self.state = dict(block=block, taken=k + 1, parts=begin, files=files)
                yield texts[order[k]]
            block += 1
            taken = 0

    def next_block(self, streams, parts):
        """The next texts or chats, in the order of the rows; none at the end of the data set."""
        texts, size = [], 0
        while len(texts) < self.BLOCK and size < self.block_characters and not self.stopped.is_set():
            open_ones = [i for i, part in enumerate(parts) if not part["ended"]]
            if not open_ones:
                break
            # of several configurations, the one that has given least of its share gives the next row
            i = min(open_ones, key=lambda i: parts[i]["read"] / self.spec.configs[i][1])
            for text in itertools.islice(streams[i], 1):  # one, or none if the stream ends here
                texts.append(text)
                size += len(text if isinstance(text, str) else str(text))
        return texts

    def texts(self, i, part):
        """The texts or chats of configuration number i, from the place `part` on, which is kept up to date."""
        patience = Patience(self.name, self.spec.repo, self.stopped)
        while True:
            try:
                _, _, names, portion = self.open(i)
                with contextlib.closing(in_turns(names, portion, part, lambda *file: self.rows(i, *file))) as texts:
                    for text in texts:
                        patience.reset()
                        part["read"] += 1
                        yield text
                        if self.stopped.is_set():
                            return
                part["ended"] = True
                return
            except Exception as e:  # pyarrow, fsspec, the Hub's client and its HTTP library raise many types
                patience.wait(e)
                if self.stopped.is_set():
                    return

    def open(self, i):
        """Configuration number i: (the library's stream of its rows, the names of its files, the same in the order in
        which they are read, the first portion).

        A set of which a part is wanted gives its files in the drawn order, so that a part comes from all of them.
        """
        if i in self.opened:
            return self.opened[i]
        import datasets
        choice = {}
        if self.spec.read_columns:
            choice["columns"] = list(self.spec.read_columns)
        if self.spec.filters:
            choice["filters"] = list(self.spec.filters)
        if self.spec.whole_files:
            choice["sample_by"] = "document"
        config, share = self.spec.configs[i]
        builder = datasets.load_dataset_builder(**self.where, name=config, **choice)
        data = builder.as_streaming_dataset(split=self.spec.split)
        shards = [str(file).rpartition(self.root)[2] for file in builder.config.data_files[self.spec.split]]
        if len(shards) != data.num_shards:  # some formats have several files in one
            shards = [f"part {k}" for k in range(data.num_shards)]

        share /= sum(share for _, share in self.spec.configs)
        names = list(dict.fromkeys(shards))  # a file that two patterns find is listed twice
        portion = Wanted(self.wanted.least * share, self.wanted.likely * share).first_portion(len(names))
        if portion < math.inf:
            names = drawn_order(names, self.seed)
        self.opened[i] = data, shards, names, portion
        return self.opened[i]

    def rows(self, i, name, state):
        """The texts or chats of one file, each with the state of the library behind it."""
        data, shards, _, _ = self.open(i)
        data = data.shard(len(shards), shards.index(name))
        if self.spec.whole_files:  # the state is how many documents were cut from the file
            given = state or 0
            with contextlib.closing(iter(data)) as rows:
                documents = (document for row in rows for document in cut_documents(row[self.spec.text_field]))
                for document in itertools.islice(documents, given, None):
                    given += 1
                    yield document, given
            return
        if state:
            data.load_state_dict(state)
        with contextlib.closing(iter(data)) as rows:
            for row in rows:
                yield row[self.spec.text_field] if self.spec.text_field else row, data.state_dict()


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
