"""Several processes that make the same folder, started at any distance in time and killed at any moment: a folder that
is there is whole and right, a run that is resumed is exact, and nobody else's file is touched."""
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import prepare
from common import UserError
from conftest import ROOT, SMALL, command, same_tensors, timeless
from corpus.folder import alone, read_meta
from corpus_helpers import document, run, snapshot, write_jsonl, write_rows
from run import read_checkpoint
from runfolder import read_rows

# As slow as a large text would be: a pause before each batch is encoded
SLOW = """
import sys, time, prepare
from common import run_tool
from corpus import passes
passes.BATCH_BYTES, passes.SAVE_SECONDS = 3000, -1
encoded, pause = passes.Encoder.encoded, float(sys.argv[1])
def slowly(self, *args):
    time.sleep(pause)
    return encoded(self, *args)
passes.Encoder.encoded = slowly
sys.argv[:2] = ["prepare.py"]
run_tool(prepare.main)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """(two text files, the folder that one process makes of them)."""
    root = tmp_path_factory.mktemp("text")
    names = [write_jsonl(root / f"{name}.jsonl", (document(i % 250) + name for i in range(300))) for name in "ab"]
    return names, snapshot(run(names, root, name="made", tokenizer="hybrid")[0])


def start(names, out, pause=0.02):
    flags = ["--tokenizer=hybrid", "--vocab_size=300", f"--out_dir={out}", "--name=made"]
    return command("-c", SLOW, pause, *names, *flags)


@pytest.mark.parametrize("distance", [0, 0.3])
def test_two_that_make_the_same_folder_wait_for_each_other(distance, text, tmp_path):
    names, good = text
    first = start(names, tmp_path / "data", pause=0.1)
    time.sleep(distance)
    second = start(names, tmp_path / "data", pause=0.1)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    out = "".join(out for out, _ in outputs)
    assert out.count("waiting      another prepare.py is making") == out.count("is there already") == 1
    assert out.count("tokenizer    hybrid") == 1  # the work was done once
    assert snapshot(tmp_path / "data/made") == good
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["made"]


def test_the_one_that_waits_goes_on_when_the_other_is_killed(text, tmp_path):
    names, good = text
    first = start(names, tmp_path / "data", pause=0.3)
    while not (tmp_path / "data/.made.part/train.0-a.bin").exists():
        time.sleep(0.01)
        assert first.poll() is None
    second, seen = start(names, tmp_path / "data", pause=0), ""
    while "waiting" not in seen:
        line = second.stdout.readline()
        assert line
        seen += line
    os.kill(first.pid, signal.SIGKILL)
    rest, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    out = seen + rest
    assert out.index("waiting") < out.index("resuming") and snapshot(tmp_path / "data/made") == good


def test_the_one_that_waits_is_refused_if_it_asks_for_something_else(text, tmp_path):
    names, good = text
    first = start(names, tmp_path / "data")
    while not (tmp_path / "data/.made.lock").exists() and first.poll() is None:
        time.sleep(0.01)
    second = start(names[:1], tmp_path / "data")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2 and "was made with other settings" in err and err.count("\n") == 1
    assert first.wait(timeout=60) == 0 and snapshot(tmp_path / "data/made") == good


def collide(names, good, out, rng, kills):
    """Starts three processes at random moments, until so many were killed at random ones. How often one was whole."""
    killed, whole = 0, 0
    while killed < kills:
        processes = []
        for _ in range(3):
            processes.append(start(names, out, pause=rng.choice([0, 0.01, 0.05])))
            time.sleep(rng.random() * 0.3)
        for process in rng.sample(processes, rng.randint(1, 3)):
            time.sleep(rng.random() * 0.5)
            killed += process.poll() is None
            process.kill()
        for process in processes:
            if process.wait(timeout=60) != -signal.SIGKILL:
                assert process.returncode == 0, process.communicate()[1]
        if (out / "made").exists():
            whole += 1
            assert snapshot(out / "made") == good
            read_meta(out / "made")
            for path in (out / "made").iterdir():
                path.unlink()
            (out / "made").rmdir()
    assert start(names, out).wait(timeout=60) == 0 and snapshot(out / "made") == good
    return whole


def test_killed_and_colliding_at_random_no_finished_folder_is_wrong(text, tmp_path):
    collide(*text, tmp_path / "data", random.Random(0), kills=4)


@pytest.mark.slow
def test_killed_fifty_times_and_colliding_no_finished_folder_is_wrong(text, tmp_path):
    assert collide(*text, tmp_path / "data", random.Random(1), kills=50) > 5


# ---------------------------------------------------------------------------------------------------- others' files

def test_a_file_of_somebody_in_the_place_of_the_work_is_refused_and_stays(text, tmp_path):
    names, _ = text
    part = tmp_path / ".made.part"
    part.mkdir()
    for name in ("novel.txt", "train.bin", "progress.json.bak"):
        (part / name).write_text("mine")
        with pytest.raises(UserError, match=f"made.part is where the work is done, and holds {name}, which prepare.py"):
            run(names, tmp_path, name="made", tokenizer="hybrid")
        assert (part / name).read_text() == "mine" and list(part.iterdir()) == [part / name]
        (part / name).unlink()
    run(names, tmp_path, name="made", tokenizer="hybrid")


def test_a_folder_of_somebody_is_refused_and_stays(text, tmp_path):
    names, _ = text
    (tmp_path / "made").mkdir()
    (tmp_path / "made/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="made is not a prepared folder"):
        run(names, tmp_path, name="made", tokenizer="hybrid")
    assert snapshot(tmp_path / "made") == {"notes.txt": b"mine"}


def test_a_mistake_leaves_no_folder_and_a_lock_no_trace(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["only one"])
    with pytest.raises(UserError):
        run(path, tmp_path / "new/data")
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError):
        run(path, tmp_path / "there/data")
    assert list((tmp_path / "there").iterdir()) == []


def test_the_lock_is_held_inside_and_free_afterwards(tmp_path):
    folder = tmp_path / "data/x"
    for _ in range(2):
        with alone(folder):
            taken = "import sys, common; sys.exit(common.lock(sys.argv[1]) is None)"
            process = command("-c", taken, folder.parent / ".x.lock")
            assert process.wait(timeout=30) == 1
        assert not Path(folder.parent).exists()


def test_in_a_folder_that_was_deleted_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rmdir(tmp_path)
    with pytest.raises(FileNotFoundError), alone(Path("data/x")):
        pass


@pytest.mark.parametrize("words", [["book.txt"], ["pydocs", "--out_dir=book.txt"]])
def test_where_no_folder_can_be_made_one_line_says_so(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It was a dark night.\n\n" * 400)
    Path("data").write_text("a file")
    process = command(ROOT / "prepare.py", *words, "--vocab_size=300", "--tokenizer=hybrid", "--max_tokens=1000")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert prepare.Settings.out_dir == "data" and Path("data").read_text() == "a file"


# ---------------------------------------------------------------------------------------------------- runs and exports

def killed_at_random(commands, kills, rng, seconds, finished=lambda: False):
    """Starts two processes at a time and kills them at random moments, until so many were killed.

    commands: () -> the words of one. seconds: how long one lives at most. finished: called when both have ended. A
    process that was not killed must succeed, or say in one line why it may not.
    """
    killed = 0
    while killed < kills:
        processes = []
        for _ in range(2):
            processes.append(command(*commands()))
            time.sleep(rng.random() * seconds / 3)
        for process in processes:
            time.sleep(rng.random() * seconds)
            killed += process.poll() is None
            process.kill()
        for process in processes:
            _, err = process.communicate(timeout=60)
            assert process.returncode in (0, -signal.SIGKILL) or process.returncode == 2 and err.count("\n") == 1, err
        finished()


def train_or_resume(tool, flags, out):
    """A run that is begun, or gone on with if it is there."""
    if (Path(out) / "config.json").exists():
        return [ROOT / tool, "--resume", f"--out={out}"]
    return [ROOT / tool, *flags, f"--out={out}"]


def assert_exact(whole, killed):
    a, b = (read_checkpoint(Path(out) / "ckpt.pt") for out in (whole, killed))
    for key in ("step", "tokens", "model", "ema", "optimizer", "loader", "rng"):
        assert same_tensors(a[key], b[key]), key
    assert timeless(whole) == timeless(killed)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["train.py", "finetune.py"])
def test_runs_and_tunings_of_one_name_killed_at_random_are_exact_in_the_end(tool, workdir, trained):
    flags = [*SMALL, "--vocab_size=600", "--data=pydocs-hybrid", "--max_steps=60", "--save_every=4", "--eval_every=12"]
    if tool == "finetune.py":
        chats = [dict(prompt=document(i)[:60], completion=document(i + 50)[:60]) for i in range(120)]
        run([write_rows("chats.jsonl", chats)], Path("data"), name="mine", val_fraction=0.2, vocab_size=0,
            tokenizer="data/pydocs-hybrid/tokenizer.json")
        flags = [f"--init_from={trained}/best.pt", "--data=mine", "--max_steps=60", "--save_every=4", "--eval_every=12",
                 "--block_size=64", "--batch_tokens=512", "--sample_tokens=0", "--dtype=float32", "--device=cpu",
                 "--compile=off", "--log_every=1"]
    start = time.monotonic()
    assert command(ROOT / tool, *flags, "--out=whole").wait(timeout=120) == 0
    whole = time.monotonic() - start
    ended = 0

    def check():
        nonlocal ended
        rows = read_rows(Path("killed/metrics.jsonl")) if Path("killed/metrics.jsonl").exists() else []
        if any(row.get("final") for row in rows):
            assert_exact("whole", "killed")
            shutil.rmtree("killed")
            ended += 1

    killed_at_random(lambda: train_or_resume(tool, flags, "killed"), 12, random.Random(0), whole / 2, check)
    while not ended:
        process = command(*train_or_resume(tool, flags, "killed"))
        assert process.wait(timeout=120) == 0, process.communicate()
        check()


@pytest.mark.slow
def test_exports_of_one_name_killed_at_random_are_whole_or_not_there(workdir, trained):
    words = [ROOT / "export.py", f"--ckpt={trained}/best.pt"]
    start = time.monotonic()
    assert command(*words, "--out=good").wait(timeout=120) == 0
    good, whole = snapshot(Path("good")), time.monotonic() - start

    def check():
        if Path("release").exists():
            assert snapshot(Path("release")) == good
            for path in Path("release").iterdir():
                path.unlink()
            Path("release").rmdir()

    killed_at_random(lambda: [*words, "--out=release"], 50, random.Random(0), whole, check)
    assert command(*words, "--out=release").wait(timeout=120) == 0
    check()
