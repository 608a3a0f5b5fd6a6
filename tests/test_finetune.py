"""finetune.py: what counts, what it weighs, what is replayed and compared, against loops over tokens in float64."""
import json
import math
import os
import signal
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune
import prepare
import run
import runfolder
import train
from architectures import ARCHITECTURES, randomised
from common import UserError
from conftest import (ALONE, CPU, FakeSource, evaluations, pretraining_plan, rows, same_tensors,
                      sources_of, step_rows, timeless, together, tuning_plan)
from corpus.folder import document_edges
from corpus.loader import Loader
from corpus.tokenizer import bos_eos
from finetune import FineTuning, Reply, Settings, WithReplay, draw_replies, mark_replies, wrong_prompts
from made_up import WORDS, made_up_chats

OFF = ["--word_boost=1", "--response_start_weight=1", "--replay=0", "--relevance=0"]


def prepare_chats(folder, name, chats, tokenizer, val_fraction=0.1):
    """folder/name: the chats in this tokenizer."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return prepare.prepare([str(path)], prepare.Settings(
        out_dir=str(folder), tokenizer=str(tokenizer), name=name, val_fraction=val_fraction))


@pytest.fixture(scope="module")
def chat_data(corpora, tmp_path_factory):
    """A folder of chats in the tokenizer of data/pydocs-hybrid."""
    tokenizer = corpora / "data/pydocs-hybrid/tokenizer.json"
    return prepare_chats(tmp_path_factory.mktemp("chats"), "chats", made_up_chats(400, 1, longest=4), tokenizer)


@pytest.fixture
def tune(trained, chat_data, workdir):
    """A function that tunes the small run on the chats, with rows of 64 tokens, and returns the folder."""
    def tune(*flags, still=True):
        """still: nothing is learned, so that the weights stay those of `trained`."""
        out = workdir / f"tuned{len(list(workdir.glob('tuned*')))}"
        more = ["--lr=0", "--muon_lr=0"] if still else []
        if not any(flag.startswith("--epochs=") for flag in flags):
            more.append("--max_steps=4")
        assert finetune.main([
            f"--init_from={trained}/best.pt", "--model=tinymemory-sft", f"--data={chat_data}",
            "--base_data=pydocs-hybrid", f"--out={out}", "--block_size=64", "--batch_tokens=512", "--micro_batch=4",
            "--eval_every=2", "--eval_tokens=1024", "--warmup_steps=1", "--final_eval_tokens=1024",
            "--save_every=2", "--log_every=1", "--sample_tokens=0", "--dtype=float32", "--compile=off", "--device=cpu",
            *more, *flags]) == 0
        return out
    return tune


def settings_of(out):
    """The settings of a tuned run."""
    return run.known_settings(Settings, run.read_checkpoint(out / "ckpt.pt")["train"])


def weights_of(out):
    """The raw weights that a run ended with."""
    return run.read_checkpoint(out / "ckpt.pt")["model"]


def framing(tokenizer):
    """Ids of <|bos|>, <|assistant|>, <|eos|>."""
    return [tokenizer.token_to_id(token) for token in ("<|bos|>", "<|assistant|>", "<|eos|>")]


# ---------------------------------------------------------------------------------------------------- marks and weights

def places_in_replies(mask):
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
    pieces, used = [], 0
    while used < T - 1 and len(pieces) < 4:
        start = data.draw(st.integers(0, len(mask) - 2))
        n = data.draw(st.integers(1, min(T - used, len(mask) - 1 - start)))
        pieces.append((start, n))
        used += n

    place = places_in_replies(mask)
    expected = []
    for start, n in pieces:
        for i in range(start + 1, start + n + 1):
            if not place[i]:
                expected.append(0)
            else:
                expected.append(2 if place[i] <= opening else 1)
    expected += [0] * (T - len(expected))
    assert mark_replies(mask, [pieces], T, opening)[0].tolist() == expected


def nats_of(model, tokens, first):
    """Of tokens[first:], each behind all before it, by one forward pass of the whole sequence alone: (n,)."""
    logp = model(torch.tensor([tokens[:-1]]), all_logits=True)[0][0].log_softmax(-1)
    return -logp[range(first - 1, len(tokens) - 1), tokens[first:]]


def plain_losses(model, tokens, first):
    with torch.no_grad():
        return nats_of(model, tokens, first).tolist()


def compared(dealt, sources, s, step, bos, rank=0, world=1):
    """(its own context, another chat's, reply), lists of tokens, of each reply that a process compares in this step.

    Who is compared with whom is drawn as finetune.py draws it. The only set of chats is source 0.
    """
    rng = np.random.default_rng([s.seed, step, rank, 1])
    replies = draw_replies(dealt, sources, lambda source: source == 0, bos, s.block_size, rng)
    mine = list(range(rank, len(dealt), world))
    for first in range(0, len(mine), s.micro_batch):
        here = mine[first:first + s.micro_batch]
        n_rows = int(s.micro_batch * s.relevance + rng.random())
        x, y, reset, number, at_home = wrong_prompts(replies, here, n_rows, s.block_size, rng)
        for k in set(number.flatten().tolist()) - {0}:
            r, at = (int(v[0]) for v in torch.where(number == k))
            begin = max(int(v) for v in torch.where(reset[r])[0] if v <= at)
            home, place = (int(v[0]) for v in torch.where(at_home == k))
            own = next(reply for reply in replies if reply.row == here[home] and reply.at == place)
            yield own.context.tolist(), x[r, begin:at + 1].tolist(), y[r][number[r] == k].tolist()


def speaks(past, bos, assistant, eos):
    """Since how many tokens the assistant speaks, given all tokens of the source up to here; -1: it does not."""
    last = max((k for k, token in enumerate(past) if token == assistant), default=-1)
    if last < 0 or eos in past[last:] or bos in past[last:]:
        return -1
    return len(past) - last - 1


def reference(out, chat_data, base, s, steps, world=1):
    """What loss and relevance loss of each step must be: a loop over rows, chats and tokens, without masks.

    The rows, and who is compared with whom, are the loader's. Nothing was learned in between.
    """
    model, tokenizer, _ = run.load_checkpoint(out / "best.pt")
    model = model.double()
    frame, (bos, assistant, eos) = bos_eos(tokenizer), framing(tokenizer)
    (chats,), base = sources_of(chat_data), sources_of(base)
    n_rows, T = s.batch_tokens // s.block_size, s.block_size
    loader = Loader([chats], "random", T, steps * n_rows, s.seed, frame)
    if s.replay:
        loader = WithReplay(loader, Loader(base, "random", T, steps * n_rows, s.seed, first_number=1), s.replay)
    found = []
    for step in range(steps):
        dealt = loader.next_rows(n_rows)
        total, weight, spoken, nats, targets = 0.0, 0.0, 0, 0.0, 0
        for source, pieces in dealt:
            for start, n in pieces:
                tokens = np.resize(np.roll(loader.sources[source].train, -start), n + 1).tolist()
                losses = plain_losses(model, tokens, 1)
                before = chats.train[:start + 1].tolist() if source == 0 else []
                for i, (token, loss) in enumerate(zip(tokens[1:], losses)):
                    w = s.word_boost if len(tokenizer.decode([token])) > 1 else 1.0
                    if source == 0:  # chats: who speaks, and since how many tokens?
                        since = speaks(before + tokens[1:1 + i], bos, assistant, eos)
                        if since < 0:
                            continue
                        spoken, nats = spoken + 1, nats + loss
                        w *= s.response_start_weight if since < s.response_start_tokens else 1.0
                    total, weight, targets = total + w * loss, weight + w, targets + 1
        hinge = 0.0
        for rank in range(world if s.relevance else 0):
            for own, other, reply in compared(dealt, loader.sources, s, step, bos, rank, world):
                right, wrong = (sum(plain_losses(model, context + reply, len(context))) for context in (own, other))
                hinge += max(0, s.relevance_margin - (wrong - right) / len(reply)) * len(reply)
        found.append((total / (weight or 1.0), hinge / (spoken or 1), targets))
    return found


TRICKS = {
    "word_boost": ["--word_boost=2", "--response_start_weight=1", "--replay=0", "--relevance=0"],
    "response_start": ["--word_boost=1", "--response_start_weight=3", "--response_start_tokens=5", "--replay=0",
                       "--relevance=0"],
    "replay": ["--word_boost=1", "--response_start_weight=1", "--replay=0.3", "--relevance=0"],
    "relevance": ["--word_boost=1", "--response_start_weight=1", "--replay=0", "--relevance=0.5",
                  "--relevance_margin=0.4"],
    "all": ["--word_boost=1.5", "--response_start_weight=2", "--response_start_tokens=30", "--replay=0.25",
            "--relevance=0.4", "--relevance_margin=0.4"],
    # a row is a step: some steps hold no reply, some are all replay, and of one chat there is none to compare with
    "single_rows": ["--word_boost=1.5", "--response_start_weight=2", "--replay=0.5", "--relevance=1",
                    "--batch_tokens=128", "--block_size=128", "--micro_batch=1", "--max_steps=40"],
}


@pytest.mark.parametrize("tricks", TRICKS)
def test_losses_equal_a_loop_over_the_tokens_in_float64(tricks, tune, chat_data, corpora):
    out = tune("--max_steps=2", *TRICKS[tricks], "--eval_every=0")
    s, logged = settings_of(out), step_rows(out)
    expected = reference(out, chat_data, corpora / "data/pydocs-hybrid", s, s.max_steps)
    seen = 0
    for row, (loss, hinge, targets) in zip(logged, expected, strict=True):
        assert row["train_loss"] == pytest.approx(loss, abs=2e-5)
        assert row.get("relevance_loss", 0.0) == pytest.approx(hinge, abs=2e-5)
        seen += targets
        assert row["tokens"] == seen
    hinges = [hinge for _, hinge, _ in expected]
    if tricks == "single_rows":
        assert any(loss == 0 for loss, _, _ in expected) and any(hinges)
    elif s.relevance:
        assert all(hinges)


def test_doubled_weights_change_nothing(tune, monkeypatch):
    weights = finetune.token_weights
    once = tune(still=False)
    monkeypatch.setattr("finetune.token_weights", lambda *args: 2 * weights(*args))
    twice = tune(still=False)
    assert same_tensors(weights_of(once), weights_of(twice))
    monkeypatch.setattr("finetune.token_weights", lambda y, *args: (y >= 0).float())
    plain = tune(still=False)
    assert not same_tensors(weights_of(once), weights_of(plain))  # they do weigh


def test_with_every_trick_off_it_is_plain_fine_tuning_to_the_bit(tune, trained, chat_data):
    """Against a loop of a few lines: the next tokens of the replies, their mean loss, the optimizers."""
    out = tune(*OFF, "--micro_batch=8", "--ema_beta=0", still=False)
    s = settings_of(out)
    model, tokenizer, _ = run.load_checkpoint(trained / "best.pt")
    model.train()
    optimizers, (source,) = train.Optimizers(model, s, torch.float32), sources_of(chat_data)
    loader = Loader([source], "random", 64, 32, s.seed, bos_eos(tokenizer))
    for step in range(4):
        dealt = loader.next_rows(8)
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
    assert same_tensors(weights_of(out), model.state_dict())


def distance(a, b):
    """Euclidean, between two dicts of tensors."""
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def test_the_relevance_loss_moves_the_weights_as_its_formula_says(tune, trained, chat_data):
    """A step against the plain gradient of the sum: each compared reply alone behind its own prompt and the other's.

    The model's weights are large, so that what stands before a reply makes a difference.
    """
    checkpoint = run.read_checkpoint(trained / "best.pt")
    loud = randomised(run.load_checkpoint(trained / "best.pt")[0])
    runfolder.save_checkpoint("start.pt", checkpoint | dict(model=loud.state_dict(), use_ema=False))
    flags = ["--init_from=start.pt", "--max_steps=1", "--ema_beta=0", "--batch_tokens=1024"]
    out = tune(*OFF, *flags, "--relevance=1", "--relevance_margin=5", still=False)
    without = tune(*OFF, *flags, still=False)

    # the same batch, as a plain sum
    s, (model, tokenizer, _), (source,) = settings_of(out), run.load_checkpoint("start.pt"), sources_of(chat_data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers, frame = train.Optimizers(model, s, torch.float32), bos_eos(tokenizer)
    loader = Loader([source], "random", 64, 16, s.seed, frame)
    dealt = loader.next_rows(16)
    x, y, reset = loader.tensors(dealt)
    y[mark_replies(source.train_mask, [pieces for _, pieces in dealt], 64) == 0] = -1
    hinges = []
    for own, other, reply in compared(dealt, [source], s, 0, frame[0]):
        gap = (nats_of(model, other + reply, len(other)) - nats_of(model, own + reply, len(own))).sum()
        hinges.append(torch.relu(s.relevance_margin * len(reply) - gap))
    contrast = sum(hinges) / (y >= 0).sum()
    (model(x, y, reset=reset)[1] + contrast).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip, foreach=True)
    optimizers.step(train.lr_factor(0, s))

    logged = step_rows(out)[0]
    assert len(hinges) > 8 and logged["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert logged["relevance_loss"] == pytest.approx(float(contrast.detach()), abs=1e-4)
    moved, plainly = weights_of(out), weights_of(without)
    assert distance(moved, model.state_dict()) < 0.01 * distance(moved, before)
    assert distance(plainly, moved) > 0.2 * distance(moved, before)


# ---------------------------------------------------------------------------------------------------- replay

def chats_and_base():
    """A source of chats of 12 tokens, masked from the fifth on, and two of text; each source has tokens of its own."""
    chat = FakeSource(np.tile([1] + [50] * 11, 200))
    chat.train_mask = np.tile([0] * 4 + [1] * 8, 200).astype(np.uint8)
    return [chat], [FakeSource(np.arange(3000) % 20 + 100), FakeSource(np.arange(1000) % 20 + 200)]


def replaying(own, base, replay, order, T, n_rows, frame):
    """A loader that replays, as finetune.py makes it."""
    loader = WithReplay(Loader(own, order, T, n_rows, 0, frame),
                        Loader(base, "random", T, n_rows, 0, first_number=len(own)), replay)
    loader.set_length(n_rows)
    return loader


@settings(max_examples=30, deadline=None)
@given(replay=st.floats(0.01, 0.95), n_rows=st.integers(1, 12))
def test_replay_gives_its_share_of_the_rows_of_each_batch(replay, n_rows):
    own, base = chats_and_base()
    loader = replaying(own, base, replay, "random", 24, 40 * n_rows, (1, 2))
    taken = [0, 0, 0]
    for step in range(40):
        dealt = loader.next_rows(n_rows)
        x, y, reset = loader.tensors(dealt)
        for r, (source, pieces) in enumerate(dealt):
            taken[source] += 1
            if source:  # a window of the stream, in which nothing is reset
                assert (y[r] >= 100).all() and pieces[0][1] == 24 and reset[r].tolist() == [True] + [False] * 23
            else:  # whole chats of 11 targets
                assert (y[r] < 100).all() and reset[r, 11]
        assert abs(taken[1] + taken[2] - replay * n_rows * (step + 1)) < 1 + 1e-6
    if sum(taken[1:]) > 40:
        assert taken[1] / sum(taken[1:]) == pytest.approx(0.75, abs=0.1)  # each base source by its size


def test_every_target_of_a_replayed_row_counts_and_of_a_chat_only_the_replies(trained, chat_data, workdir):
    plan = tuning_plan(f"--init_from={trained}/best.pt", "--model=tinymemory-sft", f"--data={chat_data}",
                       "--replay=0.5", "--base_data=pydocs-hybrid", "--block_size=64", "--batch_tokens=1024",
                       "--max_steps=4")
    task = FineTuning(plan, ALONE, CPU)
    kinds = {True: [], False: []}
    for source, pieces in task.loader.next_rows(40):
        kinds[task.is_chat(source)].append(task.marks(source, pieces))
    assert len(kinds[False]) == 20 and (torch.cat(kinds[False]) == 1).all()
    assert set(torch.cat(kinds[True]).unique().tolist()) == {0, 1, 2}


def test_a_replaying_loader_goes_on_from_its_counts():
    own, base = chats_and_base()
    whole, first, second = (replaying(own, base, 0.4, "random", 24, 300, (1, 2)) for _ in range(3))
    everything = whole.next_rows(250)
    first.next_rows(101)
    second.load_state_dict(first.state_dict())
    assert second.next_rows(149) == everything[101:]


def test_sequential_spends_its_turns_on_what_replay_leaves():
    own = [FakeSource(np.arange(1000)), FakeSource(np.arange(1000) + 1000)]
    loader = replaying(own, [FakeSource(np.arange(1000) + 5000)], 0.25, "sequential", 10, 400, None)
    drawn = [source for source, _ in loader.next_rows(400)]
    assert drawn.count(2) == 100 and [source for source in drawn if source != 2] == [0] * 150 + [1] * 150


# ---------------------------------------------------------------------------------------------------- relevance

def made_up_replies(rng, n, T):
    """n replies whose every token tells which chat it is of: contexts are 1000 k + ..., replies 1000 k + 500 + ..."""
    replies = []
    for k in range(n):
        context = np.arange(rng.integers(1, 60)) + 1000 * k
        tokens = np.arange(rng.integers(1, T // 2)) + 1000 * k + 500
        replies.append(Reply(k, int(rng.integers(0, T - len(tokens) + 1)), context, tokens))
    return replies


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10 ** 6), n=st.integers(1, 30), n_rows=st.integers(0, 4))
def test_replies_are_put_under_whole_prompts_of_other_chats(seed, n, n_rows):
    rng, T = np.random.default_rng(seed), 40
    replies, mine = made_up_replies(rng, n, T), list(range(0, n, 2))
    x, y, reset, number, at_home = wrong_prompts(replies, mine, n_rows, T, rng)
    assert x.shape == y.shape == reset.shape == number.shape == (n_rows, T) and at_home.shape == (len(mine), T)

    for r in range(n_rows):
        begin = 0
        for t in range(T):
            begin = t if reset[r, t] else begin
            if not number[r, t]:
                continue
            # a reply of these rows ...
            chat, before = int(y[r, t]) // 1000, x[r, begin:t + 1]
            assert y[r, t] % 1000 >= 500 and chat in mine
            # ... under one other chat's prompt ...
            context = before[before % 1000 < 500]
            assert len({int(token) // 1000 for token in context}) == 1 and int(context[0]) // 1000 != chat
            # ... which is whole, or at least at its end, where the question is
            whole = replies[int(context[0]) // 1000].context
            assert context.tolist() == whole[len(whole) - len(context):].tolist()
            assert len(context) == len(whole) or len(context) + len(replies[chat].tokens) == T + 1 and begin == 0

    # the same reply is found where it stands under its own prompt
    for k in set(number.flatten().tolist()) - {0}:
        chat, = {int(token) // 1000 for token in y[number == k]}
        reply = replies[chat]
        assert y[number == k].tolist() == reply.tokens.tolist()
        home, places = torch.where(at_home == k)
        assert mine[int(home[0])] == reply.row
        assert places.tolist() == list(range(reply.at, reply.at + len(reply.tokens)))
    assert set(at_home.unique().tolist()) <= set(number.unique().tolist()) | {0}
    if n > 1 and n_rows:
        assert (number > 0).any()


def test_the_relevance_loss_is_a_hinge_per_token():
    own, wrong, lengths = torch.tensor([2.0, 6.0, 1.0]), torch.tensor([4.0, 6.5, 9.0]), torch.tensor([2.0, 4.0, 1.0])
    expected = 2 * (1.5 - 1) + 4 * (1.5 - 0.125) + 0
    assert float(finetune.relevance_loss(own, wrong, lengths, 1.5)) == pytest.approx(expected)


def test_relevance_accuracy_equals_scoring_each_reply_alone(tune, chat_data):
    out = tune(still=False)
    model, tokenizer, _ = run.load_checkpoint(out / "best.pt")
    model = model.double()
    (source,), (bos, assistant, eos) = sources_of(chat_data), framing(tokenizer)

    # the first reply of the first chat, the second one of the second, ...
    text, pairs = source.val.tolist(), []
    begins = [i for i, token in enumerate(text) if token == bos] + [len(text)]
    for k, (a, b) in enumerate(zip(begins, begins[1:])):
        chat = text[a:b]
        opened = [i for i, token in enumerate(chat) if token == assistant]
        first = opened[k % len(opened)] + 1
        end = chat.index(eos, first) + 1
        pairs.append((chat[:first], chat[first:end]))

    n, right, gap = len(pairs), 0, 0.0
    for i, (context, reply) in enumerate(pairs):
        other = pairs[(i + n // 2) % n][0]
        room = 129 - len(reply)  # of a row of 128
        own, wrong = (sum(plain_losses(model, c[-room:] + reply, len(c[-room:]))) for c in (context, other))
        right, gap = right + (own < wrong), gap + (wrong - own) / len(reply)
    got = finetune.relevance(model, [source], 0, 128, 4, CPU, bos, ALONE)
    assert got == pytest.approx((right / n, gap / n), abs=1e-5) and 0 < right < n


# ---------------------------------------------------------------------------------------------------- packed chats

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changing_one_chat_of_a_row_leaves_the_others_logits_alone(name, chat_data):
    module, tiny = ARCHITECTURES[name].module, ARCHITECTURES[name].tiny
    shape = {**tiny, "vocab_size": 600, "context_length": 128}
    model = randomised(module.Model(module.Config(**shape))).eval()
    loader = Loader(sources_of(chat_data), "random", 96, 10, 0, frame=(1, 2))
    row = next(row for row in loader.next_rows(50) if len(row[1]) >= 3)
    x, y, reset = loader.tensors([row])
    a, b, *after = torch.where(reset[0])[0].tolist()[1:]
    c = after[0] if after else None
    changed = x.clone()
    changed[0, a + 1:b] = (x[0, a + 1:b] + 7) % 600
    with torch.no_grad():
        before, after = (model(t, all_logits=True, reset=reset)[0][0] for t in (x, changed))
        alone = model(x[:, b:c], all_logits=True)[0][0]
    same = [i for i in range(96) if not a <= i < b]
    assert torch.equal(before[same], after[same]) and not torch.equal(before[a + 2:b], after[a + 2:b])
    assert (before[b:b + len(alone)] - alone).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------- whole runs

@pytest.mark.pictures
def test_a_tuned_run_reports_replies_base_and_relevance_side_by_side(tune, capsys):
    out = tune("--sample_tokens=8", "--max_steps=4", still=False)
    shown, val = capsys.readouterr().out, evaluations(out)
    assert [row["step"] for row in val] == [0, 2, 4] and list(val[0]["val_loss"]) == ["raw"] and rows(out)[-1]["final"]
    for row in [*val, rows(out)[-1]]:
        for kind, loss in row["val_loss"].items():
            assert 0 <= row["relevance_accuracy"][kind] <= 1 and loss["base"] > 0
    assert all("relevance_loss" in row for row in step_rows(out))

    for part in ("eval      0  replies", "  base ", "likelier under their own prompt", "15% of the rows, replayed",
                 "sample       user: ", "             assistant: ", "--chat"):
        assert part in shown
    best = json.loads((out / "best_validation.json").read_text())
    winner = next(row for row in val if row["step"] == best["step"])
    assert best["val_loss_base"] == winner["val_loss"][best["weights"]]["base"]
    assert best["relevance_accuracy"] == winner["relevance_accuracy"][best["weights"]]
    assert best["step"] > 0 and (out / "loss.png").stat().st_size > 10_000


def test_the_loss_of_the_replies_is_that_of_their_tokens_alone(tune, trained, chat_data):
    """A long chat is cut into pieces of a row; in each piece, what the assistant says is measured."""
    model, *_ = run.load_checkpoint(trained / "best.pt")
    model, (chats,) = model.double(), sources_of(chat_data)
    total, n = 0.0, 0
    edges = document_edges(chats.val, 1)
    for a, b in zip(edges, edges[1:]):
        chat = chats.val[a:b].tolist()
        for start in range(0, len(chat) - 1, 64):
            for i, loss in enumerate(plain_losses(model, chat[start:start + 65], 1)):
                if chats.val_mask[a + start + i + 1]:
                    total, n = total + loss, n + 1
    out = tune("--eval_tokens=0", "--final_eval_tokens=0", "--max_steps=1")
    for row in [*evaluations(out), rows(out)[-1]]:
        for loss in row["val_loss"].values():
            assert loss["mixed"] == pytest.approx(total / n, abs=1e-4)
    assert settings_of(out).base_data == "pydocs-hybrid"


def test_beside_other_text_it_is_replies_that_count(tune, chat_data, capsys):
    """In what is called the loss of the replies, by which the best step is chosen; the text has a line of its own."""
    out = tune(f"--data={chat_data},pydocs-hybrid", "--base_data=", "--replay=0", "--max_steps=1")
    val = evaluations(out)[0]["val_loss"]["raw"]
    assert val["mixed"] == val["source"]["chats"] != val["source"]["pydocs"] and "base" not in val
    assert "all replies" in capsys.readouterr().out


def test_rows_without_a_reply_to_validate_on_are_no_measure(tune, chat_data, workdir):
    long = [dict(instruction=f"{i} {' '.join(WORDS * 40)}", output="yes") for i in range(40)]
    prepare_chats(workdir, "long", long, f"{chat_data}/tokenizer.json", val_fraction=0.2)
    line = "no reply is in the validation rows that --eval_tokens=64 takes; raise it, or the length of the rows"
    with pytest.raises(UserError, match=line):
        tune(f"--data={workdir}/long", "--eval_tokens=64")


def test_two_chats_are_enough(tune, chat_data, workdir, capsys):
    """One to train on, one to validate with. There is none to compare it with, and no time to warm up."""
    few = prepare_chats(workdir, "few", made_up_chats(2, 3), f"{chat_data}/tokenizer.json", val_fraction=0.005)
    out = tune(f"--data={few}", "--epochs=3", "--warmup_steps=10", "--relevance=0.5", still=False)
    shown, s = capsys.readouterr().out, settings_of(out)
    assert "nan" not in shown and "likelier" not in shown and s.warmup_steps == 10  # as asked
    assert finetune.main([f"--init_from={s.init_from}", f"--data={few}", "--base_data=", "--replay=0", "--epochs=3",
                          "--block_size=128", "--batch_tokens=512", "--sample_tokens=0", "--compile=off",
                          "--out=few_steps"]) == 0
    assert settings_of(workdir / "few_steps").warmup_steps == 0


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
    assert run.read_checkpoint(parts / "ckpt.pt")["step"] == 3 and signal.getsignal(signal.SIGTERM) == handler
    assert finetune.main(["--resume", f"--out={parts}"]) == 0
    a, b = (run.read_checkpoint(out / "ckpt.pt") for out in (whole, parts))
    for key in ("model", "ema", "optimizer", "loader", "step", "tokens"):
        assert same_tensors(a[key], b[key]), key
    assert a["step"] > 4 and timeless(whole) == timeless(parts)


# --------------------------------------------------------------------------------------------------- which run is meant

COMMON = ["--compile=off", "--device=cpu", "--dtype=float32", "--eval_tokens=256", "--final_eval_tokens=256",
          "--sample_tokens=0", "--batch_tokens=2048"]
SHAPE = ["--vocab_size=600", "--n_layer=1", "--d_model=32", "--context_length=128", "--n_head=2"]
SHAPES = {"ivme": [*SHAPE, "--n_kv_head=1", "--d_ff=48"], "gpt2preln": SHAPE,
          "i3": [*SHAPE, "--d_state=4", "--delta_rank=4", "--ffn_rank=8", "--head_rank=8"]}


def make_parent(model):
    """The folder parent: a run of any architecture on data/pydocs-hybrid. Returns its settings."""
    assert train.main([f"--model={model}", "--data=data/pydocs-hybrid", *SHAPES[model], *COMMON, "--block_size=64",
                       "--max_steps=2", "--out=parent"]) == 0
    return run.read_checkpoint("parent/best.pt")["train"]


@pytest.mark.parametrize("model", SHAPES)
def test_init_from_and_a_set_of_chats_is_all_that_tuning_needs(model, chat_data, workdir, capsys):
    """Any architecture; rows hold whole chats, replies count, it is short and gentle, in a folder of its own."""
    parent, out = make_parent(model), workdir / f"out/{model}-sft"
    given = ["--init_from=parent/best.pt", f"--data={chat_data}"]
    plan = tuning_plan(*given)
    card = pretraining_plan(f"--model={model}").settings
    assert plan.settings.batch_tokens == min(32_768, card.batch_tokens)  # a card's million would be half a set
    capsys.readouterr()
    assert finetune.main([*given, *COMMON, "--block_size=128"]) == 0
    s, shown = settings_of(out), capsys.readouterr().out
    assert (s.loss_on, s.pack, s.base_data) == ("responses", "document", "data/pydocs-hybrid")
    assert s.warmup_steps <= s.max_steps // 10
    assert s.lr == 0.25 * parent["lr"] and s.muon_lr == 0.25 * parent["muon_lr"] and f"lr {s.lr:g}" in shown
    loader = Loader(sources_of(chat_data), "random", 128, 1, s.seed, (1, 2))
    assert s.max_steps == math.ceil(3 * loader.per_epoch[0] / 16)
    before, *_, after = (row["val_loss"] for row in evaluations(out))
    assert "base" in before["raw"] and after["raw"]["mixed"] < before["raw"]["mixed"]


@pytest.mark.parametrize("lengths, asked", [((200, 200, 3), 3), ((200, 200), 0), ((5, 3), 5)])
def test_a_sample_is_asked_the_first_question_that_fits_into_a_row(lengths, asked):
    bos, eos, assistant, word = 1, 2, 5, 9
    tokens = [token for n in lengths for token in (bos, *[word] * n, assistant, 8, eos)]
    task = types.SimpleNamespace(T=64, bos=bos, eos=eos, measured_sources=lambda: [FakeSource([0], val=tokens)])
    question = finetune.FineTuning.first_question(task, assistant)
    assert question == ([bos, *[word] * asked, assistant] if asked else [])


def test_what_is_typed_goes_before_what_is_gentle(chat_data, workdir):
    make_parent("ivme")
    given = ["--init_from=parent/best.pt", f"--data={chat_data}", *COMMON, "--block_size=128"]
    gentle = tuning_plan(*given).settings
    plan = tuning_plan(*given, "--lr=0.5", "--epochs=0.5", "--pack=stream", "--schedule=cosine")
    assert (plan.settings.lr, plan.settings.pack, plan.settings.schedule) == (0.5, "stream", "cosine")
    assert plan.settings.muon_lr == gentle.muon_lr

    # half a pass over the chats
    assert finetune.main([*given, "--lr=0.5", "--epochs=0.5", "--out=half"]) == 0
    loader = Loader(sources_of(chat_data), "random", 128, 1, gentle.seed, (1, 2))
    s = settings_of(workdir / "half")
    assert s.lr == 0.5 and s.max_steps == math.ceil(0.5 * loader.per_epoch[0] / 16)

    # all that is said counts, and it is as gentle
    assert finetune.main([*given, "--loss_on=all", "--max_steps=1", "--out=all"]) == 0
    s = settings_of(workdir / "all")
    assert (s.loss_on, s.pack, s.lr, s.base_data) == ("all", "document", gentle.lr, "")
    assert "base" not in evaluations(workdir / "all")[-1]["val_loss"]["raw"]


def test_the_same_command_again_is_told_how_to_go_on_and_that_changes_nothing(chat_data, workdir):
    make_parent("ivme")
    given = ["--init_from=parent/best.pt", f"--data={chat_data}", *COMMON, "--block_size=128", "--max_steps=2"]
    assert finetune.main(given) == 0
    with pytest.raises(UserError, match="--resume --out=out/ivme-sft goes on"):
        finetune.main(given)
    with pytest.raises(UserError, match="the run in parent starts from random weights"):
        train.main(["--resume", "--init_from=parent/best.pt", "--out=parent"])
    config = workdir / "out/ivme-sft/config.json"
    before = config.read_text()
    assert finetune.main(["--resume", "--out=out/ivme-sft"]) == 0  # done already; nothing becomes gentler once more
    assert config.read_text() == before


@pytest.mark.parametrize("block, batch, small", [(2500, 240_000, 20_000), (512, 4096, 4096), (1024, 2 ** 20, 32_768),
                                                 (40_000, 80_000, 40_000), (1024, 24_000, 16_384)])
def test_a_tuning_step_is_the_recipes_or_a_power_of_two_of_rows(block, batch, small):
    assert finetune.gentler(Settings(block_size=block, batch_tokens=batch), set()).batch_tokens == small


# ---------------------------------------------------------------------------------------------------- two processes

# finetune.py, and again with what follows "and"; a second process group in one process would not find its peers
TWICE = """
import sys, torch.distributed as dist, finetune
at, end = sys.argv.index("and"), dist.destroy_process_group
dist.destroy_process_group = lambda: None
finetune.main(sys.argv[1:at])
dist.init_process_group = lambda *args, **kw: None
finetune.main(sys.argv[1:at] + sys.argv[at + 1:])
end()
"""


@pytest.mark.slow
def test_two_processes_tune_as_one_does(tune, chat_data, workdir):
    """Losses, gradients and every figure of the validation are those of one process.

    In a second run there is relevance, whose pairs are each process's own.
    """
    alone = tune("--response_start_weight=3", "--replay=0.3", "--relevance=0", "--micro_batch=2", "--max_steps=3",
                 "--eval_every=1", still=False)
    s = run.read_checkpoint(alone / "ckpt.pt")["train"]
    left_out = ("resume", "overwrite", "decay_only", "out", "epochs", "sample_prompt")
    words = [f"--{name}={value}" for name, value in s.items() if name not in left_out]
    done = together(2, "-c", TWICE, *words, "--out=two", "and", "--out=pairs", "--relevance=0.5",
                    "--relevance_margin=0.4", "--lr=0", "--muon_lr=0")
    assert all(status == 0 for status, *_ in done), done

    for a, b in zip(rows(alone), rows("two"), strict=True):
        if "train_loss" in a:
            for name, off in (("train_loss", 1e-4), ("grad_norm", 1e-3), ("train_bits_per_byte", 1e-4)):
                assert a[name] == pytest.approx(b[name], abs=off), name
            continue
        assert a["relevance_accuracy"] == b["relevance_accuracy"]
        for kind in a["val_loss"]:
            assert a["relevance_gap"][kind] == pytest.approx(b["relevance_gap"][kind], abs=1e-4)
            for of in ("mixed", "base"):
                assert a["val_loss"][kind][of] == pytest.approx(b["val_loss"][kind][of], abs=1e-4)
    a, b = weights_of(alone), weights_of(workdir / "two")
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)

    s = settings_of(workdir / "pairs")
    expected = reference(workdir / "pairs", chat_data, s.base_data, s, 3, world=2)
    for row, (loss, hinge, _) in zip(step_rows("pairs"), expected, strict=True):
        assert hinge > 0 and row["relevance_loss"] == pytest.approx(hinge, abs=2e-5)
        assert row["train_loss"] == pytest.approx(loss, abs=2e-5)
