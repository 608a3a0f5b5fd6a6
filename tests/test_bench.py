"""bench.py: the formula for memory agrees with what is counted, and the counting with what is there."""
import json
import multiprocessing
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
import gpt2preln
import prepare
import tinymemory
import train
from conftest import ROOT
from common import UserError


def test_alive_tensors_are_counted_once_each_and_no_longer_than_they_live():
    given = torch.zeros(100)
    with bench.AliveTensors([given, given[:50]]) as alive:
        assert alive.now == 400
        a = torch.ones(1000)
        b = a.view(10, 100)[3:5]  # the same memory
        assert alive.now == 4400
        del a
        assert alive.now == 4400
        del b
        assert alive.now == 400
        x = torch.ones(50, requires_grad=True)
        y = (x.exp() * 2).sum()  # keeps exp(x) and its double's factor for the backward pass
        before = alive.now
        y.backward()
        assert alive.now < before + 400 and x.grad is not None
    assert alive.peak >= 4400


@pytest.mark.parametrize("shape", (dict(n_layer=3, d_model=192, vocab_size=1000, context_length=300), dict(n_layer=2, d_model=128, vocab_size=5000, context_length=500, tied=True),
                                    dict(n_layer=16, d_model=128, vocab_size=1000, context_length=300, tied=True)), ids=("untied", "tied", "deep"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))
@pytest.mark.parametrize("grad_checkpoint", (False, True), ids=("kept", "checkpointed"))
@pytest.mark.parametrize("rows", (1, 3))
def test_the_formula_for_memory_is_what_a_step_takes(shape, dtype, grad_checkpoint, rows):
    cfg = replace(gpt2preln.Config(), n_head=4, **shape)
    model = gpt2preln.Model(cfg)
    if grad_checkpoint:
        train.checkpoint_blocks(model)
    s = train.Settings(optimizer="adamw", pack="document")
    counted = bench.training_step(model, s, dtype, cfg.context_length, rows)
    formula = bench.gpt2_memory(cfg, rows, cfg.context_length, grad_checkpoint, bf16=dtype == torch.bfloat16, cpu=True)
    assert counted == pytest.approx(formula, rel=0.05)


def test_the_cards_batches_fit_16_gb_by_the_formula():
    for preset, rows in (("gpt2preln", 6), ("gpt2preln-medium", 1)):
        cfg, recipe = gpt2preln.PRESETS[preset]
        assert recipe["micro_batch"] == rows
        for grad_checkpoint in (False, True):
            assert bench.gpt2_memory(cfg, rows, 2500, grad_checkpoint) < 12e9


def test_memory_is_measured_in_processes_of_their_own_and_extrapolated(capsys, monkeypatch):
    monkeypatch.setitem(gpt2preln.PRESETS, "gpt2preln", (replace(gpt2preln.Config(), n_layer=1, d_model=64, n_head=2, vocab_size=500), gpt2preln.PRESETS["gpt2preln"][1]))
    context = multiprocessing.get_context("fork")  # so that the children have this small preset too
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: context)
    assert bench.main(["memory", "--block_size=2000", "--device=cpu", "--dtype=float32"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [[rows, kept] for kept in ("no", "yes") for rows in ("1", "2", "6")]
    for part in (lines[:3], lines[3:]):
        one, two, six = (float(line[2]) for line in part)
        assert six == pytest.approx(one + 5 * (two - one), abs=0.004) and "extrapolated)" in part[2] and "extrapolated)" not in part[1]
        assert all(float(line[4]) > float(line[2]) for line in part)  # a process is more than its tensors


def test_what_is_not_to_be_measured_is_one_line():
    for argv, line in (([], "memory, prepare, ablation"), (["speed"], "memory, prepare, ablation, not speed"), (["memory", "--micro_batch=one"], "not a list of numbers"),
                       (["memory", "--micro_batch=0"], "not a list of numbers"), (["memory", "--dtype=half"], "half is not one of"),
                       (["memory", "--optimizer=sgd"], "sgd is not one of"), (["memory", "--block_size=5000"], "longer than the model's context of 2500")):
        with pytest.raises(bench.UserError, match=re.escape(line)):
            bench.main(argv)


def test_preparing_is_measured_on_text_without_duplicates(capsys):
    texts = list(bench.library_documents(30_000_000))  # more than the library has
    assert len(texts) == len(set(texts)) and sum(map(len, texts)) == 30_000_000
    assert bench.main(["prepare", "--megabytes=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 MB, ") and len(re.findall(r"\d MB/s", shown)) == 3 and "of the speed of encoding alone" in shown


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=40), loop=st.lists(st.integers(0, 2), min_size=3, max_size=9), times=st.integers(0, 4))
def test_repetition_is_found_where_a_search_finds_it(ids, loop, times):
    text = ids + loop * times
    assert bench.repeats_4gram(text) == any(text[i:i + 4] == text[j:j + 4] for i in range(len(text) - 3) for j in range(i + 1, len(text) - 3))
    tails = [text[-k:] for k in range(1, len(text) + 1)]
    looping = any(len(t) == 3 * n and t == t[:n] * 3 for t in tails for n in range(3, 20)) or len(text) > 16 and len(set(text[-17:])) == 1
    assert bench.ends_in_loop(text) == looping


def test_each_kind_of_the_ablation_is_plain_tuning_with_one_trick_of_the_recipe_or_all():
    recipe, plain = tinymemory.PRESETS["tinymemory-sft"][1], train.Settings()
    assert all(getattr(plain, k) == off for k, off in bench.OFF.items()) and {k: recipe[k] for k in bench.OFF} == bench.TRICKS
    assert [len(tricks) for tricks in bench.KINDS.values()] == [0, 1, 1, 1, 1, 4]
    assert {k: v for tricks in list(bench.KINDS.values())[1:-1] for k, v in tricks.items()} == bench.TRICKS == bench.KINDS["all"]
    assert all(f"| {kind.replace('plain', 'plain tuning')} |" in (ROOT / "README.md").read_text() for kind in bench.KINDS)


def test_the_ablation_trains_each_kind_once_and_prints_what_it_measured(trained, workdir, monkeypatch, capsys):
    chats = [dict(instruction=f"say {word}", output=f"{word} it is") for word in (ROOT / "train.py").read_text().split()[:400]]
    (workdir / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    tokenizer = str((workdir / "data/pydocs-hybrid/tokenizer.json").resolve())
    prepare.prepare(["chats.jsonl"], prepare.Settings(tokenizer=tokenizer, out_dir="mine", name="chats", val_fraction=0.1))
    monkeypatch.setattr(bench, "KINDS", {"plain": {}, "all": bench.TRICKS})
    flags = ["ablation", f"--init_from={trained}/best.pt", "--data=mine/chats", "--base_data=data/pydocs-hybrid", "--max_steps=2", "--seeds=2", "--questions=4", "--dtype=float32"]
    capsys.readouterr()
    assert bench.main(flags) == 0
    shown = capsys.readouterr().out.splitlines()
    measured = [json.loads(line) for line in (workdir / "out/ablation/results.jsonl").read_text().splitlines()]
    assert [(r["about"]["kind"], r["about"]["seed"]) for r in measured] == [("before tuning", 0), ("plain", 0), ("plain", 1), ("all", 0), ("all", 1)]
    assert measured[1]["measures"]["replies"] < measured[0]["measures"]["replies"] and measured[1]["measures"] != measured[2]["measures"]
    values = [r["measures"]["replies"] for r in measured[1:3]]
    assert re.search(rf"plain +{sum(values) / 2:.3f} ± {abs(values[0] - values[1]) / 2 ** 0.5:.3f} ", shown[3])
    tuned = train.read_checkpoint(workdir / "out/ablation/run/best.pt")["train"]  # the last one
    assert {k: tuned[k] for k in bench.TRICKS} == bench.TRICKS and tuned["max_steps"] == 2 and tuned["seed"] == 1338
    with monkeypatch.context() as m:
        m.setattr("train.main", None)  # nothing is left to do
        assert bench.main(flags) == 0 and capsys.readouterr().out.splitlines() == shown
    # what is stopped half-way, as Ctrl-C does it, is not measured; nor is anything taken for what it is not
    with monkeypatch.context() as m:
        m.setattr("train.main", lambda argv: (workdir / "out/ablation/run/metrics.jsonl").write_text('{"step": 1}\n') and 0)
        m.setitem(bench.TRICKS, "relevance", 0.3)
        with pytest.raises(KeyboardInterrupt):
            bench.main(flags)
    assert len((workdir / "out/ablation/results.jsonl").read_text().splitlines()) == 5
    for flag, line in (("--seeds=0", "must be above 0"), ("--data=data/pydocs-hybrid", "holds no chats to validate on")):
        with pytest.raises(UserError, match=line):
            bench.main([*flags, flag])
