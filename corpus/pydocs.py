"""The embedded corpora, which need no network: the running Python's own standard library.

pydocs       a document for each module's source and for each help topic, about 11 MB
pydocs-chat  questions and answers about that library, made from its signatures and docstrings

pydocs_chat() works in three steps. described() lists, for each module, class and function, the facts that its source
tells: its signature, its summary, its arguments and so on. A fact that two of them share is dropped. dialogues() then
asks for each fact once, in chats of one to three turns. There is no random number in it: how something is asked follows
from hashes of names, so the same Python always gives the same chats.

A chat is training or validation text as its module is in pydocs. So a validation module's docstring is in no training
chat, and a model that was trained on pydocs has not read what the validation chats ask for.
"""
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
from corpus.text import TextSource, chat_document, text_hash


# ---------------------------------------------------------------------------------------------------- the library

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # folders


def library():
    """Module name -> source file, of the running Python's library.

    Tests, installed packages, this machine's compiler flags and the help topics are left out. Raises UserError if this
    Python was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.intersection(relative.parts) or relative.parts[0] == "pydoc_data":
            continue
        if path.name.startswith("_sysconfigdata"):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        files[module] = path
    if not files:
        raise UserError(f"this Python has no library sources under {root}; "
                        "give prepare.py a text file or folder of yours")
    return files


def library_texts(files):
    """(module name, source text) of each of library()'s files.

    The 65 code pages that gencodec.py has generated are left out: a tenth of the text, and nothing but tables.
    """
    for module, path in files.items():
        with tokenize.open(path) as f:  # obeys a coding line
            text = f.read()
        if "gencodec.py" not in text[:2000]:
            yield module, text


def pydocs():
    """The library's sources and help topics as a TextSource. UserError if Python was installed without its sources."""
    files = library()

    def documents():
        for _, text in library_texts(files):
            yield text
        from pydoc_data.topics import topics
        for key in sorted(topics):
            yield topics[key]
    origin = {"dataset": "pydocs", "python": platform.python_version()}
    return TextSource("pydocs", "en", "code", origin, documents)


# ---------------------------------------------------------------------------------------------------- facts

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

LONGEST_FACT = 500  # characters


def described(module, node, outer=()):
    """What can be asked about a module, class or function, then about the classes and functions in its body.

    module: its name. node: its ast.Module, or a definition in it. outer: the names of the classes around the node.
    Yields subjects, dicts with name, noun ("class", ...), owner (the module or class it is in) and facts: kind of
    question -> reply. A subject with a private name is left out if it has no docstring.
    """
    bare = getattr(node, "name", "")  # an ast.Module has no name
    path = (*outer, bare) if bare else ()
    name = ".".join((module, *path))
    owner = ".".join((module, *outer)) if bare else "the standard library"
    noun = noun_of(node, outer)

    docstring = (ast.get_docstring(node) or "").strip()
    if docstring or not is_private(path):
        facts = {}
        for kind, names in names_in(node, noun, outer).items():
            if names or noun in ("function", "method"):
                facts[kind] = listing(name, kind, names)
        facts["summary"] = prose(docstring)
        facts["docstring"] = paragraphs(docstring)
        facts["signature"] = head(node, outer) if bare else ""
        facts["which"] = f"That is {name}."
        if bare and not outer and not is_private(name.split(".")):
            facts["where"] = f"{bare} is a {noun} of the module {module}."
            # For the question alone. If another module has the name too, it is dropped like any shared fact, and then
            # no question asks where it is.
            facts["bare"] = bare
        facts = {kind: fact for kind, fact in facts.items() if fact and len(fact) <= LONGEST_FACT}
        yield {"name": name, "noun": noun, "owner": owner, "facts": facts}

    if isinstance(node, (ast.Module, ast.ClassDef)):  # what a function defines is its own business
        for definition in definitions_in(node):
            yield from described(module, definition, path)


def noun_of(node, outer):
    if isinstance(node, ast.Module):
        return "module"
    if isinstance(node, ast.ClassDef):
        return "class"
    if is_property(node):
        return "property"
    return "method" if outer else "function"


def names_in(node, noun, outer):
    """Kind -> names: a module's public functions and classes, a class's public methods, a function's arguments."""
    if noun not in ("module", "class"):
        return {"arguments": arguments(node, outer)}
    public = {}  # name -> whether it is a class
    for x in definitions_in(node):
        if not x.name.startswith("_") and not is_property(x):
            public[x.name] = isinstance(x, ast.ClassDef)
    functions = [name for name, is_class in public.items() if not is_class]
    if noun == "class":
        return {"methods": functions}
    return {"functions": functions, "classes": [name for name, is_class in public.items() if is_class]}


def arguments(node, outer):
    """The names of a function's arguments, with * and ** before those that take several; a method's without self."""
    names = []
    for x in ast.iter_child_nodes(node.args):
        if x is node.args.vararg:
            names.append("*" + x.arg)
        elif x is node.args.kwarg:
            names.append("**" + x.arg)
        elif isinstance(x, ast.arg):  # the others are default values
            names.append(x.arg)
    if outer and "staticmethod" not in map(ast.unparse, node.decorator_list):
        return names[1:]
    return names


def definitions_in(node):
    return [x for x in node.body if isinstance(x, DEFINITIONS)]


def is_property(node):
    return any(re.search(r"property|\.[gs]etter$|\.deleter$", ast.unparse(d)) for d in node.decorator_list)


def is_private(path):
    return any(part.startswith("_") for part in path)


SENTENCE_END = r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)[.!?](?= |$)"

NO_PROSE = r">>>|^[ *+|-]|\S {3,}\S|--|->|\$"  # an example, a list or a table, an option, a signature, a command


def prose(docstring):
    """The first sentences of a docstring, at most 300 characters in one line.

    They come from the first paragraph, or from the second if the first is not made of sentences; '' if neither is.
    """
    for paragraph in re.split(r"\n\s*\n", docstring)[:2]:
        text = " ".join(paragraph.split())
        if not re.match(r"[A-Z][\w'`]*,? \S", text) or re.search(NO_PROSE, paragraph, re.M):
            continue
        if text[-1] not in ".!?:":
            text += "."
        ends = [m.end() for m in re.finditer(SENTENCE_END, text[:301])]
        return text[:ends[-1]] if ends else ""
    return ""


def paragraphs(docstring):
    """The paragraphs of a docstring that fit LONGEST_FACT characters, '' if fewer than two do.

    The last of them does not end in a colon, because then what it announces would be missing.
    """
    ends = [m.start() for m in re.finditer(r"\n\s*\n|\Z", docstring)]
    ends = [end for end in ends if end <= LONGEST_FACT and not docstring[:end].endswith(":")]
    return docstring[:ends[-1]] if len(ends) > 1 else ""


def listing(name, kind, names):
    """'textwrap.wrap', 'arguments', ['text', 'width'] -> 'textwrap.wrap takes 2 arguments: text and width.'

    It names twelve at most.
    """
    verb = "takes" if kind == "arguments" else "has"
    if not names:
        return f"{name} {verb} no {kind}."
    if len(names) == 1:
        singular = "class" if kind == "classes" else kind.removesuffix("s")
        return f"{name} {verb} one {singular}: {names[0]}."

    shown = names[:12]
    colon = ":" if shown == names else ", among them"
    return f"{name} {verb} {len(names)} {kind}{colon} {', '.join(shown[:-1])} and {shown[-1]}."


def head(node, outer):
    """The lines that begin a definition: decorators, name, and arguments or bases.

    Before those of a method stands its class, behind those of a class the head of its __init__.
    """
    def without_body(x):
        x = copy.copy(x)
        is_class = isinstance(x, ast.ClassDef)
        x.body = [without_body(y) for y in x.body if is_class and getattr(y, "name", "") == "__init__"][:1]
        return x

    text = ast.unparse(without_body(node)).replace("\n\n", "\n")
    if outer:
        return f"class {'.'.join(outer)}:\n{textwrap.indent(text, '    ')}"
    return text


# ---------------------------------------------------------------------------------------------------- questions

# Kind of fact -> how it is asked for. In the order of a chat's turns: no question contains what a later one asks for.
QUESTIONS = {
    "where": [
        "Which module has a {noun} called {bare}?",
        "Where in the standard library do I find {bare}?",
        "In which module is the {noun} {bare}?",
    ],
    "signature": [
        "What is the signature of {name}?",
        "How is {name} defined?",
        "How does the definition of the {noun} {name} begin?",
    ],
    "summary": [
        "What does {name} do?",
        "What is the {noun} {name} for?",
        "Can you explain {name}?",
        "I found {name} in somebody's code. What is it?",
        "{signature}\n\nWhat does this {noun} of {owner} do?",
        "This is from {owner}:\n\n{signature}\n\nWhat is it for?",
    ],
    "which": [
        "Which {noun} of {owner} is described as follows?\n\n{summary}",
        "Name the {noun} of {owner} with this description: {summary}",
        "I look for a {noun} of {owner}. {summary}",
    ],
    "arguments": [
        "Which arguments does {name} take?",
        "What do I pass to {name}?",
        "{signature}\n\nWhich arguments does this {noun} of {owner} take?",
        "Name the arguments of this {noun} of {owner}:\n\n{signature}",
    ],
    "functions": [
        "Which functions does the {noun} {name} have?",
        "What are the functions of {name}?",
    ],
    "classes": [
        "Which classes does the {noun} {name} have?",
        "What are the classes of {name}?",
    ],
    "methods": [
        "Which methods does the {noun} {name} have?",
        "What are the methods of {name}?",
    ],
    "docstring": [
        "Show me the docstring of {name}.",
        "What does the documentation of the {noun} {name} say?",
        "Tell me more about {name}.",
    ],
}

# The same behind another question about the same subject
FOLLOW_UPS = {
    "signature": ["What is its signature?", "And how is it defined?"],
    "summary": ["What does it do?", "And what is it for?"],
    "docstring": ["Show me its docstring.", "Tell me more about it."],
    "functions": ["Which functions does it have?", "And its functions?"],
    "classes": ["Which classes does it have?", "And its classes?"],
    "methods": ["Which methods does it have?", "And its methods?"],
}

SYSTEM = [
    "You answer questions about Python's standard library.",
    "You are a helpful assistant who knows Python.",
    "Answer briefly and precisely.",
]


def dialogues(subjects):
    """Chats of one to three turns about the subjects of one module, as lists of (question, reply).

    Each fact is told once. How it is asked for, and whether that opens a new chat, follows from a hash of the subject's
    name and the kind of question.
    """
    chats = []
    for subject in subjects:
        facts = subject["facts"]
        known = subject | facts  # what a question may mention
        opened = False  # whether the last chat is about this subject
        for kind in QUESTIONS:
            if kind not in facts:
                continue
            pick = zlib.crc32(f"{subject['name']} {kind}".encode())
            has_room = chats and len(chats[-1]) < 3

            follows = opened and kind in FOLLOW_UPS and has_room and pick % 3 > 0
            questions = FOLLOW_UPS[kind] if follows else QUESTIONS[kind]
            usable = [q for q in questions if known.keys() >= set(re.findall(r"{(\w+)}", q))]
            if not usable:
                continue

            # a subject may also go on in the chat about the one before
            changes_subject = not opened and has_room and pick % 3 == 0
            if not follows and not changes_subject:
                chats.append([])
            question = usable[pick // 3 % len(usable)].format(**known)
            chats[-1].append((question, facts[kind]))
            opened = True
    return chats


def pydocs_chat():
    """Questions and answers about the library as a TextSource.

    What two definitions have in common, such as a docstring, is left out. So no reply occurs twice, and no reply of a
    validation module is in a training chat. Raises UserError if Python was installed without its sources.
    """
    files = library()

    @functools.cache  # it is asked for twice: for the tokenizer's sample and to encode
    def modules():
        found = []  # for each module the hash of its source and its subjects
        for module, text in library_texts(files):
            subjects = {}
            for subject in described(module, ast.parse(text)):
                subjects.setdefault(subject["name"], subject)  # a setter has its getter's name: the getter is meant
            found.append((text_hash(text.encode()), list(subjects.values())))

        # drop the facts that are told of more than one subject
        every = [subject for _, subjects in found for subject in subjects]
        told = Counter(fact for subject in every for fact in subject["facts"].values())
        for subject in every:
            subject["facts"] = {kind: fact for kind, fact in subject["facts"].items() if told[fact] == 1}
        return found

    def documents():
        for module_hash, subjects in modules():
            for turns in dialogues(subjects):
                yield chat_document(messages_of(turns), module_hash)
    origin = {"dataset": "pydocs-chat", "python": platform.python_version()}
    return TextSource("pydocs-chat", "en", "chat", origin, documents, chat=True)


def messages_of(turns):
    """[(question, reply)] as [(role, text)]; one chat in eight begins with a system message."""
    messages = []
    pick = zlib.crc32(turns[0][0].encode())
    if pick % 8 == 0:
        messages.append(("system", SYSTEM[pick // 8 % len(SYSTEM)]))
    for question, reply in turns:
        messages += [("user", question), ("assistant", reply)]
    return messages


EMBEDDED = {"pydocs": pydocs, "pydocs-chat": pydocs_chat}
