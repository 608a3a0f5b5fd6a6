"""common.py: flags are read as people write them, and a mistake in one is answered with what would be right."""
import dataclasses

import pytest
from hypothesis import example, given, strategies as st

from common import UserError, columns, number, parse_flags
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
