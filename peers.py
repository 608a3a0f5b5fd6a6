"""How fast does ours train, and how fast do its peers, on the same work? `python bench.py train` runs this.

The work: optimizer steps on rows of T tokens, in a model of ivme's 22 million parameters and 16,384 tokens: forward
and backward pass under bf16 autocast (fp32 where the machine is slow at bf16), clipping, the optimizer. Peers train a
model of their own kind that is as large as that: Hugging Face's Llama has the same weights, nanoGPT's GPT-2 has 9
layers. Each contender is measured in fresh processes, taking turns, and its figure is the median.
"""
import importlib.util
import multiprocessing
import queue
import statistics
import sys
import time
from pathlib import Path

import torch

import ivme
import machine
import train
from common import Progress, UserError, columns
from release import transformers_format

SECONDS = 5.0  # of steps that are measured in a process, at least 5 of them
LR = 1e-4


# ---------------------------------------------------------------------------------------------------- contenders

def ours(compile, optimizer):
    """A function that makes a contender: (T, rows, on, s) -> the step as a function of inputs and targets."""
    def make(T, rows, on, s):
        settings = train.Settings(compile=compile, optimizer=optimizer, block_size=T, batch_tokens=rows * T,
                                  ema_beta=0.0)
        model = ivme.Model(ivme.PRESETS["ivme"][0]).to(on.device)
        net, _ = machine.make_net(model, settings, on, machine.World())
        optimizers, params = train.Optimizers(model, settings, on.dtype), list(model.parameters())

        def step(x, y):
            with on.autocast():
                loss = net(x, y)[1]
            loss.backward()
            train.clip_gradients(params, 1.0)
            optimizers.step(LR)
            for p in params:
                p.grad = None
        return step
    return make


def peer(build):
    """The same of a peer, with PyTorch's AdamW. build: (T, s) -> (model, function of x, y -> loss)."""
    def with_compile(compiled):
        def make(T, rows, on, s):
            model, loss_of = build(T, s)
            model = model.to(on.device).train()
            if compiled:
                loss_of = torch.compile(loss_of, dynamic=False)
            params = list(model.parameters())
            optimizer = torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

            def step(x, y):
                with on.autocast():
                    loss = loss_of(x, y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            return step
        return make
    return with_compile


def hugging_face(T, s):
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as e:
        raise UserError(f"this needs the package {e.name}: pip install -r requirements-dev.txt") from None
    cfg = ivme.PRESETS["ivme"][0]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=cfg.vocab_size, **transformers_format.llama_config(cfg)))

    def loss_of(x, y):
        logits = model(x, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())
    return model, loss_of


def nanogpt_module(folder):
    """nanoGPT's model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # the compiler looks for it there
    spec.loader.exec_module(module)
    return module


def nanogpt(T, s):
    module = nanogpt_module(s.nanogpt)
    cfg = ivme.PRESETS["ivme"][0]
    model = module.GPT(module.GPTConfig(block_size=T, vocab_size=cfg.vocab_size, n_layer=9, n_head=cfg.n_head,
                                        n_embd=cfg.d_model, dropout=0.0, bias=False))
    return model, lambda x, y: model(x, y)[1]


def contenders(s):
    """Name -> the function that makes it. nanoGPT takes part where --nanogpt names its folder."""
    found = {"ours, AdamW": ours("auto", "adamw"), "ours, Muon": ours("auto", "muon"),
             "ours, AdamW, plain PyTorch": ours("off", "adamw"), "ours, AdamW, torch.compile": ours("on", "adamw"),
             "transformers' Llama": peer(hugging_face)(False),
             "transformers' Llama, torch.compile": peer(hugging_face)(True)}
    if s.nanogpt:
        found |= {"nanoGPT": peer(nanogpt)(False), "nanoGPT, torch.compile": peer(nanogpt)(True)}
    return found


# ---------------------------------------------------------------------------------------------------- measuring

def measure(s, name, rows, T, threads, results):
    """In a process of its own: puts (seconds of a step, FLOP/s of a large matrix product), or an error's line."""
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        on = machine.pick_device(s.device, s.dtype)
        step = contenders(s)[name](T, rows, on, s)
        x, y = torch.randint(ivme.PRESETS["ivme"][0].vocab_size, (2, rows, T), device=on.device).unbind()

        def timed(work):
            begun = time.perf_counter()
            work()
            if on.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        for _ in range(3):
            step(x, y)
        times = []
        while len(times) < 5 or sum(times) < SECONDS:
            times.append(timed(lambda: step(x, y)))
        n = 8192 if on.device.type == "cuda" else 2048  # a product of milliseconds
        a, b = (torch.randn(n, n, device=on.device, dtype=on.dtype) for _ in range(2))
        product = min(timed(lambda: a @ b) for _ in range(20))
        results.put((statistics.median(times), 2 * n ** 3 / product))
    except UserError as e:
        results.put(str(e))


def in_a_process(s, name, rows, T):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=measure, args=(s, name, rows, T, torch.get_num_threads(), results))
    child.start()
    while True:
        try:
            found = results.get(timeout=1)
            break
        except queue.Empty:
            if not child.is_alive():
                raise UserError(f"measuring {name} ended with status {child.exitcode} (too little memory?)") from None
    child.join()
    if isinstance(found, str):
        raise UserError(found)
    return found


def sizes_of(text):
    """"4x256,2x1024" -> [(4, 256), (2, 1024)]."""
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in text.split(",")]
        assert all(len(size) == 2 and min(size) > 0 for size in sizes)
    except (ValueError, AssertionError):
        raise UserError(f"--sizes={text} is not a list of rows and tokens such as 4x256,2x1024") from None
    return sizes


def compare(s):
    """Prints a table for each size: tokens a second, beside the best peer, and beside the machine's best product."""
    if s.nanogpt and not (Path(s.nanogpt) / "model.py").is_file():
        raise UserError(f"--nanogpt={s.nanogpt} has no model.py: git clone https://github.com/karpathy/nanoGPT there")
    names, progress = list(contenders(s)), Progress()
    with torch.device("meta"):
        model = ivme.Model(ivme.PRESETS["ivme"][0])
    for rows, T in sizes_of(s.sizes):
        found = {name: [] for name in names}
        for turn in range(s.turns):
            for name in names:
                progress.show(f"{rows} x {T}, turn {turn + 1} of {s.turns}: {name}")
                found[name].append(in_a_process(s, name, rows, T))
        speed = {name: rows * T / statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
        peak = max(product for runs in found.values() for _, product in runs)
        best = max((name for name in names if not name.startswith("ours")), key=speed.get)
        lines = [(name, f"{speed[name]:,.0f} tokens/s", f"{speed[name] / speed[best]:.2f} x {best}",
                  f"{speed[name] * model.flops_per_token(T) / peak:.0%} of the best product") if name.startswith("ours")
                 else (name, f"{speed[name]:,.0f} tokens/s", "", "") for name in names]
        progress.done(f"{rows} x {T} tokens a step, medians of {s.turns} processes each; the best matrix product of "
                      f"these: {peak / 1e9:,.0f} GFLOP/s")
        print("\n".join(columns(lines)), flush=True)
