"""Whole programs: killed and resumed, over two processes, interrupted, out of disk, and sampled from; a recipe from beginning to end."""
import contextlib
import json
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch

import prepare
import train
from corpus.loader import Loader
from conftest import ROOT, SMALL, command, same_tensors

TIMES = ("tokens_per_s", "elapsed")  # what a clock says is all that may differ between two equal runs


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err[-3000:]
    return out


def last_step(path):
    try:
        return max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=0)
    except (FileNotFoundError, ValueError):
        return 0  # not there yet, or half a line


# Kills the process at the n-th checkpoint: "before" the complete file takes the old one's place, or "within", when half of it is written
KILL_WHILE_SAVING = """
import os, signal, sys, train
n, where = int(sys.argv[1]), sys.argv[2]
replace = os.replace
def replace_or_die(part, path):
    global n
    if str(path).endswith("ckpt.pt"):
        n -= 1
        if n == 0:
            if where == "within":
                os.truncate(part, os.path.getsize(part) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)
os.replace = replace_or_die
train.main(sys.argv[3:])
"""


@pytest.mark.long
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_run_killed_again_and_again_and_resumed_is_the_uninterrupted_run_to_the_bit(compile, workdir, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workdir / "inductor"))  # compiled once, by the first of these processes
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")  # the compiler knows what the CPU knows: no trials
    flags = [*SMALL, "--vocab_size=600", "--data=pydocs-hybrid", f"--compile={compile}", "--max_steps=100", "--eval_every=20", "--save_every=5",
             "--word_boost=1.5", "--sample_tokens=0"] + ["--n_layer=1"] * (compile == "on")  # quicker to compile
    finish(command(ROOT / "train.py", *flags, "--out=whole"))
    rng, go_on = random.Random(compile), [ROOT / "train.py", "--resume", "--out=killed"]
    if compile == "off":
        finish(command("-c", KILL_WHILE_SAVING, 2, "within", *flags, "--out=killed"), -signal.SIGKILL)
        assert train.read_checkpoint(workdir / "killed/ckpt.pt")["step"] == 5  # the one before the torn one
        finish(command("-c", KILL_WHILE_SAVING, 1, "before", "--resume", "--out=killed"), -signal.SIGKILL)
    for earliest in (8, 24) if compile == "off" else (18,):  # and from outside, at a random step; compiling takes long, once has to do
        process = command(*(go_on if compile == "off" else [ROOT / "train.py", *flags, "--out=killed"]))
        at = earliest + rng.randrange(8)
        while process.poll() is None and last_step(workdir / "killed/metrics.jsonl") < at:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and at <= last_step(workdir / "killed/metrics.jsonl") < 100
    finish(command(*go_on))
    assert metrics(workdir / "killed") == metrics(workdir / "whole")
    for name in ("ckpt.pt", "best.pt"):
        a, b = (train.read_checkpoint(workdir / run / name) for run in ("killed", "whole"))
        for key in ("step", "tokens", "model", "ema", "use_ema", "optimizer", "loader", "rng"):
            assert same_tensors(a[key], b[key]), (name, key)


SMALL_I3 = [*(f for f in SMALL if not f.startswith("--d_ff")), "--model=i3", "--vocab_size=600", "--data=pydocs-hybrid", "--d_state=4", "--delta_rank=4", "--ffn_rank=8",
            "--head_rank=16"]


def test_i3_killed_and_resumed_is_the_uninterrupted_run_to_the_bit(workdir):
    finish(command(ROOT / "train.py", *SMALL_I3, "--out=whole"))
    finish(command("-c", KILL_WHILE_SAVING, 2, "within", *SMALL_I3, "--out=killed"), -signal.SIGKILL)
    finish(command(ROOT / "train.py", "--resume", "--out=killed"))
    assert metrics(workdir / "killed") == metrics(workdir / "whole")
    a, b = (train.read_checkpoint(workdir / run / "ckpt.pt") for run in ("killed", "whole"))
    assert all(same_tensors(a[key], b[key]) for key in ("model", "ema", "optimizer"))


@pytest.mark.parametrize("shape", [(), ("--n_attention=1", "--d_inner=48", "--ffn_rank=0", "--head_rank=0", "--optimizer=muon")], ids=["hybrid", "attention"])
def test_i3_trains_and_samples_without_a_compiler(shape, workdir):
    env = dict(PATH="", TORCH_EXTENSIONS_DIR=str(workdir / "nothing"))
    for words in ([ROOT / "train.py", *SMALL_I3, *shape, "--out=run"], [ROOT / "sample.py", "--ckpt=run/best.pt", "--prompt=def ", "--max_new_tokens=200", "--device=cpu"]):
        process = command(*words, **env)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        assert err.splitlines() == ["kernels      there is no C++ compiler (c++), so the selective scan runs in PyTorch, several times slower"]
    assert out.startswith("def ")


def test_a_run_killed_before_its_first_checkpoint_resumes_from_its_recorded_settings(workdir):
    finish(command("-c", KILL_WHILE_SAVING, 1, "within", *SMALL, "--vocab_size=600", "--data=pydocs-hybrid", "--seed=7", "--out=early"), -signal.SIGKILL)
    assert not (workdir / "early/ckpt.pt").exists()
    finish(command(ROOT / "train.py", "--resume", "--out=early"))
    assert train.read_checkpoint(workdir / "early/ckpt.pt")["train"]["seed"] == 7
    assert [r["step"] for r in metrics(workdir / "early") if "train_loss" in r] == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_leave_quietly(number, workdir):
    process = command(ROOT / "train.py", *SMALL, "--vocab_size=600", "--data=pydocs-hybrid", "--max_steps=100000", "--save_every=0", "--eval_every=0", "--out=long")
    while last_step(workdir / "long/metrics.jsonl") < 3:
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and "--resume --out=long" in out
    step = train.read_checkpoint(workdir / "long/ckpt.pt")["step"]
    assert step == last_step(workdir / "long/metrics.jsonl") and f"stopped at step {step:,}" in out


def torchrun(n, *flags):
    return command("-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", ROOT / "train.py", *flags)


def test_two_processes_give_the_losses_of_one_and_share_muons_work(workdir):
    """Global batch of 8 rows of packed documents, weighted losses normalised over all of it, gradients accumulated on both sides."""
    flags = [*SMALL, "--n_layer=3", "--vocab_size=600", "--data=two-hybrid", "--max_steps=20", "--eval_every=10", "--word_boost=1.7", "--micro_batch=2", "--order=balanced",
             "--pack=document"]
    finish(command(ROOT / "train.py", *flags, "--out=one"))
    finish(torchrun(2, *flags, "--out=two"))
    one, two = metrics(workdir / "one"), metrics(workdir / "two")
    assert [r["step"] for r in one] == [r["step"] for r in two] and len([r for r in one if "train_loss" in r]) == 20
    for a, b in zip(one, two):
        if "train_loss" in a:
            assert abs(a["train_loss"] - b["train_loss"]) < 1e-4 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3
        else:
            for kind in a["val_loss"]:
                assert abs(a["val_loss"][kind]["mixed"] - b["val_loss"][kind]["mixed"]) < 1e-4
                assert np.allclose(list(a["val_loss"][kind]["source"].values()), list(b["val_loss"][kind]["source"].values()), atol=1e-4)
    a, b = (train.read_checkpoint(workdir / run / "ckpt.pt") for run in ("one", "two"))
    assert all(torch.allclose(a["model"][k], b["model"][k], atol=1e-3) for k in a["model"]) and len(b["rng"]) == 2


# Each process counts the matrices that it orthogonalises and compares its step with that of a process alone
SHARED_MUON = """
import torch, torch.distributed as dist, train
def matrices():
    g = torch.Generator().manual_seed(0)
    shapes = [(24, 16)] * 3 + [(16, 24)] * 4 + [(16, 16)]
    params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)
    return [(str(i), p, (8, 16) if p.shape == (24, 16) else None) for i, p in enumerate(params)]
alone, shared = matrices(), matrices()
train.Muon(alone).step(0.1)
seen, orthogonalize = [], train.orthogonalize
train.orthogonalize = lambda stack, dtype: (seen.append(int((stack.abs().sum((1, 2)) > 0).sum())), orthogonalize(stack, dtype))[1]
dist.init_process_group("gloo")
train.Muon(shared).step(0.1)
assert all(torch.allclose(a[1], b[1], atol=1e-6) for a, b in zip(alone, shared))
open(f"did-{dist.get_rank()}", "w").write(str(sum(seen)))
dist.destroy_process_group()
"""


def test_muons_stacks_are_shared_out_over_the_processes(workdir):
    (workdir / "shared.py").write_text(SHARED_MUON)
    finish(command("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", workdir / "shared.py"))
    done = sorted(int((workdir / f"did-{rank}").read_text()) for rank in range(2))
    assert sum(done) == 3 * 2 + 4 + 1 and done[0] >= 4  # eleven maps, each orthogonalised once, about half on either side


# Runs a tool with a limit on the size of a file it may write, which fails as a full disk does
LITTLE_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(workdir):
    flags = [*SMALL, "--vocab_size=600", "--data=pydocs-hybrid", "--out=full"]
    finish(command(ROOT / "train.py", *flags))
    before = (workdir / "full/ckpt.pt").read_bytes()
    process = command("-c", LITTLE_DISK, len(before) // 2, ROOT / "train.py", "--resume", "--out=full", "--max_steps=20")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "no space left" in err
    assert (workdir / "full/ckpt.pt").read_bytes() == before


def test_the_terminal_shows_one_updating_line_and_a_pipe_plain_lines(workdir):
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")
    flags = [*SMALL, "--vocab_size=600", "--data=pydocs-hybrid"]
    piped = finish(command(ROOT / "train.py", *flags, "--out=piped"))
    assert "\r" not in piped and "\x1b" not in piped and piped.count("\nstep ") == 12 and piped.count("\neval ") == 2
    seen, status = [], None
    parent, child = pty.fork()
    if parent == 0:
        os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *flags, "--out=shown"])
    with open(child, "rb", buffering=0) as f:
        while True:
            try:
                data = f.read(4096)
            except OSError:  # Linux's way of saying that the other side closed
                break
            if not data:
                break
            seen.append(data)
    _, status = os.waitpid(parent, 0)
    shown = b"".join(seen).decode()
    assert os.waitstatus_to_exitcode(status) == 0
    assert "\r\x1b[Kstep" in shown and "left" in shown and shown.rstrip().splitlines()[-1].startswith("wrote shown")


# A step with all the state that the optimizers have in each step but the first; then the most memory that the process ever had
PEAK = r"""
import re, sys, torch, train
class Optimizers(train.Optimizers):
    def __init__(self, model, *args):
        super().__init__(model, *args)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        self.step(0.0)
        for p in model.parameters():
            p.grad = None
train.Optimizers = Optimizers
train.main(sys.argv[1:])
print(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.long
@pytest.mark.parametrize("dtype, limit", [("bfloat16", 2.4e9), ("float32", 4e9)])
def test_training_ivme_on_8192_tokens_at_once_fits_in_memory(dtype, limit, workdir):
    """The whole process: weights, gradients, Muon, AdamW, EMA, activations, the checkpoint's writing. Large blocks go straight back to the system
    here: what glibc's heap keeps of them for itself was seen to be 0.5 to 0.9 GB, another amount in every run."""
    if str(train.pick_device(train.Settings(device="cpu"), 0)[1]) != f"torch.{dtype}":
        pytest.skip("takes a minute, or many where bfloat16 is emulated: only in the dtype that this CPU trains in")
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the system's own maximum counts the memory of the process that started this one too")
    out = finish(command("-c", PEAK, "--model=ivme", "--data=pydocs-hybrid", "--order=random", "--batch_tokens=8192", "--micro_batch=8", "--max_steps=1",
                         "--eval_tokens=64", "--final_eval_tokens=64", "--sample_tokens=0", "--compile=off", "--device=cpu", f"--dtype={dtype}", MALLOC_MMAP_THRESHOLD_="1000000"))
    peak = int(out.split()[-1]) * 1024
    assert peak < limit, f"{peak / 1e9:.2f} GB"


# ---------------------------------------------------------------------------------------------------- a recipe from beginning to end

WORDS = dict(
    en=dict(the=["the", "a", "this", "every"], noun=["house", "river", "old man", "letter", "city", "child", "war", "garden", "king", "song", "road", "machine"],
            verb=["sees", "takes", "forgets", "follows", "builds", "loses", "remembers", "sells"], how=["slowly", "at night", "without a word", "in the end", "again"],
            also="and", wiki="{0} is {1} of {2}, known since {3}. It {4} {5} in {6}.", web="{0} {4} {1} {7}, {8} {2} {9} {5}!"),
    it=dict(the=["il", "un", "questo", "ogni"], noun=["palazzo", "fiume", "vecchio", "libro", "paese", "bambino", "giardino", "re", "canto", "treno", "mare", "lume"],
            verb=["vede", "prende", "dimentica", "segue", "costruisce", "perde", "ricorda", "vende"], how=["piano", "di notte", "senza parlare", "alla fine", "ancora"],
            also="e", wiki="{0} è {1} di {2}, noto dal {3}. {4} {5} nel {6}.", web="{0} {4} {1} {7}, {8} {2} {9} {5}!"))


def made_up_text(language, kind, rng):
    """A few sentences of a little grammar: enough for a model to learn for minutes, and never the same."""
    w = WORDS[language]
    thing = lambda: f"{rng.choice(w['the'])} {rng.choice(w['noun'])}"
    return " ".join(w[kind].format(thing(), thing(), thing(), rng.randrange(1200, 1990), rng.choice(w["verb"]), thing(), rng.randrange(1200, 1990),
                                   rng.choice(w["how"]), w["also"], rng.choice(w["verb"])).capitalize() for _ in range(rng.randint(1, 12)))


@pytest.fixture(scope="module")
def bilingual(tmp_path_factory):
    """data/mix-bpe-500: English and Italian, web and wiki, a folder each, of different sizes; one tokenizer of 500."""
    root, names = tmp_path_factory.mktemp("bilingual"), []
    for i, (language, kind) in enumerate((x, y) for x in ("en", "it") for y in ("web", "wiki")):
        rng = random.Random(i)
        (root / f"{kind}_{language}").mkdir()
        for part in range(2):
            texts = [made_up_text(language, kind, rng) for _ in range(200 * (i + 1))]
            (root / f"{kind}_{language}/{part}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        names.append(f"{root}/{kind}_{language}@{language}/{kind}")
    prepare.prepare(names, prepare.Settings(out_dir=str(root / "data"), vocab_size=500, name="mix-bpe-500"))
    return root


@pytest.mark.parametrize("pack", ("document", "stream"))
@pytest.mark.parametrize("order", ("balanced", "random", "sequential"))
def test_prepared_languages_and_kinds_are_drawn_as_the_order_says(order, pack, bilingual, monkeypatch):
    monkeypatch.chdir(bilingual)
    sources, _ = train.find_data("mix-bpe-500", "bpe", 500, True, None)
    drawn, turns = np.zeros(4), []
    loader = Loader(sources, order, 128, 2000, seed=0, bos=1 if pack == "document" else None)
    for _ in range(2000):
        before = list(loader.taken)
        y = loader.batch(1)[1]
        source = next(i for i in range(4) if loader.taken[i] != before[i])
        drawn[source] += int((y >= 0).sum())
        turns.append(source)
    share = np.full(4, 0.25) if order == "balanced" else np.array([len(s.train) for s in sources]) / sum(len(s.train) for s in sources)
    assert np.allclose(drawn / drawn.sum(), share, rtol=0.01)
    assert (turns == sorted(turns)) == (order == "sequential")


def test_the_gpt2preln_recipe_in_small(bilingual, monkeypatch):
    """A run at a constant rate keeps checkpoints; the second-last one is continued by its decay alone; the tail's best, which
    best_validation.json names, beats every checkpoint of the parent, and the learning rate is the closed form at every step."""
    monkeypatch.chdir(bilingual)
    shape = ["--model=gpt2preln", "--n_layer=2", "--d_model=64", "--n_head=4", "--context_length=128", "--vocab_size=500", "--data=mix-bpe-500"]
    run = ["--batch_tokens=1024", "--micro_batch=8", "--lr=8e-3", "--warmup_steps=10", "--ema_beta=0.5", "--eval_tokens=8192", "--final_eval_tokens=8192", "--sample_tokens=0", "--device=cpu",
           "--dtype=float32", "--log_every=1"]
    train.main([*shape, *run, "--max_steps=160", "--keep_every=40", "--eval_every=40", "--out=parent"])
    parent = [r for r in metrics(bilingual / "parent") if "val_loss" in r and not r.get("final")]
    kept = sorted(int(p.stem[5:]) for p in (bilingual / "parent").glob("step_*.pt"))
    assert kept == [r["step"] for r in parent] == [40, 80, 120, 160]

    train.main(["--init_from=parent/step_120.pt", "--decay_only", "--decay_steps=40", "--keep_every=8", "--eval_every=8", "--out=tail"])
    best = json.loads((bilingual / "tail/best_validation.json").read_text())
    tail = [r for r in metrics(bilingual / "tail") if "val_loss" in r and not r.get("final")]
    lowest = min((r["val_loss"][kind]["mixed"], r["step"]) for r in tail for kind in r["val_loss"])
    assert (best["val_loss_mixed"], best["step"]) == lowest and best["checkpoint"] == f"step_{best['step']}.pt"
    for r in parent:  # its last one too, which has seen as many tokens as the end of the tail
        assert best["val_loss_mixed"] < min(r["val_loss"][kind]["mixed"] for kind in r["val_loss"])

    # the checkpoint that it names is the one, measured again from the file, for every source, language and all
    model, tokenizer, checkpoint = train.load_checkpoint(bilingual / "tail" / best["checkpoint"], ema=best["weights"] == "ema")
    sources, _ = train.find_data("mix-bpe-500", "bpe", 500, True, None)
    again = train.evaluate(model, sources, 8192, 128, 16, contextlib.nullcontext, torch.ones(500), torch.device("cpu"), bos=tokenizer.token_to_id("<|bos|>"))
    assert abs(again["mixed"][0] - best["val_loss_mixed"]) < 1e-5
    assert all(abs(again["language"][x][0] - best[f"val_loss_{x}"]) < 1e-5 for x in ("en", "it"))
    assert set(best["sources"]) == {"web_en", "wiki_en", "web_it", "wiki_it"}
    assert all(abs(again["source"][x][0] - v["val_loss"]) < 1e-5 and x == f"{v['kind']}_{v['language']}" for x, v in best["sources"].items())

    lrs = {r["step"]: r["lr"] for run in ("parent", "tail") for r in metrics(bilingual / run) if "train_loss" in r and (run == "tail" or r["step"] <= 120)}
    closed = [8e-3 * (min(1, (t + 1) / 10) if t < 120 else 0.1 + 0.9 * (160 - t) / 40) for t in range(160)]
    assert np.allclose([lrs[t + 1] for t in range(160)], closed, rtol=1e-12)
    # the tail went on where the parent was, and every source has given about as many rows (as many tokens: test_train.py)
    taken = [train.read_checkpoint(bilingual / p)["loader"]["taken"] for p in ("parent/step_120.pt", "tail/ckpt.pt")]
    assert sum(taken[0]) == 120 * 8 and sum(taken[1]) == 160 * 8 and max(taken[1]) - min(taken[1]) <= 0.04 * max(taken[1])
