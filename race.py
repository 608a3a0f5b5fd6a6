"""Experiments: the same training with one thing changed at a time, over several seeds. `python race.py recipe`.

architectures  Which architecture learns best? The four, i3 with attention, and a plain GPT-2, at one size, on the same
               text and tokens and in the same time, each with its own recipe and with a common one. See
               races/architectures.py.
recipe         What does each part of the training recipe bring, and what do newer ideas? See races/recipe.py.
nanogpt        Which learns more in the same time, train.py or nanoGPT's own? See races/nanogpt.py.
tricks         What do finetune.py's four tricks bring? See races/tricks.py.

Each run's result stays in --out, so an experiment can be stopped, and the same command goes on with it. In the first
three a difference counts if it is larger than what other seeds and other documents would make of it; else it is called
a tie. See races/verdicts.py.
"""
from dataclasses import dataclass, replace

from common import UserError, field_notes, parse_flags, run_tool
from races.architectures import architectures
from races.nanogpt import nanogpt
from races.recipe import recipe
from races.tricks import tricks


@dataclass
class Settings:
    seeds: int = 3  # runs of each kind
    tokens: int = 500_000  # architectures, recipe: tokens of a run
    val_tokens: int = 0  # architectures, recipe, nanogpt: validation tokens that a run is measured on; 0: all
    dry: bool = False  # architectures, recipe: only tell how long it takes
    size: int = 2_000_000  # architectures: parameters of each model, such as 20M
    model: str = ""  # architectures: presets that take part beside the repository's, with commas
    nanogpt: str = ""  # nanogpt: its folder
    minutes: float = 3.0  # nanogpt: of training, each
    init_from: str = "out/tinymemory/best.pt"  # tricks: checkpoint to fine-tune
    data: str = ""  # tricks: sets of chats; empty: the recipe's, or pydocs-chat
    base_data: str = ""  # tricks: what is replayed; empty: what the checkpoint was trained on
    max_steps: int = 120  # tricks: steps of each run
    questions: int = 48  # tricks: validation chats whose first question is answered
    out: str = ""  # folder of the runs; empty: out/ and the experiment's name
    device: str = "auto"  # cpu, cuda, cuda:1
    dtype: str = "auto"  # compute type of the training: bfloat16, float32; it is always measured in float32


EXPERIMENTS = dict(architectures=architectures, recipe=recipe, nanogpt=nanogpt, tricks=tricks)


def main(argv):
    description = " ".join((__doc__ or "").split("\n\n")[0].split())
    given, words = parse_flags(argv, Settings(), description=description, positional=("WHAT", " or ".join(EXPERIMENTS)))
    if len(words) != 1 or words[0] not in EXPERIMENTS:
        instead = f", not {' '.join(words)}" if words else ""
        raise UserError(f"which experiment? {', '.join(EXPERIMENTS)}{instead}")
    s = Settings(**given)
    for name in ("seeds", "tokens", "size", "max_steps", "questions"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name} must be above 0")
    notes = field_notes(s)
    for name in given:  # the comments of the settings say whose they are
        whose = notes[name].split(":")[0].split(", ")
        if set(whose) <= set(EXPERIMENTS) and words[0] not in whose:
            raise UserError(f"--{name} is for {' and '.join(whose)}, not for {words[0]}")
    if s.minutes <= 0 or s.val_tokens < 0:
        raise UserError("--minutes must be above 0, and --val_tokens not below it")
    EXPERIMENTS[words[0]](replace(s, out=s.out or f"out/{words[0]}"))
    return 0


if __name__ == "__main__":
    run_tool(main)
