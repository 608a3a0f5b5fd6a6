"""Models of `transformers` as our checkpoints: GPT-2-, Llama- and Qwen3-shaped ones, and the i3 that export.py writes.

    GPT-2    gpt2preln.py, OpenAI's weights too
    Llama    ivme.py, if the output head is the embedding, as in many small models
    Qwen3    tinymemory.py, if the output head is the embedding, and no query heads share a key and value head
    i3       i3.py

What a file has no place for, such as a bias or a sliding window, is a UserError that names it.
"""
import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer

import gpt2preln
import i3
import ivme
import run
import runfolder
import tinymemory
from common import UserError
from corpus.tokenizer import END_OF_TEXT, bos_eos, vocabulary_size
from release import hub
from release.contents import read_json
from release.transformers_format import needed

MODULES = dict(gpt2=gpt2preln, llama=ivme, qwen3=tinymemory, i3=i3)  # model_type -> architecture file

# Architecture file -> the preset whose recipe trains a model that has the shape of no preset
PRESETS = dict(gpt2preln="gpt2preln-gpt2", ivme="ivme", tinymemory="tinymemory", i3="i3")


def import_model(source, out):
    """Writes a model, in a folder or of this name on the Hub, as the checkpoint `out`. Returns the checkpoint's dict.

    Raises UserError for what cannot be imported.
    """
    folder = find_folder(source)
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in MODULES:
        raise UserError(f"{source}: config.json says model_type {kind!r}; {', '.join(MODULES)} can be imported")
    module = MODULES[kind]
    cfg = shape(config, module, source)
    theirs = read_weights(folder, source)
    weights = our_weights(module, theirs, source)
    if module is gpt2preln:
        cfg.tied = "head.weight" not in weights
    check_sizes(module, cfg, weights, source)
    check_all_are_used(module, cfg, weights, theirs, source)

    preset = next((name for name, (own, _) in module.PRESETS.items() if own == cfg), PRESETS[module.__name__])
    settings = dict(model=preset, data="", tokenizer=str(out), out="", init_from=source, block_size=cfg.context_length,
                    optimizer="adamw")
    checkpoint = dict(
        format=run.FORMAT, step=0, tokens=0, model_name=preset, cfg=dataclasses.asdict(cfg), train=settings,
        model=weights, ema={}, use_ema=False, optimizer={}, rng=[],
        loader=dict(taken=[], per_epoch=[], fingerprint=[]), tokenizer=tokenizer_text(folder, config, cfg, source),
        metrics=dict(best=dict(loss=math.inf, step=0), elapsed=0.0))
    out.parent.mkdir(parents=True, exist_ok=True)
    runfolder.save_checkpoint(out, checkpoint)
    return checkpoint


# ---------------------------------------------------------------------------------------------------- the files

def find_folder(source):
    """The folder of a model: the one of this name, or a copy of what the Hub has. UserError if there is neither."""
    if Path(source).is_dir():
        if not (Path(source) / "config.json").exists():
            raise UserError(f"{source} holds no config.json; --import_from names a folder that transformers wrote")
        return Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"there is no folder {source}")
    return hub.fetch(source)


# Weights that files of old versions hold though they are constants: causal masks, rotary frequencies
CONSTANTS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def read_weights(folder, source):
    """All weights of a folder in fp32, under their names there. UserError if they are missing or damaged."""
    index = read_json(folder / "model.safetensors.index.json")  # of a large model
    state = {}
    try:
        files = [folder / name for name in sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]]
        if files[0].exists():
            load_file = needed("safetensors.torch").load_file
            for file in files:
                state |= load_file(file)
        else:
            state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        return {name: value.float() for name, value in state.items() if not CONSTANTS.search(name)}
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{source} has no weights: neither model.safetensors nor pytorch_model.bin") from None
    except Exception as e:  # both libraries raise many types for a damaged file
        raise UserError(f"the weights of {source} are damaged ({type(e).__name__})") from None


# ---------------------------------------------------------------------------------------------------- the shape

def shape(config, module, source):
    """The config of our architecture that a config.json describes. UserError for what it has no place for."""
    try:
        cfg = SHAPES[module](Demands(config, module, source))
    except KeyError as e:
        raise UserError(f"config.json of {source} says no {e.args[0]}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"config.json of {source} makes no sense: {e}") from None
    for field in dataclasses.fields(cfg):
        value, kind = getattr(cfg, field.name), type(field.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"config.json of {source} makes no sense: {field.name} would be {value!r}")
    return cfg


class Demands:
    """A config.json whose values an architecture file has a place for, or not."""

    def __init__(self, config, module, source):
        self.config, self.module, self.source = config, module, source

    def __getitem__(self, name):
        return self.config[name]

    def get(self, name, default=None):
        """The value, or the default if there is none or null."""
        value = self.config.get(name)
        return default if value is None else value

    def only(self, name, *values):
        """Raises UserError if `name` has a value that is none of these."""
        if self.get(name, values[0]) not in values:
            self.refuse(f"{name}={self[name]!r}")

    def refuse(self, what):
        raise UserError(f"{self.source} has {what}, and {self.module.__name__}.py has no place for that")


def gpt2_shape(config):
    config.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    config.only("n_inner", 4 * config["n_embd"])
    config.only("scale_attn_weights", True)
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("add_cross_attention", False)
    return gpt2preln.Config(
        vocab_size=config["vocab_size"], context_length=config["n_positions"], n_layer=config["n_layer"],
        d_model=config["n_embd"], n_head=config["n_head"], norm_eps=config.get("layer_norm_epsilon", 1e-5))


def llama_shape(config):
    n_kv_head = config.get("num_key_value_heads", config["num_attention_heads"])
    config.only("mlp_bias", False)
    return ivme.Config(n_kv_head=n_kv_head, **rope_shape(config))


def qwen3_shape(config):
    config.only("use_sliding_window", False)
    config.only("num_key_value_heads", config["num_attention_heads"])
    return tinymemory.Config(**rope_shape(config))


def rope_shape(config):
    """The sizes that Llama and Qwen3 have in common."""
    d_model, n_head = config["hidden_size"], config["num_attention_heads"]
    config.only("hidden_act", "silu")
    config.only("attention_bias", False)
    config.only("head_dim", d_model // n_head)
    config.only("partial_rotary_factor", 1)
    rope = config.get("rope_parameters") or config.get("rope_scaling", {})  # of version 5, of version 4
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
        config.refuse(f"rope scaling ({kind})")
    return dict(
        vocab_size=config["vocab_size"], context_length=config["max_position_embeddings"],
        n_layer=config["num_hidden_layers"], d_model=d_model, n_head=n_head, d_ff=config["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000))),
        norm_eps=config.get("rms_norm_eps", 1e-6))


def i3_shape(config):
    return i3.Config(**{field.name: config[field.name] for field in dataclasses.fields(i3.Config)})


SHAPES = {gpt2preln: gpt2_shape, ivme: llama_shape, tinymemory: qwen3_shape, i3: i3_shape}


# ---------------------------------------------------------------------------------------------------- the weights

def our_weights(module, theirs, source):
    """The weights under our names. UserError if one is missing."""
    if module is i3:
        return {name.removeprefix("model."): value for name, value in theirs.items()}
    try:
        return module.from_transformers(theirs)
    except (KeyError, ValueError, IndexError, RuntimeError) as e:
        raise UserError(f"the weights of {source} are not those of its config.json: {e}") from None


def check_sizes(module, cfg, ours, source):
    """Raises UserError unless these are the weights of our model, each of its size."""
    try:
        with torch.device("meta"):  # names and shapes, without memory
            model = run.make_model(module, cfg)
    except UserError as e:
        raise UserError(f"config.json of {source} makes no model: {e}") from None
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in ours.items()}
    for name in (*expected, *found):
        if expected.get(name) != found.get(name):
            raise UserError(f"the weights of {source} do not fit its config.json: {name} is "
                            f"{found.get(name, 'missing')}, and should be {expected.get(name, 'absent')}")


def check_all_are_used(module, cfg, ours, theirs, source):
    """Raises UserError for a weight that has no place in our model."""
    used = theirs if module is i3 else module.to_transformers(ours, cfg)
    for name, value in theirs.items():
        if name in used or f"transformer.{name}" in used:
            continue
        what = "an output head of its own" if name == "lm_head.weight" else f"the weight {name}"
        if name != "lm_head.weight" or not torch.equal(value, ours["embed.weight"]):
            raise UserError(f"{source} has {what}, and {module.__name__}.py has no place for that")


# ---------------------------------------------------------------------------------------------------- the tokenizer

def tokenizer_text(folder, config, cfg, source):
    """The text of tokenizer.json as our tools need it: the tokens that begin and end a document have our names."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{source} has no tokenizer.json; transformers writes one: "
                        "AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception for everything
        raise UserError(f"{path} is damaged: {e}") from None
    tokenizer.post_processor = None  # our tools put the tokens around a document themselves
    tokenizer.no_truncation()
    tokenizer.no_padding()

    has_ours = None not in (tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>"))
    if not has_ours and tokenizer.token_to_id(END_OF_TEXT) is None:
        bos, eos = (special_token(name, folder, config, tokenizer) for name in ("bos", "eos"))
        if eos is None:
            raise UserError(f"{source} names no token that ends a document (eos_token)")
        names = {eos: END_OF_TEXT} if bos in (None, eos) else {bos: "<|bos|>", eos: "<|eos|>"}
        tokenizer = renamed(tokenizer, names)
    bos_eos(tokenizer, str(path))
    if vocabulary_size(tokenizer) > cfg.vocab_size:
        raise UserError(f"the tokenizer of {source} has {vocabulary_size(tokenizer):,} tokens, "
                        f"its model {cfg.vocab_size:,}")
    return tokenizer.to_str(pretty=True)


def special_token(name, folder, config, tokenizer):
    """The token that begins (bos) or ends (eos) a document, by the tokenizer's files or config.json; or None."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(folder / file).get(f"{name}_token")
        if token:
            return token if isinstance(token, str) else token.get("content")
    i = config.get(f"{name}_token_id")
    if isinstance(i, list):
        i = i[0]
    return None if i is None else tokenizer.id_to_token(i)


def renamed(tokenizer, names):
    """The tokenizer with other names for some tokens, which keep their ids and are special from now on."""
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab = {names.get(token, token): i for token, i in vocab.items()}
    else:  # of a unigram model: [token, score] in the order of the ids
        vocab = [[names.get(token, token), score] for token, score in vocab]
    spec["model"]["vocab"] = vocab
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    return tokenizer
