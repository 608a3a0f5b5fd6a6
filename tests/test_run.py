"""run.py: which run the flags mean, which data a name means, and what is in a checkpoint, also in an older one."""
import json
import os
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import common
import finetune
import prepare
import run
import runfolder
import sample
import train
from common import UserError
from conftest import (ALONE, ROOT, SMALL, evaluations, pretraining_plan, rows, run_train, same_tensors, tuning_plan)
from made_up import made_up_chats

TUNE = ["--block_size=64", "--batch_tokens=512", "--max_steps=1", "--eval_tokens=256", "--final_eval_tokens=256",
        "--sample_tokens=0", "--compile=off"]


def write_chats(path, n, seed):
    path.write_text("".join(json.dumps(chat) + "\n" for chat in made_up_chats(n, seed)))


# ---------------------------------------------------------------------------------------------------- recipes

def test_no_flags_mean_tinymemory_on_pydocs(workdir):
    s = pretraining_plan().settings
    assert (s.model, s.data, s.tokenizer, s.out) == ("tinymemory", "pydocs", "hybrid", "out/tinymemory")


def test_the_ivme_preset_is_its_cards_recipe_to_the_number(workdir):
    plan = pretraining_plan("--model=ivme")
    s, cfg = plan.settings, plan.cfg
    assert (s.max_steps, s.batch_tokens, s.warmup_steps) == (1447, 1_048_576, 100)
    assert (s.schedule, round(s.decay_fraction * s.max_steps), s.final_lr_fraction) == ("wsd", 289, 0.0)
    assert train.lr_factor(1447 - 289, s) == 1 > train.lr_factor(1447 - 288, s)
    assert (s.optimizer, s.muon_lr, s.lr, s.weight_decay, s.grad_clip) == ("muon", 0.02, 3e-4, 0.1, 1.0)
    assert (s.data, s.tokenizer, s.order, s.block_size, s.ema_beta) == ("ivme", "bpe", "sequential", 1024, 0.999)
    assert (cfg.n_layer, cfg.d_model, cfg.d_ff, cfg.n_head, cfg.n_kv_head) == (10, 384, 1024, 6, 2)
    assert (cfg.context_length, cfg.vocab_size) == (1024, 16_384)


def test_ivme_tuned_trains_the_cards_model_on_as_many_tokens_of_its_data(workdir):
    card, tuned = (pretraining_plan(f"--model={name}") for name in ("ivme", "ivme-tuned"))
    assert tuned.cfg == card.cfg and tuned.settings.out == "out/ivme-tuned"
    a, b = asdict(card.settings), asdict(tuned.settings)
    assert b["max_steps"] * b["batch_tokens"] == pytest.approx(a["max_steps"] * a["batch_tokens"], rel=1e-3)
    assert {name for name in a if a[name] != b[name]} == {
        "model", "out", "order", "batch_tokens", "max_steps", "muon_lr", "lr", "decay_fraction", "ema_beta"}


def test_i3_tuned_differs_from_the_cards_preset_in_how_it_optimizes_alone(workdir):
    card, tuned = (pretraining_plan(f"--model={name}") for name in ("i3", "i3-tuned"))
    assert tuned.cfg == card.cfg and tuned.settings.out == "out/i3-tuned"
    a, b = asdict(card.settings), asdict(tuned.settings)
    assert {name for name in a if a[name] != b[name]} == {
        "model", "out", "optimizer", "lr", "schedule", "decay_fraction", "final_lr_fraction"}
    assert (b["optimizer"], b["muon_lr"], b["lr"], b["schedule"]) == ("muon", 0.02, 3e-3, "wsd")


I3 = {"i3": ("tinychat", "chunk", 3e-4, 100), "i3-80m": ("i3-80m", "chunk", 3e-4, 100),
      "i3-200m": ("i3-200m", "bpe", 4e-4, 25)}


@pytest.mark.parametrize("preset", I3)
def test_the_i3_presets_are_their_cards_recipes(preset, workdir):
    plan = pretraining_plan(f"--model={preset}")
    s = plan.settings
    assert (s.data, s.tokenizer, s.lr, s.warmup_steps) == I3[preset] and s.out == f"out/{preset}"
    assert (s.optimizer, s.schedule, s.final_lr_fraction, s.grad_clip) == ("adamw", "cosine", 0.1, 1.0)
    assert s.block_size == plan.cfg.context_length == 256 and plan.cfg.n_head == 16


GPT2PRELN = {"gpt2preln": (6, 2500, 240_000), "gpt2preln-medium": (1, 2500, 240_000),
             "gpt2preln-gpt2": (15, 1024, 245_760)}


@pytest.mark.parametrize("preset", GPT2PRELN)
def test_the_gpt2preln_presets_are_their_cards_recipe(preset, workdir):
    plan = pretraining_plan(f"--model={preset}")
    s = plan.settings
    micro, T, batch_tokens = GPT2PRELN[preset]
    assert (s.micro_batch, s.block_size, s.batch_tokens) == (micro, T, batch_tokens) and plan.cfg.context_length == T
    assert batch_tokens % (T * micro) == 0
    assert (s.optimizer, s.lr, s.lr * s.final_lr_fraction) == ("adamw", 2e-4, pytest.approx(2e-5))
    assert (s.order, s.pack, s.data, s.max_steps) == ("balanced", "document", "gpt2preln", 8000)
    # no decay of its own: stable checkpoints are decayed by --decay_only
    assert s.schedule == "wsd" and train.lr_factor(7999, s) == 1 and train.lr_factor(0, s) < 0.01


# ---------------------------------------------------------------------------------------------------- which tool

def test_fine_tunings_flags_are_those_that_its_settings_add():
    own = {field.name for field in fields(finetune.Settings)} - {field.name for field in fields(train.Settings)}
    assert set(run.FINE_TUNING) == own


@pytest.mark.parametrize("flag", run.FINE_TUNING)
def test_train_given_a_flag_of_fine_tuning_names_the_tool_that_has_it(flag, workdir):
    line = f"--{flag} belongs to fine-tuning on chats: python finetune.py .*--{flag}=0.5"
    with pytest.raises(UserError, match=line):
        train.main([f"--{flag}=0.5"])


def test_train_given_a_recipe_for_fine_tuning_names_finetune(workdir):
    for flags in ([], ["--out=elsewhere", "--lr=0.1"]):
        with pytest.raises(UserError, match="recipe for fine-tuning: python finetune.py --model=tinymemory-sft"):
            train.main(["--model=tinymemory-sft", *flags])


@pytest.fixture
def both(trained, corpora, workdir):
    """The folders run (pretrained) and tuned (from it), and chats.jsonl in its tokenizer as own/chats."""
    shutil.copytree(trained, "run")
    write_chats(workdir / "chats.jsonl", 60, 2)
    prepare.prepare(["chats.jsonl"], prepare.Settings(
        tokenizer="run/tokenizer.json", out_dir="own", name="chats", val_fraction=0.1))
    finetune.main(["--init_from=run/best.pt", "--data=own/chats", "--out=tuned", *TUNE])
    return workdir


def test_each_tool_names_the_other_for_the_others_runs(both):
    cases = [(train, "tuned", "fine-tuning", "finetune"), (finetune, "run", "pretraining", "train")]
    for tool, out, kind, other in cases:
        with pytest.raises(UserError, match=f"a {kind} run: python {other}.py --resume --out={out} goes on"):
            tool.main(["--resume", f"--out={out}"])
        flags = [f"--init_from={out}/best.pt", "--decay_only", "--decay_steps=2", "--out=new"]
        with pytest.raises(UserError, match=f"a {kind} run: python {other}.py --init_from={out}/best.pt --decay_only"):
            tool.main(flags)

        # before its first checkpoint, a run is known by config.json alone
        for checkpoint in (both / out).glob("*.pt"):
            checkpoint.unlink()
        if out == "tuned":
            shutil.copy("run/best.pt", "start.pt")
        with pytest.raises(UserError, match=f"a {kind} run: python {other}.py --resume --out={out} goes on"):
            tool.main(["--resume", f"--out={out}"])


def test_a_tuned_run_of_random_weights_stopped_before_its_first_checkpoint_goes_on(both):
    shape = ["--model=tinymemory", *SMALL[:5], "--vocab_size=600", "--tokenizer=hybrid"]
    finetune.main([*shape, "--init_from=", "--data=own/chats", "--out=random", *TUNE])
    expected = run.read_checkpoint("random/ckpt.pt")
    for checkpoint in (both / "random").glob("*.pt"):
        checkpoint.unlink()
    assert finetune.main(["--resume", "--out=random"]) == 0
    assert same_tensors(expected["model"], run.read_checkpoint("random/ckpt.pt")["model"])


def test_evaluating_is_a_tool_of_its_own(workdir):
    with pytest.raises(UserError, match="python eval.py --ckpt"):
        train.main(["--init_from=run/best.pt", "--eval_only"])


def test_resume_without_out_means_the_folder_that_a_run_of_this_model_goes_to(both):
    for tool, out in ((train, "out/tinymemory"), (finetune, "out/tinymemory-sft")):
        shutil.copytree("run" if tool is train else "tuned", out)
        steps = run.read_checkpoint(f"{out}/ckpt.pt")["step"] + 1
        assert tool.main(["--resume", f"--max_steps={steps}"]) == 0
        assert run.read_checkpoint(f"{out}/ckpt.pt")["step"] == steps


# ---------------------------------------------------------------------------------------------------- checkpoints

def test_checkpoints_hold_plain_values_and_the_documented_keys(trained):
    checkpoint = torch.load(trained / "ckpt.pt", weights_only=True)
    assert tuple(checkpoint) == tuple(run.KEYS)
    assert checkpoint["step"] == 12 and checkpoint["tokens"] == 12 * 512 and checkpoint["model_name"] == "tinymemory"
    assert set(checkpoint["train"]) == {f.name for f in fields(train.Settings)}


def test_load_checkpoint_picks_the_winner_unless_told(trained):
    chosen, tokenizer, checkpoint = run.load_checkpoint(trained / "best.pt")
    raw, ema = (run.load_checkpoint(trained / "best.pt", ema=e)[0].state_dict() for e in (False, True))
    assert same_tensors(chosen.state_dict(), ema if checkpoint["use_ema"] else raw) and not same_tensors(raw, ema)
    assert not chosen.training and tokenizer.encode("<|bos|>").ids != [1]


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_weights_that_won_are_those_of_a_new_run_and_of_the_last_measurement(use_ema, trained, workdir):
    shutil.copytree(trained, "won")
    runfolder.save_checkpoint("won/best.pt", run.read_checkpoint("won/best.pt") | dict(use_ema=use_ema))
    won = run.load_checkpoint("won/best.pt", ema=use_ema)[0].state_dict()
    assert same_tensors(dict(run.load_checkpoint("won/best.pt")[0].state_dict()), dict(won))

    flags = [flag for flag in SMALL if not flag.startswith(("--n_", "--d_", "--context"))]
    train.main([*flags, "--init_from=won/best.pt", "--data=pydocs-hybrid", "--max_steps=1", "--lr=0", "--muon_lr=0",
                "--out=new"])
    assert same_tensors(run.read_checkpoint("new/ckpt.pt")["model"], dict(won))

    log = Path("won/metrics.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    train.main(["--resume", "--out=won"])
    (kind, loss), = rows("won")[-1]["val_loss"].items()
    best = run.read_checkpoint("won/best.pt")
    (there,) = [row for row in evaluations("won") if row["step"] == best["step"]]
    assert kind == ("ema" if use_ema else "raw") and loss["mixed"] == pytest.approx(there["val_loss"][kind]["mixed"])


def test_settings_of_another_version_are_read_and_what_is_unknown_is_left_out():
    values = dict(asdict(finetune.Settings(lr=0.5, replay=0.25)), eval_only=False, beam=3)
    assert run.known_settings(finetune.Settings, values) == finetune.Settings(lr=0.5, replay=0.25)
    assert run.known_settings(train.Settings, values) == train.Settings(model="tinymemory-sft", pack="document", lr=0.5)


# ---------------------------------------------------------------------------------------------------- older runs

# What train.py wrote into "train", and in this order, when it still was the tool for everything
OLD_TRAIN = dict(
    model="tinymemory", data="pydocs-hybrid", tokenizer="hybrid", out="old", resume=False, overwrite=False,
    init_from="", decay_only=False, eval_only=False, order="random", pack="stream", block_size=64, batch_tokens=512,
    micro_batch=8, grad_checkpoint=False, max_steps=8, epochs=0.0, loss_on="all", word_boost=1.0,
    response_start_tokens=8, response_start_weight=1.0, base_data="", replay=0.0, relevance=0.0, relevance_margin=1.0,
    optimizer="muon",
    muon_lr=0.02, lr=0.003, weight_decay=0.1, grad_clip=1.0, schedule="wsd", warmup_steps=3, decay_fraction=0.45,
    decay_steps=0, final_lr_fraction=0.0, ema_beta=0.98, eval_every=4, eval_tokens=1024, final_eval_tokens=1024,
    save_every=4, keep_every=0, log_every=1, sample_every=0, sample_prompt="", sample_tokens=8, seed=1337, device="cpu",
    dtype="float32", compile="off", deterministic=False)


def make_old(out, optimizer, **changes):
    """Makes of a run's folder what the older train.py would have left: no tokenizer.json, older settings and keys."""
    settings = dict(OLD_TRAIN, optimizer=optimizer, out=str(out), **changes)
    (out / "tokenizer.json").unlink()
    cfg = json.loads((out / "config.json").read_text())["cfg"]
    (out / "config.json").write_text(json.dumps(dict(model="tinymemory", cfg=cfg, train=settings), indent=1))
    for path in out.glob("*.pt"):
        now = torch.load(path, weights_only=True)
        states = now["optimizer"]
        torch.save(dict(
            format=1, step=now["step"], tokens=now["tokens"], model_name="tinymemory", cfg=cfg, train=settings,
            model=now["model"], ema=now["ema"], use_ema=now["use_ema"],
            optimizer=dict(adamw=states["adamw"], muon=states.get("muon", {})), rng=now["rng"], loader=now["loader"],
            tokenizer=now["tokenizer"],
            metrics=dict(best=now["metrics"]["best"], elapsed=now["metrics"]["elapsed"])), path)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_of_the_older_version_resumes_to_the_bit_samples_and_fine_tunes(optimizer, workdir, capsys):
    flags = ["--data=pydocs-hybrid", f"--optimizer={optimizer}", "--eval_every=4", "--muon_lr=0.02",
             "--decay_fraction=0.45"]
    run_train(*flags, "--out=whole", "--max_steps=8")
    run_train(*flags, "--out=old", "--max_steps=8", "--keep_every=4")
    for name in ("ckpt.pt", "best.pt", "step_8.pt"):
        (workdir / "old" / name).unlink()
    (workdir / "old/step_4.pt").rename(workdir / "old/ckpt.pt")  # it stopped there
    make_old(workdir / "old", optimizer)

    # it goes on
    assert train.main(["--resume", "--out=old"]) == 0
    a, b = (run.read_checkpoint(f"{out}/ckpt.pt") for out in ("whole", "old"))
    for key in ("model", "ema", "optimizer", "loader", "step", "tokens"):
        assert same_tensors(a[key], b[key]), key
    assert "eval_only" not in b["train"] and "loss_on" not in b["train"]

    # the older checkpoint itself speaks, starts a fine-tuning run, and gives prepare.py its tokenizer
    make_old(workdir / "old", optimizer)
    capsys.readouterr()
    assert sample.main(["--ckpt=old/best.pt", "--prompt=def ", "--max_new_tokens=5", "--device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    write_chats(workdir / "chats.jsonl", 60, 2)
    (workdir / "data").unlink()  # so that only the checkpoint holds the tokenizer
    line = "no prepared data 'chats'.*python prepare.py chats.jsonl --tokenizer=old/best.pt"
    with pytest.raises(UserError, match=line):
        finetune.main(["--init_from=old/best.pt", "--data=chats", "--out=tuned", *TUNE])
    assert prepare.main(["chats.jsonl", "--tokenizer=old/best.pt", "--val_fraction=0.1"]) == 0
    assert finetune.main(["--init_from=old/best.pt", "--data=chats", "--out=tuned", *TUNE]) == 0
    assert run.read_checkpoint("tuned/best.pt")["train"]["init_from"] == "old/best.pt"
    # the older run says what it was trained on, and that is gone
    assert "forgetting is not measured" in capsys.readouterr().out


def test_a_tuned_run_of_the_older_version_is_fine_tunings(both):
    """Its settings have the same names and say loss_on=responses."""
    finetune.main(["--init_from=run/best.pt", "--data=own/chats", "--out=old", *TUNE, "--max_steps=2"])
    now = run.read_checkpoint("old/ckpt.pt")["train"]
    kept = (*run.FINE_TUNING, "data", "init_from", "pack", "max_steps", "lr", "muon_lr", "warmup_steps")
    make_old(both / "old", "muon", **{name: now[name] for name in kept})
    assert finetune.main(["--resume", "--out=old", "--max_steps=3"]) == 0
    assert run.read_checkpoint("old/ckpt.pt")["step"] == 3
    with pytest.raises(UserError, match="python finetune.py --resume --out=old"):
        train.main(["--resume", "--out=old"])


# ---------------------------------------------------------------------------------------------------- which data

SMALL_IVME = ["--model=ivme", "--n_layer=1", "--d_model=32", "--n_head=2", "--n_kv_head=1", "--d_ff=48",
              "--context_length=64", "--block_size=64", "--batch_tokens=512", "--max_steps=1", "--eval_tokens=256",
              "--final_eval_tokens=256", "--sample_tokens=0", "--compile=off", "--device=cpu"]


def test_a_recipe_whose_mix_is_missing_names_the_command_and_what_is_ready(workdir):
    """Of what is prepared only sets in the recipe's tokenizer are named."""
    (workdir / "data").unlink()
    (workdir / "sums.txt").write_text("1 + 1 = 2\n\n" * 3000)
    prepare.prepare(["sums.txt"], prepare.Settings(vocab_size=270, name="finemath-bpe"))
    prepare.prepare(["sums.txt"], prepare.Settings(tokenizer="hybrid", vocab_size=300, name="other-hybrid"))
    with pytest.raises(UserError) as error:
        train.main(SMALL_IVME)
    assert str(error.value) == ("there is no prepared data 'ivme'; prepare it: python prepare.py ivme; "
                                "prepared and ready is --data=finemath")
    assert train.main([*SMALL_IVME, "--data=finemath"]) == 0
    assert run.read_checkpoint("out/ivme/best.pt")["step"] == 1


def test_a_name_means_the_folder_in_the_checkpoints_tokenizer(trained, workdir, monkeypatch):
    """Of two sets of one name, or with the one that is missing, or that can be made on the spot."""
    (workdir / "data").unlink()
    write_chats(workdir / "chats.jsonl", 60, 2)
    flags = [f"--init_from={trained}/best.pt", "--model=tinymemory-sft", "--data=chats", "--replay=0", "--base_data=",
             "--tokenizer=hybrid", *TUNE]
    other = dict(tokenizer="hybrid", vocab_size=600, val_fraction=0.1)
    prepare.prepare(["chats.jsonl"], prepare.Settings(name="chats-hybrid-600", **other))  # another tokenizer
    before = sorted(workdir.rglob("*"))
    line = rf"no prepared data 'chats'.*python prepare.py chats.jsonl --tokenizer={trained}/tokenizer.json"
    with pytest.raises(UserError, match=line):
        finetune.main([*flags, "--out=missing"])
    assert sorted(workdir.rglob("*")) == before  # nothing is written to say so

    # with the command that the line names it is found, from whatever run of this tokenizer one starts
    prepare.main(["chats.jsonl", f"--tokenizer={trained}/tokenizer.json", "--val_fraction=0.1"])
    assert finetune.main([*flags, "--out=found"]) == 0
    assert finetune.main(["--resume", "--out=found", "--max_steps=2"]) == 0
    assert finetune.main([*flags, "--init_from=found/best.pt", "--out=again"]) == 0

    # an embedded corpus is prepared on the spot, with a file of the same tokenizer
    made = []

    def copied(names, s):
        made.append((names, s.tokenizer))
        shutil.copytree(f"data/chats-{trained.name}", "data/pydocs-chat-chats-" + trained.name)

    monkeypatch.setattr("prepare.prepare", copied)
    tokenizer = f"data/chats-{trained.name}/tokenizer.json"
    text = (trained / "tokenizer.json").read_text()
    shutil.copytree(f"data/chats-{trained.name}", "data/more-hybrid-600")
    sources, _ = run.find_data("pydocs-chat,more", "hybrid", 600, ALONE, text, f"{trained}/best.pt")
    assert made == [(["pydocs-chat"], tokenizer)] and len(sources) == 2

    # without a checkpoint the first name decides
    assert len(run.find_data("chats-hybrid-600,chats", "hybrid", 600, ALONE)[0]) == 2
    shutil.rmtree("data/more-hybrid-600")
    line = "no prepared data 'more'.*--tokenizer=data/chats-hybrid-600/tokenizer.json"
    with pytest.raises(UserError, match=line):
        run.find_data("chats-hybrid-600,more", "hybrid", 600, ALONE)


def test_a_checkpoints_own_data_is_looked_for_as_it_was(trained, workdir):
    plan = tuning_plan(f"--init_from={trained}/best.pt", "--model=tinymemory-sft")
    assert plan.settings.tokenizer == run.read_checkpoint(trained / "best.pt")["train"]["tokenizer"]


def test_two_folders_may_bring_sources_of_one_name(workdir):
    sources, _ = run.find_data("pydocs-hybrid,pydocs-hybrid:2.5,two-hybrid", "hybrid", 600, ALONE)
    assert [source.name for source in sources] == ["pydocs-0", "pydocs-1", "one", "two"]
    assert [source.weight for source in sources] == [1.0, 2.5, 1.0, 1.0]


# ------------------------------------------------------------------------------------------------ whose folder it is

def test_resume_takes_a_folder_a_checkpoint_or_the_latest_run(workdir):
    for out in ("out/old", "out/new"):
        run_train("--data=pydocs-hybrid", f"--out={out}", "--max_steps=2")
    os.utime("out/old/metrics.jsonl", (0, 0))
    for words, folder in [(["--resume=out/old"], "out/old"), (["--resume", "out/old/ckpt.pt"], "out/old"),
                          (["--resume=latest"], "out/new"), (["--resume", "--out=out/old"], "out/old")]:
        plan = pretraining_plan(*words, "--max_steps=3")
        assert (plan.kind, plan.settings.out, plan.start_path) == ("resumed", folder, f"{folder}/ckpt.pt")
        assert plan.settings.max_steps == 3


def test_only_one_run_writes_into_a_folder_and_the_second_changes_nothing(workdir):
    run_train("--data=pydocs-hybrid", "--out=taken", "--max_steps=2")
    lock = common.lock(workdir / "taken/.lock")
    if lock is None or common.lock(workdir / "taken/.lock") is not None:
        pytest.skip("this disk has no locks")
    before = {path: path.read_bytes() for path in (workdir / "taken").iterdir()}
    for flag in ("--overwrite", "--resume"):
        with pytest.raises(UserError, match="another run is writing into taken"):
            run_train("--data=pydocs-hybrid", "--out=taken", flag, "--max_steps=3")
    assert {path: path.read_bytes() for path in (workdir / "taken").iterdir()} == before


def test_a_folder_belongs_to_its_run_from_the_first_second(workdir):
    """Before any checkpoint is there."""
    run_train("--data=pydocs-hybrid", "--out=young", "--max_steps=2")
    for path in (workdir / "young").glob("*.pt"):
        path.unlink()
    with pytest.raises(UserError, match="young holds a run: --resume"):
        run_train("--data=pydocs-hybrid", "--out=young", "--max_steps=3")


def test_overwriting_deletes_only_what_a_run_has_written(workdir):
    run_train("--data=pydocs-hybrid", "--out=mine", "--max_steps=2", "--keep_every=1")
    for name in ("notes.txt", "step_best.pt", "best.pt.old", "ckpt.part"):
        (workdir / "mine" / name).write_text("the user's")
    (workdir / "mine/best.pt.part").write_text("half a file of a run that was killed")
    run_train("--data=pydocs-hybrid", "--out=mine", "--max_steps=1", "--overwrite")
    names = {path.name for path in (workdir / "mine").iterdir()}
    assert {"notes.txt", "step_best.pt", "best.pt.old", "ckpt.part"} < names
    assert not {"step_1.pt", "step_2.pt", "best.pt.part"} & names


def test_what_editors_and_systems_leave_beside_the_programs_is_no_architecture(tmp_path, monkeypatch):
    (tmp_path / "._ivme.py").write_bytes(b"\x00\x05\x16\x07PRESETS")
    (tmp_path / ".#ivme.py").symlink_to("me@host.1234")
    (tmp_path / "latin.py").write_bytes("PRÄSETS = 'caf\xe9'\n".encode("latin-1"))
    (tmp_path / "old.py").mkdir()
    (tmp_path / "ivme.py").write_text("PRESETS = {}\n")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run.find_preset("ivme")[0].__name__ == "ivme"
    with pytest.raises(UserError, match="there is no model 'latin'"):
        run.find_preset("latin")


def test_an_unknown_choice_of_kernels_is_one_line(monkeypatch):
    monkeypatch.setenv("KERNELS", "gpu")
    for name in ("i3", "ivme"):
        module, cfg, _ = run.find_preset(name)
        model = module.Model(replace(cfg, n_layer=1, d_model=32, n_head=2, vocab_size=40))
        with pytest.raises(UserError, match="KERNELS=gpu is not one of auto, reference, cpu, cuda"):
            run.on_device(model, "cpu")


# ---------------------------------------------------------------------------------------------------- edges

@pytest.mark.parametrize("name", ["a,b", "x:2", "a b:1.5,c", "é'\"$(x)"])
def test_a_prepared_folder_is_found_whatever_characters_its_name_has(name, workdir):
    shutil.copytree("data/two-hybrid", f"data/{name}")
    for spec in (name, f"data/{name}"):
        assert [source.name for source in run.find_data(spec, "hybrid", 600, ALONE)[0]] == ["one", "two"]
    shutil.rmtree(f"data/{name}")


@pytest.mark.parametrize("weight", ["1..2", ".", "..", "1.2.3"])
def test_a_weight_that_is_no_number_is_a_part_of_the_name(weight, workdir):
    with pytest.raises(UserError, match="there is no prepared data"):
        run.find_data(f"two-hybrid:{weight}", "hybrid", 600, ALONE)


FILES = {
    "broken": "PRESETS = {", "needs": "import nowhere_at_all\nPRESETS = {}", "five": "PRESETS = 5",
    "my copy": "PRESETS = {", "ivme.bak": "PRESETS = {",
}


def test_other_files_beside_the_architectures_stop_nothing(tmp_path, monkeypatch):
    for stem, text in FILES.items():
        (tmp_path / f"{stem}.py").write_text(text)
    shutil.copy(ROOT / "ivme.py", tmp_path)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run.find_preset("ivme")[0].__name__ == "ivme"
    with pytest.raises(UserError, match="there is no model 'ivmi' .did you mean ivme..; there are ivme, ivme-tuned$"):
        run.find_preset("ivmi")
    lines = dict(broken="SyntaxError", needs="ModuleNotFoundError", five="five.py is no architecture")
    for stem, line in lines.items():
        with pytest.raises(UserError, match=line):
            run.find_preset(stem)
    with pytest.raises(UserError, match="there is no model 5"):
        run.find_preset(5)


def test_the_record_of_another_program_is_no_run(tmp_path):
    for record in ({"train": {"a": 1}, "model_type": "llama"}, [], 5, {"model": 5, "cfg": {}, "train": {}}):
        (tmp_path / "config.json").write_text(json.dumps(record))
        assert runfolder.recorded_settings(tmp_path) == {}


@given(values=st.dictionaries(st.sampled_from([f.name for f in fields(train.Settings)]),
                              st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)))
def test_recorded_settings_have_the_types_of_settings_or_are_damaged(values):
    try:
        s = run.known_settings(train.Settings, values)
    except TypeError:
        return
    assert all(type(getattr(s, f.name)) in (type(f.default), int) or f.default is None for f in fields(s))


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    lines = [b'{"step": 1}', b"[1]", b'"x"', b"null", b'{"a": 1}', b"\xff\xfe", b'{"step": 2, "x": "\xff"}', b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [row["step"] for row in runfolder.read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_overwriting_leaves_folders_where_they_are(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "best.pt.part").mkdir()
    names = [path.name for path in runfolder.own_files(out)]
    assert "best.pt" in names and "best.pt.part" not in names


def test_resuming_two_runs_at_once_is_one_line(workdir):
    with pytest.raises(UserError, match="--resume=q and --out=other name two runs"):
        pretraining_plan("--resume=q", "--out=other")


@pytest.mark.parametrize("key, value", [
    ("model", 5), ("model_name", 5), ("train", None), ("cfg", []), ("step", "1"), ("tokenizer", b"x")])
def test_a_checkpoint_of_other_types_is_one_line(key, value, trained, tmp_path):
    checkpoint = run.read_checkpoint(trained / "best.pt")
    checkpoint[key] = value
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt is damaged: {key} cannot be what it holds"):
        run.read_checkpoint(tmp_path / "x.pt")


def test_a_decay_that_was_killed_before_its_first_checkpoint_is_resumed_as_a_decay(trained, workdir):
    flags = [f"--init_from={trained}/ckpt.pt", "--decay_only", "--decay_steps=4", "--save_every=0", "--out=tail"]
    train.main(flags)
    whole = run.read_checkpoint("tail/ckpt.pt")
    for path in Path("tail").glob("*.pt"):
        path.unlink()
    train.main(["--resume", "--out=tail"])
    again = run.read_checkpoint("tail/ckpt.pt")
    assert again["step"] == whole["step"] == 16 and same_tensors(again["model"], whole["model"])


def test_the_latest_run_may_have_no_log_yet(workdir):
    for out in ("out/a", "out/b"):
        run_train("--data=pydocs-hybrid", f"--out={out}", "--max_steps=2")
    Path("out/b/metrics.jsonl").unlink()
    os.utime("out/b/config.json", (2 ** 33, 2 ** 33))
    assert run.latest_run(False) == Path("out/b")
