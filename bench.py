"""What training, preparing and decoding cost on this machine: `python bench.py memory --model=gpt2preln`, or `prepare`,
`train`, `sample`, `decode`, `step`, `eval`, `gpu` in place of `memory`.

memory   The peak of a training step as train.py makes it with --compile=off: two micro-batches, clipping, AdamW or
         Muon, EMA. Each size runs in a process of its own. "tensors" is the size of all tensors that are alive at once,
         counted operation by operation, on CUDA the allocator's own maximum. "process" is the largest resident size
         that the system saw; on a CPU it includes the interpreter, torch, and what malloc keeps for itself. The size of
         the recipe is extrapolated from the two largest sizes if it was not run.

prepare  The speed of prepare.py on --megabytes of text with a BPE that exists already: reading and cleaning alone,
         encoding alone, and all of it. The text is this Python's library over and over, cut into documents at other
         places each time, so that no document occurs twice.

train    Tokens that ours trains on in a second, and its peers: see peers.py.

sample   Tokens that sample.py draws in a second: an ivme with random weights, in each type, one sequence and eight at
         once, early and late in the context. Beside it Hugging Face's `generate` with its cache, of the same weights in
         LlamaForCausalLM, and the bound that reading every weight once a token sets.

decode   A token of i3 at position 10 and at position 10,000: time, and memory of its state.

step     Where the time of a training step of i3-22m, i3-80m and i3-200m goes.

eval     Sentences that evaluation/harness.py scores in a second, and lm-evaluation-harness's own model `hf`: an ivme
         with random weights, and the same weights in LlamaForCausalLM, each in the types that the machine has, hf with
         several batch sizes. Then all of a benchmark like BLiMP, from its files to the score, each in its best way.

gpu      All that a GPU is to show, in one table: see gpu_suite.py.

The selective scan alone is measured by kernels/bench.py.
"""
import contextlib
import copy
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import gpu_suite
import i3
import ivme
import machine
import peers
import prepare
import run
import sample
import train
from common import Progress, UserError, columns, parse_flags, run_tool
from corpus.pydocs import library, library_texts
from corpus.text import Seen, clean, local_source
from corpus.tokenizer import fast_encoder, load_tokenizer, train_bpe
from evaluation import harness
from kernels.bench import least, wait
from memory import first_step, peak_of_tensors, training_step
from release import transformers_format


@dataclass
class Settings:
    model: str = "gpt2preln"  # memory: preset to measure
    micro_batch: str = "1,2"  # memory: rows at once to run, such as 1,2
    block_size: int = 0  # memory: tokens in a row; 0: the recipe's
    grad_checkpoint: bool | None = None  # memory: unset: without and with
    optimizer: str = ""  # memory: muon or adamw; empty: the recipe's
    sizes: str = "4x256,2x1024"  # train: rows and tokens of a step
    turns: int = 2  # train: processes for each contender
    nanogpt: str = ""  # train: folder of nanoGPT, which then takes part
    tokens: int = 256  # sample: tokens to draw
    megabytes: int = 200  # prepare: text to prepare
    pairs: int = 500  # eval: pairs of sentences to score
    tasks_dir: str = ""  # eval: folder in which blimp/*.jsonl has the pairs; empty: sentences of Python's library
    device: str = "auto"  # cpu, cuda, cuda:1
    dtype: str = "auto"  # memory, train, step, eval, gpu: bfloat16, float32


# ---------------------------------------------------------------------------------------------------- memory

def plan_of(s):
    """The preset's plan, with what the flags change, as train.py makes it; and the Device. Errors are train.py's."""
    flags = [f"--model={s.model}", f"--dtype={s.dtype}", f"--device={s.device}", "--overwrite"]
    flags += ["--data=none"]  # it is not looked for
    if s.optimizer:
        flags.append(f"--optimizer={s.optimizer}")
    if s.block_size:
        flags += [f"--block_size={s.block_size}", f"--batch_tokens={s.block_size}"]
    plan = run.plan_run(flags, train.Settings, train.choices(), train.default_out, "")
    return plan, machine.pick_device(s.device, s.dtype)


def measure_memory(s, rows, grad_checkpoint, results):
    """In a process of its own: puts (bytes of tensors, largest resident size) into the queue."""
    plan, on = plan_of(s)
    torch.manual_seed(0)
    model = plan.module.Model(plan.cfg).to(on.device)
    if grad_checkpoint:
        machine.checkpoint_blocks(model)
    tensors = peak_of_tensors(model, plan.settings, on, plan.settings.block_size, rows)
    import resource  # Windows has none
    unit = 1 if sys.platform == "darwin" else 1024
    results.put((tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))


def memory_of(s, rows, grad_checkpoint):
    """(bytes of tensors, largest resident size) of a step with this many rows at once."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=measure_memory, args=(s, rows, grad_checkpoint, results))
    child.start()
    child.join()
    if child.exitcode:
        raise UserError(f"measuring {rows} rows ended with status {child.exitcode} (too little memory?)")
    return results.get()


def extrapolated(measured, rows):
    """What `rows` rows take, on a line through the two largest sizes in measured, rows -> (tensors, process)."""
    (a, low), (b, high) = sorted(measured.items())[-2:]
    return tuple(y + (y - x) / (b - a) * (rows - b) for x, y in zip(low, high))


def memory(s):
    plan, on = plan_of(s)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", s.micro_batch):
        raise UserError(f"--micro_batch={s.micro_batch} is not a list of numbers such as 1,2")
    sizes = sorted({int(size) for size in s.micro_batch.split(",")})
    recipe = plan.settings
    average = ", EMA" if recipe.ema_beta else ""
    print(f"{s.model}, rows of {recipe.block_size:,} tokens, {str(on.dtype)[6:]} on {on.device.type}, "
          f"{recipe.optimizer}{average}, {recipe.pack} packing", flush=True)

    progress = Progress()
    lines = [("rows", "checkpointed", "tensors", "process", "")]
    for grad_checkpoint in (False, True) if s.grad_checkpoint is None else (s.grad_checkpoint,):
        checkpointed = "yes" if grad_checkpoint else "no"
        measured = {}
        for rows in sizes:
            progress.show(f"running {rows} rows, checkpointed: {checkpointed}")
            measured[rows] = memory_of(s, rows, grad_checkpoint)
        found = [(rows, measured[rows], "") for rows in sizes]
        if recipe.micro_batch not in sizes and len(sizes) > 1:
            found.append((recipe.micro_batch, extrapolated(measured, recipe.micro_batch), "(extrapolated)"))
        for rows, (tensors, process), remark in found:
            lines.append((f"{rows:4}", checkpointed, f"{tensors / 1e9:8.3f} GB", f"{process / 1e9:8.3f} GB", remark))
    progress.done("\n".join(columns(lines)))


# ---------------------------------------------------------------------------------------------------- preparing

def library_documents(size, length=4000):
    """Documents of `length` characters, `size` bytes in all: the library's text as one string, which is cut at other
    places in every round."""
    text = "".join(source for _, source in library_texts(library()))
    made, start = 0, 0
    while made < size:
        for i in range(start, len(text) - length, length):
            made += length  # nearly all of it is ASCII
            yield text[i:i + length]
            if made >= size:
                return
        start += 37


def timed(function, *args):
    """(what the function returns, seconds that it took)."""
    begun = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - begun


def read_all(path):
    """The cleaned texts of a file and their size in bytes."""
    documents = list(clean(local_source(str(path), "").reader(), Seen()))
    return [document.text for document in documents], sum(len(document.utf8) for document in documents)


def encode_all(encode, texts):
    """The number of tokens in the texts, which are encoded a thousand at a time."""
    return sum(len(ids) for i in range(0, len(texts), 1000) for ids in encode(texts[i:i + 1000]))


def preparing(s):
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        path = folder / "text.jsonl"
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in library_documents(s.megabytes * 10 ** 6))
        prepare.prepare(["pydocs"], prepare.Settings(out_dir=name))
        tokenizer = str(folder / "pydocs-bpe/tokenizer.json")
        encode = fast_encoder(load_tokenizer(tokenizer))

        (texts, size), reading = timed(read_all, path)
        n_tokens, encoding = timed(encode_all, encode, texts)
        del texts
        _, whole = timed(prepare.prepare, [str(path)], prepare.Settings(
            out_dir=name, tokenizer=tokenizer, name="made"))

    print(f"{size / 1e6:,.0f} MB, {n_tokens / 1e6:,.1f}M tokens, bpe, {os.cpu_count()} cores")
    times = {"reading, hashing, looking for duplicates": reading, "encoding alone": encoding,
             "prepare.py, both passes and the writing": whole}
    print("\n".join(columns([
        (what, f"{seconds:6.2f} s", f"{size / 1e6 / seconds:6.1f} MB/s", f"{n_tokens / 1e6 / seconds:5.2f}M tokens/s")
        for what, seconds in times.items()])))
    print(f"prepare.py has {encoding / whole:.0%} of the speed of encoding alone. Reading alone takes "
          f"{reading / whole:.0%} of its time; it reads twice, the second time while it encodes")


# ---------------------------------------------------------------------------------------------------- sampling

def llama(model):
    """The weights of an ivme in LlamaForCausalLM of transformers. UserError without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as e:
        raise UserError(f"this needs the package {e.name}: pip install -r requirements-dev.txt") from None
    config = LlamaConfig(vocab_size=model.cfg.vocab_size, **transformers_format.llama_config(model.cfg))
    theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(ivme.to_transformers(model.state_dict(), model.cfg), strict=False)  # the head is tied
    return theirs.eval()


def read_speed():
    """Bytes a second at which this machine's cores together read memory that no cache holds."""
    numbers = torch.ones(2 ** 28)  # 1 GB
    return numbers.nbytes / least({"sum": numbers.sum}, budget=3.0)["sum"]


@torch.no_grad()
def sampling(s):
    torch.manual_seed(0)
    device = machine.find_device(s.device)
    model = ivme.Model(ivme.PRESETS["ivme"][0]).to(device).eval()
    theirs, generator = llama(model).to(device), torch.Generator(device)

    def ours(rows, dtype, begin=8, n=s.tokens):
        """A function that draws n tokens behind `begin` others in each of some rows."""
        quick = sample.quick_step(model, 10 ** 9, dtype) if dtype else None
        it = copy.deepcopy(model).to(dtype) if dtype and quick is None else model
        idx = torch.randint(model.cfg.vocab_size, (rows, begin), device=device)
        cache = it.init_cache(rows)
        it(idx[:, :-1], cache=cache)

        def draw():
            cache.length = begin - 1
            for _ in sample.stream(it, idx, n, generator=generator, cache=cache, step=quick):
                pass
        return draw

    def hugging_face(dtype):
        it, idx = copy.deepcopy(theirs).to(dtype), torch.randint(model.cfg.vocab_size, (1, 8), device=device)
        return lambda: it.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, top_k=0, pad_token_id=0,
                                   min_new_tokens=s.tokens, max_new_tokens=s.tokens)

    few = 64
    run = {"ours, model alone": ours(1, None)}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        run |= {f"ours, {name}": ours(1, dtype), f"ours, {name}, 8 at once": ours(8, dtype),
                f"ours, {name}, from 10": ours(1, dtype, 10, few), f"ours, {name}, from 960": ours(1, dtype, 960, few),
                f"transformers, {name}": hugging_face(dtype)}
    seconds = least(run, budget=5.0)
    each = {name: took / (few if "from" in name else s.tokens) for name, took in seconds.items()}  # of a step
    best = min(took for name, took in each.items() if name.startswith("transformers"))
    lines = [(name, f"{1e3 * took:.2f} ms a step", f"{best / took * (8 if '8 at' in name else 1):.1f} x transformers")
             for name, took in each.items()]
    print("\n".join(columns(lines)))
    if device.type == "cpu":
        speed, n = read_speed(), model.n_params
        print(f"reading all weights at {speed / 1e9:.1f} GB/s takes {4e3 * n / speed:.2f} ms in fp32, "
              f"{2e3 * n / speed:.2f} ms in bf16")


# ---------------------------------------------------------------------------------------------------- i3

@torch.no_grad()
def decode(s):
    device = machine.find_device(s.device)
    model = i3.Model(i3.PRESETS["i3"][0]).to(device).eval()
    caches = {}
    for position in (10, 10_000):
        caches[position] = model.init_cache(1)
        for part in torch.randint(model.cfg.vocab_size, (1, position), device=device).split(2048, dim=1):
            model(part, cache=caches[position])

    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def step(position):
        model(token, cache=copy.copy(caches[position]))  # the states move on, but the position stays

    seconds = least({position: lambda p=position: step(p) for position in caches}, budget=2.0)
    lines = []
    for position, cache in caches.items():
        tensors = [t for state in cache.states for t in vars(state).values()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        lines.append((f"i3, a token at position {position:>6,}:", f"{seconds[position] * 1e3:.2f} ms",
                      f"{size / 2 ** 20:.2f} MB of state"))
    print("\n".join(columns(lines)))


# Which operators do what, by their names; the first that fits counts
GROUPS = {"scan": "selective_scan", "products": r"\b(addmm|mm|bmm|linear)\b|flash|attention",
          "optimizer": "(?i)adam|foreach"}  # with clipping and EMA


def shares_of_time(run_once, device):
    """Group -> its fraction of the time that run_once() takes, by torch's profiler; "rest" is what is in no group."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run_once()
        wait()

    times = dict.fromkeys([*GROUPS, "rest"], 0.0)
    for event in profiler.key_averages():
        if device.type != "cuda":
            spent = event.self_cpu_time_total
        elif event.device_type != torch.autograd.DeviceType.CUDA:
            spent = event.self_device_time_total
        else:
            continue  # a kernel's time counts in the operator that launched it
        fitting = [name for name, pattern in GROUPS.items() if re.search(pattern, event.key)]
        times[fitting[0] if fitting else "rest"] += spent
    return {name: spent / sum(times.values()) for name, spent in times.items()}


STEPS = (("i3-22m", 8), ("i3-80m", 4), ("i3-200m", 4))  # presets and rows


def step(s):
    on = machine.pick_device(s.device, s.dtype)
    for name, rows in STEPS:
        cfg, recipe = i3.PRESETS[name]
        settings = run.known_settings(train.Settings, recipe)
        model = i3.Model(cfg).to(on.device)
        optimizers, ema = first_step(model, settings, on)
        T = settings.block_size
        idx = torch.randint(cfg.vocab_size, (rows, T + 1), device=on.device)
        micros = [(idx[:, :-1], idx[:, 1:], None)]

        def run_once():
            training_step(model, optimizers, ema, micros, settings, on)

        seconds = least({"step": run_once}, budget=6.0)["step"]
        shares = ", ".join(f"{group} {share:.0%}" for group, share in shares_of_time(run_once, on.device).items())
        print(f"{name:<8} {rows} x {T} tokens, {str(on.dtype)[6:]}: {rows * T / seconds:,.0f} tokens/s, "
              f"{seconds * 1e3:,.0f} ms a step: {shares}", flush=True)


# ---------------------------------------------------------------------------------------------------- benchmarks' speed

HF_BATCHES = (16, 64, 256)  # rows at once of the harness's own model


def made_up_pairs(folder, n):
    """Writes a file of BLiMP's kind: n pairs of a sentence from the comments of Python's library and its words in
    another order."""
    sentences = []
    for _, text in library_texts(library()):
        sentences += re.findall(r"\b[A-Z][a-z]*(?: [a-z',]+){4,10}\.", text)
    path = folder / "blimp" / "wh_island.jsonl"
    path.parent.mkdir()
    with open(path, "w", encoding="utf-8") as f:
        for sentence in list(dict.fromkeys(sentences))[:n]:
            first, second, *rest = sentence.split()
            other = " ".join([second.capitalize(), first.lower(), *rest])
            f.write(json.dumps(dict(sentence_good=sentence, sentence_bad=other)) + "\n")


def hf_model(model, tokenizer, on, batch_size):
    """lm-evaluation-harness's own model with the weights of an ivme and its tokenizer."""
    try:
        from lm_eval.models.huggingface import HFLM
        from transformers import PreTrainedTokenizerFast
    except ImportError as e:
        raise UserError(f"this needs the package {e.name}: pip install -r requirements-dev.txt") from None
    theirs = llama(model).to(on.device, on.dtype)
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>",
                                    pad_token="<|pad|>")
    return HFLM(pretrained=theirs, tokenizer=words, batch_size=batch_size, add_bos_token=False)


def whole_benchmark(lm, limit, folder):
    """A function that scores `limit` pairs of each file in folder/blimp, ours as eval.py does it."""
    from lm_eval.evaluator import evaluate
    if not hasattr(lm, "scorer"):
        group = harness.local_blimp(harness.find_manager(["blimp"], str(folder)), folder)
        loaded = dict(tasks=harness.prepared([group]), groups={"blimp": group})
        return lambda: evaluate(lm, loaded, limit=limit, log_samples=False)
    return lambda: harness.run_tasks(lm, ["blimp"], limit, str(folder))


def evaluating(s):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(s.tasks_dir or temporary)
        if not s.tasks_dir:
            made_up_pairs(folder, s.pairs)
        with harness.undisturbed():
            lines, alone, whole = compare_with_hf(s, folder)
    print("\n".join(columns(lines)))
    print(f"ours is {alone[1] / alone[0]:.1f} times as fast as hf, {whole[1] / whole[0]:.1f} times over all")


def compare_with_hf(s, folder):
    # the models, and a tokenizer that knows the sentences' words
    group = harness.local_blimp(harness.find_manager(["blimp"], str(folder)), folder)
    limit = -(-s.pairs // len(group))  # pairs of each file
    sentences = []
    for task in group:
        for row in list(task.validation_docs())[:limit]:
            sentences += [row["sentence_good"], row["sentence_bad"]]
    cfg, _ = ivme.PRESETS["ivme"]
    texts = [text for _, text in library_texts(library())]
    tokenizer = load_tokenizer(train_bpe([*sentences, *texts[:200]], cfg.vocab_size).to_str())
    torch.manual_seed(0)
    device = machine.pick_device(s.device, s.dtype)
    model = ivme.Model(cfg).to(device.device).eval()
    ours, theirs = {}, {}
    for dtype in dict.fromkeys((str(device.dtype)[6:], "float32")):
        on = machine.pick_device(s.device, dtype)
        ours[f"ours, {dtype}"] = harness.harness_model(model, tokenizer, on)
        theirs |= {f"hf, {dtype}, {size} rows": hf_model(model, tokenizer, on, size) for size in HF_BATCHES}

    # the likelihoods alone
    from lm_eval.api.instance import Instance
    requests = [Instance("loglikelihood", {}, ("", f" {sentence}"), i) for i, sentence in enumerate(sentences)]
    run = {name: lambda lm=lm: lm.loglikelihood(requests, disable_tqdm=True) for name, lm in (ours | theirs).items()}
    found = {name: torch.tensor([x for x, _ in score()]) for name, score in run.items()}
    exact = found[f"hf, float32, {HF_BATCHES[0]} rows"]
    alone = least(run, budget=10.0)
    fastest = [min(names, key=alone.get) for names in (ours, theirs)]

    # all of it
    whole = least({name: whole_benchmark((ours | theirs)[name], limit, folder) for name in fastest}, budget=10.0)
    return [
        (name, f"{len(requests) / alone[name]:,.0f} sentences/s",
         f"off by {(found[name] - exact).abs().max():.4f} nats",
         f"whole benchmark {len(requests) / whole[name]:,.0f} sentences/s" if name in whole else "")
        for name in run], [alone[name] for name in fastest], [whole[name] for name in fastest]


# ---------------------------------------------------------------------------------------------------- the tool

def gpu(s):
    gpu_suite.suite(machine.pick_device(s.device, s.dtype))


BENCHMARKS = dict(memory=memory, prepare=preparing, train=peers.compare, sample=sampling, decode=decode, step=step,
                  eval=evaluating, gpu=gpu)


def main(argv):
    description = " ".join((__doc__ or "").split("\n\n")[0].split())
    given, words = parse_flags(argv, Settings(), description=description, positional=("WHAT", ", ".join(BENCHMARKS)))
    if len(words) != 1 or words[0] not in BENCHMARKS:
        instead = f", not {' '.join(words)}" if words else ""
        raise UserError(f"what is to be measured? {', '.join(BENCHMARKS)}{instead}")
    BENCHMARKS[words[0]](Settings(**given))
    return 0


if __name__ == "__main__":
    run_tool(main)
