"""corpus/loader.py: which tokens make a row, and which row comes next."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from conftest import ALONE, FakeSource
from corpus.loader import Loader, bytes_per_token, document_rows, fill_rows
from corpus.tokenizer import load_tokenizer, token_byte_counts, train_hybrid
from run import find_data

FRAME = (1, 2)  # <|bos|> and <|eos|> of the documents here


def deal(loader, n):
    """The next n rows as (inputs, targets, reset)."""
    return loader.tensors(loader.next_rows(n))


def documents(lengths):
    """Documents of these lengths: (tokens, beginnings). Each begins with 1, and each other token has its own id."""
    tokens = np.arange(1000, 1000 + sum(lengths))
    begins = np.cumsum([0, *lengths[:-1]])
    tokens[begins] = 1
    return tokens, begins


# ---------------------------------------------------------------------------------------------------- windows

@settings(max_examples=60, deadline=None)
@given(size=st.integers(5, 400), T=st.integers(1, 40), seed=st.integers(0, 9))
def test_an_epoch_trains_on_each_token_once(size, T, seed):
    if size < T + 1:
        return
    loader = Loader([FakeSource(range(size))], "random", T, 100, seed)
    per_epoch = (size - 1) // T
    for epoch in range(3):
        targets = deal(loader, per_epoch)[1].flatten().tolist()
        assert len(set(targets)) == len(targets) == per_epoch * T
        if epoch == 0:
            assert sorted(targets) == list(range(1, per_epoch * T + 1))


def test_windows_are_contiguous_and_shuffled_and_the_seed_decides():
    source = FakeSource(range(10_000))
    x, y, reset = deal(Loader([source], "random", 16, 100, seed=1), 300)
    assert (np.diff(x, axis=1) == 1).all() and torch.equal(y, x + 1) and reset is None
    assert not (np.diff(x[:, 0]) > 0).all()
    assert torch.equal(x, deal(Loader([source], "random", 16, 100, seed=1), 300)[0])
    assert not torch.equal(x, deal(Loader([source], "random", 16, 100, seed=2), 300)[0])


def test_later_epochs_cut_the_text_elsewhere():
    loader = Loader([FakeSource(range(1000))], "random", 10, 100, seed=3)
    first, second = (set(deal(loader, 99)[0][:, 0].tolist()) for _ in range(2))
    assert first != second


def test_a_source_shorter_than_a_row_is_an_error_that_names_it():
    with pytest.raises(UserError, match="source tiny has 20 training tokens, fewer than one window of 21"):
        Loader([FakeSource(range(20), name="tiny")], "random", 20, 100, seed=0)


# ---------------------------------------------------------------------------------------------------- orders

SHARES = {"random": (0.1, 0.6, 0.3), "balanced": (1 / 3, 1 / 3, 1 / 3), "sequential": (0.1, 0.6, 0.3)}


@pytest.mark.parametrize("order", SHARES)
def test_each_order_gives_every_source_its_share(order):
    sources = [FakeSource([i] * n) for i, n in enumerate((1000, 6000, 3000))]
    drawn = deal(Loader(sources, order, 10, 900, seed=0), 900)[0][:, 0].numpy()
    for i, share in enumerate(SHARES[order]):
        assert abs((drawn == i).mean() - share) < 0.01
        if order != "sequential":  # and evenly all along
            assert all(abs((drawn[start:start + 90] == i).mean() - share) < 0.04 for start in range(0, 900, 90))
    if order == "sequential":  # one after the other, in the order they were named
        assert (np.diff(drawn) >= 0).all()


def test_sequential_spends_the_whole_run_in_proportion_to_budgets_without_cutting_a_source_off():
    budgets = (710, 160, 235, 395, 80)
    sources = [FakeSource([i] * 5000, budget=budget) for i, budget in enumerate(budgets)]
    drawn = deal(Loader(sources, "sequential", 10, 1447, seed=0), 1447)[0][:, 0]
    assert np.allclose(np.bincount(drawn) / 1447, np.array(budgets) / sum(budgets), atol=1 / 1447)


def test_data_weights_multiply_shares():
    sources = [FakeSource([0] * 1000, weight=3.0), FakeSource([1] * 1000)]
    assert deal(Loader(sources, "random", 10, 0, 0), 400)[0][:, 0].float().mean() == 0.25


@pytest.mark.parametrize("order", ["random", "balanced", "sequential"])
def test_each_order_gives_packed_sources_their_share_of_the_tokens(order):
    """Shares of tokens, not of rows: documents of 60 tokens leave 40 % of a row of 100 empty, those of 5 little."""
    sources = []
    for i, (length, n) in enumerate(((61, 100), (6, 3000), (250, 40), (12, 800))):
        tokens = np.full(length * n, 10 + i)
        tokens[::length] = 1
        sources.append(FakeSource(tokens))
    y = deal(Loader(sources, order, 100, 3000, seed=0, frame=FRAME), 3000)[1]
    drawn = np.array([(y == 10 + i).sum() for i in range(4)])
    share = np.full(4, 0.25)
    if order != "balanced":
        share = np.array([len(source.train) for source in sources]) / sum(len(source.train) for source in sources)
    assert np.allclose(drawn / drawn.sum(), share, rtol=0.01)
    if order == "sequential":
        assert (np.diff(y[:, 0]) >= 0).all()


@pytest.mark.parametrize("pack", ("document", "stream"))
@pytest.mark.parametrize("order", ("balanced", "random", "sequential"))
def test_prepared_languages_and_kinds_are_drawn_as_the_order_says(order, pack, bilingual, monkeypatch):
    monkeypatch.chdir(bilingual)
    sources, _ = find_data("mix-bpe-500", "bpe", 500, ALONE)
    loader = Loader(sources, order, 128, 2000, seed=0, frame=FRAME if pack == "document" else None)
    drawn, turns = np.zeros(4), []
    for source, pieces in loader.next_rows(2000):
        drawn[source] += sum(n for _, n in pieces)
        turns.append(source)
    share = np.full(4, 0.25)
    if order != "balanced":
        share = np.array([len(source.train) for source in sources]) / sum(len(source.train) for source in sources)
    assert np.allclose(drawn / drawn.sum(), share, rtol=0.01)
    assert (turns == sorted(turns)) == (order == "sequential")


# ---------------------------------------------------------------------------------------------------- going on

@pytest.mark.parametrize("total", [1100, 1447, 3000])
def test_a_sequence_whose_run_is_made_shorter_or_longer_goes_on_in_the_turn_where_it_was(total):
    sources = [FakeSource([i] * 5000, budget=budget) for i, budget in enumerate((710, 160, 235, 395, 80))]
    before, after = Loader(sources, "sequential", 10, 1447, 0), Loader(sources, "sequential", 10, total, 0)
    begun = deal(before, 1000)[0][:, 0].tolist()
    after.load_state_dict(before.state_dict())
    left = deal(after, total - 1000)[0][:, 0].tolist()
    whole = deal(before, 447)[0][:, 0].tolist()
    assert begun[-1] == left[0] == 2 and left == sorted(left) and set(left) == {2, 3, 4}
    for i in range(5):  # what was left has its shares
        assert left.count(i) / len(left) == pytest.approx(whole.count(i) / len(whole), abs=0.02)
    if total == 1447:
        assert left == whole


def test_the_loader_goes_on_from_its_counts():
    sources = [FakeSource(range(500)), FakeSource(range(1000, 1300))]
    whole, first, second = (Loader(sources, "random", 7, 500, 5) for _ in range(3))
    everything = deal(whole, 300)[0]
    first.next_rows(137)
    second.load_state_dict(first.state_dict())
    assert torch.equal(deal(second, 163)[0], everything[137:])


def test_a_loader_with_other_rows_goes_on_at_the_same_part_of_the_epoch():
    sources = [FakeSource(range(5001)), FakeSource(range(2001))]
    before = Loader(sources, "random", 10, 0, 5)
    before.next_rows(1050)  # one and a half epochs
    after = Loader(sources, "random", 20, 0, 5)
    after.load_state_dict(before.state_dict())
    assert after.taken == [375, 150]


# ---------------------------------------------------------------------------------------------------- whole documents

@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=40), T=st.integers(1, 30), seed=st.integers(0, 5))
def test_packed_rows_lose_no_token_and_keep_documents_whole(lengths, T, seed):
    tokens, begins = documents(lengths)
    if len(tokens) <= T:
        return
    loader = Loader([FakeSource(tokens)], "random", T, 100, seed, frame=FRAME)
    n_rows = loader.per_epoch[0]
    assert loader.fill[0] == pytest.approx((len(tokens) - len(lengths)) / (n_rows * T))
    for epoch in range(3):
        x, y, reset = deal(loader, n_rows)

        # every token but the first of a document is a target, once
        assert sorted([1] * len(lengths) + y[y >= 0].tolist()) == sorted(tokens.tolist())

        # what reset tells apart are pieces of the text, and padding at the end only
        pieces = []
        for row, targets, starts in zip(x.tolist(), y.tolist(), reset):
            assert starts[0] and targets[0] >= 0
            edges = [*starts.nonzero().flatten().tolist(), T]
            for i, j in zip(edges, edges[1:]):
                if targets[i] == -1:
                    assert j == T and targets[i:] == [-1] * (T - i)
                    continue
                first = targets[i] - 1000 - 1
                assert targets[i:j] == tokens[first + 1:first + 1 + j - i].tolist()
                assert row[i:j] == tokens[first:first + j - i].tolist()
                pieces.append((first, j - i))

        # a short document is one piece, a long one is cut into as few as possible
        pieces.sort()
        for begin, length in zip(begins, lengths):
            own = [(first, n) for first, n in pieces if begin <= first < begin + length]
            assert len(own) == -(-(length - 1) // T) and own[0][0] == begin
            assert sum(n for _, n in own) == length - 1 and sum(n < T for _, n in own) <= 1

        # no two rows would fit into one
        used = sorted((y >= 0).sum(1).tolist())
        assert len(used) < 2 or used[0] + used[1] > T


def test_later_epochs_cut_long_documents_elsewhere_and_mix_the_rows_anew():
    tokens, _ = documents([25] * 40 + [7, 3, 5] * 40)
    loader = Loader([FakeSource(tokens)], "random", 10, 100, 0, frame=FRAME)
    first, second = (deal(loader, loader.per_epoch[0]) for _ in range(2))
    cuts = [set(x[reset & (y >= 0) & (x != 1)].tolist()) for x, y, reset in (first, second)]
    assert cuts[0] != cuts[1] and len(cuts[0]) == len(cuts[1])
    assert {tuple(row) for row in first[1].tolist()} != {tuple(row) for row in second[1].tolist()}


def test_packing_documents_of_real_lengths_leaves_little_padding():
    # a median of 150 tokens, as web pages have, and some of thousands
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 5000).astype(int) + 2
    first, pieces = document_rows(np.concatenate([[0], np.cumsum(lengths)]), 1024)
    assert 1 - pieces[:, 1].sum() / (1024 * (len(first) - 1)) < 0.002
    assert pieces[:, 1].sum() == (lengths - 1).sum()


# ---------------------------------------------------------------------------------------------------- validation rows

@pytest.mark.parametrize("frame", [None, FRAME], ids=["windows", "documents"])
def test_validation_rows_are_spread_evenly_and_all_of_them_hold_each_target_once(frame):
    tokens, _ = documents([37] * 60 + [5] * 100)
    source, T = FakeSource([0], val=tokens), 16

    def targets(rows):
        y = fill_rows(tokens, rows, T)[1]
        return y[y >= 0].tolist()

    everything, is_all = source.spread_rows(0, T, frame)
    expected = tokens[1:] if frame is None else tokens[tokens != 1]
    assert is_all and sorted(targets(everything)) == sorted(expected.tolist())
    assert source.validation_rows(T, frame)[1] == len(expected)

    some, is_all = source.spread_rows(400, T, frame)
    assert not is_all and abs(len(targets(some)) - 400) <= T
    places = [everything.index(row) for row in some]
    assert set(np.diff(places)) <= {len(everything) // len(some), len(everything) // len(some) + 1}
    assert some == source.spread_rows(400, T, frame)[0]  # the same every time
    assert source.spread_rows(10 ** 6, T, frame) == (everything, True)


# ---------------------------------------------------------------------------------------------------- bytes

def test_bytes_per_token_are_whole_numbers_for_our_own_tokenizers(bilingual, monkeypatch):
    monkeypatch.chdir(bilingual)
    sources, text = find_data("mix-bpe-500", "bpe", 500, ALONE)
    tokenizer = load_tokenizer(text)
    counts = bytes_per_token(tokenizer, sources)
    assert counts.dtype == torch.float64 and (counts.numpy() == token_byte_counts(tokenizer)).all()
    for source in sources:
        assert counts.numpy()[source.val].sum() == source.entries[1]["bytes"]


def test_bytes_per_token_are_scaled_to_what_meta_json_counted():
    """Of all sources together; those that need no scale do not count."""
    tokenizer = load_tokenizer(train_hybrid(["a few words"], 280).to_str())
    sources = [FakeSource([1, 2]), FakeSource([3])]
    sources[0].entries = [dict(bytes=120, unknown_bytes=20, token_bytes=80),
                          dict(bytes=30, unknown_bytes=0, token_bytes=20)]
    sources[1].entries = [dict(bytes=7), dict(bytes=9)]
    assert np.allclose(bytes_per_token(tokenizer, sources), token_byte_counts(tokenizer) * 1.3)
