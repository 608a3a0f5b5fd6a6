"""What every tool needs: flags, one-line errors, the progress line, tables, and files that are replaced as a whole.

This file is the bottom of the import order. It imports no torch: a tool that needs none either, as prepare.py does not,
answers `--help` and a mistyped flag at once.
"""
import argparse
import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path


WINDOWS = os.name == "nt"


class UserError(Exception):
    """A mistake or a broken input that the user can correct: one line on standard error, exit status 2."""


# ---------------------------------------------------------------------------------------------------- flags

def number(text):
    """'235M' -> 235000000, '1.5K' -> 1500: a whole number, with K, M or B (10^3, 10^6, 10^9) perhaps.

    Its digits may have _ or , between them. Raises ArgumentTypeError if it is not whole, such as '1.0005K'.
    """
    match = re.fullmatch(r"(-?\d[\d_,]*(?:\.\d+)?)([KMB]?)", text.strip(), re.I)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    unit = {"": 1, "K": 10 ** 3, "M": 10 ** 6, "B": 10 ** 9}[match[2].upper()]
    value = Fraction(re.sub("[_,]", "", match[1])) * unit
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


BOOLEANS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def yes_or_no(text):
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOLEANS[text.lower()]


def quoted(value):
    """The value as a shell takes it for one word, for commands that are printed to be pasted."""
    return subprocess.list2cmdline([str(value)]) if WINDOWS else shlex.quote(str(value))


def nearest(word, words):
    """' (did you mean a or b?)', or nothing if no word is close."""
    close = difflib.get_close_matches(word, list(words), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def field_notes(settings):
    """Field name -> the comment after it, of an instance of a dataclass and of the dataclasses that it extends.

    The comments are read from the source code. So a field is written on one line, with four spaces before it, the
    comment at its end, and no # in its default.
    """
    notes = {}
    for kind in reversed(type(settings).__mro__):
        if dataclasses.is_dataclass(kind):
            notes |= re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(kind), re.M)
    return notes


def add_flag(parser, name, value, note):
    """Adds --name to the parser. The type of its default `value` says how the flag is read."""
    switch = value is None or isinstance(value, bool)  # None: neither yes nor no until the user says
    if switch:
        parser.add_argument(f"--no-{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        how = dict(type=yes_or_no, metavar="BOOL", nargs="?", const=True)
        default = "unset" if value is None else value
    elif isinstance(value, int):
        how = dict(type=number, metavar="INT")
        default = f"{value:,}"
    else:
        how = dict(type=type(value), metavar=type(value).__name__.upper())
        default = value
    parser.add_argument(f"--{name}", help=f"{note} [{default}]".replace("%", "%%"), **how)


def parse_flags(argv, *settings, description="", positional=None):
    """Reads --name=value flags, one for each field of the dataclass instances in `settings`.

    The comment after a field explains it to the reader of the code and, in --help, to the user.
    Returns (given, words): the flags that were typed, name -> value, and the words without dashes, which are allowed
    if `positional` (their name and help text) is given. Raises UserError for an unknown flag or a wrong value.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

        def _get_values(self, action, arg_strings):
            # before Python 3.13 the value of --flag=-- was taken for the mark that ends the flags
            if arg_strings == ["--"] and action.option_strings:
                return self._get_value(action, "--")
            return super()._get_values(action, arg_strings)

    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if positional:
        parser.add_argument("words", nargs="*", metavar=positional[0], help=positional[1])
    flags = set()
    for instance in settings:
        notes = field_notes(instance)
        for field in dataclasses.fields(instance):
            if field.name not in flags:
                flags.add(field.name)
                add_flag(parser, field.name, getattr(instance, field.name), notes.get(field.name, ""))

    namespace, unknown = parser.parse_known_args(list(map(with_home, argv)))
    for word in unknown:
        if word.startswith("-"):
            flag = word.lstrip("-").split("=")[0]
            raise UserError(f"there is no flag --{flag}{nearest(flag, flags)}; --help lists them")
        if not positional:
            raise UserError(f"what is {word!r}? flags are written --name=value")
    given = vars(namespace)
    words = given.pop("words", [])
    return given, [*words, *unknown]  # argparse does not collect words that follow a flag, so they are in `unknown`


# flags whose values are paths, or lists of paths
PATHS = ("base_data", "bundle", "ckpt", "data", "import_from", "init_from", "nanogpt", "out", "out_dir", "probes",
         "resume", "show", "source_dir", "tasks_dir", "tokenizer", "verify")


def with_home(word):
    """--out=~/runs with the user's home folder in place of ~, which a shell leaves as it is behind an equals sign."""
    if not re.match(rf"--({'|'.join(PATHS)})=", word):
        return word
    return re.sub(r"(?<=[=,])~(?=/|$)", lambda _: os.path.expanduser("~"), word)


def flag_value(argv, name):
    """The value of --name in argv, or None. It is for flags that decide which other flags there are to parse."""
    value = None
    for i, word in enumerate(map(with_home, argv)):
        if word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
        elif word == f"--{name}":
            follows = i + 1 < len(argv) and not argv[i + 1].startswith("--")
            value = argv[i + 1] if follows else "true"
    return value


# ---------------------------------------------------------------------------------------------------- errors

def run_tool(main):
    """Runs main(argv) and exits. A user's mistake becomes one line on standard error and exit status 2."""
    # a stream that was closed is one that nobody reads
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    # what a terminal cannot show is escaped, and what is read may have any bytes
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
            if WINDOWS and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
                stream.reconfigure(encoding="utf-8")  # as files have it; Windows would take its old code page
    try:
        if sys.version_info < (3, 11):
            raise UserError(f"this needs Python 3.11 or newer, and {sys.executable} is {platform.python_version()}")
        status = main(sys.argv[1:])
    except BaseException as e:
        status = told(e)
        if status is None:
            raise
    sys.exit(status)


def told(error):
    """Says in a line on standard error what ended the program, and returns its exit status; None, and no line, for what
    is a fault of the program."""
    tool = Path(sys.argv[0]).name
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{tool}: stopped", file=sys.stderr)
        return 130
    if is_closed_pipe(error):  # by `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, (UserError, argparse.ArgumentTypeError)):
        message = str(error)
    elif isinstance(error, OSError):
        reason = error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            reason = "no space left on the disk; nothing was overwritten"
        message = f"{error.filename or 'the output'}: {reason}"
    elif is_out_of_memory(error):
        message = ("there is not enough memory; fewer rows at once need less: --micro_batch of train.py, finetune.py "
                   f"and eval.py, --num_samples of sample.py ({str(error).split('. ')[0] or type(error).__name__})")
    else:
        return None
    print(f"{tool}: " + " ".join(message.split()), file=sys.stderr)
    return 2


def is_closed_pipe(error):
    """Whether this is the system's way to say that nobody reads the output; Windows calls it an invalid argument."""
    if WINDOWS and isinstance(error, OSError) and error.errno == errno.EINVAL:
        return not error.filename
    return isinstance(error, BrokenPipeError)


def is_out_of_memory(error):
    """Whether this is Python's, a CPU's or a GPU's way to say so, in torch's words, which need not be loaded here."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")  # Linux, Windows, a GPU
    return isinstance(error, RuntimeError) and any(said in str(error) for said in words)


# ---------------------------------------------------------------------------------------------------- the terminal

def clock(seconds):
    """125 -> '02:05', 7265 -> '2:01:05'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m:02d}:{s:02d}"


def columns(rows):
    """Rows of strings as lines of a table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


class LastingOutput:
    """Standard output that may be lost: its reader goes away, a terminal or the other end of a pipe, or the disk of a
    log is full. The program goes on without it.

    It stands in the place of sys.stdout. What is written afterwards is lost.
    """
    LOST = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
            *([errno.EINVAL] if WINDOWS else []))  # Windows' word for a closed pipe

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with self.lost():
            return self.stream.write(text)

    def flush(self):
        with self.lost():
            self.stream.flush()

    @contextlib.contextmanager
    def lost(self):
        try:
            yield
        except OSError as e:
            if e.errno not in self.LOST:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def lasting_output():
    """Inside, print writes to a LastingOutput."""
    return contextlib.redirect_stdout(LastingOutput(sys.stdout))


class Progress:
    """One line that updates itself on a terminal. Elsewhere only `done` prints, so that logs stay short."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.shown_at = 0.0
        if self.live and WINDOWS:
            os.system("")  # after it an old console understands the code that clears a line

    def show(self, text):
        """Replaces the line, ten times a second at most."""
        if self.live and time.monotonic() - self.shown_at > 0.1:
            self.shown_at = time.monotonic()
            print(f"\r\x1b[K{text[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def clear(self):
        """Removes the line."""
        if self.live:
            print("\r\x1b[K", end="", flush=True)

    def done(self, text):
        """Prints a line that stays."""
        self.clear()
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------- text and files

def mended(text):
    """The text as UTF-8 can hold it: halves of surrogate pairs are joined, and a half without its partner is U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def lock(path):
    """An open file that holds the lock `path` until it is closed or the process ends; None if another process does.

    On a system or a disk that has no locks it holds nothing.
    """
    file = open(path, "a")
    try:
        if WINDOWS:
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if isinstance(e, PermissionError if WINDOWS else BlockingIOError):
            file.close()
            return None
    except ImportError:
        pass
    return file


def replace(new, old):
    """os.replace, for which Windows has to wait until nobody reads the old file: a virus scanner, or sample.py."""
    for _ in range(20 if WINDOWS else 0):
        with contextlib.suppress(PermissionError):
            return os.replace(new, old)
        time.sleep(0.1)
    os.replace(new, old)


@contextlib.contextmanager
def replacing(path):
    """A file to write to, which then takes the place of `path`. A crash leaves the old or the new one whole.

    Of a link, what it leads to is replaced; and who may read the old file may read the new one.
    """
    path = Path(os.path.realpath(path))
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            with contextlib.suppress(OSError):
                os.chmod(part, stat.S_IMODE(os.stat(path).st_mode))
            yield f
            f.flush()
            os.fsync(f.fileno())  # without it the rename can reach the disk before the contents
        replace(part, path)
    except OSError:  # a full disk needs the room
        with contextlib.suppress(OSError):
            part.unlink()
        raise
