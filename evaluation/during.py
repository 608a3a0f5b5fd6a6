"""What train.py measures at its evaluations beside the losses: benchmarks (--eval_tasks) and probes (--probes)."""
import torch

from evaluation import harness, probes


def check(s):
    """Raises UserError if a task or the probes cannot be had: before a run and not at its first evaluation."""
    if s.eval_tasks:
        harness.check_tasks(s.eval_tasks.split(","), s.tasks_dir)
    if s.probes:
        probes.read_probes(s.probes)


@torch.no_grad()
def measure(trainer, winner, row):
    """Adds what was asked for to the row of an evaluation.

    winner: the kind of the weights that the model holds now, raw or ema. Scores stand in the row as "tasks", {name:
    {winner: score}}. Probes fill the logs that the 1gpu-llm card names: eval_metrics.jsonl has the row with all ranks
    and probabilities, probe_generations.jsonl what the model says. No random numbers of the training are used.
    """
    s, task, folder = trainer.s, trainer.task, trainer.folder
    trainer.model.eval()
    if s.eval_tasks:
        lm = harness.harness_model(trainer.model, task.tokenizer, task.on, window=task.T)
        result = harness.run_tasks(lm, s.eval_tasks.split(","), limit=s.eval_limit, tasks_dir=s.tasks_dir)
        row["tasks"] = {name: {winner: entry["score"]} for name, entry in result["tasks"].items()}
    if s.probes:
        found = probes.run_probes(trainer.model, task.tokenizer, probes.read_probes(s.probes), task.on)
        folder.record(row | dict(probes=found), "eval_metrics.jsonl")
        for probe in found:
            folder.record(dict(step=row["step"], **probe), "probe_generations.jsonl")
    trainer.model.train()
