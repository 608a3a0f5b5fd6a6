"""Every mistake ends in one line on standard error that says what is wrong, exit status 2, no traceback, and nothing written over."""
import gzip
import json
import re
import shutil

import numpy as np
import pytest
import torch

import prepare
import sample
import train
from conftest import ROOT, SMALL, command
from common import run_tool

TRAIN = [*SMALL, "--vocab_size=600", "--data=mine"]  # a sound command, to which a case adds its mistake


def edit_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def edit_checkpoint(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def ids_too_high(d):
    path = d / "data/mine/train.0-pydocs.bin"
    np.full(path.stat().st_size // 2, 601, dtype="<u2").tofile(path)


def other_data(d):
    """data/mine with as many tokens, but not those that the run saw."""
    path = d / "data/mine/train.0-pydocs.bin"
    path.write_bytes(path.read_bytes()[::-1])
    edit_meta(d / "data/mine", lambda m: m["sources"][0]["train"].update(sha256="0" * 64))


def chat_set(d):
    """data/chats: chats with the tokenizer of data/mine."""
    prepare.prepare(["chats.jsonl"], prepare.Settings(tokenizer="data/mine/tokenizer.json", name="chats"))


def short(d):
    """data/short: another text with another tokenizer."""
    prepare.prepare(["book.txt"], prepare.Settings(tokenizer="hybrid", vocab_size=300, name="short"))


def no_roles(d):
    """roles.json: data/mine's tokenizer without <|user|>."""
    (d / "roles.json").write_text((d / "data/mine/tokenizer.json").read_text().replace("<|user|>", "<|human|>"))


def nothing(d):
    pass


MISTAKES = {
    # what is wrong: (tool, its flags, what spoils the folder beforehand, what the line must say)
    "no such model": (train, ["--model=tinymemori"], nothing, r"no model 'tinymemori' \(did you mean tinymemory or tinymemory-sft\?\).*ivme"),
    "no such preset": (train, ["--model=tinymemory-xxl"], nothing, "no preset 'tinymemory-xxl'.*tinymemory"),
    "no such flag": (train, ["--max_step=3"], nothing, r"no flag --max_step \(did you mean max_steps"),
    "a word that is no flag": (train, ["max_steps=3"], nothing, "what is 'max_steps=3'.*--name=value"),
    "no number": (train, ["--max_steps=many"], nothing, "max_steps.*'many' is not a whole number"),
    "no choice": (train, ["--order=randm"], nothing, r"randm is not one of random, sequential, balanced \(did you mean random\?\)"),
    "a negative number": (train, ["--lr=-1"], nothing, "--lr=-1.0 must be at least 0"),
    "zero steps": (train, ["--max_steps=0"], nothing, "--max_steps=0 must be above 0"),
    "an average that never moves": (train, ["--ema_beta=1"], nothing, "--ema_beta must be below 1"),
    "windows beyond the context": (train, ["--block_size=512"], nothing, "--block_size=512 is longer than the model's context of 128"),
    "a step of broken windows": (train, ["--batch_tokens=500"], nothing, "not a multiple of --block_size=64"),
    "heads that do not divide": (train, ["--n_head=3"], nothing, "n_head 3 must divide d_model 32"),
    "no such data": (train, ["--data=pydoc"], nothing, r"no prepared data 'pydoc' \(did you mean .*pydocs.*python prepare.py pydoc --tokenizer=hybrid"),
    "text that was not prepared": (train, ["--data=book.txt"], nothing, "book.txt is not a prepared folder; make one of it: python prepare.py book.txt --tokenizer=hybrid --vocab_size=600"),
    "a token file is missing": (train, [], lambda d: (d / "data/mine/train.0-pydocs.bin").unlink(), "train.0-pydocs.bin is missing"),
    "a token file is cut short": (train, [], lambda d: cut(d / "data/mine/val.0-pydocs.bin"), "val.0-pydocs.bin has .* bytes, but meta.json says"),
    "a mask is missing": (train, ["--data=chats"], lambda d: (chat_set(d), (d / "data/chats/train.0-chats.mask.bin").unlink()), "train.0-chats.mask.bin is missing"),
    "a mask is cut short": (train, ["--data=chats"], lambda d: (chat_set(d), cut(d / "data/chats/train.0-chats.mask.bin")), "train.0-chats.mask.bin has .* tokens of 1 byte;"),
    "meta.json is damaged": (train, [], lambda d: cut(d / "data/mine/meta.json"), "meta.json is damaged"),
    "meta.json contradicts its files": (train, [], lambda d: edit_meta(d / "data/mine", lambda m: m["sources"][0]["train"].update(tokens=7)), "meta.json says 7 tokens"),
    "meta.json of another format": (train, [], lambda d: edit_meta(d / "data/mine", lambda m: m.update(format=9)), "format 9"),
    "another tokenizer.json": (train, [], lambda d: (d / "data/mine/tokenizer.json").write_text("{}"), "tokenizer.json is not the one this folder was encoded with"),
    "a vocabulary too large for the model": (train, ["--vocab_size=500"], nothing, "vocabulary of 600 tokens, the model of 500"),
    "ids outside the vocabulary": (train, [], ids_too_high, "token id 601, the model's vocabulary ends at 599"),
    "windows longer than the data": (train, ["--data=short", "--context_length=100000", "--block_size=65536", "--batch_tokens=65536"], nothing, "fewer than one window of 65537"),
    "data without a weight": (train, ["--data=mine:0"], nothing, "weights in --data and --base_data must be above 0"),
    "the folder holds a run": (train, ["--out=run"], nothing, "run holds a run: --resume .*--out .*--overwrite"),
    "nothing to resume": (train, ["--resume", "--out=nowhere"], nothing, "no run to resume in nowhere"),
    "resuming as another model": (train, ["--resume", "--out=run", "--model=ivme"], nothing, "the run in run is a tinymemory"),
    "resuming in another shape": (train, ["--resume", "--out=run", "--n_layer=3"], nothing, "another shape: n_layer is 2"),
    "resuming a damaged checkpoint": (train, ["--resume", "--out=run"], lambda d: cut(d / "run/ckpt.pt"), "ckpt.pt is damaged or not a checkpoint"),
    "resuming with a damaged record": (train, ["--resume", "--out=run"], lambda d: cut(d / "run/config.json"), "config.json is damaged"),
    "resuming on changed data": (train, ["--resume", "--out=run", "--data=mine", "--max_steps=20"], other_data, "has changed since the checkpoint"),
    "no checkpoint to start from": (train, ["--init_from=none.pt", "--out=new"], nothing, "no checkpoint none.pt"),
    "a foreign checkpoint": (train, ["--init_from=foreign.pt", "--out=new"], lambda d: torch.save({"model": {}}, d / "foreign.pt"), "foreign.pt is not a checkpoint of this train.py: it lacks format"),
    "no checkpoint at all": (train, ["--init_from=book.txt", "--out=new"], nothing, "book.txt is damaged or not a checkpoint"),
    "a checkpoint of another model": (train, ["--init_from=run/best.pt", "--model=ivme", "--out=new"], nothing, "holds a tinymemory, not a ivme"),
    "a checkpoint with another tokenizer": (train, ["--init_from=run/best.pt", "--data=short", "--out=new"], nothing, "not encoded with the checkpoint's tokenizer; prepare its text with --tokenizer=data/mine/tokenizer.json"),
    "a set of chats that is a file still": (train, ["--init_from=run/best.pt", "--data=chats", "--out=new"], nothing, "python prepare.py chats.jsonl --tokenizer=data/mine/tokenizer.json"),
    "decay without a start": (train, ["--decay_only", "--decay_steps=5"], nothing, "--decay_only needs --init_from"),
    "decay without a length": (train, ["--decay_only", "--init_from=run/ckpt.pt"], nothing, "--decay_only needs --decay_steps"),
    "measuring nothing": (train, ["--eval_only"], nothing, "--eval_only needs --init_from"),
    "measuring and decaying": (train, ["--eval_only", "--decay_only", "--decay_steps=3", "--init_from=run/ckpt.pt"], nothing, "--eval_only measures one checkpoint and trains nothing"),
    "no way of packing": (train, ["--pack=documents"], nothing, r"documents is not one of auto, stream, document \(did you mean document\?\)"),
    "a tuning step of broken windows": (train, ["--init_from=run/best.pt", "--data=chats", "--out=new", "--batch_tokens=500", "--block_size=64"], chat_set, "not a multiple of --block_size=64"),
    "no such device": (train, ["--device=gpu"], nothing, "--device=gpu is not a device"),
    "a device that is not here": (train, [f"--device={'mps' if not torch.backends.mps.is_available() else 'cuda:99'}"], nothing, "device"),
    "tuning without its start": (train, ["--model=tinymemory-sft"], nothing, "starts from out/tinymemory/best.pt, which is not there: run python train.py --model=tinymemory first"),
    "replay without chats": (train, ["--replay=0.1"], nothing, "--replay belongs to tuning on the replies of chats"),
    "replies of what is no chat": (train, ["--loss_on=responses"], nothing, "--loss_on=responses needs a set of chats, and mine holds none"),
    "relevance within windows": (train, ["--data=chats", "--loss_on=responses", "--relevance=0.1", "--pack=stream"], chat_set, "it needs --pack=document"),
    "replay of nothing": (train, ["--data=chats", "--loss_on=responses", "--replay=0.1"], chat_set, "--replay needs --base_data"),
    "replay of what is switched off": (train, ["--init_from=run/best.pt", "--data=chats", "--replay=0.1", "--base_data=", "--out=new"], chat_set, "--replay needs --base_data"),
    "nothing but replay": (train, ["--replay=1"], nothing, "--replay must be below 1"),
    "replay of another tokenizer's data": (train, ["--init_from=run/best.pt", "--data=chats", "--base_data=data/short", "--out=new", "--data=chats"],
                                           lambda d: (chat_set(d), short(d)), "data/short was not encoded with the chats' tokenizer; prepare its text with --tokenizer=data/mine/tokenizer.json"),
    "measuring what a recipe starts from": (train, ["--model=tinymemory-sft", "--eval_only"], lambda d: shutil.copytree(d / "run", d / "out/tinymemory"), "--eval_only needs --init_from"),
    "a chat without a tuned model": (sample, ["--chat"], nothing, "no out/tinymemory-sft/best.pt to chat with: python train.py --model=tinymemory-sft makes it"),
    "several chats": (sample, ["--chat", "--ckpt=run/best.pt", "--num_samples=2"], nothing, "--num_samples does not go with --chat"),
    "instructions without a chat": (sample, ["--ckpt=run/best.pt", "--system=be brief"], nothing, "--system belongs to --chat"),
    "a chat without roles": (sample, ["--chat", "--ckpt=run/best.pt"], lambda d: edit_checkpoint(d / "run/best.pt", tokenizer=torch.load(
        d / "run/best.pt", weights_only=True)["tokenizer"].replace("<|user|>", "<|human|>")), "no <.user.>, which chats are framed with"),
    "sampling without a checkpoint": (sample, ["--ckpt=none.pt"], nothing, "no checkpoint none.pt"),
    "sampling from a folder": (sample, ["--ckpt=run"], nothing, "run is a folder; name a checkpoint in it, such as run/best.pt"),
    "sampling from half a checkpoint": (sample, ["--ckpt=run/best.pt"], lambda d: cut(d / "run/best.pt"), "best.pt is damaged"),
    "a checkpoint of a later version": (sample, ["--ckpt=run/best.pt"], lambda d: edit_checkpoint(d / "run/best.pt", format=2), "its format is 2, not 1"),
    "a checkpoint of a changed architecture": (sample, ["--ckpt=run/best.pt"], lambda d: edit_checkpoint(d / "run/best.pt", cfg={"n_experts": 4}), "does not fit tinymemory.py as it is now"),
    "a checkpoint whose architecture is gone": (sample, ["--ckpt=run/best.pt"], lambda d: edit_checkpoint(d / "run/best.pt", model_name="mine"), "no model 'mine'"),
    "averaged weights that were not kept": (sample, ["--ckpt=run/best.pt", "--ema"], lambda d: edit_checkpoint(d / "run/best.pt", ema={}), "holds no EMA weights"),
    "a temperature below zero": (sample, ["--ckpt=run/best.pt", "--temperature=-1"], nothing, "--temperature=-1.0 makes no sense"),
    "no probability": (sample, ["--ckpt=run/best.pt", "--top_p=1.5"], nothing, "--top_p=1.5 makes no sense"),
    "a budget that is no number": (prepare, ["book.txt:1.00001K"], nothing, "the budget behind book.txt: '1.00001K' is not a whole number"),
    "a list of something": (prepare, ["book.txt", "--list"], nothing, "--list goes alone"),
    "a plot of nothing": (prepare, ["--plot"], nothing, "--plot draws what --show=FOLDER tells"),
    "showing what was not prepared": (prepare, ["--show=empty"], nothing, "empty is not a prepared folder"),
    "a budget for a mix": (prepare, ["ivme:3M"], nothing, "the sources of ivme have budgets of their own"),
    "a copy that is not there": (prepare, ["finemath", "--source_dir=nowhere"], nothing, "--source_dir=nowhere holds no copy of HuggingFaceTB/finemath: expected nowhere/HuggingFaceTB/finemath"),
    "nothing to prepare": (prepare, [], nothing, "name what to prepare: pydocs"),
    "no such corpus": (prepare, ["pydoc"], nothing, r"'pydoc' is neither a file.*\(did you mean pydocs or pydocs-chat\?\)"),
    "a folder without text": (prepare, ["empty"], nothing, "empty holds no file that prepare.py reads"),
    "a file of another kind": (prepare, ["run/loss.png"], nothing, "loss.png is not a file that prepare.py reads"),
    "broken JSON": (prepare, ["broken.jsonl"], nothing, "broken.jsonl line 2 is not JSON"),
    "rows that are no objects": (prepare, ["list.jsonl"], nothing, "list.jsonl line 1 is not a JSON object"),
    "no such column": (prepare, ["rows.jsonl", "--column=body"], nothing, "no column 'body', it has 'title', 'text'"),
    "half a gzip file": (prepare, ["half.jsonl.gz"], nothing, "half.jsonl.gz is not a whole gzip file"),
    "no parquet": (prepare, ["fake.parquet"], nothing, "fake.parquet cannot be read as parquet"),
    "one document for two splits": (prepare, ["rows.jsonl"], nothing, "rows holds only one document of text"),
    "chats among texts": (prepare, ["."], lambda d: [p.unlink() for p in d.glob("*.*") if p.name not in ("book.txt", "chats.jsonl")],
                          r"holds chats \(chats.jsonl\) as well as text \(book.txt\); name them one by one.*--column"),
    "chats that are none": (prepare, ["asked.jsonl"], nothing, "asked holds no document of text;.*; left out: 2 no reply"),
    "chats for a tokenizer without roles": (prepare, ["chats.jsonl", "--tokenizer=roles.json"], no_roles, r"the tokenizer has no <\|user\|>, .*take bpe, hybrid or chunk"),
    "the folder has other settings": (prepare, ["book.txt", "--name=mine"], nothing, "data/mine was made with other settings.*--name"),
    "a vocabulary below the bytes": (prepare, ["book.txt", "--vocab_size=100"], nothing, "--vocab_size=100 is too small.*263"),
    "a vocabulary below ASCII": (prepare, ["book.txt", "--tokenizer=chunk", "--vocab_size=283"], nothing, "--vocab_size=283 is too small.*284"),
    "no tokenizer": (prepare, ["book.txt", "--tokenizer=hybird"], nothing, r"neither bpe nor hybrid nor chunk nor a file \(did you mean hybrid\?\)"),
    "a file that is no tokenizer": (prepare, ["book.txt", "--tokenizer=rows.jsonl"], nothing, "rows.jsonl is not a tokenizer.json"),
    "a size for a tokenizer that exists": (prepare, ["book.txt", "--tokenizer=data/mine/tokenizer.json", "--vocab_size=500"], nothing, "--vocab_size belongs to a new tokenizer"),
    "validation text only": (prepare, ["book.txt", "--val_fraction=1"], nothing, "--val_fraction=1.0 is not a share"),
    "a file where the folder should go": (prepare, ["book.txt", "--out_dir=book.txt"], nothing, "book.txt"),
}


def snapshot(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_status_2_and_nothing_written_over(what, corpora, trained, tmp_path, monkeypatch, capsys):
    tool, flags, spoil, line = MISTAKES[what]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpora / "data/pydocs-hybrid", "data/mine")
    shutil.copytree(trained, "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "book.txt").write_text("It was a dark night.\n\n" * 400)
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "rows.jsonl").write_text('{"title": "a", "text": "fine"}\n')
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"instruction": f"say {i}", "output": str(i)}) + "\n" for i in range(50)))
    (tmp_path / "asked.jsonl").write_text(2 * '{"messages": [{"role": "user", "content": "Anybody?"}]}\n')
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 1000)[:-20])
    (tmp_path / "fake.parquet").write_bytes(b"PAR1 this is none")
    if "--data=short" in flags:
        short(tmp_path)
    spoil(tmp_path)
    capsys.readouterr()
    before = snapshot(tmp_path)
    argv = [*TRAIN, *flags] if tool is train and "--resume" not in flags and not any(f.startswith("--model") for f in flags) else flags
    if tool is train and any(f.startswith("--init_from") for f in flags):
        argv = ["--data=mine", *flags]  # the shape is the checkpoint's
    monkeypatch.setattr("sys.argv", [f"{tool.__name__}.py", *argv])
    with pytest.raises(SystemExit) as end:
        run_tool(tool.main)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.count("\n") == 1 and err.startswith(f"{tool.__name__}.py: ") and "Traceback" not in err
    assert re.search(line, err), err
    after = snapshot(tmp_path)
    assert all(after.get(p) == content for p, content in before.items())  # what was there is untouched
    assert not {p for p in after if p.suffix in (".pt", ".bin")} - set(before)  # and nothing half-made looks whole


def test_there_are_more_than_25_mistakes():
    assert len(MISTAKES) > 25


def test_a_mistake_in_a_process_of_its_own_shows_no_traceback(workdir):
    for words in ([ROOT / "train.py", "--model=none"], [ROOT / "sample.py", "--ckpt=none"], [ROOT / "prepare.py", "none"]):
        process = command(*words)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and out == "" and err.count("\n") == 1


def test_compiling_without_a_compiler_says_so(workdir, monkeypatch):
    process = command(ROOT / "train.py", *SMALL, "--compile=on", "--data=pydocs-hybrid", "--vocab_size=600", PATH="")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "needs a C++ compiler" in err
    assert not (workdir / "out").exists()


@pytest.mark.parametrize("tool", [train, sample, prepare], ids=lambda t: t.__name__)
def test_help_explains_every_flag_with_its_default(tool, capsys):
    with pytest.raises(SystemExit) as end:
        tool.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for field in tool.Settings.__dataclass_fields__:
        assert f"--{field}" in shown
    assert shown.count("[") >= len(tool.Settings.__dataclass_fields__)
