"""Texts and chats that are made up from a few words: enough for a model to learn for minutes, and never the same."""
import random

GRAMMAR = dict(
    en=dict(
        the=["the", "a", "this", "every"],
        noun=["house", "river", "old man", "letter", "city", "child", "war", "garden", "king", "song", "road"],
        verb=["sees", "takes", "forgets", "follows", "builds", "loses", "remembers", "sells"],
        how=["slowly", "at night", "without a word", "in the end", "again"],
        also="and",
        wiki="{0} is {1} of {2}, known since {3}. It {4} {5} in {6}.",
        web="{0} {4} {1} {7}, {8} {2} {9} {5}!"),
    it=dict(
        the=["il", "un", "questo", "ogni"],
        noun=["palazzo", "fiume", "vecchio", "libro", "paese", "bambino", "giardino", "re", "canto", "treno", "mare"],
        verb=["vede", "prende", "dimentica", "segue", "costruisce", "perde", "ricorda", "vende"],
        how=["piano", "di notte", "senza parlare", "alla fine", "ancora"],
        also="e",
        wiki="{0} è {1} di {2}, noto dal {3}. {4} {5} nel {6}.",
        web="{0} {4} {1} {7}, {8} {2} {9} {5}!"))

WORDS = "alpha beta gamma delta epsilon zeta theta kappa lambda sigma return def self import os the of in".split()


def made_up_text(language, kind, rng):
    """One to twelve sentences of a little grammar."""
    words = GRAMMAR[language]

    def thing():
        return f"{rng.choice(words['the'])} {rng.choice(words['noun'])}"

    def sentence():
        return words[kind].format(
            thing(), thing(), thing(), rng.randrange(1200, 1990), rng.choice(words["verb"]), thing(),
            rng.randrange(1200, 1990), rng.choice(words["how"]), words["also"], rng.choice(words["verb"])).capitalize()

    return " ".join(sentence() for _ in range(rng.randint(1, 12)))


def made_up_chats(n, seed, longest=12):
    """n chats of one to three turns; some replies have a single character, some questions fill more than a row."""
    rng = random.Random(seed)

    def text(longest):
        words = []
        for _ in range(rng.randint(1, longest)):
            word = rng.choice(WORDS)
            words.append(word + str(rng.randrange(99)) if rng.random() < 0.2 else word)
        return " ".join(words)

    for i in range(n):
        messages = []
        if rng.random() < 0.2:
            messages.append(dict(role="system", content="be brief"))
        for _ in range(rng.randint(1, 3)):
            question = text(60 if rng.random() < 0.1 else longest)
            answer = rng.choice("xyz") if rng.random() < 0.2 else text(longest)
            messages += [dict(role="user", content=f"{i} {question}"), dict(role="assistant", content=answer)]
        yield dict(messages=messages)
