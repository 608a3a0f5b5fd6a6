"""Processes that are forked from one that has torch loaded: they start in a tenth of a second in place of three."""
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import types
from multiprocessing import forkserver
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")


def prepare_server():
    """Starts the process that all others are forked from. It imports what takes long, but nothing that reads, while it
    is imported, a variable that a test sets: `datasets` and huggingface_hub do, what they import does not."""
    FORKS.set_forkserver_preload(["eval", "fsspec", "httpx", "matplotlib.pyplot", "pandas", "pyarrow.dataset",
                                  "pyarrow.parquet"])
    forkserver.ensure_running()


def become(words, env, folder, out, err):
    """What a forked process does: it becomes `python WORDS...` in this environment and folder."""
    multiprocessing.set_start_method(None, force=True)  # the system's own again
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout = open(0), open(1, "w", encoding="utf-8")
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1)
    for entry in env["PYTHONPATH"].split(os.pathsep):  # as an interpreter does that starts
        if os.path.exists(f"{entry}/sitecustomize.py"):
            runpy.run_path(f"{entry}/sitecustomize.py")

    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Forked:
    """What the tests need of a subprocess.Popen. words: a script and its arguments, or -c and code."""

    def __init__(self, words, env):
        self.stdout, out = self.pipe()
        self.stderr, err = self.pipe()
        self.process = FORKS.Process(target=become, args=(words, env, str(Path.cwd()), out, err), daemon=True)
        self.process.start()
        for pipe in (out, err):
            pipe.close()
        self.pid = self.process.pid
        self.send_signal = lambda number: os.kill(self.pid, number)
        self.kill, self.poll = self.process.kill, lambda: self.process.exitcode

    def pipe(self):
        """(file to read from, connection that a process inherits)."""
        read, write = FORKS.Pipe(duplex=False)
        file = open(os.dup(read.fileno()), encoding="utf-8", errors="replace")
        read.close()
        return file, write

    @property
    def returncode(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """(all of standard output, all of standard error), when it has ended."""
        texts = [""] * 2

        def read(i, file):
            with file:
                texts[i] = file.read()

        readers = [threading.Thread(target=read, args=(i, f)) for i, f in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return tuple(texts)
