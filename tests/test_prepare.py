"""prepare.py: the same input gives the same bytes in the same split, and nothing is lost when it is stopped."""
import collections
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, strategies as st

import prepare
from common import UserError
from conftest import command, finish, run_train
from corpus import passes
from corpus.folder import document_edges, read_meta, read_tokens
from corpus.pydocs import pydocs
from corpus.text import TextSource, clean, local_source
from corpus.tokenizer import READY, TRAINERS, from_tiktoken, load_tokenizer, token_byte_counts, train_bpe, train_chunk
from corpus_helpers import (
    KINDS, byte_level, document, library_ids, loaded, normalized, properties, run, size, small_gpt2, snapshot,
    split_ids, texts_of, write_jsonl, write_rows,
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Two sources for each kind of tokenizer: the first 250,000 tokens of pydocs, and Italian books in all formats."""
    root = tmp_path_factory.mktemp("corpus")
    write_jsonl(root / "books/a.jsonl", [document(i) for i in range(100)])
    (root / "books/b.txt").write_text("\n\n".join(document(i) for i in range(100, 300)))
    rows = pyarrow.table({"text": [document(i) for i in range(300, 400)]})
    pyarrow.parquet.write_table(rows, root / "books/c.parquet")
    names = ["pydocs", f"{root}/books@it/books"]
    for kind, vocab_size in KINDS.items():
        run(names, root / "data", tokenizer=kind, vocab_size=vocab_size, max_tokens=250_000, name=kind)
    return root, names


@pytest.fixture(scope="session", params=KINDS)
def prepared(request, corpus):
    return corpus[0] / "data" / request.param


@pytest.fixture(scope="session")
def tokenizer(prepared):
    return load_tokenizer(str(prepared / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------------- unknown text

def test_unknown_characters_are_counted_and_shown(tmp_path, capsys):
    texts = [document(i) + chr(0x4e00 + i) for i in range(200)]  # more characters than a vocabulary of 300 takes
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    folder, meta = run(path, tmp_path / "data", tokenizer="chunk", val_fraction=0.3)
    source = meta["sources"][0]
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    unknown, tokens = 0, 0
    for split in ("train", "val"):
        ids = np.fromfile(folder / source[split]["file"], "<u2")
        assert source[split]["unknown"] == np.count_nonzero(ids == tokenizer.token_to_id("<|unk|>")) > 0
        assert source[split]["bytes"] > size(texts_of(folder, split))
        unknown += source[split]["unknown"]
        tokens += len(ids)
    assert source["train"]["bytes"] + source["val"]["bytes"] == size(normalized(tokenizer, t) for t in texts)
    assert f" validation tokens, {unknown / tokens:.2%} unknown\n" in capsys.readouterr().out

    run(path, tmp_path / "data")
    assert "unknown" not in capsys.readouterr().out


def test_a_run_on_text_of_unknown_characters_alone_ends_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded(train_chunk(["a b c"], 300)).save("few.json")
    path = write_jsonl("x.jsonl", [chr(0x4e00 + i) * 100 for i in range(30)])
    run(path, "data", tokenizer="few.json", name="unknown")
    assert run_train("--data=unknown", "--out=run") == 0  # no bytes: bits per byte are not a number
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train_loss" in row]
    assert rows and all(np.isfinite(row["train_loss"]) and np.isnan(row["train_bits_per_byte"]) for row in rows)


# ---------------------------------------------------------------------------------------------------- the sample

def test_rows_without_text_do_not_keep_anybody_waiting_for_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "WITHOUT_TEXT", 50)
    path = str(write_rows(tmp_path / "x.jsonl", [dict(text="a")] + [dict(text="")] * 500))
    source, read = local_source(path, ""), []
    reader = source.reader()
    source.reader = lambda **how: (read.append(row) or row for row in itertools.islice(reader, 1, None))
    with pytest.raises(UserError, match="x holds no document of text.*50 empty"):
        passes.scan(source, 2 ** 62, 10 ** 6)
    assert len(read) < 60


def test_a_tokenizer_learns_from_training_text_alone(tmp_path):
    for i in range(10):  # two documents: here the split moves up to the lower hash, and the sample must follow
        texts = [f"{w}{i} " * 50 for w in ("left", "right")]
        source = local_source(write_jsonl(tmp_path / f"{i}.jsonl", texts), "")
        found = passes.scan(source, int(0.05 * 2 ** 64), 10 ** 6)
        assert found.texts == [d.text for d in clean(source.reader()) if d.hash >= found.threshold]


@properties
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=40),
    seed=st.integers(0, 10),
    budget=st.integers(100, 2000),
)
def test_sample_fits_its_budget_and_does_not_depend_on_the_order_of_documents(sizes, seed, budget):
    texts = [f"{i} " * n for i, n in enumerate(sizes)]
    shuffled = random.Random(seed).sample(texts, len(texts))
    samples = []
    for order in (texts, shuffled):
        source = TextSource("s", "en", "text", {}, lambda: iter(order))
        samples.append(passes.scan(source, 2 ** 62, budget).texts)
    one, other = samples
    assert one == other
    assert sum(map(len, one)) <= budget or len(one) == 1


def test_the_joint_tokenizer_learns_equally_much_from_every_source(tmp_path, monkeypatch):
    """A source ten times as large as the others does not crowd them out of the vocabulary."""
    monkeypatch.setattr("corpus.passes.SAMPLE_BYTES", 60_000)
    seen, trained = [], train_bpe
    monkeypatch.setitem(TRAINERS, "bpe", lambda texts, n: (seen.extend(texts), trained(texts, n))[1])
    letters = {"a": 10_000, "b": 1000, "c": 1000}
    names = []
    for letter, n in letters.items():
        texts = (f"{letter * 5} " * 6 + str(i) for i in range(n))
        names.append(write_jsonl(tmp_path / f"{letter}.jsonl", texts))
    run(names, tmp_path / "data")
    characters = collections.Counter()
    for text in seen:
        characters[text[0]] += len(text)
    assert all(19_000 < characters[letter] <= 20_000 for letter in letters)


# ---------------------------------------------------------------------------------------------------- the files

PREPARE_ALL = """
import json, sys, prepare
for words in json.loads(sys.argv[1]):
    prepare.main(words)
"""


def test_a_second_run_writes_the_same_bytes(corpus, tmp_path):
    root, names = corpus
    lines = [[*names, f"--tokenizer={kind}", f"--vocab_size={vocab_size}", "--max_tokens=250K", f"--name={kind}",
              f"--out_dir={tmp_path}"] for kind, vocab_size in KINDS.items()]
    # another process, with other hash seeds and threads
    finish(command("-c", PREPARE_ALL, json.dumps(lines), fresh=True, PYTHONHASHSEED="7", RAYON_NUM_THREADS="1"))
    for kind in KINDS:
        assert snapshot(tmp_path / kind) == snapshot(root / "data" / kind)


def test_order_in_which_files_were_made_does_not_matter(tmp_path):
    made = []
    for order in (range(20), reversed(range(20))):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        for i in order:
            write_jsonl(tmp_path / f"in/{i % 3}/{i}.jsonl", map(document, range(5 * i, 5 * i + 5)))
        folder, _ = run(tmp_path / "in", tmp_path / "data")
        made.append(snapshot(folder))
        shutil.rmtree(folder)
    assert made[0] == made[1]


def test_meta_counts_are_those_of_the_files(prepared, tokenizer):
    meta = json.loads((prepared / "meta.json").read_text())
    names = [(s["name"], s["language"], s["kind"]) for s in meta["sources"]]
    assert names == [("pydocs", "en", "code"), ("books", "it", "books")]
    token_files = {f"{split}.{stem}.bin" for split in ("train", "val") for stem in ("0-pydocs", "1-books")}
    assert {p.name for p in prepared.iterdir()} == {"tokenizer.json", "meta.json"} | token_files
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == tokenizer.get_vocab_size()
    assert meta["tokenizer_sha256"] == hashlib.sha256((prepared / "tokenizer.json").read_bytes()).hexdigest()
    counts = token_byte_counts(tokenizer)
    for i, s in enumerate(meta["sources"]):
        for split in ("train", "val"):
            raw = (prepared / s[split]["file"]).read_bytes()
            _, ids, documents = split_ids(prepared, split, i)
            text_bytes = size(texts_of(prepared, split, i))
            recount = dict(
                file=f"{split}.{i}-{s['name']}.bin", tokens=len(ids), unknown=0, documents=len(documents),
                bytes=text_bytes, file_size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
            assert s[split] == recount and len(documents) > 0 and tokenizer.token_to_id("<|unk|>") not in ids
            assert counts[ids].sum() == text_bytes


def test_files_hold_what_the_library_encodes_in_the_sources_order(corpus):
    root, names = corpus
    texts = list(dataclasses.replace(local_source(names[1], ""), budget=250_000).reader())
    for kind in KINDS:
        tokenizer, _, train = split_ids(root / "data" / kind, "train", 1)
        val = split_ids(root / "data" / kind, "val", 1)[2]
        train = collections.deque(d.tolist() for d in train)
        val = collections.deque(d.tolist() for d in val)
        for text in texts:
            ids = [tokenizer.token_to_id("<|bos|>"), *library_ids(tokenizer, text), tokenizer.token_to_id("<|eos|>")]
            assert ids == (train if train and train[0] == ids else val).popleft()
        assert not train and not val
        source = read_meta(root / "data" / kind)["sources"][1]
        assert source["train"]["bytes"] + source["val"]["bytes"] == size(normalized(tokenizer, t) for t in texts)


def test_nanogpts_loader_reads_the_files(prepared, tokenizer):
    # nanoGPT's get_batch, in numpy
    data = np.memmap(prepared / "train.0-pydocs.bin", dtype=np.uint16, mode="r")
    ix = np.random.default_rng(0).integers(len(data) - 64, size=(12,))
    x = np.stack([data[i:i + 64].astype(np.int64) for i in ix])
    y = np.stack([data[i + 1:i + 1 + 64].astype(np.int64) for i in ix])

    ids = split_ids(prepared, "train")[1]
    assert all(np.array_equal(row, ids[i:i + 64]) for i, row in zip(ix, x)) and np.array_equal(x[:, 1:], y[:, :-1])
    beginning = normalized(tokenizer, next(pydocs().documents())[:1000])
    assert "".join(texts_of(prepared, "train")).startswith(beginning)


# ---------------------------------------------------------------------------------------------------- the split

def split_of(folder):
    train, val = (collections.Counter(texts_of(folder, split)) for split in ("train", "val"))
    assert not train & val  # no text on both sides
    return train, val


def test_split_depends_on_the_texts_alone(tmp_path):
    texts = [document(i) for i in range(400)]
    one, _ = run(write_jsonl(tmp_path / "one.jsonl", texts), tmp_path / "data", val_fraction=0.1)
    random.Random(1).shuffle(texts)
    for i in range(8):
        write_jsonl(tmp_path / f"other/{i * 37 % 8}.jsonl", texts[50 * i:50 * i + 50])
    other, _ = run(tmp_path / "other", tmp_path / "data", val_fraction=0.1, tokenizer=str(one / "tokenizer.json"))
    assert split_of(one) == split_of(other)

    part, _ = run(write_jsonl(tmp_path / "part.jsonl", texts[:200]), tmp_path / "data", val_fraction=0.1)
    for small, large in zip(split_of(part), split_of(one)):  # documents that came later moved none
        assert small == collections.Counter({t: large[t] for t in texts[:200] if t in large})


def test_validation_share_is_val_fraction(tmp_path):
    path = write_jsonl(tmp_path / "many.jsonl", [f"text {i}" for i in range(5_000)])
    for fraction in (0.05, 0.3):
        _, meta = run(path, tmp_path, val_fraction=fraction, name=str(fraction))
        n, expected = meta["sources"][0]["val"]["documents"], 5_000 * fraction
        assert abs(n - expected) < 4 * (expected * (1 - fraction)) ** 0.5  # four standard deviations


def test_a_text_that_occurs_often_is_taken_once(tmp_path):
    texts = [f"text {i % 50}" for i in range(1000)]
    names = [write_jsonl(tmp_path / f"{name}.jsonl", texts) for name in "ab"]
    folder, meta = run(names, tmp_path, val_fraction=0.3)
    for i in range(2):  # within a source: the other one has them too
        train, val = texts_of(folder, "train", i), texts_of(folder, "val", i)
        assert train == [t for t in texts[:50] if t in train]  # the first time it occurs
        assert sorted(train + val) == sorted(set(texts))
        assert meta["sources"][i]["skipped"] == {"empty": 0, "not text": 0, "duplicate": 950}


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_two_documents_give_one_for_each_side(fraction, tmp_path):
    for i in range(12):
        path = write_jsonl(tmp_path / f"two{i}.jsonl", [f"one {i}", f"other {i}"])
        folder, _ = run(path, tmp_path, val_fraction=fraction)
        assert [len(c) for c in split_of(folder)] == [1, 1]


def test_a_short_text_file_gives_validation_text(tmp_path):
    (tmp_path / "short.txt").write_text("".join(f"Line {i} of a short file.\n" for i in range(100)))
    train, val = split_of(run(tmp_path / "short.txt", tmp_path)[0])
    assert train and val


def test_val_fraction_0_gives_no_validation_text(tmp_path):
    _, meta = run(write_jsonl(tmp_path / "x.jsonl", map(document, range(50))), tmp_path, val_fraction=0.0)
    source = meta["sources"][0]
    assert source["val"] == dict(file="val.0-x.bin", tokens=0, unknown=0, documents=0, bytes=0, file_size=0,
                                 sha256=hashlib.sha256().hexdigest())
    assert source["train"]["documents"] == 50


TOO_FEW = {"one": (["one"], 0.05), "copies": (["same"] * 20, 0.05), "none": ([], 0.05), "none wanted": ([], 0.0)}


@pytest.mark.parametrize("texts, fraction", TOO_FEW.values(), ids=TOO_FEW)
def test_too_few_documents_for_a_split_are_a_mistake_that_writes_nothing(texts, fraction, tmp_path):
    with pytest.raises(UserError, match="few holds"):
        run(write_jsonl(tmp_path / "few.jsonl", texts), tmp_path / "data", val_fraction=fraction)
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------------------- reused tokenizers

def test_an_existing_tokenizer_is_used_as_it_is(prepared, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "new.jsonl", map(document, range(1000, 1050)))
    folder, _ = run(path, tmp_path, tokenizer=str(prepared / "tokenizer.json"))
    assert folder.name == f"new-{prepared.name}"  # tokenizer.json is called after its folder
    assert (folder / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    ids = sorted(d[1:-1].tolist() for split in ("train", "val") for d in split_ids(folder, split)[2])
    assert ids == sorted(library_ids(tokenizer, document(i)) for i in range(1000, 1050))


def test_a_checkpoint_gives_its_tokenizer_as_its_tokenizer_json_does(prepared, tmp_path):
    path = write_jsonl(tmp_path / "new.jsonl", map(document, range(50)))
    text = (prepared / "tokenizer.json").read_text()
    (tmp_path / "my_model").mkdir()
    torch.save({"tokenizer": text, "model": {}}, tmp_path / "my_model/best.pt")
    from_json, _ = run(path, tmp_path, tokenizer=str(prepared / "tokenizer.json"))
    from_checkpoint, meta = run(path, tmp_path, tokenizer=str(tmp_path / "my_model/best.pt"))
    assert from_checkpoint.name == "new-my_model"
    assert snapshot(from_checkpoint) == snapshot(from_json)
    assert meta["settings"]["tokenizer"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_have_four_bytes_only_above_65536(size, dtype, tmp_path):
    words = ["Ġ" + "".join(w) for w in itertools.islice(itertools.product("abcdefghijklmnop", repeat=5), size - 263)]
    byte_level([], words=words, ignore_merges=True).save(str(tmp_path / "large.json"))
    texts = [f" {w[1:]} x" for w in words[-5:]]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    folder, meta = run(path, tmp_path, tokenizer=str(tmp_path / "large.json"), val_fraction=0.0)
    assert (meta["dtype"], meta["vocab_size"]) == (dtype, size)
    ids = split_ids(folder, "train")[1]
    file_size = meta["sources"][0]["train"]["file_size"]
    assert ids.max() == size - 1 and ids.nbytes == file_size == len(ids) * np.dtype(dtype).itemsize
    assert texts_of(folder, "train") == texts


def test_an_id_far_behind_the_others_keeps_its_value(tmp_path):
    spec = json.loads(byte_level([], words=["Ġlast"], ignore_merges=True).to_str())
    spec["model"]["vocab"]["Ġlast"] = 70_000  # 264 tokens, but ids up to 70,000
    (tmp_path / "gaps.json").write_text(json.dumps(spec))
    path = write_jsonl(tmp_path / "x.jsonl", ["at last", "the last"])
    folder, meta = run(path, tmp_path, tokenizer=str(tmp_path / "gaps.json"))
    tokenizer, ids, _ = split_ids(folder, "train")
    assert ids.max() == 70_000 and meta["vocab_size"] == 70_001
    assert token_byte_counts(tokenizer)[ids].sum() == meta["sources"][0]["train"]["bytes"]


# ---------------------------------------------------------------------------------------------------- gpt2

@pytest.fixture
def gpt2(monkeypatch):
    """A stand-in for GPT-2's tokenizer, whose merges need a download."""
    tokenizer = loaded(from_tiktoken(small_gpt2()))
    monkeypatch.setitem(READY, "gpt2", lambda: tokenizer)
    return tokenizer


def test_gpt2_documents_stand_between_two_ends_of_text_and_come_back_whole(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("prepare.TRAINERS", {"bpe": None})  # nothing is trained
    texts = [*map(document, range(60)), "It spells <|endoftext|> here", "<|endoftext|>", "a"]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    folder, meta = run(path, tmp_path, tokenizer="gpt2", val_fraction=0.3)
    assert folder.name == "x-gpt2"
    assert (meta["settings"]["tokenizer"], meta["settings"]["vocab_size"]) == ("gpt2", 0)
    assert meta["vocab_size"] == gpt2.get_vocab_size()
    end, found = gpt2.token_to_id("<|endoftext|>"), []
    for split in ("train", "val"):
        entry = meta["sources"][0][split]
        ids = read_tokens(folder / entry["file"], meta["dtype"])
        edges = document_edges(ids, end, end)
        assert len(edges) - 1 == entry["documents"] > 0
        for a, b in itertools.pairwise(edges):
            assert ids[a] == ids[b - 1] == end and end not in ids[a + 1:b - 1]
            found.append(gpt2.decode(ids[a + 1:b - 1].tolist()))
        assert entry["bytes"] == token_byte_counts(gpt2)[ids].sum()
    assert sorted(found) == sorted(texts)


def test_gpt2_has_no_size_of_your_own_and_no_chats(gpt2, tmp_path):
    with pytest.raises(UserError, match="--vocab_size belongs to a new tokenizer"):
        run(write_jsonl(tmp_path / "x.jsonl", map(document, range(9))), tmp_path, tokenizer="gpt2", vocab_size=500)
    rows = [{"instruction": f"Say {i}", "output": str(i)} for i in range(9)]
    with pytest.raises(UserError, match=r"the tokenizer has no <\|bos\|> .*take bpe, hybrid or chunk"):
        run(write_rows(tmp_path / "chats.jsonl", rows), tmp_path, tokenizer="gpt2")


def test_show_tells_a_gpt2_folders_documents_apart(gpt2, tmp_path, capsys):
    texts = list(map(document, range(9)))
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    folder, _ = run(path, tmp_path, tokenizer="gpt2", val_fraction=0.0)
    capsys.readouterr()
    prepare.show(folder)
    shown = capsys.readouterr().out
    lengths = sorted(2 + len(library_ids(gpt2, text)) for text in texts)
    assert f"shortest {lengths[0]}, median {lengths[4]}, longest {lengths[-1]}" in shown
    assert f"x begins:\n<|endoftext|>{texts[0]}<|endoftext|>\n" in shown


# ---------------------------------------------------------------------------------------------------- budgets and names

@pytest.mark.parametrize("budget", [1, 700, 5000])
def test_training_text_ends_with_the_document_that_reaches_max_tokens(budget, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", map(document, range(400)))
    folder, meta = run(path, tmp_path, max_tokens=budget)
    _, ids, documents = split_ids(folder, "train")
    assert len(ids) >= budget > len(ids) - len(documents[-1])
    assert meta["sources"][0]["budget"] == budget
    train, val = split_of(folder)
    assert val  # also if the first validation document lies behind the budget
    order = {document(i): i for i in range(400)}
    last = max(order[t] for t in train)
    taken = {order[t] for t in train} | {order[t] for t in val if order[t] < last}
    assert taken == set(range(last + 1))  # it starts at the start and leaves none out


def test_max_tokens_may_be_less_than_one_document(tmp_path):
    folder, _ = run(write_jsonl(tmp_path / "x.jsonl", (document(i) * 20 for i in range(100))), tmp_path, max_tokens=10)
    assert len(texts_of(folder, "train")) == 1 and texts_of(folder, "val")


def test_every_name_is_a_source_with_language_and_kind(tmp_path):
    novels = write_jsonl(tmp_path / "novels_it.jsonl", map(document, range(30)))
    new = write_jsonl(tmp_path / "v1.2 (new)/x.jsonl", map(document, range(30, 60)))
    odd = write_jsonl(tmp_path / "odd@it.jsonl", map(document, range(60, 90)))  # a file that has an @ in its name
    folder, meta = run([novels + "@it/books", new.removesuffix("/x.jsonl") + "@en", odd], tmp_path / "data")
    names = [(s["name"], s["language"], s["kind"]) for s in meta["sources"]]
    assert names == [("novels_it", "it", "books"), ("v1_2_new_", "en", "text"), ("odd_it", "und", "text")]
    stems = ("0-novels_it", "1-v1_2_new_", "2-odd_it")
    assert {p.name for p in folder.glob("*.bin")} == {f"{split}.{x}.bin" for split in ("train", "val") for x in stems}
    for i in range(3):
        texts = texts_of(folder, "train", i) + texts_of(folder, "val", i)
        assert sorted(texts) == sorted(map(document, range(30 * i, 30 * i + 30)))


def test_the_names_of_many_files_make_no_name_of_a_folder(tmp_path):
    names = [write_jsonl(tmp_path / f"chapter_{i:02}.jsonl", [document(i), document(100 + i)]) for i in range(40)]
    with pytest.raises(UserError, match="made of 40 names and be too long: give --name, or name the folder that holds"):
        run(names, tmp_path / "data")
    assert run(names, tmp_path / "data", name="all", vocab_size=300)[0].name == "all"


def test_every_source_may_have_a_budget_of_its_own(tmp_path):
    names = []
    for i, name in enumerate("abc"):
        names.append(write_jsonl(tmp_path / f"{name}.jsonl", (document(1000 * i + j) for j in range(400))))
    folder, meta = run([names[0] + "@en/web:3K", names[1] + ":1_500", names[2]], tmp_path / "data", max_tokens=5000)
    assert folder.name == "a+b+c-bpe-300"
    budgets = [(s["name"], s["language"], s["budget"]) for s in meta["sources"]]
    assert budgets == [("a", "en", 3000), ("b", "und", 1500), ("c", "und", 5000)]
    for s in meta["sources"]:
        assert s["budget"] <= s["train"]["tokens"] < s["budget"] + 400  # ends with the document that reaches it

    with pytest.raises(UserError, match="sources was"):
        run([names[0] + "@en/web:4K", names[1] + ":1500", names[2]], tmp_path / "data", max_tokens=5000)
    with pytest.raises(UserError, match="budget behind .*a.jsonl: '1.0001K' is not a whole number"):
        run(names[0] + ":1.0001K", tmp_path / "data")


def test_languages_and_kinds_stay_apart_and_the_split_ignores_the_order_of_files(tmp_path):
    """English and Italian, web and wiki: whatever the files are called, the validation text is the same."""
    folders = []
    for turn in (1, -1):
        names = []
        for i, label in enumerate(("en/web", "en/wiki", "it/web", "it/wiki")):
            folder = tmp_path / f"turn{turn}" / label.replace("/", "_")
            for k, name in enumerate("abcd"[::turn]):
                write_jsonl(folder / f"{name}.jsonl", (document(1000 * i + 100 * k + j) for j in range(60)))
            names.append(f"{folder}@{label}")
        folders.append(run(names, tmp_path / f"data{turn}", name="mix"))
    (first, meta), (second, _) = folders
    expected = [(f"{language}_{kind}", language, kind) for language in ("en", "it") for kind in ("web", "wiki")]
    assert [(s["name"], s["language"], s["kind"]) for s in meta["sources"]] == expected
    for i in range(4):
        for split in ("train", "val"):
            a, b = texts_of(first, split, i), texts_of(second, split, i)
            assert sorted(a) == sorted(b) and (split == "val" or a != b)


# ---------------------------------------------------------------------------------------------------- settings

@pytest.fixture(scope="session")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    path = write_jsonl(root / "x.jsonl", map(document, range(50)), body="some other text")
    return path, run(path, root, name="made")[0]


def test_the_same_settings_leave_a_folder_as_it_is(made, capsys):
    path, folder = made
    before = snapshot(folder, times=True)
    assert run(path, folder.parent, name="made")[0] == folder
    assert snapshot(folder, times=True) == before and "is there already" in capsys.readouterr().out


CHANGES = [dict(max_tokens=1000), dict(val_fraction=0.2), dict(column="body"), dict(vocab_size=400),
           dict(tokenizer="hybrid"), dict(sources=1)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: [*change][0])
def test_other_settings_are_refused_by_name_and_change_nothing(change, made, tmp_path):
    path, folder = made
    before = snapshot(folder, times=True)
    what, = change
    if what == "sources":
        change = {}
        path = write_jsonl(tmp_path / "x.jsonl", map(document, range(51)))
    with pytest.raises(UserError, match=f"made with other settings .*{what} was .* and is now .*--name"):
        run(path, folder.parent, name="made", **change)
    assert snapshot(folder, times=True) == before


def test_a_configuration_is_only_for_data_sets_named_by_organisation_and_name(made):
    for name, why in ((made[0], "$"), ("finemath", "; finemath has a configuration of its own"),
                      ("ivme", "; ivme has a configuration of its own"), ("pydocs", "$")):
        with pytest.raises(UserError, match=f"--config is for data sets that are given as ORG/NAME{why}"):
            prepare.prepare([name], prepare.Settings(config="en"))


def test_a_local_file_or_folder_is_taken_before_a_data_set_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("org/name/a.jsonl", map(document, range(20)))
    for word, language in (("org/name", "und"), ("org/name@it/web:1M", "it")):
        folder, meta = run(word, tmp_path / language)
        assert folder.name == "name-bpe-300"
        assert (meta["sources"][0]["language"], meta["sources"][0]["origin"]["files"]) == (language, 1)


NEXT = {
    "bpe": (dict(), "train.py --model=ivme --data={} --vocab_size=300"),
    "hybrid": (dict(tokenizer="hybrid"), "train.py --model=tinymemory --data={} --vocab_size=300"),
    "chunk": (dict(tokenizer="chunk"), "train.py --model=i3 --data={} --vocab_size=..."),
    "gpt2": (dict(tokenizer="gpt2"), "train.py --model=gpt2preln-gpt2 --data={}"),
    "reused": (dict(tokenizer="own.json"), "train.py --init_from=CHECKPOINT --data={}"),
    "checkpoint": (dict(tokenizer="run/ckpt.pt"), "train.py --init_from=run/ckpt.pt --data={}"),
    "chats": (dict(chats=True), "train.py --model=ivme --data={} --vocab_size=300"),
    "chats, reused": (dict(chats=True, tokenizer="own.json"), "finetune.py --init_from=CHECKPOINT --data={}"),
    "chats, checkpoint": (dict(chats=True, tokenizer="run/ckpt.pt"), "finetune.py --init_from=run/ckpt.pt --data={}"),
}


@pytest.mark.parametrize("what", NEXT)
def test_the_last_line_names_the_command_that_comes_next(what, gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    byte_level([("t", "h")]).save("own.json")
    Path("run").mkdir()
    torch.save({"tokenizer": Path("own.json").read_text()}, "run/ckpt.pt")
    given, expected = NEXT[what]
    flags = [f"--{name}={value}" for name, value in given.items() if name != "chats"]
    if given.get("tokenizer", "bpe") in TRAINERS:
        flags.append("--vocab_size=300")
    if "chats" in given:
        path = write_rows("x.jsonl", [{"instruction": f"Say {i}", "output": str(i)} for i in range(30)])
    else:
        path = write_jsonl("x.jsonl", map(document, range(30)))
    for _ in range(2):  # the folder is made, then it is there already
        assert prepare.main([str(path), *flags]) == 0
        folder, = (p for p in Path("data").iterdir() if (p / "meta.json").exists())
        expected = expected.replace("...", str(read_meta(folder)["vocab_size"]))  # chunk finds fewer than 300
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"{folder} holds train.0-x.bin ")
        assert line.endswith(f" next: python {expected.format(folder)}")

    prepare.show(folder)
    kind = given.get("tokenizer", "bpe")
    kind = kind if kind in NEXT else "reused"
    assert capsys.readouterr().out.startswith(f"{folder}: {kind} tokenizer of ")


# ---------------------------------------------------------------------------------------------------- after a stop

# Dies as it encodes the second of two sources: the first one's files are written, and files beside them that no later
# run makes
DIE = """
import os, pathlib, signal, sys, prepare
from corpus import passes
fast_encoder, calls = passes.fast_encoder, []
def deadly(tokenizer):
    encode = fast_encoder(tokenizer)
    def one_and_no_more(texts):
        calls.append(1)
        if len(calls) > 1:
            for part in pathlib.Path("data").glob("*.part"):
                (part / "train.7-gone.bin").touch()
            if sys.argv[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError
        return encode(texts)
    return one_and_no_more
passes.fast_encoder = deadly
prepare.main(sys.argv[2:])
"""


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_what_did_not_finish_leaves_no_folder_and_the_next_run_is_whole(end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [write_jsonl(f"{name}.jsonl", (document(i) + name for i in range(30))) for name in "ab"]
    process = command("-c", DIE, end, *names, "--vocab_size=300")
    err = process.communicate(timeout=600)[1]
    assert process.returncode == (-signal.SIGKILL if end == "killed" else 1), err
    assert list(Path("data").glob(".*.part/train.7-gone.bin"))
    assert [p.name for p in Path("data").iterdir() if not p.name.startswith(".")] == []

    folder, _ = run(names, "data")
    assert snapshot(folder) == snapshot(run(names, "undisturbed")[0])
    assert [p.name for p in Path("data").iterdir()] == [folder.name]  # and the remains are gone


# Ends the process as a power cut would, before a random one of the things that leave a trace on the disk
KILL = """
import os, random, signal, sys, prepare
from corpus import passes
passes.BATCH_BYTES, passes.SAVE_SECONDS = 2000, -1
left = random.Random(int(sys.argv[1])).randrange(1, 25)
def countdown(name, module):
    f = getattr(module, name)
    def counted(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    setattr(module, name, counted)
for name in ("replace", "fsync", "rename", "unlink"):
    countdown(name, os)
countdown("fast_encoder", passes)
prepare.main(sys.argv[2:])
"""


def test_killed_at_ten_random_moments_and_run_again_it_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [document(i % 250) for i in range(300)]  # with duplicates on both sides of every cut
    words = []
    for name, budget in (("a", ""), ("b", ":4000")):
        words.append(write_jsonl(f"{name}.jsonl", [text + name for text in texts]) + budget)
    words += ["--vocab_size=300", "--name=made"]
    prepare.main([*words, "--out_dir=whole"])
    kills, resumed = 0, 0
    for seed in itertools.count():
        process = command("-c", KILL, seed, *words, "--out_dir=killed")
        out, err = process.communicate(timeout=600)
        resumed += "resuming" in out
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
    assert kills >= 10 and resumed >= 8
    assert snapshot(Path("killed/made")) == snapshot(Path("whole/made"))


def test_what_was_half_made_of_other_text_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(write_jsonl("a.jsonl", (document(i) for i in range(300))))
    process = command("-c", KILL, 3, path, "--vocab_size=300")
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL and Path("data/.a-bpe-300.part/progress.json").exists()
    write_jsonl(path, (document(i) for i in range(300, 600)))
    os.truncate(path, path.stat().st_size)
    folder, _ = run(path, "data")
    assert sorted(texts_of(folder, "train") + texts_of(folder, "val")) == sorted(map(document, range(300, 600)))


# ---------------------------------------------------------------------------------------------------- text that changes

def rewrite(path, old, new):
    """Replaces one word by another, as an editor does that writes the file anew."""
    content = Path(path).read_text()
    assert old in content
    Path(path).write_text(content.replace(old, new))


@pytest.mark.parametrize("what", ["file", "folder", "chats"])
def test_text_that_was_edited_since_is_noticed_at_equal_size_too(what, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"note {i}: the capital is Sydney.\n\n" for i in range(300)))
    name = path
    if what == "folder":
        name = path = tmp_path / "in/b.jsonl"
        write_jsonl(tmp_path / "in/a.jsonl", map(document, range(20)))
        write_jsonl(path, [f"{i} Sydney" for i in range(20)])
        name = tmp_path / "in"
    if what == "chats":
        name = path = write_rows(tmp_path / "c.jsonl", [{"prompt": f"{i}?", "completion": "Sydney"} for i in range(30)])
    folder, _ = run(name, tmp_path / "data")
    before = snapshot(folder, times=True)
    assert run(name, tmp_path / "data")[0] == folder

    rewrite(path, "Sydney", "Ottawa")
    with pytest.raises(UserError, match="the text of .* has changed since .* was made of it; delete the folder"):
        run(name, tmp_path / "data")
    rewrite(path, "Ottawa", "Sydney")  # as it was, though later
    assert run(name, tmp_path / "data")[0] == folder and snapshot(folder, times=True) == before
    assert run(name, tmp_path / "other")[0] != folder


def test_text_behind_a_budget_may_change(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [f"{i} {document(i)}" for i in range(300)] + ["the last one"])
    folder, _ = run(path, tmp_path, max_tokens=1000)
    rewrite(path, "the last one", "the last two")
    assert run(path, tmp_path, max_tokens=1000)[0] == folder
    rewrite(path, "3 Text 3", "3 Text 4")
    with pytest.raises(UserError, match="has changed since"):
        run(path, tmp_path, max_tokens=1000)


def test_text_that_changes_while_it_is_read_makes_no_folder(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", map(document, range(50)))
    second_pass = prepare.second_pass

    def edit_and_go_on(*args):
        second_pass(*args)
        rewrite(path, "Text 3:", "Text 4:")
    with monkeypatch.context() as m:
        m.setattr("prepare.second_pass", edit_and_go_on)
        with pytest.raises(UserError, match="the text of x was changed while it was read; run the same command again"):
            run(path, tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".x-bpe-300.part"]
    folder, _ = run(path, tmp_path / "data")
    assert snapshot(folder) == snapshot(run(path, tmp_path / "undisturbed")[0])


def half_zeros(data):
    return data[:len(data) // 4 * 2] + bytes(len(data) - len(data) // 4 * 2)


DAMAGE = {
    "half of it zeros": half_zeros,
    "one bit": lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:],
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("file", ["train.0-x.bin", "val.0-x.bin", "train.0-x.mask.bin"])
def test_a_damaged_file_of_the_right_length_is_found_by_its_checksum(what, file, tmp_path, capsys):
    rows = [{"prompt": document(i), "completion": document(i + 500)} for i in range(60)]
    folder, _ = run(write_rows(tmp_path / "x.jsonl", rows), tmp_path, val_fraction=0.3)
    assert prepare.main([f"--verify={folder}"]) == 0
    assert capsys.readouterr().out.endswith(f"{folder} is whole: all files have the checksums that meta.json names\n")
    (folder / file).write_bytes(DAMAGE[what]((folder / file).read_bytes()))
    for flag in ("--verify", "--show"):
        with pytest.raises(UserError, match=f"{file} is damaged: its checksum is not that of meta.json"):
            prepare.main([f"{flag}={folder}"])


# ---------------------------------------------------------------------------------------------------- long rows

@pytest.mark.slow
@pytest.mark.parametrize("kind, what", [("bpe", " "), ("bpe", "the house "), ("hybrid", "a"), ("chunk", "\U0001f600")])
def test_a_row_of_a_hundred_megabytes_is_prepared_whatever_it_holds(kind, what, tmp_path):
    text = what * (10 ** 8 // len(what.encode())) + "end"
    texts = [text, *map(document, range(20))]
    path = write_rows(tmp_path / "x.jsonl", [json.dumps({"text": text}, ensure_ascii=False) for text in texts])
    folder, meta = run(path, tmp_path, tokenizer=kind, val_fraction=0.0)
    assert meta["sources"][0]["train"]["documents"] == 21
    tokenizer, ids, documents = split_ids(folder, "train")
    counts = token_byte_counts(tokenizer)
    assert kind == "chunk" or counts[ids].sum() == size(texts) and counts[documents[0]].sum() == size([text])


# ---------------------------------------------------------------------------------------------------- memory

# Prepares a file of argv[1] megabytes and prints by how many megabytes the process grew
MEASURE = """
import random, resource, sys, prepare, tiktoken
from corpus import passes
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024 ** 2)
rng, size = random.Random(0), int(sys.argv[1]) * 10 ** 6
words = ["".join(rng.choices("abcdefghijklmnop", k=12)) for _ in range(60)]
lines = [" ".join(rng.choices(words, k=150)) for _ in range(300)]
with open("large.txt", "w") as f:
    i = 0
    while f.tell() < size:
        f.write("".join(f"{i + j} {rng.choice(lines)}\\n\\n" for j in range(100)))
        i += 100
passes.SAMPLE_BYTES, before = 2 ** 20, peak()
prepare.main(["large.txt", "--vocab_size=1000"])
print(peak() - before)
"""


@pytest.mark.slow
def test_a_large_file_is_prepared_whole_in_less_memory_than_its_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Linux counts the memory of the process that starts another one as that one's peak: a small one stands between it
    # and this one
    between = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    process = command("-c", between, MEASURE, 60, fresh=True)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    source = read_meta("data/large-bpe-1000")["sources"][0]
    assert source["train"]["bytes"] + source["val"]["bytes"] == os.path.getsize("large.txt")
    for split in ("train", "val"):  # many batches are counted and summed up as one is
        raw = Path("data/large-bpe-1000", source[split]["file"]).read_bytes()
        assert source[split]["sha256"] == hashlib.sha256(raw).hexdigest()
        assert source[split]["tokens"] == len(raw) // 2
        assert source[split]["documents"] == np.count_nonzero(np.frombuffer(raw, "<u2") == 1)  # <|bos|>
    assert 5 < float(out.split()[-1]) < 60


# ---------------------------------------------------------------------------------------------------- --show

def test_show_tells_what_a_folder_holds(tmp_path, capsys):
    names = []
    for i, (name, label) in enumerate((("a", "@en/web"), ("b", "@it/books"))):
        names.append(write_jsonl(tmp_path / f"{name}.jsonl", (document(100 * i + j) for j in range(80))) + label)
    folder, meta = run(names, tmp_path, name="shown")
    capsys.readouterr()
    before = snapshot(folder, times=True)
    assert prepare.main([f"--show={folder}"]) == 0 and snapshot(folder, times=True) == before
    shown = capsys.readouterr().out
    for i, source in enumerate(meta["sources"]):
        for split in ("train", "val"):
            entry = source[split]
            beginning = [source["name"], f"{source['language']}/{source['kind']}", split]
            row, = (line.split() for line in shown.splitlines() if line.split()[:3] == beginning)
            assert row[3:6] == [f"{entry[k]:,}" for k in ("tokens", "documents", "bytes")]
            assert row[6] == f"{entry['bytes'] / entry['tokens']:.2f}"
            characters = sum(map(len, texts_of(folder, split, i)))
            assert float(row[7]) == pytest.approx(characters / entry["tokens"], abs=0.006)

        lengths = [len(d) for d in split_ids(folder, "train", i)[2]]
        section = shown.split(f"\n{source['name']}, tokens per training document: ")[1].split("\n\n")[0]
        median = int(np.median(lengths))
        assert section.startswith(f"shortest {min(lengths):,}, median {median:,}, longest {max(lengths):,}")
        bars = [tuple(map(int, bar)) for bar in re.findall(r"^ +(\d+) to +(\d+) +(\d+)", section, re.M)]
        assert sum(n for _, _, n in bars) == len(lengths)
        assert all(n == sum(low <= length <= high for length in lengths) for low, high, n in bars)
        assert texts_of(folder, "train", i)[0][:40] in shown


def test_no_torch_is_imported(tmp_path):
    process = command("-c", "import sys, prepare; sys.exit('torch' in sys.modules)", fresh=True)
    assert process.wait(timeout=60) == 0
