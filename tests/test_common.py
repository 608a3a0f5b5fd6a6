"""common.py: flags are read as people write them, a mistake is answered in one line with what would be right, and files
are replaced as a whole."""
import dataclasses
import errno
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, strategies as st

from common import (LastingOutput, Progress, UserError, clock, columns, flag_value, lock, mended, number, parse_flags,
                    replacing, run_tool)
from conftest import ROOT
from corpus_helpers import properties
from prepare import Settings


@dataclasses.dataclass
class Example:
    steps: int = 1200  # how many; 100% of them
    rate: float = 0.5  # how fast
    title: str = "none"  # what it is called
    loud: bool = False  # whether it shouts


@properties
@given(n=st.integers(-10 ** 18, 10 ** 18))
@example(n=2010)  # 2.01 * 1000 is 2009.9999999999998
@example(n=2 ** 53 + 1)
def test_number_reads_any_whole_number_exactly(n):
    assert number(f"{n}") == number(f"{n:,}") == number(f" {n:_} ") == n
    assert number(f"{n}B") == n * 10 ** 9
    if n >= 0:
        assert number(f"{n // 1000}.{n % 1000:03}K") == n
        assert number(f"{n // 10 ** 6}.{n % 10 ** 6:06}m") == n


NUMBERS = {"235M": 235_000_000, "1_000": 1000, "1.5K": 1500, "1,024": 1024, "2b": 2 * 10 ** 9, "-3": -3}


@pytest.mark.parametrize("text", NUMBERS)
def test_flags_take_numbers_as_people_write_them(text):
    assert parse_flags([f"--steps={text}"], Example()) == ({"steps": NUMBERS[text]}, [])


@pytest.mark.parametrize("text", ["1.5", "abc", "", "_", "1.0005K", "1e3", "5 M", "M", "0x10", "nan", "inf"])
def test_what_is_no_whole_number_is_refused_with_the_flags_name(text):
    with pytest.raises(UserError, match="--steps"):
        parse_flags([f"--steps={text}"], Example())


def test_flags_and_words_come_in_any_order_and_only_what_was_typed_is_given():
    flags = ["--loud", "--rate=2", "--title", "a b"]
    for argv in ([*flags, "x", "y"], ["x", "y", *flags], ["x", *flags, "y"]):
        given, words = parse_flags(argv, Example(), positional=("NAME", "names"))
        assert (given, words) == ({"rate": 2.0, "title": "a b", "loud": True}, ["x", "y"])
    assert parse_flags([], Example()) == ({}, [])
    for off in ("--loud=false", "--no-loud"):
        assert parse_flags([off], Example()) == ({"loud": False}, [])


def test_two_dashes_are_a_value_like_any_other():
    assert parse_flags(["--title=--"], Example()) == ({"title": "--"}, [])
    for flag in ("--steps=--", "--loud=--"):
        with pytest.raises(UserError, match="'--' is n"):
            parse_flags([flag], Example())


@pytest.mark.parametrize("flag, answer", [
    ("--stepz=3", "there is no flag --stepz .did you mean steps"),
    ("--vocabsize=3", "--vocabsize .did you mean vocab_size"),
    ("--step=3", "--step .did you mean steps"),
    ("--xyzzy", "there is no flag --xyzzy; --help lists them"),
])
def test_unknown_flags_are_answered_with_the_nearest(flag, answer):
    with pytest.raises(UserError, match=answer):
        parse_flags([flag], Example(), Settings())


def test_a_word_where_none_belongs_is_refused():
    with pytest.raises(UserError, match="what is 'x'"):
        parse_flags(["--steps=3", "x"], Example())


def test_help_explains_each_flag_with_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")  # no line is broken
    with pytest.raises(SystemExit) as e:
        parse_flags(["--help"], Example(), Settings(), description="What it does.", positional=("NAME", "what to read"))
    out = capsys.readouterr().out
    assert e.value.code == 0 and "What it does." in out and "what to read" in out
    for line in ("how many; 100% of them [1,200]", "how fast [0.5]", "what it is called [none]",
                 "whether it shouts [False]"):
        assert line in out
    for field in dataclasses.fields(Settings):
        explained = [line for line in out.splitlines() if line.startswith(f"  --{field.name} ")]
        assert len(explained) == 1 and explained[0].endswith(f"[{field.default}]") and len(explained[0]) > 60


def test_the_columns_of_a_table_are_aligned():
    assert columns([("name", "tokens"), ("a", "12"), ("longer", "3")]) == ["name    tokens", "a       12", "longer  3"]


@dataclasses.dataclass
class Further(Example):
    rate: float = 0.1  # how fast at the end
    quiet: bool | None = None  # whether it whispers; not given: it depends


def test_a_dataclass_that_extends_another_one_explains_its_own_flags_and_the_others(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        parse_flags(["--help"], Further())
    out = capsys.readouterr().out
    for line in ("how many; 100% of them [1,200]", "how fast at the end [0.1]", "it depends [unset]"):
        assert line in out


def test_a_switch_without_a_default_is_unset_until_it_is_typed():
    assert parse_flags([], Further()) == ({}, [])
    assert parse_flags(["--quiet"], Further())[0] == {"quiet": True}
    assert parse_flags(["--no-quiet"], Further())[0] == {"quiet": False}


@pytest.mark.parametrize("argv, value", [
    (["--out=run"], "run"), (["--out", "run"], "run"), (["--out"], "true"), (["--out", "--lr=1"], "true"), ([], None),
    (["--out=a", "--out=b"], "b"), (["--output=run"], None), (["--out="], ""), (["--out=a=b"], "a=b"),
])
def test_a_flag_can_be_read_before_the_others_are_known(argv, value):
    assert flag_value(argv, "out") == value


# ---------------------------------------------------------------------------------------------------- errors

def ending(main, monkeypatch, capsys):
    """(exit status, standard output, standard error) of a tool."""
    monkeypatch.setattr("sys.argv", ["folder/tool.py", "--flag"])
    with pytest.raises(SystemExit) as end:
        run_tool(main)
    return end.value.code, *capsys.readouterr()


def raising(error):
    """A tool that ends with this error."""
    def main(argv):
        raise error
    return main


ENDINGS = {
    "a user's mistake": (UserError("two\n  lines"), 2, "tool.py: two lines\n"),
    "no file": (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2,
                "tool.py: a.txt: No such file or directory\n"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "a.bin"), 2,
                    "tool.py: a.bin: no space left on the disk; nothing was overwritten\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "\ntool.py: stopped\n"),
    "a GPU's memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"), 2,
                       "tool.py: there is not enough memory; fewer rows at once need less: --micro_batch of train.py, "
                       "finetune.py and eval.py, --num_samples of sample.py (CUDA out of memory)\n"),
}


@pytest.mark.parametrize("what", ENDINGS)
def test_what_a_user_can_get_wrong_is_one_line_and_a_status(what, monkeypatch, capsys):
    error, status, line = ENDINGS[what]
    assert ending(raising(error), monkeypatch, capsys) == (status, "", line)


def test_a_fault_of_the_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool.py"])
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda argv: 1 / 0)


def test_a_tool_that_ends_well_gives_its_own_status(monkeypatch, capsys):
    assert ending(lambda argv: 0, monkeypatch, capsys) == (0, "", "")


def test_an_old_python_is_told_what_is_needed(monkeypatch, capsys):
    monkeypatch.setattr("sys.version_info", (3, 10, 0))
    status, _, line = ending(lambda argv: 0, monkeypatch, capsys)
    assert status == 2 and "this needs Python 3.11 or newer" in line


# --------------------------------------------------------------------------------------------------- terminal and files

@pytest.mark.parametrize("seconds, text", [(0, "00:00"), (59.6, "01:00"), (125, "02:05"), (7265, "2:01:05")])
def test_a_clock_shows_minutes_and_hours_only_if_there_are_some(seconds, text):
    assert clock(seconds) == text


def test_a_pipe_gets_the_lines_that_stay_and_no_others(capsys):
    progress = Progress()
    progress.show("half")
    progress.done("all")
    assert capsys.readouterr().out == "all\n"


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as f:
        f.write(b"old")
        assert not path.exists()  # not before all is there
    with pytest.raises(ZeroDivisionError), replacing(path) as f:
        f.write(b"half of the ne")
        1 / 0
    assert path.read_bytes() == b"old"
    with replacing(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_link_stays_a_link_and_a_file_of_ones_own_stays_ones_own(tmp_path):
    (tmp_path / "there").mkdir()
    path, link = tmp_path / "there/chats", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o600)
    link.symlink_to(path)
    with replacing(link) as f:
        f.write(b"new")
    assert link.is_symlink() and path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text, expected", [("caffè 😀", "caffè 😀"), ("\ud83d\ude00", "😀"), ("a\ud83db", "a\ufffdb")])
def test_text_that_utf8_cannot_hold_is_mended(text, expected):
    assert mended(text) == expected


def test_output_without_a_reader_is_lost_and_nothing_else_happens():
    read, write = os.pipe()
    out = LastingOutput(open(write, "w"))
    print("somebody reads this", file=out, flush=True)
    assert os.read(read, 100) == b"somebody reads this\n"
    os.close(read)
    for _ in range(3):
        print("nobody reads this", file=out, flush=True)
    assert out.fileno() == write and not out.isatty()
    out.close()

    with open(os.devnull) as unwritable, pytest.raises(OSError):  # another fault is still a fault
        LastingOutput(unwritable).write("x")


def test_a_terminal_that_cannot_show_a_character_shows_its_number(tmp_path):
    code = "import sys; from common import run_tool; run_tool(lambda argv: print('caf\u00e9', sys.stdin.read()))"
    done = subprocess.run([sys.executable, "-c", code], input=b"na\xefve", capture_output=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.startswith(b"caf\\xe9 na\\ufffdve"), done


def test_a_lock_is_one_process_at_a_time_and_goes_with_it(tmp_path):
    pytest.importorskip("fcntl")
    first = lock(tmp_path / ".lock")
    assert first is not None and lock(tmp_path / ".lock") is None
    first.close()
    assert lock(tmp_path / ".lock") is not None


# ---------------------------------------------------------------------------------------------------- edges

@dataclasses.dataclass
class Paths:
    out: str = ""  # where to
    data: str = ""  # from where
    title: str = ""  # what it is called


def test_a_tilde_in_a_path_is_the_home_folder_and_in_a_text_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["--out=~/runs", "--data=~/a:2,b~,~", "--title=~/x"]
    assert parse_flags(argv, Paths())[0] == dict(out="/home/me/runs", data="/home/me/a:2,b~,/home/me", title="~/x")
    assert flag_value(argv, "out") == "/home/me/runs" and flag_value(argv, "title") == "~/x"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_stream_is_one_that_nobody_reads(closed):
    code = ("import sys; from common import run_tool; "
            "run_tool(lambda argv: print(1, sys.stdin.read()) or sys.stderr.write('x') and 0)")
    done = subprocess.run(f'"{sys.executable}" -c "{code}" {closed}', shell=True, cwd=ROOT, capture_output=True,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is always full")
def test_a_log_on_a_full_disk_is_lost_and_the_program_goes_on():
    out = LastingOutput(open("/dev/full", "w"))
    for _ in range(3):
        print("lost", file=out, flush=True)


def test_a_file_that_cannot_be_finished_leaves_no_part(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError), replacing(tmp_path / "x") as f:
        f.write(b"half of it")
        raise OSError(errno.ENOSPC, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"
