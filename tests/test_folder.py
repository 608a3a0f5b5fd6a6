"""corpus/folder.py: a prepared folder is called after what is in it, and read only if it is whole."""
import hashlib
import json
import shutil
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given, strategies as st

from common import UserError
from corpus.folder import check_tokens, corpus_name, document_edges, has_gap, read_meta, read_tokens, token_files
from corpus_helpers import document, properties, run, write_jsonl


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return run(write_jsonl(root / "x.jsonl", map(document, range(50))), root, name="whole")[0]


@pytest.fixture
def folder(whole, tmp_path):
    """A prepared folder to be spoilt."""
    shutil.copytree(whole, tmp_path / "mine")
    return tmp_path / "mine"


# ---------------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize("given, name", [
    (dict(vocab_size=16_384), "x-bpe"),
    (dict(vocab_size=300), "x-bpe-300"),
    (dict(tokenizer="hybrid", vocab_size=2111), "x-hybrid"),
    (dict(tokenizer="chunk", vocab_size=4466), "x-chunk"),
    (dict(tokenizer="chunk", vocab_size=35_560), "x-chunk-35560"),
    (dict(name="mine"), "mine"),
])
def test_folder_is_named_after_text_and_tokenizer(given, name, tmp_path):
    folder, _ = run(write_jsonl(tmp_path / "x.jsonl", map(document, range(30))), tmp_path / "data", **given)
    assert folder == tmp_path / "data" / name


@pytest.mark.parametrize("word, base", [
    ("pydocs", "pydocs"),
    ("here/novels.jsonl.gz", "novels"),
    ("here/novels.jsonl.gz@it/books", "novels"),
    ("here/", "here"),
    ("here@en", "here"),
    ("gone/novels.en.JSONL.GZ", "novels.en"),
    ("v1.0", "v1.0"),
    ("gone/novels.jsonl", "novels"),  # the text may be deleted when the folder is read
    ("ORG/NAME", "NAME"),
    ("ORG/NAME-1.5B@it/web", "NAME-1.5B"),
    (".", "the_place"),
])
def test_a_name_without_its_path_is_what_a_folder_is_called(word, base, tmp_path, monkeypatch):
    (tmp_path / "the_place/here").mkdir(parents=True)
    (tmp_path / "the_place/v1.0").mkdir()
    (tmp_path / "the_place/here/novels.jsonl.gz").touch()
    monkeypatch.chdir(tmp_path / "the_place")
    assert corpus_name([word], "bpe", 16_384) == f"{base}-bpe"
    assert corpus_name([word, "pydocs"], "bpe", 1000) == f"{base}+pydocs-bpe-1000"


@pytest.mark.parametrize("tokenizer, kind", [
    ("gpt2", "gpt2"),
    ("data/pydocs-hybrid/tokenizer.json", "pydocs-hybrid"),
    ("mine/words.json", "words"),
    ("out/tinymemory/best.pt", "tinymemory"),
    ("step_20.pt", "the_run"),
])
def test_a_tokenizers_file_is_called_after_its_folder_if_its_name_says_nothing(tokenizer, kind, tmp_path, monkeypatch):
    (tmp_path / "the_run").mkdir()
    monkeypatch.chdir(tmp_path / "the_run")
    assert corpus_name(["pydocs"], tokenizer, 0) == f"pydocs-{kind}"


# ---------------------------------------------------------------------------------------------------- meta.json

def test_a_whole_folder_is_read(folder):
    meta = read_meta(folder)
    assert meta == json.loads((folder / "meta.json").read_text())
    names = [entry["file"] for entry, _, _ in token_files(meta["sources"])]
    assert {*names, "tokenizer.json", "meta.json"} == {p.name for p in folder.iterdir()}


def edit(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


SPOILT = {
    "no meta.json": (lambda d: (d / "meta.json").unlink(), "mine is not a prepared folder: it has no meta.json"),
    "half of it": (lambda d: (d / "meta.json").write_text("{"), "meta.json is damaged .*prepare the folder again"),
    "a key less": (lambda d: edit(d, lambda meta: meta.pop("sources")), "meta.json is damaged .KeyError: 'sources'"),
    "a later format": (lambda d: edit(d, lambda meta: meta.update(format=2)), "has format 2; this version reads"),
    "a file less": (lambda d: (d / "val.0-x.bin").unlink(), "val.0-x.bin is missing, though meta.json names it"),
    "a byte less": (lambda d: (d / "val.0-x.bin").write_bytes((d / "val.0-x.bin").read_bytes()[1:]),
                    r"val.0-x.bin has [\d,]+ bytes, but meta.json says [\d,]+ tokens of 2 bytes"),
    "a token less": (lambda d: edit(d, lambda meta: meta["sources"][0]["train"].update(tokens=7)),
                     r"train.0-x.bin has [\d,]+ bytes, but meta.json says 7 tokens of 2 bytes"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "another tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "not the one this folder was encoded"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_folder_is_refused_with_the_reason(what, folder):
    spoil, line = SPOILT[what]
    spoil(folder)
    with pytest.raises(UserError, match=line):
        read_meta(folder)


WRONG_TYPES = {
    "no object": lambda d: (d / "meta.json").write_text("[1]"),
    "a deep one": lambda d: (d / "meta.json").write_text("[" * 100_000),
    "settings": lambda d: edit(d, lambda meta: meta.update(settings=None)),
    "a dtype of floats": lambda d: edit(d, lambda meta: meta.update(dtype="float16")),
    "a name": lambda d: edit(d, lambda meta: meta["sources"][0].update(name=["x"])),
    "a file": lambda d: edit(d, lambda meta: meta["sources"][0]["val"].update(file=7)),
    "tokens": lambda d: edit(d, lambda meta: meta["sources"][0]["val"].update(tokens="many")),
    "an entry": lambda d: edit(d, lambda meta: meta["sources"][0].update(train=[])),
}


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_a_meta_json_of_other_types_is_damaged(what, folder):
    WRONG_TYPES[what](folder)
    with pytest.raises(UserError, match="meta.json is damaged .*prepare the folder again"):
        read_meta(folder)


def test_large_files_are_looked_at_in_a_few_places_and_read_only_if_there_are_zeros(folder, monkeypatch):
    """As a run does it: a copy that broke off is found, and a bit that changed in a large file is not looked for."""
    meta, path = read_meta(folder), folder / "train.0-x.bin"
    whole = path.read_bytes()
    read = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda f, name: read.append(f.name) or file_digest(f, name))
    monkeypatch.setattr("corpus.folder.has_gap", partial(has_gap, length=64))
    check_tokens(folder, meta, largest=10)
    assert read == []
    check_tokens(folder, meta)
    assert len(read) == 2

    for data in (whole[:len(whole) // 2] + bytes(len(whole) - len(whole) // 2), bytes(len(whole) // 2)
                 + whole[len(whole) // 2:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="train.0-x.bin is damaged"):
            check_tokens(folder, meta, largest=10)
    path.write_bytes(whole[:-2] + b"\7\0")
    check_tokens(folder, meta, largest=10)
    with pytest.raises(UserError, match="train.0-x.bin is damaged"):
        check_tokens(folder, meta, largest=len(whole))


# ---------------------------------------------------------------------------------------------------- tokens

def test_token_files_are_read_as_they_lie_on_the_disk_and_an_empty_one_too(tmp_path):
    for dtype in ("uint16", "uint32", "uint8"):
        ids = np.arange(200).astype(np.dtype(dtype).newbyteorder("<"))
        ids.tofile(tmp_path / "ids.bin")
        read = read_tokens(tmp_path / "ids.bin", dtype)
        assert isinstance(read, np.memmap) and read.tolist() == list(range(200))
    (tmp_path / "empty.bin").touch()
    assert read_tokens(tmp_path / "empty.bin", "uint16").tolist() == []


DOCUMENTS = st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=6), max_size=12)


@properties
@given(documents=DOCUMENTS)
def test_documents_begin_where_bos_stands(documents):
    framed = [[1, *document, 2] for document in documents]
    edges = document_edges(np.array(sum(framed, []), np.uint16), 1, 2)
    assert edges.tolist() == np.unique(np.cumsum([0, *map(len, framed)])).tolist() and edges.dtype == np.int64


@properties
@given(documents=DOCUMENTS)
def test_with_one_token_for_both_ends_documents_begin_at_the_second_of_two(documents):
    framed = [[0, *document, 0] for document in documents]
    edges = document_edges(np.array(sum(framed, []), np.uint16), 0, 0)
    assert edges.tolist() == np.unique(np.cumsum([0, *map(len, framed)])).tolist() and edges.dtype == np.int64


def test_the_documents_of_a_large_file_are_found_piece_by_piece(monkeypatch):
    """Also where the file is cut between the two tokens of a boundary."""
    tokens = np.full(2 ** 25, 7, np.uint16)
    tokens[[0, 2 ** 24 - 1, 2 ** 24, -1]] = 0
    tracemalloc.start()
    assert document_edges(tokens, 0, 0).tolist() == [0, 2 ** 24, 2 ** 25]
    assert tracemalloc.get_traced_memory()[1] < 20e6  # a comparison of the whole file takes a byte per token, 34 MB
    tracemalloc.stop()
