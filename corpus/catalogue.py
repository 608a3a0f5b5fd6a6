"""The data sets of the Hugging Face Hub that prepare.py knows by a short name, and mixes of them.

HUB has the names with the columns, filters and budgets that suit the sets. MIXES are lists of such names.
"""
from dataclasses import dataclass

from common import columns


@dataclass
class HubSet:
    """A data set of the Hub: where its text is, and what --list says about it."""
    repo: str
    about: str
    licence: str
    language: str
    kind: str
    rows: str = ""  # documents of the split, approximately
    tokens: str = ""  # tokens of a GPT-2-like vocabulary, approximately
    disk: str = ""  # size of the files that are read, approximately; they are streamed, never stored
    configs: tuple = ((None, 1),)  # names of configurations, each with its share of the documents
    read_columns: tuple = ("text",)  # those that are read; empty: all, as the format (.txt, .jsonl) offers no choice
    text_field: str = "text"  # field of a row that holds the text, or TinyChat's line; empty: the whole row is a chat
    filters: tuple = ()  # as pyarrow writes them: (column, operator, value)
    budget: int = 0  # training tokens unless the user names a number; 0: all
    articles: bool = False  # rows are lines, which belong together up to the next title
    chat: bool = False  # rows are chats, see chat_messages()
    split: str = "train"  # name of the split that is read
    whole_files: bool = False  # files are text, each of which is one row, and not its lines


M = 10 ** 6

# The figures are those of the sets' cards on the Hub. Those with a ~ are estimates from their sizes.
HUB = {
    "fineweb-hq": HubSet(
        "epfml/FineWeb-HQ", "English web, the best tenth, score > 0.8", "ODC-By", "en", "web", "2.4B", "~2T", "TBs",
        filters=(("quality_score", ">", 0.8),), budget=200 * M),
    "fineweb2-hq-it": HubSet(
        "epfml/FineWeb2-HQ", "Italian web, the best tenth", "ODC-By", "it", "web", "21M", "~27B", "~270 GB",
        configs=(("ita_Latn", 1),), budget=200 * M),
    "fineweb-edu": HubSet(
        "HuggingFaceFW/fineweb-edu", "educational web pages, sample-10BT", "ODC-By", "en", "web",
        "9.7M", "10B", "28 GB", configs=(("sample-10BT", 1),), budget=200 * M),
    "python-stack": HubSet(
        "bigcode/python-stack-v1-functions-filtered", "Python functions with docstrings", "permissive", "en", "code",
        "~0.6M", "~0.13B", "0.2 GB", read_columns=("content",), text_field="content"),
    "finemath": HubSet(
        "HuggingFaceTB/finemath", "mathematics from the web, finemath-4plus", "ODC-By", "en", "math",
        "6.7M", "9.6B", "18 GB", configs=(("finemath-4plus", 1),), budget=200 * M),
    "cosmopedia": HubSet(
        "HuggingFaceTB/cosmopedia", "synthetic textbooks, stanford and wikihow", "Apache-2.0", "en", "books",
        "1.2M", "~1.4B", "3.8 GB", configs=(("stanford", 1_020_024), ("wikihow", 179_191)), budget=200 * M),
    "wikipedia": HubSet(
        "wikimedia/wikipedia", "English Wikipedia of 2023-11-01", "CC BY-SA", "en", "wiki", "6.4M", "4.6B", "12 GB",
        configs=(("20231101.en", 1),), budget=200 * M),
    "wiki40b-en": HubSet(
        "google/wiki40b", "cleaned English Wikipedia", "CC BY-SA", "en", "wiki", "2.9M", "~2.2B", "6.2 GB",
        configs=(("en", 1),), budget=200 * M),
    "wiki40b-it": HubSet(
        "google/wiki40b", "cleaned Italian Wikipedia", "CC BY-SA", "it", "wiki", "0.73M", "~0.7B", "1.3 GB",
        configs=(("it", 1),), budget=200 * M),
    "wikitext": HubSet(
        "Salesforce/wikitext", "good English Wikipedia articles, wikitext-103", "CC BY-SA", "en", "wiki",
        "28K", "118M", "0.3 GB", configs=(("wikitext-103-raw-v1", 1),), articles=True),
    "tinystories": HubSet(
        "roneneldan/TinyStories", "stories in the words of small children", "CDLA-Sharing", "en", "books",
        "2.1M", "470M", "1 GB"),
    "tinychat": HubSet(
        "starhopp3r/TinyChat", "short chats in simple words", "CC BY-NC", "en", "chat", "1M", "~175M", "0.7 GB",
        read_columns=(), chat=True),
    "alpaca": HubSet(
        "tatsu-lab/alpaca", "instructions and replies of a language model", "CC BY-NC", "en", "chat",
        "52K", "~4M", "24 MB", read_columns=("instruction", "input", "output"), text_field="", chat=True),
    "dolly": HubSet(
        "databricks/databricks-dolly-15k", "instructions and replies by people", "CC BY-SA", "en", "chat",
        "15K", "~3M", "13 MB", read_columns=(), text_field="", chat=True),
    "smol-smoltalk": HubSet(
        "HuggingFaceTB/smol-smoltalk", "chats for models below a billion parameters", "Apache-2.0", "en", "chat",
        "460K", "~0.4B", "1 GB", read_columns=("messages",), text_field="", chat=True),
    "hq-sentences": HubSet(
        "agentlans/high-quality-english-sentences", "single well-formed sentences", "ODC-By", "en", "web",
        "1.5M", "~48M", "0.1 GB", read_columns=()),
}

# Mix -> (what it feeds, its sources in the order of the training run with their budgets; 0 is all)
MIXES = {
    "ivme": (
        "ivme: its card's five sources in ascending quality",
        (("fineweb-hq", 710 * M), ("python-stack", 160 * M), ("finemath", 235 * M), ("cosmopedia", 395 * M),
         ("wikipedia", 80 * M))),
    "gpt2preln": (
        "gpt2preln (--vocab_size=32000): English and Italian as on its card, budgets for web and wiki alike "
        "(our reading; wiki40b-it ends at about 0.7B)",
        (("fineweb-hq", 1_796_855_746), ("wiki40b-en", 1_796_855_746),
         ("fineweb2-hq-it", 1_652_941_754), ("wiki40b-it", 1_652_941_754))),
    "i3": (
        "i3-22m (--tokenizer=chunk): its card's TinyChat, all of it",
        (("tinychat", 0),)),
    "i3-80m": (
        "i3-80m (--tokenizer=chunk --vocab_size=35560): its card's three sets, about 3M tokens in all; how much of "
        "each is our choice",
        (("tinystories", M), ("tinychat", M), ("hq-sentences", M))),
    "i3-200m": (
        "i3-200m (--vocab_size=32000): its card's four sets; how much of each is our choice",
        (("tinystories", M), ("tinychat", M), ("hq-sentences", M), ("wikitext", M))),
    "tinymemory": (
        "tinymemory (--tokenizer=hybrid), larger than pydocs; its card names no data, the choice is ours",
        (("tinystories", 40 * M), ("hq-sentences", 10 * M))),
}


def list_table():
    """The lines of --list: a table of all names, the parts of each mix, and what else can be named."""
    rows = [
        ("name", "what it is", "licence", "documents", "tokens", "files", "language", "default", "in the mixes"),
        ("pydocs", "this Python's library and help topics, no download", "PSF",
         "740", "4M", "11 MB", "en/code", "all", ""),
        ("pydocs-chat", "questions and answers about that library, no download", "PSF",
         "31,000", "2.6M", "6 MB", "en/chat", "all", ""),
    ]
    for name, spec in HUB.items():
        default = f"{spec.budget // M}M tokens" if spec.budget else "all"
        mixes = ", ".join(mix for mix, (_, parts) in MIXES.items() if name in dict(parts))
        rows.append((name, spec.about, spec.licence, spec.rows, spec.tokens, spec.disk, f"{spec.language}/{spec.kind}",
                     default, mixes))
    yield from columns(rows)

    width = max(len(row[0]) for row in rows)
    for mix, (about, parts) in MIXES.items():
        total = sum(budget for _, budget in parts)
        yield ""
        yield f"{mix}: {about}; {total / M:,.0f}M tokens" if total else f"{mix}: {about}"
        for name, budget in parts:
            if budget:
                yield f"  {name:<{width}}  {budget / M:>8,.0f}M  {budget / total:.0%}"
    yield ""
    yield "A source that holds less than its budget gives all that it has."
    yield "Any other data set of the Hub works by its name, ORG/NAME; --config, --split and --column say what to read."
