"""How fast the selective scan is, here: `python kernels/bench.py [scan] [length] [decode] [step]`, all of them without a word.

    scan     correctness against float64 first, then forward, forward + backward and memory at four sizes, beside a loop over time and,
             where they are installed, mambapy (CPU and CUDA) and mamba_ssm (CUDA)
    length   the same against the sequence length, beside the loop and beside attention of the same width
    decode   a token of i3 at position 10 and at position 10,000: time and memory
    step     where the time of a training step of i3-22m, i3-80m and i3-200m goes

Times are the least of several rounds in which the contenders take turns. Page faults of fresh buffers are part of them, as they are
of training; on Linux, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 before the command leaves them out.

Notes, 2026-11-21, two cores of an AMD EPYC with AVX2, torch 2.13.0, fp32:

Where a training step goes (`step`). i3-22m, batch 8 x 256: 590 tokens/s; scan 19%, matrix products 42%, AdamW under 1%, rest 38% (GELU,
GroupNorm, the four mixes, copies). i3-80m, batch 4 x 256: 243 tokens/s; scan 2%, products 69%, AdamW 2%, rest 27%. i3-200m: 130 tokens/s, where
its card has 300 on a P100; scan 4%, products 69%, AdamW 2%, rest 26%.

What the CPU kernel taught, per core, N 64, data in the L1 cache (exponentials alone 4.0 G/s):
- two vectors of channels and 4 states in registers 3.0 G elements/s forward, one vector and 8 states 3.3; tiles of 8 to 32 channels alike;
- leaving the range check of exp out where a tile's delta and A prove it idle: 3.3 -> 3.9;
- 16, 32 or 64 steps between kept states: the same within 3%, so 64, which keeps the least;
- backward, 8 states of one vector or 4 states of two with half the shuffles: 1.76 and 1.77, no difference; the second is shorter;
- neighbouring tiles by one thread, chunk after chunk, so that rows are read in long pieces: 8.9 -> 7.9 ms at (2, 2048, 512, 16);
- page faults of y and of the kept states: 2.3 of 8.2 ms at (4, 256, 512, 64) in fresh memory. Huge pages (THP_MEM_ALLOC_ENABLE=1) changed nothing.
CUDA: not timed yet.

AVX-512, one core of an AMD EPYC (Zen 4, 3.7 GHz, where a 512-bit operation keeps a unit busy for two cycles), forward + backward at
(4, 256, 512, 64) and (2, 2048, 512, 16) against what did the same as AVX2: 20.7 -> 18.3 and 30.5 -> 24.5 ms. A vector takes 9 cycles in
the forward loop, as long as its 9 products; 10 and 8 in the two loops backward, for 9 and 7.
- 2^x with vrndscaleps and vscalefps, and no fused operation where a subtraction does: 7% and 5%. vreduceps is twice as slow as subtracting;
- backward, A's gradient in registers and C's while h is in them: 3% and 2%; gradients of 8 states instead of 4: 1% and 2%;
- prefetching the next tile's rows: nothing and 7%, of which AVX2 has 9%; a tile of one vector instead of two with it: 1% and 8%;
- no gain: 2 to 8 exponentials abreast, blends for half the shuffles of the lane sums, rows of states copied without memmove, scratch
  that fits the L1 cache, memory without page faults. 2^x from 16 roots (vpermps) and a cubic: forward 4%, both 2 and 1%, not taken.
"""
import copy
import ctypes
import gc
import importlib.util
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import i3
import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((4, 256, 512, 64), (2, 2048, 512, 16), (1, 4096, 512, 16), (8, 1024, 1024, 16))  # batch, T, channels, N
if DEVICE.type == "cuda":
    SIZES = ((32, 1024, 512, 16), (32, 1024, 512, 64), (4, 4096, 2048, 16))


# ---------------------------------------------------------------------------------------------------- measuring

def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def least(contenders, budget=4.0):
    """{name: function} -> {name: least seconds}; each runs 3 rounds or more, until it has had `budget` seconds."""
    spent, best = dict.fromkeys(contenders, 0.0), {}
    for round in range(50):
        for name, f in contenders.items():
            if round > 3 and spent[name] > budget:
                continue
            wait()
            start = time.perf_counter()
            f()
            wait()
            seconds = time.perf_counter() - start
            if round:  # the first one builds and warms up
                spent[name], best[name] = spent[name] + seconds, min(seconds, best.get(name, seconds))
    return best


def peak_memory(f):
    """Bytes that f needs beyond what is there before it, or None where the system does not tell."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    def read(what):
        return 1024 * int(re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
    ctypes.CDLL(None).malloc_trim(0)
    before = read("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    f()
    return read("VmHWM") - before


# ---------------------------------------------------------------------------------------------------- contenders

def loop(u, delta, A, B, C, D):
    """A loop over time as well as PyTorch can: whole tensors, and unbind, because [:, t] makes the gradient's cost quadratic."""
    h, ys = u.new_zeros(u.size(0), *A.shape), []
    for delta_t, x_t, B_t, C_t in zip(delta.unbind(1), (delta * u).unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(delta_t[..., None] * A) * h + x_t[..., None] * B_t[:, None]
        ys.append((h @ C_t[..., None]).squeeze(-1))
    return torch.stack(ys, 1) + D * u


def mambapy(u, delta, A, B, C, D):
    from mambapy.pscan import pscan
    h = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])  # (B, T, channels, N)
    return (h @ C[..., None]).squeeze(-1) + D * u


def mamba_ssm(u, delta, A, B, C, D):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn(u.mT.contiguous(), delta.mT.contiguous(), A, B.mT.contiguous(), C.mT.contiguous(), D).mT


def contenders():
    found = {"ours": kernels.selective_scan, "loop": loop}
    if importlib.util.find_spec("mambapy"):
        found["mambapy"] = mambapy
    if DEVICE.type == "cuda" and importlib.util.find_spec("mamba_ssm"):
        found["mamba_ssm"] = mamba_ssm
    if DEVICE.type == "cuda" and "mamba_ssm" not in found:
        found["compiled mambapy" if "mambapy" in found else "compiled loop"] = torch.compile(found.get("mambapy", loop))
    return found


def inputs(batch, T, channels, N, dtype=torch.float32, device=DEVICE):
    """u, delta, A, B, C, D with decays as in a trained model, and the gradient of y."""
    g = torch.Generator().manual_seed(0)
    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    x = (draw(batch, T, channels), F.softplus(draw(batch, T, channels) - 4), -torch.arange(1.0, N + 1).double().expand(channels, N), draw(batch, T, N),
         draw(batch, T, N), draw(channels), draw(batch, T, channels))
    return [v.to(device, dtype).contiguous() for v in x]


def check(batch, T, channels, N):
    """Largest relative error of y and of all gradients against the loop in float64; a fraction of the batch and channels for speed."""
    exact = inputs(1, min(T, 512), min(channels, 96), N, torch.float64, "cpu")
    leaves = [x.requires_grad_() for x in exact[:-1]]
    truth = [y := loop(*leaves), *torch.autograd.grad(y, leaves, exact[-1])]
    leaves = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in leaves]
    values = [y := kernels.selective_scan(*leaves), *torch.autograd.grad(y, leaves, exact[-1].to(y))]
    return max(float((v.detach().double().cpu() - t.detach()).abs().max() / t.detach().abs().max()) for v, t in zip(values, truth))


# ---------------------------------------------------------------------------------------------------- what is measured

def limit():
    """(text, exponentials per second): what the machine could do if a scan were nothing but its exponentials."""
    if DEVICE.type != "cpu" or kernels.implementation(torch.zeros(1)) is kernels.reference:
        return None
    exp_only = torch.ops.selective_scan_cpu.exp_only
    return exp_only(5000) / least({"exp": lambda: exp_only(5000)}, 1.0)["exp"]


def scan():
    exps = limit()
    if exps:
        print(f"exponentials alone: {exps / 1e9:.1f} G/s on {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})")
    for size in SIZES:
        batch, T, channels, N = size
        error = check(*size)
        print(f"\nbatch {batch}, T {T:,}, channels {channels:,}, N {N}: error against float64 {error:.1e}")
        assert error < 1e-5
        *x, dy = inputs(*size)
        leaves = [v.clone().requires_grad_() for v in x]
        elements, moved = batch * T * channels * N, 4 * batch * T * (3 * channels + 2 * N)
        for dtype in (torch.float32, torch.bfloat16):
            half = [v.to(dtype) if i not in (2, 5) else v for i, v in enumerate(x)]
            half_leaves = [v.clone().requires_grad_() for v in half]
            def both(f, leaves):
                return torch.autograd.grad(f(*leaves), leaves, dy.to(leaves[0].dtype))
            names = contenders() if dtype == torch.float32 else {"ours": kernels.selective_scan}
            with torch.no_grad():
                forward = least({n: lambda f=f: f(*half) for n, f in names.items()})
            whole = least({n: lambda f=f: both(f, half_leaves) for n, f in names.items()})
            for n in names:
                share = f"{exps * forward[n] / elements:5.2f} x the exponentials" if exps else f"{moved / forward[n] / 1e9:7.0f} GB/s"
                print(f"  {str(dtype)[6:]:<9} {n:<18} forward {forward[n] * 1e3:9.2f} ms {elements / forward[n] / 1e9:6.2f} G elements/s, {share}"
                      f"   with backward {whole[n] * 1e3:9.2f} ms ({whole[n] / whole['ours']:5.1f} x ours)")
        keep = 4 * batch * -(-T // kernels.CHUNK) * channels * N
        stated = keep + sum(4 * v.numel() for v in (leaves[0], *leaves))  # y, the gradients, the states kept; the inputs are there already
        peak = peak_memory(lambda: both(kernels.selective_scan, leaves))
        if peak:
            there = sum(4 * v.numel() for v in (dy, *leaves))
            print(f"  memory: {(peak + there) / 2 ** 20:.0f} MB at the peak, inputs, outputs, gradients and kept states are {(stated + there) / 2 ** 20:.0f} MB")


def length(batch=1, channels=512, N=16):
    """Cost of forward + backward against T; attention has 8 heads of 64 and the same width."""
    print(f"\nmilliseconds forward + backward, batch {batch}, width {channels}, N {N}\n{'T':>8} {'scan':>10} {'loop':>10} {'attention':>10}   per token: scan, attention (µs)")
    for T in (256, 512, 1024, 2048, 4096, 8192):
        *x, dy = inputs(batch, T, channels, N)
        leaves = [v.requires_grad_() for v in x]
        q = torch.randn(batch, 8, T, channels // 8, device=DEVICE, requires_grad=True)
        def attention():
            torch.autograd.grad(F.scaled_dot_product_attention(q, q, q, is_causal=True), q, dy.view(batch, T, 8, -1).transpose(1, 2))
        t = least({"scan": lambda: torch.autograd.grad(kernels.selective_scan(*leaves), leaves, dy), "loop": lambda: torch.autograd.grad(loop(*leaves), leaves, dy),
                   "attention": attention}, 1.0)
        print(f"{T:>8,} {t['scan'] * 1e3:>10.2f} {t['loop'] * 1e3:>10.1f} {t['attention'] * 1e3:>10.2f}   {t['scan'] / T * 1e6:.2f}, {t['attention'] / T * 1e6:.2f}")


@torch.no_grad()
def decode():
    model = i3.Model(i3.PRESETS["i3"][0]).to(DEVICE).eval()
    def at(position):
        cache = model.init_cache(1)
        for part in torch.randint(model.cfg.vocab_size, (1, position), device=DEVICE).split(2048, dim=1):
            model(part, cache=cache)
        return cache
    caches, token = {n: at(n) for n in (10, 10_000)}, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    def step(n):
        model(token, cache=copy.copy(caches[n]))  # the states move on, the position stays
    t = least({n: lambda n=n: step(n) for n in caches}, 2.0)
    for n, cache in caches.items():
        size = sum(v.numel() * v.element_size() for state in cache.states for v in vars(state).values())
        print(f"i3, a token at position {n:>6,}: {t[n] * 1e3:.2f} ms, {size / 2 ** 20:.2f} MB of state")


def step():
    """Shares of a training step: forward, backward, clipping and AdamW, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile
    for name, batch in (("i3-22m", 8), ("i3-80m", 4), ("i3-200m", 4)):
        model = i3.Model(i3.PRESETS[name][0]).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        idx = torch.randint(4000, (batch, 257), device=DEVICE)
        def run():
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
        seconds = least({"step": run}, 6.0)["step"]
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")) as p:
            run()
            wait()
        groups = dict(scan=0.0, products=0.0, optimizer=0.0, rest=0.0)
        for e in p.key_averages():
            if DEVICE.type == "cuda" and e.device_type == torch.autograd.DeviceType.CUDA:
                continue  # a kernel's time counts in the operator that launched it
            key = ("scan" if "selective_scan" in e.key else "products" if re.search(r"\b(addmm|mm|bmm|linear)\b|flash|attention", e.key) else
                   "optimizer" if re.search(r"adam|norm_?_?\b.*foreach|foreach", e.key, re.I) else "rest")
            groups[key] += e.self_device_time_total if DEVICE.type == "cuda" else e.self_cpu_time_total
        total = sum(groups.values())
        print(f"{name:<8} batch {batch} x 256, fp32: {batch * 256 / seconds:,.0f} tokens/s, {seconds * 1e3:,.0f} ms a step: "
              + ", ".join(f"{k} {v / total:.0%}" for k, v in groups.items()), flush=True)


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["scan", "length", "decode", "step"]
    for name in chosen:
        if name not in ("scan", "length", "decode", "step"):
            sys.exit(f"bench.py: {name!r} is none of scan, length, decode, step")
    for name in chosen:
        globals()[name]()
