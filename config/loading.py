"""The yaml configuration of a backbone and of its input: one schema, `load_config` and nothing global.

    config = load_config("experiments/imagenet/swin/swin_tiny_patch4_window7_224.yaml", ["MODEL.SPEC.DROP_PATH_RATE", "0.1"])

The schema holds every key that code reads. A yaml may name others it builds on under `BASE` (paths beside it, applied
first to last, itself on top). A key outside the schema is an error that names the nearest valid one, except the keys of the
published EsViT files that this project does not use: those are reported once.

Origin: key names follow the yaml files of EsViT (microsoft/esvit); the file format is YACS.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from config.schema import (
    ALIASES,
    COMMON_ALIASES,
    NAME_ALIASES,
    ONLY_CHOICES,
    PUBLISHED_UNUSED,
    RANGES,
    SCHEMA,
    SPECS,
    STAGED,
)
from utils import UsageError, logger

MOST_NESTED = 16  # parts of a key

# What yaml raises on text that is none: also of numbers of thousands of digits, of dates that do not exist, and of deep nesting.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
MOST = 1e300  # beyond, a whole number may be too large for a float

_reported: set[str] = set()


class SavedConfig(NamedTuple):
    """A config as its `dump` wrote it into another file, which messages name."""

    text: str
    source: str

    def __str__(self) -> str:
        return self.source


def load_config(
    path: str | Path | SavedConfig | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()
) -> CfgNode:
    """Read `path` with its bases, apply `KEY VALUE` overrides, and return the resolved, frozen config.

    Args:
        path: a yaml file, or what stands in its place; None gives the defaults of the schema.
        overrides: a flat list KEY VALUE KEY VALUE ..., keys dotted (`MODEL.SPEC.WINDOW_SIZE 14`).
        defaults: the same, for keys that neither the yaml nor an override sets, instead of the schema's.

    Raises:
        UsageError: a missing or malformed file, a BASE that leads back to itself, an unknown key (with the nearest
            valid one), a value of another type than the key's, a published key that asks for a network not here.
    """
    if len(overrides) % 2:
        raise UsageError(f"config overrides come in pairs KEY VALUE, '{overrides[-1]}' stands alone at the end")
    values = _given(defaults, "default")  # dotted key -> (value, where it was set)
    if isinstance(path, SavedConfig):
        values = _on_top(values, {key: (value, path.source) for key, value in _leaves(_content(*path))})
    elif path is not None:
        values = _on_top(values, _read_chain(Path(path), ()))
    values = _on_top(values, _given(overrides, "override"))

    values["MODEL.NAME"] = _model_name(values)
    config = _schema_node(values["MODEL.NAME"][0])
    known = dict(_leaves(config))
    choices = ONLY_CHOICES.get(config.MODEL.NAME, {})
    unused = []
    for key, (value, where) in _as_in_schema(values, config.MODEL.NAME, known).items():
        if key in known:
            _set(config, key, _cast(key, value, known[key], where))
        elif key in choices:
            _check_choice(key, value, choices[key], where)
            unused.append(key)
        elif any(key == name or key.startswith(name + ".") for name in PUBLISHED_UNUSED):
            unused.append(key)
        else:
            raise UsageError(f"unknown config key '{key}' in {where}{_suggestion(key, config.MODEL.NAME, known)}")
    _check_values(config)
    _report_unused(path, unused)
    config.freeze()
    return config


def _given(pairs: Sequence[str], kind: str) -> dict[str, tuple[Any, str]]:
    """Leaves of KEY VALUE pairs, the later ones on top of the earlier."""
    values: dict[str, tuple[Any, str]] = {}
    for key, text in zip(pairs[::2], pairs[1::2]):
        where = f"{kind} '{key}'"
        values = _on_top(values, {leaf: (v, where) for leaf, v in _leaves(_nest(key, _parse(text, where)))})
    return values


def _read_chain(path: Path, opened: tuple[Path, ...]) -> dict[str, tuple[Any, str]]:
    """Leaves of a yaml on top of the leaves of its bases."""
    path = path.resolve()
    if path in opened:
        raise UsageError(f"config {path} names itself through its BASE entries; break the circle")
    if not os.path.isfile(path):  # also where its name is too long
        asked_by = f" (named under BASE in {opened[-1]})" if opened else ""
        raise UsageError(f"config file {path} does not exist{asked_by}; check --cfg")
    content = _content(path.read_bytes(), f"config file {path}")
    bases = content.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UsageError(f"BASE in {path} takes a list of yaml files beside it, not {bases!r}")
    values: dict[str, tuple[Any, str]] = {}
    for base in bases:
        if base:
            values = _on_top(values, _read_chain(path.parent / base, (*opened, path)))
    return _on_top(values, {key: (value, str(path)) for key, value in _leaves(content)})


def _content(text: str | bytes, source: str) -> dict[str, Any]:
    """The nested mapping that a yaml's text holds."""
    try:
        content = yaml.safe_load(text) or {}
    except NOT_YAML as error:
        raise UsageError(f"{source} is not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{source} holds a {type(content).__name__}, not KEY: VALUE pairs")
    return content


def _on_top(values: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `values`; what was set last comes last, so that it also counts among the names of one key."""
    return {key: value for key, value in values.items() if key not in new} | new


def _as_in_schema(values: dict[str, Any], name: str, known: dict[str, Any]) -> dict[str, Any]:
    """`values` under the schema's names, and one value or one per stage as its keys have it."""
    aliases = COMMON_ALIASES | ALIASES.get(name, {})
    values = {aliases.get(key, key): value for key, value in values.items()}
    if name not in STAGED:
        return values
    depths = values.get("MODEL.SPEC.DEPTHS", (known["MODEL.SPEC.DEPTHS"], ""))[0]
    stages = len(depths) if isinstance(depths, list) else 0  # the type of DEPTHS itself is checked like any other
    for key, (value, where) in values.items():
        if not key.startswith("MODEL.SPEC.") or key == "MODEL.SPEC.DEPTHS" or key not in known:
            continue
        if isinstance(known[key], list) and not isinstance(value, list):
            values[key] = ([value] * stages, where)
        elif not isinstance(known[key], list) and isinstance(value, list) and _all_equal(value):
            values[key] = (value[0], where)
    return values


def _all_equal(items: list[Any]) -> bool:
    return bool(items) and all(item == items[0] for item in items)


def _check_choice(key: str, value: Any, allowed: tuple[Any, ...], where: str) -> None:
    """Whether each stage asks for the network there is."""
    if not all(choice in allowed for choice in (value if isinstance(value, list) else [value])):
        raise UsageError(
            f"config key '{key}' may only be {allowed[0]!r} here, {where} asks for another network with {value!r}"
        )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping, depth first."""
    if prefix.count(".") > MOST_NESTED:
        raise UsageError(f"config key '{prefix[:50]}...' has more than {MOST_NESTED} parts; no key has as many")
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    """{"A": {"B": value}} for "A.B"."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _parse(text: str, where: str) -> Any:
    """The value of an override, written as in yaml."""
    if not isinstance(text, str):
        return list(text) if isinstance(text, tuple) else text
    try:
        return yaml.safe_load(text.replace("(", "[").replace(")", "]"))
    except NOT_YAML:
        raise UsageError(f"{where} has a value that is not valid yaml: '{text:.200}'") from None


def _model_name(values: dict[str, Any]) -> tuple[str, str]:
    """MODEL.NAME as the schema has it, and where it was set."""
    name, where = values.get("MODEL.NAME", (SCHEMA["MODEL"]["NAME"], "the schema"))
    known = NAME_ALIASES.get(name, name) if isinstance(name, str) else None
    if known not in SPECS:
        raise UsageError(f"MODEL.NAME '{name}' in {where} is unknown; valid names: {', '.join(SPECS)}")
    return known, where


def _schema_node(name: str) -> CfgNode:
    """A fresh node with the schema's defaults for a MODEL.NAME."""
    config = CfgNode(SCHEMA).clone()
    config.MODEL.NAME = name
    config.MODEL.SPEC = CfgNode(SPECS[name]).clone()
    return config


def _set(config: CfgNode, dotted: str, value: Any) -> None:
    *path, leaf = dotted.split(".")
    for part in path:
        config = config[part]
    config[leaf] = value


def _cast(key: str, value: Any, default: Any, where: str) -> Any:
    """`value` in the type of `default`: only what loses nothing (int to float, one number to a square size)."""
    if key == "MODEL.IMAGE_SIZE" and isinstance(default, list) and isinstance(value, int):
        value = [value, value]
    if isinstance(default, list) and isinstance(value, list | tuple):
        value = [_cast(key, item, default[0] if default else 0.0, where) for item in value]
    if isinstance(default, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # yaml 1.1 reads 1e-4 as text
    if isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < MOST:
            raise UsageError(f"config key '{key}' takes a finite number, {where} gives {value!r:.200}")
        return float(value)
    if type(value) is not type(default):
        such = f" such as {default!r}" if default != [] else ""
        raise UsageError(f"config key '{key}' takes a {type(default).__name__}{such}, {where} gives {value!r}")
    return value


def _check_values(config: CfgNode) -> None:
    """Ranges, and relations between keys, that no single type can express."""
    for key, value in _leaves(config):
        last = key.rsplit(".", 1)[-1]
        numbers = value if isinstance(value, list) else [value]
        if last in RANGES and not (numbers and all(one in RANGES[last] for one in numbers)):
            raise UsageError(f"config key '{key}' takes {RANGES[last]}, not {value!r:.200}")
    if len(config.MODEL.IMAGE_SIZE) != 2:
        raise UsageError(f"MODEL.IMAGE_SIZE takes [height, width], not {config.MODEL.IMAGE_SIZE}")
    if len(config.INPUT.MEAN) != len(config.INPUT.STD):
        raise UsageError(
            f"INPUT.MEAN and INPUT.STD must have one value per channel each, not {config.INPUT.MEAN} and {config.INPUT.STD}"
        )

    limits = config.INPUT.RANGE
    if limits and not (len(limits) == 2 and -math.inf < limits[0] < limits[1] < math.inf):
        raise UsageError(f"INPUT.RANGE takes [black, white], two finite numbers of which white is larger, not {limits}")


def _suggestion(key: str, name: str, known: dict[str, Any]) -> str:
    """What may have been meant: a key of another network, one of an unused group, the nearest dotted key, or the nearest by
    last name when the path is off.
    """
    others = [other for other, spec in SPECS.items() if key in dict(_leaves(spec, "MODEL.SPEC."))]
    if others:
        return f"; it is one of {' and '.join(others)}, MODEL.NAME is {name}"
    group, dot, rest = key.partition(".")
    nearest = difflib.get_close_matches(group.upper(), PUBLISHED_UNUSED, n=1, cutoff=0.75)
    if nearest:
        return f"; did you mean '{nearest[0]}{dot}{rest}'?"
    dotted = [*known, *ALIASES.get(name, {}), *ONLY_CHOICES.get(name, {}), *(k for k in PUBLISHED_UNUSED if "." in k)]
    nearest = difflib.get_close_matches(key.upper(), dotted, n=1, cutoff=0.6)
    if not nearest:
        last_names = {name.rsplit(".", 1)[-1]: name for name in known}
        last = key.upper().rsplit(".", 1)[-1]
        nearest = [last_names[n] for n in difflib.get_close_matches(last, last_names, n=1, cutoff=0.0)]
    return f"; did you mean '{nearest[0]}'?"


def _report_unused(path: str | Path | SavedConfig | None, unused: list[str]) -> None:
    """Say once per file which published keys have no effect here."""
    if unused and str(path) not in _reported:
        _reported.add(str(path))
        groups = sorted({key if key.startswith(("MODEL", "INPUT")) else key.split(".")[0] for key in unused})
        logger.info("config %s: keys without effect here: %s", path, ", ".join(groups))
