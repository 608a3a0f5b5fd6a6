"""train.py: optimizers, schedules, the loss of a step, evaluation, going on, and what a fork adds, each against an
independent reference."""
import copy
import json
import math
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import gpt2preln
import i3
import ivme
import machine
import objective
import prepare
import report
import run
import tinymemory
import train
from common import UserError
from conftest import (
    ALONE, CPU, SMALL, FakeSource, command, evaluations, pretraining_plan, rows, run_train, same_tensors,
    sources_of, step_rows, timeless,
)
from corpus.folder import read_meta
from corpus.loader import Loader
from corpus.tokenizer import bos_eos, load_tokenizer, token_byte_counts
from finetune import mark_replies

# ---------------------------------------------------------------------------------------------------- optimizers

SHAPES = dict(wide=(24, 64), tall=(64, 24), square=(32, 32))


def muon_float64(w, grads, lr, weight_decay=0.1, momentum=0.95):
    """Muon written out for one matrix in float64; returns the weights after every step."""
    a, b, c = 3.4445, -4.7750, 2.0315
    w, m, path = w.double().clone(), torch.zeros_like(w, dtype=torch.float64), []
    for g in grads:
        m = momentum * m + (1 - momentum) * g.double()
        x = (1 - momentum) * g.double() + momentum * m
        tall = x.size(0) > x.size(1)
        x = x.T if tall else x
        x = x / x.norm()
        for _ in range(5):
            A = x @ x.T
            x = a * x + (b * A + c * A @ A) @ x
        x = x.T if tall else x
        w = w * (1 - lr * weight_decay) - lr * math.sqrt(max(1, w.size(0) / w.size(1))) * x
        path.append(w)
    return path


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_muon_equals_a_float64_reference_over_ten_steps(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    grads = [torch.randn(shape) for _ in range(10)]
    path = muon_float64(p.detach(), grads, 0.02)
    muon = train.Muon([("w", p, None)])
    for g, expected in zip(grads, path):
        p.grad = g
        muon.step(0.02)
        assert (p - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_muon_updates_equal_torch_optim_muon_within_its_bf16_rounding(shape):
    torch.manual_seed(1)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    muon = train.Muon([("w", ours, None)])
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(10):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = theirs.grad = torch.randn(shape)
        muon.step(0.02)
        reference.step()
        a, b = ours.detach() - before[0], theirs.detach() - before[1]
        assert (a - b).norm() / b.norm() < 2e-2


def test_muon_in_bf16_stays_near_fp32():
    torch.manual_seed(2)
    stack = torch.randn(5, 48, 96)
    exact, rough = train.orthogonalize(stack, torch.float32), train.orthogonalize(stack, torch.bfloat16)
    assert (exact - rough).norm() / exact.norm() < 3e-2
    singular = torch.linalg.svdvals(exact)
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_muon_treats_the_parts_of_a_fused_matrix_as_matrices_of_their_own():
    torch.manual_seed(3)
    fused = torch.nn.Parameter(torch.randn(24 + 8 + 8, 24))
    parts = [torch.nn.Parameter(x.clone()) for x in fused.detach().split((24, 8, 8))]
    one = train.Muon([("qkv", fused, (24, 8, 8))])
    many = train.Muon([(str(i), p, None) for i, p in enumerate(parts)])
    for _ in range(3):
        fused.grad = torch.randn_like(fused)
        for p, g in zip(parts, fused.grad.split((24, 8, 8))):
            p.grad = g
        one.step(0.1)
        many.step(0.1)
    assert torch.allclose(fused, torch.cat(parts), atol=1e-6)


MODELS = {"ivme": (ivme, {}), "tinymemory": (tinymemory, {}), "i3": (i3, {}),
          "i3-80m": (i3, dict(n_attention=1, d_inner=528, ffn_rank=0, head_rank=0)),
          "gpt2preln": (gpt2preln, {}), "tied": (gpt2preln, dict(tied=True))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_updated_by_exactly_one_optimizer(name, optimizer):
    module, shape = MODELS[name]
    model = module.Model(replace(module.Config(), n_layer=1, vocab_size=300, **shape))
    optimizers = train.Optimizers(model, train.Settings(optimizer=optimizer), torch.float32)
    by_muon = {id(p) for p in optimizers.matrix.params} if optimizers.matrix else set()
    by_adamw = [id(p) for params, _ in optimizers.adamw.groups for p in params]
    assert len(by_adamw) == len(set(by_adamw)) and not by_muon & set(by_adamw)
    assert by_muon | set(by_adamw) == {id(p) for p in model.parameters()}
    assert bool(by_muon) == (optimizer == "muon")

    # Muon has the matrices of the blocks and nothing else
    tables = ("A_log", "mix")  # two dimensions, but no maps
    for name, p in model.named_parameters():
        if id(p) in by_muon:
            assert any(part in name for part in (".attn.", ".mixer.", ".ffn.")) and not name.endswith(tables)
        elif by_muon:
            assert not name.startswith("blocks.") or p.ndim != 2 or name.endswith(tables)

    # vectors are not decayed
    names = {id(p): name for name, p in model.named_parameters()}
    for params, weight_decay in optimizers.adamw.groups:
        for p in params:
            assert (weight_decay == 0) == (p.ndim == 1 or names[id(p)].endswith(tables))


def test_adamw_is_torchs_to_the_bit_and_goes_on_from_its_state():
    """Two groups, one without decay, at a rate that changes; half-way both go on from the other one's state."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 3), (4, 4), (7,))]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))

    def make():
        adamw = train.AdamW([(ours[:2], 0.1), (ours[2:], 0.0)])
        groups = [dict(params=theirs[:2], weight_decay=0.1), dict(params=theirs[2:], weight_decay=0.0)]
        return adamw, torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    adamw, reference = make()
    for step in range(20):
        rate = 0.01 * (step + 1)
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for group in reference.param_groups:
            group["lr"] = rate
        adamw.step(rate)
        reference.step()
        assert same_tensors([p.detach() for p in ours], [q.detach() for q in theirs])
        if step == 9:
            state, their_state = adamw.state_dict(), reference.state_dict()
            assert same_tensors(state["state"], their_state["state"])
            adamw, reference = make()
            adamw.load_state_dict(their_state)
            reference.load_state_dict(their_state | copy.deepcopy(state))


def test_a_start_does_not_load_the_compiler():
    """torch's compiler takes a second and a half to import; a run that is not compiled does without."""
    code = ("import sys, torch, train, run, gpt2preln, i3, ivme, tinymemory\nfrom machine import pick_device\n"
            "pick_device('cpu', 'float32', 'off')\n"
            "for it in (gpt2preln, i3, ivme, tinymemory): run.make_model(it, it.Config(n_layer=1))\n"
            "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
            "train.AdamW([([p], 0.1)]).step(0.1); train.clip_gradients([p], 1.0)\n"
            "print('torch._dynamo' in sys.modules, torch.are_deterministic_algorithms_enabled())")
    out, err = command("-c", code, fresh=True).communicate()
    assert out == "False True\n", err


def test_a_parameter_no_role_names_is_an_error():
    model = ivme.Model(replace(ivme.Config(), n_layer=1, vocab_size=300))
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="forgotten"):
        train.Optimizers(model, train.Settings(), torch.float32)


# ---------------------------------------------------------------------------------------------------- schedules, EMA

def reference_factor(t, schedule, n, warm, decay, final):
    """Warm-up reaches 1 at update `warm`; wsd falls linearly over the last `decay` updates, cosine over all others."""
    if t < warm:
        return (t + 1) / warm
    if schedule == "constant" or (schedule == "wsd" and t < n - decay):
        return 1.0
    if schedule == "wsd":
        return 1 - (1 - final) * (t - (n - decay)) / decay
    return final + (1 - final) * (1 + math.cos(math.pi * (t - warm) / (n - warm))) / 2


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_learning_rate_equals_the_closed_form_at_every_step(schedule, final):
    s = train.Settings(schedule=schedule, max_steps=1447, warmup_steps=100, decay_fraction=0.2, final_lr_fraction=final)
    ours = [train.lr_factor(t, s) for t in range(1447)]
    expected = [reference_factor(t, schedule, 1447, 100, 289, final) for t in range(1447)]
    assert np.allclose(ours, expected, atol=1e-12)
    assert max(ours) == 1 and min(ours) > 0  # no step of the run is wasted on a rate of 0
    assert train.lr_factor(1400, replace(s, schedule="wsd", decay_steps=10)) == 1


def test_the_metrics_show_the_schedule(trained):
    s = run.known_settings(train.Settings, json.loads((trained / "config.json").read_text())["train"])
    assert [row["lr"] for row in step_rows(trained)] == [s.muon_lr * train.lr_factor(t, s) for t in range(12)]


def test_ema_equals_a_float64_reference():
    torch.manual_seed(0)
    params = [torch.randn(5, 3), torch.randn(7)]
    ema, expected = [p.clone() for p in params], [p.double() for p in params]
    for t in range(50):
        for p in params:
            p.add_(torch.randn_like(p))
        train.ema_update(ema, params, t, 0.9)
        beta = min(0.9, (1 + t) / (10 + t))
        expected = [beta * e + (1 - beta) * p.double() for e, p in zip(expected, params)]
    assert all(torch.allclose(e.double(), x, atol=1e-5) for e, x in zip(ema, expected))


def test_borrowed_weights_are_given_back_to_the_bit():
    params = [torch.randn(4, 4), torch.randn(3)]
    before = [p.clone() for p in params]
    with pytest.raises(KeyboardInterrupt), train.weights(params, [torch.zeros(4, 4), torch.ones(3)]):
        assert params[0].abs().sum() == 0
        raise KeyboardInterrupt
    assert same_tensors(params, before)


# ---------------------------------------------------------------------------------------------------- what a run writes

def test_a_run_writes_its_files_and_its_rows_have_every_field(trained):
    assert {p.name for p in trained.iterdir()} == {
        ".lock", "ckpt.pt", "best.pt", "best_validation.json", "metrics.jsonl", "loss.png", "config.json",
        "tokenizer.json"}
    steps, evals = step_rows(trained), evaluations(trained)
    assert [row["step"] for row in steps] == list(range(1, 13)) and [row["step"] for row in evals] == [6, 12]
    fields = {"step", "tokens", "train_loss", "train_bits_per_byte", "lr", "grad_norm", "tokens_per_s", "elapsed"}
    assert all(set(row) == fields for row in steps)  # a CPU has no mfu
    assert all(row["tokens"] == 512 * row["step"] for row in steps)
    for row in evals:
        for measure in ("val_loss", "val_bits_per_byte"):
            assert set(row[measure]) == {"raw", "ema"}
            raw = row[measure]["raw"]
            assert set(raw) == {"mixed", "language", "source"}
            assert raw["source"]["pydocs"] == raw["language"]["en"] == raw["mixed"]
    losses = [row["val_loss"]["raw"]["mixed"] for row in evals]
    assert losses[1] < losses[0] < math.log(600)
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_run_keeps_the_tokenizer_that_its_checkpoint_holds(trained, corpora):
    text = (trained / "tokenizer.json").read_text()
    assert text == (corpora / "data/pydocs-hybrid/tokenizer.json").read_text()
    assert text == run.read_checkpoint(trained / "best.pt")["tokenizer"]


def test_the_same_command_gives_the_same_weights_to_the_bit(trained, corpora, tmp_path):
    assert run_train(f"--data={corpora}/data/pydocs-hybrid", f"--out={tmp_path}/again") == 0
    a, b = (run.read_checkpoint(out / "ckpt.pt") for out in (trained, tmp_path / "again"))
    for key in ("model", "ema", "optimizer", "loader", "step", "tokens", "rng"):
        assert same_tensors(a[key], b[key]), key


def test_best_validation_json_names_the_best_step_and_agrees_with_the_metrics(workdir):
    run_train("--data=two-hybrid", "--out=best", "--eval_every=3", "--keep_every=6", "--max_steps=9")
    best = json.loads((workdir / "best/best_validation.json").read_text())
    checkpoint = run.read_checkpoint(workdir / "best/best.pt")
    assert best["weights"] == ("ema" if checkpoint["use_ema"] else "raw") and best["eval_tokens"] == 1024
    assert (best["step"], best["tokens"]) == (checkpoint["step"], checkpoint["tokens"])
    assert best["checkpoint"] == ("step_6.pt" if best["step"] == 6 else "best.pt")

    row, = (row for row in evaluations(workdir / "best") if row["step"] == best["step"])
    loss, bits = row["val_loss"][best["weights"]], row["val_bits_per_byte"][best["weights"]]
    loss_of, bits_of = dict(loss["language"], mixed=loss["mixed"]), dict(bits["language"], mixed=bits["mixed"])
    for name in ("mixed", "en", "it"):
        assert best[f"val_loss_{name}"] == loss_of[name] and best[f"bits_per_byte_{name}"] == bits_of[name]
        assert best[f"ppl_{name}"] == pytest.approx(math.exp(loss_of[name]))
    found = {name: (v["language"], v["kind"], v["val_loss"]) for name, v in best["sources"].items()}
    assert found == {"one": ("en", "code", loss["source"]["one"]), "two": ("it", "books", loss["source"]["two"])}


def test_best_is_the_lowest_of_raw_and_ema_and_the_checkpoint_says_which(trained):
    best = run.read_checkpoint(trained / "best.pt")
    losses = {}
    for row in evaluations(trained):
        for kind, loss in row["val_loss"].items():
            losses[row["step"], kind] = loss["mixed"]
    assert (best["step"], "ema" if best["use_ema"] else "raw") == min(losses, key=losses.get)


def test_keep_every_keeps_checkpoints_and_overwrite_removes_them(workdir):
    run_train("--data=pydocs-hybrid", "--out=keep", "--keep_every=5")
    assert {p.name for p in (workdir / "keep").glob("step_*.pt")} == {"step_5.pt", "step_10.pt"}
    assert run.read_checkpoint(workdir / "keep/step_5.pt")["step"] == 5
    with pytest.raises(UserError, match="--overwrite"):
        run_train("--data=pydocs-hybrid", "--out=keep")
    run_train("--data=pydocs-hybrid", "--out=keep", "--overwrite", "--max_steps=2")
    assert not list((workdir / "keep").glob("step_*.pt"))
    assert run.read_checkpoint(workdir / "keep/ckpt.pt")["step"] == 2


def test_samples_are_shown_as_often_as_asked(workdir, capsys):
    run_train("--data=pydocs-hybrid", "--out=samples", "--max_steps=7", "--sample_every=3")
    assert capsys.readouterr().out.count("\nsample ") == 3  # after 3, after 6, and at the end
    run_train("--data=pydocs-hybrid", "--out=none", "--max_steps=7", "--sample_every=3", "--sample_tokens=0")
    assert "sample " not in capsys.readouterr().out


FLAGS = [("log_every", 3), ("eval_every", 0), ("eval_tokens", 64), ("save_every", 0), ("sample_tokens", 0),
         ("ema_beta", 0.0), ("grad_clip", 0.0), ("optimizer", "adamw"), ("schedule", "cosine"), ("order", "balanced")]


@pytest.mark.parametrize("flag, value", FLAGS)
def test_flags_are_recorded_and_the_run_ends_well(workdir, flag, value):
    assert run_train("--data=pydocs-hybrid", "--out=flag", "--max_steps=4", f"--{flag}={value}") == 0
    assert json.loads((workdir / "flag/config.json").read_text())["train"][flag] == value
    steps = [3, 4] if flag == "log_every" else [1, 2, 3, 4]
    assert [row["step"] for row in step_rows(workdir / "flag")] == steps
    assert ("ema" in evaluations(workdir / "flag")[-1]["val_loss"]) == (flag != "ema_beta")


# --------------------------------------------------------------------------------------------------- the loss of a step

def untrained(out, seed):
    """The model that a run of tinymemory began with."""
    torch.manual_seed(seed)
    return tinymemory.Model(tinymemory.Config(**run.read_checkpoint(out / "ckpt.pt")["cfg"]))


def weight_of(tokenizer, token, factor):
    """What --word_boost makes of a target token."""
    return factor if len(tokenizer.decode([token])) > 1 else 1.0


def test_accumulation_does_not_change_the_losses(workdir):
    for micro in (8, 2):
        run_train("--data=pydocs-hybrid", f"--out=micro{micro}", f"--micro_batch={micro}", "--word_boost=1.5")
    a, b = ([row["train_loss"] for row in step_rows(workdir / f"micro{micro}")] for micro in (8, 2))
    assert np.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("pack", ["stream", "document"])
def test_word_boost_weighs_the_loss_and_leaves_bits_per_byte_what_they_are(pack, workdir):
    """Both are computed here in float64 by a loop over the tokens of each step; the learning rate is 0.

    Each piece of a row stands alone before the model, because packed documents do not see each other.
    """
    run_train("--data=two-hybrid", "--out=boost", "--word_boost=1.5", f"--pack={pack}", "--max_steps=3", "--seed=5",
              "--micro_batch=2", "--lr=0", "--muon_lr=0")
    sources = sources_of("two-hybrid")
    tokenizer = load_tokenizer("data/two-hybrid/tokenizer.json")
    n_bytes = token_byte_counts(tokenizer)
    model = untrained(workdir / "boost", 5).double()
    loader = Loader(sources, "random", 64, 24, 5, bos_eos(tokenizer) if pack == "document" else None)
    for row in step_rows(workdir / "boost"):
        total, weight, nats, size = 0.0, 0.0, 0.0, 0
        for source, pieces in loader.next_rows(8):
            for start, n in pieces:
                tokens = torch.from_numpy(sources[source].train[start:start + n + 1].astype(np.int64))
                with torch.no_grad():
                    logp = model(tokens[None, :-1], all_logits=True)[0][0].log_softmax(-1)
                for at, token in enumerate(tokens[1:].tolist()):
                    loss, w = -float(logp[at, token]), weight_of(tokenizer, token, 1.5)
                    total, weight = total + w * loss, weight + w
                    nats, size = nats + loss, size + int(n_bytes[token])
        assert row["train_loss"] == pytest.approx(total / weight, abs=1e-5)
        assert row["train_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)


def test_packed_documents_do_not_see_each_other_in_training(workdir):
    """The logged loss of the first step, weighted, is the one of each document of the batch read alone by the model."""
    words = (workdir / "data/pydocs-hybrid/tokenizer.json").read_text().split()
    texts = [" ".join(words[i:i + 1 + i % 7]) for i in range(0, 2000, 5)]
    (workdir / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = "data/pydocs-hybrid/tokenizer.json"
    prepare.prepare(["short.jsonl"], prepare.Settings(tokenizer=tokenizer, out_dir=".", name="short"))
    run_train("--data=./short", "--out=packed", "--pack=document", "--word_boost=3", "--max_steps=1", "--seed=5",
              "--micro_batch=2", "--block_size=128", "--batch_tokens=1024")

    tokenizer, model = load_tokenizer("short/tokenizer.json"), untrained(workdir / "packed", 5)
    loader = Loader(sources_of("./short"), "random", 128, 8, 5, bos_eos(tokenizer))
    x, y, reset = loader.tensors(loader.next_rows(8))
    total, weight, pieces = 0.0, 0.0, 0
    for row, targets, begins in zip(x, y, reset):
        edges = [*begins.nonzero().flatten().tolist(), 128]
        for i, j in zip(edges, edges[1:]):
            if targets[i] >= 0:
                losses = model(row[None, i:j], targets[None, i:j], reduction="none")[1][0].detach().double()
                w = torch.tensor([weight_of(tokenizer, t, 3.0) for t in targets[i:j].tolist()]).double()
                total, weight, pieces = total + float((losses * w).sum()), weight + float(w.sum()), pieces + 1
    first = rows(workdir / "packed")[0]
    assert pieces > 30 and first["tokens"] == int((y >= 0).sum())
    assert abs(first["train_loss"] - total / weight) < 1e-5


def test_checkpointed_blocks_change_nothing_but_memory(workdir, monkeypatch):
    calls, checkpoint_blocks = [], machine.checkpoint_blocks

    def counted(model):
        calls.append(model)
        checkpoint_blocks(model)

    monkeypatch.setattr("machine.checkpoint_blocks", counted)
    for flag in ("--grad_checkpoint", "--no-grad_checkpoint"):
        run_train("--data=pydocs-hybrid", f"--out={flag.strip('-')}", flag, "--max_steps=3")
    a, b = (run.read_checkpoint(workdir / out / "ckpt.pt") for out in ("grad_checkpoint", "no-grad_checkpoint"))
    assert same_tensors(a["model"], b["model"]) and same_tensors(a["optimizer"], b["optimizer"]) and len(calls) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(workdir):
    """The learning rate is sane for the first four steps, then the weights overflow."""
    run_train("--data=pydocs-hybrid", "--out=nan", "--save_every=4", "--warmup_steps=0", "--grad_clip=0",
              "--optimizer=adamw", "--lr=1e-3", "--max_steps=4")
    with pytest.raises(UserError, match=r"not finite at step \d+.*ckpt.pt holds step 4"):
        run_train("--resume", "--out=nan", "--max_steps=40", "--lr=1e38", "--save_every=0")
    model, _, checkpoint = run.load_checkpoint(workdir / "nan/ckpt.pt")
    assert checkpoint["step"] == 4 and all(torch.isfinite(p).all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- several processes

class FakeWorld:
    """One of `size` processes, which knows of the others nothing."""

    def __init__(self, rank, size):
        self.rank, self.local_rank, self.size, self.is_main = rank, rank, size, rank == 0

    def sum(self, tensor):
        return tensor

    def max(self, number):
        return number


class Counted:
    """Tokens that count how many of them are read."""

    def __init__(self, tokens):
        self.tokens, self.read = tokens, 0

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, part):
        found = self.tokens[part]
        self.read += np.size(found)
        return found


@pytest.mark.parametrize("pack", ["stream", "document"])
def test_each_process_reads_only_its_own_rows_and_together_they_have_the_batch(pack, workdir):
    batches, read = [], []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        flags = ["--vocab_size=600", "--data=two-hybrid", f"--pack={pack}", "--micro_batch=2"]
        task = objective.Pretraining(pretraining_plan(*SMALL, *flags), FakeWorld(rank, size), CPU)
        for source in task.sources:
            source.train = Counted(source.train)
        batches.append(task.next_batch(0))
        read.append(sum(source.train.read for source in task.sources))

    # together they read what one process reads, and neither reads the other's rows
    assert read[1] + read[2] == read[0] and max(read[1:]) < 0.6 * read[0]

    # the batch is the same, and so is what each row counts
    whole, *halves = ([micro for micro in batch.micros] for batch in batches)
    for part in ("x", "y", *(["reset"] if pack == "document" else [])):
        all_rows = torch.cat([getattr(micro, part) for micro in whole])
        for rank, half in enumerate(halves):
            assert torch.equal(torch.cat([getattr(micro, part) for micro in half]), all_rows[rank::2])
    assert len({batch.targets for batch in batches}) == 1
    for micros in (whole, halves[0] + halves[1]):
        assert sum(micro.share for micro in micros) == pytest.approx(1)
        assert all(micro.share == pytest.approx(int((micro.y >= 0).sum()) / batches[0].targets) for micro in micros)


# ---------------------------------------------------------------------------------------------------- evaluation

def validation_nats(model, folder, pack):
    """Source -> (nats, tokens, bytes) of its whole validation text, by one forward pass for each row of 64 targets."""
    found, tokenizer = {}, load_tokenizer(f"{folder}/tokenizer.json")
    bos, _ = bos_eos(tokenizer)
    n_bytes = token_byte_counts(tokenizer)
    for entry in read_meta(folder)["sources"]:
        val = torch.from_numpy(np.fromfile(f"{folder}/{entry['val']['file']}", dtype="<u2").astype(np.int64))
        begins = [0]
        if pack == "document":  # every document from its beginning; its <|bos|> is no target
            begins = (val == bos).nonzero().flatten().tolist()
        nats, n, size = 0.0, 0, 0
        for a, b in zip(begins, [*begins[1:], len(val)]):
            for i in range(a, b - 1, 64):
                row = val[i:min(i + 65, b)]
                with torch.no_grad():
                    logits = model(row[None, :-1], all_logits=True)[0][0].double()
                nats += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
                n, size = n + len(row) - 1, size + int(n_bytes[row[1:]].sum())
        found[entry["name"]] = nats, n, size
    return found


@pytest.mark.parametrize("pack", ["stream", "document"])
def test_validation_losses_equal_a_direct_computation_for_each_source_language_and_mixed(pack, workdir):
    run_train("--data=two-hybrid", "--out=two", "--final_eval_tokens=0", "--order=balanced", "--max_steps=6",
              f"--pack={pack}")
    final = rows(workdir / "two")[-1]
    (kind, loss), = final["val_loss"].items()
    bits = final["val_bits_per_byte"][kind]
    model, *_ = run.load_checkpoint(workdir / "two/best.pt", ema=kind == "ema")
    found = validation_nats(model, "data/two-hybrid", pack)
    for name, language in (("one", "en"), ("two", "it")):
        nats, n, size = found[name]
        assert abs(loss["source"][name] - nats / n) < 1e-5
        assert abs(bits["source"][name] - nats / math.log(2) / size) < 1e-5
        assert loss["language"][language] == loss["source"][name]

    # mixed: each source counts as many tokens
    assert final["final"] is True
    assert abs(loss["mixed"] - sum(nats / n for nats, n, _ in found.values()) / 2) < 1e-5
    bytes_per_token = sum(size / n for _, n, size in found.values()) / 2
    assert abs(bits["mixed"] - loss["mixed"] / math.log(2) / bytes_per_token) < 1e-5


class Gauge:
    """A model whose loss for a target is a hundredth of its token id."""

    def __call__(self, x, y, reduction, reset):
        return None, torch.where(y >= 0, y / 100, 0.0)


def validation_source(name, n_documents, length, low):
    """A source whose validation documents begin with token 1, followed by ids from `low` to low + 20."""
    val = np.random.default_rng(low).integers(low, low + 20, n_documents * length)
    val[::length] = 1
    return FakeSource([0], val=val, name=name)


@pytest.mark.parametrize("frame", [None, (1, 2)], ids=["windows", "documents"])
@pytest.mark.parametrize("tokens", [6000, 300, 0])
def test_the_mixed_loss_gives_each_source_an_equal_share_even_one_with_little_text(tokens, frame):
    """The small source has 600 targets. All rows of 100 are full, so that the shares are exactly equal."""
    sources = [validation_source("small", 6, 101, 10), validation_source("large", 400, 101, 60)]
    if frame is None:  # a last row that is full
        for source in sources:
            source.val = source.val[:100 * (len(source.val) // 101) + 1]
    n_bytes = torch.arange(100) % 7 + 1.0
    result = objective.evaluate(Gauge(), sources, tokens, 100, 4, CPU, n_bytes, ALONE, frame)

    # by hand: losses and bytes per token of the rows that count, then the plain mean of the two sources
    loss, size = [], []
    for source in sources:
        targets = []
        for pieces in source.spread_rows(tokens, 100, frame)[0]:
            for start, n in pieces:
                targets += source.val[start + 1:start + n + 1].tolist()
        assert len(targets) == (min(tokens, 600) if source.name == "small" and tokens else tokens or len(targets))
        loss.append(sum(targets) / 100 / len(targets))
        size.append(float(n_bytes[targets].mean()))
    assert result["loss"]["source"] == pytest.approx(dict(small=loss[0], large=loss[1]))
    assert abs(loss[0] - loss[1]) > 0.4  # so that another mixture would show
    assert result["loss"]["mixed"] == pytest.approx(sum(loss) / 2, abs=1e-6)
    assert result["bits_per_byte"]["mixed"] == pytest.approx(sum(loss) / math.log(2) / sum(size), abs=1e-6)


def test_the_mixed_loss_is_over_equally_much_text_of_each_source_also_where_rows_hold_padding():
    """Documents of 61 tokens fill 60 of 100 positions, those of 101 all; the losses of their tokens are 0.1 and 0.3."""
    sources = []
    for token, length in ((10, 61), (30, 101)):
        val = np.full(length * 500, token)
        val[::length] = 1
        sources.append(FakeSource([0], val=val, name=f"of {token}"))
    result = objective.evaluate(Gauge(), sources, 6000, 100, 4, CPU, torch.ones(50), ALONE, (1, 2))
    assert result["loss"]["source"] == pytest.approx({"of 10": 0.1, "of 30": 0.3})
    assert result["loss"]["mixed"] == pytest.approx(0.2)


@pytest.mark.parametrize("tokens", [0, 3000])
def test_the_mixed_loss_of_chats_gives_each_set_an_equal_share_however_much_of_it_counts(tokens):
    sources = []
    for token, share in ((10, 0.9), (30, 0.1)):
        source = FakeSource([0], val=np.full(20_001, token), name=f"of {token}")
        source.train_mask, source.val_mask = source.train, (np.arange(20_001) % 100 < 100 * share).astype(np.uint8)
        sources.append(source)
    result = objective.evaluate(Gauge(), sources, tokens, 100, 4, CPU, torch.ones(50), ALONE, None, mark_replies)
    assert result["loss"]["mixed"] == pytest.approx(0.2) == result["loss"]["language"]["en"]


def test_evaluation_spreads_its_windows_and_leaves_the_random_numbers_alone():
    shape = dict(n_layer=1, d_model=16, n_head=2, d_ff=16, vocab_size=50)
    model = tinymemory.Model(replace(tinymemory.Config(), **shape))
    source = FakeSource([0], val=np.arange(1000) % 50)
    state = torch.get_rng_state()
    whole, some, again = (
        objective.evaluate(model, [source], n, 10, 4, CPU, torch.ones(50), ALONE)["loss"]["mixed"] for n in (0, 200, 0))
    assert torch.equal(state, torch.get_rng_state())
    assert whole != some and abs(whole - some) < 0.2 and whole == again


# ---------------------------------------------------------------------------------------------------- going on

GOING_ON = {"documents": ["--pack=document"], "grad_checkpoint": ["--grad_checkpoint"],
            "all": ["--pack=document", "--grad_checkpoint", "--order=balanced", "--word_boost=1.5"]}


@pytest.mark.parametrize("flags", GOING_ON.values(), ids=GOING_ON)
def test_a_run_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(flags, workdir):
    run_train("--data=two-hybrid", "--out=whole", "--max_steps=8", "--decay_steps=2", *flags)
    run_train("--data=two-hybrid", "--out=parts", "--max_steps=4", "--decay_fraction=0", *flags)  # no decay yet
    run_train("--resume", "--out=parts", "--max_steps=8", "--decay_steps=2")
    a, b = (run.read_checkpoint(workdir / out / "ckpt.pt") for out in ("whole", "parts"))
    for key in ("model", "ema", "optimizer", "loader", "step", "tokens"):
        assert same_tensors(a[key], b[key]), key


@pytest.mark.parametrize("flags", [[], ["--pack=document", "--order=balanced"]], ids=["stream", "documents"])
def test_rows_that_are_read_ahead_are_the_same_and_a_checkpoint_knows_which_were_trained_on(
        flags, workdir, monkeypatch):
    run_train("--data=two-hybrid", "--out=plain", "--max_steps=8", "--decay_steps=2", *flags)
    make, threads = objective.Pretraining.__init__, set()

    def ahead(self, *args):
        make(self, *args)
        self.reads_ahead, read = True, self.read
        self.read = lambda: threads.add(threading.current_thread()) or read()
    monkeypatch.setattr(objective.Pretraining, "__init__", ahead)
    run_train("--data=two-hybrid", "--out=ahead", "--max_steps=4", "--decay_fraction=0", *flags)
    run_train("--resume", "--out=ahead", "--max_steps=8", "--decay_steps=2")
    a, b = (run.read_checkpoint(workdir / out / "ckpt.pt") for out in ("plain", "ahead"))
    for key in ("model", "optimizer", "loader", "tokens"):
        assert same_tensors(a[key], b[key]), key
    assert len(threads) == 2 and threading.main_thread() not in threads


def test_a_run_killed_after_its_last_checkpoint_is_finished_by_resuming_it(workdir):
    run_train("--data=pydocs-hybrid", "--out=run", "--max_steps=4")
    whole, log = timeless("run"), workdir / "run/metrics.jsonl"
    assert whole[-1]["final"]
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert train.main(["--resume", "--out=run"]) == 0
    assert timeless("run") == whole


def test_a_run_that_lost_its_latest_checkpoint_goes_on_from_its_best(workdir):
    for out, steps in (("whole", 9), ("lost", 6)):
        run_train("--data=pydocs-hybrid", f"--out={out}", "--save_every=0", f"--max_steps={steps}", "--eval_every=3",
                  "--decay_fraction=0")
    shutil.copytree("lost", "kept")
    (workdir / "kept/best.pt").rename(workdir / "kept/step_6.pt")
    (workdir / "kept/ckpt.pt").unlink()
    (workdir / "lost/ckpt.pt").unlink()
    with pytest.raises(UserError, match="--resume --out=lost goes on with it"):
        run_train("--data=pydocs-hybrid", "--out=lost")

    # or from one that --keep_every kept
    shutil.copytree("kept", "worse")
    whole = run.read_checkpoint(workdir / "whole/ckpt.pt")
    for out in ("lost", "kept"):
        assert train.main(["--resume", f"--out={out}", "--max_steps=9"]) == 0
        assert same_tensors(whole["model"], run.read_checkpoint(workdir / out / "ckpt.pt")["model"])
    assert (workdir / "kept/step_6.pt").exists()

    # the best there is now is worse than what was lost
    flags = ["--max_steps=9", "--muon_lr=0.5", "--lr=0.5", "--ema_beta=0"]
    assert train.main(["--resume", "--out=worse", *flags]) == 0
    lost, found = (run.read_checkpoint(workdir / f"{out}/best.pt") for out in ("whole", "worse"))
    assert found["step"] == 9 and found["metrics"]["best"]["loss"] > lost["metrics"]["best"]["loss"] + 0.1


def test_a_resumed_run_knows_its_best(workdir):
    run_train("--data=pydocs-hybrid", "--out=run", "--max_steps=6", "--eval_every=3", "--decay_fraction=0")
    best = (workdir / "run/best.pt").read_bytes()
    assert run.read_checkpoint("run/best.pt")["step"] == 6
    train.main(["--resume", "--out=run", "--max_steps=9", "--muon_lr=0.5", "--lr=0.5", "--ema_beta=0"])
    assert run.read_checkpoint("run/ckpt.pt")["step"] == 9 and (workdir / "run/best.pt").read_bytes() == best


def test_the_average_follows_the_weights_of_each_step(workdir):
    run_train("--data=pydocs-hybrid", "--out=run", "--max_steps=6", "--keep_every=1", "--ema_beta=0.2")
    steps = [run.read_checkpoint(f"run/step_{i}.pt") for i in range(1, 7)]
    for t, (before, after) in enumerate(zip(steps, steps[1:]), start=1):
        beta = min(0.2, (1 + t) / (10 + t))
        for name, average in after["ema"].items():
            expected = beta * before["ema"][name].double() + (1 - beta) * after["model"][name].double()
            assert torch.allclose(average.double(), expected, atol=1e-6), (t, name)


def test_the_share_of_the_peak_is_that_of_the_arithmetic(workdir, monkeypatch):
    monkeypatch.setattr(machine, "peak_flops", lambda chip, dtype: 1e12)
    run_train("--data=pydocs-hybrid", "--out=run", "--max_steps=3")
    model, _, checkpoint = run.load_checkpoint("run/ckpt.pt")
    for row in step_rows(workdir / "run"):
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * model.flops_per_token(64) / 1e12, rel=1e-3)


def test_bf16_is_another_arithmetic_of_nearly_the_same_losses(workdir):
    for dtype in ("float32", "bfloat16"):
        run_train("--data=pydocs-hybrid", f"--out={dtype}", "--max_steps=2", f"--dtype={dtype}", "--lr=0",
                  "--muon_lr=0")
    for a, b in zip(rows("float32"), rows("bfloat16"), strict=True):
        if "train_loss" in a:
            assert 0 < abs(a["train_loss"] - b["train_loss"]) < 0.05
        else:
            assert 0 < abs(a["val_loss"]["raw"]["mixed"] - b["val_loss"]["raw"]["mixed"]) < 0.05


def test_decay_only_keeps_optimizer_ema_and_data_position_and_decays(workdir):
    """A stable run continued by its decay alone equals a wsd run that decays from the same step, to the bit."""
    common = ["--data=pydocs-hybrid", "--muon_lr=0.02"]
    run_train(*common, "--out=stable", "--max_steps=30", "--decay_fraction=0", "--keep_every=8")
    train.main(["--init_from=stable/step_8.pt", "--decay_only", "--decay_steps=4", "--final_lr_fraction=0.1"])
    run_train(*common, "--out=whole", "--max_steps=12", "--decay_steps=4", "--final_lr_fraction=0.1")
    a, b = (run.read_checkpoint(workdir / out / "ckpt.pt") for out in ("out/tinymemory-decay", "whole"))
    assert a["step"] == b["step"] == 12
    for key in ("model", "ema", "optimizer", "loader"):
        assert same_tensors(a[key], b[key]), key
    rates = [row["lr"] for row in step_rows(workdir / "out/tinymemory-decay")]
    assert np.allclose(rates, [0.02 * (0.1 + 0.9 * left / 4) for left in (4, 3, 2, 1)])


def test_init_from_takes_the_shape_and_the_weights_and_starts_anew(trained, workdir):
    train.main(["--compile=off", "--device=cpu", "--dtype=float32", f"--init_from={trained}/best.pt",
                "--data=pydocs-hybrid", "--out=again", "--max_steps=1", "--block_size=64", "--batch_tokens=64",
                "--muon_lr=0", "--lr=0", "--sample_tokens=0", "--eval_tokens=64", "--final_eval_tokens=64"])
    again, parent = run.read_checkpoint(workdir / "again/ckpt.pt"), run.load_checkpoint(trained / "best.pt")[0]
    assert same_tensors(dict(again["model"]), dict(parent.state_dict())) and again["step"] == 1
    assert sum(again["loader"]["taken"]) == 1  # the data begins anew too


# ---------------------------------------------------------------------------------------------------- what a fork adds

class Sign:
    """A matrix optimizer of a fork: each weight moves by the learning rate, against the sign of its gradient."""

    def __init__(self, matrices, weight_decay, dtype):
        self.matrices, self.steps = matrices, torch.zeros(())

    @torch.no_grad()
    def step(self, lr):
        self.steps += 1
        for _, p, _ in self.matrices:
            p -= lr * p.grad.sign()

    def state_dict(self):
        return dict(steps=self.steps)

    def load_state_dict(self, state):
        self.steps.copy_(state["steps"])


def test_a_new_matrix_optimizer_is_one_class_and_one_line_in_a_table(workdir, monkeypatch, capsys):
    monkeypatch.setitem(train.MATRIX_OPTIMIZERS, "sign", Sign)
    common = ["--data=pydocs-hybrid", "--optimizer=sign", "--schedule=constant", "--warmup_steps=0", "--muon_lr=0.001"]
    assert run_train(*common, "--out=parts", "--max_steps=3") == 0
    assert "sign 8 matrices, AdamW" in capsys.readouterr().out
    state = run.read_checkpoint(workdir / "parts/ckpt.pt")
    assert set(state["optimizer"]) == {"adamw", "sign"} and state["train"]["optimizer"] == "sign"
    moved = state["model"]["blocks.0.attn.out.weight"] - untrained(workdir / "parts", 1337).blocks[0].attn.out.weight
    assert torch.allclose(moved / 0.001, (moved / 0.001).round(), atol=1e-3) and moved.abs().max() > 0.0005

    # it goes on where it was, and the whole run is the same
    assert run_train("--resume", "--out=parts", "--max_steps=6") == 0
    assert run_train(*common, "--out=whole", "--max_steps=6") == 0
    parts, whole = (run.read_checkpoint(workdir / out / "ckpt.pt") for out in ("parts", "whole"))
    assert parts["optimizer"]["sign"]["steps"] == 6
    assert same_tensors(parts["model"], whole["model"]) and same_tensors(parts["optimizer"], whole["optimizer"])


def test_without_its_line_in_the_table_an_optimizer_is_unknown(workdir):
    with pytest.raises(UserError, match="--optimizer=sign is not one of muon, adamw"):
        run_train("--data=pydocs-hybrid", "--optimizer=sign", "--out=none")


def test_a_new_schedule_is_one_function_and_one_line_in_a_table(workdir, monkeypatch):
    monkeypatch.setitem(train.SCHEDULES, "halving", lambda step, s: 0.5 ** (step - s.warmup_steps))
    run_train("--data=pydocs-hybrid", "--schedule=halving", "--out=run", "--max_steps=6", "--warmup_steps=2",
              "--muon_lr=0.02")
    rates = [row["lr"] / 0.02 for row in step_rows(workdir / "run")]
    assert rates == pytest.approx([0.5, 1, 1, 0.5, 0.25, 0.125])


def test_one_more_number_for_the_log_is_one_key_in_its_dict(workdir, monkeypatch, capsys):
    """It is in every row of metrics.jsonl, and report.py shows it on the terminal without knowing it."""
    numbers = objective.Pretraining.numbers

    def with_one_more(self, batch, loss):
        return numbers(self, batch, loss) | dict(longest_token=int(self.bytes_per_token[batch.counted].max()))

    monkeypatch.setattr(objective.Pretraining, "numbers", with_one_more)
    run_train("--data=pydocs-hybrid", "--out=run", "--max_steps=2")
    found = [row["longest_token"] for row in step_rows(workdir / "run")]
    assert len(found) == 2 and min(found) > 3
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [f"longest_token {n}" in line for n, line in zip(found, shown, strict=True)] == [True, True]
    assert "longest_token" not in report.FORMATS
