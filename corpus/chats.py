"""Chats: how they are read from the layouts in which people publish them, and how they become tokens.

chat_messages() turns a row of any layout into a list of (role, text), which tidy() has put in order; a row that cannot
be read raises NoChat with the reason. encode_chats() frames the messages with special tokens and makes the mask. From
the mask, a fine-tuning run knows what to learn: the replies, and where they end.
"""
import re

import numpy as np

from common import UserError

ROLES = ("system", "user", "assistant")
SHOWN = "shown"  # role of a reply that belongs to the chat but is not to be learned

# What people call the roles
ROLE_NAMES = dict(
    system="system", developer="system", user="user", human="user",
    assistant="assistant", gpt="assistant", chatgpt="assistant", model="assistant", bot="assistant")


class NoChat(ValueError):
    """A row that is no chat. The text of the error is the reason, which meta.json counts under `skipped`."""


# ---------------------------------------------------------------------------------------------------- reading

# Names of the columns that hold the system's message, what was said before, all messages, a question, what belongs to
# the question, and the reply
SYSTEMS = ("system", "system_prompt")
HISTORY = "history"
MESSAGES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question")
EXTRAS = ("input", "context")
REPLIES = ("output", "response", "completion", "answer")


def chat_columns(names):
    """Those of the columns `names` that a chat is read from; none if they hold none."""
    before = [name for name in SYSTEMS if name in names]
    for name in MESSAGES:
        if name in names:
            return [*before, name]
    if any(name in names for name in QUESTIONS) and any(name in names for name in REPLIES):
        return [name for name in (*before, HISTORY, *QUESTIONS, *EXTRAS, *REPLIES) if name in names]
    return []


def is_chat(row):
    """Whether a row (a dict, or a line of text) has one of the layouts that chat_messages() reads.

    A row that has a text of its own, beside columns that are not called messages or instruction, is a text.
    """
    if isinstance(row, str):
        return re.match(r"\s*(?:<s>\s*)?\[INST\]", row) is not None
    if isinstance(row.get("messages"), list):
        return True
    if "instruction" in row and ("output" in row or "response" in row):
        return True
    if isinstance(row.get("text"), str) or isinstance(row.get("content"), str):
        return False
    question, reply = row.get(first_of(QUESTIONS, row)), row.get(first_of(REPLIES, row))
    both = isinstance(question, (str, list)) and isinstance(reply, (str, list))
    return both or any(isinstance(row.get(name), list) for name in MESSAGES)


def first_of(names, row):
    """The first of these columns that a row fills; if it fills none, the first that it has, or None."""
    there = [name for name in names if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else None)


def chat_messages(row):
    """The chat in a row, as tidy() returns it: [(role, text)].

    The row may have one of these layouts, also with the other names that MESSAGES, QUESTIONS, EXTRAS and REPLIES list,
    and with the system's message in a column of its own (SYSTEMS):

        {"messages": [{"role": "user", "content": "..."}, ...]}
        {"conversations": [{"from": "human", "value": "..."}, ...]}         ShareGPT
        {"instruction": "...", "input": "...", "output": "..."}             alpaca: one question and its reply
        {"instruction": "...", "context": "...", "response": "..."}         dolly: the same with other names
        {"history": [["question", "reply"], ...], "instruction": ...}       the same with what was said before
        {"prompt": [messages], "completion": [messages]}
        [INST] question [/INST] reply [INST] question ...                   TinyChat: a line of text
        <s>[INST] <<SYS>>system<</SYS>> question [/INST] reply </s><s>...   Llama 2: the same with more marks

    A reply of "weight" 0, as OpenAI has it, gets the role SHOWN. Raises NoChat for anything else.
    """
    if isinstance(row, str):
        return tidy(instruction_turns(row))
    if not isinstance(row, dict):
        raise NoChat("not a chat")

    system = row.get(first_of(SYSTEMS, row))
    begin = [("system", system)] if isinstance(system, str) else []
    messages = row.get(first_of(MESSAGES, row))
    if is_list_of_messages(messages):
        said = list(map(role_and_text, messages))
        if said and said[0][0] == "system":  # twice the same, or the message's own
            begin = []
        return tidy([*begin, *said])

    question, reply = first_of(QUESTIONS, row), first_of(REPLIES, row)
    if question is None or reply is None:
        raise NoChat("not a chat")
    if is_list_of_messages(row[question]) and is_list_of_messages(row[reply]):
        return tidy([*begin, *map(role_and_text, row[question] + row[reply])])

    history = row.get(HISTORY) or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise NoChat("history that is no list of questions and replies")
    for asked, replied in history:
        begin += [("user", asked), ("assistant", replied)]
    turn = [("user", row[question])]
    turn += [("user", row[extra]) for extra in EXTRAS if str(row.get(extra) or "").strip()]  # tidy() joins them
    return tidy([*begin, *turn, ("assistant", row[reply])])


def is_list_of_messages(value):
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def role_and_text(message):
    """(role, text) of a message, {"role", "content"} or ShareGPT's {"from", "value"}. An unknown role is None.

    Raises NoChat for a reply that calls a tool, which no text of ours can express.
    """
    if message.get("tool_calls") or message.get("function_call"):
        raise NoChat("calls a tool")
    name = message.get(first_of(("role", "from"), message))
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role == "assistant" and message.get("weight") == 0:
        role = SHOWN
    content = message.get(first_of(("content", "value"), message))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return role, content


def instruction_turns(line):
    """'[INST] a [/INST] b' -> [('user', 'a'), ('assistant', 'b')]. Raises NoChat if the marks do not take turns.

    Of Llama 2's other marks, <s> and </s> go, and what stands in <<SYS>> at the beginning is the system's message.
    """
    before, *parts = re.split(r"(\[/?INST\])", line)
    marks, texts = parts[::2], parts[1::2]
    in_turn = all(mark == ("[/INST]" if i % 2 else "[INST]") for i, mark in enumerate(marks))
    if before.strip() not in ("", "<s>") or not marks or not in_turn:
        raise NoChat("[INST] and [/INST] not in turn")

    turns = []
    for i, text in enumerate(texts):
        text = text.strip()
        if i % 2:
            text = text.removesuffix("<s>").rstrip().removesuffix("</s>").rstrip()
        turns.append(("assistant" if i % 2 else "user", text))
    if system := re.match(r"<<SYS>>(.*?)<</SYS>>(.*)", turns[0][1], re.DOTALL):
        turns[:1] = [("system", system[1].strip()), ("user", system[2].strip())]
    return turns


def tidy(messages):
    """Messages, [(role, text)], as a chat: perhaps a system message, then user and assistant in turn.

    Messages of the same role that follow each other become one, with an empty line between them; replies become one
    that is SHOWN if one of them is. Questions at the end that have no reply are removed, because nothing is learned
    from them. A user's empty text is a message like any other; a system's is left out, and an empty reply is SHOWN, so
    that nobody learns to say nothing.

    Raises NoChat if

        - a role is not one of ROLES or SHOWN, or a text is not a str
        - a system message is not the first message
        - a reply does not follow a user's message
        - no reply is left that is to be learned, or all the texts are empty
    """
    replies = ("assistant", SHOWN)
    chat = []
    for role, text in messages:
        if role not in (*ROLES, SHOWN):
            raise NoChat("role other than system, user and assistant")
        if not isinstance(text, str):
            raise NoChat("not text")

        before = chat[-1][0] if chat else None
        if not text.strip():
            if role == "system" and before is None or role in replies and before in replies:
                continue
            role = SHOWN if role == "assistant" else role
        if role == before or role in replies and before in replies:
            if before == SHOWN and chat[-1][1].strip():
                role = SHOWN
            chat[-1] = (role, "\n\n".join(filter(None, (chat[-1][1], text))))
            continue
        if role == "system" and before is not None:
            raise NoChat("system message inside the chat")
        if role in replies and before != "user":
            raise NoChat("begins with a reply")
        chat.append((role, text))

    if chat and chat[-1][0] == "user":
        chat.pop()
    if not chat or chat[-1][0] not in replies:
        raise NoChat("no reply")
    if not any(text.strip() for _, text in chat):
        raise NoChat("empty")
    if not any(role == "assistant" for role, _ in chat):
        raise NoChat("no reply that is to be learned")
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

    The mask is 1 for the tokens of a reply and for the <|eos|> after it, else 0; it is 0 for a reply that is SHOWN.
    encode: a function from a list of texts to a list of id arrays; it is called once, with the texts of all chats.
    ids: see chat_ids().
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
            is_reply = role in ("assistant", SHOWN)
            token = "<|assistant|>" if is_reply else f"<|{role}|>"
            pieces += [special[token], next(texts)]
            learned += [0, int(role == "assistant")]
            if is_reply:
                pieces.append(special["<|eos|>"])
                learned.append(learned[-1])
        lengths = [len(piece) for piece in pieces]
        encoded.append((np.concatenate(pieces), np.repeat(np.array(learned, np.uint8), lengths)))
    return encoded
