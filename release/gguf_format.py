"""GGUF, the file that llama.cpp and ollama load, and ollama's Modelfile.

llama.cpp has Llama, Qwen3 and GPT-2, so that ivme, tinymemory and gpt2preln fit; it has no i3. Its byte-level BPE needs
merges, which the hybrid and the chunk tokenizer do not have.
"""
import dataclasses
import json

import numpy as np

from common import UserError
from corpus.tokenizer import is_gpt2s_kind
from release.transformers_format import CHAT_TEMPLATE, needed, weights_in_transformers

# Type of the matrices -> the number that llama.cpp has for such a file. Vectors are F32 in all of them
TYPES = dict(F32=0, F16=1, BF16=32, Q8_0=7)

# Architecture file -> its name in llama.cpp
ARCHITECTURES = dict(ivme="llama", tinymemory="qwen3", gpt2preln="gpt2")


def check(release, types):
    """Raises UserError if the model or its tokenizer has no place in a GGUF file, or if a type is none of TYPES."""
    for name in types:
        if name not in TYPES:
            raise UserError(f"--gguf_type={name} is not one of {', '.join(TYPES)}")
    if release.architecture not in ARCHITECTURES:
        raise UserError(f"llama.cpp has no {release.architecture}: --gguf is for {', '.join(ARCHITECTURES)}")
    if not is_gpt2s_kind(json.loads(release.tokenizer.to_str())):
        raise UserError("llama.cpp would cut the text into other tokens than this checkpoint's tokenizer: --gguf needs "
                        "a byte-level BPE with GPT-2's words, as --tokenizer=bpe and gpt2 are")
    needed("gguf")


def file_name(release, kind):
    return f"{release.name}-{kind}.gguf"


def write_gguf(path, release, kind):
    """Writes the model to a GGUF file. kind: the type of its matrices, one of TYPES."""
    import gguf
    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[release.architecture])
    writer.add_name(release.name)
    if release.licence:
        writer.add_license(release.licence)
    writer.add_file_type(TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, release)
    add_tokenizer(writer, release)
    if decoding_of(release):
        add_decoding(writer, decoding_of(release))
    add_tensors(writer, release, gguf.GGMLQuantizationType[kind])

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------------------------- what is in it

def add_sizes(writer, release):
    cfg = release.cfg
    head_dim = cfg.d_model // cfg.n_head
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.context_length)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layer)
    writer.add_head_count(cfg.n_head)
    if release.architecture == "gpt2preln":
        writer.add_feed_forward_length(4 * cfg.d_model)
        writer.add_layer_norm_eps(cfg.norm_eps)
        return
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count_kv(getattr(cfg, "n_kv_head", cfg.n_head))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_rope_dimension_count(head_dim)


def add_tokenizer(writer, release):
    import gguf
    tokenizer = release.tokenizer
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for i in range(release.cfg.vocab_size):
        token, kind = tokenizer.id_to_token(i), gguf.TokenType.NORMAL
        if token is None:  # the model has more ids than the tokenizer, and each one needs a name
            token, kind = f"<|unused_{i}|>", gguf.TokenType.UNUSED
        elif i in added:
            kind = gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED
        tokens.append(token)
        types.append(kind)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(release.bos)
    writer.add_eos_token_id(release.eos)
    writer.add_pad_token_id(release.pad)
    writer.add_add_bos_token(True)
    if release.has_roles:
        writer.add_chat_template(CHAT_TEMPLATE)


def decoding_of(release):
    """The recommended decoding settings, unless llama.cpp lacks the rule that makes them good."""
    return {} if release.decoding.get("no_repeat_ngram_size") else release.decoding


def add_decoding(writer, decoding):
    """The recommended decoding settings, which llama.cpp then takes where the user says nothing."""
    writer.add_sampling_sequence("penalties;temperature;top_k;top_p;min_p")  # sample.py's order, not llama.cpp's own
    writer.add_sampling_temp(temperature(decoding))
    writer.add_sampling_top_k(decoding.get("top_k", 0))
    writer.add_sampling_top_p(decoding.get("top_p", 1.0))
    writer.add_sampling_min_p(decoding.get("min_p", 0.0))
    writer.add_sampling_penalty_repeat(decoding.get("repetition_penalty", 1.0))
    writer.add_sampling_penalty_last_n(-1)  # all tokens so far count, as in sample.py


def temperature(decoding):
    """The temperature, which is 0 where nothing is drawn."""
    return decoding.get("temperature", 1.0) if decoding.get("do_sample", True) else 0.0


def add_tensors(writer, release, kind):
    import gguf
    cfg = release.cfg
    architecture = ARCHITECTURES[release.architecture]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], cfg.n_layer)
    in_fp32 = dataclasses.replace(release, dtype="float32")  # whatever type the other weights are released in
    for name, tensor in weights_in_transformers(in_fp32).items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T  # only `transformers` keeps GPT-2's maps transposed
        if architecture == "llama" and name.endswith("q_proj.weight"):
            tensor = neighbouring_pairs(tensor, cfg.n_head)
        if architecture == "llama" and name.endswith("k_proj.weight"):
            tensor = neighbouring_pairs(tensor, cfg.n_kv_head)
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        data, data_type = converted(np.ascontiguousarray(tensor.numpy()), own, kind)
        writer.add_tensor(own, data, raw_dtype=data_type)


def neighbouring_pairs(weight, n_head):
    """The rows of a map (heads D, d) to queries or keys in the order that llama.cpp wants of a Llama.

    Our rotary positions rotate row i of a head with row i + D/2, llama.cpp's rotate neighbours. In a Qwen3 it does
    as we do.
    """
    return weight.view(n_head, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def converted(data, name, kind):
    """(numbers, their type) of a tensor: of a matrix `kind`, or F16 if its rows do not divide into blocks of `kind`."""
    import gguf
    if data.ndim == 1 or name.startswith("position_embd"):  # llama.cpp adds these as they are
        kind = gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if data.shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F16
    return gguf.quants.quantize(data, kind), kind


# ---------------------------------------------------------------------------------------------------- ollama

# A chat in the language of Go's templates. The GGUF file says that <|bos|> comes first
OLLAMA_CHAT = """\
{{- range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}
{{- else if eq .Role "user" }}<|user|>{{ .Content }}
{{- else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|eos|>
{{- end }}{{ end }}<|assistant|>"""


def modelfile(release, gguf_name):
    """ollama's Modelfile, for `ollama create NAME -f Modelfile` in the folder."""
    template, stops = "{{ .Prompt }}", [release.tokenizer.id_to_token(release.eos)]
    if release.is_chat_model and release.has_roles:
        template = OLLAMA_CHAT
        stops.append("<|user|>")
    parameters = dict(num_ctx=release.cfg.context_length)
    decoding = decoding_of(release)
    if decoding:
        parameters["temperature"] = temperature(decoding)
        theirs = dict(top_k="top_k", top_p="top_p", min_p="min_p", repetition_penalty="repeat_penalty")
        parameters |= {theirs[name]: decoding[name] for name in theirs if name in decoding}
        parameters["repeat_last_n"] = -1

    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value:g}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"
