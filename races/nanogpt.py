"""`race.py nanogpt --nanogpt=DIR`: which learns more in the same time, `python train.py` or nanoGPT's own train.py?

Both train for --minutes on this machine and the same tokens (pydocs, hybrid): ours the quick start's model and recipe,
nanoGPT a GPT-2 of as many parameters, with its own optimizer and schedule, in the precision that it uses on the device
(fp32 on a CPU). Its steps are as large as ours, and it is compiled if it gets through more steps then. The learning
rates of both are tuned with one seed over the same grid, see races/architectures.py; the runs that count have other
seeds. Of each the weights at the end are measured, in the same way.
"""
import contextlib
import io
import pickle
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import peers
import run
from common import UserError
from corpus.tokenizer import load_tokenizer
from races import tables
from races.architectures import FURTHEST, GRID, VOCAB_SIZE, Entrant, fitted
from races.recipe import BATCH, TOKENS
from races.runs import Result, Runs, as_flags, as_result, code_of, document_losses, kept

OURS = ["--model=tinymemory", "--data=pydocs", "--tokenizer=hybrid"]
# the rate of its own small configuration, config/train_shakespeare_char.py; it falls to a tenth of it
RATE = 1e-3
# its train.py has one seed, to which this adds
WITH_SEED = """
import torch
plain = torch.manual_seed
torch.manual_seed = lambda seed: plain(seed + {seed})
exec(open("train.py").read())
"""


class Peer:
    """nanoGPT's model, called as token_losses calls ours."""

    def __init__(self, model):
        self.model = model.eval()

    def __call__(self, x, y, reduction):
        logits, _ = self.model(x, y.clamp(min=0))
        losses = torch.nn.functional.cross_entropy(logits.mT, y, ignore_index=-1, reduction=reduction)
        return logits, losses


class NanoGPT:
    """nanoGPT's train.py, in its own folder."""

    def __init__(self, s, runs, size):
        self.folder, self.runs = Path(s.nanogpt).resolve(), runs
        self.files = self.folder / "train.py", self.folder / "model.py"
        if not s.nanogpt or not all(path.exists() for path in self.files):
            raise UserError("--nanogpt=DIR names the folder of nanoGPT, https://github.com/karpathy/nanoGPT")
        shape, _ = fitted(Entrant("GPT-2", "gpt2preln-gpt2", dict(n_head=4)), size)
        self.shape = dict(n_layer=shape["n_layer"], n_head=4, n_embd=shape["d_model"])
        self.out = (runs.out / "nanogpt").resolve()
        self.out.mkdir(exist_ok=True)
        self.give_data()

    def give_data(self):
        """The token files under the names that nanoGPT reads, in a folder of its own under the race's."""
        (source,), _ = self.runs.data(OURS)
        for name, tokens in (("train", source.train), ("val", source.val)):
            (self.out / f"{name}.bin").write_bytes(tokens.tobytes())
        with open(self.out / "meta.pkl", "wb") as f:
            pickle.dump(dict(vocab_size=VOCAB_SIZE), f)

    def flags(self, rate, steps, compiled):
        """The flags of its train.py."""
        return as_flags(self.shape | dict(
            dataset=self.out,  # a folder below data/, and an absolute path leads out of there
            out_dir=self.out, device=self.runs.on.device, compile=compiled, block_size=TOKENS,
            batch_size=BATCH // TOKENS, gradient_accumulation_steps=1, dropout=0.0, learning_rate=rate,
            min_lr=rate / 10, max_iters=steps, lr_decay_iters=steps, warmup_iters=min(100, steps // 10),
            eval_interval=steps, eval_iters=1))

    def train(self, rate, steps, compiled, seed=0):
        """Trains, and returns its log."""
        command = [sys.executable, "-c", WITH_SEED.format(seed=seed), *self.flags(rate, steps, compiled)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"nanoGPT's train.py failed: {done.stderr.strip()[-200:]}")
        return done.stdout

    def pace(self, compiled):
        """(seconds before the first step, seconds of a step), from a short run."""
        begun, steps = time.monotonic(), 40
        log = self.train(RATE, steps, compiled)
        times = [float(ms) / 1e3 for ms in re.findall(r"time ([\d.]+)ms", log)]
        step = statistics.median(times)
        return max(0.0, time.monotonic() - begun - step * (steps + 1)), step

    def steps_in(self, minutes):
        """(whether to compile, steps): what gets furthest in that time."""
        found = {}
        for compiled in (False, True):
            before, step = self.pace(compiled)
            found[compiled] = int((60 * minutes - before) / step)
        return max(found.items(), key=lambda item: item[1])

    def model(self, **args):
        """Its model; args: of GPTConfig."""
        module = peers.nanogpt_module(self.folder)
        with contextlib.redirect_stdout(io.StringIO()):  # it tells its size
            return module.GPT(module.GPTConfig(**args))

    def count(self):
        """Its parameters."""
        model = self.model(**self.shape, block_size=TOKENS, vocab_size=VOCAB_SIZE, dropout=0.0, bias=False)
        return sum(p.numel() for p in model.parameters())

    def result(self, rate, steps, compiled, seed):
        """The Result of a run, as asdict makes it."""
        begun = time.monotonic()
        self.train(rate, steps, compiled, seed)
        seconds, checkpoint = time.monotonic() - begun, torch.load(self.out / "ckpt.pt", weights_only=True)
        model = self.model(**checkpoint["model_args"])
        model.load_state_dict({name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()})
        (source,), tokenizer = self.runs.data(OURS)
        measured = document_losses(Peer(model.to(self.runs.on.device)), source, load_tokenizer(tokenizer), TOKENS, 16,
                                   self.runs.on, self.runs.s.val_tokens)
        tokens = steps * BATCH
        return asdict(Result(measured, [[tokens, seconds, measured.bits_per_byte]], tokens / seconds, seconds))


def tuned(name, make):
    """The factor of the rates with the lowest loss. make: (factor, seed) -> Result. See GRID."""
    tried, wanted = {}, list(GRID)
    while wanted:
        for factor in wanted:
            tried[factor] = make(factor, 0).bits_per_byte
            print(f"{name}, rates x {factor:.2g}: {tried[factor]:.3f} bits per byte", flush=True)
        best, wanted = min(tried, key=tried.get), []
        if best == max(tried) and best < FURTHEST:
            wanted = [3 * best]
        elif best == min(tried) and 1 / best < FURTHEST:
            wanted = [best / 3]
    return best


def nanogpt(s):
    runs = Runs(s)
    plan = runs.plan(*OURS)
    ours, size = plan.settings, run.make_model(plan.module, plan.cfg).n_params
    theirs = NanoGPT(s, runs, size)
    here = runs.about(OURS) | dict(theirs=code_of("races/nanogpt.py", *theirs.files))  # device, data and code
    compiled, steps = kept(runs.out, here | dict(minutes=s.minutes), lambda: theirs.steps_in(s.minutes))

    def flags_of_ours(factor):
        return [f"--minutes={s.minutes:g}", f"--lr={ours.lr * factor:g}", f"--muon_lr={ours.muon_lr * factor:g}"]

    def flags_of_theirs(factor):
        return theirs.flags(RATE * factor, steps, compiled)

    def run_ours(factor, seed):
        return runs.result([*OURS, *flags_of_ours(factor), "--eval_every=0", f"--seed={1337 + seed}"])

    def run_theirs(factor, seed):
        about = here | dict(nanogpt=flags_of_theirs(factor), seed=seed)
        return as_result(kept(runs.out, about, lambda: theirs.result(RATE * factor, steps, compiled, seed)))

    factors = tuned("nanoGPT", run_theirs), tuned("ours", run_ours)
    finals = [], []
    for seed in range(1, 1 + s.seeds):  # in turns, as a machine may be quicker in one hour than in another
        for results, make, factor in zip(finals, (run_theirs, run_ours), factors):
            results.append(make(factor, seed))

    rows = [("", "command", "parameters", "seconds", "tokens", "bits per byte", "difference", "95% interval",
             "verdict")]
    flags = flags_of_theirs(factors[0]), flags_of_ours(factors[1])
    for name, words, n_params, results in zip(("nanoGPT", "ours"), flags, (theirs.count(), size), finals):
        cells = ["", "", ""]
        if name == "ours":
            cells = tables.verdict_cells(results, finals[0])
        seconds = statistics.median(result.seconds for result in results)
        tokens = statistics.median(result.curve[-1][0] for result in results)
        rows.append((name, "python train.py " + " ".join(words), f"{n_params:,}", f"{seconds:.0f}",
                     f"{tokens / 1e6:.2f}M", tables.mean_and_spread(results), *cells))
    tables.write(runs.out / "table.md", rows)
    print(f"wrote {runs.out}: table.md results.jsonl")
