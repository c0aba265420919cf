"""Parser of the architecture strings of Vision Longformer (Zhang et al., ICCV 2021): stages joined by `_`, each a list of letters
with numbers.

    l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s0,g0,p2,f7,a0

| letter | meaning |
| --- | --- |
| l | number of the stage, counted from 1 |
| h, d, n | heads, channels, blocks |
| s | 1: sliding chunks, 0: full attention in this and all later stages |
| g | global tokens |
| p | side of the patches that become a token |
| f | side of a chunk |
| a | 0: relative position bias, 1: learned embeddings of row and column |
| r | reduction of the linear variants; only 0 and 1 (no reduction) are supported |
"""

from __future__ import annotations

import re
from typing import NamedTuple

from config.ranges import integer
from utils import UsageError

REQUIRED = "hdn"
DEFAULTS = {"s": 1, "g": 1, "p": 2, "f": 7, "a": 1, "r": 0}
RANGES = {
    "h": integer(1, 1024),
    "d": integer(1, 65_536),
    "n": integer(1, 1000),
    "g": integer(0, 1024),
    "p": integer(1, 1024),
    "f": integer(1, 1024),
}
CHOICES = {"s": (0, 1), "a": (0, 1), "r": (0, 1)}


class StageSpec(NamedTuple):
    """One stage; `sparse` is False after a stage that is not."""

    num_heads: int
    dim: int
    depth: int
    sparse: bool
    num_global: int
    patch_size: int
    window: int
    absolute: bool  # embeddings of row and column instead of a relative position bias


def parse_arch(text: str) -> tuple[StageSpec, ...]:
    """Return the stages of an architecture string; omitted letters default to s1, g1, p2, f7, a1 and r0.

    Raises:
        UsageError: a stage that is empty, malformed, misnumbered or inconsistent.
    """
    stages: list[StageSpec] = []
    for number, part in enumerate(text.split("_"), start=1):
        stage = _parse_stage(part, number)
        stages.append(stage._replace(sparse=stage.sparse and all(previous.sparse for previous in stages)))
    return tuple(stages)


def _parse_stage(part: str, number: int) -> StageSpec:
    where = f"stage {number} ('{part}') of MODEL.SPEC.MSVIT.ARCH"
    given: dict[str, int] = {}
    for entry in part.split(","):
        match = re.fullmatch(r"([a-z])(\d{1,20})", entry.strip())
        if match is None or match[1] not in {"l", *REQUIRED, *DEFAULTS}:
            letters = ", ".join(["l", *REQUIRED, *DEFAULTS])
            raise UsageError(f"{where} has '{entry}'; entries are one of the letters {letters} with a number, as in h3")
        if match[1] in given:
            raise UsageError(f"{where} gives the letter {match[1]} twice")
        given[match[1]] = int(match[2])
    if given.pop("l", number) != number:
        raise UsageError(f"{where} must be numbered l{number}")
    for letter in REQUIRED:
        if letter not in given:
            raise UsageError(f"{where} lacks the letter {letter}, which is required")
    values = DEFAULTS | given
    for letter, value in values.items():
        if letter in CHOICES and value not in CHOICES[letter]:
            raise UsageError(f"{where} has {letter}{value}, only {letter}0 and {letter}1 are supported")
        if letter in RANGES and value not in RANGES[letter]:
            raise UsageError(f"{where} has {letter}{value}, the letter {letter} takes {RANGES[letter]}")
    if values["d"] % values["h"]:
        raise UsageError(f"{where} has h{values['h']}, which does not divide d{values['d']}")
    if values["a"] and values["d"] % 2:
        raise UsageError(f"{where} has an odd d{values['d']}; a1 needs an even number of channels")
    return StageSpec(
        num_heads=values["h"],
        dim=values["d"],
        depth=values["n"],
        sparse=bool(values["s"]),
        num_global=values["g"],
        patch_size=values["p"],
        window=values["f"],
        absolute=bool(values["a"]),
    )
