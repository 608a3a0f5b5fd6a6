"""evaluation/bundle.py: all files of the card, the same to the byte, whole or not at all; checkpoints side by side."""
import csv
import io
import json
import math
import os
import re
import shutil

import pytest

import run
import runfolder
import sample
from common import UserError
from conftest import CPU, evaluations, sources_of
from evaluation import bundle, decoding
from evaluation.behaviour import distinct_2, loop_rate, repeated_4gram_rate
from evaluation.probes import CARD

LOSSES = {"loss": {"mixed": 2.0, "language": {"en": 2.0}, "source": {"pydocs": 2.0}},
          "bits_per_byte": {"mixed": 1.5, "language": {"en": 1.5}, "source": {"pydocs": 1.5}}}
SCORES = {"blimp": {"score": 61.4, "stderr": 0.25, "metric": "accuracy, %"}}


@pytest.fixture(scope="module")
def make(corpora, trained):
    """make(FOLDER) writes a bundle of the small run, with few presets and prompts, and returns the Findings."""
    path = trained / "best.pt"
    model, tokenizer, checkpoint = run.load_checkpoint(path)
    sources = sources_of(corpora / "data/pydocs-hybrid")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(decoding, "PROMPTS", 6)
        m.setattr(decoding, "PAIR_TOKENS", 50_000)
        m.setattr(decoding, "LANGUAGE_TOKENS", 20_000)
        for name in set(decoding.PRESETS) - {"greedy", "balanced", "pure"}:
            m.delitem(decoding.PRESETS, name)
        yield lambda folder: bundle.write_bundle(folder, path, model, tokenizer, checkpoint, sources, LOSSES, CPU,
                                                 "raw", scores=SCORES)


@pytest.fixture(scope="module")
def written(make, tmp_path_factory):
    """(folder of a bundle, its Findings). Read only."""
    folder = tmp_path_factory.mktemp("bundles") / "b"
    return folder, make(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_has_all_files_of_the_card_and_they_say_what_was_measured(written, trained):
    folder, found = written
    files = {name: text.decode() for name, text in contents(folder).items()}
    assert set(files) == set(runfolder.BUNDLE) and os.listdir(folder.parent) == ["b"]
    for name, text in files.items():
        assert str(folder.parent) not in text and str(trained.parent) not in text, name
    read = {name: json.loads(text) for name, text in files.items() if name.endswith(".json")}
    greedy, best = found.greedy, found.recommended

    # the numbers, under the card's names
    summary, params = read["eval_summary.json"], read["recommended_decoding_params.json"]
    assert summary["val_loss_mixed"] == summary["val_loss_en"] == 2.0 and summary["bits_per_byte_mixed"] == 1.5
    assert summary["ppl_mixed"] == pytest.approx(math.exp(2)) and summary["checkpoint"] == "best.pt"
    assert summary["behaviour_greedy"] == greedy.behaviour and summary["recommended_preset"] == found.sweep.winner
    ids = [sample.ids for sample in greedy.samples]
    assert (greedy.behaviour["loop_rate"], greedy.behaviour["repeated_4gram_rate"], greedy.behaviour["distinct_2"]) \
        == (loop_rate(ids), repeated_4gram_rate(ids), distinct_2(ids))
    assert read["benchmark_source_losses.json"]["pydocs"]["val_loss"] == 2.0
    assert read["benchmark_metrics.json"]["recommended"]["distinct_2"] == best.behaviour["distinct_2"]
    assert read["benchmark_scores.json"]["tasks"] == SCORES
    assert [probe["expected"] for probe in read["probe_summary.json"]["probes"]] == [p.expected for p in CARD]
    assert read["decoding_summary.json"]["tuning_winner"] == found.sweep.tuning[0].name
    assert params == decoding.recommended_params(decoding.PRESETS[found.sweep.winner])

    # leaderboards and texts
    for part, trials in (("tuning", found.sweep.tuning), ("holdout", found.sweep.holdout)):
        board = list(csv.DictReader(io.StringIO(files[f"{part}_leaderboard.csv"])))
        assert [row["preset"] for row in board] == [*(trial.name for trial in trials), "validation text"]
        assert [row["rank"] for row in board] == ["1", "2", "3", ""]
        assert float(board[0]["score"]) == pytest.approx(trials[0].score, rel=1e-5)
        lines = [json.loads(line) for line in files[f"{part}_generations.jsonl"].splitlines()]
        assert [line["text"] for line in lines][:len(trials[0].samples)] == [s.text for s in trials[0].samples]
        assert len(lines) == 4 * len(trials[0].samples)

    # the report leads with the conclusion
    report = files["benchmark_report.md"].splitlines()
    assert report[0] == "# tinymemory, step 12"
    assert "**1.500 bits per byte**" in report[2]
    assert f"**{greedy.behaviour['loop_rate']:.0%} end in a loop**" in report[2]
    assert "| blimp | accuracy, % | 61.4 | ± 0.25 |" in report
    assert "| pydocs | en/code | 2.0000 | 7.4 | 1.500 |" in report
    width = {line.count("|") for line in report if line.startswith("| greedy") or "(recommended)" in line}
    assert len(width) <= 2 and f"`{found.sweep.winner}`" in files["decoding_report.md"]
    shown = "\n".join(bundle.summary_lines(found))
    assert "It needs 1.500 bits per byte" in shown and "*" not in shown
    assert re.search(rf"^loop_rate +{greedy.behaviour['loop_rate']:.1%}", shown, re.M)


def test_the_same_seed_gives_the_same_bytes(written, make, tmp_path):
    make(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(written[0])


def test_a_bundle_is_replaced_whole_or_stays_as_it_was(monkeypatch, tmp_path):
    folder = tmp_path / "b"
    bundle.write_folder(folder, dict.fromkeys(runfolder.BUNDLE, "old"))
    before, synced = contents(folder), []

    def full_disk(fd):
        synced.append(fd)
        if len(synced) == 3:
            raise OSError("no space")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError):
            bundle.write_folder(folder, dict.fromkeys(runfolder.BUNDLE, "new"))
    assert contents(folder) == before == dict.fromkeys(runfolder.BUNDLE, b"old")
    bundle.write_folder(folder, dict.fromkeys(runfolder.BUNDLE, "new"))
    assert contents(folder) == dict.fromkeys(runfolder.BUNDLE, b"new") and os.listdir(tmp_path) == ["b"]


def test_a_folder_with_anything_else_is_refused_before_the_work(make, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    bundle.check_folder(tmp_path / "mine")  # an empty one will do
    bundle.check_folder(tmp_path / "new")
    (tmp_path / "mine/notes.txt").write_text("keep me")
    monkeypatch.setattr(bundle, "examine", None)
    with pytest.raises(UserError, match="mine holds notes.txt, which belongs to no bundle; name another folder"):
        make(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]
    with pytest.raises(UserError, match="notes.txt is a file; name a folder"):
        bundle.check_folder(tmp_path / "mine/notes.txt")


# ---------------------------------------------------------------------------------------------------- comparison

def a_row(name, loss, bits, tokenizer="a"):
    checkpoint = dict(model_name="m", step=7, tokens=70, tokenizer=tokenizer)
    losses = None
    if loss is not None:
        losses = dict(loss=dict(mixed=loss), bits_per_byte=dict(mixed=bits))
    measured = dict(distinct_2=0.5, repeated_4gram_rate=0.25, loop_rate=0.125, language_consistency_mean=1.0)
    return bundle.checkpoint_row(name, checkpoint, losses, measured)


def test_checkpoints_are_ranked_by_the_mixed_loss():
    found = bundle.compare([a_row("a", 4.84, 1.2), a_row("none", None, None), a_row("b", 4.80, 1.3)])
    assert found["ranked_by"] == "val_loss_mixed" and found["best"] == "b"
    assert [(row["rank"], row["checkpoint"]) for row in found["checkpoints"]] == [(1, "b"), (2, "a"), (3, "none")]
    lines = bundle.comparison_lines(found)
    assert re.fullmatch(r"1 +b +7 +4.8000 +1.300 +0.500 +25.0% +12.5% +100.0%", lines[1])
    assert re.fullmatch(r"3 +none +7 +- +- +0.500 .*", lines[3])


def test_between_tokenizers_bits_per_byte_decide():
    found = bundle.compare([a_row("a", 4.84, 1.2), a_row("b", 4.80, 1.3, "another tokenizer")])
    assert found["ranked_by"] == "bits_per_byte_mixed" and found["best"] == "a"


def test_a_bundle_compares_the_checkpoints_of_the_run_by_the_losses_it_measured(written, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    checkpoint = run.read_checkpoint(trained / "best.pt")

    def compared(weights="EMA" if checkpoint["use_ema"] else "raw"):
        found = bundle.run_comparison(folder / "best.pt", checkpoint, LOSSES, weights, written[1].run_text, "cpu")
        return {row["checkpoint"]: row for row in found["checkpoints"]}
    rows = compared()
    assert set(rows) == {"best.pt", "ckpt.pt"}
    for name, row in rows.items():
        other = run.read_checkpoint(folder / name)
        kind = "ema" if other["use_ema"] else "raw"
        (of_run,) = [found for found in evaluations(folder) if found["step"] == other["step"]]
        assert row["step"] == other["step"] and row["val_loss_mixed"] == of_run["val_loss"][kind]["mixed"]
        assert 0 <= row["loop_rate"] <= 1

    # the weights that were not chosen have losses of their own
    (of_run,) = [found for found in evaluations(folder) if found["step"] == checkpoint["step"]]
    for weights in ("EMA", "raw"):
        assert compared(weights)["best.pt"]["val_loss_mixed"] == of_run["val_loss"][weights.lower()]["mixed"]

    # without its log, a checkpoint is compared with nothing
    (folder / "metrics.jsonl").unlink()
    (name, row), = compared().items()
    assert name == "best.pt" and row["val_loss_mixed"] == 2.0


# ---------------------------------------------------------------------------------------------------- Markdown

def test_any_text_fits_into_a_cell():
    assert bundle.cell(" a|b\r\n*c* <d>\n") == r"a\|b<br>\*c\* &lt;d&gt;"
    assert bundle.table([["a", "b"], ["1", bundle.cell("x|y")]]) == ["| a | b |", "|---|---|", r"| 1 | x\|y |"]


def test_the_flags_shown_for_a_preset_are_the_sampler_s_own():
    for name, preset in decoding.PRESETS.items():
        flags = ["--ckpt=x.pt", *bundle.sampling_flags(preset).split()]
        s, given = sample.read_settings(flags)
        assert {rule: getattr(s, rule) for rule in sample.RULES} == preset.rules(), name
