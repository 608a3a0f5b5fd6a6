"""What several test files share: a small prepared corpus and a small trained run."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prepare
import train
from fake_hub import make_real_layouts

ROOT = Path(train.__file__).parent
torch.set_num_threads(1)  # such small models are slower on two, and two test processes share the machine

# a model that trains in milliseconds, and a run of it; tests add or override flags
SMALL = ["--n_layer=2", "--d_model=32", "--n_head=2", "--d_ff=48", "--context_length=128", "--block_size=64", "--batch_tokens=512", "--micro_batch=8",
         "--max_steps=12", "--warmup_steps=3", "--eval_every=6", "--eval_tokens=1024", "--final_eval_tokens=1024", "--save_every=4", "--log_every=1",
         "--sample_tokens=8", "--dtype=float32", "--compile=off", "--device=cpu"]


FIRST = ("test_hub", "test_fake_hub", "test_chats", "test_bench", "test_end_to_end")  # whose set-up is costly, or whose tests are


def pytest_collection_modifyitems(items):
    """The tests that take long come first for either process, so that neither waits at the end for the other's. Behind them comes what is to stay in
    one process: the other takes over from the end."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    long, short = ([item for item in items if bool(item.get_closest_marker("long")) == yes] for yes in (True, False))
    half = len(short) // 2
    items[:] = long[::2] + short[:half] + long[1::2] + short[half:]  # each begins with one half and takes over from the other's end


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """A folder with data/pydocs-hybrid (600 tokens of vocabulary) and data/two-hybrid: two sources, en and it, one tokenizer."""
    root = tmp_path_factory.mktemp("corpora")
    for name in ("one", "two"):
        text = (ROOT / "train.py").read_text() if name == "one" else (ROOT / "prepare.py").read_text().upper()
        (root / f"{name}.txt").write_text(text)
    quiet = dict(out_dir=str(root / "data"), max_tokens=300_000)
    prepare.prepare(["pydocs"], prepare.Settings(tokenizer="hybrid", vocab_size=600, name="pydocs-hybrid", **quiet))
    prepare.prepare([f"{root}/one.txt@en/code", f"{root}/two.txt@it/books"],
                    prepare.Settings(tokenizer=str(root / "data/pydocs-hybrid/tokenizer.json"), name="two-hybrid", **quiet))
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
        monkeypatch.setattr("train.draw_loss", lambda *args: None)


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


def command(*words, **env):
    """Starts a tool in a process of its own, in the current directory; stdout and stderr are pipes."""
    return subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env})


def same_tensors(a, b):
    """Two nested structures of dicts, lists and tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b
