"""The network that a checkpoint names beside its tensors: architecture, config and patch size.

Checkpoints of this project hold their resolved config and arguments. Full checkpoints of EsViT, DINO and UDI hold arguments, among
them the path of a yaml in the EsViT repository and its overrides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import safetensors

from checkpoints.serialization import check_readable, is_safetensors, load_file
from config.loading import SavedConfig
from models.registry import ROOT, list_models, lookup
from utils import logger

OWN_FIELDS = {"world_size", "finetuning"}  # a file with one of these was written by this project


class SavedNetwork(NamedTuple):
    """The network that a file describes; fields that it lacks are None or empty."""

    arch: str | None = None
    config: SavedConfig | str | None = None
    overrides: tuple[str, ...] = ()  # of the config
    patch_size: int | None = None


def saved_network(path: str | Path) -> SavedNetwork:
    """Return the network that a checkpoint names, without reading its tensors.

    Raises:
        UsageError: As in `serialization.load_file`.
    """
    if is_safetensors(path):
        return _exported(_safetensors_metadata(path), path)
    content = load_file(path, mapped=True, checked=False)
    if "network" in getattr(content, "_metadata", {}):
        return _exported(content._metadata["network"], path)  # type: ignore[attr-defined]
    args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    arch = args.get("arch")
    if arch not in list_models():
        args = {}  # of another program
    patch_size = args.get("patch_size")
    network = SavedNetwork(args.get("arch"), patch_size=patch_size if isinstance(patch_size, int) else None)
    if isinstance(content.get("config"), str) and content.keys() & OWN_FIELDS:
        return network._replace(config=SavedConfig(content["config"], f"the config inside checkpoint '{path}'"))
    config = _published_yaml(args["arch"], args.get("cfg")) if args else None
    return network._replace(config=config, overrides=_published_overrides(args) if config else ())


def _safetensors_metadata(path: str | Path) -> Any:
    check_readable(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("network", "null"))
    except (safetensors.SafetensorError, ValueError):
        return None  # a damaged file is reported when it is loaded


def _exported(network: Any, path: str | Path) -> SavedNetwork:
    """Return the description of a network that export.py writes; empty for other values."""
    network = network if isinstance(network, Mapping) else {}
    if network.get("arch") not in list_models() or not isinstance(network.get("config"), str):
        return SavedNetwork()
    config = SavedConfig(network["config"], f"the config inside '{path}'")
    return SavedNetwork(network["arch"], config, patch_size=network.get("patch_size"))


def _published_yaml(arch: str, path: Any) -> str | None:
    """Return the yaml of this project that has the path of a published one below experiments/, or the default one of `arch`."""
    default = lookup(arch).default_config
    if not isinstance(path, str):
        return str(ROOT / default) if default else None
    parts = PurePosixPath(path).parts
    below = ROOT.joinpath(*parts[parts.index("experiments") :]) if "experiments" in parts else ROOT
    if below.is_file():
        return str(below)
    logger.warning("the checkpoint names %s, which is not a yaml of this project; pass that yaml with --cfg", path)
    return None


def _published_overrides(args: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the config overrides of a published run: its KEY VALUE pairs, and the class tokens of UDI."""
    pairs = args.get("opts")
    overrides = [str(part) for part in pairs] if isinstance(pairs, list) else []
    if args.get("number_cls_token") and "NUM_CLS_TOKENS" in lookup(args["arch"]).spec.defaults:
        overrides += ["MODEL.SPEC.NUM_CLS_TOKENS", str(args["number_cls_token"]), "MODEL.SPEC.POS_RESIZE", "scale"]
    return tuple(overrides)


def is_network(arch: str, saved_arch: str) -> bool:
    """Return whether a name of an architecture is a right one for the network of a checkpoint.

    It may leave the size to the config, or be another name of the same network.
    """
    named, saved = lookup(arch), lookup(saved_arch)
    same = named.default_config and named.default_config == saved.default_config
    return arch == saved_arch or (named.spec is saved.spec and (named.default_config is None or bool(same)))
