"""What Windows, macOS, older GPUs and networks' disks do otherwise, each put in the place of what this system does."""
import builtins
import errno
import io
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import common
import machine
import report
import terminal
import train
from common import UserError
from corpus import folder
from corpus_helpers import document, run, write_jsonl
from kernels import build


@pytest.fixture
def windows(monkeypatch):
    """The parts of our code that ask are told that this is Windows."""
    for module in (common, folder):
        monkeypatch.setattr(module, "WINDOWS", True)


# ---------------------------------------------------------------------------------------------------- Windows

def locking(held):
    """msvcrt, whose locks `held` are (device, inode) of files: a second one is refused as Windows does it."""
    def lock(number, how, size):
        status = os.fstat(number)
        if (status.st_dev, status.st_ino) in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add((status.st_dev, status.st_ino))
    return types.SimpleNamespace(locking=lock, LK_NBLCK=2)


def test_of_two_processes_on_windows_one_holds_the_lock(windows, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "msvcrt", locking(set()))
    assert common.lock(tmp_path / "lock") is not None and common.lock(tmp_path / "lock") is None


def test_windows_removes_the_lock_of_a_folder_when_it_is_closed(windows, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "msvcrt", locking(set()))
    opened, unlink = [], Path.unlink

    def lock(path):
        opened.append(common.lock(path))
        return opened[-1]

    def unlink_closed(path, missing_ok=False):
        if path.name.endswith(".lock") and not opened[-1].closed:
            raise PermissionError(errno.EACCES, "it is open", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(folder, "lock", lock)
    monkeypatch.setattr(Path, "unlink", unlink_closed)
    path = write_jsonl(tmp_path / "text.jsonl", (document(i) for i in range(60)))
    made, *_ = run(path, tmp_path / "data", name="made", tokenizer="hybrid")
    assert opened and [p.name for p in (tmp_path / "data").iterdir()] == [made.name]


def test_windows_waits_until_nobody_reads_the_file_that_is_replaced(windows, monkeypatch, tmp_path):
    refused, replace = [], os.replace

    def os_replace(new, old):
        if len(refused) < 3:
            refused.append(old)
            raise PermissionError(errno.EACCES, "another program reads it", str(old))
        replace(new, old)

    monkeypatch.setattr(os, "replace", os_replace)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with common.replacing(tmp_path / "best.pt") as f:
        f.write(b"new")
    assert (tmp_path / "best.pt").read_bytes() == b"new" and len(refused) == 3
    monkeypatch.setattr(common, "WINDOWS", False)
    refused.clear()
    with pytest.raises(PermissionError), common.replacing(tmp_path / "best.pt") as f:
        f.write(b"newer")
    assert (tmp_path / "best.pt").read_bytes() == b"new"


@pytest.mark.parametrize("word, written", [
    (r"out\run\best.pt", r"out\run\best.pt"), ("def ", '"def "'), (r"my runs\best.pt", r'"my runs\best.pt"')])
def test_commands_are_printed_as_windows_takes_them(windows, word, written):
    assert common.quoted(word) == written


def test_on_windows_a_pipe_is_read_and_written_as_utf_8(windows, monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("perché".encode()), encoding="cp1252"))
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as end:
        common.run_tool(lambda argv: print(sys.stdin.read() + " 😀", end=""))
    assert end.value.code is None and out.buffer.getvalue().decode() == "perché 😀"


def test_a_pipe_that_windows_says_is_invalid_was_closed(windows):
    assert common.is_closed_pipe(OSError(errno.EINVAL, "Invalid argument"))
    assert not common.is_closed_pipe(OSError(errno.EINVAL, "Invalid argument", "some file"))
    assert not common.is_closed_pipe(OSError(errno.ENOSPC, "full"))


def test_the_key_that_ends_a_chat_is_the_systems():
    said = {}
    for name in ("nt", "posix"):
        code = f"import common; common.WINDOWS = {name == 'nt'}; import terminal; print(terminal.COMMANDS)"
        said[name] = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                    cwd=Path(terminal.__file__).parent).stdout
    assert "as Ctrl-Z and Enter does" in said["nt"] and "as Ctrl-D does" in said["posix"]
    assert '{"messages": [...]}' in said["nt"]


def test_ctrl_break_asks_a_run_to_stop_too(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with machine.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked


# ---------------------------------------------------------------------------------------------------- Apple, GPUs

def test_gradients_are_clipped_on_a_device_without_operations_on_lists(monkeypatch):
    """As Apple's GPUs are in torch.nn.utils, which then refuses foreach=True."""
    monkeypatch.setattr("torch.nn.utils.clip_grad._device_has_foreach_support", lambda device: False)
    monkeypatch.setattr("torch.nn.utils.clip_grad._has_foreach_support", lambda tensors, device: False)
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([3.0, 0.0, 4.0])
    assert train.clip_gradients([p], 1.0) == 5.0 and torch.allclose(p.grad.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_every_systems_words_for_too_little_memory_are_known(error, capsys):
    assert common.told(error) == 2 and "there is not enough memory" in capsys.readouterr().err


def test_another_runtime_error_is_a_fault_of_the_program():
    assert common.told(RuntimeError("the sizes do not fit")) is None


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU that this build of torch has no code for. Gives a function that says what such a GPU answers."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla P100-PCIE-16GB")

    def answers(error):
        def zeros(*args, **kwargs):
            raise error
        monkeypatch.setattr("torch.zeros", zeros)
    return answers


def test_a_gpu_that_this_torch_has_no_code_for_is_one_line(old_gpu):
    old_gpu(RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ..."))
    with pytest.raises(UserError, match="does not run on Tesla P100-PCIE-16GB: CUDA error: no kernel image .*; see"):
        machine.find_device("auto")


def test_a_gpu_that_is_full_is_not_called_too_old(old_gpu):
    old_gpu(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        machine.find_device("cuda")


@pytest.mark.parametrize("here, named, platform, found", [
    ({"g++"}, None, "linux", True), ({"clang++"}, None, "linux", False), ({"clang++"}, None, "darwin", True),
    ({"g++"}, None, "win32", False), ({"cl"}, None, "win32", True), ({"g++", "ccache"}, "ccache g++", "linux", False),
    ({"clang++"}, "clang++", "linux", True)])
def test_a_compiler_counts_if_torch_takes_it(here, named, platform, found, monkeypatch):
    """torch/_inductor looks for these names on these systems."""
    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", named)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("shutil.which", lambda name: name if name in here else None)
    assert machine.pick_device("cpu").compiler == found


# ---------------------------------------------------------------------------------------------------- disks, Pythons

def test_a_disk_without_locks_keeps_nobody_from_building(monkeypatch, tmp_path):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", flock)
    with build.only_one(tmp_path / "lock") as alone:
        assert not alone
    monkeypatch.undo()
    with build.only_one(tmp_path / "lock") as alone:
        assert alone


def test_a_python_without_xz_trains_without_its_figure(monkeypatch):
    real = builtins.__import__

    def without_lzma(name, *args, **kwargs):
        if name == "lzma":
            raise ImportError("No module named '_lzma'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_lzma)
    assert report.xz_bits_per_byte([], None) is None
    code = "import sys; sys.modules['lzma'] = None; import train, finetune, sample; print('here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(report.__file__).parent)
    assert done.stdout == "here\n", done.stderr


# ---------------------------------------------------------------------------------------------------- GPUs that compile

@pytest.mark.parametrize("chip, flop, compiled", [
    ("NVIDIA H100 80GB HBM3", 3.6e13, False), ("NVIDIA H100 80GB HBM3", 2.7e17, True),
    ("NVIDIA GeForce RTX 3060", 3.6e13, False), ("NVIDIA GeForce RTX 3060", 1e15, True), ("a new one", 1e15, True)])
def test_a_gpu_compiles_a_run_that_is_long_enough_for_it(chip, flop, compiled, monkeypatch):
    """The quick start, 3.6e13 FLOP, is over before a compiler would be done."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: chip)
    monkeypatch.setattr("torch.compile", lambda model, dynamic: model)
    monkeypatch.setattr(machine, "can_compile", lambda on: True)
    model = torch.nn.Linear(1, 1)
    model.flops_per_token = lambda T: 1
    s = types.SimpleNamespace(compile="auto", grad_checkpoint=False, block_size=1, batch_tokens=1, max_steps=flop)
    on = machine.Device(torch.device("cuda"), torch.bfloat16, compiler=True)
    assert machine.make_net(model, s, on, types.SimpleNamespace(size=1)) == (model, "compiled" if compiled else "")


def test_what_compiling_lacks_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/once")
    on = machine.Device(torch.device("cuda"), torch.float32, compiler=True)
    assert [machine.can_compile(on) for _ in range(3)] == [False] * 3 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/another")
    assert not machine.can_compile(on) and capsys.readouterr().err == ""
