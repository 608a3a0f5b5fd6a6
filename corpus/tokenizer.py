"""Tokenizers: training, loading, and encoding fast."""
import itertools
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common import UserError

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>")  # the İvme card's; ids 0 to 6

DEFAULT_VOCAB = {"bpe": 16_384, "hybrid": 2111, "chunk": 4466}

# GPT-2's rule for cutting text into words, as in tokenizers' ByteLevel
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

TRIGRAMS = ("the and ing ion tio ent ati for her ter hat tha ere ate his con res ver all ons nce men ith ted ers "
            "pro thi wit are ess not ive was ect rea com eve per int est sta cti ica ist ear ain one our iti rat").split()

# A chunk: such a trigram, else three characters of which the first, else the last is a space, else two characters, else one.
# Trigrams of one first letter share a branch, which is a quarter faster. [\s\S] is any character to every engine, a line end too
CHUNKS = "|".join(f"{a}(?:{'|'.join(t[1:] for t in TRIGRAMS if t[0] == a)})" for a in dict.fromkeys(t[0] for t in TRIGRAMS))

CHUNKS += r"| [\s\S]{2}|[\s\S]{2} |[\s\S]{2}|[\s\S]"

TASK = 2 ** 16  # characters that a thread of fast_encoder gets at a time

COUNTED_CHUNKS = 2 ** 19  # different ones that are counted at a time; pydocs has 7,400 of them, Chinese text far more

PIECE = 2 ** 16  # characters; a longer text file becomes several documents, cut at paragraph ends


def load_tokenizer(source):
    """A tokenizer from a tokenizer.json's path or its text; UserError if it is none or lacks <|bos|> and <|eos|>.

    encode_special_tokens makes text that spells <|eos|> ordinary characters. The file cannot keep that setting, so every
    load goes through here.
    """
    try:
        tokenizer = Tokenizer.from_str(source) if source.lstrip().startswith("{") else Tokenizer.from_file(source)
    except Exception as e:  # tokenizers raises plain Exception for everything
        what = "the tokenizer" if source.lstrip().startswith("{") else source
        raise UserError(f"{what} is not a tokenizer.json of the tokenizers library: {e}") from None
    for token in ("<|bos|>", "<|eos|>"):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"the tokenizer {'' if source.lstrip().startswith('{') else source + ' '}has no {token}, which documents are framed with")
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()  # a file made for batches of one length would cut or pad the documents
    tokenizer.no_padding()
    return tokenizer


def added_tokens():
    return [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]


def train_bpe(texts, vocab_size):
    """Byte-level BPE (arXiv 1508.07909): special tokens, the 256 bytes, then merges in the order they were learned."""
    tokenizer = Tokenizer(models.BPE())
    # the trainer's time grows with the square of a word's length: a run of 512 characters is a word of its own while it learns
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\S{512}|\s{512}"), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=added_tokens(), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def train_hybrid(texts, vocab_size):
    """TinyMemoryLM's tokenizer: special tokens, the 256 bytes, and the most frequent words. A word in the vocabulary is one
    token, any other is spelled byte by byte; nothing is lost. A BPE without merges that looks whole words up does just that."""
    words = Tokenizer(models.WordLevel())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=vocab_size, show_progress=False))  # by frequency, then alphabet
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_rank = sorted(words.get_vocab(), key=words.get_vocab().get)
    vocab = [*SPECIAL_TOKENS, *alphabet, *(w for w in by_rank if len(w) > 1 and w not in SPECIAL_TOKENS)][:vocab_size]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(added_tokens())
    return tokenizer


def train_chunk(texts, vocab_size):
    """i3's tokenizer: lowercase text in chunks of two or three characters. Special tokens, the most frequent characters, in at most
    a quarter of the vocabulary, and the most frequent chunks. A chunk in the vocabulary is one token, any other is spelled by
    characters, and a character that is not there is <|unk|>. Text with few different chunks gives a smaller vocabulary."""
    lowercase, cut, most = normalizers.Lowercase(), re.compile(CHUNKS), max(COUNTED_CHUNKS, 4 * vocab_size)
    characters, chunks = Counter(), Counter()
    for text in texts:
        for i in range(0, len(text), PIECE):  # the list of a long document's chunks would take 30 times its size
            piece = lowercase.normalize_str(text[i:i + PIECE])
            characters.update(piece)
            chunks.update(cut.findall(piece))
            if len(chunks) > most:  # the rarer half goes, of equal ones the later: the same every time
                chunks = Counter(dict(chunks.most_common(most // 2)))

    def by_rank(counts):
        return sorted(counts, key=lambda x: (-counts[x], x))
    vocab = [*SPECIAL_TOKENS, *by_rank(characters)[:vocab_size // 4], *(c for c in by_rank(chunks) if len(c) > 1)][:vocab_size]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [], ignore_merges=True, unk_token="<|unk|>"))
    tokenizer.normalizer = lowercase
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(CHUNKS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(added_tokens())
    return tokenizer

TRAINERS = {"bpe": train_bpe, "hybrid": train_hybrid, "chunk": train_chunk}


def vocabulary_size(tokenizer):
    """One more than the highest id: a tokenizer from elsewhere may leave ids unused."""
    return 1 + max(tokenizer.get_vocab().values())


def unknown_id(tokenizer):
    """The token id that stands for text outside the vocabulary; None if the tokenizer can spell any text."""
    model = json.loads(tokenizer.to_str())["model"]
    return model["unk_id"] if "unk_id" in model else tokenizer.token_to_id(model.get("unk_token") or "")


def byte_of_character():
    """ByteLevel's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on. char -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def token_byte_counts(tokenizer):
    """UTF-8 bytes of text behind each token id, int64 (vocabulary size,); special tokens stand for none.

    So does <|unk|>: text that a tokenizer cannot spell adds no bytes, which can only raise bits per byte. The text is the
    normalized one: of İ, which has two bytes, chunk sees i̇, which has three.
    """
    is_bytes, special = byte_of_character(), {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    counts = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    byte_level = '"ByteLevel"' in tokenizer.to_str()
    for token, i in tokenizer.get_vocab().items():
        if i not in special:
            counts[i] = len(token) if byte_level and all(c in is_bytes for c in token) else len(tokenizer.decode([i]).encode())
    return counts


def fast_encoder(tokenizer):
    """A function texts -> list of id arrays, the ids of tokenizer.encode, by the quickest way there is.

    GPT-2-style byte-level BPE goes through tiktoken's merge loop, built from the same merges: 3 to 7 times faster. Ids are
    the same if every token's own text encodes to that token, by one merge only, which is checked. All else goes through encode_batch.
    """
    spec = json.loads(tokenizer.to_str())
    model, pre = spec["model"], spec["pre_tokenizer"] or {}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    byte = byte_of_character()
    tokens = sorted(byte, key=byte.get) + [a + b for a, b in merges]  # tiktoken merges the pair of lowest rank first
    plain = (model["type"] == "BPE" and merges and not spec["normalizer"] and pre.get("type") == "ByteLevel"
             and not pre["add_prefix_space"] and pre.get("use_regex", True) and not model["dropout"] and not model["ignore_merges"]
             and not model["continuing_subword_prefix"] and not model["end_of_word_suffix"]
             and len({a + b for a, b in merges}) == len(merges) and byte.keys() <= model["vocab"].keys()
             and all(t.special for t in tokenizer.get_added_tokens_decoder().values())  # others are found in the text first
             and all(len(tokenizer.model.tokenize(t)) == 1 for t in tokens))
    if not plain:
        return lambda texts: [np.array(e.ids, dtype=np.uint32) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    import tiktoken
    ranks = {bytes(byte[c] for c in t): rank for rank, t in enumerate(tokens)}
    ids = np.array([model["vocab"][t] for t in tokens], dtype=np.uint32)
    encoding = tiktoken.Encoding("prepare", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
    pool = ThreadPoolExecutor(os.cpu_count())  # the merge loop runs outside Python's lock

    def encode(texts):
        tasks, size = [[]], 0
        for text in texts:  # a task for each would take longer than a short text itself
            tasks[-1].append(text)
            size += len(text)
            if size >= TASK:
                tasks.append([])
                size = 0
        done = pool.map(lambda task: [ids[encoding.encode_to_numpy(t, disallowed_special=())] for t in task], tasks)
        return list(itertools.chain.from_iterable(done))
    return encode
