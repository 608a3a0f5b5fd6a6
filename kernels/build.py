"""Builds the C++ and CUDA sources of this folder at first use and keeps the result.

The library goes to $TORCH_EXTENSIONS_DIR, else to torch_extensions in the user's cache folder. Its name holds a hash of
the sources, of the flags, of the versions of torch and of the C library, and of the GPUs it is for. When one of these
changes, a new one is built.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = {
    "cpu": ("selective_scan.cpp",), "cuda": ("selective_scan.cpp", "selective_scan.cu"), "decode": ("decode.cpp",),
    "training": ("training.cpp",), "orthogonalize": ("orthogonalize.cpp",)}
HEADERS = {"cpu": ("selective_scan.h",), "cuda": ("selective_scan.h",), "decode": ("vectors.h",),
           "training": ("attention.h", "vectors.h"), "orthogonalize": ("vectors.h",)}
NAMES = {"cpu": "selective_scan_cpu", "cuda": "selective_scan_cuda", "decode": "decode", "training": "training",
         "orthogonalize": "orthogonalize"}
WHAT = {"cpu": "the selective scan for CPU", "cuda": "the selective scan for CUDA", "decode": "sampling for CPU",
        "training": "training for CPU", "orthogonalize": "Muon for CPUs with bf16"}
SECONDS = {"cpu": "20 seconds or so", "cuda": "a few minutes", "decode": "5 seconds or so",
           "training": "10 seconds or so", "orthogonalize": "5 seconds or so"}
# torch says what this CPU has (ATEN_CPU_CAPABILITY overrides it). -march=native would be wrong in a home directory that
# machines of different kinds share
SIMD = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
BUILDING = ".selective_scan-building-"  # folders of builds under way


class CannotBuild(Exception):
    """Why there is no compiled library, in a few words."""


def choice():
    """What the environment variable KERNELS says, see __init__.py. Raises ValueError for anything else."""
    found = os.environ.get("KERNELS") or "auto"
    if found not in ("auto", "reference", "cpu", "cuda", "triton"):
        raise ValueError(f"KERNELS={found} is not one of auto, reference, cpu, cuda, triton")
    return found


def cpu_has(what):
    """Whether this CPU has instructions such as amx_bf16. False as well if this version of torch cannot tell."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get(what))


@functools.cache
def has_tiles():
    """Whether this CPU has AMX and the system lets the process use it, which must be asked for."""
    if platform.system() != "Linux" or not cpu_has("amx_bf16"):
        return False
    arch_prctl, permission, tiles = map(ctypes.c_long, (158, 0x1023, 18))  # ARCH_REQ_XCOMP_PERM of XTILEDATA
    return ctypes.CDLL(None).syscall(arch_prctl, permission, tiles) == 0


def flags(kind):
    """(flags of the C++ compiler, flags of nvcc)."""
    cxx = ["-O3"]
    if kind != "cuda":
        level = torch.backends.cpu.get_cpu_capability()
        cxx += SIMD.get(level, [])
        if level == "AVX512" and kind != "cpu" and cpu_has("avx512_bf16"):  # the scan has vectors of its own
            cxx += ["-mavx512bf16"]
            if kind in ("training", "orthogonalize") and has_tiles():
                cxx += ["-mamx-tile", "-mamx-bf16"]
    else:
        cxx += ["-DWITH_CUDA"]
    if platform.system() == "Linux":
        cxx += ["-fopenmp"]  # at::parallel_for is a template, and serial without it
    return cxx, ["-O3"]


def path_of(kind):
    """Where the shared library `kind` (a key of SOURCES) is, or is going to be."""
    return cache_folder() / f"{NAMES[kind]}-{digest(kind, *flags(kind))[:16]}.so"


def library(kind):
    """Path of the shared library `kind`, built if it is not there yet. Raises CannotBuild."""
    path, root = path_of(kind), cache_folder()
    if path.exists():
        return path

    if os.name != "posix":
        raise CannotBuild(f"kernels are not built on {platform.system()}")
    compiler = os.environ.get("CXX") or "c++"
    words = shlex.split(compiler)  # such as "ccache g++"
    if not words or not all(shutil.which(word) for word in words if not word.startswith("-")):
        raise CannotBuild(f"there is no C++ compiler ({compiler})")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with only_one(root / ".selective_scan.lock") as alone:
            for left in root.glob(f"{BUILDING}*") if alone else ():  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not path.exists():  # else another process has built it meanwhile
                compile_into(path, kind, *flags(kind))
    except OSError as e:
        raise CannotBuild(f"{e.filename or root}: {e.strerror or e}") from None
    return path


def cache_folder():
    """The folder that libraries are kept in."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    home = os.path.expanduser("~")
    if home == "~":  # nobody knows this user, as in some containers
        return Path(tempfile.gettempdir()) / f"torch_extensions-{os.getuid()}"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")) / "torch_extensions"


def digest(kind, cxx, nvcc):
    """A hash of everything that a library depends on, in hexadecimal."""
    total = hashlib.sha256(repr((cxx, nvcc, torch.__version__, platform.machine(), platform.libc_ver())).encode())
    for name in (*SOURCES[kind], *HEADERS[kind]):
        total.update((HERE / name).read_bytes())
    if kind == "cuda":
        gpus = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
        total.update(repr((gpus, os.environ.get("TORCH_CUDA_ARCH_LIST"))).encode())
    return total.hexdigest()


@contextlib.contextmanager
def only_one(path):
    """Lets one process in at a time, and gives True; False on a disk without locks, as some network's, where all go in.
    The system drops the lock when a process dies, so none can be left behind."""
    import fcntl
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked


def say(text, end="\n"):
    """Prints on standard error, once for all processes of a machine that torchrun has started."""
    if os.environ.get("LOCAL_RANK", "0") in ("", "0") or "MASTER_ADDR" not in os.environ:
        print(text, end=end, file=sys.stderr, flush=True)


def has_threads():
    """Whether compiled code uses the threads that torch has; Apple's compiler knows no OpenMP."""
    return "-fopenmp" in flags("training")[0] or torch.get_num_threads() == 1


def is_clang(compiler):
    said = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True)
    return "clang" in said.stdout


@contextlib.contextmanager
def one_word_compiler(folder):
    """Inside, CXX is a single word even if it is a command of several, such as "ccache g++": torch would quote it."""
    command = os.environ.get("CXX", "")
    if len(shlex.split(command)) < 2:
        yield
        return
    script = Path(folder) / "compiler"
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o700)
    os.environ["CXX"] = str(script)
    try:
        yield
    finally:
        os.environ["CXX"] = command


def compile_into(path, kind, cxx, nvcc):
    """Builds in a folder of its own, then moves the library to its place, so that what stands there is always whole.

    Raises CannotBuild.
    """
    say(f"kernels      building {WHAT[kind]} (once; {SECONDS[kind]}) ...", "")
    started, search = time.monotonic(), os.environ.get("PATH", "")
    with contextlib.suppress(ImportError):
        import ninja  # its program is on the PATH only while the virtual environment is active
        os.environ["PATH"] = search + os.pathsep + ninja.BIN_DIR
    try:
        from torch.utils import cpp_extension
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=BUILDING) as folder, one_word_compiler(folder):
            cpp_extension.load(
                path.stem.replace("-", "_"), [str(HERE / name) for name in SOURCES[kind]],
                extra_cflags=cxx, extra_cuda_cflags=nvcc, build_directory=folder, is_python_module=False,
                # torch brings along the runtime that GCC's OpenMP calls, not clang's
                extra_ldflags=["-fopenmp"] if "-fopenmp" in cxx and is_clang(os.environ.get("CXX") or "c++") else [])
            os.replace(next(Path(folder).glob("*.so")), path)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as e:
        say(" failed", "\n")
        raise CannotBuild(f"the build failed ({reason(e):.200})") from None
    except ValueError as e:  # torch does not know an architecture in TORCH_CUDA_ARCH_LIST
        say(" failed", "\n")
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        raise CannotBuild(f"the build failed (TORCH_CUDA_ARCH_LIST={architectures}: {reason(e):.200})") from None
    finally:
        os.environ["PATH"] = search
    say(f" {time.monotonic() - started:.0f} s", "\n")


def reason(error):
    """The line that says what went wrong: in the pages that ninja prints, the compiler's first complaint."""
    text = str(error) or type(error).__name__
    complaint = re.search(r"^.*\berror: .*$", text, re.M)
    return complaint[0] if complaint else text.splitlines()[0]
