"""What several test files share: a small prepared corpus, a small trained run, sources made by hand, and readers."""
import json
import os
import random
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import finetune
import machine
import prepare
import run
import train
from corpus.loader import TokenSource
from fake_hub import make_real_layouts
from forks import Forked, prepare_server
from made_up import made_up_text

ROOT = Path(train.__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # such small models are slower on two, and two test processes share the machine
torch.set_num_threads(1)

# A test is right or wrong, however busy the machine is and whenever it runs; HYPOTHESIS=search draws other examples
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS", "suite"))

# a model that trains in milliseconds, and a run of it; tests add or override flags
SMALL = ["--n_layer=2", "--d_model=32", "--n_head=2", "--d_ff=48", "--context_length=128", "--block_size=64",
         "--batch_tokens=512", "--micro_batch=8", "--max_steps=12", "--warmup_steps=3", "--eval_every=6",
         "--eval_tokens=1024", "--final_eval_tokens=1024", "--save_every=4", "--log_every=1", "--sample_tokens=8",
         "--dtype=float32", "--compile=off", "--device=cpu"]

# files whose set-up is costly, or whose tests are
FIRST = ("test_hub", "test_fake_hub", "test_export", "test_pydocs", "test_bench", "test_end_to_end")


def pytest_collection_finish(session):
    if session.items and not session.config.option.collectonly:
        prepare_server()


def pytest_collection_modifyitems(items):
    """The tests that take long come first for either process, so that neither waits at the end for the other's.

    Behind them comes what is to stay in one process, because the other process takes over from the end.
    """
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    half = len(short) // 2
    items[:] = long[::2] + short[:half] + long[1::2] + short[half:]


# ------------------------------------------------------------------------------------------------- prepared and trained

@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """A folder with data/pydocs-hybrid (600 tokens of vocabulary) and data/two-hybrid: two sources, en and it."""
    root = tmp_path_factory.mktemp("corpora")
    (root / "one.txt").write_text((ROOT / "train.py").read_text())
    (root / "two.txt").write_text((ROOT / "prepare.py").read_text().upper())
    quiet = dict(out_dir=str(root / "data"), max_tokens=300_000)
    prepare.prepare(["pydocs"], prepare.Settings(tokenizer="hybrid", vocab_size=600, name="pydocs-hybrid", **quiet))
    tokenizer = str(root / "data/pydocs-hybrid/tokenizer.json")
    prepare.prepare([f"{root}/one.txt@en/code", f"{root}/two.txt@it/books"],
                    prepare.Settings(tokenizer=tokenizer, name="two-hybrid", **quiet))
    return root


@pytest.fixture(scope="session")
def bilingual(tmp_path_factory):
    """A folder with data/mix-bpe-500: English and Italian, web and wiki, of different sizes; one tokenizer of 500."""
    root, names = tmp_path_factory.mktemp("bilingual"), []
    for i, (language, kind) in enumerate([("en", "web"), ("en", "wiki"), ("it", "web"), ("it", "wiki")]):
        rng = random.Random(i)
        folder = root / f"{kind}_{language}"
        folder.mkdir()
        for part in range(2):
            texts = [made_up_text(language, kind, rng) for _ in range(200 * (i + 1))]
            (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        names.append(f"{folder}@{language}/{kind}")
    prepare.prepare(names, prepare.Settings(out_dir=str(root / "data"), vocab_size=500, name="mix-bpe-500"))
    return root


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory):
    """The folder of the repositories that the stand-in for the Hub serves. Read only."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="session")
def layouts(hub_root):
    """(repository, config, split) -> the rows that were written there."""
    return make_real_layouts(hub_root)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """A picture takes longer than such a small run; `trained` has one, and so have the tests marked `pictures`."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr("report.draw_loss", lambda *args: None)


@pytest.fixture
def workdir(corpora, tmp_path, monkeypatch):
    """An empty current directory that sees the corpora as data/."""
    (tmp_path / "data").symlink_to(corpora / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(corpora, tmp_path_factory):
    """The folder of a finished small run on data/pydocs-hybrid. Read only."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run_train(f"--data={corpora}/data/pydocs-hybrid", f"--out={out}") == 0
    return out


def run_train(*flags):
    """train.py in this process, with the small model; its exit status."""
    return train.main([*SMALL, "--vocab_size=600", *flags])


def pretraining_plan(*flags):
    """What train.py makes of its flags."""
    return run.plan_run(list(flags), train.Settings, train.choices(), train.default_out, "")


def tuning_plan(*flags):
    """What finetune.py makes of its flags."""
    return run.plan_run(list(flags), finetune.Settings, train.choices(), finetune.default_out, "", finetune.adapt)


def command(*words, fresh=False, **env):
    """Starts a tool in a process of its own, in the current directory; stdout and stderr are pipes.

    words: a script and its arguments, or -c and code. fresh: a new interpreter, for what happens while it starts.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    words = list(map(str, words))
    if not fresh:
        return Forked(words, env)
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            stdin=subprocess.DEVNULL, text=True, env=env)


def finish(process, status=0):
    """Waits for a command, checks its exit status, and returns what it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err[-3000:]
    return out


def torchrun(n, *words):
    """Runs n processes of a script that train together: [(exit status, standard output, standard error)] of all."""
    process = command("-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port=0", "--rdzv_backend=c10d",
                      "--rdzv_endpoint=localhost:0", *words, fresh=True)
    out, err = process.communicate(timeout=300)
    return [(process.returncode, out, err)]


def together(n, *words):
    """What torchrun does, without its launcher: (exit status, standard output, standard error) of n processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(n))
    processes = [command(*words, RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank in range(n)]
    with ThreadPoolExecutor() as readers:
        outputs = list(readers.map(lambda process: process.communicate(timeout=300), processes))
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs)]


# ---------------------------------------------------------------------------------------------------- made by hand

class FakeSource(TokenSource):
    """A source whose tokens are in memory."""

    def __init__(self, tokens, weight=1.0, budget=None, val=(), name="s"):
        self.name, self.language, self.kind, self.fingerprint = name, "en", "code", [name, ""]
        self.validation_cache = {}
        self.train, self.val = np.asarray(tokens), np.asarray(val)
        self.train_mask = self.val_mask = None
        self.weight, self.budget = weight, budget or len(tokens)


# A run alone on the CPU in float32, for functions that are called outside of a run
CPU = machine.Device(torch.device("cpu"), torch.float32, compiler=False)
ALONE = machine.World()


def sources_of(*folders):
    """The token sources of prepared folders in the tokenizer of data/pydocs-hybrid."""
    found = []
    for folder in folders:
        found += run.find_data(str(folder), "hybrid", 600, ALONE)[0]
    return found


# ---------------------------------------------------------------------------------------------------- readers

TIMES = ("tokens_per_s", "elapsed")  # what a clock says is all that may differ between two equal runs


def rows(out):
    """All rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def step_rows(out):
    """Those of the training steps."""
    return [row for row in rows(out) if "train_loss" in row]


def evaluations(out):
    """Those of the evaluations, without the final one."""
    return [row for row in rows(out) if "val_loss" in row and not row.get("final")]


def timeless(out):
    """All rows without what a clock says."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(out)]


def same_tensors(a, b):
    """Two nested structures of dicts, lists and tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b
