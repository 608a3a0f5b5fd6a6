"""What training and preparing cost, and what tuning's tricks bring: `python bench.py memory --model=gpt2preln`, `prepare`, `ablation`.

memory    the peak of a training step as train.py makes it, without torch.compile: two micro-batches are accumulated, clipped, and stepped
          with AdamW or Muon and EMA. Each size runs in a process of its own. "tensors" is what all tensors alive at once take, counted operation by operation, or
          on CUDA the allocator's own maximum; "process" is the largest resident size that the system saw, which on a CPU has the interpreter,
          torch and what malloc keeps for itself on top. Sizes that were not run are extrapolated from the two largest that were.

prepare   the speed of prepare.py on --megabytes of text (this Python's library over and over, cut into documents elsewhere each time, so that none
          occurs twice) with a BPE that is there already: reading and cleaning alone, encoding alone, writing alone, and all of it as prepare.py does it.

ablation  a checkpoint tuned on chats plainly, with each trick alone and with all of them: --max_steps steps, --seeds batch orders. Each run's best
          weights are measured: bits per byte of all validation replies and of 65,536 tokens of the base data's validation text, relevance accuracy and
          gap over all validation chats (see train.relevance), and, over greedy replies of up to 128 tokens to the first questions of --questions of these chats,
          how many repeat a 4-gram and how many end in a loop. What was measured stays in --out, so the command can be stopped and goes on.

The timings of the selective scan are in kernels/bench.py.
"""
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prepare
import sample
import train
from common import UserError, parse_flags, run_tool
from corpus.folder import document_edges
from corpus.pydocs import library, library_texts
from corpus.text import Seen, clean, local_source
from corpus.tokenizer import fast_encoder, load_tokenizer, token_byte_counts


@dataclass
class Settings:
    model: str = "gpt2preln"  # memory: preset to measure
    micro_batch: str = "1,2"  # memory: rows at once to run, such as 1,2
    block_size: int = 0  # memory: tokens in a row; 0: the recipe's
    grad_checkpoint: bool | None = None  # memory: unset: without and with
    optimizer: str = ""  # memory: muon or adamw; empty: the recipe's
    device: str = "auto"  # cpu, cuda, cuda:1
    dtype: str = "auto"  # bfloat16, float32
    megabytes: int = 200  # prepare: text to prepare
    init_from: str = "out/tinymemory/best.pt"  # ablation: checkpoint to tune
    data: str = ""  # ablation: sets of chats; empty: the recipe's, pydocs-chat
    base_data: str = ""  # ablation: what is replayed; empty: what the checkpoint was trained on
    max_steps: int = 120  # ablation: steps of each run
    seeds: int = 3  # ablation: runs of each kind
    questions: int = 48  # ablation: validation chats whose first question is answered
    out: str = "out/ablation"  # ablation: folder of the runs


# ---------------------------------------------------------------------------------------------------- memory

class AliveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once: those given at the start and what any operation makes, in
    the backward pass too. Not seen is what a kernel allocates and frees by itself."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()
        for t in tensors:
            self.add(t)

    def add(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.known and storage.nbytes():
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out


def training_step(model, s, dtype, T, rows):
    """One optimizer step of two accumulated micro-batches on random tokens, packed documents if the recipe packs them, with the parts
    that train.py uses. Returns the most bytes of tensors alive at once."""
    device, bf16 = next(model.parameters()).device, dtype == torch.bfloat16
    params = list(model.parameters())
    ema = [p.detach().clone() for p in params] if s.ema_beta else []
    optimizers = train.Optimizers(model, s, dtype)
    for p in params:  # what AdamW keeps from its first step on
        p.grad = torch.zeros_like(p)
    optimizers.step(0.0)
    idx = torch.randint(model.cfg.vocab_size, (rows, T), device=device)
    reset = None
    if s.pack == "document":
        reset = torch.zeros(rows, T, dtype=torch.bool, device=device)
        reset[:, ::max(1, T // 4)] = True
    kept = [*params, *ema, *tree_leaves(optimizers.state_dict()), idx]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    counter = AliveTensors(t for t in kept if isinstance(t, torch.Tensor)) if device.type != "cuda" else contextlib.nullcontext()
    for p in params:
        p.grad = None
    with counter:
        for _ in range(2):
            with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
                loss = model(idx, idx, reset=reset)[1]
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizers.step(1.0)
        for p in params:
            p.grad = None
        if ema:
            train.ema_update(ema, params, 0, s.ema_beta)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else counter.peak


def gpt2_memory(cfg, rows, T, grad_checkpoint=False, bf16=True, packed=True, ema=True, cpu=False):
    """Bytes of tensors alive at the peak of gpt2preln's training step with AdamW.

    P parameters, L layers of width d, V logits a token, N = rows x T tokens at once. Always there: weights, accumulated gradients, two moments, EMA, 20 P.
    Kept of a token by a layer in bf16: the LayerNorms' inputs in fp32 (8 d) and outputs (4 d), queries, keys and values (6 d), attention's output (2 d),
    the hidden layer before and after GELU (16 d): 36 d. On a CPU, where attention computes in fp32, 46 d; all in fp32 64 d. A checkpointed layer keeps
    its input, 4 d. The matrices are kept as bf16 copies, 2 bytes a weight, until the forward pass ends or, without checkpointing, until they are
    used again. The peak is the largest of four moments: at the head, backward and forward, 12 and 10 bytes for each of at most LOSS_CHUNK logits; in the
    last block, whose gradients take 14 d a token (20 d in fp32) and which checkpointing makes again first; and at the embedding, whose gradient
    is dense. Packed documents add a mask of T x T numbers for each row.
    """
    d, L, V, N = cfg.d_model, cfg.n_layer, cfg.vocab_size, rows * T
    block = 12 * d * d
    P = L * (block + 13 * d) + (V * (1 if cfg.tied else 2) + cfg.context_length + 2) * d
    layer = (46 if cpu else 36) * d if bf16 else 64 * d
    copies = 2 * bf16 * block
    kept = N * 4 * d * L if grad_checkpoint else N * layer * L + copies * L
    logits = min(N * V, 2 ** 24)
    head = max(12 * logits + 10 * d * N + (6 if bf16 else 4) * V * d, 10 * logits + 6 * d * N + 2 * bf16 * V * d + copies * L * grad_checkpoint)
    last = (14 if bf16 else 20) * d * N + (8 if bf16 else 16) * d * d + ((N * layer + copies) if grad_checkpoint else 0)
    mask = packed * rows * T * T * (2 if bf16 and not cpu else 4)
    return (16 + 4 * ema) * P + max(kept + mask + max(head, last), (12 if cfg.tied else 4) * V * d)


def recipe_of(s):
    """(module, config, train.py's settings, device, dtype) of the preset to measure; what cannot be is train.py's UserError."""
    shape = [f"--block_size={s.block_size}", f"--batch_tokens={s.block_size}"] if s.block_size else []
    flags = [f"--model={s.model}", "--data=none", f"--dtype={s.dtype}", f"--device={s.device}", *([f"--optimizer={s.optimizer}"] if s.optimizer else []), *shape]
    module, cfg, recipe, *_ = train.settings_from(flags)
    return module, cfg, recipe, *train.pick_device(recipe, 0)[:2]


def measure_memory(s, rows, grad_checkpoint, results):
    """In a process of its own: puts (bytes of tensors, largest resident size) into the queue."""
    module, cfg, recipe, device, dtype = recipe_of(s)
    torch.manual_seed(0)
    model = module.Model(cfg).to(device)
    if grad_checkpoint:
        train.checkpoint_blocks(model)
    tensors = training_step(model, recipe, dtype, recipe.block_size, rows)
    results.put((tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)))


def memory(s):
    _, cfg, recipe, device, dtype = recipe_of(s)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", s.micro_batch):
        raise UserError(f"--micro_batch={s.micro_batch} is not a list of numbers such as 1,2")
    T, sizes, adamw = recipe.block_size, sorted({int(x) for x in s.micro_batch.split(",")}), recipe.optimizer == "adamw"
    print(f"{s.model}, rows of {T:,} tokens, {str(dtype)[6:]} on {device.type}, {'AdamW' if adamw else 'Muon'}, EMA, {recipe.pack} packing")
    print("rows  checkpointed  tensors      process      formula" if s.model.startswith("gpt2preln") and adamw else "rows  checkpointed  tensors      process")
    context, gb = multiprocessing.get_context("spawn"), 1e9
    for grad_checkpoint in (False, True) if s.grad_checkpoint is None else (s.grad_checkpoint,):
        measured = {}
        for rows in sizes + [recipe.micro_batch] * (recipe.micro_batch not in sizes):
            formula = ""
            if s.model.startswith("gpt2preln") and adamw:
                arguments = dict(bf16=dtype == torch.bfloat16, packed=recipe.pack == "document", ema=recipe.ema_beta > 0)
                formula = f"  {gpt2_memory(cfg, rows, T, grad_checkpoint, cpu=device.type == 'cpu', **arguments) / gb:8.3f} GB"
                if device.type == "cpu":
                    formula += f", {gpt2_memory(cfg, rows, T, grad_checkpoint, **arguments) / gb:.3f} GB on a GPU"
            if rows in sizes:
                results = context.Queue()
                child = context.Process(target=measure_memory, args=(s, rows, grad_checkpoint, results))
                child.start()
                child.join()
                if child.exitcode:
                    raise UserError(f"measuring {rows} rows ended with status {child.exitcode} (too little memory?)")
                measured[rows] = results.get()
            elif len(measured) > 1:
                (a, low), (b, high) = list(measured.items())[-2:]
                measured[rows] = [y + (y - x) / (b - a) * (rows - b) for x, y in zip(low, high)]
            else:
                continue
            print(f"{rows:4}  {'yes' if grad_checkpoint else 'no':<12}  " + "  ".join(f"{x / gb:8.3f} GB" for x in measured[rows]) + formula
                  + "  (tensors and process extrapolated)" * (rows not in sizes), flush=True)
    return 0


# ---------------------------------------------------------------------------------------------------- preparing

def library_documents(size, length=4000):
    """Documents of `length` characters and `size` bytes in all: the library's text as one string, cut at other places in every round."""
    text, made, start = "".join(source for _, source in library_texts(library())), 0, 0
    while made < size:
        for i in range(start, len(text) - length, length):
            made += length  # nearly all of it is ASCII
            yield text[i:i + length]
            if made >= size:
                return
        start += 37


def preparing(s):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(folder)
        with open(folder / "text.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in library_documents(s.megabytes * 10 ** 6))
        prepare.prepare(["pydocs"], prepare.Settings(out_dir=str(folder)))
        tokenizer = folder / "pydocs-bpe/tokenizer.json"
        encode, source = fast_encoder(load_tokenizer(str(tokenizer))), local_source(str(folder / "text.jsonl"), "")

        begun = time.perf_counter()
        documents = list(clean(source.reader(), Seen()))
        size = sum(len(d.utf8) for d in documents)
        times = dict(read=time.perf_counter() - begun)
        begun, texts = time.perf_counter(), [d.text for d in documents]
        arrays = [ids for i in range(0, len(texts), 1000) for ids in encode(texts[i:i + 1000])]
        times["encode"] = time.perf_counter() - begun
        n = sum(map(len, arrays))
        del documents, texts
        begun = time.perf_counter()
        with open(folder / "tokens.bin", "wb") as f:
            for i in range(0, len(arrays), 1000):
                f.write(np.concatenate(arrays[i:i + 1000]).astype("<u2").tobytes())
            f.flush()
            os.fsync(f.fileno())
        with open(folder / "tokens.bin", "rb") as f:
            hashlib.file_digest(f, "sha256")
        times["write"] = time.perf_counter() - begun
        del arrays
        begun = time.perf_counter()
        prepare.prepare([str(folder / "text.jsonl")], prepare.Settings(out_dir=str(folder), tokenizer=str(tokenizer), name="made"))
        times["all"] = time.perf_counter() - begun
    print(f"{size / 1e6:,.0f} MB, {n / 1e6:,.1f}M tokens, bpe, {os.cpu_count()} cores")
    for what, name in (("read", "reading, hashing, looking for duplicates"), ("encode", "encoding alone"), ("all", "prepare.py, both passes and the writing")):
        print(f"{name:<42} {times[what]:6.2f} s  {size / 1e6 / times[what]:6.1f} MB/s  {n / 1e6 / times[what]:5.2f}M tokens/s")
    shares = ", ".join(f"{verb} alone takes {times[what] / times['all']:.0%}" for what, verb in (("read", "reading"), ("encode", "encoding"), ("write", "writing")))
    print(f"prepare.py does {times['encode'] / times['all']:.0%} of the speed of encoding alone. Of its time {shares}; it reads twice, once of it beside the encoding")
    return 0


# ---------------------------------------------------------------------------------------------------- tuning's tricks

OFF = dict(word_boost=1.0, response_start_weight=1.0, replay=0.0, relevance=0.0)
TRICKS = dict(word_boost=1.5, response_start_weight=2.0, replay=0.15, relevance=0.25)  # tinymemory-sft's
KINDS = {"plain": {}, **{f"+ {name.removesuffix('_weight').replace('_', ' ')}": {name: value} for name, value in TRICKS.items()}, "all": TRICKS}
MEASURES = {"replies": ("bits/byte of replies", "{:.3f}"), "base": ("bits/byte of base data", "{:.3f}"), "accuracy": ("relevance accuracy", "{:.2%}"),
            "gap": ("relevance gap", "{:.2f}"), "repeats": ("repeat a 4-gram", "{:.0%}"), "loops": ("end in a loop", "{:.0%}")}


def repeats_4gram(ids):
    """Whether four tokens occur in a row twice."""
    grams = [tuple(ids[i:i + 4]) for i in range(len(ids) - 3)]
    return len(set(grams)) < len(grams)


def ends_in_loop(ids):
    """Whether the tail is one sequence of three tokens or more, three or more times back to back, or one token more than 16 times."""
    if len(ids) > 16 and len(set(ids[-17:])) == 1:
        return True
    return any(ids[-n:] == ids[-2 * n:-n] == ids[-3 * n:-2 * n] for n in range(3, len(ids) // 3 + 1))


def judge(path, questions, device, sources, base):
    """The MEASURES of a checkpoint's chosen weights."""
    model, tokenizer, _ = train.load_checkpoint(path, device)
    bos, eos, assistant = (tokenizer.token_to_id(f"<|{t}|>") for t in ("bos", "eos", "assistant"))
    T, byte_counts = min(512, model.cfg.context_length), torch.from_numpy(token_byte_counts(tokenizer)).float()
    replies = train.evaluate(model, sources, 0, T, 8, contextlib.nullcontext, byte_counts, device, bos=bos, responses=True)["mixed"][1]
    of_base = train.evaluate(model, base, 65_536, min(256, T), 16, contextlib.nullcontext, byte_counts, device)["mixed"][1]
    accuracy, gap = train.relevance(model, sources, 0, T, 8, contextlib.nullcontext, bos, device)
    answers = []
    for source in (x for x in sources if x.val_mask is not None):
        edges = document_edges(source.val, bos)
        n = len(edges) - 1
        take = min(n, -(-questions // len(sources)))
        for k in range(take):
            chat = source.val[edges[k * n // take]:edges[k * n // take + 1]].tolist()
            question = chat[:chat.index(assistant) + 1][-T // 2:]
            ids = sample.generate(model, torch.tensor([question], device=device), 128, stop_token=eos, temperature=0)[0].tolist()[len(question):]
            answers.append(ids[:-1] if ids[-1] == eos else ids)
    return dict(replies=replies, base=of_base, accuracy=accuracy, gap=gap, repeats=statistics.mean(map(repeats_4gram, answers)),
                loops=statistics.mean(map(ends_in_loop, answers)))


def ablation(s):
    if s.seeds < 1 or s.questions < 1 or s.max_steps < 1:
        raise UserError("--seeds, --questions and --max_steps must be above 0")
    parent = train.read_checkpoint(s.init_from)
    name, before = parent["model_name"], parent["train"]
    module, *_ = train.find_preset(name)
    preset = f"{name}-sft" if f"{name}-sft" in module.PRESETS else name
    s.data = s.data or (module.PRESETS[preset][1]["data"] if preset != name else "pydocs-chat")
    base_data, (device, *_) = s.base_data or before.get("base_data") or before["data"], train.pick_device(train.Settings(device=s.device), 0)
    sources, base = (train.find_data(spec, before["tokenizer"], parent["cfg"]["vocab_size"], True, lambda: None, parent["tokenizer"])[0] for spec in (s.data, base_data))
    if not any(x.val_mask is not None and len(x.val) for x in sources):
        raise UserError(f"{s.data} holds no chats to validate on; --data names a set of chats")
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    stamp = hashlib.sha256(Path(s.init_from).read_bytes()).hexdigest()[:16]

    def known(kind, seed):
        """The measures of a run, made now or earlier."""
        flags = [f"--model={preset}", f"--init_from={s.init_from}", f"--data={s.data}", f"--base_data={base_data}", "--overwrite", f"--max_steps={s.max_steps}",
                 f"--eval_every={max(1, s.max_steps // 2)}", "--save_every=0", "--final_eval_tokens=1024", "--sample_tokens=0", f"--seed={1337 + seed}",
                 f"--device={s.device}", f"--dtype={s.dtype}", *(f"--{k}={v}" for k, v in {**OFF, **KINDS.get(kind, {})}.items())]
        about = dict(kind=kind, seed=seed, questions=s.questions, flags=flags, recipe=module.PRESETS[preset][1], parent=stamp,
                     data=[x.fingerprint for x in (*sources, *base)])
        for row in train.read_rows(out / "results.jsonl"):
            if row["about"] == about:
                return row["measures"]
        path = s.init_from
        if kind != "before tuning":
            with contextlib.redirect_stdout(io.StringIO()):
                train.main([*flags, f"--out={out / 'run'}"])
            if not train.read_rows(out / "run/metrics.jsonl")[-1].get("final"):
                raise KeyboardInterrupt  # train.py stops quietly
            path = out / "run/best.pt"
        measures = judge(path, s.questions, device, sources, base)
        with open(out / "results.jsonl", "a") as f:
            f.write(json.dumps(dict(about=about, measures=measures)) + "\n")
        return measures

    print(f"{s.init_from} tuned on {s.data} for {s.max_steps} steps, {s.seeds} runs each (mean ± standard deviation); replayed: {base_data}")
    print(f"{'':<16}" + "  ".join(f"{title:>24}" for title, _ in MEASURES.values()))
    for kind in ("before tuning", *KINDS):
        runs = [known(kind, seed) for seed in range(1 if kind == "before tuning" else s.seeds)]
        cells = []
        for key, (_, form) in MEASURES.items():
            values = [r[key] for r in runs]
            cells.append(form.format(statistics.mean(values)) + (f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""))
        print(f"{kind:<16}" + "  ".join(f"{cell:>24}" for cell in cells), flush=True)
    return 0


def main(argv):
    given, words = parse_flags(argv, Settings(), description=__doc__.split("\n")[0], positional=("WHAT", "memory, prepare or ablation"))
    benchmarks = dict(memory=memory, prepare=preparing, ablation=ablation)
    if len(words) != 1 or words[0] not in benchmarks:
        raise UserError(f"what is to be measured? {', '.join(benchmarks)}{', not ' + ' '.join(words) if words else ''}")
    return benchmarks[words[0]](Settings(**given))


if __name__ == "__main__":
    run_tool(main)
