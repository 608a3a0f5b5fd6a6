"""Small models with Llama's blocks, and changes to them that kernels/ must notice."""
import torch
import torch.nn.functional as F

import ivme
import tinymemory
from conftest import ROOT, command, finish

SMALL = dict(vocab_size=311, context_length=48, n_layer=2)
SHAPES = {  # widths that are and are not a multiple of a vector, an odd number of rows, one head for all
    "ivme": (ivme, dict(d_model=64, n_head=4, n_kv_head=2, d_ff=96)),
    "ivme-odd": (ivme, dict(d_model=60, n_head=6, n_kv_head=1, d_ff=37)),
    "ivme-alone": (ivme, dict(d_model=32, n_head=1, n_kv_head=1, d_ff=33)),
    "tinymemory": (tinymemory, dict(d_model=160, n_head=4, d_ff=256)),
    "tinymemory-odd": (tinymemory, dict(d_model=36, n_head=3, d_ff=5)),
}


def model_of(module, **shape):
    """A model whose weights are random, and large enough for sharp attention."""
    torch.manual_seed(0)
    model = module.Model(module.Config(**SMALL | shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1).add_(torch.randn_like(p), alpha=0.2 * (p.dim() == 1))
    return model


def with_flags_of(capability, test_file, code, folder):
    """Runs code, to which the test file is known as t, with kernels that are built in `folder` for such a CPU."""
    process = command("-c", f"import llamas, {test_file} as t\n{code}\nprint('same')", fresh=True,
                      ATEN_CPU_CAPABILITY=capability, TORCH_EXTENSIONS_DIR=str(folder),
                      PYTHONPATH=f"{ROOT}:{ROOT}/tests")
    assert finish(process).endswith("same\n")


# ---------------------------------------------------------------------------------------------------- changes

class OtherGate(ivme.SwiGLU):
    def gated_down(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up)


def other_gate(model):
    for block in model.blocks:
        block.ffn.__class__ = OtherGate


def parallel_blocks(model):
    class Parallel(ivme.Block):
        def forward(self, x, *rest):
            return x + self.attn(self.attn_norm(x), *rest) + self.ffn(self.ffn_norm(x))
    for block in model.blocks:
        block.__class__ = Parallel


def other_table(model):
    model.cos = model.cos * 0.9


def one_more_parameter(model):
    model.blocks[1].attn.gain = torch.nn.Parameter(torch.ones(3))


def other_bias(model):
    model.blocks[0].attn.out = torch.nn.Linear(64, 64)
