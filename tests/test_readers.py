"""Whatever a file holds that a tool reads, the end is success or one line that says what is wrong."""
import contextlib
import copy
import gzip
import io
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import run as run_files
import runfolder
from common import UserError
from conftest import pretraining_plan
from corpus.counts import TokenCounts
from corpus.describe import show
from corpus.folder import check_tokens, read_meta
from corpus.text import Document, clean, local_source
from corpus.tokenizer import TRAINERS, bos_eos, fast_encoder, load_tokenizer
from corpus_helpers import KINDS, SPECIAL, TRICKY, document, run, write_jsonl, write_rows
from fake_hub import alpaca, dolly, talk, turns

# Values to put in the place of others
ODD = [None, True, False, 0, -1, 1, 7, 2 ** 31, 2 ** 63, 10 ** 30, 1.5, -0.0, 1e308, "", " ", "a", "\ud800", "\0",
       "../x", "<|bos|>", [], {}, [None], [[]], {"": None}, ["a"] * 3, {"type": "BPE"}, "x" * 999]
JUNK = [b"", b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1", b"{", b"}", b"[", b'"', b"\\u",
        b"\\ud83d", b"\r", b"\n\n", b",", b":", b"[INST]", b"[/INST]", b"<s>", b"</s>", b"<<SYS>>", b"NaN", b"-",
        b"1" * 500, b"\xe9", b"null", b'"text":', b"messages", *(text.encode() for text in TRICKY)]


def spoilt_bytes(data, rng):
    """The bytes with a few things gone, doubled, changed or put in."""
    for _ in range(rng.randint(1, 4)):
        begin = rng.randint(0, len(data))
        end = min(len(data), begin + rng.choice([0, 1, 1, 2, 8, 100, len(data)]))
        middle = rng.choice([rng.choice(JUNK), rng.randbytes(rng.randint(0, 9)), data[begin:end] * 2, data[end:begin]])
        data = data[:begin] + middle + data[end:]
    return data


def spoilt_json(value, rng):
    """The value with a few values in it replaced, or keys taken away or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        places = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
        place, key = rng.choice(places or [([None], 0)])
        while rng.random() < 0.7 and isinstance(place[key], (dict, list)) and place[key]:
            place = place[key]
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        what = rng.randrange(4)
        if what == 0 and isinstance(place, dict):
            del place[key]
        elif what == 1 and isinstance(place, dict):
            place[rng.choice(["text", "messages", "role", "weight", "x"])] = copy.deepcopy(rng.choice(ODD))
        else:
            place[key] = copy.deepcopy(rng.choice(ODD))
        if not value:
            break
    return value


# ---------------------------------------------------------------------------------------------------- texts and rows

def text_rows(rng, i):
    return dict(id=i, text=document(rng.randrange(99)))


LAYOUTS = [text_rows, alpaca, dolly, talk, turns]


def some_rows(rng):
    make = rng.choice(LAYOUTS)
    rows = [make(rng, i) for i in range(rng.randint(0, 30))]
    if rows and rng.random() < 0.7:
        rows = spoilt_json(rows, rng)
    return rows


def text_file(rng):
    lines = [rng.choice([document(rng.randrange(99)), turns(rng, 0)["text"]]) for _ in range(rng.randint(0, 20))]
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
    return rng.choice([".txt", ".md"]), "\n".join(lines).encode(encoding, "replace")


def lines_file(rng):
    return ".jsonl", "\n".join(map(json.dumps, some_rows(rng))).encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"]))


def zipped_file(rng):
    return ".jsonl.gz", gzip.compress(lines_file(rng)[1], 1)


def array_file(rng):
    return ".json", json.dumps(some_rows(rng), indent=rng.choice([None, 1])).encode()


def parquet_file(rng):
    rows = [row for row in some_rows(rng) if isinstance(row, dict)]
    compression = rng.choice(["none", "snappy", "zstd"])
    for some in (rows, [text_rows(rng, i) for i in range(9)]):
        sink = io.BytesIO()
        with contextlib.suppress(pyarrow.ArrowException, TypeError, OverflowError, UnicodeEncodeError):  # no table
            table = pyarrow.Table.from_pylist(some)
            pyarrow.parquet.write_table(table, sink, row_group_size=7, compression=compression)
            return ".parquet", sink.getvalue()


FILES = {"text": text_file, "lines": lines_file, "zipped": zipped_file, "array": array_file, "parquet": parquet_file}


def read_file(path, rng):
    """Reads it as the first pass of prepare.py does."""
    column, encoding = rng.choice(["", "", "", "text", "body"]), rng.choice(["", "", "", "cp1252"])
    source = local_source(str(path), column, encoding=encoding)
    found = [item for item in clean(source.reader(), chat=source.chat) if isinstance(item, Document)]
    for item in found:
        assert item.text.encode() and item.utf8.decode()


def ends_well(function, *args):
    """Whether it succeeds. If it does not, it must say why in one line, as run_tool() shows it."""
    try:
        function(*args)
    except (UserError, OSError) as e:
        assert str(e).strip()
        return False
    return True


def try_files(kind, n, folder):
    """Tries n files of a kind; how many of them were read."""
    good = 0
    for seed in range(n):
        rng = random.Random(f"{kind} {seed}")
        ending, data = FILES[kind](rng)
        if rng.random() < 0.7:
            data = spoilt_bytes(data, rng)
        path = folder / f"x{ending}"
        path.write_bytes(data)
        good += ends_well(read_file, path, rng)
        path.unlink()
    return good


@pytest.mark.parametrize("kind", FILES)
def test_any_file_of_texts_or_rows_is_read_or_refused_in_one_line(kind, tmp_path):
    assert 10 < try_files(kind, 120, tmp_path) < 120


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_thousands_of_files_of_texts_or_rows_are_read_or_refused_in_one_line(kind, tmp_path):
    try_files(kind, 3500, tmp_path)


def test_what_is_read_is_prepared(tmp_path):
    """The rest of the way, for some of them."""
    for seed in range(40):
        rng = random.Random(seed)
        ending, data = FILES[rng.choice(list(FILES))](rng)
        (tmp_path / f"x{ending}").write_bytes(data)
        kind = rng.choice(list(KINDS))
        ends_well(lambda: run(tmp_path / f"x{ending}", tmp_path, name=str(seed), tokenizer=kind))
        (tmp_path / f"x{ending}").unlink()


# ---------------------------------------------------------------------------------------------------- meta.json

def try_meta(n, folder):
    whole, meta = (folder / "meta.json").read_bytes(), read_meta(folder)
    for seed in range(n):
        rng = random.Random(f"meta {seed}")
        data = json.dumps(spoilt_json(meta, rng)).encode() if rng.random() < 0.8 else spoilt_bytes(whole, rng)
        (folder / "meta.json").write_bytes(data)
        ends_well(lambda: check_tokens(folder, read_meta(folder)))
        ends_well(show, folder)


@pytest.fixture
def prepared(tmp_path):
    rows = [dict(prompt=document(i), completion=document(i + 99)) for i in range(20)]
    names = [write_jsonl(tmp_path / "a.jsonl", map(document, range(20))), write_rows(tmp_path / "b.jsonl", rows)]
    return run(names, tmp_path, name="prepared", tokenizer="hybrid")[0]


def test_any_meta_json_is_read_or_refused_in_one_line(prepared):
    try_meta(150, prepared)


@pytest.mark.slow
def test_thousands_of_meta_json_are_read_or_refused_in_one_line(prepared):
    try_meta(3000, prepared)


# ---------------------------------------------------------------------------------------------------- tokenizer.json

def foreign():
    """Two tokenizers as others make them."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *map(chr, range(33, 127)), "the", "\u2581the", "##s"])}
    words = Tokenizer(models.WordPiece(vocab, unk_token="<|unk|>"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    pieces = Tokenizer(models.Unigram([(token, -1.0) for token in vocab], unk_id=3))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    for tokenizer in (words, pieces):
        tokenizer.add_special_tokens(SPECIAL)
        yield tokenizer


def try_tokenizers(n, texts):
    trained = [*(train(texts, 300) for train in TRAINERS.values()), *foreign()]
    trained = [json.loads(tokenizer.to_str()) for tokenizer in trained]
    good = 0
    for seed in range(n):
        rng = random.Random(f"tokenizer {seed}")
        spec = rng.choice(trained)
        text = json.dumps(spec)
        if rng.random() < 0.8:
            part = rng.choice(["model", "pre_tokenizer", "decoder", "normalizer", "added_tokens", "post_processor"])
            changed = dict(spec, **{part: copy.deepcopy(rng.choice(ODD))})
            if isinstance(spec[part], (dict, list)) and rng.random() < 0.8:
                changed[part] = spoilt_json(spec[part], rng)
            text = json.dumps(changed)
        else:
            text = spoilt_bytes(text.encode(), rng).decode(errors="replace")
        good += ends_well(use_tokenizer, text)
    return good


def use_tokenizer(text):
    tokenizer = load_tokenizer(text if text.lstrip().startswith("{") else "{" + text)
    texts = ["the house <|eos|>", "caffè \U0001f600", ""]
    counts = TokenCounts(tokenizer)
    for text, ids in zip(texts, fast_encoder(tokenizer)(texts)):
        counts.of([text], len(text.encode()), ids)
        tokenizer.decode(ids.tolist())
    bos_eos(tokenizer)


def test_any_tokenizer_json_is_used_or_refused_in_one_line():
    assert 10 < try_tokenizers(150, [document(i) for i in range(30)])


@pytest.mark.slow
def test_thousands_of_tokenizer_json_are_used_or_refused_in_one_line():
    try_tokenizers(3000, [document(i) for i in range(30)])


# ---------------------------------------------------------------------------------------------------- a run's files

def try_runs(n, folder, out):
    """Spoils one file of a run and lets all that reads it have it; how often each of them succeeded."""
    names = ("config.json", "metrics.jsonl", "best.pt", "tokenizer.json")
    whole = {name: (folder / name).read_bytes() for name in names}
    checkpoint = torch.load(folder / "best.pt", weights_only=True)
    good = 0
    for seed in range(n):
        rng = random.Random(f"run {seed}")
        for name, data in whole.items():
            (out / name).write_bytes(data)
        name = rng.choice(["config.json", "metrics.jsonl", "best.pt"])
        if name == "best.pt" and rng.random() < 0.8:
            spoil_checkpoint(checkpoint, out / name, rng)
        elif name == "config.json" and rng.random() < 0.8:
            (out / name).write_text(json.dumps(spoilt_json(json.loads(whole[name]), rng)))
        elif name == "metrics.jsonl" and rng.random() < 0.8:
            rows = spoilt_json([json.loads(line) for line in whole[name].splitlines()], rng)
            (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            (out / name).write_bytes(spoilt_bytes(whole[name], rng))
        good += ends_well(runfolder.recorded_settings, out) and ends_well(runfolder.read_rows, out / "metrics.jsonl")
        good += ends_well(run_files.load_checkpoint, out / "best.pt")
        good += ends_well(pretraining_plan, "--resume", f"--out={out}")
        good += ends_well(pretraining_plan, f"--init_from={out / 'best.pt'}", "--out=none", "--data=x")
    return good


def spoil_checkpoint(checkpoint, path, rng):
    """A checkpoint with an odd value, at the top or in its plain parts."""
    checkpoint = dict(checkpoint)
    key = rng.choice(list(checkpoint))
    if key in ("cfg", "train", "metrics", "loader") and rng.random() < 0.7:
        checkpoint[key] = spoilt_json(checkpoint[key], rng)
    elif key == "model" and rng.random() < 0.7:
        checkpoint[key] = dict(checkpoint[key])
        checkpoint[key][rng.choice(list(checkpoint[key]))] = copy.deepcopy(rng.choice([*ODD, torch.zeros(3)]))
    elif rng.random() < 0.3:
        del checkpoint[key]
    else:
        checkpoint[key] = copy.deepcopy(rng.choice(ODD))
    torch.save(checkpoint, path)


def test_any_file_of_a_run_is_read_or_refused_in_one_line(trained, tmp_path):
    assert 40 < try_runs(40, trained, tmp_path) < 160


@pytest.mark.slow
def test_hundreds_of_files_of_runs_are_read_or_refused_in_one_line(trained, tmp_path):
    try_runs(700, trained, tmp_path)
