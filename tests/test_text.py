"""corpus/text.py: every format gives its texts whole and in order, and what is left out is left out for a reason."""
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from common import UserError
from corpus.text import Document, Reader, Seen, clean, cut_documents, local_source, split_budget, text_documents
from corpus_helpers import TEXT, document, properties, run, write_rows


def found(path, column=""):
    """What clean() makes of a file or folder: the texts of its documents, and the reasons why others have none."""
    source = local_source(str(path), column)
    documents = list(clean(source.reader(), Seen(), source.chat))
    texts = [d.text for d in documents if isinstance(d, Document)]
    return texts, [d for d in documents if not isinstance(d, Document)]


# ---------------------------------------------------------------------------------------------------- formats

def test_every_format_is_read_in_the_order_of_paths(tmp_path):
    d = tmp_path / "mixed"
    (d / "sub/.hidden").mkdir(parents=True)
    (d / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree \xe8".encode())  # a byte order mark, two kinds of line ends
    (d / "b.md").write_bytes(b"caf\xe9 \xff ok")  # Latin-1
    (d / "c.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "r1", "content": "not this"}\r\n\r\n  \n'
        b'{"id": 1, "text": "\\ud83d\\ude00 \\ud800x\\udc00"}\n'
        b'{"text": "line\\r\\nends \\u0000 stay"}')
    (d / "d.jsonl.gz").write_bytes(gzip.compress('{"content": "zipped \xe8"}\n'.encode()))
    write_rows(d / "e.parquet", [{"id": 1, "content": "p1"}, {"id": 2, "content": None}, {"id": 3, "content": "p3"}])
    (d / "sub/f.txt").write_text("deep")
    for ignored in ("notes.csv", ".g.txt", "sub/.hidden/h.txt", "README"):
        (d / ignored).write_text("not read")

    texts, reasons = found(f"{d}@it/web")
    assert texts == ["one\ntwo\nthree \xe8", "caf\ufffd \ufffd ok", "r1", "\U0001f600 \ufffdx\ufffd",
                     "line\r\nends \x00 stay", "zipped \xe8", "p1", "p3", "deep"]
    assert reasons == ["empty"]  # the null in the parquet file
    source = local_source(f"{d}@it/web", "")
    assert (source.name, source.language, source.kind, source.origin["files"]) == ("mixed", "it", "web", 6)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_column_names_the_text(suffix, tmp_path):
    path = write_rows(tmp_path / f"x{suffix}", [{"text": "no", "body": f"yes {i}"} for i in range(3)])
    assert found(path, "body") == (["yes 0", "yes 1", "yes 2"], [])
    with pytest.raises(UserError, match="no column 'txt', it has 'text', 'body'"):
        found(path, "txt")


def test_rows_without_text_are_left_out_with_the_reason(tmp_path):
    rows = [{"text": text} for text in ("a", "", " \n\u3000", None, 5, ["b"], {"c": 1}, False, "d", "a")]
    texts, reasons = found(write_rows(tmp_path / "x.jsonl", rows))
    assert texts == ["a", "d"]
    assert reasons == [*["empty"] * 3, *["not text"] * 4, "duplicate"]


def test_what_was_left_out_is_counted_in_the_prepared_folder(tmp_path):
    rows = [{"text": text} for text in ("a", "", " \n\u3000", None, 5, ["b"], {"c": 1}, False, "d", "a")]
    _, meta = run(write_rows(tmp_path / "x.jsonl", rows), tmp_path, val_fraction=0.0)
    assert meta["sources"][0]["skipped"] == {"empty": 3, "not text": 4, "duplicate": 1}


def cut_parquet(path):
    write_rows(path, [{"text": "fine"}])
    path.write_bytes(path.read_bytes()[:-20])


ZIPPED = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(1000)))
BROKEN = {
    "cut.jsonl.gz": lambda path: path.write_bytes(ZIPPED[:-100]),
    "garbage.jsonl.gz": lambda path: path.write_bytes(ZIPPED[:10] + b"\xff" * 100),
    "unzipped.jsonl.gz": lambda path: path.write_bytes(gzip.decompress(ZIPPED)),
    "deep.jsonl": lambda path: path.write_text("[" * 100_000),
    "cut.parquet": cut_parquet,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_nothing_is_written(name, tmp_path):
    BROKEN[name](tmp_path / name)
    with pytest.raises(UserError, match=name):
        run(tmp_path / name, tmp_path / "data")
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------------------- layouts

def said(i):
    return {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}]}


def shape(path, column=""):
    """(whether the file holds chats, how many documents it gives, reason -> how often it gives none)."""
    source = local_source(str(path), column)
    found = list(clean(source.reader(), chat=source.chat))
    documents = [item for item in found if isinstance(item, Document)]
    return source.chat, len(documents), dict(Counter(item for item in found if isinstance(item, str)))


ODD_FIRST = {
    "null": ({"messages": None}, {"not a chat": 1}),
    "empty": ({}, {"not a chat": 1}),
    "text": ({"text": "a heading"}, {"not a chat": 1}),
    "no list": ({"messages": "user: hi"}, {"not a chat": 1}),
    "no replies": ({"messages": []}, {"no reply": 1}),
}


@pytest.mark.parametrize("what", ODD_FIRST)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_the_layout_is_that_of_most_rows_whatever_the_first_one_is(what, ending, tmp_path):
    odd, reasons = ODD_FIRST[what]
    rows = [odd, *map(said, range(30))]
    path = tmp_path / f"x{ending}"
    path.write_text(json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows)))
    assert shape(path) == (True, 30, reasons)


def test_rows_of_nulls_alone_say_nothing_and_the_columns_decide(tmp_path):
    rows = [{"id": 0, "messages": None}] * 25 + [{"id": i, **said(i)} for i in range(9)]
    for ending in (".jsonl", ".parquet"):
        assert shape(write_rows(tmp_path / f"x{ending}", rows)) == (True, 9, {"not a chat": 25})
    rows = [{"text": None, "id": 1}] * 25 + [{"text": f"t {i}", "id": 1} for i in range(9)]
    for ending in (".jsonl", ".parquet"):
        assert shape(write_rows(tmp_path / f"y{ending}", rows)) == (False, 9, {"empty": 25})


def test_a_row_without_the_column_or_that_is_no_object_is_left_out_and_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text('null\n{"text": "a"}\n{"body": "b"}\n[1]\n7\n{"text": "c"}\n"d"\n')
    assert shape(tmp_path / "x.jsonl") == (False, 3, {"empty": 2, "not text": 2})


def test_a_column_without_text_is_refused_at_once(tmp_path):
    for name, value in (("x.jsonl", {"a": 1}), ("y.parquet", [1, 2])):
        path = write_rows(tmp_path / name, [{"metadata": value, "text": "a"}] * 30)
        with pytest.raises(UserError, match=f"{name} holds no text in its column 'metadata', it has .*; choose one"):
            shape(path, column="metadata")


def test_of_a_column_that_nobody_named_what_is_no_text_is_counted(tmp_path):
    for ending in (".jsonl", ".parquet"):
        path = write_rows(tmp_path / f"x{ending}", [{"id": i, "text": [f"t {i}"]} for i in range(60)])
        assert shape(path) == (False, 0, {"not text": 60})


@given(st.text(alphabet="ab \n", max_size=400), st.integers(4, 60))
def test_a_text_in_memory_is_cut_as_a_file_is(text, limit):
    parts = list(cut_documents(text, limit))
    assert "".join(parts) == text and all(len(part) <= limit for part in parts)


def test_a_chat_among_texts_is_no_text_and_a_text_among_chats_no_chat(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [said(0), *({"text": f"t {i}"} for i in range(9))])
    assert shape(path) == (False, 9, {"empty": 1})
    path = write_rows(tmp_path / "y.jsonl", [{"text": "t"}, *map(said, range(9))])
    assert shape(path) == (True, 9, {"not a chat": 1})
    with pytest.raises(UserError, match="x.jsonl.* has no column 'body', it has 'messages', 'text'"):
        shape(tmp_path / "x.jsonl", column="body")


def test_lines_of_instructions_in_a_column_are_chats_unless_the_column_is_named(tmp_path):
    rows = [{"id": i, "text": f"<s>[INST] q {i} [/INST] a {i} </s>"} for i in range(9)] + [{"id": 9, "text": "a text"}]
    for ending in (".jsonl", ".parquet"):
        path = write_rows(tmp_path / f"x{ending}", rows)
        assert shape(path) == (True, 9, {"[INST] and [/INST] not in turn": 1})
        assert shape(path, column="text") == (False, 10, {})


@pytest.mark.parametrize("text, documents", [
    ("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq {i} [/INST] a\n", 1),
    ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq {i}\n\nmore [/INST] a\n\nb </s><s>[INST] r [/INST] c </s>\n\n", 1),
    ("<s>[INST] q {i} [/INST] an end that is missing\n", 1),
    ("# a heading\n[INST] q {i} [/INST] a\n[INST] q2 {i} [/INST] b\n", 2),
])
def test_chats_of_llama_2_may_go_over_several_lines_of_a_text_file(text, documents, tmp_path):
    (tmp_path / "x.txt").write_text("".join(text.format(i=i) for i in range(12)))
    chat, n, reasons = shape(tmp_path / "x.txt")
    assert chat and n == 12 * documents
    assert reasons == ({"[INST] and [/INST] not in turn": 12} if "#" in text else {})


def test_an_empty_file_beside_others_changes_nothing(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").touch()
    write_rows(tmp_path / "c.parquet", [{"text": "x"}])
    (tmp_path / "d.md").write_text(" \n")
    assert shape(tmp_path) == (False, 1, {"empty": 2})
    (tmp_path / "c.parquet").unlink()
    write_rows(tmp_path / "c.jsonl", map(said, range(3)))
    assert shape(tmp_path) == (True, 3, {})


# ---------------------------------------------------------------------------------------------------- long files

@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "text.txt"


@properties
@given(text=st.one_of(TEXT.filter(lambda text: "\0" not in text),
                      st.text(st.sampled_from("ab \n\r\u3000\U0001f600"), max_size=300)),
       limit=st.integers(1, 50), read=st.integers(1, 60))
def test_pieces_of_a_long_file_are_its_text_and_at_most_the_limit(text, limit, read, scratch):
    scratch.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as m:
        m.setattr("corpus.text.PIECE", read)  # the amount read at a time
        pieces = list(text_documents(scratch, limit))
    assert "".join(pieces) == text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert all(len(piece) <= limit for piece in pieces) and all(pieces[:-1])


@pytest.mark.parametrize("text, first", [
    ("one two three.\n\n4\n5 six seven", "one two three.\n\n"),
    ("one two three.\n4 5 six seven", "one two three.\n"),
    ("one two three four five six", "one two three four "),
    ("x" * 40, "x" * 20),
], ids=["paragraph", "line", "word", "nowhere"])
def test_a_piece_ends_behind_a_paragraph_else_a_line_else_a_word(text, first, scratch):
    scratch.write_text(text)
    assert next(text_documents(scratch, 20)) == first


# ---------------------------------------------------------------------------------------------------- names

@pytest.mark.parametrize("word, split", [
    ("novels@it/books:50M", ("novels@it/books", 50_000_000)),
    ("a:1_500", ("a", 1500)),
    ("a:0", ("a", 0)),
    ("a:b:2K", ("a:b", 2000)),
    ("a", ("a", None)),
    ("C:folder", ("C:folder", None)),
    ("chapter:3", ("chapter:3", None)),  # a file
])
def test_a_budget_stands_behind_a_colon_unless_that_is_a_files_name(word, split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chapter:3").touch()
    assert split_budget(word) == split


@pytest.mark.parametrize("file, word, expected", [
    ("novels_it.jsonl", "novels_it.jsonl@it/books", ("novels_it", "it", "books")),
    ("v1.2 (new)/x.jsonl", "v1.2 (new)@en", ("v1_2_new_", "en", "text")),
    ("odd@it.jsonl", "odd@it.jsonl", ("odd_it", "und", "text")),
    ("x.jsonl.gz", "x.jsonl.gz@/wiki", ("x", "und", "wiki")),
])
def test_a_source_has_a_name_a_language_and_a_kind(file, word, expected, tmp_path):
    write_rows(tmp_path / file, [{"text": "some"}])
    source = local_source(f"{tmp_path}/{word}", "")
    assert (source.name, source.language, source.kind) == expected


def test_a_source_is_stamped_anew_when_a_file_changes(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"text": "some"}])
    before = local_source(str(path), "").stamp()
    os.utime(path, ns=(before + 1, before + 1))  # many clocks of files take steps of milliseconds
    assert local_source(str(path), "").stamp() > before


# ---------------------------------------------------------------------------------------------------- going on

@properties
@given(n=st.integers(0, 20), stop=st.integers(0, 20))
def test_a_reader_goes_on_where_another_one_was(n, stop):
    texts = [str(i) for i in range(n)]
    first = Reader(lambda: iter(texts))
    before = [text for text, _ in zip(first, range(stop))]
    assert before + list(Reader(lambda: iter(texts), json.loads(json.dumps(len(before))))) == texts
    whole = Reader(lambda: iter(texts))
    assert list(whole) == texts and whole.state == n


@properties
@given(hashes=st.lists(st.integers(0, 60), max_size=300), limit=st.integers(1, 20))
def test_hashes_are_remembered_for_a_while_in_bounded_memory(hashes, limit):
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


# ---------------------------------------------------------------------------------------------------- wiki40b

WIKI40B = ("\n_START_ARTICLE_\nFiume è perché\n_START_SECTION_\nStoria\n_START_PARAGRAPH_\n"
           "Prima riga._NEWLINE_Seconda riga\n_START_SECTION_\nVedi_START_PARAGRAPH_\nFine.")
PLAIN = "Fiume è perché\n\nStoria\n\nPrima riga.\nSeconda riga\n\nVedi\n\nFine."


def cleaned(text):
    return [d.text if isinstance(d, Document) else d for d in clean([text])]


@pytest.mark.parametrize("text", [
    WIKI40B,
    repr(WIKI40B.encode()),
    repr(WIKI40B.replace("Fiume", "L'").encode()).replace("L'", "Fiume"),  # in double quotes
], ids=("text", "repr", "quotes"))
def test_markers_of_wiki40b_become_paragraphs(text):
    assert cleaned(text) == [PLAIN]


def test_a_text_that_mentions_a_marker_is_taken_as_it_is():
    text = f"It says _START_ARTICLE_ here.{document(2)}"
    assert cleaned(text) == [text]


def test_a_damaged_article_of_wiki40b_is_taken_as_it_is():
    torn = repr(WIKI40B.encode())[:-1]
    assert cleaned(torn) == [torn]


@pytest.mark.parametrize("text", ["\n_START_ARTICLE_\n", "_START_ARTICLE_\n_START_PARAGRAPH_"])
def test_an_article_without_text_is_empty(text):
    assert cleaned(text) == ["empty"]
