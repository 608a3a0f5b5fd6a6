"""The numbers of a checkpoint: `python eval.py --ckpt=out/RUN/best.pt`, its validation losses; --tasks=blimp,arc_easy,
its scores on benchmarks; --bundle=DIR, its behaviour too. `python eval.py --compare A.pt B.pt` ranks checkpoints.

Losses    of each source, language and kind of the data that it was trained on, or of --data, over whole validation
          files. A window of --context positions moves over the text in steps of --stride. A checkpoint that was
          fine-tuned on replies is measured on chats as finetune.py does it: its replies, the base data, and context
          relevance. --plot draws the loss over the position in the context.
--tasks   Benchmarks by their names in EleutherAI's lm-evaluation-harness, such as wikitext, blimp, arc_easy.
--bundle  The evaluation of the 1gpu-llm card in a folder: source losses, behaviour, probes, and a search for decoding
          parameters, which sample.py then uses if DIR is bundle/ beside the checkpoint.

Losses and scores are kept in eval.json beside the checkpoint, the picture of --plot is loss_by_position.png. Nothing
else of the run is changed.
"""
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import finetune
import machine
import report
import run
import runfolder
import train
from common import Progress, UserError, nearest, parse_flags, replacing, run_tool
from corpus.loader import bytes_per_token
from corpus.tokenizer import bos_eos
from evaluation import losses
from sample import latest_best


@dataclass
class Settings:
    ckpt: str = ""  # checkpoint to measure; empty: the best of the latest pretraining run
    ema: bool | None = None  # averaged weights, --no-ema the raw ones; unset: those with the lower validation loss
    compare: str = ""  # checkpoints, with spaces between them, to rank by their mixed validation loss

    # losses
    data: str = ""  # prepared folders, or names under data/, as train.py's --data; empty: what it was trained on
    eval_tokens: int = 0  # validation tokens of each source that count, spread evenly; 0: all
    context: int = 0  # positions of a window; 0: the rows that it was trained on
    stride: int = 0  # positions between windows; 0: half a window
    plot: bool = False  # draw the loss at each position of the model's whole context

    # benchmarks
    tasks: str = ""  # names of lm-evaluation-harness, such as wikitext,blimp,arc_easy
    limit: int = 0  # documents of each benchmark, and of each subtask if it has some, as blimp has 67; 0: all
    tasks_dir: str = ""  # folder with the tasks' data as local files, for machines without network
    row: bool = False  # show a row for a leaderboard too

    # behaviour
    bundle: str = ""  # folder for the evaluation of the 1gpu-llm card
    probes: str = ""  # JSON file of prompts and expected words; empty: the four of the card
    seed: int = 1337  # of the sampled texts

    # machine
    micro_batch: int = 0  # windows that are computed at once; 0: as it was trained
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: str = ""  # bfloat16, float32, auto; empty: as it was trained


def check_settings(s, cfg):
    """Raises UserError for values that make no sense."""
    for name in ("eval_tokens", "context", "stride", "limit", "micro_batch", "seed"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name}={getattr(s, name)} cannot be negative")
    if s.context > cfg.context_length:
        raise UserError(f"--context={s.context} is longer than the model's context of {cfg.context_length}")
    dtypes = train.choices()["dtype"]
    if s.dtype and s.dtype not in dtypes:
        raise UserError(f"--dtype={s.dtype} is not one of {', '.join(dtypes)}{nearest(s.dtype, dtypes)}")


class Measured:
    """A checkpoint that is measured: its model, its data, and what the flags say of it."""

    def __init__(self, s, world):
        self.s, self.world = s, world
        device = machine.find_device(s.device, world.local_rank)
        self.model, self.tokenizer, self.checkpoint = run.load_checkpoint(s.ckpt, device, s.ema)
        self.recorded, self.cfg = asdict(train.Settings()) | self.checkpoint["train"], self.model.cfg
        check_settings(s, self.cfg)
        self.on = machine.pick_device(s.device, s.dtype or self.recorded["dtype"], local_rank=world.local_rank)

        self.weights = "EMA" if run.weights_of(self.checkpoint, s.ema) == "ema" else "raw"
        self.trained = min(self.recorded["block_size"], self.cfg.context_length)
        self.context = s.context or self.trained
        self.stride = min(s.stride or max(1, self.context // 2), self.context)
        self.rows = s.micro_batch or self.recorded["micro_batch"]
        self.frame = bos_eos(self.tokenizer) if self.recorded["pack"] == "document" else None

    def heading(self):
        return f"{self.s.ckpt}, step {self.checkpoint['step']:,}, {self.weights} weights"

    def sources(self):
        """The sources to measure: those of --data, or what the checkpoint was trained on."""
        sources, _ = run.find_data(
            self.s.data or self.recorded["data"], self.recorded["tokenizer"], self.cfg.vocab_size, self.world,
            self.checkpoint["tokenizer"], self.s.ckpt)
        if not any(len(source.val) > 1 for source in sources):
            raise UserError(f"{self.s.data or self.recorded['data']} has no validation text; prepare it with "
                            "--val_fraction above 0")
        return sources

    def losses(self, sources, tokens=None):
        """Losses of text, see evaluation/losses.py. tokens: of each source; None: what --eval_tokens says."""
        n_bytes = bytes_per_token(self.tokenizer, sources)
        tokens = self.s.eval_tokens if tokens is None else tokens
        return losses.measure(self.model, sources, self.on, n_bytes, self.world, self.context, self.stride, self.rows,
                              self.frame, tokens)


# ---------------------------------------------------------------------------------------------------- losses

class Replies(finetune.FineTuning):
    """Fine-tuning's measures without its training: it has no loader, so that few chats are enough."""

    def make_loader(self, s):
        self.base, self.base_spec = self.find_base(s)
        return self

    def set_length(self, total_rows):
        pass


def replies_of(measured):
    """What measures the replies of a fine-tuned checkpoint."""
    s, world, recorded = measured.s, measured.world, measured.recorded
    settings = replace(
        run.known_settings(finetune.Settings, recorded), data=s.data or recorded["data"], replay=0.0, relevance=0.0,
        block_size=measured.context, micro_batch=measured.rows, epochs=0.0,
        batch_tokens=measured.rows * measured.context * world.size)
    module, _, recipe = run.find_preset(measured.checkpoint["model_name"])
    plan = run.Plan("new", module, measured.cfg, settings, recipe, measured.checkpoint, s.ckpt)
    return Replies(plan, world, measured.on)


def is_about_replies(measured, sources):
    """Whether replies alone count: those of a model that was fine-tuned on them."""
    return measured.recorded.get("loss_on") == "responses" and any(source.is_chat for source in sources)


def losses_of(measured, sources):
    """The losses that rank a checkpoint, of --eval_tokens or BUNDLE_TOKENS tokens of each source."""
    tokens = measured.s.eval_tokens or BUNDLE_TOKENS
    if not is_about_replies(measured, sources):
        return measured.losses(sources, tokens)
    with torch.no_grad():
        return replies_of(measured).measure(measured.model, tokens)


def show_losses(measured):
    """Measures the losses, prints them and, with --plot, draws them. Returns the record for eval.json."""
    s, sources = measured.s, measured.sources()
    if is_about_replies(measured, sources):
        if s.plot or s.stride:
            raise UserError("replies are measured in rows of whole chats: --plot and --stride are for text, and --data "
                            "names some")
        task = replies_of(measured)
        with torch.no_grad():
            result = task.measure(measured.model, s.eval_tokens)
        print(f"{measured.heading()}: replies in rows of {task.T:,}")
        print("\n".join("  " + line for line in task.table(result)))
        return dict(result, protocol=dict(rows=task.T, text="replies"))

    result = measured.losses(sources)
    text = "one stream" if measured.frame is None else "each document by itself"
    print(f"{measured.heading()}: windows of {measured.context:,}, stride {measured.stride:,}, {text}")
    print("\n".join("  " + line for line in report.loss_table(result, sources)), flush=True)
    if s.plot and measured.world.is_main:
        draw(measured, sources)
    return dict(result, protocol=dict(window=measured.context, stride=measured.stride, text=text))


def draw(measured, sources):
    """Draws the loss over the whole context of the model."""
    s, context = measured.s, measured.cfg.context_length
    path = Path(s.ckpt).with_name("loss_by_position.png")
    curves = losses.by_position(measured.model, sources, measured.on, context, measured.rows, measured.frame,
                                s.eval_tokens)
    title = f"{measured.checkpoint['model_name']}, step {measured.checkpoint['step']:,}"
    losses.draw_positions(curves, sources, path, measured.trained, title)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------- benchmarks

def show_tasks(measured):
    """Scores the benchmarks of --tasks and prints them. Returns the record for eval.json."""
    from evaluation import harness
    s, checkpoint = measured.s, measured.checkpoint
    lm = harness.harness_model(measured.model, measured.tokenizer, measured.on, measured.context, progress=Progress())
    result = harness.run_tasks(lm, [name for name in s.tasks.split(",") if name], s.limit, s.tasks_dir)
    print(measured.heading())
    print("\n".join("  " + line for line in harness.table(result)), flush=True)
    if s.row:
        row = harness.leaderboard_row(result, checkpoint["model_name"], measured.model.n_params, checkpoint["tokens"],
                                      tokens_per_byte(measured))
        print("\n".join(row))
    return result


def tokens_per_byte(measured):
    """Tokens that the model reads for each UTF-8 byte of its validation text; None without the text."""
    try:
        sources = measured.sources()
    except UserError:
        return None
    n_bytes = bytes_per_token(measured.tokenizer, sources).numpy()
    tokens = [source.val for source in sources]
    return sum(map(len, tokens)) / max(1, sum(float(n_bytes[some].sum()) for some in tokens))


# ---------------------------------------------------------------------------------------------------- behaviour

BUNDLE_TOKENS = 200_000  # validation tokens of each source whose losses a bundle has, if --eval_tokens says nothing


def make_bundle(measured, scores):
    """Writes the folder --bundle. scores: tasks of the harness, name -> score, if there are any."""
    from evaluation import bundle, probes
    s, sources = measured.s, measured.sources()
    questions = probes.read_probes(s.probes)
    text = losses_of(measured, sources)
    found = bundle.write_bundle(s.bundle, s.ckpt, measured.model, measured.tokenizer, measured.checkpoint, sources,
                                text, measured.on, measured.weights, questions, scores, s.seed)
    print("\n".join(bundle.summary_lines(found)))
    print(f"wrote {s.bundle}: {' '.join(runfolder.BUNDLE)}")


def compare(s, world, paths):
    """Ranks checkpoints by their mixed validation loss, and shows their behaviour beside it.

    Raises UserError if they were trained on different sets, and --data does not say on which one they are measured.
    """
    from evaluation import bundle, decoding
    rows, texts, protocols = [], [], []
    for path in paths:
        measured = Measured(replace(s, ckpt=path), world)
        sources = measured.sources()
        texts.append({source.name: source.entries[1]["bytes"] for source in sources})
        if texts[-1].keys() != texts[0].keys():
            raise UserError(f"{path} was trained on {', '.join(texts[-1])}, {paths[0]} on {', '.join(texts[0])}, and "
                            "losses of different texts have no order: --data names one for all")
        about_replies = is_about_replies(measured, sources)
        protocols.append((about_replies, measured.context, about_replies or measured.stride, measured.frame is None))
        if about_replies != protocols[0][0]:
            raise UserError(f"of {path} and {paths[0]}, one was fine-tuned on replies and the other was not: losses of "
                            "replies and of whole texts have no order")
    for path in paths:
        measured = Measured(replace(s, ckpt=path), world)
        sources = measured.sources()
        text = losses_of(measured, sources)
        run_text = decoding.RunText(sources, measured.tokenizer, measured.model.max_len // 2)
        behaves = decoding.greedy_behaviour(measured.model, measured.tokenizer, run_text)
        rows.append(bundle.checkpoint_row(path, measured.checkpoint, text, behaves))
    print("\n".join(bundle.comparison_lines(bundle.compare(rows))))
    if any(text != texts[0] for text in texts):
        print("not all were measured on the same validation text, so small differences mean nothing")
    if len(set(protocols)) > 1:
        print("not all were measured in windows of one length, or not all document by document, as they were trained; "
              "--context gives all the same length")


# ---------------------------------------------------------------------------------------------------- the tool

def keep(measured, **found):
    """Adds what was found to eval.json beside the checkpoint. Findings about another checkpoint, step or weights go,
    and scores of benchmarks under another protocol. A file of this name that is somebody else's stays as it is."""
    path = Path(measured.s.ckpt).with_name("eval.json")
    about = dict(checkpoint=Path(measured.s.ckpt).name, step=measured.checkpoint["step"], weights=measured.weights)
    record = about
    if path.exists():
        record = runfolder.read_evaluation(path)
        if record is None:
            print(f"{path} was not written by this program and is left as it is; what was found is not kept")
            return
    if {name: record[name] for name in about} != about:
        record = about
    if "tasks" in found and isinstance(record.get("tasks"), dict) and record.get("protocol") == found["protocol"]:
        found["tasks"] = record["tasks"] | found["tasks"]
    with replacing(path) as f:
        f.write(json.dumps(record | found, indent=1).encode())


def work(measured):
    """All that the flags ask for: benchmarks, the bundle, else the losses."""
    s, scores = measured.s, {}
    if s.bundle:  # what is wrong is said now, and not after hours of benchmarks
        from evaluation import bundle, probes
        bundle.check_folder(s.bundle)
        probes.read_probes(s.probes)
        measured.sources()
    if s.tasks:
        found = show_tasks(measured)
        scores = found["tasks"]
        if measured.world.is_main:
            keep(measured, **found)
    if s.bundle:
        make_bundle(measured, scores)
    if s.data or s.plot or not (s.tasks or s.bundle):
        found = show_losses(measured)
        if measured.world.is_main:
            keep(measured, losses=found)


# flag -> the flag without which it would do nothing
PART_OF = dict(row="tasks", limit="tasks", tasks_dir="tasks", probes="bundle", seed="bundle")


def check_modes(s, given):
    """Raises UserError for a flag that would do nothing in what is asked for."""
    for name, other in PART_OF.items():
        if name in given and not getattr(s, other):
            raise UserError(f"--{name} is a part of --{other}, which is not asked for")
    if s.tasks and not (s.data or s.plot or s.bundle):
        for name in sorted({"eval_tokens", "stride", "micro_batch"} & given.keys()):
            raise UserError(f"--{name} is about losses, which are not asked for: --data, --plot or --bundle does so")
    alone = [name for name in ("ckpt", "tasks", "bundle", "plot") if s.compare and name in given]
    if alone:
        raise UserError(f"--compare ranks checkpoints by their losses; --{alone[0]} is for a single one")


def main(argv):
    description = " ".join((__doc__ or "").split("\n\n")[0].split())
    given, words = parse_flags(argv, Settings(), description=description,
                               positional=("CHECKPOINT", "more checkpoints, behind --compare"))
    s, world = Settings(**given), machine.World()
    check_modes(s, given)
    if words and not s.compare:
        raise UserError(f"what is {words[0]!r}? flags are written --name=value")
    if world.size > 1 and (s.tasks or s.bundle or s.compare):
        raise UserError("--tasks, --bundle and --compare run in one process; torchrun is for losses")
    with world.one_voice():
        if s.compare:
            first = [s.compare] if Path(s.compare).exists() else s.compare.split()
            compare(s, world, [*first, *words])
            return 0
        s.ckpt = s.ckpt or latest_best(chat=False)
        measured = Measured(s, world)
        with world.joined(measured.on.device):
            work(measured)
    return 0


if __name__ == "__main__":
    run_tool(main)
