"""prepare.py and the Hugging Face Hub: the real `datasets` library streams from a stand-in on loopback that breaks in
all the usual ways."""
import gzip
import json
import math
import random
import re
import shutil
import time

import numpy as np
import pytest

import prepare
from common import UserError
from conftest import ROOT, command
from corpus.chats import chat_messages
from corpus.folder import read_meta
from corpus.catalogue import HUB, MIXES
from corpus.hub import HubReader, hub_name, hub_source
from corpus.tokenizer import load_tokenizer
from corpus_helpers import expected as framed, masked, snapshot, texts_of
from fake_hub import FakeHub, Fault, alpaca, prose, talk, turns, write_repository

# Every name in turn, in one process: importing `datasets` takes longer than all of them. Blocks are small, so that
# there are several
PREPARE = """
import json, sys, prepare
from common import run_tool
from corpus import passes
from corpus.hub import HubReader, Patience
HubReader.BLOCK, Patience.TRIES, Patience.PAUSE, passes.BATCH_BYTES, passes.SAVE_SECONDS = 7, 3, 0.01, 3000, -1
passes.SAMPLE_BYTES, passes.HUB_SCAN = 20_000, 3000
for words in json.loads(sys.argv[1]):
    prepare.main(words)
"""

SMALL = ["--vocab_size=300", "--max_tokens=0", "--val_fraction=0.1"]
JOB = ["cosmopedia", "hq-sentences", *SMALL, "--name=x"]

# For processes that must not reach anything: nothing listens on this port
NOWHERE = dict(HF_ENDPOINT="http://127.0.0.1:9")


def child(hub, home, jobs, source=PREPARE, status=0, **env):
    """Runs `source` with `jobs` as its argument in a process that takes `hub` for the Hub: (output, errors)."""
    hub_env = hub.env(home, impatient=True) if hub else {}
    process = command("-c", source, json.dumps(jobs), **{**hub_env, **env})
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, (out[-2000:], err[-3000:])
    return out, err


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


@pytest.fixture(scope="module")
def prepared(hub_root, layouts, tmp_path_factory):
    """data/NAME of every set and mix, prepared through the stand-in; the hub, for what it was asked."""
    data = tmp_path_factory.mktemp("prepared")
    with FakeHub(hub_root) as hub:
        jobs = [[name, *SMALL, f"--out_dir={data}", f"--name={name}"] for name in (*HUB, *MIXES)]
        child(hub, data / "home", jobs)
    return data, hub


def documents(folder, i=0):
    return texts_of(folder, "train", i) + texts_of(folder, "val", i)


# ---------------------------------------------------------------------------------------------------- the catalogue

TEXTS = [name for name, spec in HUB.items() if not spec.chat]
CHATS = [name for name, spec in HUB.items() if spec.chat]


def written_rows(layouts, repo, config=None):
    """The training rows that were written for a repository, or for one of its configurations."""
    return next(rows for (r, c, split), rows in layouts.items()
                if r == repo and split == "train" and config in (None, c))


def expected(name, layouts):
    """The documents of a set in file order, made from the rows that were written."""
    spec, found = HUB[name], []
    for config, _ in spec.configs:
        for row in written_rows(layouts, spec.repo, config):
            if name != "fineweb-hq" or row["quality_score"] > 0.8:
                found.append(row[spec.read_columns[0] if spec.read_columns else "text"])
    if spec.repo == "google/wiki40b":
        found = [eval(t).decode() if t.startswith("b") else t for t in found]
        found = [re.sub(r"\s*_START_\w+?_\n", "\n\n", t).replace("_NEWLINE_", "\n").strip() for t in found]
    if name == "wikitext":
        found = [x for x in re.split(r"(?m)^(?= = [^=].* = $)", "".join(found)) if x.strip()]
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_every_set_is_read_whole_with_its_filter_columns_and_cleaning(name, prepared, layouts):
    data, hub = prepared
    texts, meta = documents(data / name), read_meta(data / name)["sources"][0]
    assert sorted(texts) == sorted(set(expected(name, layouts))) and len(texts) >= 10
    assert not any("_START_" in t or "_NEWLINE_" in t or t.startswith("b'") for t in texts)
    origin = meta["origin"]
    assert (origin["dataset"], origin["revision"]) == (HUB[name].repo, hub.sha(HUB[name].repo))
    assert (meta["language"], meta["kind"]) == (HUB[name].language, HUB[name].kind)
    if name != "wikitext":  # in blocks of seven, each in an order of its own
        train = texts_of(data / name, "train")
        assert train != [t for t in expected(name, layouts) if t in set(train)]


@pytest.mark.parametrize("name", CHATS)
def test_every_chat_set_is_its_chats_with_their_masks(name, prepared, layouts):
    rows = written_rows(layouts, HUB[name].repo)
    messages = [chat_messages(row["text"] if name == "tinychat" else row) for row in rows]
    folder = prepared[0] / name
    chats = masked(folder, "train") + masked(folder, "val")
    assert sorted(chats) == sorted(set(framed(messages))) and len(chats) >= 30

    # the whole of each chat, and each reply by itself
    entry, tokenizer = read_meta(folder)["sources"][0], load_tokenizer(str(folder / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id("<|bos|>"), tokenizer.token_to_id("<|eos|>")
    whole, replies = [], []
    for split in ("train", "val"):
        ids = np.fromfile(folder / entry[split]["file"], "<u2")
        mask = np.fromfile(folder / entry[split]["mask"]["file"], np.uint8)
        for chat in np.split(ids, np.flatnonzero(ids == bos))[1:]:
            whole.append(tokenizer.decode(chat.tolist(), skip_special_tokens=False))
        learned = ids[mask == 1]
        replies += [tokenizer.decode(r.tolist()) for r in np.split(learned, np.flatnonzero(learned == eos) + 1)[:-1]]
    end = {"assistant": "<|eos|>"}
    texts = {"<|bos|>" + "".join(f"<|{role}|>{text}{end.get(role, '')}" for role, text in m) for m in messages}
    assert sorted(whole) == sorted(texts)
    different = {tuple(m) for m in messages}
    assert sorted(replies) == sorted(text for m in different for role, text in m if role == "assistant")


def test_only_the_named_configs_and_splits_are_downloaded(prepared):
    names = {name for name, _ in prepared[1].downloads()}
    others = ("deu_Latn", "finemath-3plus", "wikitext-2-raw", "validation", "test", "fineweb-edu/data")
    assert not [name for name in names if any(x in name for x in others)]


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_are_their_sources_in_order(mix, prepared, layouts):
    data, _ = prepared
    names = [name for name, _ in MIXES[mix][1]]
    assert [source["name"] for source in read_meta(data / mix)["sources"]] == names
    for i, name in enumerate(names):
        if name in TEXTS:
            assert sorted(documents(data / mix, i)) == sorted(set(expected(name, layouts)))


def test_mixes_have_their_cards_budgets():
    budgets = [budget for _, budget in MIXES["ivme"][1]]
    assert budgets == [710e6, 160e6, 235e6, 395e6, 80e6] and sum(budgets) == 1.58e9
    # the card's shares, in ascending quality
    assert [round(100 * budget / 1.58e9) for budget in budgets] == [45, 10, 15, 25, 5]
    names = {mix: [name for name, _ in MIXES[mix][1]] for mix in ("i3", "i3-80m", "i3-200m")}
    assert names["i3"] == ["tinychat"]
    assert names["i3-80m"] == ["tinystories", "tinychat", "hq-sentences"]
    assert names["i3-200m"] == [*names["i3-80m"], "wikitext"]
    assert sum(budget for _, budget in MIXES["i3-80m"][1]) == 3e6
    languages = {"en": 0, "it": 0}
    for name, budget in MIXES["gpt2preln"][1]:
        languages[HUB[name].language] += budget
    assert abs(languages["en"] - 3_593_711_492) < 2 and abs(languages["it"] - 3_305_883_508) < 2


def test_the_list_shows_every_name_with_its_figures(capsys):
    assert prepare.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, spec in HUB.items():
        line, = (x for x in lines if x.startswith(f"{name} "))
        assert all(x in line for x in (spec.about, spec.licence, spec.rows, spec.tokens, spec.disk, spec.language))
    assert any(x.startswith("ivme: ") and "1,580M" in x for x in lines)
    assert "ORG/NAME" in lines[-1]


def test_default_budgets_of_large_sets_and_budgets_of_mixes_are_what_is_asked_for(hub_root, layouts, tmp_path):
    names = ["finemath", "python-stack", "wikipedia:2K"]
    with FakeHub(hub_root) as hub:
        child(hub, tmp_path / "home", [[*names, "--vocab_size=300", f"--out_dir={tmp_path}", "--name=a"],
                                       ["ivme", "--vocab_size=300", f"--out_dir={tmp_path}", "--name=b"]])
    sources = read_meta(tmp_path / "a")["sources"]
    assert [source["budget"] for source in sources] == [200_000_000, 0, 2000]
    assert sources[2]["train"]["tokens"] < 2600
    budgets = [source["budget"] for source in read_meta(tmp_path / "b")["sources"]]
    assert budgets == [budget for _, budget in MIXES["ivme"][1]]


# ---------------------------------------------------------------------------------------------------- other data sets

def made(row, n=60):
    """Rows that row(rng, i) makes."""
    rng = random.Random(row.__name__)
    return [row(rng, i) for i in range(n)]


def page(rng, i):
    return dict(url=f"https://example.org/{i}", text=prose(rng), embedding=[0.5] * 8)


def note(rng, i):
    return dict(id=i, content=prose(rng))


def entry(rng, i):
    return dict(title=f"no {i}", body=prose(rng), text="not this")


def asked(rng, i):  # alpaca with a column that holds all of it as text
    return {"text": "not this", **alpaca(rng, i), "output": prose(rng)}


MANY = {"old": {"train": "old/*"}, "new": {"train": "new/*"}}
OTHERS = {  # repository -> (its files, its configurations)
    "me/pages": ({"data/train-0.parquet": made(page)[:30], "data/train-1.parquet": made(page)[30:]}, None),
    "you/pages": ({"train.jsonl": made(note, 40)}, None),
    "me/notes-1.5": ({"train.jsonl": made(note), "test.jsonl": made(page, 5)}, None),
    "me/many": ({"old/0.parquet": made(page, 5), "new/0.parquet": made(entry)}, MANY),
    "me/talks": ({"data/train-0.parquet": made(talk)}, None),
    "me/asked": ({"train.jsonl": made(asked)}, None),
    "me/lines": ({"train.txt": made(turns)}, None),
    "me/exam": ({"test.jsonl": made(note, 5), "validation.jsonl": made(note, 5)}, None),
    "me/titles": ({"train.parquet": [dict(title=f"{i}", year=i) for i in range(9)]}, None),
    "me/nothing": ({}, None),
    "me/prose": ({f"{k}.txt": [dict(text=line) for line in ("ROMEO:", "", *(x["text"] for x in made(page)[k:k + 8]))]
                  for k in (0, 8)}, None),
    "me/twice": ({"train/train-0/a.jsonl": made(note, 30), "train/train-1/b.jsonl": made(note)[30:]}, None),
}


@pytest.fixture(scope="module")
def others_root(tmp_path_factory):
    """The stand-in's folder with data sets that are in no catalogue."""
    root = tmp_path_factory.mktemp("others")
    for repo, (files, configs) in OTHERS.items():
        write_repository(root, repo, files, configs)
    return root


LINES = [row["text"] for row in made(turns)]

# folder's name -> (words of the command; name, language and kind of the source; its origin; its documents or chats)
NEW = {
    "web": (["me/pages@it/web"], ("pages", "it", "web"),
            dict(dataset="me/pages", configs=[None], columns=["text"], filter=[]), [x["text"] for x in made(page)]),
    "content": (["me/notes-1.5"], ("notes-1_5", "und", "text"),
                dict(dataset="me/notes-1.5", configs=[None], columns=["content"], filter=[]),
                [x["content"] for x in made(note)]),
    "config": (["me/many@en", "--config=new", "--column=body"], ("many", "en", "text"),
               dict(dataset="me/many", configs=["new"], columns=["body"], filter=[]), [x["body"] for x in made(entry)]),
    "messages": (["me/talks"], ("talks", "und", "chat"),
                 dict(dataset="me/talks", configs=[None], columns=["messages"], filter=[]), made(talk)),
    "alpaca": (["me/asked@en"], ("asked", "en", "chat"),
               dict(dataset="me/asked", configs=[None], columns=["instruction", "input", "output"], filter=[]),
               made(asked)),
    "lines": (["me/lines@en/small"], ("lines", "en", "small"),
              dict(dataset="me/lines", configs=[None], columns=["text"], filter=[]), LINES),
    "files": (["me/prose"], ("prose", "und", "text"),
              dict(dataset="me/prose", configs=[None], columns=["text"], filter=[]),
              ["\n".join(["ROMEO:", "", *(x["text"] for x in made(page)[k:k + 8]), ""]) for k in (0, 8)]),
    "found twice": (["me/twice"], ("twice", "und", "text"),
                    dict(dataset="me/twice", configs=[None], columns=["content"], filter=[]),
                    [x["content"] for x in made(note)]),
    "split": (["me/exam", "--split=test"], ("exam", "und", "text"),
              dict(dataset="me/exam", configs=[None], columns=["content"], filter=[], split="test"),
              [x["content"] for x in made(note, 5)]),
    "as text": (["me/lines", "--column=text"], ("lines", "und", "text"),
                dict(dataset="me/lines", configs=[None], columns=["text"], filter=[]), LINES),
}


@pytest.fixture(scope="module")
def new(others_root, tmp_path_factory):
    """data/NAME of the names in NEW, prepared through the stand-in; the hub."""
    data = tmp_path_factory.mktemp("new")
    with FakeHub(others_root) as hub:
        jobs = [[*words, *SMALL, f"--out_dir={data}", f"--name={name}"] for name, (words, *_) in NEW.items()]
        child(hub, data / "home", jobs)
    return data, hub


@pytest.mark.parametrize("name", NEW)
def test_a_data_set_that_is_in_no_catalogue_prepares_with_no_code(name, new):
    data, hub = new
    _, label, origin, rows = NEW[name]
    meta = read_meta(data / name)
    source = meta["sources"][0]
    assert (source["name"], source["language"], source["kind"]) == label
    assert source["origin"] == dict(origin, revision=hub.sha(origin["dataset"]))
    if name in ("messages", "alpaca", "lines"):
        chats = framed(map(chat_messages, rows))
        assert sorted(masked(data / name, "train") + masked(data / name, "val")) == sorted(set(chats))
    else:
        assert sorted(documents(data / name)) == sorted(rows)
        train = texts_of(data / name, "train")
        assert len(train) < 5 or train != [text for text in rows if text in train]


def test_of_other_data_sets_only_the_training_split_of_the_configuration_is_downloaded(new):
    names = {name for name, _ in new[1].downloads() if not name.startswith("me/exam")}
    assert "me/many/new/0.parquet" in names and not any("/old/" in name or "test" in name for name in names)


def test_a_large_column_is_read_neither_for_the_first_look_nor_later(tmp_path):
    wide = [dict(text=f"text {i}") for i in range(24)]
    for row in wide:
        row["embedding"] = np.random.default_rng(0).standard_normal(120_000).tolist()
    write_repository(tmp_path / "root", "me/wide", {"train.parquet": wide})
    with FakeHub(tmp_path / "root") as hub:
        child(hub, tmp_path / "home", [["me/wide", *SMALL, f"--out_dir={tmp_path}", "--name=x"]])
    assert sorted(documents(tmp_path / "x")) == sorted(row["text"] for row in wide)
    fetched = sum(last - first + 1 for _, (first, last) in hub.downloads())
    assert fetched < 0.9 * (tmp_path / "root/me/wide/train.parquet").stat().st_size


def test_several_other_data_sets_and_one_of_the_catalogue_make_one_corpus(others_root, hub_root, layouts, tmp_path):
    shutil.copytree(others_root, tmp_path / "root")
    shutil.copytree(hub_root / "roneneldan", tmp_path / "root/roneneldan")
    words = ["me/pages@it/web:1K", "tinystories", "you/pages", "--vocab_size=300", f"--out_dir={tmp_path}"]
    with FakeHub(tmp_path / "root") as hub:
        out, err = child(hub, tmp_path / "home", [words, words])
    assert "is there already, made with these settings" in out
    folder = tmp_path / "pages+tinystories+pages-bpe-300"
    sources = read_meta(folder)["sources"]
    assert [(s["name"], s["budget"]) for s in sources] == [("pages", 1000), ("tinystories", 0), ("pages", 0)]
    assert [s["origin"]["revision"] for s in sources] == [hub.sha(s["origin"]["dataset"]) for s in sources]
    assert 1000 <= sources[0]["train"]["tokens"] < 1500
    assert sorted(documents(folder, 2)) == sorted(row["content"] for row in made(note, 40))


WRONG = {
    "no such data set": (["me/none"], "none: the Hugging Face Hub has no public data set me/none, and there is no "
                                      "such file or folder here; names of data sets look like HuggingFaceTB/finemath"),
    "no configuration": (["me/many"], "me/many has several configurations: 'old', 'new'; choose one with --config"),
    "another configuration": (["me/many", "--config=neww"],
                              r"me/many has no configuration 'neww' \(did you mean new\?\); it has 'old', 'new'$"),
    "a configuration too many": (["me/pages", "--config=new"],
                                 "me/pages has no configuration 'new'; it has 'default'$"),
    "no such column": (["me/pages", "--column=body"],
                       "me/pages has no column 'body', it has 'url', 'text', 'embedding'; choose one with --column"),
    "no such column of rows": (["you/pages", "--column=text"],
                               "you/pages has no column 'text', it has 'id', 'content'; choose one with --column"),
    "no text": (["me/titles"], "me/titles has no column 'text', it has 'title', 'year'; choose one with --column"),
    "no training split": (["me/exam"],
                          "me/exam has no split called train.*; it has 'validation', 'test'; choose one with --split$"),
    "no data": (["me/nothing"], "nothing: me/nothing cannot be read as expected .EmptyDatasetError: "),
    "a configuration for the catalogue": (["wikipedia", "--config=20231101.it"],
                                          "--config is for .* ORG/NAME; wikipedia has a configuration of its own$"),
    "a copy that is not there": (["me/pages", "--source_dir=nowhere"],
                                 "--source_dir=nowhere holds no copy of me/pages: expected nowhere/me/pages or "),
    "a name that is a file's": (["me/pages.jsonl"], "'me/pages.jsonl' is neither a file or folder here, nor a corpus"),
}

COMPLAIN = PREPARE.split("for words")[0] + """
lines = []
for words in json.loads(sys.argv[1]):
    try:
        prepare.main(words)
        lines.append("nothing wrong")
    except prepare.UserError as e:
        lines.append(str(e))
print(json.dumps(lines))
"""


@pytest.fixture(scope="module")
def complaints(others_root, tmp_path_factory):
    """What is wrong -> the line that says so."""
    home = tmp_path_factory.mktemp("complaints")
    with FakeHub(others_root) as hub:
        out, err = child(hub, home, [[*words, f"--out_dir={home}/data"] for words, _ in WRONG.values()], COMPLAIN)
    assert not (home / "data").exists()
    return dict(zip(WRONG, json.loads(out.splitlines()[-1])))


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_name_is_said_in_one_line(what, complaints):
    assert re.search(WRONG[what][1], complaints[what]), complaints[what]
    assert "\n" not in complaints[what]


def test_names_of_the_hub_are_an_organisation_and_a_name():
    assert hub_name("ORG/NAME") == ("ORG/NAME", "", "")
    assert hub_name("o-1/n_2.5@it/web") == ("o-1/n_2.5", "it", "web")
    assert hub_name("ORG/NAME@it") == ("ORG/NAME", "it", "")
    for word in ("NAME", "a/b/c", "/a/b", "./a", "../a", "a/", "a/b.txt", "a/b.jsonl.gz", "a/b c", "@it/web"):
        assert hub_name(word) is None


def test_a_name_that_is_unknown_is_answered_with_all_kinds_of_names():
    with pytest.raises(UserError, match="'pydoc' is neither .*ORG/NAME.*did you mean pydocs or pydocs-chat"):
        prepare.prepare(["pydoc"], prepare.Settings())


# ---------------------------------------------------------------------------------------------------- samples

KINDS = 20  # files of the set, each with a word of its own


def kinds(root, ending):
    """Writes a set whose files differ visibly: each file's texts begin with the file's own word."""
    files = {}
    for k in range(KINDS):
        rng = random.Random(k)
        files[f"data/train-{k:05}-of-{KINDS:05}.{ending}"] = [
            dict(text=f"kind{chr(97 + k)} {i}: {prose(rng)}") for i in range(60)]
    write_repository(root, "me/kinds", files)


def kinds_in(folder):
    return {text.split()[0] for text in texts_of(folder, "train")}


SAMPLE = ["me/kinds:5000", "--tokenizer=hybrid", "--vocab_size=600"]  # about a tenth of the set
PLAIN = PREPARE.replace("HubReader.BLOCK, ", "").replace("= 7, 3,", "= 3,")  # blocks as long as they are


@pytest.mark.parametrize("ending", ["parquet", pytest.param("jsonl", marks=pytest.mark.slow)])
def test_a_budget_of_a_tenth_holds_text_of_all_files_at_few_requests_and_a_copy_gives_the_same(ending, tmp_path):
    kinds(tmp_path / "root", ending)
    with FakeHub(tmp_path / "root") as hub:
        child(hub, tmp_path / "home", [[*SAMPLE, f"--out_dir={tmp_path}/data", "--name=x"],
                                       ["me/kinds", *SAMPLE[1:], f"--out_dir={tmp_path}/data", "--name=all"]], PLAIN)
        opened = hub.downloads()
    whole, part = (read_meta(tmp_path / "data" / name)["sources"][0] for name in ("all", "x"))
    assert 5000 <= part["train"]["tokens"] < 5300 < 0.15 * whole["train"]["tokens"]
    assert len(kinds_in(tmp_path / "data/x")) == len(kinds_in(tmp_path / "data/all")) == KINDS

    # what was read is named, in the drawn order and not in that of the names
    assert sorted(part["files"]) == whole["files"] != part["files"] and len(whole["files"]) == KINDS
    assert len(opened) < 9 * KINDS  # three times for the sample, and for all of it at the beginning and then once

    copy = [*SAMPLE, f"--source_dir={tmp_path}/root", f"--out_dir={tmp_path}/copy", "--name=x"]
    nowhere = dict(NOWHERE, HF_HOME=str(tmp_path / "home2"))
    child(None, None, [copy, [*copy[:-1], "--name=other", "--seed=1"]], PLAIN, **nowhere)
    copied, other = (read_meta(tmp_path / "copy" / name)["sources"][0] for name in ("x", "other"))
    for entry in (part["train"], part["val"]):
        name = entry["file"]
        assert (tmp_path / "copy/x" / name).read_bytes() == (tmp_path / "data/x" / name).read_bytes()
    assert copied["files"] == part["files"] != other["files"]
    assert texts_of(tmp_path / "copy/other", "train") != texts_of(tmp_path / "copy/x", "train")


def test_the_tokenizer_learns_from_all_over_a_set_too(tmp_path):
    """Also if all of it is read afterwards."""
    kinds(tmp_path / "root", "jsonl")
    with FakeHub(tmp_path / "root") as hub:
        words = ["me/kinds", "--tokenizer=hybrid", "--vocab_size=2000", f"--out_dir={tmp_path}", "--name=x"]
        child(hub, tmp_path / "home", [words], PLAIN)  # the sample is a twelfth of the set
    vocabulary = load_tokenizer(str(tmp_path / "x/tokenizer.json")).get_vocab()
    assert sum(f"kind{chr(97 + k)}" in vocabulary for k in range(KINDS)) >= 0.9 * KINDS


@pytest.mark.slow
def test_a_sample_goes_on_after_a_stop_with_the_same_files(tmp_path):
    kinds(tmp_path / "root", "parquet")
    with FakeHub(tmp_path / "root") as hub:
        child(hub, tmp_path / "home", [[*SAMPLE, f"--out_dir={tmp_path}/whole", "--name=x"]])
        out, _ = child(hub, tmp_path / "home", [[*SAMPLE, f"--out_dir={tmp_path}/killed", "--name=x"]], KILLED)
    assert int(out.split()[-1]) >= 2, out
    assert snapshot(tmp_path / "killed/x") == snapshot(tmp_path / "whole/x")


# ---------------------------------------------------------------------------------------------------- faults and stops

def test_dropped_connections_and_busy_servers_change_nothing(hub_root, good, tmp_path):
    with FakeHub(hub_root) as hub:
        hub.faults += [Fault("drop", "*stanford*", times=9, skip=2), Fault("status", "*train.txt.gz", times=9),
                       Fault("status", "*wikihow*", status=429, times=9)]
        out, _ = child(hub, tmp_path / "home", [[*JOB, f"--out_dir={tmp_path}/faulty"]])
        assert not any(fault.times for fault in hub.faults) and "trying again in" in out
    assert snapshot(tmp_path / "faulty/x") == good


def test_the_first_look_at_a_data_set_is_tried_again_too(others_root, new, tmp_path):
    words = ["me/notes-1.5", *SMALL, f"--out_dir={tmp_path}", "--name=x"]
    with FakeHub(others_root) as hub:
        hub.faults += [Fault("status", "*train.jsonl", times=9)]
        out, _ = child(hub, tmp_path / "home", [words])
        assert not any(fault.times for fault in hub.faults) and "notes-1_5 " in out and "trying again in" in out
    assert snapshot(tmp_path / "x") == snapshot(new[0] / "content")


BEYOND_REPAIR = {
    "truncate": r"cosmopedia: HuggingFaceTB/cosmopedia cannot be read as expected \(ArrowInvalid",
    "column": r"cosmopedia: HuggingFaceTB/cosmopedia cannot be read as expected .*text",
    "down": r"cosmopedia: the connection to the Hugging Face Hub is lost .*run the same command again",
}


# Waits between the two passes for the file `go`, which the test writes when it has spoilt something
SPOILT_BETWEEN = """
import pathlib, time
second_pass, (first, go) = prepare.second_pass, map(pathlib.Path, sys.argv[2:])
def later(*args):
    first.touch()
    while not go.exists():
        time.sleep(0.01)
    second_pass(*args)
prepare.second_pass = later
for words"""


@pytest.mark.parametrize("fault", BEYOND_REPAIR)
def test_what_cannot_be_mended_is_one_line_and_the_work_goes_on_later(fault, own_root, good, tmp_path):
    """The connection breaks after the first pass, so that half of the work is done then."""
    as_a_tool = "    sys.argv = ['prepare.py', *words]\n    run_tool(prepare.main)"
    tool = PREPARE.replace("    prepare.main(words)", as_a_tool).replace("for words", SPOILT_BETWEEN)
    job = [*JOB, f"--out_dir={tmp_path}/data"]
    later = own_root / "HuggingFaceTB/cosmopedia/data/stanford/train-00001-of-00002.parquet"
    whole = later.read_bytes()
    if fault == "column":
        import pyarrow.parquet as pq
        names = ["prompt", "text_token_length", "body", "seed_data", "format", "audience"]
        pq.write_table(pq.read_table(later).rename_columns(names), later)
    with FakeHub(own_root) as hub:
        env = hub.env(tmp_path / "home", impatient=True)
        process = command("-c", tool, json.dumps([job]), tmp_path / "first", tmp_path / "go", **env)
        while not (tmp_path / "first").exists() and process.poll() is None:
            time.sleep(0.01)
        if fault == "truncate":
            hub.faults.append(Fault("truncate", "*stanford/*00001-of*"))
        elif fault == "down":
            hub.faults.append(Fault("status", "*stanford/*00001-of*", status=503, times=math.inf))
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2 and err.startswith("prepare.py: ") and err.count("\n") == 1, err
        assert re.search(BEYOND_REPAIR[fault], err), err

        later.write_bytes(whole)
        hub.faults.clear()
        out, _ = child(hub, tmp_path / "home2", [job])
        assert ("resuming" in out) == (fault != "column")
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
os.replace, (words,), kills = replace_or_die, json.loads(sys.argv[1]), 0
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
        out, _ = child(hub, tmp_path / "home", [[*JOB, f"--out_dir={tmp_path}/killed"]], KILLED)
    assert int(out.split()[-1]) >= 4, out  # ten moments and more: test_prepare.py, where a process costs less
    assert snapshot(tmp_path / "killed/x") == good


def test_other_data_sets_go_on_after_a_stop_as_those_of_the_catalogue_do(others_root, tmp_path):
    """Two of one name, so that each must find its own commit and its own place again."""
    words = ["me/pages", "you/pages", *SMALL, "--name=x"]
    with FakeHub(others_root) as hub:
        child(hub, tmp_path / "home", [[*words, f"--out_dir={tmp_path}/whole"]])
        out, _ = child(hub, tmp_path / "home", [[*words, f"--out_dir={tmp_path}/killed"]], KILLED)
    assert int(out.split()[-1]) >= 3, out
    assert snapshot(tmp_path / "killed/x") == snapshot(tmp_path / "whole/x")


# ---------------------------------------------------------------------------------------------------- without a network

def test_a_copy_of_the_repository_gives_the_same_text_without_a_network(hub_root, layouts, prepared, tmp_path):
    copies = {"cosmopedia": hub_root, "wiki40b-it": hub_root / "google",
              "hq-sentences": hub_root / "agentlans/high-quality-english-sentences"}
    jobs = [[name, *SMALL, f"--source_dir={copy}", f"--out_dir={tmp_path}", f"--name={name}"]
            for name, copy in copies.items()]
    child(None, None, jobs, **NOWHERE, HF_HOME=str(tmp_path / "home"))
    for name in copies:
        assert documents(tmp_path / name) == documents(prepared[0] / name)
        assert "revision" not in read_meta(tmp_path / name)["sources"][0]["origin"]


def test_a_copy_of_any_other_data_set_gives_the_same_text_without_a_network(others_root, new, tmp_path):
    copies = {"web": others_root, "content": others_root / "me", "config": others_root / "me/many"}
    jobs = [[*NEW[name][0], *SMALL, f"--source_dir={copy}", f"--out_dir={tmp_path}", f"--name={name}"]
            for name, copy in copies.items()]
    child(None, None, jobs, **NOWHERE, HF_HOME=str(tmp_path / "home"))
    for name in copies:
        assert documents(tmp_path / name) == documents(new[0] / name)
        assert read_meta(tmp_path / name)["sources"][0]["origin"] == NEW[name][2]


def test_a_mix_of_one_source_finds_its_copy_where_the_source_alone_finds_it(tmp_path):
    copy = tmp_path / "TinyChat"
    copy.mkdir()
    for name in ("tinychat", "i3"):
        source, = prepare.plan_sources([name], prepare.Settings(source_dir=str(copy)))
        assert source.folder == copy
    with pytest.raises(UserError, match="holds no copy"):
        prepare.plan_sources(["i3", "pydocs"], prepare.Settings(source_dir=str(copy)))


def test_an_empty_copy_is_refused_in_one_line(tmp_path):
    names = ("tinychat", "me/pages")
    for name in ("TinyChat", "pages"):
        (tmp_path / name).mkdir()
    jobs = [[name, *SMALL, f"--source_dir={tmp_path}", f"--out_dir={tmp_path}/data"] for name in names]
    out, err = child(None, None, jobs, COMPLAIN, **NOWHERE, HF_HOME=str(tmp_path / "home"))
    for line in json.loads(out.splitlines()[-1]):
        assert "cannot be read as expected" in line and "\n" not in line


def test_a_stop_reaches_the_lines_that_wikitexts_articles_are_made_of(monkeypatch, tmp_path):
    """Without that, a lost connection would be waited for though nobody reads on."""
    readers = []
    texts = HubReader.texts
    monkeypatch.setattr(HubReader, "texts", lambda self, *args: readers.append(self) or texts(self, *args))
    (tmp_path / "wikitext").mkdir()
    reader = hub_source("wikitext", str(tmp_path), several=False).reader()
    reader.stopped.set()
    assert readers[0].stopped.is_set()


@pytest.mark.parametrize("spoil", ("another", "changed"))
def test_what_was_begun_from_one_copy_does_not_go_on_with_another(spoil, hub_root, layouts, tmp_path):
    repo = "agentlans/high-quality-english-sentences"
    for i, copy in enumerate(("one", "two")):
        shutil.copytree(hub_root / repo, tmp_path / copy / repo)
        lines = b"".join(b"%d: sentence %d of a copy\n" % (i, k) for k in range(300))
        (tmp_path / copy / repo / "train.txt.gz").write_bytes(gzip.compress(lines))
    stop = PREPARE.replace("for words", """
save = passes.Record.save
def save_and_stop(self, **changes):
    save(self, **changes)
    sys.exit(3)
passes.Record.save = save_and_stop
for words""")
    words = ["hq-sentences", "--vocab_size=300", f"--out_dir={tmp_path}/data", "--name=x"]
    nowhere = dict(NOWHERE, HF_HOME=str(tmp_path / "home"))
    child(None, None, [[*words, f"--source_dir={tmp_path}/one"]], stop, status=3, **nowhere)

    copy = "two"
    if spoil == "changed":
        copy = "one"
        shutil.rmtree(tmp_path / "one")
        shutil.move(tmp_path / "two", tmp_path / "one")
    out, _ = child(None, None, [[*words, f"--source_dir={tmp_path}/{copy}"]], **nowhere)
    texts = documents(tmp_path / "data/x")
    assert "resuming" not in out and len(texts) == 300 and all(text.startswith("1: ") for text in texts)


def test_a_copy_that_was_edited_since_is_noticed_at_equal_size(tmp_path):
    kinds(tmp_path, "jsonl")
    path = tmp_path / "me/kinds/data/train-00003-of-00020.jsonl"
    edit = f"""
import os, pathlib
path = pathlib.Path({str(path)!r})
for i, words in enumerate(json.loads(sys.argv[1])):
    if i == 1:
        os.utime(path)
    if i == 2:
        path.write_text(path.read_text().replace("kindd 7:", "kindd 8:"))
"""
    words = [*SAMPLE[1:], f"--source_dir={tmp_path}", f"--out_dir={tmp_path}/data", "--name=x"]
    complain = COMPLAIN.replace("for words in json.loads(sys.argv[1]):", edit.strip("\n"))
    out, _ = child(None, None, [["me/kinds", *words]] * 3, complain, **NOWHERE, HF_HOME=str(tmp_path / "home"))
    lines = json.loads(out.splitlines()[-1])
    assert lines[:2] == ["nothing wrong"] * 2 and re.search("text of kinds has changed since .*/x was made", lines[2])


def test_without_a_network_one_line_names_the_ways_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("finemath", "me/pages")
    both = [command(ROOT / "prepare.py", name, **NOWHERE, HF_HOME=str(tmp_path)) for name in names]
    for name, process in zip(names, both):  # they wait at the same time
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2 and err.count("\n") == 1, err
        for word in (name, "cannot be reached", "pydocs", "file or folder of yours", "--source_dir"):
            assert word in err
    assert not (tmp_path / "data").exists()
