"""race.py: what is compared with what, and an experiment that can be stopped."""
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finetune
import machine
import prepare
import race
import run
import tinymemory
from common import UserError
from conftest import CPU, ROOT
from made_up import made_up_chats
from races import runs, tricks


def test_each_kind_is_plain_tuning_with_one_trick_of_the_recipe_or_all():
    recipe, plain = tinymemory.PRESETS["tinymemory-sft"][1], finetune.Settings()
    assert all(getattr(plain, name) == value for name, value in tricks.OFF.items())
    assert {name: recipe[name] for name in tricks.OFF} == tricks.TRICKS
    first, *single, last = tricks.KINDS.values()
    assert first == {} and [len(one) for one in single] == [1, 1, 1, 1]
    assert {name: value for one in single for name, value in one.items()} == tricks.TRICKS == last
    tables = (ROOT / "MEASUREMENTS.md").read_text(encoding="utf-8")
    for kind in tricks.KINDS:
        assert f"| {kind.replace('plain', 'plain tuning')} |" in tables


@pytest.fixture
def flags(trained, workdir):
    """A small experiment on chats of the test's own."""
    (workdir / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in made_up_chats(400, 1)))
    tokenizer = str((workdir / "data/pydocs-hybrid/tokenizer.json").resolve())
    prepare.prepare(["chats.jsonl"], prepare.Settings(
        tokenizer=tokenizer, out_dir="mine", name="chats", val_fraction=0.1))
    return ["tricks", f"--init_from={trained}/best.pt", "--data=mine/chats", "--base_data=data/pydocs-hybrid",
            "--max_steps=2", "--seeds=2", "--questions=4", "--dtype=float32"]


@pytest.mark.slow
def test_each_kind_is_trained_once_and_what_was_measured_is_printed(flags, workdir, monkeypatch, capsys):
    monkeypatch.setattr(tricks, "KINDS", {"plain": {}, "all": tricks.TRICKS})
    results = workdir / "out/tricks/results.jsonl"
    capsys.readouterr()
    assert race.main(flags) == 0
    shown = capsys.readouterr().out.splitlines()
    measured = [json.loads(line) for line in results.read_text().splitlines()]
    runs = [(row["about"]["kind"], row["about"]["seed"]) for row in measured]
    assert runs == [("before tuning", 0), ("plain", 0), ("plain", 1), ("all", 0), ("all", 1)]
    before, first, second = (row["result"] for row in measured[:3])
    assert first["replies"] < before["replies"] and first != second
    values = [first["replies"], second["replies"]]
    assert re.search(rf"plain +{sum(values) / 2:.3f} ± {abs(values[0] - values[1]) / 2 ** 0.5:.3f} ", shown[3])
    tuned = run.read_checkpoint(workdir / "out/tricks/run/best.pt")["train"]  # the last one
    assert {name: tuned[name] for name in tricks.TRICKS} == tricks.TRICKS
    assert tuned["max_steps"] == 2 and tuned["seed"] == 1338

    # the same command again has nothing left to do
    with monkeypatch.context() as m:
        m.setattr(finetune, "main", None)
        assert race.main(flags) == 0 and capsys.readouterr().out.splitlines() == shown

    # what is stopped half-way, as Ctrl-C does it, is not measured; nor is anything taken for what it is not
    def stopped(argv):
        (workdir / "out/tricks/run/metrics.jsonl").write_text('{"step": 1}\n')
        return 0
    with monkeypatch.context() as m:
        m.setattr(finetune, "main", stopped)
        m.setitem(tricks.TRICKS, "relevance", 0.3)
        with pytest.raises(KeyboardInterrupt):
            race.main(flags)
    assert len(results.read_text().splitlines()) == 5


def test_a_result_is_known_by_code_device_and_compute_type(flags, trained, monkeypatch):
    monkeypatch.setattr(tricks, "kept", lambda folder, about, make: about)
    plain, picked = Path.read_text, replace(CPU)
    monkeypatch.setattr(machine, "pick_device", lambda device, dtype: replace(picked, dtype=getattr(torch, dtype)))

    def key(changed="", **more):
        def read(path, *args, **kwargs):
            return plain(path, *args, **kwargs) + "\nCHANGED = 1\n" * (path == ROOT / changed)
        settings = race.Settings(**dict(init_from=f"{trained}/best.pt", data="mine/chats", out="out/tricks",
                                        base_data="data/pydocs-hybrid", dtype="float32") | more)
        with monkeypatch.context() as m:
            m.setattr(Path, "read_text", read)
            runs.hash_of.cache_clear()  # as in a new process
            about = tricks.Tricks(settings).measures("plain", 0)
        runs.hash_of.cache_clear()
        return {name: value for name, value in about.items() if name != "flags"}

    before = key()
    for name in ("finetune.py", "train.py", "sample.py", "tinymemory.py", "corpus/loader.py",
                 "evaluation/behaviour.py", "races/tricks.py", "kernels/training.cpp"):
        assert key(name) != before, name
    assert key("races/variants.py") == key("README.md") == before != key(dtype="bfloat16")
    monkeypatch.setattr(machine.Device, "chip", "another GPU")
    assert key() != before


def test_what_cannot_be_tried_is_one_line(flags):
    mistakes = [
        ([], "which experiment? architectures, recipe, nanogpt, tricks"),
        (["ablation"], "nanogpt, tricks, not ablation"),
        (["tricks", "--dry"], "--dry is for architectures and recipe, not for tricks"),
        (["recipe", "--size=20M"], "--size is for architectures, not for recipe"),
        (["architectures", "--minutes=3"], "--minutes is for nanogpt, not for architectures"),
        ([*flags, "--seeds=0"], "must be above 0"),
        (["tricks", "--init_from=none.pt"], "no checkpoint none.pt"),
        ([*flags, "--data=data/pydocs-hybrid"], "holds no chats to validate on"),
    ]
    for argv, line in mistakes:
        with pytest.raises(UserError, match=re.escape(line)):
            race.main(argv)
