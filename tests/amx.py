"""Builds a file of kernels/ as for a CPU with AMX, whose tiles amx_on_cpu.h computes in plain C++."""
import shutil
import subprocess

import pytest
import torch

from conftest import ROOT
from kernels import build


def library_with_tiles(name, folder):
    """Path of the shared library of kernels/NAME.cpp. Skips the test if this CPU or compiler cannot do the rest."""
    cxx, _ = build.flags(name)
    if "-mavx512bf16" not in cxx or torch.backends.cpu.get_cpu_capability() != "AVX512" or not shutil.which("c++"):
        pytest.skip("needs a CPU with AVX512-BF16 and a C++ compiler")
    path = folder / f"{name}.so"
    flags = [flag for flag in cxx if "amx" not in flag]
    subprocess.run(["c++", *flags, "-O2", "-std=c++17", "-shared", "-fPIC", "-D__AMX_BF16__", "-include",
                    str(ROOT / "tests/amx_on_cpu.h"), str(ROOT / f"kernels/{name}.cpp"), "-o", str(path)], check=True)
    return path
