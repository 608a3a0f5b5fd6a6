"""What a run computes on, and what reaches it from outside: the device, the processes, the compiled and distributed
model, signals, the clock."""
import contextlib
import functools
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.utils.checkpoint

from common import UserError, is_out_of_memory, told

# ---------------------------------------------------------------------------------------------------- the device

# FLOP/s of dense matrix products without sparsity, with fp32 accumulation, from NVIDIA's data sheets and architecture
# whitepapers. The first table is for bf16, the second for fp32 on cards that have no bf16.
PEAK_BF16 = {"B200": 2250e12, "H200": 989e12, "H200 NVL": 836e12, "H100": 989e12, "H100 NVL": 835e12,
             "H100 PCIe": 756e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX PRO 6000 Blackwell": 503.8e12,
             "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 4060 Ti": 44.1e12, "RTX 3090": 71e12, "RTX 3060": 25.5e12}
PEAK_FP32 = {"P100-SXM2": 10.6e12, "P100": 9.3e12, "T4": 8.1e12}


def peak_flops(chip, dtype):
    """FLOP/s that the GPU of this name can do at most in dtype; None if it is not in the tables above."""
    table = PEAK_BF16 if dtype == torch.bfloat16 else PEAK_FP32
    # a suffix makes it another card; the longest name that fits wins, so that an H100 PCIe is no plain H100
    names = [name for name in table if re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|D)\b)", chip)]
    return table[max(names, key=len)] if names else None


@dataclass
class Device:
    """What a run computes on."""
    device: torch.device
    dtype: torch.dtype  # compute type: bfloat16 (by autocast) or float32
    compiler: bool  # whether torch.compile finds the compiler that it needs: of C++ on a CPU, of C on a GPU

    def autocast(self):
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @property
    def chip(self):
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        if self.device.type == "mps":
            return getattr(torch.backends.mps, "get_name", lambda: "Apple's GPU")()  # torch 2.11 may lack it
        return f"{torch.get_num_threads()} threads"


def find_device(name, local_rank=0):
    """--device=NAME -> torch.device. "auto" is the best there is. UserError if the device is not there."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name} is not a device; use cpu, cuda, cuda:1 or mps") from None
    here = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not here.get(device.type):
        raise UserError(f"--device={name}: this torch has no such device here; use --device=cpu")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"there is no device cuda:{index}: this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        check_runs(device)
        # cuDNN's attention plans anew for every length, up to half a second, and lengths change in sampling and
        # evaluation; with some masks its gradients are NaN (pytorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def check_runs(device):
    """UserError if this build of torch has no code for the GPU, as the usual one has none for a P100."""
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError as e:
        if is_out_of_memory(e):
            raise
        raise UserError(f"torch {torch.__version__} does not run on {torch.cuda.get_device_name(device)}: "
                        f"{str(e).splitlines()[0]}; see TROUBLESHOOTING.md, or use --device=cpu") from None


def pick_device(device, dtype="auto", compile="auto", deterministic=False, local_rank=0):
    """The flags of that name -> Device. UserError if the device is not there or cannot do it."""
    device = find_device(device, local_rank)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast_bf16 = device.type == "cpu" and bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    if dtype == "auto":
        dtype = "bfloat16" if fast_bf16 else "float32"

    if device.type == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cl"]
    else:  # torch takes the system's own, and CXX must be a single word
        names = [os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")]
    compiler = any(map(shutil.which, names))
    if compile == "on" and device.type == "cpu" and not compiler:
        raise UserError(f"--compile=on needs a C++ compiler on a CPU, and there is no {names[0]}; --compile=off trains "
                        "without")
    if device.type == "cpu" or deterministic:
        # without this, compiled CPU code was seen to differ from run to run
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would load the compiler: a second
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return Device(device, getattr(torch, dtype), compiler)


# ---------------------------------------------------------------------------------------------------- processes

SILENT_SECONDS = 2.0  # torchrun looks after its processes ten times a second


class World:
    """The processes that train together. torchrun starts one for each GPU and says who is who; without it there is one.

    Small numbers travel between the CPUs (gloo), so that no GPU has to wait for them.
    """

    def __init__(self):
        self.rank, self.local_rank, self.size = 0, 0, 1
        if "MASTER_ADDR" in os.environ:  # else the variables are left over from a cluster's own launcher
            self.rank, self.local_rank, self.size = map(self.number, ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
            missing = [name for name in ("RANK", "MASTER_PORT") if name not in os.environ]
            if self.size > 1 and missing:
                raise UserError(f"WORLD_SIZE={self.size} in the environment, but no {' and no '.join(missing)}: start "
                                "several processes with torchrun, or unset MASTER_ADDR for one")
        if self.rank >= self.size:
            raise UserError(f"RANK={self.rank} is not below WORLD_SIZE={self.size}; torchrun sets both")
        self.is_main = self.rank == 0

    def number(self, name):
        """An environment variable that torchrun sets."""
        text = os.environ.get(name, "1" if name == "WORLD_SIZE" else "0")
        if not text.isdecimal():
            raise UserError(f"{name}={text} in the environment is not a number; torchrun sets it")
        return int(text)

    @contextlib.contextmanager
    def one_voice(self):
        """Inside, only the first process prints. Of a mistake that all processes meet, one line is enough: the others
        wait until torchrun ends them, and speak if it does not, because the first one has not met it."""
        if self.is_main:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                yield
            except UserError as e:
                time.sleep(SILENT_SECONDS)
                raise UserError(f"process {self.rank} of {self.size}: {e}") from None

    @contextlib.contextmanager
    def joined(self, device):
        """Inside, the processes can exchange tensors."""
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        try:
            yield
        except BaseException as e:
            if device.type == "cuda":
                self.end_at_once(e)
            raise
        finally:
            dist.destroy_process_group()

    def end_at_once(self, error):
        """Says what happened and ends the process. The others wait for it in an exchange, and would do so for half an
        hour, because leaving NCCL in good order means to wait for them; torchrun ends them when this one has ended."""
        if not self.is_main:
            time.sleep(SILENT_SECONDS)
        status = told(error)
        if not isinstance(status, int):
            traceback.print_exception(error)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def sum(self, tensor):
        """The sum of a CPU tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number):
        """The largest of the processes' whole numbers."""
        if self.size == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def gather(self, thing):
        """[thing of process 0, thing of process 1, ...]."""
        things = [thing]
        if self.size > 1:
            things = [None] * self.size
            dist.all_gather_object(things, thing)
        return things

    def barrier(self):
        if self.size > 1:
            dist.barrier()


# ---------------------------------------------------------------------------------------------------- the net

def checkpoint_blocks(model):
    """From now on the blocks keep only their inputs and compute the rest anew for the gradients (arXiv 1604.06174)."""
    def recomputed(forward, *args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)

    for block in model.blocks:
        block.forward = functools.partial(recomputed, block.forward)


# torch.compile takes half a minute or more. On a CPU it pays from this many FLOP on, about 15 minutes of training on
# two cores. On a GPU it pays from what the GPU could do at its peak in so many seconds, of which small models reach a
# few percent: an estimate
COMPILE_PAYS = 1e14
COMPILE_PAYS_SECONDS = 5


def make_net(model, s, on, world):
    """The model as the loop calls it: (net, what makes it quick: "our kernels", "compiled" or "").

    s: train.Settings. on: Device. Where several processes train, the net is distributed.
    """
    net, how = None, ""
    if s.compile == "auto" and on.device.type == "cpu" and not s.grad_checkpoint:
        from kernels.training import quick_net
        net, how = quick_net(model, s.block_size), "our kernels"
    if net is None:
        net, how = model, ""
        work = model.flops_per_token(s.block_size) * s.batch_tokens * s.max_steps
        least = COMPILE_PAYS
        if on.device.type == "cuda":
            least = COMPILE_PAYS_SECONDS * (peak_flops(on.chip, on.dtype) or 1e14)
        pays = on.device.type in ("cpu", "cuda") and work > least
        if s.compile == "on" or (s.compile == "auto" and pays and can_compile(on)):
            torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # now the compiler knows
            # graphs stay whole; gradients are exchanged once a step, of which cutting them would hide little
            torch._dynamo.config.optimize_ddp = False
            net, how = torch.compile(model, dynamic=False), "compiled"
    if world.size > 1:
        ids = [on.device.index] if on.device.type == "cuda" else None
        idle = not getattr(model.cfg, "scan", True)  # i3's parameters of a scan that is left out
        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=ids, find_unused_parameters=idle)
    return net, how


def can_compile(on):
    """Whether torch.compile has what it needs: a compiler and, for a GPU, Triton, which needs Python's headers too. A
    line says so if a GPU has to do without."""
    if on.device.type != "cuda":
        return on.compiler
    from torch.utils._triton import has_triton
    headers = os.path.join(sysconfig.get_path("include"), "Python.h")
    lacks = [what for what, is_here in (("a C compiler", on.compiler), (headers, os.path.exists(headers)),
                                        ("a Triton for this GPU", has_triton())) if not is_here]
    if lacks and os.environ.get("LOCAL_RANK", "0") == "0":
        say_once(f"compile      torch.compile lacks {' and '.join(lacks)}, so training takes longer")
    return not lacks


@functools.cache
def say_once(line):
    print(line, file=sys.stderr, flush=True)


def quick_orthogonalize(s, muon):
    """A quicker function in place of train.orthogonalize, or None. s: train.Settings."""
    if s.compile != "auto" or muon.dtype != torch.bfloat16 or muon.params[0].device.type != "cpu":
        return None
    from kernels.orthogonalize import library, quick_orthogonalize
    if not library():
        return None
    stack = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0))
    own, found = (f(stack.clone(), muon.dtype, muon.quintics) for f in (muon.orthogonalize, quick_orthogonalize))
    return quick_orthogonalize if (found - own).norm() < 0.05 * own.norm() else None  # a fork may have changed its own


def gradients_stay_here(net, last):
    """Inside, backward passes do not exchange gradients between processes, unless it is the step's last one."""
    if last or not isinstance(net, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return net.no_sync()


# ---------------------------------------------------------------------------------------------------- signals, time

class StopSignals:
    """Inside, Ctrl-C, SIGTERM and the end of the terminal only ask the loop to stop, so that it can save.

    A second signal ends the process. A run that ignores the end of its terminal, as under nohup, goes on ignoring it.
    """

    def __enter__(self):
        self.asked = False
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGBREAK] if hasattr(signal, "SIGBREAK") else [])]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self.on_signal) for number in numbers}
        return self

    def on_signal(self, number, frame):
        if self.asked:
            sys.exit(128 + number)
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


class Pace:
    """Measures training alone: the watch stands still while the loop evaluates, saves and samples.

    state: the loop's, with the numbers step, tokens and elapsed.
    """

    def __init__(self, state):
        self.state, self.since, self.step, self.tokens = state, time.monotonic(), state.step, state.tokens

    @contextlib.contextmanager
    def paused(self):
        begun = time.monotonic()
        yield
        self.since += time.monotonic() - begun

    def lap(self):
        """(seconds, steps, tokens) since the last lap. The seconds are added to the state's."""
        now = time.monotonic()
        seconds, steps, tokens = now - self.since, self.state.step - self.step, self.state.tokens - self.tokens
        self.since, self.step, self.tokens = now, self.state.step, self.state.tokens
        self.state.elapsed += seconds
        return seconds, steps, tokens
