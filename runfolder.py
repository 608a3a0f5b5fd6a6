"""A run's folder, out/RUN: whose it is, and all that a run writes into it.

A file is written under another name and then renamed, so that a crash leaves the old one or the new one. The logs
alone grow row by row; a last row that was cut is left out when they are read.
"""
import contextlib
import errno
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from common import Progress, UserError, lock, quoted, replacing

# what a run records while it goes on, in rows of JSON; the last two only if probes are asked for
LOGS = ("metrics.jsonl", "eval_metrics.jsonl", "probe_generations.jsonl")

# what `eval.py --bundle` writes into its folder; the last one tells sample.py and export.py how to sample
RECOMMENDED = "recommended_decoding_params.json"
BUNDLE = ("benchmark_report.md", "eval_summary.json", "benchmark_metrics.json", "benchmark_source_losses.json",
          "benchmark_scores.json", "comparison.json", "probe_summary.json", "decoding_report.md",
          "decoding_summary.json", "tuning_leaderboard.csv", "holdout_leaderboard.csv", "tuning_generations.jsonl",
          "holdout_generations.jsonl", RECOMMENDED)


def read_rows(path, key="step", kind=int):
    """The rows of a log. A line that is no row with such a key, for example a last one that is cut, is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and type(row.get(key)) is kind:
                    rows.append(row)
    return rows


# Files of a run and of its evaluation, which --overwrite deletes; no other file is ever touched
OWN = re.compile(r"(ckpt|best|step_\d+)\.pt|best_validation\.json|loss\.png|config\.json|tokenizer\.json|\.lock|"
                 r"eval\.json|loss_by_position\.png|" + "|".join(map(re.escape, LOGS)))


def own_files(folder):
    """The files of a run that a folder holds, those that a crash left half written as well."""
    if not Path(folder).is_dir():
        return []
    return [path for path in sorted(Path(folder).iterdir())
            if OWN.fullmatch(path.name.removesuffix(".part")) and (path.is_symlink() or not path.is_dir())
            and not (path.name == "eval.json" and read_evaluation(path) is None)]


def read_evaluation(path):
    """What eval.py has written into an eval.json; None if the file is somebody else's."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and {"checkpoint", "step", "weights"} <= found.keys():
            return found
    return None


def recorded_settings(folder):
    """The settings that config.json of a run's folder has; none if it is missing, damaged, or of something else."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if isinstance(record["model"], str) and isinstance(record["cfg"], dict):
            return dict(record["train"])
    return {}


STRAY = (".lock", "config.json.part", ".DS_Store")  # what a run that was killed at once, or a system, leaves


def check_folder(s):
    """UserError if the run must not write into its folder, because of another run there or of files of somebody's."""
    out = Path(s.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder")
    if recorded_settings(out):
        if not (s.resume or s.overwrite):
            raise UserError(f"{out} holds a run: --resume --out={quoted(out)} goes on with it, --out names another "
                            "folder, --overwrite deletes it")
        return
    foreign = sorted(path.name for path in out.glob("*") if path.name not in STRAY)
    if foreign:
        raise UserError(f"{out} holds files of others ({', '.join(foreign[:3])}), which stay as they are; "
                        "--out names another folder")


def save_checkpoint(path, checkpoint):
    """Writes the dict to a temporary file and renames it, so that a crash leaves the old checkpoint or the new one."""
    with replacing(path) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as e:  # torch's writer hides what the system said
            cause = e.__context__
            raise cause if isinstance(cause, OSError) else OSError(errno.ENOSPC, str(e), str(path)) from None


class RunFolder:
    """out/RUN: ckpt.pt, best.pt, step_N.pt, best_validation.json, metrics.jsonl, loss.png, config.json, tokenizer.json.

    Of several processes only the first one writes, and only its terminal shows anything. UserError if another run is
    writing there: the lock is the process's own, and the system drops it when the process dies.
    """

    def __init__(self, path, world):
        self.path, self.is_main = Path(path), world.is_main
        self.progress = Progress()
        is_taken = False
        if self.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.path / ".lock")
            is_taken = self.lock is None
        if world.max(int(is_taken)):
            raise UserError(f"another run is writing into {self.path}; --out names another folder")

    def begin(self, s, cfg, tokenizer_text, machine, resumed_at=None):
        """Begins the folder. Of a resumed run, the rows since its checkpoint go, because those steps come again.

        machine: what it runs on, a dict of plain values for config.json.
        """
        if not self.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for old in own_files(self.path):
            if old.suffix == ".part" or resumed_at is None and old.name != ".lock":
                old.unlink()
        if resumed_at is None:  # what eval.py found out about the old weights
            for name in ("recommended_decoding_params", "eval_summary"):
                (self.path / f"bundle/{name}.json").unlink(missing_ok=True)
        for log in filter(Path.exists, (self.path / name for name in LOGS)):
            rows = [row for row in read_rows(log) if row["step"] <= resumed_at and not row.get("final")]
            self.write(log.name, "".join(json.dumps(row) + "\n" for row in rows))
        settings = asdict(replace(s, resume=False, overwrite=False))
        record = dict(model=s.model, cfg=asdict(cfg), train=settings, machine=machine)
        self.write("config.json", json.dumps(record, indent=1))
        self.write("tokenizer.json", tokenizer_text)

    def write(self, name, text):
        """Writes a file of the folder as a whole."""
        if self.is_main:
            with replacing(self.path / name) as f:
                f.write(text.encode())

    def record(self, row, log="metrics.jsonl"):
        """Adds a row to a log."""
        if self.is_main:
            with open(self.path / log, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    def rows(self):
        return read_rows(self.path / "metrics.jsonl")

    def files(self):
        """Names of the files that are there, in the order of their importance."""
        names = ("best.pt", "best_validation.json", "ckpt.pt", *LOGS, "loss.png", "config.json", "tokenizer.json")
        return [name for name in names if (self.path / name).exists()]

    def show(self, line):
        """A line that the next one replaces, if this is a terminal."""
        show = self.progress.show if self.progress.live else self.progress.done
        show(line)

    def save(self, name, checkpoint):
        if self.is_main:
            save_checkpoint(self.path / name, checkpoint)
