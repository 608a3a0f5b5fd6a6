"""train.py on chats: what counts, how much it weighs, what is replayed and compared, against plain loops over tokens in float64."""
import json
import math
import os
import random
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import train
from conftest import command, same_tensors
from common import UserError
from test_architectures import ARCHITECTURES, randomised
from test_train import fake_source, rows
from corpus.folder import document_edges
from corpus.loader import Loader, mark_replies

WORDS = "alpha beta gamma delta epsilon zeta theta kappa lambda sigma return def self import os the of in".split()
OFF = ["--word_boost=1", "--response_start_weight=1", "--replay=0", "--relevance=0"]


def invented_chats(n, seed, longest=12):
    """Chats of one to three turns; some replies have a character, some questions fill more than a row."""
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choice(WORDS) + str(rng.randrange(99)) * (rng.random() < 0.2) for _ in range(rng.randint(low, high)))
    for i in range(n):
        turns = [[dict(role="user", content=f"{i} {text(1, 60 if rng.random() < 0.1 else longest)}"),
                  dict(role="assistant", content=rng.choice("xyz") if rng.random() < 0.2 else text(1, longest))] for _ in range(rng.randint(1, 3))]
        yield dict(messages=[dict(role="system", content="be brief")] * (rng.random() < 0.2) + sum(turns, []))


@pytest.fixture(scope="module")
def chat_data(corpora, tmp_path_factory):
    """A folder of chats in the tokenizer of data/pydocs-hybrid."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in invented_chats(400, 1)))
    return prepare.prepare([str(folder / "chats.jsonl")], prepare.Settings(
        out_dir=str(folder), tokenizer=str(corpora / "data/pydocs-hybrid/tokenizer.json"), name="chats", val_fraction=0.1))


@pytest.fixture
def tune(trained, chat_data, workdir):
    """Tunes the small run on the chats, with rows of 64 tokens; returns the folder. Nothing is learned at first: --lr=0 --muon_lr=0."""
    def run(*flags, still=True):
        out = workdir / f"tuned{len(list(workdir.glob('tuned*')))}"
        rates = ["--lr=0", "--muon_lr=0"] if still else []
        assert train.main(["--model=tinymemory-sft", f"--init_from={trained}/best.pt", f"--data={chat_data}", "--base_data=pydocs-hybrid", f"--out={out}",
                           "--block_size=64", "--batch_tokens=512", "--micro_batch=4", "--max_steps=4", "--eval_every=2", "--eval_tokens=1024", "--warmup_steps=1",
                           "--final_eval_tokens=1024", "--save_every=2", "--log_every=1", "--sample_tokens=0", "--dtype=float32", "--compile=off", "--device=cpu",
                           *rates, *flags]) == 0
        return out
    return run


def sources_of(*folders):
    return sum((train.find_data(str(f), "hybrid", 600, True, None)[0] for f in folders), [])


# ---------------------------------------------------------------------------------------------------- marks and weights

def turns_of(mask):
    """Plain loop: number of each token within its reply, from 1, or 0."""
    numbers, n = [], 0
    for m in mask:
        n = n + 1 if m else 0
        numbers.append(n)
    return numbers


@settings(max_examples=60, deadline=None)
@given(mask=st.lists(st.integers(0, 1), min_size=3, max_size=80), opening=st.integers(0, 12), data=st.data())
def test_marks_equal_a_loop_over_the_tokens(mask, opening, data):
    mask, T = np.array([0, *mask], np.uint8), 20
    place, pieces, used = turns_of(mask), [], 0
    while used < T - 1 and len(pieces) < 4:
        start = data.draw(st.integers(0, len(mask) - 2))
        n = data.draw(st.integers(1, min(T - used, len(mask) - 1 - start)))
        pieces.append((start, n))
        used += n
    expected = [0] * T
    for at, i in enumerate(i for start, n in pieces for i in range(start + 1, start + n + 1)):
        expected[at] = 0 if not place[i] else 2 if place[i] <= opening else 1
    assert mark_replies(mask, [pieces], T, opening)[0].tolist() == expected


def nats(model, tokens, first):
    """Of tokens[first:], each behind all before it, one forward pass of the whole sequence alone: (n,)."""
    logp = model(torch.tensor([tokens[:-1]]), all_logits=True)[0][0].log_softmax(-1)
    return -logp[range(first - 1, len(tokens) - 1), tokens[first:]]


def plain_losses(model, tokens, first):
    with torch.no_grad():
        return nats(model, tokens, first).tolist()


def compared(dealt, loader, s, step, bos, rank=0, world=1):
    """(its own context, another chat's, reply), lists of tokens, of each reply that a process compares in this step: drawn as train.py does."""
    rng = np.random.default_rng([s.seed, step, rank, 1])
    replies, mine = train.replies_of(dealt, loader, bos, rng), list(range(rank, len(dealt), world))
    for here in (mine[i:i + s.micro_batch] for i in range(0, len(mine), s.micro_batch)):
        x, y, reset, number, at_home = train.wrong_prompts(replies, here, int(s.micro_batch * s.relevance + rng.random()), s.block_size, rng)
        for k in set(number.flatten().tolist()) - {0}:
            r, at = (int(v[0]) for v in torch.where(number == k))
            begin = max(int(v) for v in torch.where(reset[r])[0] if v <= at)
            home, place = (int(v[0]) for v in torch.where(at_home == k))
            own = next(c for c in replies if c.row == here[home] and c.at == place)
            yield own.context.tolist(), x[r, begin:at + 1].tolist(), y[r][number[r] == k].tolist()


def reference(out, chat_data, base, s, steps, world=1):
    """What each step's loss and relevance loss must be: a loop over rows, chats and tokens, without masks from train.py. The rows, and who
    is compared with whom, are the loader's."""
    model, tokenizer, checkpoint = train.load_checkpoint(out / "best.pt")
    model = model.double()
    bos, assistant, eos = (tokenizer.token_to_id(t) for t in ("<|bos|>", "<|assistant|>", "<|eos|>"))
    sources, base = sources_of(chat_data), sources_of(base)
    rows, T = s.batch_tokens // s.block_size, s.block_size
    loader = Loader(sources, "random", T, steps * rows, s.seed, bos, base, s.replay)
    found = []
    for step in range(steps):
        dealt, total, weight, spoken = [loader.next_row() for _ in range(rows)], 0.0, 0.0, 0
        for source, pieces in dealt:
            for start, n in pieces:
                tokens = np.resize(np.roll(loader.sources[source].train, -start), n + 1).tolist()
                nats = plain_losses(model, tokens, 1)
                before = sources[0].train[:start + 1].tolist() if source == 0 else []
                for i, (token, loss) in enumerate(zip(tokens[1:], nats)):
                    w = s.word_boost if len(tokenizer.decode([token])) > 1 else 1.0
                    if source == 0:  # chats: who speaks, and since how many tokens?
                        past = before + tokens[1:1 + i]
                        last = max((k for k, t in enumerate(past) if t == assistant), default=-1)
                        if last < 0 or eos in past[last:] or bos in past[last:]:
                            continue
                        spoken += 1
                        w *= s.response_start_weight if len(past) - last - 1 < s.response_start_tokens else 1.0
                    total, weight = total + w * loss, weight + w
        hinge = 0.0
        for rank in range(world if s.relevance else 0):
            for own, other, reply in compared(dealt, loader, s, step, bos, rank, world):
                right, wrong = (sum(plain_losses(model, c + reply, len(c))) for c in (own, other))
                hinge += max(0, s.relevance_margin - (wrong - right) / len(reply)) * len(reply)
        found.append((total / weight if weight else 0.0, hinge / spoken if spoken else 0.0))
    return found


@pytest.mark.parametrize("flags", [
    ["--word_boost=2", "--response_start_weight=1", "--replay=0", "--relevance=0"],
    ["--word_boost=1", "--response_start_weight=3", "--response_start_tokens=5", "--replay=0", "--relevance=0"],
    ["--word_boost=1", "--response_start_weight=1", "--replay=0.3", "--relevance=0"],
    ["--word_boost=1", "--response_start_weight=1", "--replay=0", "--relevance=0.5", "--relevance_margin=0.4"],
    ["--word_boost=1.5", "--response_start_weight=2", "--response_start_tokens=30", "--replay=0.25", "--relevance=0.4", "--relevance_margin=0.4"],
    # a row is a step: some steps hold no reply, some are all replay, and of one chat there is none to compare with
    ["--word_boost=1.5", "--response_start_weight=2", "--replay=0.5", "--relevance=1", "--batch_tokens=128", "--block_size=128", "--micro_batch=1", "--max_steps=40"],
], ids=["word_boost", "response_start", "replay", "relevance", "all", "single_rows"])
def test_losses_equal_a_loop_over_the_tokens_in_float64(flags, tune, chat_data, corpora):
    out = tune("--max_steps=2", *flags, "--eval_every=0")
    s = train.Settings(**train.read_checkpoint(out / "best.pt")["train"])
    logged = [r for r in rows(out) if "train_loss" in r]
    expected = reference(out, chat_data, corpora / "data/pydocs-hybrid", s, s.max_steps)
    for row, (loss, hinge) in zip(logged, expected, strict=True):
        assert row["train_loss"] == pytest.approx(loss, abs=2e-5)
        assert row.get("relevance_loss", 0.0) == pytest.approx(hinge, abs=2e-5)
    if s.block_size == 128:
        assert any(loss == 0 for loss, _ in expected) and any(hinge > 0 for _, hinge in expected)
    elif s.relevance:
        assert all(hinge > 0 for _, hinge in expected)


def test_doubled_weights_change_nothing(tune, monkeypatch):
    once = tune(still=False)
    weights = train.token_weights
    monkeypatch.setattr("train.token_weights", lambda *args: 2 * weights(*args))
    twice = tune(still=False)
    assert same_tensors(*(train.read_checkpoint(out / "ckpt.pt")["model"] for out in (once, twice)))
    monkeypatch.setattr("train.token_weights", lambda y, *args: (y >= 0).float())
    plain = tune(still=False)
    assert not same_tensors(*(train.read_checkpoint(out / "ckpt.pt")["model"] for out in (once, plain)))  # they do weigh


def test_with_every_trick_off_it_is_plain_fine_tuning_to_the_bit(tune, trained, chat_data):
    """Against a loop of a few lines: the next tokens of the replies, their mean loss, the optimizers."""
    out = tune(*OFF, "--micro_batch=8", "--ema_beta=0", still=False)
    s = train.Settings(**train.read_checkpoint(out / "ckpt.pt")["train"])
    model, tokenizer, _ = train.load_checkpoint(trained / "best.pt")
    model.train()
    optimizers, (source,) = train.Optimizers(model, s, torch.float32), sources_of(chat_data)
    loader = Loader([source], "random", 64, 32, s.seed, tokenizer.token_to_id("<|bos|>"))
    for step in range(4):
        dealt = [loader.next_row() for _ in range(8)]
        x, y, reset = loader.tensors(dealt)
        for row, (_, pieces) in enumerate(dealt):
            at = 0
            for start, n in pieces:
                for i in range(n):
                    if not source.train_mask[start + i + 1]:
                        y[row, at + i] = -1
                at += n
        for p in model.parameters():
            p.grad = None
        model(x, y, reset=reset)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip, foreach=True)
        optimizers.step(train.lr_factor(step, s))
    assert same_tensors(train.read_checkpoint(out / "ckpt.pt")["model"], model.state_dict())


def test_the_relevance_loss_moves_the_weights_as_its_formula_says(tune, trained, chat_data):
    """A step against the plain gradient of the sum, each compared reply alone behind its own prompt and alone behind the other's. The model's
    weights are large, so that what stands before a reply makes a difference."""
    checkpoint = train.read_checkpoint(trained / "best.pt")
    checkpoint["model"] = randomised(train.load_checkpoint(trained / "best.pt")[0]).state_dict()
    train.save_checkpoint("start.pt", checkpoint | dict(use_ema=False))
    flags = ["--init_from=start.pt", "--max_steps=1", "--ema_beta=0", "--relevance_margin=5", "--batch_tokens=1024"]
    out, without = tune(*OFF, *flags, "--relevance=1", still=False), tune(*OFF, *flags, still=False)
    s, (model, tokenizer, _), (source,) = train.Settings(**train.read_checkpoint(out / "ckpt.pt")["train"]), train.load_checkpoint("start.pt"), sources_of(chat_data)
    before, optimizers, bos = {k: v.clone() for k, v in model.state_dict().items()}, train.Optimizers(model, s, torch.float32), tokenizer.token_to_id("<|bos|>")
    loader = Loader([source], "random", 64, 16, s.seed, bos)
    dealt = [loader.next_row() for _ in range(16)]
    x, y, reset = loader.tensors(dealt)
    y[loader.marks(dealt, 0) == 0] = -1
    hinge = [torch.relu(s.relevance_margin * len(reply) - (nats(model, other + reply, len(other)) - nats(model, own + reply, len(own))).sum())
             for own, other, reply in compared(dealt, loader, s, 0, bos)]
    (model(x, y, reset=reset)[1] + sum(hinge) / (y >= 0).sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip, foreach=True)
    optimizers.step(train.lr_factor(0, s))
    logged = rows(out)[1]
    assert len(hinge) > 8 and logged["grad_norm"] == pytest.approx(float(norm), rel=1e-4) and logged["relevance_loss"] == pytest.approx(float(sum(hinge).detach() / (y >= 0).sum()), abs=1e-4)
    moved, plainly = (train.read_checkpoint(run / "ckpt.pt")["model"] for run in (out, without))

    def distance(a, b):
        return sum(float((a[k] - b[k]).square().sum()) for k in before) ** 0.5
    assert distance(moved, model.state_dict()) < 0.01 * distance(moved, before) and distance(plainly, moved) > 0.2 * distance(moved, before)


# ---------------------------------------------------------------------------------------------------- replay

def chats_and_base(seed=0):
    """A source of chats of 12 tokens, masked from the fifth on, and two of text; each source has tokens of its own."""
    chat = fake_source(np.tile([1] + [50] * 11, 200))
    chat.train_mask = np.tile([0] * 4 + [1] * 8, 200).astype(np.uint8)
    return [chat], [fake_source(np.arange(3000) % 20 + 100), fake_source(np.arange(1000) % 20 + 200)]


@settings(max_examples=30, deadline=None)
@given(replay=st.floats(0.01, 0.95), rows=st.integers(1, 12))
def test_replay_gives_its_share_of_the_rows_of_each_batch(replay, rows):
    own, base = chats_and_base()
    loader, taken = Loader(own, "random", 24, 40 * rows, 0, 1, base, replay), 0
    for step in range(40):
        dealt = [loader.next_row() for _ in range(rows)]
        marks, (_, y, reset) = loader.marks(dealt, 2), loader.tensors(dealt)
        for r, (source, pieces) in enumerate(dealt):
            if source:  # a window of the stream: every target counts, and nothing in it is reset
                assert (marks[r] == 1).all() and (y[r] >= 100).all() and pieces[0][1] == 24 and reset[r].tolist() == [True] + [False] * 23
            else:
                assert set(marks[r].tolist()) == {0, 1, 2} and (y[r] < 100).all() and reset[r, 11]
            taken += source > 0
        assert abs(taken - replay * rows * (step + 1)) < 1 + 1e-6
    if taken > 40:
        assert loader.taken[1] / taken == pytest.approx(0.75, abs=0.1)  # each base source by its size


def test_without_replay_the_loader_deals_what_it_always_did():
    own, base = chats_and_base()
    for a, b in zip(Loader(own, "random", 24, 100, 0, 1).batch(100), Loader(own, "random", 24, 100, 0, 1, base, 0.0).batch(100)):
        assert torch.equal(a, b)


def test_sequential_spends_its_turns_on_what_replay_leaves():
    own = [fake_source(np.arange(1000)), fake_source(np.arange(1000) + 1000)]
    loader = Loader(own, "sequential", 10, 400, 0, None, [fake_source(np.arange(1000) + 5000)], 0.25)
    drawn = [loader.next_row()[0] for _ in range(400)]
    assert drawn.count(2) == 100 and [d for d in drawn if d != 2] == [0] * 150 + [1] * 150


# ---------------------------------------------------------------------------------------------------- relevance

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10 ** 6), n=st.integers(1, 30), n_rows=st.integers(0, 4))
def test_replies_are_put_under_whole_prompts_of_other_chats(seed, n, n_rows):
    rng, T = np.random.default_rng(seed), 40
    replies = []
    for k in range(n):  # every token tells which chat it is of: contexts 1000 k + ..., replies 1000 k + 500 + ...
        context, reply = np.arange(rng.integers(1, 60)) + 1000 * k, np.arange(rng.integers(1, T // 2)) + 1000 * k + 500
        replies.append(train.Reply(k, int(rng.integers(0, T - len(reply) + 1)), context, reply))
    rows = list(range(0, n, 2))
    x, y, reset, number, at_home = train.wrong_prompts(replies, rows, n_rows, T, rng)
    assert x.shape == y.shape == reset.shape == number.shape == (n_rows, T) and at_home.shape == (len(rows), T)
    begin = 0
    for r in range(n_rows):
        for t in range(T):
            begin = t if reset[r, t] else begin
            if number[r, t]:
                chat, other = int(y[r, t]) // 1000, x[r, begin:t + 1]
                assert y[r, t] % 1000 >= 500 and chat in rows  # a reply of these rows ...
                context = other[other % 1000 < 500]
                assert len({int(c) // 1000 for c in context}) == 1 and int(context[0]) // 1000 != chat  # ... under one other chat's prompt ...
                whole = replies[int(context[0]) // 1000].context
                assert context.tolist() == whole[len(whole) - len(context):].tolist()  # ... which is whole at its end, where the question is
                assert len(context) == len(whole) or begin == 0 and len(context) + len(replies[chat].tokens) == T + 1
    for k in set(number.flatten().tolist()) - {0}:
        there, = {int(v) // 1000 for v in y[number == k]}
        assert y[number == k].tolist() == replies[there].tokens.tolist()
        home = torch.where(at_home == k)
        assert rows[int(home[0][0])] == replies[there].row and home[1].tolist() == list(range(replies[there].at, replies[there].at + len(replies[there].tokens)))
    assert set(at_home.unique().tolist()) <= set(number.unique().tolist()) | {0}
    if n > 1 and n_rows:
        assert (number > 0).any()


def test_the_relevance_loss_is_a_hinge_per_token():
    own, wrong, lengths = torch.tensor([2.0, 6.0, 1.0]), torch.tensor([4.0, 6.5, 9.0]), torch.tensor([2.0, 4.0, 1.0])
    assert float(train.relevance_loss(own, wrong, lengths, 1.5)) == pytest.approx(2 * 0.5 + 4 * (1.5 - 0.125) + 0)


def test_relevance_accuracy_equals_scoring_each_reply_alone(tune, chat_data):
    out = tune(still=False)
    model, tokenizer, _ = train.load_checkpoint(out / "best.pt")
    source, = sources_of(chat_data)
    bos, assistant, eos = (tokenizer.token_to_id(t) for t in ("<|bos|>", "<|assistant|>", "<|eos|>"))
    text = source.val.tolist()
    begins = [i for i, t in enumerate(text) if t == bos] + [len(text)]
    pairs = []
    for k, (a, b) in enumerate(zip(begins, begins[1:])):
        chat = text[a:b]
        opened = [i for i, t in enumerate(chat) if t == assistant]
        first = opened[k % len(opened)] + 1
        end = chat.index(eos, first) + 1
        pairs.append((chat[:first], chat[first:end]))
    model, right, gap = model.double(), 0, 0.0
    for i, (context, reply) in enumerate(pairs):
        prompts = (c[-(129 - len(reply)):] for c in (context, pairs[(i + len(pairs) // 2) % len(pairs)][0]))  # what a row of 128 has room for
        own, wrong = (sum(plain_losses(model, c + reply, len(c))) for c in prompts)
        right, gap = right + (own < wrong), gap + (wrong - own) / len(reply)
    got = train.relevance(model, [source], 0, 128, 4, torch.no_grad, bos, torch.device("cpu"))
    assert got == pytest.approx((right / len(pairs), gap / len(pairs)), abs=1e-5)
    assert 0 < right < len(pairs)


# ---------------------------------------------------------------------------------------------------- packed chats do not see each other

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changing_one_chat_of_a_row_leaves_the_others_logits_alone(name, chat_data):
    module, tiny = ARCHITECTURES[name].module, ARCHITECTURES[name].tiny
    model = randomised(module.Model(module.Config(**{**tiny, "vocab_size": 600, "context_length": 128}))).eval()
    source, = sources_of(chat_data)
    loader = Loader([source], "random", 96, 10, 0, bos=1)
    dealt = [next(d for d in (loader.next_row() for _ in range(50)) if len(d[1]) >= 3)]
    x, y, reset = loader.tensors(dealt)
    begins = torch.where(reset[0])[0].tolist()
    a, b = begins[1], begins[2]
    changed = x.clone()
    changed[0, a + 1:b] = (x[0, a + 1:b] + 7) % 600
    with torch.no_grad():
        before, after = (model(t, all_logits=True, reset=reset)[0][0] for t in (x, changed))
        alone = model(x[:, b:begins[3] if len(begins) > 3 else None], all_logits=True)[0][0]
    same = [i for i in range(96) if not a <= i < b]
    assert torch.equal(before[same], after[same]) and not torch.equal(before[a + 2:b], after[a + 2:b])
    assert (before[b:b + len(alone)] - alone).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------- whole runs

@pytest.mark.pictures
def test_a_tuned_run_reports_replies_base_and_relevance_side_by_side(tune, trained, chat_data, capsys):
    out = tune("--data=" + str(chat_data), "--sample_tokens=8", "--max_steps=4", still=False)
    shown, seen = capsys.readouterr().out, rows(out)
    val = [r for r in seen if "val_loss" in r]
    assert [r["step"] for r in val if not r.get("final")] == [0, 2, 4] and list(val[0]["val_loss"]) == ["raw"] and val[-1]["final"]
    assert all(0 <= r["relevance_accuracy"][kind] <= 1 and r["val_loss"][kind]["base"] > 0 for r in val for kind in r["val_loss"])
    assert all("relevance_loss" in r for r in seen if "train_loss" in r)
    assert "eval      0  replies" in shown and "  base " in shown and "likelier under their own prompt" in shown and "15% of the rows, replayed" in shown
    assert "sample       user: What does shutil" not in shown and "sample       user: " in shown and "             assistant: " in shown and "--chat" in shown
    best = json.loads((out / "best_validation.json").read_text())
    winner = next(r for r in val if r["step"] == best["step"] and not r.get("final"))
    assert best["val_loss_base"] == winner["val_loss"][best["weights"]]["base"] and best["relevance_accuracy"] == winner["relevance_accuracy"][best["weights"]]
    assert best["step"] > 0 and (out / "loss.png").stat().st_size > 10_000
    # replies alone are measured, all of the base data
    model, tokenizer, _ = train.load_checkpoint(out / "best.pt")
    chats, = sources_of(chat_data)
    total, n, model = 0.0, 0, model.double()
    edges = document_edges(chats.val, 1)
    for a, b in zip(edges, edges[1:]):
        piece = chats.val[a:b].tolist()
        for start in range(0, len(piece) - 1, 64):  # a long chat is cut
            part = piece[start:start + 65]
            for i, loss in enumerate(plain_losses(model, part, 1)):
                if chats.val_mask[a + start + i + 1]:
                    total, n = total + loss, n + 1
    out = tune("--eval_tokens=0", "--final_eval_tokens=0", "--max_steps=1", "--init_from=" + str(out / "best.pt"))
    assert rows(out)[-1]["val_loss"][next(iter(rows(out)[-1]["val_loss"]))]["mixed"] == pytest.approx(total / n, abs=1e-4)
    assert train.read_checkpoint(out / "best.pt")["train"]["base_data"] == "pydocs-hybrid"


def test_beside_other_text_it_is_replies_that_count(tune, chat_data, capsys):
    """In what is called the loss of the replies, by which the best step is chosen; the text has a line of its own."""
    out = tune(f"--data={chat_data},pydocs-hybrid", "--base_data=", "--replay=0", "--max_steps=1")
    val = next(r for r in rows(out) if "val_loss" in r)["val_loss"]["raw"]
    assert val["mixed"] == val["source"]["chats"] != val["source"]["pydocs"] and "base" not in val and "all replies" in capsys.readouterr().out


def test_rows_without_a_reply_to_validate_on_are_no_measure(tune, chat_data, workdir):
    (workdir / "long.jsonl").write_text("".join(json.dumps(dict(instruction=f"{i} {' '.join(WORDS * 40)}", output="yes")) + "\n" for i in range(40)))
    prepare.prepare(["long.jsonl"], prepare.Settings(tokenizer=f"{chat_data}/tokenizer.json", out_dir="mine", name="long", val_fraction=0.2))
    with pytest.raises(UserError, match="no reply is in the validation rows that --eval_tokens=64 takes; raise it, or --block_size"):
        tune("--data=mine/long", "--eval_tokens=64")


def test_two_chats_are_enough(tune, chat_data, workdir, capsys):
    """One to train on, one to validate with. There is none to compare it with, and no time to warm up."""
    (workdir / "few.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in invented_chats(2, 3)))
    prepare.prepare(["few.jsonl"], prepare.Settings(tokenizer=f"{chat_data}/tokenizer.json", out_dir="mine", name="few"))
    out = tune("--data=mine/few", "--epochs=3", "--warmup_steps=10", "--relevance=0.5", still=False)
    shown, s = capsys.readouterr().out, train.read_checkpoint(out / "ckpt.pt")["train"]
    assert "nan" not in shown and "likelier" not in shown and s["warmup_steps"] == 10  # as asked
    assert train.main(["--model=tinymemory-sft", f"--init_from={s['init_from']}", "--data=mine/few", "--base_data=", "--replay=0", "--epochs=3", "--block_size=128",
                       "--batch_tokens=512", "--sample_tokens=0", "--compile=off", "--out=few"]) == 0
    assert train.read_checkpoint("few/ckpt.pt")["train"]["warmup_steps"] == 0


def test_a_tuned_run_stopped_and_resumed_is_the_uninterrupted_run_to_the_bit(tune, monkeypatch):
    whole, calls, update = tune("--epochs=0.3", still=False), [], train.ema_update

    def stop_in_the_third_step(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        update(*args)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr("train.ema_update", stop_in_the_third_step)
        parts = tune("--epochs=0.3", still=False)
    assert train.read_checkpoint(parts / "ckpt.pt")["step"] == 3 and signal.getsignal(signal.SIGTERM) == handler
    assert train.main(["--resume", f"--out={parts}"]) == 0
    a, b = (train.read_checkpoint(out / "ckpt.pt") for out in (whole, parts))
    for key in ("model", "ema", "optimizer", "loader", "step", "tokens"):
        assert same_tensors(a[key], b[key]), key
    assert a["step"] > 4
    for x, y in zip(rows(whole), rows(parts), strict=True):
        assert {k: v for k, v in x.items() if k not in ("tokens_per_s", "elapsed")} == {k: v for k, v in y.items() if k not in ("tokens_per_s", "elapsed")}


@pytest.mark.pictures
def test_the_curve_is_drawn_of_what_was_measured(tmp_path, monkeypatch, capsys):
    """The base data may have gone in between; matplotlib need not be there."""
    evaluations = [dict(step=i, tokens=1000 * i, val_loss={}, val_bits_per_byte={k: dict(mixed=3.0 - i, **({"base": 2.0} if i < 1 else {})) for k in ("raw", "ema")[:1 + i]},
                        **(dict(relevance_accuracy={"raw": 0.5, "ema": 0.6}) if i else {})) for i in range(2)]
    seen = [*evaluations, dict(step=1, tokens=1000, train_loss=1.0, train_bits_per_byte=2.5)]
    train.draw_loss(seen, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train.draw_loss(seen, tmp_path / "again.png", "title")
    assert not (tmp_path / "again.png").exists() and "matplotlib, which is not installed" in capsys.readouterr().out


SHAPES = {"ivme": ["--n_kv_head=1"], "i3": ["--n_head=2", "--d_state=4", "--delta_rank=4", "--ffn_rank=8", "--head_rank=8"], "gpt2preln": []}


@pytest.mark.parametrize("model", SHAPES)
def test_init_from_and_a_set_of_chats_is_all_that_tuning_needs(model, chat_data, workdir, capsys):
    """Any architecture; rows hold whole chats, replies count, it is short and gentle, and goes to a folder of its own."""
    common = ["--compile=off", "--device=cpu", "--dtype=float32", "--eval_tokens=256", "--final_eval_tokens=256", "--sample_tokens=0", "--batch_tokens=2048"]
    shape = ["--vocab_size=600", "--n_layer=1", "--d_model=32", "--context_length=128", *([] if model == "i3" else ["--n_head=2"])]
    shape += ["--d_ff=48"] if model == "ivme" else []
    assert train.main([f"--model={model}", "--data=data/pydocs-hybrid", *shape, *SHAPES[model], *common, "--block_size=64", "--max_steps=2", "--out=parent"]) == 0
    parent = train.read_checkpoint(workdir / "parent/best.pt")["train"]
    assert parent["loss_on"] == "all"
    _, _, given_s, *_ = train.settings_from(["--init_from=parent/best.pt", f"--data={chat_data}"])
    assert train.tuning_settings(given_s, {"init_from", "data"}).batch_tokens == min(32_768, given_s.batch_tokens)  # a card's million would be half a set
    capsys.readouterr()
    assert train.main(["--init_from=parent/best.pt", f"--data={chat_data}", *common, "--block_size=128"]) == 0
    s, shown = train.read_checkpoint(workdir / f"out/{model}-sft/best.pt")["train"], capsys.readouterr().out
    assert s["loss_on"] == "responses" and s["pack"] == "document" and s["base_data"] == "data/pydocs-hybrid" and s["warmup_steps"] <= s["max_steps"] // 10
    assert s["lr"] == train.TUNING_RATE * parent["lr"] and s["muon_lr"] == train.TUNING_RATE * parent["muon_lr"] and f"lr {s['lr']:g}" in shown
    loader = Loader(sources_of(chat_data), "random", 128, 1, s["seed"], 1)
    assert s["max_steps"] == math.ceil(train.TUNING_EPOCHS * loader.per_epoch[0] / 16)
    val = [r for r in rows(workdir / f"out/{model}-sft") if "val_loss" in r]
    assert "base" in val[0]["val_loss"]["raw"] and val[-1]["val_loss"]["raw" if "raw" in val[-1]["val_loss"] else "ema"]["mixed"] < val[0]["val_loss"]["raw"]["mixed"]
    if model == "ivme":  # what is said counts; and the tuned checkpoint is measured as it was trained
        assert train.main(["--init_from=parent/best.pt", f"--data={chat_data}", *common, "--block_size=128", "--loss_on=all", "--max_steps=1", "--out=all"]) == 0
        spoken = train.read_checkpoint(workdir / "all/best.pt")["train"]
        assert (spoken["loss_on"], spoken["pack"], spoken["lr"]) == ("all", "document", s["lr"])  # as gentle
        assert train.main(["--init_from=parent/best.pt", f"--data={chat_data}", *common, "--block_size=128", "--lr=0.5", "--epochs=0.5", "--out=said"]) == 0
        said = train.read_checkpoint(workdir / "said/best.pt")["train"]
        assert said["lr"] == 0.5 and said["max_steps"] == math.ceil(0.5 * loader.per_epoch[0] / 16)
        capsys.readouterr()
        assert train.main([f"--init_from=out/{model}-sft/best.pt", "--eval_only"]) == 0
        shown = capsys.readouterr().out
        assert "base data" in shown and "likelier under" in shown
        assert train.main([f"--init_from=out/{model}-sft/best.pt", "--eval_only", "--data=data/pydocs-hybrid"]) == 0
        assert "likelier" not in capsys.readouterr().out
        # the same command again; the advice that it gives goes on with this run and with no other
        with pytest.raises(UserError, match=f"--resume --out=out/{model}-sft goes on"):
            train.main(["--init_from=parent/best.pt", f"--data={chat_data}", *common, "--block_size=128"])
        with pytest.raises(UserError, match="the run in parent starts from random weights"):
            train.main(["--resume", "--init_from=parent/best.pt", "--out=parent"])
        before = (workdir / f"out/{model}-sft/config.json").read_text()
        assert train.main(["--resume", f"--out=out/{model}-sft", "--loss_on=auto"]) == 0  # done already; nothing is made gentler once more
        assert (workdir / f"out/{model}-sft/config.json").read_text() == before


def test_a_tuning_step_is_the_recipes_or_a_power_of_two_of_rows():
    for block, batch, small in ((2500, 240_000, 20_000), (512, 4096, 4096), (1024, 2 ** 20, 32_768), (40_000, 80_000, 40_000), (1024, 24_000, 16_384)):
        assert train.tuning_settings(train.Settings(block_size=block, batch_tokens=batch), set()).batch_tokens == small


def test_a_name_means_the_folder_in_the_checkpoints_tokenizer(trained, chat_data, workdir, monkeypatch):
    """Of two sets of one name, or with the one that is missing, or that can be made on the spot."""
    (workdir / "data").unlink()
    text = (chat_data / "tokenizer.json").read_text()
    (workdir / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in invented_chats(60, 2)))
    flags = ["--model=tinymemory-sft", f"--init_from={trained}/best.pt", "--data=chats", "--block_size=64", "--batch_tokens=512", "--max_steps=1", "--eval_tokens=256",
             "--final_eval_tokens=256", "--sample_tokens=0", "--compile=off", "--replay=0", "--base_data=", "--tokenizer=hybrid"]
    prepare.prepare(["chats.jsonl"], prepare.Settings(tokenizer="hybrid", vocab_size=600, name="chats-hybrid-600", val_fraction=0.1))  # another tokenizer
    with pytest.raises(UserError, match=r"no prepared data 'chats'.*python prepare.py chats.jsonl --tokenizer=data/tokenizer-\w{8}.json"):
        train.main([*flags, "--out=missing"])
    tokenizer, = (workdir / "data").glob("tokenizer-*.json")
    assert tokenizer.read_text() == text
    prepare.prepare(["chats.jsonl"], prepare.Settings(tokenizer=str(tokenizer), val_fraction=0.1))
    assert train.main([*flags, "--out=found"]) == 0
    made = []
    monkeypatch.setattr("prepare.prepare", lambda names, s: made.append((names, s.tokenizer)) or (_ for _ in ()).throw(UserError("enough")))
    with pytest.raises(UserError, match="enough"):
        train.main([*flags, "--data=pydocs-chat", "--out=embedded"])
    assert made == [(["pydocs-chat"], str(tokenizer.relative_to(workdir)))]
    # one that is made on the spot leaves the names behind it what they are
    monkeypatch.setattr("prepare.prepare", lambda names, s: shutil.copytree(next((workdir / "data").glob("chats-tokenizer-*")), workdir / f"data/pydocs-chat-{tokenizer.stem}"))
    shutil.copytree(next((workdir / "data").glob("chats-tokenizer-*")), workdir / "data/more-hybrid-600")
    assert len(train.find_data("pydocs-chat,more", "hybrid", 600, True, lambda: None, text)[0]) == 2
    # without a checkpoint the first name decides
    assert len(train.find_data("chats-hybrid-600,chats", "hybrid", 600, True, lambda: None)[0]) == 2
    with pytest.raises(UserError, match=r"no prepared data 'more'.*--tokenizer=data/chats-hybrid-600/tokenizer.json"):
        train.find_data("chats-hybrid-600,more", "hybrid", 600, True, lambda: None)
    # and a checkpoint's own data is looked for as it was
    assert train.settings_from([f"--init_from={trained}/best.pt", "--model=tinymemory-sft"])[2].tokenizer == train.read_checkpoint(trained / "best.pt")["train"]["tokenizer"]


# train.py, and again with what follows "and"; a second process group in one process would not find its peers
TWICE = """
import sys, torch.distributed as dist, train
at, end = sys.argv.index("and"), dist.destroy_process_group
dist.destroy_process_group = lambda: None
train.main(sys.argv[1:at])
dist.init_process_group = lambda *args, **kw: None
train.main(sys.argv[1:at] + sys.argv[at + 1:])
end()
"""


def test_two_processes_tune_as_one_does(tune, trained, chat_data, workdir):
    """Losses, gradients and every figure of the validation are those of one process. In a second run relevance, whose pairs are each process's own."""
    alone = tune("--response_start_weight=3", "--replay=0.3", "--relevance=0", "--micro_batch=2", "--max_steps=3", "--eval_every=1", still=False)
    s = train.read_checkpoint(alone / "ckpt.pt")["train"]
    words = [f"--{k}={v}" for k, v in s.items() if k not in ("resume", "overwrite", "decay_only", "eval_only", "out", "epochs", "sample_prompt")]
    (workdir / "twice.py").write_text(TWICE)
    process = command("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "twice.py",
                      *words, "--out=two", "and", "--out=pairs", "--relevance=0.5", "--relevance_margin=0.4", "--lr=0", "--muon_lr=0")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for a, b in zip(rows(alone), rows(workdir / "two"), strict=True):
        if "train_loss" in a:
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-3)
            assert a["train_bits_per_byte"] == pytest.approx(b["train_bits_per_byte"], abs=1e-4)
        else:
            assert all(a["val_loss"][k][of] == pytest.approx(b["val_loss"][k][of], abs=1e-4) for k in a["val_loss"] for of in ("mixed", "base"))
            assert a["relevance_accuracy"] == b["relevance_accuracy"] and all(a["relevance_gap"][k] == pytest.approx(b["relevance_gap"][k], abs=1e-4) for k in a["relevance_gap"])
    a, b = (train.read_checkpoint(out / "ckpt.pt")["model"] for out in (alone, workdir / "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)
    s = train.Settings(**train.read_checkpoint(workdir / "pairs/best.pt")["train"])
    logged = [r for r in rows(workdir / "pairs") if "train_loss" in r]
    for row, (loss, hinge) in zip(logged, reference(workdir / "pairs", chat_data, s.base_data, s, 3, world=2), strict=True):
        assert hinge > 0 and row["relevance_loss"] == pytest.approx(hinge, abs=2e-5) and row["train_loss"] == pytest.approx(loss, abs=2e-5)
