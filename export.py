"""A release that other programs load without this repository: `python export.py --ckpt=out/tinymemory/best.pt`.

The folder loads in `transformers`, has a model card and, with --gguf, a file for llama.cpp and ollama. --push=USER/NAME
uploads it to the Hugging Face Hub, and with --out alone it uploads a folder that is there already. The folder is made
beside its place and renamed at the end, so that it is there whole or not at all.

--import_from=FOLDER goes the other way: a GPT-2-, Llama- or Qwen3-shaped model of `transformers`, or a release of ours,
becomes a checkpoint that train.py and finetune.py start from.
"""
import dataclasses
import errno
import importlib.util
import os
import re
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import run
import runfolder
from common import Progress, UserError, parse_flags, quoted, run_tool
from corpus.folder import alone
from release import card, gguf_format, hub, importing, llama_cpp, transformers_format
from release.contents import DTYPES, open_release, read_json


@dataclass
class Settings:
    ckpt: str = ""  # checkpoint to release
    out: str = ""  # folder of the release, empty: RUN/release; with --import_from the checkpoint to write, a .pt file
    ema: bool | None = None  # averaged weights, --no-ema the raw ones; unset: those with the lower validation loss
    dtype: str = "float32"  # type of the weights: float32, float16, bfloat16
    bin: bool = False  # the weights as pytorch_model.bin, as on i3's cards, in place of model.safetensors
    card_names: bool = False  # also files under the names of İvme's or TinyMemoryLM's card, with the model's code
    gguf: bool = False  # also a GGUF file for llama.cpp, and a Modelfile for ollama
    gguf_type: str = "F16"  # type of its matrices: F32, F16, BF16, Q8_0; several with commas make a file each
    bundle: str = ""  # folder that eval.py --bundle has written; empty: bundle/ beside the checkpoint
    license: str = ""  # licence of the model for its card, as the Hub spells it: mit, cc-by-sa-4.0
    push: str = ""  # USER/NAME: upload the folder as this model of the Hugging Face Hub
    import_from: str = ""  # folder, or name on the Hub, of a model that becomes a checkpoint


# ---------------------------------------------------------------------------------------------------- the folder

def make_release(release, out, s):
    """Writes the release into the folder `out`, which must not be there yet."""
    with alone(out, "export.py"):
        check_free(out)
        write_folder(release, out, s)


def write_folder(release, out, s):
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
    try:
        part.mkdir(parents=True)
        write_files(part, release, s)
        for path in part.iterdir():  # all of it is on the disk before the folder gets its name
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        os.rename(part, out)
    except OSError as e:
        if e.errno is None:  # numpy's writer hides what the system said
            raise OSError(errno.ENOSPC, str(e), str(out)) from None
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_files(folder, release, s):
    """Writes all files of the release; the model card comes last, because it lists the others."""
    transformers_format.write_folder(folder, release, s.bin)
    files = {
        "pytorch_model.bin" if s.bin else "model.safetensors": f"weights ({release.dtype})",
        "config.json": "sizes of the model", "generation_config.json": "settings of `generate()`",
        "tokenizer.json": "tokenizer", "tokenizer_config.json": "its settings",
        "special_tokens_map.json": "its special tokens"}
    if release.has_roles:
        files["chat_template.jinja"] = "how a chat becomes text"
    if release.architecture == "i3":
        files |= dict.fromkeys(transformers_format.I3_CODE, "code that transformers loads the model with")
    files |= write_checkpoint(folder, release)
    if s.card_names:
        files |= write_card_names(folder, release)
    files |= copy_what_the_run_left(folder, release)
    seen = []
    if s.gguf:
        more, seen = write_gguf(folder, release, s.gguf_type.split(","))
        files |= more
    text = card.model_card(release, files, seen)  # paths in it may hold bytes that are no characters
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def write_checkpoint(folder, release):
    """step_N.pt: the released weights as a checkpoint of ours, without what only training needs."""
    weights = {name: value.clone() for name, value in release.model.state_dict().items()}
    checkpoint = dict(release.checkpoint, model=weights, ema={}, use_ema=False, optimizer={}, rng=[],
                      released=release.weights)
    name = f"step_{checkpoint['step']}.pt"
    runfolder.save_checkpoint(folder / name, checkpoint)
    return {name: "checkpoint for sample.py, finetune.py and train.py --init_from, without the optimizer's state"}


def copy_what_the_run_left(folder, release):
    """Copies files of the run and of its evaluation, as far as they are there. Returns name -> what it is."""
    names = {
        release.record_path.name: ("training_config.json", "settings of the training"),
        "best_validation.json": ("best_validation.json", "best evaluation during the training"),
        "metrics.jsonl": ("metrics.jsonl", "log of the training"),
        "eval_metrics.jsonl": ("eval_metrics.jsonl", "evaluations with probes during the training"),
        "probe_generations.jsonl": ("probe_generations.jsonl", "what the probes were answered"),
        "loss.png": ("loss.png", "losses of the training"), "eval.json": ("eval.json", "scores and their protocol")}
    files = {}
    for name, (own, about) in names.items():
        if name == "eval.json" and not release.evaluation:
            continue  # it may be about other weights
        if release.beside(name).is_file():
            shutil.copyfile(release.beside(name), folder / own)
            files[own] = about
    for name in runfolder.BUNDLE if release.bundle_folder else ():
        if (release.bundle_folder / name).is_file():
            shutil.copyfile(release.bundle_folder / name, folder / name)
            files[name] = "part of the evaluation"
    return files


def write_gguf(folder, release, kinds):
    """Writes a GGUF file for each type and a Modelfile. Returns (name -> what it is, lines about each file)."""
    files, seen = {}, []
    for kind in kinds:
        name = gguf_format.file_name(release, kind)
        gguf_format.write_gguf(folder / name, release, kind)
        files[name] = f"for llama.cpp, matrices in {kind}"
        if importlib.util.find_spec("xllamacpp"):
            seen.append(f"{name}: {llama_cpp.check(folder / name, release, kind)}")
            Progress().done(f"{'llama.cpp':<12} {seen[-1]}")
        else:
            Progress().done(f"{'llama.cpp':<12} {name} was not tried; llama.cpp comes with requirements-dev.txt")
    text = gguf_format.modelfile(release, gguf_format.file_name(release, kinds[0]))
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return files | {"Modelfile": "for ollama"}, seen


# ------------------------------------------------------------------------------------------------- the cards' own names

# Architecture file -> names for (the weights of a base model, those of a fine-tuned one, the tokenizer)
CARD_NAMES = dict(
    ivme=("ivme_base_ema.pt", "ivme_instruct_ema.pt", "ivme_tokenizer.json"),
    tinymemory=("pretrain.pt", "model.pt", "tokenizer.json"))


def write_card_names(folder, release):
    """The files that the snippet on İvme's card loads; model.py is the architecture file. Returns name -> what it is.

    A fine-tuned model brings the one that it started from, if that is still there, as TinyMemoryLM's release does.
    """
    base, tuned, tokenizer = CARD_NAMES[release.architecture]
    weights = {base: release}
    if release.is_chat_model:
        weights = {tuned: release}
        if (start := pretrained(release)) is not None:
            weights[base] = start

    shutil.copyfile(release.module.__file__, folder / "model.py")
    files = {"model.py": "the model's code, which needs torch alone"}
    for name, of in weights.items():
        write_for_model_py(folder, name, of)
        kind = "fine-tuned" if of.is_chat_model else "pretrained"
        files[name] = f"{kind} weights and configuration for model.py"
    if tokenizer != "tokenizer.json":
        shutil.copyfile(folder / "tokenizer.json", folder / tokenizer)
        files[tokenizer] = "tokenizer again"
    return files


def pretrained(release):
    """The release that a fine-tuned one was started from; None if its checkpoint is gone, or of another shape now."""
    path = Path(release.settings.get("init_from", ""))
    if not path.is_file():
        return None
    start = open_release(path, dtype=release.dtype)
    is_same = start.cfg == release.cfg and start.checkpoint["tokenizer"] == release.checkpoint["tokenizer"]
    return start if is_same and not start.is_chat_model else None


def write_for_model_py(folder, name, release):
    """The weights, with the configuration as an object of model.py and not as plain values, as İvme's file has it."""
    model = types.ModuleType("model")
    before = sys.modules.get("model")
    sys.modules["model"] = model  # where pickle looks for the class
    try:
        exec((folder / "model.py").read_text(encoding="utf-8"), model.__dict__)
        cfg = model.Config(**dataclasses.asdict(release.cfg))
        runfolder.save_checkpoint(folder / name, dict(cfg=cfg, model=release.state))
    finally:
        del sys.modules["model"]
        if before is not None:
            sys.modules["model"] = before


# ---------------------------------------------------------------------------------------------------- the tool

def check_settings(s, given):
    """Raises UserError for flags that cannot be meant together. given: names of the flags that were typed."""
    goes_with = None
    if s.import_from:
        goes_with = {"import_from", "out"}
    elif not s.ckpt and s.push and s.out:
        goes_with = {"push", "out"}
    elif not s.ckpt:
        raise UserError("give --ckpt=CHECKPOINT, such as out/tinymemory/best.pt, or --import_from=FOLDER")
    if goes_with and given - goes_with:
        raise UserError(f"--{min(given - goes_with)} does not go with --{min(goes_with - {'out'})}")
    if s.import_from and not s.out.endswith(".pt"):
        raise UserError("--import_from needs --out=CHECKPOINT, a file that ends in .pt")
    if s.dtype not in DTYPES:
        raise UserError(f"--dtype={s.dtype} is not one of {', '.join(DTYPES)}")
    if "gguf_type" in given and not s.gguf:
        raise UserError("--gguf_type belongs to --gguf")
    if s.bundle and not Path(s.bundle).is_dir():
        raise UserError(f"--bundle={s.bundle} is no folder")
    if s.push and not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", s.push, re.ASCII):
        raise UserError(f"--push={s.push} is not USER/NAME, of letters, digits and . _ -")


def check_release(release, s):
    """Raises UserError, before anything is written, for what this model or this machine cannot do."""
    transformers_format.model_config(release)  # knows the architectures
    if s.bundle and release.bundle_folder is None:
        raise UserError(f"--bundle={s.bundle} is no evaluation of these weights: eval.py --ckpt={quoted(s.ckpt)} "
                        "--bundle=FOLDER makes one")
    if not s.bin:
        transformers_format.needed("safetensors")
    if s.card_names and release.architecture not in CARD_NAMES:
        raise UserError(f"--card_names is for {' and '.join(CARD_NAMES)}; the weights of i3's cards are "
                        "pytorch_model.bin (--bin), and gpt2preln's has the names that are written anyway")
    if s.gguf:
        gguf_format.check(release, s.gguf_type.split(","))


def check_free(out):
    if out.exists():
        raise UserError(f"{out} is there already: delete it, or give another --out")


def main(argv):
    given, _ = parse_flags(argv, Settings(), description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    s = Settings(**given)
    check_settings(s, set(given))
    if s.import_from:
        return import_model(s)

    if s.ckpt:
        out = Path(s.out or Path(s.ckpt).parent / "release")
        check_free(out)
        about = dict(dtype=s.dtype, licence=s.license, bundle=s.bundle)
        if s.push:
            about["name"] = s.push.split("/")[1]
        release = open_release(s.ckpt, s.ema, **about)
        check_release(release, s)
        make_release(release, out, s)
        sizes = [path.stat().st_size for path in out.iterdir()]
        print(f"wrote {out}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB; its README.md is the model card")
    else:
        out = Path(s.out)
        if not read_json(out / "config.json").get("architectures"):
            raise UserError(f"{out} is not a release; --ckpt=CHECKPOINT makes one")
    if s.push:
        hub.push(out, s.push)
    return 0


def import_model(s):
    out = Path(s.out)
    check_free(out)
    checkpoint = importing.import_model(s.import_from, out)
    module, *_ = run.find_preset(checkpoint["model_name"])
    n_params = sum(value.numel() for value in checkpoint["model"].values())
    print(f"wrote {out}: {n_params / 1e6:,.2f}M parameters ({module.__name__}.py), "
          f"context {checkpoint['cfg']['context_length']:,}\n"
          f"next: python prepare.py TEXT.txt --tokenizer={quoted(out)} --name=mine && "
          f"python train.py --init_from={quoted(out)} --data=mine --out=out/mine")
    return 0


if __name__ == "__main__":
    run_tool(main)
