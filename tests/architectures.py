"""The table of all architectures in small, with models of theirs whose every part counts."""
import dataclasses
import sys
import types

import torch

import gpt2preln
import i3
import ivme
import tinymemory


def llama_or_qwen3(model):
    """The `transformers` model of the same weights: Qwen3 if queries and keys have norms, else Llama."""
    import transformers
    c, qwen3 = model.cfg, hasattr(model.blocks[0].attn, "q_norm")
    n_kv_head, head_dim = getattr(c, "n_kv_head", c.n_head), c.d_model // c.n_head
    config = (transformers.Qwen3Config if qwen3 else transformers.LlamaConfig)(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=n_kv_head, head_dim=head_dim,
        max_position_embeddings=c.context_length, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=True, attention_bias=False, attn_implementation="sdpa")
    reference = (transformers.Qwen3ForCausalLM if qwen3 else transformers.LlamaForCausalLM)(config)
    return with_weights(reference, model)


def gpt2(model):
    """GPT2LMHeadModel of the same weights."""
    import transformers
    c = model.cfg
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head,
        layer_norm_epsilon=c.norm_eps, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=c.tied,
        attn_implementation="sdpa"))
    return with_weights(reference, model)


def with_weights(reference, model):
    """The `transformers` model with the weights of ours. Only a head that is the embedding again may be left out."""
    weights = sys.modules[type(model).__module__].to_transformers(model.state_dict(), model.cfg)
    missing, unknown = reference.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if reference.config.tie_word_embeddings else []
    assert (missing, unknown) == (tied, [])
    return reference.eval()


@dataclasses.dataclass
class Architecture:
    module: types.ModuleType
    params: dict  # preset -> exact number of parameters
    tiny: dict  # overrides of the default config: small, and no two sizes equal
    broken: list  # overrides of the tiny config that the model must refuse
    reference: object = None  # model -> callable whose .logits are the truth, where one is published
    imports: tuple = ()  # what the file may import beside torch and the standard library
    into_residual: tuple = ("out.weight", "down.weight")  # ends of the names of matrices that start smaller
    scale_keeping: tuple = ("nothing",)  # of those that start at 1 / sqrt(columns)
    # end of a vector's name -> its initial value if that is not 1; None: another test is about it
    constants: dict = dataclasses.field(default_factory=dict)
    # overrides of a preset for tests that need its widths, but would take long at its depth
    cut: dict = dataclasses.field(default_factory=dict)


I3 = dict(imports=("kernels",), into_residual=("out.weight", "outer.weight", "ffn.down.weight", "ffn.down.1.weight"),
          scale_keeping=(".0.weight", "head_down.weight"),
          constants={"mix": None, "bias": 0.0, "A_log": None, "delta_up.bias": None})
ARCHITECTURES = {
    "ivme": Architecture(
        ivme, {"ivme": 22_028_160},
        dict(vocab_size=61, context_length=32, n_layer=2, d_model=48, n_head=6, n_kv_head=2, d_ff=80, rope_theta=500.0,
             norm_eps=1e-3),
        [dict(n_head=7), dict(n_kv_head=4), dict(d_model=54)], llama_or_qwen3),
    "tinymemory": Architecture(
        tinymemory, {"tinymemory": 1_692_000},
        dict(vocab_size=61, context_length=32, n_layer=2, d_model=48, n_head=4, d_ff=80, rope_theta=500.0,
             norm_eps=1e-3),
        [dict(n_head=7), dict(d_model=36)], llama_or_qwen3),
    "i3": Architecture(  # hybrid blocks only
        i3, {"i3": 22_640_626},
        dict(vocab_size=61, context_length=32, n_layer=2, d_model=48, n_head=4, d_state=5, delta_rank=6, ffn_rank=20,
             head_rank=28, norm_eps=1e-3),
        [dict(n_head=7), dict(d_inner=50), dict(n_layer=0)], **I3),
    "i3-attention": Architecture(  # maps around the scan, dense feed-forward, attention blocks on top
        i3, {"i3-80m": 82_802_280, "i3-200m": 169_740_736},
        dict(vocab_size=61, context_length=32, n_layer=2, n_attention=1, d_model=48, n_head=4, d_state=5, d_inner=56,
             delta_rank=6, ffn_rank=0, head_rank=0, norm_eps=1e-3),
        [dict(n_head=7), dict(d_inner=50)], **I3),
    "gpt2preln": Architecture(
        gpt2preln, {"gpt2preln": 136_128_000},
        dict(vocab_size=61, context_length=32, n_layer=2, d_model=48, n_head=4, norm_eps=1e-3),
        [dict(n_head=7)], gpt2, constants={"bias": 0.0}, cut=dict(n_layer=2)),
    "gpt2preln-tied": Architecture(
        gpt2preln, {"gpt2preln-medium": 337_639_424, "gpt2preln-gpt2": 124_439_808},
        dict(vocab_size=61, context_length=32, n_layer=2, d_model=48, n_head=4, tied=True, norm_eps=1e-3),
        [dict(n_head=7)], gpt2, constants={"bias": 0.0}, cut=dict(n_layer=2)),
}


def role_of(model, name):
    """The role of the parameter of this name; exactly one fits."""
    (role,) = [role for end, (role, _) in model.roles().items() if name.endswith(end)]
    return role


def randomised(model, seed=0):
    """Every part counts: maps that keep the scale, embeddings of 0.1, other vectors and norms in 0.5 .. 1.5."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            role = role_of(model, name)
            if name.endswith(("A_log", "delta_up.bias")):
                continue  # a scan forgets at once unless these are as it needs them
            if name.endswith("bias"):
                p.uniform_(-0.1, 0.1, generator=g)
            elif role == "vector":
                p.uniform_(0.5, 1.5, generator=g)
            else:
                p.normal_(std=0.1 if role == "embedding" else p.size(-1) ** -0.5, generator=g)
    return model


def tiny(name, **overrides):
    arch = ARCHITECTURES[name]
    torch.manual_seed(6)  # for what randomised leaves as it is
    return randomised(arch.module.Model(arch.module.Config(**{**arch.tiny, **overrides})))
