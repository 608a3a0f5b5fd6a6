"""Whatever is typed behind the flags of a tool, the end is success or one line, and no file that was there changes."""
import contextlib
import dataclasses
import io
import shutil

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import bench
import eval
import export
import finetune
import gpt2preln
import i3
import ivme
import prepare
import race
import sample
import terminal
import tinymemory
import train
from common import run_tool

TOOLS = dict(train=train, finetune=finetune, prepare=prepare, sample=sample, eval=eval, export=export,
             bench=bench, race=race)
WORDS = ["", " ", "-", "--", "~", ".", "..", "/", "None", "none", "nan", "inf", "-inf", "1e999", "1e-999", "0x10",
         "1_0", "٣", "½", "1.5", "-0", "0", "1", "-1", "2", "7", "64", "300", "4096", "99999999999999999999",
         "-" + "9" * 30, "1K", "true", "false", "auto", "latest", "data", "run", "run/best.pt",
         "run/ckpt.pt", "run/config.json", "book.txt",
         "nothing/there", "a,b", ",", ":", "mine:0", "mine:-1", "mine:1e9", "mine,mine", "ivme",
         "i3-80m", "tinymemory-sft", "muon", "cosine", "document", "cuda:99", "float16", "é€\udcff", "\x00", "a\nb",
         "*", "{}", "[]", "a" * 300]
VALUES = st.sampled_from(WORDS) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=6)
SHAPES = {field.name for module in (gpt2preln, i3, ivme, tinymemory) for field in dataclasses.fields(module.Config)}


def flags_of(tool):
    """The names of all flags that a tool has."""
    names = {field.name for field in dataclasses.fields(tool.Settings)}
    if tool in (train, finetune):
        names |= SHAPES
    return sorted(names)


@st.composite
def command_lines(draw):
    """(tool, words): some flags of a tool with any values, and seldom a word or a flag that there is not."""
    name = draw(st.sampled_from(sorted(TOOLS)))
    words = list(START.get(name, ()))
    for _ in range(draw(st.integers(1, 3))):
        flag = draw(st.sampled_from(flags_of(TOOLS[name])))
        how = draw(st.sampled_from(("{}={}",) * 6 + ("{} {}", "{}", "no-{}", "{}x={}")))
        words += f"--{how.format(flag, draw(VALUES))}".split(" ", 1)
    if draw(st.integers(0, 5)) == 0:
        words.append(draw(VALUES))
    return name, words


# What each command line begins with, so that many get past the first check
START = dict(
    train=["--data=mine", "--vocab_size=600", "--n_layer=1", "--device=cpu"],
    finetune=["--init_from=run/best.pt", "--data=mine", "--loss_on=all", "--device=cpu"],
    prepare=["book.txt", "--vocab_size=300", "--tokenizer=hybrid"],
    sample=["--ckpt=run/best.pt", "--prompt=def ", "--device=cpu"], eval=["--ckpt=run/best.pt", "--device=cpu"],
    export=["--ckpt=run/best.pt"], bench=["memory"], race=["tricks"])


@pytest.fixture(scope="module")
def desk(corpora, trained, tmp_path_factory):
    """A folder with a prepared corpus, a finished run and a text. Nothing in it may change."""
    root = tmp_path_factory.mktemp("desk")
    (root / "data").mkdir()
    shutil.copytree(corpora / "data/pydocs-hybrid", root / "data/mine")
    shutil.copytree(trained, root / "run")
    (root / "book.txt").write_text("It was a dark night.\n\n" * 40)
    return root


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def nothing_heavy(monkeypatch):
    """The tools do all that comes before their work, and of the work only what takes no time."""
    def make(plan, *task):
        train.run.make_model(plan.module, plan.cfg)
        return 0

    monkeypatch.setattr(train, "train", make)
    monkeypatch.setattr(sample, "write_samples", lambda *args: 0)
    monkeypatch.setattr(terminal.Conversation, "go_on", lambda *args: 0)
    monkeypatch.setattr(eval, "work", lambda measured: None)
    monkeypatch.setattr(eval, "compare", lambda *args: None)
    monkeypatch.setattr(export, "make_release", lambda *args: None)
    monkeypatch.setattr(export, "import_model", lambda *args: 0)
    monkeypatch.setattr(export.hub, "push", lambda *args: None)
    monkeypatch.setattr(bench, "BENCHMARKS", dict.fromkeys(bench.BENCHMARKS, lambda s: None))
    monkeypatch.setattr(race, "EXPERIMENTS", dict.fromkeys(race.EXPERIMENTS, lambda s: None))


def outcome(name, words, monkeypatch):
    """(exit status, standard error) of a tool, run as from the shell."""
    errors = io.StringIO()
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        with pytest.raises(SystemExit) as end:
            run_tool(TOOLS[name].main)
    return end.value.code, errors.getvalue()


def check(desk, monkeypatch, examples):
    """Tries that many command lines."""
    monkeypatch.chdir(desk)
    before = contents(desk)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(command_lines())
    def ends_well(line):
        name, words = line
        status, errors = outcome(name, words, monkeypatch)
        assert status == 0 or status == 2 and errors.count("\n") == 1 and errors.startswith(f"{name}.py: "), errors
        assert "Traceback" not in errors

    ends_well()
    after = contents(desk)
    assert {path: after.get(path) for path in before} == before


def test_any_command_line_ends_in_success_or_in_one_line(desk, nothing_heavy, monkeypatch):
    check(desk, monkeypatch, 300)


@pytest.mark.slow
def test_many_command_lines_end_in_success_or_in_one_line(desk, nothing_heavy, monkeypatch):
    check(desk, monkeypatch, 4000)
