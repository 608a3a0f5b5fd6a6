"""Tokenizers from elsewhere: nothing is lost without being counted, and no text becomes a special token."""
import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import prepare
import sample
from common import UserError
from corpus.counts import TokenCounts, adds_up, leaves_out
from corpus.loader import bytes_per_token, open_sources
from corpus.tokenizer import (
    byte_of_character, fast_encoder, from_tiktoken, load_tokenizer, token_byte_counts, unknown_id, vocabulary_size,
)
from corpus_helpers import SPECIAL, TEXT, document, run, size, small_gpt2, split_ids, write_jsonl, write_rows

properties = settings(deadline=None, max_examples=40)
PLAIN = "a plain sentence, with letters: quick brown foxes (and lazy dogs) jump."
TEXTS = [document(i) for i in range(300)] + [PLAIN] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
EVERY_BYTE = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), limit_alphabet=256)
SPACE = "\u2581"  # how SentencePiece writes a space


def framed(tokenizer):
    """With our special tokens, as `transformers` adds tokens to a vocabulary."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def sentencepiece(byte_fallback):
    """Unigram as SentencePiece trains it, with the special tokens among its pieces."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<|unk|>", show_progress=False)
    trained.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    if byte_fallback:
        pieces += [(byte, -20.0) for byte in BYTES]
    tokenizer = Tokenizer(models.Unigram(pieces, SPECIAL.index("<|unk|>"), byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    if byte_fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), tokenizer.decoder])
    return framed(tokenizer)


def llama():
    """BPE with byte fallback, whose normalizer writes the spaces."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL, *BYTES], limit_alphabet=60, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, fuse_unk=True, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return framed(tokenizer)


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False))
    return tokenizer


def words():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    return tokenizer


def bpe(decoder, pre_tokenizer, trainer=None, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    trainer = dict(vocab_size=500, special_tokens=SPECIAL, limit_alphabet=50, show_progress=False) | (trainer or {})
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(**trainer))
    return tokenizer


def llama3():
    """Byte-level, cut by another regular expression, and whole words looked up first."""
    cut = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s?\p{L}+|\s+"), "isolated")
    words = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return bpe(decoders.ByteLevel(), words, EVERY_BYTE, ignore_merges=True)


def roberta():
    return bpe(decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=True), EVERY_BYTE)


MAKE = {
    "SentencePiece": lambda: sentencepiece(byte_fallback=False),
    "SentencePiece, bytes": lambda: sentencepiece(byte_fallback=True),
    "Llama": llama,
    "Llama 3": llama3,
    "RoBERTa": roberta,
    "WordPiece": wordpiece,
    "words": words,
    "BPE without an unknown token": lambda: bpe(
        decoders.Metaspace(prepend_scheme="never"), pre_tokenizers.Metaspace(prepend_scheme="never")),
    "BPE with an end of word": lambda: bpe(
        decoders.BPEDecoder(), pre_tokenizers.WhitespaceSplit(), dict(end_of_word_suffix="</w>"),
        end_of_word_suffix="</w>", unk_token="<|unk|>"),
    "BPE with a prefix": lambda: bpe(
        decoders.WordPiece(), pre_tokenizers.WhitespaceSplit(), dict(continuing_subword_prefix="##"),
        continuing_subword_prefix="##"),
}
SPELLS_ANYTHING = ("SentencePiece, bytes", "Llama", "Llama 3", "RoBERTa")
ANY = TEXT | st.lists(st.sampled_from([*SPECIAL, *TEXTS[:9], " ", "é", "中", "<0x41>", "</w>", "##a", SPACE]),
                      max_size=8).map("".join)


@pytest.fixture(scope="session", params=MAKE)
def foreign(request, tmp_path_factory):
    """(name, path of its file, the tokenizer as it is loaded, its encoder, its TokenCounts)."""
    path = tmp_path_factory.mktemp("foreign") / "tok.json"
    MAKE[request.param]().save(str(path))
    tokenizer = load_tokenizer(path)
    return request.param, path, tokenizer, fast_encoder(tokenizer), TokenCounts(tokenizer)


# ---------------------------------------------------------------------------------------------------- dropped text

def without_vowels():
    tokenizer = roberta()
    tokenizer.normalizer = normalizers.Replace(Regex("[aeiou]"), "")
    return tokenizer


def without_digits():
    cut = pre_tokenizers.Split(Regex(r"\d+"), "removed")
    words = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return bpe(decoders.ByteLevel(), words, EVERY_BYTE)


@pytest.mark.parametrize("make, text, n, n_bytes", [
    (without_vowels, "the house", 3, 4), (without_vowels, "shh", 0, 0), (without_vowels, "aeiou", 1, 5),
    (without_digits, "12 houses, 345", 2, 5), (without_digits, "none", 0, 0), (wordpiece, "\0 house", 1, 1),
])
def test_text_that_a_tokenizer_drops_is_counted_as_unknown(make, text, n, n_bytes):
    tokenizer = load_tokenizer(make().to_str())
    counts, n_text = TokenCounts(tokenizer), len(text.encode())
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
    found = counts.of([text], n_text, ids)
    assert counts.knows_unknown and not counts.adds_up
    assert (found["unknown"], found["unknown_bytes"], found["bytes"]) == (n, n_bytes, n_text)


# ---------------------------------------------------------------------------------------------------- text

@properties
@given(text=ANY)
@example(text="<|eos|>")
@example(text="a <|eos|> b<|user|>c <|bos|>")
def test_text_never_becomes_a_special_token(text, foreign):
    _, _, tokenizer, encode, _ = foreign
    special = {tokenizer.token_to_id(token) for token in SPECIAL} - {unknown_id(tokenizer)}
    assert not special.intersection(encode([text])[0].tolist())
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [  # which keep their ids
        json.loads(foreign[1].read_text())["added_tokens"][i]["id"] for i in range(len(SPECIAL))]


def bare(text):
    """Without what the tokenizers between them change: white space, and how a character is written."""
    return re.sub(r"\s|" + SPACE, "", normalizers.BertNormalizer(lowercase=True).normalize_str(text))


@properties
@given(text=st.lists(st.sampled_from([*" .,abéñ中", "the ", "house ", "1 ", "\U0001f600 "]), max_size=20).map("".join))
@example(text="house house")
def test_what_is_not_counted_as_unknown_comes_back(text, foreign):
    name, _, tokenizer, encode, counts = foreign
    ids = encode([text])[0]
    counted = counts.of([text], size([text]), ids)
    decoded = tokenizer.decode(ids.tolist())
    assert counted["unknown"] > 0 or bare(decoded) == bare(text)
    if name in SPELLS_ANYTHING:
        assert counted["unknown"] == 0 and decoded.strip() == text.strip()


@properties
@given(text=st.text("the hous\xe9\u4e2d\U0001f600", max_size=30))
def test_unknown_text_is_counted_in_characters_and_bytes(text):
    tokenizer = load_tokenizer(MAKE["BPE without an unknown token"]().to_str())
    known = {char for token in tokenizer.get_vocab() if token not in SPECIAL for char in token.replace(SPACE, " ")}
    lost = [char for char in text if char not in known]
    counted = TokenCounts(tokenizer).of([text], size([text]), fast_encoder(tokenizer)([text])[0])
    assert (counted["unknown"], counted["unknown_bytes"]) == (len(lost), size(lost))


def test_words_outside_a_vocabulary_of_words_are_counted_whole():
    tokenizer = load_tokenizer(words().to_str())
    text = "house caffè gardens 12"
    unknown = [word for word in text.split() if word not in tokenizer.get_vocab()]
    assert len(unknown) == 1
    counted = TokenCounts(tokenizer).of([text], size([text]), fast_encoder(tokenizer)([text])[0])
    assert counted["bytes"] == size([text]) and counted["unknown"] == 1 and counted["unknown_bytes"] == size(unknown)


def test_what_frames_a_document_is_no_unknown_text(tmp_path):
    end = "<|endoftext|>"
    bpe(decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False), dict(EVERY_BYTE, special_tokens=[end]),
        unk_token=end).save(str(tmp_path / "tok.json"))
    path = write_jsonl(tmp_path / "x.jsonl", map(document, range(30)))
    _, meta = run(path, tmp_path, tokenizer=str(tmp_path / "tok.json"))
    assert [meta["sources"][0][split]["unknown"] for split in ("train", "val")] == [0, 0]


def test_prepare_says_how_much_of_a_text_is_left_out(tmp_path, capsys):
    MAKE["BPE without an unknown token"]().save(str(tmp_path / "tok.json"))
    texts = [f"plain {document(i)} 中国" for i in range(60)]
    _, meta = run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path, tokenizer=str(tmp_path / "tok.json"))
    source = meta["sources"][0]
    assert source["train"]["unknown"] >= 2 * source["train"]["documents"]
    share = float(re.search(r"([\d.]+)% unknown", capsys.readouterr().out)[1])
    assert 1 < share < 50


# ---------------------------------------------------------------------------------------------------- bytes

def test_bytes_behind_all_tokens_are_those_of_the_known_text(foreign, tmp_path):
    name, path, tokenizer, _, _ = foreign
    texts = [f"{document(i)} and {document(i + 1000)}" for i in range(120)] + ["x", "house", "  two  spaces\n\n"]
    folder, meta = run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path, tokenizer=str(path), val_fraction=0.2)
    assert (folder / "tokenizer.json").read_text() == Tokenizer.from_file(str(path)).to_str(pretty=True)
    entries = [meta["sources"][0][split] for split in ("train", "val")]
    assert sum(entry["bytes"] for entry in entries) == size(texts)

    per_token = bytes_per_token(tokenizer, open_sources([(folder, meta, 1.0)])).numpy()
    ids = np.concatenate([np.fromfile(folder / entry["file"], "<u2") for entry in entries])
    known = sum(entry["bytes"] - entry.get("unknown_bytes", 0) for entry in entries)
    assert per_token[ids].sum() == pytest.approx(known)
    assert len(per_token) == vocabulary_size(tokenizer) and per_token[tokenizer.token_to_id("<|bos|>")] == 0
    if adds_up(tokenizer):
        assert (per_token == token_byte_counts(tokenizer)).all() and "token_bytes" not in entries[0]
    else:  # and they are near what each token stands for
        assert 0.7 < per_token.sum() / token_byte_counts(tokenizer).sum() < 1.4
    assert (name in SPELLS_ANYTHING) <= (sum(entry["unknown"] for entry in entries) == 0)


@pytest.mark.parametrize("name, token, n", [
    ("SentencePiece", SPACE, 1), ("SentencePiece, bytes", "<0xC3>", 1), ("Llama", SPACE, 1),
    ("Llama", "<0x0A>", 1), ("WordPiece", "##e", 1), ("WordPiece", "house", 5), ("RoBERTa", "Ġhouse", 6),
    ("BPE with an end of word", "e</w>", 2),
    ("words", "house", 5), ("BPE without an unknown token", "<|unk|>", 0)])
def test_a_token_stands_for_the_text_that_it_writes(name, token, n):
    tokenizer = MAKE[name]()
    assert token_byte_counts(tokenizer)[tokenizer.token_to_id(token)] == n


def test_which_tokenizers_keep_all_of_a_text_and_which_leave_something_out():
    made = {name: make() for name, make in MAKE.items()}
    assert {name for name in made if adds_up(made[name])} == {"Llama 3"}
    assert {name for name in made if leaves_out(made[name])} == {"BPE without an unknown token", "BPE with a prefix"}
    ours = Tokenizer.from_str(prepare.TRAINERS["chunk"](TEXTS, 300).to_str())
    assert adds_up(ours) and not leaves_out(ours)


# ---------------------------------------------------------------------------------------------------- streams

IDS = st.lists(st.integers(0, 10 ** 6), max_size=200)


def streamed(tokenizer, ids, before=()):
    """The text that is shown while the tokens come one by one."""
    text = sample.Text(tokenizer, eos=2, before=before)
    shown = "".join(map(text.add, ids)) + text.finish()
    assert shown == text.text
    return shown


@properties
@given(numbers=IDS)
def test_streamed_text_is_what_decoding_all_tokens_at_once_gives(numbers, foreign):
    """Whatever tokens a model makes: spaces, halves of characters, bytes that fit nowhere."""
    tokenizer = foreign[2]
    ids = [n % vocabulary_size(tokenizer) for n in numbers]
    ids = [i for i in ids if i != 2]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


CHARACTERS = ["a", " ", "é", "你", "\U0001f600", "\U0001f468\u200d\U0001f469", "\ufffd"]


@properties
@given(data=st.lists(st.sampled_from(CHARACTERS).map(str.encode)
                     | st.sampled_from([b"\x80", b"\xc3", b"\xe2", b"\xf0", b"\xff"]), max_size=40).map(b"".join))
@example(data=b"\xf0\x9f\x98" + "\U0001f600".encode())
def test_bytes_that_fit_nowhere_are_streamed_as_they_are_decoded(data):
    tokenizer = load_tokenizer(prepare.TRAINERS["hybrid"](["a small text"], 263).to_str())
    of_byte = {byte: tokenizer.token_to_id(char) for char, byte in byte_of_character().items()}
    ids = [of_byte[byte] for byte in data]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == data.decode(errors="replace")


@properties
@given(prompt=st.sampled_from(["house", "house sea", "the ", ""]),
       words=st.lists(st.sampled_from(["sea", "house", "12"])))
def test_what_follows_a_prompt_keeps_the_space_between_them(prompt, words, foreign):
    _, _, tokenizer, encode, _ = foreign
    before, ids = encode([prompt])[0].tolist(), encode([" ".join([prompt.strip(), *words])])[0].tolist()
    if ids[:len(before)] == before:
        assert tokenizer.decode(before) + streamed(tokenizer, ids[len(before):], before) == tokenizer.decode(ids)


def test_a_long_stream_decodes_only_its_last_tokens(foreign):
    tokenizer, decoded = foreign[2], []
    ids = fast_encoder(tokenizer)([" ".join(map(document, range(60)))])[0].tolist()

    class Counted:
        id_to_token, get_added_tokens_decoder = tokenizer.id_to_token, tokenizer.get_added_tokens_decoder

        def decode(self, ids):
            decoded.append(len(ids))
            return tokenizer.decode(ids)
    assert streamed(Counted(), ids) == tokenizer.decode(ids) and len(ids) > 1000 > 100 > max(decoded)


# ---------------------------------------------------------------------------------------------------- loading

def test_special_tokens_that_only_the_vocabulary_holds_are_special_all_the_same(tmp_path):
    vocab = {token: i for i, token in enumerate([*SPECIAL, "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(["<|user|>"])  # added, and not said to be special
    loaded = load_tokenizer(tokenizer.to_str())
    assert loaded.encode("a <|eos|> <|user|> b", add_special_tokens=False).tokens == ["a", "<|unk|>", "<|unk|>", "b"]
    assert loaded.decode([1, 7, 2, 4]) == "a" and loaded.token_to_id("<|eos|>") == 2


def test_merges_that_make_a_special_token_are_not_applied():
    merges = [("<", "e"), ("<e", ">")]
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<", "e", ">", "<e", "<e>"])}
    tokenizer = framed(Tokenizer(models.BPE(vocab, merges)))
    tokenizer.add_special_tokens(["<e>"])
    loaded = load_tokenizer(tokenizer.to_str())
    assert loaded.encode("<e>", add_special_tokens=False).tokens == ["<e", ">"]
    assert loaded.token_to_id("<e>") == vocab["<e>"] and loaded.id_to_token(vocab["<e>"]) == "<e>"


UNUSABLE = {
    "words": (lambda: framed(Tokenizer(models.WordLevel({"a": 0}, unk_token="<u>"))), "lacks the token '<u>'"),
    "word pieces": (lambda: framed(Tokenizer(models.WordPiece({"a": 0}, unk_token="<u>"))), "lacks the token '<u>'"),
    "merges": (lambda: framed(Tokenizer(models.BPE({"a": 0}, [], unk_token="<u>"))), "lacks the token '<u>'"),
    "unigram": (lambda: framed(Tokenizer(models.Unigram([("a", -1.0)]))), "names no token for text outside"),
    "ids": (lambda: framed(Tokenizer(models.WordLevel({"<unk>": 0, "a": 777}, unk_token="<unk>"))),
            "has ids above 16,777,2"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_tokenizer_that_would_fail_later_is_refused_in_one_line(what, tmp_path):
    make, line = UNUSABLE[what]
    text = make().to_str().replace("777", str(2 ** 31))
    (tmp_path / "tok.json").write_text(text)
    path = write_jsonl(tmp_path / "x.jsonl", [document(i) for i in range(9)])
    with pytest.raises(UserError, match=f"tok.json {line}"):
        run(path, tmp_path / "data", tokenizer=str(tmp_path / "tok.json"))
    assert not (tmp_path / "data").exists()


def test_chats_are_framed_with_a_tokenizer_from_elsewhere(tmp_path):
    sentencepiece(byte_fallback=False).save(str(tmp_path / "tok.json"))
    rows = [{"prompt": f"house {i} <|eos|>", "completion": "<|user|> sea"} for i in range(30)]
    folder, _ = run(write_rows(tmp_path / "x.jsonl", rows), tmp_path, tokenizer=str(tmp_path / "tok.json"))
    ids = np.fromfile(folder / "train.0-x.bin", "<u2")
    begins = np.flatnonzero(ids == 1)
    for chat in np.split(ids, begins[1:]):
        special = [SPECIAL[i] for i in chat if i < len(SPECIAL) and SPECIAL[i] != "<|unk|>"]
        assert special == ["<|bos|>", "<|user|>", "<|assistant|>", "<|eos|>"]


def test_our_own_tokenizers_are_loaded_as_they_are(tmp_path):
    for kind, train in prepare.TRAINERS.items():
        trained = train(TEXTS, 400)
        assert load_tokenizer(trained.to_str()).to_str() == trained.to_str()
    gpt2 = from_tiktoken(small_gpt2()).to_str()
    assert load_tokenizer(gpt2).to_str() == gpt2


def test_a_prepared_folder_in_a_tokenizer_from_elsewhere_reads_back(foreign, tmp_path):
    name, path, _, _, _ = foreign
    texts = [f"house {'ae'[i % 2]} {'ou'[i // 2 % 2]} sea" for i in range(4)]
    folder, meta = run(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path, tokenizer=str(path), val_fraction=0.0)
    tokenizer, _, documents = split_ids(folder, "train")
    found = [tokenizer.decode(ids[1:-1].tolist()).split() for ids in documents]
    assert (meta["sources"][0]["train"]["unknown"] > 0) == (name in ("words", "BPE with an end of word"))
    if meta["sources"][0]["train"]["unknown"] == 0:
        assert sorted(map("".join, found)) == sorted(text.replace(" ", "") for text in texts)
