"""train.py: batches, optimizers, schedules, checkpoints and evaluation against independent references."""
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2preln
import i3
import ivme
import prepare
import tinymemory
import train
from conftest import SMALL, run_train, same_tensors
from common import UserError
from corpus.folder import read_meta
from corpus.loader import Loader, Source, document_rows
from corpus.tokenizer import load_tokenizer


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- batches

class fake_source(Source):
    def __init__(self, tokens, weight=1.0, budget=None, val=()):
        self.name, self.language, self.kind, self.fingerprint, self.packed = "s", "en", "code", ["s", ""], {}
        self.train_mask = self.val_mask = None
        self.train, self.val, self.weight, self.budget = np.asarray(tokens), np.asarray(val), weight, budget or len(tokens)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(5, 400), T=st.integers(1, 40), seed=st.integers(0, 9))
def test_an_epoch_trains_on_each_token_once(size, T, seed):
    if size < T + 1:
        return
    loader = Loader([fake_source(range(size))], "random", T, 100, seed)
    per_epoch = (size - 1) // T
    for epoch in range(3):
        targets = loader.batch(per_epoch)[1].flatten().tolist()
        assert len(set(targets)) == len(targets) == per_epoch * T
        if epoch == 0:
            assert sorted(targets) == list(range(1, per_epoch * T + 1))


def test_windows_are_contiguous_and_shuffled_and_the_seed_decides():
    source = fake_source(range(10_000))
    batch = Loader([source], "random", 16, 100, seed=1).batch(300)[0].numpy()
    assert (np.diff(batch, axis=1) == 1).all()
    assert not (np.diff(batch[:, 0]) > 0).all()
    x, y, reset = Loader([source], "random", 16, 100, seed=1).batch(300)
    assert (batch == x.numpy()).all() and torch.equal(y, x + 1) and reset is None
    assert not (batch == Loader([source], "random", 16, 100, seed=2).batch(300)[0].numpy()).all()


def test_later_epochs_cut_the_text_elsewhere():
    loader = Loader([fake_source(range(1000))], "random", 10, 100, seed=3)
    first, second = (set(loader.batch(99)[0][:, 0].tolist()) for _ in range(2))
    assert first != second


@pytest.mark.parametrize("order,shares", [("random", (0.1, 0.6, 0.3)), ("balanced", (1 / 3, 1 / 3, 1 / 3)), ("sequential", (0.1, 0.6, 0.3))])
def test_each_order_gives_every_source_its_share(order, shares):
    sources = [fake_source([i] * n) for i, n in enumerate((1000, 6000, 3000))]
    drawn = Loader(sources, order, 10, 900, seed=0).batch(900)[0][:, 0].numpy()
    for i, share in enumerate(shares):
        assert abs((drawn == i).mean() - share) < 0.01
    if order == "sequential":
        assert (np.diff(drawn) >= 0).all()  # one after the other, in the order they were named
    else:
        for start in range(0, 900, 90):  # and evenly all along
            assert all(abs((drawn[start:start + 90] == i).mean() - share) < 0.04 for i, share in enumerate(shares))


def test_sequential_spends_the_whole_run_in_proportion_to_budgets_without_cutting_a_source_off():
    sources = [fake_source([i] * 5000, budget=b) for i, b in enumerate((710, 160, 235, 395, 80))]
    drawn = Loader(sources, "sequential", 10, 1447, seed=0).batch(1447)[0][:, 0]
    assert np.allclose(np.bincount(drawn) / 1447, np.array([710, 160, 235, 395, 80]) / 1580, atol=1 / 1447)


def test_data_weights_multiply_shares():
    sources = [fake_source([0] * 1000, weight=3.0), fake_source([1] * 1000)]
    assert Loader(sources, "random", 10, 0, 0).batch(400)[0][:, 0].float().mean() == 0.25


def test_the_loader_goes_on_from_its_counts():
    sources = [fake_source(range(500)), fake_source(range(1000, 1300))]
    whole, first = Loader(sources, "random", 7, 500, 5), Loader(sources, "random", 7, 500, 5)
    everything = whole.batch(300)[0]
    first.batch(137)
    second = Loader(sources, "random", 7, 500, 5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.batch(163)[0], everything[137:])


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=40), T=st.integers(1, 30), seed=st.integers(0, 5))
def test_packed_rows_lose_no_token_and_keep_documents_whole(lengths, T, seed):
    """Every token has its own id, 1000 and up, but for the <|bos|> (1) that each document begins with."""
    tokens = np.arange(1000, 1000 + sum(lengths))
    begins = np.cumsum([0, *lengths[:-1]])
    tokens[begins] = 1
    if len(tokens) <= T:
        return
    loader = Loader([fake_source(tokens)], "random", T, 100, seed, bos=1)
    n = loader.per_epoch[0]
    assert loader.fill[0] == pytest.approx((len(tokens) - len(lengths)) / (n * T))
    for epoch in range(3):
        x, y, reset = loader.batch(n)
        assert sorted([1] * len(lengths) + y[y >= 0].tolist()) == sorted(tokens.tolist())  # all that there is, each once
        pieces = []
        for row, targets, starts in zip(x.tolist(), y.tolist(), reset):
            assert starts[0] and targets[0] >= 0
            edges = [*starts.nonzero().flatten().tolist(), T]
            for i, j in zip(edges, edges[1:]):
                if targets[i] == -1:  # padding, at the end only
                    assert j == T and targets[i:] == [-1] * (T - i)
                    continue
                first = targets[i] - 1000 - 1
                assert targets[i:j] == [t for t in tokens[first + 1:first + 1 + j - i]] and row[i:j] == tokens[first:first + j - i].tolist()
                pieces.append((first, j - i))
        pieces.sort()
        for begin, length in zip(begins, lengths):
            own = [(first, n) for first, n in pieces if begin <= first < begin + length]
            assert len(own) == -(-(length - 1) // T)  # a short document is one piece, a long one is cut into as few as possible
            assert own[0][0] == begin and sum(n for _, n in own) == length - 1 and sum(n < T for _, n in own) <= 1
        used = sorted((y >= 0).sum(1).tolist())
        assert len(used) < 2 or used[0] + used[1] > T  # no two rows would fit into one


def test_later_epochs_cut_long_documents_elsewhere_and_mix_the_rows_anew():
    lengths = [25] * 40 + [7, 3, 5] * 40
    tokens = np.arange(1000, 1000 + sum(lengths))
    tokens[np.cumsum([0, *lengths[:-1]])] = 1
    loader = Loader([fake_source(tokens)], "random", 10, 100, 0, bos=1)
    first, second = (loader.batch(loader.per_epoch[0]) for _ in range(2))
    cuts = [set(x[reset & (y >= 0) & (x != 1)].tolist()) for x, y, reset in (first, second)]
    assert cuts[0] != cuts[1] and len(cuts[0]) == len(cuts[1])
    assert {tuple(r) for r in first[1].tolist()} != {tuple(r) for r in second[1].tolist()}


def test_packing_documents_of_real_lengths_leaves_little_padding():
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 5000).astype(int) + 2  # a median of 150 tokens, as web pages have, some of thousands
    first, pieces = document_rows(np.concatenate([[0], np.cumsum(lengths)]), 1024)
    assert 1 - pieces[:, 1].sum() / (1024 * (len(first) - 1)) < 0.002
    assert pieces[:, 1].sum() == (lengths - 1).sum()


@pytest.mark.parametrize("order", ["random", "balanced", "sequential"])
def test_each_order_gives_packed_sources_their_share_of_the_tokens(order):
    """Documents of 60 tokens leave 40 % of a row of 100 empty, those of 5 next to nothing; the shares are of tokens, not of rows."""
    sources = []
    for i, (length, n) in enumerate(((61, 100), (6, 3000), (250, 40), (12, 800))):
        tokens = np.full(length * n, 10 + i)
        tokens[::length] = 1
        sources.append(fake_source(tokens))
    loader = Loader(sources, order, 100, 3000, seed=0, bos=1)
    _, y, _ = loader.batch(3000)
    drawn = np.array([(y == 10 + i).sum() for i in range(4)])
    sizes = np.array([len(s.train) for s in sources])
    assert np.allclose(drawn / drawn.sum(), np.full(4, 0.25) if order == "balanced" else sizes / sizes.sum(), rtol=0.01)
    if order == "sequential":
        assert (np.diff(y[:, 0]) >= 0).all()


def test_a_loader_with_other_rows_goes_on_at_the_same_share_of_the_epoch():
    sources = [fake_source(range(5001)), fake_source(range(2001))]
    before = Loader(sources, "random", 10, 0, 5)
    before.batch(1050)  # one and a half epochs
    after = Loader(sources, "random", 20, 0, 5)
    after.load_state_dict(before.state_dict())
    assert after.taken == [375, 150]


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
    one, many = train.Muon([("qkv", fused, (24, 8, 8))]), train.Muon([(str(i), p, None) for i, p in enumerate(parts)])
    for _ in range(3):
        fused.grad = torch.randn_like(fused)
        for p, g in zip(parts, fused.grad.split((24, 8, 8))):
            p.grad = g
        one.step(0.1)
        many.step(0.1)
    assert torch.allclose(fused, torch.cat(parts), atol=1e-6)


@pytest.mark.parametrize("module, shape", [(ivme, {}), (tinymemory, {}), (i3, {}), (i3, dict(n_attention=1, d_inner=528, ffn_rank=0, head_rank=0)),
                                           (gpt2preln, {}), (gpt2preln, dict(tied=True))], ids=["ivme", "tinymemory", "i3", "i3-80m", "gpt2preln", "tied"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_updated_by_exactly_one_optimizer(module, shape, optimizer):
    model = module.Model(replace(module.Config(), n_layer=1, vocab_size=300, **shape))
    o = train.Optimizers(model, train.Settings(optimizer=optimizer), torch.float32)
    by_muon = {id(p) for p in o.muon.params} if o.muon else set()
    by_adamw = [id(p) for g in o.adamw.param_groups for p in g["params"]]
    assert not by_muon & set(by_adamw) and by_muon | set(by_adamw) == {id(p) for p in model.parameters()} and len(by_adamw) == len(set(by_adamw))
    assert bool(by_muon) == (optimizer == "muon")
    names = {id(p): n for n, p in model.named_parameters()}
    tables = ("A_log", "mix")  # two dimensions, but no maps
    assert all(any(part in names[i] for part in (".attn.", ".mixer.", ".ffn.")) and not names[i].endswith(tables) for i in by_muon)
    assert not by_muon or all(id(p) in by_muon for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2 and not n.endswith(tables))
    for group in o.adamw.param_groups:  # vectors are not decayed
        assert all((group["weight_decay"] == 0) == (p.ndim == 1 or names[id(p)].endswith(tables)) for p in group["params"])


def test_a_parameter_no_role_names_is_an_error():
    model = ivme.Model(replace(ivme.Config(), n_layer=1, vocab_size=300))
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="forgotten"):
        train.Optimizers(model, train.Settings(), torch.float32)


# ---------------------------------------------------------------------------------------------------- schedule, EMA

def reference_factor(t, schedule, n, warm, decay, final):
    """Warm-up reaches 1 at update `warm`; wsd falls linearly over the last `decay` updates; cosine over all after warm-up."""
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
    assert np.allclose(ours, [reference_factor(t, schedule, 1447, 100, 289, final) for t in range(1447)], atol=1e-12)
    assert max(ours) == 1 and min(ours) > 0  # no step of the run is wasted on a rate of 0
    assert train.lr_factor(1400, replace(s, schedule="wsd", decay_steps=10)) == 1


def test_the_metrics_show_the_schedule(trained):
    lrs = [r["lr"] for r in rows(trained) if "train_loss" in r]
    s = train.Settings(**json.loads((trained / "config.json").read_text())["train"])
    assert lrs == [s.muon_lr * train.lr_factor(t, s) for t in range(12)]


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
    with train.weights(params, [torch.zeros(4, 4), torch.ones(3)]):
        assert params[0].abs().sum() == 0
    assert same_tensors(params, before)


# ---------------------------------------------------------------------------------------------------- the run

def test_a_run_writes_its_files_and_its_rows_have_every_field(trained):
    assert {p.name for p in trained.iterdir()} == {"ckpt.pt", "best.pt", "best_validation.json", "metrics.jsonl", "loss.png", "config.json"}
    steps = [r for r in rows(trained) if "train_loss" in r]
    evals = [r for r in rows(trained) if "val_loss" in r and "final" not in r]
    assert [r["step"] for r in steps] == list(range(1, 13)) and [r["step"] for r in evals] == [6, 12]
    assert all(set(r) >= {"step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_s", "elapsed"} for r in steps)
    assert all(r["tokens"] == 512 * r["step"] for r in steps)
    for r in evals:
        for measure in ("val_loss", "val_bits_per_byte"):
            assert set(r[measure]) == {"raw", "ema"}
            assert set(r[measure]["raw"]) == {"mixed", "language", "source"}
            assert r[measure]["raw"]["source"]["pydocs"] == r[measure]["raw"]["language"]["en"] == r[measure]["raw"]["mixed"]
    assert evals[1]["val_loss"]["raw"]["mixed"] < evals[0]["val_loss"]["raw"]["mixed"] < math.log(600)
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_gives_the_same_weights_to_the_bit(trained, corpora, tmp_path):
    assert run_train(f"--data={corpora}/data/pydocs-hybrid", f"--out={tmp_path}/again") == 0
    a, b = (train.read_checkpoint(p / "ckpt.pt") for p in (trained, tmp_path / "again"))
    for key in ("model", "ema", "optimizer", "loader", "step", "tokens", "rng"):
        assert same_tensors(a[key], b[key]), key


def test_checkpoints_hold_plain_values_and_the_documented_keys(trained):
    checkpoint = torch.load(trained / "ckpt.pt", weights_only=True)
    assert tuple(checkpoint) == train.KEYS
    assert checkpoint["step"] == 12 and checkpoint["tokens"] == 12 * 512 and checkpoint["model_name"] == "tinymemory"


def test_accumulation_does_not_change_the_losses(workdir):
    for micro in (8, 2):
        run_train("--data=pydocs-hybrid", f"--out=micro{micro}", f"--micro_batch={micro}", "--word_boost=1.5")
    a, b = ([r["train_loss"] for r in rows(workdir / f"micro{m}") if "train_loss" in r] for m in (8, 2))
    assert np.allclose(a, b, atol=1e-4)


def test_word_boost_weighs_tokens_of_several_characters(workdir):
    """The logged loss of the first step is the weighted mean over the batch, computed here from the untrained model's token losses."""
    run_train("--data=pydocs-hybrid", "--out=boost", "--word_boost=3", "--max_steps=1", "--seed=5")
    tokenizer = load_tokenizer(str(workdir / "data/pydocs-hybrid/tokenizer.json"))
    cfg = tinymemory.Config(**train.read_checkpoint(workdir / "boost/ckpt.pt")["cfg"])
    torch.manual_seed(5)
    model = tinymemory.Model(cfg)
    sources, _ = train.find_data("pydocs-hybrid", "hybrid", 600, True, None)
    x, y, _ = Loader(sources, "random", 64, 8, 5).batch(8)
    losses = model(x, y, reduction="none")[1].detach().double()
    w = torch.tensor([3.0 if len(tokenizer.decode([t])) > 1 else 1.0 for t in y.flatten().tolist()]).view_as(losses)
    assert w.min() == 1 and w.max() == 3
    assert abs(rows(workdir / "boost")[0]["train_loss"] - float((losses * w).sum() / w.sum())) < 1e-5


def test_packed_documents_do_not_see_each_other_in_training(workdir):
    """The logged loss of the first step, weighted, is the one of each document of the batch read alone by the untrained model."""
    words = (workdir / "data/pydocs-hybrid/tokenizer.json").read_text().split()
    (workdir / "short.jsonl").write_text("".join(json.dumps({"text": " ".join(words[i:i + 1 + i % 7])}) + "\n" for i in range(0, 2000, 5)))
    prepare.prepare(["short.jsonl"], prepare.Settings(tokenizer="data/pydocs-hybrid/tokenizer.json", out_dir=".", name="short"))
    run_train("--data=./short", "--out=packed", "--pack=document", "--word_boost=3", "--max_steps=1", "--seed=5", "--micro_batch=2", "--block_size=128", "--batch_tokens=1024")
    tokenizer = load_tokenizer("short/tokenizer.json")
    torch.manual_seed(5)
    model = tinymemory.Model(tinymemory.Config(**train.read_checkpoint(workdir / "packed/ckpt.pt")["cfg"]))
    sources, _ = train.find_data("./short", "hybrid", 600, True, None)
    x, y, reset = Loader(sources, "random", 128, 8, 5, bos=tokenizer.token_to_id("<|bos|>")).batch(8)
    total, weight, pieces = 0.0, 0.0, 0
    for row, targets, begins in zip(x, y, reset):
        edges = [*begins.nonzero().flatten().tolist(), 128]
        for i, j in zip(edges, edges[1:]):
            if targets[i] >= 0:
                losses = model(row[None, i:j], targets[None, i:j], reduction="none")[1][0].detach().double()
                w = torch.tensor([3.0 if len(tokenizer.decode([t])) > 1 else 1.0 for t in targets[i:j].tolist()]).double()
                total, weight, pieces = total + float((losses * w).sum()), weight + float(w.sum()), pieces + 1
    first = rows(workdir / "packed")[0]
    assert pieces > 30 and first["tokens"] == int((y >= 0).sum())
    assert abs(first["train_loss"] - total / weight) < 1e-5


def test_validation_losses_equal_a_direct_computation_per_source_language_and_mixed(workdir, capsys):
    run_train("--data=two-hybrid", "--out=two", "--final_eval_tokens=0", "--order=balanced", "--max_steps=6")
    final = rows(workdir / "two")[-1]
    assert final["final"] is True
    (kind, loss), = final["val_loss"].items()
    model, tokenizer, _ = train.load_checkpoint(workdir / "two/best.pt", ema=kind == "ema")
    nats, count, size, T = {}, {}, {}, 64
    meta = read_meta("data/two-hybrid")
    for entry in meta["sources"]:
        val, total = torch.from_numpy(np.fromfile(f"data/two-hybrid/{entry['val']['file']}", dtype="<u2").astype(np.int64)), 0.0
        for i in range(0, len(val) - 1, T):
            x = val[i:i + T + 1]
            with torch.no_grad():
                logits = model(x[None, :-1], all_logits=True)[0][0].double()
            total += float(torch.nn.functional.cross_entropy(logits, x[1:], reduction="sum"))
        nats[entry["name"]], count[entry["name"]], size[entry["name"]] = total, len(val) - 1, entry["val"]["bytes"]
    for name, language in (("one", "en"), ("two", "it")):
        assert abs(loss["source"][name] - nats[name] / count[name]) < 1e-5
        assert loss["language"][language] == loss["source"][name]
        assert abs(final["val_bits_per_byte"][kind]["source"][name] - nats[name] / math.log(2) / size[name]) < 1e-5
    assert abs(loss["mixed"] - sum(nats.values()) / sum(count.values())) < 1e-5
    assert abs(final["val_bits_per_byte"][kind]["mixed"] - sum(nats.values()) / math.log(2) / sum(size.values())) < 1e-5
    assert "en" in capsys.readouterr().out


def test_losses_of_packed_documents_equal_a_direct_computation_document_by_document(workdir):
    """--pack=document: every document from its beginning, in pieces of T if it is longer; its <|bos|> is no target."""
    run_train("--data=two-hybrid", "--out=packed", "--pack=document", "--final_eval_tokens=0", "--order=balanced", "--max_steps=4", "--ema_beta=0")
    loss = rows(workdir / "packed")[-1]["val_loss"]["raw"]
    model, tokenizer, _ = train.load_checkpoint(workdir / "packed/best.pt")
    nats, count = {}, {}
    for entry in read_meta("data/two-hybrid")["sources"]:
        val, total, n = torch.from_numpy(np.fromfile(f"data/two-hybrid/{entry['val']['file']}", dtype="<u2").astype(np.int64)), 0.0, 0
        begins = (val == tokenizer.token_to_id("<|bos|>")).nonzero().flatten().tolist()
        for a, b in zip(begins, [*begins[1:], len(val)]):
            for i in range(a, b - 1, 64):
                x = val[i:min(i + 65, b)]
                with torch.no_grad():
                    logits = model(x[None, :-1], all_logits=True)[0][0].double()
                total, n = total + float(torch.nn.functional.cross_entropy(logits, x[1:], reduction="sum")), n + len(x) - 1
        nats[entry["name"]], count[entry["name"]] = total, n
    for name, language in (("one", "en"), ("two", "it")):
        assert abs(loss["source"][name] - nats[name] / count[name]) < 1e-5
        assert loss["language"][language] == loss["source"][name]
    assert abs(loss["mixed"] - sum(nats.values()) / sum(count.values())) < 1e-5


def test_best_validation_json_names_the_best_step_and_agrees_with_the_metrics(workdir):
    run_train("--data=two-hybrid", "--out=best", "--eval_every=3", "--keep_every=6", "--max_steps=9")
    best, checkpoint = json.loads((workdir / "best/best_validation.json").read_text()), train.read_checkpoint(workdir / "best/best.pt")
    row, = (r for r in rows(workdir / "best") if "val_loss" in r and r["step"] == best["step"] and not r.get("final"))
    assert (best["step"], best["tokens"], best["weights"]) == (checkpoint["step"], checkpoint["tokens"], "ema" if checkpoint["use_ema"] else "raw")
    assert best["checkpoint"] == ("step_6.pt" if best["step"] == 6 else "best.pt") and best["eval_tokens"] == 1024
    loss, bits = row["val_loss"][best["weights"]], row["val_bits_per_byte"][best["weights"]]
    for name in ("mixed", "en", "it"):
        assert best[f"val_loss_{name}"] == (loss["mixed"] if name == "mixed" else loss["language"][name])
        assert best[f"ppl_{name}"] == pytest.approx(math.exp(best[f"val_loss_{name}"]))
        assert best[f"bits_per_byte_{name}"] == (bits["mixed"] if name == "mixed" else bits["language"][name])
    assert {k: (v["language"], v["kind"], v["val_loss"]) for k, v in best["sources"].items()} == {
        "one": ("en", "code", loss["source"]["one"]), "two": ("it", "books", loss["source"]["two"])}


def test_the_mixed_loss_is_over_equally_much_text_of_each_source_also_where_rows_hold_padding():
    """Documents of 61 tokens fill 60 of 100 positions, those of 101 all; the model gives the first a loss of 1, the second of 3."""
    class Model:
        def __call__(self, x, y, reduction, reset):
            return None, torch.where(y == 2, 1.0, torch.where(y == 3, 3.0, 0.0))
    sources = []
    for token, length in ((2, 61), (3, 101)):
        val = np.full(length * 500, token)
        val[::length] = 1
        sources.append(fake_source([0], val=val))
    sources[1].name = "t"
    result = train.evaluate(Model(), sources, 6000, 100, 4, lambda: torch.autocast("cpu", enabled=False), torch.ones(5), torch.device("cpu"), bos=1)
    assert result["source"]["s"][0] == 1 and result["source"]["t"][0] == 3 and result["mixed"][0] == 2


def test_eval_only_measures_a_checkpoint_and_writes_nothing(workdir, capsys):
    run_train("--data=two-hybrid", "--out=measured", "--max_steps=4", "--pack=document", "--final_eval_tokens=0", "--keep_every=4")
    final, before = rows(workdir / "measured")[-1], {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train.main(["--init_from=measured/best.pt", "--eval_only", "--device=cpu", "--micro_batch=3"]) == 0
    shown = capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before
    (kind, loss), = final["val_loss"].items()
    assert f"step 4, {kind.replace('ema', 'EMA')} weights (the chosen ones)" in shown
    for name, value in (("one", loss["source"]["one"]), ("it", loss["language"]["it"]), ("mixed", loss["mixed"])):
        assert any(line.split()[0] == name and f"loss {value:.4f}" in line for line in shown.splitlines()), (name, value, shown)


def test_evaluation_spreads_its_windows_and_leaves_the_random_numbers_alone():
    model = tinymemory.Model(replace(tinymemory.Config(), n_layer=1, d_model=16, n_head=2, d_ff=16, vocab_size=50))
    source = fake_source([0], val=np.arange(1000) % 50)
    state = torch.get_rng_state()
    args = dict(T=10, rows=4, autocast=lambda: torch.autocast("cpu", enabled=False), bytes_per_token=torch.ones(50), device=torch.device("cpu"))
    whole, some = (train.evaluate(model, [source], n, **args)["mixed"] for n in (0, 200))
    assert torch.equal(state, torch.get_rng_state())
    assert whole != some and abs(whole[0] - some[0]) < 0.2
    halves = [train.evaluate(model, [source], 0, world=1, rank=0, **args)["mixed"]]
    assert halves[0] == whole


@pytest.mark.parametrize("flags", [("--pack=document",), ("--grad_checkpoint",), ("--pack=document", "--grad_checkpoint", "--order=balanced", "--word_boost=1.5")],
                         ids=lambda f: "+".join(x.strip("-") for x in f))
def test_a_run_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(flags, workdir):
    run_train("--data=two-hybrid", "--out=whole", "--max_steps=8", "--decay_steps=2", *flags)
    run_train("--data=two-hybrid", "--out=parts", "--max_steps=4", "--decay_fraction=0", *flags)  # stops before the decay begins
    run_train("--resume", "--out=parts", "--max_steps=8", "--decay_steps=2")
    a, b = (train.read_checkpoint(workdir / p / "ckpt.pt") for p in ("whole", "parts"))
    for key in ("model", "ema", "optimizer", "loader", "step", "tokens"):
        assert same_tensors(a[key], b[key]), key


def test_a_run_that_lost_its_latest_checkpoint_goes_on_from_its_best(workdir):
    for out, steps in (("whole", 9), ("lost", 6)):
        run_train("--data=pydocs-hybrid", f"--out={out}", "--save_every=0", f"--max_steps={steps}", "--eval_every=3", "--decay_fraction=0")
    shutil.copytree("lost", "kept")
    (workdir / "kept/best.pt").rename(workdir / "kept/step_6.pt")
    (workdir / "kept/ckpt.pt").unlink()
    (workdir / "lost/ckpt.pt").unlink()
    with pytest.raises(UserError, match="--resume --out=lost goes on with it"):
        run_train("--data=pydocs-hybrid", "--out=lost")
    shutil.copytree("kept", "worse")
    for out in ("lost", "kept"):  # or from one that --keep_every kept
        assert train.main(["--resume", f"--out={out}", "--max_steps=9"]) == 0
        assert same_tensors(*(train.read_checkpoint(workdir / run / "ckpt.pt")["model"] for run in ("whole", out)))
    assert (workdir / "kept/step_6.pt").exists()
    assert train.main(["--resume", "--out=worse", "--max_steps=9", "--muon_lr=0.5", "--lr=0.5", "--ema_beta=0"]) == 0  # the best there is now is worse than what was lost
    lost, found = (train.read_checkpoint(workdir / f"{run}/best.pt") for run in ("whole", "worse"))
    assert found["step"] == 9 and found["metrics"]["best"]["loss"] > lost["metrics"]["best"]["loss"] + 0.1


def test_checkpointed_blocks_change_nothing_but_memory(workdir, monkeypatch):
    calls, checkpoint_blocks = [], train.checkpoint_blocks
    monkeypatch.setattr("train.checkpoint_blocks", lambda model: (calls.append(model), checkpoint_blocks(model)))
    for flag in ("--grad_checkpoint", "--no-grad_checkpoint"):
        run_train("--data=pydocs-hybrid", f"--out={flag.strip('-')}", flag, "--max_steps=3")
    a, b = (train.read_checkpoint(workdir / p / "ckpt.pt") for p in ("grad_checkpoint", "no-grad_checkpoint"))
    assert same_tensors(a["model"], b["model"]) and same_tensors(a["optimizer"], b["optimizer"]) and len(calls) == 1


def test_samples_are_shown_as_often_as_asked(workdir, capsys):
    run_train("--data=pydocs-hybrid", "--out=samples", "--max_steps=7", "--sample_every=3")
    assert capsys.readouterr().out.count("\nsample ") == 3  # after 3, after 6, and at the end
    run_train("--data=pydocs-hybrid", "--out=none", "--max_steps=7", "--sample_every=3", "--sample_tokens=0")
    assert "sample " not in capsys.readouterr().out


def test_best_is_the_lowest_of_raw_and_ema_and_the_checkpoint_says_which(trained):
    best = train.read_checkpoint(trained / "best.pt")
    losses = {(r["step"], kind): r["val_loss"][kind]["mixed"] for r in rows(trained) if "val_loss" in r and "final" not in r for kind in r["val_loss"]}
    assert (best["step"], "ema" if best["use_ema"] else "raw") == min(losses, key=losses.get)


def test_load_checkpoint_picks_the_winner_unless_told(trained):
    chosen, tokenizer, checkpoint = train.load_checkpoint(trained / "best.pt")
    raw, ema = (train.load_checkpoint(trained / "best.pt", ema=e)[0].state_dict() for e in (False, True))
    assert same_tensors(chosen.state_dict(), ema if checkpoint["use_ema"] else raw) and not same_tensors(raw, ema)
    assert not chosen.training and tokenizer.encode("<|bos|>").ids != [1]


def test_keep_every_keeps_checkpoints_and_overwrite_removes_them(workdir):
    run_train("--data=pydocs-hybrid", "--out=keep", "--keep_every=5")
    assert {p.name for p in (workdir / "keep").glob("step_*.pt")} == {"step_5.pt", "step_10.pt"}
    assert train.read_checkpoint(workdir / "keep/step_5.pt")["step"] == 5
    with pytest.raises(UserError, match="--overwrite"):
        run_train("--data=pydocs-hybrid", "--out=keep")
    run_train("--data=pydocs-hybrid", "--out=keep", "--overwrite", "--max_steps=2")
    assert not list((workdir / "keep").glob("step_*.pt")) and train.read_checkpoint(workdir / "keep/ckpt.pt")["step"] == 2


def test_decay_only_keeps_optimizer_ema_and_data_position_and_decays(workdir):
    """A stable run continued by its decay alone equals a wsd run that decays from the same step, to the bit."""
    run_train("--data=pydocs-hybrid", "--out=stable", "--max_steps=30", "--decay_fraction=0", "--keep_every=8")
    train.main([*SMALL[-2:], "--dtype=float32", "--init_from=stable/step_8.pt", "--decay_only", "--decay_steps=4", "--final_lr_fraction=0.1"])
    run_train("--data=pydocs-hybrid", "--out=whole", "--max_steps=12", "--decay_steps=4", "--final_lr_fraction=0.1")
    a, b = (train.read_checkpoint(workdir / p / "ckpt.pt") for p in ("out/tinymemory-decay", "whole"))
    assert a["step"] == b["step"] == 12
    for key in ("model", "ema", "optimizer", "loader"):
        assert same_tensors(a[key], b[key]), key
    lrs = [r["lr"] for r in rows(workdir / "out/tinymemory-decay") if "train_loss" in r]
    assert np.allclose(lrs, [0.02 * (0.1 + 0.9 * left / 4) for left in (4, 3, 2, 1)])


def test_init_from_takes_the_shape_and_the_weights_and_starts_anew(trained, workdir):
    train.main([*SMALL[-2:], "--dtype=float32", f"--init_from={trained}/best.pt", "--data=pydocs-hybrid", "--out=tuned", "--max_steps=1", "--block_size=64",
                "--batch_tokens=64", "--muon_lr=0", "--lr=0", "--sample_tokens=0", "--eval_tokens=64", "--final_eval_tokens=64"])
    tuned, parent = train.read_checkpoint(workdir / "tuned/ckpt.pt"), train.load_checkpoint(trained / "best.pt")[0].state_dict()
    assert same_tensors(dict(tuned["model"]), dict(parent)) and tuned["step"] == 1


def test_the_ivme_preset_is_its_cards_recipe_to_the_number():
    _, cfg, s, *_ = train.settings_from(["--model=ivme"])
    assert (s.max_steps, s.batch_tokens, s.warmup_steps, train.decay_steps(s)) == (1447, 1_048_576, 100, 289)
    assert (s.optimizer, s.muon_lr, s.lr, s.weight_decay, s.grad_clip, s.ema_beta, s.schedule, s.final_lr_fraction) == ("muon", 0.02, 3e-4, 0.1, 1.0, 0.999, "wsd", 0.0)
    assert (s.data, s.tokenizer, s.order, s.block_size) == ("ivme", "bpe", "sequential", 1024)
    assert (cfg.n_layer, cfg.d_model, cfg.d_ff, cfg.n_head, cfg.n_kv_head, cfg.context_length, cfg.vocab_size) == (10, 384, 1024, 6, 2, 1024, 16_384)


def test_the_i3_presets_are_their_cards_recipes():
    for preset, data, tokenizer, lr in (("i3", "tinychat", "chunk", 3e-4), ("i3-80m", "i3-80m", "chunk", 3e-4), ("i3-200m", "i3-200m", "bpe", 4e-4)):
        _, cfg, s, *_ = train.settings_from([f"--model={preset}"])
        assert (s.data, s.tokenizer, s.optimizer, s.lr, s.schedule, s.grad_clip, s.block_size) == (data, tokenizer, "adamw", lr, "cosine", 1.0, 256)
        assert (s.final_lr_fraction, s.out) == (0.1, f"out/{preset}") and s.warmup_steps == (25 if preset == "i3-200m" else 100)
        assert cfg.context_length == 256 and cfg.n_head == 16


def test_the_gpt2preln_presets_are_their_cards_recipe():
    for preset, micro, T in (("gpt2preln", 6, 2500), ("gpt2preln-medium", 1, 2500), ("gpt2preln-gpt2", 15, 1024)):
        _, cfg, s, *_ = train.settings_from([f"--model={preset}"])
        assert (s.optimizer, s.lr, s.lr * s.final_lr_fraction, s.schedule, train.decay_steps(s)) == ("adamw", 2e-4, pytest.approx(2e-5), "wsd", 0)
        assert (s.order, s.pack, s.data, s.max_steps, s.block_size, s.micro_batch) == ("balanced", "document", "gpt2preln", 8000, T, micro)
        assert s.batch_tokens == (240_000 if T == 2500 else 245_760) and s.batch_tokens % (T * micro) == 0 and cfg.context_length == T
        assert train.lr_factor(7999, s) == 1 and train.lr_factor(0, s) < 0.01


def test_no_flags_mean_tinymemory_on_pydocs():
    _, _, s, *_ = train.settings_from([])
    assert (s.model, s.data, s.tokenizer, s.out) == ("tinymemory", "pydocs", "hybrid", "out/tinymemory")


@pytest.mark.parametrize("flag,value", [("log_every", 3), ("eval_every", 0), ("eval_tokens", 64), ("save_every", 0), ("sample_tokens", 0), ("ema_beta", 0.0), ("grad_clip", 0.0),
                                        ("optimizer", "adamw"), ("schedule", "cosine"), ("order", "balanced")])
def test_flags_are_recorded_and_the_run_ends_well(workdir, flag, value):
    assert run_train("--data=pydocs-hybrid", "--out=flag", "--max_steps=4", f"--{flag}={value}") == 0
    assert json.loads((workdir / "flag/config.json").read_text())["train"][flag] == value
    found = rows(workdir / "flag")
    assert [r["step"] for r in found if "train_loss" in r] == ([3, 4] if flag == "log_every" else [1, 2, 3, 4])
    assert ("ema" in found[-1]["val_loss"]) <= (flag != "ema_beta")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(workdir):
    with pytest.raises(UserError, match=r"not finite at step \d+.*ckpt.pt holds step 4"):
        # the learning rate is sane for the first four steps, then the weights overflow
        run_train("--data=pydocs-hybrid", "--out=nan", "--save_every=4", "--warmup_steps=0", "--grad_clip=0", "--optimizer=adamw", "--lr=1e-3", "--max_steps=4")
        run_train("--resume", "--out=nan", "--max_steps=40", "--lr=1e38", "--save_every=0")
    assert train.read_checkpoint(workdir / "nan/ckpt.pt")["step"] == 4
    assert all(torch.isfinite(p).all() for p in train.load_checkpoint(workdir / "nan/ckpt.pt")[0].parameters())
