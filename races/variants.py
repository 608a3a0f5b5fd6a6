"""Matrix optimizers that `race.py recipe` tries beside train.Muon: each is Muon with one idea added, most from a paper.

They are for whole runs: what they keep beside Muon's momentum is not in a checkpoint.
"""
import contextlib

import torch

import train

# Five quintics for singular values from 0.001 to 1, each the best for what the one before it leaves (arXiv 2505.16932);
# with a safety factor of 2%, as in the repository modded-nanogpt
POLAR_EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


class PolarExpress(train.Muon):
    """Muon with the five quintics of Polar Express in place of one that is used five times (arXiv 2505.16932)."""
    quintics = POLAR_EXPRESS


class NorMuon(train.Muon):
    """Muon whose rows are divided by a moving root mean square of their own (arXiv 2510.05491).

        v <- 0.95 v + 0.05 mean of the row's squares;  u <- u / sqrt(v), then scaled to the norm that it had

    The paper sets the norm to one that depends on the shape alone; keeping it is modded-nanogpt's way.
    """

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.squares = {}  # (rows, columns) -> v of the whole stack

    def orthogonalize_together(self, stack):
        update = super().orthogonalize_together(stack)
        square = update.square().mean(2, keepdim=True)
        v = self.squares.setdefault(stack.shape[1:], torch.zeros_like(square)).lerp_(square, 0.05)
        scaled = update / (v.sqrt() + 1e-8)
        return scaled * (update.norm(dim=(1, 2), keepdim=True) / scaled.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))


class CautiousDecay(train.Muon):
    """Muon that decays a weight only where the update makes it smaller too (arXiv 2510.12402)."""

    @torch.no_grad()
    def step(self, lr):
        before = [p.clone() for p in self.params]
        rate, self.weight_decay = self.weight_decay, 0.0
        super().step(lr)
        self.weight_decay = rate
        for p, old in zip(self.params, before):
            p.sub_(old * ((p - old) * old < 0), alpha=lr * rate)


class FallingDecay(train.Muon):
    """Muon whose weight decay falls with the learning rate: its product with the rate falls with the square."""

    def __init__(self, matrices, weight_decay, dtype):
        super().__init__(matrices, weight_decay, dtype)
        self.start, self.peak = weight_decay, 0.0

    def step(self, lr):
        self.peak = max(self.peak, lr)
        self.weight_decay = self.start * lr / (self.peak or 1.0)
        super().step(lr)


class EMANesterov(train.Muon):
    """Muon that computes its gradients at a point ahead of the weights, in the direction of their average movement
    (arXiv 2605.25395). Here the matrices alone are ahead, and not what AdamW trains.

        w  = A(w + AHEAD m)        m <- 0.99 m + 0.01 (new w - old w)        where A is a step of Muon

    The parameters hold the point ahead. In the warm-up and the decay, where the rate is below its peak, AHEAD is 0.
    """
    AHEAD = 10.0  # steps

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.peak = 0.0
        self.weights = [p.detach().clone() for p in self.params]
        self.average = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, lr):
        super().step(lr)
        ahead = self.AHEAD if lr == self.peak else 0.0
        self.peak = max(self.peak, lr)
        for p, weight, average in zip(self.params, self.weights, self.average):
            average.lerp_(p - weight, 0.01)
            weight.copy_(p)
            p.add_(average, alpha=ahead)


VARIANTS = {"normuon": NorMuon, "polar_express": PolarExpress, "cautious_decay": CautiousDecay,
            "falling_decay": FallingDecay, "ema_nesterov": EMANesterov}


@contextlib.contextmanager
def registered():
    """Inside, --optimizer may also be one of VARIANTS."""
    train.MATRIX_OPTIMIZERS |= VARIANTS
    try:
        yield
    finally:
        for name in VARIANTS:
            del train.MATRIX_OPTIMIZERS[name]
