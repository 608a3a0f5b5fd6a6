"""Chats in prepare.py: what is learned from is the replies and nothing else, and pydocs-chat keeps the split of pydocs."""
import ast
import collections
import gzip
import hashlib
import itertools
import json
import random
import re
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer, models

import prepare
from conftest import ROOT, command, run_train
from common import UserError
from corpus.chats import NoChat
from prepare import Settings
from corpus.chats import chat_ids, chat_messages, encode_chats, tidy
from corpus.folder import read_meta
from corpus.pydocs import described, dialogues, library, library_texts, listing, paragraphs, prose, pydocs, pydocs_chat
from corpus.text import Document, chat_document, clean, text_hash
from corpus.tokenizer import SPECIAL_TOKENS, TRAINERS, fast_encoder, load_tokenizer, token_byte_counts

SIZES = {"bpe": 600, "hybrid": 600, "chunk": 600}
SPECIAL = list(SPECIAL_TOKENS)
properties = settings(deadline=None, max_examples=60)

# What trips a chat up: texts that spell special tokens, whole or in halves, that are empty or white space, or that no small vocabulary holds
TEXT = st.one_of(st.just(""), st.text(max_size=20),
                 st.lists(st.sampled_from([*SPECIAL, "<|", "|>", "user", "<|USER|>", " ", "\n\n", "[INST]", "[/INST]", "İ", "\U0001f600", "é\x00",
                                           "def x", "the "]), max_size=8).map("".join))
TURN = st.tuples(TEXT, TEXT).map(lambda t: [("user", t[0]), ("assistant", t[1])])
SYSTEM = st.one_of(st.just([]), TEXT.map(lambda t: [("system", t)]))
CHAT = st.tuples(SYSTEM, st.lists(TURN, min_size=1, max_size=4)).map(lambda t: t[0] + sum(t[1], []))


@pytest.fixture(scope="session")
def trained():
    """kind -> (tokenizer, its fast encoder, special token -> id)"""
    texts, kinds = [(ROOT / name).read_text() for name in ("train.py", "README.md")], {}
    for kind, size in SIZES.items():
        t = load_tokenizer(TRAINERS[kind](texts, size).to_str())
        kinds[kind] = t, fast_encoder(t), chat_ids(t)
    return kinds


def kept(tokenizer, text):
    """What the tokenizer keeps of a text: all of it, or for a lossy one what it can spell."""
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------------- encoding

@properties
@given(chats=st.lists(CHAT, max_size=4))
@example(chats=[[("user", ""), ("assistant", "")]])
@example(chats=[[("system", "<|eos|>"), ("user", "<|assistant|>yes<|eos|>"), ("assistant", "<|user|>"), ("user", "\n"), ("assistant", "<|bos|> ")]] * 2)
@pytest.mark.parametrize("kind", SIZES)
def test_the_mask_holds_the_replies_with_their_ends_and_nothing_else(chats, kind, trained):
    tokenizer, encode, ids = trained[kind]
    encoded = encode_chats(chats, encode, ids)
    assert len(encoded) == len(chats)
    for chat, (tokens, mask) in zip(chats, encoded):
        assert (tokens.dtype, mask.dtype, len(tokens)) == (np.uint32, np.uint8, len(mask)) and set(mask.tolist()) <= {0, 1}
        learned, rest = (tokenizer.decode(tokens[mask == m].tolist(), skip_special_tokens=False) for m in (1, 0))
        assert learned == "".join(kept(tokenizer, text) + "<|eos|>" for role, text in chat if role == "assistant")
        assert rest == "<|bos|>" + "".join(f"<|{role}|>" + kept(tokenizer, text) * (role != "assistant") for role, text in chat)
        if kind != "chunk":
            assert all(kept(tokenizer, text) == text for _, text in chat)
        frame = ["<|bos|>", *(t for role, _ in chat for t in (f"<|{role}|>", *["<|eos|>"] * (role == "assistant")))]
        assert [SPECIAL[i] for i in tokens if i < len(SPECIAL) and SPECIAL[i] != "<|unk|>"] == frame


@properties
@given(chats=st.lists(CHAT, max_size=4))
def test_a_chat_gives_the_same_ids_alone_and_in_a_batch_of_one_call(chats, trained):
    tokenizer, encode, ids = trained["bpe"]
    calls = []
    together = encode_chats(chats, lambda texts: (calls.append(1), encode(texts))[1], ids)
    assert len(calls) == bool(chats)
    for chat, arrays in zip(chats, together):
        expected, mask = [ids["<|bos|>"]], [0]
        for role, text in chat:
            body, end, m = tokenizer.encode(text, add_special_tokens=False).ids, [ids["<|eos|>"]] * (role == "assistant"), int(role == "assistant")
            expected, mask = [*expected, ids[f"<|{role}|>"], *body, *end], [*mask, 0, *[m] * len(body + end)]
        alone, = encode_chats([chat], encode, ids)
        assert [a.tolist() for a in arrays] == [a.tolist() for a in alone] == [expected, mask]


def test_a_tokenizer_without_the_roles_is_refused():
    tokenizer = Tokenizer(models.BPE({"<|bos|>": 0, "<|eos|>": 1, "<|user|>": 2}, []))
    with pytest.raises(UserError, match=r"no <\|system\|> and no <\|assistant\|>, .*take bpe, hybrid or chunk"):
        chat_ids(tokenizer)


# ---------------------------------------------------------------------------------------------------- reading

@properties
@given(messages=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=8))
def test_any_list_of_messages_is_a_well_formed_chat_or_none(messages):
    try:
        chat = tidy(messages)
    except NoChat:
        return
    assert re.fullmatch("s?(ua)+", "".join(role[0] for role, _ in chat))
    assert tidy(chat) == chat
    for wanted in ("system", "assistant"):  # only questions at the end go
        assert "".join(t for r, t in chat if r == wanted).replace("\n", "") == "".join(t for r, t in messages if r == wanted).replace("\n", "")


@properties
@given(messages=st.lists(st.one_of(st.none(), st.dictionaries(st.sampled_from(["role", "content"]),
                                                              st.one_of(TEXT, st.integers(), st.sampled_from(["user", "assistant"]))))),
       row=st.one_of(st.none(), st.integers(), TEXT, st.lists(TEXT),
                     st.dictionaries(st.sampled_from(["instruction", "input", "output", "context", "response"]), TEXT)))
def test_no_row_makes_a_reader_fail_otherwise(messages, row):
    for r in ({"messages": messages}, row):
        found, = clean([r], chat=True)
        assert isinstance(found, (Document, str))


def said(*messages):
    return {"messages": [dict(zip(("role", "content"), m)) for m in messages]}


U, A, S = "user", "assistant", "system"
ROWS = {
    "one turn": (said((U, "hi"), (A, "Hello!")), [(U, "hi"), (A, "Hello!")]),
    "system and two turns": (said((S, "Be kind."), (U, "a\n"), (A, " b"), (U, "c"), (A, "d")), [(S, "Be kind."), (U, "a\n"), (A, " b"), (U, "c"), (A, "d")]),
    "more columns": (said((U, "a"), (A, "b")) | {"source": "smol-magpie", "output": "x"}, [(U, "a"), (A, "b")]),
    "empty texts": (said((U, ""), (A, ""), (U, "a"), (A, "")), [(U, ""), (A, ""), (U, "a"), (A, "")]),
    "neighbours": (said((S, "a"), (S, "b"), (U, "c"), (U, ""), (U, "d"), (A, ""), (A, "e")), [(S, "a\n\nb"), (U, "c\n\nd"), (A, "e")]),
    "question left open": (said((U, "a"), (A, "b"), (U, "c"), (U, "d")), [(U, "a"), (A, "b")]),
    "surrogates": (said((U, "\ud83d\ude00"), (A, "\ud800x")), [(U, "\U0001f600"), (A, "\ufffdx")]),
    "alpaca": ({"instruction": "Add these.", "input": "1, 2", "output": "3", "text": "Below is ..."}, [(U, "Add these.\n\n1, 2"), (A, "3")]),
    "alpaca without input": ({"instruction": "Say hi.", "input": "", "output": "hi"}, [(U, "Say hi."), (A, "hi")]),
    "dolly": ({"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"}, [(U, "Who?\n\nAda wrote it."), (A, "Ada")]),
    "dolly without context": ({"instruction": "Who?", "context": None, "response": "Ada"}, [(U, "Who?"), (A, "Ada")]),
    "tinychat": ("[INST] Do you like tea? [/INST] Yes, I do. [INST] Why? [/INST] It is warm.\n",
                 [(U, "Do you like tea?"), (A, "Yes, I do."), (U, "Why?"), (A, "It is warm.")]),
    "tinychat cut off": ("  [INST]a[/INST]b[INST] c", [(U, "a"), (A, "b")]),
}
NO_CHATS = {
    "other role": (said(("human", "a"), ("gpt", "b")), "role other than system, user and assistant"),
    "tool": (said((U, "a"), (A, "b"), ("tool", "c"), (A, "d")), "role other than"),
    "no role": ({"messages": [{"content": "a"}]}, "role other than"),
    "no content": ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, "not text"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "not text"),
    "reply first": (said((A, "a"), (U, "b"), (A, "c")), "begins with a reply"),
    "reply behind the system's": (said((S, "a"), (A, "b")), "begins with a reply"),
    "late system": (said((U, "a"), (S, "b"), (A, "c")), "system message inside"),
    "no reply": (said((S, "a"), (U, "b")), "no reply"),
    "only a system message": (said((S, "a")), "no reply"),
    "nothing": (said(), "no reply"),
    "no text": (said((U, ""), (A, " \n")), "empty"),
    "not a list": ({"messages": "user: hi"}, "not a chat"),
    "not messages": ({"messages": ["hi", "hello"]}, "not a chat"),
    "text": ({"text": "a"}, "not a chat"),
    "null": (None, "not a chat"),
    "alpaca without output": ({"instruction": "a", "input": ""}, "not a chat"),
    "alpaca with a number": ({"instruction": "a", "input": 5, "output": "b"}, "not text"),
    "tinychat without marks": ("Hello there.", "not in turn"),
    "tinychat with text before": ("Hello [INST] a [/INST] b", "not in turn"),
    "tinychat with two questions": ("[INST] a [INST] b [/INST] c", "not in turn"),
    "tinychat with two replies": ("[INST] a [/INST] b [/INST] c", "not in turn"),
    "tinychat that ends early": ("[INST] a", "no reply"),
    "empty line": ("", "not in turn"),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_is_read(name):
    row, chat = ROWS[name]
    assert chat_messages(row) == chat


@pytest.mark.parametrize("name", NO_CHATS)
def test_a_row_that_is_no_chat_is_skipped_with_its_reason(name):
    row, reason = NO_CHATS[name]
    with pytest.raises(NoChat, match=reason):
        chat_messages(row)


@properties
@given(chat=CHAT)
def test_a_tinychat_line_is_read_back(chat):
    bare = [(role, re.sub(r"\[/?INST\]", "", text).strip()) for role, text in chat if role != "system"]
    if any(text for _, text in bare):
        line = " ".join(f"[INST] {text} [/INST]" if role == "user" else text for role, text in bare)
        assert chat_messages(line) == [(role, re.sub(r"\[/?INST\]", "", text)) for role, text in bare]


def test_who_says_what_belongs_to_a_chats_hash():
    chats = [[(U, "a"), (A, "b")], [(U, "b"), (A, "a")], [(U, "ab"), (A, "")], [(S, ""), (U, "a"), (A, "b")], [(U, "a"), (A, "b"), (U, ""), (A, "")]]
    documents = [chat_document(c) for c in chats]
    assert len({d.hash for d in documents}) == len(chats) and all(d.split_hash == d.hash and len(d.utf8) == 2 for d in documents)
    module = [chat_document(c, 5) for c in chats]
    assert [d.hash for d in module] == [d.hash for d in documents] and {d.split_hash for d in module} == {5}


# ---------------------------------------------------------------------------------------------------- files

def texts(i):
    """Four texts of their own for every i: a question, its reply, and two more. The layouts below make a chat of them."""
    rng = random.Random(i)
    text = [" ".join(rng.choice(["tea", "caffè", "\U0001f600", "<|eos|>", "<|user|>", "12", "you're"]) for _ in range(rng.randint(1, 12))) for _ in range(4)]
    return f"Question {i}: {text[0]}", f"Reply {i}: {text[1]}", text[2], text[3]


def dialogue(i):
    q, a, more, end = texts(i)
    return said(*[(S, "Be brief.")] * (i % 3 == 0), (U, q), (A, a), *[(U, more), (A, end)] * (i % 2))


def alpaca(i):
    q, a, more, _ = texts(i)
    return {"instruction": q, "input": more * (i % 2), "output": a, "text": f"### {q} ### {a}"}


def dolly(i):
    q, a, more, _ = texts(i)
    return {"instruction": q, "context": more * (i % 2), "response": a, "category": "open_qa"}


def tinychat(i):
    q, a, more, end = texts(i)
    return f"[INST] {q} [/INST] {a}" + f" [INST] {more} [/INST] {end}" * (i % 2)


def write(path, rows):
    """Rows into a file of the kind that its name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def run(names, out_dir, **given):
    given = {"vocab_size": 300, "val_fraction": 0.3, **given}
    folder = prepare.prepare([str(n) for n in names], Settings(out_dir=str(out_dir), **given))
    return folder, read_meta(folder)


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def masked(folder, split, source=0):
    """A chat set's files read without prepare.py's help, cut into chats: [(text of the tokens with mask 1, text of the others)]"""
    entry = json.loads((folder / "meta.json").read_text())["sources"][source][split]
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    ids, mask = np.fromfile(folder / entry["file"], "<u2"), np.fromfile(folder / entry["mask"]["file"], np.uint8)
    assert len(ids) == len(mask) == entry["tokens"] and set(mask.tolist()) <= {0, 1}
    assert hashlib.sha256(mask.tobytes()).hexdigest() == entry["mask"]["sha256"] and entry["mask"]["file_size"] == len(mask)
    starts = [*np.flatnonzero(ids == tokenizer.token_to_id("<|bos|>")).tolist(), len(ids)]
    assert starts[0] == 0 and entry["documents"] == len(starts) - 1
    return [tuple(tokenizer.decode(ids[a:b][mask[a:b] == m].tolist(), skip_special_tokens=False) for m in (1, 0)) for a, b in itertools.pairwise(starts)]


def expected(chats):
    """What masked() should find of chats, [(role, text)] each."""
    return [("".join(text + "<|eos|>" for role, text in chat if role == A),
             "<|bos|>" + "".join(f"<|{role}|>" + text * (role != A) for role, text in chat)) for chat in chats]


LAYOUTS = {"messages.jsonl": dialogue, "messages.jsonl.gz": dialogue, "messages.parquet": dialogue, "alpaca.jsonl": alpaca, "alpaca.parquet": alpaca,
           "dolly.jsonl": dolly, "tinychat.txt": tinychat}


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_on_the_disk_line_up_with_the_tokens(name, tmp_path):
    rows = [LAYOUTS[name](i) for i in range(60)]
    folder, meta = run([write(tmp_path / name, rows)], tmp_path, name="made")
    source, chats = meta["sources"][0], [chat_messages(row) for row in rows]
    sides = {split: [c for c in chats if (chat_document(c).hash < 0.3 * 2 ** 64) == (split == "val")] for split in ("train", "val")}
    for split, side in sides.items():
        assert side and masked(folder, split) == expected(side)
        assert source[split]["bytes"] == sum(len(text.encode()) for c in side for _, text in c)
    assert source["kind"] == "chat" and source["skipped"] == {"empty": 0, "not text": 0, "duplicate": 0}
    files = {f"{split}.0-{name.split('.')[0]}{end}.bin" for split in sides for end in ("", ".mask")}
    assert {p.name for p in folder.iterdir()} == {"tokenizer.json", "meta.json"} | files


@pytest.mark.parametrize("kind", SIZES)
def test_a_chats_bytes_are_what_its_tokens_stand_for(kind, tmp_path):
    rows = [dialogue(i) for i in range(60)] + [said((U, f"\u0130 {i}"), (A, "\u0130vme " * i)) for i in range(9)]
    folder, meta = run([write(tmp_path / "x.jsonl", rows)], tmp_path, tokenizer=kind, vocab_size=400)
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    for split in ("train", "val"):
        entry = meta["sources"][0][split]
        counted = token_byte_counts(tokenizer)[np.fromfile(folder / entry["file"], "<u2")].sum()
        assert counted == entry["bytes"] or entry["unknown"] and counted < entry["bytes"]
        assert kind == "chunk" or not entry["unknown"]


def test_chats_and_texts_may_be_sources_of_one_corpus_and_only_chats_have_masks(tmp_path):
    write(tmp_path / "chats/a.jsonl", [dialogue(i) for i in range(30)])
    write(tmp_path / "chats/b.txt", ["", " ", *(tinychat(i) for i in range(30, 60)), ""])
    write(tmp_path / "chats/empty.jsonl", [])
    write(tmp_path / "text.jsonl", [{"text": f"text {i}"} for i in range(40)])
    folder, meta = run([f"{tmp_path}/text.jsonl", f"{tmp_path}/chats@it/web"], tmp_path)
    text, chats = meta["sources"]
    assert "mask" not in text["train"] and "mask" not in text["val"]
    assert (chats["kind"], chats["language"], chats["train"]["documents"] + chats["val"]["documents"]) == ("web", "it", 60)
    assert sorted(masked(folder, "train", 1) + masked(folder, "val", 1)) == sorted(
        expected(chat_messages(row) for row in [*(dialogue(i) for i in range(30)), *(tinychat(i) for i in range(30, 60))]))


def test_column_takes_rows_of_chats_as_text(tmp_path):
    folder, meta = run([write(tmp_path / "x.jsonl", [alpaca(i) for i in range(20)])], tmp_path, column="text")
    assert meta["sources"][0]["kind"] == "text" and not list(folder.glob("*mask*"))
    folder, meta = run([write(tmp_path / "y.txt", [tinychat(i) for i in range(200)])], tmp_path, column="text")
    assert meta["sources"][0]["kind"] == "text" and not list(folder.glob("*mask*"))


@pytest.mark.parametrize("row", [{"text": "a", "messages": 5}, {"text": "a", "instruction": "b"}, {"text": "a", "input": "b", "output": "c"},
                                 "Say [INST] and [/INST]"])
def test_other_rows_are_texts_as_ever(row, tmp_path):
    rows = [f"{row} {i}\n" * 9 if isinstance(row, str) else row | {"text": f"a {i}"} for i in range(20)]
    _, meta = run([write(tmp_path / ("x.txt" if isinstance(row, str) else "x.jsonl"), rows)], tmp_path)
    assert meta["sources"][0]["kind"] == "text" and "mask" not in meta["sources"][0]["train"]


def test_rows_that_are_no_chats_are_counted_by_reason(tmp_path):
    bad = [row for row, _ in NO_CHATS.values() if isinstance(row, dict)]
    _, meta = run([write(tmp_path / "x.jsonl", [*(dialogue(i) for i in range(20)), *bad, dialogue(3)])], tmp_path)
    source = meta["sources"][0]
    assert source["train"]["documents"] + source["val"]["documents"] == 20
    assert sum(source["skipped"].values()) == len(bad) + 1
    assert source["skipped"] == {"empty": 1, "not text": 3, "duplicate": 1, "role other than system, user and assistant": 3, "begins with a reply": 2,
                                 "system message inside the chat": 1, "no reply": 3, "not a chat": 4}


def test_stopped_again_and_again_a_chat_set_is_made_with_the_same_bytes(tmp_path, monkeypatch, capsys):
    rows = [dialogue(i % 250) if i % 7 else {"messages": []} for i in range(300)]  # with duplicates and rows that are none
    names = [write(tmp_path / f"{n}.jsonl", rows) for n in "ab"]
    whole, _ = run(names, tmp_path / "whole", name="made")
    monkeypatch.setattr("prepare.BATCH_BYTES", 2000)
    monkeypatch.setattr("prepare.SAVE_SECONDS", -1)
    save, encoder = prepare.Record.save, fast_encoder
    for stop in itertools.count():  # in turn before a batch is encoded, and when it is on the disk but not in the record
        left = 2 + stop // 2 % 4

        def countdown(f, counts):
            def counted(*args, **kwargs):
                nonlocal left
                left -= counts
                if not left:
                    raise MemoryError
                return f(*args, **kwargs)
            return counted
        monkeypatch.setattr(prepare.Record, "save", countdown(save, stop % 2))
        monkeypatch.setattr("corpus.tokenizer.fast_encoder", lambda tokenizer: countdown(encoder(tokenizer), 1 - stop % 2))
        try:
            folder, _ = run(names, tmp_path / "stopped", name="made")
            break
        except MemoryError:
            continue
    assert stop > 5 and capsys.readouterr().out.count("going on") == stop
    assert snapshot(folder) == snapshot(whole)


@pytest.mark.parametrize("spoil, line", [(lambda p: p.write_bytes(p.read_bytes()[:-1]), "val.0-x.mask.bin has .* bytes, .* tokens of 1 byte;"),
                                         (Path.unlink, "val.0-x.mask.bin is missing")], ids=["cut", "gone"])
def test_a_spoilt_mask_is_refused(spoil, line, tmp_path):
    folder, _ = run([write(tmp_path / "x.jsonl", [dialogue(i) for i in range(20)])], tmp_path)
    spoil(folder / "val.0-x.mask.bin")
    with pytest.raises(UserError, match=line):
        read_meta(folder)


@properties
@given(lengths=st.lists(st.integers(0, 30), max_size=40))
def test_texts_come_back_in_order_however_they_are_shared_out_to_threads(lengths, trained):
    tokenizer, encode, _ = trained["bpe"]
    texts = [f"{i} " * n for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr("corpus.tokenizer.TASK", 50)
        assert [ids.tolist() for ids in encode(texts)] == [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


# ---------------------------------------------------------------------------------------------------- pydocs-chat

@pytest.fixture
def few_modules(monkeypatch):
    """A library of a few modules."""
    wanted = ("argparse", "ast", "bisect", "calendar", "datetime", "decimal", "difflib", "fractions", "heapq", "random", "statistics", "textwrap")
    files = library()
    monkeypatch.setattr("corpus.pydocs.library", lambda: {name: files[name] for name in wanted})


def test_masks_of_pydocs_chat_line_up_and_modules_keep_their_side(few_modules, tmp_path):
    folder, meta = run(["pydocs-chat"], tmp_path)
    documents = list(pydocs_chat().documents())
    sides = {split: [d for d in documents if (d.split_hash < 0.3 * 2 ** 64) == (split == "val")] for split in ("train", "val")}
    assert meta["sources"][0]["kind"] == "chat" and {d.split_hash for d in sides["train"]} and {d.split_hash for d in sides["val"]}
    for split, side in sides.items():
        assert masked(folder, split) == expected(d.messages for d in side)


def test_a_split_too_small_for_a_module_takes_the_lowest_and_the_tokenizer_sees_none_of_it(few_modules):
    source, documents = pydocs_chat(), list(pydocs_chat().documents())
    lowest = min(d.split_hash for d in documents)
    sample, threshold, total, n = prepare.scan(source, 1, 10 ** 9)
    assert {d.split_hash for d in documents if d.split_hash < threshold} == {lowest}
    assert sorted(sample) == sorted(d.text for d in documents if d.split_hash != lowest)
    assert (total, n) == (sum(len(text.encode()) for d in documents for _, text in d.messages), len(documents))


def test_a_budget_takes_the_beginning_of_pydocs_chat(few_modules, tmp_path):
    folder, meta = run(["pydocs-chat:5000"], tmp_path)
    assert 5000 <= meta["sources"][0]["train"]["tokens"] < 7000 and meta["sources"][0]["val"]["tokens"]
    training = [d.messages for d in pydocs_chat().documents() if d.split_hash >= 0.3 * 2 ** 64]
    found = masked(folder, "train")
    assert found == expected(training[:len(found)])


def test_training_prepares_pydocs_chat_by_itself_and_takes_it_as_text(few_modules, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_train("--data=pydocs-chat", "--out=run", "--pack=document") == 0
    assert (tmp_path / "data/pydocs-chat-hybrid-600/train.0-pydocs-chat.mask.bin").exists() and (tmp_path / "run/best.pt").exists()


@pytest.fixture(scope="session")
def documents():
    return list(pydocs_chat().documents())


def replies(documents):
    return [text for d in documents for role, text in d.messages if role == "assistant"]


DIGEST = """
import hashlib, prepare
print(hashlib.sha256(repr([(d.split_hash, d.messages) for d in pydocs_chat().documents()]).encode()).hexdigest())
"""


def test_pydocs_chat_is_the_same_in_every_process(documents):
    process = command("-c", DIGEST, PYTHONHASHSEED="7")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.strip() == hashlib.sha256(repr([(d.split_hash, d.messages) for d in documents]).encode()).hexdigest()


def test_pydocs_chat_is_many_short_chats_without_an_empty_or_a_repeated_reply(documents):
    assert len(documents) > 10_000
    for d in documents:
        assert tidy(d.messages) == d.messages
        assert 1 <= sum(role == "user" for role, _ in d.messages) <= 3
        assert all(text.strip() == text and 0 < len(text) <= 1500 for _, text in d.messages)
    told = replies(documents)
    assert len(set(told)) == len(told) and max(map(len, told)) <= 500
    assert any("@property\n" in reply for reply in told) and not any(".setter\n" in reply for reply in told)  # one name, told of once
    assert len({d.hash for d in documents}) == len(documents)
    assert {len(d.messages) - (d.messages[0][0] == "system") for d in documents} == {2, 4, 6}


def test_a_chat_is_split_as_its_module_in_pydocs(documents):
    texts = list(library_texts(library()))
    assert [text for _, text in texts] == list(pydocs().documents())[:len(texts)]  # the topics follow
    facts = collections.defaultdict(set)  # two modules may be copies of each other
    for module, text in texts[::6]:
        facts[text_hash(text.encode())].update(fact for thing in described(module, ast.parse(text)) for fact in thing["facts"].values())
    assert {d.split_hash for d in documents} <= {text_hash(text.encode()) for _, text in texts}
    assert all(facts[d.split_hash].issuperset(replies([d])) for d in documents if d.split_hash in facts)


def squeezed(text):
    return " ".join(text.split())


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2])
def test_no_reply_of_a_validation_module_is_in_a_training_chat(fraction, documents):
    threshold = int(fraction * 2 ** 64)
    train, val = [d for d in documents if d.split_hash >= threshold], [d for d in documents if d.split_hash < threshold]
    told, known = set(replies(val)), {text for d in train for _, text in d.messages}
    assert told and not told & known
    # Nor do validation documents say elsewhere what training chats reply; now and then two docstrings have a sentence in common
    texts = squeezed("\n".join(t for t in pydocs().documents() if text_hash(t.encode()) < threshold))
    sample = replies(train[::20])
    assert sum(squeezed(reply) in texts for reply in sample) < len(sample) / 500


def test_pydocs_chat_knows_the_library(documents):
    turns = {reply: (d.messages[i - 1][1], d.messages) for d in documents for i, (role, reply) in enumerate(d.messages) if role == "assistant"}
    for reply, words in {"def dedent(text):": "textwrap.dedent", "textwrap.wrap takes 3 arguments: text, width and **kwargs.": "wrap",
                         "class Fraction:\n    def limit_denominator(self, max_denominator=1000000):": "limit_denominator",
                         "That is statistics.": "standard library", "ChainMap is a class of the module collections.": "ChainMap"}.items():
        question, chat = turns[reply]
        assert words in question or chat[-2][1] == question and words in str(chat[:-2])


SOURCE = ast.parse('''
"""Shapes in the plane, e.g. circles.  They can be drawn!
No more of them.

Author: nobody

  - a list
"""
class Circle(Shape, metaclass=M):
    """A round thing"""
    def __init__(self, r=1): pass
    @property
    def area(self):
        """Is the area inside, which cannot be changed: """
    @area.setter
    def area(self, x):
        """Never told of."""
    @staticmethod
    def unit(a, /): pass
    def _private(self): pass
    class Error(ValueError): pass
async def draw(what, /, *args, at=(0, 0), **options) -> None:
    def inner(): "Not told of."
def _hidden(): """lower case"""
''')


def test_what_is_told_of_a_module():
    told = list(described("plane", SOURCE))
    assert [(t["name"], t["noun"], t["owner"]) for t in told] == [
        ("plane", "module", "the standard library"), ("plane.Circle", "class", "plane"),
        *[("plane.Circle.area", "property", "plane.Circle")] * 2,
        ("plane.Circle.unit", "method", "plane.Circle"), ("plane.Circle.Error", "class", "plane.Circle"), ("plane.draw", "function", "plane"),
        ("plane._hidden", "function", "plane")]
    facts = {thing["name"]: thing["facts"] for thing in reversed(told)}  # the first of a name
    assert facts["plane"] == dict(
        summary="Shapes in the plane, e.g. circles. They can be drawn! No more of them.", which="That is plane.", functions="plane has one function: draw.",
        classes="plane has one class: Circle.",
        docstring="Shapes in the plane, e.g. circles.  They can be drawn!\nNo more of them.\n\nAuthor: nobody\n\n  - a list")
    assert facts["plane.Circle"] == dict(
        summary="A round thing.", which="That is plane.Circle.", methods="plane.Circle has one method: unit.", bare="Circle",
        where="Circle is a class of the module plane.", signature="class Circle(Shape, metaclass=M):\n    def __init__(self, r=1):")
    assert facts["plane.Circle.area"] == dict(signature="class Circle:\n    @property\n    def area(self):", which="That is plane.Circle.area.")
    assert facts["plane.Circle.unit"] == dict(signature="class Circle:\n    @staticmethod\n    def unit(a, /):", which="That is plane.Circle.unit.",
                                              arguments="plane.Circle.unit takes one argument: a.")
    assert facts["plane.draw"] == dict(signature="async def draw(what, /, *args, at=(0, 0), **options) -> None:", which="That is plane.draw.", bare="draw",
                                       arguments="plane.draw takes 4 arguments: what, *args, at and **options.",
                                       where="draw is a function of the module plane.")
    assert facts["plane._hidden"] == dict(signature="def _hidden():", arguments="plane._hidden takes no arguments.", which="That is plane._hidden.")


def test_each_fact_is_told_once_and_never_given_away_before():
    things = [thing for thing in described("plane", SOURCE) if "Never told of." not in thing["facts"].values()]
    chats = dialogues(things)
    told = [reply for chat in chats for _, reply in chat]
    assert len(told) == len(set(told)) and all(1 <= len(chat) <= 3 for chat in chats)
    assert "{" not in "".join(question for chat in chats for question, _ in chat)
    for chat in chats:
        for i, (_, reply) in enumerate(chat):
            assert not any(reply in question for question, _ in chat[:i + 1])


@pytest.mark.parametrize("docstring, summary", [
    ("Return it", "Return it."), ("Really so? Yes.\nAnd more\nhere:", "Really so? Yes."), ("wrap(text) -> list\n\nWraps text.", "Wraps text."), ("", ""),
    ("Word.", ""), ("lower case", ""), ("Usage:\n  x.py -h", ""), ("A " + "very " * 60 + "long one.", ""), ("A fact. " + "Very " * 60 + "long.", "A fact."),
    (">>> f(1)\n2", ""), ("Takes a, b, etc. and c.", "Takes a, b, etc. and c.")])
def test_a_summary_is_whole_sentences(docstring, summary):
    assert prose(docstring) == summary


@pytest.mark.parametrize("docstring, shown", [("One.", ""), ("One.\n\nTwo.", "One.\n\nTwo."), ("", ""),
                                              ("One.\n \nTwo:\n\n" + "x" * 500, ""), ("One.\n\nTwo.\n\n" + "x" * 500, "One.\n\nTwo.")])
def test_a_docstring_is_shown_up_to_a_paragraphs_end(docstring, shown):
    assert paragraphs(docstring) == shown


@pytest.mark.parametrize("n, text", [(0, "f takes no arguments."), (1, "f takes one argument: a0."),
                                     (2, "f takes 2 arguments: a0 and a1."), (3, "f takes 3 arguments: a0, a1 and a2.")])
def test_names_are_listed_in_english(n, text):
    assert listing("f", "arguments", [f"a{i}" for i in range(n)]) == text


def test_a_long_list_is_cut_and_says_so():
    assert listing("m", "classes", list("abcdefghijklmn")) == "m has 14 classes, among them a, b, c, d, e, f, g, h, i, j, k and l."
    assert listing("m", "classes", ["A"]) == "m has one class: A."


def test_a_python_without_its_sources_is_a_mistake_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no library sources"):
        pydocs_chat()
