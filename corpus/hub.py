"""The Hugging Face Hub."""
import contextlib
import itertools
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Progress, UserError
from corpus.text import Reader, Source


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


@dataclass
class HubSource(Source):
    """A set of the Hub, streamed at `revision` or from a copy in `folder`."""
    hub: object = None
    revision: str = ""
    folder: object = None

    def reader(self, state=None):
        reader = HubReader(self.name, self.hub, self.revision, self.folder, None if self.hub.articles else state)
        if self.hub.articles:  # must stay in order; the set is small enough to be read again up to the place
            return Reader(lambda: articles(reader.rows(self.hub.configs[0][0], reader.state["parts"][0])), state)
        return reader


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
    return HubSource(name, spec.language, spec.kind, origin, None, budget=spec.budget, chat=spec.chat, stamp=stamp, hub=spec, folder=folder)


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
