"""eval.py: what it measures is what the run itself has measured, for text and for chats; nothing is written."""
import json
import re
import shutil
from pathlib import Path

import pytest

import eval
import finetune
import prepare
import run
import runfolder
from common import UserError
from conftest import ALONE, ROOT, rows, run_train, together
from made_up import made_up_chats

MEASURE = ["--device=cpu", "--micro_batch=3"]


@pytest.fixture(scope="module")
def chats(corpora, tmp_path_factory):
    """A folder of chats in the tokenizer of data/pydocs-hybrid."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in made_up_chats(200, 1)))
    return prepare.prepare([str(folder / "chats.jsonl")], prepare.Settings(
        out_dir=str(folder), tokenizer=str(corpora / "data/pydocs-hybrid/tokenizer.json"), name="chats",
        val_fraction=0.1))


@pytest.fixture(scope="module")
def tuned(corpora, trained, chats, tmp_path_factory):
    """The folder of a small run that is fine-tuned on the chats. Read only."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert finetune.main([
        "--model=tinymemory-sft", f"--init_from={trained}/best.pt", f"--data={chats}", f"--out={out}",
        f"--base_data={corpora}/data/pydocs-hybrid", "--block_size=64", "--batch_tokens=512", "--micro_batch=4",
        "--max_steps=4", "--eval_every=2", "--eval_tokens=1024", "--final_eval_tokens=2048", "--sample_tokens=0",
        "--dtype=float32", "--compile=off", "--device=cpu"]) == 0
    return out


def measured(capsys, *flags):
    """(heading, {first word of a line: the line}) of what eval.py prints."""
    capsys.readouterr()
    assert eval.main([*MEASURE, *flags]) == 0
    heading, *table = capsys.readouterr().out.splitlines()
    return heading, {line.split()[0]: line for line in table}


def files(folder):
    """All files below the folder, with the times of their last changes."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_measured_as_its_run_did_it_and_nothing_of_the_run_is_changed(workdir, capsys):
    run_train("--data=two-hybrid", "--out=measured", "--max_steps=4", "--pack=document", "--final_eval_tokens=0",
              "--keep_every=4")
    final, before = rows(workdir / "measured")[-1], files(workdir)
    heading, table = measured(capsys, "--ckpt=measured/best.pt", "--stride=64")  # as the run, without overlap
    after = files(workdir)
    assert {path.name for path in set(after) - set(before)} == {"eval.json"}
    assert {path: after[path] for path in before} == before

    # the better weights, which are those of the run's last row
    (kind, loss), = final["val_loss"].items()
    kind = "EMA" if kind == "ema" else kind
    assert heading == f"measured/best.pt, step 4, {kind} weights: windows of 64, stride 64, each document by itself"
    for name, value in (("one", loss["source"]["one"]), ("it", loss["language"]["it"]), ("mixed", loss["mixed"])):
        assert f"loss {value:.4f}" in table[name]
    assert {"books", "code"} < set(table)  # kinds


def test_raw_and_averaged_weights_are_measured_if_they_are_asked_for(trained, workdir, capsys):
    evaluation = rows(trained)[-2]["val_loss"]  # the last one of the loop, over --eval_tokens=1024
    shutil.copytree(trained, "run")
    found = {}
    for flag in ("--no-ema", "--ema"):
        heading, table = measured(capsys, "--ckpt=run/ckpt.pt", flag, "--stride=64", "--eval_tokens=1024")
        found[heading.split()[3]] = table["pydocs"]
    assert f"loss {evaluation['raw']['mixed']:.4f}" in found["raw"]
    assert f"loss {evaluation['ema']['mixed']:.4f}" in found["EMA"]

    run_train("--data=pydocs-hybrid", "--out=plain", "--max_steps=2", "--ema_beta=0")
    with pytest.raises(UserError, match="plain/best.pt holds no EMA weights"):
        eval.main(["--ckpt=plain/best.pt", "--ema"])


def test_what_was_found_is_kept_beside_the_checkpoint_until_it_is_another_one(trained, workdir, capsys):
    shutil.copytree(trained, "run")
    flags = ["--ckpt=run/best.pt", "--eval_tokens=512"]
    measured(capsys, *flags)
    kept = json.loads(Path("run/eval.json").read_text())
    assert kept["checkpoint"] == "best.pt" and kept["step"] == 12 and kept["weights"] in ("raw", "EMA")
    assert kept["losses"]["protocol"] == dict(window=64, stride=32, text="one stream")
    assert set(kept["losses"]["loss"]) == {"mixed", "language", "kind", "source"}

    Path("run/eval.json").write_text(json.dumps(kept | dict(tasks="of an earlier call")))
    measured(capsys, *flags)
    assert json.loads(Path("run/eval.json").read_text())["tasks"] == "of an earlier call"
    measured(capsys, "--ckpt=run/ckpt.pt", "--eval_tokens=512")
    assert "tasks" not in json.loads(Path("run/eval.json").read_text())

    for text in ('{"question": "?"}', "[1]", '{"a": 1}\n{"a": 2}\n'):  # somebody's data
        Path("run/eval.json").write_text(text)
        _, table = measured(capsys, *flags)
        assert "run/eval.json" in table and Path("run/eval.json").read_text() == text


def test_checkpoints_of_different_sets_have_no_order_and_a_path_may_have_spaces(trained, workdir, capsys, monkeypatch):
    behaves = dict(distinct_2=0.5, repeated_4gram_rate=0.5, loop_rate=0.5, language_consistency_mean=0.5)
    monkeypatch.setattr("evaluation.decoding.greedy_behaviour", lambda *args: behaves)
    run_train("--data=two-hybrid", "--out=my other", "--max_steps=1", "--ema_beta=0")
    flags = ["--device=cpu", "--eval_tokens=512", f"{trained}/best.pt"]
    with pytest.raises(UserError, match="best.pt was trained on pydocs, .*/best.pt on .*: --data names one for all"):
        eval.main(["--compare=my other/best.pt", *flags])
    capsys.readouterr()
    eval.main(["--compare", "my other/best.pt", "--data=pydocs-hybrid", *flags])
    out = capsys.readouterr().out
    assert "my other" in out and "windows of one length" not in out
    run_train("--data=two-hybrid", "--out=shorter", "--max_steps=1", "--ema_beta=0", "--block_size=32")
    eval.main(["--compare", "my other/best.pt", "shorter/best.pt", "--data=pydocs-hybrid", "--device=cpu",
               "--eval_tokens=512"])
    assert "not all were measured in windows of one length" in capsys.readouterr().out


def test_losses_of_replies_and_of_texts_have_no_order(tuned, workdir):
    checkpoint = run.read_checkpoint(tuned / "best.pt")
    for name, loss_on in (("replies", "responses"), ("texts", "all")):
        settings = dict(checkpoint["train"], loss_on=loss_on)
        runfolder.save_checkpoint(f"{name}.pt", dict(checkpoint, train=settings))
    with pytest.raises(UserError, match="of texts.pt and replies.pt, one was fine-tuned on replies and the other was"):
        eval.main(["--compare", "replies.pt", "texts.pt", "--device=cpu", "--eval_tokens=512"])


def test_a_checkpoint_that_was_tuned_on_whole_chats_is_measured_on_them(tuned, workdir, capsys):
    checkpoint = run.read_checkpoint(tuned / "best.pt")
    Path("run").mkdir()
    runfolder.save_checkpoint("run/best.pt", dict(checkpoint, train=dict(checkpoint["train"], loss_on="all")))
    heading, _ = measured(capsys, "--ckpt=run/best.pt", "--eval_tokens=512")
    assert "windows of 64" in heading and "replies" not in heading


def test_what_is_wrong_with_a_bundle_is_said_before_the_benchmarks(trained, workdir, monkeypatch):
    runfolder.save_checkpoint("best.pt", run.read_checkpoint(trained / "best.pt"))
    monkeypatch.setattr(eval, "show_tasks", lambda measured: pytest.fail("benchmarks came first"))
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which belongs to no bundle"):
        eval.main(["--ckpt=best.pt", "--tasks=wikitext", "--bundle=mine", "--device=cpu"])
    with pytest.raises(UserError, match="nowhere.json"):
        eval.main(["--ckpt=best.pt", "--tasks=wikitext", "--bundle=new", "--probes=nowhere.json", "--device=cpu"])


def test_scores_of_one_protocol_stay_together(trained, workdir):
    shutil.copytree(trained, "run")
    one = eval.Measured(eval.Settings(ckpt="run/best.pt", device="cpu"), ALONE)
    for task, limit in (("a", 0), ("b", 0), ("c", 5)):
        eval.keep(one, tasks={task: 1}, protocol=dict(limit=limit))
        kept = json.loads(Path("run/eval.json").read_text())
        assert set(kept["tasks"]) == (set("ab"[:"ab".index(task) + 1]) if task != "c" else {"c"})


def test_a_fine_tuned_checkpoint_is_measured_on_replies_base_data_and_relevance(tuned, workdir, capsys):
    final = rows(tuned)[-1]
    (kind, loss), = final["val_loss"].items()
    shutil.copytree(tuned, "run")
    heading, table = measured(capsys, "--ckpt=run/best.pt", "--eval_tokens=2048")
    assert heading.endswith("weights: replies in rows of 64")
    assert f"loss {loss['mixed']:.4f}" in table["chats"] and f"loss {loss['base']:.4f}" in table["base"]
    assert f"{final['relevance_accuracy'][kind]:.1%} of replies are likelier" in table["relevance"]

    # so are those that are compared
    one = eval.Measured(eval.Settings(ckpt="run/best.pt", eval_tokens=2048, device="cpu", micro_batch=3), ALONE)
    assert eval.losses_of(one, one.sources())["loss"]["mixed"] == pytest.approx(loss["mixed"], rel=1e-5)
    with pytest.raises(UserError, match="--plot and --stride are for text"):
        eval.main(["--ckpt=run/best.pt", "--plot", "--device=cpu"])

    # text is measured as text even so
    _, table = measured(capsys, "--ckpt=run/best.pt", "--data=pydocs-hybrid", "--eval_tokens=1024")
    assert set(table) == {"pydocs"}


def test_chats_are_text_to_a_pretrained_checkpoint(trained, chats, workdir, capsys):
    shutil.copytree(trained, "run")
    _, table = measured(capsys, "--ckpt=run/best.pt", f"--data={chats}", "--eval_tokens=1024")
    assert set(table) == {"chats"} and "und/chat" in table["chats"]


def test_data_that_is_too_small_to_train_on_can_be_measured(corpora, tuned, trained, workdir, capsys):
    tokenizer = str(corpora / "data/pydocs-hybrid/tokenizer.json")
    texts = [dict(text=word) for word in ("yes", "no")]
    questions = [dict(instruction=f"say {word}", output=word) for word in ("yes", "no")]
    for name, lines, checkpoint in (("texts", texts, trained), ("questions", questions, tuned)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folder = prepare.prepare([f"{name}.jsonl"], prepare.Settings(
            out_dir="mine", tokenizer=tokenizer, name=name, val_fraction=0.5))
        shutil.copytree(checkpoint, name)
        _, table = measured(capsys, f"--ckpt={name}/best.pt", f"--data={folder}", "--context=128")
        assert name in table and ("base" in table) == (checkpoint is tuned)


def test_several_windows_at_once_change_nothing(trained, workdir, capsys):
    shutil.copytree(trained, "run")
    flags = ["--ckpt=run/best.pt", "--eval_tokens=2048"]
    plain = measured(capsys, *flags)
    assert measured(capsys, *flags, "--micro_batch=1") == plain
    assert measured(capsys, *flags, "--context=64", "--stride=32") == plain  # as it was trained, half a window
    assert measured(capsys, *flags, "--context=16") != plain


def test_two_processes_find_what_one_finds(trained, workdir, capsys):
    shutil.copytree(trained, "run")
    flags = ["--ckpt=run/best.pt", "--eval_tokens=1024", *MEASURE]
    (first, told, _), (second, silence, _) = together(2, ROOT / "eval.py", *flags)
    capsys.readouterr()
    assert first == second == eval.main(flags) == 0 and told == capsys.readouterr().out and silence == ""


def test_the_loss_by_position_is_drawn_over_the_whole_context(trained, workdir, capsys):
    shutil.copytree(trained, "run")
    eval.main([*MEASURE, "--ckpt=run/best.pt", "--eval_tokens=2048", "--plot"])
    assert "wrote run/loss_by_position.png" in capsys.readouterr().out
    assert Path("run/loss_by_position.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_one_line(trained, workdir):
    runfolder.save_checkpoint("best.pt", run.read_checkpoint(trained / "best.pt"))
    (workdir / "other.txt").write_text("some text " * 2000)
    prepare.prepare(["other.txt"], prepare.Settings(out_dir="mine", tokenizer="hybrid", vocab_size=400))
    mistakes = [
        ([], "there is no pretraining run under out/ yet"),
        (["--ckpt=none.pt"], "no checkpoint none.pt"),
        (["--ckpt=other.txt"], "other.txt is damaged or not a checkpoint"),
        (["--ckpt=best.pt", "--resume"], "there is no flag --resume"),
        (["--ckpt=best.pt", "--data=mine/other-hybrid-400"], "not encoded with the checkpoint's tokenizer"),
        (["--ckpt=best.pt", "--data=pydoc"], "no prepared data 'pydoc' (did you mean"),
        (["--ckpt=best.pt", "--context=129"], "longer than the model's context of 128"),
        (["--ckpt=best.pt", "--eval_tokens=-1"], "cannot be negative"),
        (["--ckpt=best.pt", "--tasks=wikitext", "--stride=64"], "--stride is about losses, which are not asked for"),
        (["--ckpt=best.pt", "--row"], "--row is a part of --tasks, which is not asked for"),
        (["--ckpt=best.pt", "--probes=card"], "--probes is a part of --bundle, which is not asked for"),
        (["--compare=best.pt", "--plot"], "--compare ranks checkpoints by their losses; --plot is for a single one"),
        (["--ckpt=best.pt", "--dtype=float23"], "float23 is not one of auto, bfloat16, float32 (did you mean float32"),
        (["--ckpt=best.pt", "--device=gpu"], "--device=gpu is not a device"),
    ]
    for flags, line in mistakes:
        with pytest.raises(UserError, match=re.escape(line)):
            eval.main(flags)
