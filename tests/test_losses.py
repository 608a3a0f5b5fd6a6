"""evaluation/losses.py: strided windows count every target once, and the losses are those of a loop over them."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

import objective
from architectures import tiny
from conftest import ALONE, CPU, FakeSource
from evaluation.losses import by_position, draw_positions, measure, strided_rows, windows_of

BOS, EOS, T = 0, 1, 16
BYTES = torch.arange(100).float() % 5  # UTF-8 bytes behind each token


@given(st.integers(0, 90), st.integers(0, 200), st.integers(1, 40), st.data())
def test_each_target_counts_once_and_has_the_context_that_the_stride_promises(begin, length, T, data):
    stride = data.draw(st.integers(1, T))
    counted = []
    for first, n, before in strided_rows(begin, begin + length, T, stride):
        assert 0 <= before < n <= T and begin <= first and first + n < begin + length
        for target in range(first + before + 1, first + n + 1):
            counted.append(target)
            assert target - first >= min(target - begin, T - stride + 1)
    assert counted == list(range(begin + 1, begin + length))


@pytest.fixture(scope="module")
def model():
    return tiny("ivme", vocab_size=100, context_length=2 * T)


@pytest.fixture(scope="module")
def sources():
    """Documents of 3 to 62 tokens, one text much longer than the other."""
    g = torch.Generator().manual_seed(0)

    def text(lengths):
        return [token for n in lengths for token in (BOS, *torch.randint(2, 100, (n,), generator=g).tolist(), EOS)]

    long, short = text([1, 60, 20, 7, 33]), text([9, 4])
    found = [FakeSource([], budget=1, val=long, name="long"), FakeSource([], budget=1, val=short, name="short")]
    found[1].language, found[1].kind = "it", "books"
    return found


def losses_of(model, val, windows):
    """Nats of the counted targets, one forward pass for each: [(target's token, nats), ...]."""
    found = []
    for first, n, before in windows:
        for position in range(before, n):
            idx = torch.tensor([val[first:first + position + 1].tolist()])
            logits = model(idx)[0][0, -1].double()
            target = int(val[first + position + 1])
            found.append((target, -float(logits.log_softmax(-1)[target])))
    return found


@pytest.mark.parametrize("frame", [None, (BOS, EOS)], ids=["stream", "documents"])
@torch.no_grad()
def test_losses_are_those_of_a_loop_over_the_targets(model, sources, frame):
    result = measure(model, sources, CPU, BYTES, ALONE, T, 5, n_rows=3, frame=frame)
    means, per_byte = [], []
    for source in sources:
        found = losses_of(model, source.val, windows_of(source, T, 5, frame))
        documents = 5 if source.name == "long" else 2
        assert len(found) == len(source.val) - (1 if frame is None else documents)
        mean = sum(nats for _, nats in found) / len(found)
        n_bytes = sum(float(BYTES[token]) for token, _ in found) / len(found)
        assert result["loss"]["source"][source.name] == pytest.approx(mean, abs=1e-5)
        assert result["bits_per_byte"]["source"][source.name] == pytest.approx(mean / math.log(2) / n_bytes, abs=1e-5)
        means.append(mean)
        per_byte.append(n_bytes)

    # each source has the same share of the mixed loss, however short it is
    assert result["loss"]["mixed"] == pytest.approx(sum(means) / 2, abs=1e-5)
    assert result["bits_per_byte"]["mixed"] == pytest.approx(sum(means) / math.log(2) / sum(per_byte), abs=1e-5)
    loss, of_source = result["loss"], result["loss"]["source"]
    assert loss["language"] == {"en": of_source["long"], "it": of_source["short"]}
    assert loss["kind"] == {"books": of_source["short"], "code": of_source["long"]}


@pytest.mark.parametrize("frame", [None, (BOS, EOS)], ids=["stream", "documents"])
def test_a_stride_of_a_whole_window_gives_what_a_run_measures(model, sources, frame):
    ours = measure(model, sources, CPU, BYTES, ALONE, T, T, n_rows=3, frame=frame)
    runs = objective.evaluate(model, sources, 0, T, 4, CPU, BYTES, ALONE, frame)
    for name in ("loss", "bits_per_byte"):
        for group in ("mixed", "language", "source"):
            assert ours[name][group] == pytest.approx(runs[name][group], abs=1e-5)


def test_a_part_of_the_text_is_spread_over_all_of_it(sources):
    whole, some = (windows_of(sources[0], T, 5, tokens=tokens) for tokens in (0, 30))
    assert set(some) < set(whole) and 30 <= sum(n - before for _, n, before in some) < 60
    assert some[0] == whole[0] and some[-1][0] > len(sources[0].val) / 2
    assert windows_of(FakeSource([], budget=1, val=[]), T, 5) == []


@torch.no_grad()
def test_the_loss_at_each_position_is_that_of_a_loop(model, sources):
    curves = by_position(model, sources, CPU, T, 3)
    for source, curve in zip(sources, curves):
        sums, counts = [0.0] * T, [0] * T
        for window in windows_of(source, T, T):
            for position, (_, nats) in enumerate(losses_of(model, source.val, [window])):
                sums[position], counts[position] = sums[position] + nats, counts[position] + 1
        expected = [total / n if n else math.nan for total, n in zip(sums, counts)]
        assert curve.tolist() == pytest.approx(expected, abs=1e-5, nan_ok=True)

    # documents by themselves: late positions are those of long documents, and of none if none is that long
    curves = by_position(model, sources, CPU, 2 * T, 3, frame=(BOS, EOS))
    assert curves[0].isfinite().all() and curves[1, :10].isfinite().all() and curves[1, 10:].isnan().all()


def test_the_picture_shows_a_curve_for_each_source(tmp_path, sources):
    curves = torch.linspace(5, 3, 64).repeat(2, 1).double()
    curves[1, 20:] = math.nan
    draw_positions(curves, sources, tmp_path / "p.png", 32, "a title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
