"""corpus/tokenizer.py: no text is lost or changed on its way into ids, and the quick way gives the library's ids."""
import collections
import hashlib
import itertools
import os
import random
import re
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import example, given, strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from common import UserError
from conftest import ROOT
from corpus.pydocs import pydocs
from corpus.tokenizer import (CHUNKS, DEFAULT_VOCAB, GPT2_FILES, READY, TRAINERS, TRIGRAMS, bos_eos, byte_of_character,
                              cut_text, fast_encoder, from_tiktoken, gpt2_tokenizer, load_tokenizer, token_byte_counts,
                              train_bpe, train_chunk, unknown_id, vocabulary_size)
from corpus_helpers import (ALPHABET, KINDS, SPECIAL, TEXT, TRICKY, byte_level, document, library_ids, loaded,
                            normalized, properties, size, small_gpt2)

LOSSLESS = ["bpe", "hybrid"]


@pytest.fixture(scope="session")
def tokenizers():
    """kind -> (tokenizer, its fast encoder), trained on a part of pydocs and on invented words."""
    texts = [*itertools.islice(pydocs().documents(), 60), *map(document, range(400))]
    trained = {kind: loaded(TRAINERS[kind](texts, n)) for kind, n in KINDS.items()}
    return {kind: (tokenizer, fast_encoder(tokenizer)) for kind, tokenizer in trained.items()}


@pytest.fixture(scope="session", params=KINDS)
def each(request, tokenizers):
    """Each kind's (tokenizer, fast encoder) in turn."""
    return tokenizers[request.param]


# ---------------------------------------------------------------------------------------------------- any text

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
def test_fast_ids_are_the_librarys(texts, each):
    tokenizer, fast = each
    assert [ids.tolist() for ids in fast(texts)] == [library_ids(tokenizer, text) for text in texts]


@properties
@given(lengths=st.lists(st.integers(0, 30), max_size=40))
def test_texts_come_back_in_order_however_they_are_shared_out_to_threads(lengths, tokenizers):
    tokenizer, fast = tokenizers["bpe"]
    texts = [f"{i} " * n for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr("corpus.tokenizer.TASK", 50)
        assert [ids.tolist() for ids in fast(texts)] == [library_ids(tokenizer, text) for text in texts]


@pytest.fixture(scope="session")
def boundaries():
    """A tokenizer that merges every two neighbouring bytes of one word, at least at characters' ends: its ids show
    where words are cut."""
    char = {b: c for c, b in byte_of_character().items()}
    last, first = [*range(0xC0)], [*range(0x80), *range(0xC2, 0xF5)]  # a character's last and first byte
    tokenizer = loaded(byte_level([(char[a], char[b]) for a, b in itertools.product(last, first)]))
    return tokenizer, fast_encoder(tokenizer)


def test_fast_ids_are_the_librarys_for_every_code_point(boundaries):
    """Two regular expression engines carry two Unicode tables. A code point that one of them takes for a letter, a
    number, white space or none of these, and the other does not, is cut off from other neighbours."""
    tokenizer, fast = boundaries

    def context(c):
        return f" {c}a{c}1"

    def cuts(c):
        ids = library_ids(tokenizer, context(c))
        return tuple(ids.count(tokenizer.token_to_id(token)) for token in ("aÃ", "²1", "ĠÂ", "ĠÃ"))
    # letter, number, neither, white space: the context tells them apart
    assert len({cuts(c) for c in ("\xe9", "\xb2", "\xa7", "\xa0")}) == 4

    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [context(chr(c)) for c in points if c >> 16 in (0, 1, 2, 3, 14)]
    # The other planes have no character, or private ones. In runs they take half the time: what is none of the three
    # stays with both !
    rest = "".join(chr(c) for c in points if c >> 16 not in (0, 1, 2, 3, 14))
    texts += [f"!{rest[i:i + 16]}! " for i in range(0, len(rest), 16)]

    groups = [texts[i:i + 4096] for i in range(0, len(texts), 4096)]
    joined = ["".join(group) for group in groups]
    library = tokenizer.encode_batch_fast(joined, add_special_tokens=False)
    differing = [group for group, ids, e in zip(groups, fast(joined), library) if not np.array_equal(ids, e.ids)]
    wrong = [ascii(t) for group in differing for t in group if fast([t])[0].tolist() != library_ids(tokenizer, t)]
    assert not differing, wrong[:100]


@properties
@given(text=st.lists(st.sampled_from([*TRICKY, *"stmdrlvSTMa1!\u017f"]), max_size=30).map("".join))
def test_fast_encoder_cuts_words_where_the_library_does(text, boundaries):
    tokenizer, fast = boundaries
    assert fast([text])[0].tolist() == library_ids(tokenizer, text)


@pytest.fixture
def encodings(monkeypatch):
    """A list that grows by one when a tiktoken.Encoding is made."""
    made, encoding = [], tiktoken.Encoding
    monkeypatch.setattr(tiktoken, "Encoding", lambda *args, **given: made.append(1) or encoding(*args, **given))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_trained_bpe_and_only_that_goes_through_tiktoken(kind, tokenizers, encodings):
    fast_encoder(tokenizers[kind][0])(["some text"])
    assert bool(encodings) == (kind == "bpe")


def changed(change):
    tokenizer = byte_level([("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")])
    change(tokenizer)
    return tokenizer


def with_words(*before, **options):
    """Cuts text with `before`, then as ByteLevel with these options."""
    words = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    return lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence([*before, words]) if before else words)


BUT_O = [c for c in ALPHABET if c not in "oÃ"]
NOT_PLAIN = {
    "lowercase": changed(lambda t: setattr(t, "normalizer", normalizers.Lowercase())),
    "digits apart": changed(with_words(pre_tokenizers.Digits(individual_digits=True))),
    "no words": changed(with_words(use_regex=False)),
    "prefix space": changed(with_words(add_prefix_space=True)),
    "added token that is not special": changed(lambda t: t.add_tokens(["foo", "the d"])),
    "two merges make one token": byte_level([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]),
    "token that its own text does not give": byte_level([("b", "c"), ("a", "b"), ("ab", "c")]),
    "whole words first": byte_level([("t", "h"), ("h", "e")], words=["the", "Ġabc"], ignore_merges=True),
    "not every byte": byte_level([("t", "h"), ("th", "e")], alphabet=BUT_O),
    "unknown token": byte_level([("t", "h"), ("th", "e")], alphabet=BUT_O, unk_token="<|unk|>"),
    "end of word": byte_level([("t", "h"), ("h", "e</w>")], words=["e</w>", "c</w>"], end_of_word_suffix="</w>"),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_fast_encoder_gives_the_librarys_ids_for_other_tokenizers_too(case, encodings):
    tokenizer = loaded(NOT_PLAIN[case])
    texts = ["The the abc ab bc abcbc foo dog the dog é 12 <|bos|>\U0001f600", "", "foo", " the"]
    assert [ids.tolist() for ids in fast_encoder(tokenizer)(texts)] == [library_ids(tokenizer, t) for t in texts]
    assert not encodings


def test_a_text_has_the_same_ids_each_time_though_the_file_asks_for_dropout():
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokenizer = loaded(byte_level(merges, dropout=0.5))
    ids = library_ids(loaded(byte_level(merges)), "the the the")
    assert all(library_ids(tokenizer, "the the the") == ids for _ in range(20)) and len(ids) == 3
    assert fast_encoder(tokenizer)(["the the the"])[0].tolist() == ids


# ---------------------------------------------------------------------------------------------------- long texts

@properties
@given(text=TEXT, longest=st.integers(1, 12))
def test_pieces_are_the_text_and_none_is_too_long(text, longest):
    pieces = list(cut_text(text, longest))
    assert "".join(pieces) == text and all(len(piece) <= longest for piece in pieces)


WORDS = ["the", "house", "caffè", "Łódź", "12", "don't", "you're", "(or", "self.x", "中文", "\U0001f600",
         "\n\nThen", "a_b"]


@properties
@given(words=st.lists(st.sampled_from(WORDS), min_size=4, max_size=60), longest=st.integers(30, 60))
@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_text_that_is_cut_between_words_gives_the_same_ids(words, longest, kind, tokenizers):
    text, (tokenizer, _) = " the a ".join(words), tokenizers[kind]  # a place to cut is never far away
    with pytest.MonkeyPatch.context() as m:
        m.setattr("corpus.tokenizer.LONGEST_WITH_TIKTOKEN", longest)
        m.setattr("corpus.tokenizer.LONGEST", longest)
        ids, short = fast_encoder(tokenizer)([text, "short"])
    assert ids.tolist() == library_ids(tokenizer, text) and short.tolist() == library_ids(tokenizer, "short")


@pytest.mark.parametrize("what", [" ", "\n", "a"])
def test_a_text_of_a_million_characters_without_a_word_is_encoded(what, tokenizers):
    text = what * (1_100_000 // len(what)) + "x"  # tiktoken's regular expression fails at a million spaces
    tokenizer, fast = tokenizers["bpe"]
    assert tokenizer.decode(fast([text])[0].tolist()) == text


# ---------------------------------------------------------------------------------------------------- loading

def test_truncation_and_padding_in_a_tokenizer_file_do_not_cut_or_pad_documents(each):
    tokenizer = Tokenizer.from_str(each[0].to_str())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20, pad_token="<|pad|>")
    tokenizer, texts = loaded(tokenizer), [document(0), "a", document(1)]
    decoded = [tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in fast_encoder(tokenizer)(texts)]
    assert decoded == [normalized(tokenizer, text) for text in texts]


def test_a_tokenizer_is_loaded_from_its_text_its_file_and_a_checkpoint(each, tmp_path):
    text = each[0].to_str(pretty=True)
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    torch.save({"step": 3, "model": {"w": torch.ones(2)}, "tokenizer": text}, tmp_path / "best.pt")
    for source in (text, str(tmp_path / "t.json"), str(tmp_path / "best.pt")):
        tokenizer = load_tokenizer(source)
        assert tokenizer.to_str(pretty=True) == text and tokenizer.encode_special_tokens


NO_TOKENIZER = {
    "none.json": (lambda path: None, "none.json is not a tokenizer.json"),
    "list.json": (lambda path: path.write_text("[1]"), "list.json is not a tokenizer.json"),
    "none.pt": (lambda path: None, r"none.pt is not a checkpoint that holds a tokenizer \(FileNotFoundError\)"),
    "text.pt": (lambda path: path.write_text("x"), "text.pt is not a checkpoint that holds a tokenizer"),
    "weights.pt": (lambda path: torch.save({"w": torch.ones(1)}, path), "weights.pt is not a checkpoint .*KeyError"),
    "other.pt": (lambda path: torch.save({"tokenizer": "words"}, path), "in .*other.pt is not a tokenizer.json"),
}


@pytest.mark.parametrize("name", NO_TOKENIZER)
def test_a_file_without_a_tokenizer_is_named(name, tmp_path):
    make, line = NO_TOKENIZER[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=line):
        load_tokenizer(str(tmp_path / name))


def with_special(*tokens):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


@pytest.mark.parametrize("tokens, ids", [
    (["<|bos|>", "<|eos|>"], (1, 2)),
    (["<|endoftext|>"], (1, 1)),
    (["<|endoftext|>", "<|eos|>", "<|bos|>"], (3, 2)),
    (["<|bos|>", "<|endoftext|>"], (2, 2)),
])
def test_a_document_is_framed_with_bos_and_eos_or_else_with_endoftext_twice(tokens, ids):
    assert bos_eos(loaded(with_special(*tokens))) == ids


@pytest.mark.parametrize("tokens", [[], ["<|bos|>"], ["<|eos|>", "<|user|>"]])
def test_a_tokenizer_that_cannot_frame_documents_is_refused(tokens, tmp_path):
    with_special(*tokens).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t.json has neither <\|bos\|> and <\|eos\|> nor <\|endoftext\|>"):
        load_tokenizer(str(tmp_path / "t.json"))


# ---------------------------------------------------------------------------------------------------- bpe and hybrid

def test_bpe_learns_from_a_document_without_spaces_in_seconds():
    def seconds(n):  # one word; 35 s for 150,000 where time grows with the square of its length
        started = time.process_time()
        train_bpe(["ab" * n, "some text"], 300)
        return time.process_time() - started

    assert seconds(150_000) < 8 or seconds(150_000) < 3 * seconds(75_000)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_vocabulary_has_special_tokens_then_bytes_and_the_size_asked_for(kind, tokenizers):
    vocab = tokenizers[kind][0].get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    assert sorted(vocab.values()) == list(range(KINDS[kind]))
    assert tokens[:7] == SPECIAL and tokens[7:7 + 256] == ALPHABET


def test_hybrid_spells_every_word_that_is_not_in_its_vocabulary(tokenizers):
    tokenizer, _ = tokenizers["hybrid"]
    assert tokenizer.token_to_id("Ġself") and len(library_ids(tokenizer, " self")) == 1
    assert not tokenizer.token_to_id("Ġselfesteem")
    assert len(library_ids(tokenizer, " selfesteem")) == len(" selfesteem")


# ---------------------------------------------------------------------------------------------------- chunk

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
    return [token for chunk in greedy(text) for token in ([chunk] if chunk in vocab else chunk)]


def cut(tokenizer, text):
    return [chunk for chunk, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.fixture(scope="session")
def few():
    """A chunk tokenizer of 300 tokens: it knows 75 characters at most."""
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
    assert ids == library_ids(tokenizer, text) == [vocab.get(token, vocab["<|unk|>"]) for token in tokens]
    assert tokenizer.decode(ids) == "".join(token for token in tokens if token in vocab)
    assert {i for i in ids if i < len(SPECIAL)} <= {vocab["<|unk|>"]} == {unknown_id(tokenizer)}
    assert counts[ids].sum() + size(token for token in tokens if token not in vocab) == size([lower])


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
    text = "Ġab Ċ Ã© <0x0A> \\n ▁x ##y '' \"\" \x00\t\r\n  Łódź 中文 \U0001f600"
    tokenizer = loaded(train_chunk([text], 300))
    counts, vocab = token_byte_counts(tokenizer), tokenizer.get_vocab()
    assert any(t[0] == " " for t in vocab) and any(t[-1] == " " for t in vocab) and len(counts) == len(vocab)
    for token, i in vocab.items():
        expected = (0, "") if token in SPECIAL else (len(token.encode()), token)
        assert (counts[i], tokenizer.decode([i])) == expected


def test_chunk_vocabulary_is_special_tokens_the_commonest_characters_and_the_commonest_chunks():
    rng = random.Random(0)
    texts = [document(i) + "".join(chr(int(0x4e00 + rng.expovariate(0.01))) for _ in range(20)) for i in range(400)]
    lower = [normalizers.Lowercase().normalize_str(text) for text in texts]
    characters = collections.Counter("".join(lower))
    chunks = collections.Counter(chunk for text in lower for chunk in greedy(text) if len(chunk) > 1)
    assert len(characters) > 150

    def rank(counts):
        return sorted(counts, key=lambda k: (-counts[k], k))
    for n in (400, 700):
        tokenizer = train_chunk(texts, n)
        vocab = tokenizer.get_vocab()
        assert sorted(vocab, key=vocab.get) == [*SPECIAL, *rank(characters)[:n // 4], *rank(chunks)][:n]
        assert tokenizer.to_str() == train_chunk(texts, n).to_str()
    everything = train_chunk(texts, 35_560).get_vocab()  # more than there is
    assert everything.keys() == {*SPECIAL, *characters, *chunks}
    assert sorted(everything.values()) == list(range(len(everything)))


def test_chunk_counts_in_bounded_memory_and_still_finds_what_is_frequent(monkeypatch):
    monkeypatch.setattr("corpus.tokenizer.COUNTED_CHUNKS", 2000)
    rng = random.Random(0)
    texts = []
    for _ in range(100):
        texts += [" some words again", "".join(chr(rng.randrange(0x4e00, 0x9fff)) for _ in range(3000))]
    tracemalloc.start()
    vocab = train_chunk(texts, 400).get_vocab()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {*greedy(" some words again")} <= vocab.keys() and len(vocab) == 400
    assert peak < 8e6  # counting all 150,000 different chunks would take 30 MB


# ---------------------------------------------------------------------------------------------------- gpt2

@pytest.fixture(scope="session")
def gpt2():
    """(tiktoken's encoding, our tokenizer, its fast encoder), with few merges in place of GPT-2's."""
    encoding = small_gpt2()
    tokenizer = loaded(from_tiktoken(encoding))
    return encoding, tokenizer, fast_encoder(tokenizer)


@properties
@given(text=TEXT)
@example(text="<|endoftext|>")
@example(text="a<|endoftext|>b <|endoftext|>")
def test_gpt2_gives_tiktokens_ids_for_any_text_and_text_never_makes_its_special_token(text, gpt2):
    encoding, tokenizer, fast = gpt2
    ids = encoding.encode(text, disallowed_special=())
    assert library_ids(tokenizer, text) == fast([text])[0].tolist() == ids
    assert tokenizer.decode(ids) == text and encoding.eot_token not in ids


@properties
@given(words=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=12), n=st.integers(1, 60),
       text=st.text("abc ", max_size=30))
def test_merges_found_from_the_ranks_of_any_bpe_give_the_same_ids(words, n, text):
    encoding = small_gpt2([" ".join(words)], 263 + n)
    tokenizer = from_tiktoken(encoding)
    assert library_ids(tokenizer, text) == encoding.encode(text, disallowed_special=())
    assert all(library_ids(tokenizer, encoding.decode([i])) == [i] for i in range(256, encoding.eot_token))


def test_gpt2_spells_any_text_and_counts_its_bytes(gpt2, encodings):
    encoding, tokenizer, _ = gpt2
    assert vocabulary_size(tokenizer) == encoding.n_vocab and unknown_id(tokenizer) is None
    own = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)]
    assert token_byte_counts(tokenizer).tolist() == [*own, 0]
    assert bos_eos(tokenizer) == (encoding.eot_token, encoding.eot_token)
    fast_encoder(tokenizer)
    assert encodings  # the quick way is taken


def test_gpt2_is_made_once_and_needs_no_network_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoding, asked = small_gpt2(), []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or encoding)
    first, again = gpt2_tokenizer(), gpt2_tokenizer()
    assert asked == ["gpt2"] and first.to_str() == again.to_str() == from_tiktoken(encoding).to_str()
    assert first.encode_special_tokens and READY["gpt2"] is gpt2_tokenizer
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["gpt2-tokenizer.json"]


def test_gpt2_needs_no_place_to_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_gpt2())
    for home in (tmp_path / "file", None):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
        if home:
            monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        else:
            def nobody():
                raise RuntimeError("Could not determine home directory.")
            monkeypatch.setattr(Path, "home", nobody)
        assert library_ids(gpt2_tokenizer(), "a text") == small_gpt2().encode("a text")


def test_without_a_network_one_line_says_which_files_tiktoken_looks_for(tmp_path, monkeypatch):
    asked = []

    def no_network(url):
        asked.append(url)
        raise ConnectionError
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    with pytest.raises(UserError, match=r"cannot download GPT-2's merges \(ConnectionError\).*TIKTOKEN_CACHE_DIR") as e:
        gpt2_tokenizer()
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())

    # the addresses are tiktoken's, and the names are those that it gives to what it downloads from there
    line = re.search(r"download (\S+) and (\S+) elsewhere, name them (\w+) and (\w+),", str(e.value))
    assert asked == [line[1]]  # the first of the two
    monkeypatch.setattr("tiktoken.load.read_file", str.encode)
    for url, name in ((line[1], line[3]), (line[2], line[4])):
        tiktoken.load.read_file_cached(url)
        assert (tmp_path / "tiktoken" / name).read_text() == url


def real_gpt2():
    """Whether tiktoken's cache holds GPT-2's real merges."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    urls = (f"{GPT2_FILES}/{name}" for name in ("vocab.bpe", "encoder.json"))
    return all(Path(folder, hashlib.sha1(url.encode()).hexdigest()).exists() for url in urls)


@pytest.mark.skipif(not real_gpt2(), reason="tiktoken has not downloaded GPT-2's merges on this machine")
def test_the_real_gpt2_has_all_of_tiktokens_ids(tmp_path, monkeypatch, encodings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer, encoding = gpt2_tokenizer(), tiktoken.get_encoding("gpt2")
    assert vocabulary_size(tokenizer) == DEFAULT_VOCAB["gpt2"] == 50_257 and bos_eos(tokenizer) == (50_256, 50_256)
    character = {byte: char for char, byte in byte_of_character().items()}
    for i in range(50_256):
        token = "".join(character[byte] for byte in encoding.decode_single_token_bytes(i))
        assert tokenizer.token_to_id(token) == i
    fast = fast_encoder(tokenizer)
    texts = [path.read_text() for path in sorted(ROOT.glob("**/*.py"))]
    assert [ids.tolist() for ids in fast(texts)] == [encoding.encode(text, disallowed_special=()) for text in texts]
    assert [library_ids(tokenizer, text) for text in texts[:5]] == [ids.tolist() for ids in fast(texts[:5])]
    assert len(encodings) > 0
