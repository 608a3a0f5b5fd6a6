"""How a model's text behaves: does it repeat itself, does it end in a loop, does it stay in the language it began in?

Measured are continuations alone, as far as the end token, which is no part of them. Repetition is counted in tokens of
the model's own tokenizer. The names are those of the 1gpu-llm card:

    completion_rate            share of the samples that hold any text
    distinct_2                 different pairs of neighbours / pairs of neighbours, mean over the samples
    repeated_4gram_rate        share of the samples in which four tokens in a row occur twice
    loop_rate                  share of the samples that end in a loop
    language_consistency_en    share of the samples behind English prompts that read like the English of the run's text
    language_consistency_mean  mean of this over the languages
    language_switch_rate_mean  share of neighbouring pieces of a sample that differ in language, mean over the samples
"""
import re
import statistics
import textwrap
from dataclasses import dataclass

import numpy as np


@dataclass
class Sample:
    """What a model wrote behind a prompt."""
    ids: list  # token ids, without the end token and what came after it, see `until`
    text: str  # the same as text; special tokens have none
    language: str = ""  # of the prompt


def until(ids, eos):
    """The list of token ids before the first `eos`."""
    return ids[:ids.index(eos)] if eos in ids else ids


def mean(values):
    """The mean of numbers, or of yes and no as 1 and 0; 0.0 if there are none."""
    values = list(values)
    return statistics.fmean(values) if values else 0.0


# ---------------------------------------------------------------------------------------------------- repetition

def distinct_bigrams(ids):
    """Different pairs of neighbours / pairs of neighbours (arXiv 1510.03055); None for fewer than two tokens."""
    pairs = list(zip(ids, ids[1:]))
    return len(set(pairs)) / len(pairs) if pairs else None


def repeats_4gram(ids):
    """Whether four tokens in a row occur twice."""
    grams = [tuple(ids[i:i + 4]) for i in range(len(ids) - 3)]
    return len(set(grams)) < len(grams)


def ends_in_loop(ids):
    """Whether the text ends with the same three tokens, or more, three times in a row. One token for ever is a loop
    too, from its ninth time on."""
    return any(ids[-n:] == ids[-2 * n:-n] == ids[-3 * n:-2 * n] for n in range(3, len(ids) // 3 + 1))


def distinct_2(texts):
    """Mean of `distinct_bigrams` over lists of token ids; those of fewer than two tokens do not count."""
    return mean(value for value in map(distinct_bigrams, texts) if value is not None)


def repeated_4gram_rate(texts):
    """Share of lists of token ids in which four tokens in a row occur twice."""
    return mean(map(repeats_4gram, texts))


def loop_rate(texts):
    """Share of lists of token ids that end in a loop."""
    return mean(map(ends_in_loop, texts))


def completion_rate(samples):
    """Share of the Samples that hold more than white space and special tokens."""
    return mean(bool(sample.text.strip()) for sample in samples)


# ---------------------------------------------------------------------------------------------------- languages

def trigrams(text):
    """Three letters in a row, or two and the space before or after a word, as numbers: int64 (n,).

    Letters are lowercase; what is between words counts as one space. A text without letters has no trigram.
    """
    words = re.sub(r"[\W\d_]+", " ", text.lower()).strip()
    characters = np.frombuffer(f" {words} ".encode("utf-32-le"), "<u4").astype(np.int64)  # each is below 2^21
    return characters[:-2] << 42 | characters[1:-1] << 21 | characters[2:]


class LanguageIdentifier:
    """Naive Bayes over character trigrams (Cavnar and Trenkle 1994 showed how much trigrams tell).

    texts: language -> some text in it, from which it learns. Each language gets the same weight, however long its text.
    A text may be in none of them: see `identify`. A language whose text holds no letters is left out.
    """

    SMOOTHING = 0.5  # added to the count of each trigram, those that never occurred included
    MARGIN = 1.0  # nats per trigram by which a text may be less likely than what the language was learned from

    def __init__(self, texts):
        counted = {language: trigrams(text) for language, text in sorted(texts.items())}
        counted = {language: grams for language, grams in counted.items() if len(grams)}
        self.languages = list(counted)
        self.known = np.unique(np.concatenate([np.empty(0, np.int64), *counted.values()]))

        # the last column is for trigrams that occur in no language
        self.log_p = np.zeros((len(counted), len(self.known) + 1))
        self.own = np.zeros(len(counted))  # mean log probability of each language's own text
        for i, grams in enumerate(counted.values()):
            columns = self.columns(grams)
            counts = np.bincount(columns, minlength=len(self.known) + 1) + self.SMOOTHING
            self.log_p[i] = np.log(counts / counts.sum())
            self.own[i] = self.log_p[i, columns].mean()

    def columns(self, grams):
        """Numbers of the columns of log_p."""
        places = np.searchsorted(self.known, grams)
        is_known = self.known[np.minimum(places, len(self.known) - 1)] == grams
        return np.where(is_known, places, len(self.known))

    def identify(self, text):
        """The language in which the text is likeliest; None if it fits none, or has no letters.

        It fits a language if the mean log probability of its trigrams is at most MARGIN below that of the text that the
        language was learned from. With English and Italian, this tells German, French and Spanish apart from both.
        """
        grams = trigrams(text)
        if not len(grams) or not self.languages:
            return None
        scores = self.log_p[:, self.columns(grams)].mean(1)
        best = int(scores.argmax())
        return self.languages[best] if scores[best] >= self.own[best] - self.MARGIN else None

    def accuracy(self, texts):
        """Language -> share of its texts that are identified as it. texts: language -> texts it has not seen."""
        return {language: mean(self.identify(text) == language for text in some) for language, some in texts.items()}


PIECE = 60  # characters of text whose language can be told


def pieces(text):
    """The text in pieces of PIECE characters, cut between words; without what is left if it is less than half a one."""
    return [piece for piece in textwrap.wrap(text, PIECE) if 2 * len(piece) >= PIECE]


def language_consistency(samples, identifier):
    """Language -> share of the samples behind prompts in it that are identified as it. Empty samples are not."""
    return {language: mean(identifier.identify(sample.text) == language
                           for sample in samples if sample.language == language)
            for language in sorted({sample.language for sample in samples} & set(identifier.languages))}


def switch_rate(text, identifier):
    """Share of neighbouring pieces of the text that differ in language; pieces that fit no language are skipped.

    0.0 for a text of fewer than two pieces.
    """
    languages = [identifier.identify(piece) for piece in pieces(text)]
    languages = [language for language in languages if language is not None]
    return mean(a != b for a, b in zip(languages, languages[1:]))


# ---------------------------------------------------------------------------------------------------- together

def behaviour(samples, identifier):
    """The measures at the top of this file, name -> number, of a list of Samples.

    identifier: LanguageIdentifier of the run's languages.
    """
    texts = [sample.ids for sample in samples]
    result = dict(completion_rate=completion_rate(samples), distinct_2=distinct_2(texts),
                  repeated_4gram_rate=repeated_4gram_rate(texts), loop_rate=loop_rate(texts))
    consistency = language_consistency(samples, identifier)
    result |= {f"language_consistency_{language}": share for language, share in consistency.items()}
    result["language_consistency_mean"] = mean(consistency.values())
    result["language_switch_rate_mean"] = mean(switch_rate(sample.text, identifier) for sample in samples)
    return result
