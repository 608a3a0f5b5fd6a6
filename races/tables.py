"""Tables and the figure of an experiment, made of its results."""
import math
import os
import statistics

from common import columns, replacing
from races.verdicts import compare


def finished(results):
    """Their Measured, or None if one of them diverged or was not made."""
    if all(result and result.measured for result in results):
        return [result.measured for result in results]
    return None


def mean(results):
    """Mean bits per byte over the seeds; infinite if one of the runs diverged or was not made."""
    return statistics.mean(result.bits_per_byte if result else math.inf for result in results)


def mean_and_spread(results):
    """'mean ± standard deviation' of bits per byte over the seeds, or what is missing."""
    measured = finished(results)
    if not measured:
        words = ["unfinished" if result is None else "diverged" for result in results
                 if result is None or not result.measured]
        return ", ".join(f"{words.count(word)} of {len(results)} {word}" for word in sorted(set(words)))
    values = [one.bits_per_byte for one in measured]
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text


def of_same_text(first, second):
    """Whether two Measured are of the same documents, but for a hundredth of their bytes."""
    if len(first.bytes) != len(second.bytes):
        return False
    return sum(abs(a - b) for a, b in zip(first.bytes, second.bytes)) <= 0.01 * sum(first.bytes)


def verdict_cells(results, others):
    """Difference, interval and verdict of the first kind of runs, as three cells."""
    first, second = finished(results), finished(others)
    if not first or not second:
        return ["", "", ""]
    if not of_same_text(first[0], second[0]):  # another tokenizer's windows, and not all of the text
        return [f"{mean(results) - mean(others):+.3f}", "", "other text"]
    verdict = compare(first, second)
    interval = f"{verdict.low:+.3f} to {verdict.high:+.3f}"
    if math.isinf(verdict.low):
        interval = ""
    return [f"{verdict.difference:+.3f}", interval, verdict.word]


def markdown(rows):
    """Rows of cells, the first one the titles, as a table in Markdown."""
    first, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, "|" + "---|" * len(rows[0]), *rest])


def write(path, rows, note=""):
    """Prints the table and a note below it, and writes both as Markdown."""
    print("\n".join(columns(rows)))
    text = markdown(rows) + "\n"
    if note:
        print(note)
        text += f"\n{note}\n"
    with replacing(path) as f:
        f.write(text.encode())


def draw(path, curves):
    """Draws validation bits per byte over tokens and over seconds of training.

    curves: (name, recipe) -> curves of its seeds, [tokens, seconds, bits per byte] of each evaluation; the mean is
    drawn. A name has one colour, and each recipe but the first one is dotted.
    """
    os.environ["MPLBACKEND"] = "Agg"  # a notebook may have left one that is not here
    import matplotlib.pyplot as plt
    import numpy as np

    fig, axes = plt.subplots(1, 2, figsize=(11, 5.4), dpi=100, layout="constrained", sharey=True)
    colours, plain = {}, next(iter(curves))[1]
    for (name, recipe), seeds in curves.items():
        points = min(len(curve) for curve in seeds)  # a run that diverged has fewer
        if not points:
            continue
        colour, line = colours.setdefault(name, f"C{len(colours)}"), "-" if recipe == plain else ":"
        tokens, seconds, bits = np.mean([curve[:points] for curve in seeds], axis=0).T
        for ax, x in zip(axes, (tokens / 1e6, seconds)):
            ax.plot(x, bits, color=colour, lw=1.6, ls=line, label=f"{name}, {recipe} recipe")
    axes[0].set(xlabel="million tokens", ylabel="validation bits per byte")
    axes[1].set(xlabel="seconds of training")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with replacing(path) as f:
        fig.savefig(f, format="png")
    plt.close(fig)
