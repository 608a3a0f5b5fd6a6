"""What a prepared folder holds, for `python prepare.py --show=FOLDER`."""
from pathlib import Path

import numpy as np

from common import columns
from corpus.folder import check_tokens, document_edges, read_meta, read_tokens
from corpus.tokenizer import READY, TRAINERS, bos_eos, load_tokenizer


def show(folder):
    """Prints what a prepared folder holds: its sources, how long their documents are, and how each source begins.

    Raises UserError if a file is not as it was written.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    check_tokens(folder, meta)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    dtype = meta["dtype"]
    kind = "reused" if is_reused(meta) else meta["settings"]["tokenizer"]
    print(f"{folder}: {kind} tokenizer of {meta['vocab_size']:,} tokens, {meta['dtype']}")

    rows = [("source", "language/kind", "split", "tokens", "documents", "bytes",
             "bytes/token", "characters/token", "from")]
    for source in meta["sources"]:
        rows += [split_row(source, split, folder, tokenizer, dtype) for split in ("train", "val")]
    print("\n".join(columns(rows)))

    lengths = []  # tokens of each training document of a source
    for source in meta["sources"]:
        tokens = read_tokens(folder / source["train"]["file"], dtype)
        lengths.append(np.diff(document_edges(tokens, *bos_eos(tokenizer))))
    for source, n in zip(meta["sources"], lengths):
        print("\n" + "\n".join(histogram(source["name"], n)))
    for source, n in zip(meta["sources"], lengths):
        first = read_tokens(folder / source["train"]["file"], dtype)[:400]
        if len(n):
            first = first[:n[0]]
        print(f"\n{source['name']} begins:\n{tokenizer.decode(first.tolist(), skip_special_tokens=False)}")


def is_reused(meta):
    """Whether the folder's tokenizer existed before: the settings then name it by a checksum, not by its kind."""
    return meta["settings"]["tokenizer"] not in (*TRAINERS, *READY)


def split_row(source, split, folder, tokenizer, dtype):
    """A row of the table that --show prints."""
    entry = source[split]
    origin = [str(v) for k, v in source["origin"].items() if k in ("dataset", "path", "python", "revision")]
    tokens = read_tokens(folder / entry["file"], dtype)[:2 ** 20]  # the first million is enough for an average
    characters = len(tokenizer.decode(tokens.tolist())) / max(1, len(tokens))
    return (source["name"], f"{source['language']}/{source['kind']}", split, f"{entry['tokens']:,}",
            f"{entry['documents']:,}", f"{entry['bytes']:,}", f"{entry['bytes'] / max(1, entry['tokens']):.2f}",
            f"{characters:.2f}", " ".join(origin))


def histogram(name, lengths):
    """Yields lines about the lengths of a source's documents: the extremes, and a bar for each power of two."""
    heading = f"{name}, tokens per training document: "
    if len(lengths) == 0:
        yield heading + "there is none"
        return
    median = int(np.median(lengths))
    yield heading + f"shortest {lengths.min():,}, median {median:,}, longest {lengths.max():,}"
    counts = np.bincount(np.frexp(lengths)[1])  # frexp's exponent of 4, 5, 6 and 7 is 3
    for power, count in enumerate(counts):
        if count:
            bar = "#" * round(50 * count / max(counts))
            yield f"  {2 ** (power - 1):>9,} to {2 ** power - 1:>9,}  {count:>9,}  {bar}"
