"""kernels/orthogonalize.py: Muon's orthogonalization on a CPU that multiplies bf16, against PyTorch's products."""
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import machine
import train
from amx import library_with_tiles
from kernels import orthogonalize
from kernels.orthogonalize import library, quick_orthogonalize

pytestmark = pytest.mark.skipif(library() is None, reason="this CPU does not multiply bf16, or there is no compiler")


def errors(shape, seed=0, quintics=train.NEWTON_SCHULZ, decay=None):
    """Relative errors of ours and of PyTorch's bf16, against fp32. With `decay`, singular value i is i^-decay."""
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if decay:
        u, s, v = torch.linalg.svd(stack, full_matrices=False)
        stack = u * torch.arange(1, s.size(1) + 1) ** -decay @ v
    exact = train.orthogonalize(stack, torch.float32, quintics)
    found = quick_orthogonalize(stack.clone(), torch.bfloat16, quintics), train.orthogonalize(
        stack, torch.bfloat16, quintics)
    return [float((one - exact).norm() / exact.norm()) for one in found]


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 100), st.integers(1, 100), st.integers(0, 10 ** 6))
def test_it_is_as_near_to_fp32_as_products_in_bf16_for_any_shape(n, rows, columns, seed):
    ours, theirs = errors((n, rows, columns), seed)
    assert ours < 3 * theirs + 0.05  # of a few numbers in bf16 one may happen to be off; a wrong one is off by far more


@pytest.mark.parametrize("shape", [(2, 384, 1024), (2, 1024, 384), (3, 160, 160), (1, 64, 2000)])
def test_and_for_the_shapes_of_models(shape):
    ours, theirs = errors(shape)
    assert ours < 1.2 * theirs < 0.03


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_and_where_most_singular_values_are_small(decay):
    ours, theirs = errors((1, 384, 1024), decay=decay)
    assert ours < 1.5 * theirs < 0.4


def test_and_with_the_tiles_of_amx(monkeypatch, tmp_path):
    with_tiles = ctypes.CDLL(str(library_with_tiles("orthogonalize", tmp_path)))
    with_tiles.orthogonalize_stack.argtypes = library().orthogonalize_stack.argtypes
    monkeypatch.setattr(orthogonalize, "library", lambda: with_tiles)
    for shape in ((2, 40, 70), (1, 70, 33), (1, 64, 200), (1, 1, 1)):
        ours, theirs = errors(shape)
        assert ours < 3 * theirs + 0.05


def test_a_few_other_coefficients_and_a_matrix_of_zeros():
    ours, theirs = errors((2, 40, 70), quintics=[(1.5, -0.5, 0.0), (1.875, -1.25, 0.375), (2.0, -1.5, 0.5)])
    assert ours < 3 * theirs + 0.05  # of a few numbers in bf16 one may happen to be off; a wrong one is off by far more
    assert torch.equal(quick_orthogonalize(torch.zeros(2, 5, 9), torch.bfloat16, train.NEWTON_SCHULZ),
                       torch.zeros(2, 5, 9))


def test_the_result_is_the_same_to_the_bit_for_any_number_of_threads_and_any_place_in_the_stack():
    stack, found = torch.randn(5, 48, 80), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(quick_orthogonalize(stack.clone(), torch.bfloat16, train.NEWTON_SCHULZ))
    torch.set_num_threads(1)
    alone = [quick_orthogonalize(one[None].clone(), torch.bfloat16, train.NEWTON_SCHULZ)[0] for one in stack]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], torch.stack(alone))


def test_muon_uses_it_in_bf16_unless_plain_pytorch_is_asked_for():
    for compile, dtype, quick in (("auto", torch.bfloat16, True), ("off", torch.bfloat16, False),
                                  ("auto", torch.float32, False)):
        p = torch.nn.Parameter(torch.randn(8, 8))
        muon = train.Muon([("w", p, None)], dtype=dtype)
        found = machine.quick_orthogonalize(train.Settings(compile=compile), muon)
        assert found is (quick_orthogonalize if quick else None)


@pytest.mark.parametrize("changed, quick", [
    (lambda u, stack: u, True), (lambda u, stack: 1.1 * u, False), (lambda u, stack: stack, False)])
def test_a_fork_that_orthogonalizes_in_another_way_is_noticed(monkeypatch, changed, quick):
    own = train.orthogonalize
    monkeypatch.setattr(train, "orthogonalize", lambda stack, *how: changed(own(stack, *how), stack))
    muon = train.Muon([("w", torch.nn.Parameter(torch.randn(8, 8)), None)], dtype=torch.bfloat16)
    found = machine.quick_orthogonalize(train.Settings(), muon)
    assert found is (quick_orthogonalize if quick else None)
