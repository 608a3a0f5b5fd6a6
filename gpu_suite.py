"""`python bench.py gpu`: what a GPU makes of this repository, in one table. It should take less than eight minutes.

Is the selective scan right, and how fast beside the others that are installed; what does a training step of six
presets cost at its own recipe; what do packed documents cost; how fast are sampling and the loader; how long would the
run of İvme's card take. Each part that fails is a line of the table, and the others go on. On a CPU everything runs
with tiny sizes: the figures then mean nothing, but each part is seen to work.
"""
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import kernels.bench as scan_bench
import machine
import minutes
import prepare
import run
import sample
import train
from common import Progress, columns
from corpus.folder import read_meta
from corpus.loader import Loader, open_sources
from kernels.bench import least

SCANS = ((32, 1024, 512, 16), (32, 1024, 512, 64), (8, 2048, 768, 16), (32, 256, 512, 64))  # batch, T, channels, N
TRAINED = ("tinymemory", "ivme", "gpt2preln", "i3", "i3-80m", "i3-200m")
# what makes any preset tiny
TINY = dict(vocab_size=300, context_length=64, n_layer=1, n_attention=1, d_model=32, n_head=2, n_kv_head=1, d_ff=32,
            d_state=4, delta_rank=4, ffn_rank=8, head_rank=8, d_inner=0)
TINY_RECIPE = dict(block_size=32, batch_tokens=128, micro_batch=2)


# ---------------------------------------------------------------------------------------------------- the scan

def scan_is_right(on, tiny):
    worst = max(scan_bench.check(*size) for size in ([(1, 70, 20, 16)] if tiny else SCANS))
    return [("scan", "largest relative error against float64", f"{worst:.1e}")]


def scan_speed(on, tiny):
    rows = []
    for size in [(2, 64, 32, 16)] if tiny else SCANS:
        *x, dy = scan_bench.inputs(*size)
        leaves = [v.clone().requires_grad_() for v in x]
        scans = scan_bench.contenders()
        if not tiny:
            scans.pop("loop")  # thousands of launches a pass
        times = least({name: lambda f=f: scan_bench.with_gradients(f, leaves, dy) for name, f in scans.items()}, 2.0)
        for name, seconds in times.items():
            rows.append((f"scan {', '.join(map(str, size))}", f"{name}, forward + backward",
                         f"{1e3 * seconds:.2f} ms, {seconds / times['ours']:.1f} x ours"))
    return rows


# ---------------------------------------------------------------------------------------------------- training

def of_preset(name, tiny):
    """(architecture module, config, settings) of a preset, or of a tiny one of its kind."""
    module, cfg, recipe = run.find_preset(name)
    s = replace(train.Settings(), **{key: value for key, value in recipe.items() if hasattr(train.Settings, key)})
    s = replace(s, model=name, minutes=10.0)  # long enough to be compiled
    if tiny:
        small = {key: value for key, value in TINY.items() if getattr(cfg, key, 0)}
        cfg, s = replace(cfg, **small), replace(s, compile="off", minutes=0.01, **TINY_RECIPE)
    return module, cfg, s


def pace_of(name, on, tiny, pack=None):
    """(tokens a second, rows at once, bytes of memory at the peak, config, settings) of a preset's training."""
    module, cfg, s = of_preset(name, tiny)
    rows = s.batch_tokens // s.block_size
    micro, frame = min(s.micro_batch, rows), (1, 2) if (pack or s.pack) == "document" else None
    while True:
        task = SimpleNamespace(micro=micro, rows=rows, frame=frame)
        plan = SimpleNamespace(module=module, cfg=cfg, settings=s)
        try:
            if on.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            costs = minutes.measured(plan, task, machine.World(), on, train.Optimizers)
            break
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
            micro //= 2  # the result of a step stays the same
    memory = torch.cuda.max_memory_allocated() if on.device.type == "cuda" else 0
    return s.batch_tokens / (costs.micro * rows / micro + costs.update), micro, memory, cfg, s


def training(on, tiny):
    rows, peak = [], machine.peak_flops(on.chip, on.dtype)
    for name in TRAINED:
        speed, micro, memory, cfg, s = pace_of(name, on, tiny)
        with torch.device("meta"):
            flop = run.find_preset(name)[0].Model(cfg).flops_per_token(s.block_size)
        share = f", {flop * speed / peak:.0%} of the peak" if peak else ""
        rows.append((f"train {name}", f"{s.block_size:,} x {micro} rows at once, {s.optimizer}, {str(on.dtype)[6:]}",
                     f"{speed:,.0f} tokens/s{share}, {memory / 1e9:.1f} GB"))
        if name == "ivme":
            hours = s.max_steps * s.batch_tokens / speed / 3600
            rows.append(("ivme's card", f"{s.max_steps * s.batch_tokens / 1e6:,.0f}M tokens, extrapolated",
                         f"{60 * hours:,.0f} minutes"))
    return rows


def packing(on, tiny):
    speeds = {pack: pace_of("ivme", on, tiny, pack)[0] for pack in ("stream", "document")}
    ratio = speeds["document"] / speeds["stream"]
    return [("ivme, packed", "documents against streams", f"{ratio:.2f} x the tokens/s")]


# ---------------------------------------------------------------------------------------------------- the rest

@torch.no_grad()
def sampling(on, tiny):
    rows = []
    module, cfg, _ = of_preset("ivme", tiny)
    model = module.Model(cfg).to(on.device, on.dtype).eval()
    n = 8 if tiny else 256
    for batch in (1, 64):
        idx = torch.zeros(batch, 8, dtype=torch.int64, device=on.device)
        seconds = least({"sample": lambda: list(sample.stream(model, idx, n))}, 2.0)["sample"]
        rows.append(("sample ivme", f"{batch} at once, {str(on.dtype)[6:]}", f"{batch * n / seconds:,.0f} tokens/s"))
    return rows


def loading(on, tiny):
    """Batches of ivme's recipe from a small corpus, on the CPU's side alone."""
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare.Settings(out_dir=folder, tokenizer="hybrid", vocab_size=300, max_tokens=100_000)
        path = Path(prepare.prepare(["pydocs"], settings))
        T, n = (32, 8) if tiny else (1024, 1024)
        loader = Loader(open_sources([(path, read_meta(path), 1.0)]), "random", T, 10 ** 6, 0)
        seconds = least({"load": lambda: loader.tensors(loader.next_rows(n))}, 2.0)["load"]
    return [("loader", f"rows of {T:,}, {n:,} a step", f"{n * T / seconds:,.0f} tokens/s")]


PARTS = dict(scan_is_right=scan_is_right, scan_speed=scan_speed, training=training, packing=packing,
             sampling=sampling, loading=loading)


def suite(on):
    """Runs all parts and prints their table."""
    tiny, progress = on.device.type != "cuda", Progress()
    started, rows = time.monotonic(), []
    for name, part in PARTS.items():
        progress.show(f"{name.replace('_', ' ')} ...")
        try:
            rows += part(on, tiny)
        except Exception as e:  # the other parts are worth having
            rows.append((name.replace("_", " "), "failed", f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"))
    progress.done(f"{on.chip}, torch {torch.__version__}, {time.monotonic() - started:,.0f} s"
                  + (", tiny sizes: the figures mean nothing" if tiny else ""))
    print("\n".join(columns(rows)))
