"""prepare.py: no text is lost or changed on its way into ids, and the same input gives the same bytes in the same split."""
import collections
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import prepare
from conftest import ROOT, command, run_train
from common import UserError
from prepare import Settings
from common import number, parse_flags
from corpus.folder import read_meta
from corpus.pydocs import pydocs
from corpus.text import Seen, Source, clean, local_source, text_documents
from corpus.tokenizer import CHUNKS, SPECIAL_TOKENS, TRAINERS, TRIGRAMS, added_tokens, byte_of_character, fast_encoder, load_tokenizer, token_byte_counts, train_bpe, train_chunk

KINDS = {"bpe": 1000, "hybrid": 900, "chunk": 1100}  # tokenizer -> size of its vocabulary here
LOSSLESS = ["bpe", "hybrid"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = list(SPECIAL_TOKENS)
properties = settings(deadline=None, max_examples=150)

# Any Unicode text, mixed with what trips tokenizers up: special tokens spelled out, contractions, every kind of white space and line
# end, NUL, combining marks, joined emoji, characters outside the BMP, noncharacters, a byte order mark, and ordinary words.
TRICKY = [*SPECIAL, "<|", "|>", "bos", "'s", "'RE", "'ll", "'", " ", "  ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0",
          "\u1680", "\u180e", "\u2003", "\u200b", "\u2028", "\u2029", "\u202f", "\u3000", "\ufeff", "\x00", "e\u0301", "\u0301", "\u0930\u094d",
          "\U0001f469\u200d\U0001f4bb", "\U0001d7d8", "\U00020000", "\uffff", "\U0010ffff", "\u0130vme", "\u216b", "\xb2", "\u0663", "the", " self", " return", "1"]
TEXT = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=4)), max_size=20).map("".join))


# ---------------------------------------------------------------------------------------------------- what the tests share

def document(i):
    """A text of its own for every i: a few words, with characters of one to four bytes."""
    rng = random.Random(i)
    return " ".join([f"Text {i}:", *(rng.choice(["house", "caffè", "sea\n", "İvme", "\U0001f600", "12", "you're", "\t--"]) for _ in range(rng.randint(5, 60)))])


def write_jsonl(path, texts, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t, **more}) + "\n" for t in texts))
    return str(path)


def run(names, out_dir, **given):
    """prepare() with a small vocabulary; returns (folder, meta)."""
    given = {"vocab_size": 300, **given} if given.get("tokenizer", "bpe") in KINDS else given
    folder = prepare.prepare([str(n) for n in ([names] if isinstance(names, (str, Path)) else names)], Settings(out_dir=str(out_dir), **given))
    return folder, read_meta(folder)


def split_ids(folder, split, source=0):
    """A .bin file read without prepare.py's help, cut into documents where a <|bos|> stands."""
    meta = json.loads((folder / "meta.json").read_text())
    path = folder / meta["sources"][source][split]["file"]
    ids = np.fromfile(path, dtype={"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    starts = np.flatnonzero(ids == tokenizer.token_to_id("<|bos|>"))
    documents = np.split(ids, starts)
    assert len(documents.pop(0)) == 0  # nothing before the first <|bos|>
    for d in documents:
        special = d[(d < len(SPECIAL)) & (d != tokenizer.token_to_id("<|unk|>"))]
        assert d[-1] == tokenizer.token_to_id("<|eos|>") and len(special) == 2
    return tokenizer, ids, documents


def texts_of(folder, split, source=0):
    tokenizer, _, documents = split_ids(folder, split, source)
    return tokenizer.decode_batch([d[1:-1].tolist() for d in documents])


def snapshot(folder, times=False):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) if times else p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Two sources for both kinds of tokenizer: the first 250,000 tokens of pydocs, and a folder of Italian books in all formats."""
    root = tmp_path_factory.mktemp("corpus")
    write_jsonl(root / "books/a.jsonl", [document(i) for i in range(100)])
    (root / "books/b.txt").write_text("\n\n".join(document(i) for i in range(100, 300)))
    pyarrow.parquet.write_table(pyarrow.table({"text": [document(i) for i in range(300, 400)]}), root / "books/c.parquet")
    names = ["pydocs", f"{root}/books@it/books"]
    for kind, size in KINDS.items():
        run(names, root / "data", tokenizer=kind, vocab_size=size, max_tokens=250_000, name=kind)
    return root, names


@pytest.fixture(scope="session", params=KINDS)
def prepared(request, corpus):
    return corpus[0] / "data" / request.param


@pytest.fixture(scope="session")
def tokenizers(corpus):
    """Each kind's tokenizer and its fast encoder."""
    trained = {kind: load_tokenizer(str(corpus[0] / "data" / kind / "tokenizer.json")) for kind in KINDS}
    return {kind: (tokenizer, fast_encoder(tokenizer)) for kind, tokenizer in trained.items()}


@pytest.fixture(scope="session")
def tokenizer(prepared, tokenizers):
    return tokenizers[prepared.name][0]


@pytest.fixture(scope="session")
def fast(prepared, tokenizers):
    return tokenizers[prepared.name][1]


def normalized(tokenizer, text):
    return tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text


def size(texts):
    return sum(len(t.encode()) for t in texts)


def byte_level(merges, alphabet=ALPHABET, words=(), **options):
    """A byte-level BPE made by hand."""
    vocab = {}
    for token in [*SPECIAL, *alphabet, *(a + b for a, b in merges), *words]:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(added_tokens())
    return tokenizer


def loaded(tokenizer):
    return load_tokenizer(tokenizer.to_str())


def library_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------------------------------------------- tokenizers

@properties
@given(text=TEXT)
@example(text="<|bos|>")
@example(text="a<|eos|>b <|pad|><|user|>")
@pytest.mark.parametrize("kind", LOSSLESS)
def test_decoding_gives_back_any_text_and_no_text_makes_a_special_token(text, kind, tokenizers):
    tokenizer, fast = tokenizers[kind]
    ids = fast([text])[0].tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(library_ids(tokenizer, text)) == text
    assert all(i >= len(SPECIAL) for i in ids)


@properties
@given(texts=st.lists(TEXT, max_size=4))
def test_fast_ids_are_the_librarys(texts, tokenizer, fast):
    assert [a.tolist() for a in fast(texts)] == [library_ids(tokenizer, t) for t in texts]


@pytest.fixture(scope="session")
def boundaries():
    """A tokenizer that merges every two neighbouring bytes of one word, at least at characters' ends: its ids show where words are cut."""
    char = {b: c for c, b in byte_of_character().items()}
    last, first = [*range(0x80), *range(0x80, 0xC0)], [*range(0x80), *range(0xC2, 0xF5)]  # a character's last and first byte
    tokenizer = loaded(byte_level([(char[a], char[b]) for a, b in itertools.product(last, first)]))
    return tokenizer, fast_encoder(tokenizer)


def test_fast_ids_are_the_librarys_for_every_code_point(boundaries):
    """Two regular expression engines carry two Unicode tables. A code point that one of them takes for a letter, a number, white
    space or none of these, and the other does not, is cut off from other neighbours."""
    tokenizer, fast = boundaries

    def context(c):
        return f" {c}a{c}1"
    cuts = {tuple(library_ids(tokenizer, context(c)).count(tokenizer.token_to_id(t)) for t in ("aÃ", "²1", "ĠÂ", "ĠÃ"))
            for c in ("\xe9", "\xb2", "\xa7", "\xa0")}
    assert len(cuts) == 4  # letter, number, neither, white space: the context tells them apart

    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [context(chr(c)) for c in points if c >> 16 in (0, 1, 2, 3, 14)]
    # The other planes have no character, or private ones. In runs they take half the time: what is none of the three stays with both !
    rest = "".join(chr(c) for c in points if c >> 16 not in (0, 1, 2, 3, 14))
    texts += [f"!{rest[i:i + 16]}! " for i in range(0, len(rest), 16)]
    chunks = ["".join(texts[i:i + 4096]) for i in range(0, len(texts), 4096)]
    library = tokenizer.encode_batch_fast(chunks, add_special_tokens=False)
    wrong = [i for i, (a, e) in enumerate(zip(fast(chunks), library)) if not np.array_equal(a, e.ids)]
    assert not wrong, [ascii(t) for i in wrong for t in texts[i * 4096:(i + 1) * 4096] if fast([t])[0].tolist() != library_ids(tokenizer, t)][:100]


@properties
@given(text=st.lists(st.sampled_from([*TRICKY, *"stmdrlvSTMa1!\u017f"]), max_size=30).map("".join))
def test_fast_encoder_cuts_words_where_the_library_does(text, boundaries):
    tokenizer, fast = boundaries
    assert fast([text])[0].tolist() == library_ids(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_bpe_and_only_that_goes_through_tiktoken(kind, corpus, monkeypatch):
    built, encoding = [], tiktoken.Encoding
    monkeypatch.setattr(tiktoken, "Encoding", lambda *a, **k: built.append(1) or encoding(*a, **k))
    fast_encoder(load_tokenizer(str(corpus[0] / "data" / kind / "tokenizer.json")))(["some text"])
    assert bool(built) == (kind == "bpe")


def changed(change):
    tokenizer = byte_level([("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")])
    change(tokenizer)
    return tokenizer


NOT_PLAIN = {
    "lowercase": changed(lambda t: setattr(t, "normalizer", normalizers.Lowercase())),
    "digits apart": changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]))),
    "no words": changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))),
    "prefix space": changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
    "added token that is not special": changed(lambda t: t.add_tokens(["foo", "the d"])),
    "dropout": byte_level([("t", "h"), ("th", "e")], dropout=1.0),  # 1: it always drops, so its ids can be compared
    "two merges make one token": byte_level([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]),
    "token that its own text does not give": byte_level([("b", "c"), ("a", "b"), ("ab", "c")]),
    "whole words first": byte_level([("t", "h"), ("h", "e")], words=["the", "Ġabc"], ignore_merges=True),
    "not every byte": byte_level([("t", "h"), ("th", "e")], alphabet=[c for c in ALPHABET if c not in "oÃ"]),
    "unknown token": byte_level([("t", "h"), ("th", "e")], alphabet=[c for c in ALPHABET if c not in "oÃ"], unk_token="<|unk|>"),
    "end of word": byte_level([("t", "h"), ("h", "e</w>")], words=["e</w>", "c</w>"], end_of_word_suffix="</w>"),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_fast_encoder_gives_the_librarys_ids_for_other_tokenizers_too(case):
    tokenizer = loaded(NOT_PLAIN[case])
    texts = ["The the abc ab bc abcbc foo dog the dog é 12 <|bos|>\U0001f600", "", "foo", " the"]
    assert [a.tolist() for a in fast_encoder(tokenizer)(texts)] == [library_ids(tokenizer, t) for t in texts]


def test_truncation_and_padding_in_a_tokenizer_file_do_not_cut_or_pad_documents(prepared):
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20, pad_token="<|pad|>")
    tokenizer, texts = loaded(tokenizer), [document(0), "a", document(1)]
    decoded = [tokenizer.decode(a.tolist(), skip_special_tokens=False) for a in fast_encoder(tokenizer)(texts)]
    assert decoded == [normalized(tokenizer, t) for t in texts]


def test_bpe_learns_from_a_document_without_spaces_in_seconds():
    started = time.process_time()
    train_bpe(["ab" * 150_000, "some text"], 300)  # one word; 35 s where time grows with the square of its length
    assert time.process_time() - started < 8


@pytest.mark.parametrize("kind", LOSSLESS)
def test_vocabulary_has_special_tokens_then_bytes_and_the_size_asked_for(kind, corpus):
    vocab = load_tokenizer(str(corpus[0] / "data" / kind / "tokenizer.json")).get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    assert sorted(vocab.values()) == list(range(KINDS[kind]))
    assert tokens[:7] == SPECIAL and tokens[7:7 + 256] == ALPHABET


def test_hybrid_spells_every_word_that_is_not_in_its_vocabulary(corpus):
    tokenizer = load_tokenizer(str(corpus[0] / "data/hybrid/tokenizer.json"))
    assert tokenizer.token_to_id("Ġself") and len(library_ids(tokenizer, " self")) == 1
    assert not tokenizer.token_to_id("Ġselfesteem") and len(library_ids(tokenizer, " selfesteem")) == len(" selfesteem")


# ---- chunk

def greedy(text):
    """The rule of the chunks as a loop."""
    i = 0
    while i < len(text):
        three = text[i:i + 3]
        whole = len(three) == 3 and (three in TRIGRAMS or three[0] == " " or three[2] == " ")
        yield three if whole else three[:2]
        i += 3 if whole else 2


def spelled(text, vocab):
    """Lowercase text in chunks, those outside the vocabulary in characters."""
    return [t for chunk in greedy(text) for t in ([chunk] if chunk in vocab else chunk)]


def cut(tokenizer, text):
    return [chunk for chunk, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture(scope="session")
def few(corpus):
    """A chunk tokenizer of 300 tokens: it knows 75 characters."""
    tokenizer = loaded(train_chunk([(ROOT / "prepare.py").read_text()], 300))
    return tokenizer, fast_encoder(tokenizer), token_byte_counts(tokenizer)


CHUNKY = st.lists(st.sampled_from([*TRIGRAMS, *TRICKY, *"thei  \n"]), max_size=30).map("".join)


@properties
@given(text=st.one_of(TEXT, CHUNKY))
@example(text="\r\n the\n  \n\n x\u2028y")
def test_chunks_are_what_a_greedy_loop_cuts(text, few):
    assert cut(few[0], text) == re.findall(CHUNKS, text) == list(greedy(text))


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_chunks_of_real_text_are_what_a_greedy_loop_cuts(path, few):
    text = path.read_text().lower()
    assert cut(few[0], text) == re.findall(CHUNKS, text) == list(greedy(text))
    assert len(list(greedy(text))) < len(text) / 2.2


@properties
@given(text=st.one_of(TEXT, CHUNKY))
@example(text="ab☃cd ☃☃☃☃ the☃")
@example(text="<|EOS|> <|eos|> <|Unk|>")
@example(text="\u0130vme \u1e9e \u03a3")
def test_chunk_loses_a_character_that_it_does_not_know_and_nothing_else(text, few):
    tokenizer, fast, counts = few
    vocab, lower = tokenizer.get_vocab(), normalized(tokenizer, text)
    tokens, ids = spelled(lower, vocab), fast([text])[0].tolist()
    assert ids == library_ids(tokenizer, text) == [vocab.get(t, vocab["<|unk|>"]) for t in tokens]
    assert tokenizer.decode(ids) == "".join(t for t in tokens if t in vocab)
    assert {i for i in ids if i < len(SPECIAL)} <= {vocab["<|unk|>"]}
    assert counts[ids].sum() + size(t for t in tokens if t not in vocab) == size([lower])


def test_chunk_keeps_the_rest_of_a_chunk_with_an_unknown_character(few):
    tokenizer, fast, _ = few
    ids = fast(["ab☃cd"])[0].tolist()
    assert ids.count(tokenizer.token_to_id("<|unk|>")) == 1 and tokenizer.decode(ids) == "abcd"


@pytest.mark.parametrize("text", ["<|eos|>", "<|EOS|>", "a<|Bos|><|UNK|>b"])
def test_chunk_spells_what_looks_like_a_special_token(text, tokenizers):
    tokenizer, fast = tokenizers["chunk"]
    ids = fast([text])[0].tolist()
    assert min(ids) >= len(SPECIAL) and tokenizer.decode(ids) == text.lower()


def test_chunk_counts_each_tokens_own_bytes():
    tokenizer = loaded(train_chunk(["Ġab Ċ Ã© <0x0A> \\n ▁x ##y '' \"\" \x00\t\r\n  Łódź 中文 \U0001f600"], 300))
    counts, vocab = token_byte_counts(tokenizer), tokenizer.get_vocab()
    assert any(t[0] == " " for t in vocab) and any(t[-1] == " " for t in vocab) and len(counts) == len(vocab)
    for token, i in vocab.items():
        assert (counts[i], tokenizer.decode([i])) == ((0, "") if token in SPECIAL else (len(token.encode()), token))


def test_chunk_vocabulary_is_special_tokens_the_commonest_characters_and_the_commonest_chunks():
    rng = random.Random(0)
    texts = [document(i) + "".join(chr(int(0x4e00 + rng.expovariate(0.01))) for _ in range(20)) for i in range(400)]
    lower = [normalizers.Lowercase().normalize_str(t) for t in texts]
    characters, chunks = collections.Counter("".join(lower)), collections.Counter(c for t in lower for c in greedy(t) if len(c) > 1)
    assert len(characters) > 150

    def rank(counts):
        return sorted(counts, key=lambda k: (-counts[k], k))
    for n in (400, 700):
        tokenizer = train_chunk(texts, n)
        vocab = tokenizer.get_vocab()
        assert sorted(vocab, key=vocab.get) == [*SPECIAL, *rank(characters)[:n // 4], *rank(chunks)][:n]
        assert tokenizer.to_str() == train_chunk(texts, n).to_str()
    everything = train_chunk(texts, 35_560).get_vocab()  # more than there is
    assert everything.keys() == {*SPECIAL, *characters, *chunks} and sorted(everything.values()) == list(range(len(everything)))


def test_chunk_counts_in_bounded_memory_and_still_finds_what_is_frequent(monkeypatch):
    monkeypatch.setattr("corpus.tokenizer.COUNTED_CHUNKS", 2000)
    rng = random.Random(0)
    texts = [t for _ in range(100) for t in (" some words again", "".join(chr(rng.randrange(0x4e00, 0x9fff)) for _ in range(3000)))]
    tracemalloc.start()
    vocab = train_chunk(texts, 400).get_vocab()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {*greedy(" some words again")} <= vocab.keys() and len(vocab) == 400
    assert peak < 8e6  # counting all 150,000 different chunks would take 30 MB


def test_unknown_characters_are_counted_and_shown(tmp_path, capsys):
    texts = [document(i) + chr(0x4e00 + i) for i in range(200)]  # more characters than a vocabulary of 300 takes
    folder, meta = run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "data", tokenizer="chunk", val_fraction=0.3)
    source, unknown, tokens = meta["sources"][0], 0, 0
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    for split in ("train", "val"):
        ids = np.fromfile(folder / source[split]["file"], "<u2")
        assert source[split]["unknown"] == np.count_nonzero(ids == tokenizer.token_to_id("<|unk|>")) > 0
        assert source[split]["bytes"] > size(texts_of(folder, split))
        unknown, tokens = unknown + source[split]["unknown"], tokens + len(ids)
    assert source["train"]["bytes"] + source["val"]["bytes"] == size(normalized(tokenizer, t) for t in texts)
    assert f" validation tokens, {unknown / tokens:.2%} unknown\n" in capsys.readouterr().out
    run(tmp_path / "x.jsonl", tmp_path / "data")
    assert "unknown" not in capsys.readouterr().out


def test_a_run_on_text_of_unknown_characters_alone_ends_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded(train_chunk(["a b c"], 300)).save("few.json")
    run(write_jsonl(Path("x.jsonl"), [chr(0x4e00 + i) * 100 for i in range(30)]), "data", tokenizer="few.json", name="unknown")
    assert run_train("--data=unknown", "--out=run") == 0  # no bytes: bits per byte are not a number
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows and all(np.isfinite(r["train_loss"]) and np.isnan(r["train_bits_per_byte"]) for r in rows if "train_loss" in r)


# ---- the sample

def test_a_tokenizer_learns_from_training_text_alone(tmp_path):
    for i in range(10):  # two documents: here the split moves up to the lower hash, and the sample must follow
        texts = [f"{w}{i} " * 50 for w in ("left", "right")]
        source = local_source(write_jsonl(tmp_path / f"{i}.jsonl", texts), "")
        sample, threshold, *_ = prepare.scan(source, int(0.05 * 2 ** 64), 10 ** 6)
        assert sample == [d.text for d in clean(source.reader()) if d.hash >= threshold]


@properties
@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=40), seed=st.integers(0, 10), budget=st.integers(100, 2000))
def test_sample_fits_its_budget_and_does_not_depend_on_the_order_of_documents(sizes, seed, budget):
    texts = [f"{i} " * n for i, n in enumerate(sizes)]
    shuffled = random.Random(seed).sample(texts, len(texts))
    one, other = (prepare.scan(Source("s", "en", "text", {}, lambda: iter(t)), 2 ** 62, budget)[0] for t in (texts, shuffled))
    assert one == other
    assert sum(map(len, one)) <= budget or len(one) == 1


# ---------------------------------------------------------------------------------------------------- the files

@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_writes_the_same_bytes(kind, corpus, tmp_path):
    root, names = corpus
    process = command(ROOT / "prepare.py", *names, f"--tokenizer={kind}", f"--vocab_size={KINDS[kind]}", "--max_tokens=250K", f"--name={kind}",
                      f"--out_dir={tmp_path}", PYTHONHASHSEED="7", RAYON_NUM_THREADS="1")  # another process, with other hash seeds and threads
    err = process.communicate(timeout=600)[1]
    assert process.returncode == 0, err
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
    assert [(s["name"], s["language"], s["kind"]) for s in meta["sources"]] == [("pydocs", "en", "code"), ("books", "it", "books")]
    assert {p.name for p in prepared.iterdir()} == {"tokenizer.json", "meta.json", "train.0-pydocs.bin", "val.0-pydocs.bin", "train.1-books.bin", "val.1-books.bin"}
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == tokenizer.get_vocab_size()
    assert meta["tokenizer_sha256"] == hashlib.sha256((prepared / "tokenizer.json").read_bytes()).hexdigest()
    counts = token_byte_counts(tokenizer)
    for i, s in enumerate(meta["sources"]):
        for split in ("train", "val"):
            raw = (prepared / s[split]["file"]).read_bytes()
            _, ids, documents = split_ids(prepared, split, i)
            recount = dict(file=f"{split}.{i}-{s['name']}.bin", tokens=len(ids), unknown=0, documents=len(documents), bytes=size(texts_of(prepared, split, i)),
                           file_size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
            assert s[split] == recount and len(documents) > 0 and tokenizer.token_to_id("<|unk|>") not in ids
            assert counts[ids].sum() == recount["bytes"]


def test_files_hold_what_the_library_encodes_in_the_sources_order(corpus):
    root, names = corpus
    texts = list(local_source(names[1], "").documents())
    for kind in KINDS:
        tokenizer, _, train = split_ids(root / "data" / kind, "train", 1)
        val = split_ids(root / "data" / kind, "val", 1)[2]
        train, val = collections.deque(d.tolist() for d in train), collections.deque(d.tolist() for d in val)
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
    assert "".join(texts_of(prepared, "train")).startswith(normalized(tokenizer, next(pydocs().documents())[:1000]))


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
    for small, large in zip(split_of(part), split_of(one)):
        assert small == collections.Counter({t: large[t] for t in texts[:200] if t in large})  # documents that came later moved none


def test_validation_share_is_val_fraction(tmp_path):
    path = write_jsonl(tmp_path / "many.jsonl", [f"text {i}" for i in range(5_000)])
    for fraction in (0.05, 0.3):
        _, meta = run(path, tmp_path, val_fraction=fraction, name=str(fraction))
        n, expected = meta["sources"][0]["val"]["documents"], 5_000 * fraction
        assert abs(n - expected) < 4 * (expected * (1 - fraction)) ** 0.5  # four standard deviations


def test_a_text_that_occurs_often_is_taken_once(tmp_path):
    texts = [f"text {i % 50}" for i in range(1000)]
    folder, meta = run([write_jsonl(tmp_path / f"{name}.jsonl", texts) for name in "ab"], tmp_path, val_fraction=0.3)
    for i in range(2):  # within a source: the other one has them too
        assert texts_of(folder, "train", i) == [t for t in texts[:50] if t in texts_of(folder, "train", i)]  # the first time it occurs
        assert sorted(texts_of(folder, "train", i) + texts_of(folder, "val", i)) == sorted(set(texts))
        assert meta["sources"][i]["skipped"] == {"empty": 0, "not text": 0, "duplicate": 950}


@properties
@given(hashes=st.lists(st.integers(0, 60), max_size=300), limit=st.integers(1, 20), cut=st.integers(0, 300))
def test_hashes_are_remembered_for_a_while_in_bounded_memory(hashes, limit, cut):
    seen = Seen()
    seen.LIMIT = limit
    new = []
    for i, h in enumerate(hashes):
        if seen.add(h):
            new.append(h)
        else:
            assert h in hashes[:i]  # nothing is called a duplicate that is none
        assert len(seen.new) + len(seen.old) <= 2 * limit and set(new[-limit:]) <= seen.new | seen.old
    again = Seen()
    again.LIMIT = limit
    for h in new:  # what resuming does: the hashes of what was kept are enough to go on
        again.add(h)
    assert (again.new, again.old) == (seen.new, seen.old)


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_two_documents_give_one_for_each_side(fraction, tmp_path):
    for i in range(12):
        folder, _ = run(write_jsonl(tmp_path / f"two{i}.jsonl", [f"one {i}", f"other {i}"]), tmp_path, val_fraction=fraction)
        assert [len(c) for c in split_of(folder)] == [1, 1]


def test_a_short_text_file_gives_validation_text(tmp_path):
    (tmp_path / "short.txt").write_text("".join(f"Line {i} of a short file.\n" for i in range(100)))
    train, val = split_of(run(tmp_path / "short.txt", tmp_path)[0])
    assert train and val


def test_val_fraction_0_gives_no_validation_text(tmp_path):
    _, meta = run(write_jsonl(tmp_path / "x.jsonl", map(document, range(50))), tmp_path, val_fraction=0.0)
    assert meta["sources"][0]["val"] == dict(file="val.0-x.bin", tokens=0, unknown=0, documents=0, bytes=0, file_size=0, sha256=hashlib.sha256().hexdigest())
    assert meta["sources"][0]["train"]["documents"] == 50


@pytest.mark.parametrize("texts, fraction", [(["one"], 0.05), (["same"] * 20, 0.05), ([], 0.05), ([], 0.0)], ids=["one", "copies", "none", "none wanted"])
def test_too_few_documents_for_a_split_are_a_mistake_that_writes_nothing(texts, fraction, tmp_path):
    with pytest.raises(UserError, match="few holds"):
        run(write_jsonl(tmp_path / "few.jsonl", texts), tmp_path / "data", val_fraction=fraction)
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------------------- formats

def test_every_format_is_read_in_the_order_of_paths(tmp_path):
    d = tmp_path / "mixed"
    (d / "sub/.hidden").mkdir(parents=True)
    (d / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree \xe8".encode())  # a byte order mark, two kinds of line ends
    (d / "b.md").write_bytes(b"caf\xe9 \xff ok")  # Latin-1
    (d / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "r1", "content": "not this"}\r\n\r\n  \n{"id": 1, "text": "\\ud83d\\ude00 \\ud800x\\udc00"}\n{"text": "line\\r\\nends \\u0000 stay"}')
    (d / "d.jsonl.gz").write_bytes(gzip.compress('{"content": "zipped \xe8"}\n'.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "content": ["p1", None, "p3"]}), d / "e.parquet")
    (d / "sub/f.txt").write_text("deep")
    for ignored in ("notes.csv", ".g.txt", "sub/.hidden/h.txt", "README"):
        (d / ignored).write_text("not read")
    folder, meta = run(f"{d}@it/web", tmp_path, val_fraction=0.0)
    assert texts_of(folder, "train") == ["one\ntwo\nthree \xe8", "caf\ufffd \ufffd ok", "r1", "\U0001f600 \ufffdx\ufffd", "line\r\nends \x00 stay", "zipped \xe8", "p1", "p3", "deep"]
    source = meta["sources"][0]
    assert (source["name"], source["language"], source["kind"], source["origin"]["files"]) == ("mixed", "it", "web", 6)
    assert source["skipped"] == {"empty": 1, "not text": 0, "duplicate": 0}  # the null in the parquet file


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_column_names_the_text(suffix, tmp_path):
    rows = [{"text": "no", "body": f"yes {i}"} for i in range(3)]
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        data = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    folder, _ = run(path, tmp_path, val_fraction=0.0, column="body")
    assert texts_of(folder, "train") == ["yes 0", "yes 1", "yes 2"]
    with pytest.raises(UserError, match="no column 'txt', it has 'text', 'body'"):
        run(path, tmp_path, column="txt", name="other")


def test_rows_without_text_are_counted_and_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a", "", " \n\u3000", None, 5, ["b"], {"c": 1}, False, "d")))
    folder, meta = run(path, tmp_path, val_fraction=0.0)
    assert texts_of(folder, "train") == ["a", "d"]
    assert meta["sources"][0]["skipped"] == {"empty": 3, "not text": 4, "duplicate": 0}


def not_utf8_parquet(path):
    raw = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())}), path)


ZIPPED = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(1000)))
BROKEN = {
    "cut.jsonl.gz": lambda p: p.write_bytes(ZIPPED[:-100]),
    "garbage.jsonl.gz": lambda p: p.write_bytes(ZIPPED[:10] + b"\xff" * 100),
    "unzipped.jsonl.gz": lambda p: p.write_bytes(gzip.decompress(ZIPPED)),
    "deep.jsonl": lambda p: p.write_text("[" * 100_000),
    "number.jsonl": lambda p: p.write_text('{"text": ' + "1" * 5000 + "}"),
    "cut.parquet": lambda p: (not_utf8_parquet(p), p.write_bytes(p.read_bytes()[:-20])),
    "latin1.parquet": not_utf8_parquet,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name, tmp_path):
    BROKEN[name](tmp_path / name)
    with pytest.raises(UserError, match=name):
        run(tmp_path / name, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "text.txt"


@properties
@given(text=st.one_of(TEXT, st.text(st.sampled_from("ab \n\r\u3000\U0001f600"), max_size=300)), limit=st.integers(1, 50), read=st.integers(1, 60))
def test_pieces_of_a_long_file_are_its_text_and_at_most_the_limit(text, limit, read, scratch):
    scratch.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as m:
        m.setattr("corpus.tokenizer.PIECE", read)  # the amount read at a time
        pieces = list(text_documents(scratch, limit))
    assert "".join(pieces) == text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert all(len(p) <= limit for p in pieces) and all(pieces[:-1])


@pytest.mark.parametrize("text, first", [("one two three.\n\n4\n5 six seven", "one two three.\n\n"), ("one two three.\n4 5 six seven", "one two three.\n"),
                                         ("one two three four five six", "one two three four "), ("x" * 40, "x" * 20)],
                         ids=["paragraph", "line", "word", "nowhere"])
def test_a_piece_ends_behind_a_paragraph_else_a_line_else_a_word(text, first, scratch):
    scratch.write_text(text)
    assert next(text_documents(scratch, 20)) == first


# ---------------------------------------------------------------------------------------------------- settings

def test_an_existing_tokenizer_is_used_as_it_is(prepared, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "new.jsonl", map(document, range(1000, 1050)))
    folder, _ = run(path, tmp_path, tokenizer=str(prepared / "tokenizer.json"))
    assert folder.name == f"new-{prepared.name}"  # tokenizer.json is called after its folder
    assert (folder / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    ids = sorted(d[1:-1].tolist() for split in ("train", "val") for d in split_ids(folder, split)[2])
    assert ids == sorted(library_ids(tokenizer, document(i)) for i in range(1000, 1050))


@pytest.mark.parametrize("size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_have_four_bytes_only_above_65536(size, dtype, tmp_path):
    words = ["Ġ" + "".join(w) for w in itertools.islice(itertools.product("abcdefghijklmnop", repeat=5), size - 263)]
    byte_level([], words=words, ignore_merges=True).save(str(tmp_path / "large.json"))
    texts = [f" {w[1:]} x" for w in words[-5:]]
    folder, meta = run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path, tokenizer=str(tmp_path / "large.json"), val_fraction=0.0)
    assert (meta["dtype"], meta["vocab_size"]) == (dtype, size)
    ids = split_ids(folder, "train")[1]
    assert ids.max() == size - 1 and ids.nbytes == meta["sources"][0]["train"]["file_size"] == len(ids) * np.dtype(dtype).itemsize
    assert texts_of(folder, "train") == texts


def test_an_id_far_behind_the_others_keeps_its_value(tmp_path):
    spec = json.loads(byte_level([], words=["Ġlast"], ignore_merges=True).to_str())
    spec["model"]["vocab"]["Ġlast"] = 70_000  # 264 tokens, but ids up to 70,000
    (tmp_path / "gaps.json").write_text(json.dumps(spec))
    folder, meta = run(write_jsonl(tmp_path / "x.jsonl", ["at last", "the last"]), tmp_path, tokenizer=str(tmp_path / "gaps.json"))
    tokenizer, ids, _ = split_ids(folder, "train")
    assert ids.max() == 70_000 and meta["vocab_size"] == 70_001
    assert token_byte_counts(tokenizer)[ids].sum() == meta["sources"][0]["train"]["bytes"]


@pytest.mark.parametrize("budget", [1, 700, 5000])
def test_training_text_ends_with_the_document_that_reaches_max_tokens(budget, tmp_path):
    folder, meta = run(write_jsonl(tmp_path / "x.jsonl", map(document, range(400))), tmp_path, max_tokens=budget)
    _, ids, documents = split_ids(folder, "train")
    assert len(ids) >= budget > len(ids) - len(documents[-1])
    assert meta["sources"][0]["budget"] == budget
    train, val = split_of(folder)
    assert val  # also where the first validation document lies behind the budget
    order = {document(i): i for i in range(400)}
    last = max(order[t] for t in train)
    assert {order[t] for t in train} | {order[t] for t in val if order[t] < last} == set(range(last + 1))  # it starts at the start and leaves none out


def test_max_tokens_may_be_less_than_one_document(tmp_path):
    folder, _ = run(write_jsonl(tmp_path / "x.jsonl", (document(i) * 20 for i in range(100))), tmp_path, max_tokens=10)
    assert len(texts_of(folder, "train")) == 1 and texts_of(folder, "val")


def test_every_name_is_a_source_with_language_and_kind(tmp_path):
    (tmp_path / "v1.2 (new)").mkdir()
    names = [write_jsonl(tmp_path / "novels_it.jsonl", map(document, range(30))) + "@it/books",
             write_jsonl(tmp_path / "v1.2 (new)/x.jsonl", map(document, range(30, 60))).removesuffix("/x.jsonl") + "@en",
             write_jsonl(tmp_path / "odd@it.jsonl", map(document, range(60, 90)))]  # a file that has an @ in its name
    folder, meta = run(names, tmp_path / "data")
    assert [(s["name"], s["language"], s["kind"]) for s in meta["sources"]] == [("novels_it", "it", "books"), ("v1_2_new_", "en", "text"), ("odd_it", "und", "text")]
    assert {p.name for p in folder.glob("*.bin")} == {f"{split}.{stem}.bin" for split in ("train", "val") for stem in ("0-novels_it", "1-v1_2_new_", "2-odd_it")}
    for i in range(3):
        assert sorted(texts_of(folder, "train", i) + texts_of(folder, "val", i)) == sorted(map(document, range(30 * i, 30 * i + 30)))


def test_every_source_may_have_a_budget_of_its_own(tmp_path):
    names = [write_jsonl(tmp_path / f"{name}.jsonl", (document(1000 * i + j) for j in range(400))) for i, name in enumerate("abc")]
    folder, meta = run([names[0] + "@en/web:3K", names[1] + ":1_500", names[2]], tmp_path / "data", max_tokens=5000)
    assert folder.name == "a+b+c-bpe-300"
    assert [(s["name"], s["language"], s["budget"]) for s in meta["sources"]] == [("a", "en", 3000), ("b", "und", 1500), ("c", "und", 5000)]
    for s in meta["sources"]:
        assert s["budget"] <= s["train"]["tokens"] < s["budget"] + 400  # ends with the document that reaches it
    with pytest.raises(UserError, match="sources was"):
        run([names[0] + "@en/web:4K", names[1] + ":1500", names[2]], tmp_path / "data", max_tokens=5000)
    with pytest.raises(UserError, match="budget behind .*a.jsonl: '1.0001K' is not a whole number"):
        run(names[0] + ":1.0001K", tmp_path / "data")


def test_the_joint_tokenizer_learns_equally_much_from_every_source(tmp_path, monkeypatch):
    """A source ten times as large as the others does not crowd them out of the vocabulary."""
    monkeypatch.setattr("prepare.SAMPLE_BYTES", 60_000)
    seen, trained = [], train_bpe
    monkeypatch.setitem(TRAINERS, "bpe", lambda texts, size: (seen.extend(texts), trained(texts, size))[1])
    letters = {"a": 10_000, "b": 1000, "c": 1000}
    names = [write_jsonl(tmp_path / f"{x}.jsonl", (f"{x * 5} " * 6 + str(i) for i in range(n))) for x, n in letters.items()]
    run(names, tmp_path / "data")
    share = collections.Counter(text[0] for text in seen for _ in range(len(text)))
    assert all(19_000 < share[x] <= 20_000 for x in letters)

WIKI40B = "\n_START_ARTICLE_\nFiume è perché\n_START_SECTION_\nStoria\n_START_PARAGRAPH_\nPrima riga._NEWLINE_Seconda riga\n_START_SECTION_\nVedi_START_PARAGRAPH_\nFine."


def test_an_article_without_text_is_empty():
    assert list(clean(["\n_START_ARTICLE_\n", "_START_ARTICLE_\n_START_PARAGRAPH_"])) == ["empty", "empty"]


@pytest.mark.parametrize("text", (WIKI40B, repr(WIKI40B.encode()), repr(WIKI40B.replace("Fiume", "L'").encode()).replace("L'", "Fiume")), ids=("text", "repr", "quotes"))
def test_markers_of_wiki40b_become_paragraphs(text, tmp_path):
    folder, _ = run(write_jsonl(tmp_path / "wiki.jsonl", [text, document(1), f"It says _START_ARTICLE_ here.{document(2)}"]), tmp_path, val_fraction=0.0)
    assert sorted(texts_of(folder, "train")) == sorted(["Fiume è perché\n\nStoria\n\nPrima riga.\nSeconda riga\n\nVedi\n\nFine.", document(1),
                                                       f"It says _START_ARTICLE_ here.{document(2)}"])


def test_a_damaged_article_of_wiki40b_is_taken_as_it_is(tmp_path):
    torn = repr(WIKI40B.encode())[:-1]
    folder, _ = run(write_jsonl(tmp_path / "wiki.jsonl", [torn, document(1)]), tmp_path, val_fraction=0.0)
    assert torn in texts_of(folder, "train")


def test_languages_and_kinds_stay_apart_and_the_split_ignores_the_order_of_files(tmp_path):
    """English and Italian, web and wiki, two folders per language: the same validation text whatever the files are called."""
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
    assert [(s["name"], s["language"], s["kind"]) for s in meta["sources"]] == [(f"{x}_{k}", x, k) for x in ("en", "it") for k in ("web", "wiki")]
    for i in range(4):
        for split in ("train", "val"):
            a, b = texts_of(first, split, i), texts_of(second, split, i)
            assert sorted(a) == sorted(b) and (split == "val" or a != b)


@pytest.mark.parametrize("given, name", [(dict(vocab_size=16_384), "x-bpe"), (dict(vocab_size=300), "x-bpe-300"), (dict(tokenizer="hybrid", vocab_size=2111), "x-hybrid"),
                                         (dict(tokenizer="chunk", vocab_size=4466), "x-chunk"), (dict(tokenizer="chunk", vocab_size=35_560), "x-chunk-35560"),
                                         (dict(name="mine"), "mine")])
def test_folder_is_named_after_text_and_tokenizer(given, name, tmp_path):
    folder, _ = run(write_jsonl(tmp_path / "x.jsonl", map(document, range(30))), tmp_path / "data", **given)
    assert folder == tmp_path / "data" / name


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


@pytest.mark.parametrize("change", [dict(max_tokens=1000), dict(val_fraction=0.2), dict(column="body"), dict(vocab_size=400), dict(tokenizer="hybrid"), dict(sources=1)], ids=lambda c: [*c][0])
def test_other_settings_are_refused_by_name_and_change_nothing(change, made, tmp_path):
    path, folder = made
    before = snapshot(folder, times=True)
    if change.pop("sources", 0):
        path, what = write_jsonl(tmp_path / "x.jsonl", map(document, range(51))), "sources"
    else:
        what = [*change][0]
    with pytest.raises(UserError, match=f"made with other settings .*{what} was .* and is now .*--name"):
        run(path, folder.parent, name="made", **change)
    assert snapshot(folder, times=True) == before


# Dies as it encodes the second of two sources: the first one's files are written, and files beside them that no later run makes
DIE = """
import os, pathlib, signal, sys, prepare
fast_encoder, calls = fast_encoder, []
def deadly(tokenizer):
    encode = fast_encoder(tokenizer)
    def one_and_no_more(texts):
        calls.append(1)
        if len(calls) > 1:
            for part in pathlib.Path("data").iterdir():
                (part / "leftover").touch()
            if sys.argv[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError
        return encode(texts)
    return one_and_no_more
fast_encoder = deadly
prepare.main(sys.argv[2:])
"""


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_what_did_not_finish_leaves_no_folder_and_the_next_run_is_whole(end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [write_jsonl(Path(f"{n}.jsonl"), (document(i) + n for i in range(30))) for n in "ab"]
    process = command("-c", DIE, end, *names, "--vocab_size=300")
    err = process.communicate(timeout=600)[1]
    assert process.returncode == (-signal.SIGKILL if end == "killed" else 1), err
    assert [p.name for p in Path("data").iterdir() if not p.name.startswith(".")] == []
    folder, _ = run(names, "data")
    assert snapshot(folder) == snapshot(run(names, "undisturbed")[0])
    assert [p.name for p in Path("data").iterdir()] == [folder.name]  # and the remains are gone


# Ends the process as a power cut would, before a random one of the things that leave a trace on the disk
KILL = """
import os, random, signal, sys, prepare
prepare.BATCH_BYTES, prepare.SAVE_SECONDS = 2000, -1
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
countdown("fast_encoder", prepare)
prepare.main(sys.argv[2:])
"""


def test_killed_at_ten_random_moments_and_run_again_it_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [document(i % 250) for i in range(300)]  # with duplicates on both sides of every cut
    words = [write_jsonl(Path(f"{n}.jsonl"), [t + n for t in texts]) + budget for n, budget in (("a", ""), ("b", ":4000"))]
    words += ["--vocab_size=300", "--name=made"]
    prepare.main([*words, "--out_dir=whole"])
    kills, resumed = 0, 0
    for seed in itertools.count():
        process = command("-c", KILL, seed, *words, "--out_dir=killed")
        out, err = process.communicate(timeout=600)
        resumed += "going on" in out
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
    assert process.returncode == 0 and kills >= 10 and resumed >= 8
    assert snapshot(Path("killed/made")) == snapshot(Path("whole/made"))


def test_what_was_half_made_of_other_text_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(write_jsonl(Path("a.jsonl"), (document(i) for i in range(300))))
    process = command("-c", KILL, 3, path, "--vocab_size=300")
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL and Path("data/.a-bpe-300.part/progress.json").exists()
    write_jsonl(path, (document(i) for i in range(300, 600)))
    os.truncate(path, path.stat().st_size)
    folder, _ = run(path, "data")
    assert sorted(texts_of(folder, "train") + texts_of(folder, "val")) == sorted(map(document, range(300, 600)))


# Prepares a file of argv[1] megabytes and prints by how many megabytes the process grew
MEASURE = """
import random, resource, sys, prepare, tiktoken
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
prepare.SAMPLE_BYTES, before = 2 ** 20, peak()
prepare.main(["large.txt", "--vocab_size=1000"])
print(peak() - before)
"""


def test_a_large_file_is_prepared_whole_in_less_memory_than_its_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Linux counts the memory of the process that starts another one as that one's peak: a small one stands between it and this one
    process = command("-c", "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))", MEASURE, 60)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    source = read_meta("data/large-bpe-1000")["sources"][0]
    assert source["train"]["bytes"] + source["val"]["bytes"] == os.path.getsize("large.txt")
    for split in ("train", "val"):  # many batches are counted and summed up as one is
        raw = Path("data/large-bpe-1000", source[split]["file"]).read_bytes()
        assert source[split]["sha256"] == hashlib.sha256(raw).hexdigest() and source[split]["tokens"] == len(raw) // 2
        assert source[split]["documents"] == np.count_nonzero(np.frombuffer(raw, "<u2") == 1)  # <|bos|>
    assert 5 < float(out.split()[-1]) < 60


def test_show_tells_what_a_folder_holds(tmp_path, capsys):
    names = [write_jsonl(tmp_path / f"{name}.jsonl", (document(100 * i + j) for j in range(80))) + label for i, (name, label) in enumerate((("a", "@en/web"), ("b", "@it/books")))]
    folder, meta = run(names, tmp_path, name="shown")
    capsys.readouterr()
    before = snapshot(folder, times=True)
    assert prepare.main([f"--show={folder}"]) == 0 and snapshot(folder, times=True) == before
    shown = capsys.readouterr().out
    for i, x in enumerate(meta["sources"]):
        for split in ("train", "val"):
            row, = (line.split() for line in shown.splitlines() if line.split()[:3] == [x["name"], f"{x['language']}/{x['kind']}", split])
            assert row[3:6] == [f"{x[split][k]:,}" for k in ("tokens", "documents", "bytes")] and row[6] == f"{x[split]['bytes'] / x[split]['tokens']:.2f}"
            assert float(row[7]) == pytest.approx(sum(map(len, texts_of(folder, split, i))) / x[split]["tokens"], abs=0.006)
        _, _, documents = split_ids(folder, "train", i)
        lengths = [len(d) for d in documents]
        section = shown.split(f"\n{x['name']}, tokens per training document: ")[1].split("\n\n")[0]
        assert section.startswith(f"shortest {min(lengths):,}, median {int(np.median(lengths)):,}, longest {max(lengths):,}")
        bars = {(int(low), int(high)): int(n) for low, high, n in re.findall(r"^ +(\d+) to +(\d+) +(\d+)", section, re.M)}
        assert sum(bars.values()) == len(lengths) and all(n == sum(low <= k <= high for k in lengths) for (low, high), n in bars.items())
        assert texts_of(folder, "train", i)[0][:40] in shown
    assert prepare.main([f"--show={folder}", "--plot"]) == 0
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG") and read_meta(folder) == meta


# ---------------------------------------------------------------------------------------------------- flags

@dataclasses.dataclass
class Example:
    steps: int = 1200  # how many; 100% of them
    rate: float = 0.5  # how fast
    title: str = "none"  # what it is called
    loud: bool = False  # whether it shouts


@properties
@given(n=st.integers(-10 ** 18, 10 ** 18))
@example(n=2010)  # 2.01 * 1000 is 2009.9999999999998
@example(n=2 ** 53 + 1)
def test_number_reads_any_whole_number_exactly(n):
    assert number(f"{n}") == number(f"{n:,}") == number(f" {n:_} ") == n
    assert number(f"{n}B") == n * 10 ** 9
    if n >= 0:
        assert number(f"{n // 1000}.{n % 1000:03}K") == n
        assert number(f"{n // 10 ** 6}.{n % 10 ** 6:06}m") == n


@pytest.mark.parametrize("text, value", [("235M", 235_000_000), ("1_000", 1000), ("1.5K", 1500), ("1,024", 1024), ("2b", 2 * 10 ** 9), ("-3", -3)])
def test_flags_take_numbers_as_people_write_them(text, value):
    assert parse_flags([f"--steps={text}"], Example()) == ({"steps": value}, [])


@pytest.mark.parametrize("text", ["1.5", "abc", "", "_", "1.0005K", "1e3", "5 M", "M", "0x10", "nan", "inf"])
def test_what_is_no_whole_number_is_refused_with_the_flags_name(text):
    with pytest.raises(UserError, match="--steps"):
        parse_flags([f"--steps={text}"], Example())


def test_flags_and_words_come_in_any_order_and_only_what_was_typed_is_given():
    flags = ["--loud", "--rate=2", "--title", "a b"]
    for argv in ([*flags, "x", "y"], ["x", "y", *flags], ["x", *flags, "y"]):
        assert parse_flags(argv, Example(), positional=("NAME", "names")) == ({"rate": 2.0, "title": "a b", "loud": True}, ["x", "y"])
    assert parse_flags([], Example()) == ({}, [])
    for off in ("--loud=false", "--no-loud"):
        assert parse_flags([off], Example()) == ({"loud": False}, [])


@pytest.mark.parametrize("flag, answer", [("--stepz=3", "there is no flag --stepz .did you mean steps"), ("--vocabsize=3", "--vocabsize .did you mean vocab_size"),
                                          ("--step=3", "--step .did you mean steps"), ("--xyzzy", "there is no flag --xyzzy; --help lists them")])
def test_unknown_flags_are_answered_with_the_nearest(flag, answer):
    with pytest.raises(UserError, match=answer):
        parse_flags([flag], Example(), Settings())


def test_a_word_where_none_belongs_is_refused():
    with pytest.raises(UserError, match="what is 'x'"):
        parse_flags(["--steps=3", "x"], Example())


def test_help_explains_each_flag_with_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")  # no line is broken
    with pytest.raises(SystemExit) as e:
        parse_flags(["--help"], Example(), Settings(), description="What it does.", positional=("NAME", "what to read"))
    out = capsys.readouterr().out
    assert e.value.code == 0 and "What it does." in out and "what to read" in out
    for line in ("how many; 100% of them [1,200]", "how fast [0.5]", "what it is called [none]", "whether it shouts [False]"):
        assert line in out
    for field in dataclasses.fields(Settings):
        explained = [line for line in out.splitlines() if line.startswith(f"  --{field.name} ")]
        assert len(explained) == 1 and explained[0].endswith(f"[{field.default}]") and len(explained[0]) > 60
