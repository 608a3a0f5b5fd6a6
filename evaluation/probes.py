"""Probes: does the model know how a sentence goes on? A probe is a prompt and the word that is expected behind it.

    correct_token_rank              place of the expected word's first token among all tokens; 1: the likeliest one
    correct_token_probability       its probability
    perplexity_on_target_sequence   of the whole expected word
    continuation                    what the model says itself, by the likeliest tokens

The names, and the probes that are put if no others are given, are those of the 1gpu-llm card.

Prompt, a space, and the expected word are encoded together, because that is how the model saw text. What is scored are
the tokens that hold some of the expected word's characters; those before them are given. So " Rome" is scored where a
token holds the space and the word. Where the space is a token of its own (hybrid, before a word that it spells), or is
in one token with the end of the prompt (chunk), it is given.
"""
import json
import math
from dataclasses import dataclass

import torch

from common import UserError, mended
from corpus.tokenizer import bos_eos
from evaluation.behaviour import until
from sample import generate

CONTINUATION_TOKENS = 24


@dataclass(frozen=True)
class Probe:
    prompt: str
    expected: str


CARD = (
    Probe("The capital of Italy is", "Rome"),
    Probe("A small language model should", "be"),
    Probe("La capitale d'Italia è", "Roma"),
    Probe("Un piccolo modello linguistico dovrebbe", "essere"),
)


def read_probes(path):
    """The Probes in a JSON file, [{"prompt": "...", "expected": "..."}, ...]; the card's for "" and "card".

    Raises UserError if the file is missing or holds something else.
    """
    if path in ("", "card"):
        return list(CARD)
    form = 'a list of probes, [{"prompt": "...", "expected": "..."}, ...]'
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)
    except FileNotFoundError:
        raise UserError(f"there is no file of probes {path}; it holds {form}") from None
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}); it holds {form}") from None

    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is not {form}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or set(row) != {"prompt", "expected"}:
            raise UserError(f'{path}: probe {number} needs "prompt" and "expected" and nothing else')
        for name, text in row.items():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f'{path}: "{name}" of probe {number} must be some text')
    return [Probe(mended(row["prompt"]), mended(row["expected"]).strip()) for row in rows]


def encode_probe(probe, tokenizer):
    """(context, target): ids of the tokens that are given, and of those that are scored, as the top of this file says.

    No space is put behind a prompt that ends with white space, an apostrophe or a bracket.
    """
    between = " "
    if probe.prompt.endswith((" ", "\n", "\t", "'", "’", "(", "[", "«")):
        between = ""
    given = probe.prompt + between
    encoding = tokenizer.encode(given + probe.expected, add_special_tokens=False)
    n = sum(end <= len(given) for _, end in encoding.offsets)
    bos, _ = bos_eos(tokenizer)
    return [bos, *encoding.ids[:n]], encoding.ids[n:]


@torch.no_grad()
def run_probes(model, tokenizer, probes, on):
    """A dict for each probe: its prompt and expected word, and what is listed at the top of this file.

    on: machine.Device, which the model is on. No random numbers are drawn. Raises UserError for a probe that is longer
    than the model's context.
    """
    _, eos = bos_eos(tokenizer)
    results = []
    for probe in probes:
        context, target = encode_probe(probe, tokenizer)
        ids = torch.tensor([[*context, *target]], device=on.device)
        if ids.size(1) > model.max_len:
            raise UserError(f"the probe {probe.prompt[:40]!r} has {ids.size(1):,} tokens, the model reads "
                            f"{model.max_len:,}")
        with on.autocast():
            logits = model(ids[:, :-1], all_logits=True)[0][0, len(context) - 1:].float()  # (target tokens, V)
        log_p = logits.log_softmax(-1).gather(1, ids[0, len(context):, None])[:, 0]

        prompt = ids.new_tensor([[context[0], *tokenizer.encode(probe.prompt, add_special_tokens=False).ids]])
        with on.autocast():
            said = generate(model, prompt, CONTINUATION_TOKENS, stop_token=eos, temperature=0)
        results.append(dict(
            prompt=probe.prompt, expected=probe.expected,
            correct_token_rank=1 + int((logits[0] > logits[0, target[0]]).sum()),
            correct_token_probability=float(log_p[0].exp()),
            perplexity_on_target_sequence=math.exp(-float(log_p.double().mean())),
            continuation=tokenizer.decode(until(said[0, prompt.size(1):].tolist(), eos))))
    return results
