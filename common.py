"""What every tool needs: flags, one-line errors, the progress line, files that are replaced as a whole."""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import inspect
import os
import platform
import re
import shutil
import sys
import time
from fractions import Fraction
from pathlib import Path


class UserError(Exception):
    """A mistake or a broken input that the user can mend: shown as one line on standard error, exit status 2."""


def number(text):
    """'235M' -> 235000000: an int, with _ or , between digits and K, M or B (10^3, 10^6, 10^9) behind it."""
    m = re.fullmatch(r"(-?\d[\d_,]*(?:\.\d+)?)([KMB]?)", text.strip(), re.I)
    value = Fraction(re.sub("[_,]", "", m[1])) * {"": 1, "K": 10 ** 3, "M": 10 ** 6, "B": 10 ** 9}[m[2].upper()] if m else 0.5
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def yes_or_no(text):
    try:
        return {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def nearest(word, words):
    """' (did you mean a or b?)', or nothing if no word is close."""
    close = difflib.get_close_matches(word, list(words), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def parse_flags(argv, *settings, description="", positional=None):
    """Reads --name=value flags, one for each field of the dataclass instances in `settings`; a field's comment is its help.

    Returns (given, words): the flags that were typed, name -> value, and the words without dashes (allowed if `positional`
    names them). Raises UserError for an unknown flag or a value of the wrong type.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if positional:
        parser.add_argument("words", nargs="*", metavar=positional[0], help=positional[1])
    flags = set()
    for s in settings:
        # the comment behind a field explains it to the reader of the code and, here, to the reader of --help
        notes = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(type(s)), re.M))
        for f in dataclasses.fields(s):
            if f.name in flags:
                continue
            flags.add(f.name)
            value = getattr(s, f.name)
            switch = value is None or isinstance(value, bool)  # None: neither yes nor no until the user says
            kind = yes_or_no if switch else number if isinstance(value, int) else type(value)
            extra = dict(nargs="?", const=True) if switch else {}
            if switch:
                parser.add_argument(f"--no-{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
            shown = f"{value:,}" if kind is number else "unset" if value is None else value
            parser.add_argument(f"--{f.name}", type=kind, metavar={yes_or_no: "BOOL", number: "INT"}.get(kind, kind.__name__.upper()),
                                help=f"{notes.get(f.name, '')} [{shown}]".replace("%", "%%"), **extra)
    namespace, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("-"):
            flag = word.lstrip("-").split("=")[0]
            raise UserError(f"there is no flag --{flag}{nearest(flag, flags)}; --help lists them")
        if not positional:
            raise UserError(f"what is {word!r}? flags are written --name=value")
    given = vars(namespace)
    return given, [*given.pop("words", []), *unknown]  # argparse leaves the words behind a flag to us


def run_tool(main):
    """main(argv) with this project's manners: a user's mistake is one line on standard error and exit status 2."""
    tool = Path(sys.argv[0]).name
    try:
        if sys.version_info < (3, 11):
            raise UserError(f"this needs Python 3.11 or newer, and {sys.executable} is {platform.python_version()}")
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        print(f"\n{tool}: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        message = f"{e.filename or 'the output'}: {'no space left on the disk; nothing was written over' if full else e.strerror or e}"
    print(f"{tool}: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def clock(seconds):
    """125 -> '02:05', 7265 -> '2:01:05'."""
    m, s = divmod(round(seconds), 60)
    return f"{m:02d}:{s:02d}" if m < 60 else f"{m // 60}:{m % 60:02d}:{s:02d}"


class Progress:
    """One line that updates itself on a terminal. Elsewhere only `done` prints, so that logs stay short."""

    def __init__(self):
        self.live, self.last = sys.stdout.isatty(), 0.0

    def show(self, text):
        if self.live and time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            print(f"\r\x1b[K{text[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def done(self, text):
        print(("\r\x1b[K" if self.live else "") + text, flush=True)


def mended(text):
    """The text as UTF-8 can hold it: halves of surrogate pairs out of JSON escapes are joined, those without a partner become U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextlib.contextmanager
def replacing(path):
    """A file to write to, which takes path's place when all is written: a crash leaves the old file or the new one, never half of either."""
    part = Path(path).with_name(Path(path).name + ".part")
    with open(part, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())  # without it the rename can reach the disk before the contents
    os.replace(part, path)
