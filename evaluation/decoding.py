"""Which sampling parameters suit a model: each of PRESETS is tried on tuning prompts, and confirmed on holdout prompts.

`RunText` takes from the run's own data what is needed for that: prompts, and what their text is compared with. A preset
has one sample behind each prompt, and gets a score between 0 and 1. 1 means that its samples are in no respect worse
than the validation text itself, which goes on behind the same prompts. For each of MERITS, how far does the text have
it, and how far has the preset? The score is the product of these ratios, of which none counts as more than 1.

So neither extreme wins. Text that repeats itself loses variety, and text that is drawn too freely has words, and pairs
of words, that nobody writes.
"""
import math
import re
from dataclasses import asdict, dataclass

import numpy as np
import torch

from common import Progress, UserError
from corpus.folder import document_edges
from corpus.tokenizer import bos_eos
from evaluation import behaviour
from evaluation.behaviour import Sample, distinct_bigrams, ends_in_loop, repeats_4gram, until
from sample import generate

MAX_NEW_TOKENS = 64  # length of a sample, as on the 1gpu-llm card


@dataclass(frozen=True)
class Preset:
    """Parameters of `sample.stream`, and why they are worth a try."""
    why: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def rules(self):
        """The parameters alone, name -> value."""
        return {name: value for name, value in asdict(self).items() if name != "why"}


PRESETS = {
    "greedy": Preset("always the likeliest token: what the model is surest of", temperature=0.0),
    "greedy-penalty": Preset("the likeliest token, with the penalty of arXiv 1909.05858", temperature=0.0,
                             repetition_penalty=1.2),
    "pure": Preset("the model's distribution as it is"),
    "focused": Preset("close to the likeliest tokens", temperature=0.6, top_p=0.9),
    "balanced": Preset("what the 1gpu-llm card recommends", temperature=0.8, top_k=50, top_p=0.95,
                       repetition_penalty=1.1),
    "creative": Preset("the whole temperature, without the unlikeliest tokens", top_p=0.95, repetition_penalty=1.1),
    "min-p": Preset("cut in proportion to the likeliest token, as in arXiv 2407.01082", min_p=0.1),
    "min-p-penalty": Preset("the same, cooler and with a penalty", temperature=0.8, min_p=0.1, repetition_penalty=1.15),
    "top-p-min-p": Preset("both cuts, without a penalty", temperature=0.8, top_p=0.9, min_p=0.05),
    "no-repeat": Preset("three tokens never occur twice", temperature=0.7, top_p=0.9, no_repeat_ngram_size=3),
    "strong-penalty": Preset("for models that loop whatever one does", temperature=0.8, top_p=0.9,
                             repetition_penalty=1.3),
}


def recommended_params(preset):
    """The preset under the names of the card's recommended_decoding_params.json, which `transformers` has too."""
    rules = preset.rules()
    do_sample = preset.temperature > 0
    if not do_sample:
        rules["temperature"] = 1.0  # transformers knows no temperature of 0
    return dict(do_sample=do_sample, **rules, max_new_tokens=MAX_NEW_TOKENS)


# ---------------------------------------------------------------------------------------------------- prompts

PROMPTS = 40  # tuning prompts of all sources together, and as many for holdout
PROMPT_TOKENS = 12  # length of a prompt that is text, or a few more; that of a chat is its question
WINDOW = 512  # tokens of a place in the validation text where a prompt is looked for


@dataclass
class Prompt:
    ids: list  # token ids, with the one that begins a document
    text: str
    reference: list  # token ids that come after it in the validation text, MAX_NEW_TOKENS at most
    source: str
    language: str


def lines_in(window, tokenizer):
    """The text of `window`, int64 (n,), from each beginning of a line or document to the end of that document.

    Lines that begin with a small letter come last: they may be in the middle of a sentence.
    """
    bos, _ = bos_eos(tokenizer)
    lines = []
    for number, document in enumerate(np.split(window, np.flatnonzero(window == bos))):
        text = tokenizer.decode(document.tolist())
        if number > 0:
            lines.append(text)  # what comes before the first <|bos|> is the rest of a document
        lines += [text[match.end():] for match in re.finditer(r"\n\s*", text)]
    return sorted(lines, key=lambda line: line[:1].islower())


def first_prompt(window, tokenizer, source):
    """The beginning of a line in `window` as a Prompt; None if there is none.

    A prompt ends with a word, so that the tokenizer cuts it as it cuts the whole line. It has PROMPT_TOKENS tokens if
    one of the first lines has the end of a word there, because prompts of one length are continued together.
    """
    bos, _ = bos_eos(tokenizer)
    lines = lines_in(window, tokenizer)[:4]
    encoded = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
    for n in range(PROMPT_TOKENS, 2 * PROMPT_TOKENS):
        for line, ids in zip(lines, encoded):
            text = tokenizer.decode(ids[:n])
            rest = line[len(text):]
            ends_with_a_word = text.strip() and not text[-1].isspace() and rest[:1].isspace() and rest.strip()
            if ends_with_a_word and tokenizer.encode(text, add_special_tokens=False).ids == ids[:n]:
                return Prompt([bos, *ids[:n]], text, ids[n:n + MAX_NEW_TOKENS], source.name, source.language)
    return None


def text_prompts(source, tokenizer, n):
    """n beginnings of lines of a source's validation text as Prompts, spread evenly; fewer if there are fewer."""
    found = {}
    places = 8 * n  # not at each one there is a prompt
    for k in range(places):
        first = k * len(source.val) // places
        prompt = first_prompt(np.asarray(source.val[first:first + WINDOW]), tokenizer, source)
        if prompt is not None:
            found.setdefault(prompt.text, prompt)
    found = list(found.values())
    take = min(n, len(found))
    return [found[i * len(found) // take] for i in range(take)]


def chat_prompts(source, tokenizer, n, longest):
    """The first questions of n validation chats as Prompts, spread evenly; without those of more than `longest` tokens.

    The reference is the reply.
    """
    bos, eos = bos_eos(tokenizer)
    assistant = tokenizer.token_to_id("<|assistant|>")
    edges = document_edges(source.val, bos)
    n_chats = len(edges) - 1
    take = min(n, n_chats)
    prompts = []
    for k in range(take):
        begin, end = edges[k * n_chats // take:][:2]
        chat = source.val[begin:end].tolist()
        ids = chat[:chat.index(assistant) + 1]
        if len(ids) <= longest:
            reply = until(chat[len(ids):], eos)[:MAX_NEW_TOKENS]
            prompts.append(Prompt(ids, tokenizer.decode(ids), reply, source.name, source.language))
    return prompts


def find_prompts(sources, tokenizer, longest):
    """(tuning, holdout): two lists of Prompts, with about PROMPTS / sources of each source in either.

    longest: tokens of a question of a chat, at most. Raises UserError if there is too little validation text.
    """
    tuning, holdout = [], []
    each = math.ceil(PROMPTS / len(sources))
    for source in sources:
        if source.is_chat:
            prompts = chat_prompts(source, tokenizer, 2 * each, longest)
        else:
            prompts = text_prompts(source, tokenizer, 2 * each)
        tuning += prompts[::2]
        holdout += prompts[1::2]
    if not holdout:
        raise UserError("there is too little validation text for prompts; prepare the data with a larger "
                        "--val_fraction, or give other data with --data")
    return tuning, holdout


# ---------------------------------------------------------------------------------------------------- the run's text

LANGUAGE_TOKENS = 100_000  # training tokens of each source that its language is learned from
HELD_OUT_TOKENS = 20_000  # validation tokens of each source on which this is tried out
PAIR_TOKENS = 2_000_000  # training tokens of all sources together whose pairs of words are known


def spread_text(tokens, n, tokenizer):
    """About n tokens of a token file as texts, spread evenly in 64 places."""
    size = max(1, n // 64)
    if len(tokens) <= n:
        return [tokenizer.decode(np.asarray(tokens).tolist())]
    return [tokenizer.decode(tokens[k * len(tokens) // 64:][:size].tolist()) for k in range(64)]


def word_pairs(text):
    """The pairs of neighbouring words of a text, as strings; a word is what letters make."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return [f"{a} {b}" for a, b in zip(words, words[1:])]


class RunText:
    """What a run's own text gives for measuring: prompts, an identifier of its languages, its pairs of words.

    tuning, holdout: see `find_prompts`. identifier: learned from training text. accuracy: language -> share of pieces
    of validation text that it identifies. pairs: pairs of words that occur in the training text.
    """

    def __init__(self, sources, tokenizer, longest):
        self.tuning, self.holdout = find_prompts(sources, tokenizer, longest)
        self.pairs = set()
        learned, held_out = {}, {}
        for source in sources:
            texts = spread_text(source.train, LANGUAGE_TOKENS, tokenizer)
            learned[source.language] = "\n".join([learned.get(source.language, ""), *texts])
            for text in spread_text(source.val, HELD_OUT_TOKENS, tokenizer):
                held_out.setdefault(source.language, []).extend(behaviour.pieces(text))
            for text in spread_text(source.train, PAIR_TOKENS // len(sources), tokenizer):
                self.pairs.update(word_pairs(text))
        self.identifier = behaviour.LanguageIdentifier(learned)
        self.accuracy = self.identifier.accuracy(held_out)

    def known_pairs(self, text):
        """Share of the text's pairs of words that occur in the training text; 0 if it has none."""
        return behaviour.mean(pair in self.pairs for pair in word_pairs(text))


# ---------------------------------------------------------------------------------------------------- samples

def write(model, tokenizer, prompts, preset, seed, max_new_tokens=MAX_NEW_TOKENS):
    """One Sample behind each Prompt. Prompts of one length are continued together; the same seed gives the same."""
    _, eos = bos_eos(tokenizer)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    by_length = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.ids), []).append(i)

    samples = [None] * len(prompts)
    for length, members in sorted(by_length.items()):
        idx = torch.tensor([prompts[i].ids for i in members], device=device)
        cache = model.init_cache(len(members), min(model.max_len, length + max_new_tokens))
        rows = generate(model, idx, max_new_tokens, stop_token=eos, generator=generator, cache=cache, **preset.rules())
        for i, ids in zip(members, rows[:, length:].tolist()):
            ids = until(ids, eos)
            samples[i] = Sample(ids, tokenizer.decode(ids), prompts[i].language)
    return samples


def references(prompts, tokenizer):
    """What the validation text itself says behind the prompts, as Samples."""
    return [Sample(prompt.reference, tokenizer.decode(prompt.reference), prompt.language) for prompt in prompts]


def greedy_behaviour(model, tokenizer, run_text):
    """The behaviour of the likeliest text behind the holdout prompts, by which checkpoints are compared."""
    samples = write(model, tokenizer, run_text.holdout, PRESETS["greedy"], seed=0)
    return behaviour.behaviour(samples, run_text.identifier)


# ---------------------------------------------------------------------------------------------------- the score

# What a sample can have, as a number between 0 and 1
MERITS = {
    "text": lambda sample, run_text: bool(sample.text.strip()),
    "variety": lambda sample, run_text: distinct_bigrams(sample.ids) or 0.0,
    "no 4-gram twice": lambda sample, run_text: not repeats_4gram(sample.ids),
    "no loop": lambda sample, run_text: not ends_in_loop(sample.ids),
    "the prompt's language": lambda sample, run_text: run_text.identifier.identify(sample.text) == sample.language,
    "known pairs of words": lambda sample, run_text: run_text.known_pairs(sample.text),
}
RESAMPLES = 200  # of the prompts, for the score's standard error


def merits(samples, run_text):
    """MERITS of each sample, float64 (samples, merits)."""
    return np.array([[float(merit(sample, run_text)) for merit in MERITS.values()] for sample in samples])


def score(values, of_text):
    """The score of a preset. values, of_text: `merits` of its samples, and of the validation text.

    A merit that the validation text has nowhere does not count: in a language that writes no spaces, no pair is known.
    """
    has, text_has = values.mean(0), of_text.mean(0)
    return float(np.prod([min(1.0, a / b) for a, b in zip(has, text_has) if b > 0]))


def resampled(values, of_text):
    """The score with the prompts drawn anew with replacement, RESAMPLES times (the bootstrap, Efron 1979), as a tuple.

    The draws are the same for all presets, so that two of these show how the presets' difference varies.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(values), size=(RESAMPLES, len(values)))
    return tuple(score(values[some], of_text[some]) for some in drawn)


@dataclass
class Trial:
    """What a preset, or the validation text itself, wrote behind some prompts, and how it was measured."""
    name: str
    samples: list
    behaviour: dict
    known_pairs: float  # mean share of pairs of words that the training text has
    score: float = 1.0
    resampled: tuple = (1.0,)  # the score with other prompts

    @property
    def error(self):
        """Standard error of the score."""
        return float(np.std(self.resampled))


def try_presets(model, tokenizer, prompts, run_text, seed, presets=None):
    """(Trial of the validation text, Trials of all presets with the best one first).

    presets: name -> Preset; PRESETS if None. Of two with equal scores, the more varied one is the better one.
    """
    presets = PRESETS if presets is None else presets
    progress = Progress()

    def trial(name, samples):
        known = behaviour.mean(run_text.known_pairs(sample.text) for sample in samples)
        return Trial(name, samples, behaviour.behaviour(samples, run_text.identifier), known)

    text = trial("validation text", references(prompts, tokenizer))
    of_text = merits(text.samples, run_text)
    trials = []
    for i, (name, preset) in enumerate(presets.items()):
        progress.show(f"decoding: {name}, {i + 1} of {len(presets)} presets, {len(prompts)} prompts")
        found = trial(name, write(model, tokenizer, prompts, preset, seed))
        values = merits(found.samples, run_text)
        found.score, found.resampled = score(values, of_text), resampled(values, of_text)
        trials.append(found)
    progress.clear()
    return text, sorted(trials, key=lambda trial: (-trial.score, -trial.behaviour["distinct_2"]))


@dataclass
class Sweep:
    """The search: what was found on the tuning and on the holdout prompts, Trials with the best one first."""
    tuning_text: Trial
    tuning: list
    holdout_text: Trial
    holdout: list

    @property
    def winner(self):
        """The name of the best preset on the tuning prompts, which is recommended."""
        return self.tuning[0].name

    def on_holdout(self, name):
        """The holdout Trial of a preset."""
        return next(trial for trial in self.holdout if trial.name == name)

    @property
    def is_confirmed(self):
        """Whether no preset beats the winner on the holdout prompts by more than two standard errors of their
        difference."""
        winner, first = self.on_holdout(self.winner), self.holdout[0]
        error = np.std(np.subtract(first.resampled, winner.resampled))
        return bool(first.score - winner.score <= 2 * error)


def sweep(model, tokenizer, run_text, seed):
    """Tries all presets on the tuning and on the holdout prompts."""
    return Sweep(*try_presets(model, tokenizer, run_text.tuning, run_text, seed),
                 *try_presets(model, tokenizer, run_text.holdout, run_text, seed))
