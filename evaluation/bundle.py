"""The evaluation of the 1gpu-llm card in a folder, and checkpoints side by side.

    benchmark_report.md           the whole in words, tables and examples; read this
    eval_summary.json             the main numbers under the card's names
    benchmark_metrics.json        all numbers: losses, behaviour of greedy, of recommended and of validation text
    benchmark_source_losses.json  loss, perplexity and bits per byte of each source
    benchmark_scores.json         scores of lm-evaluation-harness, if --tasks asked for some, and of the presets
    comparison.json               the checkpoints of the run, ranked by the card's rule
    probe_summary.json            see evaluation/probes.py
    decoding_report.md            the search for decoding parameters, see evaluation/decoding.py
    decoding_summary.json         its result
    tuning_leaderboard.csv        all presets on the tuning prompts, and on the holdout prompts: holdout_leaderboard.csv
    tuning_generations.jsonl      what each preset wrote, with the validation text; and holdout_generations.jsonl
    recommended_decoding_params.json  what sample.py uses

The files hold no times and no paths, so that the same checkpoint, data and seed give the same bytes on one machine.
"""
import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import report
import run
import runfolder
from common import UserError, columns
from evaluation import behaviour, decoding, probes
from evaluation.decoding import MAX_NEW_TOKENS, MERITS, PRESETS, RunText
from runfolder import RECOMMENDED


# ---------------------------------------------------------------------------------------------------- comparison

def checkpoint_row(name, checkpoint, losses, measured):
    """What `compare` needs to know of a checkpoint.

    checkpoint: its dict, see run.read_checkpoint. losses: {"loss": {"mixed": x}, "bits_per_byte": {"mixed": x}}, or
    None if they were not measured. measured: its behaviour.
    """
    row = dict(checkpoint=name, model=checkpoint["model_name"], step=checkpoint["step"], tokens=checkpoint["tokens"],
               tokenizer=hashlib.sha256(checkpoint["tokenizer"].encode()).hexdigest()[:12],
               val_loss_mixed=None, bits_per_byte_mixed=None)
    if losses is not None:
        row |= dict(val_loss_mixed=losses["loss"]["mixed"], bits_per_byte_mixed=losses["bits_per_byte"]["mixed"])
    return row | measured


def compare(rows):
    """Ranks rows of `checkpoint_row` by the card's rule, the lowest mixed validation loss; rows without one come last.

    Losses in nats per token compare nothing between different tokenizers. There the bits per byte decide.
    """
    ranked_by = "val_loss_mixed"
    if len({row["tokenizer"] for row in rows}) > 1:
        ranked_by = "bits_per_byte_mixed"

    def key(row):
        is_missing = row[ranked_by] is None
        return is_missing, 0.0 if is_missing else row[ranked_by]

    ranked = sorted(rows, key=key)
    return dict(ranked_by=ranked_by, best=ranked[0]["checkpoint"],
                checkpoints=[dict(rank=i, **row) for i, row in enumerate(ranked, 1)])


def shown(value, form="{:.3f}"):
    return "-" if value is None else form.format(value)


def comparison_table(comparison):
    """The comparison as rows of strings, the first of which has the titles."""
    titles = ["rank", "checkpoint", "step", "val loss", "bits/byte", "distinct-2", "repeat a 4-gram", "end in a loop",
              "keep the language"]
    rows = [titles]
    for row in comparison["checkpoints"]:
        rows.append([
            str(row["rank"]), row["checkpoint"], f"{row['step']:,}", shown(row["val_loss_mixed"], "{:.4f}"),
            shown(row["bits_per_byte_mixed"]), f"{row['distinct_2']:.3f}", f"{row['repeated_4gram_rate']:.1%}",
            f"{row['loop_rate']:.1%}", f"{row['language_consistency_mean']:.1%}"])
    return rows


def comparison_lines(comparison):
    """The comparison for the terminal."""
    return columns(comparison_table(comparison))


def run_comparison(path, checkpoint, losses, weights, run_text, device):
    """The comparison of all checkpoints in the folder of `path`, of which that one has the `weights` "EMA" or "raw".

    Their losses are those that the run measured at their steps, from metrics.jsonl. If it did not measure the one at
    `path`, that one alone is in the comparison, with `losses`. The behaviour is that of the likeliest text.
    """
    path = Path(path)
    evaluations = {row["step"]: row for row in runfolder.read_rows(path.with_name("metrics.jsonl"))
                   if "val_loss" in row and not row.get("final")}
    paths = {path}
    if checkpoint["step"] in evaluations:
        for pattern in ("best.pt", "ckpt.pt", "step_*.pt"):
            paths.update(path.parent.glob(pattern))

    rows, measured = [], {}  # measured: (step, weights) -> behaviour; best.pt and ckpt.pt often hold the same weights
    for other in sorted(paths, key=lambda other: other.name):
        model, tokenizer, loaded = run.load_checkpoint(other, device, weights == "EMA" if other == path else None)
        step, kind = loaded["step"], weights.lower() if other == path else run.weights_of(loaded)
        if (step, kind) not in measured:
            measured[step, kind] = decoding.greedy_behaviour(model, tokenizer, run_text)

        other_losses = None
        if step in evaluations and kind in evaluations[step]["val_loss"]:
            row = evaluations[step]
            other_losses = dict(loss=row["val_loss"][kind], bits_per_byte=row["val_bits_per_byte"][kind])
        elif other == path:
            other_losses = losses
        rows.append(checkpoint_row(other.name, loaded, other_losses, measured[step, kind]))
    return compare(rows)


# ---------------------------------------------------------------------------------------------------- what was found

@dataclass
class Findings:
    """All that the bundle is written from."""
    about: dict  # the checkpoint: file, model, step, tokens, parameters, weights; and the seed
    losses: dict  # report.best_validation of its losses
    scores: dict  # task -> {"score": x, "stderr": y, "metric": "...", ...}, of lm-evaluation-harness
    run_text: RunText
    sweep: decoding.Sweep
    probes: list  # of dicts, see probes.run_probes
    comparison: dict

    @property
    def greedy(self):
        return self.sweep.on_holdout("greedy")

    @property
    def recommended(self):
        return self.sweep.on_holdout(self.sweep.winner)


def examine(path, model, tokenizer, checkpoint, sources, losses, on, weights, probe_list, scores, seed):
    """Measures all that `losses` and `scores` do not hold yet. Returns Findings."""
    about = dict(checkpoint=Path(path).name, model=checkpoint["model_name"], step=checkpoint["step"],
                 tokens=checkpoint["tokens"], parameters=model.n_params, weights=weights, seed=seed)
    run_text = RunText(sources, tokenizer, model.max_len // 2)
    return Findings(
        about, report.best_validation(losses, sources), scores or {}, run_text,
        decoding.sweep(model, tokenizer, run_text, seed), probes.run_probes(model, tokenizer, probe_list, on),
        run_comparison(path, checkpoint, losses, weights, run_text, on.device))


def sampling_flags(preset):
    """The preset as flags of sample.py: the temperature, and what changes anything."""
    neutral = decoding.Preset("").rules()
    return " ".join(f"--{name}={value:g}" for name, value in preset.rules().items()
                    if name == "temperature" or value != neutral[name])


def conclusion(found):
    """What was found, in a few sentences."""
    about, losses, sweep = found.about, found.losses, found.sweep
    greedy, best = found.greedy.behaviour, found.recommended.behaviour
    sources = ", ".join(losses["sources"])
    sentences = [
        f"{about['checkpoint']} is a {about['model']} of {about['parameters'] / 1e6:,.2f}M parameters after "
        f"{about['tokens'] / 1e6:,.1f}M training tokens ({about['weights']} weights). It needs "
        f"**{shown(losses['bits_per_byte_mixed'])} bits per byte** for the validation text of {sources} "
        f"(loss {shown(losses['val_loss_mixed'])}, perplexity {shown(losses['ppl_mixed'], '{:,.1f}')})."]
    if sweep.winner == "greedy":
        sentences.append("No way of sampling was better than to take the likeliest token each time.")
    else:
        sentences.append(
            f"Of its likeliest texts, **{greedy['loop_rate']:.0%} end in a loop** and "
            f"{greedy['repeated_4gram_rate']:.0%} repeat four tokens. Sampled as recommended (`{sweep.winner}`: "
            f"`{sampling_flags(PRESETS[sweep.winner])}`), **{best['loop_rate']:.0%}** and "
            f"{best['repeated_4gram_rate']:.0%} do.")

    # is it as good on other prompts?
    first, rank = sweep.holdout[0], 1 + sweep.holdout.index(found.recommended)
    scores = f"{found.recommended.score:.3f} ± {found.recommended.error:.3f}"
    if rank == 1:
        sentences.append("That preset was the best one on the tuning prompts, and it is on the holdout prompts too.")
    elif sweep.is_confirmed:
        sentences.append(
            f"That preset was the best one on the tuning prompts; on the holdout prompts it is number {rank}, and "
            f"`{first.name}` is ahead by less than two standard errors of their difference ({first.score:.3f} against "
            f"{scores}).")
    else:
        sentences.append(
            f"That preset was the best one on the tuning prompts, but the holdout prompts do not confirm it: there "
            f"`{first.name}` is better ({first.score:.3f} against {scores}).")
    return sentences


# ---------------------------------------------------------------------------------------------------- the reports

def cell(text):
    """Any text as a cell of a Markdown table."""
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(text.strip(), quote=False))
    return escaped.replace("\r", "").replace("\n", "<br>")


def table(rows):
    """Rows of strings, the first of which has the titles, as lines of a Markdown table."""
    line = "|" + "---|" * len(rows[0])
    titles, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return [titles, line, *rest]


def before_and_after(found):
    """(title, Trial) on the holdout prompts: the likeliest text, the recommended preset, the validation text."""
    trials = [("greedy", found.greedy)]
    if found.recommended is not found.greedy:
        trials.append((f"{found.sweep.winner} (recommended)", found.recommended))
    return [*trials, ("the validation text itself", found.sweep.holdout_text)]


def behaviour_rows(trials):
    """Rows for `table`: a column for each of (title, Trial)."""
    rows = [["", *(name for name, _ in trials)]]
    for name in trials[0][1].behaviour:
        form = "{:.3f}" if name == "distinct_2" else "{:.1%}"
        rows.append([name, *(form.format(trial.behaviour[name]) for _, trial in trials)])
    rows.append(["known pairs of words", *(f"{trial.known_pairs:.1%}" for _, trial in trials)])
    return rows


def example_numbers(prompts):
    """Numbers of the first holdout prompt of each of two sources, or of the first two."""
    first_of = {}
    for i, prompt in enumerate(prompts):
        first_of.setdefault(prompt.source, i)
    numbers = list(first_of.values())[:2]
    if len(numbers) < 2:
        numbers = list(range(len(prompts)))[:2]
    return numbers


def benchmark_report(found):
    """The lines of benchmark_report.md."""
    about, prompts = found.about, found.run_text.holdout
    lines = [f"# {about['model']}, step {about['step']:,}", "", " ".join(conclusion(found)), ""]

    trials = before_and_after(found)
    lines += ["## How it writes", "",
              f"Behind {len(prompts)} beginnings of the validation text, {MAX_NEW_TOKENS} tokens each.", "",
              *table(behaviour_rows(trials)), "",
              "Not picked by hand: the first holdout prompts.", "",
              *table([["prompt", *(name for name, _ in trials)]] + [
                  [cell(prompts[i].text), *(cell(trial.samples[i].text) for _, trial in trials)]
                  for i in example_numbers(prompts)]), ""]

    lines += ["## Losses", "", *table([["", "", "loss", "perplexity", "bits per byte"], *loss_rows(found.losses)]), ""]
    lines += ["## Probes", "",
              *table([["prompt", "expected", "rank", "probability", "perplexity of the word", "what it says"]] + [
                  [cell(probe["prompt"]), cell(probe["expected"]), f"{probe['correct_token_rank']:,}",
                   f"{probe['correct_token_probability']:.2g}", f"{probe['perplexity_on_target_sequence']:,.1f}",
                   cell(probe["continuation"])] for probe in found.probes]), ""]
    if found.scores:
        rows = [[name, entry.get("metric", ""), f"{entry['score']:.4g}", shown(entry.get("stderr"), "± {:.2g}")]
                for name, entry in found.scores.items()]
        lines += ["## Benchmarks", "", *table([["task", "", "score", "standard error"], *rows]), ""]
    lines += ["## Checkpoints of the run", "",
              f"The lowest {found.comparison['ranked_by']} leads; behaviour is that of the likeliest text.", "",
              *table(comparison_table(found.comparison)), ""]
    accuracy = ", ".join(f"{share:.1%} ({language})" for language, share in found.run_text.accuracy.items())
    lines += ["## How it was measured", "",
              "- Repetition is counted in tokens, on the continuation alone, without the end token.",
              f"- Languages are told apart by character trigrams of the training text. Of held-out pieces of "
              f"{behaviour.PIECE} characters, this identifies {accuracy}.",
              "- A pair of words is known if it occurs in the training text (in 2 million tokens of it at most).",
              "- The losses of the run's checkpoints are those that the run measured itself.",
              f"- Samples are drawn with seed {about['seed']}. How the preset was chosen is in decoding_report.md."]
    return lines


def loss_rows(losses):
    """Rows for `table`, of what report.best_validation gives."""
    def row(name, what, values, end=""):
        return [name, what, shown(values[f"val_loss{end}"], "{:.4f}"), shown(values[f"ppl{end}"], "{:,.1f}"),
                shown(values[f"bits_per_byte{end}"])]

    rows = [row(name, f"{entry['language']}/{entry['kind']}", entry) for name, entry in losses["sources"].items()]
    languages = sorted({entry["language"] for entry in losses["sources"].values()})
    if len(languages) > 1:
        rows += [row(language, "language", losses, f"_{language}") for language in languages]
    return [*rows, row("mixed", "all sources", losses, "_mixed")]


def summary_lines(found):
    """What the terminal shows of a bundle: its conclusion, and how the model writes before and after."""
    sentences = [re.sub(r"\*\*|`", "", sentence) for sentence in conclusion(found)]
    return [*sentences, *columns(behaviour_rows(before_and_after(found)))]


def leaderboard_rows(trials, text):
    """Rows for `table` of Trials, the best one first, and of the validation text."""
    rows = [["", "preset", "score", "distinct-2", "repeat a 4-gram", "end in a loop", "keep the language",
             "known pairs of words"]]
    for rank, trial in enumerate([*trials, text], 1):
        measured, place, points = trial.behaviour, str(rank), f"{trial.score:.3f} ± {trial.error:.3f}"
        if trial is text:
            place, points = "", ""
        rows.append([place, trial.name, points, f"{measured['distinct_2']:.3f}",
                     f"{measured['repeated_4gram_rate']:.1%}", f"{measured['loop_rate']:.1%}",
                     f"{measured['language_consistency_mean']:.1%}", f"{trial.known_pairs:.1%}"])
    return rows


def decoding_report(found):
    """The lines of decoding_report.md."""
    sweep, run_text = found.sweep, found.run_text
    winner = PRESETS[sweep.winner]
    lines = [f"# Decoding of {found.about['model']}, step {found.about['step']:,}", "", *conclusion(found)[1:], "",
             "```", f"python sample.py --ckpt=out/RUN/{found.about['checkpoint']} {sampling_flags(winner)}", "```", ""]
    lines += [f"## {len(run_text.tuning)} tuning prompts", "",
              *table(leaderboard_rows(sweep.tuning, sweep.tuning_text)), "",
              f"## {len(run_text.holdout)} holdout prompts", "",
              *table(leaderboard_rows(sweep.holdout, sweep.holdout_text)), ""]
    lines += ["## The score", "",
              "How far do the samples have each of these merits, and how far does the validation text behind the same "
              f"prompts: {'; '.join(MERITS)}? The score is the product of the ratios, of which none counts as more "
              "than 1. Repetition costs variety; words drawn at random cost known pairs of words. ± is the standard "
              "error over the prompts.", "",
              "## The presets", "",
              *table([["preset", "parameters", "why"]] + [
                  [name, f"`{sampling_flags(preset)}`", preset.why] for name, preset in PRESETS.items()]), ""]

    lines += ["## The same prompts, by all presets", ""]
    for i in example_numbers(run_text.holdout):
        rows = [[trial.name, cell(trial.samples[i].text)] for trial in [*sweep.holdout, sweep.holdout_text]]
        lines += [f"### {cell(run_text.holdout[i].text).replace('<br>', ' ')}", "", *table([["", "text"], *rows]), ""]
    return lines


# ---------------------------------------------------------------------------------------------------- the other files

def as_json(value):
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def leaderboard_csv(trials, text):
    """A leaderboard as CSV; the validation text comes last and has no rank."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    rules = decoding.Preset("").rules()
    writer.writerow(["rank", "preset", "score", "standard_error", *text.behaviour, "known_word_pairs", *rules])
    for rank, trial in enumerate(trials, 1):
        numbers = [trial.score, trial.error, *trial.behaviour.values(), trial.known_pairs]
        writer.writerow([rank, trial.name, *(f"{x:.6g}" for x in numbers), *PRESETS[trial.name].rules().values()])
    numbers = [*text.behaviour.values(), text.known_pairs]
    writer.writerow(["", text.name, "", "", *(f"{x:.6g}" for x in numbers), *[""] * len(rules)])
    return out.getvalue()


def generations(trials, text, prompts, identifier):
    """What was written, a JSON object a line."""
    lines = []
    for trial in [*trials, text]:
        for prompt, sample in zip(prompts, trial.samples):
            lines.append(json.dumps(dict(
                preset=trial.name, source=prompt.source, language=prompt.language, prompt=prompt.text,
                text=sample.text, tokens=len(sample.ids), distinct_2=behaviour.distinct_bigrams(sample.ids),
                repeats_4gram=behaviour.repeats_4gram(sample.ids), ends_in_loop=behaviour.ends_in_loop(sample.ids),
                identified_language=identifier.identify(sample.text)), ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def numbers_of(trial):
    return dict(trial.behaviour, known_word_pairs=trial.known_pairs)


def json_files(found):
    """The bundle's JSON files, name -> value."""
    about, losses, sweep, run_text = found.about, dict(found.losses), found.sweep, found.run_text
    sources = losses.pop("sources")
    ranks = {row["checkpoint"]: row["rank"] for row in found.comparison["checkpoints"]}
    return {
        "eval_summary.json": about | losses | dict(
            rank_in_run=ranks[about["checkpoint"]], checkpoints_in_run=len(ranks),
            behaviour_greedy=found.greedy.behaviour, behaviour_recommended=found.recommended.behaviour,
            recommended_preset=sweep.winner),
        "benchmark_metrics.json": losses | dict(
            greedy=numbers_of(found.greedy), recommended=numbers_of(found.recommended),
            validation_text=numbers_of(sweep.holdout_text), prompts=len(run_text.holdout),
            language_identifier_accuracy=run_text.accuracy),
        "benchmark_source_losses.json": sources,
        "benchmark_scores.json": dict(
            tasks=found.scores, decoding={trial.name: trial.score for trial in sweep.holdout}),
        "comparison.json": found.comparison,
        "probe_summary.json": dict(
            checkpoint=about["checkpoint"], step=about["step"],
            top_1=sum(probe["correct_token_rank"] == 1 for probe in found.probes), probes=found.probes),
        "decoding_summary.json": dict(
            tuning_winner=sweep.winner, holdout_winner=sweep.holdout[0].name, confirmed=sweep.is_confirmed,
            tuning_prompts=len(run_text.tuning), holdout_prompts=len(run_text.holdout),
            max_new_tokens=MAX_NEW_TOKENS, seed=about["seed"],
            tuning={trial.name: trial.score for trial in sweep.tuning},
            holdout={trial.name: trial.score for trial in sweep.holdout},
            holdout_metrics=numbers_of(found.recommended),
            presets={name: dict(preset.rules(), why=preset.why) for name, preset in PRESETS.items()}),
        RECOMMENDED: decoding.recommended_params(PRESETS[sweep.winner]),
    }


def bundle_files(found):
    """All files of the bundle, name -> text."""
    sweep, run_text = found.sweep, found.run_text
    files = {name: as_json(value) for name, value in json_files(found).items()}
    files["benchmark_report.md"] = "\n".join(benchmark_report(found)) + "\n"
    files["decoding_report.md"] = "\n".join(decoding_report(found)) + "\n"
    for part, text, trials, prompts in (("tuning", sweep.tuning_text, sweep.tuning, run_text.tuning),
                                        ("holdout", sweep.holdout_text, sweep.holdout, run_text.holdout)):
        files[f"{part}_leaderboard.csv"] = leaderboard_csv(trials, text)
        files[f"{part}_generations.jsonl"] = generations(trials, text, prompts, run_text.identifier)
    assert set(files) == set(runfolder.BUNDLE)
    return files


# ---------------------------------------------------------------------------------------------------- the folder

def check_folder(folder):
    """Raises UserError if the folder holds anything but a bundle, which a new one may replace."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--bundle={folder} is a file; name a folder")
    foreign = []
    if folder.exists():
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in runfolder.BUNDLE)
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which belongs to no bundle; name another folder with --bundle")


def write_folder(folder, files):
    """Writes the files (name -> text) into a folder beside it, which then takes its place, so that it is whole."""
    folder = Path(os.path.abspath(folder))
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    for leftover in (part, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    for name, text in files.items():
        with open(part / name, "wb") as f:
            f.write(text.encode())
            f.flush()
            os.fsync(f.fileno())
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_bundle(folder, path, model, tokenizer, checkpoint, sources, losses, on, weights, probe_list=probes.CARD,
                 scores=None, seed=1337):
    """Measures what is still to be measured, and writes the bundle of a checkpoint into `folder`. Returns Findings.

    path: the checkpoint's file, whose run's other checkpoints are compared with it. model, tokenizer, checkpoint: as
    run.load_checkpoint gives them; the model is on on.device. sources: the token sources that `losses` are of.
    losses: {"loss": {"mixed", "language", "source"}, "bits_per_byte": the same}. weights: "EMA" or "raw".
    probe_list: of probes.Probe. scores: task -> {"score": x, ...}, see Findings. Raises UserError for a folder that is
    not a bundle, and for data with too little validation text.
    """
    check_folder(folder)
    found = examine(path, model, tokenizer, checkpoint, sources, losses, on, weights, probe_list, scores, seed)
    write_folder(folder, bundle_files(found))
    return found
