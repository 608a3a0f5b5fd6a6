"""A stand-in for huggingface.co on loopback, so that tests run the real `datasets` library without a network.

    make_real_layouts(root)                      # small files laid out like the repositories that prepare.py reads
    write_repository(root, "me/mine", {...})     # and any other
    with FakeHub(root) as hub:
        subprocess.run([...], env={**os.environ, **hub.env(tmp_path)})
        hub.requests                             # what was asked for

The endpoint is read when `datasets` is first imported, so the code under test has to run in a process of its own.
"""
import base64
import fnmatch
import gzip
import hashlib
import json
import random
import re
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass
class Fault:
    """Something that goes wrong with downloads of data files: GET of resolve/<sha>/<path>, whole or a range.

    drop      half of the bytes arrive, then the connection closes
    status    an error instead of the file
    truncate  the file ends in its middle, for good
    """
    kind: str
    path: str = "*"  # which files, as a pattern on ORG/NAME/PATH
    times: float = 1  # how many downloads, counted down; math.inf for ever. "truncate" does not count
    skip: int = 0  # matching downloads that go well before
    status: int = 500
    retry_after: int | None = None  # seconds, sent as Retry-After with a status

    def matches(self, name):
        return fnmatch.fnmatch(name, self.path)


class FakeHub:
    """Serves every folder root/ORG/NAME, as it is on disk at each request, as the dataset repository ORG/NAME, and
    every folder models/ORG/NAME as a model. It takes uploads of models from whoever sends a token.

    url       http://127.0.0.1:PORT
    requests  (method, path without its query, Range header or None) of every request so far, in order of arrival
    faults    Fault rules, to be appended to at any time; of several that match a download, the first that is not used
              up applies
    commits   (repository, message, names of the files) of every upload

    A context manager: it serves while it is open.
    """

    def __init__(self, root, models=None):
        self.root = Path(root)
        self.models = Path(models or self.root / "models")
        self.requests = []
        self.faults = []
        self.commits = []
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def env(self, home, impatient=False):
        """Environment variables for a process that takes this for the Hub and keeps its caches below the folder `home`.

        `impatient` cuts every time.sleep of that process to 10 ms: the pauses between retries cannot be set from
        outside, and giving up takes half a minute with them. It does so by a sitecustomize.py, which PYTHONPATH has to
        find: keep its entry if you set your own.
        """
        home = Path(home)
        env = dict(
            HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_CACHE=str(home / "hub"),
            HF_DATASETS_CACHE=str(home / "datasets"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_IMPLICIT_TOKEN="1", HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="0",
            NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        if impatient:
            path = home / "impatient"
            path.mkdir(parents=True, exist_ok=True)
            (path / "sitecustomize.py").write_text(
                "import time\nsleep = time.sleep\ntime.sleep = lambda seconds: sleep(min(seconds, 0.01))\n")
            env["PYTHONPATH"] = f"{path}:{Path(__file__).parents[1]}"
        return env

    def sha(self, repo):
        """The commit that `main` of a repository points to. The files do not change it, so a process that shall see
        changed files needs a fresh home."""
        return hashlib.sha1(repo.encode()).hexdigest()

    def downloads(self, pattern="*"):
        """(ORG/NAME/PATH, range) of the data downloads so far whose path matches. The range is the pair of the first
        and the last byte, or None."""
        found = []
        for method, path, header in list(self.requests):
            m = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[0-9a-f]{40}/(.+)", path)
            if not m or method != "GET" or m[2] == "README.md" or not fnmatch.fnmatch(f"{m[1]}/{m[2]}", pattern):
                continue
            asked = None
            if header:
                asked = tuple(int(x) if x else None for x in header.removeprefix("bytes=").split("-"))
            found.append((f"{m[1]}/{m[2]}", asked))
        return found

    def size(self, root, repo, path):
        """Bytes of a file as this hub presents it: in listings, in headers and in what it sends."""
        size = (root / repo / path).stat().st_size
        cut = any(fault.kind == "truncate" and fault.matches(f"{repo}/{path}") for fault in self.faults)
        return size // 2 if cut else size

    def next_fault(self, name):
        """The fault that befalls this download, counted; None if it goes well."""
        with self.lock:
            for fault in self.faults:
                if fault.kind == "truncate" or fault.times <= 0 or not fault.matches(name):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed or lost interest is no error
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as the Hub does
    # headers and body are two writes: the second would wait 40 ms until the first is acknowledged
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub = self.server.hub
        url = urlsplit(self.path)
        self.sha = None
        with hub.lock:
            hub.requests.append((self.command, unquote(url.path), self.headers.get("Range")))
        # a slash inside a revision or a folder arrives as %2F, so parts are unquoted after the split
        m = re.fullmatch(r"(?:/api)?(/datasets|/models|)/([^/]+/[^/]+)(?:/(resolve|revision|tree)/([^/]+)(?:/(.+))?)?",
                         url.path)
        if not m:
            return self.refuse(404, "EntryNotFound")
        kind, repo, what, revision, path = (unquote(x or "") for x in m.groups())
        self.root = hub.root if kind == "/datasets" else hub.models
        if not (self.root / repo).is_dir():
            # as the Hub has it: without a token, a missing repository looks like a private one
            return self.refuse(401, "RepoNotFound")
        self.sha = hub.sha(repo)
        if revision not in ("", "main", self.sha):
            return self.refuse(404, "RevisionNotFound")
        target = self.root / repo / path
        if what == "resolve" and target.is_file():
            return self.send_file(repo, path, revision)
        if what == "tree" and target.is_dir():
            deep = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
            found = target.rglob("*") if deep else target.iterdir()
            return self.send_json([self.entry(repo, x) for x in sorted(found)])
        if what in ("resolve", "tree"):
            return self.refuse(404, "EntryNotFound")
        files = sorted(x.relative_to(self.root / repo).as_posix() for x in (self.root / repo).rglob("*") if x.is_file())
        self.send_json(dict(id=repo, sha=self.sha, private=False, gated=False, disabled=False, tags=[],
                            siblings=[dict(rfilename=x) for x in files]))

    do_HEAD = do_GET

    def do_POST(self):
        """Uploads: making a repository, asking how each file is to be sent, and the commit."""
        hub = self.server.hub
        self.sha = None
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with hub.lock:
            hub.requests.append((self.command, path, None))
        if path == "/api/validate-yaml":
            return self.send_json(dict(errors=[], warnings=[]))
        if not self.headers.get("Authorization"):
            return self.refuse(401)
        if path == "/api/repos/create":
            made = json.loads(body)
            repo = "/".join(filter(None, (made.get("organization"), made["name"])))
            (hub.models / repo).mkdir(parents=True, exist_ok=True)
            return self.send_json(dict(id=repo, url=f"{hub.url}/{repo}"))
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            def mode(name):
                return "lfs" if name.endswith((".safetensors", ".bin", ".pt", ".gguf", ".png")) else "regular"
            files = [dict(path=file["path"], uploadMode=mode(file["path"]), shouldIgnore=False)
                     for file in json.loads(body)["files"]]
            return self.send_json(dict(files=files))
        if m := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [dict(thing, actions=dict(upload=dict(href=f"{hub.url}/lfs/{thing['oid']}")))
                       for thing in json.loads(body)["objects"]]
            return self.send_json(dict(transfer="basic", objects=objects))
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(m[1], [json.loads(line) for line in body.splitlines()])
        self.refuse(404, "EntryNotFound")

    def do_PUT(self):
        """A large file, under its checksum, until a commit gives it its name."""
        hub = self.server.hub
        self.sha = None
        oid = self.path.rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400)
        (hub.models / f".lfs-{oid}").write_bytes(body)
        self.respond(200, b"", {})

    def commit(self, repo, lines):
        hub, names = self.server.hub, []
        header = next(line["value"] for line in lines if line["key"] == "header")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = (hub.models / f".lfs-{value['oid']}").read_bytes()
            else:
                continue
            target = hub.models / repo / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            names.append(value["path"])
        hub.commits.append((repo, header["summary"], sorted(names)))
        self.send_json(dict(commitUrl=f"{hub.url}/{repo}/commit/{hub.sha(repo)}", commitOid=hub.sha(repo)))

    def entry(self, repo, file):
        path = file.relative_to(self.root / repo).as_posix()
        oid = hashlib.sha1(f"{repo}/{path}".encode()).hexdigest()
        if file.is_dir():
            return dict(type="directory", path=path, size=0, oid=oid)
        return dict(type="file", path=path, size=self.server.hub.size(self.root, repo, path), oid=oid)

    def send_file(self, repo, path, revision):
        hub = self.server.hub
        fault = None
        if self.command == "GET" and revision == self.sha and path != "README.md":
            fault = hub.next_fault(f"{repo}/{path}")
        if fault and fault.kind == "status":
            return self.refuse(fault.status, headers={"Retry-After": fault.retry_after})
        size = hub.size(self.root, repo, path)
        first, last, status, headers = 0, size - 1, 200, {}
        m = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if m:
            first, last = int(m[1]), min(int(m[2] or size), size - 1)
            if first >= size:
                return self.refuse(416, headers={"Content-Range": f"bytes */{size}"})
            status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{size}"}
        with open(self.root / repo / path, "rb") as f:
            f.seek(first)
            body = f.read(last + 1 - first)
        etag = f'"{self.entry(repo, self.root / repo / path)["oid"]}"'
        self.respond(status, body, {"ETag": etag, "Accept-Ranges": "bytes", **headers},
                     send=len(body) // 2 if fault else len(body))
        self.close_connection |= fault is not None

    def send_json(self, value):
        self.respond(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, code=None, headers=None):
        # huggingface_hub tells a missing file, revision and repository apart by X-Error-Code
        self.respond(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def respond(self, status, body, headers, send=None):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "X-Repo-Commit": self.sha, **headers}.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])


# ---------------------------------------------------------------------------------------------------- repositories

def write_repository(root, repo, files, configs=None):
    """Writes the repository ORG/NAME. files: name -> rows, see write_rows(). configs: name -> {split: pattern of its
    files}, for the card; without them `datasets` goes by the files' names."""
    for name, rows in files.items():
        write_rows(Path(root, repo, name), rows)
    card = dict(license="mit")
    if configs:
        card["configs"] = [card_config(name, splits) for name, splits in configs.items()]
    write_card(root, repo, card)


def card_config(name, splits):
    """A configuration as a card declares it. splits: split -> pattern of its files."""
    return dict(config_name=name, data_files=[dict(split=split, path=path) for split, path in splits.items()])


def write_card(root, repo, card):
    """The dataset card. Its front matter is JSON, which is YAML, too."""
    path = Path(root, repo, "README.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"---\n{json.dumps(card, indent=1)}\n---\n# {repo}\n", encoding="utf-8")


def write_rows(path, rows, embedding_floats=0):
    """One data file, in the format of its name: .parquet in two row groups, .jsonl, .txt (a row's text a line) or
    .txt.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pa.Table.from_pylist(rows)
        if embedding_floats:
            rng = np.random.default_rng(0)
            floats = rng.standard_normal(len(rows) * embedding_floats, np.float32)  # random: they do not compress
            offsets = np.arange(len(rows) + 1, dtype=np.int32) * embedding_floats
            table = table.append_column("embeddings", pa.ListArray.from_arrays(offsets, floats))
        pq.write_table(table, path, row_group_size=-(-len(rows) // 2))
        return
    lines = [json.dumps(row, ensure_ascii=False) if path.suffix == ".jsonl" else row["text"] for row in rows]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


# ---------------------------------------------------------------------------------------------------- made-up text

WORDS = (
    "the of and to in a is that it was for on with as by from at which this river stone window letter garden market "
    "winter engine harbour bridge teacher morning silver quiet under measure signal copper history island language "
    "theory machine perhaps naïve café Zürich Łódź Ωmega 日本 π≈3.14 — €5").split()
PAROLE = (
    "il la di che è un per non con una del più città perché università acqua stazione lungo strada mattina libro però "
    "così già giù virtù caffè montagna ponte scuola mare vento l'inverno dell'Ottocento — €5").split()


def prose(rng, words=WORDS, sentences=3):
    """Sentences of random words: reproducible text that differs from document to document."""
    made = []
    for _ in range(sentences):
        sentence = " ".join(rng.choice(words) for _ in range(rng.randint(6, 14)))
        made.append(sentence.capitalize() + ".")
    return " ".join(made)


def short(rng, words=WORDS):
    return prose(rng, words, 1)


def page(rng, i, words=WORDS):
    return dict(text=prose(rng, words, 6), id=f"<urn:uuid:{rng.getrandbits(64):016x}>", dump="CC-MAIN-2024-10",
                url=f"https://example.org/{i}")


def ranked(rng, i, words=WORDS):  # poor and good pages take turns, so that every row group has both sides of 0.8
    return {**page(rng, i, words), "quality_score": round(0.55 + 0.3 * (i % 2) + 0.1 * rng.random(), 4)}


def code(rng, i):
    source = (f"def {rng.choice(WORDS[20:40])}_{i}(x):\n    \"\"\"{short(rng)}\"\"\"\n"
              f"    return x * {rng.randint(2, 99)}\n")
    return dict(content=source, sha1=f"{rng.getrandbits(160):040x}", id=i)


def marked(rng, i, words=WORDS):
    paragraphs = "_NEWLINE_".join(prose(rng, words) for _ in range(2))
    text = (f"\n_START_ARTICLE_\n{short(rng, words)[:20]}\n_START_SECTION_\n{rng.choice(words)}\n"
            f"_START_PARAGRAPH_\n{paragraphs}")
    return dict(wikidata_id=f"Q{i}", text=text, version_id="1")


def marked_bytes(rng, i):  # the text is what Python prints for its bytes
    row = marked(rng, i, PAROLE)
    return {**row, "text": repr(row["text"].encode())}


def turns(rng, i):
    return dict(text=" ".join(f"[INST] {short(rng)} [/INST] {short(rng)}" for _ in range(rng.randint(1, 3))))


def talk(rng, i):
    roles = ["user", "assistant"] * rng.randint(1, 2)
    if i % 4 == 0:
        roles.insert(0, "system")
    return dict(messages=[dict(content=short(rng), role=role) for role in roles], source="smol-magpie-ultra-short")


def math_page(rng, i):
    return dict(url=f"https://example.org/{i}", text=f"{prose(rng)}\n\n$$x^2 - {i}x = 0$$\n\n{prose(rng)}",
                score=4.5, int_score=4)


def textbook(rng, i):
    return dict(prompt=short(rng), text_token_length=100, text=prose(rng, sentences=8), seed_data="auto",
                format="textbook", audience="college")


def article(rng, i):
    return dict(id=str(i), url=f"https://en.wikipedia.org/wiki/{i}", title=short(rng)[:20],
                text=f"{prose(rng)}\n\nReferences\n{prose(rng)}")


def story(rng, i):
    return dict(text=f"Once upon a time {prose(rng)}\n\n{prose(rng)}")


def article_line(rng, i):  # a row is a line, half of them blank
    return dict(text=["", f" = {short(rng)[:20]} = \n", "", f" {prose(rng)} <unk> @-@ . \n"][i % 4])


def scored(rng, i):
    return {**page(rng, i), "score": round(2.5 + 2 * rng.random(), 4), "int_score": 3}


def alpaca(rng, i):
    return dict(instruction=short(rng), input=short(rng) if i % 3 == 0 else "", output=prose(rng),
                text="Below is an instruction.")


def dolly(rng, i):
    return dict(instruction=short(rng), context=prose(rng) if i % 2 else "", response=prose(rng),
                category="closed_qa" if i % 2 else "open_qa")


# ---------------------------------------------------------------------------------------------------- real layouts

def parts(prefix, **counts):
    """Split name -> file names, as the Hub's own converter names them."""
    return {split: [f"{prefix}{split}-{k:05}-of-{n:05}.parquet" for k in range(n)] for split, n in counts.items()}


def pages(folder):
    return dict(train=[f"{folder}/{k:03}_00000.parquet" for k in range(2)])


# repository, configuration (None: the card declares none, and `datasets` goes by the file names), split -> files, the
# function that makes a row
LAYOUTS = [
    ("epfml/FineWeb-HQ", "default", pages("data/CC-MAIN-2024-10"), ranked),
    ("epfml/FineWeb2-HQ", "deu_Latn", pages("deu_Latn"), ranked),
    ("epfml/FineWeb2-HQ", "ita_Latn", pages("ita_Latn"), lambda rng, i: ranked(rng, i, PAROLE)),
    ("bigcode/python-stack-v1-functions-filtered", None, parts("data/", train=1), code),
    ("HuggingFaceTB/finemath", "finemath-3plus", parts("finemath-3plus/", train=2), math_page),
    ("HuggingFaceTB/finemath", "finemath-4plus", parts("finemath-4plus/", train=2), math_page),
    ("HuggingFaceTB/cosmopedia", "stanford", parts("data/stanford/", train=2), textbook),
    ("HuggingFaceTB/cosmopedia", "wikihow", parts("data/wikihow/", train=2), textbook),
    ("wikimedia/wikipedia", "20231101.en", parts("20231101.en/", train=2), article),
    ("google/wiki40b", "en", parts("en/", train=2, validation=1, test=1), marked),
    ("google/wiki40b", "it", parts("it/", train=2, validation=1, test=1), marked_bytes),
    ("roneneldan/TinyStories", "default", parts("data/", train=2, validation=1), story),
    ("starhopp3r/TinyChat", None, dict(train=["tinychat.txt"]), turns),
    ("agentlans/high-quality-english-sentences", None, dict(train=["train.txt.gz"], test=["test.txt.gz"]),
     lambda rng, i: dict(text=short(rng))),
    ("Salesforce/wikitext", "wikitext-103-raw-v1", parts("wikitext-103-raw-v1/", test=1, train=2, validation=1),
     article_line),
    ("Salesforce/wikitext", "wikitext-2-raw-v1", parts("wikitext-2-raw-v1/", test=1, train=1, validation=1),
     article_line),
    ("HuggingFaceFW/fineweb-edu", "default", parts("data/CC-MAIN-2024-10/", train=2), scored),
    ("HuggingFaceFW/fineweb-edu", "sample-10BT", pages("sample/10BT"), scored),
    ("tatsu-lab/alpaca", "default", parts("data/", train=1), alpaca),
    ("databricks/databricks-dolly-15k", None, dict(train=["databricks-dolly-15k.jsonl"]), dolly),
    ("HuggingFaceTB/smol-smoltalk", "default", parts("data/", train=2, test=1), talk),
]

# the cards of these list their columns and types under dataset_info, which `datasets` then takes instead of looking
# into a file
DECLARED = {
    "HuggingFaceTB/finemath", "HuggingFaceTB/cosmopedia", "wikimedia/wikipedia", "google/wiki40b",
    "roneneldan/TinyStories", "Salesforce/wikitext", "tatsu-lab/alpaca", "HuggingFaceTB/smol-smoltalk",
}


def make_real_layouts(root, documents=40, embedding_floats=1024):
    """Writes small repositories laid out like the real ones: folders, file names, configurations, columns and markers,
    but words of their own.

    Every split gets `documents` rows (4 or more), spread over its files in order, and every parquet file two row
    groups. The rows depend on `documents` alone. FineWeb-HQ and FineWeb2-HQ also get a column of `embedding_floats`
    floats a row, the bulk of their files. Returns {(repo, config, split): rows} without the embeddings; config is None
    if the card declares none.
    """
    written, cards = {}, {}
    for repo, config, splits, make_row in LAYOUTS:
        for split, files in splits.items():
            rng = random.Random(f"{repo} {config} {split}")
            rows = written[repo, config, split] = [make_row(rng, i) for i in range(documents)]
            for k, file in enumerate(files):
                some = rows[k * documents // len(files):(k + 1) * documents // len(files)]
                write_rows(Path(root, repo, file), some, embedding_floats if repo.startswith("epfml/") else 0)

        card = cards.setdefault(repo, dict(license="mit", language=["en"]))
        if config:  # the real cards name the files by patterns: data/train-*
            patterns = {split: re.sub(r"\d+[-_][^/]*$", "*", files[0]) for split, files in splits.items()}
            card.setdefault("configs", []).append(card_config(config, patterns))
        if repo in DECLARED:
            sizes = [dict(name=split, num_examples=documents, num_bytes=0) for split in splits]
            card.setdefault("dataset_info", []).append(
                dict(config_name=config, features=features(rows[0]), splits=sizes))
    for repo, card in cards.items():
        write_card(root, repo, card)
    return written


def features(row):
    """A row's columns as a dataset card declares them."""
    kinds = {str: "string", int: "int64", float: "float64"}
    declared = []
    for name, value in row.items():
        if isinstance(value, list):
            declared.append(dict(name=name, list=features(value[0])))
        else:
            declared.append(dict(name=name, dtype=kinds[type(value)]))
    return declared
