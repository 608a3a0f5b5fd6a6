"""report.py: the lines of the log, the tables, best_validation.json and the picture say what was measured."""
import json
import lzma
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import report
from conftest import FakeSource

ROW = dict(step=1200, tokens=9600, train_loss=2.34567, train_bits_per_byte=1.23456, tokens_per_s=12345.6, lr=0.02,
           grad_norm=0.98765, elapsed=60.0)


def result(mixed, languages, sources, base=None):
    """A result of an evaluation, in nats; a token has two bytes here."""
    loss = dict(mixed=mixed, language=languages, source=sources)
    if base is not None:
        loss["base"] = base

    def bits(value):
        if isinstance(value, dict):
            return {name: bits(part) for name, part in value.items()}
        return value / math.log(2) / 2
    return dict(loss=loss, bits_per_byte=bits(loss))


def two_sources():
    sources = [FakeSource([0], name="web"), FakeSource([0], name="libri")]
    sources[1].language, sources[1].kind = "it", "books"
    return sources


RESULT = result(2.0, dict(en=1.5, it=2.5), dict(web=1.5, libri=2.5))


# ---------------------------------------------------------------------------------------------------- the log

def test_the_line_of_a_step_shows_its_numbers_and_the_time_that_is_left():
    assert report.log_line(ROW, 2000, 125) == (
        "step  1,200/2,000  loss 2.346  1.23 bits/byte  12,346 tok/s  02:05 left  lr 0.02  |g| 0.99")
    assert report.log_line(ROW | dict(mfu=0.412), 2000, 125).endswith("|g| 0.99  MFU 41%")


def test_a_number_that_the_log_does_not_know_is_shown_with_its_name():
    assert report.log_line(ROW | dict(spread=0.123456), 2000, 125).endswith("|g| 0.99  spread 0.1235")


def test_an_evaluation_is_one_row_and_one_line():
    ema = result(1.9, dict(en=1.4, it=2.4), dict(web=1.4, libri=2.4))
    row = report.evaluation_row(dict(raw=RESULT, ema=ema), 100, 800, 7.5)
    assert row == dict(step=100, tokens=800, elapsed=7.5, val_loss=dict(raw=RESULT["loss"], ema=ema["loss"]),
                       val_bits_per_byte=dict(raw=RESULT["bits_per_byte"], ema=ema["bits_per_byte"]))
    # with the languages of the weights that won
    assert report.evaluation_line(row, "validation", "ema") == (
        "eval    100  validation 1.443 bits/byte, EMA 1.371  en 1.010  it 1.731")


def test_an_evaluation_of_replies_shows_what_is_forgotten_and_relevance():
    replies = result(2.0, dict(en=2.0), dict(chats=2.0), base=3.0) | dict(relevance_accuracy=0.75, relevance_gap=0.5)
    row = report.evaluation_row(dict(raw=replies), 0, 0, 0.0)
    assert row["relevance_accuracy"] == dict(raw=0.75) and row["relevance_gap"] == dict(raw=0.5)
    assert report.evaluation_line(row, "replies", "raw") == (
        "eval      0  replies 1.443 bits/byte  base 2.164  relevance 75.0%")

    # of fewer than two replies there is no relevance, and JSON knows no NaN
    lonely = replies | dict(relevance_accuracy=math.nan, relevance_gap=math.nan)
    row = report.evaluation_row(dict(raw=lonely), 0, 0, 0.0)
    assert "relevance_accuracy" not in row and "NaN" not in json.dumps(row)
    assert "relevance" not in report.evaluation_line(row, "replies", "raw")


def test_source_lines_tell_each_sources_size_and_share():
    sources = [FakeSource(np.arange(12_000), val=np.arange(600), name="web")]
    loader = SimpleNamespace(sources=sources, share=[1.0], row_share=[1.0], frame=None, per_epoch=[120], fill=[0.97])
    assert report.source_lines(loader) == [
        "web          en/code, 12,000 training and 600 validation tokens, 100% of the run"]
    assert report.source_lines(loader, 0.25)[0].endswith("tokens, 25% of the rows")
    loader.frame = (1, 2)
    assert report.source_lines(loader)[0].endswith("whole documents in 120 rows, 3.00% of them padding")


# ---------------------------------------------------------------------------------------------------- losses

def test_the_table_has_a_line_for_each_source_language_and_all():
    lines = report.loss_table(RESULT, two_sources())
    assert [line.split()[0] for line in lines] == ["web", "libri", "en", "it", "mixed"]
    assert lines[1].split() == "libri it/books loss 2.5000 perplexity 12.2 1.803 bits/byte".split()
    assert len({line.index("bits/byte") for line in lines}) == 1  # the columns are aligned
    alone = result(2.0, dict(en=2.0), dict(web=2.0), base=3.0)
    assert [line.split()[0] for line in report.loss_table(alone, two_sources()[:1])] == ["web", "base"]


def test_best_validation_has_the_names_of_the_card_and_only_finite_numbers():
    found = report.best_validation(RESULT, two_sources(), step=7, weights="ema")
    assert (found["step"], found["weights"], found["val_loss_mixed"], found["val_loss_it"]) == (7, "ema", 2.0, 2.5)
    assert found["ppl_mixed"] == pytest.approx(math.exp(2))
    assert found["bits_per_byte_en"] == pytest.approx(1.5 / math.log(4))
    assert found["sources"]["libri"]["language"] == "it" and found["sources"]["libri"]["val_loss"] == 2.5
    strange = result(math.nan, dict(en=math.inf), dict(web=math.nan))
    text = json.dumps(report.best_validation(strange, two_sources()[:1]))
    assert "NaN" not in text and "Infinity" not in text and '"val_loss_mixed": null' in text


def test_a_huge_loss_has_a_perplexity_that_is_still_a_number():
    assert report.perplexity(2.0) == pytest.approx(math.exp(2)) and report.perplexity(10_000) < math.inf


def test_xz_compresses_the_validation_text_unless_it_is_too_long():
    source = FakeSource([0], val=np.frombuffer(b"what a day it was " * 300, np.uint8))
    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode())
    expected = 8 * len(lzma.compress(source.val.tobytes(), preset=9)) / len(source.val)
    assert report.xz_bits_per_byte([source], tokenizer) == pytest.approx(expected)
    assert report.xz_bits_per_byte([source], tokenizer, limit=100) is None


# ---------------------------------------------------------------------------------------------------- the picture

@pytest.mark.pictures
def test_the_curve_is_drawn_of_what_was_measured(tmp_path, monkeypatch, capsys):
    """The base data may have gone in between; matplotlib need not be there."""
    start = dict(step=0, tokens=0, val_loss={}, val_bits_per_byte=dict(raw=dict(mixed=3.0, base=2.0)))
    later = dict(step=1, tokens=1000, val_loss={}, val_bits_per_byte=dict(raw=dict(mixed=2.0), ema=dict(mixed=2.0)),
                 relevance_accuracy=dict(raw=0.5, ema=0.6))
    rows = [start, later, dict(step=1, tokens=1000, train_loss=1.0, train_bits_per_byte=2.5)]
    report.draw_loss(rows, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "loss.png").stat().st_size > 10_000

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.draw_loss(rows, tmp_path / "again.png", "title")
    assert not (tmp_path / "again.png").exists()
    assert "matplotlib, which is not installed" in capsys.readouterr().out


def test_the_points_of_a_curve_are_those_evaluations_that_have_the_number():
    rows = [dict(tokens=10 ** 6 * i, val_bits_per_byte=bits) for i, bits in enumerate(
        [dict(raw=dict(mixed=3.0)), dict(raw=dict(mixed=2.0), ema=dict(mixed=2.5)), dict(ema=dict(mixed=1.5))])]
    curves = report.validation_curves(rows, lambda row, kind: row["val_bits_per_byte"].get(kind, {}).get("mixed"))
    assert curves == dict(raw=[(0, 3.0), (1, 2.0)], ema=[(1, 2.5), (2, 1.5)])
