"""--minutes: the steps, batch and warm-up that fit into a time."""
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

import minutes
import run
import runfolder
import train
from common import UserError
from conftest import ALONE, CPU, SMALL, pretraining_plan, step_rows, together
from minutes import Costs, choice
from objective import Pretraining

SETTINGS = replace(train.Settings(), minutes=10.0, batch_tokens=2 ** 19, block_size=1024, micro_batch=8,
                   warmup_steps=50)


@settings(max_examples=300)
@given(time=st.floats(0.01, 600), micro=st.floats(1e-4, 60), update=st.floats(0, 5), spent=st.floats(0, 20),
       rows=st.integers(1, 16), processes=st.sampled_from([1, 2, 8]), extra=st.floats(0, 0.5),
       sources=st.integers(1, 5))
def test_what_is_chosen_fits_into_the_time_and_fills_it(time, micro, update, spent, rows, processes, extra, sources):
    s, costs = replace(SETTINGS, minutes=time), Costs(micro, update, spent)
    try:
        found = choice(s, (), costs, rows, processes, extra, sources)
    except UserError as e:
        least = 512  # rows of the recipe
        while least % (2 * processes) == 0 and least * s.block_size >= 2 * minutes.LEAST_TOKENS:
            least //= 2
        a_step = micro * (1 + extra) * least / rows / processes + update
        assert spent + a_step > 0.9 * 60 * time and "is not enough for one step" in str(e)
        return
    a_step = micro * (1 + extra) * (found.batch_tokens / s.block_size) / rows / processes + update
    needed = found.max_steps * a_step
    assert needed <= 60 * time - spent and needed + a_step > (60 * time - spent) * (1 - minutes.RESERVE) - 1e-6

    # the batch is the recipe's, or halved no more often than needed
    assert s.batch_tokens % found.batch_tokens == 0 and found.batch_tokens % (processes * s.block_size) == 0
    if found.batch_tokens < s.batch_tokens:
        twice = a_step * 2 - update
        assert int((60 * time - spent) * (1 - minutes.RESERVE) / twice) < minutes.STEPS
    assert found.warmup_steps <= max(0, found.max_steps // 10) and 1 <= found.eval_every <= found.max_steps
    evaluated = 2 * 9 * found.eval_tokens * sources + found.final_eval_tokens * sources
    if found.max_steps * found.batch_tokens > 300 * sources * s.block_size:
        assert evaluated < 0.2 * found.max_steps * found.batch_tokens


def test_a_model_with_idle_parameters_is_measured_too(workdir):
    """As i3 without its scan: the loss does not depend on the scan's parameters, which have no gradient then."""
    assert train.main(["--model=i3", "--scan=false", "--n_layer=1", "--d_model=16", "--n_head=2", "--d_state=4",
                       "--delta_rank=4", "--ffn_rank=8", "--head_rank=8", "--vocab_size=600", "--data=pydocs-hybrid",
                       "--minutes=0.02", "--block_size=32", "--batch_tokens=256", "--micro_batch=4",
                       "--sample_tokens=0", "--device=cpu", "--compile=off", "--out=idle"]) == 0
    assert step_rows("idle")


def test_flags_that_were_typed_stay():
    found = choice(SETTINGS, {"batch_tokens", "warmup_steps", "eval_every"}, Costs(1.0, 0.1, 0.0), 8)
    assert (found.batch_tokens, found.warmup_steps) == (2 ** 19, 50) and found.eval_every == SETTINGS.eval_every
    assert found.max_steps == int(600 * (1 - minutes.RESERVE) / (64 * 1.0 + 0.1))


@pytest.mark.parametrize("flags, measured, micro_batch", [
    ([], [64, 16], 16),  # as many rows as a CPU is given at once; then those of the smaller step
    (["--micro_batch=128"], [128, 16], 128),
    (["--batch_tokens=8192"], [64], 64),
])
def test_what_is_measured_are_the_rows_that_a_step_computes(flags, measured, micro_batch, workdir, monkeypatch):
    flags = ["--data=pydocs-hybrid", "--vocab_size=600", "--block_size=64", "--minutes=0.1", *flags]
    plan = pretraining_plan(*flags)
    plan.settings = replace(plan.settings, batch_tokens=8192, micro_batch=128)
    calls = []

    def a_hundredth_for_each_row(*args, micro_rows):
        calls.append(micro_rows)
        return Costs(0.01 * micro_rows, 0.0, spent=0.5)

    monkeypatch.setattr(minutes, "measured", a_hundredth_for_each_row)
    minutes.settle(plan, Pretraining(plan, ALONE, CPU), ALONE, CPU, None)
    rows = plan.settings.batch_tokens // 64
    assert calls == measured and rows in (16, 128) and plan.settings.micro_batch == micro_batch
    assert plan.settings.max_steps == int((6 - 0.5 * len(calls)) * (1 - minutes.RESERVE) / (0.01 * rows))


def test_a_run_of_a_few_seconds_ends_with_the_steps_it_chose(corpora, tmp_path, monkeypatch):
    monkeypatch.chdir(corpora)
    monkeypatch.setattr(minutes, "MEASURE_SECONDS", 0.1)
    flags = [flag for flag in SMALL if not flag.startswith(("--max_steps", "--eval_", "--final", "--save", "--warmup"))]
    out = tmp_path / "run"
    train.main([*flags, "--vocab_size=600", "--data=pydocs-hybrid", "--minutes=0.04", "--log_every=1", f"--out={out}"])
    recorded = runfolder.recorded_settings(out)
    assert recorded["minutes"] == 0.04 and len(step_rows(out)) == recorded["max_steps"] > 0
    assert run.read_checkpoint(out / "ckpt.pt")["step"] == recorded["max_steps"]

    # what goes on has its steps
    train.main(["--resume", f"--out={out}", f"--max_steps={recorded['max_steps'] + 3}"])
    assert len(step_rows(out)) == recorded["max_steps"] + 3
    with pytest.raises(UserError, match="--minutes is for a new run"):
        train.main(["--resume", f"--out={out}", "--minutes=1"])
    train.main([f"--init_from={out}/ckpt.pt", "--decay_only", "--decay_steps=2", f"--out={tmp_path / 'decay'}"])
    assert run.read_checkpoint(tmp_path / "decay/ckpt.pt")["step"] == recorded["max_steps"] + 5


def test_two_processes_choose_the_same(corpora, tmp_path, monkeypatch):
    monkeypatch.chdir(corpora)
    flags = [flag for flag in SMALL if not flag.startswith(("--max_steps", "--eval_", "--final", "--save"))]
    for status, _, err in together(2, "-c", QUICKLY, *flags, "--vocab_size=600", "--data=pydocs-hybrid",
                                   "--minutes=0.06", f"--out={tmp_path / 'two'}"):
        assert status == 0, err
    assert len(step_rows(tmp_path / "two")) == runfolder.recorded_settings(tmp_path / "two")["max_steps"] > 0


QUICKLY = """
import sys, minutes, train
minutes.MEASURE_SECONDS = 0.1
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("flags, line", [
    (["--minutes=1", "--max_steps=7"], "leave out --max_steps"),
    (["--minutes=1", "--epochs=2"], "leave out --epochs"),
    (["--minutes=1e-9"], "is not enough for one step of 512 tokens on this machine"),
])
def test_a_time_that_makes_no_sense_is_one_line(flags, line, corpora, tmp_path, monkeypatch):
    monkeypatch.chdir(corpora)
    monkeypatch.setattr(minutes, "MEASURE_SECONDS", 0.01)
    small = [flag for flag in SMALL if not flag.startswith("--max_steps")]
    with pytest.raises(UserError, match=line):
        train.main([*small, "--vocab_size=600", "--data=pydocs-hybrid", f"--out={tmp_path / 'x'}", *flags])
    assert not (tmp_path / "x").exists()


def test_the_number_of_steps_is_whole_and_finite():
    assert math.isfinite(choice(SETTINGS, (), Costs(1e-4, 0.0, 0.0), 8).max_steps)
