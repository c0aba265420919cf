"""Ranges of numeric flags and config keys.

    parser.add_argument("--lr", type=number(0, 1000), default=0.0005)

Upper bounds are far above anything useful: they reject sizes that no machine can hold, and values that overflow float32.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

MANY = 10**9
LARGE = 1000


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; callable, as the `type` of a flag.

    Args:
        kind: int or float.
        low, high: bounds, included unless `above_low` or `below_high` is set.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    above_low: bool = False
    below_high: bool = False

    def __contains__(self, value: Any) -> bool:
        within = self.low <= value <= self.high  # False for NaN
        return within and not (self.above_low and value == self.low) and not (self.below_high and value == self.high)

    def __str__(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        if not (self.above_low or self.below_high):
            return f"{noun} from {self.low:,} to {self.high:,}".replace(",", "_")
        low = f"{'above' if self.above_low else 'at least'} {self.low}"
        return f"{noun} {low} and {'below' if self.below_high else 'at most'} {self.high}"

    def interval(self, name: str) -> str:
        """Write the range as an inequality about `name`, for `--help`, which leaves out large upper bounds."""
        if self.high >= LARGE:
            return f"{name} {'>' if self.above_low else '>='} {self.low}"
        return f"{self.low} {'<' if self.above_low else '<='} {name} {'<' if self.below_high else '<='} {self.high}"

    def __call__(self, text: str) -> int | float:
        """Parse the text of a flag.

        Raises:
            argparse.ArgumentTypeError: not a number of the range.
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = float("nan")
        if value not in self:
            raise argparse.ArgumentTypeError(f"'{text[:50]}' is not {self}")
        return value


def integer(low: int, high: int = MANY) -> Range:
    """Return the range of integers from `low` to `high`."""
    return Range(int, low, high)


def number(low: float, high: float, *, above_low: bool = False, below_high: bool = False) -> Range:
    """Return the range of finite numbers from `low` to `high`, without `low` or `high` where asked."""
    return Range(float, low, high, above_low, below_high)


SHARE = number(0, 1)  # probabilities, momenta
ABOVE_ZERO = number(0, 1, above_low=True)
BELOW_ONE = number(0, 1, below_high=True)
FACTOR = number(0, 1000)  # rates, decays, alphas, weights
TEMPERATURE = number(1e-4, 100)  # below, a cosine divided by it overflows float16
CROP_RATIO = number(0.1, 1)
COUNT = integer(1)
SEED = integer(0, 2**63 - 1)
PIXELS = integer(1, 16_384)
BATCH = integer(1, 65_536)
BLOCKS = integer(1, 1000)
EPOCHS = integer(1, 100_000)
WARMUP = integer(0, 100_000)  # epochs
WORKERS = integer(0, 1024)
