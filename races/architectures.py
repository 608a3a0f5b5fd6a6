"""`race.py architectures`: which architecture learns best at one size, on the same text?

Who takes part: the repository's architectures in the width at which they have --size parameters with 2,111 tokens, a
plain GPT-2 with tied embeddings, and any --model of a file of one's own. Each is trained with two recipes, its preset's
own and one that all have in common (Muon and WSD); batch, rows and order of the data are the same. For each of them the
learning rates are tuned first: a rate is tried in one run of --tokens tokens, over the same grid for all, which goes on
where the best rate lies at its edge.

The final runs have the best rate, other seeds, and two lengths: --tokens tokens for each, and the time that the slowest
needs for them, in which a faster one trains on more. Speeds are those of `python train.py` on this machine, with what
makes it quick there: a CPU has kernels for the blocks of ivme and tinymemory.

The table compares each entrant with the best of its column, which the same runs have chosen, in part by luck. So if
twelve are equally good and have three seeds, one comparison in ten says "worse", and not one in twenty. The verdicts
are not corrected for that, and a note below the table says so. The runs do not choose the pairs of pairs.md.
"""
import bisect
import json
import statistics
import time
from dataclasses import dataclass, field, fields, replace

import torch

import memory
import run
import sample
from common import replacing
from races import tables
from races.recipe import BATCH, DATA, OPTIMIZER, TOKENS
from races.runs import Runs, as_flags, estimate

VOCAB_SIZE = 2111  # of the tokenizer that all use
GRID = (1 / 3, 1, 3)  # factors of both of a recipe's learning rates
FURTHEST = 27  # the grid's last factor, and its inverse
RECIPES = ("common", "own")
CURVE_POINTS = 8
TUNING, EQUAL_TOKENS, EQUAL_TIME = "tuning", "equal tokens", "equal time"
NOTE = ("A verdict is against the first of its column, which these same runs have chosen. "
        "So an equally good one is called worse more often than once in twenty.")


# ---------------------------------------------------------------------------------------------------- who takes part

@dataclass
class Entrant:
    """A preset that takes part, at another size."""
    name: str
    preset: str
    shape: dict = field(default_factory=dict)  # fields of the config that are set by hand
    recipe: dict = field(default_factory=dict)  # settings of its own recipe that differ from the preset's


ENTRANTS = [
    Entrant("ivme", "ivme", dict(n_head=3, n_kv_head=1)),
    Entrant("tinymemory", "tinymemory", dict(n_head=4)),
    Entrant("i3", "i3", dict(n_head=4)),
    Entrant("i3 with attention", "i3-80m", dict(n_head=4)),
    # its card decays in a run of its own, a tenth as long as the one before
    Entrant("gpt2preln", "gpt2preln", dict(n_head=4), dict(decay_fraction=0.1)),
    Entrant("GPT-2", "gpt2preln-gpt2", dict(n_head=4), dict(decay_fraction=0.1)),
]


def layers_of(size):
    """Layers of a model with `size` parameters: 6 with 2 million, 10 with 20 million."""
    return max(1, round(6 * (size / 2e6) ** 0.22))


def n_params(module, cfg):
    with torch.device("meta"):
        return module.Model(cfg).n_params


def scaled(cfg, width, n_layer):
    """The config at another width and depth; inner widths, and the share of attention layers, stay in proportion."""
    changes = dict(d_model=width)
    for name in ("d_ff", "d_inner", "ffn_rank", "head_rank", "delta_rank"):
        if getattr(cfg, name, 0):
            changes[name] = max(8, 8 * round(getattr(cfg, name) * width / cfg.d_model / 8))
    on_top = getattr(cfg, "n_attention", 0)
    if on_top:
        changes["n_attention"] = max(1, round(n_layer * on_top / (cfg.n_layer + on_top)))
    return replace(cfg, **changes, n_layer=n_layer - changes.get("n_attention", 0))


def fitted(entrant, size):
    """(the flags that give the entrant's model about `size` parameters, how many it has then).

    The width is the one that comes nearest, and an inner width, if the config has one, makes up what is missing. A
    config without d_model and n_layer keeps the preset's size.
    """
    module, preset, _ = run.find_preset(entrant.preset)
    names = [field.name for field in fields(preset)]
    cfg = replace(preset, vocab_size=VOCAB_SIZE, **entrant.shape)
    if "context_length" in names:
        cfg = replace(cfg, context_length=TOKENS)

    if {"d_model", "n_layer"} <= set(names):
        inner = next((name for name in ("d_ff", "d_inner", "ffn_rank") if getattr(cfg, name, 0)), None)
        step, n_layer = getattr(cfg, "n_head", 1) * (8 if inner else 2), layers_of(size)
        widths = range(step, 100 * step, step)

        def at(width):
            return n_params(module, scaled(cfg, width, n_layer))

        above = bisect.bisect_left(widths, size, hi=len(widths) - 1, key=at)
        width = min(widths[max(0, above - 1):above + 1], key=lambda width: abs(at(width) - size))
        cfg = scaled(cfg, width, n_layer)
        if inner:  # the number of parameters is linear in it
            narrow, wider = (n_params(module, replace(cfg, **{inner: n})) for n in (8, 16))
            cfg = replace(cfg, **{inner: max(8, 8 + 8 * round((size - narrow) / (wider - narrow)))})
    changed = {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(preset, name)}
    return changed, n_params(module, cfg)


# ---------------------------------------------------------------------------------------------------- the runs

class Race:
    """The runs of all entrants. s: race.Settings."""

    def __init__(self, s):
        self.s, self.runs = s, Runs(s)
        others = [name for name in s.model.split(",") if name]
        self.entrants = ENTRANTS + [Entrant(name, name) for name in others]
        self.shapes = {entrant.name: fitted(entrant, s.size) for entrant in self.entrants}
        self.starters = [(entrant, recipe) for entrant in self.entrants for recipe in RECIPES]

    def flags(self, entrant, recipe, factor, tokens, seed, points=0):
        """What train.py is told. factor: of the recipe's learning rates. points: evaluations on the way; 0: none."""
        settings = dict(model=entrant.preset) | self.shapes[entrant.name][0] | DATA
        steps = max(1, round(tokens / BATCH))
        if recipe == "common":
            settings |= OPTIMIZER
        else:
            own = self.runs.plan(f"--model={entrant.preset}").settings
            settings |= {name: getattr(own, name) for name in OPTIMIZER} | entrant.recipe
        settings |= dict(lr=settings["lr"] * factor, muon_lr=settings["muon_lr"] * factor,
                         warmup_steps=min(settings["warmup_steps"], max(1, steps // 10)))
        return as_flags(settings | dict(
            block_size=TOKENS, batch_tokens=BATCH, micro_batch=BATCH // TOKENS, max_steps=steps,
            eval_every=steps // points if points else 0, eval_tokens=8192, log_every=1, seed=1337 + seed))

    def tuning(self, grids):
        """The runs that try rates. grids: name of the entrant and recipe -> factors."""
        return {(TUNING, entrant.name, recipe, factor): self.flags(entrant, recipe, factor, self.s.tokens, 0)
                for entrant, recipe in self.starters for factor in grids[entrant.name, recipe]}

    def best_factors(self):
        """(name of the entrant, recipe) -> the factor of its rates with the lowest loss."""
        grids = {(entrant.name, recipe): list(GRID) for entrant, recipe in self.starters}
        while True:
            results = self.runs.all(self.tuning(grids))
            if self.runs.stopped:
                raise KeyboardInterrupt
            best, further = {}, False
            for (name, recipe), grid in grids.items():
                bits = {factor: results[TUNING, name, recipe, factor].bits_per_byte for factor in grid}
                best[name, recipe] = factor = min(grid, key=bits.get)
                if factor == max(grid) and factor < FURTHEST:
                    grid.append(3 * factor)
                    further = True
                elif factor == min(grid) and 1 / factor < FURTHEST:
                    grid.append(factor / 3)
                    further = True
            if not further:
                return best

    def speeds(self):
        """(name of the entrant, recipe) -> tokens that it trains on in a second.

        All are measured one after the other, twice, and kept, so that equal time means the same number of steps when
        the race goes on.
        """
        path = self.runs.out / "speeds.json"
        known = {}
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
        wanted = {(entrant.name, recipe): self.flags(entrant, recipe, 1, self.s.tokens, 0)
                  for entrant, recipe in self.starters}
        keys = {name: self.runs.work(flags) for name, flags in wanted.items()}
        measured = {}
        for _ in range(2):
            for name, flags in wanted.items():
                if keys[name] not in known:
                    measured[keys[name]] = max(self.runs.speed(flags), measured.get(keys[name], 0.0))
        known |= measured
        with replacing(path) as f:
            f.write(json.dumps(known, indent=1).encode())
        return {name: known[key] for name, key in keys.items()}

    def final(self, best, speeds):
        """The runs with the best rates: of equal tokens, and of the time that the slowest takes for them."""
        plan, seconds = {}, self.s.tokens / min(speeds.values())
        for seed in range(1, 1 + self.s.seeds):  # seed 0 has chosen the rate
            for length in (EQUAL_TOKENS, EQUAL_TIME):
                for entrant, recipe in self.starters:
                    tokens, points = self.s.tokens, 0
                    if length == EQUAL_TIME:
                        tokens, points = round(seconds * speeds[entrant.name, recipe]), CURVE_POINTS
                    plan[length, entrant.name, recipe, seed] = self.flags(
                        entrant, recipe, best[entrant.name, recipe], tokens, seed, points)
        return plan


def architectures(s):
    race = Race(s)
    speeds = race.speeds()
    if s.dry:
        names = list(speeds)
        plans = race.tuning({name: GRID for name in names}) | race.final(dict.fromkeys(names, 1), speeds)
        print(estimate(race.runs, plans, {name: speeds[name[1:3]] for name in plans}))
        return
    best = race.best_factors()
    results = race.runs.all(race.final(best, speeds))
    show(race, best, speeds, results)
    if race.runs.stopped:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------- beside the loss

def tensors_in(thing, seen):
    """All tensors that an object holds, also inside its lists and attributes."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if id(thing) in seen or isinstance(thing, torch.nn.Module):
        return []
    seen.add(id(thing))
    inside = ()
    if isinstance(thing, dict):
        inside = thing.values()
    elif isinstance(thing, (list, tuple)):
        inside = thing
    elif hasattr(thing, "__dict__"):
        inside = vars(thing).values()
    return [tensor for part in inside for tensor in tensors_in(part, seen)]


@torch.no_grad()
def costs(race, entrant, recipe):
    """(tokens that it writes in a second, bytes that it keeps while writing, bytes of tensors in a training step)."""
    plan, on = race.runs.plan(*race.flags(entrant, recipe, 1, race.s.tokens, 0)), race.runs.on
    torch.manual_seed(0)
    model = plan.module.Model(plan.cfg).to(on.device).eval()
    cache = model.init_cache(1)
    start = torch.zeros(1, 1, dtype=torch.int64, device=on.device)
    step, n = sample.quick_step(model, 10 ** 9), TOKENS - 2
    seconds = []
    for _ in range(3):
        begun = time.monotonic()
        for token in sample.stream(model, start, n, step=step):
            pass
        token.tolist()  # a GPU has come to the end
        seconds.append(time.monotonic() - begun)
    kept = sum(tensor.nbytes for tensor in tensors_in(cache, set()))
    with torch.enable_grad():
        peak = memory.peak_of_tensors(model.train(), plan.settings, race.runs.training_device, TOKENS, BATCH // TOKENS)
    return n / statistics.median(seconds), kept, peak


# ---------------------------------------------------------------------------------------------------- the result

def show(race, best, speeds, results):
    """Prints the tables, and writes them and the figure."""
    def of(length, name, recipe):
        return [results[length, name, recipe, seed] for seed in range(1, 1 + race.s.seeds)]

    tables.write(race.runs.out / "table.md", main_table(race, best, speeds, of), NOTE)
    tables.write(race.runs.out / "pairs.md", pairs_table(race, of))
    curves = {}
    for entrant, recipe in race.starters:
        name = (entrant.name, recipe)
        # seconds at the speed that equal time was reckoned with: what else ran on the machine does not matter
        curves[name] = [[[tokens, tokens / speeds[name], bits] for tokens, _, bits in result.curve] if result else []
                        for result in of(EQUAL_TIME, *name)]
    tables.draw(race.runs.out / "curves.png", curves)
    print(f"wrote {race.runs.out}: table.md pairs.md curves.png results.jsonl")


def main_table(race, best, speeds, of):
    """Rows: each entrant with each recipe, beside the best of them. of: (length, name, recipe) -> results."""
    names = [(entrant.name, recipe) for entrant, recipe in race.starters]
    leaders = {length: min(names, key=lambda name: tables.mean(of(length, *name)))
               for length in (EQUAL_TOKENS, EQUAL_TIME)}
    rows = [("", "recipe", "parameters", "rates x", "equal tokens", "verdict", "tokens in equal time", "equal time",
             "verdict", "trains tokens/s", "writes tokens/s", "state", "memory of a step")]
    for entrant, recipe in race.starters:
        name, speed = (entrant.name, recipe), speeds[entrant.name, recipe]
        cells = {}
        for length, leader in leaders.items():
            verdict = "first"
            if name != leader:
                verdict = tables.verdict_cells(of(length, *name), of(length, *leader))[2]
            cells[length] = [tables.mean_and_spread(of(length, *name)), verdict]
        beside = ["", "", ""]
        if not race.runs.stopped:
            writes, state, peak = costs(race, entrant, recipe)
            beside = [f"{writes:,.0f}", f"{state / 1e6:.2f} MB", f"{peak / 1e6:.0f} MB"]
        tokens = race.s.tokens / min(speeds.values()) * speed
        rows.append((*name, f"{race.shapes[entrant.name][1]:,}", f"{best[name]:.2g}", *cells[EQUAL_TOKENS],
                     f"{tokens / 1e6:.2f}M", *cells[EQUAL_TIME], f"{speed:,.0f}", *beside))
    return rows


def pairs_table(race, of):
    """Rows: each pair of entrants with one recipe, after equal tokens and after equal time."""
    rows = [("length", "recipe", "first", "second", "difference", "95% interval", "the first is")]
    for length in (EQUAL_TOKENS, EQUAL_TIME):
        for recipe in RECIPES:
            for i, first in enumerate(race.entrants):
                for second in race.entrants[i + 1:]:
                    cells = tables.verdict_cells(of(length, first.name, recipe), of(length, second.name, recipe))
                    rows.append((length, recipe, first.name, second.name, *cells))
    return rows
