"""Benchmarks of EleutherAI's lm-evaluation-harness, so that a score can be compared with any other model's.

The harness has the tasks: prompts, choices, metrics. A model of ours answers it through `harness_model`: likelihoods of
texts, windows over long documents, truncation, prefix token and generation are those of the harness's own `hf` model.
`run_tasks` gives the scores with their standard errors, and beside them what a model without any knowledge would get.

The harness reads a task's data from the Hugging Face Hub. For machines without network, tasks_dir is a folder:

    blimp/SUBTASK.jsonl         some or all of the 67, as in github.com/alexwarstadt/blimp
    wikitext/NAME.txt           "test" or "valid" in its name; the text of WikiText-2, cut into pages here
    TASK/SPLIT.jsonl            arc_easy/test.jsonl or arc_easy/validation.jsonl, say: rows as on the Hub
    NAME.yaml                   tasks of one's own, as the harness describes them

Where there are a test and a validation split, the harness takes the first. WikiText-2 may also stand in tasks_dir
itself, as wikitext*.txt.

The other way round, the harness's own command line scores a checkpoint with

    python -m evaluation.harness --model checkpoint --model_args ckpt=out/RUN/best.pt --tasks blimp
"""
import contextlib
import functools
import io
import json
import logging
import math
import os
import random
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from common import Progress, UserError, columns, mended, nearest, run_tool
from corpus.tokenizer import bos_eos
from evaluation.likelihood import Scorer
from machine import pick_device
from run import load_checkpoint
from sample import stream

# Tasks whose place in the harness is known: looking through all of its 13,000 files takes ten seconds
FOLDERS = dict(wikitext="wikitext", blimp="blimp", arc_easy="arc", arc_challenge="arc")

# The metric that a score is compared by, if it is not the task's first one
METRICS = dict(wikitext="byte_perplexity", arc_easy="acc_norm", arc_challenge="acc_norm")
PERCENT = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")

# The model card of İvme-Conversate 22M
CARD = {("wikitext", "byte_perplexity"): 2.96, ("blimp", "acc"): 61.40, ("arc_easy", "acc_norm"): 30.85}

# What a model that gives every byte the same probability gets; of choices it is counted, see `baselines`
UNIFORM_BYTES = dict(byte_perplexity=256.0, bits_per_byte=8.0)

N_BLIMP = 67  # subtasks


# ---------------------------------------------------------------------------------------------------- the model

def need_harness():
    """Raises UserError if lm-evaluation-harness is not installed."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as e:
        package = (e.name or "lm_eval").partition(".")[0]
        raise UserError(f"benchmarks need the package {package}: pip install lm_eval==0.4.13") from None


@functools.cache
def adapter():
    """The class of our models as the harness knows them. It is made here because its base class is the harness's."""
    need_harness()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Checkpoint(TemplateLM):
        """A model with its tokenizer. Its parameters are those of `harness_model`."""

        def __init__(self, model, tokenizer, on, window=None, batch_tokens=0, progress=None):
            super().__init__()
            self.model, self.encoder, self.on = model, tokenizer, on
            self.max_length = window or model.cfg.context_length
            if self.max_length > model.max_len:
                raise UserError(f"a window of {self.max_length:,} tokens is longer than the model's context of "
                                f"{model.max_len:,}")
            self.scorer = Scorer(model, on, batch_tokens, progress)

        @property
        def eot_token_id(self):
            return bos_eos(self.encoder)[1]

        @property
        def prefix_token_id(self):
            return bos_eos(self.encoder)[0]

        def tok_encode(self, string, add_special_tokens=None):
            """Token ids of a text, without special tokens, whatever the text spells."""
            return self.encoder.encode(mended(string), add_special_tokens=False).ids

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, disable_tqdm=True):
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length:
                raise UserError(f"an answer of this task has {longest:,} tokens, the model reads {self.max_length:,}")
            return self.scorer.score([
                (tuple((context + continuation)[-(self.max_length + 1):]), len(continuation))
                for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            rows, row_of = [], []  # the windows of all documents, and the document of each
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                    context, continuation = make_disjoint_window(window)
                    rows.append((tuple(context + continuation), len(continuation)))
                    row_of.append(i)
            sums = [0.0] * len(requests)
            for i, (logprob, _) in zip(row_of, self.scorer.score(rows)):
                sums[i] += logprob
            return sums

        def generate_until(self, requests, disable_tqdm=True):
            return generate_until(self, [request.args for request in requests])

        def get_model_info(self):
            """What the harness's command line writes beside its scores."""
            return dict(model_num_parameters=self.model.n_params, **protocol(self))

    return Checkpoint


def harness_model(model, tokenizer, on, window=None, batch_tokens=0, progress=None):
    """Our model as an lm_eval.api.model.TemplateLM.

    model: in eval mode on on.device; tokenizer: tokenizers.Tokenizer; on: machine.Device, whose dtype is the compute
    type. window: longest row in tokens; None: the model's context. batch_tokens, progress: see `Scorer`. Raises
    UserError if lm_eval is missing, or if the window is longer than the model's context.
    """
    return adapter()(model, tokenizer, on, window, batch_tokens, progress)


def protocol(lm):
    """What a score depends on beside the model's weights, for the record."""
    return dict(
        harness=version("lm_eval"), window=lm.max_length, stride=lm.max_length,
        prefix_token=lm.encoder.id_to_token(lm.prefix_token_id), dtype=str(lm.on.dtype).removeprefix("torch."))


# ---------------------------------------------------------------------------------------------------- generating

GENERATED_TOGETHER = 32  # texts
DEFAULT_LENGTH = 256  # tokens that are generated if the task does not say, as the harness's `hf` model has it
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


def generate_until(lm, requests):
    """[(context, the task's settings)] -> the texts that follow, each cut before the first of its stop texts.

    Greedy unless the task says otherwise. A context that leaves no room in the window loses its beginning. Raises
    UserError for settings that there are not here, and if what is to be generated fills the window by itself.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    # what can be generated together: the same settings, and contexts of the same length, as nothing is padded here
    together = defaultdict(list)
    for i, (context, asked) in enumerate(requests):
        given = dict(normalize_gen_kwargs(asked, min(DEFAULT_LENGTH, lm.max_length // 2)))
        length, stops = given.pop("max_gen_toks"), tuple(given.pop("until"))
        room = lm.max_length - length
        if room < 1:
            raise UserError(f"the task generates {length:,} tokens, and the model reads {lm.max_length:,}: that leaves "
                            "no room for a question")
        ids = lm.tok_encode(context)[-room:] or [lm.prefix_token_id]
        together[len(ids), length, stops, sampling_of(given)].append((i, ids))

    texts, done = [""] * len(requests), 0
    for (_, length, stops, sampling), members in together.items():
        for begin in range(0, len(members), GENERATED_TOGETHER):
            some = members[begin:begin + GENERATED_TOGETHER]
            found = generate(lm, [ids for _, ids in some], length, stops, dict(sampling))
            for (i, _), text in zip(some, found):
                texts[i] = text
            done += len(some)
            lm.scorer.show(f"{done:,} of {len(requests):,} texts generated")
    return texts


def sampling_of(given):
    """A task's settings -> what `sample.stream` is to be given, as pairs."""
    is_greedy = not given.pop("do_sample")
    if given.pop("num_beams", 1) != 1:
        raise UserError("the task searches with several beams, which is not possible here")
    unknown = set(given) - set(SAMPLING)
    if unknown:
        raise UserError(f"the task generates with {', '.join(sorted(unknown))}, which is not possible here")
    if is_greedy:
        given["temperature"] = 0.0
    return tuple(sorted(given.items()))


def generate(lm, prompts, length, stops, sampling):
    """Continues prompts of equal length (lists of ids) by up to `length` tokens, until <|eos|> or a stop text."""
    idx = torch.tensor(prompts, device=lm.on.device)
    generator = torch.Generator(lm.on.device).manual_seed(0)
    said = [[] for _ in prompts]
    done = [False] * len(prompts)
    with lm.on.autocast():
        for tokens in stream(lm.model, idx, length, generator=generator, **sampling):
            for i, token in enumerate(tokens.tolist()):
                if done[i]:
                    continue
                if token == lm.eot_token_id:
                    done[i] = True
                    continue
                said[i].append(token)
                text = lm.encoder.decode(said[i])
                done[i] = any(stop in text for stop in stops if stop)
            if all(done):
                break

    texts = [lm.encoder.decode(tokens) for tokens in said]
    for stop in filter(None, stops):
        texts = [text.split(stop)[0] for text in texts]
    return texts


# ---------------------------------------------------------------------------------------------------- local data

def pages(text):
    """WikiText's text -> its documents, as the Hub's EleutherAI/wikitext_document_level has them.

    A page begins at a heading ` = Title = `; one of a section has more equals signs. The line end before a heading
    belongs to no page.
    """
    found, page = [], []
    for line in text.split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            found.append("\n".join(page))
            page = []
        page.append(line)
    found.append("\n".join(page))
    return [page for page in found if page.strip()]


def read_rows(path):
    """The rows of a local file: of a .jsonl file its lines, of text the pages. UserError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    if path.suffix != ".jsonl":
        return [dict(page=page) for page in pages(text)]
    rows = []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {i}: not JSON") from None
        lacks = [name for name in rows[0] if name not in rows[-1]] if isinstance(rows[-1], dict) else ["its fields"]
        if lacks:
            raise UserError(f"{path}, line {i} lacks {lacks[0]}, which the others have")
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def local_files(name, config, folder):
    """Split -> file of a task's data. config: the task's own, which names the splits."""
    splits = {config.get(f"{kind}_split") for kind in ("training", "validation", "test")} - {None}
    if name.startswith("blimp_"):
        path = folder / "blimp" / f"{name.removeprefix('blimp_')}.jsonl"
        return {config["validation_split"]: path} if path.exists() else {}
    files = {split: folder / name / f"{split}.jsonl" for split in splits}
    files = {split: path for split, path in files.items() if path.exists()}
    if name == "wikitext":
        texts = [path for path in (*folder.glob("wikitext/*"), *folder.glob("wikitext*.*")) if path.suffix != ".jsonl"]
        files |= {split: path for split in splits for path in sorted(texts) if split[:5] in path.name}
    return files


def local_task(name, manager, folder):
    """A task of the harness, of whose data alone the place has changed: its own config and local files."""
    import datasets
    config = manager.task_index[name].cfg
    files = local_files(name, config, folder)
    if not {config.get("test_split"), config.get("validation_split")} & set(files):
        raise UserError(f"--tasks_dir={folder} has no data for {name}: it would be {expected_files(name, folder)}")

    def read(**_):
        return {split: datasets.Dataset.from_list(read_rows(path)) for split, path in files.items()}

    changes = dict(task=name, custom_dataset=read)
    for kind in ("training", "validation", "test"):
        if config.get(f"{kind}_split") not in files:
            changes[f"{kind}_split"] = None
    (task,) = manager.load([dict(group="local", task=[changes])])["tasks"].values()
    return task


def expected_files(name, folder):
    """Where a task's data is looked for, in words."""
    if name.startswith("blimp"):
        return f"{folder / 'blimp'}/{name.removeprefix('blimp').removeprefix('_') or 'SUBTASK'}.jsonl"
    if name == "wikitext":
        return f"{folder / name}/test.txt or valid.txt"
    return f"{folder / name}/test.jsonl or validation.jsonl"


def local_blimp(manager, folder):
    """The group of those subtasks of BLiMP that have a file."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig
    config = manager.task_index["blimp"].cfg
    found = sorted(f"blimp_{path.stem}" for path in folder.glob("blimp/*.jsonl"))
    unknown = [name for name in found if name not in config["task"]]
    if not found:
        raise UserError(f"--tasks_dir={folder} has no data for blimp: it would be {expected_files('blimp', folder)}")
    if unknown:
        raise UserError(f"{folder}/blimp/{unknown[0].removeprefix('blimp_')}.jsonl is no subtask of BLiMP"
                        f"{nearest(unknown[0], config['task'])}")
    group = Group.from_config(GroupConfig(**config))
    for name in found:
        group.add(local_task(name, manager, folder))
    return group


# ---------------------------------------------------------------------------------------------------- the tasks

@functools.cache
def task_manager(folders, tasks_dir):
    """The harness's index of tasks: of some folders of it, or of all of it (None); and of tasks_dir."""
    import lm_eval.tasks
    root = Path(lm_eval.tasks.__file__).parent
    paths = [root / folder for folder in folders or ()]
    if tasks_dir:
        paths.append(Path(tasks_dir))
    return lm_eval.tasks.TaskManager(include_defaults=folders is None, include_path=paths)


def find_manager(names, tasks_dir):
    """The index that has all of the tasks. Raises UserError for a name that the harness does not know."""
    if tasks_dir and not Path(tasks_dir).is_dir():
        raise UserError(f"--tasks_dir={tasks_dir} is not a folder")
    folders = {name: FOLDERS.get(name, "blimp") for name in names if name in FOLDERS or name.startswith("blimp_")}
    manager = task_manager(tuple(sorted(set(folders.values()))), tasks_dir)
    if any(name not in manager.task_index and name not in folders for name in names):
        manager = task_manager(None, tasks_dir)
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"lm-evaluation-harness has no task {name!r}{nearest(name, manager.all_tasks)}")
    return manager


def load_task(name, manager, tasks_dir):
    """The harness's objects of a name: a task, a group, or the tasks of a tag. UserError if that cannot be."""
    entry, folder = manager.task_index[name], Path(tasks_dir)
    is_own = entry.yaml_path and Path(entry.yaml_path).resolve().is_relative_to(folder.resolve())
    try:
        if tasks_dir and name == "blimp":
            found = [local_blimp(manager, folder)]
        elif tasks_dir and not is_own:
            if entry.kind.name != "TASK":
                raise UserError(f"--tasks_dir: {name} is several tasks; name those that {folder} has")
            found = [local_task(name, manager, folder)]
        else:
            loaded = manager.load([name])
            found = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    except UserError:
        raise
    except OSError as e:  # the libraries below raise its kinds
        if tasks_dir:
            raise
        raise UserError(f"the data of {name} cannot be read from the Hugging Face Hub ({type(e).__name__}: "
                        f"{str(e)[:200]}); --tasks_dir=DIR reads local files") from None
    except ImportError as e:
        raise UserError(f"the task {name} needs the package {e.name}: pip install {e.name}") from None
    except Exception as e:  # a task is a program of somebody else's
        hint = "; are the rows of its file as on the Hub?" if tasks_dir else ""
        raise UserError(f"the task {name} cannot be loaded ({type(e).__name__}: {str(e)[:200]}){hint}") from None
    for task in leaves(found):
        check_possible(task)
    return found


def is_group(one):
    return hasattr(one, "get_all_tasks")


def leaves(found):
    """The single tasks of tasks and groups."""
    tasks = []
    for one in found:
        tasks += one.get_all_tasks() if is_group(one) else [one]
    return tasks


def prepared(found):
    """{name: task} of the single tasks, with the examples that the harness gives if nothing else is asked for."""
    tasks = {}
    for task in leaves(found):
        if task.task_name in tasks:
            raise UserError(f"the task {task.task_name} is asked for twice, also as a part of a group")
        tasks[task.task_name] = task
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(1234)
    return tasks


def check_possible(task):
    """Raises UserError for a task that a language model of ours cannot do."""
    name = task.task_name
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {name} shows pictures or sounds; these models read text alone")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"the task {name} runs the code that a model writes; only the harness itself should do that")


@contextlib.contextmanager
def undisturbed():
    """Inside, the harness is silent, and its random numbers start from its own seeds. Afterwards those of Python and of
    numpy go on as if nothing had been drawn; it draws none of torch's."""
    python, arrays, disabled = random.getstate(), np.random.get_state(), logging.root.manager.disable
    workers = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork this process to estimate some standard errors
    logging.disable(logging.CRITICAL)
    random.seed(0)
    np.random.seed(1234)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        logging.disable(disabled)
        del os.environ["DISABLE_MULTIPROC"]
        if workers is not None:
            os.environ["DISABLE_MULTIPROC"] = workers


@contextlib.contextmanager
def compiled_once():
    """Inside, the harness compiles each of its templates once, and not for every document: most of its time."""
    from lm_eval.utils import env
    compile_template = env.from_string
    env.from_string = functools.cache(compile_template)
    try:
        yield
    finally:
        env.from_string = compile_template


def check_tasks(names, tasks_dir=""):
    """Raises UserError as run_tasks does for tasks that there are not, or that lack their data."""
    adapter()
    with undisturbed():
        manager = find_manager(names, tasks_dir)
        for name in names:
            load_task(name, manager, tasks_dir)


def run_tasks(lm, names, limit=0, tasks_dir=""):
    """Scores a `harness_model` on tasks of the harness: {"protocol": {...}, "tasks": {name: score}}.

    limit: documents of each task, or subtask, that count; 0: all. tasks_dir: folder with the data as local files, see
    this file's top. A score is a dict, see `score_of`. The model's mode and all global random numbers stay as they are,
    and nothing is printed but lm's progress line. Raises UserError for a task that is unknown or cannot be done, for a
    file that is missing or broken, and if there is no network.
    """
    from lm_eval.evaluator import evaluate
    is_training = lm.model.training
    lm.model.eval()
    try:
        with undisturbed(), compiled_once():
            manager = find_manager(names, tasks_dir)
            found = []
            for name in dict.fromkeys(names):
                lm.scorer.show(f"loading {name}")
                found += load_task(name, manager, tasks_dir)
            groups = {one.name: one for one in found if is_group(one)}
            try:
                results = evaluate(lm, dict(tasks=prepared(found), groups=groups), limit=limit or None,
                                   log_samples=False, bootstrap_iters=100)
            except (ValueError, TypeError, KeyError, IndexError) as e:
                if not tasks_dir:
                    raise
                raise UserError(f"a row of the local files in {tasks_dir} is not as the task needs it "
                                f"({type(e).__name__}: {str(e)[:200]})") from None
            scores = {}
            for one in found:
                scores |= scores_of(one, results)
    finally:
        lm.model.train(is_training)
        lm.scorer.clear()
    data = tasks_dir or "Hugging Face Hub"
    return dict(protocol=dict(**protocol(lm), limit=limit, data=data), tasks=scores)


# ---------------------------------------------------------------------------------------------------- scores

def baselines(task):
    """{metric: (chance, uniform bytes)} of a task with choices, over the documents that it was scored on.

    chance: the share that guessing gets right. uniform bytes: the score of a model that gives every byte the same
    probability, and so prefers the shortest answer; of equal ones it takes the first, as the harness does.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return {}
    requests = defaultdict(list)
    for instance in task.instances:
        requests[instance.doc_id].append(instance)
    guesses, uniform = [], defaultdict(list)
    for instances in requests.values():
        instances.sort(key=lambda instance: instance.idx)
        doc = instances[0].doc
        guesses.append(1 / len(task.doc_to_choice(doc)))
        nats = [-8 * math.log(2) * len(instance.args[1].encode()) for instance in instances]
        for metric, value in task.process_results(doc, [(x, False) for x in nats]).items():
            uniform[metric].append(value)
    chance = sum(guesses) / len(guesses)
    return {metric: (chance, float(np.mean(values))) for metric, values in uniform.items() if metric in PERCENT}


def group_baselines(group):
    """`baselines` of a group: the mean over its tasks, weighted as the group's score is."""
    weighted = {metric.metric: metric.weight_by_size for metric in group.aggregate_metric_list}
    tasks = group.get_all_tasks()
    parts = [baselines(task) for task in tasks]
    sizes = [len({instance.doc_id for instance in task.instances}) for task in tasks]
    means = {}
    for metric in set(weighted).intersection(*parts):
        weights = sizes if weighted[metric] else None
        means[metric] = tuple(np.average([part[metric] for part in parts], axis=0, weights=weights).tolist())
    return means


def scores_of(one, results):
    """{name: score} of a task, or of a group; of a group that has no score itself, those of its tasks."""
    if not is_group(one):
        return {one.task_name: score_of(one.task_name, results, baselines(one), [one])}
    if not one.aggregate_metric_list:
        scores = {}
        for task in one.get_all_tasks():
            scores |= scores_of(task, results)
        return scores
    score = score_of(one.name, results, group_baselines(one), one.get_all_tasks())
    score["subtasks"] = {task.task_name: score_of(task.task_name, results, {}, [task])["score"]
                         for task in one.get_all_tasks()}
    return {one.name: score}


def score_of(name, results, baseline, tasks):
    """One score: a dict with

        metric, score, stderr   its standard error is None if the harness estimates none; accuracies are in percent
        card                    the figure on İvme's card, or None
        chance, uniform_bytes   see `baselines`, or None
        higher_is_better        of the metric
        n, split, few_shot      documents, and the split and number of examples that the task takes
        others                  {metric: the first four lines} of the task's other metrics
    """
    found = results["results"][name]
    entries = {}
    for key, value in found.items():
        metric, _, end = key.partition(",")
        if not end or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        title = metric if end == "none" else f"{metric} ({end})"
        unit = 100 if metric in PERCENT else 1
        stderr = found.get(f"{metric}_stderr,{end}")
        chance, uniform = baseline.get(metric, (None, None))
        if uniform is not None:
            chance, uniform = 100 * chance, 100 * uniform
        entries[title] = dict(
            metric=title, score=unit * value, stderr=unit * stderr if isinstance(stderr, float) else None,
            card=CARD.get((name, metric)), chance=chance, uniform_bytes=uniform or UNIFORM_BYTES.get(metric),
            higher_is_better=results["higher_is_better"].get(name, {}).get(metric))

    score = entries.pop(METRICS.get(name, next(iter(entries))))
    config = tasks[0].config
    score |= dict(n=sum(results["n-samples"][task.task_name]["effective"] for task in tasks),
                  split=config.test_split or config.validation_split, few_shot=config.num_fewshot, others=entries)
    return score


# ---------------------------------------------------------------------------------------------------- showing

def number(value):
    return "" if value is None else f"{value:,.2f}"


def table(result):
    """A result of `run_tasks` as lines for the terminal."""
    rows = [("", "", "score", "+-", "İvme's card", "chance", "uniform bytes", "")]
    for name, score in result["tasks"].items():
        for one in (score, *score["others"].values()):
            about = ""
            if one is score:
                about = f"{score['n']:,} documents, {score['split']} split"
                if name == "blimp":
                    about = f"{len(score['subtasks'])} of {N_BLIMP} subtasks, {score['n']:,} pairs"
            unit = " %" if one["metric"].split()[0] in PERCENT else ""
            cells = [number(one[key]) for key in ("score", "stderr", "card", "chance", "uniform_bytes")]
            rows.append((name if one is score else "", one["metric"] + unit, *cells, about))
    about = result["protocol"]
    limit = f", {about['limit']:,} documents of each task" if about["limit"] else ""
    return [*columns(rows),
            f"lm-evaluation-harness {about['harness']}, data: {about['data']}{limit}; {about['dtype']}, windows of "
            f"{about['window']:,} tokens, stride {about['stride']:,}, prefix {about['prefix_token']}"]


def amount(n):
    """22028160 -> '22.0M'."""
    for unit, letter in ((10 ** 9, "B"), (10 ** 6, "M"), (10 ** 3, "K")):
        if n >= unit:
            return f"{n / unit:.1f}{letter}"
    return str(n)


def leaderboard_row(result, name, n_params, tokens_seen, tokens_per_byte):
    """A result of `run_tasks` as a Markdown table of one row: its header, its rule, and the row."""
    scores = result["tasks"]
    header = ["model", "parameters", "tokens seen", *(f"{task} {scores[task]['metric']}" for task in scores),
              "tokens per byte"]
    cells = [name, amount(n_params), amount(tokens_seen)]
    for score in scores.values():
        error = "" if score["stderr"] is None else f" ± {number(score['stderr'])}"
        cells.append(number(score["score"]) + error)
    cells.append("" if tokens_per_byte is None else f"{tokens_per_byte:.3f}")
    rule = ["---"] * len(cells)
    return ["| " + " | ".join(line) + " |" for line in (header, rule, cells)]


# ---------------------------------------------------------------------------------------------------- the launcher

def main(argv):
    """Runs the harness's own command line, to which `--model checkpoint` is known."""
    need_harness()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    @register_model("checkpoint")
    class FromFile(adapter()):
        """--model_args: ckpt (a path), ema (true, false), window, dtype (bfloat16, float32). The harness's --device is
        taken; its batch size is not, as ours is found."""

        def __init__(self, ckpt, ema=None, window=None, dtype="auto", device=None, batch_size=None,
                     max_batch_size=None):
            on = pick_device(device or "auto", dtype)
            model, tokenizer, checkpoint = load_checkpoint(ckpt, on.device, ema)
            trained = min(checkpoint["train"]["block_size"], model.cfg.context_length)
            super().__init__(model, tokenizer, on, window or trained, progress=Progress())

    cli_evaluate()
    return 0


if __name__ == "__main__":
    run_tool(main)
