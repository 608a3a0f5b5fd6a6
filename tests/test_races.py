"""races/: verdicts that noise does not earn, losses document by document, and experiments that can be stopped."""
import json
import math
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import objective
import race
import run
import train
from common import UserError
from conftest import CPU, ROOT, SMALL
from corpus.loader import bytes_per_token
from machine import World
from races import architectures, nanogpt, recipe, runs, tables, variants
from races.verdicts import Measured, compare


# ---------------------------------------------------------------------------------------------------- verdicts

def measured(rng, shift, seed_noise, seeds=3, documents=20):
    """Runs of one kind: their documents differ much, and seeds by noise of that size, in bits per byte."""
    n_bytes = 1000 * np.arange(1, documents + 1)
    found = []
    for _ in range(seeds):
        bits = 2 + shift + np.sin(np.arange(documents)) + rng.normal(0, seed_noise) + rng.normal(0, 0.01, documents)
        found.append(Measured((bits * n_bytes * math.log(2)).tolist(), n_bytes.tolist()))
    return found


@given(st.integers(0, 10 ** 6), st.floats(-0.5, 0.5), st.integers(1, 4))
def test_a_verdict_is_on_the_mean_difference_and_turns_round_with_the_pair(seed, shift, seeds):
    rng = np.random.default_rng(seed)
    a, b = measured(rng, shift, 0.01, seeds), measured(rng, 0, 0.01, seeds)
    verdict, other = compare(a, b), compare(b, a)
    mean = sum(one.bits_per_byte - two.bits_per_byte for one, two in zip(a, b)) / seeds
    assert verdict.difference == pytest.approx(mean) and other.difference == pytest.approx(-mean)
    assert verdict.low <= mean <= verdict.high
    assert (other.low, other.high) == pytest.approx((-verdict.high, -verdict.low))
    opposite = dict(better="worse", worse="better", tie="tie") | {"one seed": "one seed"}
    assert other.word == opposite[verdict.word] and (verdict.word == "one seed") == (seeds == 1)


def test_the_interval_holds_what_seeds_and_documents_do():
    rng = np.random.default_rng(0)
    a, b = measured(rng, 0.02, 0.02, documents=8), measured(rng, 0, 0.02, documents=8)
    draws = []
    for _ in range(3000):  # one draw at a time
        documents, difference = rng.integers(8, size=8), 0
        for sign, kind in ((1, a), (-1, b)):
            nats, n_bytes = (sum(values[d] for one in kind for d in documents for values in (getattr(one, name),))
                             for name in ("nats", "bytes"))
            difference += sign * nats / math.log(2) / n_bytes
        draws.append(difference)
    verdict = compare(a, b)
    each = np.array([one.bits_per_byte - two.bits_per_byte for one, two in zip(a, b)])
    half = math.hypot(4.303 * each.std(ddof=1) / math.sqrt(3), 1.96 * np.std(draws))
    assert (verdict.high - verdict.low) / 2 == pytest.approx(half, rel=0.02)


def test_noise_alone_seldom_earns_a_verdict_and_a_clear_difference_always():
    rng = np.random.default_rng(1)
    words = [compare(measured(rng, 0, 0.01), measured(rng, 0, 0.01)).word for _ in range(200)]
    assert words.count("tie") >= 185  # 190 are expected, a little more because of the documents
    assert all(compare(measured(rng, 0.3, 0.01), measured(rng, 0, 0.01)).word == "worse" for _ in range(20))


def one_document(bits):
    """Runs of one kind, one for each figure of bits per byte."""
    return [Measured([math.log(2) * 100 * value], [100]) for value in bits]


def test_more_seeds_sharpen_a_verdict():
    # the mean difference is 0.01, and its standard deviation over the seeds about 0.02
    for seeds, word in ((4, "tie"), (8, "tie"), (40, "worse")):
        bits = [2.01 + 0.02 * (-1) ** seed for seed in range(seeds)]
        assert compare(one_document(bits), one_document([2.0] * seeds)).word == word


@given(st.integers(0, 10 ** 6), st.floats(-0.1, 0.1), st.integers(2, 6))
def test_up_to_six_seeds_a_difference_that_counts_is_larger_than_its_spread(seed, shift, seeds):
    rng = np.random.default_rng(seed)
    a, b = measured(rng, shift, 0.01, seeds), measured(rng, 0, 0.01, seeds)
    each = np.array([one.bits_per_byte - two.bits_per_byte for one, two in zip(a, b)])
    assert compare(a, b).word == "tie" or abs(each.mean()) > each.std(ddof=1)


def test_documents_are_drawn_once_for_all_pairs(monkeypatch):
    calls, rng = [], np.random.default_rng(2)
    kinds = [measured(rng, 0, 0.01, documents=13) for _ in range(4)]  # no other test has 13
    plain = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda *seed: calls.append(seed) or plain(*seed))
    verdicts = [compare(kinds[0], other) for other in kinds[1:]]
    assert len(calls) == 1 and compare(kinds[0], kinds[1]) == verdicts[0]


def test_of_twelve_equally_good_kinds_one_in_ten_is_called_worse_than_the_first():
    words, rng = [], np.random.default_rng(3)
    for _ in range(200):
        kinds = [one_document(2 + rng.normal(0, 0.01, 3)) for _ in range(12)]
        first = min(kinds, key=lambda kind: sum(one.bits_per_byte for one in kind))
        words += [compare(kind, first).word for kind in kinds if kind is not first]
    assert 0.08 < words.count("worse") / len(words) < 0.12 and "better" not in words


def test_a_table_says_what_diverged_and_what_is_missing():
    done = runs.Result(Measured([math.log(2) * 300], [100]), [], 1.0, 1.0)
    bad = runs.Result(None, [], 1.0, 1.0, "the gradient is not finite")
    assert tables.mean_and_spread([done, done]) == "3.000 ± 0.000" and tables.mean([done, done]) == 3
    assert tables.mean_and_spread([done, bad]) == "1 of 2 diverged" and tables.mean([done, bad]) == math.inf
    assert tables.mean_and_spread([bad, None, None]) == "1 of 3 diverged, 2 of 3 unfinished"
    assert tables.verdict_cells([done, bad], [done, done]) == ["", "", ""]
    for n_bytes, word in (([100, 200], "other text"), ([60], "other text"), ([100], "one seed")):
        other = runs.Result(Measured([math.log(2) * 2 * n for n in n_bytes], n_bytes), [], 1.0, 1.0)
        assert tables.verdict_cells([done], [other]) == ["+1.000", "", word]
    assert tables.markdown([("a", "b"), ("1", "")]).splitlines() == ["| a | b |", "|---|---|", "| 1 |  |"]


# ---------------------------------------------------------------------------------------------------- losses

def test_losses_of_documents_are_those_of_their_own_tokens_and_add_up_to_trains(trained, workdir):
    model, tokenizer, checkpoint = run.load_checkpoint(trained / "best.pt")
    sources, _ = run.find_data("data/two-hybrid", "hybrid", model.cfg.vocab_size, World(), checkpoint["tokenizer"])
    T, source = 32, sources[0]
    found = runs.document_losses(model, source, tokenizer, T, 4, CPU)

    n_bytes = bytes_per_token(tokenizer, [source])
    whole = objective.evaluate(model, [source], 0, T, 4, CPU, n_bytes, World())
    assert found.bits_per_byte == pytest.approx(whole["bits_per_byte"]["mixed"], rel=1e-5)

    # token by token
    bos, text = tokenizer.token_to_id("<|bos|>"), torch.tensor(source.val.astype(np.int64))
    document, nats, in_bytes = -1, {}, {}
    for first in range(0, len(text) - 1, T):
        window = text[first:first + T + 1]
        with torch.no_grad():
            losses = model(window[None, :-1], window[None, 1:], reduction="none")[1][0]
        for token, loss in zip(window[1:].tolist(), losses.tolist()):
            document += token == bos
            nats[document] = nats.get(document, 0) + loss
            in_bytes[document] = in_bytes.get(document, 0) + float(n_bytes[token])
    assert len(nats) > 0
    order = sorted(nats)
    assert found.nats == pytest.approx([nats[k] for k in order], rel=1e-4)
    assert found.bytes == pytest.approx([in_bytes[k] for k in order])


# ---------------------------------------------------------------------------------------------------- variants

def matrix(shape=(6, 4)):
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(shape))


def steps_of(kind, p, rates=(0.1, 0.1, 0.05), decay=0.1):
    """The matrix after steps of an optimizer from gradients that depend on the step alone."""
    optimizer = kind([("w", p, None)], decay, torch.float32)
    for i, rate in enumerate(rates):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step(rate)
    return p.detach()


def test_polar_express_comes_nearer_to_orthogonal_than_one_quintic_does():
    torch.manual_seed(0)
    stack = torch.randn(8, 32, 64)
    far = [float((torch.linalg.svdvals(train.orthogonalize(stack, torch.float32, quintics)) - 1).abs().max())
           for quintics in (train.NEWTON_SCHULZ, variants.POLAR_EXPRESS)]
    assert far[1] < 0.15 < 0.25 < far[0]


def test_normuon_divides_rows_by_their_moving_mean_square_and_keeps_the_norm():
    p, reference = matrix(), matrix().detach()
    m, v = torch.zeros_like(reference), torch.zeros(6, 1)
    for i, rate in enumerate((0.1, 0.1, 0.05)):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        m = 0.95 * m + 0.05 * g
        u = train.orthogonalize((0.05 * g + 0.95 * m)[None], torch.float32)[0]
        v = 0.95 * v + 0.05 * torch.stack([(row ** 2).mean() for row in u])[:, None]
        scaled = u / v.sqrt()
        scaled *= u.norm() / scaled.norm()
        reference = reference * (1 - rate * 0.1) - rate * (6 / 4) ** 0.5 * scaled
    assert torch.allclose(steps_of(variants.NorMuon, p), reference, atol=1e-5)


def test_cautious_decay_touches_only_what_the_update_makes_smaller():
    plain = steps_of(train.Muon, matrix(), rates=(0.1,), decay=0.0)
    old, found = matrix().detach(), steps_of(variants.CautiousDecay, matrix(), rates=(0.1,), decay=0.5)
    for w, p, f in zip(old.flatten().tolist(), plain.flatten().tolist(), found.flatten().tolist()):
        agree = (p - w) * w < 0
        assert f == pytest.approx(p - 0.1 * 0.5 * w if agree else p, abs=1e-6)
    assert 0 < int(((plain - old) * old < 0).sum()) < old.numel()


def test_falling_decay_is_muon_whose_decay_follows_the_rate():
    plain = [steps_of(train.Muon, matrix(), rates=rates) for rates in ((0.1, 0.1),)]
    assert torch.equal(steps_of(variants.FallingDecay, matrix(), rates=(0.1, 0.1)), plain[0])
    reference, optimizer = matrix(), None
    optimizer = train.Muon([("w", reference, None)], 0.1, torch.float32)
    for i, (rate, decay) in enumerate(((0.1, 0.1), (0.05, 0.05), (0.025, 0.025))):
        reference.grad = torch.randn(reference.shape, generator=torch.Generator().manual_seed(i))
        optimizer.weight_decay = decay
        optimizer.step(rate)
    assert torch.allclose(steps_of(variants.FallingDecay, matrix(), rates=(0.1, 0.05, 0.025)), reference.detach())


def test_ema_nesterov_steps_from_the_point_ahead_and_ends_at_the_weights(monkeypatch):
    reference, ahead = matrix(), matrix()
    optimizer = train.Muon([("w", ahead, None)], 0.1, torch.float32)
    average, last = torch.zeros(6, 4), reference.detach().clone()
    for i, rate in enumerate((0.1, 0.1, 0.1, 0.05)):
        ahead.grad = torch.randn(ahead.shape, generator=torch.Generator().manual_seed(i))
        optimizer.step(rate)
        new = ahead.detach().clone()
        average, last = 0.99 * average + 0.01 * (new - last), new
        if i in (1, 2):  # at the peak rate, which it knows from the second step on
            with torch.no_grad():
                ahead += 10 * average
    found = steps_of(variants.EMANesterov, matrix(), rates=(0.1, 0.1, 0.1, 0.05))
    assert torch.allclose(found, ahead.detach(), atol=1e-6) and torch.equal(ahead, new)
    monkeypatch.setattr(variants.EMANesterov, "AHEAD", 0.0)
    assert torch.equal(steps_of(variants.EMANesterov, matrix()), steps_of(train.Muon, matrix()))


def test_the_variants_are_there_only_while_they_race():
    before = dict(train.MATRIX_OPTIMIZERS)
    with variants.registered():
        assert set(variants.VARIANTS) < set(train.choices()["optimizer"])
    assert train.MATRIX_OPTIMIZERS == before


# ---------------------------------------------------------------------------------------------------- recipe

@pytest.fixture
def settings(workdir):
    return lambda **more: race.Settings(**dict(out="out/race", device="cpu", dtype="float32") | more)


def test_every_kind_differs_from_the_common_recipe_in_what_it_names(settings):
    with variants.registered():
        plans = {}
        for kind in recipe.KINDS:
            kind = recipe.Kind(kind.name, kind.changes)  # equal bytes would need the data of another tokenizer
            flags = recipe.flags_of(kind, 0, 500_000, None)
            plans[kind.name] = runs.Runs(settings()).plan(*flags)
    common = plans["common recipe"]
    names = [field.name for field in fields(train.Settings)]
    for kind in recipe.KINDS:
        s = plans[kind.name].settings
        tokens = s.max_steps * s.batch_tokens
        assert abs(tokens - 500_000) <= s.batch_tokens / 2
        differs = {name: getattr(s, name) for name in names if getattr(s, name) != getattr(common.settings, name)}
        differs = {name: value for name, value in differs.items()
                   if name not in ("max_steps", "micro_batch", "save_every", "sample_prompt")}
        assert differs == {name: value for name, value in kind.changes.items()
                           if name in names and value != getattr(common.settings, name)}
        assert not kind.against or kind.against in plans
    without = plans["without QK-norm"]
    qk_norm = 2 * common.cfg.n_layer * common.cfg.d_model // common.cfg.n_head
    sizes = [plan.module.Model(plan.cfg).n_params for plan in (common, without)]
    assert sizes[0] - sizes[1] == qk_norm


@pytest.fixture
def small(monkeypatch):
    """Kinds and a model that train in a second."""
    shape = dict(flag[2:].split("=") for flag in SMALL if re.match("--(n_|d_|context)", flag))
    shape |= dict(vocab_size=600, context_length=256, compile="off")
    monkeypatch.setattr(recipe, "DATA", recipe.DATA | shape | dict(tokenizer="hybrid", data="data/pydocs-hybrid"))
    kinds = [recipe.Kind("common recipe"), recipe.Kind("no weight decay", dict(weight_decay=0.0)),
             recipe.Kind("far too fast", dict(muon_lr=1e30))]
    monkeypatch.setattr(recipe, "KINDS", kinds)
    return ["recipe", "--tokens=8192", "--seeds=2", "--val_tokens=2000", "--dtype=float32", "--device=cpu"]


def test_a_race_goes_on_where_it_was_stopped_and_shows_what_diverged(small, workdir, monkeypatch, capsys):
    plain, calls = train.main, []

    def stopped_at_the_third(argv):
        calls.append(argv)
        if len(calls) == 3:
            (workdir / "out/recipe/run/metrics.jsonl").write_text('{"step": 1}\n')  # as Ctrl-C leaves it
            return 0
        return plain(argv)

    with monkeypatch.context() as m:
        m.setattr(train, "main", stopped_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            race.main(small)
    shown = capsys.readouterr().out
    assert "the same command goes on" in shown and re.search(r"common recipe +1 of 2 unfinished", shown)
    assert race.main(small) == 0
    shown = capsys.readouterr().out
    assert "1 of 4" in shown and re.search(r"far too fast +2 of 2 diverged", shown)

    # the same again has nothing left to do, and one seed made anew gives the same figures
    results = workdir / "out/recipe/results.jsonl"
    before = results.read_text()
    assert race.main(small) == 0 and results.read_text() == before
    table = (workdir / "out/recipe/table.md").read_text()
    assert [len(line.split("|")) for line in table.splitlines()] == 5 * [7]
    rows = [json.loads(line) for line in before.splitlines()]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert race.main(small) == 0
    again = json.loads(results.read_text().splitlines()[-1])
    assert again["about"] == rows[0]["about"]
    assert again["result"]["measured"] == rows[0]["result"]["measured"]


def test_dry_tells_how_long_and_trains_nothing(small, workdir, capsys):
    assert race.main([*small, "--dry"]) == 0
    assert re.fullmatch(r"6 runs are to be made, which take about [\d:]+ on this machine\n", capsys.readouterr().out)
    assert not (workdir / "out/recipe/results.jsonl").exists()


# ---------------------------------------------------------------------------------------------------- the code

@pytest.fixture
def edited(monkeypatch):
    """A function that makes a file of the repository, or an absolute path, read as if `more` stood at its end."""
    plain, files = Path.read_text, {}
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **more: plain(path, *args, **more) + files.get(path, ""))

    def edit(name, more):
        files.clear()
        files[ROOT / name] = more
        runs.hash_of.cache_clear()  # as in a new process
    yield edit
    runs.hash_of.cache_clear()


FLAGS = ["--model=ivme", "--data=data/pydocs-hybrid", "--tokenizer=hybrid", "--vocab_size=600"]
CHANGED, EXPLAINED = "\nCHANGED = 1\n", '\n"""A text."""\n# and a comment\n'


def test_a_result_and_a_speed_are_known_by_all_the_code_that_trains_and_measures(settings, edited):
    contest = runs.Runs(settings())

    def keys(*more):
        with variants.registered():
            return contest.about([*FLAGS, *more]), contest.work([*FLAGS, *more])

    before, normuon = keys(), keys("--optimizer=normuon")
    names = ["train.py", "objective.py", "run.py", "machine.py", "minutes.py", "report.py", "ivme.py",
             "corpus/loader.py", "evaluation/losses.py", "races/runs.py", "kernels/training.py",
             "kernels/orthogonalize.py", "kernels/build.py"]
    for name in (*names, "kernels/training.cpp", "kernels/orthogonalize.cpp", "kernels/vectors.h"):
        edited(name, CHANGED)
        assert all(old != new for old, new in zip(before, keys())), name
    for name in names:
        edited(name, EXPLAINED)
        assert keys() == before, name
    for name in ("README.md", "tests/test_races.py", "sample.py", "finetune.py", "i3.py", "races/tables.py",
                 "races/verdicts.py", "kernels/bench.py", "corpus/hub.py"):
        edited(name, CHANGED)
        assert keys() == before, name

    # the variants, where one of them trains
    edited("races/variants.py", CHANGED)
    assert keys() == before and all(old != new for old, new in zip(normuon, keys("--optimizer=normuon")))


def test_nanogpts_results_are_known_by_its_own_code(workdir, edited, monkeypatch):
    folder, keys = workdir / "nanoGPT", []
    folder.mkdir()
    for name in ("train.py", "model.py"):
        (folder / name).write_text("x = 1\n")
    monkeypatch.setattr(nanogpt, "OURS", FLAGS)

    def first_key(out, about, make):
        keys.append(about)
        raise KeyboardInterrupt
    monkeypatch.setattr(nanogpt, "kept", first_key)
    for name in ("README.md", folder / "train.py", folder / "model.py", ROOT / "races/nanogpt.py", ROOT / "train.py"):
        edited(name, CHANGED)
        with pytest.raises(KeyboardInterrupt):
            race.main(["nanogpt", "--nanogpt=nanoGPT", "--device=cpu", "--dtype=float32"])
    assert all(keys[0] != key for key in keys[1:]) and keys[1] != keys[2]

    (folder / "model.py").unlink()
    with pytest.raises(UserError, match="--nanogpt=DIR names the folder"):
        race.main(["nanogpt", "--nanogpt=nanoGPT"])


# ---------------------------------------------------------------------------------------------------- architectures

@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    return architectures.Race(race.Settings(out=str(tmp_path_factory.mktemp("race")), device="cpu", dtype="float32"))


def test_the_architectures_have_one_size(contest):
    for entrant in contest.entrants:
        shape, n_params = contest.shapes[entrant.name]
        assert abs(n_params - 2_000_000) < 60_000
        flags = [f"--{name}={value}" for name, value in shape.items()]
        plan = contest.runs.plan(f"--model={entrant.preset}", *flags, "--block_size=256", "--batch_tokens=2048")
        assert plan.cfg.vocab_size == architectures.VOCAB_SIZE
        with torch.device("meta"):
            assert plan.module.Model(plan.cfg).n_params == n_params
    _, larger = architectures.fitted(architectures.ENTRANTS[0], 20_000_000)
    assert abs(larger - 20_000_000) < 600_000


def test_a_recipe_of_its_own_is_the_presets_and_the_common_one_is_the_same_for_all(contest):
    common = set()
    for entrant in contest.entrants:
        own = contest.runs.plan(*contest.flags(entrant, "own", 1, 500_000, 0)).settings
        preset = contest.runs.plan(f"--model={entrant.preset}").settings
        for name in ("optimizer", "lr", "muon_lr", "weight_decay", "schedule", "ema_beta", "final_lr_fraction"):
            assert getattr(own, name) == getattr(preset, name)
        shared = contest.runs.plan(*contest.flags(entrant, "common", 3, 500_000, 0)).settings
        common.add(tuple(getattr(shared, name) for name in recipe.OPTIMIZER))
        assert own.batch_tokens == shared.batch_tokens == 2048 and own.max_steps == shared.max_steps == 244
    assert len(common) == 1


def test_the_grid_of_rates_goes_on_where_the_best_lies_at_its_edge(contest, monkeypatch):
    wanted = {name: factor for name, factor in zip(
        ((entrant.name, recipe) for entrant, recipe in contest.starters), 2 * [1, 9, 1 / 3, 1 / 27, 27, 3])}

    def results(plan):
        """Each has its lowest loss at the factor that is wanted, and none at all far above it."""
        found = {}
        for _, name, recipe, factor in plan:
            bits = 1 + abs(math.log(factor / wanted[name, recipe]))
            one = Measured([bits * math.log(2)], [1]) if factor < 20 * wanted[name, recipe] else None
            found["tuning", name, recipe, factor] = runs.Result(one, [], 1.0, 1.0)
        return found
    monkeypatch.setattr(contest.runs, "all", results)
    assert contest.best_factors() == pytest.approx(wanted)


def test_the_table_tells_that_its_first_was_chosen_by_the_same_runs(contest, monkeypatch, capsys):
    monkeypatch.setattr(contest.runs, "stopped", True)  # so it measures nothing beside the losses
    monkeypatch.setattr(tables, "draw", lambda *args: None)
    names = [(entrant.name, recipe) for entrant, recipe in contest.starters]
    done = runs.Result(Measured([math.log(2) * 300], [100]), [], 1.0, 1.0)
    results = {(length, *name, seed): done for name in names for seed in (1, 2, 3)
               for length in (architectures.EQUAL_TOKENS, architectures.EQUAL_TIME)}
    architectures.show(contest, dict.fromkeys(names, 1), dict.fromkeys(names, 1000.0), results)
    note = "So an equally good one is called worse more often than once in twenty.\n"
    written = (contest.runs.out / "table.md").read_text()
    assert note in capsys.readouterr().out and written.endswith(note) and "|\n\nA verdict is" in written
    assert note not in (contest.runs.out / "pairs.md").read_text()


@pytest.mark.slow
@pytest.mark.pictures
def test_a_small_race_of_two_architectures_has_a_winner(workdir, monkeypatch, capsys):
    two = [architectures.Entrant("ivme", "ivme", dict(n_head=2, n_kv_head=1)),
           architectures.Entrant("i3", "i3", dict(n_head=2, d_state=4))]
    monkeypatch.setattr(architectures, "ENTRANTS", two)
    monkeypatch.setattr(architectures, "GRID", (0.5, 1))
    monkeypatch.setattr(architectures, "FURTHEST", 1)
    monkeypatch.setattr(architectures, "DATA", recipe.DATA | dict(data="data/pydocs-hybrid"))
    flags = ["architectures", "--size=200K", "--tokens=8192", "--seeds=2", "--val_tokens=2000", "--dtype=float32",
             "--device=cpu"]
    assert race.main([*flags, "--dry"]) == 0
    assert race.main(flags) == 0
    folder = workdir / "out/architectures"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    titles, body = rows[0], rows[2:]
    assert [row[:2] for row in body] == [["ivme", "common"], ["ivme", "own"], ["i3", "common"], ["i3", "own"]]
    for column in [i for i, title in enumerate(titles) if title == "verdict"]:
        words = [row[column] for row in body]
        assert words.count("first") == 1 and set(words) <= {"first", "worse", "tie"}
    assert len((folder / "pairs.md").read_text().splitlines()) == 2 + 4  # two lengths, two recipes, one pair
    assert (folder / "curves.png").stat().st_size > 10_000
    results = (folder / "results.jsonl").read_text()
    assert race.main(flags) == 0 and (folder / "results.jsonl").read_text() == results


# ---------------------------------------------------------------------------------------------------- nanoGPT

MODEL = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = False
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, x, y):
        return self.table(x), None
"""
TRAIN = """
import os, pickle, sys, numpy, torch
from model import GPT, GPTConfig
given = dict(word[2:].split("=") for word in sys.argv[1:])
torch.manual_seed(1337)
data = os.path.join("data", given["dataset"])
vocab_size = pickle.load(open(os.path.join(data, "meta.pkl"), "rb"))["vocab_size"]
for name in ("train", "val"):
    assert numpy.memmap(os.path.join(data, name + ".bin"), dtype=numpy.uint16).max() < vocab_size
args = dict(block_size=int(given["block_size"]), vocab_size=vocab_size)
model = GPT(GPTConfig(**args))
with torch.no_grad():
    model.table.weight.mul_(float(given["learning_rate"]))
for i in range(3):
    print(f"iter {i}: loss 1.0, time 1000.00ms, mfu 1%")
state = {"_orig_mod." + name: w for name, w in model.state_dict().items()}
torch.save(dict(model=state, model_args=args), os.path.join(given["out_dir"], "ckpt.pt"))
"""


@pytest.mark.slow
def test_nanogpts_own_program_is_called_and_measured_as_ours_is(workdir, monkeypatch, capsys):
    folder = workdir / "nanoGPT"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "train.py").write_text(TRAIN)
    monkeypatch.setattr(nanogpt, "OURS", ["--model=tinymemory", "--data=data/pydocs-hybrid"])
    contest = runs.Runs(race.Settings(out="out/nanogpt", device="cpu", dtype="float32", val_tokens=2000))
    theirs = nanogpt.NanoGPT(race.Settings(nanogpt="nanoGPT"), contest, 2_000_000)
    assert theirs.count() == 2111 ** 2 and theirs.shape == dict(n_layer=6, n_head=4, n_embd=152)
    compiled, steps = theirs.steps_in(1)
    assert 40 < steps <= 60  # of a second each, and it takes some time to start

    small, large = (runs.as_result(theirs.result(rate, steps, False, 0)).measured for rate in (1e-3, 1.0))
    other = runs.as_result(theirs.result(1.0, steps, False, 1)).measured
    assert large.nats != other.nats  # another seed
    tokens = sum(small.nats) / math.log(2111)  # nearly the same probability for each of the vocabulary
    assert 1900 <= round(tokens) <= 2500 and sum(large.nats) > sum(small.nats)

    with pytest.raises(UserError, match="--nanogpt=DIR names the folder"):
        race.main(["nanogpt", "--nanogpt=nowhere"])
