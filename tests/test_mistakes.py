"""Every mistake ends in one line on standard error that says what is wrong, exit status 2, no traceback, and nothing
written over."""
import gzip
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch

import finetune
import prepare
import sample
import train
from common import run_tool
from conftest import ROOT, SMALL, command


# ----------------------------------------------------------------------------------------------- what spoils the folder

def nothing(d):
    pass


def cut(path):
    """Cuts the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-100])


def edit_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def other_tokens(d):
    """meta.json of data/mine says that there are 7 training tokens."""
    edit_meta(d / "data/mine", lambda meta: meta["sources"][0]["train"].update(tokens=7))


def other_format(d):
    edit_meta(d / "data/mine", lambda meta: meta.update(format=9))


def set_tokens(d, data):
    """Gives data/mine other training tokens, and meta.json their checksum."""
    (d / "data/mine/train.0-pydocs.bin").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    edit_meta(d / "data/mine", lambda meta: meta["sources"][0]["train"].update(sha256=sha256))


def ids_too_high(d):
    n = (d / "data/mine/train.0-pydocs.bin").stat().st_size // 2
    set_tokens(d, np.full(n, 601, dtype="<u2").tobytes())


def half_zeroed(d):
    path = d / "data/mine/train.0-pydocs.bin"
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2] + bytes(len(data) - len(data) // 2))


def other_data(d):
    """data/mine with as many tokens, but not those that the run saw."""
    set_tokens(d, (d / "data/mine/train.0-pydocs.bin").read_bytes()[::-1])


def chat_set(d):
    """data/chats: chats with the tokenizer of data/mine."""
    prepare.prepare(["chats.jsonl"], prepare.Settings(tokenizer="data/mine/tokenizer.json", name="chats"))


def no_mask(d):
    chat_set(d)
    (d / "data/chats/train.0-chats.mask.bin").unlink()


def half_a_mask(d):
    chat_set(d)
    cut(d / "data/chats/train.0-chats.mask.bin")


def two_novels(d):
    """Two files of one name, of which one is prepared."""
    for folder in ("a", "b"):
        (d / folder).mkdir()
        (d / folder / "novels.txt").write_text((d / "book.txt").read_text() + folder)
    prepare.prepare(["a/novels.txt"], prepare.Settings(tokenizer="hybrid", vocab_size=600))


def short(d):
    """data/short: another text with another tokenizer."""
    prepare.prepare(["book.txt"], prepare.Settings(tokenizer="hybrid", vocab_size=300, name="short"))


def chats_and_short(d):
    chat_set(d)
    short(d)


def text_and_chats(d):
    """Of the files, a text and chats alone."""
    for path in d.glob("*.*"):
        if path.name not in ("book.txt", "chats.jsonl"):
            path.unlink()


def no_roles(d):
    """roles.json: data/mine's tokenizer without <|user|>."""
    text = (d / "data/mine/tokenizer.json").read_text()
    (d / "roles.json").write_text(text.replace("<|user|>", "<|human|>"))


def edit_checkpoint(**changes):
    """A function that changes keys of run/best.pt."""
    def edit(d):
        torch.save(torch.load(d / "run/best.pt", weights_only=True) | changes, d / "run/best.pt")
    return edit


def checkpoint_without_roles(d):
    text = (d / "data/mine/tokenizer.json").read_text()
    edit_checkpoint(tokenizer=text.replace("<|user|>", "<|human|>"))(d)


# ---------------------------------------------------------------------------------------------------- the mistakes

TRAIN = [*SMALL, "--vocab_size=600", "--data=mine"]  # sound commands, to which a case adds its mistake
START = ["--init_from=run/best.pt", "--data=mine", "--out=new"]
TUNE = ["--init_from=run/best.pt", "--data=chats", "--out=new", "--block_size=64", "--batch_tokens=512"]
SAMPLE = ["--ckpt=run/best.pt"]
NOT_HERE = "cuda:99" if torch.backends.mps.is_available() else "mps"

MISTAKES = {
    # what is wrong: (tool, its flags, what spoils the folder beforehand, what the line must say)

    # flags
    "no such model": (
        train, ["--model=tinymemori"], nothing,
        r"no model 'tinymemori' \(did you mean tinymemory or tinymemory-sft\?\).*ivme"),
    "no such preset": (train, ["--model=tinymemory-xxl"], nothing, "no preset 'tinymemory-xxl'.*tinymemory"),
    "no such flag": (train, [*TRAIN, "--max_step=3"], nothing, r"no flag --max_step \(did you mean max_steps"),
    "a word that is no flag": (train, [*TRAIN, "max_steps=3"], nothing, "what is 'max_steps=3'.*--name=value"),
    "no number": (train, [*TRAIN, "--max_steps=many"], nothing, "max_steps.*'many' is not a whole number"),
    "no choice": (
        train, [*TRAIN, "--order=randm"], nothing,
        r"randm is not one of random, sequential, balanced \(did you mean random\?\)"),
    "no way of packing": (
        train, [*TRAIN, "--pack=documents"], nothing,
        r"documents is not one of stream, document \(did you mean document\?\)"),
    "no way of choosing what counts": (
        finetune, [*TUNE, "--loss_on=response"], nothing,
        r"response is not one of responses, all \(did you mean responses\?\)"),
    "neither yes nor no": (train, [*TRAIN, "--overwrite=perhaps"], nothing, "'perhaps' is neither true nor false"),
    "a negative number": (train, [*TRAIN, "--lr=-1"], nothing, "--lr=-1.0 must be at least 0"),
    "a number without end": (train, [*TRAIN, "--lr=inf"], nothing, "--lr=inf must be at least 0"),
    "two lengths": (train, [*TRAIN, "--epochs=2"], nothing, "--max_steps and --epochs both say how long the run is"),
    "zero steps": (train, [*TRAIN, "--max_steps=0"], nothing, "--max_steps=0 must be above 0"),
    "an average that never moves": (train, [*TRAIN, "--ema_beta=1"], nothing, "--ema_beta must be below 1"),
    "windows beyond the context": (
        train, [*TRAIN, "--block_size=512"], nothing, "--block_size=512 is longer than the model's context of 128"),
    "a step of broken windows": (
        train, [*TRAIN, "--batch_tokens=500"], nothing, "not a multiple of --block_size=64"),
    "heads that do not divide": (train, [*TRAIN, "--n_head=3"], nothing, "n_head 3 must divide d_model 32"),
    "no such device": (train, [*TRAIN, "--device=gpu"], nothing, "--device=gpu is not a device"),
    "a device that is not here": (train, [*TRAIN, f"--device={NOT_HERE}"], nothing, "device"),

    # data
    "no such data": (
        train, [*TRAIN, "--data=pydoc"], nothing,
        r"no prepared data 'pydoc' \(did you mean .*pydocs.*python prepare.py pydoc --tokenizer=hybrid"),
    "text that was not prepared": (
        train, [*TRAIN, "--data=book.txt"], nothing,
        "book.txt is not a prepared folder; make one of it: "
        "python prepare.py book.txt --tokenizer=hybrid --vocab_size=600"),
    "another file of the same name": (
        train, [*TRAIN, "--data=b/novels.txt"], two_novels,
        "b/novels.txt is not a prepared folder; make one of it: python prepare.py b/novels.txt"),
    "a token file is missing": (
        train, TRAIN, lambda d: (d / "data/mine/train.0-pydocs.bin").unlink(), "train.0-pydocs.bin is missing"),
    "a token file is cut short": (
        train, TRAIN, lambda d: cut(d / "data/mine/val.0-pydocs.bin"),
        "val.0-pydocs.bin has .* bytes, but meta.json says"),
    "a mask is missing": (train, [*TRAIN, "--data=chats"], no_mask, "train.0-chats.mask.bin is missing"),
    "a mask is cut short": (
        train, [*TRAIN, "--data=chats"], half_a_mask, "train.0-chats.mask.bin has .* tokens of 1 byte;"),
    "meta.json is damaged": (train, TRAIN, lambda d: cut(d / "data/mine/meta.json"), "meta.json is damaged"),
    "meta.json contradicts its files": (train, TRAIN, other_tokens, "meta.json says 7 tokens"),
    "meta.json of another format": (train, TRAIN, other_format, "format 9"),
    "another tokenizer.json": (
        train, TRAIN, lambda d: (d / "data/mine/tokenizer.json").write_text("{}"),
        "tokenizer.json is not the one this folder was encoded with"),
    "a vocabulary too large for the model": (
        train, [*TRAIN, "--vocab_size=500"], nothing, "vocabulary of 600 tokens, the model of 500"),
    "ids outside the vocabulary": (train, TRAIN, ids_too_high, "token id 601, the model's vocabulary ends at 599"),
    "a token file that is half zeros": (train, TRAIN, half_zeroed, "train.0-pydocs.bin is damaged: its checksum"),
    "windows longer than the data": (
        train, [*TRAIN, "--data=short", "--context_length=100000", "--block_size=65536", "--batch_tokens=65536"], short,
        "fewer than one window of 65537"),
    "data without a weight": (
        train, [*TRAIN, "--data=mine:0"], nothing, "weights in --data and --base_data must be above 0"),
    "two tokenizers at once": (
        train, [*TRAIN, "--data=mine,data/short"], short,
        "data/short was not encoded with data/mine's tokenizer; .* --tokenizer=data/mine/tokenizer.json"),

    # runs
    "the folder holds somebody's files": (
        train, [*TRAIN, "--out=empty", "--overwrite"], lambda d: (d / "empty/notes.txt").write_text("mine"),
        r"empty holds files of others \(notes.txt\), which stay as they are; --out names another folder"),
    "the folder holds a model of another program": (
        train, [*TRAIN, "--out=run", "--overwrite"],
        lambda d: (d / "run/config.json").write_text('{"model_type": "x"}'),
        "run holds files of others"),
    "the folder is a file": (train, [*TRAIN, "--out=book.txt"], nothing, "book.txt is a file; --out names a folder"),
    "a size that cannot be": (train, [*TRAIN, "--n_head=0"], nothing, "--n_head=0 must be above 0"),
    "a model larger than the machine": (
        train, [*TRAIN, "--d_model=100000000", "--n_head=2", "--out=x"], nothing, "more than this machine's memory"),
    "a seed that torch cannot take": (train, [*TRAIN, "--seed=99999999999999999999"], nothing, "more than 63 bits"),
    "--resume of a step": (
        train, ["--resume=run/step_4.pt"], nothing, "--resume goes on with a run's ckpt.pt; --init_from=run/step_4.pt"),
    "--resume of nothing": (train, ["--resume=nowhere"], nothing, "there is no run to resume in nowhere"),
    "--resume=latest of no run": (train, ["--resume=latest"], nothing, "there is no run under out/ to resume"),
    "the folder holds a run": (
        train, [*TRAIN, "--out=run"], nothing, "run holds a run: --resume .*--out .*--overwrite"),
    "nothing to resume": (train, ["--resume", "--out=nowhere"], nothing, "no run to resume in nowhere"),
    "no tuned run to resume": (finetune, ["--resume"], nothing, "no run to resume in out/tinymemory-sft"),
    "resuming as another model": (
        train, ["--resume", "--out=run", "--model=ivme"], nothing, "the run in run is a tinymemory"),
    "resuming in another shape": (
        train, ["--resume", "--out=run", "--n_layer=3"], nothing, "the run has another shape: n_layer is 2"),
    "resuming a damaged checkpoint": (
        train, ["--resume", "--out=run"], lambda d: cut(d / "run/ckpt.pt"), "ckpt.pt is damaged or not a checkpoint"),
    "resuming with a damaged record": (
        train, ["--resume", "--out=run"], lambda d: cut(d / "run/config.json"), "config.json is damaged"),
    "resuming on changed data": (
        train, ["--resume", "--out=run", "--data=mine", "--max_steps=20"], other_data,
        "has changed since the checkpoint"),
    "decay without a start": (train, ["--decay_only", "--decay_steps=5"], nothing, "--decay_only needs --init_from"),
    "decay of a release": (
        train, ["--init_from=run/best.pt", "--decay_only", "--decay_steps=5", "--out=tail"],
        edit_checkpoint(optimizer={}),
        "run/best.pt is a release, which has no optimizer's state"),
    "decay without a length": (
        train, ["--decay_only", "--init_from=run/ckpt.pt"], nothing, "--decay_only needs --decay_steps"),
    "measuring with the training tool": (
        train, ["--eval_only", "--init_from=run/best.pt"], nothing, "python eval.py --ckpt=CHECKPOINT"),

    # checkpoints
    "no checkpoint to start from": (train, [*START, "--init_from=none.pt"], nothing, "no checkpoint none.pt"),
    "a foreign checkpoint": (
        train, [*START, "--init_from=foreign.pt"], lambda d: torch.save({"model": {}}, d / "foreign.pt"),
        "foreign.pt is not a checkpoint of this train.py: it lacks format"),
    "no checkpoint at all": (
        train, [*START, "--init_from=book.txt"], nothing, "book.txt is damaged or not a checkpoint"),
    "a checkpoint of another model": (
        train, [*START, "--model=ivme"], nothing, "run/best.pt holds a tinymemory, not a ivme"),
    "a checkpoint with another tokenizer": (
        train, [*START, "--data=short"], short,
        "not encoded with the checkpoint's tokenizer; prepare its text with --tokenizer=data/mine/tokenizer.json"),

    # fine-tuning
    "tuning without its start": (
        finetune, [], nothing,
        "starts from out/tinymemory/best.pt, which is not there: run python train.py --model=tinymemory first"),
    "tuning a recipe that names no start": (
        finetune, ["--model=ivme", "--data=chats"], chat_set,
        "--model=ivme names no checkpoint to start from: give --init_from=CHECKPOINT"),
    "tuning with the training tool": (
        train, ["--model=tinymemory-sft"], nothing, "python finetune.py --model=tinymemory-sft"),
    "a trick of tuning in training": (
        train, [*TRAIN, "--replay=0.1"], nothing, "--replay belongs to fine-tuning on chats: python finetune.py"),
    "replies of what is no chat": (
        finetune, [*TUNE, "--data=mine"], nothing,
        "fine-tuning needs a set of chats, and mine holds none; train.py trains on text"),
    "a set of chats that is a file still": (
        finetune, TUNE, nothing, "python prepare.py chats.jsonl --tokenizer=data/mine/tokenizer.json"),
    "a tuning step of broken windows": (
        finetune, [*TUNE, "--batch_tokens=500"], chat_set, "not a multiple of --block_size=64"),
    "relevance within windows": (
        finetune, [*TUNE, "--relevance=0.1", "--pack=stream"], chat_set, "it needs --pack=document"),
    "more relevance than replies": (
        finetune, [*TUNE, "--relevance=1.5"], chat_set, "--replay must be below 1 and --relevance at most 1"),
    "replay of nothing": (
        finetune, [*TUNE, "--replay=0.1", "--base_data="], chat_set, "--replay needs --base_data"),
    "a margin of nothing": (
        finetune, [*TUNE, "--relevance=0", "--relevance_margin=0.4"], chat_set,
        "--relevance_margin does nothing without --relevance"),
    "nothing but replay": (finetune, [*TUNE, "--replay=1"], chat_set, "--replay must be below 1"),
    "replay where everything counts": (
        finetune, [*TUNE, "--loss_on=all", "--replay=0.1"], chat_set,
        "--replay goes only with --loss_on=responses"),
    "replay of another tokenizer's data": (
        finetune, [*TUNE, "--base_data=data/short"], chats_and_short,
        "data/short was not encoded with the chats' tokenizer; "
        "prepare its text with --tokenizer=data/mine/tokenizer.json"),

    # sampling
    "a chat without a tuned model": (
        sample, ["--chat"], nothing, "there is no fine-tuning run under out/ yet: python finetune.py makes one"),
    "several chats": (sample, [*SAMPLE, "--chat", "--num_samples=2"], nothing, "--num_samples does not go with --chat"),
    "instructions without a chat": (sample, [*SAMPLE, "--system=be brief"], nothing, "--system belongs to --chat"),
    "a chat without roles": (
        sample, [*SAMPLE, "--chat"], checkpoint_without_roles, "no <.user.>, which chats are framed with"),
    "sampling without a checkpoint": (sample, ["--ckpt=none.pt"], nothing, "no checkpoint none.pt"),
    "sampling from a folder": (
        sample, ["--ckpt=run"], nothing, "run is a folder; name a checkpoint in it, such as run/best.pt"),
    "sampling from half a checkpoint": (sample, SAMPLE, lambda d: cut(d / "run/best.pt"), "best.pt is damaged"),
    "a checkpoint of a later version": (sample, SAMPLE, edit_checkpoint(format=2), "its format is 2, not 1"),
    "a checkpoint of a changed architecture": (
        sample, SAMPLE, edit_checkpoint(cfg={"n_experts": 4}), "does not fit tinymemory.py as it is now"),
    "a checkpoint whose architecture is gone": (sample, SAMPLE, edit_checkpoint(model_name="mine"), "no model 'mine'"),
    "averaged weights that were not kept": (
        sample, [*SAMPLE, "--ema"], edit_checkpoint(ema={}), "holds no EMA weights"),
    "a temperature below zero": (sample, [*SAMPLE, "--temperature=-1"], nothing, "--temperature=-1.0 makes no sense"),
    "no probability": (sample, [*SAMPLE, "--top_p=1.5"], nothing, "--top_p=1.5 makes no sense"),

    # preparing
    "nothing to prepare": (prepare, [], nothing, "name what to prepare: pydocs"),
    "no such corpus": (
        prepare, ["pydoc"], nothing, r"'pydoc' is neither a file.*\(did you mean pydocs or pydocs-chat\?\)"),
    "a budget that is no number": (
        prepare, ["book.txt:1.00001K"], nothing, "the budget behind book.txt: '1.00001K' is not a whole number"),
    "a budget for a mix": (prepare, ["ivme:3M"], nothing, "the sources of ivme have budgets of their own"),
    "a list of something": (prepare, ["book.txt", "--list"], nothing, "--list goes alone"),
    "showing what was not prepared": (prepare, ["--show=empty"], nothing, "empty is not a prepared folder"),
    "a copy that is not there": (
        prepare, ["finemath", "--source_dir=nowhere"], nothing,
        "--source_dir=nowhere holds no copy of HuggingFaceTB/finemath: expected nowhere/HuggingFaceTB/finemath"),
    "a folder without text": (prepare, ["empty"], nothing, "empty holds no file that prepare.py reads"),
    "a file of another kind": (prepare, ["run/loss.png"], nothing, "loss.png is not a file that prepare.py reads"),
    "broken JSON": (prepare, ["broken.jsonl"], nothing, "broken.jsonl line 2 is not JSON"),
    "rows that are no objects": (prepare, ["list.jsonl"], nothing, "list.jsonl line 1 is not a JSON object"),
    "no such column": (
        prepare, ["rows.jsonl", "--column=body"], nothing, "no column 'body', it has 'title', 'text'"),
    "half a gzip file": (prepare, ["half.jsonl.gz"], nothing, "half.jsonl.gz is not a whole gzip file"),
    "names beside --show": (prepare, ["pydocs", "--show=data/mine"], nothing, "leave out pydocs"),
    "a column of pydocs": (prepare, ["pydocs", "--column=text"], nothing, "--column is for files of yours"),
    "a copy of pydocs": (
        prepare, ["pydocs", "--source_dir=."], nothing, "--source_dir is for data sets of the Hugging"),
    "more behind an array": (
        prepare, ["two.json"], lambda d: (d / "two.json").write_text('[{"text": "a"}]\n[{"text": "b"}]'),
        "two.json holds more behind its array, which ends with item 1"),
    "no parquet": (prepare, ["fake.parquet"], nothing, "fake.parquet cannot be read as parquet"),
    "one document for two splits": (prepare, ["rows.jsonl"], nothing, "rows holds only one document of text"),
    "chats among texts": (
        prepare, ["."], text_and_chats,
        r"holds chats \(chats.jsonl\) as well as text \(book.txt\); name them one by one.*--column"),
    "chats that are none": (
        prepare, ["asked.jsonl"], nothing, "asked holds no document of text;.*; left out: 2 no reply"),
    "chats for a tokenizer without roles": (
        prepare, ["chats.jsonl", "--tokenizer=roles.json"], no_roles,
        r"the tokenizer has no <\|user\|>, .*take bpe, hybrid or chunk"),
    "the folder has other settings": (
        prepare, ["book.txt", "--name=mine"], nothing, "data/mine was made with other settings.*--name"),
    "a vocabulary below the bytes": (
        prepare, ["book.txt", "--vocab_size=100"], nothing, "--vocab_size=100 is too small.*263"),
    "a vocabulary below ASCII": (
        prepare, ["book.txt", "--tokenizer=chunk", "--vocab_size=283"], nothing,
        "--vocab_size=283 is too small.*284"),
    "no tokenizer": (
        prepare, ["book.txt", "--tokenizer=hybird"], nothing,
        r"neither bpe nor hybrid nor chunk nor gpt2 nor a file \(did you mean hybrid\?\)"),
    "a file that is no tokenizer": (
        prepare, ["book.txt", "--tokenizer=rows.jsonl"], nothing, "rows.jsonl is not a tokenizer.json"),
    "a size for a tokenizer that exists": (
        prepare, ["book.txt", "--tokenizer=data/mine/tokenizer.json", "--vocab_size=500"], nothing,
        "--vocab_size belongs to a new tokenizer"),
    "validation text only": (
        prepare, ["book.txt", "--val_fraction=1"], nothing, "--val_fraction=1.0 is not a fraction from 0 up to 1"),
    "a file where the folder should go": (prepare, ["book.txt", "--out_dir=book.txt"], nothing, "book.txt"),
}


def snapshot(root):
    """Path -> contents of all files."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def desk(corpora, trained, tmp_path, monkeypatch):
    """A current directory with data/mine, a finished run, a text, chats, and files that are wrong in some way."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpora / "data/pydocs-hybrid", "data/mine")
    shutil.copytree(trained, "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "book.txt").write_text("It was a dark night.\n\n" * 400)
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "rows.jsonl").write_text('{"title": "a", "text": "fine"}\n')
    chats = (json.dumps({"instruction": f"say {i}", "output": str(i)}) for i in range(50))
    (tmp_path / "chats.jsonl").write_text("".join(chat + "\n" for chat in chats))
    (tmp_path / "asked.jsonl").write_text(2 * '{"messages": [{"role": "user", "content": "Anybody?"}]}\n')
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 1000)[:-20])
    (tmp_path / "fake.parquet").write_bytes(b"PAR1 this is none")
    return tmp_path


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_status_2_and_nothing_written_over(what, desk, monkeypatch, capsys):
    tool, flags, spoil, line = MISTAKES[what]
    spoil(desk)
    capsys.readouterr()
    before = snapshot(desk)
    monkeypatch.setattr("sys.argv", [f"{tool.__name__}.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_tool(tool.main)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.count("\n") == 1 and err.startswith(f"{tool.__name__}.py: ") and "Traceback" not in err
    assert re.search(line, err), err
    after = snapshot(desk)
    assert all(after.get(path) == content for path, content in before.items())  # what was there is untouched
    assert not {path for path in after if path.suffix in (".pt", ".bin")} - set(before)  # nothing half-made looks whole


def test_a_mistake_in_a_process_of_its_own_shows_no_traceback(workdir):
    for words in (["train.py", "--model=none"], ["finetune.py", "--model=none"], ["sample.py", "--ckpt=none"],
                  ["prepare.py", "none"]):
        process = command(ROOT / words[0], *words[1:])
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and out == "" and err.count("\n") == 1


@pytest.mark.parametrize("tool", [train, finetune, sample, prepare], ids=lambda tool: tool.__name__)
def test_help_explains_every_flag_with_its_default(tool, workdir, capsys):
    with pytest.raises(SystemExit) as end:
        tool.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for field in tool.Settings.__dataclass_fields__:
        assert f"--{field}" in shown
    assert shown.count("[") >= len(tool.Settings.__dataclass_fields__)
