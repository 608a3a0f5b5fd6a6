"""corpus/files.py: a file is read for what it is, in whatever encoding and shape, or somebody is told."""
import codecs
import gzip
import io
import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, strategies as st

from common import UserError
from corpus.files import MARK, check_encoding, encoding_of, json_items, readable_files, suffix_of
from corpus.text import Document, clean, local_source
from corpus_helpers import TEXT, document, properties, run, texts_of, write_rows
from fake_hub import PAROLE, prose

PROSE = {
    "English": "It was a quiet harbour, and the lamps were lit. ",
    "Italian": "Perché la città è più bella di così, non si sa. ",
    "Russian": "Город проснулся рано, и фонари ещё горели. ",
    "Greek": "Το λιμάνι ήταν ήσυχο και τα φώτα αναμμένα. ",
    "Japanese": "港は静かで、灯りがともっていた。12時。\n",
    "emoji": "A lamp 💡 and a harbour ⚓️ at night 🌃. ",
}


def texts(path, encoding=""):
    """(the texts that a file or folder gives, joined; undecodable bytes that were counted)."""
    source = local_source(str(path), "", encoding=encoding)
    documents = [item for item in clean(source.reader(), chat=source.chat) if isinstance(item, Document)]
    return "".join(d.text for d in documents), sum(d.undecodable for d in documents)


# ---------------------------------------------------------------------------------------------------- encodings

MARKED = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
          "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".jsonl.gz", ".json"])
@pytest.mark.parametrize("encoding", MARKED)
def test_text_with_a_byte_order_mark_is_decoded_in_every_format(encoding, ending, tmp_path):
    lines = [text * 3 for text in PROSE.values()]
    written = "\r\n".join(lines)
    if ending != ".txt":
        written = "\r\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    data = MARKED[encoding] + written.encode(encoding)
    path = tmp_path / f"x{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    expected = "\n".join(lines) if ending == ".txt" else "".join(lines)
    assert texts(path) == (expected, 0)


@pytest.mark.parametrize("language", PROSE)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_recognised_without_a_mark(encoding, language, tmp_path):
    text = PROSE[language] * 3000  # more than is read at a time, and cut within a character
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    assert texts(tmp_path / "x.txt") == (text, 0)
    (tmp_path / "y.txt").write_bytes(PROSE[language].encode(encoding))
    assert texts(tmp_path / "y.txt") == (PROSE[language], 0)


@properties
@given(text=st.text(min_size=3), zeros=st.lists(st.integers(0, 200), max_size=3))
@example(text="some words in a row, and more of them " * 9, zeros=[0, 40, 80])
def test_text_in_utf8_stays_what_it_is_even_with_zeros_in_it(text, zeros):
    text = text * (600 // len(text.encode()) + 1)
    for i in zeros:
        text = text[:i] + "\0" + text[i:]
    if text.count("\0") * 10 < len(text) and not text.startswith("\ufeff"):
        assert encoding_of("x", text.encode(), "") == "utf-8"


@properties
@given(data=st.lists(st.binary(max_size=9) | TEXT.map(str.encode), max_size=20).map(b"".join))
@example(data=b"\xe9" * 9)
@example(data=b"\xf0\x9f\x98")
def test_any_bytes_are_decoded_counted_byte_by_byte_or_refused(data, scratch):
    scratch.write_bytes(b"words " * 20 + data)
    try:
        found, undecodable = texts(scratch)
    except UserError as e:
        assert "name its encoding, as in --encoding=cp1252" in str(e) and "\n" not in str(e)
        return
    escaped = scratch.read_bytes().decode("utf-8", "surrogateescape")  # an independent count
    lost = re.findall("[\udc80-\udcff]", escaped)
    assert undecodable == len(lost)
    assert found == re.sub("[\udc80-\udcff]", "\ufffd", escaped).replace("\r\n", "\n").replace("\r", "\n")


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "text.txt"


def test_undecodable_bytes_are_counted_in_the_output_and_in_meta_json_and_encoding_reads_them(tmp_path, capsys):
    rng = random.Random(0)
    paragraphs = [prose(rng, [word for word in PAROLE if word != "€5"]).replace("—", "-") for _ in range(300)]
    text = "\n\n".join(paragraphs)
    data = text.encode("cp1252")
    (tmp_path / "storie.txt").write_bytes(data)
    accents = sum(byte > 127 for byte in data)
    assert accents > 100

    folder, meta = run(tmp_path / "storie.txt", tmp_path / "data")
    assert meta["sources"][0]["undecodable"] == accents
    assert f"{accents:,} undecodable bytes (see --encoding)" in capsys.readouterr().out
    assert sum(t.count("\ufffd") for split in ("train", "val") for t in texts_of(folder, split)) == accents

    folder, meta = run(tmp_path / "storie.txt", tmp_path / "data", encoding="cp1252", name="right")
    assert meta["sources"][0]["undecodable"] == 0 and "undecodable" not in capsys.readouterr().out
    found = texts_of(folder, "train") + texts_of(folder, "val")
    assert sorted("".join(found)) == sorted(text) and meta["settings"]["encoding"] == "cp1252"
    with pytest.raises(UserError, match="other settings .encoding was 'cp1252' and is now None"):
        run(tmp_path / "storie.txt", tmp_path / "data", name="right")


def test_rows_count_only_what_is_lost_of_their_text(tmp_path):
    rows = b'{"text": "caf\xe9", "note": "\xe9\xe9"}\n{"text": "caff\\u00e8 \\ud800"}\n{"text": "tea"}\n'
    (tmp_path / "x.jsonl").write_bytes(rows)
    assert texts(tmp_path / "x.jsonl") == ("caf\ufffdcaff\xe8 \ufffdtea", 2)
    chats = b'{"prompt": "caf\xe9?", "completion": "yes \xff\xfe"}\n'
    (tmp_path / "y.jsonl").write_bytes(chats)
    assert texts(tmp_path / "y.jsonl") == ("caf\ufffd?\nyes \ufffd\ufffd", 3)


WRONG = {
    "Cyrillic": (PROSE["Russian"] * 20).encode("cp1251"),
    "Chinese": ("港口很安静，灯亮着。" * 50).encode("gb18030"),
    "noise": random.Random(0).randbytes(5000),
    "a copy that broke off": bytes(5000),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("ending", [".txt", ".md", ".jsonl", ".jsonl.gz", ".json"])
def test_what_is_mostly_no_text_is_refused_with_the_way_out(what, ending, tmp_path):
    path = tmp_path / f"x{ending}"
    path.write_bytes(gzip.compress(WRONG[what]) if ending.endswith(".gz") else WRONG[what])
    with pytest.raises(UserError, match=rf"x{re.escape(ending)} is no text in utf-8: \d+% .*--encoding=cp1252"):
        run(path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_text_that_was_refused_is_read_in_its_encoding(tmp_path):
    (tmp_path / "x.txt").write_bytes(WRONG["Cyrillic"])
    assert texts(tmp_path / "x.txt", "cp1251") == (PROSE["Russian"] * 20, 0)


def test_encoding_is_for_files_without_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("più".encode("cp1252"))
    (tmp_path / "b.txt").write_bytes("più".encode("utf-16"))
    assert texts(tmp_path, "cp1252") == ("più" * 2, 0)


@pytest.mark.parametrize("encoding, hint", [
    ("shift-jiss", "did you mean .*shift_?jis"), ("hex", "$"), ("rot13", "$"), ("idna", "$"), ("undefined", "$"),
    ("\0", "$")])
def test_an_encoding_that_is_none_is_refused(encoding, hint, tmp_path):
    with pytest.raises(UserError, match=f"is no text encoding.*{hint}"):
        check_encoding(encoding)
    with pytest.raises(UserError, match="--encoding is for files of yours"):
        run(["pydocs"], tmp_path, encoding="cp1252")


# ---------------------------------------------------------------------------------------------------- which files

def test_capitals_linked_folders_and_links_in_a_circle_are_read_and_the_rest_is_counted(tmp_path, capsys):
    books, elsewhere = tmp_path / "books", tmp_path / "elsewhere"
    for name in ("a.txt", "B.TXT", "c.Md", "sub/d.JSONL", "sub/E.Parquet", "f.Jsonl.GZ"):
        rows = [{"text": f"{name} {i}"} for i in range(5)]
        if name.lower().endswith((".txt", ".md")):
            (books / name).parent.mkdir(exist_ok=True)
            (books / name).write_text(f"{name} 0")
        else:
            made = write_rows(books / name.lower(), rows)
            made.rename(books / name)
    elsewhere.mkdir()
    (elsewhere / "far.txt").write_text("far 0")
    os.symlink("../elsewhere", books / "linked")
    os.symlink("../books", elsewhere / "back")  # a circle
    os.symlink("../../elsewhere", books / "sub/again")  # the same folder once more
    os.symlink("nowhere", books / "gone.txt")
    for name in ("x.csv", "y.csv", "README", ".hidden.txt"):
        (books / name).write_text("not read")
    (books / ".git").mkdir()
    (books / ".git/z.txt").write_text("not read")

    folder, meta = run(books, tmp_path / "data", val_fraction=0.0)
    found = {text.split()[0] for text in texts_of(folder, "train")}
    assert found == {"a.txt", "B.TXT", "c.Md", "sub/d.JSONL", "sub/E.Parquet", "f.Jsonl.GZ", "far"}
    assert meta["sources"][0]["origin"]["files"] == 7 and meta["sources"][0]["skipped"]["duplicate"] == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if "not read" in line)
    assert line == "books        7 files; not read: 2 hidden, 2 .csv, 1 without a suffix, 1 .txt"


def test_a_folder_of_which_all_is_read_says_so_and_a_file_says_nothing(tmp_path, capsys):
    for i in range(2):
        (tmp_path / f"in{i}").mkdir()
        write_rows(tmp_path / f"in{i}/{i}.jsonl", [{"text": document(k)} for k in range(9)])
    run(tmp_path / "in0", tmp_path / "data")
    assert "in0          1 file, none left out\n" in capsys.readouterr().out
    run(tmp_path / "in1/1.jsonl", tmp_path / "data")
    assert " left out" not in capsys.readouterr().out


def test_json_is_read_if_it_is_named_or_alone_and_not_beside_other_files(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "y.json").write_text("[]")
    assert readable_files(tmp_path)[0] == [tmp_path / "x.json", tmp_path / "y.json"]
    (tmp_path / "z.txt").write_text("")
    files, left_out = readable_files(tmp_path)
    assert files == [tmp_path / "z.txt"] and left_out == {"hidden": 0, ".json": 2}
    assert readable_files(tmp_path / "x.json")[0] == [tmp_path / "x.json"]


@pytest.mark.parametrize("name, suffix", [
    ("a.TXT", ".txt"), ("a.jsonl.gz", ".jsonl.gz"), ("a.JSON", ".json"), ("a.gz", ""), ("txt", ""), ("a.b.md", ".md")])
def test_a_suffix_may_be_in_capitals(name, suffix):
    assert suffix_of(name) == suffix


# ---------------------------------------------------------------------------------------------------- rows

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)


@properties
@given(rows=st.lists(VALUE, max_size=6), indent=st.none() | st.integers(0, 3), ascii_only=st.booleans(),
       piece=st.integers(1, 40), space=st.text(" \n\t\r", max_size=3))
def test_the_items_of_a_json_array_are_read_however_it_is_written_and_cut(rows, indent, ascii_only, piece, space):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    f = io.StringIO(text[1:] + space)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("corpus.files.PIECE", piece)
        found = list(json_items("x", f, f.read(piece)))
    assert found == json.loads(text, parse_int=float)


@pytest.mark.parametrize("text, line", [
    ('[{"text": "a"}', "item 1 is not JSON: the array does not end"),
    ('[{"text": "a"},', "item 2 is not JSON"),
    ('[{"text": "a"} {"text": "b"}]', "item 2 is not JSON: no comma"),
    ('[{"text": "a"}, ]', "item 2 is not JSON"),
    ('[{"text": "a', "item 1 is not JSON"),
    ("[" * 100_000, "item 1 is not JSON"),
    ("[1, 2]", "item 1 is not a JSON object"),
    ("{\n}", "is neither a JSON array of rows nor a row a line"),
    ("12", "line|item 1 is not a JSON object"),
])
def test_a_json_file_that_holds_no_rows_is_refused(text, line, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x.json {line}"):
        texts(tmp_path / "x.json")


def test_a_json_file_may_hold_an_array_of_rows_or_of_strings_or_a_row_a_line(tmp_path):
    rows = [{"id": i, "text": f"row {i}"} for i in range(3)]
    path = tmp_path / "x.json"
    for written in (json.dumps(rows), json.dumps(rows, indent=2), " \n" * 70_000 + json.dumps(rows),
                    json.dumps([row["text"] for row in rows]), "\n".join(map(json.dumps, rows))):
        path.write_text(written)
        assert texts(path) == ("row 0row 1row 2", 0)


def test_a_large_json_array_is_never_in_memory_as_a_whole(tmp_path):
    row = json.dumps({"text": "a few words of text " * 50})
    with open(tmp_path / "x.json", "w") as f:
        f.write("[" + ",".join([row] * 10_000) + "]")  # 10 MB
    source = local_source(str(tmp_path / "x.json"), "")
    tracemalloc.start()
    assert sum(1 for _ in source.reader()) == 10_000
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("number", ["1" * 5000, "-" + "9" * 50_000, "1" + "0" * 400, "1e999999", "0." + "3" * 9000])
def test_a_number_of_any_length_is_valid_json(number, ending, tmp_path):
    row = f'{{"id": {number}, "text": "words"}}'
    (tmp_path / f"x{ending}").write_text(f"[{row}]" if ending == ".json" else row)
    assert texts(tmp_path / f"x{ending}") == ("words", 0)


def test_strings_of_a_parquet_file_that_are_no_utf8_are_counted(tmp_path):
    raw = pyarrow.array([b"fine", None, b"caf\xe9 \xff"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet") == ("finecaf\ufffd \ufffd", 2)


def test_a_mark_is_half_of_a_pair_so_that_no_decoded_text_holds_it():
    assert 0xDC00 <= ord(MARK) < 0xE000
    for encoding in ("utf-8", "utf-16", "utf-32", "cp1252", "shift_jis", "gb18030"):
        assert random.Random(1).randbytes(4000).decode(encoding, "mark").count(MARK) > 0


def test_a_folder_whose_name_is_no_utf8_is_prepared(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_rows(folder / "x.jsonl", [{"text": document(i)} for i in range(20)])
    made, meta = run(str(folder), tmp_path / "data", name="made")
    assert meta["sources"][0]["origin"]["path"] == str(folder) and Path(made, "meta.json").read_text(encoding="utf-8")
