"""corpus/samples.py: a part of a set comes from all over it, and a stop changes nothing."""
import gzip
import itertools
import json
import math

from hypothesis import given, strategies as st

from corpus.samples import VISIT, VISITED, begun, in_turns, wanted_for
from corpus_helpers import document, properties, run, snapshot, texts_of, write_rows


def taken(files, portion, place=None, n=None):
    """[(name, text)] of files, name -> texts, as in_turns() gives them, n at most; and the place, as from JSON."""
    place = json.loads(json.dumps(begun() if place is None else place))

    def read(name, state):
        for i, text in enumerate(files[name]):
            if i >= (state or 0):
                yield (name, text), i + 1
    found = list(itertools.islice(in_turns(list(files), portion, place, read), n))
    return found, place


FILES = st.dictionaries(st.sampled_from("abcdefg"), st.lists(st.text(max_size=9), max_size=12), max_size=7)


@properties
@given(files=FILES, portion=st.floats(0.5, 60), stop=st.integers(0, 50))
def test_all_files_are_read_to_their_ends_in_turns_and_a_stop_changes_nothing(files, portion, stop):
    whole, _ = taken(files, portion)
    assert sorted(whole) == sorted((name, text) for name, texts in files.items() for text in texts)
    for name, texts in files.items():
        assert [text for file, text in whole if file == name] == texts

    before, place = taken(files, portion, n=stop)
    assert before + taken(files, portion, place)[0] == whole
    assert {name for name, _ in before} <= set(place["files"])


@properties
@given(n=st.integers(1, 300), budget=st.integers(1, 10 ** 9), bytes_per_token=st.floats(1, 5))
def test_a_budget_visits_many_files_and_none_of_them_too_seldom(n, budget, bytes_per_token):
    portion = wanted_for(budget).first_portion(n)
    needed = budget * bytes_per_token
    assert min(n, VISITED) * portion <= max(needed, 4 * budget) + 1  # all of so many files are visited at least
    assert n <= VISITED or portion <= max(VISIT, 4 * budget / VISITED)
    assert math.isinf(wanted_for(0).first_portion(n))


def test_a_budget_that_needs_a_part_of_a_folder_comes_from_all_its_files_in_an_order_that_the_seed_draws(tmp_path):
    for k in range(12):
        write_rows(tmp_path / f"in/{k:02}.jsonl", [{"text": f"file{k} {document(100 * k + i)}"} for i in range(60)])
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder, meta = run(f"{tmp_path}/in:2000", tmp_path, seed=seed, name=name)
        words = {text.split()[0] for text in texts_of(folder, "train")}
        assert len(words) == 12 == len(meta["sources"][0]["files"])
        made.append((snapshot(folder), meta["sources"][0]["files"]))
    assert made[0] == made[1] and made[0][1] != made[2][1]
    assert made[0][1] != sorted(made[0][1]) and set(made[0][1]) == {f"{k:02}.jsonl" for k in range(12)}

    for path in (tmp_path / "in").iterdir():  # compressed files hold more text than their sizes say
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    folder, meta = run(f"{tmp_path}/in:8000", tmp_path, name="packed")
    assert len({text.split()[0] for text in texts_of(folder, "train")}) == 12
    folder, meta = run(f"{tmp_path}/in:2M", tmp_path, name="all")  # a budget that needs all of it: in the files' order
    assert "files" not in meta["sources"][0]
    words = [text.split()[0] for text in texts_of(folder, "train")]
    assert words == sorted(words, key=lambda word: int(word.removeprefix("file")))
