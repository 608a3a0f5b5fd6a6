"""evaluation/during.py: benchmarks and probes while training are recorded, and change nothing of the training."""
import json
import os

import pytest

import run
from common import UserError
from conftest import evaluations, run_train, same_tensors, timeless
from report import draw_loss


@pytest.fixture
def blimp(workdir):
    """A folder with one subtask of BLiMP, made up: of each pair the model likes one better."""
    pytest.importorskip("lm_eval")
    (workdir / "tasks/blimp").mkdir(parents=True)
    rows = [dict(sentence_good=f"def f{i}(self):", sentence_bad=f"self(: f{i} def") for i in range(12)]
    path = workdir / "tasks/blimp/anaphor_gender_agreement.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir / "tasks"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.pictures
def test_benchmarks_and_probes_are_recorded_and_the_training_is_the_same(blimp, workdir, capsys):
    (workdir / "probes.json").write_text('[{"prompt": "def f(", "expected": "self"}]')
    plain = ["--data=pydocs-hybrid", "--eval_every=6"]
    run_train(*plain, "--out=plain")
    run_train(*plain, "--out=measured", "--eval_tasks=blimp", "--eval_limit=8", f"--tasks_dir={blimp}",
              "--probes=probes.json")
    shown = capsys.readouterr().out
    a, b = (run.read_checkpoint(f"{out}/ckpt.pt") for out in ("plain", "measured"))
    assert same_tensors(a["model"], b["model"]) and same_tensors(a["ema"], b["ema"])
    assert same_tensors(a["rng"], b["rng"])
    without = [{name: value for name, value in row.items() if name != "tasks"} for row in timeless("measured")]
    assert without == timeless("plain")

    # benchmarks stand in the log, on the terminal and in the picture
    rows = evaluations("measured")
    assert [row["step"] for row in rows] == [6, 12]
    for row in rows:
        (score,) = row["tasks"]["blimp"].values()
        assert 0 <= score <= 100 and f"blimp {score:.4g}" in shown
    assert (workdir / "measured/loss.png").stat().st_size != (workdir / "plain/loss.png").stat().st_size

    # probes stand in the logs that the card names
    evals, said = (lines(workdir / "measured" / name) for name in ("eval_metrics.jsonl", "probe_generations.jsonl"))
    assert [row["step"] for row in evals] == [row["step"] for row in said] == [6, 12]
    assert all(row["val_loss"] and row["probes"][0]["correct_token_rank"] >= 1 for row in evals)
    assert all(row["prompt"] == "def f(" and isinstance(row["continuation"], str) for row in said)
    assert not (workdir / "plain/eval_metrics.jsonl").exists()


@pytest.mark.parametrize("flags, line", [
    pytest.param(["--eval_tasks=blimb"], "no task 'blimb' .did you mean", marks=pytest.mark.slow),  # all tasks are read
    (["--eval_tasks=blimp", "--tasks_dir=nowhere"], "nowhere is not a folder"),
    (["--probes=nothing.json"], "nothing.json"),
])
def test_what_cannot_be_measured_is_said_before_the_run_begins(flags, line, blimp):
    with pytest.raises(UserError, match=line):
        run_train("--data=pydocs-hybrid", "--out=none", *flags)
    assert not os.path.exists("none")


def test_a_resumed_run_has_each_probe_once_and_a_new_one_none_of_the_old(workdir):
    flags = ["--data=pydocs-hybrid", "--eval_every=3", "--probes=card", "--out=run"]
    run_train(*flags, "--max_steps=6")
    run_train("--resume", "--out=run", "--max_steps=9")
    said = lines(workdir / "run/probe_generations.jsonl")
    assert [row["step"] for row in said] == [step for step in (3, 6, 9) for _ in range(4)]
    run_train("--data=pydocs-hybrid", "--out=run", "--overwrite", "--max_steps=1")
    assert not (workdir / "run/probe_generations.jsonl").exists()


def test_the_picture_has_a_panel_for_each_benchmark(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    seen = []
    monkeypatch.setattr(plt, "close", lambda fig: seen.append([ax.get_title() for ax in fig.axes]))
    rows = [dict(step=i, tokens=i, train_loss=2.0, train_bits_per_byte=2.0) for i in (1, 2)]
    rows.append(dict(step=2, tokens=2, val_loss={}, val_bits_per_byte=dict(raw=dict(mixed=1.9)),
                     tasks=dict(blimp=dict(raw=0.6), arc_easy=dict(raw=0.3))))
    draw_loss(rows, tmp_path / "loss.png", "a run")
    assert seen == [["a run", "arc_easy", "blimp"]]
