"""evaluation/behaviour.py: every measure against a value computed by hand or by a plain search, and the edge cases."""
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.tokenizer import load_tokenizer
from evaluation.behaviour import (
    LanguageIdentifier, Sample, behaviour, completion_rate, distinct_2, distinct_bigrams, ends_in_loop,
    language_consistency, loop_rate, pieces, repeated_4gram_rate, repeats_4gram, switch_rate, trigrams, until,
)
from made_up import made_up_text


# ---------------------------------------------------------------------------------------------------- repetition

def test_a_continuation_ends_before_its_first_end_token():
    assert [until(ids, 2) for ids in ([5, 2, 6, 2], [5, 6], [2, 5], [])] == [[5], [5, 6], [], []]


@pytest.mark.parametrize("ids, value", [
    ([1, 2, 1, 2, 3], 3 / 4),  # 12 21 12 23
    ([1, 2, 3, 4], 1.0),
    ([7] * 5, 1 / 4),
    ([7, 7], 1.0),
    ([7], None),
    ([], None),
])
def test_distinct_bigrams_by_hand(ids, value):
    assert distinct_bigrams(ids) == value


def test_distinct_2_is_the_mean_over_samples_that_have_a_pair():
    assert distinct_2([[1, 2, 1, 2, 3], [7] * 5, [7], []]) == (3 / 4 + 1 / 4) / 2
    assert distinct_2([[7], []]) == distinct_2([]) == 0.0


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=40), loop=st.lists(st.integers(0, 2), min_size=3, max_size=9),
       times=st.integers(0, 4))
def test_repetition_is_found_where_a_search_finds_it(ids, loop, times):
    text = ids + loop * times
    places = range(len(text) - 3)
    assert repeats_4gram(text) == any(text[i:i + 4] == text[j:j + 4] for i in places for j in places if i < j)

    tails = [text[-k:] for k in range(1, len(text) + 1)]
    three_times = any(len(tail) == 3 * n and tail == tail[:n] * 3 for tail in tails for n in range(3, 20))
    one_token = len(text) > 16 and len(set(text[-17:])) == 1
    assert ends_in_loop(text) == (three_times or one_token)


@pytest.mark.parametrize("ids, repeats, loops", [
    ([], False, False),
    ([1, 2, 3], False, False),  # shorter than the n-gram
    ([1, 2, 3, 4, 1, 2, 3, 4], True, False),
    ([1, 2, 3, 4, 1, 2, 3, 5], False, False),
    ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], True, True),
    ([1, 2, 3, 1, 2, 3, 1, 2, 3, 9], True, False),  # it went on
    ([1, 2] * 6, True, True),  # 1212 three times
    ([1, 2] * 4, True, False),
    ([7] * 17, True, True),  # one token for ever
    ([7] * 8, True, False),
])
def test_repetition_by_hand(ids, repeats, loops):
    assert (repeats_4gram(ids), ends_in_loop(ids)) == (repeats, loops)
    assert repeated_4gram_rate([ids, [1], [2], [3]]) == repeats / 4
    assert loop_rate([ids, [1], [2], [3]]) == loops / 4


def test_a_sample_of_white_space_or_special_tokens_alone_is_not_complete(corpora):
    tokenizer = load_tokenizer(corpora / "data/pydocs-hybrid/tokenizer.json")
    special = [4, 5, 6, 1]  # <|user|> <|assistant|> <|system|> <|bos|>
    samples = [Sample(ids, tokenizer.decode(ids)) for ids in (special, [], tokenizer.encode(" \n").ids,
                                                              tokenizer.encode("if").ids)]
    assert [sample.text for sample in samples] == ["", "", " \n", "if"]
    assert completion_rate(samples) == 1 / 4 and completion_rate([]) == 0.0
    assert distinct_bigrams(special) == 1.0  # as tokens they do count
    assert behaviour(samples[:1], LanguageIdentifier({"en": "the house"}))["completion_rate"] == 0.0


# ---------------------------------------------------------------------------------------------------- languages

def spelled(grams):
    """Numbers of trigrams as text."""
    return ["".join(chr(gram >> shift & 2 ** 21 - 1) for shift in (42, 21, 0)) for gram in grams.tolist()]


@pytest.mark.parametrize("text, expected", [
    ("Ab, c!", [" ab", "ab ", "b c", " c "]),
    ("A1b_c", [" a ", "a b", " b ", "b c", " c "]),
    ("è", [" è "]),
    ("\U0001d4d0ж", [" \U0001d4d0ж", "\U0001d4d0ж "]),  # beyond 16 bits
    ("", []), (" 12 -\n", []), ("\ufffd", []),
])
def test_trigrams_are_of_lowercase_letters_and_single_spaces(text, expected):
    assert spelled(trigrams(text)) == expected


def test_the_identifier_by_hand():
    """Language a has learned the trigrams " ab" and "ab ", language b two others. With a half added to each of the four
    and to unknown ones, a gives its own (1 + 1/2) / (2 + 5/2) = 1/3 each, and all others 1/9."""
    identifier = LanguageIdentifier({"b": "cd", "a": "ab"})
    assert identifier.languages == ["a", "b"]
    assert identifier.log_p[0].tolist() == pytest.approx([math.log(p) for p in (1 / 3, 1 / 9, 1 / 3, 1 / 9, 1 / 9)])
    assert identifier.own.tolist() == pytest.approx([math.log(1 / 3)] * 2)
    assert [identifier.identify(text) for text in ("ab", "CD!", "cd ab cd", "ab cd")] == ["a", "b", "b", "a"]

    # a text of unknown trigrams has ln 1/9 each, 1.1 below ln 1/3; one of "ab"'s and four of these is 0.88 below it
    assert identifier.identify("xy") is None and identifier.identify("") is None and identifier.identify("3.") is None
    assert identifier.identify("ab xy") == "a"
    assert identifier.accuracy({"a": ["ab", "cd", "xy", "ab ab"], "b": ["cd"]}) == {"a": 1 / 2, "b": 1.0}


@pytest.fixture(scope="module")
def identifier():
    """It has learned English and Italian from some made-up web text."""
    rng = random.Random(0)
    return LanguageIdentifier({language: " ".join(made_up_text(language, "web", rng) for _ in range(200))
                               for language in ("en", "it")})


def test_english_and_italian_are_told_apart_and_other_languages_are_neither(identifier):
    rng = random.Random(1)
    unseen = {language: [made_up_text(language, "web", rng) for _ in range(50)] for language in ("en", "it")}
    assert identifier.accuracy(unseen) == {"en": 1.0, "it": 1.0}
    for text in ("Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
                 "Все люди рождаются свободными и равными в своём достоинстве и правах.",
                 "人人生而自由，在尊严和权利上一律平等。"):
        assert identifier.identify(text) is None


def test_any_languages_can_be_learned():
    texts = dict(de="Der alte Mann geht über die Straße und sieht das Haus.",
                 ru="Старик идёт через дорогу и видит дом.")
    identifier = LanguageIdentifier(texts)
    assert identifier.identify("Das Haus und die Straße") == "de" and identifier.identify("старик видит дом") == "ru"
    only = LanguageIdentifier({"de": texts["de"], "und": "12 + 3"})  # there are no letters to learn from
    assert only.languages == ["de"] and only.identify(texts["de"]) == "de" and only.identify(texts["ru"]) is None
    nothing = LanguageIdentifier({})
    assert nothing.identify("Haus") is None and language_consistency([Sample([1], "Haus", "de")], nothing) == {}


def test_pieces_are_cut_between_words_and_short_rests_are_left_out():
    assert [len(piece) for piece in pieces("word " * 23)] == [59, 54]
    assert pieces("word " * 5) == [] and pieces("") == []
    assert [len(piece) for piece in pieces("word " * 18)] == [59]  # and a rest of 29
    assert [len(piece) for piece in pieces("x" * 150)] == [60, 60, 30]


EN = "the old man sees the house and the river at night, again. "
IT = "il vecchio vede il palazzo e il fiume di notte, ancora una. "


def test_switches_are_counted_between_neighbouring_pieces(identifier):
    assert [len(pieces(text)) for text in (EN * 2, EN + IT, EN + IT * 2 + EN)] == [2, 2, 4]
    assert switch_rate(EN * 2, identifier) == 0.0
    assert switch_rate(EN + IT, identifier) == 1.0
    assert switch_rate(EN + IT * 2 + EN, identifier) == 2 / 3
    russian = "все люди рождаются свободными и равными, и видят свои права. "
    assert switch_rate(EN + russian + EN + IT, identifier) == 1 / 2  # what fits no language is skipped
    assert switch_rate(EN, identifier) == switch_rate("", identifier) == 0.0


def test_all_measures_of_some_samples_by_hand(identifier):
    samples = [
        Sample([1, 2, 3, 4], EN * 2, "en"),
        Sample([1, 2, 1, 2, 3], EN + IT + IT, "en"),  # more Italian than English
        Sample([], "", "en"),
        Sample([7] * 20, EN, "en"),
        Sample([1, 2, 3, 4, 1, 2, 3, 4], IT, "it"),
    ]
    consistency = {"en": 2 / 4, "it": 1.0}
    assert language_consistency(samples, identifier) == consistency
    assert behaviour(samples, identifier) == {
        "completion_rate": 4 / 5,
        "distinct_2": pytest.approx((1 + 3 / 4 + 1 / 19 + 4 / 7) / 4),
        "repeated_4gram_rate": 2 / 5,
        "loop_rate": 1 / 5,
        "language_consistency_en": 1 / 2,
        "language_consistency_it": 1.0,
        "language_consistency_mean": 3 / 4,
        "language_switch_rate_mean": (1 / 2) / 5,
    }
