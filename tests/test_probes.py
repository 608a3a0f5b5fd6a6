"""evaluation/probes.py: ranks, probabilities and perplexities by hand and step by step; how the word is tokenized."""
import json
import math
import re

import pytest
import torch

import tinymemory
from architectures import randomised
from common import UserError
from conftest import CPU
from corpus.tokenizer import load_tokenizer, train_bpe, train_chunk, train_hybrid
from evaluation.probes import CARD, Probe, encode_probe, read_probes, run_probes

TEXT = ["The capital of Italy is Rome. A small language model should be small. The house is of the old man. " * 20]


@pytest.fixture(scope="module")
def tokenizers():
    trained = dict(bpe=train_bpe(TEXT, 330), hybrid=train_hybrid(TEXT, 280), chunk=train_chunk(TEXT, 90))
    return {kind: load_tokenizer(tokenizer.to_str()) for kind, tokenizer in trained.items()}


@pytest.fixture(scope="module")
def model(tokenizers):
    torch.manual_seed(0)
    cfg = tinymemory.Config(vocab_size=330, context_length=64, n_layer=2, d_model=32, n_head=2, d_ff=48)
    return randomised(tinymemory.Model(cfg)).eval()


# ---------------------------------------------------------------------------------------------------- tokens

@pytest.mark.parametrize("kind, prompt, expected, given, scored", [
    ("bpe", "The house is", "Rome", "The house is", [" Rome"]),
    ("bpe", "The house is ", "Rome", "The house is", [" Rome"]),  # the prompt's space is a part of the word's token
    ("bpe", "The house is\n", "Rome", "The house is\n", ["R", "ome"]),
    ("bpe", "L'", "is", "L'", ["is"]),
    ("hybrid", "The house is", "Rome", "The house is", [" Rome"]),  # a word of the vocabulary
    ("hybrid", "The house is", "red", "The house is ", ["r", "e", "d"]),  # spelled: the space is given
    ("chunk", "The house is", "Rome", "the house is ", ["ro", "me"]),  # "is " is one token, which is given
    ("chunk", "The", "old", "the", [" ol", "d"]),
])
def test_scored_are_the_tokens_that_hold_some_of_the_expected_word(tokenizers, kind, prompt, expected, given, scored):
    tokenizer = tokenizers[kind]
    context, target = encode_probe(Probe(prompt, expected), tokenizer)
    assert context[0] == tokenizer.token_to_id("<|bos|>")
    assert tokenizer.decode(context) == given
    shown = [tokenizer.decode([token]) for token in target]
    assert "".join(shown) == "".join(scored) and (kind == "bpe" or shown == scored)

    # together they are what the whole text is encoded to
    between = "" if prompt.endswith((" ", "\n", "'")) else " "
    assert context[1:] + target == tokenizer.encode(prompt + between + expected).ids


# ---------------------------------------------------------------------------------------------------- numbers

class Bigram:
    """A model whose next token depends on the last one alone: `table` has the probabilities, (V, V)."""

    def __init__(self, table):
        self.log_p, self.max_len = table.log(), 64
        self.cfg = tinymemory.Config(vocab_size=len(table))

    def init_cache(self, n):
        return tinymemory.Cache(0, (1, 1, self.max_len, 1), torch.float32, "cpu")

    def __call__(self, idx, all_logits=False, cache=None):
        if cache is not None:
            cache.length += idx.size(1)
        return self.log_p[idx if all_logits else idx[:, -1:]] + 3.0, None  # logits know no scale


def test_a_probe_by_hand(tokenizers):
    """The vocabulary has " Rome" as one token, and spells " red": a space, r, e, d. The table has all probabilities."""
    tokenizer = tokenizers["hybrid"]
    V = tokenizer.get_vocab_size()
    (r, e, d), (is_, space, rome) = (
        [tokenizer.encode(text).ids[0] for text in texts] for texts in ("red", (" is", " red", " Rome")))
    table = torch.full((V, V), 1e-9)
    table[is_, [space, rome, e]] = torch.tensor([0.5, 0.2, 0.3])
    table[space, [r, d, e]] = torch.tensor([0.25, 0.7, 0.05])
    table[r, [e, d]] = torch.tensor([0.5, 0.5])
    table[e, [d, 2]] = torch.tensor([0.125, 0.875])  # 2 is <|eos|>
    table[d, 2] = 1.0
    red, rome = run_probes(Bigram(table), tokenizer, [Probe("The house is", "red"), Probe("The house is", "Rome")], CPU)

    assert red["correct_token_rank"] == 2 and red["correct_token_probability"] == pytest.approx(0.25)
    assert red["perplexity_on_target_sequence"] == pytest.approx((0.25 * 0.5 * 0.125) ** (-1 / 3), rel=1e-5)
    assert rome["correct_token_rank"] == 3 and rome["correct_token_probability"] == pytest.approx(0.2)
    assert rome["perplexity_on_target_sequence"] == pytest.approx(5, rel=1e-5)
    assert red["continuation"] == rome["continuation"] == " d"  # the likeliest: a space, d, the end


def test_a_probe_is_what_reading_token_by_token_gives(model, tokenizers):
    probes = [*CARD, Probe("x", "y"), Probe("The", "capital")]
    before = torch.get_rng_state()
    found = run_probes(model, tokenizers["bpe"], probes, CPU)
    assert torch.equal(torch.get_rng_state(), before) and found == run_probes(model, tokenizers["bpe"], probes, CPU)
    for probe, result in zip(probes, found):
        ids, target = encode_probe(probe, tokenizers["bpe"])
        log_p = []
        for token in target:
            with torch.no_grad():
                p = model(torch.tensor([ids]))[0][0, -1].softmax(-1)
            if not log_p:
                assert result["correct_token_rank"] == p.argsort(descending=True).tolist().index(token) + 1
                assert result["correct_token_probability"] == pytest.approx(float(p[token]), rel=1e-4)
            log_p.append(math.log(p[token]))
            ids = [*ids, token]
        perplexity = math.exp(-sum(log_p) / len(log_p))
        assert result["perplexity_on_target_sequence"] == pytest.approx(perplexity, rel=1e-4)
        assert (result["prompt"], result["expected"]) == (probe.prompt, probe.expected)


def test_a_probe_longer_than_the_context_is_one_line(model, tokenizers):
    with pytest.raises(UserError, match=r"the probe 'z{40}' has 2\d\d tokens, the model reads 64"):
        run_probes(model, tokenizers["bpe"], [Probe("z" * 200, "y")], CPU)


# ---------------------------------------------------------------------------------------------------- the file

def test_probes_are_the_cards_or_those_of_a_file(tmp_path):
    assert read_probes("") == read_probes("card") == list(CARD) and len(CARD) == 4
    path = tmp_path / "probes.json"
    path.write_text(json.dumps([dict(prompt="Il colore del cielo è", expected=" blu ")]))
    assert read_probes(str(path)) == [Probe("Il colore del cielo è", "blu")]


@pytest.mark.parametrize("text, line", [
    (None, "there is no file of probes"),
    ("[", "is not JSON"),
    ("{}", "is not a list of probes"),
    ("[]", "is not a list of probes"),
    ('["a"]', "probe 1 needs"),
    ('[{"prompt": "a", "expected": "b"}, {"prompt": "a"}]', "probe 2 needs"),
    ('[{"prompt": "a", "expected": "b", "c": 1}]', "and nothing else"),
    ('[{"prompt": "a", "expected": " "}]', '"expected" of probe 1 must be some text'),
    ('[{"prompt": 1, "expected": "b"}]', '"prompt" of probe 1 must be some text'),
])
def test_a_file_that_holds_no_probes_is_one_line(tmp_path, text, line):
    path = tmp_path / "probes.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        read_probes(str(path))
    assert "\n" not in str(error.value)
