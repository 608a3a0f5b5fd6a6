"""Losses of whole validation files, each target with a long context before it; and the loss at each position.

A window of T positions moves over the text in steps of `stride` positions. Each target counts once, in the first window
that reaches it, so that it has at least T - stride tokens before it (except near the beginning of the text). A smaller
stride costs more and gives a lower loss. With a stride of T it is what train.py measures.
"""
import math
import os
import time

import numpy as np
import torch

import report
from common import Progress, clock, replacing
from corpus.folder import document_edges
from corpus.loader import fill_rows


def strided_rows(begin, end, T, stride):
    """Windows over the tokens from `begin` to `end`: (first token, positions, targets that have counted before)."""
    rows, reached, positions = [], 0, end - begin - 1
    for first in range(0, max(positions, 0), stride):
        if reached >= positions:
            break
        n = min(T, positions - first)
        rows.append((begin + first, n, reached - first))
        reached = first + n
    return rows


def windows_of(source, T, stride, frame=None, tokens=0):
    """The windows over a source's validation text, see `strided_rows`. frame: (bos, eos) if each document is read by
    itself, or None. tokens: about this many targets count, in windows spread evenly over the text; 0: all."""
    edges = np.array([0, len(source.val)])
    if frame is not None:
        edges = document_edges(source.val, *frame)
    rows = []
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        rows += strided_rows(begin, end, T, stride)

    targets = sum(n - before for _, n, before in rows)
    if tokens and tokens < targets:
        take = math.ceil(tokens * len(rows) / targets)
        rows = [rows[i * len(rows) // take] for i in range(take)]
    return rows


def token_losses(model, tokens, rows, T, on):
    """Nats of each target, and the targets: fp32 and int64 (rows, longest row) on the CPU; -1 where a row has ended."""
    x, y, _ = fill_rows(tokens, [[(first, n)] for first, n, _ in rows], T)
    longest = max(n for _, n, _ in rows)
    x, y = x[:, :longest], y[:, :longest]
    with on.autocast():
        losses = model(x.to(on.device), y.to(on.device), reduction="none")[1]
    return losses.float().cpu(), y


@torch.no_grad()
def measure(model, sources, on, bytes_per_token, world, T, stride, n_rows, frame=None, tokens=0):
    """Losses in nats per token and bits per byte: {"loss": {"mixed", "language", "kind", "source"}, "bits_per_byte"}.

    on: machine.Device; world: machine.World; n_rows: windows at once; bytes_per_token: float (V,); frame, tokens: see
    `windows_of`. "mixed" gives each source the same share, whatever the length of its text.
    """
    windows = [windows_of(source, T, stride, frame, tokens) for source in sources]
    progress, begun, done = Progress(), time.monotonic(), 0
    total = sum(n for rows in windows for _, n, _ in rows)

    sums = torch.zeros(len(sources), 3, dtype=torch.float64)  # nats, tokens and bytes of each source
    for i, source in enumerate(sources):
        mine = sorted(windows[i][world.rank::world.size], key=lambda row: row[1])  # alike in length, so little padding
        for k in range(0, len(mine), n_rows):
            some = mine[k:k + n_rows]
            losses, y = token_losses(model, source.val, some, T, on)
            for row, (_, _, before) in zip(y, some):
                row[:before] = -1
            counted = y[y >= 0]
            sums[i, 0] += losses[y >= 0].double().sum()
            sums[i, 1] += len(counted)
            sums[i, 2] += float(bytes_per_token[counted].sum())

            done += world.size * sum(n for _, n, _ in some)
            left = (time.monotonic() - begun) / done * max(0, total - done)
            progress.show(f"{source.name}: {min(done, total) / total:.0%} of all text, {clock(left)} left")
    progress.clear()

    sums = world.sum(sums)
    longest = sums[:, 1].max()
    shares = torch.where(sums[:, 1:2] > 0, longest / sums[:, 1:2], 1.0)
    return report.grouped(sums * shares, sources, sources, groups=("language", "kind"))


@torch.no_grad()
def by_position(model, sources, on, T, n_rows, frame=None, tokens=0):
    """Mean loss of the targets at each position of a window of T, in nats per token: float64 (sources, T).

    Position p has p + 1 tokens to look at. nan where no window is that long. The windows follow each other without
    overlap; if documents are read by themselves (`frame`, see `windows_of`), each begins with a document, so that the
    late positions are those of long documents alone.
    """
    sums, counts = (torch.zeros(len(sources), T, dtype=torch.float64) for _ in range(2))
    for i, source in enumerate(sources):
        rows = windows_of(source, T, T, frame, tokens)
        if frame is not None:
            begins = set(document_edges(source.val, *frame).tolist())
            rows = [row for row in rows if row[0] in begins]
        rows.sort(key=lambda row: row[1])
        for k in range(0, len(rows), n_rows):
            losses, y = token_losses(model, source.val, rows[k:k + n_rows], T, on)
            longest = losses.size(1)
            sums[i, :longest] += torch.where(y >= 0, losses, 0.0).double().sum(0)
            counts[i, :longest] += (y >= 0).sum(0)
    return sums / counts


def draw_positions(losses, sources, path, trained, title):
    """Draws the loss over the position. losses: see `by_position`; trained: positions that training knew."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook may have left one that is not here
    import matplotlib.pyplot as plt

    # a point for each eighth of a doubling, as single positions scatter
    T = losses.size(1)
    edges = sorted({round(2 ** (k / 4)) - 1 for k in range(4 * math.ceil(math.log2(T + 1)))} | {T})
    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=100, layout="constrained")
    for source, curve in zip(sources, losses):
        points = []
        for first, end in zip(edges, edges[1:]):
            mean = curve[first:end].nanmean().item()
            if not math.isnan(mean):
                points.append(((first + end + 1) / 2, mean))
        ax.plot(*zip(*points), marker="o", ms=3, lw=1.6, label=source.name)
    if trained < T:
        ax.axvline(trained, color="#888888", lw=1, ls="--", label=f"longest row in training: {trained:,}")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set(xlabel="tokens of context", ylabel="loss, nats per token", title=title)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    with replacing(path) as f:
        fig.savefig(f, format="png")
    plt.close(fig)
