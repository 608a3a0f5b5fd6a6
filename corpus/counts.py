"""What a text's tokens stand for: bytes, and text that the tokenizer does not know.

Most tokenizers cut a text into pieces, so that the bytes of their tokens add up to those of the text. Those from
elsewhere may drop the spaces between words, put some before them, or leave out what they cannot spell.
"""
import json

import numpy as np
from tokenizers import Tokenizer

from corpus.foreign import HIDDEN, parts
from corpus.tokenizer import byte_of_character, cut_text, token_byte_counts, unknown_id


def adds_up(tokenizer):
    """Whether the tokens are pieces of the (normalized) text as it stands, so that nothing is left out between them."""
    spec = json.loads(tokenizer.to_str())
    keeping = ("ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts")
    for part in parts(spec["pre_tokenizer"]):
        if part["type"] not in keeping or part.get("behavior") == "Removed" or part.get("add_prefix_space"):
            return False
    return all(part["type"] in ("ByteLevel", "Fuse") for part in parts(spec["decoder"])) and bool(spec["decoder"])


def drops(tokenizer):
    """Whether it drops some characters of a text, other than spaces, before it looks for tokens."""
    spec = json.loads(tokenizer.to_str())
    if any(part.get("behavior") == "Removed" for part in parts(spec["pre_tokenizer"])):
        return True
    return any(part["type"] in ("BertNormalizer", "Nmt", "Precompiled") or part.get("content") == ""
               for part in parts(spec["normalizer"]))


def leaves_out(tokenizer):
    """Whether it leaves out what it cannot spell, as a BPE does that has neither all bytes nor an unknown token."""
    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model["unk_token"] is not None:
        return False
    steps = [*parts(spec["normalizer"]), *parts(spec["pre_tokenizer"])]
    if model["byte_fallback"]:
        needed = {f"<0x{byte:02X}>" for byte in range(256)}
    elif any(step["type"] == "ByteLevel" for step in steps):
        needed = byte_of_character().keys()
    else:
        return True
    return not model["vocab"].keys() >= needed


class TokenCounts:
    """Counts what the tokens of documents stand for.

    A tokenizer whose tokens are pieces of the text says it by itself. Of any other, a document's bytes are those of its
    text, and two more numbers let losses be counted in bits per byte all the same: `unknown_bytes` of text that tokens
    for unknown text stand for, and `token_bytes`, what spelled() gives for all the others. See byte_scale().
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.unknown = tokenizer, unknown_id(tokenizer)
        self.leaves_out, self.drops = leaves_out(tokenizer), drops(tokenizer)
        self.adds_up = adds_up(tokenizer) and not self.leaves_out and not self.drops
        self.token_bytes = token_byte_counts(tokenizer)

        # which tokenizer shows where unknown text is, and by which token
        self.witness, self.mark = tokenizer, self.unknown
        if self.leaves_out:
            self.witness, self.mark = with_unknown_token(tokenizer)

    @property
    def knows_unknown(self):
        """Whether the tokenizer may meet text that no token stands for."""
        return self.mark is not None or self.drops

    def of(self, texts, n_bytes, ids):
        """{"unknown", "bytes"...} of a document. texts: its text, or those of a chat. n_bytes: their UTF-8 bytes. ids:
        those of all its tokens, uint32 (n,).
        """
        unknown = 0
        if self.unknown is not None:
            unknown = int(np.count_nonzero(ids == self.unknown))
        if self.adds_up:
            normalizer = self.tokenizer.normalizer
            if normalizer is not None:
                n_bytes = sum(len(normalizer.normalize_str(piece).encode()) for piece in pieces(texts))
            return dict(unknown=unknown, bytes=n_bytes)

        unknown_bytes = 0
        if unknown or self.leaves_out or self.drops:
            unknown, unknown_bytes = self.unknown_text(texts)
        return dict(unknown=unknown, bytes=n_bytes, unknown_bytes=unknown_bytes,
                    token_bytes=int(self.token_bytes[ids].sum()))

    def unknown_text(self, texts):
        """How many pieces of the texts have no token of their own, and their UTF-8 bytes."""
        n, n_bytes = 0, 0
        for piece in pieces(texts):
            encoding = self.witness.encode(piece, add_special_tokens=False)
            if self.drops:
                for gap in between(encoding.offsets, piece):
                    n += 1
                    n_bytes += len(gap.encode())
            reached = 0  # several tokens may be parts of one character
            for i in np.flatnonzero(np.array(encoding.ids) == self.mark).tolist():
                begin, end = encoding.offsets[i]
                n += 1
                n_bytes += len(piece[max(begin, reached):end].encode())
                reached = max(reached, end)
        return n, n_bytes


def between(offsets, text):
    """The parts of a text that no token stands for, without the spaces in them."""
    reached = 0
    for begin, end in [*sorted(offsets), (len(text), len(text))]:
        if gap := "".join(text[reached:begin].split()):
            yield gap
        reached = max(reached, end)


def pieces(texts):
    """The texts in pieces that the library handles in little memory."""
    return (piece for text in texts for piece in cut_text(text, 2 ** 20))


def with_unknown_token(tokenizer):
    """A BPE as it would be if it had a token for what it leaves out: (tokenizer, the id of that token)."""
    spec = json.loads(tokenizer.to_str())
    new = 1 + max(tokenizer.get_vocab().values())
    token = HIDDEN + "unknown"
    spec["model"] |= dict(vocab=spec["model"]["vocab"] | {token: new}, unk_token=token, fuse_unk=False)
    changed = Tokenizer.from_str(json.dumps(dict(spec, added_tokens=[])))
    changed.add_special_tokens(list(tokenizer.get_added_tokens_decoder().values()))
    changed.encode_special_tokens = True
    return changed, new


def byte_scale(entries):
    """What spelled() must be multiplied by, so that the bytes behind all tokens are those of the known text.

    entries: what meta.json says about the files that were made with one tokenizer. 1 for tokens that are pieces of it.
    """
    known = sum(entry["bytes"] - entry["unknown_bytes"] for entry in entries if "token_bytes" in entry)
    counted = sum(entry["token_bytes"] for entry in entries if "token_bytes" in entry)
    return known / counted if counted else 1.0
