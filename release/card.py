"""README.md of a release: a model card as the Hub shows it, filled from the run.

Every figure comes from a file: the checkpoint, config.json and metrics.jsonl of the run, meta.json of its data,
eval.json of its evaluation. What no file tells is left out.
"""
import json
import math
from datetime import timedelta

from release.contents import is_number
from report import perplexity

# Architecture file -> what it is, in a sentence and in a table
ABOUT = dict(
    ivme=("a Llama-like decoder, built like İvme-Conversate", "Decoder-only transformer"),
    tinymemory=("a small decoder with QK-norm, built like TinyMemoryLM", "Decoder-only transformer"),
    gpt2preln=("a GPT-2-style decoder with pre-layernorm blocks, built like 1gpu-llm", "GPT-2-style decoder"),
    i3=("a hybrid of RWKV's token shift and Mamba's selective state space, built like i3", "RWKV-Mamba hybrid"))

LANGUAGES = dict(en="English", it="Italian", tr="Turkish", de="German", fr="French", es="Spanish")

# Data set -> how the card calls it, if its name does not say it
DATA = {"pydocs": "Python's own standard library and help topics",
        "pydocs-chat": "questions and answers about Python's standard library"}


def model_card(release, files, seen=()):
    """The text of README.md. files: name -> what it is. seen: lines about the GGUF files from release/llama_cpp.py."""
    parts = [
        front_matter(release), f"# {release.name}", introduction(release), model_section(release),
        benchmarks_section(release), losses_section(release), training_section(release), tokenizer_section(release),
        decoding_section(release), usage_section(release), gguf_section(release, files, seen), files_section(files),
        limitations_section(release)]
    return "\n\n".join(filter(None, parts)) + "\n"


def section(title, *parts):
    """A section of the card; nothing if all of its parts are empty."""
    parts = list(filter(None, parts))
    return "\n\n".join([f"## {title}", *parts]) if parts else ""


def table(head, rows):
    """A Markdown table of the rows whose last cell is not empty; nothing if there are none."""
    rows = [row for row in rows if row[-1] not in ("", None)]
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def human(n):
    """1474560 -> '1.47M'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


# ---------------------------------------------------------------------------------------------------- what it is

def languages(release):
    """Codes of the languages that it was trained on, as far as its data and its evaluations tell them."""
    found = {source.language for source in release.sources}
    for row in release.rows:
        for losses in row.get("val_loss", {}).values():
            found |= set(losses.get("language", {}))
    return sorted(found - {"", "und"})


def spoken(codes):
    """['en', 'it'] -> 'English and Italian'."""
    *names, last = [LANGUAGES.get(code, code) for code in codes]
    return f"{', '.join(names)} and {last}" if names else last


def front_matter(release):
    """What the Hub reads. JSON is YAML, too."""
    fields = dict(
        language=languages(release), license=release.licence, library_name="transformers",
        pipeline_tag="text-generation", tags=["small-language-model", release.architecture],
        datasets=sorted({source.dataset for source in release.sources if source.is_on_the_hub}))
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"])


def goes_on(release):
    """Whether the training began with the weights of a model that was trained before."""
    return bool(release.settings.get("init_from")) and not release.settings.get("decay_only")


def introduction(release):
    text = f"A language model of {release.model.n_params:,} parameters: {ABOUT[release.architecture][0]}."
    codes, tokens = languages(release), release.checkpoint["tokens"]
    tongue = f" in {spoken(codes)}" if codes else ""
    if release.is_chat_model:
        what = "replies"
        if release.settings["loss_on"] != "responses":
            what = "chats"
        elif release.settings.get("replay"):
            what = "replies and of replayed text"
        return f"{text} It is fine-tuned on chats{tongue}, {human(tokens)} tokens of {what}: it answers messages."
    if tokens and goes_on(release):
        text += f" It goes on from {release.settings['init_from']}, with {human(tokens)} tokens of text{tongue}."
    elif tokens:
        text += f" It was trained on {human(tokens)} tokens of text{tongue}."
    return f"{text} It is a base model: it continues text, and was not taught to answer."


def model_section(release):
    cfg = release.cfg
    sizes = dict(ivme=rope_rows, tinymemory=rope_rows, gpt2preln=gpt2_rows, i3=i3_rows)[release.architecture](cfg)
    context = f"{cfg.context_length:,} tokens"
    if trained_rows(release) < cfg.context_length:
        context += f", trained on rows of {trained_rows(release):,}"
    weights = "those of the last step"
    if release.weights == "ema":
        weights = f"moving average over the training (EMA, β = {release.settings.get('ema_beta', 0):g})"
    return section("Model details", table(("Parameter", "Value"), [
        ("Architecture", ABOUT[release.architecture][1]), ("Parameters", f"{release.model.n_params:,}"), *sizes,
        ("Context length", context), ("Vocabulary", f"{cfg.vocab_size:,} tokens ({tokenizer_kind(release)})"),
        ("Weights", f"{weights}, in {release.dtype}")]))


def trained_rows(release):
    """Tokens in the longest row that the model was trained on; of a model that was not trained here, its context."""
    if not release.checkpoint["step"]:
        return release.cfg.context_length
    return release.settings.get("block_size", release.cfg.context_length)


def rope_rows(cfg):
    heads, normalization = f"{cfg.n_head}", "RMSNorm in front of each layer, and on queries and keys (QK-norm)"
    if hasattr(cfg, "n_kv_head"):
        heads, normalization = f"{cfg.n_head} query, {cfg.n_kv_head} key and value (GQA)", "RMSNorm (pre-norm)"
    return [("Layers", cfg.n_layer), ("Hidden dim", cfg.d_model), ("FFN dim", f"{cfg.d_ff:,} (SwiGLU)"),
            ("Attention heads", heads), ("Positional encoding", f"RoPE (θ = {cfg.rope_theta:,g})"),
            ("Normalization", normalization), ("Embeddings", "tied input and output"), ("Biases", "none")]


def gpt2_rows(cfg):
    embeddings = "tied input and output" if cfg.tied else "separate output head"
    return [("Layers", cfg.n_layer), ("Hidden dim", cfg.d_model), ("FFN dim", f"{4 * cfg.d_model:,} (GELU)"),
            ("Attention heads", cfg.n_head), ("Positional encoding", "learned"),
            ("Normalization", "LayerNorm (pre-norm)"), ("Embeddings", embeddings)]


def i3_rows(cfg):
    layers = f"{cfg.n_layer} hybrid"
    if cfg.n_attention:
        layers += f", then {cfg.n_attention} with attention"
    return [("Layers", layers), ("Hidden dim", cfg.d_model), ("Heads", cfg.n_head), ("State dim", cfg.d_state),
            ("Scan channels", f"{cfg.d_inner or cfg.d_model:,}"), ("FFN dim", f"{4 * cfg.d_model:,} (GELU)"),
            ("Rank of the FFN's maps", cfg.ffn_rank or ""), ("Positional encoding", "learned"),
            ("Normalization", "LayerNorm (pre-norm)")]


def tokenizer_kind(release):
    spec = json.loads(release.tokenizer.to_str())
    is_byte_level = '"ByteLevel"' in json.dumps(spec["pre_tokenizer"])
    if spec["model"]["type"] != "BPE":
        return spec["model"]["type"]
    if spec["model"]["merges"]:
        return "byte-level BPE" if is_byte_level else "BPE"
    return "bytes and frequent words" if is_byte_level else "chunks of two or three lowercase characters"


# ---------------------------------------------------------------------------------------------------- how good it is

def benchmarks_section(release):
    """The scores of eval.json, which stand with their protocol."""
    tasks, protocol = release.evaluation.get("tasks"), release.evaluation.get("protocol")
    rows = []
    for task, result in tasks.items() if isinstance(tasks, dict) else ():
        if not isinstance(result, dict) or not is_number(result.get("score")):
            continue
        score = f"{result['score']:.4g}"
        if is_number(result.get("stderr")):
            score += f" ± {result['stderr']:.2g}"
        rows.append((task, result.get("metric", ""), score))
    if not rows:
        return ""
    if isinstance(protocol, dict):
        protocol = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in protocol.items())
    return section("Benchmarks", table(("Benchmark", "Metric", "Score"), rows), protocol and f"Protocol: {protocol}.")


def losses_section(release):
    """The losses of the last evaluation of these weights."""
    measured = [row for row in release.rows if release.weights in row.get("val_loss", {})
                and row["step"] == release.checkpoint["step"]]
    if not measured:
        return ""
    row = measured[-1]
    loss, bits = row["val_loss"][release.weights], row["val_bits_per_byte"][release.weights]

    entries = [(name, loss["source"][name], bits["source"][name]) for name in loss["source"]]
    if len(loss["language"]) > 1:
        entries += [(LANGUAGES.get(code, code), loss["language"][code], bits["language"][code])
                    for code in loss["language"]]
    if len(loss["source"]) > 1:
        entries.append(("mixed: each source counts the same", loss["mixed"], bits["mixed"]))
    if "base" in loss:
        entries.append(("the text that it was pretrained on", loss["base"], bits["base"]))
    rows = [(name, f"{nats:.4f}", f"{perplexity(nats):,.2f}", f"{b:.3f}")
            for name, nats, b in entries if math.isfinite(nats)]

    text = "the replies in validation chats" if release.settings.get("loss_on") == "responses" else "validation text"
    notes = (f"Measured on {text}, no part of which was trained on, in rows of {trained_rows(release):,} tokens. "
             "Bits per byte compare models that have different tokenizers.")
    if row.get("xz_bits_per_byte"):
        notes += f" The compressor `xz -9` needs {row['xz_bits_per_byte']:.3f} bits per byte for the same text."
    accuracy = row.get("relevance_accuracy", {}).get(release.weights)
    if accuracy is not None:
        notes += f" {accuracy:.1%} of the replies are likelier behind their own prompt than behind another chat's."
    picture = "![Training and validation loss](loss.png)" if release.beside("loss.png").exists() else ""
    head = ("Text", "Loss (nats per token)", "Perplexity", "Bits per byte")
    return section("Validation losses", table(head, rows), notes, picture)


# ---------------------------------------------------------------------------------------------------- how it was made

def training_section(release):
    start = release.settings.get("init_from", "")
    if not release.checkpoint["step"]:
        return section("Training", start and f"The weights are those of {start}, as they were.")
    return section("Training", data_table(release), hyperparameters(release), hardware(release))


def data_table(release):
    """What the model has read. A column that no source fills is left out."""
    sources = release.sources
    total = sum(source.seen for source in sources)
    if not total:
        return ""
    columns = {"Source": source_name, "Language and kind": lambda s: "/".join(filter(None, (s.language, s.kind))),
               "Licence": lambda s: s.licence, "Revision": lambda s: s.revision and f"`{s.revision[:12]}`",
               "Epochs": lambda s: f"{s.seen / s.tokens:.2f}" if s.tokens else "",
               "Tokens read": lambda s: human(s.seen), "Share": lambda s: f"{s.seen / total:.0%}"}
    columns = {head: cell for head, cell in columns.items() if any(map(cell, sources))}
    rows = [[cell(source) for cell in columns.values()] for source in sources]

    order = ""
    if len(sources) > 1 and not release.settings.get("replay"):
        order = dict(sequential="The sources follow each other in this order.",
                     balanced="The sources are mixed in equal shares.",
                     random="The sources are mixed in proportion to their sizes.").get(release.settings.get("order"))
    return "\n\n".join(filter(None, (table(list(columns), rows), order)))


def source_name(source):
    name = DATA.get(source.dataset, source.dataset or source.name)
    if source.is_on_the_hub:
        name = f"[{name}](https://huggingface.co/datasets/{name})"
    return f"{name} ({source.part})" if source.part else name


# Row of the table -> (setting, its value where there is nothing to say, how its value is written)
SETTINGS = {
    "AdamW lr": ("lr", None, "{:g}"),
    "Warmup steps": ("warmup_steps", None, "{:,}"),
    "Weight decay": ("weight_decay", None, "{:g}"),
    "Gradient clipping": ("grad_clip", 0, "{:g}"),
    "Tokens per step": ("batch_tokens", None, "{:,}"),
    "Averaged weights (EMA)": ("ema_beta", 0, "β = min({:g}, (1 + step) / (10 + step))"),
    # the tricks of TinyMemoryLM's card
    "Word boost": ("word_boost", 1, "{:g} for tokens of more than one character"),
    "Response start": ("response_start_weight", 1, "{:g} for the first tokens of a reply"),
    "Pretrain replay": ("replay", 0, "{:.0%} of the rows"),
    "Context relevance": ("relevance", 0, "{:.0%} more rows, of replies behind wrong prompts"),
    "Seed": ("seed", None, "{}")}


def hyperparameters(release):
    """The settings of the training. One that the run did not record is left out."""
    s, checkpoint = release.settings, release.checkpoint
    optimizers = dict(muon="Muon for the blocks' matrices, AdamW for all else", adamw="AdamW")
    optimizer, schedule = s.get("optimizer"), s.get("schedule")
    rows = [("Started from", s.get("init_from")), ("Optimizer", optimizers.get(optimizer, optimizer))]
    if optimizer == "muon":
        rows.append(("Muon lr", f"{s['muon_lr']:g}"))
    rows.append(("LR schedule", dict(wsd="warm-up, stable, linear decay (WSD)").get(schedule, schedule)))
    decays = s.get("decay_steps") or s.get("decay_fraction")
    if schedule == "wsd" and decays:
        rows.append(("Decay", f"{decays:,} steps" if s.get("decay_steps") else f"{decays:.0%} of the steps"))
    if schedule == "cosine" or schedule == "wsd" and decays:
        rows.append(("Final lr", f"{s['final_lr_fraction']:.0%} of the peak"))
    for head, (name, nothing, form) in SETTINGS.items():
        if s.get(name, nothing) != nothing:
            rows.append((head, form.format(s[name])))

    steps = f"{checkpoint['step']:,}"
    if checkpoint["step"] != s.get("max_steps", checkpoint["step"]):
        steps += f" of {s['max_steps']:,}"
    rows += [("Total steps", steps), ("Tokens trained on", f"{checkpoint['tokens']:,}")]
    return table(("Setting", "Value"), rows)


def hardware(release):
    """Where it was trained, as config.json's `machine` has it, and how long it took."""
    s, machine = release.settings, release.record.get("machine", {})
    seconds = release.checkpoint["metrics"].get("elapsed") or 0
    speeds = sorted(row["tokens_per_s"] for row in release.rows if "tokens_per_s" in row)
    # all tokens that were computed, the padding and the rows of context relevance too
    computed = release.checkpoint["step"] * s.get("batch_tokens", 0) * (1 + s.get("relevance", 0))
    flop = computed * release.model.flops_per_token(trained_rows(release))
    return table(("Hardware and time", "Value"), [
        ("Hardware", machine.get("chip")), ("Processes", machine.get("processes")),
        ("Precision", machine.get("dtype")), ("PyTorch", machine.get("torch")),
        ("Training time", f"{timedelta(seconds=round(seconds))} (h:mm:ss)" if seconds else ""),
        ("Speed", f"{speeds[len(speeds) // 2]:,.0f} trained tokens per second" if speeds else ""),
        ("Computation", f"{flop:.2g} FLOP" if flop else "")])


# ---------------------------------------------------------------------------------------------------- how to use it

def tokenizer_section(release):
    added = sorted(release.tokenizer.get_added_tokens_decoder().items())
    special = ", ".join(f"`{token.content}`" for _, token in added if token.special)
    text = f"{release.tokenizer.get_vocab_size():,} tokens: {tokenizer_kind(release)}. Special tokens: {special}."
    frame = ""
    if release.has_roles:
        frame = ("The chat template writes `<|bos|>[<|system|>text]<|user|>text<|assistant|>text<|eos|><|user|>...`, "
                 "with nothing between the parts.")
    plain = (f"`tokenizer(text)` puts `{release.tokenizer.id_to_token(release.bos)}` first, as every document of the "
             "training had it. Text that merely spells a special token stays text with `split_special_tokens=True` "
             "and, in a chat, with `sanitize_control_tokens=True` where transformers has it.")
    return section("Tokenizer", text, frame, plain)


def decoding_section(release):
    rows = [(name, f"`{json.dumps(value)}`") for name, value in release.decoding.items()]
    note = "The evaluation found these, and `generate()` takes them from generation_config.json by itself."
    return section("Recommended decoding", table(("Parameter", "Value"), rows), rows and note)


def usage_section(release):
    prompt = json.dumps(release.settings.get("sample_prompt") or "The", ensure_ascii=False)
    trust, note = "", ""
    if release.architecture == "i3":
        trust = ", trust_remote_code=True"
        note = ("transformers has no i3, so this folder carries the model's code. It computes the selective scan in "
                "plain PyTorch; the repository that trained it has faster kernels.")
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'path = "."  # this folder, or its name on the Hub',
        f"tokenizer = AutoTokenizer.from_pretrained(path{trust})",
        f"model = AutoModelForCausalLM.from_pretrained(path{trust})", ""]

    if release.is_chat_model:
        lines += [f'messages = [dict(role="user", content={prompt})]',
                  "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,",
                  '                                       return_tensors="pt")']
        shown = 'out[0][inputs["input_ids"].shape[1]:]'
    else:
        lines.append(f'inputs = tokenizer({prompt}, return_tensors="pt")')
        shown = "out[0]"
    settings = ["**inputs"]
    if "max_new_tokens" not in release.decoding:
        settings.append("max_new_tokens=64")
    if not release.decoding:
        settings += ["do_sample=True", "temperature=0.8"]
    lines += [f"out = model.generate({', '.join(settings)})",
              f"print(tokenizer.decode({shown}, skip_special_tokens=True))"]
    return section("Usage", "\n".join(["```python", *lines, "```"]), note)


def gguf_section(release, files, seen):
    names = [name for name in files if name.endswith(".gguf")]
    if not names:
        return ""
    own = release.name.lower()
    commands = ["```", f"llama-cli -m {names[0]}", f"ollama create {own} -f Modelfile && ollama run {own}", "```"]
    if release.decoding.get("no_repeat_ngram_size"):
        commands.append("\nThe recommended way to sample forbids repeated n-grams, which llama.cpp cannot do, so these "
                        "files bring no settings of it.")
    compared = "\n".join(["Compared with the model in PyTorch:", "", *(f"- {line}" for line in seen)]) if seen else ""
    return section("llama.cpp and ollama", "\n".join(commands), compared)


def files_section(files):
    return section("Files", table(("File", "Description"), list(files.items())))


def limitations_section(release):
    """What follows from the size, the data and the tokenizer."""
    cfg, codes, tokens = release.cfg, languages(release), release.checkpoint["tokens"]
    lines = ["Base model only: it is not instruction-tuned, and does not follow instructions."]
    if release.is_chat_model:
        lines = ["It answers in the manner of the chats that it was fine-tuned on, whatever it is asked."]
    size = f"{human(release.model.n_params)} parameters"
    if tokens and not release.is_chat_model and not goes_on(release):
        size += f" and {human(tokens)} training tokens"
    lines.append(f"{size} hold few facts: it invents others. It repeats itself, most of all without sampling.")
    if codes and not goes_on(release):
        lines.append(f"It was trained on {spoken(codes)} only.")
    if trained_rows(release) < cfg.context_length:
        lines.append(f"It was trained on no more than {trained_rows(release):,} tokens at a time, though its context "
                     f"holds {cfg.context_length:,}.")
    else:
        lines.append(f"Its context holds {cfg.context_length:,} tokens.")
    if tokenizer_kind(release).startswith("chunks"):
        lines.append("Its tokenizer lowercases all text, and loses characters that are not in its vocabulary.")
    return section("Limitations", "\n".join(f"- {line}" for line in lines))
