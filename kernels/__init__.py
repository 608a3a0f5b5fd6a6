"""Mamba's selective scan (arXiv 2312.00752), differentiable, on a CPU and on CUDA:

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = sum_n C_t[n] h_t[n] + D u_t

    y = selective_scan(u, delta, A, B, C, D)                        whole sequences
    y, h = selective_scan(..., h0=h, return_state=True)             going on from a state
    y = selective_scan_step(h, u, delta, A, B, C, D)                one token, h changed in place

Four implementations stand behind one operator, torch.ops.kernels.selective_scan, which torch.compile keeps as one node
of its graph: reference.py (PyTorch), selective_scan.cpp (C++ with SIMD and threads), selective_scan.cu (CUDA) and
scan_triton.py (Triton). The C++ and CUDA ones are built at first use. Where that fails, one line says why and what runs
in their place. The environment variable KERNELS chooses:

    auto         the default: the CPU's for tensors on a CPU, CUDA's for those on a GPU. Where CUDA's cannot be built,
                 as without nvcc, or finds too little shared memory, Triton's. The reference, if these fail
    reference    always the reference
    cpu          the CPU's must build, else RuntimeError; tensors on a GPU go to the reference
    cuda         CUDA's must build, else RuntimeError; tensors on a CPU are treated as with auto
    triton       Triton's must run, else RuntimeError; tensors on a CPU are treated as with auto, but go to Triton's
                 interpreter with TRITON_INTERPRET=1

An empty KERNELS is no KERNELS.

fp64 on a GPU always goes to the reference. To use the folder in another project, copy it.
"""
import functools
import importlib
import os

import torch
from torch import Tensor

from . import build, reference
from .reference import CHUNK

MAX_STATES = 256  # what the CUDA kernels are made for
SHARED_MEMORY = 92 * 1024  # bytes of it that their largest block needs; a T4 and a P100 have less


# ---------------------------------------------------------------------------------------------------- implementations

@functools.cache
def compiled(kind, must):
    """The compiled operators of `kind` (cpu or cuda), or None if they cannot be built; with `must` a RuntimeError."""
    try:
        torch.ops.load_library(build.library(kind))
        return getattr(torch.ops, f"selective_scan_{kind}")
    except (build.CannotBuild, OSError) as e:
        if must:
            raise RuntimeError(f"KERNELS={kind}, but {e}") from None
        build.say(f"kernels      {e}, so the selective scan runs in {in_its_place(kind)}")
        return None


@functools.cache
def has_room(device):
    """Whether the CUDA kernels fit this GPU. If they do not, a line says so."""
    gpu = torch.cuda.get_device_properties(device)
    if gpu.shared_memory_per_block_optin >= SHARED_MEMORY:
        return True
    build.say(f"kernels      {gpu.name} has too little shared memory, "
              f"so the selective scan runs in {in_its_place('cuda')}")
    return False


def in_its_place(kind):
    """The name of what runs where `kind` cannot."""
    return "Triton" if kind == "cuda" and in_triton(must=False) else "PyTorch, several times slower"


@functools.cache
def in_triton(must):
    """The module that computes the scan in Triton, or None if Triton does not run here; with `must` a RuntimeError."""
    try:
        found = importlib.import_module(f"{__name__}.scan_triton")
        x = torch.ones(1, 2, 1, device="cuda" if torch.cuda.is_available() else "cpu")
        y, _, kept = found.forward(x, x, -x[0, :1], x, x, None, None, None, True)
        found.backward(y, None, x, x, -x[0, :1], x, x, None, None, kept)
        return found
    except Exception as e:  # Triton and what it calls, such as a C compiler, fail in many ways
        why = f"Triton does not run ({type(e).__name__}: {' '.join(str(e).split())[:200]})"
        if must:
            raise RuntimeError(f"KERNELS=triton, but {why}") from None
        build.say(f"kernels      {why}")
        return None


def implementation(x):
    """The module or operators that compute the scan for tensors like x. Raises ValueError for an unknown KERNELS."""
    choice, kind = build.choice(), x.device.type
    if choice == "reference" or kind not in ("cpu", "cuda"):
        return reference
    if kind == "cuda" and (choice == "cpu" or x.dtype == torch.float64):
        return reference
    if choice == "triton" and (kind == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        return reference if x.dtype == torch.float64 else in_triton(must=True)
    if kind == "cpu":
        return compiled("cpu", must=choice == "cpu") or reference
    return has_room(x.device) and compiled("cuda", must=choice == "cuda") or in_triton(must=False) or reference


# ---------------------------------------------------------------------------------------------------- the operator

@torch.library.custom_op("kernels::selective_scan", mutates_args=())
def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
         h0: Tensor | None, reset: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(implementation(u).forward(u, delta, A, B, C, D, h0, reset, save))


@scan.register_fake
def _(u, delta, A, B, C, D, h0, reset, save):
    kept = -(-u.size(1) // CHUNK) if save else 0
    y = u.new_empty(u.shape)
    last = A.new_empty(u.size(0), *A.shape)
    checkpoints = A.new_empty(u.size(0), kept, A.size(1), A.size(0))
    return y, last, checkpoints


@torch.library.custom_op("kernels::selective_scan_backward", mutates_args=())
def scan_backward(dy: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                  D: Tensor | None, reset: Tensor | None, checkpoints: Tensor
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(implementation(u).backward(dy, dlast, u, delta, A, B, C, D, reset, checkpoints))


@scan_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, D, reset, checkpoints):
    du, ddelta, dA, dB, dC = (x.new_empty(x.shape) for x in (u, delta, A, B, C))
    dD, dh0 = A.new_empty(A.size(0)), A.new_empty(u.size(0), *A.shape)
    return du, ddelta, dA, dB, dC, dD, dh0


def _setup(ctx, inputs, output):
    u, delta, A, B, C, D, h0, reset, save = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, reset, output[2])
    ctx.has_h0 = h0 is not None
    ctx.set_materialize_grads(False)  # the state's gradient is mostly absent, and a tensor of zeros would cost time


def _backward(ctx, dy, dlast, _):
    u, delta, A, B, C, D, reset, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(u)
    du, ddelta, dA, dB, dC, dD, dh0 = scan_backward(dy, dlast, u, delta, A, B, C, D, reset, checkpoints)
    if D is None:
        dD = None
    if not ctx.has_h0:
        dh0 = None
    return du, ddelta, dA, dB, dC, dD, dh0, None, None


scan.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("kernels::selective_scan_step", mutates_args=("h",))
def scan_step(h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    kernels = reference if h.is_cuda else implementation(h)  # one step is too little for a CUDA kernel to be worth it
    return kernels.step(h, u, delta, A, B, C, D)


@scan_step.register_fake
def _(h, u, delta, A, B, C, D):
    return u.new_empty(u.shape)


# ---------------------------------------------------------------------------------------------------- what to call

def selective_scan(u, delta, A, B, C, D=None, h0=None, reset=None, return_state=False):
    """y, or (y, last state) with return_state. Differentiable in all tensors but reset, and through the returned state.

    u, delta   (batch, T, channels)    input, and the step size, at least 0
    A          (channels, N)           at most 0; exp(delta A) is the decay of a state in one step; N at most 256
    B, C       (batch, T, N)           what goes into the states, what is read out of them; the same for all channels
    D          (channels,)             skip connection; None: none
    h0         (batch, channels, N)    state before the first step; None: zeros
    reset      bool (batch, T)         true where a document begins: the state before that step counts as zero

    u, delta, B and C are fp32, bf16 or fp16 and of any strides; states, A, D and all sums are fp32. If u is fp64, for
    gradient checks, all is fp64. y has u's type and shape, and contiguous strides. For the backward pass the inputs are
    kept, and a state every 64 steps. Raises ValueError for shapes or devices that do not fit, and if reset is not bool.
    """
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError("u must be (batch, T, channels) and A (channels, N), "
                         f"not {tuple(u.shape)} and {tuple(A.shape)}")
    batch, T, channels = u.shape
    N = A.size(1)
    if not 1 <= N <= MAX_STATES:
        raise ValueError(f"A has {N} states; 1 to {MAX_STATES} are possible")
    expected = (
        ("delta", delta, (batch, T, channels)), ("A", A, (channels, N)), ("B", B, (batch, T, N)),
        ("C", C, (batch, T, N)), ("D", D, (channels,)), ("h0", h0, (batch, channels, N)), ("reset", reset, (batch, T)))
    for name, x, shape in expected:
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}, "
                             f"but {shape} goes with u {tuple(u.shape)} and A {tuple(A.shape)}")
        if x is not None and x.device != u.device:
            raise ValueError(f"{name} is on {x.device}, u on {u.device}")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset must be bool, not {reset.dtype}")

    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    A, D, h0 = (x if x is None else x.to(compute) for x in (A, D, h0))
    inputs = [x for x in (u, delta, A, B, C, D, h0) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)  # states, for a backward pass
    y, last, _ = scan(u, delta, A, B, C, D, h0, reset, save)
    return (y, last) if return_state else y


def selective_scan_step(h, u, delta, A, B, C, D=None):
    """One time step, without gradients. Changes the state h (batch, channels, N) in place.

    Returns y (batch, channels) in u's type. u, delta (batch, channels), A (channels, N), B, C (batch, N), D (channels,)
    or None: the arithmetic is that of selective_scan. Raises ValueError for shapes or devices that do not fit.
    """
    batch, channels, N = h.shape
    if not 1 <= N <= MAX_STATES:
        raise ValueError(f"h has {N} states; 1 to {MAX_STATES} are possible")
    expected = (
        ("u", u, (batch, channels)), ("delta", delta, (batch, channels)), ("A", A, (channels, N)),
        ("B", B, (batch, N)), ("C", C, (batch, N)), ("D", D, (channels,)))
    for name, x, shape in expected:
        if x is not None and (tuple(x.shape) != shape or x.device != h.device):
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}, "
                             f"but {shape} on {h.device} goes with h {tuple(h.shape)}")

    state = h.contiguous()
    tensors = [x if x is None else x.detach().to(h.dtype).contiguous() for x in (u, delta, A, B, C, D)]
    y = scan_step(state, *tensors).to(u.dtype)
    if state is not h:  # h was not contiguous
        h.copy_(state)
    return y
