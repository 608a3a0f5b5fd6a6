"""Text in, token files out: `python prepare.py NAME...` writes a folder that train.py, nanoGPT and `np.memmap` can read.

NAME is `pydocs` (this Python's own library and help topics: nothing to download) or `pydocs-chat` (questions and answers about that
library), a data set of the Hugging Face Hub or a mix of them (`python prepare.py --list`), or a file or folder of yours (.txt, .md,
.jsonl, .jsonl.gz, .parquet) with texts or chats, with language and kind behind an @ and a budget of training tokens behind a colon
if you like: `novels_it@it/books:50M`. Several names become several sources of one corpus, each with files of its own, and one
tokenizer that learns from them all. The folder data/NAME-TOKENIZER holds

    tokenizer.json                  a Hugging Face `tokenizers` file
    train.<i>-<source>.bin, val...  raw little-endian uint16 token ids (uint32 above 65,536), documents as <|bos|> text <|eos|>
    train.<i>-<source>.mask.bin     only of chats, and val...: a byte per token, 1 for a reply's, see encode_chats
    meta.json                       what it is made of, with counts of tokens, documents and UTF-8 bytes, sizes and checksums

The input is read as a stream, twice: once to sample the text that the tokenizer learns from (of the Hub's sets their beginning), once
to encode. Memory does not grow with it. Stopped by whatever while it encodes, the same command goes on where it was, and the result is
the same to the byte. Exact duplicates within a source are left out. Whether a document is training or validation text depends on the hash of its
text alone, not on the order of files or on what is added later; only a source so small that no hash falls below val_fraction lends
its lowest one. A chat of pydocs-chat goes where its module's source goes in pydocs.
"""
import dataclasses
import hashlib
import heapq
import json
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Progress, UserError, clock, nearest, parse_flags, run_tool
from corpus.chats import chat_ids, encode_chats
from corpus.folder import corpus_name, document_edges, read_meta, read_tokens, token_files
from corpus.hub import HUB, MIXES, HubSource, hub_revision, hub_setup, hub_source, list_table
from corpus.pydocs import EMBEDDED
from corpus.text import SKIPPED, Document, Seen, clean, local_source, split_budget
from corpus.tokenizer import DEFAULT_VOCAB, SPECIAL_TOKENS, TRAINERS, fast_encoder, load_tokenizer, unknown_id, vocabulary_size


@dataclass
class Settings:
    out_dir: str = "data"  # folder in which the prepared folder is made
    name: str = ""  # the prepared folder's name; empty: NAME-TOKENIZER
    tokenizer: str = "bpe"  # bpe, hybrid (characters and frequent words), chunk (lowercase, by two or three), or a tokenizer.json to reuse
    vocab_size: int = 0  # tokens in a new tokenizer's vocabulary; 0: bpe 16,384, hybrid 2,111, chunk 4,466
    max_tokens: int = -1  # training tokens to take from each source that names no budget, such as 235M; 0: all; -1: all, or what --list says
    val_fraction: float = 0.05  # share of the documents that become validation text
    column: str = ""  # field of .jsonl and .parquet rows that holds the text; empty: text or content, and rows of chats are chats
    source_dir: str = ""  # read the Hub's data sets from copies of their repositories in this folder: DIR/ORG/NAME, DIR/NAME, or DIR itself
    list: bool = False  # show the data sets and mixes that can be named, and nothing else
    show: str = ""  # tell what this prepared folder holds, and nothing else
    plot: bool = False  # with --show: draw the lengths of the documents, FOLDER/lengths.png

SAMPLE_BYTES = 32 * 2 ** 20  # text a tokenizer learns from, shared equally by the sources


def why_skipped(skipped):
    """{"empty": 3} -> '; left out: 3 empty', nothing where nothing was."""
    counts = ", ".join(f"{n:,} {what}" for what, n in skipped.items() if n)
    return f"; left out: {counts}" * bool(counts)


def scan(source, threshold, sample_bytes):
    """First pass: how much there is, a sample of the training text, and where the validation split lies.

    The sample is the documents of lowest rehashed hash that fit sample_bytes: even over all that is read, the same whatever its order,
    and never more than that in memory. Of a source with a budget no more is read than the budget can need, of a Hub set its beginning,
    sample_bytes or a megabyte. If no document's hash is below `threshold`, the split moves up to the lowest one, so that a small source has
    validation text too. Returns (texts, threshold, bytes, or None where there is more, documents).
    """
    sample, sampled, bar, total, lowest, highest, n, skipped = [], 0, 2 ** 64, 0, 2 ** 64, -1, 0, Counter()
    progress = Progress()
    for d in clean(source.reader(), chat=source.chat):
        if not isinstance(d, Document):
            skipped[d] += 1
            continue
        progress.show(f"{source.name:<12} reading, {total / 1e6:,.1f} MB")
        total, n, lowest, highest = total + len(d.utf8), n + 1, min(lowest, d.split_hash), max(highest, d.split_hash)
        key = d.hash * 0x9E3779B97F4A7C15 % 2 ** 64  # independent of the split's order
        if d.split_hash >= threshold and sample_bytes and key < bar:
            heapq.heappush(sample, (-key, d.text, len(d.utf8), d.split_hash))
            sampled += len(d.utf8)
            while sampled > sample_bytes and len(sample) > 1:
                bar = -sample[0][0]  # what ranks behind a document that did not fit stays out, even if it is short
                sampled -= heapq.heappop(sample)[2]
        if isinstance(source, HubSource) and total > max(sample_bytes, HUB_SCAN) and lowest < highest:
            total = None
            break
        if source.budget and total > 8 * source.budget and lowest < highest:  # no tokenizer here makes tokens that long: the budget ends before this
            break
    if not n or threshold and lowest == highest:
        raise UserError(f"{source.name} holds {'only one document' if n else 'no document'} of text; "
                        f"a training and a validation split need two different ones{why_skipped(skipped)}")
    if threshold:
        threshold = min(max(threshold, lowest + 1), highest)
    texts = [text for _, text, _, split_hash in sorted(sample, reverse=True) if split_hash >= threshold]
    return texts, threshold, total, n

HUB_SCAN = 2 ** 20  # bytes of a Hub set that the first pass reads at least

BATCH_BYTES = 4 * 2 ** 20  # text that is encoded at once: enough to keep every core busy, little to hold

SAVE_SECONDS = 10  # between two records of how far the work is


class Record:
    """progress.json in a folder that is being made: the settings asked for, the sources that are done, and where the present one is.
    It is replaced as a whole, after the token files that it speaks of have reached the disk."""

    def __init__(self, folder, asked):
        self.path = folder / "progress.json"
        try:
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self.data = {}
        self.resumed = self.data.get("asked") == asked
        if not self.resumed:
            self.data = dict(asked=asked, scans=None, done=[], source=None)

    def save(self, **changes):
        self.data |= changes
        part = self.path.with_suffix(".part")
        with open(part, "w", encoding="utf-8") as f:
            json.dump(self.data, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, self.path)


def encode_source(source, stem, folder, tokenizer, encode, dtype, threshold, total_bytes, record):
    """Second pass: writes train.<stem>.bin and val.<stem>.bin, beside them the masks of chats, and returns the source's entry for meta.json.

    Goes on where `record` says; it is brought up to date every few seconds. The next batch is read while one is encoded.
    """
    bos, eos = (np.array([tokenizer.token_to_id(token)], np.uint32) for token in ("<|bos|>", "<|eos|>"))
    chat = chat_ids(tokenizer) if source.chat else None
    unknown, normalizer, max_tokens = unknown_id(tokenizer), tokenizer.normalizer, source.budget
    where = record.data["source"] or dict(splits={s: dict(file=f"{s}.{stem}.bin", tokens=0, unknown=0, documents=0, bytes=0,
                                                          **(dict(mask=dict(file=f"{s}.{stem}.mask.bin")) if chat else {})) for s in ("train", "val")},
                                          skipped=dict.fromkeys(SKIPPED, 0), state=None, hashes=0, seen_bytes=0)
    splits, hashes = where["splits"], f"hashes.{stem}.bin"
    sizes = {x["file"]: tokens * width for x, tokens, width in token_files([splits], dtype.itemsize)} | {hashes: 8 * where["hashes"]}
    out = {file: open(folder / file, "ab") for file in sizes}
    for file, f in out.items():
        if os.path.getsize(f.name) < sizes[file]:
            raise UserError(f"{f.name} is shorter than progress.json beside it says; delete {folder} to start anew")
        f.truncate(sizes[file])  # what was written behind the record is written again
    first = max(0, (where["hashes"] - 1) // Seen.LIMIT * Seen.LIMIT - Seen.LIMIT)  # what comes before is forgotten by now
    seen = Seen(np.fromfile(folder / hashes, dtype="<u8", offset=8 * first).tolist())
    reader = source.reader(where["state"])
    progress, started, at_start, shares = Progress(), time.monotonic(), where["seen_bytes"], []

    def batches():
        """(what `clean` gives, the reader's state behind it), and None at the end"""
        batch, size = [], 0
        for x in clean(reader, seen, source.chat):
            batch.append(x)
            size += len(x.utf8) if isinstance(x, Document) else 0
            if size > BATCH_BYTES or len(batch) > 100_000:
                yield batch, reader.state
                batch, size = [], 0
        yield batch, reader.state
        yield None

    def full():  # the training budget is spent, and there is something to validate on
        return max_tokens and splits["train"]["tokens"] >= max_tokens and (splits["val"]["tokens"] or not threshold)

    pending, saved = batches(), time.monotonic()
    with ThreadPoolExecutor(1) as ahead:
        try:
            future = ahead.submit(next, pending)
            while not full() and (item := future.result()):
                batch, where["state"] = item
                future = ahead.submit(next, pending)
                pieces, documents = {file: [] for file in sizes}, [x for x in batch if isinstance(x, Document)]
                if chat:
                    encoded = iter(encode_chats([d.messages for d in documents], encode, chat))
                else:
                    encoded = ((np.concatenate((bos, ids, eos)), None) for ids in encode([d.text for d in documents]))
                for d in batch:
                    if not isinstance(d, Document):
                        where["skipped"][d] = where["skipped"].get(d, 0) + 1
                        continue
                    ids, mask = next(encoded)
                    split = "val" if d.split_hash < threshold else "train"
                    count = splits[split]
                    if split == "train" and max_tokens and count["tokens"] >= max_tokens:
                        continue
                    count["tokens"], count["documents"] = count["tokens"] + len(ids), count["documents"] + 1
                    count["unknown"] += 0 if unknown is None else int(np.count_nonzero(ids == unknown))
                    texts = [text for _, text in d.messages] if chat else [d.text]
                    # as token_byte_counts has them
                    count["bytes"] += sum(len(normalizer.normalize_str(text).encode()) for text in texts) if normalizer else len(d.utf8)
                    pieces[count["file"]].append(ids.astype(dtype))
                    if chat:
                        pieces[count["mask"]["file"]].append(mask)
                    where["seen_bytes"] += len(d.utf8)
                    if full():
                        break
                pieces[hashes].append(np.array([d.hash for d in documents], dtype="<u8"))
                for file, arrays in pieces.items():
                    if arrays:
                        out[file].write(np.concatenate(arrays).tobytes())
                where["hashes"] += len(documents)
                if time.monotonic() - saved > SAVE_SECONDS:
                    for f in out.values():
                        f.flush()
                        os.fsync(f.fileno())
                    record.save(source=where)
                    saved = time.monotonic()
                rate = (where["seen_bytes"] - at_start) / max(time.monotonic() - started, 1e-9)
                shares.append(max(splits["train"]["tokens"] / max_tokens if max_tokens else 0, where["seen_bytes"] / total_bytes if total_bytes else 0))
                left = f", {clock((time.monotonic() - started) * (1 - shares[-1]) / (shares[-1] - shares[0]))} left" if shares[-1] > shares[0] else ""
                progress.show(f"{source.name:<12} {where['seen_bytes'] / 1e6:,.1f} MB, {splits['train']['tokens'] / 1e6:,.1f}M tokens, {rate / 1e6:.1f} MB/s{left}")
        finally:
            reader.stopped.set()  # the thread that reads ahead need not wait for a lost connection
    for f in out.values():
        f.flush()
        os.fsync(f.fileno())
        f.close()
    for x, _, _ in token_files([splits]):
        with open(folder / x["file"], "rb") as f:
            x.update(file_size=os.path.getsize(f.name), sha256=hashlib.file_digest(f, "sha256").hexdigest())
    train, val, skipped = splits["train"], splits["val"], where["skipped"]
    share = (train["unknown"] + val["unknown"]) / max(1, train["tokens"] + val["tokens"])
    progress.done(f"{source.name:<12} {where['seen_bytes'] / 1e6:,.1f} MB, {train['documents'] + val['documents']:,} documents: {train['tokens']:,} training and "
                  f"{val['tokens']:,} validation tokens" + f", {share:.2%} unknown" * (unknown is not None) + why_skipped(skipped))
    return dict(name=source.name, language=source.language, kind=source.kind, origin=source.origin, budget=max_tokens, skipped=skipped, **splits)


def prepare(names, s):
    """Prepares the corpora `names` with Settings s and returns the folder. A folder with the same settings is left as it is."""
    if not names:
        raise UserError(f"name what to prepare: {', '.join(EMBEDDED)}, a data set or mix of --list, or a file or folder of yours")
    if not 0 <= s.val_fraction < 1:
        raise UserError(f"--val_fraction={s.val_fraction} is not a share from 0 up to 1")
    if s.max_tokens < -1 or s.vocab_size < 0:
        raise UserError("--max_tokens and --vocab_size cannot be negative")
    budgets = dict(map(split_budget, names))
    if len(budgets) < len(names):
        raise UserError("a name is given twice; one source is made of each")
    names, sources = list(budgets), []
    for name, budget in budgets.items():
        if name in MIXES and budget is not None:
            raise UserError(f"the sources of {name} have budgets of their own; --max_tokens gives all of them another one")
        for part, own in MIXES[name][1] if name in MIXES else ((name, budget),):
            several = len(budgets) > 1 or name in MIXES
            source = EMBEDDED[part]() if part in EMBEDDED else hub_source(part, s.source_dir, several) if part in HUB else local_source(part, s.column, (*EMBEDDED, *HUB, *MIXES))
            asked_for = s.max_tokens if s.max_tokens >= 0 else None
            choices = (asked_for, own) if name in MIXES else (own, asked_for)
            sources.append(dataclasses.replace(source, budget=next((n for n in choices if n is not None), source.budget)))
    reuse = s.tokenizer not in TRAINERS
    if reuse and not os.path.isfile(s.tokenizer):
        raise UserError(f"--tokenizer={s.tokenizer} is neither {' nor '.join(TRAINERS)} nor a file{nearest(s.tokenizer, TRAINERS)}")
    if reuse and s.vocab_size:
        raise UserError("--vocab_size belongs to a new tokenizer, and --tokenizer names an existing one")
    if reuse and any(x.chat for x in sources):
        chat_ids(load_tokenizer(s.tokenizer))  # one without the roles' tokens is no use: better known before the text is read
    vocab_size = 0 if reuse else s.vocab_size or DEFAULT_VOCAB[s.tokenizer]
    least, why = len(SPECIAL_TOKENS) + 256, "the special tokens and the bytes alone are"
    if s.tokenizer == "chunk":
        least, why = 4 * 71, "a quarter of it is for single characters, and ASCII without capitals has 71 of them; take at least"
    if not reuse and vocab_size < least:
        raise UserError(f"--vocab_size={vocab_size} is too small: {why} {least}")

    folder = Path(s.out_dir) / (s.name or corpus_name(names, s.tokenizer, vocab_size))
    asked = dict(sources=[dict(name=x.name, language=x.language, kind=x.kind, **x.origin, **dict(budget=x.budget) if x.budget != max(0, s.max_tokens) else {})
                          for x in sources],
                 tokenizer=hashlib.sha256(Path(s.tokenizer).read_bytes()).hexdigest() if reuse else s.tokenizer,
                 vocab_size=vocab_size, max_tokens=max(0, s.max_tokens), val_fraction=s.val_fraction, column=s.column)
    if folder.exists():
        made = read_meta(folder)["settings"]
        if made == asked:
            print(f"{folder} is there already, made with these settings")
            return folder
        differs = ", ".join(f"{k} was {made.get(k)!r} and is now {asked[k]!r}" for k in asked if made.get(k) != asked[k])
        raise UserError(f"{folder} was made with other settings ({differs}); give --name for a second one, or delete it")

    part = folder.with_name(f".{folder.name}.part")  # renamed at the end: a folder that exists is whole
    record = Record(part, asked | dict(stamps=[x.stamp for x in sources]))
    if any(isinstance(x, HubSource) for x in sources):
        hub_setup()
    for i, x in enumerate(sources):  # what was begun goes on with the same commits
        if isinstance(x, HubSource) and not x.folder:
            x.revision = (record.data.get("revisions") or {}).get(x.name) or hub_revision(x.name, x.hub)
            x.origin = dict(x.origin, revision=x.revision)
    if record.resumed:
        Progress().done(f"going on       {part} holds {len(record.data['done'])} of {len(sources)} sources and perhaps a part of the next")
    else:
        threshold = int(s.val_fraction * 2 ** 64)
        scans = [scan(x, threshold, 0 if reuse else SAMPLE_BYTES // len(sources)) for x in sources]
        tokenizer = load_tokenizer(s.tokenizer) if reuse else None
        if not reuse:
            started, texts = time.monotonic(), [t for texts, *_ in scans for t in texts]
            tokenizer = TRAINERS[s.tokenizer](texts, vocab_size)
            Progress().done(f"tokenizer    {s.tokenizer}, {tokenizer.get_vocab_size():,} tokens, from {sum(map(len, texts)) / 1e6:,.1f} M characters "
                            f"in {time.monotonic() - started:.1f} s")
            del texts
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        record.save(scans=[(t, total) for _, t, total, _ in scans], revisions={x.name: x.revision for x in sources if isinstance(x, HubSource)})
        del scans  # the sample is no longer needed

    text = (part / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(text)
    dtype, encode = np.dtype("<u2" if vocabulary_size(tokenizer) <= 2 ** 16 else "<u4"), fast_encoder(tokenizer)
    for i, (source, (threshold, total)) in enumerate(zip(sources, record.data["scans"])):
        if i == len(record.data["done"]):
            entry = encode_source(source, f"{i}-{source.name}", part, tokenizer, encode, dtype, threshold, total, record)
            record.save(done=[*record.data["done"], entry], source=None)
    meta = dict(format=1, dtype=dtype.name, vocab_size=vocabulary_size(tokenizer),
                tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(), settings=asked, sources=record.data["done"])
    (part / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
    whole = {"tokenizer.json", "meta.json"} | {x["file"] for x, _, _ in token_files(meta["sources"])}
    for other in (p for p in part.iterdir() if p.name not in whole):  # progress.json, hashes, and what an end half-way left behind
        other.unlink()
    part.rename(folder)
    return folder


def show(folder, plot=False):
    """Tells what a prepared folder holds: its sources, how long their documents are, and the beginning of each one's first document."""
    folder, meta = Path(folder), read_meta(folder)
    tokenizer, dtype = load_tokenizer(str(folder / "tokenizer.json")), np.dtype(meta["dtype"]).newbyteorder("<")
    print(f"{folder}: {meta['settings']['tokenizer']} tokenizer of {meta['vocab_size']:,} tokens, {meta['dtype']}")
    rows, lengths, firsts = [("source", "language/kind", "split", "tokens", "documents", "bytes", "bytes/token", "characters/token", "from")], {}, []
    for x in meta["sources"]:
        origin = " ".join(str(v) for k, v in x["origin"].items() if k in ("dataset", "path", "python", "revision"))
        for split in ("train", "val"):
            n, tokens = x[split], np.fromfile(folder / x[split]["file"], dtype, 2 ** 20)
            characters = len(tokenizer.decode(tokens.tolist())) / max(1, len(tokens))  # of the first million
            rows.append((x["name"], f"{x['language']}/{x['kind']}", split, f"{n['tokens']:,}", f"{n['documents']:,}", f"{n['bytes']:,}",
                         f"{n['bytes'] / max(1, n['tokens']):.2f}", f"{characters:.2f}", origin))
        lengths[x["name"]] = np.diff(document_edges(read_tokens(folder / x["train"]["file"], dtype), tokenizer.token_to_id("<|bos|>")))
        first = np.fromfile(folder / x["train"]["file"], dtype, min(400, int(lengths[x["name"]][0]) if len(lengths[x["name"]]) else 0))
        firsts.append((x["name"], tokenizer.decode(first.tolist(), skip_special_tokens=False)))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print("\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, wide)).rstrip() for row in rows))
    for name, n in lengths.items():
        print(f"\n{name}, tokens per training document: " + (f"shortest {n.min():,}, median {int(np.median(n)):,}, longest {n.max():,}" if len(n) else "there is none"))
        counts = np.bincount(np.frexp(n)[1]) if len(n) else []  # powers of two
        for power, count in enumerate(counts):
            if count:
                print(f"  {2 ** (power - 1):>9,} to {2 ** power - 1:>9,}  {count:>9,}  {'#' * round(50 * count / max(counts))}")
    for name, text in firsts:
        print(f"\n{name} begins:\n{text}")
    if plot:
        draw_lengths(lengths, folder / "lengths.png")
        print(f"\nwrote {folder / 'lengths.png'}")


def draw_lengths(lengths, path):
    """Histograms over logarithmic bins, a line for each source."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=100, layout="constrained")
    every = np.concatenate([n for n in lengths.values() if len(n)] or [[1, 2]])
    bins = np.geomspace(every.min(), every.max() + 1, 60)
    for name, n in lengths.items():
        ax.hist(n, bins=bins, weights=n / max(1, n.sum()), histtype="step", lw=1.6, label=f"{name}: {len(n):,} documents, median {int(np.median(n)) if len(n) else 0:,}")
    ax.set(xscale="log", xlabel="tokens in a training document", ylabel="share of the source's tokens")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)
    plt.close(fig)


def main(argv):
    if argv == ["--list"]:
        print("\n".join(list_table()))
        return 0
    given, names = parse_flags(argv, Settings(), description=__doc__.split("\n")[0],
                               positional=("NAME", f"{', '.join(EMBEDDED)}, a data set or mix of --list, or a file or folder of yours, as PATH or PATH@language/kind, and :TOKENS behind it for a budget"))
    if given.get("list"):
        raise UserError("--list goes alone")
    if given.get("plot") and not given.get("show"):
        raise UserError("--plot draws what --show=FOLDER tells")
    if given.get("show"):
        show(given["show"], given.get("plot", False))
        return 0
    folder = prepare(names, Settings(**given))
    meta = read_meta(folder)
    files = [x["file"] for x, _, _ in token_files(meta["sources"])]
    made = meta["settings"]  # name the model that this kind of vocabulary is for, and its size where it is not the default
    model = {"bpe": " --model=ivme", "hybrid": " --model=tinymemory", "chunk": " --model=i3"}.get(made["tokenizer"], "")
    size = f" --vocab_size={meta['vocab_size']}" if model and made["vocab_size"] != DEFAULT_VOCAB[made["tokenizer"]] else ""
    if (made["tokenizer"], made["vocab_size"]) == ("bpe", 32_000):
        model, size = " --model=gpt2preln", ""
    print(f"wrote {folder}: {' '.join([*files[:6], *['...'] * (len(files) > 6)])} tokenizer.json meta.json        "
          f"next: python train.py{model} --data={folder}{size}")

if __name__ == "__main__":
    run_tool(main)
