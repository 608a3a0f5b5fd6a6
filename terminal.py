"""A chat through standard input and output: `sample.py --chat` at a terminal or in a pipe.

Messages and commands come in, replies go out on standard output, and everything else goes to standard error.
"""
import contextlib
import importlib
import io
import json
import os
import re
import signal
import sys
from pathlib import Path

from common import WINDOWS, replacing

END = "Ctrl-Z and Enter" if WINDOWS else "Ctrl-D"
COMMANDS = f"""/reset         begins a new chat
/save [FILE]   adds this chat to FILE (chats.jsonl), a line {{"messages": [...]}} that prepare.py reads
/help          this list
/exit          ends, as {END} does. Ctrl-C ends a reply
A line that ends with a backslash goes on in the next."""


def note(text):
    """Shows what is no part of the conversation."""
    print(text, file=sys.stderr, flush=True)


def save_chat(path, messages, saved):
    """Adds the chat as a line to the file. saved: path -> the line that was saved there before, which is replaced."""
    old = Path(path).read_bytes() if os.path.exists(path) else b""
    old = old.removesuffix(saved.get(path, b""))  # somebody else may have written behind it
    if old and not old.endswith(b"\n"):
        old += b"\n"
    line = (json.dumps(dict(messages=messages), ensure_ascii=False) + "\n").encode(errors="replace")
    with replacing(path) as f:
        f.write(old + line)
    saved[path] = line


def read_message(live):
    """The next message: a line, or several of which each but the last ends with a backslash. None at the end of input.

    live: whether somebody types at a terminal, who then sees a prompt.
    """
    lines = []
    while not lines or lines[-1].endswith("\\"):
        prompt = ""
        if live:
            prompt = "  " if lines else "> "
        try:
            line = input(prompt)
        except EOFError:
            if not lines:
                return None
            break
        lines.append(line.removesuffix("\r"))
    return "\n".join([line[:-1] for line in lines[:-1]] + lines[-1:])


@contextlib.contextmanager
def counted_interrupts():
    """Gives a list that the first Ctrl-C only makes longer. The second one raises KeyboardInterrupt at once."""
    interrupts = []

    def on_signal(number, frame):
        interrupts.append(number)
        if len(interrupts) == 2:
            raise KeyboardInterrupt
    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


class Conversation:
    """A Chat through standard input and output: messages and commands come in, replies go out."""

    def __init__(self, chat, s):
        self.chat, self.s = chat, s
        self.live = bool(sys.stdin and sys.stdin.isatty())
        self.saved = {}  # see save_chat
        self.told = False  # whether the user knows that the beginning is forgotten

    def go_on(self, first=""):
        """Answers the message `first`, if there is one, and then what is read, until the input ends."""
        if self.live:
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # history and editing of the line, if the system has it
            note(f"{END} ends the chat, /help lists the commands")
        elif isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")

        if first and self.live:
            print(f"> {first}")
        if first.strip():
            self.answer(first)

        while True:
            try:
                line = read_message(self.live) if sys.stdin else None
            except KeyboardInterrupt:
                if not self.live:
                    raise
                print()
                continue
            if line is None:
                if self.live:
                    print()
                return
            command = re.fullmatch(r"(/[a-z]+)(?: (.*))?", line.strip())  # a path has more slashes
            if command and command[1] == "/exit":
                return
            if command:
                self.obey(command[1], command[2] or "")
            elif line.strip():
                self.answer(line)

    def obey(self, command, argument):
        if command == "/reset":
            self.chat.reset()
            self.saved, self.told = {}, False
            note("a new chat")
        elif command == "/save":
            self.save(os.path.expanduser(argument.strip() or "chats.jsonl"))
        elif command == "/help":
            note(COMMANDS)
        else:
            note(f"there is no command {command}\n{COMMANDS}")

    def save(self, path):
        messages = self.chat.messages
        if not any(message["role"] == "user" for message in messages):
            note("there is nothing to save yet")
            return
        try:
            save_chat(path, messages, self.saved)
            note(f"saved {len(messages)} messages to {path}")
        except (OSError, ValueError) as e:
            note(f"{path}: {getattr(e, 'strerror', None) or e}; the chat was not saved")

    def answer(self, message):
        """Shows the reply while it is generated. Ctrl-C ends it, and the chat goes on."""
        chat, s = self.chat, self.s
        try:
            with counted_interrupts() as interrupts:
                for piece in chat.reply(message, s.max_new_tokens, s.stop, lambda: bool(interrupts)):
                    print(piece, end="", flush=True)
                print(flush=True)
                if chat.cut:
                    note(f"(cut after {s.max_new_tokens:,} tokens, see --max_new_tokens)")
                if chat.forgot and not self.told:
                    self.told = True
                    note(f"(the model reads {chat.cache.max_len:,} tokens at most: "
                         "the beginning of this chat is forgotten)")
        except KeyboardInterrupt:
            if not self.live:
                raise
            print()
