"""kernels/decode.cpp, the compiled step of sampling, against the models' own forward pass."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import gpt2preln
import i3
import ivme
import sample
import tinymemory
from kernels import build, decode
from llamas import (SHAPES, SMALL, model_of, one_more_parameter, other_bias, other_gate, other_table,
                    parallel_blocks, with_flags_of)

try:
    build.library("decode")
    COMPILER = True
except build.CannotBuild:
    COMPILER = False
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")

@pytest.fixture(params=SHAPES)
def model(request):
    module, shape = SHAPES[request.param]
    return model_of(module, **shape)


def tokens_of(model, B, T):
    return torch.randint(model.cfg.vocab_size, (B, T), generator=torch.Generator().manual_seed(B))


@torch.no_grad()
def largest_difference(step, model, B, begin=0):
    """Over all positions of the context, of which the model itself reads the first `begin`."""
    idx, caches = tokens_of(model, B, 48), [model.init_cache(B) for _ in range(2)]
    if begin:
        for cache in caches:
            model(idx[:, :begin], cache=cache)
    worst = 0
    for t in range(begin, 48):
        new = idx[:, t:t + 1]
        expected, found = model(new, cache=caches[0])[0], step(new, caches[1])
        assert found.shape == expected.shape == (B, 1, 311) and found.dtype == torch.float32
        worst = max(worst, float((found - expected).abs().max()))
    assert caches[1].length == 48 and expected.std() > 0.3
    if worst < 1e-4:  # the caches hold the same too
        pairs = zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v)
        assert all((a - b).abs().max() < 1e-4 * max(1, a.abs().max()) for a, b in pairs)
    return worst


@pytest.mark.parametrize("B", [1, 2, 4, 9])
def test_it_computes_what_the_model_computes_at_every_position(model, B):
    step = decode.compiled_step(model)
    assert largest_difference(step, model, B) < 1e-4
    assert largest_difference(step, model, B, begin=17) < 1e-4  # behind what the model has read


def test_in_bfloat16_the_matrices_alone_are_rounded(model):
    step, rounded = decode.compiled_step(model, torch.bfloat16), copy.deepcopy(model)
    for p in rounded.parameters():
        if p.dim() == 2:
            p.data = p.data.bfloat16().float()
    assert largest_difference(step, rounded, 3) < 1e-4
    assert largest_difference(step, model, 3) > 1e-3


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(model, threads):
    step, found = decode.compiled_step(model), []
    before = torch.get_num_threads()
    for n in (1, threads):
        torch.set_num_threads(n)
        found.append(step(tokens_of(model, 2, 1), model.init_cache(2)))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_sample_is_the_same_with_and_without_it(model):
    idx = tokens_of(model, 2, 5)
    step = decode.compiled_step(model)
    for rules in (dict(temperature=0), dict(temperature=0.9, top_p=0.9, repetition_penalty=1.2)):
        a, b = (sample.generate(model, idx, 100, generator=torch.Generator().manual_seed(1), step=s, **rules)
                for s in (None, step))
        assert torch.equal(a, b)  # beyond the context too


def test_extreme_scores_stay_finite():
    model = model_of(ivme, d_model=64, n_head=4, n_kv_head=2, d_ff=96)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "qkv" in name or "gate_up" in name:
                p.mul_(200)
    assert largest_difference(decode.compiled_step(model), model, 2) < 1e-2


# ---------------------------------------------------------------------------------------------------- other models

def a_window(model):
    """Attention that looks back over 32 positions alone, which the first tokens do not show."""
    class Window(ivme.Attention):
        def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
            S = cache.length + x.size(1)
            seen = torch.arange(S) > S - 33
            return super().forward(x, cos, sin, torch.zeros(1, 1, 1, S).masked_fill(~seen, -math.inf), cache, layer)
    for block in model.blocks:
        block.attn.__class__ = Window


def in_training(model):
    model.train()


def in_double(model):
    model.double()


@pytest.mark.parametrize("change", [
    other_gate, parallel_blocks, a_window, one_more_parameter, other_bias, in_training, in_double])
def test_a_model_that_computes_something_else_is_left_alone(change):
    model = model_of(ivme, d_model=64, n_head=4, n_kv_head=2, d_ff=96)
    assert decode.compiled_step(model) is not None
    change(model)
    assert decode.compiled_step(model) is None


def test_other_rotary_tables_are_used():
    model = model_of(tinymemory, d_model=64, n_head=4, d_ff=96)
    other_table(model)
    assert largest_difference(decode.compiled_step(model), model, 1) < 1e-4


@pytest.mark.parametrize("module, shape", [
    (gpt2preln, dict(d_model=32, n_head=2)),
    (i3, dict(d_model=32, n_head=2, d_state=4, delta_rank=4, ffn_rank=8, head_rank=16)),
])
def test_other_architectures_are_left_alone(module, shape):
    assert decode.compiled_step(module.Model(replace(module.Config(), **SMALL | shape)).eval()) is None


# ---------------------------------------------------------------------------------------------------- where it is used

def test_it_is_built_only_if_it_pays_and_the_reference_can_be_asked_for(monkeypatch, tmp_path, capfd):
    model = model_of(tinymemory, d_model=64, n_head=4, d_ff=96)
    monkeypatch.setenv("KERNELS", "reference")
    assert sample.quick_step(model, 10 ** 9) is None
    monkeypatch.delenv("KERNELS")
    assert sample.quick_step(model, 1) is not None  # it is there
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))
    assert sample.quick_step(model, 1) is None and not (tmp_path / "empty").exists()
    decode.function.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    for _ in range(2):
        assert sample.quick_step(model, 10 ** 9) is None
    assert capfd.readouterr().err == ("kernels      there is no C++ compiler (no-such-compiler), so sampling is "
                                      "several times slower\n")
    decode.function.cache_clear()


AGAIN = """
for module, shape in llamas.SHAPES.values():
    model = llamas.model_of(module, **shape)
    for B in (1, 5):
        assert t.largest_difference(t.decode.compiled_step(model), model, B) < 1e-4
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_without_simd_flags_it_is_the_same(capability, tmp_path):
    with_flags_of(capability, "test_decode", AGAIN, tmp_path)


# ---------------------------------------------------------------------------------------------------- choosing a token

@settings(max_examples=60)
@given(seed=st.integers(0, 999), share=st.floats(0, 1), V=st.sampled_from([3, 64, 65, 700]), sharp=st.floats(0, 9))
def test_the_likeliest_tokens_have_the_share_that_is_asked_for(seed, share, V, sharp):
    p = (torch.randn(3, V, generator=torch.Generator().manual_seed(seed)) * sharp).softmax(-1)
    values, indices = sample.likeliest(p, share)
    n = values.size(1)
    assert torch.equal(values, p.sort(descending=True)[0][:, :n]) and torch.equal(p.gather(1, indices), values)
    assert n == V or (values.sum(-1) >= share).all()


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0], [0.1, 0.0, 0.0, 0.0, 0.0, 0.9]])
    n = 20_000
    drawn = sample.draw(p.repeat(n, 1), torch.Generator().manual_seed(0)).view(n, 2)
    for row in range(2):
        seen = torch.bincount(drawn[:, row], minlength=6) / n
        assert (seen[p[row] == 0] == 0).all()
        assert (seen - p[row]).abs().max() < 4 * math.sqrt(0.25 / n)
