"""Muon's orthogonalization in bf16 on a CPU with AMX (Intel's Xeon since 2023): orthogonalize.cpp."""
import ctypes
import functools

import torch

from . import build

INT, TENSOR = ctypes.c_int64, ctypes.c_void_p


@functools.cache
def library():
    """The compiled library, or None where it cannot be built or used."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not (has.get("amx_bf16") and has.get("avx512_bf16")) or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    if build.choice() == "reference":
        return None
    try:
        found = ctypes.CDLL(str(build.library("orthogonalize")))
    except (build.CannotBuild, OSError):
        return None  # PyTorch's products are quick too
    found.orthogonalize_stack.argtypes = (TENSOR, INT, INT, INT, TENSOR, INT, ctypes.c_int)
    return found if found.may_use_tiles() else None


def quick_orthogonalize(stack, dtype, quintics):
    """As train.orthogonalize, for a stack in fp32 that may be overwritten. The result is the same for any number of
    threads: a matrix is the work of one."""
    stack = stack.contiguous()
    coefficients = torch.tensor(quintics)
    library().orthogonalize_stack(stack.data_ptr(), *stack.shape, coefficients.data_ptr(), len(quintics),
                                  torch.get_num_threads())
    return stack
