"""What the README promises: its code runs, its commands are real, its numbers are those of the code."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import bench
import gpt2preln
import i3
import ivme
import prepare
import sample
import tinymemory
import train
from conftest import ROOT

ARCHITECTURES = (gpt2preln, i3, ivme, tinymemory)

README = (ROOT / "README.md").read_text()


@pytest.mark.long
def test_the_ten_lines_train_and_generate_with_ivme_alone(tmp_path):
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    shutil.copy(ROOT / "ivme.py", tmp_path)
    (tmp_path / "ten_lines.py").write_text(code)
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec(open('ten_lines.py').read())"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"loss (\d\.\d+)", done.stdout)[1]) < 3.0  # 5.5 at the start
    assert len(done.stdout) > 100


def test_its_two_commands_stand_there_word_for_word():
    assert "pip install -r requirements.txt && python train.py\n" in README
    assert "pip install -r requirements-dev.txt && pytest\n" in README


def test_every_flag_it_names_exists():
    known = {f for tool in (prepare, train, sample, bench) for f in tool.Settings.__dataclass_fields__} | {f for m in ARCHITECTURES for f in m.Config.__dataclass_fields__}
    elsewhere = {"index-url", "nproc_per_node", "help", "no-ema"}
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README))
    assert len(named) > 20 and named <= known | elsewhere, named - known - elsewhere


def test_its_table_of_models_is_that_of_the_code():
    for module in ARCHITECTURES:
        for name, (cfg, _) in module.PRESETS.items():
            row, = (line for line in README.splitlines() if re.match(rf"\| .*`{name}`.*? \| \[", line))
            with torch.device("meta"):
                n_params = module.Model(cfg).n_params
            for value in (n_params, cfg.context_length, cfg.vocab_size):
                assert f"{value:,}" in row


def test_the_files_and_pictures_it_links_to_exist():
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if not x.startswith("http")]
    assert links and all((ROOT / x).exists() for x in links), links
