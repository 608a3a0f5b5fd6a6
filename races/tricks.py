"""`race.py tricks`: what do finetune.py's four tricks bring?

A checkpoint is fine-tuned on chats plainly, with each trick alone and with all of them: --seeds runs of --max_steps
steps each, which differ in the order of the batches. The best weights of each run are measured:

    bits per byte of all validation replies, and of 65,536 tokens of the base data's validation text
    relevance accuracy and gap over all validation chats, see finetune.relevance
    how many of the greedy replies, up to 128 tokens long, to the first questions of --questions validation chats repeat
    a 4-gram, and how many end in a loop

A line of the table is the mean of its runs and their standard deviation.
"""
import contextlib
import hashlib
import io
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

import finetune
import machine
import objective
import run
import runfolder
import sample
from common import UserError
from corpus.folder import document_edges
from corpus.loader import bytes_per_token
from corpus.tokenizer import bos_eos
from evaluation.behaviour import loop_rate, repeated_4gram_rate, until
from races.runs import code_of, kept

# ---------------------------------------------------------------------------------------------------- measures

BASE_TOKENS = 65_536  # of the base data
REPLY_TOKENS = 128  # length of a generated reply at most


def greedy_replies(model, tokenizer, sources, questions, T, device):
    """The likeliest replies, lists of token ids without the end token, to the first questions of validation chats.

    There are about `questions` chats in all, spread evenly. T: a prompt has half of it at most.
    """
    bos, eos = bos_eos(tokenizer)
    assistant = tokenizer.token_to_id("<|assistant|>")
    replies = []
    for source in sources:
        if not source.is_chat:
            continue
        edges = document_edges(source.val, bos)
        n = len(edges) - 1
        take = min(n, math.ceil(questions / sum(source.is_chat for source in sources)))
        for k in range(take):
            start, end = edges[k * n // take:][:2]
            chat = source.val[start:end].tolist()
            prompt = chat[:chat.index(assistant) + 1][-T // 2:]
            idx = torch.tensor([prompt], device=device)
            ids = sample.generate(model, idx, REPLY_TOKENS, stop_token=eos, temperature=0)[0].tolist()[len(prompt):]
            replies.append(until(ids, eos))
    return replies


def measure(path, sources, base, questions, on):
    """Name of each of MEASURES -> its value for a checkpoint. sources, base: of the chats and of the base data."""
    model, tokenizer, _ = run.load_checkpoint(path, on.device)
    n_bytes = bytes_per_token(tokenizer, [*sources, *base])
    frame, world = bos_eos(tokenizer), machine.World()
    T = min(512, model.cfg.context_length)

    replies = objective.evaluate(
        model, sources, 0, T, 8, on, n_bytes, world, frame=frame, mark=finetune.mark_replies)
    of_base = objective.evaluate(model, base, BASE_TOKENS, min(256, T), 16, on, n_bytes, world)
    accuracy, gap = finetune.relevance(model, sources, 0, T, 8, on, frame[0], world)
    texts = greedy_replies(model, tokenizer, sources, questions, T, on.device)
    return dict(replies=replies["bits_per_byte"]["mixed"], base=of_base["bits_per_byte"]["mixed"],
                accuracy=accuracy, gap=gap, repeats=repeated_4gram_rate(texts), loops=loop_rate(texts))


# ---------------------------------------------------------------------------------------------------- the tricks

OFF = dict(word_boost=1.0, response_start_weight=1.0, replay=0.0, relevance=0.0)
TRICKS = dict(word_boost=1.5, response_start_weight=2.0, replay=0.15, relevance=0.25)  # tinymemory-sft's
BEFORE = "before tuning"
KINDS = {
    "plain": {},
    "+ word boost": dict(word_boost=TRICKS["word_boost"]),
    "+ response start": dict(response_start_weight=TRICKS["response_start_weight"]),
    "+ replay": dict(replay=TRICKS["replay"]),
    "+ relevance": dict(relevance=TRICKS["relevance"]),
    "all": TRICKS,
}

MEASURES = {  # name -> (title of the column, format)
    "replies": ("bits/byte of replies", "{:.3f}"),
    "base": ("bits/byte of base data", "{:.3f}"),
    "accuracy": ("relevance accuracy", "{:.2%}"),
    "gap": ("relevance gap", "{:.2f}"),
    "repeats": ("repeat a 4-gram", "{:.0%}"),
    "loops": ("end in a loop", "{:.0%}"),
}


class Tricks:
    """The experiment with fine-tuning's tricks: its checkpoint, its data, and its runs, made now or earlier."""

    def __init__(self, s):
        self.s, self.out = s, Path(s.out)
        checkpoint = run.read_checkpoint(s.init_from)
        name, before = checkpoint["model_name"], asdict(finetune.Settings()) | checkpoint["train"]
        module, *_ = run.find_preset(name)

        # the recipe: the model's own for fine-tuning, if it has one
        self.preset, self.data = name, s.data or "pydocs-chat"
        if f"{name}-sft" in module.PRESETS:
            self.preset = f"{name}-sft"
            self.data = s.data or module.PRESETS[self.preset][1]["data"]
        self.recipe = module.PRESETS[self.preset][1]

        # the data
        self.base_data = s.base_data or before.get("base_data") or before["data"]
        vocab_size, text, world = checkpoint["cfg"]["vocab_size"], checkpoint["tokenizer"], machine.World()
        self.sources, self.base = (
            run.find_data(spec, before["tokenizer"], vocab_size, world, text, s.init_from)[0]
            for spec in (self.data, self.base_data))
        if not any(source.is_chat and len(source.val) for source in self.sources):
            raise UserError(f"{self.data} holds no chats to validate on; --data names a set of chats")

        self.on = machine.pick_device(s.device, "float32")  # for measuring
        self.training_device = machine.pick_device(s.device, s.dtype)
        self.code = code_of("finetune.py", "sample.py", "evaluation/behaviour.py", "races/tricks.py", module.__file__)
        self.stamp = hashlib.sha256(Path(s.init_from).read_bytes()).hexdigest()[:16]
        self.out.mkdir(parents=True, exist_ok=True)

    def flags(self, kind, seed):
        """What finetune.py is told for this run."""
        s = self.s
        tricks = OFF | KINDS.get(kind, {})
        return [f"--model={self.preset}", f"--init_from={s.init_from}", f"--data={self.data}",
                f"--base_data={self.base_data}", "--overwrite", f"--max_steps={s.max_steps}",
                f"--eval_every={max(1, s.max_steps // 2)}", "--save_every=0", "--final_eval_tokens=1024",
                "--sample_tokens=0", f"--seed={1337 + seed}", f"--device={s.device}", f"--dtype={s.dtype}",
                *(f"--{name}={value}" for name, value in tricks.items())]

    def measures(self, kind, seed):
        """The measures of a run, which is trained unless it was measured earlier."""
        flags, on = self.flags(kind, seed), self.training_device
        about = dict(kind=kind, seed=seed, questions=self.s.questions, flags=flags, recipe=self.recipe,
                     device=on.chip, dtype=str(on.dtype), code=self.code, parent=self.stamp,
                     data=[source.fingerprint for source in (*self.sources, *self.base)])

        def make():
            path = self.s.init_from
            if kind != BEFORE:
                path = self.train(flags)
            return measure(path, self.sources, self.base, self.s.questions, self.on)
        return kept(self.out, about, make)

    def train(self, flags):
        """Fine-tunes quietly, and returns the path of the best weights. KeyboardInterrupt if the user stops it."""
        folder = self.out / "run"
        with contextlib.redirect_stdout(io.StringIO()):
            finetune.main([*flags, f"--out={folder}"])
        if not runfolder.read_rows(folder / "metrics.jsonl")[-1].get("final"):
            raise KeyboardInterrupt  # Ctrl-C ends training without an error
        return folder / "best.pt"


def cell(values, form):
    """'mean ± standard deviation', or the value alone."""
    text = form.format(statistics.mean(values))
    if len(values) > 1:
        text += f" ± {form.format(statistics.stdev(values))}"
    return text


def tricks(s):
    experiment = Tricks(s)
    print(f"{s.init_from} tuned on {experiment.data} for {s.max_steps} steps, {s.seeds} runs each "
          f"(mean ± standard deviation); replayed: {experiment.base_data}")
    print(f"{'':<16}" + "  ".join(f"{title:>24}" for title, _ in MEASURES.values()))
    for kind in (BEFORE, *KINDS):
        n_runs = 1 if kind == BEFORE else s.seeds
        runs = [experiment.measures(kind, seed) for seed in range(n_runs)]
        cells = [cell([measures[name] for measures in runs], form) for name, (_, form) in MEASURES.items()]
        print(f"{kind:<16}" + "  ".join(f"{text:>24}" for text in cells), flush=True)
