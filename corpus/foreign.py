"""What tokenizers need that were made elsewhere: `--tokenizer=FILE` takes any tokenizer.json.

load_tokenizer() refuses those that would fail later. hide_special_tokens() keeps text from becoming a special token,
also where these are words of the model's own vocabulary. spelled() reads what a token stands for in the ways in which
SentencePiece, WordPiece and others write it. corpus/counts.py counts what such tokenizers drop or add.
"""
import json
import re

from tokenizers import AddedToken, Tokenizer, models

from common import UserError

LARGEST_VOCABULARY = 2 ** 24  # ids; a table of them must fit into memory


# ---------------------------------------------------------------------------------------------------- loading

def check_model(tokenizer, name):
    """Raises UserError, which calls the tokenizer `name`, if it would fail at unknown text or is too large."""
    if max(tokenizer.get_vocab().values(), default=0) >= LARGEST_VOCABULARY:
        raise UserError(f"{name} has ids above {LARGEST_VOCABULARY:,}")
    unknown = unknown_token(tokenizer)
    if unknown is None and not isinstance(tokenizer.model, models.BPE):  # a BPE leaves out what it does not know
        raise UserError(f"{name} names no token for text outside its vocabulary")
    if unknown is not None and tokenizer.model.token_to_id(unknown) is None:
        raise UserError(f"{name} lacks the token {unknown!r} that it names for text outside its vocabulary")


def unknown_token(tokenizer):
    """The token for text outside the vocabulary, or None."""
    if not isinstance(tokenizer.model, models.Unigram):
        return tokenizer.model.unk_token
    unk_id = json.loads(tokenizer.to_str())["model"]["unk_id"]  # a unigram model names the id
    return None if unk_id is None else tokenizer.model.id_to_token(unk_id)


HIDDEN = "\uffff" * 8  # no text holds eight noncharacters in a row


def hide_special_tokens(tokenizer, names):
    """Changes the tokenizer, if need be, so that no text becomes a special token. The others keep their ids.

    The library's encode_special_tokens keeps special tokens from being looked for in a text. But if they are words of
    the model's vocabulary too, the model may find them as it finds other words. There they get a name that no text
    has. names: tokens that are special if the tokenizer has them, whether it says so or not. A tokenizer that was
    changed must not be written to a file.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    unsaid = [name for name in names if name not in added and tokenizer.token_to_id(name) is not None]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in unsaid])
    tokenizer.encode_special_tokens = True

    special = added.union(unsaid)
    if not isinstance(tokenizer.model, models.Unigram):  # the others find the unknown token by its name
        special.discard(tokenizer.model.unk_token)
    ids = set(map(tokenizer.token_to_id, special))
    texts = [text for token in special for text in (token, f" {token} ", f"x{token}x")]
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    if not any(ids.intersection(encoding.ids) for encoding in found):
        return

    spec = json.loads(tokenizer.to_str())
    model = spec["model"]

    def hidden(token):
        return HIDDEN + token if token in special else token
    if model["type"] == "Unigram":
        model["vocab"] = [(hidden(token), score) for token, score in model["vocab"]]
    else:
        model["vocab"] = {hidden(token): i for token, i in model["vocab"].items()}
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not special.intersection((*pair, "".join(pair)))]
    tokenizer.model = Tokenizer.from_str(json.dumps(dict(spec, added_tokens=[]))).model


# ---------------------------------------------------------------------------------------------------- what tokens are

def parts(component):
    """The components of a pre-tokenizer, decoder or normalizer of a tokenizer.json, without the Sequences."""
    if not component:
        return []
    for name in ("pretokenizers", "decoders", "normalizers"):
        if name in component:
            return [part for inner in component[name] for part in parts(inner)]
    return [component]


def spelled(token, spec):
    """How many UTF-8 bytes of text a token of a tokenizer.json stands for, in the middle of a text."""
    model, decoders = spec["model"], parts(spec["decoder"])
    if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
    token = token.removeprefix(model.get("continuing_subword_prefix") or "")
    if suffix := model.get("end_of_word_suffix"):
        token = token.replace(suffix, " ")
    for part in decoders:
        if part["type"] == "Metaspace":
            token = token.replace(part["replacement"], " ")
        elif part["type"] == "Replace" and "String" in part["pattern"]:
            token = token.replace(part["pattern"]["String"], part["content"])
    return len(token.encode())
