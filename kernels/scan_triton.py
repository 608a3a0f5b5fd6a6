"""The selective scan in Triton, which torch's builds for GPUs bring along: for GPUs without nvcc, with little shared
memory, or of AMD.

A program has one row of the batch and some channels, whose states (channels, N) stay in registers while it goes through
time. The equations, and the states that are kept every 64 steps, are those of reference.py. On the way back a program
computes the states of a chunk again and writes them to memory of its own; what several programs add to the gradients
of B, C and A lies beside each other until PyTorch adds it up, so that results are the same every time.

With TRITON_INTERPRET=1 in the environment all of it runs on a CPU in NumPy: so it is tested.
"""
import contextlib

import torch
import triton
import triton.language as tl

from .reference import CHUNK, step  # one step is too little for a kernel of its own

__all__ = ["forward", "backward", "step"]

# States that a program holds, and its warps: so the forward pass needs 72 registers a thread and the backward pass at
# most 168, with hardly a spill (sm_80). No timing has confirmed them yet
TILE, WARPS = 512, 4


@triton.jit
def decay_of(delta, a, reset, at, has_reset: tl.constexpr):
    """exp(delta A), and 0 where a document begins; (BLOCK_D, BLOCK_N)."""
    decay = tl.exp(delta[:, None] * a)
    if has_reset:
        decay = tl.where(tl.load(reset + at) != 0, 0.0, decay)
    return decay


@triton.jit
def forward_kernel(u, delta, A, B, C, D, h0, reset, y, last, kept, T, channels, N, chunks,
                   u_b, u_t, u_d, delta_b, delta_t, delta_d, B_b, B_t, B_n, C_b, C_t, C_n,
                   has_D: tl.constexpr, has_h0: tl.constexpr, has_reset: tl.constexpr, save: tl.constexpr,
                   CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)  # offsets may need more than 32 bits
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d, in_n = d < channels, n < N
    in_tile = in_d[:, None] & in_n[None, :]
    states = b * channels * N + d[:, None] * N + n[None, :]
    a = tl.load(A + d[:, None] * N + n[None, :], mask=in_tile, other=0.0)
    h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if has_h0:
        h = tl.load(h0 + states, mask=in_tile, other=0.0)

    for i in range(T):
        t = b * 0 + i
        if save:
            if i % CHUNK == 0:
                tl.store(kept + ((b * chunks + i // CHUNK) * N + n[None, :]) * channels + d[:, None], h, mask=in_tile)
        u_i = tl.load(u + b * u_b + t * u_t + d * u_d, mask=in_d, other=0.0).to(tl.float32)
        delta_i = tl.load(delta + b * delta_b + t * delta_t + d * delta_d, mask=in_d, other=0.0).to(tl.float32)
        B_i = tl.load(B + b * B_b + t * B_t + n * B_n, mask=in_n, other=0.0).to(tl.float32)
        C_i = tl.load(C + b * C_b + t * C_t + n * C_n, mask=in_n, other=0.0).to(tl.float32)
        h = decay_of(delta_i, a, reset, b * T + t, has_reset) * h + (delta_i * u_i)[:, None] * B_i[None, :]
        y_i = tl.sum(h * C_i[None, :], axis=1)
        if has_D:
            y_i += tl.load(D + d, mask=in_d, other=0.0) * u_i
        tl.store(y + (b * T + t) * channels + d, y_i.to(y.dtype.element_ty), mask=in_d)
    tl.store(last + states, h, mask=in_tile)


@triton.jit
def backward_kernel(dy, dlast, u, delta, A, B, C, D, reset, kept, scratch, du, ddelta, dA, dB, dC, dh0,
                    T, channels, N, chunks, batch,
                    dy_b, dy_t, dy_d, u_b, u_t, u_d, delta_b, delta_t, delta_d, B_b, B_t, B_n, C_b, C_t, C_n,
                    has_D: tl.constexpr, has_dlast: tl.constexpr, has_reset: tl.constexpr,
                    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    b, part = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d, in_n = d < channels, n < N
    in_tile = in_d[:, None] & in_n[None, :]
    states = b * channels * N + d[:, None] * N + n[None, :]
    tile = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    own = scratch + (part * batch + b) * CHUNK * BLOCK_D * BLOCK_N + tile  # the state before each step of a chunk
    a = tl.load(A + d[:, None] * N + n[None, :], mask=in_tile, other=0.0)
    dh, dA_sum = tl.zeros((BLOCK_D, BLOCK_N), tl.float32), tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if has_dlast:
        dh = tl.load(dlast + states, mask=in_tile, other=0.0)

    for back in range(chunks):
        chunk = chunks - 1 - back
        length = tl.minimum(CHUNK, T - chunk * CHUNK)

        # the states of the chunk, computed again
        h = tl.load(kept + ((b * chunks + chunk) * N + n[None, :]) * channels + d[:, None], mask=in_tile, other=0.0)
        for i in range(length):
            t = b * 0 + chunk * CHUNK + i
            tl.store(own + i * BLOCK_D * BLOCK_N, h)
            u_i = tl.load(u + b * u_b + t * u_t + d * u_d, mask=in_d, other=0.0).to(tl.float32)
            delta_i = tl.load(delta + b * delta_b + t * delta_t + d * delta_d, mask=in_d, other=0.0).to(tl.float32)
            B_i = tl.load(B + b * B_b + t * B_t + n * B_n, mask=in_n, other=0.0).to(tl.float32)
            h = decay_of(delta_i, a, reset, b * T + t, has_reset) * h + (delta_i * u_i)[:, None] * B_i[None, :]
        tl.debug_barrier()  # what another thread has written is read next

        # from the last step to the first: dh_t = dy_t C_t + decay_{t+1} dh_{t+1}
        for j in range(length):
            i = length - 1 - j
            t = b * 0 + chunk * CHUNK + i
            before = tl.load(own + i * BLOCK_D * BLOCK_N)
            dy_i = tl.load(dy + b * dy_b + t * dy_t + d * dy_d, mask=in_d, other=0.0).to(tl.float32)
            u_i = tl.load(u + b * u_b + t * u_t + d * u_d, mask=in_d, other=0.0).to(tl.float32)
            delta_i = tl.load(delta + b * delta_b + t * delta_t + d * delta_d, mask=in_d, other=0.0).to(tl.float32)
            B_i = tl.load(B + b * B_b + t * B_t + n * B_n, mask=in_n, other=0.0).to(tl.float32)
            C_i = tl.load(C + b * C_b + t * C_t + n * C_n, mask=in_n, other=0.0).to(tl.float32)
            decay = decay_of(delta_i, a, reset, b * T + t, has_reset)
            x_i = delta_i * u_i
            h = decay * before + x_i[:, None] * B_i[None, :]

            dh += dy_i[:, None] * C_i[None, :]
            dexponent = dh * decay * before  # of delta_t A
            dx = tl.sum(dh * B_i[None, :], axis=1)  # of delta_t u_t
            ddelta_i = tl.sum(dexponent * a, axis=1) + dx * u_i
            du_i = dx * delta_i
            if has_D:
                du_i += tl.load(D + d, mask=in_d, other=0.0) * dy_i
            dA_sum += dexponent * delta_i[:, None]

            at = (b * T + t) * channels + d
            tl.store(du + at, du_i.to(du.dtype.element_ty), mask=in_d)
            tl.store(ddelta + at, ddelta_i.to(ddelta.dtype.element_ty), mask=in_d)
            at = ((part * batch + b) * T + t) * N + n
            tl.store(dB + at, tl.sum(x_i[:, None] * dh, axis=0), mask=in_n)
            tl.store(dC + at, tl.sum(dy_i[:, None] * h, axis=0), mask=in_n)
            dh = decay * dh
        tl.debug_barrier()  # the next chunk's states go to the same place
    tl.store(dA + states, dA_sum, mask=in_tile)
    tl.store(dh0 + states, dh, mask=in_tile)


def blocks(channels, N):
    """(channels, states) of a program's tile, powers of two."""
    n = triton.next_power_of_2(N)
    return min(triton.next_power_of_2(channels), max(1, TILE // n), 64), n


def on(x):
    """Inside, kernels are launched on the GPU that x is on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def forward(u, delta, A, B, C, D, h0, reset, save):
    """As reference.forward."""
    (batch, T, channels), N, A = u.shape, A.size(1), A.contiguous()
    kept = A.new_empty(batch, -(-T // CHUNK) if save else 0, N, channels)
    y, last = torch.empty(u.shape, dtype=u.dtype, device=u.device), A.new_empty(batch, channels, N)
    block_d, block_n = blocks(channels, N)
    h0, flags = (None if x is None else x.contiguous() for x in (h0, reset))
    flags = None if flags is None else flags.to(torch.uint8)
    if batch and channels:
        with on(u):
            forward_kernel[triton.cdiv(channels, block_d), batch](
                u, delta, A, B, C, *(x if x is not None else A for x in (D, h0, flags)), y, last, kept,
                T, channels, N, kept.size(1), *u.stride(), *delta.stride(), *B.stride(), *C.stride(),
                D is not None, h0 is not None, flags is not None, save, CHUNK, block_d, block_n, num_warps=WARPS)
    return y, last, kept


def backward(dy, dlast, u, delta, A, B, C, D, reset, checkpoints):
    """As reference.backward."""
    (batch, T, channels), N, A = u.shape, A.size(1), A.contiguous()
    block_d, block_n = blocks(channels, N)
    parts = triton.cdiv(channels, block_d)
    du, ddelta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta))
    dA, dh0 = A.new_zeros(batch, channels, N), A.new_zeros(batch, channels, N)
    dB, dC = (A.new_empty(parts, batch, T, N) for _ in range(2))
    dlast, flags = (None if x is None else x.contiguous() for x in (dlast, reset))
    flags = None if flags is None else flags.to(torch.uint8)
    if batch and channels:
        scratch = A.new_empty(parts * batch * CHUNK * block_d * block_n)
        with on(u):
            backward_kernel[parts, batch](
                dy, dlast if dlast is not None else A, u, delta, A, B, C,
                *(x if x is not None else A for x in (D, flags)), checkpoints.contiguous(), scratch,
                du, ddelta, dA, dB, dC, dh0,
                T, channels, N, checkpoints.size(1), batch,
                *dy.stride(), *u.stride(), *delta.stride(), *B.stride(), *C.stride(),
                D is not None, dlast is not None, flags is not None, CHUNK, block_d, block_n, num_warps=WARPS)
    dD = (dy.float() * u.float()).sum((0, 1))
    return du, ddelta, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD, dh0
