"""kernels/training.cpp, the quick training step on a CPU, against the models' own forward and backward passes."""
import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st

import gpt2preln
import i3
import ivme
import tinymemory
import train
from amx import library_with_tiles
from conftest import ROOT, SMALL, command, finish, rows, same_tensors, together
from kernels import build, training
from llamas import (SHAPES, model_of, one_more_parameter, other_bias, other_gate, other_table, parallel_blocks,
                    with_flags_of)

try:
    build.library("training")
    COMPILER = True
except build.CannotBuild:
    COMPILER = False
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


def batch(model, B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    idx, targets = torch.randint(model.cfg.vocab_size, (2, B, T), generator=generator).unbind()
    targets[torch.rand(B, T, generator=generator) < 0.2] = -1
    return idx, targets


def gradients(net, idx, targets, bf16=False, **more):
    """The loss or losses, and the gradient of every parameter."""
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        loss = net(idx, targets, **more)[1]
    factors = torch.linspace(-1, 2, loss.numel()).view_as(loss)  # each token's loss has a gradient of its own
    (loss * factors).sum().backward()
    return [loss.detach(), *(p.grad for p in net.parameters())]


def difference(found, expected):
    """The largest of the tensors' differences, relative to their norms, of which some are 0 but for rounding."""
    assert len(found) == len(expected) and all(a.dtype == b.dtype == torch.float32 for a, b in zip(found, expected))
    return max(float((a - b).norm() / (b.norm() + 0.1)) for a, b in zip(found, expected))


@pytest.fixture(params=SHAPES)
def model(request):
    module, shape = SHAPES[request.param]
    return model_of(module, **shape).train()


@settings(max_examples=40)
@given(name=st.sampled_from(sorted(SHAPES)), B=st.integers(1, 3), T=st.integers(1, 48),
       chunk=st.sampled_from([1, 10, 10 ** 6]), documents=st.booleans(), weighted=st.booleans(),
       reduction=st.sampled_from(["mean", "none"]))
def test_loss_and_gradients_are_the_models_own(name, B, T, chunk, documents, weighted, reduction):
    """One chunk of logits or several, a token alone, a target alone or none."""
    module, shape = SHAPES[name]
    model = model_of(module, **shape)
    idx, targets = batch(model, B, T, seed=T)
    more = dict(reduction=reduction)
    if documents:
        more["reset"] = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.2
    if weighted:
        more["loss_weights"] = torch.rand(B, T, generator=torch.Generator().manual_seed(B))
    quick = training.QuickNet(model)
    quick.chunk = chunk
    found = gradients(quick, idx, targets, **more)
    assert difference(found, gradients(model, idx, targets, **more)) < 1e-4


def attention_alone(q, k, v, dout, first, dtype):
    """training.cpp's attention (B, T, H D) of q (B, H, T, D), k and v (B, K, T, D), and its gradients of q, k, v."""
    (B, H, T, D), K = q.shape, k.size(1)
    of, shape = training.functions(dtype), training.Shape(B, T, H, K, D)
    q, k, v, dout = (x.to(dtype).contiguous() for x in (q, k, v, dout))
    out, total, dq = torch.empty_like(dout), torch.empty(B, H, T), torch.empty_like(q)
    dk, dv = torch.empty(2, B, H, T, D).unbind()
    of.attention(q, k, v, first, shape, out, total)
    of.attention_backward(q, k, v, first, out, total, dout, shape, dq, dk, dv)
    return out, dq, *(d.view(B, K, H // K, T, D).sum(2) for d in (dk, dv))


def check_attention(B, T, K, sharing, half, documents, bf16):
    """attention_alone() against float64."""
    generator, H, D = torch.Generator().manual_seed(T), K * sharing, 2 * half
    dtype = torch.bfloat16 if bf16 else torch.float32
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype).double().requires_grad_() for shape in (
        (B, H, T, D), (B, K, T, D), (B, K, T, D), (B, T, H * D)))
    seen, first = torch.ones(B, T, T).tril().bool(), None
    if documents:
        begins = (torch.rand(B, T, generator=generator) < 0.1).int()
        first = (torch.arange(T) * begins).cummax(1).values.int().contiguous()
        seen &= torch.arange(T) >= first[:, :, None]
    scores = q @ k.repeat_interleave(sharing, 1).mT / D ** 0.5
    exact = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v.repeat_interleave(sharing, 1)
    exact = exact.transpose(1, 2).flatten(2)
    expected = exact.detach(), *torch.autograd.grad(exact, (q, k, v), dout)
    for a, b in zip(attention_alone(*(x.detach() for x in (q, k, v, dout)), first, dtype), expected):
        assert float((a - b).norm() / (b.norm() + 0.1)) < (2e-2 if bf16 else 1e-5)


@settings(max_examples=60)
@given(B=st.integers(1, 2), T=st.integers(1, 200), K=st.integers(1, 2), sharing=st.integers(1, 3),
       half=st.integers(1, 36), documents=st.booleans(), bf16=st.booleans())
def test_attention_alone_is_that_of_float64(B, T, K, sharing, half, documents, bf16):
    """Rows of several blocks of queries, of which the last may be short, and heads of any width."""
    check_attention(B, T, K, sharing, half, documents, bf16)


def test_and_with_the_tiles_of_amx(monkeypatch, tmp_path):
    path = library_with_tiles("training", tmp_path)
    monkeypatch.setattr(build, "library", lambda kind: path)
    monkeypatch.setattr(training, "functions", training.functions.__wrapped__)
    for half in (1, 16, 20, 32, 35):
        for T in (1, 32, 100):
            check_attention(2, T, 1, 2, half, T == 100, True)
    check_attention(1, 70, 1, 3, 20, True, False)  # fp32 stays without tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_document_is_to_the_bit_what_it_is_among_others(dtype):
    B, H, K, T, D = 1, 4, 2, 150, 20
    q, k, v, dout = torch.randn(B, H, T, D), *torch.randn(2, B, K, T, D), torch.randn(B, T, H * D)
    first = torch.zeros(B, T, dtype=torch.int32)
    first[:, 40:] = 40
    first[:, 101:] = 101
    found = attention_alone(q, k, v, dout, first, dtype)
    others = [x.clone() for x in (q, k, v, dout)]
    for x, at in zip(others, (2, 2, 2, 1)):  # the dimension of positions
        x.narrow(at, 0, 40).mul_(-30)
        x.narrow(at, 101, 49).add_(7)
    again = attention_alone(*others, first, dtype)
    for a, b, at in zip(found, again, (1, 2, 2, 2)):
        assert torch.equal(a.narrow(at, 40, 61), b.narrow(at, 40, 61))
        assert not torch.equal(a.narrow(at, 0, 40), b.narrow(at, 0, 40))


def test_in_bfloat16_it_is_as_near_to_fp32_as_the_model_itself(model):
    idx, targets = batch(model, 4, 48)
    exact = gradients(model, idx, targets)
    own, quick = (gradients(net, idx, targets, bf16=True) for net in (model, training.QuickNet(model)))
    errors = [[float((a - b).norm() / b.norm()) for a, b in zip(found, exact)] for found in (own, quick)]
    assert max(errors[1]) < 0.2 and sum(errors[1]) < 1.2 * sum(errors[0])


@pytest.mark.parametrize("bf16", [False, True])
def test_any_number_of_threads_gives_the_same_bits(model, bf16):
    """Of what training.cpp does; torch's own matrix products may differ, so they are those of one thread."""
    idx, targets = batch(model, 3, 48)
    before, found = torch.get_num_threads(), []
    for n in (1, 2, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.Functions, "call", staticmethod(lambda f, *args, n=n: f(*(
                a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args), n)))
            training.functions.cache_clear()
            torch.set_num_threads(1)
            found.append(gradients(training.QuickNet(model), idx, targets, bf16=bf16))
    torch.set_num_threads(before)
    training.functions.cache_clear()
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_that_an_optimizer_changed_are_the_next_steps(model, optimizer):
    idx, targets = batch(model, 2, 20)
    quick = training.QuickNet(model)
    before = gradients(quick, idx, targets, bf16=True)
    train.Optimizers(model, train.Settings(optimizer=optimizer, lr=0.05), torch.bfloat16).step(1.0)
    after = gradients(quick, idx, targets, bf16=True)
    assert not any(map(torch.equal, before, after))
    assert all(map(torch.equal, after, gradients(training.QuickNet(copy.deepcopy(model)), idx, targets, bf16=True)))


def test_extreme_scores_stay_finite_and_lost_numbers_show():
    model = model_of(ivme, d_model=64, n_head=4, n_kv_head=2, d_ff=96)
    idx, targets = batch(model, 2, 40)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "qkv" in name or "gate_up" in name:
                p.mul_(100)
    found = gradients(training.QuickNet(model), idx, targets)
    assert all(g.isfinite().all() for g in found) and difference(found[:1], gradients(model, idx, targets)[:1]) < 1e-2
    for lost in (float("nan"), float("inf")):
        broken = copy.deepcopy(model)
        broken.blocks[1].ffn.down.weight.data[3, 5] = lost
        loss, *grads = gradients(training.QuickNet(broken), idx, targets)
        assert not all(g.isfinite().all() for g in grads)  # the loop stops


def test_without_targets_nothing_is_kept_and_evaluation_agrees(model):
    idx, targets = batch(model, 2, 48)
    with torch.no_grad():
        found = training.QuickNet(model)(idx, targets, reduction="none")[1]
        assert torch.allclose(found, model(idx, targets, reduction="none")[1], atol=1e-4) and not found.requires_grad


def test_a_row_beyond_the_context_is_an_error(model):
    with pytest.raises(ValueError, match="49 tokens are more than the context of 48"):
        training.QuickNet(model)(*batch(model, 1, 49))


# ---------------------------------------------------------------------------------------------------- other models

def softcap(model):
    """Logits of attention that are bounded, which the small weights of a new model would not show."""
    class Capped(ivme.Attention):
        def forward(self, x, *rest):
            y = super().forward(x, *rest)
            return 3 * torch.tanh(y / 3)
    for block in model.blocks:
        block.attn.__class__ = Capped


def dropout(model):
    class Dropped(ivme.SwiGLU):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)
    model.blocks[0].ffn.__class__ = Dropped


def other_loss(model):
    class Smoothed(type(model)):
        def forward(self, idx, targets=None, **more):
            logits, loss = super().forward(idx, targets, **more)
            return logits, loss if loss is None else loss * 1.01
    model.__class__ = Smoothed


def a_hook(model):
    model.blocks[0].register_forward_hook(lambda *args: None)


def last_layer_differs(model):
    model.blocks[-1].attn_norm.eps = 0.1


def frozen(model):
    model.embed.weight.requires_grad_(False)


def fewer_arguments(model):
    class Plain(type(model)):
        def forward(self, idx, targets=None, reset=None):
            return super().forward(idx, targets, reset=reset)
    model.__class__ = Plain


@pytest.mark.parametrize("change", [other_gate, parallel_blocks, one_more_parameter, other_bias, softcap, dropout,
                                    other_loss, a_hook, last_layer_differs, frozen, fewer_arguments])
def test_a_model_that_computes_something_else_is_left_alone(change):
    torch.manual_seed(0)
    model = ivme.Model(ivme.Config(vocab_size=311, context_length=48, n_layer=2, d_model=64, n_head=4, n_kv_head=2,
                                   d_ff=96))
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert training.quick_net(model, 48) is not None
    assert same_tensors(weights, model.state_dict()) and torch.equal(state, torch.get_rng_state())
    change(model)
    assert training.quick_net(model, 48) is None


def test_other_rotary_tables_are_used():
    model = model_of(tinymemory, d_model=64, n_head=4, d_ff=96)
    other_table(model)
    idx, targets = batch(model, 2, 30)
    assert difference(gradients(training.quick_net(model, 30), idx, targets), gradients(model, idx, targets)) < 1e-4


@pytest.mark.parametrize("module, shape", [
    (gpt2preln, dict(d_model=32, n_head=2)),
    (i3, dict(d_model=32, n_head=2, d_state=4, delta_rank=4, ffn_rank=8, head_rank=16)),
    (tinymemory, dict(d_model=1032, n_head=2, d_ff=8)),  # heads wider than training.cpp has room for
])
def test_other_architectures_are_left_alone(module, shape):
    cfg = dict(vocab_size=311, context_length=48, n_layer=2) | shape
    assert training.quick_net(module.Model(module.Config(**cfg)), 16) is None


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path, capfd):
    model = model_of(tinymemory, d_model=64, n_head=4, d_ff=96)
    monkeypatch.setenv("KERNELS", "reference")
    assert training.quick_net(model, 16) is None and capfd.readouterr().err == ""
    monkeypatch.delenv("KERNELS")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    training.functions.cache_clear()
    for _ in range(3):  # a run asks several times
        assert training.quick_net(model, 16) is None
    assert capfd.readouterr().err == (
        "kernels      there is no C++ compiler (no-such-compiler), so training takes longer\n")
    training.functions.cache_clear()


def test_what_pytorch_refuses_is_refused(model):
    net = training.quick_net(model, 30)
    idx, targets = batch(model, 2, 30)
    assert torch.equal(net(idx.int(), targets.int())[1], net(idx, targets)[1])
    for wrong in ((idx, targets.clone().fill_(model.cfg.vocab_size)), (idx - model.cfg.vocab_size, targets)):
        with pytest.raises(IndexError, match="not within the vocabulary"):
            net(*wrong)

    loss = net(idx, targets)[1]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph is not supported"):
        loss.backward()
    loss = net(idx, targets)[1]
    with torch.no_grad():
        model.embed.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(TypeError, match="must be fp32"):
        training.QuickNet(copy.deepcopy(model).bfloat16())(idx, targets)


def test_a_nan_of_any_bits_stays_one_in_bf16(model):
    for bits in (0x7fffffff, -1, 0x7f800001):
        nan = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.norm.weight.copy_(nan.expand_as(broken.norm.weight))
        idx, targets = batch(model, 1, 9)
        with torch.autocast("cpu", torch.bfloat16):
            assert training.QuickNet(broken)(idx, targets)[1].isnan()


# ---------------------------------------------------------------------------------------------------- whole runs

QUICK = [*SMALL, "--compile=auto", "--data=pydocs-hybrid", "--vocab_size=600"]


def losses(out):
    return [row["train_loss"] for row in rows(out) if "train_loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["stream", "document"])
def test_a_run_has_the_losses_of_plain_pytorch(workdir, pack):
    for compile in ("auto", "off"):
        text = finish(command(ROOT / "train.py", *QUICK, f"--pack={pack}", "--max_steps=40", f"--compile={compile}",
                              f"--out={pack}-{compile}"))
        assert ("our kernels" in text) == (compile == "auto")
    assert losses(f"{pack}-auto") == pytest.approx(losses(f"{pack}-off"), abs=2e-3)


def test_a_run_that_is_stopped_and_resumed_is_the_uninterrupted_one_to_the_bit(workdir):
    flags = [*QUICK, "--max_steps=8", "--decay_steps=2"]
    finish(command(ROOT / "train.py", *flags, "--out=whole"))
    finish(command(ROOT / "train.py", *flags, "--out=half", "--save_every=4", "--keep_every=4"))
    (workdir / "half/step_4.pt").replace(workdir / "half/ckpt.pt")
    finish(command(ROOT / "train.py", "--resume", "--out=half"))
    a, b = (torch.load(f"{out}/ckpt.pt", weights_only=True) for out in ("whole", "half"))
    assert same_tensors(a["model"], b["model"]) and same_tensors(a["optimizer"], b["optimizer"])


def test_two_processes_have_the_losses_of_one(workdir):
    flags = [*QUICK, "--max_steps=12", "--micro_batch=2", "--word_boost=1.5"]
    finish(command(ROOT / "train.py", *flags, "--out=alone"))
    (first, out, err), (second, _, also) = together(2, ROOT / "train.py", *flags, "--out=both")
    assert first == second == 0, err + also
    assert "our kernels" in out
    assert losses("alone") == pytest.approx(losses("both"), abs=1e-4)


AGAIN = """
for module, shape in llamas.SHAPES.values():
    model = llamas.model_of(module, **shape)
    for bf16 in (False, True):
        idx, targets = t.batch(model, 3, 48)
        found = t.gradients(t.training.QuickNet(model), idx, targets, bf16=bf16)
        assert t.difference(found, t.gradients(model, idx, targets, bf16=bf16)) < (0.2 if bf16 else 1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_without_simd_flags_it_is_the_same(capability, tmp_path):
    with_flags_of(capability, "test_quick_training", AGAIN, tmp_path)
