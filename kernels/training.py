"""A quick training step on a CPU: the layers' matrix products are PyTorch's, all between them is in training.cpp.

    net = quick_net(model, T)                       for rows of T tokens; None if nothing is quicker than the model
    _, loss = net(idx, targets)                     as the model itself, with gradients; also loss_weights, reset

It serves models whose blocks are Llama's: ivme.py's, tinymemory.py's and what is made of them. Whether a model computes
exactly that is not guessed from its names: with weights drawn at random, loss and gradients of the two must agree.
"""
import copy
import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import nn

from . import build
from .decode import PARTS, is_llama

LOGITS = 2 ** 24  # that exist at once; (B, T, V) of them would be a step's largest tensor
GROUP = 64  # as in training.cpp
MAX_HEAD = 512  # as in training.cpp

INT, REAL, TENSOR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("B", "T", "H", "K", "D")]


# training.cpp's functions in its order, and what they take before the number of threads
FUNCTIONS = dict(
    norm=(TENSOR, TENSOR, TENSOR, REAL, INT, INT, TENSOR, TENSOR),
    norm_backward=(TENSOR, TENSOR, TENSOR, TENSOR, REAL, INT, INT, TENSOR, TENSOR, TENSOR, TENSOR),
    heads=(TENSOR, TENSOR, TENSOR, REAL, TENSOR, TENSOR, Shape, TENSOR, TENSOR, TENSOR),
    heads_backward=(TENSOR, TENSOR, TENSOR, REAL, TENSOR, TENSOR, Shape, TENSOR, TENSOR, TENSOR, TENSOR, TENSOR),
    attention=(TENSOR, TENSOR, TENSOR, TENSOR, Shape, TENSOR, TENSOR),
    attention_backward=(TENSOR, TENSOR, TENSOR, TENSOR, TENSOR, TENSOR, TENSOR, Shape, TENSOR, TENSOR, TENSOR),
    swiglu=(TENSOR, INT, INT, TENSOR),
    swiglu_backward=(TENSOR, TENSOR, INT, INT, TENSOR, TENSOR),
    cross_entropy=(TENSOR, TENSOR, INT, INT, TENSOR, TENSOR),
    cross_entropy_backward=(TENSOR, TENSOR, TENSOR, TENSOR, INT, INT, TENSOR),
    scatter_add=(TENSOR, TENSOR, INT, INT, TENSOR))


class Functions:
    """training.cpp's functions for activations of `dtype`. A tensor is given as itself, None is a null pointer."""

    def __init__(self, dtype):
        library = ctypes.CDLL(str(build.library("training")))
        table = (ctypes.c_void_p * len(FUNCTIONS)).in_dll(library, f"for_{str(dtype)[6:]}")
        for address, (name, kinds) in zip(table, FUNCTIONS.items()):
            setattr(self, name, functools.partial(self.call, ctypes.CFUNCTYPE(None, *kinds, ctypes.c_int)(address)))
        self.library = library

    @staticmethod
    def call(function, *args):
        function(*(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args), torch.get_num_threads())


@functools.cache
def functions(dtype):
    """The Functions for activations of dtype; None if they cannot be had, which a line then tells."""
    try:
        return Functions(dtype)
    except (build.CannotBuild, OSError) as e:
        if dtype == torch.float32:
            build.say(f"kernels      {e}, so training takes longer")
        return None


class Pass:
    """A forward and a backward pass of one micro-batch, outside autograd."""

    def __init__(self, net, B, T, first, dtype):
        """first: int32 (B, T), the first position that each position sees, or None: all of them are seen."""
        cfg = net.model.cfg
        self.of, self.dtype, self.first = functions(dtype), dtype, first
        self.weights, self.eps, self.tables = net.cast(dtype), cfg.norm_eps, (net.model.cos, net.model.sin)
        heads = getattr(cfg, "n_kv_head", cfg.n_head)
        self.shape = Shape(B, T, cfg.n_head, heads, cfg.d_model // cfg.n_head)

    def empty(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype)

    def norm(self, x, add, weight):
        """(x + add, its norm in the compute type)."""
        total, out = x if add is None else torch.empty_like(x), self.empty(*x.shape)
        self.of.norm(x, add, weight, self.eps, *x.shape, total, out)
        return total, out

    def norm_backward(self, x, weight, dout, g):
        """(dx = g + the norm's gradient, dx in the compute type, the norm's output, gradient of its weight)."""
        N, d = x.shape
        dx, dw = torch.empty_like(x), self.empty(-(-N // GROUP), d, dtype=torch.float32)
        small, out = dx if dx.dtype == self.dtype else self.empty(N, d), self.empty(N, d)
        self.of.norm_backward(x, weight, dout, g, self.eps, N, d, dx, small, out, dw)
        return dx, small, out, dw.sum(0)

    def attention(self, qkv, w):
        """softmax(q k^T / sqrt(D)) v (N, H D), and what its backward pass needs."""
        s = self.shape
        q, k, v = (self.empty(s.B, heads, s.T, s.D) for heads in (s.H, s.K, s.K))
        y, total = self.empty(s.B * s.T, s.H * s.D), self.empty(s.B, s.H, s.T, dtype=torch.float32)
        self.of.heads(qkv, w["q_norm"], w["k_norm"], self.eps, *self.tables, s, q, k, v)
        self.of.attention(q, k, v, self.first, s, y, total)
        return y, (q, k, v, total)

    def attention_backward(self, qkv, w, kept, y, dy):
        """Gradients of (qkv, q_norm's weight, k_norm's weight) from that of attention's result y."""
        s, (q, k, v, total) = self.shape, kept
        dq, dqkv = torch.empty_like(q), torch.empty_like(qkv)
        dk, dv = (self.empty(*q.shape, dtype=torch.float32) for _ in range(2))
        self.of.attention_backward(q, k, v, self.first, y, total, dy, s, dq, dk, dv)
        dw = self.empty(-(-len(qkv) // GROUP), 2, s.D, dtype=torch.float32)
        self.of.heads_backward(qkv, w["q_norm"], w["k_norm"], self.eps, *self.tables, s, dq, dk, dv, dqkv, dw)
        return dqkv, *dw.sum(0)

    def block(self, x, add, w):
        """The output of a block whose input is x + add, as two such terms, and what its backward pass needs."""
        x, h = self.norm(x, add, w["attn_norm"])
        qkv = h @ w["qkv"].T
        y, attention = self.attention(qkv, w)
        x2, h = self.norm(x, y @ w["out"].T, w["ffn_norm"])
        gate_up = h @ w["gate_up"].T
        hidden = self.empty(len(x), gate_up.size(1) // 2)
        self.of.swiglu(gate_up, *hidden.shape, hidden)
        return x2, hidden @ w["down"].T, (x, qkv, y, attention, x2, gate_up)

    def block_backward(self, g, small, w, kept):
        """(gradient of the block's input in fp32 and in the compute type, gradients of its weights by their names) from
        that of its output. The gradient of a matrix becomes fp32 while it is still in a cache."""
        x, qkv, y, attention, x2, gate_up = kept
        grads = {}
        dhidden = small @ w["down"]
        hidden, dgate_up = torch.empty_like(dhidden), torch.empty_like(gate_up)
        self.of.swiglu_backward(gate_up, dhidden, *hidden.shape, dgate_up, hidden)
        grads["down"] = (small.T @ hidden).float()
        g, small, h, grads["ffn_norm"] = self.norm_backward(x2, w["ffn_norm"], dgate_up @ w["gate_up"], g)
        grads["gate_up"] = (dgate_up.T @ h).float()
        grads["out"] = (small.T @ y).float()
        dqkv, grads["q_norm"], grads["k_norm"] = self.attention_backward(qkv, w, attention, y, small @ w["out"])
        g, small, h, grads["attn_norm"] = self.norm_backward(x, w["attn_norm"], dqkv @ w["qkv"], g)
        grads["qkv"] = (dqkv.T @ h).float()
        return g, small, grads

    def losses(self, h, targets, chunk, space):
        """Loss of each token (N) and, for the backward pass, the sums of their exponentials. Afterwards `space` holds
        the logits of the last chunk of tokens."""
        loss, total = (self.empty(len(h), dtype=torch.float32) for _ in range(2))
        for first in range(0, len(h), chunk):
            part = slice(first, first + chunk)
            logits = torch.mm(h[part], self.weights["embed"].T, out=space[:len(h[part])])
            self.of.cross_entropy(logits, targets[part], *logits.shape, loss[part], total[part])
        return loss, total

    def losses_backward(self, h, targets, chunk, space, total, g):
        """Gradients of h and of the output head (fp32) from those of the losses, g (N)."""
        dh, dw = torch.empty_like(h), None
        for first in reversed(range(0, len(h), chunk)):  # the last chunk's logits are still there
            part = slice(first, first + chunk)
            logits = space[:len(h[part])]
            if dw is not None:
                torch.mm(h[part], self.weights["embed"].T, out=logits)
            self.of.cross_entropy_backward(logits, targets[part], total[part], g[part], *logits.shape, logits)
            torch.mm(logits, self.weights["embed"], out=dh[part])
            here = (logits.T @ h[part]).float()
            dw = here if dw is None else dw.add_(here)
        return dh, dw


class TokenLosses(torch.autograd.Function):
    """Cross entropy of each token (N) as a function of the model's parameters."""

    @staticmethod
    def forward(ctx, net, run, idx, targets, *params):
        x, add, kept = F.embedding(idx, net.model.embed.weight), None, []
        for w in run.weights["layers"]:
            x, add, of_block = run.block(x, add, w)
            kept.append(of_block)
        x, h = run.norm(x, add, run.weights["norm"])
        space = net.take_space(len(h), run.dtype)
        loss, total = run.losses(h, targets, net.chunk, space)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*params)  # for PyTorch's own check that nobody has changed them in the meantime
            ctx.kept = net, run, idx, targets, x, h, kept, space, total
        else:
            net.spaces.append(space)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        _, kept = ctx.saved_tensors, getattr(ctx, "kept", None)
        if kept is None:
            raise RuntimeError("the gradients of this pass were computed already; retain_graph is not supported")
        net, run, idx, targets, x, h, kept, space, total = kept
        del ctx.kept  # each block's part is freed when it has been used
        dh, dembed = run.losses_backward(h, targets, net.chunk, space, total, g.contiguous())
        net.spaces.append(space)
        g, small, _, dnorm = run.norm_backward(x, run.weights["norm"], dh, None)
        grads = {"embed.weight": dembed, "norm.weight": dnorm}
        for i in reversed(range(len(kept))):
            g, small, of_block = run.block_backward(g, small, run.weights["layers"][i], kept.pop())
            grads |= {f"blocks.{i}.{PARTS[part]}.weight": grad for part, grad in of_block.items()}
        run.of.scatter_add(g, idx, *g.shape, dembed)
        return None, None, None, None, *(grads[name] for name in net.names)


class QuickNet(nn.Module):
    """A model's training pass. It has the model's parameters, and is used in its place where there are targets."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.names = [name for name, _ in model.named_parameters()]
        self.chunk = max(1, LOGITS // model.cfg.vocab_size)
        self.spaces = []  # for logits; a pass takes one, or makes it, and brings it back: new memory costs time

    def take_space(self, rows, dtype):
        shape = min(rows, self.chunk), self.model.cfg.vocab_size
        if self.spaces:
            space = self.spaces.pop()
            if (space.shape, space.dtype) == (shape, dtype):
                return space
        return torch.empty(shape, dtype=dtype)

    def cast(self, dtype):
        """The weights as training.cpp takes them, matrices in dtype. Nothing tells whether they are still the same:
        PyTorch's fused AdamW changes weights without counting that up in their _version."""
        ready = {name: p.detach() for name, p in self.model.named_parameters()}
        ready = {name: w.to(dtype) if w.dim() == 2 else w for name, w in ready.items()}
        return dict(embed=ready["embed.weight"], norm=ready["norm.weight"], layers=[
            {part: ready.get(f"blocks.{i}.{name}.weight") for part, name in PARTS.items()}
            for i in range(self.model.cfg.n_layer)])

    def forward(self, idx, targets, loss_weights=None, reduction="mean", reset=None):
        """(None, loss), as the models' own forward passes with targets."""
        B, T = idx.shape
        if T > self.model.max_len:
            raise ValueError(f"{T} tokens are more than the context of {self.model.max_len}")
        if max(int(idx.max()), int(targets.max())) >= self.model.cfg.vocab_size or int(idx.min()) < 0:
            raise IndexError(f"a token id is not within the vocabulary of {self.model.cfg.vocab_size}")
        if any(p.dtype != torch.float32 for p in self.parameters()):
            raise TypeError("the weights must be fp32: autocast computes in bf16")
        idx, targets = idx.long(), targets.long()
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        first = None
        if reset is not None:  # where the document of each position begins
            first = (torch.arange(T) * reset).cummax(1).values.int().contiguous()
        with torch.autocast("cpu", enabled=False):
            run = Pass(self, B, T, first, dtype)
            losses = TokenLosses.apply(self, run, idx.flatten().contiguous(), targets.flatten().contiguous(),
                                       *self.model.parameters()).view(B, T)
        weights = (targets >= 0).float()
        if loss_weights is not None:
            weights = weights * loss_weights
        losses = losses * weights
        if reduction == "none":
            return None, losses
        return None, losses.sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


def same(a, b):
    """Whether two tensors agree as far as fp32 lets them. A gradient may be 0 but for rounding; a frozen weight has
    none."""
    return a is not None and b is not None and bool((a - b).norm() <= 1e-3 * b.norm() + 1e-5)


def agrees(model, T):
    """Whether QuickNet computes what the model does, with weights drawn at random: those of a new model hide much.

    It tries a row of T tokens, and two rows of several documents whose tokens weigh differently.
    """
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(1 + 0.3 * torch.randn(p.shape) if p.dim() == 1 else torch.randn(p.shape) * 2 / p.size(1) ** 0.5)
        for rows, length in ((1, T), (2, min(T, 48))):
            idx, targets = torch.randint(model.cfg.vocab_size, (2, rows, length)).unbind()
            more = {}
            if rows > 1:
                targets[:, ::5] = -1
                more = dict(reset=torch.rand(rows, length) < 0.1, loss_weights=torch.rand(rows, length),
                            reduction="none")
            results = []
            for net in (model, QuickNet(model)):
                model.zero_grad()
                try:
                    losses = net(idx, targets, **more)[1]
                except Exception:  # it takes no such arguments; a run in plain PyTorch may do without them
                    return False
                losses.sum().backward()
                results.append([losses.detach(), *(p.grad for p in model.parameters())])
            if not all(map(same, *results)):
                return False
    return True


def quick_net(model, T):
    """A QuickNet of the model for training on rows of T tokens, or None; see above."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    if build.choice() == "reference" or not is_llama(model) or hooked:
        return None
    cfg = model.cfg
    if cfg.d_model // cfg.n_head > MAX_HEAD or not build.has_threads():
        return None
    if not all(map(functions, (torch.float32, torch.bfloat16))) or not agrees(model, T):
        return None
    functions(torch.float32).library.keep_memory()
    return QuickNet(model)
