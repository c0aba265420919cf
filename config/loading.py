"""Load the yaml config of a network: `BASE` chains, published keys, overrides and validation.

    config = load_config("experiments/imagenet/swin/swin_tiny_patch4_window7_224.yaml", ["MODEL.SPEC.DROP_PATH_RATE", "0.1"])

`BASE` in a yaml lists files, relative to it, that are applied first to last before its own keys. A key outside the schema is an
error that suggests the nearest valid one; keys of the published files that have no effect here are reported once per file.

Key names follow the yaml files of microsoft/esvit; the file format is YACS.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from config.schema import KEY_ALIASES, PUBLISHED_UNUSED, RANGES, SCHEMA, ArchSpec, arch_specs
from utils import UsageError, logger

MAX_KEY_PARTS = 16
MAX_NUMBER = 1e300  # an int above it may not fit a float

# What PyYAML raises for malformed text; ValueError and RecursionError for huge numbers, impossible dates and deep nesting.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)

_reported: set[str] = set()  # files with unused keys, each logged once


class SavedConfig(NamedTuple):
    """The text of a config that is stored in another file, such as a checkpoint."""

    text: str
    source: str  # for messages

    def __str__(self) -> str:
        return self.source


class Setting(NamedTuple):
    """The value of a key."""

    value: Any
    source: str  # the file or override that sets it, for messages


Settings = dict[str, Setting]  # by dotted key


def load_config(
    path: str | Path | SavedConfig | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()
) -> CfgNode:
    """Load a yaml with its bases, apply `KEY VALUE` overrides, and return the resolved, frozen config.

    Args:
        path: a yaml file or a stored config; None for the schema's defaults.
        overrides: a flat list KEY VALUE KEY VALUE ... with dotted keys (`MODEL.SPEC.WINDOW_SIZE 14`).
        defaults: the same, for keys that neither the yaml nor an override sets.

    Raises:
        UsageError: a missing or malformed file, a cycle of BASE entries, an unknown key, or a value of the wrong type or outside
            the allowed range.
    """
    if len(overrides) % 2:
        raise UsageError(f"config overrides are pairs KEY VALUE; the last one, '{overrides[-1]}', has no value")
    settings = _from_pairs(defaults, "default")
    if isinstance(path, SavedConfig):
        settings = _merge(settings, _flatten(_parse_yaml(path.text, path.source), path.source))
    elif path is not None:
        settings = _merge(settings, _load_chain(Path(path), ()))
    settings = _merge(settings, _from_pairs(overrides, "override"))

    spec = _find_spec(settings.pop("MODEL.NAME", Setting(SCHEMA["MODEL"]["NAME"], "the schema")))
    config = CfgNode(SCHEMA).clone()
    config.MODEL.NAME = spec.name
    config.MODEL.SPEC = CfgNode(spec.defaults).clone()
    known = dict(_leaves(config))
    unused = []
    for key, (value, source) in _translate(settings, spec, known).items():
        if key in known:
            _set(config, key, _convert(key, value, known[key], source))
        elif key in spec.fixed_choices:
            _check_choice(key, value, spec.fixed_choices[key], source)
            unused.append(key)
        elif any(key == name or key.startswith(name + ".") for name in PUBLISHED_UNUSED):
            unused.append(key)
        else:
            raise UsageError(f"unknown config key '{key}' in {source}{_suggest(key, spec, known)}")
    _check_values(config, spec)
    _report_unused(path, unused)
    config.freeze()
    return config


# --------------------------------------------------------------------------- reading


def _from_pairs(pairs: Sequence[str], kind: str) -> Settings:
    settings: Settings = {}
    for key, text in zip(pairs[::2], pairs[1::2]):
        source = f"{kind} '{key}'"
        tree = _parse_value(text, source)
        for part in reversed(key.split(".")):
            tree = {part: tree}
        settings = _merge(settings, _flatten(tree, source))
    return settings


def _parse_value(text: str, source: str) -> Any:
    """Parse the value of an override, written as in yaml; parentheses stand for brackets."""
    if not isinstance(text, str):
        return list(text) if isinstance(text, tuple) else text
    try:
        return yaml.safe_load(text.replace("(", "[").replace(")", "]"))
    except YAML_ERRORS:
        raise UsageError(f"{source} has a value that is not valid yaml: '{text:.200}'") from None


def _load_chain(path: Path, opened: tuple[Path, ...]) -> Settings:
    """Load a yaml file on top of its bases; `opened` are the files whose bases are being loaded."""
    path = path.resolve()
    if path in opened:
        raise UsageError(f"config {path} includes itself through its BASE entries; remove the cycle")
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        included_by = f" (listed under BASE in {opened[-1]})" if opened else ""
        raise UsageError(f"config file {path} does not exist{included_by}; check --cfg")
    content = _parse_yaml(path.read_bytes(), f"config file {path}")
    bases = content.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UsageError(f"BASE in {path} must be a list of yaml files, not {bases!r}")
    settings: Settings = {}
    for base in filter(None, bases):
        settings = _merge(settings, _load_chain(path.parent / base, (*opened, path)))
    return _merge(settings, _flatten(content, str(path)))


def _parse_yaml(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) or {}
    except YAML_ERRORS as error:
        raise UsageError(f"{source} is not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{source} holds a {type(content).__name__}, not KEY: VALUE pairs")
    return content


def _flatten(tree: Mapping[str, Any], source: str) -> Settings:
    return {key: Setting(value, source) for key, value in _leaves(tree)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and the values of a nested mapping, depth first."""
    if prefix.count(".") > MAX_KEY_PARTS:
        raise UsageError(f"config key '{prefix[:50]}...' has more than {MAX_KEY_PARTS} parts; no key has as many")
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(settings: Settings, new: Settings) -> Settings:
    """Put `new` over `settings`, keys in the order in which they were last set: of two aliases the later one counts."""
    return {key: value for key, value in settings.items() if key not in new} | new


# --------------------------------------------------------------------------- published files to the schema


def _find_spec(name: Setting) -> ArchSpec:
    specs = arch_specs()
    for spec in specs.values():
        if name.value == spec.name or name.value in spec.name_aliases:
            return spec
    raise UsageError(f"MODEL.NAME '{name.value}' in {name.source} is unknown; valid names: {', '.join(specs)}")


def _translate(settings: Settings, spec: ArchSpec, known: Mapping[str, Any]) -> Settings:
    """Map aliases to the keys of the schema and, for a `per_stage` architecture, single values to lists and back."""
    aliases = {**KEY_ALIASES, **spec.key_aliases}
    settings = {aliases.get(key, key): setting for key, setting in settings.items()}
    if not spec.per_stage:
        return settings
    depths = settings.get("MODEL.SPEC.DEPTHS", Setting(known["MODEL.SPEC.DEPTHS"], "")).value
    stages = len(depths) if isinstance(depths, list) else 0  # _convert rejects another type
    for key, (value, source) in settings.items():
        if not key.startswith("MODEL.SPEC.") or key == "MODEL.SPEC.DEPTHS" or key not in known:
            continue
        if isinstance(known[key], list) and not isinstance(value, list):
            settings[key] = Setting([value] * stages, source)
        elif (
            not isinstance(known[key], list)
            and isinstance(value, list)
            and value
            and value.count(value[0]) == len(value)
        ):
            settings[key] = Setting(value[0], source)
    return settings


def _check_choice(key: str, value: Any, choices: tuple[Any, ...], source: str) -> None:
    if not all(entry in choices for entry in (value if isinstance(value, list) else [value])):
        raise UsageError(
            f"config key '{key}' is {value!r} in {source}; only {choices[0]!r} is implemented, remove the key or use that value"
        )


def _set(config: CfgNode, key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    for group in groups:
        config = config[group]
    config[leaf] = value


# --------------------------------------------------------------------------- validation


def _convert(key: str, value: Any, default: Any, source: str) -> Any:
    """Return `value` in the type of `default`, by lossless conversions only (int to float, one number to a square size)."""
    if key == "MODEL.IMAGE_SIZE" and isinstance(default, list) and isinstance(value, int):
        value = [value, value]
    if isinstance(default, list) and isinstance(value, list | tuple):
        value = [_convert(key, item, default[0] if default else 0.0, source) for item in value]
    if isinstance(default, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < MAX_NUMBER:
            raise UsageError(f"config key '{key}' takes a finite number, {source} sets {value!r:.200}")
        return float(value)
    if type(value) is not type(default):
        example = f" such as {default!r}" if default != [] else ""
        raise UsageError(f"config key '{key}' takes a {type(default).__name__}{example}, {source} sets {value!r}")
    return value


def _check_values(config: CfgNode, spec: ArchSpec) -> None:
    """Check ranges, and relations between entries."""
    ranges = {**RANGES, **spec.ranges}
    for key, value in _leaves(config):
        allowed = ranges.get(key.rsplit(".", 1)[-1])
        numbers = value if isinstance(value, list) else [value]
        if allowed and not (numbers and all(number in allowed for number in numbers)):
            raise UsageError(f"config key '{key}' takes {allowed}, not {value!r:.200}")
    if len(config.MODEL.IMAGE_SIZE) != 2:
        raise UsageError(f"MODEL.IMAGE_SIZE takes [height, width], not {config.MODEL.IMAGE_SIZE}")
    mean, std, limits = config.INPUT.MEAN, config.INPUT.STD, config.INPUT.RANGE
    if len(mean) != len(std):
        raise UsageError(f"INPUT.MEAN {mean} and INPUT.STD {std} must have the same length, one value per channel")
    if limits and not (len(limits) == 2 and -math.inf < limits[0] < limits[1] < math.inf):
        raise UsageError(f"INPUT.RANGE takes [black, white] with finite black < white, not {limits}")


def _suggest(key: str, spec: ArchSpec, known: Mapping[str, Any]) -> str:
    """Suggest a valid key: the same one of another network, or the nearest group, dotted key or last part."""
    owners = [name for name, other in arch_specs().items() if key in dict(_leaves(other.defaults, "MODEL.SPEC."))]
    if owners:
        return f"; it is a key of {' and '.join(owners)}, but MODEL.NAME is {spec.name}"
    group, dot, rest = key.partition(".")
    nearest = difflib.get_close_matches(group.upper(), PUBLISHED_UNUSED, n=1, cutoff=0.75)
    if nearest:
        return f"; did you mean '{nearest[0]}{dot}{rest}'?"
    dotted = [*known, *spec.key_aliases, *spec.fixed_choices, *(name for name in PUBLISHED_UNUSED if "." in name)]
    nearest = difflib.get_close_matches(key.upper(), dotted, n=1, cutoff=0.6)
    if not nearest:
        last_parts = {name.rsplit(".", 1)[-1]: name for name in known}
        last = key.upper().rsplit(".", 1)[-1]
        nearest = [last_parts[part] for part in difflib.get_close_matches(last, last_parts, n=1, cutoff=0.0)]
    return f"; did you mean '{nearest[0]}'?"


def _report_unused(path: str | Path | SavedConfig | None, keys: Sequence[str]) -> None:
    if keys and str(path) not in _reported:
        _reported.add(str(path))
        groups = sorted({key if key.startswith(("MODEL", "INPUT")) else key.split(".")[0] for key in keys})
        logger.info("config %s: keys without effect here: %s", path, ", ".join(groups))
