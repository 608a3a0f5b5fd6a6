"""What a run tells: the lines of the log, tables of losses, best_validation.json, and the picture loss.png.

A result of an evaluation is a nested dict, {"loss": {"mixed": x, "language": {...}, "source": {...}}, "bits_per_byte":
the same}; fine-tuning adds "base" beside "mixed", and relevance_accuracy and relevance_gap beside "loss". `results` are
those of the raw and the averaged weights, {"raw": result, "ema": result}.
"""
import math
import os
from pathlib import Path

from common import UserError, clock, columns, quoted, replacing

# ---------------------------------------------------------------------------------------------------- the log

# How the log's numbers look on the terminal. A number that is not here is shown with its name; None: only in the file
FORMATS = {"step": None, "tokens": None, "elapsed": None, "train_loss": "loss {:.3f}",
           "train_bits_per_byte": "{:.2f} bits/byte", "relevance_loss": "relevance {:.3f}", "lr": "lr {:.2g}",
           "grad_norm": "|g| {:.2f}", "tokens_per_s": "{:,.0f} tok/s", "mfu": "MFU {:.0%}"}


def log_line(row, max_steps, seconds_left):
    """The row of a training step for the terminal. A narrow terminal cuts off its end."""
    parts = [f"step {row['step']:>6,}/{max_steps:,}"]
    for name, value in row.items():
        form = FORMATS.get(name, name + " {:.4g}")
        if form is not None:
            parts.append(form.format(value))
        if name == "tokens_per_s":
            parts.append(f"{clock(seconds_left)} left")
    return "  ".join(parts)


def evaluation_row(results, step, tokens, elapsed):
    """An evaluation as a row of metrics.jsonl. Numbers beside the losses are in it only if they are finite."""
    row = dict(step=step, tokens=tokens,
               val_loss={kind: result["loss"] for kind, result in results.items()},
               val_bits_per_byte={kind: result["bits_per_byte"] for kind, result in results.items()})
    names = {name for result in results.values() for name in result} - {"loss", "bits_per_byte"}
    for name in sorted(names):
        values = {kind: result[name] for kind, result in results.items()}
        if all(map(math.isfinite, values.values())):
            row[name] = values
    return row | dict(elapsed=elapsed)


def evaluation_line(row, what, winner):
    """The same row for the terminal: the mixed losses and, of the weights that won, the languages and the rest."""
    bits = row["val_bits_per_byte"]
    line = f"eval {row['step']:>6,}  {what} {bits['raw']['mixed']:.3f} bits/byte"
    if "ema" in bits:
        line += f", EMA {bits['ema']['mixed']:.3f}"
    languages = bits[winner]["language"]
    if len(languages) > 1:
        line += "".join(f"  {name} {value:.3f}" for name, value in languages.items())
    if "base" in bits[winner]:
        line += f"  base {bits[winner]['base']:.3f}"
    if "relevance_accuracy" in row:
        line += f"  relevance {row['relevance_accuracy'][winner]:.1%}"
    for name, scores in row.get("tasks", {}).items():
        line += f"  {name} {scores[winner]:.4g}"
    return line


# ---------------------------------------------------------------------------------------------------- the beginning

def source_lines(loader, fraction=1.0):
    """A line for each source of the loader, which deals this fraction of all rows."""
    lines = []
    for i, source in enumerate(loader.sources):
        share = f"{loader.share[i]:.0%} of the run"
        if fraction != 1:
            share = f"{loader.row_share[i] * fraction:.0%} of the rows"
        line = (f"{source.name:<12} {source.language}/{source.kind}, {len(source.train):,} training and "
                f"{len(source.val):,} validation tokens, {share}")
        if loader.frame is not None:
            line += f", whole documents in {loader.per_epoch[i]:,} rows, {1 - loader.fill[i]:.2%} of them padding"
        lines.append(line)
    return lines


def run_lines(trainer):
    """The lines that a run begins with: the model, what it is trained on, the machine."""
    s, task, on, world, plan = trainer.s, trainer.task, trainer.on, trainer.world, trainer.plan
    rows = "windows" if s.pack == "stream" else "rows"
    lines = [f"{s.model:<12} {trainer.model.n_params / 1e6:,.2f}M parameters ({Path(plan.module.__file__).name}), "
             f"context {plan.cfg.context_length:,}, training on {rows} of {task.T:,}", *task.about()]

    how = f", {trainer.how}" if trainer.how else ""
    processes = f"{world.size} x " if world.size > 1 else ""
    optimizers = f"AdamW {trainer.optimizers.n_other} tensors"
    if trainer.optimizers.n_matrices:
        optimizers = f"{s.optimizer} {trainer.optimizers.n_matrices} matrices, {optimizers}"
    n_micro = task.rows // world.size // task.micro
    lines.append(f"{on.device.type:<12} {str(on.dtype)[6:]}{how}, {processes}{on.chip}; {optimizers}; "
                 f"{s.max_steps:,} steps of {s.batch_tokens:,} tokens, {n_micro} x {task.micro} rows each")
    if plan.kind == "resumed":
        lines.append(f"{'resumed':<12} {s.out} at step {trainer.state.step:,}")
    return lines


# ---------------------------------------------------------------------------------------------------- the end

def result_lines(task, best, result, xz):
    """The lines about the best weights. best: their checkpoint; result: of their last evaluation; xz: see below."""
    average = " (EMA)" if best["use_ema"] else ""
    beside = f"; xz -9 needs {xz:.3f}" if xz else ""
    lines = [f"{'best':<12} step {best['step']:,}{average}: {result['bits_per_byte']['mixed']:.3f} bits/byte over the "
             f"{task.measured_text}{beside}"]
    if len(task.sources) > 1 or not task.is_text:
        lines += task.table(result)
    return lines


def last_line(trainer):
    """What a run wrote, and the next command."""
    task, folder = trainer.task, trainer.folder
    flags = ""
    if not task.is_text:
        flags = " --chat"
    elif trainer.s.sample_prompt:
        flags = f" --prompt={quoted(trainer.s.sample_prompt)}"
    return (f"wrote {folder.path}: {' '.join(folder.files())}        "
            f"next: python sample.py --ckpt={quoted(folder.path / 'best.pt')}{flags}")


class Diverged(UserError):
    """A gradient is not finite."""


def divergence(trainer, loss, grad_norm):
    """The error for a gradient that is not finite."""
    state, kept = trainer.state, "no checkpoint was written yet"
    if state.saved_step >= 0:
        kept = f"{trainer.folder.path / 'ckpt.pt'} holds step {state.saved_step}"
    return Diverged(f"the gradient is not finite at step {state.step + 1} (loss {float(loss):.3g}, gradient norm "
                    f"{grad_norm}): stopped; {kept}. A lower learning rate or --dtype=float32 may help")


# ---------------------------------------------------------------------------------------------------- losses

def grouped(sums, sources, mixed, groups=("language",)):
    """Losses and bits per byte, see the top of this file, from `sums`: nats, tokens and bytes (sources, 3), float64.

    mixed: the sources that "mixed" is made of. groups: attributes of a source by which others are made.
    """
    def values(value):
        """value(nats, tokens, bytes) of some sources together."""
        def of(chosen):
            return value(*sums[[i for i, source in enumerate(sources) if source in chosen]].sum(0).tolist())

        result = dict(mixed=of(mixed))
        for group in groups:
            names = sorted({getattr(source, group) for source in sources})
            result[group] = {name: of([s for s in sources if getattr(s, group) == name]) for name in names}
        return result | dict(source={source.name: of([source]) for source in sources})

    return dict(loss=values(lambda nats, n, size: nats / n if n else math.nan),
                bits_per_byte=values(lambda nats, n, size: nats / math.log(2) / size if size else math.nan))


def perplexity(loss):
    return math.exp(min(loss, 700))


def loss_table(result, sources, mixed="all sources"):
    """Lines of the terminal: loss, perplexity and bits per byte of each source, each group, and of all (`mixed`)."""
    loss, bits = result["loss"], result["bits_per_byte"]
    rows = [(s.name, f"{s.language}/{s.kind}", loss["source"][s.name], bits["source"][s.name]) for s in sources]
    for group in ("language", "kind"):
        members = loss.get(group, {})
        if len(members) > 1:
            rows += [(name, group, members[name], bits[group][name]) for name in members]
    if len(sources) > 1:
        rows.append(("mixed", mixed, loss["mixed"], bits["mixed"]))
    if "base" in loss:
        rows.append(("base", "base data", loss["base"], bits["base"]))
    return columns([
        (f"{name:<11}", what, f"loss {nats:.4f}", f"perplexity {perplexity(nats):,.1f}", f"{b:.3f} bits/byte")
        for name, what, nats, b in rows])


def best_validation(result, sources, **about):
    """What best_validation.json says of the best step, under the names of the 1gpu-llm card: losses in nats per token,
    their perplexities, and bits per byte."""
    def finite(x):  # JSON knows no NaN
        return x if math.isfinite(x) else None

    def entry(nats, bits, loss_name="val_loss", end=""):
        return {loss_name + end: finite(nats), "ppl" + end: finite(perplexity(nats)),
                "bits_per_byte" + end: finite(bits)}

    loss, bits = result["loss"], result["bits_per_byte"]
    record = dict(about)
    record |= {name: finite(value) for name, value in result.items() if name not in ("loss", "bits_per_byte")}
    record |= entry(loss["mixed"], bits["mixed"], end="_mixed")
    for name in loss["language"]:
        record |= entry(loss["language"][name], bits["language"][name], end=f"_{name}")
    if "base" in loss:
        record |= entry(loss["base"], bits["base"], end="_base")
    record["sources"] = {
        s.name: dict(language=s.language, kind=s.kind, **entry(loss["source"][s.name], bits["source"][s.name]))
        for s in sources}
    return record


def xz_bits_per_byte(sources, tokenizer, limit=8_000_000):
    """What `xz -9` needs for the validation text: a language model is a compressor too. None above `limit` bytes, and
    if this Python was built without xz."""
    try:
        import lzma
    except ImportError:
        return None
    if sum(len(source.val) for source in sources) > limit:  # a token is at least a byte, nearly always more
        return None
    text = "".join(tokenizer.decode(source.val.tolist()) for source in sources).encode()
    if not 0 < len(text) <= limit:
        return None
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


# ---------------------------------------------------------------------------------------------------- the picture

COLORS = dict(raw="#33658a", ema="#d1495b")


def validation_curves(rows, value):
    """{"raw": points, "ema": points}: (million tokens, value(row, kind)) of the evaluations that have it."""
    curves = {}
    for kind in COLORS:
        points = [(row["tokens"] / 1e6, value(row, kind)) for row in rows]
        curves[kind] = [point for point in points if point[1] is not None]
    return curves


def draw_loss(rows, path, title, xz=None):
    """loss.png: bits per byte of the training batches and of the validation text, over the tokens trained on.

    rows: of metrics.jsonl. xz: bits per byte of `xz -9`, as a line. Fine-tuning shows the same for replies and, beside
    it, the bits per byte of the base data and the relevance accuracy; benchmarks stand there too. Without matplotlib
    one line says so.
    """
    os.environ["MPLBACKEND"] = "Agg"  # a notebook may have left one that is not here
    try:
        import matplotlib
    except ImportError:
        print(f"no {path}: it is drawn by matplotlib, which is not installed")
        Path(path).unlink(missing_ok=True)
        return
    import matplotlib.pyplot as plt

    # what there is to draw
    train = [row for row in rows if "train_loss" in row]
    val = [row for row in rows if "val_loss" in row and not row.get("final")]
    bits = validation_curves(val, lambda row, kind: row["val_bits_per_byte"].get(kind, {}).get("mixed"))
    base = validation_curves(val, lambda row, kind: row["val_bits_per_byte"].get(kind, {}).get("base"))
    relevance = validation_curves(val, lambda row, kind: row.get("relevance_accuracy", {}).get(kind))
    beside = {"bits per byte of the base data": base, "relevance accuracy": relevance}
    beside = {name: curves for name, curves in beside.items() if any(curves.values())}
    is_tuning = bool(beside)
    for name in sorted({name for row in val for name in row.get("tasks", {})}):
        beside[name] = validation_curves(val, lambda row, kind: row.get("tasks", {}).get(name, {}).get(kind))

    # the loss
    widths = [1.5, *[1] * len(beside)] if beside else [1]
    fig, axes = plt.subplots(1, 1 + len(beside), figsize=(8 + 2 * len(beside), 4.5), dpi=100, layout="constrained",
                             squeeze=False, width_ratios=widths)
    ax, *others = axes[0]
    ax.plot([row["tokens"] / 1e6 for row in train], [row["train_bits_per_byte"] for row in train],
            color="#b9c7d6", lw=1, label="training batches")
    names = dict(raw="validation, raw weights", ema="validation, EMA weights")
    for kind, points in bits.items():
        if points:
            label = f"{names[kind]}: {points[-1][1]:.3f} at the end"
            ax.plot(*zip(*points), color=COLORS[kind], marker="o", ms=3.5, lw=1.6, label=label)
    if xz:
        ax.axhline(xz, color="#888888", lw=1, ls="--", label=f"xz -9 on the validation text: {xz:.3f}")
    shown = [y for points in bits.values() for _, y in points if not math.isnan(y)]  # nan: every character is unknown
    lowest = min(shown, default=1)
    bottom = min([row["train_bits_per_byte"] for row in train if row["train_bits_per_byte"] > 0], default=lowest)
    ax.set(ylabel="bits per byte of replies" if is_tuning else "bits per byte", title=title,
           ylim=(0.9 * min(lowest, bottom), max(3.2 * lowest, 1.1 * (xz or 0))))

    # beside it what fine-tuning measures, and benchmarks
    for other, (name, curves) in zip(others, beside.items()):
        for kind, points in curves.items():
            if points:
                other.plot(*zip(*points), color=COLORS[kind], marker="o", ms=3.5, lw=1.6,
                           label=f"{points[-1][1]:.3f} at the end")
        other.set(title=name)

    for each in axes[0]:
        each.set(xlabel="million training tokens")
        each.grid(alpha=0.25)
        each.legend(frameon=False)
        each.spines[["top", "right"]].set_visible(False)
    with replacing(path) as f:
        fig.savefig(f, format="png")
    plt.close(fig)
