"""Muon's orthogonalization in bf16 on a CPU that multiplies bf16: orthogonalize.cpp.

Those are CPUs with AMX (Intel's Xeon since 2023), and with AVX512-BF16 alone (AMD's since 2022).
"""
import ctypes
import functools

import torch

from . import build

INT, TENSOR = ctypes.c_int64, ctypes.c_void_p


@functools.cache
def library():
    """The compiled library, or None where it cannot be built or used."""
    if not build.cpu_has("avx512_bf16") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    if build.choice() == "reference":
        return None
    try:
        found = ctypes.CDLL(str(build.library("orthogonalize")))
    except (build.CannotBuild, OSError):
        return None  # PyTorch's products are quick too
    found.orthogonalize_stack.argtypes = (TENSOR, INT, INT, INT, TENSOR, INT, ctypes.c_int)
    return found


def quick_orthogonalize(stack, dtype, quintics):
    """As train.orthogonalize, for a stack in fp32 that may be overwritten. The result is the same for any number of
    threads: a matrix is the work of one."""
    stack = stack.contiguous()
    coefficients = torch.tensor(quintics)
    library().orthogonalize_stack(stack.data_ptr(), *stack.shape, coefficients.data_ptr(), len(quintics),
                                  torch.get_num_threads())
    return stack
