"""Which of two kinds of runs is better, and how sure that is: a paired comparison over seeds and documents.

All runs are measured on the same validation documents, and a pair of runs has one seed. Another seed would give another
difference, and so would other documents. How much, the seeds show by their standard deviation and Student's t, and the
documents by drawing them anew with replacement, DRAWS times (the bootstrap, Efron 1979). The 95% interval holds both.
So one comparison in twenty of kinds that are equally good finds a difference, if the two were chosen before the runs
were made. A table of many comparisons is expected to have some that chance made.
"""
import functools
import math
import statistics
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
# Student's t that is exceeded with probability 2.5%, for 1, 2, ... degrees of freedom; the last one serves for more
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL = 1.96  # the same of the normal distribution


@dataclass
class Measured:
    """A run's losses on validation documents."""
    nats: list  # of each document
    bytes: list  # of UTF-8 text in each document

    @property
    def bits_per_byte(self):
        return sum(self.nats) / math.log(2) / sum(self.bytes)


@dataclass
class Verdict:
    """The difference of two kinds of runs in bits per byte, first minus second: below 0 the first one is better."""
    difference: float
    low: float  # the ends of the 95% interval; infinite for one seed
    high: float

    @property
    def word(self):
        """better, worse or tie, of the first kind. One seed gives no verdict: it does not show how much seeds differ.

        A difference counts if its interval leaves out 0.
        """
        if math.isinf(self.low):
            return "one seed"
        if self.low <= 0 <= self.high:
            return "tie"
        return "better" if self.difference < 0 else "worse"


@functools.lru_cache(maxsize=1)  # all pairs of a table have the same documents, and the matrix can be large
def draws(n):
    """How often each of n documents occurs in each draw, (DRAWS, n)."""
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS)


def of_documents(first, second):
    """Standard error of the mean difference if other documents were drawn, in bits per byte."""
    drawn = draws(len(first[0].nats))

    def bits_per_byte(runs):
        nats, n_bytes = (np.mean([getattr(run, name) for run in runs], axis=0) for name in ("nats", "bytes"))
        return (drawn @ nats) / math.log(2) / (drawn @ n_bytes)

    return float(np.std(bits_per_byte(first) - bits_per_byte(second)))


def compare(first, second):
    """The Verdict on two lists of Measured, one for each seed, in the same order. Extra seeds of one are ignored."""
    n = min(len(first), len(second))
    first, second = first[:n], second[:n]
    assert all(len(run.nats) == len(first[0].nats) for run in (*first, *second)), "not the same documents"
    each = [a.bits_per_byte - b.bits_per_byte for a, b in zip(first, second)]
    difference = statistics.mean(each)
    if n == 1:
        return Verdict(difference, -math.inf, math.inf)
    of_seeds = STUDENT[min(n - 1, len(STUDENT)) - 1] * statistics.stdev(each) / math.sqrt(n)
    half = math.hypot(of_seeds, NORMAL * of_documents(first, second))
    return Verdict(difference, difference - half, difference + half)
