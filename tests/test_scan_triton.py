"""The selective scan in Triton against the float64 loop: on a GPU, or in Triton's interpreter on a CPU.

Triton is on no list of packages: torch's builds for GPUs bring it along. For a CPU: pip install triton, and
TRITON_INTERPRET=1 in the environment, as .ci/run has it.
"""
import functools
import importlib.util
import os

import pytest
import torch

import kernels
from conftest import command
from kernels import bench, reference
from scans import brute_force, convert, error, gradients, problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not importlib.util.find_spec("triton") or DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton has no GPU here, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
scan = functools.partial(kernels.selective_scan, return_state=True)


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")


def test_triton_is_what_runs():
    from kernels import scan_triton
    x = torch.zeros(1, device=DEVICE)
    assert kernels.implementation(x) is scan_triton and kernels.implementation(x.double()) is reference


@pytest.mark.parametrize("T, channels, N",
                         [(0, 3, 5), (1, 33, 16), (3, 9, 256), (64, 70, 1), (65, 5, 64), (130, 33, 7)])
@pytest.mark.parametrize("optional, dtype", [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_values_and_gradients_are_those_of_the_float64_loop(T, channels, N, optional, dtype):
    x = problem(2, T, channels, N, optional=optional)
    rounded = {k: v.double() if k != "reset" else v for k, v in convert(x, "cpu", dtype).items()}
    dy = problem(2, T, channels, N, seed=1)["u"].to(dtype).double()
    dh = torch.randn(2, channels, N, dtype=torch.float64)
    truth = gradients(brute_force, rounded, dy, dh)
    values = gradients(scan, convert(x, DEVICE, dtype), dy, dh)
    assert values[0].dtype == dtype and values[1].dtype == torch.float32
    for value, right in zip(values, truth):
        assert error(value, right) < (2e-5 if dtype == torch.float32 else 1e-2)


def test_any_strides_are_read():
    x = convert(problem(2, 70, 20, 16), DEVICE, torch.float32)
    turned = {k: v.mT.contiguous().mT if v.ndim == 3 and k != "reset" else v for k, v in x.items()}
    assert not turned["u"].is_contiguous() and not turned["h0"].is_contiguous()
    dy, dh = torch.randn(20, 70, 2).permute(2, 1, 0), torch.randn(2, 16, 20).mT
    for a, b in zip(gradients(scan, x, dy.contiguous(), dh.contiguous()), gradients(scan, turned, dy, dh)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_going_on_from_a_state_is_the_whole_sequence():
    x = convert(problem(2, 75, 8, 16), DEVICE, torch.float32)
    y, last = scan(**x)
    parts, h = [], x["h0"]
    for t in (slice(0, 10), slice(10, 64), slice(64, 75)):
        some = {k: v[:, t] if k in ("u", "delta", "B", "C", "reset") else v for k, v in x.items()}
        part, h = scan(**(some | dict(h0=h)))
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), y, atol=1e-5) and torch.allclose(h, last, atol=1e-5)


def test_an_empty_batch_has_an_empty_result():
    x = convert(problem(0, 5, 8, 4), DEVICE, torch.float32)
    y, last, *_ = gradients(scan, x, torch.empty(0, 5, 8), torch.empty(0, 8, 4))
    assert y.shape == (0, 5, 8) and last.shape == (0, 8, 4)


# What the interpreter does not do: compile the kernels, here for GPUs that are not there. Prints their shared memory
COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kernels import scan_triton as scan

CHOICES = dict(has_D=True, has_h0=True, has_dlast=True, has_reset=True, save=True, CHUNK=64)
ACTIVATIONS = ("u", "delta", "B", "C", "dy", "y", "du", "ddelta")
FP32 = ("A", "D", "h0", "last", "kept", "dlast", "scratch", "dA", "dB", "dC", "dh0")
for arch in (75, 80, 90, 120):
    for kernel in (scan.forward_kernel, scan.backward_kernel):
        for kind in ("fp32", "bf16") if arch >= 80 else ("fp32", "fp16"):
            block_d, block_n = scan.blocks(512, 64)
            known = {k: v for k, v in dict(CHOICES, BLOCK_D=block_d, BLOCK_N=block_n).items() if k in kernel.arg_names}
            types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(known, "constexpr") | dict(reset="*u8")
            types |= dict.fromkeys(ACTIVATIONS, "*" + kind) | dict.fromkeys(FP32, "*fp32")
            types = {name: types[name] for name in kernel.arg_names}
            if kernel is scan.backward_kernel:
                types |= dict(dB="*fp32", dC="*fp32")
            source = ASTSource(kernel, types, {(kernel.arg_names.index(k),): v for k, v in known.items()})
            made = compile(source, GPUTarget("cuda", arch, 32), dict(num_warps=scan.WARPS))
            assert len(made.asm["cubin"]) > 1000
            print(made.metadata.shared)
"""


def test_the_kernels_compile_for_gpus_from_the_t4_to_the_newest_in_little_shared_memory():
    process = command("-c", COMPILED, TRITON_INTERPRET="0", fresh=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(out.split()) == 16 and max(map(int, out.split())) <= 48 * 1024


def test_the_benchmarks_contender_has_the_same_gradients():
    *x, dy = bench.inputs(2, 70, 12, 8, torch.float32, DEVICE)
    ours, plain = (bench.with_gradients(f, [v.clone().requires_grad_() for v in x], dy)
                   for f in (bench.InTriton.apply, bench.loop))
    assert max(error(a.detach(), b.detach()) for a, b in zip(ours, plain)) < 1e-5
