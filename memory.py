"""The memory of a training step, as train.py makes it in plain PyTorch."""
import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train


def first_step(model, s, on):
    """The optimizers after a step that changes nothing, so that they hold their moments, and the weights' average."""
    ema = [p.detach().clone() for p in model.parameters()] if s.ema_beta else []
    optimizers = train.Optimizers(model, replace(s, compile="off"), on.dtype)  # a kernel's memory is not counted
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(0.0)
    for p in model.parameters():
        p.grad = None
    return optimizers, ema


def training_step(model, optimizers, ema, micros, s, on):
    """One optimizer step as train.py makes it. micros: (inputs, targets, reset) of each micro-batch."""
    params = list(model.parameters())
    for x, y, reset in micros:
        with on.autocast():
            loss = model(x, y, reset=reset)[1]
        loss.backward()
        del loss
    train.clip_gradients(params, s.grad_clip)
    optimizers.step(1.0)
    for p in params:
        p.grad = None
    if ema:
        train.ema_update(ema, params, 0, s.ema_beta)


class AliveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once: those given at the start and what any
    operation makes, in the backward pass too. It does not see what a kernel allocates and frees by itself."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.peak = 0, 0
        self.known = set()
        for t in tensors:
            self.add(t)

    def add(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.known and storage.nbytes():
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out


def peak_of_tensors(model, s, on, T, rows):
    """Most bytes of tensors that are alive at once in a step of two micro-batches of random tokens, (rows, T) each.

    A recipe that packs documents gets four documents in a row.
    """
    optimizers, ema = first_step(model, s, on)
    idx = torch.randint(model.cfg.vocab_size, (rows, T), device=on.device)
    reset = None
    if s.pack == "document":
        reset = torch.zeros(rows, T, dtype=torch.bool, device=on.device)
        reset[:, ::max(1, T // 4)] = True
    micros = [(idx, idx, reset)] * 2

    if on.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on.device)
        training_step(model, optimizers, ema, micros, s, on)
        return torch.cuda.max_memory_allocated(on.device)
    kept = [*model.parameters(), *ema, *tree_leaves(optimizers.state_dict()), idx]
    with AliveTensors(t for t in kept if isinstance(t, torch.Tensor)) as alive:
        training_step(model, optimizers, ema, micros, s, on)
    return alive.peak
