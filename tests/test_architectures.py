"""What every architecture file promises, proven on each of them: sizes, arithmetic, cache, loss, generation, cost.

A new architecture is a row of ARCHITECTURES. Tests take the tiny config unless the claim is about the real one. Weights
are drawn much larger than their initialisation, norms included, so that every part of a model shows in its logits.
"""
import ast
import dataclasses
import functools
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import finetune
import gpt2preln
import i3
import ivme
import tinymemory
import train
from architectures import ARCHITECTURES, randomised, role_of, tiny
from conftest import ROOT
from machine import checkpoint_blocks

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
every_preset = pytest.mark.parametrize("name, preset", [(n, p) for n, a in ARCHITECTURES.items() for p in a.params])
smallest_preset = pytest.mark.parametrize("name, preset", [(n, next(iter(a.params))) for n, a in ARCHITECTURES.items()])


def run_on(pairs):
    """Parametrizes with architectures and presets. Large ones that compute what a smaller one does take seconds."""
    large = ("i3-200m", "gpt2preln-medium", "gpt2preln-gpt2")
    return pytest.mark.parametrize("name, preset", [
        pytest.param(*pair, marks=[pytest.mark.slow] * (pair[1] in large)) for pair in pairs])


@functools.cache
def preset_model(name, preset):
    arch = ARCHITECTURES[name]
    return randomised(arch.module.Model(dataclasses.replace(arch.module.PRESETS[preset][0], **arch.cut)))


def tokens(model, *shape, seed=0):
    return torch.randint(model.cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def all_logits(model, idx, cache=None):
    with torch.no_grad():
        return model(idx, cache=cache, all_logits=True)[0]


def longest(model):
    """Tokens that the model takes in one sequence."""
    return getattr(model, "max_len", model.cfg.context_length)


def in_chunks(model, idx, sizes, cache=None):
    """The logits of idx fed to a cache in chunks of these sizes, the rest token by token."""
    cache = cache or model.init_cache(idx.size(0))
    sizes = list(sizes) + [1] * (idx.size(1) - sum(sizes))
    return torch.cat([all_logits(model, chunk, cache) for chunk in idx.split(sizes, dim=1)], dim=1)


# ---------------------------------------------------------------------------------------------------- shared source

FILES = {"ivme": ivme, "tinymemory": tinymemory, "i3": i3, "gpt2preln": gpt2preln}
ALL = tuple(FILES)
WITHOUT_I3 = ("ivme", "tinymemory", "gpt2preln")
LLAMA_LIKE = ("ivme", "tinymemory")
# What the files repeat on purpose, so that each of them makes sense alone -> the files whose copies are equal
SHARED = {
    "at_least_fp32": ALL, "recompute": ALL, "causal_attention": ALL, "within_documents": ALL,
    "chunk_loss": ALL, "chunked_loss": ALL, "next_token": ALL, "Model.generate": ALL, "Model.n_params": ALL,
    "Cache": WITHOUT_I3, "Model.init_cache": WITHOUT_I3, "Model.flops_per_token": LLAMA_LIKE,
    "RMSNorm": LLAMA_LIKE, "rope_tables": LLAMA_LIKE, "apply_rope": LLAMA_LIKE, "SwiGLU": LLAMA_LIKE,
    "Block.__init__": LLAMA_LIKE, "Model.init_weights": LLAMA_LIKE, "Model.forward": LLAMA_LIKE,
    "from_transformers": LLAMA_LIKE,
}
# What ivme.py alone has in its copy -> what the others have for it: shared heads, and recomputing to save memory
OF_IVME = {
    "causal_attention": {
        "k, v (B, K, S, D)": "k, v (B, H, S, D)",
        ", enable_gqa=True": "",
        "    if mask is not None or (v.is_cuda and v.dtype == torch.float32):\n": "",
        "        # quick attention with a mask, or in fp32 on CUDA, has no shared heads: "
        "every query head gets a copy\n": "",
        "        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)\n": "",
        "        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)\n": "",
    },
    "SwiGLU": {"recompute(self.gated_down, self.gate_up(x))": "self.gated_down(self.gate_up(x))"},
    "Model.init_cache": {"cfg.n_kv_head": "cfg.n_head"},
}


def source_of(module, path):
    """The source text of a function, class or method of a file; comments and docstrings count too."""
    found = module
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    if isinstance(found, property):
        found = found.fget
    text = inspect.getsource(found)
    if module is ivme:
        for own, others in OF_IVME.get(path, {}).items():
            assert own in text, own
            text = text.replace(own, others)
    return text


@pytest.mark.parametrize("path", SHARED)
def test_copies_of_shared_functions_are_equal(path):
    first, *others = SHARED[path]
    for name in others:
        assert source_of(FILES[name], path) == source_of(FILES[first], path), f"{path} of {name}.py and {first}.py"


def test_every_function_that_files_have_in_common_is_compared_or_known_to_differ():
    # between gpt2preln and i3, between Llama and GPT-2, between Llama and Qwen3
    differ = {"Attention", "Block", "FeedForward", "to_transformers"}
    names = [{n for n, x in vars(m).items() if getattr(x, "__module__", "") == m.__name__} for m in FILES.values()]
    common = {n for a, b in itertools.combinations(names, 2) for n in a & b} - {"Config", "Model"}
    assert common == {path for path in SHARED if "." not in path} | differ
    assert all(m.LOSS_CHUNK == ivme.LOSS_CHUNK for m in FILES.values())


# ---------------------------------------------------------------------------------------------------- sizes and roles

@every_preset
def test_parameter_count_is_exact(name, preset):
    module = ARCHITECTURES[name].module
    with torch.device("meta"):  # shapes without memory
        model = module.Model(module.PRESETS[preset][0])
    assert model.n_params == ARCHITECTURES[name].params[preset]
    # a checkpoint holds parameters and nothing else
    assert model.n_params == sum(p.numel() for p in model.state_dict().values())


def test_every_recipe_is_made_of_settings():
    for module in FILES.values():
        for preset, (_, recipe) in module.PRESETS.items():
            settings = finetune.Settings if "loss_on" in recipe else train.Settings
            settings(**recipe)  # an unknown one is a TypeError


@every_architecture
def test_config_that_cannot_work_is_refused(name):
    for overrides in ARCHITECTURES[name].broken:
        with pytest.raises(ValueError):
            tiny(name, **overrides)


@every_architecture
def test_every_parameter_has_exactly_one_role(name):
    model, used = tiny(name), set()
    for parameter, p in model.named_parameters():
        (end,) = [end for end in model.roles() if parameter.endswith(end)]
        role, rows = model.roles()[end]
        used.add(end)
        assert role in ("matrix", "embedding", "head", "vector"), role
        assert role == "vector" or p.ndim == 2, parameter
        assert rows is None or role == "matrix" and sum(rows) == p.size(0), parameter
    assert used == set(model.roles())


@smallest_preset
def test_initial_weights_follow_the_recipe(name, preset):
    module = ARCHITECTURES[name].module
    torch.manual_seed(0)
    model = module.Model(dataclasses.replace(module.PRESETS[preset][0], **ARCHITECTURES[name].cut))
    arch, n_layer = ARCHITECTURES[name], len(model.blocks)
    for parameter, p in model.named_parameters():
        if role_of(model, parameter) == "vector":
            ends = [end for end in arch.constants if parameter.endswith(end)]
            constant = arch.constants[max(ends, key=len)] if ends else 1.0
            assert constant is None or (p == constant).all(), parameter
        else:
            std = 0.02 / (2 * n_layer) ** 0.5 if parameter.endswith(arch.into_residual) else 0.02
            std = p.size(1) ** -0.5 if parameter.endswith(arch.scale_keeping) else std
            sampling_error = (2 * p.numel()) ** -0.5
            assert p.std().item() == pytest.approx(std, rel=5 * sampling_error), parameter
            assert abs(p.mean().item()) < 5 * std * p.numel() ** -0.5, parameter


@every_architecture
def test_flops_per_token_agrees_with_counted_flop(name):
    T, B = 32, 2
    model = tiny(name)
    idx = tokens(model, B, T)
    # this attention consists of plain matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    counted = {op.__name__.split(".")[0]: n for op, n in counter.get_flop_counts()["Global"].items()}
    # nothing that is recomputed is a matrix product; the formula leaves out the half of attention that the mask hides
    matrices = B * T * model.flops_per_token(0)
    attention = B * T * model.flops_per_token(T) - matrices
    assert matrices == pytest.approx(counted.pop("mm") + counted.pop("addmm", 0), rel=0.01)  # addmm: with a bias
    assert attention == pytest.approx(counted.pop("bmm", 0) / 2, rel=0.01)
    assert not counted


@every_architecture
def test_file_imports_only_torch_and_the_standard_library(name):
    arch = ARCHITECTURES[name]
    tree = ast.parse(Path(arch.module.__file__).read_text(encoding="utf-8"))
    roots = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    roots |= {(node.module or ".").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "torch" in roots and roots - sys.stdlib_module_names - {"torch"} <= set(arch.imports)


# Forks a child for each (folder, module, config). The child has imported torch and sees only its folder
ALONE = """
import importlib, json, os, sys, torch, torch._dynamo  # which the first step of AdamW loads
for folder, name, config in json.loads(sys.argv[1]):
    if os.fork():
        assert os.wait()[1] == 0, name
        continue
    os.chdir(folder)
    sys.path[0] = folder
    it = importlib.import_module(name)
    text = torch.tensor(list(open(it.__file__, "rb").read()))
    torch.manual_seed(0)
    model = it.Model(it.Config(**config))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=4e-3), []
    for step in range(110):
        rows = torch.stack([text[i:i + 65] for i in torch.randint(len(text) - 65, (8,))])
        loss = model(rows[:, :-1], rows[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    out = model.generate(text[None, :20], 100)
    p = text.bincount() / len(text)
    unigram = p.xlogy(p).sum().neg().item()
    repeats = torch.equal(out[0, :20], text[:20])
    print(it.__file__, losses[0], sum(losses[-10:]) / 10, unigram, *out.shape, repeats, flush=True)
    os._exit(0)
"""


def test_each_file_copied_alone_trains_and_generates(tmp_path):
    jobs = []
    for name, arch in ARCHITECTURES.items():
        folder = tmp_path / name
        folder.mkdir()
        for part in (Path(arch.module.__file__).name, *arch.imports):
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)
        jobs.append((str(folder), arch.module.__name__, {**arch.tiny, "vocab_size": 256, "context_length": 64}))

    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ALONE, json.dumps(jobs)], cwd=tmp_path, capture_output=True, text=True,
                          env={**env, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for (folder, module, _), line in zip(jobs, done.stdout.splitlines(), strict=True):
        file, first, last, unigram, *rest = line.split()
        assert Path(file).samefile(Path(folder) / f"{module}.py")
        assert 5.4 < float(first) < 5.7  # ln 256 = 5.55: knows nothing
        assert float(last) < float(unigram) - 0.1  # better than knowing how often each byte occurs
        assert rest == ["1", "120", "True"]


# ---------------------------------------------------------------------------------------------------- arithmetic

with_reference = run_on([(n, p) for n, a in ARCHITECTURES.items() if a.reference for p in (None, *a.params)])


@with_reference
def test_logits_equal_transformers(name, preset):
    model = preset_model(name, preset) if preset else tiny(name)
    reference, C = ARCHITECTURES[name].reference(model), model.cfg.context_length
    for B, T in ((3, min(100, C)), (1, min(C, 2 ** 24 // model.cfg.vocab_size))):  # at most 64 MB of logits
        idx = tokens(model, B, T)
        with torch.no_grad():
            expected = reference(idx, use_cache=False).logits
        assert expected.std() > 0.5
        assert (all_logits(model, idx) - expected).abs().max() < 1e-4
        with torch.no_grad():
            last, loss = model(idx)
        assert loss is None and last.shape == (B, 1, model.cfg.vocab_size)
        assert (last - expected[:, -1:]).abs().max() < 1e-4


@every_architecture
def test_no_logit_depends_on_a_later_token(name):
    model = tiny(name)
    T = model.cfg.context_length
    idx = tokens(model, 1, T)
    changed = idx.repeat(T, 1)  # row t: token t is another one
    changed.diagonal().add_(1).remainder_(model.cfg.vocab_size)
    difference = (all_logits(model, changed) - all_logits(model, idx)).abs().amax(-1)  # (T, T)
    assert difference.tril(-1).max() < 1e-5
    assert difference.triu()[-1, -1] > 0.1 and (difference.diagonal() > 0.1).all()
    assert (difference[0, 1:] > 1e-3).all()  # and every later one sees the first


def documents(B, T):
    """reset (B, T). The rows: one document; documents of lengths 1, 2, 3, ...; one that began earlier, then another."""
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 0] = True
    reset[1, [i * (i + 1) // 2 for i in range(T) if i * (i + 1) // 2 < T]] = True
    reset[2, T // 3] = True
    return reset


@every_architecture
def test_packed_documents_are_read_as_if_each_stood_alone(name):
    model = tiny(name)
    T = model.cfg.context_length
    idx, reset = tokens(model, 3, T), documents(3, T)
    with torch.no_grad():
        packed = model(idx, all_logits=True, reset=reset)[0]
    for row, begins, logits in zip(idx, reset, packed):
        edges = sorted({0, *begins.nonzero().flatten().tolist(), T})
        alone = torch.cat([all_logits(model, row[None, i:j])[0] for i, j in zip(edges, edges[1:])])
        assert (logits - alone).abs().max() < 1e-5
    together = all_logits(model, idx[1:2])[0]  # without reset they do see each other
    assert (packed[1] - together)[1:].abs().amax(-1).min() > 1e-3


@every_architecture
def test_the_gradient_of_a_packed_document_ignores_its_neighbours(name):
    """The losses of one document, its first tokens included, give other documents' inputs a gradient of exactly 0."""
    model, T = tiny(name), 20
    idx, reset = tokens(model, 1, T), torch.zeros(1, T, dtype=torch.bool)
    reset[0, [0, 6, 14]] = True
    seen = []

    def keep(module, args, out):
        out.retain_grad()
        seen.append(out)

    handle = model.embed.register_forward_hook(keep)
    targets = tokens(model, 1, T, seed=1)
    targets[0, :6] = targets[0, 14:] = -1
    model(idx, targets, reset=reset)[1].backward()
    handle.remove()
    touched = seen[0].grad[0].abs().amax(-1)
    assert (touched[6:14] > 0).all() and (touched[:6] == 0).all() and (touched[14:] == 0).all()


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the different tensors that a forward pass keeps for the backward pass, without parameters."""

    def __init__(self, model):
        self.storages = {}
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self):
        return sum(s.nbytes() for s in self.storages.values())


@every_architecture
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(name):
    kept, gradients = [], []
    for checkpointed in (False, True):
        model = tiny(name, n_layer=6)
        if checkpointed:
            checkpoint_blocks(model)
        idx, targets = tokens(model, 2, 32), tokens(model, 2, 32, seed=1)
        saved = Saved(model)
        with saved:
            loss = model(idx, targets, reset=documents(3, 32)[:2])[1]
        loss.backward()
        kept.append(saved.bytes)
        gradients.append([p.grad for p in model.parameters()])
        with torch.no_grad():  # and decoding does not care
            assert torch.isfinite(model(idx, cache=model.init_cache(2))[0]).all()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < kept[0] / 3, kept


@smallest_preset
def test_bfloat16_autocast_stays_close_to_float32(name, preset):
    model = preset_model(name, preset)
    idx, targets = tokens(model, 2, 64), tokens(model, 2, 64, seed=1)
    exact = all_logits(model, idx)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half, loss = all_logits(model, idx), model(idx, targets)[1]
        cached = in_chunks(model, idx, (61,))
    half_cache = in_chunks(model, idx, (61,), model.init_cache(2, dtype=torch.bfloat16))  # without autocast
    for logits in (half, cached, half_cache):
        assert (logits - exact).square().mean().sqrt() < 0.03 * exact.std()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(exact.flatten(0, 1), targets.flatten()).item(), rel=0.01)


@pytest.mark.parametrize("name", [  # the slow ones compute what another of the same file does
    "ivme", "tinymemory", "i3-attention", "gpt2preln",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("i3", "gpt2preln-tied"))])
def test_compiled_model_is_one_graph_with_the_same_results(name):
    torch._dynamo.reset()
    model = tiny(name, n_layer=1)  # and i3's attention block, in its second row
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # inductor's C++ would take half a minute more
    idx, targets = tokens(model, 2, 16), tokens(model, 2, 16, seed=1)
    gradients = []
    for run in (model, compiled):
        loss = run(idx, targets)[1]
        gradients.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for expected, value in zip(*gradients):
        assert (value - expected).abs().max() < 1e-5
    reset = documents(3, 16)[:2]
    with torch.no_grad():
        assert (compiled(idx)[0] - model(idx)[0]).abs().max() < 1e-4
        assert abs(compiled(idx, targets, reset=reset)[1] - model(idx, targets, reset=reset)[1]) < 1e-5


# ---------------------------------------------------------------------------------------------------- cache

@run_on([(n, p) for n, a in ARCHITECTURES.items() for p in a.params])
def test_prefill_then_decode_equals_full_forward(name, preset):
    model = preset_model(name, preset)
    idx = tokens(model, 2, 60)
    assert (in_chunks(model, idx, (1, 7, 13, 2, 31)) - all_logits(model, idx)).abs().max() < 1e-4


@every_architecture
@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_chunking_equals_full_forward(name, data):
    model = tiny(name)
    sizes = data.draw(st.lists(st.integers(1, 12), max_size=8).filter(lambda s: sum(s) <= model.cfg.context_length))
    T = data.draw(st.integers(max(1, sum(sizes)), model.cfg.context_length))
    max_len = data.draw(st.integers(T, model.cfg.context_length))
    idx = tokens(model, data.draw(st.integers(1, 3)), T)
    chunked = in_chunks(model, idx, sizes, model.init_cache(idx.size(0), max_len))
    assert (chunked - all_logits(model, idx)).abs().max() < 1e-4


@every_architecture
def test_too_many_tokens_are_refused_and_harm_nothing(name):
    model = tiny(name)
    if longest(model) > model.cfg.context_length:
        pytest.skip("there are none for a model without attention")
    C = model.cfg.context_length
    idx = tokens(model, 1, C + 1)
    with pytest.raises(ValueError):
        model(idx)
    with pytest.raises(ValueError):
        model(idx, idx)
    with pytest.raises(ValueError):
        model.init_cache(1, C + 1)
    for max_len in (5, C):
        cache = model.init_cache(1, max_len)
        before = all_logits(model, idx[:, :max_len - 1], cache)
        with pytest.raises(ValueError):
            model(idx[:, :2], cache=cache)
        after = all_logits(model, idx[:, max_len - 1:max_len], cache)  # the refused call left the cache as it was
        assert (torch.cat((before, after), 1) - all_logits(model, idx[:, :max_len])).abs().max() < 1e-4
        with pytest.raises(ValueError):
            model(idx[:, :1], cache=cache)


# ---------------------------------------------------------------------------------------------------- loss

def plain_loss(model, idx, targets, weights=None, reduction="mean"):
    """The definition: cross entropy of all logits at once, weighted mean over the targets that count."""
    logits = model(idx, all_logits=True)[0].float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    losses = losses.view_as(targets)
    weights = (torch.ones_like(losses) if weights is None else weights) * (targets != -1)
    return (losses * weights).sum() / weights.sum() if reduction == "mean" else losses * weights


def batch_with_gaps(model, B=3, T=14):
    """idx, targets of which a third is ignored, and weights from 0 to 3."""
    idx, targets = tokens(model, B, T), tokens(model, B, T, seed=1)
    g = torch.Generator().manual_seed(2)
    targets[torch.rand(B, T, generator=g) < 1 / 3] = -1
    return idx, targets, 3 * torch.rand(B, T, generator=g)


@every_architecture
@pytest.mark.parametrize("positions", (1, 4, 1000))  # in one chunk of the loss
@pytest.mark.parametrize("weighted", (False, True))
def test_chunked_loss_equals_plain_cross_entropy(name, positions, weighted, monkeypatch):
    model = tiny(name)
    monkeypatch.setattr(ARCHITECTURES[name].module, "LOSS_CHUNK", positions * model.cfg.vocab_size)
    idx, targets, weights = batch_with_gaps(model)
    weights = weights if weighted else None
    results = []
    for loss in (plain_loss(model, idx, targets, weights), model(idx, targets, weights)[1]):
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for expected, value in zip(*results):
        assert value.shape == expected.shape and (value - expected).abs().max() < 1e-5
    with torch.no_grad():
        per_token = model(idx, targets, weights, reduction="none")[1]
        assert per_token.shape == targets.shape and per_token.dtype == torch.float32
        assert (per_token - plain_loss(model, idx, targets, weights, "none")).abs().max() < 1e-5
        if weighted:
            for scale in (2, 1e-3):
                assert model(idx, targets, scale * weights)[1].item() == pytest.approx(results[0][0].item(), rel=1e-5)
        else:
            expected = F.cross_entropy(all_logits(model, idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
            assert results[1][0].item() == pytest.approx(expected.item(), rel=1e-5)


@every_architecture
@pytest.mark.parametrize("nothing", ("targets", "weights"))
def test_loss_of_nothing_is_zero_with_zero_gradients(name, nothing):
    model = tiny(name)
    idx, targets, weights = batch_with_gaps(model)
    if nothing == "targets":
        loss = model(idx, torch.full_like(targets, -1))[1]
    else:
        loss = model(idx, targets, torch.zeros_like(weights))[1]
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@every_architecture
def test_softmax_of_bfloat16_weights_is_in_float32(name):
    model = tiny(name).bfloat16()
    idx, targets, _ = batch_with_gaps(model)
    with torch.no_grad():
        losses = model(idx, targets, reduction="none")[1]
        assert (losses - plain_loss(model, idx, targets, reduction="none")).abs().max() < 1e-3


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operation returns, in the backward pass too."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


@every_architecture
def test_full_logits_never_exist_in_training(name, monkeypatch):
    B, T, V = 4, 32, 1009
    model = tiny(name, vocab_size=V)
    idx = tokens(model, B, T)
    largest = {}
    for positions in (B * T, 8):
        monkeypatch.setattr(ARCHITECTURES[name].module, "LOSS_CHUNK", positions * V)
        with LargestTensor() as mode:
            model(idx, idx)[1].backward()
        largest[positions] = mode.numel
    assert largest[B * T] == B * T * V  # in one chunk they do, and the recorder sees it
    assert largest[8] <= max(B * T * V // 2, V * model.cfg.d_model)


# ---------------------------------------------------------------------------------------------------- generation

def greedy(model, idx, n):
    """generate() at temperature 0 without a cache. A full context goes on with its last half."""
    start, C = max(0, idx.size(1) - longest(model)), longest(model)
    for _ in range(n):
        if idx.size(1) - start > C:
            start = idx.size(1) - C // 2
        idx = torch.cat((idx, all_logits(model, idx[:, start:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@every_architecture
@pytest.mark.parametrize("prompt, new", ((1, 12), (20, 50), (32, 20), (45, 40)))  # the context is 32
def test_greedy_generation_equals_argmax_without_cache(name, prompt, new):
    model = tiny(name)
    idx = tokens(model, 3, prompt)
    expected = greedy(model, idx, new)
    assert len(expected[:, prompt:].unique()) > 3  # a text that says something
    assert torch.equal(model.generate(idx, new, temperature=0), expected)
    for almost_greedy in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)):
        assert torch.equal(model.generate(idx, new, **almost_greedy), expected), almost_greedy


@every_architecture
def test_same_seed_same_text(name):
    model = tiny(name)
    idx = tokens(model, 2, 5)
    texts = [model.generate(idx, 40, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@every_architecture
def test_generation_ends_once_every_row_has_stopped(name):
    model = tiny(name)
    idx = tokens(model, 8, 5)
    text = greedy(model, idx, 25)
    new = text[:, 5:].tolist()
    i, j, stop = next(  # two rows that produce the same token, one earlier than the other
        (i, j, t) for i, j in itertools.permutations(range(8), 2) for t in set(new[i]) & set(new[j])
        if 0 < new[i].index(t) < new[j].index(t) < 24)
    for rows in ([i], [i, j]):
        end = 5 + max(new[row].index(stop) for row in rows) + 1
        assert torch.equal(model.generate(idx[rows], 25, temperature=0, stop_token=stop), text[rows, :end])
    never = (set(range(model.cfg.vocab_size)) - {t for row in new for t in row}).pop()
    assert torch.equal(model.generate(idx, 25, temperature=0, stop_token=never), text)


@every_architecture
@pytest.mark.parametrize("options", (
    dict(), dict(temperature=0.6), dict(top_k=5), dict(top_p=0.7), dict(top_p=0.0), dict(repetition_penalty=1.6),
    dict(repetition_penalty=1.3, temperature=0.8, top_k=20, top_p=0.9)), ids=lambda o: "+".join(o) or "plain")
def test_sampled_tokens_follow_the_distribution_of_transformers(name, options):
    from transformers.generation import logits_process as theirs
    order = (("repetition_penalty", theirs.RepetitionPenaltyLogitsProcessor),
             ("temperature", theirs.TemperatureLogitsWarper),
             ("top_k", theirs.TopKLogitsWarper), ("top_p", theirs.TopPLogitsWarper))
    processors = theirs.LogitsProcessorList(make(options[key]) for key, make in order if key in options)
    model, N = tiny(name), 1500
    idx = tokens(model, 1, 8)
    expected = processors(idx, all_logits(model, idx)[:, -1].clone())[0].softmax(-1)
    sampled = model.generate(idx.expand(N, -1), 1, generator=torch.Generator().manual_seed(0), **options)[:, -1]
    frequency = sampled.bincount(minlength=model.cfg.vocab_size) / N
    assert (frequency[expected == 0] == 0).all()
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / N).sqrt() + 1 / N).all()


@every_architecture
def test_repetition_penalty_equals_transformers_for_one_step(name):
    from transformers import RepetitionPenaltyLogitsProcessor
    model = tiny(name)
    idx = tokens(model, 64, 30)
    logits = all_logits(model, idx)[:, -1]
    expected = RepetitionPenaltyLogitsProcessor(1.5)(idx, logits.clone()).argmax(-1)
    assert (expected != logits.argmax(-1)).any()
    assert torch.equal(model.generate(idx, 1, temperature=0, repetition_penalty=1.5)[:, -1], expected)


# ---------------------------------------------------------------------------------------------------- to and fro

@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.reference])
def test_weights_become_those_of_transformers_and_back(name):
    model, module = tiny(name), ARCHITECTURES[name].module
    theirs = ARCHITECTURES[name].reference(model).state_dict()  # with a tied head beside the embedding
    for state in (theirs, module.to_transformers(model.state_dict(), model.cfg)):
        ours = module.from_transformers(state)
        assert ours.keys() == model.state_dict().keys()
        assert all(torch.equal(ours[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ("gpt2preln", "gpt2preln-tied"))
def test_gpt2_weights_as_the_hub_has_them_become_ours(name):
    """The file of OpenAI's GPT-2 has no prefix, and holds the causal masks."""
    model = tiny(name)
    theirs = gpt2preln.to_transformers(model.state_dict(), model.cfg)
    theirs = {key.removeprefix("transformer."): value for key, value in theirs.items()}
    mask = torch.ones(1, 1, 32, 32).tril()
    ours = gpt2preln.from_transformers(theirs | {"h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)})
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[k], v) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- i3 alone

def plain_mixer(m, x):
    """The equations of i3.py's first page in float64, one token and one head after the other."""
    p = {name: v.double() for name, v in m.named_parameters()}
    h = torch.zeros(x.size(0), *m.A_log.shape, dtype=torch.float64)
    before, ys = torch.zeros_like(x[:, 0]), []
    for x_t in x.unbind(1):
        u, δ, b, c = (mix * x_t + (1 - mix) * before for mix in p["mix"])
        u = u @ p["inner.weight"].T if "inner.weight" in p else u
        down = δ @ p["delta_down.weight"].T + p["delta_down.bias"]
        Δ = torch.log1p(torch.exp(down @ p["delta_up.weight"].T + p["delta_up.bias"]))
        B, C = b @ p["B.weight"].T + p["B.bias"], c @ p["C.weight"].T + p["C.bias"]
        h = torch.exp(Δ[..., None] * -p["A_log"].exp()) * h + (Δ * u)[..., None] * B[:, None]
        heads = ((h * C[:, None]).sum(-1) + p["D"] * u).chunk(m.n_head, dim=-1)
        normed = torch.cat([standardised(y, m.eps) for y in heads], -1)
        y = (normed * p["norm_weight"] + p["norm_bias"]) * torch.sigmoid(p["r"] * u + p["r_bias"])
        ys.append(y @ p["outer.weight"].T if "outer.weight" in p else y)
        before = x_t
    return torch.stack(ys, 1)


def standardised(x, eps):
    """x minus its mean over the last dimension, divided by its standard deviation there."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def plain_i3(model, idx):
    """All logits of an I3 in float64, from its parameters alone: one matrix product, head and token after the other."""
    p = {name: v.double() for name, v in model.named_parameters()}

    def norm(x, name):
        return standardised(x, model.cfg.norm_eps) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):  # dense, or two low-rank halves
        if f"{name}.0.weight" in p:
            x = x @ p[f"{name}.0.weight"].T
            name = f"{name}.1"
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attention(x, name):
        T = x.size(1)
        q, k, v = linear(x, f"{name}.qkv").chunk(3, dim=-1)
        heads = []
        for q, k, v in zip(*(t.chunk(model.cfg.n_head, dim=-1) for t in (q, k, v))):
            scores = q @ k.mT / q.size(-1) ** 0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf)
            heads.append(scores.softmax(-1) @ v)
        return linear(torch.cat(heads, -1), f"{name}.out")

    x = p["embed.weight"][idx] + p["position.weight"][:idx.size(1)]
    for i, block in enumerate(model.blocks):
        mixed = norm(x, f"blocks.{i}.mixer_norm")
        x = x + (plain_mixer(block.mixer, mixed) if i < model.cfg.n_layer else attention(mixed, f"blocks.{i}.mixer"))
        up = linear(norm(x, f"blocks.{i}.ffn_norm"), f"blocks.{i}.ffn.up")
        x = x + linear(up * (1 + torch.erf(up / 2 ** 0.5)) / 2, f"blocks.{i}.ffn.down")  # GELU
    x = norm(x, "norm")
    if "head_down.weight" in p:
        x = x @ p["head_down.weight"].T
    return linear(x, "head")


@pytest.mark.parametrize("name", ("i3", "i3-attention"))
def test_i3_mixer_is_its_equations(name):
    model = tiny(name)
    x = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in list(model.blocks)[:2]:
            assert (block.mixer(x) - plain_mixer(block.mixer, x.double())).abs().max() < 1e-4


@pytest.mark.parametrize("name", ("i3", "i3-attention"))
def test_i3_in_float64_computes_in_float64_throughout(name):
    model = tiny(name).double()
    idx, targets = tokens(model, 2, 30), tokens(model, 2, 30, seed=1)
    with torch.no_grad():
        exact = plain_i3(model, idx)
        assert (all_logits(model, idx) - exact).abs().max() < 1e-10
        assert (in_chunks(model, idx, (1, 7, 13)) - exact).abs().max() < 1e-10  # prefill, then token by token
        exact_loss = F.cross_entropy(exact.flatten(0, 1), targets.flatten())
        assert (model(idx, targets)[1] - exact_loss).abs() < 1e-10


@pytest.mark.parametrize("preset", ("i3", "i3-80m"))
def test_i3_scan_starts_as_mambas(preset):
    torch.manual_seed(0)
    cfg = dataclasses.replace(i3.PRESETS[preset][0], n_layer=2, n_attention=0)
    for mixer in (block.mixer for block in i3.Model(cfg).blocks):
        assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, cfg.d_state + 1).expand_as(mixer.A_log), rtol=1e-5)
        step = F.softplus(mixer.delta_up.bias).sort().values
        assert torch.allclose(step, torch.logspace(-3, -1, len(step)), rtol=1e-4)
        assert all(torch.allclose(mix.sort().values, torch.linspace(0, 1, cfg.d_model)) for mix in mixer.mix)


def test_i3_presets_are_the_cards():
    assert i3.PRESETS["i3"] is i3.PRESETS["i3-22m"]
    assert i3.Model(dataclasses.replace(i3.PRESETS["i3"][0], n_layer=12)).n_params == 12_691_186  # the smaller release
    for preset, published in (("i3-80m", 82_765_160), ("i3-200m", 169.85e6)):
        assert ARCHITECTURES["i3-attention"].params[preset] == pytest.approx(published, rel=1e-3)


def test_i3_without_attention_goes_on_past_its_context():
    model = tiny("i3")
    C, idx = model.cfg.context_length, tokens(model, 2, 100)
    full = all_logits(model, idx)
    assert (in_chunks(model, idx, (C - 1, 5, 30)) - full).abs().max() < 1e-4
    assert torch.equal(full[:, :C], all_logits(model, idx[:, :C]))
    with torch.no_grad():  # the last position's embedding serves all tokens past it
        longer = i3.Model(dataclasses.replace(model.cfg, context_length=100))
        rows = model.position.weight
        rows = torch.cat((rows, rows[-1:].expand(100 - C, -1)))
        longer.load_state_dict(model.state_dict() | {"position.weight": rows})
    assert (all_logits(longer, idx) - full).abs().max() < 1e-5


def test_i3_without_attention_keeps_a_state_of_constant_size():
    model = tiny("i3")

    def size(cache):
        return sum(t.numel() for state in cache.states for t in vars(state).values())

    cache = model.init_cache(3)
    c, before = model.cfg, size(cache)
    assert before == 3 * c.n_layer * c.d_model * (c.d_state + 1) == size(model.init_cache(3, 10_000))
    in_chunks(model, tokens(model, 3, 150), (140,), cache)
    assert size(cache) == before and cache.length == 150 and cache.max_len > 10 ** 9


def test_i3_without_its_scan_has_the_same_parameters_and_no_memory_beyond_the_shift():
    with_scan, without = tiny("i3"), tiny("i3", scan=False)
    assert with_scan.n_params == without.n_params
    idx = tokens(without, 1, 30)
    changed = idx.clone()
    changed[0, 5] += 1

    def differs(model):
        return (all_logits(model, changed) - all_logits(model, idx)).abs().amax(-1)[0] > 1e-6  # (T)

    assert differs(without).nonzero().flatten().tolist() == [5, 6, 7]  # one step further in each of the two layers
    assert differs(with_scan)[5:].all()
