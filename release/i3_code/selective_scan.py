"""The selective scan as i3.py calls it, computed by reference.py. The folder kernels/ of the repository is faster."""
import torch

from .reference import forward, step

MAX_STATES = 256  # of a channel


def selective_scan(u, delta, A, B, C, D=None, h0=None, reset=None, return_state=False):
    """y, or (y, last state) with return_state; shapes as in the repository's kernels/__init__.py.

    States and sums are fp32, or fp64 if u is. The gradients are PyTorch's own.
    """
    compute = torch.promote_types(u.dtype, torch.float32)
    A, D, h0 = (x if x is None else x.to(compute) for x in (A, D, h0))
    y, last, _ = forward(u, delta, A, B, C, D, h0, reset, save=False)
    return (y, last) if return_state else y


def selective_scan_step(h, u, delta, A, B, C, D=None):
    """One time step, which changes the state h (batch, channels, N) in place. Returns y (batch, channels)."""
    y = step(h, *(x if x is None else x.detach().to(h.dtype) for x in (u, delta, A, B, C, D)))
    return y.to(u.dtype)
