"""Pretraining, for every architecture: `python train.py` (quick start), `python train.py --model=ivme`,
`torchrun --nproc_per_node=8 train.py --model=ivme` (one process for each GPU).

The file reads top to bottom: settings, Muon and AdamW, schedules and EMA, the run, the loop. An architecture file
brings its model and, in PRESETS, its sizes and its recipe. Each field of Settings and of the model's config is a flag,
--name=value, and a flag overrides the recipe. The batches, their loss and validation are in objective.py, the order of
the data in corpus/loader.py, which run is meant and its checkpoints in run.py, its folder in runfolder.py, devices and
processes in machine.py. Fine-tuning on chats is finetune.py, which calls the same loop.

A run writes out/RUN: ckpt.pt (the latest state, for --resume), best.pt (lowest validation loss), best_validation.json,
step_N.pt (--keep_every), metrics.jsonl, loss.png, config.json, tokenizer.json.
"""
import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

import machine
import minutes
import report
import run
import runfolder
from common import UserError, lasting_output, quoted, run_tool
from objective import Pretraining


@dataclass(frozen=True)
class Settings:
    model: str = "tinymemory"  # preset of an architecture file: tinymemory, ivme, i3, gpt2preln..., or one of your own
    data: str = ""  # folders, or names under data/, with commas; NAME:2 counts as twice as large; empty: the recipe's
    tokenizer: str = "bpe"  # tokenizer that a bare name in --data means: pydocs with hybrid is data/pydocs-hybrid
    out: str = ""  # folder of the run; empty: out/MODEL
    resume: bool = False  # go on with the run in --out from its ckpt.pt, with its recorded settings; =FOLDER, =latest
    overwrite: bool = False  # start anew in a folder that holds a run, and delete that run
    init_from: str = ""  # start from this checkpoint's weights
    decay_only: bool = False  # with --init_from: keep optimizer, EMA and place in the data, and run --decay_steps

    # batches
    order: str = "random"  # random: rows of all sources by size; sequential: in turn; balanced: equal shares
    pack: str = "stream"  # stream: windows of the token stream; document: whole documents, which do not see each other
    block_size: int = 256  # tokens in a training row; at most the model's context
    batch_tokens: int = 4096  # tokens in an optimizer step, over all processes
    micro_batch: int = 16  # rows that a process computes at once; the other rows of a step are accumulated
    grad_checkpoint: bool = False  # keep only the blocks' inputs for the backward pass: less memory, a third more work
    max_steps: int = 600  # optimizer steps of the run
    epochs: float = 0.0  # in place of --max_steps: passes over the training data
    minutes: float = 0.0  # in place of --max_steps: minutes to train; steps, batch and warm-up are made to fit
    word_boost: float = 1.0  # weight in the loss of tokens that are longer than one character; 1: off

    # optimizer
    optimizer: str = "muon"  # muon: matrices of the blocks by Muon, all else by AdamW; adamw: everything by AdamW
    muon_lr: float = 0.02  # peak learning rate of Muon
    lr: float = 3e-4  # peak learning rate of AdamW
    weight_decay: float = 0.1  # decoupled from the gradient; not for vectors
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no limit
    schedule: str = "wsd"  # learning rate: wsd (warm-up, stable, linear decay), cosine, constant
    warmup_steps: int = 20  # steps of linear warm-up, for every schedule
    decay_fraction: float = 0.2  # fraction of the steps that decay (wsd)
    decay_steps: int = 0  # number of steps that decay (wsd); 0: --decay_fraction says it
    final_lr_fraction: float = 0.0  # learning rate at the end, as a fraction of the peak (wsd, cosine)
    ema_beta: float = 0.999  # decay of the weights' moving average; 0: none is kept

    # evaluation, saving, showing
    eval_every: int = 100  # steps between evaluations; 0: only at the end
    eval_tokens: int = 32_768  # validation tokens of each source that an evaluation reads, from all over it; 0: all
    final_eval_tokens: int = 4_000_000  # the same for the last evaluation, of best.pt; 0: all
    eval_tasks: str = ""  # benchmarks to score at evaluations too, as eval.py's --tasks; empty: none
    eval_limit: int = 100  # documents of each benchmark, or of each of its subtasks (blimp has 67); 0: all
    tasks_dir: str = ""  # folder with the benchmarks' data, for machines without network
    probes: str = ""  # prompts to try at evaluations: a JSON file as eval.py's, or "card" for the four of the card
    save_every: int = 100  # steps between checkpoints; 0: only at the end
    keep_every: int = 0  # steps between checkpoints that stay, as step_N.pt; 0: none
    log_every: int = 10  # steps between rows of metrics.jsonl and lines of the log
    sample_every: int = 0  # steps between samples; 0: only at the end
    sample_prompt: str = ""  # text that a sample continues; empty: a new document
    sample_tokens: int = 200  # length of a sample; 0: none

    # machine
    seed: int = 1337  # of initial weights and batch order
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: str = "auto"  # compute type: bfloat16, float32; auto: bfloat16 if the hardware is fast at it
    compile: str = "auto"  # on: torch.compile; off: plain PyTorch; auto: what is quickest for the device and the run
    deterministic: bool = False  # repeatable to the bit on CUDA as well; a CPU always is


# ---------------------------------------------------------------------------------------------------- optimizers

# coefficients of the quintic, used five times: steep at zero, and singular values end within 0.7 and 1.2
NEWTON_SCHULZ = 5 * [(3.4445, -4.7750, 2.0315)]


def orthogonalize(stack, dtype, quintics=NEWTON_SCHULZ):
    """Newton-Schulz: roughly the nearest semi-orthogonal matrix to each of stack (n, rows, columns), fp32.

    From Muon (Jordan 2024). Five steps of X <- aX + bAX + cA^2 X with A = XX^T push all singular values near 1. Tall
    matrices are transposed, which makes A small.
    """
    tall = stack.size(1) > stack.size(2)
    x = (stack.mT if tall else stack).to(dtype).contiguous()  # a transposed matrix slows products on a CPU
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values at most 1, where the iteration converges
    for a, b, c in quintics:
        A = x @ x.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # bA + cA^2
        x = torch.baddbmm(x, B, x, beta=a)  # aX + BX
    return (x.mT if tall else x).float()


class Muon:
    """MomentUm Orthogonalized by Newton-Schulz, for the blocks' matrices (https://kellerjordan.github.io/posts/muon).

        m <- 0.95 m + 0.05 g
        u  = 0.05 g + 0.95 m                                                          (Nesterov)
        w <- (1 - lr wd) w - lr sqrt(max(1, rows / columns)) orthogonalize(u)

    matrices: list of (name, parameter, rows of each map in a fused matrix or None). A fused matrix is orthogonalized
    map by map. Matrices of one shape go through Newton-Schulz as one stack; of several processes each one does its
    share of every stack. The arithmetic is that of `torch.optim.Muon`. The momentum is fp32 and whole on every process,
    so that any one of them can save it.
    """

    quintics = NEWTON_SCHULZ

    def __init__(self, matrices, weight_decay=0.1, dtype=torch.float32, momentum=0.95):
        self.names = [name for name, _, _ in matrices]
        self.params = [p for _, p, _ in matrices]
        self.momentum, self.weight_decay, self.dtype = momentum, weight_decay, dtype
        self.orthogonalize = orthogonalize  # Optimizers may put a compiled one in its place
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.stacks = {}  # (rows, columns) -> [(index of the parameter, first row)]
        for i, (name, p, parts) in enumerate(matrices):
            first = 0
            for rows in parts or (p.size(0),):
                self.stacks.setdefault((rows, p.size(1)), []).append((i, first))
                first += rows
            assert first == p.size(0), f"{name}: parts {parts} do not make up {p.size(0)} rows"

    @torch.no_grad()
    def step(self, lr):
        """One update from the parameters' .grad with learning rate lr."""
        grads = [p.grad for p in self.params]
        torch._foreach_lerp_(self.buffers, grads, 1 - self.momentum)
        updates = torch._foreach_lerp(grads, self.buffers, self.momentum)
        torch._foreach_mul_(self.params, 1 - lr * self.weight_decay)
        for (rows, columns), members in self.stacks.items():
            stack = torch.stack([updates[i][first:first + rows] for i, first in members])
            stack = self.orthogonalize_together(stack)
            scale = max(1, rows / columns) ** 0.5  # tall maps: keeps the change of the output's size the same
            for (i, first), update in zip(members, stack):
                self.params[i][first:first + rows].add_(update, alpha=-lr * scale)

    def orthogonalize_together(self, stack):
        """`orthogonalize`, of which each process does an equal share of the stack (n, rows, columns)."""
        if not dist.is_initialized():
            return self.orthogonalize(stack, self.dtype, self.quintics)
        n, size, rank = len(stack), dist.get_world_size(), dist.get_rank()
        each = math.ceil(n / size)
        stack = torch.nn.functional.pad(stack, (0, 0, 0, 0, 0, each * size - n))  # zeros stay zero
        mine = self.orthogonalize(stack[rank * each:(rank + 1) * each], self.dtype, self.quintics).contiguous()
        dist.all_gather_into_tensor(stack, mine)
        return stack[:n]

    def state_dict(self):
        return dict(zip(self.names, self.buffers))

    def load_state_dict(self, state):
        for name, buffer in zip(self.names, self.buffers):
            buffer.copy_(state[name])


# --optimizer=NAME for the blocks' matrices. An entry is called as Muon is; it has step(lr), state_dict, load_state_dict
MATRIX_OPTIMIZERS = dict(muon=Muon)


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), for everything but the blocks' matrices.

        m <- 0.9 m + 0.1 g;    v <- 0.95 v + 0.05 g^2
        w <- (1 - lr wd) w - lr (m / (1 - 0.9^t)) / (sqrt(v / (1 - 0.95^t)) + eps)

    groups: list of (parameters, weight decay). torch's function does the arithmetic, in one kernel for all tensors if
    the device has it; the class torch.optim.AdamW around it would load the compiler, one and a half seconds of a start.
    """

    def __init__(self, groups, betas=(0.9, 0.95), eps=1e-8):
        self.groups, self.betas, self.eps = groups, betas, eps
        self.params = [p for params, _ in groups for p in params]
        self.fused = self.params[0].device.type in ("cpu", "cuda")
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.t = [torch.zeros((), device=p.device if self.fused else "cpu") for p in self.params]

    @torch.no_grad()
    def step(self, lr):
        """One update from the parameters' .grad with learning rate lr."""
        first = 0
        for params, weight_decay in self.groups:
            part = slice(first, first + len(params))
            adamw(params, [p.grad for p in params], self.m[part], self.v[part], [], self.t[part], fused=self.fused,
                  foreach=False, beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=weight_decay,
                  eps=self.eps, amsgrad=False, maximize=False)
            first += len(params)

    def state_dict(self):
        """The same tensors as in the state of a torch.optim.AdamW, under the same names."""
        return dict(state={i: dict(step=t, exp_avg=m, exp_avg_sq=v)
                           for i, (t, m, v) in enumerate(zip(self.t, self.m, self.v))})

    def load_state_dict(self, state):
        for i, values in state["state"].items():
            self.t[i].copy_(values["step"])
            self.m[i].copy_(values["exp_avg"])
            self.v[i].copy_(values["exp_avg_sq"])


class Optimizers:
    """The matrices' optimizer and AdamW behind one step. The model's table `roles()` says which parameter is what."""

    def __init__(self, model, s, dtype):
        groups = dict(matrix=[], embedding=[], head=[], vector=[])
        for name, p in model.named_parameters():
            fits = [role for end, role in model.roles().items() if name.endswith(end)]
            assert len(fits) == 1 and fits[0][0] in groups, \
                f"roles() must name {name} exactly once as one of {list(groups)}, found {fits}"
            role, parts = fits[0]
            groups[role].append((name, p, parts))

        self.name = s.optimizer
        matrices = groups.pop("matrix") if self.name in MATRIX_OPTIMIZERS else []
        decayed = [p for role, members in groups.items() if role != "vector" for _, p, _ in members]
        vectors = [p for _, p, _ in groups["vector"]]
        self.n_matrices, self.n_other = len(matrices), len(decayed) + len(vectors)
        self.peak_matrix, self.peak_adamw = s.muon_lr, s.lr
        # Newton-Schulz needs few digits, so it runs in bf16 if the model does
        self.matrix = MATRIX_OPTIMIZERS[self.name](matrices, s.weight_decay, dtype) if matrices else None
        if isinstance(self.matrix, Muon):
            quick = machine.quick_orthogonalize(s, self.matrix)  # compiled code for this CPU, or None
            if quick is not None:
                self.matrix.orthogonalize = quick
        self.adamw = AdamW([(decayed, s.weight_decay), (vectors, 0.0)])

    def step(self, factor):
        """One update with `factor` times the peak rates. Returns the matrices' rate, or AdamW's if it has all."""
        self.adamw.step(self.peak_adamw * factor)
        if self.matrix is None:
            return self.peak_adamw * factor
        self.matrix.step(self.peak_matrix * factor)
        return self.peak_matrix * factor

    def state_dict(self):
        state = dict(adamw=self.adamw.state_dict())
        if self.matrix is not None:
            state[self.name] = self.matrix.state_dict()
        return state

    def load_state_dict(self, state):
        self.adamw.load_state_dict(state["adamw"])
        if self.matrix is not None:
            self.matrix.load_state_dict(state[self.name])


# ---------------------------------------------------------------------------------------------------- schedules, EMA

def wsd(step, s):
    """Warm-up, stable, decay (arXiv 2405.18392): 1, then linear to final_lr_fraction.

    The line would reach final_lr_fraction one step after the last, so that no step is spent on a rate of 0.
    """
    decay_steps = s.decay_steps or round(s.decay_fraction * s.max_steps)
    left = min(1.0, (s.max_steps - step) / max(1, decay_steps))
    return s.final_lr_fraction + (1 - s.final_lr_fraction) * left


def cosine(step, s):
    """Half a cosine wave from the end of the warm-up down to final_lr_fraction (arXiv 1608.03983)."""
    left = 0.5 + 0.5 * math.cos(math.pi * (step - s.warmup_steps) / max(1, s.max_steps - s.warmup_steps))
    return s.final_lr_fraction + (1 - s.final_lr_fraction) * left


def constant(step, s):
    return 1.0


# --schedule=NAME: (step, settings) -> factor of the peak learning rate after the warm-up
SCHEDULES = dict(wsd=wsd, cosine=cosine, constant=constant)


def lr_factor(step, s):
    """Factor of the peak learning rate for update number `step`, from 0. The warm-up is linear for every schedule."""
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps
    return SCHEDULES[s.schedule](step, s)


@torch.no_grad()
def ema_update(ema, params, step, beta):
    """ema <- b ema + (1 - b) params with b = min(beta, (1 + step) / (10 + step)), which soon forgets a run's start."""
    torch._foreach_lerp_(ema, params, 1 - min(beta, (1 + step) / (10 + step)))


@contextlib.contextmanager
def weights(params, values):
    """Inside, the parameters hold `values`; afterwards, to the bit, what they held before. None changes nothing."""
    if values is None:
        yield
        return
    saved = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, values)
        try:
            yield
        finally:
            torch._foreach_copy_(params, saved)


# ---------------------------------------------------------------------------------------------------- the run

@dataclass
class State:
    """What the loop changes, apart from the weights, the optimizers' moments and the loader's counts."""
    step: int = 0
    tokens: int = 0  # targets trained on
    elapsed: float = 0.0  # seconds of training
    use_ema: bool = False  # whether the averaged weights had the lower loss in the last evaluation
    best_loss: float = math.inf
    best_step: int = 0
    saved_step: int = -1  # the step that ckpt.pt holds; -1: there is none


def clip_gradients(params, largest):
    """Scales all gradients so that their common norm is at most `largest` (0: no limit). Returns the norm before."""
    for p in params:
        if p.grad is None:  # the loss does not depend on it, and the optimizers need a gradient of each
            p.grad = torch.zeros_like(p)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if largest and (norm.is_cuda or norm > largest):  # comparing would wait for the GPU; there it may scale by 1
        torch.nn.utils.clip_grads_with_norm_(params, largest, norm)
    return float(norm)


class Trainer:
    """A run: it holds the model, the optimizers, the weights' average and the folder, and it saves and measures.

    plan: run.Plan, which settings, and which checkpoint to start from. task: objective.Pretraining or what finetune.py
    has in its place, the batches and the loss. world: machine.World, the processes. on: machine.Device.
    """

    def __init__(self, plan, task, world, on):
        self.plan, self.task, self.world, self.on = plan, task, world, on
        self.s = s = task.s
        torch.manual_seed(s.seed)
        self.model = run.make_model(plan.module, plan.cfg)
        if plan.start:
            # a run that continues goes on from the raw weights, a new one starts from the better ones
            use_ema = plan.start["use_ema"] and not plan.continues
            run.load_weights(self.model, plan.start, use_ema, plan.start_path)
        if s.grad_checkpoint:
            machine.checkpoint_blocks(self.model)
        run.on_device(self.model, on.device)
        self.params = list(self.model.parameters())
        self.names = [name for name, _ in self.model.named_parameters()]
        self.optimizers = Optimizers(self.model, s, on.dtype)
        self.ema = [p.detach().clone() for p in self.params] if s.ema_beta else None
        self.state = State()
        torch.manual_seed(s.seed + world.rank)  # dropout, if a fork has any, differs between processes
        if plan.continues:
            self.go_on(plan.start)
        # the model as the loop calls it, compiled or distributed, and a word for the log that says which
        self.net, self.how = machine.make_net(self.model, s, on, world)
        self.folder = runfolder.RunFolder(s.out, world)
        self.progress = self.folder.progress

    def go_on(self, start):
        """Puts optimizers, average, place in the data and random numbers where the checkpoint left them."""
        state = self.state
        if [list(f) for f in start["loader"]["fingerprint"]] != self.task.loader.state_dict()["fingerprint"]:
            raise UserError(f"the data of {self.s.data} has changed since the checkpoint, so its place in it is lost; "
                            "use the data, and in fine-tuning the --base_data and --replay, that it was trained with")
        state.step, state.tokens, state.use_ema = start["step"], start["tokens"], start["use_ema"]
        self.task.loader.load_state_dict(start["loader"])
        if not start["optimizer"]:
            raise UserError(f"{self.plan.start_path} is a release, which has no optimizer's state: a run cannot go on "
                            "with it, and --init_from alone starts a new one from its weights")
        trained_by = start["train"].get("optimizer", self.s.optimizer)
        if trained_by != self.s.optimizer:
            raise UserError(f"the run's optimizer is {trained_by}, whose state is of no use to {self.s.optimizer}")
        self.optimizers.load_state_dict(start["optimizer"])
        if self.ema is not None and start["ema"]:
            self.ema = [start["ema"][name].to(self.on.device) for name in self.names]
        if len(start["rng"]) == self.world.size:  # else random numbers begin anew; only dropout would draw any
            rng = start["rng"][self.world.rank]
            torch.set_rng_state(rng["cpu"])
            if self.on.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"])
        if self.plan.kind == "resumed":
            state.elapsed = start["metrics"]["elapsed"]
            if Path(self.plan.start_path).name == "ckpt.pt":
                state.saved_step = state.step
            if (Path(self.s.out) / "best.pt").exists():
                state.best_loss, state.best_step = (start["metrics"]["best"][key] for key in ("loss", "step"))

    def begin(self):
        """Makes the folder and tells what the run is. Fine-tuning is measured before its first step too."""
        resumed_at = self.state.step if self.plan.kind == "resumed" else None
        dtype = str(self.on.dtype).removeprefix("torch.")
        here = dict(chip=self.on.chip, processes=self.world.size, dtype=dtype, torch=torch.__version__)
        self.folder.begin(self.s, self.plan.cfg, self.task.tokenizer_text, here, resumed_at)
        self.world.barrier()
        for line in report.run_lines(self):
            print(line)
        self.model.train()
        if self.task.measures_start and self.state.step == 0:
            _, row = self.measure_both()
            self.folder.record(row)
            self.progress.done(report.evaluation_line(row, self.task.measured, "raw"))

    def save(self, name):
        """Writes a checkpoint: tensors and plain values only, so that weights_only=True loads it."""
        state, rng = self.state, dict(cpu=torch.get_rng_state())
        if self.on.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        self.folder.save(name, dict(
            format=run.FORMAT, step=state.step, tokens=state.tokens, model_name=self.s.model, cfg=asdict(self.plan.cfg),
            train=asdict(self.s), model=self.model.state_dict(),
            ema={} if self.ema is None else dict(zip(self.names, self.ema)), use_ema=state.use_ema,
            optimizer=self.optimizers.state_dict(), rng=self.world.gather(rng), loader=self.task.place,
            tokenizer=self.task.tokenizer_text,
            metrics=dict(best=dict(loss=state.best_loss, step=state.best_step), elapsed=state.elapsed)))

    def measure_both(self):
        """Measures the raw and the averaged weights: ({"raw": result, "ema": result}, row of metrics.jsonl)."""
        self.model.eval()
        results = dict(raw=self.task.measure(self.model, self.s.eval_tokens))
        if self.ema is not None and self.state.step:
            with weights(self.params, self.ema):
                results["ema"] = self.task.measure(self.model, self.s.eval_tokens)
        self.model.train()
        return results, report.evaluation_row(results, self.state.step, self.state.tokens, self.state.elapsed)

    def measure_more(self, winner, row):
        """Adds the benchmarks and probes of the better weights to the row of an evaluation, if they are asked for."""
        if self.world.is_main and (self.s.eval_tasks or self.s.probes):
            from evaluation import during  # it is not needed for a run without them
            with weights(self.params, self.ema if winner == "ema" else None):
                during.measure(self, winner, row)

    def evaluate(self):
        """Measures the weights, and saves those that are the best of the run."""
        s, state = self.s, self.state
        results, row = self.measure_both()
        winner = min(results, key=lambda kind: results[kind]["loss"]["mixed"])
        loss = results[winner]["loss"]["mixed"]
        self.measure_more(winner, row)
        self.folder.record(row)
        state.use_ema = winner == "ema"
        is_best = loss < state.best_loss
        if is_best:
            state.best_loss, state.best_step = loss, state.step
        line = report.evaluation_line(row, self.task.measured, winner)
        if is_best:
            line += "  best"
        self.progress.done(line)
        if is_best:
            self.save("best.pt")
            stays = s.keep_every and state.step % s.keep_every == 0
            record = report.best_validation(
                results[winner], self.task.sources, step=state.step, tokens=state.tokens, weights=winner,
                checkpoint=f"step_{state.step}.pt" if stays else "best.pt", eval_tokens=s.eval_tokens)
            self.folder.write("best_validation.json", json.dumps(record, indent=1))

    def show_sample(self):
        """Prints a sample, if there is to be one; its further lines begin under its first one."""
        if not self.s.sample_tokens:
            return
        label = "sample"
        for paragraph in self.task.sample(self.model):
            self.progress.done(f"{label:<12} " + paragraph.replace("\n", "\n" + 13 * " "))
            label = ""

    def finish(self):
        """Measures the best weights of the run on --final_eval_tokens, draws the loss, shows a sample."""
        s, task, folder = self.s, self.task, self.folder
        best = run.read_checkpoint(folder.path / "best.pt")
        kind = "ema" if best["use_ema"] else "raw"
        self.model.load_state_dict(best["model"] | (best["ema"] if best["use_ema"] else {}))
        self.model.eval()
        result = task.measure(self.model, s.final_eval_tokens)
        if not self.world.is_main:
            return

        xz = report.xz_bits_per_byte(task.sources, task.tokenizer) if task.is_text else None
        row = report.evaluation_row({kind: result}, best["step"], best["tokens"], self.state.elapsed)
        folder.record(row | dict(final=True, xz_bits_per_byte=xz))
        title = f"{s.model} on {', '.join(source.name for source in task.sources)}"
        report.draw_loss(folder.rows(), folder.path / "loss.png", title, xz)

        print("\n".join(report.result_lines(task, best, result, xz)))
        self.show_sample()
        print(report.last_line(self))


def loop(trainer, stop):
    """The training loop. Returns whether the run is finished; it is not if `stop`, a signal, asked for its end."""
    world, on, task, s = trainer.world, trainer.on, trainer.task, trainer.s
    model, net, params, ema = trainer.model, trainer.net, trainer.params, trainer.ema
    optimizers, state, folder = trainer.optimizers, trainer.state, trainer.folder
    flop_per_step = model.flops_per_token(task.T) * s.batch_tokens * (1 + task.extra_rows) / world.size
    peak = machine.peak_flops(on.chip, on.dtype)
    pace = machine.Pace(state)

    def is_due(every):
        """Whether this step is one of those in which something is done every so many steps; 0: never."""
        return every > 0 and state.step % every == 0

    while state.step < s.max_steps:
        # forward and backward, in micro-batches whose losses add up to the step's
        batch, loss = task.next_batch(state.step), torch.zeros((), device=on.device)
        for micro in batch.micros:
            with machine.gradients_stay_here(net, last=micro is batch.micros[-1]):
                with on.autocast():
                    part = task.loss(net, micro)
                (part * world.size).backward()  # the parts add up to the loss, but DDP takes the processes' mean
            loss += part.detach()

        # the update
        grad_norm = clip_gradients(params, s.grad_clip)
        if not math.isfinite(grad_norm):
            raise report.divergence(trainer, loss, grad_norm)
        lr = optimizers.step(lr_factor(state.step, s))
        for p in params:
            p.grad = None
        if ema is not None:
            ema_update(ema, params, state.step, s.ema_beta)
        state.step, state.tokens = state.step + 1, state.tokens + batch.targets
        is_last = state.step == s.max_steps
        stopping = bool(world.max(int(stop.asked)))  # a signal may reach the processes in different steps

        # the log: one dict is the row of metrics.jsonl and the line on the terminal
        if is_last or state.step % s.log_every == 0:
            seconds, steps, tokens = pace.lap()
            row = dict(step=state.step, tokens=state.tokens) | task.numbers(batch, loss)
            row |= dict(tokens_per_s=tokens / seconds, lr=lr, grad_norm=grad_norm, elapsed=state.elapsed)
            if peak:
                row["mfu"] = flop_per_step * steps / seconds / peak
            folder.record(row)
            folder.show(report.log_line(row, s.max_steps, (s.max_steps - state.step) * seconds / steps))

        # evaluate, save, sample
        with pace.paused():
            if is_last or is_due(s.eval_every):
                trainer.evaluate()
            if is_last or stopping or is_due(s.save_every):
                trainer.save("ckpt.pt")
                state.saved_step = state.step
            if is_due(s.keep_every):
                trainer.save(f"step_{state.step}.pt")
            if is_due(s.sample_every) and not is_last and world.is_main:
                trainer.show_sample()
        if stopping and not is_last:
            return False
    return True


def train(plan, make_task=Pretraining):
    """Trains as `plan` says, see run.plan_run, and returns the exit status. make_task: a class like Pretraining."""
    world, s = machine.World(), plan.settings
    on = machine.pick_device(s.device, s.dtype, s.compile, s.deterministic, world.local_rank)
    if s.eval_tasks or s.probes:
        from evaluation import during
        during.check(s)
    with world.joined(on.device), lasting_output():
        task = make_task(plan, world, on)
        if s.minutes and (not s.resume or "minutes" in plan.given):  # a resumed run keeps the steps that were found
            print(minutes.settle(plan, task, world, on, Optimizers))  # it puts steps and batch into plan.settings
            task = make_task(plan, world, on)
        trainer = Trainer(plan, task, world, on)
        trainer.begin()
        with machine.StopSignals() as stop:
            finished = loop(trainer, stop)
        if finished:
            trainer.finish()
        else:
            trainer.progress.done(
                f"stopped at step {trainer.state.step:,} of {trainer.s.max_steps:,}, saved {Path(s.out) / 'ckpt.pt'}"
                f"        next: python {task.tool} --resume --out={quoted(s.out)}")
        world.barrier()
    return 0


# --------------------------------------------------------------------------------------------------- which run is meant

def choices():
    """Setting -> the values that it may have."""
    return dict(order=("random", "sequential", "balanced"), pack=("stream", "document"),
                optimizer=(*MATRIX_OPTIMIZERS, "adamw"), schedule=tuple(SCHEDULES),
                dtype=("auto", "bfloat16", "float32"), compile=("auto", "on", "off"))


def default_out(model, kind):
    return f"out/{model}-decay" if kind == "decay" else f"out/{model}"


def main(argv):
    with machine.World().one_voice():
        description = " ".join((__doc__ or "").split("\n\n")[0].split())
        plan = run.plan_run(argv, Settings, choices(), default_out, description)
        return train(plan)


if __name__ == "__main__":
    run_tool(main)
