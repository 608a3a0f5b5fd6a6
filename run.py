"""Which run is meant by the flags, its data, and the checkpoint that it starts from.

    plan_run         flags -> Plan: a new run, a resumed one, or the decay alone; with all settings checked
    find_data        --data -> token sources
    load_checkpoint  a checkpoint's file -> a model that is ready to use

train.py, finetune.py and all tools that read a checkpoint are built on it. What a run writes is in runfolder.py.
"""
import contextlib
import importlib
import json
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import prepare
from common import (
    BOOLEANS, UserError, flag_value, is_out_of_memory, mended, nearest, parse_flags, quoted, yes_or_no,
)
from corpus.folder import base_name, check_tokens, corpus_name, read_meta
from corpus.loader import open_sources
from corpus.pydocs import EMBEDDED
from corpus.text import SUFFIXES
from corpus.tokenizer import DEFAULT_VOCAB, TRAINERS, load_tokenizer
from runfolder import check_folder, recorded_settings

# ---------------------------------------------------------------------------------------------------- checkpoints

FORMAT = 1
# what a checkpoint holds
KEYS = dict(format=int, step=int, tokens=int, model_name=str, cfg=dict, train=dict, model=dict, ema=dict, use_ema=bool,
            optimizer=object, rng=object, loader=object, tokenizer=str, metrics=dict)
ITS_TRAIN = ("data", "tokenizer", "optimizer")  # what programs ask of the settings that it was trained with, if any


def architecture(file):
    """The module of an architecture file. UserError if it cannot be imported, or is none."""
    try:
        module = importlib.import_module(file)
    except Exception as e:  # whatever somebody's file does
        raise UserError(f"{file}.py cannot be imported ({type(e).__name__}: {e})") from None
    if not isinstance(module.PRESETS, dict) or not hasattr(module, "Config") or not hasattr(module, "Model"):
        raise UserError(f"{file}.py is no architecture: it needs Config, Model and PRESETS, a dict")
    return module


def find_preset(name):
    """Preset name -> (architecture module, config, recipe): `i3-80m` is in i3.py. UserError lists the presets."""
    stem, here = str(name).split("-")[0], Path(__file__).parent
    files = [path.stem for path in sorted(here.glob("*.py"))  # editors leave others beside them
             if path.stem.isidentifier() and path.is_file() and re.search(rb"^PRESETS\b", path.read_bytes(), re.M)]
    if stem not in files:
        presets = []
        for file in files:
            with contextlib.suppress(UserError):
                presets += architecture(file).PRESETS
        raise UserError(f"there is no model {name!r}{nearest(str(name), presets)}; there are {', '.join(presets)}")
    module = architecture(stem)
    if name not in module.PRESETS:
        raise UserError(f"{stem}.py has no preset {name!r}{nearest(name, module.PRESETS)}; "
                        f"it has {', '.join(module.PRESETS)}")
    return module, *module.PRESETS[name]


def read_checkpoint(path):
    """The checkpoint's dict, tensors on the CPU. UserError if it is missing, damaged, or not one of ours."""
    try:
        with warnings.catch_warnings():  # what torch thinks of other files is not the user's concern
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a checkpoint in it, such as {Path(path) / 'best.pt'}") from None
    except (PermissionError, MemoryError):
        raise
    except Exception as e:  # torch raises many types for a damaged file
        if is_out_of_memory(e):
            raise
        raise UserError(f"{path} is damaged or not a checkpoint ({type(e).__name__})") from None

    missing = KEYS
    if isinstance(checkpoint, dict):
        missing = [key for key in KEYS if key not in checkpoint]
    if missing:
        raise UserError(f"{path} is not a checkpoint of this train.py: it lacks {', '.join(missing[:4])}")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this train.py: "
                        f"its format is {checkpoint['format']!r}, not {FORMAT}")
    wrong = [key for key in KEYS if not isinstance(checkpoint[key], KEYS[key])]
    wrong = wrong or [f"train.{key}" for key in ITS_TRAIN if not isinstance(checkpoint["train"].get(key, ""), str)]
    if wrong:
        raise UserError(f"{path} is damaged: {', '.join(wrong[:4])} cannot be what it holds")
    return checkpoint


def load_checkpoint(path, device="cpu", ema=None):
    """A trained model, ready to use: (model in eval mode on `device`, tokenizer, the checkpoint's dict).

    ema: True for the averaged weights, False for the raw ones, None for those that had the lower validation loss.
    Raises UserError for a file that is missing, damaged or foreign, and for ema=True if no average was kept.
    """
    checkpoint = read_checkpoint(path)
    module, *_ = find_preset(checkpoint["model_name"])
    ema = checkpoint["use_ema"] if ema is None else ema
    if ema and not checkpoint["ema"]:
        raise UserError(f"{path} holds no EMA weights (its run had --ema_beta=0)")
    model = make_model(module, config_of(module, checkpoint["cfg"], path))
    load_weights(model, checkpoint, ema, path)
    return on_device(model, device).eval(), load_tokenizer(checkpoint["tokenizer"]), checkpoint


def weights_of(checkpoint, ema=None):
    """Which weights `load_checkpoint` takes, "ema" or "raw". A release has but one kind, and says which it was."""
    ema = checkpoint["use_ema"] if ema is None else ema
    return checkpoint.get("released") or ("ema" if ema else "raw")


def check_types(kind, values):
    """TypeError if a value of a dict has another type than the default of its field in the dataclass `kind`."""
    if not isinstance(values, dict):
        raise TypeError(f"{values!r:.40} is not a group of named values")
    for field in fields(kind):
        value, default = values.get(field.name, field.default), field.default
        is_whole = isinstance(default, float) and type(value) is int
        if default is not None and type(value) is not type(default) and not is_whole:
            raise TypeError(f"{field.name} is {value!r}")


def config_of(module, values, path):
    """The config in a checkpoint or a run's record. UserError if the architecture file has other fields by now."""
    try:
        check_types(module.Config, values)
        return module.Config(**values)
    except TypeError as e:
        raise UserError(f"{path} does not fit {module.__name__}.py as it is now: {e}") from None


def check_shape(module, cfg):
    """UserError for a config with numbers that cannot be. 0 means "none" where a preset or a default has it."""
    known = [module.Config(), *(preset for preset, _ in module.PRESETS.values())]
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if type(value) not in (int, float):
            continue
        may_be_zero = any(getattr(other, field.name) == 0 for other in known)
        if not 0 <= value < math.inf or value == 0 and not may_be_zero:
            least = "at least 0" if may_be_zero else "above 0"
            raise UserError(f"--{field.name}={value} must be {least}")


def memory():
    """Bytes of main memory that this machine has, or infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


class WithinMemory(TorchFunctionMode):
    """Inside, a model that is larger than the machine's memory is a UserError, before its tensors are made."""
    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
    n_bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.MAKERS and args:
            shape = args[0] if isinstance(args[0], (tuple, list)) else args
            self.n_bytes += 4 * math.prod(shape)
            if self.n_bytes > memory():
                raise UserError(f"the weights of this model alone need more than {self.n_bytes / 1e9:,.0f} GB, "
                                "which is more than this machine's memory")
        return func(*args, **(kwargs or {}))


def make_model(module, cfg):
    """The architecture's model with random weights. UserError for a config that makes no model, or too large a one."""
    check_shape(module, cfg)
    try:
        with WithinMemory():
            return module.Model(cfg)
    except (ValueError, RuntimeError, OverflowError, TypeError) as e:
        raise UserError(f"{module.__name__}.py: {str(e).splitlines()[0]}") from None


def on_device(model, device):
    """Moves the model there. UserError if KERNELS asks for what there is not or, for a scan, what cannot be had."""
    import kernels  # it registers operators, which most commands do not need
    try:
        kernels.build.choice()
        if hasattr(sys.modules[type(model).__module__], "selective_scan"):
            kernels.implementation(torch.empty(0, device=device))
    except (ValueError, RuntimeError) as e:
        raise UserError(str(e)) from None
    return model.to(device)


def load_weights(model, checkpoint, ema, path):
    """Puts a checkpoint's weights into the model: the averaged ones if `ema`, else the raw ones. UserError as above."""
    try:
        model.load_state_dict(checkpoint["model"] | (checkpoint["ema"] if ema else {}))
    except RuntimeError as e:
        file = type(model).__module__
        raise UserError(f"{path} does not fit {file}.py as it is now: {' '.join(str(e).split())[:300]}") from None


# --------------------------------------------------------------------------------------------------- which run is meant

@dataclass
class Plan:
    """What a run is to be, decided before anything is built."""
    kind: str  # new: from random weights or a checkpoint's; resumed: where a run stopped; decay: a run's decay alone
    module: object  # the architecture file
    cfg: object  # the model's config
    settings: object  # of train.py or finetune.py
    recipe: dict  # the preset's
    start: dict | None = None  # the checkpoint that is started from, or resumed
    start_path: str = ""  # its file
    recorded: dict | None = None  # settings of the run that goes on, as it wrote them; a new run has none
    given: frozenset = frozenset()  # names of the flags that were typed

    @property
    def continues(self):
        """Whether optimizer, average and place in the data go on as well, and not the weights alone."""
        return self.kind != "new"

    @property
    def going_on(self):
        """The flags that go on with the recorded run."""
        if self.kind == "decay":
            return f"--init_from={quoted(self.start_path)} --decay_only"
        return f"--resume --out={quoted(self.settings.out)}"


# settings that finetune.py alone has
FINE_TUNING = ("loss_on", "response_start_tokens", "response_start_weight", "base_data", "replay", "relevance",
               "relevance_margin")


def is_fine_tuning(settings):
    """Whether a recipe, or the settings that a run recorded, are finetune.py's, which alone has --loss_on.

    A first version had one tool for both, which said loss_on=all of pretraining. It had no --minutes.
    """
    return settings.get("loss_on") == "responses" or "loss_on" in settings and "minutes" in settings


def check_tool(plan):
    """UserError if the preset, or the run that is to go on, belongs to the other tool: the command that was meant."""
    s, recorded = plan.settings, plan.recorded
    here_is_finetune = hasattr(s, "loss_on")
    if recorded and is_fine_tuning(recorded) and not here_is_finetune:
        raise UserError(f"this is a fine-tuning run: python finetune.py {plan.going_on} goes on with it")
    if recorded and here_is_finetune and not recorded.get("loss_on"):
        raise UserError(f"this is a pretraining run: python train.py {plan.going_on} goes on with it")
    if not recorded and is_fine_tuning(plan.recipe) and not here_is_finetune:
        raise UserError(f"{s.model} is a recipe for fine-tuning: python finetune.py --model={s.model}")
    for name in plan.recipe:
        if name not in FINE_TUNING and not hasattr(s, name):
            raise UserError(f"the recipe of {s.model} names {name!r}, which is no setting{nearest(name, vars(s))}")


def check_flags(argv):
    """UserError if a flag of train.py belongs to another tool: the command that was meant."""
    for flag in FINE_TUNING:
        value = flag_value(argv, flag)
        if value is not None:
            raise UserError(f"--{flag} belongs to fine-tuning on chats: python finetune.py --init_from=CHECKPOINT "
                            f"--data=CHATS --{flag}={value}")
    if flag_value(argv, "eval_only") is not None:
        raise UserError("--eval_only is a tool of its own: python eval.py --ckpt=CHECKPOINT")


def known_settings(Settings, values):
    """Settings from a dict that another version or the other tool may have written, without what is unknown here."""
    check_types(Settings, values)
    names = {field.name for field in fields(Settings)}
    return Settings(**{name: value for name, value in values.items() if name in names})


def latest_run(fine_tuning):
    """The folder under out/ whose run, of that kind, wrote last; None if there is none."""
    runs = [path.parent for path in Path("out").glob("*/config.json")]
    runs = [folder for folder in runs if (s := recorded_settings(folder)) and is_fine_tuning(s) == fine_tuning]

    def written(folder):
        return max(path.stat().st_mtime for path in (folder / "config.json", folder / "metrics.jsonl") if path.exists())
    return max(runs, key=written, default=None)


def plain_resume(argv, Settings):
    """The flags with --resume=FOLDER, --resume=FOLDER/ckpt.pt and --resume=latest written as --resume --out=FOLDER."""
    value = flag_value(argv, "resume")
    if value is None or value.lower() in BOOLEANS:
        return argv
    folder = Path(value)
    if value == "latest":
        folder = latest_run(hasattr(Settings, "loss_on"))
        if folder is None:
            raise UserError("there is no run under out/ to resume")
    elif folder.name == "ckpt.pt":
        folder = folder.parent
    elif folder.suffix == ".pt":
        raise UserError(f"--resume goes on with a run's ckpt.pt; --init_from={value} starts a new run from this one")
    out = flag_value(argv, "out")
    if out is not None and Path(out) != folder:
        raise UserError(f"--resume={value} and --out={out} name two runs")
    rest = [word for i, word in enumerate(argv)
            if not word.startswith("--resume") and not (i and argv[i - 1] == "--resume" and word == value)]
    return [*rest, "--resume", f"--out={folder}"]


def recorded_run(argv, Settings, default_out):
    """--resume: the run in --out as its config.json has it, with its latest checkpoint."""
    model = flag_value(argv, "model") or Settings.model
    out = Path(flag_value(argv, "out") or default_out(model, "resumed"))
    if not (out / "config.json").exists():
        instead = "--out names its folder"
        if (out / "ckpt.pt").is_file():
            instead = f"it lacks config.json; --init_from={quoted(out / 'ckpt.pt')} starts a new run from its weights"
        raise UserError(f"there is no run to resume in {out}; {instead}")
    try:
        record = json.loads((out / "config.json").read_text(encoding="utf-8"))
        name, cfg, settings = record["model"], record["cfg"], known_settings(Settings, record["train"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{out / 'config.json'} is damaged ({e}); a new run can start from a checkpoint that is there: "
                        f"--init_from={out / 'ckpt.pt'} --out=...") from None
    if flag_value(argv, "model") not in (None, name):
        raise UserError(f"the run in {out} is a {name}, not a {model}")
    if flag_value(argv, "init_from") not in (None, "", settings.init_from):
        raise UserError(f"the run in {out} starts from {settings.init_from or 'random weights'}; "
                        "--resume goes on with it as it is, --out names its folder")

    module, _, recipe = find_preset(name)
    settings = replace(settings, out=str(out), resume=True)
    cfg = config_of(module, cfg, out / "config.json")
    plan = Plan("resumed", module, cfg, settings, recipe, recorded=record["train"])
    if (out / "ckpt.pt").exists():
        plan.start_path = str(out / "ckpt.pt")
        plan.start = read_checkpoint(plan.start_path)
    elif others := [*out.glob("best.pt"), *out.glob("step_*.pt")]:  # they hold all that is needed too
        found = {str(path): read_checkpoint(path) for path in others}
        plan.start_path = max(found, key=lambda path: found[path]["step"])
        plan.start = found[plan.start_path]
    else:  # stopped before its first checkpoint
        plan.kind = "decay" if settings.decay_only else "new"
        if settings.init_from:
            plan.start, plan.start_path = read_checkpoint(settings.init_from), settings.init_from
    return plan


def new_run(argv, Settings):
    """A run from a preset's recipe, or from the checkpoint that --init_from or the recipe names."""
    init_from = flag_value(argv, "init_from")
    start = read_checkpoint(init_from) if init_from else None
    name = flag_value(argv, "model") or (start["model_name"] if start else Settings.model)
    module, cfg, recipe = find_preset(name)
    settings = known_settings(Settings, dict(recipe, model=name))

    # a recipe for fine-tuning names a checkpoint itself
    if init_from is None and recipe.get("init_from"):
        init_from = recipe["init_from"]
        if os.path.exists(init_from):
            start = read_checkpoint(init_from)
    if start:
        if start["model_name"].split("-")[0] != name.split("-")[0]:
            raise UserError(f"--init_from={init_from} holds a {start['model_name']}, not a {name}")
        cfg = config_of(module, start["cfg"], init_from)

    plan = Plan("new", module, cfg, settings, recipe, start, init_from or "")
    if yes_or_no(flag_value(argv, "decay_only") or "false"):
        if not start:
            raise UserError("--decay_only needs --init_from=CHECKPOINT")
        plan.kind, plan.recorded = "decay", start["train"]
        plan.settings = replace(known_settings(Settings, start["train"]), out="", init_from=init_from,
                                overwrite=False, resume=False, decay_only=False, minutes=0.0)
    return plan


def apply_flags(plan, argv, description):
    """The typed flags change the plan's settings and, of a model that is new, its shape."""
    s, cfg = plan.settings, plan.cfg
    both = {field.name for field in fields(s)} & {field.name for field in fields(cfg)}
    assert not both, f"a config's field needs a name that no setting has: {', '.join(both)}"
    description += f" Defaults in brackets are those of --model={s.model}."
    given, _ = parse_flags(argv, s, cfg, description=description)
    given.pop("resume", None)
    if "sample_prompt" in given:
        given["sample_prompt"] = mended(given["sample_prompt"])
    shape = {k: given.pop(k) for k in list(given) if k in {field.name for field in fields(cfg)}}
    if plan.start or s.resume:
        differs = [f"{k} is {getattr(cfg, k)}" for k, v in shape.items() if getattr(cfg, k) != v]
        if differs:
            raise UserError(f"{'the run' if s.resume else plan.start_path} has another shape: {', '.join(differs)}")
    plan.cfg = cfg = replace(cfg, **shape)
    plan.settings = replace(s, **given)
    plan.given = frozenset(given)

    # what follows from the flags
    follows = {}
    if plan.kind == "new" and plan.start and "tokenizer" not in given:
        # names in the start's --data go with it
        follows["tokenizer"] = plan.start["train"].get("tokenizer", s.tokenizer)
    if "max_steps" in given and given.get("epochs"):
        raise UserError("--max_steps and --epochs both say how long the run is: give one of them")
    if "max_steps" in given and "epochs" not in given:
        follows["epochs"] = 0.0
    if "block_size" not in given:
        follows["block_size"] = min(plan.settings.block_size, cfg.context_length)
    if "sample_prompt" not in given and given.get("data", s.data) != s.data:
        follows["sample_prompt"] = ""  # the recipe's prompt belongs to the recipe's data
    if plan.kind == "decay":
        if not plan.settings.decay_steps or plan.settings.epochs:
            raise UserError("--decay_only needs --decay_steps, and goes without --epochs")
        follows |= dict(schedule="wsd", warmup_steps=0, max_steps=plan.start["step"] + plan.settings.decay_steps)
    plan.settings = replace(plan.settings, **follows)


def check_settings(s, cfg, choices):
    """Raises UserError for values that make no sense. choices: field -> the values it may have."""
    for name, allowed in choices.items():
        value = getattr(s, name)
        if value not in allowed:
            raise UserError(f"--{name}={value} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
    check_shape(sys.modules[type(cfg).__module__], cfg)
    positive = ("block_size", "batch_tokens", "micro_batch", "max_steps", "log_every")
    for field in fields(s):
        value = getattr(s, field.name)
        if type(value) not in (int, float):
            continue
        if field.name in positive and not value > 0:
            raise UserError(f"--{field.name}={value} must be above 0")
        if not 0 <= value < math.inf:
            raise UserError(f"--{field.name}={value} must be at least 0")
    if s.seed >= 2 ** 63:
        raise UserError(f"--seed={s.seed} has more than 63 bits")
    if s.ema_beta >= 1 or s.decay_fraction > 1:
        raise UserError("--ema_beta must be below 1 and --decay_fraction at most 1")
    if s.block_size > cfg.context_length:
        raise UserError(f"--block_size={s.block_size} is longer than the model's context of {cfg.context_length}; "
                        f"--context_length={s.block_size} makes a model that fits")
    if s.batch_tokens % s.block_size:
        raise UserError(f"--batch_tokens={s.batch_tokens} is not a multiple of --block_size={s.block_size}")
    if not s.data:
        raise UserError(f"--model={s.model} names no data of its own: give --data")


def plan_run(argv, Settings, choices, default_out, description, adapt=lambda plan: None):
    """argv -> Plan. Settings: train.py's dataclass or finetune.py's; choices: see `check_settings`.

    Defaults come from Settings, then from the preset's recipe or, with --resume, from the run's record; flags override
    both. default_out: (model, kind of run) -> folder. adapt: changes the plan after the flags are read, before the
    checks. Raises UserError for whatever cannot be meant.
    """
    if not hasattr(Settings, "loss_on"):
        check_flags(argv)
    argv = plain_resume(argv, Settings)
    if yes_or_no(flag_value(argv, "resume") or "false"):
        plan = recorded_run(argv, Settings, default_out)
    else:
        plan = new_run(argv, Settings)
    apply_flags(plan, argv, description)
    check_tool(plan)
    adapt(plan)
    if plan.start_path and not plan.start:
        raise UserError(f"{plan.settings.model} starts from {plan.start_path}, which is not there: run python train.py "
                        f"--model={Path(plan.start_path).parent.name} first, or give --init_from")
    check_settings(plan.settings, plan.cfg, choices)

    s = plan.settings
    if not s.out:
        plan.settings = s = replace(s, out=default_out(s.model, plan.kind))
    check_folder(s)
    return plan


# ---------------------------------------------------------------------------------------------------- data

def tokenizer_files(text, owner):
    """Files that hold the tokenizer `text`: those of prepared folders, then its owner's.

    owner: the prepared folder or the checkpoint that it comes from. Older runs have no tokenizer.json of their own;
    prepare.py takes the tokenizer out of the checkpoint then.
    """
    prepared = sorted(Path("data").glob("[!.]*/tokenizer.json"), key=lambda p: (len(str(p)), str(p)))
    files = [path for path in prepared if path.read_text(encoding="utf-8") == text]
    own = Path(owner) / "tokenizer.json" if Path(owner).is_dir() else Path(owner).with_name("tokenizer.json")
    if own.exists() and own.read_text(encoding="utf-8") == text:
        files.append(own)
    return files or [Path(owner)]


def is_prepared(name):
    """Whether this is a prepared folder, or the name of one under data/, whatever characters it has."""
    return any((folder / "meta.json").exists() for folder in (Path(name), Path("data") / name))


def is_of_another(folder, name):
    """Whether a prepared folder was made of a file or folder that is here, and `name` is another one."""
    if not os.path.exists(name):
        return False
    made_of = [source["origin"].get("path") for source in read_meta(folder)["sources"]]
    return any(isinstance(path, str) and os.path.exists(path) and not os.path.samefile(path, name) for path in made_of)


def find_folder(name, encoders, text):
    """The prepared folder that a name in --data means, or None: a path, a folder under data/, or data/NAME-TOKENIZER.

    encoders: (tokenizer, vocabulary size) pairs that the name may go with. text: the tokenizer that the folder must
    have, or None.
    """
    for folder in (Path(name), Path("data") / name):
        if (folder / "meta.json").exists():
            return folder
    for encoder, vocab_size in encoders:
        folder = Path("data") / corpus_name([name], encoder, vocab_size)
        if not (folder / "meta.json").exists() or is_of_another(folder, name):
            continue
        if text is None or (folder / "tokenizer.json").read_text(encoding="utf-8") == text:
            return folder

    # it may have been prepared with another file that holds the same tokenizer, such as another run's
    base = base_name(name)
    for folder in sorted(path.parent for path in Path("data").glob("[!.]*/meta.json")):
        if text is None or not folder.name.startswith(f"{base}-") or is_of_another(folder, name):
            continue
        sources = [source["name"] for source in read_meta(folder)["sources"]]
        if sources == [base] and (folder / "tokenizer.json").read_text(encoding="utf-8") == text:
            return folder
    return None


def missing_data(name, encoder, vocab_size):
    """The error for a name in --data that is not prepared: the command to type, and what there is instead."""
    path = next((p for p in (name, *(name + end for end in SUFFIXES)) if os.path.exists(p)), name)
    command = f"python prepare.py {quoted(path or 'NAME')}"
    if encoder != prepare.Settings.tokenizer:
        command += f" --tokenizer={quoted(encoder)}"
    if DEFAULT_VOCAB.get(encoder, vocab_size) != vocab_size:
        command += f" --vocab_size={vocab_size}"
    if os.path.exists(name):
        return UserError(f"{name} is not a prepared folder; make one of it: {command}")

    there = [p.parent.name for p in sorted(Path("data").glob("[!.]*/meta.json"))]
    ending = corpus_name(["-"], encoder, vocab_size if encoder in TRAINERS else 0)[1:]  # such as -bpe
    usable = [folder.removesuffix(ending) for folder in there if folder.endswith(ending)]
    instead = f"; prepared and ready is --data={' or --data='.join(usable[:3])}" if usable else ""
    return UserError(f"there is no prepared data {name!r}{nearest(name, [*there, *EMBEDDED])}; "
                     f"prepare it: {command}{instead}")


CHECKED = 2 ** 25  # bytes of a token file up to which its checksum is compared when it is opened: 20 ms


def find_data(spec, tokenizer, vocab_size, world, text=None, owner="", whose="the checkpoint's"):
    """--data -> (sources, text of their tokenizer.json).

    spec: NAME or NAME:WEIGHT, several with commas. tokenizer: the one that a bare name goes with (pydocs and hybrid
    mean data/pydocs-hybrid). text: the tokenizer that the data must have, from `owner` (a checkpoint's file); errors
    say `whose` it is. An embedded corpus that is missing is prepared on the spot; any other missing name is a UserError
    with the command to type. So is data that does not fit the tokenizer or the vocabulary.
    """
    folders = []
    for item in [spec] if is_prepared(spec) else spec.split(","):
        name, weight = item, "1"
        if re.fullmatch(r".+:(\d+\.?\d*|\.\d+)", item) and not is_prepared(item):
            name, _, weight = item.rpartition(":")

        # which folder is it?
        encoders = [(tokenizer, vocab_size if tokenizer in TRAINERS else 0)]
        if text is not None:
            encoders += [(str(path), 0) for path in tokenizer_files(text, owner)]
        folder = find_folder(name, encoders, text)
        encoder, size = encoders[0] if text is None else encoders[1]  # what it is to be prepared with, if it is missing
        if folder is None and name in EMBEDDED:
            folder = Path("data") / corpus_name([name], encoder, size)
            if world.is_main:
                print(f"{name}: preparing {folder} (once)", flush=True)
                prepare.prepare([name], prepare.Settings(tokenizer=encoder, vocab_size=size))
            world.barrier()
        if folder is None:
            raise missing_data(name, encoder, vocab_size)

        # does it fit?
        meta = read_meta(folder)
        if text is None:  # of several folders the first one decides
            text, owner, whose = (folder / "tokenizer.json").read_text(encoding="utf-8"), folder, f"{folder}'s"
        if (folder / "tokenizer.json").read_text(encoding="utf-8") != text:
            raise UserError(f"{folder} was not encoded with {whose} tokenizer; prepare its text with "
                            f"--tokenizer={quoted(tokenizer_files(text, owner)[0])}")
        if meta["vocab_size"] > vocab_size:
            raise UserError(f"{folder} has a vocabulary of {meta['vocab_size']:,} tokens, the model of {vocab_size:,}: "
                            f"prepare it with --vocab_size={vocab_size}, or give the model "
                            f"--vocab_size={meta['vocab_size']}")
        folders.append((folder, meta, float(weight)))
    if world.is_main:
        for folder, meta, _ in folders:
            check_tokens(folder, meta, largest=CHECKED)
    return open_sources(folders), text
