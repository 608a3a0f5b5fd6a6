"""The order of the house: who imports whom, what is imported only when needed, how long lines and functions are."""
import ast
import subprocess
import sys

import pytest

from conftest import ROOT

# A module imports only modules from lines above its own, also inside its functions
ORDER = [
    ["common"],
    ["corpus.foreign", "corpus.chats", "corpus.catalogue", "corpus.samples", "machine", "report", "terminal"],
    ["corpus.tokenizer"],
    ["corpus.files", "corpus.counts"],
    ["corpus.text"],
    ["corpus.pydocs", "corpus.hub"],
    ["corpus.folder"],
    ["corpus.loader", "corpus.describe", "corpus.passes"],
    ["prepare", "runfolder"],
    ["run"],
    ["release.contents", "release.hub"],
    ["release.transformers_format"],
    ["release.card", "release.gguf_format", "release.importing", "release.llama_cpp"],
    ["export"],
    ["sample"],
    ["evaluation.behaviour", "evaluation.likelihood", "evaluation.losses"],
    ["evaluation.decoding", "evaluation.harness", "evaluation.probes"],
    ["evaluation.bundle", "evaluation.during"],
    ["minutes", "objective"],
    ["train"],
    ["finetune"],
    ["eval"],
    ["gpu_suite", "memory", "peers"],
    ["bench", "races.variants", "races.verdicts"],
    ["races.runs"],
    ["races.tables", "races.tricks"],
    ["races.recipe"],
    ["races.architectures"],
    ["races.nanogpt"],
    ["race"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# architecture -> what it imports beside torch and the standard library
ARCHITECTURES = {"ivme": set(), "tinymemory": set(), "gpt2preln": set(), "i3": {"kernels"}}
PACKAGES = {"corpus", "evaluation", "races", "release"}

FILES = {}  # module -> its file
for path in (path for folder in (".", "corpus", "evaluation", "kernels", "races", "release")
             for path in sorted(ROOT.glob(f"{folder}/*.py"))):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    FILES[name] = path
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported_names(nodes, package="kernels"):
    """All modules that the import statements among some nodes name. package: what a leading dot means."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if node.level:
                module = f"{package}.{node.module}" if node.module else package
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def ours(names):
    """Those of some modules that are files of this repository, packages apart."""
    return {name for name in names if name in FILES and name not in PACKAGES}


def at_module_level(tree):
    """Import statements that run when the module is imported."""
    nodes = list(tree.body)
    for node in nodes:  # grows while we walk
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            nodes += list(ast.iter_child_nodes(node))
    return nodes


def roots(names):
    return {name.split(".")[0] for name in names}


def test_every_module_has_its_place():
    kernels = {name for name in FILES if roots([name]) == {"kernels"}}
    assert set(FILES) - kernels - PACKAGES == set(LEVEL) | set(ARCHITECTURES)


@pytest.mark.parametrize("name", LEVEL)
def test_a_module_imports_only_modules_below_it(name):
    for other in ours(imported_names(ast.walk(TREES[name]))):
        if other in LEVEL:
            assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


def test_the_packages_themselves_import_nothing_of_the_house():
    for package in PACKAGES:
        assert not ours(imported_names(ast.walk(TREES[package])))


def test_there_are_no_circles():
    """No module is reached from itself by imports, wherever in a file they stand."""
    imports = {name: ours(imported_names(ast.walk(tree))) - {name} for name, tree in TREES.items()}
    for name in imports:
        reached, new = set(), imports[name]
        while new:
            reached |= new
            new = set().union(*(imports[other] for other in new)) - reached
        assert name not in reached


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_imports_torch_and_the_standard_library_alone(name):
    found = roots(imported_names(ast.walk(TREES[name])))
    assert found <= sys.stdlib_module_names | {"torch"} | ARCHITECTURES[name]


def test_kernels_import_nothing_above_them():
    for name in FILES:
        if name.startswith("kernels"):
            above = {other for other in ours(imported_names(ast.walk(TREES[name]))) if not other.startswith("kernels")}
            assert not above, name


NO_TORCH = ["common", "prepare", *(name for name in FILES if name.startswith("corpus.") and name != "corpus.loader")]


def test_the_data_tools_start_without_torch():
    """--help and a mistyped flag answer at once; torch takes seconds to import."""
    code = f"import sys, {', '.join(NO_TORCH)}; print([name for name in ('torch', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", FILES)
def test_large_packages_are_imported_only_by_the_function_that_needs_them(name):
    large = {"datasets", "huggingface_hub", "matplotlib", "transformers", "tiktoken", "lm_eval", "pyarrow",
             "gguf", "safetensors", "xllamacpp"}
    assert not roots(imported_names(at_module_level(TREES[name]))) & large


# ---------------------------------------------------------------------------------------------------- shape

CODE = [*FILES.values(), *sorted(ROOT.glob("tests/*.py")),
        *(path for end in ("cpp", "cu", "h") for path in ROOT.glob(f"kernels/*.{end}"))]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_longer_than_120_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [(i, line) for i, line in enumerate(lines, 1) if len(line) > 120] == []


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_longer_than_100_lines(name):
    functions = (node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef))
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {function: n for function, n in lengths.items() if n > 100} == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_file_has_450_lines_at_most(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 450


def test_no_test_file_imports_another_one():
    """What several of them need is in conftest.py or in a module of its own."""
    for path in ROOT.glob("tests/*.py"):
        found = imported_names(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        assert not {name for name in found if name.startswith("test_")}, path.name
