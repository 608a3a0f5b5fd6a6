"""What the README promises: its code runs, its commands are real, its numbers are those of the code."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

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
import tinymemory
import train
from conftest import ROOT

ARCHITECTURES = (gpt2preln, i3, ivme, tinymemory)
TOOLS = dict(prepare=prepare, train=train, finetune=finetune, sample=sample, eval=eval, export=export, bench=bench,
             race=race)
README = (ROOT / "README.md").read_text()


@pytest.mark.long
def test_the_ten_lines_train_and_generate_with_ivme_alone(tmp_path):
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "range(200)" in code
    shutil.copy(ROOT / "ivme.py", tmp_path)
    (tmp_path / "ten_lines.py").write_text(code.replace("range(200)", "range(60)"))
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec(open('ten_lines.py').read())"
    done = subprocess.run([sys.executable, "-I", "-c", start], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"loss (\d\.\d+)", done.stdout)[1]) < 3.6  # 5.5 at the start, below 3 after all 200 steps
    assert len(done.stdout) > 100


def test_its_two_commands_stand_there_word_for_word():
    assert "pip install -r requirements.txt && python train.py\n" in README
    assert "pip install -r requirements-dev.txt && pytest\n" in README


def fields(thing):
    return set(thing.__dataclass_fields__)


SHAPES = set().union(*(fields(module.Config) for module in ARCHITECTURES))


def test_every_flag_it_names_exists():
    known = SHAPES.union(*(fields(tool.Settings) for tool in TOOLS.values()))
    elsewhere = {"index-url", "nproc_per_node", "help", "no-ema", "model_args"}
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README))
    assert len(named) > 20 and named <= known | elsewhere, named - known - elsewhere


def commands():
    """(tool, flags) of every command that stands on a line of its own or between backquotes."""
    found = []
    lines = [line for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", README)
    for line in lines:
        command = line.split("  #")[0]
        for tool, words in re.findall(r"(?:python|torchrun --nproc_per_node=\d+) (\w+)\.py([^|&;]*)", command):
            found.append((tool, re.findall(r"(?<!\S)--([a-z]\w*)", words)))
    return found


def test_every_command_names_a_tool_and_flags_that_this_tool_has():
    assert len(commands()) > 10
    for tool, flags in commands():
        known = fields(TOOLS[tool].Settings)
        if tool in ("train", "finetune"):
            known |= SHAPES
        assert set(flags) <= known | {"help"}, (tool, flags)


def test_its_table_of_models_is_that_of_the_code():
    for module in ARCHITECTURES:
        name, (cfg, _) = next(iter(module.PRESETS.items()))
        row, = (line for line in README.splitlines() if re.match(rf"\| `{name}` \| \[{module.__name__}.py\]", line))
        with torch.device("meta"):
            n_params = module.Model(cfg).n_params
        for value in (n_params, cfg.context_length):
            assert f"{value:,}" in row


def test_every_shape_that_can_be_pretrained_is_named():
    """A second name of the same shape, and a recipe for fine-tuning, need no mention."""
    for module in ARCHITECTURES:
        named = [cfg for name, (cfg, _) in module.PRESETS.items()
                 if f"`{name}`" in README or f"`{name.removeprefix(module.__name__)}`" in README]
        for name, (cfg, _) in module.PRESETS.items():
            assert cfg in named, name


def test_the_files_and_pictures_it_links_to_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links), links


def test_it_is_200_lines_long_at_most():
    assert len(README.splitlines()) <= 200
