"""Whole programs: killed and resumed, over two processes, interrupted, out of disk; and a whole recipe in small."""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import machine
import objective
import run
import train
from conftest import (ALONE, CPU, ROOT, SMALL, command, evaluations, finish, rows, same_tensors, step_rows, timeless,
                      together, torchrun)

RUN = [*SMALL, "--vocab_size=600", "--data=pydocs-hybrid"]


def last_step(out):
    """The step of a run that is under way; 0 if it has not begun, or if its last line is half written."""
    try:
        return max((row["step"] for row in rows(out)), default=0)
    except (FileNotFoundError, ValueError):
        return 0


# --------------------------------------------------------------------------------------------------- killed and resumed

# Kills the process at the n-th checkpoint: "before" the complete file takes the old one's place, or "within", when half
# of it is written
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


def kill_at(process, out, step):
    """Kills a run from outside once it has shown this step, unless it was so quick that it has ended."""
    while process.poll() is None and last_step(out) < step:
        time.sleep(0.02)
    process.kill()
    _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL) and step <= last_step(out), err


def assert_same_runs(a, b):
    """Two runs have the same metrics and checkpoints, to the bit."""
    assert timeless(a) == timeless(b)
    for name in ("ckpt.pt", "best.pt"):
        one, other = (run.read_checkpoint(f"{out}/{name}") for out in (a, b))
        for key in ("step", "tokens", "model", "ema", "use_ema", "optimizer", "loader", "rng"):
            assert same_tensors(one[key], other[key]), (name, key)


LONG_RUN = [*RUN, "--max_steps=100", "--eval_every=20", "--save_every=5", "--word_boost=1.5", "--sample_tokens=0"]


@pytest.mark.long
def test_a_run_killed_again_and_again_and_resumed_is_the_uninterrupted_run_to_the_bit(workdir):
    finish(command(ROOT / "train.py", *LONG_RUN, "--out=whole"))
    finish(command("-c", KILL_WHILE_SAVING, 2, "within", *LONG_RUN, "--out=killed"), -signal.SIGKILL)
    assert run.read_checkpoint("killed/ckpt.pt")["step"] == 5  # the one before the torn one
    finish(command("-c", KILL_WHILE_SAVING, 1, "before", "--resume", "--out=killed"), -signal.SIGKILL)
    rng, go_on = random.Random(0), [ROOT / "train.py", "--resume", "--out=killed"]
    for earliest in (8, 24):  # and from outside, at a random step
        kill_at(command(*go_on), "killed", earliest + rng.randrange(8))
    finish(command(*go_on))
    assert_same_runs("killed", "whole")


@pytest.mark.slow
def test_a_compiled_run_killed_and_resumed_is_the_uninterrupted_run_to_the_bit(workdir, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workdir / "inductor"))  # compiled once, by the first process
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")  # the compiler knows what the CPU knows: no trials
    flags = [*LONG_RUN, "--compile=on", "--n_layer=1"]  # one layer is quicker to compile
    finish(command(ROOT / "train.py", *flags, "--out=whole"))
    kill_at(command(ROOT / "train.py", *flags, "--out=killed"), "killed", 18 + random.Random(1).randrange(8))
    finish(command(ROOT / "train.py", "--resume", "--out=killed"))
    assert_same_runs("killed", "whole")


SMALL_I3 = [*(flag for flag in RUN if not flag.startswith("--d_ff")), "--model=i3", "--d_state=4", "--delta_rank=4",
            "--ffn_rank=8", "--head_rank=16"]


@pytest.mark.slow
def test_i3_killed_and_resumed_is_the_uninterrupted_run_to_the_bit(workdir):
    finish(command(ROOT / "train.py", *SMALL_I3, "--out=whole"))
    finish(command("-c", KILL_WHILE_SAVING, 2, "within", *SMALL_I3, "--out=killed"), -signal.SIGKILL)
    finish(command(ROOT / "train.py", "--resume", "--out=killed"))
    assert_same_runs("killed", "whole")


ATTENTION = ("--n_attention=1", "--d_inner=48", "--ffn_rank=0", "--head_rank=0", "--optimizer=muon")


@pytest.mark.parametrize("shape", [(), ATTENTION], ids=["hybrid", "attention"])
def test_i3_trains_and_samples_without_a_compiler(shape, workdir):
    env = dict(PATH="", CXX="", TORCH_EXTENSIONS_DIR=str(workdir / "nothing"))
    both = "import sys, train, sample; train.main(sys.argv[1:]); print('sampled:', end='', flush=True); "
    both += "sample.main(['--ckpt=run/best.pt', '--prompt=def ', '--max_new_tokens=200', '--device=cpu'])"
    process = command("-c", both, *SMALL_I3, *shape, "--out=run", **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert err == ("kernels      there is no C++ compiler (c++), so the selective scan runs in PyTorch, "
                   "several times slower\n")
    assert "sampled:def " in out


def test_a_run_killed_before_its_first_checkpoint_resumes_from_its_recorded_settings(workdir):
    finish(command("-c", KILL_WHILE_SAVING, 1, "within", *RUN, "--seed=7", "--out=early"), -signal.SIGKILL)
    assert not (workdir / "early/ckpt.pt").exists()
    finish(command(ROOT / "train.py", "--resume", "--out=early"))
    assert run.read_checkpoint("early/ckpt.pt")["train"]["seed"] == 7
    assert [row["step"] for row in step_rows("early")] == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_sigterm_and_a_closed_terminal_save_and_leave_quietly(number, workdir):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("this signal is ignored here, as under nohup, and so a run ignores it")
    endless = ["--max_steps=100000", "--save_every=0", "--eval_every=0", "--out=long"]
    process = command(ROOT / "train.py", *RUN, *endless)
    while last_step("long") < 3:
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and "python train.py --resume --out=long" in out
    step = run.read_checkpoint("long/ckpt.pt")["step"]
    assert step == last_step("long") and f"stopped at step {step:,}" in out


def test_a_run_whose_reader_goes_away_goes_on(workdir):
    """As in `python train.py | head`: what it prints is lost, and nothing else."""
    process = command(ROOT / "train.py", *RUN, "--out=unread")
    process.stdout.close()
    process.stdout = open(os.devnull)
    finish(process)
    assert step_rows("unread")[-1]["step"] == 12 and rows("unread")[-1]["final"]
    assert (workdir / "unread/best.pt").exists()


# ---------------------------------------------------------------------------------------------------- two processes

@pytest.mark.parametrize("launch", [together, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one(launch, workdir):
    """A global batch of 8 rows of packed documents; weighted losses are normalised over all of it, and gradients are
    accumulated on both sides."""
    flags = [*SMALL, "--n_layer=3", "--vocab_size=600", "--data=two-hybrid", "--max_steps=20", "--eval_every=10",
             "--word_boost=1.7", "--micro_batch=2", "--order=balanced", "--pack=document"]
    finish(command(ROOT / "train.py", *flags, "--out=one"))
    for status, _, err in launch(2, ROOT / "train.py", *flags, "--out=two"):
        assert status == 0, err
    assert len(step_rows("one")) == len(step_rows("two")) == 20
    for a, b in zip(rows("one"), rows("two"), strict=True):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"]
        if "train_loss" in a:
            assert abs(a["train_loss"] - b["train_loss"]) < 1e-4 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3
            assert abs(a["train_bits_per_byte"] - b["train_bits_per_byte"]) < 1e-4
            continue
        for kind in a["val_loss"]:
            of_one, of_two = a["val_loss"][kind], b["val_loss"][kind]
            assert abs(of_one["mixed"] - of_two["mixed"]) < 1e-4
            assert of_one["source"] == pytest.approx(of_two["source"], abs=1e-4)
    a, b = (run.read_checkpoint(f"{out}/ckpt.pt") for out in ("one", "two"))
    assert all(torch.allclose(a["model"][name], b["model"][name], atol=1e-3) for name in a["model"])
    assert len(b["rng"]) == 2


def test_two_processes_train_what_a_switch_leaves_without_gradients(workdir):
    flags = [flag for flag in SMALL if not flag.startswith(("--model", "--n_kv", "--d_ff"))]
    flags += ["--model=i3", "--scan=false", "--d_state=4", "--delta_rank=4", "--ffn_rank=8", "--head_rank=8"]
    flags += ["--vocab_size=600", "--data=two-hybrid", "--max_steps=3", "--order=balanced", "--micro_batch=2"]
    for status, _, err in together(2, ROOT / "train.py", *flags, "--out=two"):
        assert status == 0, err
    assert [row["step"] for row in step_rows("two")] == [1, 2, 3]


@pytest.mark.slow
def test_two_processes_train_a_compiled_model(workdir):
    flags = [flag for flag in SMALL if not flag.startswith("--compile")]
    flags += ["--vocab_size=600", "--data=two-hybrid", "--max_steps=3", "--micro_batch=2", "--order=balanced"]
    finish(command(ROOT / "train.py", *flags, "--compile=off", "--out=one"))
    for status, _, err in together(2, ROOT / "train.py", *flags, "--compile=on", "--out=two"):
        assert status == 0, err
    for a, b in zip(step_rows("one"), step_rows("two"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4)


# The second process gets a signal in its third step
STOPPED = """
import os, signal, sys, train
step = train.Optimizers.step
def step_and_signal(self, factor):
    self.n = getattr(self, "n", 0) + 1
    if self.n == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, factor)
train.Optimizers.step = step_and_signal
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_which_go_on_to_the_bit(workdir):
    flags = [*SMALL, "--vocab_size=600", "--data=two-hybrid", "--max_steps=6", "--order=balanced", "--micro_batch=2"]
    for words in (["-c", STOPPED, *flags, "--out=parts"], [ROOT / "train.py", *flags, "--out=whole"]):
        for status, _, err in together(2, *words):
            assert status == 0, err
    assert run.read_checkpoint("parts/ckpt.pt")["step"] == 3
    for status, _, err in together(2, ROOT / "train.py", "--resume", "--out=parts"):
        assert status == 0, err
    a, b = (run.read_checkpoint(f"{out}/ckpt.pt") for out in ("parts", "whole"))
    assert a["step"] == 6 and all(torch.allclose(a["model"][name], b["model"][name], atol=1e-5) for name in a["model"])


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
def counted(stack, *how):
    seen.append(int((stack.abs().sum((1, 2)) > 0).sum()))
    return orthogonalize(stack, *how)
def in_place(stack, *how):  # as the kernel does it
    return stack.copy_(orthogonalize(stack, *how))
alone, shared, again = matrices(), matrices(), matrices()
train.Muon(alone).step(0.1)
seen, orthogonalize = [], train.orthogonalize
train.orthogonalize = counted
dist.init_process_group("gloo")
train.Muon(shared).step(0.1)
muon = train.Muon(again)
muon.orthogonalize = in_place
muon.step(0.1)
for a, b, c in zip(alone, shared, again):
    assert torch.allclose(a[1], b[1], atol=1e-6) and torch.equal(b[1], c[1])
open(f"did-{dist.get_rank()}", "w").write(str(sum(seen)))
dist.destroy_process_group()
"""


def test_muons_stacks_are_shared_out_over_the_processes(workdir):
    assert all(status == 0 for status, *_ in together(2, "-c", SHARED_MUON))
    done = sorted(int((workdir / f"did-{rank}").read_text()) for rank in range(2))
    assert sum(done) == 3 * 2 + 4 + 1 and done[0] >= 4  # eleven maps, each once, about half on either side


@pytest.mark.parametrize("launch", [together, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_a_mistake_that_all_processes_meet_is_told_once_if_the_launcher_ends_the_others(launch, workdir):
    silent = 60 if launch is torchrun else 0.1  # two processes may start seconds apart
    patient = f"import common, machine, train; machine.SILENT_SECONDS = {silent}; common.run_tool(train.main)"
    Path("patient.py").write_text(patient)
    ends = launch(2, "patient.py", "--lr=-1")
    assert all(status for status, *_ in ends) and ends[0][2].count("patient.py: --lr=-1.0 must be at least 0") == 1
    if launch is torchrun:
        assert "process 1 of 2" not in ends[0][2]
    else:
        assert "patient.py: process 1 of 2: --lr=-1.0 must be at least 0" in ends[1][2]


# ----------------------------------------------------------------------------------------------- disk, terminal, memory

# Runs a tool with a limit on the size of a file it may write, which fails as a full disk does
LITTLE_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(workdir):
    finish(command(ROOT / "train.py", *RUN, "--out=full"))
    before = (workdir / "full/ckpt.pt").read_bytes()
    go_on = [ROOT / "train.py", "--resume", "--out=full", "--max_steps=20"]
    process = command("-c", LITTLE_DISK, len(before) // 2, *go_on)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "no space left" in err
    assert (workdir / "full/ckpt.pt").read_bytes() == before


def test_the_terminal_shows_one_updating_line_and_a_pipe_plain_lines(workdir):
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")
    piped = finish(command(ROOT / "train.py", *RUN, "--out=piped"))
    assert "\r" not in piped and "\x1b" not in piped
    assert piped.count("\nstep ") == 12 and piped.count("\neval ") == 2

    parent, child = pty.fork()
    if parent == 0:
        os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *RUN, "--out=shown"])
    seen = []
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


# A step with all the state that the optimizers have in each step but the first; then the most memory that the process
# ever had
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype, limit", [("bfloat16", 2.4e9), ("float32", 4e9)])
def test_training_ivme_on_8192_tokens_at_once_fits_in_memory(dtype, limit, workdir):
    """The whole process: weights, gradients, Muon, AdamW, EMA, activations, the checkpoint's writing.

    Large blocks go straight back to the system here: what glibc's heap keeps of them for itself was seen to be 0.5 to
    0.9 GB, another amount in every run.
    """
    if str(machine.pick_device("cpu").dtype) != f"torch.{dtype}":
        pytest.skip("takes many minutes if bfloat16 is emulated: only in the dtype that this CPU trains in")
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the system's own maximum counts the memory of the process that started this one too")
    flags = ["--model=ivme", "--data=pydocs-hybrid", "--order=random", "--batch_tokens=8192", "--micro_batch=8",
             "--max_steps=1", "--eval_tokens=64", "--final_eval_tokens=64", "--sample_tokens=0", "--compile=off",
             "--device=cpu", f"--dtype={dtype}"]
    out = finish(command("-c", PEAK, *flags, fresh=True, MALLOC_MMAP_THRESHOLD_="1000000"))
    peak = int(out.split()[-1]) * 1024
    assert peak < limit, f"{peak / 1e9:.2f} GB"


# ---------------------------------------------------------------------------------------------------- a recipe in small

@pytest.mark.slow
def test_the_gpt2preln_recipe_in_small(bilingual, tmp_path, monkeypatch):
    """A run at a constant rate keeps checkpoints; the second-last one is continued by its decay alone.

    The tail's best, which best_validation.json names, beats every checkpoint of the parent, and the learning rate is
    the closed form at every step.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(bilingual / "data")
    train.main(["--model=gpt2preln", "--n_layer=2", "--d_model=64", "--n_head=4", "--context_length=128",
                "--vocab_size=500", "--data=mix-bpe-500", "--batch_tokens=1024", "--micro_batch=8", "--lr=8e-3",
                "--warmup_steps=10", "--ema_beta=0.5", "--eval_tokens=8192", "--final_eval_tokens=8192",
                "--sample_tokens=0", "--device=cpu", "--dtype=float32", "--log_every=1", "--max_steps=160",
                "--keep_every=40", "--eval_every=40", "--out=parent"])
    kept = sorted(int(path.stem[5:]) for path in (tmp_path / "parent").glob("step_*.pt"))
    assert kept == [row["step"] for row in evaluations("parent")] == [40, 80, 120, 160]

    train.main(["--init_from=parent/step_120.pt", "--decay_only", "--decay_steps=40", "--keep_every=8",
                "--eval_every=8", "--out=tail"])
    best = json.loads((tmp_path / "tail/best_validation.json").read_text())
    losses = {}
    for row in evaluations("tail"):
        for kind, loss in row["val_loss"].items():
            losses[row["step"], kind] = loss["mixed"]
    assert (best["step"], best["weights"]) == min(losses, key=losses.get)
    assert best["val_loss_mixed"] == min(losses.values()) and best["checkpoint"] == f"step_{best['step']}.pt"
    for row in evaluations("parent"):  # its last one too, which has seen as many tokens as the end of the tail
        assert best["val_loss_mixed"] < min(loss["mixed"] for loss in row["val_loss"].values())

    # the checkpoint that it names is the one, measured again from the file, for every source, language and all
    model, tokenizer, _ = run.load_checkpoint(f"tail/{best['checkpoint']}", ema=best["weights"] == "ema")
    sources, _ = run.find_data("mix-bpe-500", "bpe", 500, ALONE)
    frame = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")
    again = objective.evaluate(model, sources, 8192, 128, 16, CPU, torch.ones(500), ALONE, frame)["loss"]
    assert abs(again["mixed"] - best["val_loss_mixed"]) < 1e-5
    assert again["language"] == pytest.approx({name: best[f"val_loss_{name}"] for name in ("en", "it")}, abs=1e-5)
    assert set(best["sources"]) == {"web_en", "wiki_en", "web_it", "wiki_it"}
    for name, entry in best["sources"].items():
        assert abs(again["source"][name] - entry["val_loss"]) < 1e-5 and name == f"{entry['kind']}_{entry['language']}"

    # the learning rate of every step, of the parent up to where the tail begins
    rates = {row["step"]: row["lr"] for row in step_rows("parent") if row["step"] <= 120}
    rates |= {row["step"]: row["lr"] for row in step_rows("tail")}
    closed = [8e-3 * (min(1, (t + 1) / 10) if t < 120 else 0.1 + 0.9 * (160 - t) / 40) for t in range(160)]
    assert np.allclose([rates[t + 1] for t in range(160)], closed, rtol=1e-12)

    # the tail went on where the parent was, and every source has given about as many rows
    before, after = (run.read_checkpoint(path)["loader"]["taken"] for path in ("parent/step_120.pt", "tail/ckpt.pt"))
    assert sum(before) == 120 * 8 and sum(after) == 160 * 8 and max(after) - min(after) <= 0.04 * max(after)
