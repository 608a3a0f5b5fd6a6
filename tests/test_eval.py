"""eval.py: what it measures is what the run itself has measured, for text and for chats; nothing is written."""
import json
import re

import pytest

import eval
import finetune
import prepare
import run
from common import UserError
from conftest import ROOT, rows, run_train, together
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
    """What eval.py prints: {"raw": {first word of a line: the line}, "EMA": ...}, and which of the two was chosen."""
    capsys.readouterr()
    assert eval.main([*MEASURE, *flags]) == 0
    tables, chosen = {}, []
    for line in capsys.readouterr().out.splitlines():
        heading = re.fullmatch(r".*, step [\d,]+, (raw|EMA) weights( \(the chosen ones\))?", line)
        if heading:
            table = tables[heading[1]] = {}
            if heading[2]:
                chosen.append(heading[1])
        else:
            table[line.split()[0]] = line
    (only,) = chosen
    return tables, only


def files(folder):
    """All files below the folder, with the times of their last changes."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_measured_as_its_run_did_it_and_nothing_is_written(workdir, capsys):
    run_train("--data=two-hybrid", "--out=measured", "--max_steps=4", "--pack=document", "--final_eval_tokens=0",
              "--keep_every=4")
    final, before = rows(workdir / "measured")[-1], files(workdir)
    tables, chosen = measured(capsys, "--ckpt=measured/best.pt")
    assert files(workdir) == before

    # of the run's kinds of weights the chosen one is in the run's last row
    (kind, loss), = final["val_loss"].items()
    assert chosen == kind.replace("ema", "EMA") and set(tables) == {"raw", "EMA"}
    for name, value in (("one", loss["source"]["one"]), ("it", loss["language"]["it"]), ("mixed", loss["mixed"])):
        assert f"loss {value:.4f}" in tables[chosen][name]


def test_both_kinds_of_weights_are_measured_unless_no_average_was_kept(trained, workdir, capsys):
    evaluation = rows(trained)[-2]["val_loss"]  # the last one of the loop, over --eval_tokens=1024
    tables, _ = measured(capsys, f"--ckpt={trained}/ckpt.pt", "--eval_tokens=1024")
    for kind in ("raw", "ema"):
        assert f"loss {evaluation[kind]['mixed']:.4f}" in tables[kind.replace("ema", "EMA")]["pydocs"]

    run_train("--data=pydocs-hybrid", "--out=plain", "--max_steps=2", "--ema_beta=0")
    tables, chosen = measured(capsys, "--ckpt=plain/best.pt", "--eval_tokens=1024")
    assert set(tables) == {"raw"} and chosen == "raw"


def test_a_fine_tuned_checkpoint_is_measured_on_replies_base_data_and_relevance(tuned, workdir, capsys):
    final = rows(tuned)[-1]
    (kind, loss), = final["val_loss"].items()
    tables, chosen = measured(capsys, f"--ckpt={tuned}/best.pt", "--eval_tokens=2048")
    table = tables[chosen]
    assert chosen == kind.replace("ema", "EMA")
    assert f"loss {loss['mixed']:.4f}" in table["chats"] and f"loss {loss['base']:.4f}" in table["base"]
    assert f"{final['relevance_accuracy'][kind]:.1%} of replies are likelier" in table["relevance"]


def test_text_is_measured_as_text_even_with_a_fine_tuned_checkpoint(tuned, workdir, capsys):
    tables, chosen = measured(capsys, f"--ckpt={tuned}/best.pt", "--data=pydocs-hybrid", "--eval_tokens=1024")
    assert set(tables[chosen]) == {"pydocs"}


def test_chats_are_text_to_a_pretrained_checkpoint(trained, chats, workdir, capsys):
    tables, chosen = measured(capsys, f"--ckpt={trained}/best.pt", f"--data={chats}", "--eval_tokens=1024")
    assert set(tables[chosen]) == {"chats"} and "und/chat" in tables[chosen]["chats"]


def test_data_that_is_too_small_to_train_on_can_be_measured(corpora, tuned, trained, workdir, capsys):
    tokenizer = str(corpora / "data/pydocs-hybrid/tokenizer.json")
    texts = [dict(text=word) for word in ("yes", "no")]
    questions = [dict(instruction=f"say {word}", output=word) for word in ("yes", "no")]
    for name, lines, checkpoint in (("texts", texts, trained), ("questions", questions, tuned)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folder = prepare.prepare([f"{name}.jsonl"], prepare.Settings(
            out_dir="mine", tokenizer=tokenizer, name=name, val_fraction=0.5))
        tables, chosen = measured(capsys, f"--ckpt={checkpoint}/best.pt", f"--data={folder}", "--block_size=128")
        assert name in tables[chosen] and ("base" in tables[chosen]) == (checkpoint is tuned)


def test_the_length_of_a_row_changes_the_losses_and_the_micro_batch_does_not(trained, workdir, capsys):
    flags = [f"--ckpt={trained}/best.pt", "--eval_tokens=2048"]
    plain, chosen = measured(capsys, *flags)
    assert measured(capsys, *flags, "--micro_batch=1")[0] == plain
    assert measured(capsys, *flags, "--block_size=64")[0] == plain  # as it was trained
    assert measured(capsys, *flags, "--block_size=16")[0] != plain


def test_two_processes_find_what_one_finds(trained, workdir, capsys):
    flags = [f"--ckpt={trained}/best.pt", "--eval_tokens=1024", *MEASURE]
    (first, told, _), (second, silence, _) = together(2, ROOT / "eval.py", *flags)
    capsys.readouterr()
    assert first == second == eval.main(flags) == 0 and told == capsys.readouterr().out and silence == ""


def test_what_cannot_be_measured_is_one_line(trained, workdir):
    run.save_checkpoint("best.pt", run.read_checkpoint(trained / "best.pt"))
    (workdir / "other.txt").write_text("some text " * 2000)
    prepare.prepare(["other.txt"], prepare.Settings(out_dir="mine", tokenizer="hybrid", vocab_size=400))
    mistakes = [
        ([], "no checkpoint out/tinymemory/best.pt"),
        (["--ckpt=none.pt"], "no checkpoint none.pt"),
        (["--ckpt=other.txt"], "other.txt is damaged or not a checkpoint"),
        (["--ckpt=best.pt", "--resume"], "there is no flag --resume"),
        (["--ckpt=best.pt", "--data=mine/other-hybrid-400"], "not encoded with the checkpoint's tokenizer"),
        (["--ckpt=best.pt", "--data=pydoc"], "no prepared data 'pydoc' (did you mean"),
        (["--ckpt=best.pt", "--block_size=129"], "longer than the model's context of 128"),
        (["--ckpt=best.pt", "--eval_tokens=-1"], "cannot be negative"),
        (["--ckpt=best.pt", "--dtype=float23"], "float23 is not one of auto, bfloat16, float32 (did you mean float32"),
        (["--ckpt=best.pt", "--device=gpu"], "--device=gpu is not a device"),
    ]
    for flags, line in mistakes:
        with pytest.raises(UserError, match=re.escape(line)):
            eval.main(flags)
