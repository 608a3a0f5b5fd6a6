"""The selective scan: every implementation against a float64 loop over time, and what its callers rely on.

Errors are max |difference| / max |reference|. CUDA takes part if there is a GPU; test_selective_scan_cuda.py runs its
kernels on the CPU, test_scan_triton.py those in Triton.
"""
import ast
import functools
import os
import shutil
import subprocess
import sys
import time
import types

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from conftest import ROOT, command
from kernels import bench, build
from scans import NAMES, brute_force, convert, error, gradients, problem

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
IMPLEMENTATIONS = ["reference"] + ["cpu"] * bool(COMPILER) + ["cuda"] * torch.cuda.is_available()
every_implementation = pytest.mark.parametrize("kind", IMPLEMENTATIONS)


@pytest.fixture
def use(monkeypatch):
    """use("reference") makes that implementation the one that runs; returns its device."""
    def choose(kind):
        monkeypatch.setenv("KERNELS", kind)
        return "cuda" if kind == "cuda" else "cpu"
    return choose


scan = functools.partial(kernels.selective_scan, return_state=True)


# ---------------------------------------------------------------------------------------------------- arithmetic

SIZES = [(T, N) for T in (0, 1, 2, 63, 64, 65, 257) for N in (1, 7, 16, 64, 128, 256)] + [(1000, 7), (1000, 64)]


@pytest.mark.parametrize("T, N", SIZES)
def test_all_implementations_equal_the_float64_loop(T, N, use):
    for optional, dtype in ((True, torch.float32), (False, torch.float32), (True, torch.bfloat16)):
        channels = 33 if T < 1000 else 19  # no multiple of any tile
        x = problem(2, T, channels, N, optional=optional)
        rounded = {k: v.double() if k != "reset" else v for k, v in convert(x, "cpu", dtype).items()}
        dy = problem(2, T, channels, N, seed=1)["u"].to(dtype).double()
        dh = torch.randn(2, channels, N, dtype=torch.float64)
        truth = gradients(brute_force, rounded, dy, dh)
        for kind in IMPLEMENTATIONS:
            values = gradients(scan, convert(x, use(kind), dtype), dy, dh)
            assert values[0].dtype == dtype and values[1].dtype == torch.float32
            errors = [error(v, t) for v, t in zip(values, truth)]
            assert all(e < (1e-5 if dtype == torch.float32 else 2e-2) for e in errors), (kind, dtype, errors)


@every_implementation
def test_any_strides_and_mixed_types(kind, use):
    x = convert(problem(3, 70, 21, 10), use(kind), torch.float32)
    x["delta"], x["B"] = x["delta"].half(), x["B"].bfloat16()
    dy, dh = torch.randn(3, 70, 21), torch.randn(3, 21, 10)
    truth = gradients(scan, x, dy, dh)
    strided = dict(
        u=x["u"].permute(2, 0, 1).contiguous().permute(1, 2, 0), delta=x["delta"].repeat_interleave(2, 2)[:, :, ::2],
        A=x["A"].mT.contiguous().mT, B=x["B"].mT.contiguous().mT, C=torch.cat((x["C"], x["C"]), 2)[:, :, 10:],
        D=x["D"].repeat_interleave(3)[::3], h0=x["h0"].mT.contiguous().mT, reset=x["reset"].mT.contiguous().mT)
    values = gradients(scan, strided, dy.mT.contiguous().mT, dh.mT.contiguous().mT)
    assert all(not v.is_contiguous() for v in strided.values())
    for value, expected in zip(values, truth):
        assert value.dtype == expected.dtype
        assert error(value, expected) < (1e-5 if expected.dtype == torch.float32 else 1e-2)
    assert values[0].is_contiguous()


@every_implementation
def test_reset_equals_scanning_each_document_alone(kind, use):
    x, ends = convert(problem(1, 150, 20, 16), use(kind), torch.float32), (0, 1, 64, 66, 129, 150)
    x["reset"] = torch.zeros(1, 150, dtype=torch.bool, device=x["u"].device)
    x["reset"][0, list(ends[:-1])] = True
    y, h = scan(**x)
    for first, end in zip(ends, ends[1:]):
        part = {k: x[k][:, first:end] for k in ("u", "delta", "B", "C")}
        alone, last = scan(**part, A=x["A"], D=x["D"])
        assert error(y[:, first:end], alone) < 1e-6
    assert error(h, last) < 1e-6
    for t in ends[:-1]:  # and no gradient crosses
        u = x["u"].detach().requires_grad_()
        g, = torch.autograd.grad(kernels.selective_scan(**{**x, "u": u})[:, t:].sum(), u)
        assert (g[:, :t] == 0).all() and (g[:, t:] != 0).all()


@every_implementation
@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_a_sequence_cut_anywhere_and_carried_on_gives_the_same(kind, data):
    T, N = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 20))
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4)))
    os.environ["KERNELS"] = kind
    try:
        x = convert(problem(2, T, 9, N, seed=T), "cuda" if kind == "cuda" else "cpu", torch.float32)
        dy, dh = torch.randn(2, T, 9), torch.randn(2, 9, N)

        def in_pieces(h0, A, D, **over_time):
            ys, h = [], h0
            for first, end in zip([0, *cuts], [*cuts, T]):
                y, h = scan(A=A, D=D, h0=h, **{k: v[:, first:end] for k, v in over_time.items()})
                ys.append(y)
            return torch.cat(ys, 1), h

        for value, truth in zip(gradients(in_pieces, x, dy, dh), gradients(scan, x, dy, dh)):
            assert error(value, truth) < 1e-5
    finally:
        del os.environ["KERNELS"]


@pytest.mark.parametrize("kind", [kind for kind in IMPLEMENTATIONS if kind != "cuda"])
def test_gradcheck_in_float64(kind, use):
    use(kind)
    x = problem(2, 67, 3, 2)
    reset = x.pop("reset")
    inputs = [v.requires_grad_() for v in x.values()]
    assert torch.autograd.gradcheck(lambda *a: scan(*a, reset=reset), inputs, fast_mode=True)
    for k in ("u", "delta", "B", "C"):
        x[k] = x[k].detach()[:, :3].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: scan(*a), list(x.values()))


@every_implementation
def test_same_bits_on_every_run_and_for_any_number_of_threads(kind, use):
    x = convert(problem(3, 130, 70, 16), use(kind), torch.float32)
    dy, dh, threads = torch.randn(3, 130, 70), torch.randn(3, 70, 16), torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            runs.append(gradients(scan, x, dy, dh))
    finally:
        torch.set_num_threads(threads)
    if kind == "reference":  # its sums depend on the number of threads
        runs = runs[1:3]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


@every_implementation
@pytest.mark.parametrize("delta", (0.0, 1e-30, 1e4))
@pytest.mark.parametrize("A", (0.0, -1e-30, -1e4))
def test_extreme_steps_and_decays_are_finite_and_right(kind, delta, A, use):
    x = problem(1, 70, 5, 9)
    x["delta"][:, ::2], x["A"][::2] = delta, A
    truth = gradients(brute_force, x, x["u"], x["h0"])
    values = gradients(scan, convert(x, use(kind), torch.float32), x["u"], x["h0"])
    assert all(v.isfinite().all() for v in values)
    assert all(error(v, t) < 1e-5 for v, t in zip(values, truth))


@every_implementation
@pytest.mark.parametrize("batch, T, channels", ((0, 5, 4), (2, 5, 0), (0, 0, 0)))
def test_empty_tensors_have_empty_results_and_zero_gradients(kind, batch, T, channels, use):
    x = convert(problem(batch, T, channels, 3), use(kind), torch.float32)
    values = gradients(scan, x, torch.ones(batch, T, channels), torch.ones(batch, channels, 3))
    assert [v.shape for v in values[2:]] == [x[k].shape for k in NAMES]
    assert all((v == 0).all() for v in values)


@every_implementation
def test_autocast_changes_nothing(kind, use):
    device = use(kind)
    x = convert(problem(2, 70, 10, 8), device, torch.float32)
    dy, dh = torch.randn(2, 70, 10), torch.randn(2, 10, 8)
    plain = gradients(scan, x, dy, dh)
    with torch.autocast(device, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(scan, x, dy, dh), plain))


@every_implementation
def test_decay_above_one_and_not_a_number_are_not_hidden(kind, use):
    x = convert(problem(1, 1, 4, 3, optional=False), use(kind), torch.float32)
    growing = dict(x, A=torch.full_like(x["A"], 1e8), h0=torch.ones_like(x["A"])[None])
    assert (scan(**growing)[1] == torch.inf).all()
    for name in ("u", "delta", "A", "B", "C"):
        broken = dict(x, **{name: torch.full_like(x[name], torch.nan)})
        assert scan(**broken)[0].isnan().all(), name


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_a_state_that_fades_is_zero_before_its_numbers_take_a_hundred_cycles_each(use):
    use("cpu")
    tiny = torch.finfo(torch.float32).tiny
    x = dict(u=torch.zeros(1, 200, 20), delta=torch.ones(1, 200, 20), B=torch.ones(1, 200, 8), C=torch.ones(1, 200, 8),
             A=-torch.linspace(0.3, 1.3, 160).view(20, 8))
    x["u"][:, 0] = 1
    y, h = scan(**x)
    exact, _ = brute_force(**x)
    assert (exact[exact > 0] < tiny).any() and ((y == 0) | (y >= tiny)).all()
    assert torch.equal(h[h < tiny], torch.zeros_like(h[h < tiny])) and (h > 0).any()
    y = torch.ops.selective_scan_cpu.step(torch.full((1, 20, 8), 2 * tiny), *(x[k][:, 1] for k in ("u", "delta")),
                                          x["A"], *(x[k][:, 1] for k in ("B", "C")), None)
    assert ((y == 0) | (y >= tiny)).all() and (y == 0).any()
    assert torch.full((9,), tiny).div(2).gt(0).all()  # outside, such numbers are as they were


def test_one_token_step_equals_the_scan(use):
    for kind in IMPLEMENTATIONS:
        for N in (1, 7, 16, 64, 100):
            x = convert(problem(2, 6, 21, N), use(kind), torch.float32)
            del x["reset"]
            y, last = scan(**x)
            A, D, h = x["A"], x["D"], x["h0"].clone()
            tokens = list(zip(*(x[k].unbind(1) for k in ("u", "delta", "B", "C"))))
            steps = [kernels.selective_scan_step(h, u, delta, A, B, C, D) for u, delta, B, C in tokens]
            assert error(torch.stack(steps, 1), y) < 1e-6 and error(h, last) < 1e-6

            u, delta, B, C = tokens[0]
            half = kernels.selective_scan_step(h, u.bfloat16(), delta, A, B, C)
            assert half.dtype == torch.bfloat16
            strided = last.mT.contiguous().mT
            kernels.selective_scan_step(strided, u.bfloat16(), delta, A, B, C)
            assert error(strided, h) < 1e-6
            with pytest.raises(ValueError):
                kernels.selective_scan_step(h, u[:1], delta, A, B, C)


# ---------------------------------------------------------------------------------------------------- memory, compiling

class Allocated(TorchDispatchMode):
    """Sizes in bytes of all tensors that operations return."""
    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


MEMORY = """
import ctypes, re, sys, torch, kernels
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: freed memory goes back to the system at once, for a true peak
torch.set_num_threads(1)
B, T, D, N = 1, 4096, 512, int(sys.argv[1])
def run(T):
    u, delta, dy = (torch.rand(B, T, D) for _ in range(3))
    b, c, A = torch.randn(B, T, N), torch.randn(B, T, N), -torch.rand(D, N)
    leaves = [x.requires_grad_() for x in (u, delta, A, b, c)]
    kernels.selective_scan(*leaves).backward(dy)
    return sum(2 * x.numel() * 4 for x in leaves) + 2 * dy.numel() * 4 + B * -(-T // 64) * D * N * 4
def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
run(64)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
stated = run(T)
print((memory("VmHWM") - before) / stated)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="of the compiled scan, with /proc and mallopt")
@pytest.mark.parametrize("N", (16, 64))
def test_memory_is_inputs_outputs_gradients_and_a_state_every_64_steps(N):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(N)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.8 < float(done.stdout) < 1.2


@every_implementation
def test_nothing_of_the_size_of_all_states_exists(kind, use):
    B, T, D, N = 1, 1024, 32, 16
    x = convert(problem(B, T, D, N), use(kind), torch.float32)
    inputs = [x[k] for k in ("u", "delta", "A", "B", "C", "D")]
    run = kernels.implementation(x["u"])  # below the operator, whose inside the mode does not see
    with Allocated() as seen:
        y, last, kept = run.forward(*inputs, x["h0"], x["reset"], True)
        run.backward(y, last, *inputs, x["reset"], kept)
    assert max(seen.sizes) <= 4 * B * D * max(T, kernels.CHUNK * N)


@every_implementation
def test_compiled_function_is_one_graph_with_the_same_results(kind, use):
    torch._dynamo.reset()
    x = convert(problem(2, 70, 10, 8), use(kind), torch.float32)
    dy, dh = torch.randn(2, 70, 10), torch.randn(2, 10, 8)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(gradients(compiled, x, dy, dh), gradients(scan, x, dy, dh)))
    with torch.no_grad():
        assert torch.equal(compiled(**x)[0], scan(**x)[0])
    step = kernels.selective_scan_step
    ys, hs = [], []
    for step in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hs.append(x["h0"].clone())
        ys.append(step(hs[-1], x["u"][:, 0], x["delta"][:, 0], x["A"], x["B"][:, 0], x["C"][:, 0], x["D"]))
    assert torch.equal(*ys) and torch.equal(*hs) and not torch.equal(hs[0], x["h0"])


@every_implementation
def test_results_have_the_strides_that_compiled_code_is_promised(kind, use):
    x = convert(problem(2, 70, 10, 8), use(kind), torch.float32)
    x = {k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in x.items()}
    inputs = [x[k] for k in ("u", "delta", "A", "B", "C", "D")]
    y, last, kept = torch.ops.kernels.selective_scan(*inputs, x["h0"], x["reset"], True)
    grads = torch.ops.kernels.selective_scan_backward(y, last, *inputs, x["reset"], kept)
    assert all(v.is_contiguous() for v in (y, last, kept, *grads))


def test_operator_passes_torchs_own_checks(use):
    x = convert(problem(2, 70, 5, 3), use(IMPLEMENTATIONS[-1]), torch.float32)
    inputs = [x[k].requires_grad_() for k in NAMES]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.kernels.selective_scan, (*inputs, x["reset"], True), test_utils=checks)


def test_shapes_that_do_not_fit_are_refused(use):
    x = convert(problem(2, 5, 4, 3), use(IMPLEMENTATIONS[-1]), torch.float32)
    for name in ("delta", "A", "B", "C", "D", "h0", "reset"):
        with pytest.raises(ValueError):
            scan(**dict(x, **{name: x[name][..., :-1]}))
    one, many = torch.zeros(1, 1, 1), torch.zeros(1, 1, 257)
    with pytest.raises(ValueError, match="256"):
        scan(one, one, many[0], many, many)
    with pytest.raises(ValueError, match="bool"):
        scan(**dict(x, reset=x["reset"].float()))
    nothing = torch.zeros(1, 4, 0)
    with pytest.raises(ValueError, match="h has 0 states; 1 to 256"):
        kernels.selective_scan_step(nothing, one[0, 0].expand(1, 4), one[0, 0].expand(1, 4), nothing[0], nothing[:, 0],
                                    nothing[:, 0])


# ---------------------------------------------------------------------------------------------------- building

def test_a_machine_with_another_c_library_builds_its_own(monkeypatch):
    ours = build.path_of("cpu")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.28"))
    assert build.path_of("cpu") != ours


@pytest.mark.parametrize("triton, what", [("Triton's", "Triton"), (None, "PyTorch, several times slower")])
def test_a_gpu_with_too_little_memory_for_a_block_gets_triton_or_the_reference(triton, what, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "in_triton", lambda must: triton)
    monkeypatch.setattr(kernels, "compiled", lambda kind, must: "CUDA's")
    x = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    for room, fits in ((64 * 1024, False), (99 * 1024, True)):
        kernels.has_room.cache_clear()
        gpu = types.SimpleNamespace(name="Tesla T4", shared_memory_per_block_optin=room)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: gpu)
        assert kernels.implementation(x) == ("CUDA's" if fits else triton or kernels.reference)
        said = f"kernels      Tesla T4 has too little shared memory, so the selective scan runs in {what}\n"
        assert capsys.readouterr().err == ("" if fits else said)
    kernels.has_room.cache_clear()


def test_a_gpu_without_nvcc_gets_triton(monkeypatch, capsys):
    def library(kind):
        raise build.CannotBuild("there is no nvcc")
    monkeypatch.setattr(build, "library", library)
    monkeypatch.setattr(kernels, "in_triton", lambda must: "Triton's")
    monkeypatch.setattr(kernels, "has_room", lambda device: True)
    monkeypatch.setattr(kernels, "compiled", kernels.compiled.__wrapped__)  # not what was cached
    x = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert kernels.implementation(x) == "Triton's"
    assert capsys.readouterr().err == "kernels      there is no nvcc, so the selective scan runs in Triton\n"
    monkeypatch.setenv("KERNELS", "cuda")
    with pytest.raises(RuntimeError, match="KERNELS=cuda, but there is no nvcc"):
        kernels.implementation(x)


def test_triton_that_does_not_run_is_a_reason_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kernels.scan_triton", None)
    look = kernels.in_triton.__wrapped__  # not what was cached
    assert look(must=False) is None
    assert capsys.readouterr().err.startswith("kernels      Triton does not run (ModuleNotFoundError: ")
    with pytest.raises(RuntimeError, match=r"KERNELS=triton, but Triton does not run \(ModuleNotFoundError: "):
        look(must=True)


def test_the_benchmarks_contenders_compute_the_same(monkeypatch):
    monkeypatch.setattr(bench, "compiled_steps", lambda: bench.steps)  # what compiling leaves as it is
    *x, dy = bench.inputs(2, 70, 12, 8, torch.float64, "cpu")
    loop, pieces = (bench.with_gradients(f, [v.clone().requires_grad_() for v in x], dy)
                    for f in (bench.loop, bench.compiled_loop))
    assert max(error(a.detach(), b.detach()) for a, b in zip(pieces, loop)) < 1e-12


def test_the_folder_imports_nothing_of_the_project():
    """So that it can be copied alone."""
    for file in (ROOT / "kernels").glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        imported = {a.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for a in node.names}
        imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        optional = {"ninja", "mambapy", "mamba_ssm", "triton"}
        assert imported - sys.stdlib_module_names - optional <= {"torch", "kernels"}, file.name


USE = """
import torch, kernels
x = torch.ones(1, 3, 2)
y = kernels.selective_scan(x, x, -torch.ones(2, 1), x[..., :1], x[..., :1])
print([round(v, 4) for v in y[0, :, 0].tolist()], kernels.implementation(x).__name__)
"""
TRUE = "[1.0, 1.3679, 1.5032]"  # 1, 1 + 1/e, 1 + 1/e + 1/e^2


def test_without_a_compiler_one_line_says_so_and_the_reference_runs(tmp_path):
    env = dict(PATH="", TORCH_EXTENSIONS_DIR=str(tmp_path))
    out, err = command("-c", USE, **env).communicate()
    assert TRUE in out and "reference" in out
    assert len(err.splitlines()) == 1 and "no C++ compiler" in err
    out, err = command("-c", USE, KERNELS="cpu", **env).communicate()
    assert not out and "RuntimeError: KERNELS=cpu, but there is no C++ compiler" in err


@pytest.mark.skipif(not COMPILER, reason="a C++ compiler lends its --version")
def test_a_compiler_that_fails_is_reported_in_one_line(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n"
                        "case $1 in -*ersion*) exec c++ $1;; esac\n"
                        "echo 'selective_scan.cpp:1: error: this compiler is broken' >&2\n"
                        "exit 1\n")
    compiler.chmod(0o755)
    out, err = command("-c", USE, CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache")).communicate()
    assert TRUE in out and "reference" in out
    assert "this compiler is broken" in err.splitlines()[-1] and "Traceback" not in err
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.skipif(not COMPILER, reason="without a C++ compiler it does not come that far")
def test_an_architecture_that_torch_does_not_know_is_reported_in_one_line(tmp_path, monkeypatch, capfd):
    from torch.utils import cpp_extension
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))  # as if the CUDA toolkit were there
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "99.9z")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "kernels.scan_triton", None)
    monkeypatch.setattr(kernels, "in_triton", kernels.in_triton.__wrapped__)
    compiled = kernels.compiled.__wrapped__  # not what was cached
    assert compiled("cuda", must=False) is None
    line = capfd.readouterr().err.splitlines()[-1]
    assert "TORCH_CUDA_ARCH_LIST=99.9z" in line and "the selective scan runs in PyTorch" in line
    with pytest.raises(RuntimeError, match="KERNELS=cuda, but .*99.9z"):
        compiled("cuda", must=True)


def test_an_unwritable_cache_is_no_end(tmp_path):
    (tmp_path / "file").touch()
    out, err = command("-c", USE, TORCH_EXTENSIONS_DIR=str(tmp_path / "file" / "cache")).communicate()
    assert TRUE in out and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_without_simd_flags_it_is_right_and_two_processes_may_build_at_once(tmp_path):
    # ATEN_CPU_CAPABILITY=default: what a machine without AVX2 would build. Another process is killed while it builds
    env = dict(TORCH_EXTENSIONS_DIR=str(tmp_path), ATEN_CPU_CAPABILITY="default", KERNELS="cpu")
    killed = command("-c", USE, **env)
    while killed.poll() is None and not list(tmp_path.glob(".*building*/*.o.d")):  # the compiler is at work
        time.sleep(0.05)
    killed.kill()
    assert killed.communicate()[0] == ""
    both = [command("-c", USE, **env) for _ in range(2)]
    errors = ""
    for process in both:
        out, err = process.communicate()
        assert TRUE in out and process.returncode == 0, err
        errors += err
    assert errors.count("building") == 1  # the second one waited and took what the first had built
    library, = tmp_path.glob("*.so")
    # nor is anything left of the killed one
    assert sorted(tmp_path.iterdir()) == sorted([library, tmp_path / ".selective_scan.lock"])

    tests = [f"{ROOT}/tests/test_selective_scan.py::test_{name}" for name in (
        "all_implementations_equal_the_float64_loop[65-7]",
        "extreme_steps_and_decays_are_finite_and_right[0.0-0.0-cpu]",
        "extreme_steps_and_decays_are_finite_and_right[-10000.0-10000.0-cpu]",
        "one_token_step_equals_the_scan")]
    del env["KERNELS"]
    pytest_alone = ("-m", "pytest", "-n0", "-p", "no:cacheprovider", f"--rootdir={ROOT}")
    out, err = command(*pytest_alone, *tests, fresh=True, **env).communicate()
    assert "4 passed" in out, out + err
    assert [*tmp_path.glob("*.so")] == [library]  # that was the library in use
