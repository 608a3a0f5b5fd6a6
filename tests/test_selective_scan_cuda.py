"""kernels/selective_scan.cu computes the selective scan and its gradients: proven without a GPU.

g++ compiles the file with tests/cuda_on_cpu.h, which runs every thread of a block as a fiber. The results are compared
with a loop over time in float64. What only a GPU can show (nvcc's code does the same, and how fast) is not claimed.
"""
import ctypes
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
CHUNK = 64
EXPORTS = """
#include "selective_scan.cu"
extern "C" const char *forward(const ScanArgs *p) { return scan_forward_cuda(*p); }
extern "C" const char *backward(const ScanArgs *p) { return scan_backward_cuda(*p); }
extern "C" int64_t workspace(int64_t b, int64_t t, int64_t c, int64_t n) {
  return scan_backward_workspace(b, t, c, n);
}
"""


class ScanArgs(ctypes.Structure):  # the struct of selective_scan.h
    _fields_ = [("type", ctypes.c_int), *((name, ctypes.c_int64) for name in ("batch", "T", "channels", "N")),
                *((name, ctypes.c_void_p) for name in (
                    "u", "delta", "A", "B", "C", "D", "h0", "reset", "y", "last", "checkpoints",
                    "dy", "dlast", "du", "ddelta", "dA", "dB", "dC", "dD", "dh0", "workspace", "stream"))]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """selective_scan.cu as a library for the CPU."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first of several test processes compiles for all
        root = root.parent
    with open(root / "scan.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "scan.so").exists():
            (root / "scan.cpp").write_text(EXPORTS)
            subprocess.run(["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-DCUDA_ON_CPU",
                            f"-I{HERE.parent / 'kernels'}", f"-I{HERE}", root / "scan.cpp", "-o", root / "scan.tmp"],
                           check=True)
            os.replace(root / "scan.tmp", root / "scan.so")
    library = ctypes.CDLL(str(root / "scan.so"))
    library.forward.restype = library.backward.restype = ctypes.c_char_p
    library.workspace.argtypes, library.workspace.restype = [ctypes.c_int64] * 4, ctypes.c_int64
    return library


def make(batch, T, channels, N, dtype=torch.float32, D=True, h0=True, reset=True, dlast=True, seed=0):
    """Inputs, and the gradients that come back, by name; None if one is left out."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    return dict(
        u=rand(batch, T, channels).to(dtype),
        delta=torch.nn.functional.softplus(rand(batch, T, channels) - 2).to(dtype),
        A=-rand(channels, N).exp(),
        B=rand(batch, T, N).to(dtype),
        C=rand(batch, T, N).to(dtype),
        D=rand(channels) if D else None,
        h0=rand(batch, channels, N) if h0 else None,
        reset=(torch.rand(batch, T, generator=g) < 0.05).to(torch.uint8) if reset else None,
        dy=rand(batch, T, channels).to(dtype),
        dlast=rand(batch, channels, N) if dlast else None)


def run(kernels, x):
    """What the kernels make of such inputs. Outputs and workspace start as NaN."""
    batch, T, channels = x["u"].shape
    N = x["A"].shape[1]

    def nan(*shape):
        return torch.full(shape, torch.nan)

    def nan_like(tensor):
        return None if tensor is None else torch.full_like(tensor, torch.nan)

    out = dict(
        y=nan_like(x["u"]), last=nan(batch, channels, N), checkpoints=nan(batch, -(-T // CHUNK), N, channels),
        du=nan_like(x["u"]), ddelta=nan_like(x["u"]), dA=nan_like(x["A"]), dB=nan(batch, T, N), dC=nan(batch, T, N),
        dD=nan_like(x["D"]), dh0=nan_like(x["h0"]))
    size = kernels.workspace(batch, T, channels, N)
    assert size % 4 == 0
    workspace = torch.full((size // 4 + 64,), torch.nan)
    args = ScanArgs(TYPES[x["u"].dtype], batch, T, channels, N,
                    **{name: t.data_ptr() for name, t in {**x, **out, "workspace": workspace}.items() if t is not None})
    assert kernels.forward(ctypes.byref(args)) is None
    assert kernels.backward(ctypes.byref(args)) is None
    assert workspace[size // 4:].isnan().all()  # nothing was written behind it
    return {name: t for name, t in out.items() if t is not None}


def truth(x):
    """The definition, step by step in float64; gradients by autograd."""
    names = ("u", "delta", "A", "B", "C", "D", "h0")
    leaves = {name: x[name].double().requires_grad_() for name in names if x[name] is not None}
    u, delta, A, B, C, D, h0 = (leaves.get(name) for name in names)
    batch, T, channels = u.shape
    h, y = torch.zeros(batch, channels, A.shape[1], dtype=torch.float64) if h0 is None else h0, []
    for t in range(T):
        decay = (delta[:, t, :, None] * A).exp()
        if x["reset"] is not None:
            decay = decay * (x["reset"][:, t, None, None] == 0)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1) + (0 if D is None else D * u[:, t]))
    y = torch.stack(y, 1) if T else u
    loss = (y * x["dy"].double()).sum()
    if x["dlast"] is not None:
        loss = loss + (h * x["dlast"].double()).sum()
    grads = [torch.zeros_like(t) for t in leaves.values()]
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves.values(), materialize_grads=True)
    return dict(y=y.detach(), last=h.detach(), **{"d" + name: grad for name, grad in zip(leaves, grads)})


def assert_right(kernels, x):
    got, expected = run(kernels, x), truth(x)
    assert not got["checkpoints"].isnan().any()
    for name, right in expected.items():
        if right.numel():
            error, size = (got[name].double() - right).abs().max().item(), right.abs().max().item()
            assert error <= LIMIT[x["u"].dtype] * size, f"{name}: off by {error:.2e}, values up to {size:.2e}"


# ---------------------------------------------------------------------------------------------------- the claims

# lengths around a chunk's end, every padded N, channels around a tile's width, every type, each optional input left out
@pytest.mark.parametrize("T, N, channels, dtype, absent", [
    (130, 16, 70, torch.float32, ""), (130, 64, 33, torch.float32, ""), (130, 7, 5, torch.float32, "D h0 reset dlast"),
    (65, 1, 1, torch.float32, "D"), (65, 32, 68, torch.float32, "h0"), (64, 100, 9, torch.float32, "reset"),
    (63, 256, 5, torch.float32, "dlast"), (2, 16, 33, torch.float32, "h0 D"), (1, 64, 5, torch.float32, ""),
    (130, 128, 8, torch.float32, "h0 reset"), (130, 64, 36, torch.bfloat16, ""), (65, 16, 33, torch.bfloat16, "h0"),
    (130, 16, 64, torch.float16, "D"), (63, 100, 5, torch.float16, "reset dlast"),
], ids=str)
def test_outputs_and_gradients_are_those_of_the_loop(kernels, T, N, channels, dtype, absent):
    assert_right(kernels, make(2, T, channels, N, dtype, **dict.fromkeys(absent.split(), False)))


@pytest.mark.parametrize("absent", ["", "h0 D dlast"])
def test_no_steps_hand_the_state_through(kernels, absent):
    assert_right(kernels, make(2, 0, 5, 7, **dict.fromkeys(absent.split(), False)))


def test_a_view_that_is_not_aligned(kernels):
    x = make(2, 65, 8, 16)
    for name in ("u", "delta", "B", "C", "dy"):
        x[name] = torch.cat([torch.zeros(1), x[name].flatten()])[1:].view(x[name].shape)
    assert x["u"].data_ptr() % 16 == 4
    assert_right(kernels, x)


@pytest.mark.parametrize("N", [16, 64])
def test_extreme_steps_and_decays_give_no_nan(kernels, N):
    x = make(2, 66, 6, N)
    x["delta"][:, :, 0::3], x["delta"][:, :, 1::3] = 0.0, 1e4
    x["A"][:, 0::2], x["A"][:, 1::4] = 0.0, -1e4
    assert all(t.isfinite().all() for t in run(kernels, x).values())
    assert_right(kernels, x)


def test_a_reset_starts_a_sequence_of_its_own(kernels):
    """What comes after a reset does not see what came before it, however large."""
    x = make(2, 70, 5, 16)
    x["reset"][:] = 0
    x["reset"][:, 40] = 1
    other = {**x, "h0": x["h0"] * 1e6, "u": x["u"].clone()}
    other["u"][:, :40] *= -1e6
    one, two = run(kernels, x), run(kernels, other)
    assert torch.equal(one["y"][:, 40:], two["y"][:, 40:]) and torch.equal(one["last"], two["last"])
    assert torch.equal(one["du"][:, 40:], two["du"][:, 40:])


def test_blocks_in_another_order_give_the_same_bits(kernels):
    """The emulator draws a new order of blocks, warps and lanes in every launch."""
    x = make(2, 130, 70, 64)
    one, two = run(kernels, x), run(kernels, x)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_workspace_stays_small(kernels):
    """Near a quarter of u, delta, dy, du and ddelta in fp32, for the usual shapes."""
    for batch, T, channels, N in [(32, 1024, 512, 16), (32, 1024, 512, 64), (8, 4096, 1024, 16)]:
        assert kernels.workspace(batch, T, channels, N) < 0.35 * 5 * 4 * batch * T * channels
