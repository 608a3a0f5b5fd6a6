"""`race.py recipe`: training with one thing changed at a time, each against the common recipe.

The common recipe trains the quick start's model of 1.7 million parameters with Muon and WSD on the embedded corpus.
Each kind is trained --seeds times on --tokens tokens and measured on the validation text, in bits per byte of it, in
windows that cross the borders of documents.
"""
from dataclasses import dataclass, field

from races import tables
from races.runs import Runs, as_flags, estimate
from races.variants import registered

# tinymemory without its QK-norm is a Llama, as ivme is one
WITHOUT_QK_NORM = dict(model="ivme", vocab_size=2111, context_length=2048, n_layer=6, d_model=160, n_head=4,
                       n_kv_head=4, d_ff=256)
DATA = dict(data="pydocs", tokenizer="hybrid", order="random", pack="stream")
BATCH, TOKENS = 2048, 256  # tokens in a step, in a row
OPTIMIZER = dict(optimizer="muon", muon_lr=0.02, lr=3e-3, weight_decay=0.1, grad_clip=1.0, schedule="wsd",
                 warmup_steps=20, decay_fraction=0.45, final_lr_fraction=0.0, ema_beta=0.98, word_boost=1.0)


@dataclass
class Kind:
    """One way to train."""
    name: str
    changes: dict = field(default_factory=dict)  # of train.py's settings, against the common recipe
    against: str = "common recipe"  # the kind that it is compared with
    equal_bytes: bool = False  # as much text as the common recipe reads, and not as many tokens


KINDS = [
    Kind("common recipe"),
    Kind("Muon at half the rate", dict(muon_lr=0.01)),
    Kind("Muon at a quarter of the rate", dict(muon_lr=0.005)),
    Kind("Muon at twice the rate", dict(muon_lr=0.04)),
    Kind("AdamW for all, rate 1e-3", dict(optimizer="adamw", lr=1e-3)),
    Kind("AdamW for all, rate 3e-3", dict(optimizer="adamw", lr=3e-3)),
    Kind("AdamW for all, rate 1e-2", dict(optimizer="adamw", lr=1e-2)),
    Kind("embeddings and head at 3e-4", dict(lr=3e-4)),
    Kind("embeddings and head at 1e-2", dict(lr=1e-2)),
    Kind("cosine", dict(schedule="cosine")),
    Kind("decay over 20%", dict(decay_fraction=0.2)),
    Kind("decay over 65%", dict(decay_fraction=0.65)),
    Kind("decay over all steps", dict(decay_fraction=1.0)),
    Kind("last weights, no average", dict(ema_beta=0.0)),
    Kind("average over 10 steps", dict(ema_beta=0.9)),
    Kind("half the batch", dict(batch_tokens=BATCH // 2)),
    Kind("half the batch, Muon at half the rate", dict(batch_tokens=BATCH // 2, muon_lr=0.01)),
    Kind("a quarter of the batch, Muon at half the rate", dict(batch_tokens=BATCH // 4, muon_lr=0.01)),
    Kind("twice the batch", dict(batch_tokens=BATCH * 2)),
    Kind("no weight decay", dict(weight_decay=0.0)),
    Kind("cautious weight decay", dict(optimizer="cautious_decay")),
    Kind("falling weight decay", dict(optimizer="falling_decay")),
    Kind("NorMuon", dict(optimizer="normuon")),
    Kind("Polar Express", dict(optimizer="polar_express")),
    Kind("EMA-Nesterov", dict(optimizer="ema_nesterov")),
    Kind("word boost 1.5", dict(word_boost=1.5)),
    Kind("whole documents", dict(pack="document")),
    Kind("without QK-norm", WITHOUT_QK_NORM),
    Kind("BPE of equal size, equal bytes", dict(tokenizer="bpe"), equal_bytes=True),
    Kind("two sources, shuffled", dict(data="pydocs,pydocs-chat"), against=""),
    Kind("two sources, one after the other", dict(data="pydocs,pydocs-chat", order="sequential"),
         against="two sources, shuffled"),
]


def flags_of(kind, seed, tokens, runs):
    """What train.py is told for a run of this kind."""
    settings = dict(model="tinymemory") | DATA | OPTIMIZER | kind.changes
    batch = settings.setdefault("batch_tokens", BATCH)
    if kind.equal_bytes:
        common = dict(model="tinymemory") | DATA
        tokens *= runs.bytes_per_token(as_flags(common)) / runs.bytes_per_token(as_flags(settings))
    steps = max(1, round(tokens / batch))
    return as_flags(settings | dict(block_size=TOKENS, micro_batch=min(8, batch // TOKENS), max_steps=steps,
                                    eval_every=0, eval_tokens=16_384, seed=1337 + seed))


def recipe(s):
    with registered():
        runs = Runs(s)
        plan = {(kind.name, seed): flags_of(kind, seed, s.tokens, runs) for seed in range(s.seeds) for kind in KINDS}
        if s.dry:
            print(estimate(runs, plan))
            return
        results = runs.all(plan)

    rows = [("", "bits per byte", "difference", "95% interval", "verdict")]
    for kind in KINDS:
        found = [results[kind.name, seed] for seed in range(s.seeds)]
        cells = [kind.name, tables.mean_and_spread(found)]
        if kind.against and kind.against != kind.name:
            other = [results[kind.against, seed] for seed in range(s.seeds)]
            cells += tables.verdict_cells(found, other)
        rows.append((*cells, *[""] * (len(rows[0]) - len(cells))))
    tables.write(runs.out / "table.md", rows)
    print(f"wrote {runs.out}: table.md results.jsonl")
    if runs.stopped:
        raise KeyboardInterrupt
