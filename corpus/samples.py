"""A budget of tokens is a sample: if it needs only a part of a set of many files, portions of at least 64 are taken.

The files come in an order that a seed draws. in_turns() goes over them and can continue from any place.
"""
import hashlib
import math
from typing import NamedTuple

VISITED = 64  # files that a sample comes from at least, if there are as many
VISIT = 2 ** 20  # bytes of text to take from a file before it is worth while to open another one


class Wanted(NamedTuple):
    """How many bytes of text a budget of tokens needs, at least and probably: the number is known after encoding."""
    least: int
    likely: int

    def first_portion(self, n_files):
        """Bytes to take first from each of n_files files, so that all come from many of them; math.inf for all text.

        If every file is visited, each first gives its share of the least, and later rounds give the rest.
        """
        if not self.likely:
            return math.inf
        visited = min(n_files, max(VISITED, self.likely // VISIT))
        return (self.least if visited == n_files else self.likely) / visited


def wanted_for(budget):
    """Most tokens have a byte or more, and those of English text and a large vocabulary have four. 0: all text."""
    return Wanted(budget, 4 * budget)


def drawn_order(names, seed):
    """The files' names in an order that the seed draws. It does not depend on the order in which they are given."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{seed} {name}".encode(errors="replace")).digest())


def in_turns(names, portion, place, read):
    """Yields texts from all over a set: a portion of each file in turn, and in each further round three times as much.

    portion: bytes of the first portion; math.inf: one file after the other is read as a whole. read: (name, state) ->
    iterator of (text, state behind it), where the state is None at the beginning of a file. place: how far it is, as
    begun() gives it. It is brought up to date before each text, and JSON can keep it.
    """
    files = place["files"]
    n_ended = sum(state == "ended" for state in files.values())
    while n_ended < len(names):
        round_number, i = divmod(place["turn"], len(names))
        name, limit = names[i], portion * 3 ** round_number
        if files.get(name) != "ended" and place["given"] < limit:
            for text, state in read(name, files.get(name)):
                files[name] = state
                if limit < math.inf:
                    place["given"] += len(str(text).encode(errors="replace"))
                yield text
                if place["given"] >= limit:
                    break
            else:
                files[name] = "ended"
                n_ended += 1
        place["turn"] += 1
        place["given"] = 0


def begun():
    """The place where in_turns() begins."""
    return dict(
        turn=0,  # portions that were taken
        given=0,  # bytes of the present one
        files={})  # name -> the state of its reading, or "ended", in the order of the first portions
