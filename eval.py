"""Validation losses of a checkpoint: `python eval.py --ckpt=out/RUN/best.pt`. It trains nothing and changes no run.

The raw and the averaged weights are measured on the data that the checkpoint was trained on, or on --data. A fine-tuned
checkpoint is measured as finetune.py does it: its replies to validation chats, the base data, and context relevance.
Data without chats is measured as text, and so are chats if the checkpoint comes from pretraining.
"""
from dataclasses import dataclass, replace

import finetune
import machine
import run
import train
from common import UserError, nearest, parse_flags, run_tool


@dataclass
class Settings:
    ckpt: str = "out/tinymemory/best.pt"  # checkpoint to measure
    data: str = ""  # prepared folders, or names under data/, as train.py's --data; empty: what it was trained on
    eval_tokens: int = 4_000_000  # validation tokens of each source, spread evenly; 0: all
    block_size: int = 0  # tokens in a row; 0: as it was trained
    micro_batch: int = 0  # rows that are computed at once; 0: as it was trained
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: str = ""  # bfloat16, float32, auto; empty: as it was trained


class NoLoader:
    """Stands where training has its loader. A set of data that is too small to be trained on can be measured."""

    def set_length(self, total_rows):
        pass


class Text(train.Pretraining):
    def make_loader(self, s):
        return NoLoader()


class Replies(finetune.FineTuning):
    def make_loader(self, s):
        self.base, self.base_spec = self.find_base(s)
        return NoLoader()


def check_settings(s, context_length):
    """Raises UserError for values that make no sense."""
    if min(s.eval_tokens, s.block_size, s.micro_batch) < 0:
        raise UserError("--eval_tokens, --block_size and --micro_batch cannot be negative")
    if s.block_size > context_length:
        raise UserError(f"--block_size={s.block_size} is longer than the model's context of {context_length}")
    dtypes = train.choices()["dtype"]
    if s.dtype and s.dtype not in dtypes:
        raise UserError(f"--dtype={s.dtype} is not one of {', '.join(dtypes)}{nearest(s.dtype, dtypes)}")


def plan_of(checkpoint, s, n_processes):
    """The settings that the checkpoint was trained with, as a plan for measuring what the flags say."""
    recorded = checkpoint["train"]
    kind = finetune.Settings if run.is_fine_tuning(recorded) else train.Settings
    trained = run.known_settings(kind, recorded)
    block_size = s.block_size or trained.block_size
    micro_batch = s.micro_batch or trained.micro_batch
    settings = replace(
        trained, data=s.data or trained.data, dtype=s.dtype or trained.dtype, block_size=block_size,
        micro_batch=micro_batch, batch_tokens=micro_batch * block_size * n_processes, epochs=0.0)
    if kind is finetune.Settings:
        settings = replace(settings, replay=0.0, relevance=0.0)
    module, _, recipe = run.find_preset(checkpoint["model_name"])
    cfg = module.Config(**checkpoint["cfg"])
    return run.Plan("new", module, cfg, settings, recipe, start=checkpoint, start_path=s.ckpt)


def make_task(plan, world, on):
    """What measures: Replies for a fine-tuned checkpoint and chats, else Text."""
    task = Text(plan, world, on)
    if run.is_fine_tuning(plan.start["train"]) and any(source.is_chat for source in task.sources):
        task = Replies(plan, world, on)
    return task


def show_losses(model, task, checkpoint, s):
    """Measures the raw and the averaged weights, and prints a table of each."""
    params = list(model.parameters())
    kinds = {"raw": None}
    if checkpoint["ema"]:
        kinds["EMA"] = [checkpoint["ema"][name].to(params[0].device) for name, _ in model.named_parameters()]
    chosen = "EMA" if checkpoint["use_ema"] else "raw"
    for kind, values in kinds.items():
        with train.weights(params, values):
            result = task.measure(model, s.eval_tokens)
        mark = " (the chosen ones)" if kind == chosen else ""
        print(f"{s.ckpt}, step {checkpoint['step']:,}, {kind} weights{mark}", flush=True)
        for line in task.table(result):
            print("  " + line, flush=True)


def main(argv):
    given, _ = parse_flags(argv, Settings(), description=" ".join(__doc__.split("\n\n")[0].split()))
    s = Settings(**given)
    world = machine.World()
    with world.one_voice():
        model, _, checkpoint = run.load_checkpoint(s.ckpt, ema=False)
        check_settings(s, model.cfg.context_length)
        plan = plan_of(checkpoint, s, world.size)
        on = machine.pick_device(s.device, plan.settings.dtype, local_rank=world.local_rank)
        with world.joined(on.device):
            show_losses(model.to(on.device), make_task(plan, world, on), checkpoint, s)
    return 0


if __name__ == "__main__":
    run_tool(main)
