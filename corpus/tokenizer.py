"""Tokenizers: how they are trained, loaded, and made to encode fast.

A tokenizer is always a pipeline of the `tokenizers` library, and its file is always a tokenizer.json. One file serves
preparing, training and sampling, and the `transformers` library reads it too. There are four kinds:

    bpe     byte-level BPE, trained on the text; it spells any text                       (for ivme and gpt2preln)
    hybrid  the 256 bytes and the most frequent words, no merges; it spells any text      (for tinymemory)
    chunk   lowercase chunks of two or three characters; it loses unknown characters      (for i3)
    gpt2    GPT-2's own merges, not trained here; for OpenAI's weights and nanoGPT's data

TRAINERS holds the functions that train the first three, READY the one that makes the last. The trained kinds have the
seven SPECIAL_TOKENS, with ids 0 to 6; gpt2 has <|endoftext|> alone. bos_eos() gives the ids that begin and end a
document in either case.

Text that spells "<|eos|>" must not become the token <|eos|>. load_tokenizer() prevents that with a setting that a
tokenizer.json cannot keep, so every tokenizer is loaded by it. It takes tokenizers from elsewhere too, see
corpus/foreign.py. fast_encoder() gives the ids that the library gives, several times faster if the tokenizer allows it.
"""
import contextlib
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common import UserError, replacing
from corpus.foreign import check_model, hide_special_tokens, spelled, unknown_token

# The İvme card's special tokens, with ids 0 to 6
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>")

END_OF_TEXT = "<|endoftext|>"  # the only special token of GPT-2

DEFAULT_VOCAB = {"bpe": 16_384, "hybrid": 2111, "chunk": 4466, "gpt2": 50_257}

PIECE = 2 ** 16  # characters of a text that are held or counted at a time


# ---------------------------------------------------------------------------------------------------- loading

def load_tokenizer(source):
    """Loads a tokenizer from the path or the text of a tokenizer.json, or from the path of a checkpoint (.pt).

    Text that spells a special token stays text. Raises UserError if `source` holds no tokenizer, one without the tokens
    that begin and end a document, or one that would fail at some text.
    """
    tokenizer = read_tokenizer(source)
    name = "the tokenizer" if str(source).lstrip().startswith("{") else str(source)
    bos_eos(tokenizer, name)
    check_model(tokenizer, name)
    hide_special_tokens(tokenizer, [*SPECIAL_TOKENS, END_OF_TEXT])
    no_dropout(tokenizer)
    return tokenizer


def no_dropout(tokenizer):
    """From now on the same text has the same ids each time, also with a BPE that was trained to vary them."""
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None


def read_tokenizer(source):
    """The tokenizer as it stands in a file, to be written to another one. Otherwise see load_tokenizer()."""
    name = source = str(source)
    try:
        if source.lstrip().startswith("{"):
            name = "the tokenizer"
            tokenizer = Tokenizer.from_str(source)
        elif source.endswith(".pt"):
            name = f"the tokenizer in {source}"
            tokenizer = Tokenizer.from_str(tokenizer_text(source))
        else:
            tokenizer = Tokenizer.from_str(Path(source).read_text(encoding="utf-8"))
    except UserError:
        raise
    except Exception as e:  # the library raises plain Exception for everything
        raise UserError(f"{name} is not a tokenizer.json of the tokenizers library: {e}") from None

    # a file that was made for batches of one length would cut or pad the documents
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_text(checkpoint):
    """The text of the tokenizer.json in a checkpoint file. Raises UserError if there is none."""
    import torch  # nothing else here needs it
    try:
        return torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["tokenizer"]
    except (PermissionError, MemoryError):
        raise
    except Exception as e:  # torch raises many types for a damaged file
        raise UserError(f"{checkpoint} is not a checkpoint that holds a tokenizer ({type(e).__name__})") from None


def bos_eos(tokenizer, name="the tokenizer"):
    """The ids (bos, eos) of the tokens that begin and end a document.

    They are those of <|bos|> and <|eos|>; a tokenizer that lacks these has <|endoftext|> for both, as GPT-2 does.
    Raises UserError, which calls the tokenizer `name`, if it has neither.
    """
    bos = tokenizer.token_to_id("<|bos|>")
    eos = tokenizer.token_to_id("<|eos|>")
    if bos is None or eos is None:
        bos = eos = tokenizer.token_to_id(END_OF_TEXT)
    if bos is None:
        raise UserError(f"{name} has neither <|bos|> and <|eos|> nor {END_OF_TEXT}, which documents are framed with")
    return bos, eos


# ---------------------------------------------------------------------------------------------------- training

def added_tokens():
    # normalized=False: the chunk tokenizer's lowercase must not change the tokens themselves
    return [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]


def train_bpe(texts, vocab_size):
    """Byte-level BPE (arXiv 1508.07909): special tokens, the 256 bytes, then merges in the order they were learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)

    # The trainer's time grows with the square of a word's length. So 512 characters without a space between them, or
    # 512 spaces, are a word of their own while it learns.
    short_runs = pre_tokenizers.Split(Regex(r"\S{512}|\s{512}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([short_runs, words])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=added_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_pieces(texts), trainer)

    tokenizer.pre_tokenizer = words
    return tokenizer


def train_hybrid(texts, vocab_size):
    """TinyMemoryLM's tokenizer: special tokens, the 256 bytes, and the most frequent words.

    A word in the vocabulary is one token. Any other word is spelled byte by byte, so that nothing is lost. A BPE that
    has no merges, but looks up whole words first, does exactly that.
    """
    # rank the words by their frequency, then by the alphabet
    counter = Tokenizer(models.WordLevel())
    counter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, show_progress=False)
    counter.train_from_iterator(all_pieces(texts), trainer)
    rank = counter.get_vocab()
    words = [word for word in sorted(rank, key=rank.get) if len(word) > 1 and word not in SPECIAL_TOKENS]

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*SPECIAL_TOKENS, *alphabet, *words][:vocab_size]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(added_tokens())
    return tokenizer


TRIGRAMS = (
    "the and ing ion tio ent ati for her ter hat tha ere ate his con res ver all ons nce men ith ted ers "
    "pro thi wit are ess not ive was ect rea com eve per int est sta cti ica ist ear ain one our iti rat"
).split()


def chunk_pattern():
    """The regular expression that cuts lowercase text into chunks.

    At each place, the first of these rules that fits makes the chunk: one of TRIGRAMS; three characters whose first is
    a space; three whose last is a space; two characters; a single character.
    """
    # trigrams that begin with the same letter share a branch, which is a quarter faster
    endings = {}
    for trigram in TRIGRAMS:
        endings.setdefault(trigram[0], []).append(trigram[1:])
    branches = [f"{first}(?:{'|'.join(rest)})" for first, rest in endings.items()]

    # [\s\S] is any character, a line end too, for every regular expression engine
    branches += [r" [\s\S]{2}", r"[\s\S]{2} ", r"[\s\S]{2}", r"[\s\S]"]
    return "|".join(branches)


CHUNKS = chunk_pattern()

COUNTED_CHUNKS = 2 ** 19  # different chunks counted at a time; pydocs has 7,400 of them, Chinese text far more


def train_chunk(texts, vocab_size):
    """i3's tokenizer: lowercase text in chunks of two or three characters.

    The vocabulary is the special tokens, the most frequent characters (at most a quarter of it), and the most frequent
    chunks. A chunk in it is one token, any other chunk is spelled by its characters, and a character that is not in it
    is <|unk|>. It is smaller than vocab_size if the text has few different chunks.
    """
    lowercase = normalizers.Lowercase()
    characters, chunks = count_chunks(texts, lowercase, most=max(COUNTED_CHUNKS, 4 * vocab_size))
    longer = [chunk for chunk in by_frequency(chunks) if len(chunk) > 1]
    vocab = [*SPECIAL_TOKENS, *by_frequency(characters)[:vocab_size // 4], *longer][:vocab_size]

    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(ids, [], ignore_merges=True, unk_token="<|unk|>"))
    tokenizer.normalizer = lowercase
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(CHUNKS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(added_tokens())
    return tokenizer


def count_chunks(texts, lowercase, most):
    """How often each character and each chunk occurs in the texts: two Counters, the second of about `most` chunks."""
    cut = re.compile(CHUNKS)
    characters, chunks = Counter(), Counter()
    for text in texts:
        for i in range(0, len(text), PIECE):  # the chunks of a long document, listed, would take 30 times its memory
            piece = lowercase.normalize_str(text[i:i + PIECE])
            characters.update(piece)
            chunks.update(cut.findall(piece))

            # Too many: the rarer half goes. Of equally rare ones the later go, so that the result is always the same.
            if len(chunks) > most:
                chunks = Counter(dict(chunks.most_common(most // 2)))
    return characters, chunks


def by_frequency(counts):
    """The keys, the most frequent one first; equally frequent ones in the order of the alphabet."""
    return sorted(counts, key=lambda key: (-counts[key], key))


TRAINERS = {"bpe": train_bpe, "hybrid": train_hybrid, "chunk": train_chunk}


# ---------------------------------------------------------------------------------------------------- GPT-2's merges

GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # where tiktoken downloads them from


def gpt2_tokenizer():
    """GPT-2's own tokenizer (Radford et al. 2019), with the same 50,257 ids as tiktoken's encoding "gpt2".

    The first call downloads GPT-2's merges through tiktoken and keeps the tokenizer.json in the user's cache folder;
    later calls need no network. Raises UserError if the merges are not there and cannot be downloaded.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # nobody's home is known
            cache = tempfile.gettempdir()
    path = Path(cache) / "small-language-models" / "gpt2-tokenizer.json"
    if path.exists():
        return load_tokenizer(str(path))

    text = from_tiktoken(gpt2_encoding()).to_str(pretty=True)
    with contextlib.suppress(OSError):  # if it cannot be kept, it is made again
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            f.write(text.encode())
    return load_tokenizer(text)


def gpt2_encoding():
    """tiktoken's encoding "gpt2", which it downloads once and keeps. UserError says how to do without a network."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # no network, or a file with another checksum
        urls = [f"{GPT2_FILES}/{name}" for name in ("vocab.bpe", "encoder.json")]
        names = [hashlib.sha1(url.encode()).hexdigest() for url in urls]  # tiktoken's cache calls a file by its address
        raise UserError(
            f"tiktoken cannot download GPT-2's merges ({type(e).__name__}); download {urls[0]} and {urls[1]} "
            f"elsewhere, name them {names[0]} and {names[1]}, and set TIKTOKEN_CACHE_DIR to the folder they are in"
        ) from None


def from_tiktoken(encoding):
    """A byte-level BPE encoding of tiktoken that has one special token, <|endoftext|>, as a tokenizer with equal ids.

    tiktoken lists the tokens alone, and a token's id is its rank: the lower the rank, the earlier two neighbours are
    merged into it. tokenizers wants the merges, that is, the two parts that each token is made of.
    """
    end = encoding.eot_token
    tokens = [encoding.decode_single_token_bytes(i) for i in range(end)]  # <|endoftext|> has the last id
    rank = {token: i for i, token in enumerate(tokens)}
    character = {byte: char for char, byte in byte_of_character().items()}
    spelling = {token: "".join(character[byte] for byte in token) for token in tokens}

    vocab = {spelling[token]: i for token, i in rank.items()} | {END_OF_TEXT: end}
    pairs = [last_merge(token, rank) for token in tokens if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab, [(spelling[a], spelling[b]) for a, b in pairs]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def last_merge(token, rank):
    """The two parts that the last merge joins to `token` (bytes), found by merging its bytes in the order of `rank`."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks = [rank.get(a + b, len(rank)) for a, b in zip(parts, parts[1:])]
        i = ranks.index(min(ranks))
        assert ranks[i] < rank[token], "a token must be made of tokens with lower ranks"
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


READY = {"gpt2": gpt2_tokenizer}  # name -> a function without arguments that returns the tokenizer


# ---------------------------------------------------------------------------------------------------- facts

def vocabulary_size(tokenizer):
    """One more than the highest id: a tokenizer from elsewhere may leave ids unused."""
    return 1 + max(tokenizer.get_vocab().values())


def unknown_id(tokenizer):
    """The id of the token for text outside the vocabulary; None if the tokenizer can spell any text."""
    unknown = unknown_token(tokenizer)
    return None if unknown is None else tokenizer.model.token_to_id(unknown)


def byte_of_character():
    """The alphabet of ByteLevel, as a dict from its 256 characters to the bytes they stand for.

    Printable bytes stand for themselves. The others have the characters from U+0100 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(others)}
    return alphabet


def token_byte_counts(tokenizer):
    """UTF-8 bytes of text that each token id stands for, int64 (vocabulary size,). Special tokens stand for none.

    <|unk|> too stands for none: text that a tokenizer cannot spell adds no bytes, which can only raise bits per byte.
    The text is the normalized one: chunk, which lowercases, makes three bytes of the two of İ. Of a tokenizer from
    elsewhere, the bytes may not add up to those of the text: see corpus/counts.py.
    """
    spec = json.loads(tokenizer.to_str())
    is_byte = byte_of_character()
    byte_level = '"ByteLevel"' in json.dumps([spec["normalizer"], spec["pre_tokenizer"], spec["decoder"]])
    none = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special} | {unknown_id(tokenizer)}

    counts = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for token, i in tokenizer.get_vocab().items():
        if i in none:
            continue
        if byte_level and all(char in is_byte for char in token):
            counts[i] = len(token)  # a token may be a part of a character, which cannot be decoded by itself
        else:
            counts[i] = spelled(token, spec)
    return counts


# ---------------------------------------------------------------------------------------------------- encoding fast

# GPT-2's rule for cutting text into words, as ByteLevel of the tokenizers library has it
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

TASK = 2 ** 16  # characters that a thread encodes at a time

# Longer texts are encoded in pieces. tiktoken's regular expressions fail at a million spaces, and its merge loop takes
# its time with a long word. The library needs a hundred bytes of memory for each token
LONGEST_WITH_TIKTOKEN = 2 ** 19
LONGEST = 2 ** 21

# Places where ByteLevel always begins a new word: at the space before a word, and at punctuation behind one
BETWEEN_WORDS = re.compile(r"(?<=[^\W_])(?= [^\W_]|[^\w\s'])")


def cut_text(text, longest):
    """Yields the text in pieces of at most `longest` characters, which end between words if that is possible."""
    begin = 0
    while len(text) - begin > longest:
        end = begin + longest
        for first in (max(begin + 1, end - 100), begin + (longest + 1) // 2):  # near the end, else in the second half
            if cuts := [cut.start() for cut in BETWEEN_WORDS.finditer(text, first, end)]:
                end = cuts[-1]
                break
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text


def all_pieces(texts):
    """The pieces of all the texts, to learn from."""
    return (piece for text in texts for piece in cut_text(text, LONGEST_WITH_TIKTOKEN))


def in_pieces(encode, longest):
    """A function like encode(texts), which gets no text that is longer than `longest`."""
    def encode_all(texts):
        pieces = [list(cut_text(text, longest)) for text in texts]
        ids = iter(encode([piece for some in pieces for piece in some]))
        return [next(ids) if len(some) == 1 else np.concatenate([next(ids) for _ in some]) for some in pieces]
    return encode_all


def fast_encoder(tokenizer):
    """A function from a list of texts to a list of id arrays, uint32 (n,) each: the ids that tokenizer.encode gives.

    A byte-level BPE like GPT-2's goes through tiktoken's merge loop, which is built from the same merges and takes a
    third to a seventh of the time. Any other tokenizer goes through the library's own encode_batch.
    """
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    byte = byte_of_character()
    tokens = sorted(byte, key=byte.get) + [a + b for a, b in merges]  # in the order of their ranks
    if not tiktoken_gives_equal_ids(tokenizer, merges, tokens):
        return library_encoder(tokenizer)

    import tiktoken
    rank = {bytes(byte[char] for char in token): i for i, token in enumerate(tokens)}
    ids = np.array([model["vocab"][token] for token in tokens], dtype=np.uint32)  # rank -> id
    encoding = tiktoken.Encoding("prepare", pat_str=GPT2_WORDS, mergeable_ranks=rank, special_tokens={})
    pool = ThreadPoolExecutor(os.cpu_count())  # the merge loop runs outside Python's lock

    def encode_task(texts):
        return [ids[encoding.encode_to_numpy(text, disallowed_special=())] for text in texts]

    def encode(texts):
        return list(itertools.chain.from_iterable(pool.map(encode_task, tasks(texts, TASK))))
    return in_pieces(encode, LONGEST_WITH_TIKTOKEN)


def tiktoken_gives_equal_ids(tokenizer, merges, tokens):
    """Whether tiktoken's merge loop finds the ids that the tokenizer gives.

    tiktoken merges the pair whose union has the lowest rank; the library applies the merges in their order. Both give
    the same if each token comes from one merge only, and if each token's own text is encoded to that token alone. Also,
    nothing may change the text or find tokens in it beforehand, and the text must be cut into words as GPT-2 does it.
    """
    spec = json.loads(tokenizer.to_str())
    if not is_gpt2s_kind(spec):
        return False

    # An added token that is not special is found in the text first
    if not all(token.special for token in tokenizer.get_added_tokens_decoder().values()):
        return False

    # Each token comes from one merge or is a byte, every byte has a token, and each token's text gives the token alone
    if len({a + b for a, b in merges}) != len(merges):
        return False
    if not byte_of_character().keys() <= spec["model"]["vocab"].keys():
        return False
    return all(len(tokenizer.model.tokenize(token)) == 1 for token in tokens)


def is_gpt2s_kind(spec):
    """Whether a tokenizer.json describes a BPE whose merges alone decide, over GPT-2's words of the unchanged text."""
    model, words = spec["model"], spec["pre_tokenizer"] or {}

    # Nothing comes before the words, and they are GPT-2's
    if model["type"] != "BPE" or not model["merges"] or spec["normalizer"]:
        return False
    if words.get("type") != "ByteLevel" or words["add_prefix_space"] or not words.get("use_regex", True):
        return False

    # No merge is left out by chance, no whole word is looked up, no mark is added to a part of a word
    if model["dropout"] or model["ignore_merges"]:
        return False
    return not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])


def library_encoder(tokenizer):
    def encode(texts):
        ids = []
        for task in tasks(texts, LONGEST):
            encodings = tokenizer.encode_batch_fast(task, add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return ids
    return in_pieces(encode, LONGEST)


def tasks(texts, characters):
    """Divides texts into lists of about so many characters: a task for a short text would take longer than the text."""
    task, size = [], 0
    for text in texts:
        task.append(text)
        size += len(text)
        if size >= characters:
            yield task
            task, size = [], 0
    yield task
