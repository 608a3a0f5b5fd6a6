"""corpus/chats.py: chats of every layout are read, and what is learned from is the replies and nothing else."""
import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer, models

import corpus_helpers
from common import UserError
from conftest import ROOT
from corpus.chats import SHOWN, NoChat, chat_ids, chat_messages, encode_chats, is_chat, tidy
from corpus.folder import read_meta
from corpus.passes import Record
from corpus.text import Document, chat_document, clean
from corpus.tokenizer import TRAINERS, fast_encoder, from_tiktoken, load_tokenizer, token_byte_counts
from corpus_helpers import SPECIAL, expected, loaded, masked, small_gpt2, snapshot, write_rows

SIZES = {"bpe": 600, "hybrid": 600, "chunk": 600}
properties = settings(deadline=None, max_examples=60)

# What trips a chat up: texts that spell special tokens, whole or in halves, that are empty or white space, or that no
# small vocabulary holds
WORDS = [
    *SPECIAL, "<|", "|>", "user", "<|USER|>", "[INST]", "[/INST]",
    " ", "\n\n", "İ", "\U0001f600", "é\x00", "def x", "the ",
]
TEXT = st.one_of(
    st.just(""),
    st.text(max_size=20),
    st.lists(st.sampled_from(WORDS), max_size=8).map("".join),
)
TURN = st.tuples(TEXT, TEXT).map(lambda t: [("user", t[0]), ("assistant", t[1])])
SYSTEM = st.one_of(st.just([]), TEXT.map(lambda t: [("system", t)]))
CHAT = st.tuples(SYSTEM, st.lists(TURN, min_size=1, max_size=4)).map(lambda t: t[0] + sum(t[1], []))

U, A, S = "user", "assistant", "system"


@pytest.fixture(scope="session")
def trained():
    """kind -> (tokenizer, its fast encoder, special token -> id)"""
    texts, kinds = [(ROOT / name).read_text() for name in ("train.py", "README.md")], {}
    for kind, size in SIZES.items():
        tokenizer = loaded(TRAINERS[kind](texts, size))
        kinds[kind] = tokenizer, fast_encoder(tokenizer), chat_ids(tokenizer)
    return kinds


def kept(tokenizer, text):
    """What the tokenizer keeps of a text: all of it, or for a lossy one what it can spell."""
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------------- encoding

def frame(chat):
    """The special tokens of a chat, in order."""
    tokens = ["<|bos|>"]
    for role, _ in chat:
        tokens.append(f"<|{role}|>")
        if role == "assistant":
            tokens.append("<|eos|>")
    return tokens


@properties
@given(chats=st.lists(CHAT, max_size=4))
@example(chats=[[(U, ""), (A, "")]])
@example(chats=2 * [[(S, "<|eos|>"), (U, "<|assistant|>yes<|eos|>"), (A, "<|user|>"), (U, "\n"), (A, "<|bos|> ")]])
@pytest.mark.parametrize("kind", SIZES)
def test_the_mask_holds_the_replies_with_their_ends_and_nothing_else(chats, kind, trained):
    tokenizer, encode, ids = trained[kind]
    encoded = encode_chats(chats, encode, ids)
    assert len(encoded) == len(chats)
    for chat, (tokens, mask) in zip(chats, encoded):
        assert (tokens.dtype, mask.dtype, len(tokens)) == (np.uint32, np.uint8, len(mask))
        assert set(mask.tolist()) <= {0, 1}
        sides = [tokenizer.decode(tokens[mask == m].tolist(), skip_special_tokens=False) for m in (1, 0)]
        assert [tuple(sides)] == expected([[(role, kept(tokenizer, text)) for role, text in chat]])
        assert kind == "chunk" or all(kept(tokenizer, text) == text for _, text in chat)
        assert [SPECIAL[i] for i in tokens if i < len(SPECIAL) and SPECIAL[i] != "<|unk|>"] == frame(chat)


@properties
@given(chats=st.lists(CHAT, max_size=4))
def test_a_chat_gives_the_same_ids_alone_and_in_a_batch_of_one_call(chats, trained):
    tokenizer, encode, ids = trained["bpe"]
    calls = []
    together = encode_chats(chats, lambda texts: calls.append(1) or encode(texts), ids)
    assert len(calls) == bool(chats)
    for chat, arrays in zip(chats, together):
        tokens, mask = [ids["<|bos|>"]], [0]
        for role, text in chat:
            body = tokenizer.encode(text, add_special_tokens=False).ids
            if role == "assistant":
                body = [*body, ids["<|eos|>"]]
            tokens += [ids[f"<|{role}|>"], *body]
            mask += [0, *[int(role == "assistant")] * len(body)]
        alone, = encode_chats([chat], encode, ids)
        assert [a.tolist() for a in arrays] == [a.tolist() for a in alone] == [tokens, mask]


def test_a_tokenizer_without_the_roles_is_refused():
    tokenizer = Tokenizer(models.BPE({"<|bos|>": 0, "<|eos|>": 1, "<|user|>": 2}, []))
    with pytest.raises(UserError, match=r"no <\|system\|> and no <\|assistant\|>, .*take bpe, hybrid or chunk"):
        chat_ids(tokenizer)


def test_gpt2_cannot_frame_chats_and_says_so():
    with pytest.raises(UserError, match=r"no <\|user\|> .*which chats are framed with; take bpe, hybrid or chunk"):
        chat_ids(loaded(from_tiktoken(small_gpt2())))


# ---------------------------------------------------------------------------------------------------- reading

def without_breaks(messages, role):
    return "".join(text for r, text in messages if r == role).replace("\n", "")


@properties
@given(messages=st.lists(st.tuples(st.sampled_from([S, U, A, SHOWN]), TEXT), max_size=8))
def test_any_list_of_messages_is_a_well_formed_chat_or_none(messages):
    try:
        chat = tidy(messages)
    except NoChat:
        return
    letters = {S: "s", U: "u", A: "a", SHOWN: "c"}
    assert re.fullmatch("s?(u[ac])*uac?|s?(u[ac])+", "".join(letters[role] for role, _ in chat))
    assert any(role == A for role, _ in chat) and tidy(chat) == chat
    shown = [text for role, text in messages if role == SHOWN and text]
    assert all(text in "".join(t for r, t in chat if r == SHOWN) for text in shown)  # nothing shown is learned
    if shown:
        return
    for role in (S, A):  # only questions at the end go
        assert without_breaks(chat, role) == without_breaks(messages, role)


CONTENT = st.one_of(TEXT, st.integers(), st.sampled_from([U, A]))
MESSAGE = st.one_of(st.none(), st.dictionaries(st.sampled_from(["role", "content"]), CONTENT))
COLUMNS = st.sampled_from(["instruction", "input", "output", "context", "response"])
ROW = st.one_of(st.none(), st.integers(), TEXT, st.lists(TEXT), st.dictionaries(COLUMNS, TEXT))


@properties
@given(messages=st.lists(MESSAGE), row=ROW)
def test_no_row_makes_a_reader_fail_otherwise(messages, row):
    for r in ({"messages": messages}, row):
        found, = clean([r], chat=True)
        assert isinstance(found, (Document, str))


def said(*messages):
    return {"messages": [dict(zip(("role", "content"), m)) for m in messages]}


def weighed(*messages):
    return {"messages": [dict(zip(("role", "content", "weight"), m)) for m in messages]}


ROWS = {
    "one turn": (
        said((U, "hi"), (A, "Hello!")),
        [(U, "hi"), (A, "Hello!")]),
    "system and two turns": (
        said((S, "Be kind."), (U, "a\n"), (A, " b"), (U, "c"), (A, "d")),
        [(S, "Be kind."), (U, "a\n"), (A, " b"), (U, "c"), (A, "d")]),
    "more columns": (
        said((U, "a"), (A, "b")) | {"source": "smol-magpie", "output": "x"},
        [(U, "a"), (A, "b")]),
    "empty texts": (
        said((S, " "), (U, ""), (A, "x"), (U, "a"), (A, ""), (U, "b"), (A, "y"), (A, "\n")),
        [(U, ""), (A, "x"), (U, "a"), (SHOWN, ""), (U, "b"), (A, "y")]),
    "neighbours": (
        said((S, "a"), (S, "b"), (U, "c"), (U, ""), (U, "d"), (A, ""), (A, "e")),
        [(S, "a\n\nb"), (U, "c\n\nd"), (A, "e")]),
    "question left open": (
        said((U, "a"), (A, "b"), (U, "c"), (U, "d")),
        [(U, "a"), (A, "b")]),
    "other names of roles": (
        said(("system", "s"), ("Human", "a"), ("GPT", "b"), ("user", "c"), ("model", "d")),
        [(S, "s"), (U, "a"), (A, "b"), (U, "c"), (A, "d")]),
    "sharegpt": (
        {"id": "7", "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                                      {"from": "gpt", "value": "b"}]},
        [(S, "s"), (U, "a"), (A, "b")]),
    "messages under another name": (
        {"conversation": said((U, "a"), (A, "b"))["messages"]},
        [(U, "a"), (A, "b")]),
    "both kinds of keys, as parquet has them": (
        {"conversations": [{"role": None, "from": "human", "content": None, "value": "a"},
                           {"role": "assistant", "from": None, "content": "b", "value": None}]},
        [(U, "a"), (A, "b")]),
    "sharegpt with the system's message in a column": (
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [(S, "s"), (U, "a"), (A, "b")]),
    "a system's message in both places": (
        {"system": "t"} | said((S, "s"), (U, "a"), (A, "b")),
        [(S, "s"), (U, "a"), (A, "b")]),
    "a system prompt beside question and response": (
        {"id": "1", "system_prompt": "Think.", "question": "a", "response": "b"},
        [(S, "Think."), (U, "a"), (A, "b")]),
    "what was said before": (
        {"instruction": "c", "input": "", "output": "d", "system": "", "history": [["a", "b"]]},
        [(U, "a"), (A, "b"), (U, "c"), (A, "d")]),
    "an input of a response": (
        {"instruction": "a", "input": "i", "response": "b"},
        [(U, "a\n\ni"), (A, "b")]),
    "prompt and completion": (
        {"prompt": "How far?", "completion": " A mile."},
        [(U, "How far?"), (A, " A mile.")]),
    "prompt and completion of messages": (
        {"prompt": said((S, "s"), (U, "a"))["messages"], "completion": said((A, "b"))["messages"]},
        [(S, "s"), (U, "a"), (A, "b")]),
    "question and answer": (
        {"id": 3, "question": "How far?", "answer": "A mile."},
        [(U, "How far?"), (A, "A mile.")]),
    "question with a context": (
        {"question": "How far?", "context": "The town is a mile away.", "answer": "A mile."},
        [(U, "How far?\n\nThe town is a mile away."), (A, "A mile.")]),
    "a column of nulls beside the one that is filled": (
        {"instruction": None, "prompt": "a", "output": None, "completion": "b"},
        [(U, "a"), (A, "b")]),
    "weights": (
        weighed((U, "a", None), (A, "b", 0), (U, "c", None), (A, "d", 1), (U, "e", 0), (A, "f", None)),
        [(U, "a"), (SHOWN, "b"), (U, "c"), (A, "d"), (U, "e"), (A, "f")]),
    "replies of two weights behind each other": (
        weighed((U, "a", None), (A, "b", 0), (A, "c", None), (U, "d", None), (A, "e", None)),
        [(U, "a"), (SHOWN, "b\n\nc"), (U, "d"), (A, "e")]),
    "alpaca": (
        {"instruction": "Add these.", "input": "1, 2", "output": "3", "text": "Below is ..."},
        [(U, "Add these.\n\n1, 2"), (A, "3")]),
    "alpaca without input": (
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        [(U, "Say hi."), (A, "hi")]),
    "dolly": (
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"},
        [(U, "Who?\n\nAda wrote it."), (A, "Ada")]),
    "dolly without context": (
        {"instruction": "Who?", "context": None, "response": "Ada"},
        [(U, "Who?"), (A, "Ada")]),
    "tinychat": (
        "[INST] Do you like tea? [/INST] Yes, I do. [INST] Why? [/INST] It is warm.\n",
        [(U, "Do you like tea?"), (A, "Yes, I do."), (U, "Why?"), (A, "It is warm.")]),
    "tinychat cut off": (
        "  [INST]a[/INST]b[INST] c",
        [(U, "a"), (A, "b")]),
    "llama 2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHow far? [/INST] A mile. </s><s>[INST] And back? [/INST] Two. </s>",
        [(S, "Be brief."), (U, "How far?"), (A, "A mile."), (U, "And back?"), (A, "Two.")]),
    "llama 2 without a system message": (
        "<s> [INST]a[/INST]b</s>",
        [(U, "a"), (A, "b")]),
}
def test_a_message_in_parts_of_text_is_their_text():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[0]]}]}
    assert chat_messages(row) == [("user", "What is it?"), ("assistant", "What is ")]


NO_CHATS = {
    "other role": (said(("narrator", "a"), ("gpt", "b")), "role other than system, user and assistant"),
    "a role that is no word": (said(([U], "a"), (5, "b")), "role other than"),
    "no reply that is to be learned": (weighed((U, "a", None), (A, "b", 0)), "no reply that is to be learned"),
    "a reply that is no text": ({"question": "a", "answer": 3}, "not text"),
    "a prompt of messages and a completion of none": ({"prompt": [{"role": U, "content": "a"}], "completion": "b"},
                                                      "not text"),
    "a call of a tool": ({"messages": [{"role": U, "content": "a"},
                                       {"role": A, "content": "", "tool_calls": [{"name": "f"}]}]}, "calls a tool"),
    "a number as history": ({"instruction": "a", "output": "b", "history": 5}, "history that is no list"),
    "odd history": ({"instruction": "a", "output": "b", "history": ["c"]}, "history that is no list"),
    "tool": (said((U, "a"), (A, "b"), ("tool", "c"), (A, "d")), "role other than"),
    "no role": ({"messages": [{"content": "a"}]}, "role other than"),
    "no content": ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, "not text"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}, "not text"),
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
    assert is_chat(row) and chat_messages(row) == chat


@pytest.mark.parametrize("name", NO_CHATS)
def test_a_row_that_is_no_chat_is_skipped_with_its_reason(name):
    row, reason = NO_CHATS[name]
    with pytest.raises(NoChat, match=reason):
        chat_messages(row)


@properties
@given(chat=CHAT)
def test_a_tinychat_line_is_read_back(chat):
    bare = [(role, re.sub(r"\[/?INST\]", "", text).strip()) for role, text in chat if role != "system"]
    if any(text for role, text in bare if role == "assistant"):
        line = " ".join(f"[INST] {text} [/INST]" if role == "user" else text for role, text in bare)
        assert chat_messages(line) == [(role if role == "user" or text else SHOWN, text) for role, text in bare]


def test_who_says_what_belongs_to_a_chats_hash():
    chats = [
        [(U, "a"), (A, "b")],
        [(U, "b"), (A, "a")],
        [(U, "ab"), (A, "")],
        [(S, ""), (U, "a"), (A, "b")],
        [(U, "a"), (A, "b"), (U, ""), (A, "")],
    ]
    documents = [chat_document(chat) for chat in chats]
    assert len({d.hash for d in documents}) == len(chats)
    assert all(d.split_hash == d.hash and len(d.utf8) == 2 for d in documents)
    of_a_module = [chat_document(chat, 5) for chat in chats]
    assert [d.hash for d in of_a_module] == [d.hash for d in documents]
    assert {d.split_hash for d in of_a_module} == {5}


# ---------------------------------------------------------------------------------------------------- files

def texts(i):
    """Four texts of their own for every i: a question, its reply, and two more. The layouts make a chat of them."""
    rng = random.Random(i)
    words = ["tea", "caffè", "\U0001f600", "<|eos|>", "<|user|>", "12", "you're"]
    text = [" ".join(rng.choice(words) for _ in range(rng.randint(1, 12))) for _ in range(4)]
    return f"Question {i}: {text[0]}", f"Reply {i}: {text[1]}", text[2], text[3]


def dialogue(i):
    question, reply, more, end = texts(i)
    chat = [(U, question), (A, reply)]
    if i % 3 == 0:
        chat.insert(0, (S, "Be brief."))
    if i % 2:
        chat += [(U, more), (A, end)]
    return said(*chat)


def alpaca(i):
    question, reply, more, _ = texts(i)
    return {"instruction": question, "input": more if i % 2 else "", "output": reply, "text": f"# {question} # {reply}"}


def dolly(i):
    question, reply, more, _ = texts(i)
    return {"instruction": question, "context": more if i % 2 else "", "response": reply, "category": "open_qa"}


def tinychat(i):
    question, reply, more, end = texts(i)
    line = f"[INST] {question} [/INST] {reply}"
    return f"{line} [INST] {more} [/INST] {end}" if i % 2 else line


def sharegpt(i):
    names = {S: "system", U: "human", A: "gpt"}
    messages = [{"from": names[m["role"]], "value": m["content"]} for m in dialogue(i)["messages"]]
    return {"id": str(i), "conversations": messages}


def completion(i):
    question, reply, _, _ = texts(i)
    return {"prompt": question, "completion": reply}


def answer(i):
    question, reply, more, _ = texts(i)
    return {"question": question, "context": more if i % 2 else None, "answer": reply}


def corrected(i):
    """A chat whose first reply was wrong: it belongs to the chat and is not to be learned."""
    question, reply, more, end = texts(i)
    return weighed((U, question, None), (A, f"wrong {more}", 0), (U, "Try again.", None), (A, reply + end, 1))


def llama2(i):
    question, reply, more, end = texts(i)
    line = f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{question} [/INST] {reply} </s>"
    return f"{line}<s>[INST] {more} [/INST] {end} </s>" if i % 2 else line


LAYOUTS = {
    "sharegpt.jsonl": sharegpt, "sharegpt.json": sharegpt, "sharegpt.parquet": sharegpt, "completion.jsonl": completion,
    "answer.json": answer, "answer.parquet": answer, "corrected.jsonl": corrected, "corrected.parquet": corrected,
    "llama2.txt": llama2,
    "messages.jsonl": dialogue, "messages.jsonl.gz": dialogue, "messages.parquet": dialogue,
    "alpaca.jsonl": alpaca, "alpaca.parquet": alpaca, "dolly.jsonl": dolly, "tinychat.txt": tinychat,
}


def run(names, out_dir, **given):
    """prepare() with a small vocabulary and much validation text; returns (folder, meta)."""
    return corpus_helpers.run(names, out_dir, **{"val_fraction": 0.3, **given})


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_on_the_disk_line_up_with_the_tokens(name, tmp_path):
    rows = [LAYOUTS[name](i) for i in range(60)]
    folder, meta = run([write_rows(tmp_path / name, rows)], tmp_path, name="made")
    source, sides = meta["sources"][0], {"train": [], "val": []}
    for row in rows:
        chat = chat_messages(row)
        sides["val" if chat_document(chat).hash < 0.3 * 2 ** 64 else "train"].append(chat)
    for split, side in sides.items():
        assert side and masked(folder, split) == expected(side)
        assert source[split]["bytes"] == sum(len(text.encode()) for chat in side for _, text in chat)
    assert source["kind"] == "chat" and source["skipped"] == {"empty": 0, "not text": 0, "duplicate": 0}
    files = {f"{split}.0-{name.split('.')[0]}{end}.bin" for split in sides for end in ("", ".mask")}
    assert {p.name for p in folder.iterdir()} == {"tokenizer.json", "meta.json"} | files


@pytest.mark.parametrize("kind", SIZES)
def test_a_chats_bytes_are_what_its_tokens_stand_for(kind, tmp_path):
    rows = [dialogue(i) for i in range(60)] + [said((U, f"\u0130 {i}"), (A, "\u0130vme " * i)) for i in range(9)]
    folder, meta = run([write_rows(tmp_path / "x.jsonl", rows)], tmp_path, tokenizer=kind, vocab_size=400)
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    for split in ("train", "val"):
        entry = meta["sources"][0][split]
        counted = token_byte_counts(tokenizer)[np.fromfile(folder / entry["file"], "<u2")].sum()
        assert counted == entry["bytes"] or entry["unknown"] and counted < entry["bytes"]
        assert kind == "chunk" or not entry["unknown"]


def test_chats_and_texts_may_be_sources_of_one_corpus_and_only_chats_have_masks(tmp_path):
    some, others = [dialogue(i) for i in range(30)], [tinychat(i) for i in range(30, 60)]
    write_rows(tmp_path / "chats/a.jsonl", some)
    write_rows(tmp_path / "chats/b.txt", ["", " ", *others, ""])
    write_rows(tmp_path / "chats/empty.jsonl", [])
    write_rows(tmp_path / "text.jsonl", [{"text": f"text {i}"} for i in range(40)])
    folder, meta = run([f"{tmp_path}/text.jsonl", f"{tmp_path}/chats@it/web"], tmp_path)
    text, chats = meta["sources"]
    assert "mask" not in text["train"] and "mask" not in text["val"]
    assert (chats["kind"], chats["language"]) == ("web", "it")
    assert chats["train"]["documents"] + chats["val"]["documents"] == 60
    found = masked(folder, "train", 1) + masked(folder, "val", 1)
    assert sorted(found) == sorted(expected(chat_messages(row) for row in [*some, *others]))


@pytest.mark.parametrize("name, rows", [
    ("x.jsonl", [alpaca(i) for i in range(20)]),
    ("y.txt", [tinychat(i) for i in range(200)]),
])
def test_column_takes_rows_of_chats_as_text(name, rows, tmp_path):
    folder, meta = run([write_rows(tmp_path / name, rows)], tmp_path, column="text")
    assert meta["sources"][0]["kind"] == "text" and not list(folder.glob("*mask*"))


@pytest.mark.parametrize("row", [
    {"text": "a", "messages": 5},
    {"text": "a", "conversations": [{"from": "human", "value": "b"}]},
    {"text": "a", "prompt": "b", "completion": "c"},
    {"text": "a", "question": "b", "answer": "c"},
    {"text": "a", "instruction": "b"},
    {"text": "a", "input": "b", "output": "c"},
    "Say [INST] and [/INST]",
])
def test_other_rows_are_texts_as_ever(row, tmp_path):
    if isinstance(row, str):
        name, rows = "x.txt", [f"{row} {i}\n" * 9 for i in range(20)]
    else:
        name, rows = "x.jsonl", [row | {"text": f"a {i}"} for i in range(20)]
    _, meta = run([write_rows(tmp_path / name, rows)], tmp_path)
    assert meta["sources"][0]["kind"] == "text" and "mask" not in meta["sources"][0]["train"]


def test_rows_that_are_no_chats_are_counted_by_reason(tmp_path):
    bad = [row for row, _ in NO_CHATS.values() if isinstance(row, dict)]
    rows = [*(dialogue(i) for i in range(20)), *bad, dialogue(3)]
    _, meta = run([write_rows(tmp_path / "x.jsonl", rows)], tmp_path)
    source = meta["sources"][0]
    assert source["train"]["documents"] + source["val"]["documents"] == 20
    assert sum(source["skipped"].values()) == len(bad) + 1
    assert source["skipped"] == {
        "empty": 1, "not text": 5, "duplicate": 1, "role other than system, user and assistant": 4,
        "begins with a reply": 2, "system message inside the chat": 1, "no reply": 3, "not a chat": 4,
        "no reply that is to be learned": 1, "calls a tool": 1,
        "history that is no list of questions and replies": 2,
    }


def test_stopped_again_and_again_a_chat_set_is_made_with_the_same_bytes(tmp_path, monkeypatch, capsys):
    rows = [dialogue(i % 250) if i % 7 else {"messages": []} for i in range(300)]  # with duplicates and rows of none
    names = [write_rows(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    whole, _ = run(names, tmp_path / "whole", name="made")
    monkeypatch.setattr("corpus.passes.BATCH_BYTES", 2000)
    monkeypatch.setattr("corpus.passes.SAVE_SECONDS", -1)
    save, encoder = Record.save, fast_encoder
    for stop in itertools.count():
        # in turn before a batch is encoded, and when it is on the disk but not in the record
        left = 2 + stop // 2 % 4

        def countdown(f, counts):
            def counted(*args, **kwargs):
                nonlocal left
                left -= counts
                if not left:
                    raise MemoryError
                return f(*args, **kwargs)
            return counted
        monkeypatch.setattr("corpus.passes.Record.save", countdown(save, stop % 2))
        monkeypatch.setattr("corpus.passes.fast_encoder", lambda tokenizer: countdown(encoder(tokenizer), 1 - stop % 2))
        try:
            folder, _ = run(names, tmp_path / "stopped", name="made")
            break
        except MemoryError:
            continue
    assert stop > 5 and capsys.readouterr().out.count("resuming") == stop
    assert snapshot(folder) == snapshot(whole)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("spoil, line", [
    (cut_short, "val.0-x.mask.bin has .* bytes, .* tokens of 1 byte;"),
    (Path.unlink, "val.0-x.mask.bin is missing"),
], ids=["cut", "gone"])
def test_a_spoilt_mask_is_refused(spoil, line, tmp_path):
    folder, _ = run([write_rows(tmp_path / "x.jsonl", [dialogue(i) for i in range(20)])], tmp_path)
    spoil(folder / "val.0-x.mask.bin")
    with pytest.raises(UserError, match=line):
        read_meta(folder)
