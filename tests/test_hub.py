"""prepare.py and the Hugging Face Hub: the real `datasets` library streams from a stand-in on loopback that breaks in all the usual ways."""
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
from conftest import ROOT
from fake_hub import FakeHub, Fault
from corpus.chats import chat_messages
from corpus.folder import read_meta
from corpus.hub import HUB, MIXES
from corpus.tokenizer import load_tokenizer
from test_prepare import snapshot, texts_of

# Every name in turn, in one process: importing `datasets` takes longer than all of them. Blocks are small, so that there are several
PREPARE = """
import json, sys, prepare
from corpus.hub import HubReader
HubReader.BLOCK, HubReader.TRIES, prepare.BATCH_BYTES, prepare.SAVE_SECONDS = 7, 3, 3000, -1
prepare.SAMPLE_BYTES, prepare.HUB_SCAN = 20_000, 3000
for words in json.load(sys.stdin):
    prepare.main(words)
"""


def child(hub, home, jobs, source=PREPARE, status=0, **env):
    run = subprocess.run([sys.executable, "-c", source], input=json.dumps(jobs), capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(hub.env(home, impatient=True) if hub else {}), **env})
    assert run.returncode == status, (run.stdout[-2000:], run.stderr[-3000:])
    return run


@pytest.fixture(scope="module")
def good(hub_root, layouts, tmp_path_factory):
    """The folder of JOB, prepared without any trouble."""
    data = tmp_path_factory.mktemp("good")
    with FakeHub(hub_root) as hub:
        child(hub, data / "home", [[*JOB, f"--out_dir={data}"]])
    return snapshot(data / "x")


@pytest.fixture
def own_root(hub_root, layouts, tmp_path):
    """A copy of the repositories of JOB, to be spoilt."""
    for repo in ("HuggingFaceTB/cosmopedia", "agentlans/high-quality-english-sentences"):
        shutil.copytree(hub_root / repo, tmp_path / "own" / repo)
    return tmp_path / "own"


SMALL = ["--vocab_size=300", "--max_tokens=0", "--val_fraction=0.1"]
JOB = ["cosmopedia", "hq-sentences", *SMALL, "--name=x"]


@pytest.fixture(scope="module")
def prepared(hub_root, layouts, tmp_path_factory):
    """data/NAME of every set and mix, prepared through the stand-in; the hub, for what it was asked."""
    data = tmp_path_factory.mktemp("prepared")
    with FakeHub(hub_root) as hub:
        child(hub, data / "home", [[name, *SMALL, f"--out_dir={data}", f"--name={name}"] for name in (*HUB, *MIXES)])
    return data, hub


def documents(folder, i=0):
    return texts_of(folder, "train", i) + texts_of(folder, "val", i)


def expected(name, layouts):
    """The documents of a set in file order, made from the rows that were written."""
    spec, found = HUB[name], []
    for config, _ in spec.configs:
        rows = next(rows for (repo, c, split), rows in layouts.items() if repo == spec.repo and (config is None or c == config) and split == "train")
        found += [row[spec.columns[0] if spec.columns else "text"] for row in rows if "quality_score" not in row or name != "fineweb-hq" or row["quality_score"] > 0.8]
    if spec.repo == "google/wiki40b":
        found = [eval(t).decode() if t.startswith("b") else t for t in found]
        found = [re.sub(r"\s*_START_\w+?_\n", "\n\n", t).replace("_NEWLINE_", "\n").strip() for t in found]
    if name == "wikitext":
        found = [x for x in re.split(r"(?m)^(?= = [^=].* = $)", "".join(found)) if x.strip()]
    return found


TEXTS, CHATS = ([name for name, spec in HUB.items() if spec.chat == chat] for chat in (False, True))


@pytest.mark.parametrize("name", TEXTS)
def test_every_set_is_read_whole_with_its_filter_columns_and_cleaning(name, prepared, layouts):
    data, hub = prepared
    texts, meta = documents(data / name), read_meta(data / name)["sources"][0]
    assert sorted(texts) == sorted(set(expected(name, layouts))) and len(texts) >= 10
    assert not any("_START_" in t or "_NEWLINE_" in t or t.startswith("b'") for t in texts)
    origin = meta["origin"]
    assert (origin["dataset"], origin["revision"]) == (HUB[name].repo, hub.sha(HUB[name].repo))
    assert (meta["language"], meta["kind"]) == (HUB[name].language, HUB[name].kind)
    if name not in ("wikitext",):  # in blocks of seven, each in an order of its own
        order = [t for t in expected(name, layouts) if t in set(texts_of(data / name, "train"))]
        assert texts_of(data / name, "train") != order


@pytest.mark.parametrize("name", CHATS)
def test_every_chat_set_is_its_chats_with_their_masks(name, prepared, layouts):
    folder = prepared[0] / name
    entry, tokenizer = read_meta(folder)["sources"][0], load_tokenizer(str(folder / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")
    chats, replies = [], []
    for split in ("train", "val"):
        ids, mask = np.fromfile(folder / entry[split]["file"], "<u2"), np.fromfile(folder / entry[split]["mask"]["file"], np.uint8)
        assert len(ids) == len(mask)
        for chat in np.split(ids, np.flatnonzero(ids == bos))[1:]:
            chats.append(tokenizer.decode(chat.tolist(), skip_special_tokens=False))
        replies += [tokenizer.decode(r.tolist()) for r in np.split(ids[mask == 1], np.flatnonzero(ids[mask == 1] == eos) + 1)[:-1]]
    rows = next(rows for (repo, config, split), rows in layouts.items() if repo == HUB[name].repo and split == "train")
    messages = [chat_messages(row["text"] if name == "tinychat" else row) for row in rows]
    expected = {"<|bos|>" + "".join(f"<|{role}|>{text}" + "<|eos|>" * (role == "assistant") for role, text in m) for m in messages}
    assert sorted(chats) == sorted(expected) and len(chats) >= 30
    assert sorted(replies) == sorted(text for m in {tuple(m) for m in messages} for role, text in m if role == "assistant")


def test_only_the_named_configs_and_splits_are_downloaded(prepared):
    names = {name for name, _ in prepared[1].downloads()}
    assert not [n for n in names if any(x in n for x in ("deu_Latn", "finemath-3plus", "wikitext-2-raw", "validation", "test", "fineweb-edu/data"))]


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_are_their_sources_in_order(mix, prepared, layouts):
    data, _ = prepared
    meta = read_meta(data / mix)
    assert [x["name"] for x in meta["sources"]] == [name for name, _ in MIXES[mix][1]]
    for i, (name, _) in enumerate(MIXES[mix][1]):
        if name in TEXTS:
            assert sorted(documents(data / mix, i)) == sorted(set(expected(name, layouts)))


def test_mixes_have_their_cards_budgets():
    assert [n for _, n in MIXES["ivme"][1]] == [710e6, 160e6, 235e6, 395e6, 80e6] and sum(n for _, n in MIXES["ivme"][1]) == 1.58e9
    assert [round(100 * n / 1.58e9) for _, n in MIXES["ivme"][1]] == [45, 10, 15, 25, 5]  # the card's shares, in ascending quality
    assert [[name for name, _ in MIXES[mix][1]] for mix in ("i3", "i3-80m", "i3-200m")] == [
        ["tinychat"], ["tinystories", "tinychat", "hq-sentences"], ["tinystories", "tinychat", "hq-sentences", "wikitext"]]
    assert sum(n for _, n in MIXES["i3-80m"][1]) == 3e6
    languages = {x: sum(n for name, n in MIXES["gpt2preln"][1] if HUB[name].language == x) for x in ("en", "it")}
    assert abs(languages["en"] - 3_593_711_492) < 2 and abs(languages["it"] - 3_305_883_508) < 2


def test_the_list_shows_every_name_with_its_figures(capsys):
    assert prepare.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, spec in HUB.items():
        line, = (x for x in lines if x.startswith(f"{name} "))
        assert all(x in line for x in (spec.about, spec.licence, spec.rows, spec.tokens, spec.disk, spec.language))
    assert any(x.startswith("ivme: ") and "1,580M" in x for x in lines)


def test_default_budgets_of_large_sets_and_budgets_of_mixes_are_what_is_asked_for(hub_root, layouts, tmp_path):
    with FakeHub(hub_root) as hub:
        child(hub, tmp_path / "home", [["finemath", "python-stack", "wikipedia:2K", "--vocab_size=300", f"--out_dir={tmp_path}", "--name=a"],
                                       ["ivme", "--vocab_size=300", f"--out_dir={tmp_path}", "--name=b"]])
    assert [x["budget"] for x in read_meta(tmp_path / "a")["sources"]] == [200_000_000, 0, 2000]
    assert read_meta(tmp_path / "a")["sources"][2]["train"]["tokens"] < 2600
    assert [x["budget"] for x in read_meta(tmp_path / "b")["sources"]] == [n for _, n in MIXES["ivme"][1]]


def test_dropped_connections_and_busy_servers_change_nothing(hub_root, good, tmp_path):
    with FakeHub(hub_root) as hub:
        hub.faults += [Fault("drop", "*stanford*", times=9, skip=2), Fault("status", "*train.txt.gz", times=9), Fault("status", "*wikihow*", status=429, times=9)]
        out = child(hub, tmp_path / "home", [[*JOB, f"--out_dir={tmp_path}/faulty"]]).stdout
        assert not any(f.times for f in hub.faults) and "trying again in" in out
    assert snapshot(tmp_path / "faulty/x") == good


@pytest.mark.parametrize("fault, line", (("truncate", r"cosmopedia: HuggingFaceTB/cosmopedia cannot be read as expected \(ArrowInvalid"),
                                         ("column", r"cosmopedia: HuggingFaceTB/cosmopedia cannot be read as expected .*text"),
                                         ("down", r"cosmopedia: the connection to the Hugging Face Hub is lost .*the same command goes on")))
def test_what_cannot_be_mended_is_one_line_and_the_work_goes_on_later(fault, line, own_root, good, tmp_path):
    """The broken file lies behind what the first pass reads, so that half of the work is done when it is met."""
    tool = PREPARE.replace("    prepare.main(words)", "    sys.argv = ['prepare.py', *words]\n    run_tool(prepare.main)")
    job, later = [*JOB, f"--out_dir={tmp_path}/data"], own_root / "HuggingFaceTB/cosmopedia/data/stanford/train-00001-of-00002.parquet"
    whole = later.read_bytes()
    with FakeHub(own_root) as hub:
        if fault == "column":
            import pyarrow.parquet as pq
            pq.write_table(pq.read_table(later).rename_columns(["prompt", "text_token_length", "body", "seed_data", "format", "audience"]), later)
        else:
            hub.faults += [Fault("truncate", "*stanford/*00001-of*") if fault == "truncate" else Fault("status", "*stanford/*00001-of*", status=503, times=math.inf)]
        run = child(hub, tmp_path / "home", [job], tool, status=2)
        assert run.stderr.startswith("prepare.py: ") and run.stderr.count("\n") == 1 and re.search(line, run.stderr), run.stderr
        later.write_bytes(whole)
        hub.faults.clear()
        assert (tmp_path / "data/.x.part/train.0-cosmopedia.bin").stat().st_size > 3000
        assert "going on" in child(hub, tmp_path / "home2", [job]).stdout
    assert snapshot(tmp_path / "data/x") == good


# Forks a process for every attempt, and kills it at a random one of the things that leave a trace on the disk
KILLED = PREPARE.split("for words")[0] + """
import datasets, os, random, signal
replace, left = os.replace, 0
def replace_or_die(*args):
    global left
    left -= str(args[1]).endswith("progress.json")
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace, (words,), kills = replace_or_die, json.load(sys.stdin), 0
for seed in range(100):
    pid = os.fork()
    if pid == 0:
        left = random.Random(seed).randrange(3, 8)
        prepare.main(words)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        break
    kills += 1
print("killed", kills)
"""


def test_killed_at_random_moments_of_a_stream_it_writes_the_same_bytes(hub_root, good, tmp_path):
    with FakeHub(hub_root) as hub:
        out = child(hub, tmp_path / "home", [[*JOB, f"--out_dir={tmp_path}/killed"]], KILLED).stdout
    assert int(out.split()[-1]) >= 4, out  # ten moments and more: test_prepare.py, where a process costs less
    assert snapshot(tmp_path / "killed/x") == good


def test_a_copy_of_the_repository_gives_the_same_text_without_a_network(hub_root, layouts, prepared, tmp_path):
    nowhere = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    child(None, None, [[name, *SMALL, f"--source_dir={source}", f"--out_dir={tmp_path}", f"--name={name}"]
                       for name, source in (("cosmopedia", hub_root), ("wiki40b-it", hub_root / "google"), ("hq-sentences", hub_root / "agentlans/high-quality-english-sentences"))], **nowhere)
    for name in ("cosmopedia", "wiki40b-it", "hq-sentences"):
        assert documents(tmp_path / name) == documents(prepared[0] / name)
        assert "revision" not in read_meta(tmp_path / name)["sources"][0]["origin"]


@pytest.mark.parametrize("spoil", ("another", "changed"))
def test_what_was_begun_from_one_copy_does_not_go_on_with_another(spoil, hub_root, good, tmp_path):
    for i, copy in enumerate(("one", "two")):
        shutil.copytree(hub_root / "agentlans/high-quality-english-sentences", tmp_path / copy / "agentlans/high-quality-english-sentences")
        path = tmp_path / copy / "agentlans/high-quality-english-sentences/train.txt.gz"
        path.write_bytes(gzip.compress(b"".join(b"%d: sentence %d of a copy\n" % (i, k) for k in range(300))))
    stop = PREPARE.replace("for words", "prepare.Record.save = (lambda save: lambda self, **changes: (save(self, **changes), sys.exit(3))[0])(prepare.Record.save)\nfor words")
    words = ["hq-sentences", "--vocab_size=300", f"--out_dir={tmp_path}/data", "--name=x"]
    nowhere = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    child(None, None, [[*words, f"--source_dir={tmp_path}/one"]], stop, status=3, **nowhere)
    if spoil == "changed":
        shutil.rmtree(tmp_path / "one")
        shutil.move(tmp_path / "two", tmp_path / "one")
    out = child(None, None, [[*words, f"--source_dir={tmp_path}/{'one' if spoil == 'changed' else 'two'}"]], **nowhere).stdout
    assert "going on" not in out and len(documents(tmp_path / "data/x")) == 300 and all(t.startswith("1: ") for t in documents(tmp_path / "data/x"))


def test_without_a_network_one_line_names_the_ways_on(tmp_path):
    started = time.monotonic()
    run = subprocess.run([sys.executable, str(ROOT / "prepare.py"), "finemath"], capture_output=True, text=True, cwd=tmp_path, timeout=60,
                         env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)})
    assert run.returncode == 2 and time.monotonic() - started < 30
    assert run.stderr.count("\n") == 1 and all(x in run.stderr for x in ("finemath", "cannot be reached", "pydocs", "file or folder of yours", "--source_dir")), run.stderr
    assert not (Path(tmp_path) / "data").exists()
