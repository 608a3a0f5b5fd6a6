"""bench.py: tensors are counted as long as they live, and each benchmark measures what it says."""
import multiprocessing
import queue
import re
import time
from dataclasses import replace

import pytest
import torch

import bench
import gpt2preln
import gpu_suite
import i3
import ivme
import memory
import peers
import train
from common import UserError
from conftest import CPU, ROOT


# ---------------------------------------------------------------------------------------------------- memory

def test_alive_tensors_are_counted_once_each_and_no_longer_than_they_live():
    given = torch.zeros(100)
    with memory.AliveTensors([given, given[:50]]) as alive:
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


@pytest.fixture
def small_gpt2preln(monkeypatch):
    """The preset gpt2preln with a small model."""
    cfg, recipe = gpt2preln.PRESETS["gpt2preln"]
    cfg = replace(cfg, n_layer=1, d_model=64, n_head=2, vocab_size=500)
    monkeypatch.setitem(gpt2preln.PRESETS, "gpt2preln", (cfg, recipe))
    return cfg


def test_a_step_holds_weights_gradients_moments_and_average_and_more_with_more_rows(small_gpt2preln):
    def peak(rows, **changes):
        torch.manual_seed(0)
        model = gpt2preln.Model(replace(small_gpt2preln, context_length=200, n_layer=4))
        s = train.Settings(optimizer="adamw", **changes)
        return memory.peak_of_tensors(model, s, CPU, 200, rows), 4 * model.n_params
    one, weights = peak(1, pack="document")
    three, _ = peak(3, pack="document")
    assert 5 * weights < one < three  # weights, gradients, two moments, average; and what the backward pass needs
    assert three - one > 2 * 4 * 200 * 4 * 8 * 64  # for each of two rows 8 d numbers of each layer's tokens, at least
    # without the average
    assert peak(1, pack="document", ema_beta=0.0)[0] == one - weights


def test_memory_is_measured_in_processes_of_their_own_and_extrapolated(small_gpt2preln, capsys, monkeypatch):
    context = multiprocessing.get_context("fork")  # so that the children have this small preset too
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: context)
    assert bench.main(["memory", "--block_size=2000", "--device=cpu", "--dtype=float32"]) == 0
    about, _, *lines = capsys.readouterr().out.splitlines()
    assert about == "gpt2preln, rows of 2,000 tokens, float32 on cpu, adamw, EMA, document packing"
    table = [line.split() for line in lines]
    assert [cells[:2] for cells in table] == [[rows, kept] for kept in ("no", "yes") for rows in ("1", "2", "6")]
    for part in (table[:3], table[3:]):
        one, two, six = (float(cells[2]) for cells in part)
        assert six == pytest.approx(one + 5 * (two - one), abs=0.004)
        assert [cells[-1] == "(extrapolated)" for cells in part] == [False, False, True]
        assert all(float(cells[4]) > float(cells[2]) for cells in part)  # a process is more than its tensors


def test_the_cards_batches_fit_16_gb_as_measured():
    tables = (ROOT / "MEASUREMENTS.md").read_text(encoding="utf-8")
    for preset in ("gpt2preln", "gpt2preln-medium"):
        rows = gpt2preln.PRESETS[preset][1]["micro_batch"]
        for kept in ("no", "yes"):
            _, process = re.search(rf"\| {preset} {rows}, {kept} \| ([\d.]+) GB \| ([\d.]+) GB \|", tables).groups()
            assert float(process) < 16


# ---------------------------------------------------------------------------------------------------- the others

@pytest.mark.slow
def test_preparing_is_measured_on_text_without_duplicates(capsys):
    texts = list(bench.library_documents(13_000_000))  # more than the library has
    assert len(texts) == len(set(texts)) and sum(map(len, texts)) == 13_000_000
    assert bench.main(["prepare", "--megabytes=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 MB, ") and len(re.findall(r"\d MB/s", shown)) == 3
    assert "of the speed of encoding alone" in shown


@pytest.fixture
def small_i3(monkeypatch):
    """Small models in place of i3's presets."""
    for name, n_attention in (("i3", 0), ("i3-22m", 0), ("i3-80m", 1), ("i3-200m", 1)):
        cfg, recipe = i3.PRESETS[name]
        cfg = replace(cfg, vocab_size=100, n_layer=2, n_attention=n_attention, d_model=32, d_inner=0, n_head=2,
                      d_state=4, delta_rank=4)
        monkeypatch.setitem(i3.PRESETS, name, (cfg, recipe))


def test_a_token_of_i3_needs_as_much_state_at_every_position(small_i3, capsys):
    assert bench.main(["decode", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = [re.search(r"position +([\d,]+): +[\d.]+ ms +(.* of state)", line).groups() for line in lines]
    assert [position for position, _ in sizes] == ["10", "10,000"] and sizes[0][1] == sizes[1][1]


@pytest.mark.slow
def test_the_shares_of_a_training_step_are_all_of_it(small_i3, capsys):
    assert bench.main(["step", "--device=cpu", "--dtype=float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["i3-22m", "i3-80m", "i3-200m"]
    for line in lines:
        shares = dict(re.findall(r"(scan|products|optimizer|rest) (\d+)%", line))
        assert len(shares) == 4 and int(shares["products"]) > 0 and int(shares["rest"]) > 0
        assert sum(map(int, shares.values())) == pytest.approx(100, abs=2)


def timed_once(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@pytest.mark.slow
def test_training_is_measured_beside_transformers(capsys, monkeypatch):
    cfg, recipe = ivme.PRESETS["ivme"]
    small = replace(cfg, vocab_size=100, n_layer=1, d_model=32, n_head=2, n_kv_head=1, d_ff=16)
    monkeypatch.setitem(ivme.PRESETS, "ivme", (small, recipe))
    monkeypatch.setattr(peers, "SECONDS", 0)
    whole = peers.contenders
    monkeypatch.setattr(peers, "contenders", lambda s: {
        name: make for name, make in whole(s).items() if not name.endswith("torch.compile")})

    def here(*args):
        results = queue.SimpleQueue()
        peers.measure(*args, torch.get_num_threads(), results)
        return results.get()
    monkeypatch.setattr(peers, "in_a_process", here)
    assert bench.main(["train", "--sizes=2x16,1x8", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" tokens a step")[0] for line in lines[::5]] == ["2 x 16", "1 x 8"]
    for line in [*lines[1:4], *lines[6:9]]:
        assert re.search(r"^ours, .* tokens/s  +[\d.]+ x transformers' Llama  +\d+% of the best product$", line)
    assert lines[4].startswith("transformers' Llama") and lines[9].startswith("transformers' Llama")


def test_a_contender_that_cannot_be_measured_is_one_line(monkeypatch):
    monkeypatch.setattr(peers, "contenders", lambda s: {"ours": None, "theirs": None})
    with pytest.raises(UserError, match="measuring ours ended with status 1"):  # not to be called
        bench.main(["train", "--sizes=1x8", "--turns=1", "--device=cpu"])


def test_sampling_is_measured_beside_transformers(capsys, monkeypatch):
    cfg, recipe = ivme.PRESETS["ivme"]
    small = replace(cfg, vocab_size=100, n_layer=1, d_model=32, n_head=2, n_kv_head=1, d_ff=16)
    monkeypatch.setitem(ivme.PRESETS, "ivme", (small, recipe))

    monkeypatch.setattr(bench, "least", lambda run, budget: {name: timed_once(f) for name, f in run.items()})
    assert bench.main(["sample", "--tokens=5", "--device=cpu"]) == 0
    *lines, bound = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and all(re.search(r"  [\d.]+ ms a step  +[\d.]+ x transformers$", line) for line in lines)
    names = {line.split("  ")[0] for line in lines}
    assert names >= {"ours, float32", "ours, bfloat16, 8 at once", "transformers, float32"}
    assert re.fullmatch(r"reading all weights at [\d.]+ GB/s takes [\d.]+ ms in fp32, [\d.]+ ms in bf16", bound)


def test_the_gpu_suite_runs_whole_with_tiny_sizes(capsys, monkeypatch):
    monkeypatch.setattr(gpu_suite, "least", lambda run, budget: {name: timed_once(f) for name, f in run.items()})
    monkeypatch.setattr(gpu_suite.minutes, "MEASURE_SECONDS", 0.01)
    assert bench.main(["gpu", "--device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "failed" not in shown and "tiny sizes" in shown
    for what in ("scan  ", "scan 2, 64, 32, 16", *(f"train {name} " for name in gpu_suite.TRAINED), "ivme's card",
                 "ivme, packed", "64 at once", "loader"):
        assert what in shown
    assert float(re.search(r"against float64 +(\S+)", shown)[1]) < 1e-5


def test_a_part_of_the_gpu_suite_that_fails_is_a_line_of_the_table(capsys, monkeypatch):
    def fail(on, tiny):
        raise RuntimeError("no such\nkernel")
    monkeypatch.setattr(gpu_suite, "PARTS", dict(scan_is_right=fail, loading=lambda on, tiny: [("loader", "a", "b")]))
    assert bench.main(["gpu", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split("  ")[0] == "scan is right" and "RuntimeError: no such kernel" in lines[-2]
    assert lines[-1].startswith("loader")


def test_what_is_not_to_be_measured_is_one_line():
    mistakes = [
        ([], "memory, prepare, train, sample, decode, step"),
        (["speed"], "memory, prepare, train, sample, decode, step, eval, gpu, not speed"),
        (["train", "--sizes=4"], "not a list of rows and tokens"),
        (["train", "--sizes=0x5"], "not a list of rows and tokens"),
        (["train", "--nanogpt=nowhere"], "git clone https://github.com/karpathy/nanoGPT"),
        (["memory", "--micro_batch=one"], "not a list of numbers"),
        (["memory", "--micro_batch=0"], "not a list of numbers"),
        (["memory", "--dtype=half"], "half is not one of"),
        (["memory", "--optimizer=sgd"], "sgd is not one of"),
        (["memory", "--block_size=5000"], "longer than the model's context of 2500"),
        (["memory", "--model=tinymemory-sft"], "tinymemory-sft is a recipe for fine-tuning"),
    ]
    for argv, line in mistakes:
        with pytest.raises(UserError, match=re.escape(line)):
            bench.main(argv)
