"""corpus/pydocs.py: chats about the library tell each fact once, and keep the split of the sources they are from."""
import ast
import collections
import hashlib
import sysconfig

import pytest

import corpus_helpers
from common import UserError
from conftest import command, run_train
from corpus.chats import tidy
from corpus.passes import scan
from corpus.pydocs import (described, dialogues, library, library_texts, listing, paragraphs, prose, pydocs,
                           pydocs_chat)
from corpus.text import text_hash
from corpus_helpers import expected, masked

VAL = 0.3  # fraction of the modules that become validation text


# ---------------------------------------------------------------------------------------------------- a few modules

@pytest.fixture
def few_modules(monkeypatch):
    """A library of a few modules."""
    wanted = ("argparse", "ast", "bisect", "calendar", "datetime", "decimal", "difflib", "fractions", "heapq", "random",
              "statistics", "textwrap")
    files = library()
    monkeypatch.setattr("corpus.pydocs.library", lambda: {name: files[name] for name in wanted})


def run(name, out_dir):
    return corpus_helpers.run(name, out_dir, val_fraction=VAL)


def is_validation(document):
    return document.split_hash < VAL * 2 ** 64


def test_masks_of_pydocs_chat_line_up_and_modules_keep_their_side(few_modules, tmp_path):
    folder, meta = run("pydocs-chat", tmp_path)
    documents = list(pydocs_chat().documents())
    assert meta["sources"][0]["kind"] == "chat"
    for split in ("train", "val"):
        side = [d.messages for d in documents if is_validation(d) == (split == "val")]
        assert side and masked(folder, split) == expected(side)


def test_a_split_too_small_for_a_module_takes_the_lowest_and_the_tokenizer_sees_none_of_it(few_modules):
    source, documents = pydocs_chat(), list(pydocs_chat().documents())
    lowest = min(d.split_hash for d in documents)
    sample, threshold, total = scan(source, 1, 10 ** 9)
    assert {d.split_hash for d in documents if d.split_hash < threshold} == {lowest}
    assert sorted(sample) == sorted(d.text for d in documents if d.split_hash != lowest)
    assert total == sum(len(text.encode()) for d in documents for _, text in d.messages)


def test_a_budget_takes_the_beginning_of_pydocs_chat(few_modules, tmp_path):
    folder, meta = run("pydocs-chat:5000", tmp_path)
    source = meta["sources"][0]
    assert 5000 <= source["train"]["tokens"] < 7000 and source["val"]["tokens"]
    training = [d.messages for d in pydocs_chat().documents() if not is_validation(d)]
    found = masked(folder, "train")
    assert found == expected(training[:len(found)])


def test_training_prepares_pydocs_chat_by_itself_and_takes_it_as_text(few_modules, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_train("--data=pydocs-chat", "--out=run", "--pack=document") == 0
    assert (tmp_path / "data/pydocs-chat-hybrid-600/train.0-pydocs-chat.mask.bin").exists()
    assert (tmp_path / "run/best.pt").exists()


def test_a_python_without_its_sources_is_a_mistake_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for source in (pydocs, pydocs_chat):
        with pytest.raises(UserError, match="no library sources"):
            source()


# ---------------------------------------------------------------------------------------------------- the whole library

@pytest.fixture(scope="session")
def documents():
    return list(pydocs_chat().documents())


def replies(documents):
    return [text for d in documents for role, text in d.messages if role == "assistant"]


DIGEST = """
import hashlib
from corpus.pydocs import pydocs_chat
print(hashlib.sha256(repr([(d.split_hash, d.messages) for d in pydocs_chat().documents()]).encode()).hexdigest())
"""


@pytest.mark.slow
def test_pydocs_chat_is_the_same_in_every_process(documents):
    process = command("-c", DIGEST, fresh=True, PYTHONHASHSEED="7")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.strip() == hashlib.sha256(repr([(d.split_hash, d.messages) for d in documents]).encode()).hexdigest()


def test_pydocs_chat_is_many_short_chats_without_an_empty_or_a_repeated_reply(documents):
    assert len(documents) > 10_000
    for d in documents:
        assert tidy(d.messages) == d.messages
        assert 1 <= sum(role == "user" for role, _ in d.messages) <= 3
        assert all(text.strip() == text and 0 < len(text) <= 1500 for _, text in d.messages)
    told = replies(documents)
    assert len(set(told)) == len(told) and max(map(len, told)) <= 500
    assert len({d.hash for d in documents}) == len(documents)
    assert {len(d.messages) - (d.messages[0][0] == "system") for d in documents} == {2, 4, 6}


def test_a_getter_and_its_setter_are_told_of_once(documents):
    told = replies(documents)
    assert any("@property\n" in reply for reply in told) and not any(".setter\n" in reply for reply in told)


def test_a_chat_is_split_as_its_module_in_pydocs(documents):
    texts = list(library_texts(library()))
    assert [text for _, text in texts] == list(pydocs().documents())[:len(texts)]  # the topics follow
    assert {d.split_hash for d in documents} <= {text_hash(text.encode()) for _, text in texts}

    facts = collections.defaultdict(set)  # of every sixth module; two modules may be copies of each other
    for module, text in texts[::6]:
        for subject in described(module, ast.parse(text)):
            facts[text_hash(text.encode())].update(subject["facts"].values())
    for d in documents:
        if d.split_hash in facts:
            assert facts[d.split_hash].issuperset(replies([d]))


def squeezed(text):
    return " ".join(text.split())


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2])
def test_no_reply_of_a_validation_module_is_in_a_training_chat(fraction, documents):
    threshold = int(fraction * 2 ** 64)
    train = [d for d in documents if d.split_hash >= threshold]
    told = set(replies(d for d in documents if d.split_hash < threshold))
    assert told and not told & {text for d in train for _, text in d.messages}

    # Nor do validation documents say elsewhere what training chats reply; now and then two docstrings have a sentence
    # in common
    texts = squeezed("\n".join(text for text in pydocs().documents() if text_hash(text.encode()) < threshold))
    sample = replies(train[::20])
    assert sum(squeezed(reply) in texts for reply in sample) < len(sample) / 500


# reply -> a word of its question, or of one before it in the same chat
KNOWN = {
    "def dedent(text):": "textwrap.dedent",
    "textwrap.wrap takes 3 arguments: text, width and **kwargs.": "wrap",
    "class Fraction:\n    def limit_denominator(self, max_denominator=1000000):": "limit_denominator",
    "That is statistics.": "standard library",
    "ChainMap is a class of the module collections.": "ChainMap",
}


def test_pydocs_chat_knows_the_library(documents):
    before = {}  # reply -> its question and what stands before it in the chat
    for d in documents:
        for i, (role, text) in enumerate(d.messages):
            if role == "assistant":
                before[text] = (d.messages[i - 1][1], d.messages)
    for reply, word in KNOWN.items():
        question, chat = before[reply]
        assert word in question or chat[-2][1] == question and word in str(chat[:-2])


# ---------------------------------------------------------------------------------------------------- facts

SOURCE = ast.parse('''
"""Shapes in the plane, e.g. circles.  They can be drawn!
No more of them.

Author: nobody

  - a list
"""
class Circle(Shape, metaclass=M):
    """A round thing"""
    def __init__(self, r=1): pass
    @property
    def area(self):
        """Is the area inside, which cannot be changed: """
    @area.setter
    def area(self, x):
        """Never told of."""
    @staticmethod
    def unit(a, /): pass
    def _private(self): pass
    class Error(ValueError): pass
async def draw(what, /, *args, at=(0, 0), **options) -> None:
    def inner(): "Not told of."
def _hidden(): """lower case"""
''')

FACTS = {
    "plane": {
        "summary": "Shapes in the plane, e.g. circles. They can be drawn! No more of them.",
        "which": "That is plane.",
        "functions": "plane has one function: draw.",
        "classes": "plane has one class: Circle.",
        "docstring": "Shapes in the plane, e.g. circles.  They can be drawn!\nNo more of them.\n\n"
                     "Author: nobody\n\n  - a list",
    },
    "plane.Circle": {
        "summary": "A round thing.",
        "which": "That is plane.Circle.",
        "methods": "plane.Circle has one method: unit.",
        "bare": "Circle",
        "where": "Circle is a class of the module plane.",
        "signature": "class Circle(Shape, metaclass=M):\n    def __init__(self, r=1):",
    },
    "plane.Circle.area": {
        "signature": "class Circle:\n    @property\n    def area(self):",
        "which": "That is plane.Circle.area.",
    },
    "plane.Circle.unit": {
        "signature": "class Circle:\n    @staticmethod\n    def unit(a, /):",
        "which": "That is plane.Circle.unit.",
        "arguments": "plane.Circle.unit takes one argument: a.",
    },
    "plane.draw": {
        "signature": "async def draw(what, /, *args, at=(0, 0), **options) -> None:",
        "which": "That is plane.draw.",
        "bare": "draw",
        "arguments": "plane.draw takes 4 arguments: what, *args, at and **options.",
        "where": "draw is a function of the module plane.",
    },
    "plane._hidden": {
        "signature": "def _hidden():",
        "arguments": "plane._hidden takes no arguments.",
        "which": "That is plane._hidden.",
    },
}


def test_what_is_told_of_a_module():
    subjects = list(described("plane", SOURCE))
    assert [(x["name"], x["noun"], x["owner"]) for x in subjects] == [
        ("plane", "module", "the standard library"),
        ("plane.Circle", "class", "plane"),
        *2 * [("plane.Circle.area", "property", "plane.Circle")],
        ("plane.Circle.unit", "method", "plane.Circle"),
        ("plane.Circle.Error", "class", "plane.Circle"),
        ("plane.draw", "function", "plane"),
        ("plane._hidden", "function", "plane"),
    ]
    facts = {x["name"]: x["facts"] for x in reversed(subjects)}  # the first of a name
    assert {name: facts[name] for name in FACTS} == FACTS


def test_each_fact_is_told_once_and_never_given_away_before():
    subjects = [x for x in described("plane", SOURCE) if "Never told of." not in x["facts"].values()]
    chats = dialogues(subjects)
    told = [reply for chat in chats for _, reply in chat]
    assert len(told) == len(set(told)) and all(1 <= len(chat) <= 3 for chat in chats)
    assert "{" not in "".join(question for chat in chats for question, _ in chat)
    for chat in chats:
        for i, (_, reply) in enumerate(chat):
            assert not any(reply in question for question, _ in chat[:i + 1])


@pytest.mark.parametrize("docstring, summary", [
    ("Return it", "Return it."),
    ("Really so? Yes.\nAnd more\nhere:", "Really so? Yes."),
    ("wrap(text) -> list\n\nWraps text.", "Wraps text."),
    ("", ""),
    ("Word.", ""),
    ("lower case", ""),
    ("Usage:\n  x.py -h", ""),
    ("A " + "very " * 60 + "long one.", ""),
    ("A fact. " + "Very " * 60 + "long.", "A fact."),
    (">>> f(1)\n2", ""),
    ("Takes a, b, etc. and c.", "Takes a, b, etc. and c."),
])
def test_a_summary_is_whole_sentences(docstring, summary):
    assert prose(docstring) == summary


@pytest.mark.parametrize("docstring, shown", [
    ("One.", ""),
    ("One.\n\nTwo.", "One.\n\nTwo."),
    ("", ""),
    ("One.\n \nTwo:\n\n" + "x" * 500, ""),
    ("One.\n\nTwo.\n\n" + "x" * 500, "One.\n\nTwo."),
])
def test_a_docstring_is_shown_up_to_a_paragraphs_end(docstring, shown):
    assert paragraphs(docstring) == shown


@pytest.mark.parametrize("n, text", [
    (0, "f takes no arguments."),
    (1, "f takes one argument: a0."),
    (2, "f takes 2 arguments: a0 and a1."),
    (3, "f takes 3 arguments: a0, a1 and a2."),
])
def test_names_are_listed_in_english(n, text):
    assert listing("f", "arguments", [f"a{i}" for i in range(n)]) == text


def test_a_long_list_is_cut_and_says_so():
    text = "m has 14 classes, among them a, b, c, d, e, f, g, h, i, j, k and l."
    assert listing("m", "classes", list("abcdefghijklmn")) == text
    assert listing("m", "classes", ["A"]) == "m has one class: A."
