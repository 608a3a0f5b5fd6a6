"""--minutes=N: how many steps of what size a run can make in that time on this machine.

measured() trains on random tokens for some seconds, with the model and the optimizers of the run, and choice() shares
out the time. A recipe's batch is made for the recipe's number of tokens. Where only a few steps of it fit into the
time, smaller ones train better: the batch is halved until there are STEPS of them.
"""
import math
import time
from dataclasses import dataclass, replace

import torch

import machine
import run
from common import UserError, clock

STEPS = 500  # steps that a run has at least, unless its batch is as small as this:
LEAST_TOKENS = 2048
MEASURE_SECONDS = 3.0
RESERVE = 0.08  # of the time for evaluating, saving and for what the measurement did not see


@dataclass
class Pace:
    """What a process needs for its share of a step, in seconds."""
    micro: float  # for the gradients of a micro-batch
    update: float  # for clipping, the optimizers and the average, once a step
    spent: float  # for the measurement itself


def choice(s, given, pace, micro_rows, processes=1, extra_rows=0.0, n_sources=1):
    """The settings s with the steps, batch, warm-up and evaluations that take s.minutes at this pace.

    given: names of the flags that were typed, which stay as they are. micro_rows: rows of a micro-batch. extra_rows:
    rows that are computed beside those of the batch, as a fraction of them. Raises UserError if nothing fits.
    """
    seconds = (60 * s.minutes - pace.spent) * (1 - RESERVE)
    a_row = pace.micro * (1 + extra_rows) / micro_rows

    def steps_of(rows):
        return int(seconds / (a_row * rows / processes + pace.update))

    rows = s.batch_tokens // s.block_size
    while ("batch_tokens" not in given and steps_of(rows) < STEPS and rows % (2 * processes) == 0
           and rows * s.block_size >= 2 * LEAST_TOKENS):
        rows //= 2
    max_steps = steps_of(rows)
    if max_steps < 1:
        needed = (pace.spent + (a_row * rows / processes + pace.update) / (1 - RESERVE)) / 60
        raise UserError(f"--minutes={s.minutes:g} is not enough for one step of {rows * s.block_size:,} tokens on this "
                        f"machine, which needs {needed:.1f}")
    tokens = max_steps * rows * s.block_size
    some = max(s.block_size, tokens // (200 * n_sources))  # about 1 token of an evaluation for 12 of training
    chosen = dict(
        max_steps=max_steps, epochs=0.0, batch_tokens=rows * s.block_size,
        warmup_steps=min(s.warmup_steps, max_steps // 10),
        decay_steps=0,  # --decay_fraction says it
        eval_every=max(1, max_steps // 8), save_every=max(1, max_steps // 8),
        eval_tokens=min(s.eval_tokens or some, some),
        final_eval_tokens=min(s.final_eval_tokens or 10 * some, 10 * some))
    return replace(s, **{name: value for name, value in chosen.items() if name not in given})


def measured(plan, task, world, on, make_optimizers):
    """The Pace of the plan's training on this machine, with the compiled model if so long a run compiles it.

    make_optimizers: train.Optimizers. Every process measures, and the slowest one counts.
    """
    begun, s = time.monotonic(), plan.settings
    model = run.on_device(run.make_model(plan.module, plan.cfg), on.device)
    if s.grad_checkpoint:
        machine.checkpoint_blocks(model)
    optimizers, params = make_optimizers(model, s, on.dtype), list(model.parameters())
    x = torch.randint(plan.cfg.vocab_size, (task.micro, s.block_size + 1), device=on.device)
    reset = None
    if task.frame is not None:
        reset = torch.rand(task.micro, s.block_size, device=on.device) < 0.01

    def gradients(net):
        with on.autocast():
            loss = net(x[:, :-1], x[:, 1:], reset=reset)[1]
        loss.backward()

    def update():
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizers.step(0.0)
        torch._foreach_lerp_([p.detach().clone() for p in params], params, 0.1)

    def wait():
        if on.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_of(work):
        """Of the quickest of several calls: the first ones set things up."""
        best, end = math.inf, None
        while end is None or time.monotonic() < end:
            started = time.monotonic()
            work()
            wait()
            best = min(best, time.monotonic() - started)
            end = end or time.monotonic() + MEASURE_SECONDS
        return world.max(math.ceil(1e6 * best)) / 1e6

    net, _ = machine.make_net(model, replace(s, max_steps=0), on, world)
    net.train()
    pace = Pace(seconds_of(lambda: gradients(net)), seconds_of(update), 0.0)
    steps = int(60 * s.minutes / (pace.micro * task.rows / task.micro / world.size + pace.update))
    net, compiled = machine.make_net(model, replace(s, max_steps=max(1, steps)), on, world)
    if compiled:
        pace.micro = seconds_of(lambda: gradients(net))
    pace.spent = time.monotonic() - begun
    return pace


def settle(plan, task, world, on, make_optimizers):
    """Gives the plan of a new run the settings that take plan.settings.minutes. Returns a line that tells them.

    Raises UserError for another run, and for flags that say how long it is to be.
    """
    if plan.kind != "new":
        raise UserError("--minutes is for a new run: one that goes on has its number of steps")
    for name in ("max_steps", "epochs", "decay_steps"):
        if name in plan.given:
            raise UserError(f"--minutes chooses the number of steps: leave out --{name}")
    pace = measured(plan, task, world, on, make_optimizers)
    plan.settings = s = choice(plan.settings, plan.given, pace, task.micro, world.size, task.extra_rows,
                               len(task.sources))
    each = pace.micro * (1 + task.extra_rows) * s.batch_tokens / s.block_size / task.micro / world.size + pace.update
    return (f"{'minutes':<12} {s.minutes:g}: {s.max_steps:,} steps of {s.batch_tokens:,} tokens at "
            f"{s.batch_tokens / each:,.0f} tokens/s make {s.max_steps * s.batch_tokens / 1e6:,.1f}M; "
            f"warm-up {s.warmup_steps}, about {clock(s.max_steps * each)} of training")
