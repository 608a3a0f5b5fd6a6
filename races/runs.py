"""Training runs for an experiment: each is made once, measured on the validation documents, and kept.

A run is known by the flags that train.py is told, by its data, by the device and by the code that trains and measures.
What was measured of it is a line of results.jsonl, so an experiment can be stopped at any moment, and the same command
goes on with it.
"""
import ast
import contextlib
import functools
import hashlib
import io
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import minutes
import objective
import run
import runfolder
import train
from common import clock
from corpus.folder import document_edges
from corpus.loader import bytes_per_token
from corpus.tokenizer import bos_eos
from evaluation.losses import token_losses, windows_of
from machine import World, pick_device
from races.variants import VARIANTS
from races.verdicts import Measured
from report import Diverged


@dataclass
class Result:
    """What is kept of a run."""
    measured: Measured | None  # None: it diverged
    curve: list  # [tokens, seconds, bits per byte] of each evaluation during training
    tokens_per_s: float  # median over the run
    seconds: float  # that all of it took, its start and its evaluations too
    why: str = ""  # what was said when it diverged

    @property
    def bits_per_byte(self):
        return self.measured.bits_per_byte if self.measured else math.inf

    @property
    def shown(self):
        return f"{self.measured.bits_per_byte:.3f} bits per byte" if self.measured else "diverged"


def as_result(values):
    """The Result that asdict made values of."""
    result = Result(**values)
    if values["measured"]:
        result.measured = Measured(**values["measured"])
    return result


ROOT = Path(__file__).parent.parent
# What trains and measures, whatever the architecture. What only prepares data is not here: data has its fingerprint
CODE = ("train.py", "objective.py", "run.py", "machine.py", "minutes.py", "report.py", "corpus/loader.py",
        "corpus/counts.py", "corpus/folder.py", "corpus/tokenizer.py", "evaluation/losses.py", "races/runs.py")


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@functools.cache
def hash_of(path):
    """A hash of a source file. Of Python, comments and docstrings do not count.

    The file is read once: if it changes while a race runs, the program still runs what it said before.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [line for line in node.body if not is_docstring(line)]
        text = ast.dump(tree)
    return hashlib.sha256(text.encode()).hexdigest()


def code_of(*more):
    """A hash of the code that trains and measures, and of the files `more`, which are named from the repository."""
    kernels = [path for path in sorted((ROOT / "kernels").iterdir())
               if path.suffix in (".py", ".cpp", ".cu", ".h") and path.name != "bench.py"]
    hashes = [hash_of(path) for path in (*kernels, *(ROOT / name for name in (*CODE, *more)))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def find(folder, about):
    """What results.jsonl has under `about`, a dict; None if nothing."""
    for row in runfolder.read_rows(folder / "results.jsonl", "about", dict):
        if row["about"] == about:
            return row["result"]
    return None


def kept(folder, about, make):
    """The result that results.jsonl has under `about`, a dict. If there is none, make() makes it, and it is kept."""
    result = find(folder, about)
    if result is None:
        result, path = make(), folder / "results.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # the program was killed while it wrote
        with open(path, "a", encoding="utf-8") as f:
            f.write("\n" * torn + json.dumps(dict(about=about, result=result)) + "\n")
    return result


@torch.no_grad()
def document_losses(model, source, tokenizer, T, n_rows, on, tokens=0):
    """The model's Measured on the documents of a source's validation text, read in windows of T that do not overlap.

    tokens: about this many targets count, in windows spread evenly over the text; 0: all. A document without any is
    left out, which depends on the windows alone and so is the same for every model.
    """
    starts = document_edges(source.val, bos_eos(tokenizer)[0])[:-1]
    n_bytes = bytes_per_token(tokenizer, [source])
    rows = windows_of(source, T, T, tokens=tokens)
    sums = np.zeros((len(starts), 2))
    for k in range(0, len(rows), n_rows):
        some = rows[k:k + n_rows]
        losses, y = token_losses(model, source.val, some, T, on)
        place = torch.tensor([first for first, _, _ in some])[:, None] + 1 + torch.arange(y.size(1))  # of the targets
        counted = y >= 0
        document = np.searchsorted(starts, place[counted].numpy(), side="right") - 1
        np.add.at(sums, document, np.stack([losses[counted].double().numpy(), n_bytes[y[counted]].numpy()], 1))
    sums = sums[sums[:, 1] > 0]
    return Measured(sums[:, 0].tolist(), sums[:, 1].tolist())


def as_flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


# flags that do not change how long a step takes
NOT_SPEED = tuple(f"--{name}=" for name in (
    "seed", "max_steps", "lr", "muon_lr", "weight_decay", "schedule", "warmup_steps", "decay_fraction",
    "final_lr_fraction", "eval_every", "eval_tokens", "log_every", "data", "order"))


class Runs:
    """The runs of an experiment, whose folder is --out. s: race.Settings."""

    def __init__(self, s):
        self.s, self.out = s, Path(s.out)
        self.on = pick_device(s.device, "float32")  # for measuring
        self.training_device = pick_device(s.device, s.dtype)
        self.known = {}  # flags about the data -> what it is
        self.stopped = False  # by Ctrl-C
        self.out.mkdir(parents=True, exist_ok=True)

    def plan(self, *flags):
        """What train.py makes of these flags."""
        flags = [*flags, f"--device={self.s.device}", f"--dtype={self.s.dtype}", "--overwrite", f"--out={self.out}/run"]
        return run.plan_run(flags, train.Settings, train.choices(), train.default_out, "")

    def data(self, flags):
        """(sources, text of their tokenizer.json) of a run with these flags."""
        key = tuple(flag for flag in flags if flag.startswith(("--model=", "--data=", "--tokenizer=", "--vocab_size=")))
        if key not in self.known:
            plan = self.plan(*key)
            s = plan.settings
            self.known[key] = run.find_data(s.data, s.tokenizer, plan.cfg.vocab_size, World())
        return self.known[key]

    def bytes_per_token(self, flags):
        """Bytes of training text behind a token."""
        entries = [source.entries[0] for source in self.data(flags)[0]]
        return sum(entry["bytes"] for entry in entries) / sum(entry["tokens"] for entry in entries)

    def code(self, flags):
        """A hash of the code that makes a run with these flags."""
        plan = self.plan(*flags)
        files = [plan.module.__file__]
        if plan.settings.optimizer in VARIANTS:
            files.append("races/variants.py")
        return code_of(*files)

    def about(self, flags):
        """The key of a result in results.jsonl."""
        on, data = self.training_device, [source.fingerprint for source in self.data(flags)[0]]
        return dict(flags=flags, device=on.chip, dtype=str(on.dtype), code=self.code(flags), data=data,
                    val_tokens=self.s.val_tokens)

    def find(self, flags):
        """The result of a run that was made earlier, or None."""
        values = find(self.out, self.about(flags))
        return values and as_result(values)

    def result(self, flags):
        """The result of the run that these flags of train.py make, which is trained now unless it was before.

        Raises KeyboardInterrupt if the user stops it, after which nothing of it is kept.
        """
        return as_result(kept(self.out, self.about(flags), lambda: asdict(self.train(flags))))

    def train(self, flags):
        folder = self.out / "run"
        flags = [*flags, f"--device={self.s.device}", f"--dtype={self.s.dtype}", "--overwrite", f"--out={folder}",
                 "--sample_tokens=0", "--save_every=0", "--final_eval_tokens=1024"]
        why, begun = "", time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                train.main(flags)
            except Diverged as e:
                why = str(e)
        rows, seconds = runfolder.read_rows(folder / "metrics.jsonl"), time.monotonic() - begun
        speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
        speed = statistics.median(speeds) if speeds else 0.0
        curve = [[row["tokens"], row["elapsed"], min(kind["mixed"] for kind in row["val_bits_per_byte"].values())]
                 for row in rows if "val_bits_per_byte" in row and not row.get("final")]
        if why:
            return Result(None, curve, speed, seconds, why)
        if not rows or not rows[-1].get("final"):
            raise KeyboardInterrupt  # Ctrl-C ends training without an error
        return Result(self.measure(folder / "ckpt.pt"), curve, speed, seconds)

    def measure(self, path):
        """The Measured of a checkpoint on its data's validation text, of the weights that its last evaluation chose."""
        model, tokenizer, checkpoint = run.load_checkpoint(path, self.on.device)
        s = checkpoint["train"]
        sources, _ = run.find_data(s["data"], s["tokenizer"], model.cfg.vocab_size, World(), checkpoint["tokenizer"])
        parts = [document_losses(model, source, tokenizer, s["block_size"], 16, self.on, self.s.val_tokens)
                 for source in sources]
        return Measured([x for part in parts for x in part.nats], [x for part in parts for x in part.bytes])

    def all(self, plan):
        """The Results of a plan, name -> flags, under the same names; None for a run that Ctrl-C left unmade.

        A line tells of each run that is made now.
        """
        results = {name: self.find(flags) for name, flags in plan.items()}
        missing = [name for name, result in results.items() if result is None]
        begun = time.monotonic()
        for made, name in enumerate(missing, start=1):
            try:
                results[name] = self.result(plan[name])
            except KeyboardInterrupt:
                self.stopped = True
                print("stopped; the same command goes on with the experiment", flush=True)
                break
            left = (time.monotonic() - begun) / made * (len(missing) - made)
            words = ", ".join(f"{part:.2g}" if isinstance(part, float) else str(part) for part in name)
            print(f"{made} of {len(missing)}  {words}: {results[name].shown}, {clock(left)} left", flush=True)
        return results

    def work(self, flags):
        """What the speed of a run depends on, as text."""
        on, code = self.training_device, self.code(flags)
        return " ".join([on.chip, str(on.dtype), code, *(flag for flag in flags if not flag.startswith(NOT_SPEED))])

    def speed(self, flags):
        """Tokens that a run with these flags trains on in a second, from a measurement of some seconds."""
        plan, on, world = self.plan(*flags), self.training_device, World()
        task = objective.Pretraining(plan, world, on)
        costs = minutes.measured(plan, task, world, on, train.Optimizers, plan.settings.max_steps)
        return plan.settings.batch_tokens / (costs.micro * task.rows / task.micro + costs.update)


AROUND = 4.0  # seconds that a run spends before, between and after its steps


def estimate(runs, plan, speeds=None):
    """A line that tells how long those runs of a plan, name -> flags, take that were not made yet.

    speeds: name -> tokens a second; what it does not have is measured.
    """
    speeds, measured = dict(speeds or {}), {}
    missing = {name: flags for name, flags in plan.items() if not runs.find(flags)}
    seconds = 0.0
    for name, flags in missing.items():
        work = runs.work(flags)
        if name not in speeds:
            if work not in measured:
                measured[work] = runs.speed(flags)
            speeds[name] = measured[work]
        s = runs.plan(*flags).settings
        seconds += s.max_steps * s.batch_tokens / speeds[name] + AROUND
    return f"{len(missing)} runs are to be made, which take about {clock(seconds)} on this machine"
