"""The selective scan in PyTorch: what the compiled implementations must equal, and what runs where none can be built.

Time is cut into chunks of 64 steps, so that nothing of shape (B, T, channels, N) exists over the whole sequence. The
arithmetic is in fp32, or in fp64 if the activations are. The forward pass keeps the state before each chunk. From it
the backward pass computes the chunk's states again, with the equations of selective_scan.cpp.
"""
import torch

CHUNK = 64  # time steps between two states kept for the backward pass, as in selective_scan.h


def scan_chunk(u, delta, A, B, h, reset=None):
    """The decays exp(delta_t A), 0 at a reset, and the states h_t after each of L steps, both (B, L, channels, N)."""
    decay = torch.exp(delta[..., None] * A)
    if reset is not None:
        decay = decay.masked_fill(reset[..., None, None], 0)
    x = (delta * u)[..., None] * B[:, :, None]
    states = []
    for decay_t, x_t in zip(decay.unbind(1), x.unbind(1)):
        h = decay_t * h + x_t
        states.append(h)
    return decay, torch.stack(states, 1)


def chunks(T):
    return [slice(t, min(t + CHUNK, T)) for t in range(0, T, CHUNK)]


def forward(u, delta, A, B, C, D, h0, reset, save):
    """(y, last h, the states before each chunk (B, chunks, N, channels), or none of them without `save`)."""
    dtype, compute = u.dtype, A.dtype
    u, delta, B, C = (x.to(compute) for x in (u, delta, B, C))
    h = u.new_zeros(u.size(0), *A.shape) if h0 is None else h0.clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    kept = []
    for t in chunks(u.size(1)):
        if save:
            kept.append(h.mT)
        _, states = scan_chunk(u[:, t], delta[:, t], A, B[:, t], h, None if reset is None else reset[:, t])
        y[:, t] = (states * C[:, t, None]).sum(-1)  # a matrix product would obey autocast and TF32
        h = states[:, -1].contiguous()
    if D is not None:
        y += D * u
    checkpoints = torch.stack(kept, 1) if kept else u.new_empty(u.size(0), 0, *A.mT.shape)
    return y.to(dtype), h, checkpoints


def backward(dy, dlast, u, delta, A, B, C, D, reset, checkpoints):
    """Gradients of u, delta, A, B, C, D and h0 from those of y and of the last state (None: zero)."""
    inputs, compute = (u, delta, B, C), A.dtype
    dy, u, delta, B, C = (x.to(compute) for x in (dy, u, delta, B, C))
    dh = u.new_zeros(u.size(0), *A.shape) if dlast is None else dlast.clone()
    du, ddelta, dB, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, B, C))
    dA = A.new_zeros(A.shape)
    for k, t in reversed(list(enumerate(chunks(u.size(1))))):
        h = checkpoints[:, k].mT  # before the chunk
        decay, states = scan_chunk(u[:, t], delta[:, t], A, B[:, t], h, None if reset is None else reset[:, t])
        grads = []  # of h_t, from the last step to the first: dh_t = dy_t C_t + decay_{t+1} dh_{t+1}
        for decay_t, from_y_t in zip(
                reversed(decay.unbind(1)), reversed((dy[:, t, :, None] * C[:, t, None]).unbind(1))):
            grads.append(dh + from_y_t)
            dh = decay_t * grads[-1]
        dstates = torch.stack(grads[::-1], 1)  # (B, L, channels, N)
        dexponent = dstates * decay * torch.cat((h[:, None], states[:, :-1]), 1)  # of delta_t A
        dx = (dstates * B[:, t, None]).sum(-1)  # of delta_t u_t
        dC[:, t] = (dy[:, t, :, None] * states).sum(2)
        dB[:, t] = ((delta * u)[:, t, :, None] * dstates).sum(2)
        ddelta[:, t] = (dexponent * A).sum(-1) + dx * u[:, t]
        du[:, t] = dx * delta[:, t]
        dA += (dexponent * delta[:, t, :, None]).sum((0, 1))
    if D is not None:
        du += D * dy
    du, ddelta, dB, dC = (x.to(like.dtype) for x, like in zip((du, ddelta, dB, dC), inputs))
    return du, ddelta, dA, dB, dC, (dy * u).sum((0, 1)), dh.contiguous()


def step(h, u, delta, A, B, C, D):
    """One time step; h (B, channels, N) is changed in place. Returns y (B, channels)."""
    h.mul_(torch.exp(delta[..., None] * A)).add_((delta * u)[..., None] * B[:, None])
    y = (h * C[:, None]).sum(-1)
    return y if D is None else y + D * u
