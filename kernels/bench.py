"""How fast the selective scan is on this machine: `python kernels/bench.py [scan] [length]`; without a word, both.

    scan     correctness against float64 first, then forward, forward + backward and memory at several sizes, beside a
             loop over time and, if they are installed, mambapy (CPU and CUDA) and mamba_ssm (CUDA)
    length   forward + backward against the sequence length, beside the loop and beside attention of the same width

Times are the least of several rounds in which the contenders take turns. They include the page faults of fresh buffers,
which training has too. On Linux, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 before the command leaves them
out. MEASUREMENTS.md has results, and what was tried on the way to the present kernels.
"""
import ctypes
import functools
import gc
import importlib.util
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda":
    SIZES = ((32, 1024, 512, 16), (32, 1024, 512, 64), (4, 4096, 2048, 16))  # batch, T, channels, N
else:
    SIZES = ((4, 256, 512, 64), (2, 2048, 512, 16), (1, 4096, 512, 16), (8, 1024, 1024, 16))


# ---------------------------------------------------------------------------------------------------- measuring

def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def least(contenders, budget=4.0):
    """{name: function} -> {name: least seconds}; each runs 3 rounds or more, until it has had `budget` seconds."""
    spent, best = dict.fromkeys(contenders, 0.0), {}
    for round in range(50):
        for name, f in contenders.items():
            if round > 3 and spent[name] > budget:
                continue
            wait()
            start = time.perf_counter()
            f()
            wait()
            seconds = time.perf_counter() - start
            if round:  # the first one builds and warms up
                spent[name] += seconds
                best[name] = min(seconds, best.get(name, seconds))
    return best


def peak_memory(f):
    """Bytes that f needs beyond what is in use before it, or None if the system does not tell."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None

    def read(what):
        return 1024 * int(re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

    ctypes.CDLL(None).malloc_trim(0)
    before = read("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    f()
    return read("VmHWM") - before


def exponentials_per_second():
    """What the machine could do if a scan were nothing but its exponentials; None if the CPU kernel does not run."""
    if DEVICE.type != "cpu" or kernels.implementation(torch.zeros(1)) is kernels.reference:
        return None
    exp_only = torch.ops.selective_scan_cpu.exp_only
    return exp_only(5000) / least({"exp": lambda: exp_only(5000)}, 1.0)["exp"]


# ---------------------------------------------------------------------------------------------------- contenders

def steps(h, u, delta, A, B, C):
    """A loop over time as fast as PyTorch can: on whole tensors, by unbind. Indexing [:, t] has quadratic gradients."""
    ys = []
    for delta_t, x_t, B_t, C_t in zip(delta.unbind(1), (delta * u).unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(delta_t[..., None] * A) * h + x_t[..., None] * B_t[:, None]
        ys.append((h @ C_t[..., None]).squeeze(-1))
    return torch.stack(ys, 1), h


def loop(u, delta, A, B, C, D):
    return steps(u.new_zeros(u.size(0), *A.shape), u, delta, A, B, C)[0] + D * u


def compiled_loop(u, delta, A, B, C, D):
    """The same, 32 steps at a time by torch.compile, to which the loop is a program that grows with each step."""
    h, ys = u.new_zeros(u.size(0), *A.shape), []
    for u_part, delta_part, B_part, C_part in zip(*(x.split(32, 1) for x in (u, delta, B, C))):
        y, h = compiled_steps()(h, u_part, delta_part, A, B_part, C_part)
        ys.append(y)
    return torch.cat(ys, 1) + D * u


@functools.cache
def compiled_steps():
    return torch.compile(steps)


def mambapy(u, delta, A, B, C, D):
    from mambapy.pscan import pscan
    h = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])  # (B, T, channels, N)
    return (h @ C[..., None]).squeeze(-1) + D * u


def mamba_ssm(u, delta, A, B, C, D):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn(u.mT.contiguous(), delta.mT.contiguous(), A, B.mT.contiguous(), C.mT.contiguous(), D).mT


class InTriton(torch.autograd.Function):
    """Our scan in Triton, which runs where there is no nvcc."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D):
        from kernels import scan_triton
        y, _, kept = scan_triton.forward(u, delta, A, B, C, D, None, None, True)
        ctx.save_for_backward(u, delta, A, B, C, D, kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        from kernels import scan_triton
        *inputs, kept = ctx.saved_tensors
        return scan_triton.backward(dy, None, *inputs, None, kept)[:6]


def contenders():
    """{name: scan} of what is installed. On CUDA without mamba_ssm, plain PyTorch also runs compiled."""
    found = {"ours": kernels.selective_scan, "loop": loop}
    if importlib.util.find_spec("mambapy"):
        found["mambapy"] = mambapy
    if DEVICE.type == "cuda":
        if importlib.util.find_spec("triton"):
            found["ours in Triton"] = InTriton.apply
        if importlib.util.find_spec("mamba_ssm"):
            found["mamba_ssm"] = mamba_ssm
        elif "mambapy" in found:
            found["compiled mambapy"] = torch.compile(mambapy)
        else:
            found["compiled loop"] = compiled_loop
    return found


def inputs(batch, T, channels, N, dtype=torch.float32, device=DEVICE):
    """u, delta, A, B, C, D with decays as in a trained model, and the gradient of y."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    u = draw(batch, T, channels)
    delta = F.softplus(draw(batch, T, channels) - 4)
    A = -torch.arange(1.0, N + 1).double().expand(channels, N)
    B, C = draw(batch, T, N), draw(batch, T, N)
    D, dy = draw(channels), draw(batch, T, channels)
    return [x.to(device, dtype).contiguous() for x in (u, delta, A, B, C, D, dy)]


def with_gradients(scan, leaves, dy):
    """[y, the gradients of all leaves]: forward and backward pass of a scan."""
    y = scan(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check(batch, T, channels, N):
    """Largest relative error of y and all gradients against the loop in float64, on a part of batch and channels."""
    *x, dy = inputs(1, min(T, 512), min(channels, 96), N, torch.float64, "cpu")
    truth = with_gradients(loop, [v.requires_grad_() for v in x], dy)
    ours = [v.detach().to(DEVICE, torch.float32).requires_grad_() for v in x]
    values = with_gradients(kernels.selective_scan, ours, dy.to(DEVICE, torch.float32))

    def error(value, exact):
        return float((value.detach().double().cpu() - exact.detach()).abs().max() / exact.detach().abs().max())

    return max(error(v, t) for v, t in zip(values, truth))


# ---------------------------------------------------------------------------------------------------- what is measured

def print_row(cells, widths):
    print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))


SCAN_WIDTHS = (8, 16, 12, 12, 24, 13, 7)


def scan():
    """A table for each size. `limit` is the time over that of the exponentials alone, or on CUDA the bytes moved."""
    exps = exponentials_per_second()
    if exps:
        capability = torch.backends.cpu.get_cpu_capability()
        print(f"exponentials alone: {exps / 1e9:.1f} G/s on {torch.get_num_threads()} threads ({capability})")
    for batch, T, channels, N in SIZES:
        error = check(batch, T, channels, N)
        print(f"\nbatch {batch}, T {T:,}, channels {channels:,}, N {N}: error against float64 {error:.1e}")
        assert error < 1e-5
        *x, dy = inputs(batch, T, channels, N)
        print_row(("type", "scan", "forward", "G elements/s", "limit", "with backward", "x ours"), SCAN_WIDTHS)
        for dtype in (torch.float32, torch.bfloat16):
            time_scans(x, dy, dtype, exps)
        show_memory(x, dy)


def time_scans(x, dy, dtype, exps):
    """Prints a row for each contender, whose activations have this dtype."""
    (batch, T, channels), N = x[0].shape, x[2].size(1)
    elements = batch * T * channels * N
    moved = 4 * batch * T * (3 * channels + 2 * N)  # bytes of u, delta, B, C and y in fp32

    scans = contenders() if dtype == torch.float32 else {"ours": kernels.selective_scan}
    x = [v if i in (2, 5) else v.to(dtype) for i, v in enumerate(x)]  # A and D stay fp32
    leaves = [v.clone().requires_grad_() for v in x]
    dy = dy.to(dtype)
    with torch.no_grad():
        forward = least({name: lambda f=f: f(*x) for name, f in scans.items()})
    both = least({name: lambda f=f: with_gradients(f, leaves, dy) for name, f in scans.items()})

    for name in scans:
        if exps:
            limit = f"{exps * forward[name] / elements:.2f} x the exponentials"
        else:
            limit = f"{moved / forward[name] / 1e9:.0f} GB/s"
        print_row((str(dtype).removeprefix("torch."), name, f"{forward[name] * 1e3:.2f} ms",
                   f"{elements / forward[name] / 1e9:.2f}", limit, f"{both[name] * 1e3:.2f} ms",
                   f"{both[name] / both['ours']:.1f}"), SCAN_WIDTHS)


def show_memory(x, dy):
    """The peak of forward + backward in fp32, beside the sizes of what must exist."""
    leaves = [v.clone().requires_grad_() for v in x]
    (batch, T, channels), N = x[0].shape, x[2].size(1)
    peak = peak_memory(lambda: with_gradients(kernels.selective_scan, leaves, dy))
    if not peak:
        return
    before = sum(4 * v.numel() for v in (dy, *leaves))
    kept = 4 * batch * -(-T // kernels.CHUNK) * channels * N
    made = kept + sum(4 * v.numel() for v in (x[0], *leaves))  # the states kept, y and the gradients
    print(f"  memory: {(peak + before) / 2 ** 20:.0f} MB at the peak; inputs, outputs, gradients and kept states are "
          f"{(made + before) / 2 ** 20:.0f} MB")


def length(batch=1, channels=512, N=16):
    """Forward + backward against T; attention has 8 heads and the same width."""
    print(f"\nmilliseconds forward + backward, batch {batch}, width {channels}, N {N}")
    widths = (8, 9, 9, 9, 18, 23)
    print_row(("T", "scan", "loop", "attention", "scan, µs per token", "attention, µs per token"), widths)
    for T in (256, 512, 1024, 2048, 4096, 8192):
        *x, dy = inputs(batch, T, channels, N)
        leaves = [v.requires_grad_() for v in x]
        q = torch.randn(batch, 8, T, channels // 8, device=DEVICE, requires_grad=True)
        dy_heads = dy.view(batch, T, 8, -1).transpose(1, 2)
        seconds = least({
            "scan": lambda: with_gradients(kernels.selective_scan, leaves, dy),
            "loop": lambda: with_gradients(loop, leaves, dy),
            "attention": lambda: with_gradients(
                lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), [q], dy_heads),
        }, 1.0)
        ms = [f"{seconds[name] * 1e3:.2f}" for name in ("scan", "loop", "attention")]
        per_token = [f"{seconds[name] / T * 1e6:.2f}" for name in ("scan", "attention")]
        print_row((f"{T:,}", *ms, *per_token), widths)


if __name__ == "__main__":
    measurements = {"scan": scan, "length": length}
    chosen = sys.argv[1:] or list(measurements)
    for name in chosen:
        if name not in measurements:
            sys.exit(f"bench.py: {name!r} is none of {', '.join(measurements)}")
    for name in chosen:
        measurements[name]()
