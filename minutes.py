"""--minutes=N: how many steps of what size a run can make in that time on this machine.

measured() trains on random tokens for some seconds, with the model and the optimizers of the run, and choice() shares
out the time. A recipe's batch is made for the recipe's number of tokens. Where only a few steps of it fit into the
time, smaller ones train better: the batch is halved until STEPS of them fit, but not below LEAST_TOKENS tokens. Both
figures are from races of a model of 2 million parameters, for 0.5 and for 2.5 million tokens (MEASUREMENTS.md).
"""
import math
import statistics
import time
from dataclasses import dataclass, replace

import torch

import machine
import run
from common import UserError, clock

STEPS = 1000  # the batch is halved until so many steps fit into the time,
LEAST_TOKENS = 1024  # but not below so many tokens
CPU_TOKENS = 4096  # of a micro-batch on a CPU, where more of them need memory and bring no speed
MEASURE_SECONDS = 3.0  # for each part of a step
RESERVE = 0.08  # of the time for evaluating, saving and for what the measurement did not see


@dataclass
class Costs:
    """What a process needs for its share of a step, in seconds."""
    micro: float  # for the gradients of a micro-batch
    update: float  # for clipping, the optimizers and the average, once a step
    spent: float  # for the measurement itself


def choice(s, given, costs, micro_rows, processes=1, extra_rows=0.0, n_sources=1):
    """The settings s with the steps, batch, warm-up and evaluations that take s.minutes at these costs.

    given: names of the flags that were typed, which stay as they are. micro_rows: rows of the micro-batch that was
    measured. extra_rows: rows that are computed beside those of the batch, as a fraction of them. Raises UserError if
    nothing fits.
    """
    seconds = (60 * s.minutes - costs.spent) * (1 - RESERVE)
    a_row = costs.micro * (1 + extra_rows) / micro_rows

    def steps_of(rows):
        return int(seconds / (a_row * rows / processes + costs.update))

    rows = s.batch_tokens // s.block_size
    while ("batch_tokens" not in given and steps_of(rows) < STEPS and rows % (2 * processes) == 0
           and rows * s.block_size >= 2 * LEAST_TOKENS):
        rows //= 2
    max_steps = steps_of(rows)
    if max_steps < 1:
        needed = (costs.spent + (a_row * rows / processes + costs.update) / (1 - RESERVE)) / 60
        raise UserError(f"--minutes={s.minutes:g} is not enough for one step of {rows * s.block_size:,} tokens on this "
                        f"machine, which needs {needed:.1f}")
    tokens = max_steps * rows * s.block_size
    # 8 evaluations, of raw and of averaged weights, then read a twelfth as many tokens as training does; the last one
    # is the end's
    some = max(s.block_size, tokens // (200 * n_sources))
    chosen = dict(
        max_steps=max_steps, epochs=0.0, batch_tokens=rows * s.block_size,
        warmup_steps=min(s.warmup_steps, max_steps // 10),
        decay_steps=0,  # --decay_fraction says it
        eval_every=math.ceil(max_steps / 8), save_every=math.ceil(max_steps / 8),
        eval_tokens=min(s.eval_tokens or some, some),
        final_eval_tokens=min(s.final_eval_tokens or 10 * some, 10 * some))
    return replace(s, **{name: value for name, value in chosen.items() if name not in given})


def measured(plan, task, world, on, make_optimizers, steps=0, micro_rows=0):
    """The Costs of the plan's training on this machine, with the compiled model if so long a run compiles it.

    make_optimizers: train.Optimizers. steps: of the run; 0: as many as fit into its --minutes. micro_rows: rows of a
    micro-batch; 0: the task's. Every process measures, and the slowest one counts.
    """
    begun, s, micro_rows = time.monotonic(), plan.settings, micro_rows or task.micro
    model = run.on_device(run.make_model(plan.module, plan.cfg), on.device)
    if s.grad_checkpoint:
        machine.checkpoint_blocks(model)
    optimizers, params = make_optimizers(model, s, on.dtype), list(model.parameters())
    x, y = torch.randint(plan.cfg.vocab_size, (2, micro_rows, s.block_size), device=on.device).unbind()
    reset = None
    if task.frame is not None:
        reset = torch.rand(micro_rows, s.block_size, device=on.device) < 0.01

    def gradients(net, last):
        with machine.gradients_stay_here(net, last):
            with on.autocast():
                loss = net(x, y, reset=reset)[1]
            loss.backward()

    def update():
        for p in params:
            if p.grad is None:  # the loss does not depend on it
                p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizers.step(0.0)
        torch._foreach_lerp_([p.detach().clone() for p in params], params, 0.1)

    def once(work):
        started = time.monotonic()
        work()
        if on.device.type == "cuda":
            torch.cuda.synchronize()
        elif on.device.type == "mps":
            torch.mps.synchronize()
        return time.monotonic() - started

    def seconds_of(work):
        """The median of some calls, as many on every process, because they may wait for each other."""
        once(work)  # sets things up
        n = world.max(max(2, min(20, int(MEASURE_SECONDS / once(work)))))
        median = statistics.median(once(work) for _ in range(n))
        return world.max(math.ceil(1e6 * median)) / 1e6

    def micro_and_update(net):
        micro = seconds_of(lambda: gradients(net, last=False))
        exchange = 0.0  # of gradients, once a step
        if world.size > 1:
            exchange = max(0.0, seconds_of(lambda: gradients(net, last=True)) - micro)
        return micro, seconds_of(update) + exchange

    net, _ = machine.make_net(model, replace(s, max_steps=0), on, world)
    net.train()
    costs = Costs(*micro_and_update(net), 0.0)
    steps = steps or int(60 * s.minutes / (costs.micro * task.rows / micro_rows / world.size + costs.update))
    net, how = machine.make_net(model, replace(s, max_steps=max(1, steps)), on, world)
    if how == "compiled":
        costs.micro, costs.update = micro_and_update(net)
    costs.spent = world.max(math.ceil(1e6 * (time.monotonic() - begun))) / 1e6
    return costs


def settle(plan, task, world, on, make_optimizers):
    """Gives the plan of a new run the settings that take plan.settings.minutes. Returns a line that tells them.

    Raises UserError for a run that goes on, and for flags that say how long it is to be.
    """
    if plan.kind != "new" or plan.settings.resume:
        raise UserError("--minutes is for a new run: one that goes on has its number of steps")
    for name in ("max_steps", "epochs", "decay_steps"):
        if name in plan.given:
            raise UserError(f"--minutes chooses the number of steps: leave out --{name}")
    s, rows, spent = plan.settings, task.micro, 0.0
    if on.device.type == "cpu" and "micro_batch" not in plan.given:
        rows = min(rows, max(1, CPU_TOKENS // s.block_size))
    while True:
        costs = measured(plan, task, world, on, make_optimizers, micro_rows=rows)
        costs.spent = spent = spent + costs.spent
        chosen = choice(s, plan.given, costs, rows, world.size, task.extra_rows, len(task.sources))
        fewer = chosen.batch_tokens // s.block_size // world.size
        if fewer >= rows:
            break
        rows = fewer  # a step has fewer rows than were measured at once, and they may take longer each
    plan.settings = s = chosen if "micro_batch" in plan.given else replace(chosen, micro_batch=rows)
    each = costs.micro * (1 + task.extra_rows) * s.batch_tokens / s.block_size / rows / world.size + costs.update
    return (f"{'minutes':<12} {s.minutes:g}: {s.max_steps:,} steps of {s.batch_tokens:,} tokens at "
            f"{s.batch_tokens / each:,.0f} tokens/s make {s.max_steps * s.batch_tokens / 1e6:,.1f}M; "
            f"warm-up {s.warmup_steps}, about {clock(s.max_steps * each)} of training")
