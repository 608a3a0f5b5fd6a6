"""machine.py: the device, what a GPU can do at most, the processes, signals, the clock."""
import os
import signal
import types

import pytest
import torch

import machine
from common import UserError
from conftest import ROOT, SMALL, command

# the names that NVIDIA's driver gives -> FLOP/s of dense bf16 products by the data sheets; None: not in our tables
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA L40": None,
    "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090": 71e12, "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA GeForce RTX 5090": 209.5e12, "NVIDIA GeForce RTX 5090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4060 Ti": 44.1e12, "NVIDIA GeForce RTX 4060": None,
    "Tesla T4": None, "AMD Instinct MI300X": None, "2 threads": None,
}


@pytest.mark.parametrize("chip", PEAKS)
def test_a_gpu_has_the_peak_of_its_own_data_sheet_and_not_of_one_with_a_similar_name(chip):
    assert machine.peak_flops(chip, torch.bfloat16) == PEAKS[chip]


def test_older_gpus_have_a_peak_in_float32_and_newer_ones_only_in_bf16():
    assert machine.peak_flops("Tesla T4", torch.float32) == 8.1e12
    assert machine.peak_flops("Tesla P100-PCIE-16GB", torch.float32) == 9.3e12
    assert machine.peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None


def test_the_dtype_is_the_one_that_was_asked_for_and_autocast_follows_it():
    for dtype in (torch.bfloat16, torch.float32):
        on = machine.pick_device("cpu", dtype=str(dtype).removeprefix("torch."))
        assert (on.device.type, on.dtype) == ("cpu", dtype) and on.chip == f"{torch.get_num_threads()} threads"
        with on.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bf16_only_if_the_cpu_is_fast_at_it(fast, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: dict(avx512_bf16=fast), raising=False)
    assert machine.pick_device("cpu").dtype == (torch.bfloat16 if fast else torch.float32)


def test_a_device_that_is_not_there_is_an_error_that_says_what_to_use():
    with pytest.raises(UserError, match="--device=gpu is not a device; use cpu, cuda, cuda:1 or mps"):
        machine.find_device("gpu")
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="--device=mps: this torch has no such device here; use --device=cpu"):
            machine.find_device("mps")


def test_compiling_without_a_compiler_says_so(workdir):
    flags = [*SMALL, "--vocab_size=600", "--data=pydocs-hybrid", "--compile=on"]
    process = command(ROOT / "train.py", *flags, PATH="", CXX="")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "needs a C++ compiler" in err
    assert not (workdir / "out").exists()


def test_of_several_processes_the_first_one_speaks_and_the_others_if_nothing_ends_them(monkeypatch, capsys):
    monkeypatch.setattr(machine, "SILENT_SECONDS", 0.01)
    said = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        with pytest.raises(UserError) as end, machine.World().one_voice():
            print("about to fail")
            raise UserError("wrong")
        said[rank] = str(end.value), capsys.readouterr().out
    assert said == {"0": ("wrong", "about to fail\n"), "1": ("process 1 of 2: wrong", "")}


def test_on_a_gpu_a_process_that_failed_ends_at_once_because_the_others_wait_for_it(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *how, **more: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: ended.append("in good order"))
    monkeypatch.setattr("os._exit", ended.append)
    world = machine.World()
    world.size = 2
    for error, status, line in (
            (UserError("wrong"), 2, ": wrong\n"), (ZeroDivisionError("1 / 0"), 1, "Error: 1 / 0\n")):
        with pytest.raises(type(error)), world.joined(torch.device("cuda")):
            raise error
        assert ended[0] == status and capsys.readouterr().err.endswith(line)
        ended.clear()
    with world.joined(torch.device("cuda")):
        pass
    assert ended == ["in good order"]


def test_a_gpu_without_what_compiling_needs_trains_all_the_same(monkeypatch, capsys):
    on = machine.Device(torch.device("cuda"), torch.float32, compiler=True)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/none")
    assert not machine.can_compile(on)
    assert capsys.readouterr().err == ("compile      torch.compile lacks /none/Python.h and a Triton for this GPU, so "
                                       "training takes longer\n")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("os.path.exists", lambda path: True)
    assert machine.can_compile(on)


def test_a_signal_asks_once_and_a_second_one_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, machine.StopSignals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before


def test_the_watch_stands_still_while_it_is_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    state = types.SimpleNamespace(step=3, tokens=30, elapsed=7.0)
    pace = machine.Pace(state)
    now[0] += 2
    with pace.paused():
        now[0] += 50
    now[0] += 1
    state.step, state.tokens = 5, 50
    assert pace.lap() == (3.0, 2, 20) and state.elapsed == 10.0
    assert pace.lap() == (0.0, 0, 0)


@pytest.mark.parametrize("env, expected", [
    (dict(RANK="3", WORLD_SIZE="8"), (0, 1)),  # left over from a cluster's launcher, which gives no address
    (dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"), (1, 2)),
    (dict(MASTER_ADDR="127.0.0.1"), (0, 1)),
])
def test_processes_are_counted_only_if_somebody_started_them_together(env, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    world = machine.World()
    assert (world.rank, world.size) == expected


@pytest.mark.parametrize("name, value, line", [
    ("WORLD_SIZE", "all", "WORLD_SIZE=all in the environment is not a number"),
    ("RANK", "-1", "RANK=-1 in the environment is not a number"),
    ("RANK", "1", "RANK=1 is not below WORLD_SIZE=1"),
    ("WORLD_SIZE", "2", "WORLD_SIZE=2 in the environment, but no RANK and no MASTER_PORT: start several"),
])
def test_an_odd_environment_is_one_line(name, value, line, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=line):
        machine.World()
