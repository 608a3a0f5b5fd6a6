"""terminal.py: a chat through a pipe and at a pseudo-terminal, its commands, Ctrl-C, and what is saved."""
import io
import json
import os
import select
import signal
import sys
import time

import pytest

import run
import runfolder
import sample
import terminal
from conftest import ROOT
from corpus.chats import chat_messages


def test_a_saved_chat_replaces_only_its_own_line(tmp_path):
    path, saved = tmp_path / "chats.jsonl", {}
    path.write_text('{"messages": 1}')  # without a line end
    terminal.save_chat(path, ["a"], saved)
    terminal.save_chat(path, ["a", "b"], saved)
    assert path.read_text() == '{"messages": 1}\n{"messages": ["a", "b"]}\n'
    with open(path, "a") as f:
        f.write("another's\n")
    terminal.save_chat(path, ["a", "b", "\udce9"], saved)
    lines = ['{"messages": 1}', '{"messages": ["a", "b"]}', "another's", '{"messages": ["a", "b", "?"]}']
    assert path.read_text() == "\n".join(lines) + "\n"


@pytest.fixture
def chatty(trained, tmp_path):
    """A checkpoint that never ends a reply of its own accord when it takes the likeliest token."""
    checkpoint = run.read_checkpoint(trained / "best.pt")
    for part in ("model", "ema"):
        checkpoint[part]["embed.weight"][:7] = 0
    runfolder.save_checkpoint(tmp_path / "chatty.pt", checkpoint)
    return tmp_path / "chatty.pt"


PIPED = """import os\r
class A:\\\r
    pass
/save chat.jsonl
again
/save chat.jsonl
/nonsense
/reset
/save chat.jsonl

x
/save chat.jsonl
/save /no/such/folder/x
/exit
never"""


def test_a_chat_through_pipes_answers_each_line_and_saves_what_prepare_reads(chatty, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(PIPED))
    flags = [f"--ckpt={chatty}", "--chat", "--max_new_tokens=6", "--temperature=0", "--system=be brief"]
    assert sample.main(flags) == 0
    out, err = capfd.readouterr()
    saved = [json.loads(line)["messages"] for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    asked = [[m["content"] for m in chat if m["role"] == "user"] for chat in saved]
    assert asked == [["import os", "class A:\n    pass", "again"], ["x"]]
    assert "".join(m["content"] + "\n" for chat in saved for m in chat if m["role"] == "assistant") == out
    assert all(chat[0] == dict(role="system", content="be brief") for chat in saved) and ">" not in out
    for line in ("saved 7 messages to chat.jsonl", "there is no command /nonsense", "the chat was not saved",
                 "a new chat", "there is nothing to save yet", "cut after 6 tokens"):
        assert line in err
    assert [chat_messages(dict(messages=chat)) for chat in saved]


def test_the_first_message_may_be_a_flag_and_is_never_a_command(chatty, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("/save chat.jsonl\n"))
    flags = [f"--ckpt={chatty}", "--chat", "--max_new_tokens=6", "--temperature=0", "--prompt=/reset"]
    assert sample.main(flags) == 0
    question, answer = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert question["content"] == "/reset" and capfd.readouterr().out == answer["content"] + "\n"


class TerminalUser:
    """Someone at a terminal, who types to a process and sees what it shows."""

    def __init__(self, fd):
        self.fd, self.shown = fd, b""

    def type(self, keys):
        os.write(self.fd, keys)

    def wait_until(self, condition):
        """Reads until condition() is true, or until the process has closed its side."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.shown
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.shown += os.read(self.fd, 65536)
                except OSError:  # the other side is closed
                    return

    def wait_for(self, ending):
        self.wait_until(lambda: self.shown.endswith(ending))


def test_ctrl_c_ends_a_reply_and_the_chat_goes_on(chatty, tmp_path):
    """On a terminal: an endless reply, Ctrl-C, at the prompt Ctrl-C again, another message, /save, Ctrl-D."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")
    flags = [f"--ckpt={chatty}", "--chat", "--max_new_tokens=1000000", "--temperature=0"]
    pid, fd = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.environ["OMP_NUM_THREADS"] = "1"
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
        os.execv(sys.executable, [sys.executable, str(ROOT / "sample.py"), *flags])
    user = TerminalUser(fd)
    user.wait_for(b"> ")

    # Ctrl-C in a reply
    for message in (b"import os", b"again"):
        begun = len(user.shown)
        user.type(message + b"\r")
        user.wait_until(lambda: len(user.shown) > begun + 200)
        user.type(b"\x03")
        user.wait_for(b"> ")

    # Ctrl-C at the prompt
    user.type(b"half a mess")
    user.wait_for(b"half a mess")
    begun, pressed = len(user.shown), []

    def another_prompt():  # between its prompt and its waiting for keys Python misses a signal
        if not pressed or time.monotonic() > pressed[-1] + 1:
            pressed.append(time.monotonic())
            user.type(b"\x03")
        return len(user.shown) > begun and user.shown.endswith(b"> ")
    user.wait_until(another_prompt)

    user.type(b"/save chat.jsonl\r")
    user.wait_until(lambda: b"saved 4 messages" in user.shown and user.shown.endswith(b"> "))
    user.type(b"\x04")
    if sys.platform == "linux":
        user.wait_until(lambda: False)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(fd)
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and b"Traceback" not in user.shown
