"""The stand-in for the Hub: the real `datasets` reads every layout through it, resumes, and meets its faults."""
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import command
from fake_hub import LAYOUTS, FakeHub, Fault

pytest.importorskip("datasets")

# the beginning of every child's code; `answer` is what it sends back
STREAM = """
import json, sys
from datasets import load_dataset
def stream(repo, config=None, split="train", columns=None, **more):
    choice = {"columns": columns} if columns else {}
    return load_dataset(repo, config, split=split, streaming=True, **choice, **more)
jobs, answer = json.loads(sys.argv[1]), []
"""


def child(hub, home, code, jobs=None):
    """(answer, standard error) of the code, run behind STREAM in a process that takes `hub` for the Hub."""
    source = f"{STREAM}\n{code}\nprint(json.dumps(answer))"
    process = command("-c", source, json.dumps(jobs), **hub.env(home, impatient=True))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out), err


def test_datasets_streams_every_layout_in_order(hub_root, layouts, tmp_path):
    unread = {"deu_Latn", "finemath-3plus", "wikitext-103-raw-v1"}
    plain = set()  # formats without a choice of columns
    for repo, _, files, _ in LAYOUTS:
        if not files["train"][0].endswith(".parquet"):
            plain.add(repo)
    jobs = []
    for (repo, config, split), rows in layouts.items():
        if config not in unread:
            jobs.append((repo, config, split, None if repo in plain else list(rows[0])[:2]))

    with FakeHub(hub_root) as hub:
        read, _ = child(hub, tmp_path, "answer += [list(stream(*job)) for job in jobs]", jobs)
    for (repo, config, split, columns), rows in zip(jobs, read):
        expected = [{k: row[k] for k in columns or row} for row in layouts[repo, config, split]]
        assert rows == expected, (repo, config, split)
    fetched = {name for name, _ in hub.downloads()}
    wanted = {f"{repo}/{name}" for repo, config, files, _ in LAYOUTS if config not in unread
              for names in files.values() for name in names}
    assert fetched == wanted


def test_resuming_is_exact_without_a_shuffle_buffer(hub_root, layouts, tmp_path):
    jobs = [
        ("epfml/FineWeb-HQ", ["text"]), ("databricks/databricks-dolly-15k", None), ("starhopp3r/TinyChat", None),
        ("agentlans/high-quality-english-sentences", None),
    ]
    code = """
from huggingface_hub import HfApi
for repo, columns in jobs:
    sha = HfApi().dataset_info(repo).sha
    for seen in (0, 3, 10, 33, 40):
        first = stream(repo, columns=columns, revision=sha)
        rows = iter(first)
        head = [next(rows) for _ in range(seen)]
        second = stream(repo, columns=columns, revision=sha)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        answer.append((repo, sha, head + list(second)))
"""
    with FakeHub(hub_root) as hub:
        answer, _ = child(hub, tmp_path, code, jobs)
        assert all(sha == hub.sha(repo) for repo, sha, _ in answer)
    for repo, _, rows in answer:
        written = next(rows for key, rows in layouts.items() if key[0] == repo)
        assert [list(row.values())[0] for row in rows] == [list(row.values())[0] for row in written]


def test_a_large_column_is_not_fetched(tmp_path):
    # `datasets` reads 5 MiB more than it was asked for at a time, so the column has to be larger than that to be seen
    # left out
    texts = [f"text {i}" for i in range(8)]
    embeddings = list(np.random.default_rng(0).standard_normal((8, 500_000), np.float32))
    table = pa.table(dict(text=texts, score=np.arange(8.0), embeddings=embeddings))
    folder = tmp_path / "hub/a/b"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# no front matter\n")
    pq.write_table(table, folder / "train.parquet", row_group_size=4)
    with FakeHub(tmp_path / "hub") as hub:
        code = "answer += stream('a/b', columns=['text'], filters=[('score', '>', 2.5)])"
        answer, _ = child(hub, tmp_path / "home", code)
    assert answer == [dict(text=x) for x in texts[3:]]
    fetched = sum(last - first + 1 for _, (first, last) in hub.downloads())
    assert fetched < 0.7 * (folder / "train.parquet").stat().st_size


def test_faults(hub_root, layouts, tmp_path):
    code = """
for repo, config in jobs:
    rows = []
    try:
        rows.extend(stream(repo, config))
        answer.append((len(rows), None, None))
    except Exception as e:
        answer.append((len(rows), type(e).__name__, getattr(getattr(e, "response", None), "status_code", None)))
"""
    jobs = {
        "starhopp3r/TinyChat": None, "tatsu-lab/alpaca": None, "databricks/databricks-dolly-15k": None,  # mended
        "google/wiki40b": "en", "HuggingFaceTB/smol-smoltalk": None, "roneneldan/TinyStories": None, "no/such": None,
    }
    with FakeHub(hub_root) as hub:
        hub.faults += [
            Fault("drop", "*tinychat.txt"), Fault("status", "tatsu-lab/*", times=2),
            Fault("status", "databricks/*", status=429, retry_after=1), Fault("status", "google/*", times=6),
            Fault("drop", "*smol*", times=120, skip=1), Fault("truncate", "roneneldan/*00001-of*"),
        ]
        answer, log = child(hub, tmp_path, code, list(jobs.items()))
        assert not any(f.times for f in hub.faults if f.kind != "truncate")
    assert answer[:3] == [[40, None, None]] * 3
    assert answer[3:] == [[0, "HfHubHTTPError", 500], [20, "ConnectionError", None], [20, "ArrowInvalid", None],
                          [0, "DatasetNotFoundError", None]]
    assert "Waiting 2.0s" in log  # Retry-After and one
