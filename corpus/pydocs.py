"""The embedded corpora."""
import ast
import copy
import functools
import platform
import re
import sysconfig
import textwrap
import tokenize
import zlib
from collections import Counter
from pathlib import Path

from common import UserError
from corpus.text import Source, chat_document, text_hash


def library():
    """Module's name -> its source file, of the running Python's library without tests, installed packages, this machine's compiler
    flags and the help topics. Raises UserError where a Python was installed without its sources."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in sorted(root.rglob("*.py"))
             if not left_out.intersection(p.relative_to(root).parts) and not p.name.startswith("_sysconfigdata")
             and p.relative_to(root).parts[0] != "pydoc_data"}
    if not files:
        raise UserError(f"this Python has no library sources under {root}; give prepare.py a text file or folder of yours")
    return files


def library_texts(files):
    """(module's name, source text) of library()'s files but the 65 code pages that gencodec.py generates: a tenth of the text, tables without an end."""
    for module, p in files.items():
        with tokenize.open(p) as f:  # honours a coding line
            text = f.read()
        if "gencodec.py" not in text[:2000]:
            yield module, text


def pydocs():
    """The running Python's library: a document per module's source, and per help topic.

    Raises UserError where a Python was installed without its sources.
    """
    files = library()

    def documents():
        yield from (text for _, text in library_texts(files))
        from pydoc_data.topics import topics
        for key in sorted(topics):
            yield topics[key]
    return Source("pydocs", "en", "code", {"dataset": "pydocs", "python": platform.python_version()}, documents)

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

SENTENCE_END = r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)[.!?](?= |$)"

# What is asked, in the order of the turns of a chat: nothing that stands in a question is asked for behind it
QUESTIONS = {
    "where": ["Which module has a {noun} called {bare}?", "Where in the standard library do I find {bare}?", "In which module is the {noun} {bare}?"],
    "signature": ["What is the signature of {name}?", "How is {name} defined?", "How does the definition of the {noun} {name} begin?"],
    "summary": ["What does {name} do?", "What is the {noun} {name} for?", "Can you explain {name}?", "I found {name} in somebody's code. What is it?",
                "{signature}\n\nWhat does this {noun} of {owner} do?", "This is from {owner}:\n\n{signature}\n\nWhat is it for?"],
    "which": ["Which {noun} of {owner} is described as follows?\n\n{summary}", "Name the {noun} of {owner} with this description: {summary}",
              "I look for a {noun} of {owner}. {summary}"],
    "arguments": ["Which arguments does {name} take?", "What do I pass to {name}?", "{signature}\n\nWhich arguments does this {noun} of {owner} take?",
                  "Name the arguments of this {noun} of {owner}:\n\n{signature}"],
    **{kind: [f"Which {kind} does the {{noun}} {{name}} have?", f"What are the {kind} of {{name}}?"] for kind in ("functions", "classes", "methods")},
    "docstring": ["Show me the docstring of {name}.", "What does the documentation of the {noun} {name} say?", "Tell me more about {name}."]}

FOLLOW_UPS = {
    "signature": ["What is its signature?", "And how is it defined?"], "summary": ["What does it do?", "And what is it for?"],
    "docstring": ["Show me its docstring.", "Tell me more about it."],
    **{kind: [f"Which {kind} does it have?", f"And its {kind}?"] for kind in ("functions", "classes", "methods")}}

SYSTEM = ["You answer questions about Python's standard library.", "You are a helpful assistant who knows Python.", "Answer briefly and precisely."]


def prose(docstring):
    """The first sentences of a docstring, 300 characters at most, in one line; '' where neither of its first two paragraphs is sentences."""
    for paragraph in re.split(r"\n\s*\n", docstring)[:2]:
        text = " ".join(paragraph.split())
        if re.match(r"[A-Z][\w'`]*,? \S", text) and not re.search(r">>>|^[ *+|-]|\S {3,}\S|--|->|\$", paragraph, re.M):
            text += "" if text[-1] in ".!?:" else "."
            return max((text[:m.end()] for m in re.finditer(SENTENCE_END, text[:301])), key=len, default="")
    return ""


def paragraphs(docstring):
    """A docstring of several paragraphs up to the last one that ends within 500 characters; '' where that is less than two."""
    ends = [m.start() for m in re.finditer(r"\n\s*\n|\Z", docstring) if m.start() <= 500 and not docstring[:m.start()].endswith(":")]
    return docstring[:ends[-1]] if len(ends) > 1 else ""


def listing(subject, kind, names):
    """'textwrap.wrap', 'arguments', ['text', 'width'] -> 'textwrap.wrap takes 2 arguments: text and width.'; twelve names at most."""
    count = {0: f"no {kind}", 1: f"one {kind.removesuffix('es' if kind == 'classes' else 's')}"}.get(len(names), f"{len(names)} {kind}")
    names, among = names[:12], ", among them " if len(names) > 12 else ": " if names else ""
    return f"{subject} {'takes' if kind == 'arguments' else 'has'} {count}{among}{' and '.join(filter(None, (', '.join(names[:-1]), *names[-1:])))}."


def head(node, outer):
    """The lines that begin a definition: a method's class, decorators, name, arguments or bases, and a class's __init__."""
    def bodyless(x):
        x = copy.copy(x)
        x.body = [bodyless(y) for y in x.body if isinstance(x, ast.ClassDef) and getattr(y, "name", "") == "__init__"][:1]
        return x
    text = ast.unparse(bodyless(node)).replace("\n\n", "\n")
    return f"class {'.'.join(outer)}:\n{textwrap.indent(text, '    ')}" if outer else text


def is_property(node):
    return any(re.search(r"property|\.[gs]etter$|\.deleter$", ast.unparse(d)) for d in node.decorator_list)


def described(module, node, outer=()):
    """What can be asked about a module, class or function, then about each class and function in its body: dicts of name, noun, owner and
    `facts`, kind of question -> reply. What has no docstring and a private name is left out."""
    docstring, bare = (ast.get_docstring(node) or "").strip(), getattr(node, "name", "")  # a module's node has no name
    path = (*outer, *[bare] * bool(bare))
    name, owner = ".".join((module, *path)), ".".join((module, *outer)) if bare else "the standard library"
    inner = [x for x in node.body if isinstance(x, DEFINITIONS)]
    public = {x.name: isinstance(x, ast.ClassDef) for x in inner if not x.name.startswith("_") and not is_property(x)}
    functions, classes = ([name for name, is_class in public.items() if is_class == wanted] for wanted in (False, True))
    if isinstance(node, ast.Module):
        noun, lists = "module", dict(functions=functions, classes=classes)
    elif isinstance(node, ast.ClassDef):
        noun, lists = "class", dict(methods=functions)
    else:
        noun, a, inner = "property" if is_property(node) else "method" if outer else "function", node.args, []
        names = ["*" * (x is a.vararg) + "**" * (x is a.kwarg) + x.arg for x in ast.iter_child_nodes(a) if isinstance(x, ast.arg)]
        lists = dict(arguments=names[bool(outer) and "staticmethod" not in map(ast.unparse, node.decorator_list):])  # without self
    if docstring or not any(part.startswith("_") for part in path):
        facts = {kind: listing(name, kind, names) for kind, names in lists.items() if names or noun in ("function", "method")}
        facts |= dict(summary=prose(docstring), docstring=paragraphs(docstring), signature=head(node, outer) if bare else "", which=f"That is {name}.")
        if bare and not outer and not any(part.startswith("_") for part in name.split(".")):
            facts |= dict(bare=bare, where=f"{bare} is a {noun} of the module {module}.")
        yield dict(name=name, noun=noun, owner=owner, facts={k: v for k, v in facts.items() if v and len(v) <= 500})
    for x in inner:
        yield from described(module, x, path)


def dialogues(things):
    """Chats of one to three turns about the things of one module, as lists of (question, reply). Each fact is told once. How it is asked for,
    and whether behind another question, is up to the hash of the thing's name and the kind of question."""
    chats = []
    for thing in things:
        known, opened = thing | thing["facts"], False
        for kind in (k for k in QUESTIONS if k in thing["facts"]):
            pick = zlib.crc32(f"{thing['name']} {kind}".encode())
            joins = opened and kind in FOLLOW_UPS and len(chats[-1]) < 3 and pick % 3 > 0
            usable = [q for q in (FOLLOW_UPS if joins else QUESTIONS)[kind] if known.keys() >= {*re.findall(r"{(\w+)}", q)}]
            if not usable:
                continue
            if not joins and not (chats and not opened and len(chats[-1]) < 3 and pick % 3 == 0):  # a thing may follow the one before
                chats.append([])
            chats[-1].append((usable[pick // 3 % len(usable)].format(**known), thing["facts"][kind]))
            opened = True
    return chats


def pydocs_chat():
    """Questions and answers about the running Python's library, made from its sources' signatures and docstrings. A chat is training or
    validation text as its module is in pydocs. What two definitions have in common, a docstring say, is left out: no reply occurs twice,
    and none of a validation module in a training chat.

    Raises UserError where a Python was installed without its sources.
    """
    files = library()

    @functools.cache  # asked for twice: for the tokenizer's sample and to encode
    def modules():
        found = []
        for module, text in library_texts(files):
            things = {}
            for thing in described(module, ast.parse(text)):
                things.setdefault(thing["name"], thing)  # a setter has its getter's name: the first is meant
            found.append((text_hash(text.encode()), list(things.values())))
        told = Counter(fact for _, things in found for thing in things for fact in thing["facts"].values())
        for thing in (thing for _, things in found for thing in things):
            thing["facts"] = {kind: fact for kind, fact in thing["facts"].items() if told[fact] == 1}
        return found

    def documents():
        for hash, things in modules():
            for chat in dialogues(things):
                pick = zlib.crc32(chat[0][0].encode())
                system = [("system", SYSTEM[pick // 8 % len(SYSTEM)])] if pick % 8 == 0 else []
                yield chat_document([*system, *(message for turn in chat for message in zip(("user", "assistant"), turn))], hash)
    return Source("pydocs-chat", "en", "chat", {"dataset": "pydocs-chat", "python": platform.python_version()}, documents, chat=True)

EMBEDDED = {"pydocs": pydocs, "pydocs-chat": pydocs_chat}
