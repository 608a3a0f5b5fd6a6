"""evaluation/decoding.py: which prompts are taken, what a preset writes, and that the score likes neither loops nor
noise."""
import inspect
import json
import random
import types

import numpy as np
import pytest
import torch

import prepare
import run
import sample
import tinymemory
from architectures import randomised
from common import UserError
from conftest import ALONE, FakeSource, sources_of
from corpus.tokenizer import load_tokenizer
from evaluation import decoding
from evaluation.behaviour import Sample
from evaluation.decoding import PRESETS, Preset, RunText, find_prompts, merits, recommended_params, score, write
from made_up import made_up_chats, made_up_text


@pytest.fixture(scope="module")
def sources(bilingual):
    return run.find_data(str(bilingual / "data/mix-bpe-500"), "bpe", 500, ALONE)[0]


@pytest.fixture(scope="module")
def tokenizer(bilingual):
    return load_tokenizer(bilingual / "data/mix-bpe-500/tokenizer.json")


@pytest.fixture(scope="module")
def run_text(sources, tokenizer):
    return RunText(sources, tokenizer, longest=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = tinymemory.Config(vocab_size=500, context_length=128, n_layer=2, d_model=32, n_head=2, d_ff=48)
    return randomised(tinymemory.Model(cfg)).eval()


# ---------------------------------------------------------------------------------------------------- prompts

def test_prompts_are_beginnings_of_validation_lines_shared_out_over_sources_and_sets(sources, tokenizer, run_text):
    bos = tokenizer.token_to_id("<|bos|>")
    tuning, holdout = run_text.tuning, run_text.holdout
    assert not {prompt.text for prompt in tuning} & {prompt.text for prompt in holdout}
    for source in sources:
        documents = tokenizer.decode_batch(np.split(source.val, np.flatnonzero(source.val == bos))[1:])
        for prompts, n in ((tuning, 7), (holdout, 6)):
            mine = [prompt for prompt in prompts if prompt.source == source.name]
            if source.name != "web_en":  # it has no more
                n = decoding.PROMPTS / len(sources)
            assert len(mine) == n
            for prompt in mine:
                assert prompt.language == source.language and 12 < len(prompt.ids) <= 24
                assert prompt.ids == [bos, *tokenizer.encode(prompt.text).ids]
                goes_on = prompt.text + tokenizer.decode(prompt.reference)
                assert any(document.startswith(goes_on) for document in documents)  # a document here is one line
                assert tokenizer.decode(prompt.reference).startswith((" ", "\n"))
    assert find_prompts(sources, tokenizer, 64) == (tuning, holdout)


def test_within_a_document_a_prompt_begins_a_line_and_better_a_sentence(tokenizer):
    words = "house sees the river and the house sees the garden and the old man sees the house and the river"
    lines = [f"{first} {words}" for first in ("every", "the", "The")]
    ids = tokenizer.encode("\n".join(lines)).ids
    source = types.SimpleNamespace(name="s", language="en")
    prompt = decoding.first_prompt(np.array(ids), tokenizer, source)
    assert prompt.text + tokenizer.decode(prompt.reference) == lines[2]
    prompt = decoding.first_prompt(np.array(tokenizer.encode("\n".join(lines[:2])).ids), tokenizer, source)
    assert lines[1].startswith(prompt.text)
    assert decoding.first_prompt(np.array(tokenizer.encode(lines[0]).ids), tokenizer, source) is None
    assert decoding.first_prompt(np.array([1, *tokenizer.encode(lines[0]).ids]), tokenizer, source) is not None


def test_a_chat_is_prompted_by_its_first_question_and_its_reply_is_the_reference(corpora, tmp_path):
    chats = list(made_up_chats(400, 1))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    path = str(corpora / "data/pydocs-hybrid/tokenizer.json")
    folder = prepare.prepare([str(tmp_path / "chats.jsonl")], prepare.Settings(
        tokenizer=path, out_dir=str(tmp_path), name="chats", val_fraction=0.2))
    tokenizer, sources = load_tokenizer(path), sources_of(folder)
    tuning, holdout = find_prompts(sources, tokenizer, longest=100)
    assert 10 < len(holdout) <= len(tuning) <= decoding.PROMPTS
    replies = {chat["messages"][-2]["content"]: chat["messages"][-1]["content"] for chat in chats
               if [message["role"] for message in chat["messages"]] == ["user", "assistant"]}
    known = 0
    for prompt in tuning + holdout:
        assert tokenizer.id_to_token(prompt.ids[-1]) == "<|assistant|>" and len(prompt.ids) <= 100
        if prompt.text in replies:
            known += 1
            assert replies[prompt.text].startswith(tokenizer.decode(prompt.reference))
    assert known > 5
    assert len(find_prompts(sources, tokenizer, longest=30)[0]) < len(tuning)


def test_too_little_validation_text_is_one_line(tokenizer):
    with pytest.raises(UserError, match="too little validation text for prompts"):
        find_prompts([FakeSource([1] * 9, val=tokenizer.encode("a few words").ids)], tokenizer, 64)


# ---------------------------------------------------------------------------------------------------- the run's text

def test_the_runs_text_knows_its_languages_and_its_pairs_of_words(run_text, sources, tokenizer):
    assert set(run_text.accuracy) == {"en", "it"} and min(run_text.accuracy.values()) > 0.95
    assert decoding.word_pairs("L'uomo vede 2 case, e_si...") == ["l uomo", "uomo vede", "vede case", "case e", "e si"]
    assert decoding.word_pairs("uomo 12") == decoding.word_pairs("") == []
    text = tokenizer.decode(sources[0].train[:200].tolist())
    assert run_text.known_pairs(text) == 1.0 and run_text.known_pairs("") == 0.0
    assert run_text.known_pairs("the house xyzzy") == 1 / 2
    assert max(len(text) for text in decoding.spread_text(sources[0].train, 6400, tokenizer)) < 1000


# ---------------------------------------------------------------------------------------------------- what is written

def test_presets_are_rules_of_the_sampler():
    parameters = inspect.signature(sample.stream).parameters
    for preset in PRESETS.values():
        assert set(preset.rules()) == set(sample.RULES) <= set(parameters) and preset.why
    assert all(parameters[name].default == value for name, value in Preset("").rules().items())
    assert PRESETS["balanced"].rules() == dict(
        temperature=0.8, top_k=50, top_p=0.95, min_p=0.0, repetition_penalty=1.1, no_repeat_ngram_size=0)


def test_recommended_params_have_the_cards_names_and_are_understood_by_transformers():
    import transformers
    assert recommended_params(PRESETS["balanced"]) == dict(
        do_sample=True, temperature=0.8, top_k=50, top_p=0.95, min_p=0.0, repetition_penalty=1.1,
        no_repeat_ngram_size=0, max_new_tokens=64)
    greedy = recommended_params(PRESETS["greedy"])
    assert not greedy["do_sample"]
    for name in PRESETS:
        transformers.GenerationConfig(**recommended_params(PRESETS[name])).validate()


def test_samples_are_what_each_prompt_gives_alone_and_depend_on_the_seed_alone(model, tokenizer, run_text):
    prompts = run_text.tuning[:4]
    short = decoding.Prompt(prompts[0].ids[:5], "", [], "s", "en")
    prompts = [short, *prompts, short]
    greedy = write(model, tokenizer, prompts, PRESETS["greedy"], seed=0, max_new_tokens=20)
    for prompt, written in zip(prompts, greedy):
        ids = sample.generate(model, torch.tensor([prompt.ids]), 20, stop_token=2, temperature=0)[0, len(prompt.ids):]
        ids = ids.tolist()
        assert written.ids == (ids[:-1] if ids[-1] == 2 else ids)
        assert written.text == tokenizer.decode(written.ids) and written.language == prompt.language

    def texts(seed):
        return [written.text for written in write(model, tokenizer, prompts, PRESETS["pure"], seed, 20)]
    assert texts(1) == texts(1) != texts(2)


# ---------------------------------------------------------------------------------------------------- the score

def test_the_score_by_hand():
    of_text = np.array([[1.0, 0.8, 0.5, 0.0], [1.0, 0.8, 0.7, 0.0]])
    values = np.array([[1.0, 0.3, 0.9, 0.2], [1.0, 0.5, 0.9, 0.2]])
    assert score(values, of_text) == pytest.approx(1 * 0.4 / 0.8 * 1 * 1)  # no more than 1; what text lacks is left out
    assert score(of_text, of_text) == 1.0
    assert np.std(decoding.resampled(of_text, of_text)) == 0.0
    error = np.std(decoding.resampled(values, of_text))
    assert error == pytest.approx(np.std([0.3, 0.4, 0.4, 0.5]) / 0.8, rel=0.2)


def test_neither_loops_nor_noise_nor_the_wrong_language_reach_the_score_of_text(run_text, tokenizer):
    """The extremes that a single measure would prefer."""
    prompts, rng = run_text.tuning, random.Random(0)

    def samples(text_of):
        texts = [text_of(prompt) for prompt in prompts]
        ids = [tokenizer.encode(text).ids[:decoding.MAX_NEW_TOKENS] for text in texts]
        return [Sample(i, tokenizer.decode(i), prompt.language) for i, prompt in zip(ids, prompts)]

    of_text = merits(decoding.references(prompts, tokenizer), run_text)
    tokens = range(263, 500)  # of more than a byte
    other = dict(en="it", it="en")
    scores = {name: score(merits(samples(text_of), run_text), of_text) for name, text_of in dict(
        text=lambda prompt: made_up_text(prompt.language, prompt.source.split("_")[0], rng),
        loop=lambda prompt: " the house" * 40,
        noise=lambda prompt: tokenizer.decode(rng.sample(tokens, 64)),
        other=lambda prompt: made_up_text(other[prompt.language], prompt.source.split("_")[0], rng),
        empty=lambda prompt: "").items()}
    assert scores["text"] > 0.6
    assert scores["loop"] == scores["other"] == scores["empty"] == 0.0 and scores["noise"] < 0.1


def trial(name, score, distinct_2=0.5, resampled=(1.0,)):
    return decoding.Trial(name, [], dict(distinct_2=distinct_2), 0.0, score, resampled)


def test_the_best_preset_comes_first_and_of_equals_the_more_varied(model, tokenizer, run_text):
    presets = {"a": PRESETS["greedy"], "b": PRESETS["balanced"], "c": Preset("", temperature=3.0)}
    text, trials = decoding.try_presets(model, tokenizer, run_text.tuning[:8], run_text, 1, presets)
    assert text.name == "validation text" and text.behaviour["completion_rate"] == 1.0
    keys = [(trial.score, trial.behaviour["distinct_2"]) for trial in trials]
    assert keys == sorted(keys, reverse=True) and {trial.name for trial in trials} == set(presets)
    again = decoding.try_presets(model, tokenizer, run_text.tuning[:8], run_text, 1, presets)
    assert (text, trials) == again


def test_a_winner_is_confirmed_if_no_other_is_clearly_better_on_holdout_prompts():
    """Clearly: by more than two standard errors of the difference, which is small if both vary in the same way."""
    tuning, of_a = [trial("a", 0.9), trial("b", 0.8)], np.array([0.7, 0.9, 0.7, 0.9])
    for score_of_b, of_b, confirmed in (
            (0.7, of_a - 0.1, True),
            (0.819, of_a + [0.009, 0.029, 0.029, 0.009], True),  # the difference is 0.019, its error 0.01
            (0.83, of_a + [0.02, 0.04, 0.04, 0.02], False),
            (0.83, 1.63 - of_a, True)):  # it varies against the winner
        holdout = [trial("a", 0.8, resampled=tuple(of_a)), trial("b", score_of_b, resampled=tuple(of_b))]
        holdout.sort(key=lambda trial: -trial.score)
        found = decoding.Sweep(trial("", 1), tuning, trial("", 1), holdout)
        assert found.winner == "a" and found.is_confirmed is confirmed
