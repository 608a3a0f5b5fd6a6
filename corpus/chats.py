"""Chats: how they are read from the layouts in which people publish them, and how they become tokens.

chat_messages() turns a row of any layout into a list of (role, text), which tidy() has put in order; a row that cannot
be read raises NoChat with the reason. encode_chats() frames the messages with special tokens and makes the mask. From
the mask, a fine-tuning run knows what to learn: the replies, and where they end.
"""
import re

import numpy as np

from common import UserError, mended

ROLES = ("system", "user", "assistant")


class NoChat(ValueError):
    """A row that is no chat. The text of the error is the reason, which meta.json counts under `skipped`."""


# ---------------------------------------------------------------------------------------------------- reading

CHAT_COLUMNS = ("messages", "instruction", "input", "output", "context", "response")  # the columns of all the layouts


def is_chat(row):
    """Whether a row (a dict, or a line of a text file) has one of the layouts that chat_messages() reads."""
    if isinstance(row, str):
        return row.lstrip().startswith("[INST]")
    if isinstance(row.get("messages"), list):
        return True
    return "instruction" in row and ("output" in row or "response" in row)


def chat_messages(row):
    """The chat in a row, as tidy() returns it: [(role, text)].

    The row may have one of four layouts:

        {"messages": [{"role": "user", "content": "..."}, ...]}
        {"instruction": "...", "input": "...", "output": "..."}        alpaca: one question and its reply
        {"instruction": "...", "context": "...", "response": "..."}    dolly: the same with other names
        [INST] question [/INST] reply [INST] question ...              TinyChat: a line of text

    Raises NoChat for anything else.
    """
    if isinstance(row, str):
        return tidy(instruction_turns(row))
    if not isinstance(row, dict):
        raise NoChat("not a chat")

    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
        return tidy((m.get("role"), m.get("content")) for m in messages)

    for extra, reply in (("input", "output"), ("context", "response")):
        if "instruction" in row and reply in row:
            turn = [("user", row["instruction"]), ("assistant", row[reply])]
            if str(row.get(extra) or "").strip():
                turn.insert(1, ("user", row[extra]))  # tidy() joins it to the question
            return tidy(turn)
    raise NoChat("not a chat")


def instruction_turns(line):
    """'[INST] a [/INST] b' -> [('user', 'a'), ('assistant', 'b')]. Raises NoChat if the marks do not take turns."""
    before, *parts = re.split(r"(\[/?INST\])", line)
    marks, texts = parts[::2], parts[1::2]
    in_turn = all(mark == ("[/INST]" if i % 2 else "[INST]") for i, mark in enumerate(marks))
    if before.strip() or not marks or not in_turn:
        raise NoChat("[INST] and [/INST] not in turn")
    return [("assistant" if i % 2 else "user", text.strip()) for i, text in enumerate(texts)]


def tidy(messages):
    """Messages, [(role, text)], as a chat: perhaps a system message, then user and assistant in turn.

    Messages of the same role that follow each other become one, with an empty line between them. Questions at the end
    that have no reply are removed, because nothing is learned from them. An empty text is a message like any other.

    Raises NoChat if

        - a role is not one of ROLES, or a text is not a str
        - a system message is not the first message
        - a reply does not follow a user's message
        - no reply is left, or all the texts are empty
    """
    chat = []
    for role, text in messages:
        if role not in ROLES:
            raise NoChat("role other than system, user and assistant")
        if not isinstance(text, str):
            raise NoChat("not text")

        before = chat[-1][0] if chat else None
        if role == before:
            chat[-1] = (role, "\n\n".join(filter(None, (chat[-1][1], mended(text)))))
            continue
        if role == "system" and before is not None:
            raise NoChat("system message inside the chat")
        if role == "assistant" and before != "user":
            raise NoChat("begins with a reply")
        chat.append((role, mended(text)))

    if chat and chat[-1][0] == "user":
        chat.pop()
    if not chat or chat[-1][0] != "assistant":
        raise NoChat("no reply")
    if not any(text.strip() for _, text in chat):
        raise NoChat("empty")
    return chat


# ---------------------------------------------------------------------------------------------------- encoding

def chat_ids(tokenizer):
    """Special token -> id, for encode_chats(). Raises UserError if the tokenizer lacks one of the tokens."""
    tokens = ("<|bos|>", "<|eos|>", *(f"<|{role}|>" for role in ROLES))
    ids = {token: tokenizer.token_to_id(token) for token in tokens}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        raise UserError(f"the tokenizer has no {' and no '.join(missing)}, which chats are framed with; "
                        "take bpe, hybrid or chunk")
    return ids


def encode_chats(chats, encode, ids):
    """Tidy chats, [(role, text)] each, as a list of (ids, mask): uint32 (n,) and uint8 (n,).

        <|bos|>[<|system|>text]<|user|>text<|assistant|>text<|eos|><|user|>text<|assistant|>text<|eos|>...

    The mask is 1 for the tokens of a reply and for the <|eos|> after it, else 0. encode: a function from a list of
    texts to a list of id arrays; it is called once, with the texts of all chats. ids: see chat_ids().
    """
    if not chats:
        return []
    texts = iter(encode([text for chat in chats for _, text in chat]))
    special = {token: np.array([i], np.uint32) for token, i in ids.items()}
    encoded = []
    for chat in chats:
        pieces = [special["<|bos|>"]]
        learned = [0]  # the mask's value for each piece
        for role, _ in chat:
            pieces += [special[f"<|{role}|>"], next(texts)]
            if role == "assistant":
                pieces.append(special["<|eos|>"])
                learned += [0, 1, 1]
            else:
                learned += [0, 0]
        lengths = [len(piece) for piece in pieces]
        encoded.append((np.concatenate(pieces), np.repeat(np.array(learned, np.uint8), lengths)))
    return encoded
