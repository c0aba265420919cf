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

from ranges import PIXELS, SHARE, integer, number
from utils import UsageError, logger

# What a backbone of each MODEL.NAME reads from MODEL.SPEC, with its defaults.
SPECS: dict[str, dict[str, Any]] = {
    "swin_transformer": {
        "PATCH_SIZE": 4,
        "IN_CHANS": 3,
        "DIM_EMBED": 96,
        "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [3, 6, 12, 24],
        "WINDOW_SIZE": 7,
        "MLP_RATIO": 4.0,
        "QKV_BIAS": True,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
        "PATCH_NORM": True,
        "USE_APE": False,
    },
    "cvt_v4_transformer": {
        "IN_CHANS": 3,
        "NUM_STAGES": 0,  # 0: as many as DEPTHS has entries
        "PATCH_SIZE": [7, 3, 3, 3],
        "PATCH_STRIDE": [4, 2, 2, 2],
        "PATCH_PADDING": [2, 1, 1, 1],
        "DIM_EMBED": [64, 192, 384, 768],
        "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [1, 3, 6, 12],
        "WINDOW_SIZE": [7, 7, 7, 7],
        "MLP_RATIO": [4.0, 4.0, 4.0, 4.0],
        "QKV_BIAS": True,
        "SHIFT": False,
        "REL_POS_EMBED": False,
        "RES_STEM": False,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
    },
    "vision_longformer": {
        "IN_CHANS": 3,
        "DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
        "NORM_EMBED": True,
        "AVG_POOL": False,
        "MSVIT": {
            "ARCH": "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_"
            "l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0",
            "SHARE_W": True,
            "SHARE_KV": True,
            "ONLY_GLOBAL": False,
            "ATTN_TYPE": "longformerhand",
            "SW_EXACT": 0,
            "MODE": 0,
            "VIL_MODE_SWITCH": 1.0,
            "LN_EPS": 1e-6,
        },
    },
    "vision_transformer": {  # its patch size is the flag --patch_size
        "IN_CHANS": 3,
        "NUM_CLS_TOKENS": 1,  # 2 for UDI
        # Of positions for other image sizes: size, or scale as DINO and UDI have it (models/resize.py); auto: as the program of
        # the loaded file does, else size.
        "POS_RESIZE": "auto",
        "DIM_EMBED": 384,
        "DEPTH": 12,
        "NUM_HEADS": 6,
        "MLP_RATIO": 4.0,
        "QKV_BIAS": True,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
    },
    "resnet": {"IN_CHANS": 3},  # its name is the flag --arch
}

PATCH_SIZE = 16  # pixels, of networks whose yaml does not say; the flag --patch_size

# Everything else that code reads.
SCHEMA: dict[str, Any] = {
    "MODEL": {"NAME": "swin_transformer", "IMAGE_SIZE": [224, 224]},
    "INPUT": {
        "MEAN": [0.485, 0.456, 0.406],
        "STD": [0.229, 0.224, 0.225],
        "RANGE": [],  # [black, white]: what images of more than 8 bits hold, where their type does not say (data/decode.py)
    },
}

# Keys of the published files that belong to the supervised code base they came from; of a whole group every key is one.
PUBLISHED_UNUSED = {
    *(
        "AMP",
        "AUG",
        "CUDNN",
        "DATASET",
        "DEBUG",
        "FINETUNE",
        "LOSS",
        "OUTPUT_DIR",
        "PRINT_FREQ",
        "TEST",
        "TRAIN",
        "WORKERS",
    ),
    *("MODEL.NUM_CLASSES", "MODEL.INIT_WEIGHTS", "MODEL.PRETRAINED", "MODEL.PRETRAINED_LAYERS"),
    *("INPUT.IMAGE_SIZE", "INPUT.CROP_PCT", "INPUT.INTERPOLATION"),
}

# What a number, or every number of a list, may be, by the last part of its key.
RANGES = {
    **dict.fromkeys(("PATCH_SIZE", "PATCH_STRIDE", "WINDOW_SIZE"), integer(1, 1024)),
    **dict.fromkeys(("DEPTH", "DEPTHS"), integer(1, 1000)),
    **dict.fromkeys(("DROP_RATE", "ATTN_DROP_RATE", "DROP_PATH_RATE", "VIL_MODE_SWITCH"), SHARE),
    "IMAGE_SIZE": PIXELS,
    "MEAN": number(-1e6, 1e6),
    "STD": number(1e-6, 1e6),
    "IN_CHANS": integer(1, 1024),
    "DIM_EMBED": integer(1, 65_536),
    "NUM_HEADS": integer(1, 1024),
    "MLP_RATIO": number(0, 1000, above_low=True),
    "NUM_STAGES": integer(0, 100),
    "PATCH_PADDING": integer(0, 1024),
    "NUM_CLS_TOKENS": integer(0, 1024),
    "SW_EXACT": integer(-1, 1),
    "MODE": integer(-1, 8),
    "LN_EPS": number(0, 1, above_low=True),
}
MOST_NESTED = 16  # parts of a key

# Published files of these networks may give one value for every stage, or one per stage where a key has a single value.
STAGED = {"cvt_v4_transformer"}

# Published files name the size that learned tables are made for as that of the training images, whatever the network.
COMMON_ALIASES = {"TRAIN.IMAGE_SIZE": "MODEL.IMAGE_SIZE"}

# Names of networks in published files that the published code itself no longer knows.
NAME_ALIASES = {"cls_cvt_v4": "cvt_v4_transformer", "cls_vil": "vision_longformer"}

# Other names of keys in published files, by MODEL.NAME.
ALIASES = {
    "cvt_v4_transformer": {"MODEL.SPEC.DEPTH": "MODEL.SPEC.DEPTHS"},
    "vision_longformer": {
        "MODEL.SPEC.DROP": "MODEL.SPEC.DROP_RATE",
        "MODEL.SPEC.DROP_PATH": "MODEL.SPEC.DROP_PATH_RATE",
    },
}

# Keys by which published files choose between networks, with the values that mean the one there is here; reported as unused.
ONLY_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "cvt_v4_transformer": {
        "MODEL.SPEC.INIT": ("trunc_norm",),
        "MODEL.SPEC.CLS_TOKEN": (False,),
        "MODEL.SPEC.POS_EMBED": (False,),
        "MODEL.SPEC.QKV_PROJ_METHOD": ("dw_bn",),
        "MODEL.SPEC.KERNEL_QKV": (3,),
        "MODEL.SPEC.PADDING_QKV": (1,),
        "MODEL.SPEC.STRIDE_QKV": (1,),
        "MODEL.SPEC.PADDING_KV": (1,),
        "MODEL.SPEC.STRIDE_KV": (1,),
        "MODEL.SPEC.PADDING_Q": (1,),
        "MODEL.SPEC.STRIDE_Q": (1,),
        "MODEL.SPEC.NORM": ("layernorm", "layer_norm", "LayerNorm", "ln"),
        "MODEL.SPEC.ACT": ("quick_gelu", "quickgelu", "QuickGELU"),
    },
    "vision_longformer": {  # no squeeze-and-excitation, no pooled tokens; the ratio would be that of the former
        "MODEL.SPEC.MSVIT.POOL_METHOD": ("None", None),
        "MODEL.SPEC.MSVIT.WITH_SE": ("None", None, False),
        "MODEL.SPEC.MSVIT.SE_MLP_RATIO": (0.0625,),
        "MODEL.SPEC.MSVIT.SE_MLP_BALANCE": (False,),
    },
}

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
