"""A GGUF file, tried in llama.cpp itself: does it read text, score it and go on with it as our model does?

llama.cpp comes as the Python package xllamacpp, whose server runs inside this process and is asked over HTTP.
"""
import json
import random
import urllib.request

import torch

from common import UserError
from corpus.chats import chat_ids, encode_chats
from corpus.tokenizer import fast_encoder

N_TEXTS = 400  # strings whose tokens are compared
N_GREEDY = 64  # tokens of each greedy text that are compared
PROMPTS = ("The", "In the beginning", "def ", "La città", "Bir gün")
CHAT = [("system", "Be brief."), ("user", "Who <|are|> you?\n"), ("assistant", "A model."), ("user", " And you? 🙂")]

# How far a log-probability may be off. With F32 llama.cpp adds in another order than PyTorch; with the other types it
# rounds weights and activations. The figures are several times what was seen with trained models.
TOLERANCE = dict(F32=0.001, F16=0.1, BF16=0.3, Q8_0=1.0)
TOLERANCE_OF_GELU = 0.02  # with F32: llama.cpp looks GPT-2's GELU up in a table of F16 numbers

# What trips tokenizers up, between ordinary words
PIECES = [
    "<|bos|>", "<|eos|>", "<|endoftext|>", "<|", "'s", "'LL", "don't",
    " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\x00", "\xa0", "\u3000",
    "e\u0301", "İstanbul'da", "ığüşöç", "perché", "l'università", "città.", "naïve", "Größe",
    "日本語", "привет", "हिन्दी", "مرحبا", "🙂", "👩\u200d💻", "🇹🇷", "\U00020000",
    "½", "²", "1234567", "3.14", "0x1F", "def f(x):", "    return x", "self.x[i] += 1", "//", "&&", "http://a.b/c?d=e",
    "CamelCase", "snake_case", "the", "of", " and", " model", "Hello", "!!", "...",
]


def varied_texts(n):
    """n strings of words, code, emoji, white space and several languages; the same every time."""
    rng = random.Random(0)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12))) for _ in range(n)]


class LlamaCpp:
    """llama.cpp's server with one model. UserError if it does not load the file."""

    def __init__(self, path, context_length):
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context_length
        params.n_parallel = 1
        params.port = 0  # any that is free
        params.verbosity = 0
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        # by default keys and values are rounded to F16, which would hide small mistakes
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as e:
            raise UserError(f"llama.cpp does not load {path}: {e}") from None

    def ask(self, path, **question):
        """The answer to a POST, as llama.cpp's tools/server/README.md describes both."""
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(question).encode(), {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=600) as answer:
            return json.load(answer)

    def tokens(self, text, special=False):
        """Token ids of a text. special: <|bos|> comes first, and what spells a special token is one."""
        return self.ask("/tokenize", content=text, add_special=special, parse_special=special)["tokens"]

    def greedy(self, ids, n):
        """The likeliest next tokens, one after the other: n, or up to <|eos|>."""
        answer = self.ask(
            "/completion", prompt=ids, n_predict=n, temperature=0, repeat_penalty=1.0, return_tokens=True)
        return answer["tokens"]

    def log_probabilities(self, ids, n=10):
        """The n likeliest next tokens: id -> natural logarithm of the probability."""
        # the server tells them only where a character ends, so that the letter "a" is forced upon it
        letter = self.tokens("a")[0]
        answer = self.ask(
            "/completion", prompt=ids, n_predict=1, temperature=0, n_probs=n, logit_bias=[[letter, 1000]])
        (first,) = answer["completion_probabilities"]
        return {token["id"]: token["logprob"] for token in first["top_logprobs"]}

    def chat(self, messages):
        """The token ids that the model sees of a chat, up to where its reply begins."""
        prompt = self.ask("/apply-template", messages=messages)["prompt"]
        return self.tokens(prompt, special=True)


# ---------------------------------------------------------------------------------------------------- the comparison

def check(path, release, kind):
    """Compares a GGUF file, whose matrices are of the type `kind`, with our model. Returns a line that says what was
    found; UserError if it is not the same model.

    Tokens, and those of a chat, must be equal. Log-probabilities must agree up to TOLERANCE. Greedy text must be equal
    with F32, unless the two likeliest tokens are about as likely where the texts part.
    """
    tolerance = TOLERANCE[kind]
    if release.architecture == "gpt2preln":
        tolerance = max(tolerance, TOLERANCE_OF_GELU)
    llama = LlamaCpp(path, release.cfg.context_length)
    n_texts = check_tokens(path, llama, release)

    prompts = [[release.bos, *release.tokenizer.encode(text, add_special_tokens=False).ids] for text in PROMPTS]
    prompts = [ids[:max(1, release.cfg.context_length // 2)] for ids in prompts]
    worst = max(log_probability_error(llama, release, ids) for ids in prompts)
    if worst > tolerance:
        raise UserError(f"{path.name}: llama.cpp's log-probabilities are off by {worst:.3g}: it is not the same model")

    n_equal, parted = 0, []
    for text, ids in zip(PROMPTS, prompts):
        n, gap = greedy_agreement(llama, release, ids)
        n_equal += n
        if gap is not None:
            parted.append(f"{n} tokens after {text!r}, where the likeliest two differ by {gap:.2g} nats")
            if kind == "F32" and gap > 2 * tolerance:
                raise UserError(f"{path.name}: llama.cpp's greedy text parts from ours {parted[-1]}")
    line = (f"tokens of {n_texts} strings equal, log-probabilities within {worst:.1g}, "
            f"{n_equal} greedy tokens of {len(PROMPTS)} texts equal")
    if parted:
        line += f"; they part {', and '.join(parted)}"
    return line


def check_tokens(path, llama, release):
    """Raises UserError unless llama.cpp reads texts, and a chat, as our tools do. Returns the number of texts."""
    texts = varied_texts(N_TEXTS)
    for text in texts:
        ours, theirs = release.tokenizer.encode(text, add_special_tokens=False).ids, llama.tokens(text)
        if ours != theirs:
            raise UserError(f"{path.name}: llama.cpp makes the tokens {theirs} of {text!r}, and not {ours}")
    if release.has_roles:
        reply = ("assistant", "")
        encoded = encode_chats([[*CHAT, reply]], fast_encoder(release.tokenizer), chat_ids(release.tokenizer))
        ours = encoded[0][0][:-1].tolist()  # without the <|eos|> of the empty reply
        theirs = llama.chat([dict(role=role, content=text) for role, text in CHAT])
        if ours != theirs:
            raise UserError(f"{path.name}: llama.cpp frames a chat as {theirs}, and not as {ours}")
    return len(texts)


@torch.no_grad()
def log_probability_error(llama, release, ids):
    """The largest difference between llama.cpp's log-probabilities of its likeliest next tokens and ours."""
    ours = release.model(torch.tensor([ids]))[0][0, -1].float().log_softmax(-1)
    theirs = llama.log_probabilities(ids)
    return max(abs(float(ours[token]) - value) for token, value in theirs.items())


@torch.no_grad()
def greedy_agreement(llama, release, ids):
    """(number of greedy tokens after which llama.cpp's text parts from ours, gap); gap is None if it does not.

    gap: how far our log-probabilities of the two likeliest tokens differ where the texts part.
    """
    n = min(N_GREEDY, release.cfg.context_length - len(ids))
    idx = torch.tensor([ids])
    ours = release.model.generate(idx, n, temperature=0, stop_token=release.eos)[0, len(ids):].tolist()
    theirs = llama.greedy(ids, n)
    if ours == theirs:
        return len(ours), None
    same = 0
    while ours[same:same + 1] == theirs[same:same + 1]:
        same += 1
    best = release.model(torch.tensor([ids + ours[:same]]))[0][0, -1].float().log_softmax(-1).topk(2).values
    return same, float(best[0] - best[1])
