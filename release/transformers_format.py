"""The files from which `transformers`, version 4 or 5, loads a model without this repository.

ivme becomes a Llama, tinymemory a Qwen3, gpt2preln a GPT-2. i3 has no counterpart there, so that its folder carries its
own code: it is made from i3.py, kernels/reference.py and the files of release/i3_code.

    config.json, generation_config.json                               the model
    model.safetensors or pytorch_model.bin                            its weights
    tokenizer.json, tokenizer_config.json, special_tokens_map.json    the tokenizer
    chat_template.jinja                                               how a chat becomes text
"""
import importlib
import inspect
import json
import re
from pathlib import Path

from tokenizers import Tokenizer, processors

import runfolder
from common import UserError
from corpus.chats import ROLES
from corpus.tokenizer import no_dropout

ROOT = Path(__file__).resolve().parent.parent  # the repository

# The frame of corpus/chats.py: <|bos|>[<|system|>text]<|user|>text<|assistant|>text<|eos|><|user|>... Messages of one
# role that follow each other are one message, with an empty line between them, as there; a blank system message, and a
# blank reply behind another one, are left out. Each tag has a - on both sides, so that the line ends of the template
# are no part of a chat.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set turn = namespace(role='', has_text=false) -%}
{%- for message in messages -%}
  {%- set goes_on = message['role'] == turn.role -%}
  {%- set is_last = loop.last or messages[loop.index0 + 1]['role'] != message['role'] -%}
  {%- set is_blank = not message['content'] | trim -%}
  {%- if not (is_blank and (message['role'] == 'system' or (message['role'] == 'assistant' and goes_on))) -%}
    {%- if goes_on and turn.has_text and message['content'] -%}{{- '\\n\\n' -}}
    {%- elif goes_on -%}
    {%- elif message['role'] == 'system' -%}{{- '<|system|>' -}}
    {%- elif message['role'] == 'user' -%}{{- '<|user|>' -}}
    {%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}
    {%- else -%}{{- raise_exception('a role other than system, user and assistant: ' + message['role']) -}}
    {%- endif -%}
    {{- message['content'] -}}
    {%- set turn.has_text = (goes_on and turn.has_text) or message['content'] != '' -%}
    {%- set turn.role = message['role'] -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' and is_last -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def write_folder(folder, release, as_bin=False):
    """Writes all the files named above into a folder. as_bin: the weights as pytorch_model.bin."""
    write_json(folder / "config.json", model_config(release))
    write_json(folder / "generation_config.json", generation_config(release))
    write_weights(folder, release, as_bin)
    write_tokenizer(folder, release)
    if release.architecture == "i3":
        write_i3_code(folder, type(release.cfg))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def needed(module):
    """A module of a package that only releases need. UserError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = (e.name or module).partition(".")[0]
        raise UserError(f"this needs the package {package}: pip install -r requirements-dev.txt") from None


# ---------------------------------------------------------------------------------------------------- the model

def model_config(release):
    """config.json. UserError if `transformers` has no model for this architecture."""
    if release.architecture not in CONFIGS:
        raise UserError(f"{release.architecture}.py is not one of {', '.join(CONFIGS)}, "
                        "and transformers has no model for it")
    config = CONFIGS[release.architecture](release.cfg)
    config |= dict(
        vocab_size=release.cfg.vocab_size, use_cache=True,
        bos_token_id=release.bos, eos_token_id=release.eos, pad_token_id=release.pad,
        torch_dtype=release.dtype,  # version 4
        dtype=release.dtype)  # version 5
    return config


def llama_config(cfg):
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama")
    return config | rope_config(cfg) | dict(num_key_value_heads=cfg.n_kv_head, mlp_bias=False)


def qwen3_config(cfg):
    config = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    return config | rope_config(cfg) | dict(
        num_key_value_heads=cfg.n_head, use_sliding_window=False, sliding_window=None, max_window_layers=cfg.n_layer)


def rope_config(cfg):
    """What the configurations of Llama and Qwen3 have in common."""
    return dict(
        hidden_size=cfg.d_model, intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head, head_dim=cfg.d_model // cfg.n_head, hidden_act="silu",
        max_position_embeddings=cfg.context_length, rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rope_theta, rope_scaling=None,  # version 4
        rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_theta),  # version 5
        attention_bias=False, attention_dropout=0.0, initializer_range=0.02, tie_word_embeddings=True)


def gpt2_config(cfg):
    return dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2",
        n_positions=cfg.context_length, n_ctx=cfg.context_length,  # n_ctx: for llama.cpp's converter
        n_embd=cfg.d_model, n_layer=cfg.n_layer, n_head=cfg.n_head, n_inner=None,
        activation_function="gelu_new",  # the GELU with tanh
        layer_norm_epsilon=cfg.norm_eps, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.02, scale_attn_weights=True, tie_word_embeddings=cfg.tied)


def i3_config(cfg):
    auto_map = dict(AutoConfig="configuration_i3.I3HubConfig", AutoModelForCausalLM="modeling_i3.I3ForCausalLM")
    config = dict(architectures=["I3ForCausalLM"], model_type="i3", auto_map=auto_map, tie_word_embeddings=False)
    return config | vars(cfg)


CONFIGS = dict(ivme=llama_config, tinymemory=qwen3_config, gpt2preln=gpt2_config, i3=i3_config)


def generation_config(release):
    """generation_config.json: the ids that generation needs, and the decoding that the evaluation recommends."""
    config = dict(bos_token_id=release.bos, eos_token_id=release.eos, pad_token_id=release.pad) | release.decoding
    if config.get("do_sample"):
        config.setdefault("top_k", 0)  # else version 4 takes 50
    else:  # nothing is drawn, and `transformers` complains of settings that say how
        for name in ("temperature", "top_k", "top_p", "min_p"):
            config.pop(name, None)
    return config


def weights_in_transformers(release):
    """The released weights under the names that `transformers` knows, each in memory of its own."""
    if release.architecture == "i3":
        theirs = {f"model.{name}": value for name, value in release.state.items()}
    else:
        theirs = release.module.to_transformers(release.state, release.cfg)
    return {name: value.contiguous().clone() for name, value in theirs.items()}


def write_weights(folder, release, as_bin):
    theirs = weights_in_transformers(release)
    if as_bin:
        runfolder.save_checkpoint(folder / "pytorch_model.bin", theirs)
        return
    # the package's own writer would hide what the system says of a full disk
    contents = needed("safetensors.torch").save(theirs, metadata=dict(format="pt"))
    (folder / "model.safetensors").write_bytes(contents)


# ---------------------------------------------------------------------------------------------------- the tokenizer

def write_tokenizer(folder, release):
    text = tokenizer_with_bos(release.checkpoint["tokenizer"], release.bos)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = tokenizer_config(release)
    write_json(folder / "tokenizer_config.json", config)
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    write_json(folder / "special_tokens_map.json", {name: config[name] for name in names if name in config})
    if release.has_roles:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def tokenizer_with_bos(text, bos):
    """The text of a tokenizer.json that puts the token `bos` first: so every document began in training."""
    tokenizer = Tokenizer.from_str(text)
    no_dropout(tokenizer)
    token = tokenizer.id_to_token(bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, bos)])
    return tokenizer.to_str(pretty=True)


def tokenizer_config(release):
    """tokenizer_config.json. Rows of a batch are padded on the left, so that generation goes on at their ends."""
    tokenizer = release.tokenizer
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=release.cfg.context_length, padding_side="left",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
        bos_token=tokenizer.id_to_token(release.bos), eos_token=tokenizer.id_to_token(release.eos),
        pad_token=tokenizer.id_to_token(release.pad))
    if tokenizer.token_to_id("<|unk|>") is not None:
        config["unk_token"] = "<|unk|>"
    if release.has_roles:
        config["additional_special_tokens"] = [f"<|{role}|>" for role in ROLES]
        config["chat_template"] = CHAT_TEMPLATE

    config["added_tokens_decoder"] = {}
    for i, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        config["added_tokens_decoder"][str(i)] = {name: getattr(token, name) for name in names}
    return config


# ---------------------------------------------------------------------------------------------------- i3's own code

I3_CODE = ("configuration_i3.py", "modeling_i3.py")

# Import in the code -> the file whose text takes its place. Version 4 of `transformers` does not find what an imported
# file imports, so that each of the two files has to be whole by itself.
IN_PLACE_OF = {
    r"^from \.i3 import Config, I3\n": "i3.py",
    r"^from kernels import .+\n": "release/i3_code/selective_scan.py",
    r"^from \.reference import .+\n": "kernels/reference.py",
}


def write_i3_code(folder, I3Config):
    """The code that loads an i3. I3Config: the class of i3.py."""
    for name in I3_CODE:
        text = whole(ROOT / "release/i3_code" / name)
        text = text.replace("from .i3 import I3Config\n", f"\n{inspect.getsource(I3Config)}")
        (folder / name).write_text(text, encoding="utf-8")


def whole(path):
    """The text of a source file, with other files' texts in place of the lines that import them, see IN_PLACE_OF."""
    text = path.read_text(encoding="utf-8")
    for line, other in IN_PLACE_OF.items():
        begin, end = (f"\n# {'-' * 90} {name}\n\n" for name in (other, path.name))
        text = re.sub(line, lambda _: begin + whole(ROOT / other) + end, text, flags=re.M)
    return text
