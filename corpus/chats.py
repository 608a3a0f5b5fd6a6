"""Chats: the rows that hold them, and how they are framed."""
import re

import numpy as np

from common import UserError, mended


class NoChat(ValueError):
    """A row that is no chat. Its text is the reason, a key of meta.json's `skipped`."""


def tidy(messages):
    """[(role, text)] as the chat format wants it: a system message perhaps, then user and assistant in turn, an assistant's at the end.

    Neighbours of one role become one message, an empty line between them; a question without a reply at the end goes, for nothing
    is learned from it. An empty text is a message like any other. Raises NoChat for other roles, text that is none, a system
    message further on, a reply that nobody asked for, and where no reply or no text is left.
    """
    chat = []
    for role, text in messages:
        if role not in ("system", "user", "assistant"):
            raise NoChat("role other than system, user and assistant")
        if not isinstance(text, str):
            raise NoChat("not text")
        if chat and chat[-1][0] == role:
            chat[-1] = (role, "\n\n".join(filter(None, (chat[-1][1], mended(text)))))
            continue
        if role == "system" and chat:
            raise NoChat("system message inside the chat")
        if role == "assistant" and (not chat or chat[-1][0] == "system"):
            raise NoChat("begins with a reply")
        chat.append((role, mended(text)))
    if chat and chat[-1][0] == "user":
        chat.pop()
    if not chat or chat[-1][0] != "assistant":
        raise NoChat("no reply")
    if not any(text.strip() for _, text in chat):
        raise NoChat("empty")
    return chat


def chat_messages(row):
    """The chat in a row as [(role, text)], see tidy(). Its layout is told by its shape: {"messages": [{"role", "content"}]}; alpaca's
    {"instruction", "input", "output"} and dolly's {"instruction", "context", "response"}, one question and its reply; TinyChat's
    line `[INST] user [/INST] reply [INST] ...`. Raises NoChat for anything else."""
    if isinstance(row, str):
        before, *parts = re.split(r"(\[/?INST\])", row)
        if before.strip() or not parts or any(mark != ("[INST]", "[/INST]")[i % 2] for i, mark in enumerate(parts[::2])):
            raise NoChat("[INST] and [/INST] not in turn")
        return tidy((("user", "assistant")[i % 2], text.strip()) for i, text in enumerate(parts[1::2]))
    if not isinstance(row, dict):
        raise NoChat("not a chat")
    if isinstance(row.get("messages"), list) and all(isinstance(m, dict) for m in row["messages"]):
        return tidy((m.get("role"), m.get("content")) for m in row["messages"])
    for extra, reply in (("input", "output"), ("context", "response")):
        if "instruction" in row and reply in row:
            return tidy([("user", row["instruction"]), *([("user", row[extra])] if str(row.get(extra) or "").strip() else []), ("assistant", row[reply])])
    raise NoChat("not a chat")

CHAT_COLUMNS = ("messages", "instruction", "input", "output", "context", "response")


def is_chat(row):
    """Whether a row, or a line of a text file, has one of the layouts that chat_messages() reads."""
    if isinstance(row, str):
        return row.lstrip().startswith("[INST]")
    return isinstance(row.get("messages"), list) or "instruction" in row and ("output" in row or "response" in row)


def chat_ids(tokenizer):
    """Special token -> id, for encode_chats(). UserError where the tokenizer has none for the three roles."""
    ids = {token: tokenizer.token_to_id(token) for token in ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        raise UserError(f"the tokenizer has no {' and no '.join(missing)}, which chats are framed with; take bpe, hybrid or chunk")
    return ids


def encode_chats(chats, encode, ids):
    """Chats, tidy [(role, text)] each, as a list of (ids uint32 (n,), mask uint8 (n,)):

        <|bos|>[<|system|>text]<|user|>text<|assistant|>text<|eos|><|user|>text<|assistant|>text<|eos|>...

    The mask is 1 for a reply's tokens and its <|eos|>. `encode`: texts -> id arrays, called once for all chats; `ids`: see chat_ids().
    """
    if not chats:
        return []
    texts = iter(encode([text for chat in chats for _, text in chat]))
    single = {token: np.array([i], np.uint32) for token, i in ids.items()}
    pieces, flags, ends = [], [], []
    for chat in chats:
        pieces.append(single["<|bos|>"])
        flags.append(0)
        for role, _ in chat:
            reply = role == "assistant"
            pieces += [single[f"<|{role}|>"], next(texts), *([single["<|eos|>"]] if reply else [])]
            flags += [0, 1, 1] if reply else [0, 0]
        ends.append(len(pieces))
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    stops = np.cumsum(lengths)[np.array(ends) - 1].tolist()
    tokens, mask = np.concatenate(pieces), np.repeat(np.array(flags, np.uint8), lengths)
    return [(tokens[a:b], mask[a:b]) for a, b in zip([0, *stops], stops)]
