"""What is released: the weights and the tokenizer of a checkpoint, and what its run and its evaluation left.

Nothing is written here. Each format takes what it needs from a Release.
"""
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import run
import runfolder
from corpus.chats import ROLES
from corpus.hub import HUB
from corpus.tokenizer import bos_eos

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Settings for sampling that `transformers` and recommended_decoding_params.json call by the same names -> their types
DECODING = dict(do_sample=bool, temperature=float, top_k=int, top_p=float, min_p=float, repetition_penalty=float,
                no_repeat_ngram_size=int, max_new_tokens=int)


@dataclass
class Release:
    name: str  # what the model is called
    path: Path  # the checkpoint's file; what its run left is in the same folder
    checkpoint: dict  # as run.read_checkpoint gives it
    model: torch.nn.Module  # with the released weights, in fp32
    weights: str  # which weights these are: raw or ema
    tokenizer: object  # of the `tokenizers` library
    dtype: str = "float32"  # type of the released weights, a key of DTYPES
    licence: str = ""  # of the model, as the Hub spells it; empty: not said
    bundle: str = ""  # folder of an evaluation; empty: bundle/ beside the checkpoint

    @property
    def module(self):
        """The architecture file: ivme, tinymemory, i3 or gpt2preln, or a fork of one."""
        return sys.modules[type(self.model).__module__]

    @property
    def architecture(self):
        return self.module.__name__

    @property
    def cfg(self):
        return self.model.cfg

    @property
    def settings(self):
        """What the run was trained with."""
        return self.checkpoint["train"]

    @property
    def is_chat_model(self):
        """Whether the model was fine-tuned on chats."""
        return run.is_fine_tuning(self.settings)

    @property
    def state(self):
        """The weights under our names, in the released type."""
        return {name: value.to(DTYPES[self.dtype]) for name, value in self.model.state_dict().items()}

    # ids of the tokenizer

    @property
    def bos(self):
        return bos_eos(self.tokenizer)[0]

    @property
    def eos(self):
        return bos_eos(self.tokenizer)[1]

    @property
    def pad(self):
        """What rows are filled up with. A tokenizer without <|pad|> takes the token that ends a document."""
        pad = self.tokenizer.token_to_id("<|pad|>")
        return self.eos if pad is None else pad

    @property
    def has_roles(self):
        """Whether chats can be framed with this tokenizer."""
        return all(self.tokenizer.token_to_id(f"<|{role}|>") is not None for role in ROLES)

    # files of the run and of its evaluation

    def beside(self, name):
        """A file in the checkpoint's folder, which need not be there."""
        return self.path.parent / name

    @functools.cached_property
    def record(self):
        """config.json of the run, which a release calls training_config.json; empty if it is gone."""
        return read_json(self.record_path)

    @property
    def record_path(self):
        released = self.beside("training_config.json")
        return released if released.is_file() else self.beside("config.json")

    @functools.cached_property
    def rows(self):
        """The rows of metrics.jsonl up to this checkpoint's step."""
        rows = runfolder.read_rows(self.beside("metrics.jsonl"))
        return [row for row in rows if isinstance(row, dict) and row.get("step", 0) <= self.checkpoint["step"]]

    @functools.cached_property
    def evaluation(self):
        """eval.json; empty if it is not there, or about other weights, or not eval.py's."""
        found = runfolder.read_evaluation(self.beside("eval.json")) or {}
        is_mine = found.get("step") == self.checkpoint["step"]
        is_mine &= str(found.get("weights")).lower() == self.weights
        if not self.checkpoint["step"]:  # models of others, of which a folder may hold several
            is_mine &= found.get("checkpoint") == self.path.name
        return found if is_mine else {}

    @functools.cached_property
    def bundle_folder(self):
        """The evaluation's folder, if it is about these weights, else None: the one that was named, or bundle/ beside
        the checkpoint."""
        folder = Path(self.bundle) if self.bundle else self.beside("bundle")
        about = read_json(folder / "eval_summary.json")
        is_mine = all(about.get(name) == self.checkpoint[name] for name in ("step", "tokens"))
        is_mine &= str(about.get("weights")).lower() == self.weights
        if not self.checkpoint["step"]:
            is_mine &= about.get("checkpoint") == self.path.name
        return folder if is_mine else None

    @functools.cached_property
    def decoding(self):
        """The sampling settings that the evaluation recommends, see DECODING; empty if there are none, and for chats:
        a penalty would count the tokens that end each reply before."""
        if self.is_chat_model:
            return {}
        for folder in filter(None, (self.bundle_folder, self.path.parent)):
            found = read_json(folder / runfolder.RECOMMENDED)
            known = {name: kind(found[name]) for name, kind in DECODING.items() if is_number(found.get(name))}
            if known:
                return known
        return {}

    @functools.cached_property
    def sources(self):
        """The sources that the model was trained on, as Source; none if it was not trained."""
        return data_sources(self.checkpoint)


def open_release(path, ema=None, **about):
    """A checkpoint as a Release. ema: see run.load_checkpoint, which says what it raises. about: further fields."""
    model, tokenizer, checkpoint = run.load_checkpoint(path, ema=ema)
    about.setdefault("name", Path(path).resolve().parent.name)
    return Release(path=Path(path), checkpoint=checkpoint, model=model, weights=run.weights_of(checkpoint, ema),
                   tokenizer=tokenizer, **about)


def is_number(value):
    """Whether this is a finite number, or a truth value."""
    return isinstance(value, (bool, int, float)) and math.isfinite(value)


def read_json(path):
    """The object in a .json file; empty if the file is missing or damaged, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------------- the data

LICENCES = {spec.repo: spec.licence for spec in HUB.values()} | {"pydocs": "PSF", "pydocs-chat": "PSF"}


@dataclass
class Source:
    """A source of text that the model was trained on. What no file tells is None or empty."""
    name: str
    seen: int  # training tokens that the model has read, some of them perhaps more than once
    tokens: int | None = None  # training tokens that there are
    language: str = ""
    kind: str = ""
    dataset: str = ""  # its name on the Hub; or pydocs, or pydocs-chat
    part: str = ""  # which part of the data set was read
    revision: str = ""  # the commit of its repository
    licence: str = ""

    @property
    def is_on_the_hub(self):
        return "/" in self.dataset


def data_sources(checkpoint):
    """The sources that a checkpoint was trained on, in the order of the run.

    The checkpoint knows their names, their checksums and how many rows each has given. All else is in the meta.json of
    the prepared folder with the same checksum, if that is still there.
    """
    loader, settings = checkpoint["loader"], checkpoint["train"]
    if not loader.get("fingerprint") or "block_size" not in settings:
        return []
    entries = prepared_entries(settings)
    sources = []
    for (name, sha256, *_), taken, per_epoch in zip(loader["fingerprint"], loader["taken"], loader["per_epoch"]):
        source = Source(name, seen=taken * settings["block_size"])
        sources.append(source)
        if sha256 not in entries:
            continue
        entry = entries[sha256]
        train, origin = entry["train"], entry["origin"]
        if settings.get("pack") == "document":  # rows are filled up, and a document's first token is no target
            source.seen = round(taken * (train["tokens"] - train["documents"]) / per_epoch)
        source.tokens, source.language, source.kind = train["tokens"], entry["language"], entry["kind"]
        source.dataset, source.revision = origin.get("dataset", ""), origin.get("revision", "")
        source.part, source.licence = part_of(origin), LICENCES.get(source.dataset, "")
    return sources


def prepared_entries(settings):
    """Checksum of training tokens -> what meta.json says of that source.

    Looks into the folders that --data and --base_data name, and into all under data/.
    """
    folders = []
    for names in (settings.get("data", ""), settings.get("base_data", "")):
        for name in filter(None, names.split(",")):
            folders += [Path(name), Path(name.rpartition(":")[0])]  # NAME or NAME:WEIGHT
    folders += sorted(path.parent for path in Path("data").glob("*/meta.json"))
    entries = {}
    for folder in folders:
        meta = read_json(folder / "meta.json")
        if meta.get("format") == 1 and "tokenizer_sha256" in meta:  # else it is another program's
            for entry in meta["sources"]:
                entries.setdefault(entry["train"]["sha256"], entry)
    return entries


def part_of(origin):
    """Which part of a data set was read: its configurations and its filter, or the version of Python."""
    parts = [config for config in origin.get("configs", []) if config]
    parts += [" ".join(map(str, condition)) for condition in origin.get("filter", [])]
    if "python" in origin:
        parts.append(f"Python {origin['python']}")
    return ", ".join(parts)
