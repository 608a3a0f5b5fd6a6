"""Problems for the selective scan, and what is right about them: for the tests of its implementations."""
import torch

NAMES = ("u", "delta", "A", "B", "C", "D", "h0")


def problem(batch, T, channels, N, seed=0, optional=True):
    """float64 inputs by name, with decays from fast to slow, as in a trained Mamba. D, h0 and reset are optional."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = dict(u=draw(batch, T, channels), delta=torch.nn.functional.softplus(2 * draw(batch, T, channels) - 2),
             A=-draw(channels, N).exp(), B=draw(batch, T, N), C=draw(batch, T, N))
    if optional:
        x |= dict(D=draw(channels), h0=draw(batch, channels, N), reset=torch.rand(batch, T, generator=g) < 0.05)
    return x


def brute_force(u, delta, A, B, C, D=None, h0=None, reset=None):
    """The definition, one step and one tensor operation after the other."""
    h = torch.zeros(u.size(0), *A.shape, dtype=u.dtype) if h0 is None else h0
    y = [torch.zeros_like(u[:, :0])]
    for t in range(u.size(1)):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], 0.0, h)
        h = torch.exp(delta[:, t, :, None] * A) * h + delta[:, t, :, None] * B[:, t, None] * u[:, t, :, None]
        y.append((C[:, t, None] * h).sum(-1)[:, None])
    return torch.cat(y, 1) + (0 if D is None else D * u), h


def gradients(scan, x, dy, dh):
    """[y, last state, *gradients by inputs] of scan(**x) for the output gradients dy and dh."""
    leaves = {k: v.detach().requires_grad_() if k in NAMES else v for k, v in x.items()}
    y, h = scan(**leaves)
    inputs = [leaves[k] for k in NAMES if k in leaves]
    grads = [None] * len(inputs)
    outputs = [(out, grad.to(out)) for out, grad in ((y, dy), (h, dh)) if out.requires_grad]
    if outputs:  # there are none if T is 0 and h0 is not given
        grads = torch.autograd.grad([o for o, _ in outputs], inputs, [g for _, g in outputs], allow_unused=True)
    return [y.detach(), h.detach(), *(torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs))]


def error(value, truth):
    value, truth = value.double().cpu(), truth.double().cpu()
    assert value.shape == truth.shape
    return float((value - truth).abs().max() / truth.abs().max().clamp(min=1e-30)) if truth.numel() else 0.0


def convert(x, device, dtype):
    """Activations in dtype, parameters and state in float32."""
    types = {k: dtype if k in ("u", "delta", "B", "C") else torch.float32 for k in x}
    types["reset"] = torch.bool
    return {k: v.to(device, types[k]) for k, v in x.items()}
