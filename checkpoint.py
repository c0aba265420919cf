"""Checkpoints: the published layout, written whole or not at all, read without running anybody's code.

`checkpoint.pth` holds student (keys prefixed `module.`), teacher, optimizer, epoch (the next one), args, dino_loss (udi_loss of
main_udi.py) and fp16_scaler as the published files do; this project adds config, rng (one entry a process) and world_size.
Networks are also read from bare state dicts, from files of timm, torchvision, Swin, DINO and UDI, and from safetensors.

What a method trains beside a backbone lies beside its keys: `head.`, EsViT's `head_dense.`, UDI's `srs.`; a bare backbone leaves
it out.

Origin: file names and keys follow DINO and microsoft/esvit.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

import sharding
from config import SavedConfig
from files import whole_file
from models import srs
from models.base import BESIDE, HEADS, Backbone
from models.interop import vit_from_timm
from utils import UsageError, counted, logger

PREFIX = "module."
UDI_BACKBONE = "backbone.backbone."  # around a backbone in UDI's files
UDI_HEAD = re.compile(r"^head\.\d+\.")  # their one head, kept once a level
CLASSIFIERS = ("fc.", "head_dist.")  # linear heads of other projects, beside `head.`
WRAPPING_KEYS = ("model", "state_dict")  # where timm, Swin, DeiT and others keep a network
DERIVED = ("relative_position_index", "attn_mask")  # buffers that the architecture computes itself
OPTIONAL = ("num_batches_tracked",)  # older files lack it
LISTED_NAMES = 5
# What published files keep their arguments in: EsViT and DINO a Namespace, the original Swin its yacs config, here an ordered
# dictionary that is filled without any code of yacs.
READABLE: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
OWN = {"world_size", "finetuning"}  # one of these beside a config makes a file one of this project's
MOST_CHANNELS = 32  # of images; a first convolution has no more inputs


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside a DistributedDataParallel wrapper, or itself."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the published `module.` before each key."""
    return {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}


# --------------------------------------------------------------------------- files


class DamagedError(UsageError):
    """A file that is no whole checkpoint."""


def save_file(state: Mapping[str, Any] | Tensor, path: Path) -> None:
    """Write `state` to `path`, whole or not at all; see `write_file`."""
    with whole_file(path) as temporary:
        write_file(state, temporary)


def write_file(state: Mapping[str, Any] | Tensor, path: Path) -> None:
    """Write `state` to `path`.

    Raises:
        OSError: the disk refuses, also where torch's writer makes another error of it.
    """
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(" ".join(str(error).split())) from error


def load_file(path: str | Path, in_place: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; see `_load_safely`.

    Raises:
        UsageError: as there, or content that is no dictionary.
    """
    content = _load_safely(path, in_place)
    if not isinstance(content, dict):
        raise UsageError(
            f"checkpoint '{path}' holds a {type(content).__name__}, not a dictionary of tensors; use another file"
        )
    return content


def saved_config(path: str | Path) -> SavedConfig | None:
    """The network's config, where the file is a checkpoint of this project; what others call so is left alone.

    Of the tensors none is read, but those of files as torch wrote them before 1.6.

    Raises:
        UsageError: see `load_file`.
    """
    if _is_safetensors(path):
        return None
    content = load_file(path, in_place=True)
    if not isinstance(content.get("config"), str) or not content.keys() & OWN:
        return None
    return SavedConfig(content["config"], f"the config inside checkpoint '{path}'")


def check_whole(path: Path) -> None:
    """Compare every record of a file with its checksum (torch writes zip files, whose CRC-32 it does not read again).

    Files that are no zip, as very old torch wrote them, are left to `load_file`.

    Raises:
        DamagedError: they differ, or the file cannot be read.
    """
    if not path.is_file():  # before anything waits for a FIFO's other end
        what = "a folder" if path.is_dir() else "no file" if path.exists() else "a link to nothing"
        raise DamagedError(f"checkpoint '{path}' is {what}; put a copy there")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DamagedError(f"checkpoint '{path}' cannot be read ({error.strerror}); see to it") from None
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as records:
            wrong = records.testzip()
    except Exception as error:  # on damaged bytes zipfile raises whatever it stumbles over
        raise DamagedError(f"checkpoint '{path}' is damaged ({error}); use another file") from None
    if wrong is not None:
        raise DamagedError(f"checkpoint '{path}' is damaged (checksum of {wrong}); use another file")


def load_tensor(path: str | Path) -> Tensor:
    """Read a file that holds one tensor onto the CPU; see `_load_safely`.

    Raises:
        UsageError: as there, or content that is no tensor.
    """
    content = _load_safely(path)
    if not isinstance(content, Tensor):
        raise UsageError(f"'{path}' holds a {type(content).__name__}, not a tensor; use another file")
    return content


def _load_safely(path: str | Path, in_place: bool = False) -> Any:
    """Read a file without unpickling anything but tensors, plain values and `READABLE`.

    `in_place`: tensors stay in the file (as torch writes it since 1.6) and are read when they are used.

    Raises:
        UsageError: no such file, a damaged or foreign one, or one that only unsafe unpickling could read.
    """
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint '{path}' does not exist; check the path")
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(READABLE):
            mapped = in_place and zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except safetensors.SafetensorError as error:
        raise UsageError(f"'{path}' is no safetensors file or is damaged ({error}); use another file") from None
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UsageError(
                f"checkpoint '{path}' holds more than tensors and plain values and is not read for safety; where you trust it, "
                "convert it once: torch.save(torch.load(FILE, weights_only=False)[KEY], NEW), KEY being 'teacher' or 'model'"
            ) from None
        raise DamagedError(f"'{path}' is not a torch checkpoint or is damaged; use another file") from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"checkpoint '{path}' is damaged or no torch file ({reason}); use another file") from None
    return content


def _is_safetensors(path: str | Path) -> bool:
    return Path(path).suffix == ".safetensors"


# --------------------------------------------------------------------------- layouts


class NetworkState(NamedTuple):
    """The tensors of one network in a file, and where they were found."""

    tensors: dict[str, Tensor]
    layout: str
    key: str | None
    image_size: tuple[int, int] | None = None  # MODEL.IMAGE_SIZE of the run, where the file tells


def network_state(content: Mapping[str, Any], key: str, path: str | Path) -> NetworkState:
    """The network of a file, without `module.`: `key` of a full checkpoint, what lies under `model`, or the whole of a bare one.

    Weight norm in torch's parametrised spelling gets the published names, a network of UDI's own files this project's.

    Raises:
        UsageError: a full checkpoint without `key`, or content that is no state dict.
    """
    layout, found_under, whole = "bare state dict", None, content
    if "student" in content or "teacher" in content:
        if key not in content:
            raise UsageError(
                f"checkpoint '{path}' has no network '{key}'; name one that it has: "
                + " or ".join(sorted(content.keys() & {"student", "teacher"}))
            )
        layout, found_under = "full checkpoint", key
    else:
        found_under = next((k for k in WRAPPING_KEYS if isinstance(content.get(k), Mapping)), None)
        layout = "wrapped state dict" if found_under else layout
    if found_under:
        content = content[found_under]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {_published_weight_norm(str(k).removeprefix(PREFIX)): v for k, v in named if isinstance(v, Tensor)}
    if not tensors:
        where = f" under '{found_under}'" if found_under else ""
        found = ", ".join(map(str, content))[:200] if isinstance(content, Mapping) else type(content).__name__
        raise UsageError(
            f"checkpoint '{path}' holds no tensors of a network{where}, but {found or 'nothing'}; use another file"
        )
    if f"{UDI_BACKBONE}cls_token" in tensors:
        layout, tensors = f"{layout} of UDI", _from_udi(tensors)
    return NetworkState(vit_from_timm(tensors), layout, found_under, _image_size(whole))


def _image_size(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """MODEL.IMAGE_SIZE of the run, where the file tells."""
    config = content.get("config")
    if not isinstance(config, str):
        return None
    try:
        height, width = yaml.safe_load(config)["MODEL"]["IMAGE_SIZE"]
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
    return int(height), int(width)


def _published_weight_norm(name: str) -> str:
    """`parametrizations.weight.original0` and `1` of torch >= 2 are the gain and the direction."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


def _from_udi(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network of a published UDI file under this project's names; with one head where those of all levels are equal."""
    ours = {f"srs.{name}": tensor for name, tensor in srs.from_published(published).items()}
    others = {n.removeprefix(UDI_BACKBONE): t for n, t in published.items() if not n.startswith(tuple(srs.PUBLISHED))}
    shared: dict[str, Tensor] = {}
    for name in filter(UDI_HEAD.match, others):
        if not torch.equal(shared.setdefault(UDI_HEAD.sub("head.", name), others[name]), others[name]):
            return ours | others  # a head of its own for each level
    return ours | {name: tensor for name, tensor in others.items() if not UDI_HEAD.match(name)} | shared


def _in_our_names(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under this project's names: whichever of the known namings fits most of the network's tensors.

    Known are the published names, those of timm and torchvision, and either of them inside DINO's `backbone.`.
    """
    wanted = network.state_dict()
    timm_name = network.timm_name if isinstance(network, Backbone) else str
    namings: list[Callable[[str], str]] = [
        str,
        timm_name,
        lambda name: name if name.startswith(BESIDE) else f"backbone.{name}",
        lambda name: name if name.startswith(BESIDE) else f"backbone.{timm_name(name)}",
    ]
    best = max(namings, key=lambda naming: sum(naming(name) in tensors for name in wanted))
    ours = {best(name): name for name in wanted}
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


# --------------------------------------------------------------------------- networks


class LoadReport(NamedTuple):
    """What a network took from a file."""

    layout: str
    key: str | None
    matched: int
    resized: int
    left_out: int

    def __str__(self) -> str:
        where = f"{self.layout}, key '{self.key}'" if self.key else self.layout
        return f"{where}: {counted(self.matched, 'tensor')} loaded, {self.resized} of them resized, {self.left_out} left out"


def load_network(
    network: nn.Module, state: NetworkState, source: str, *, resize: bool = False, allow_partial: bool = False
) -> LoadReport:
    """Load a state dict into a network, wrapped or not; every tensor of the network must be there in its shape.

    A network without what may lie `BESIDE` a backbone leaves that of the file out; a file without heads (or with a classifier's
    linear one) leaves those of the network as they are. Buffers that follow from the architecture are neither asked for nor taken.

    Args:
        network: left as it is where an error is raised.
        state: see `network_state`.
        source: how messages name the file.
        resize: let a backbone resize its tables of positions to its own image or window size.
        allow_partial: take what fits; what is missing is warned about instead of being an error.

    Raises:
        UsageError: a number of prototypes or other shapes that differ, or names that are missing, with the first of them.
    """
    network = unwrap(network)
    wanted = network.state_dict(keep_vars=True)
    offered = {name: t for name, t in state.tensors.items() if not name.endswith(DERIVED) and t.numel()}
    tensors = _in_our_names(network, offered)
    _fill_second_names(wanted, tensors, source)
    file_has_heads = any("last_layer." in name for name in tensors)
    taken, misfits, resized = {}, [], 0
    for name in sorted(wanted.keys() & tensors.keys()):
        tensor = tensors[name]
        if resize and isinstance(network, Backbone) and _may_be_resized(network, state, tensor, wanted[name]):
            fitted = network.fit_tensor(name, tensor, state.image_size)
            if fitted is not None and fitted is not tensor:
                tensor, resized = fitted, resized + 1
        if tensor.shape == wanted[name].shape:
            taken[name] = tensor
        else:
            misfits.append(name)
    missing = [
        name
        for name in wanted
        if name not in tensors
        and not name.endswith((*DERIVED, *OPTIONAL))
        and (file_has_heads or not name.startswith(BESIDE))
    ]
    unexpected = [name for name in tensors if name not in wanted and not name.startswith((*BESIDE, *CLASSIFIERS))]
    if missing or unexpected or misfits:
        problem = _problem(source, missing, unexpected, misfits, tensors, wanted)
        if not allow_partial:
            raise UsageError(problem)
        logger.warning("%s; --allow_partial loads the rest", problem)
        if not taken:
            raise UsageError(
                f"{source} has not one tensor of this network, not even with --allow_partial; check --arch or use another file"
            )
    placed = {name: sharding.placed_like(wanted[name], tensor) for name, tensor in taken.items()}
    network.load_state_dict(placed, strict=False)
    left_out = sum(name not in taken for name in tensors)
    return LoadReport(state.layout, state.key, len(taken), resized, left_out)


def _may_be_resized(network: Backbone, state: NetworkState, theirs: Tensor, ours: Tensor) -> bool:
    """Whether shapes differ, or may agree by chance because a file was made for another image size with as many patches."""
    sizes = (network.image_size, state.image_size)
    return theirs.shape != ours.shape or (None not in sizes and sizes[0] != sizes[1])


def _fill_second_names(wanted: Mapping[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Modules that a network uses under two names (shared projections of ViL) need one of them in the file, or equal ones.

    Raises:
        UsageError: the file has different tensors for what is shared here.
    """
    names_of: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        names_of.setdefault(id(tensor), []).append(name)
    for names in names_of.values():
        given = [name for name in names if name in tensors]
        if len(names) == 1 or not given:
            continue
        if any(not torch.equal(tensors[name], tensors[given[0]]) for name in given[1:]):
            raise UsageError(
                f"{source} has different tensors for {' and '.join(given)}, which this network shares; "
                "set MODEL.SPEC.MSVIT.SHARE_W False"
            )
        tensors.update({name: tensors[given[0]] for name in names})


def _problem(
    source: str,
    missing: list[str],
    unexpected: list[str],
    misfits: list[str],
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> str:
    """What keeps a file from loading in full, with the first names and the likeliest remedy."""
    parts = []
    of_regions = any(name.startswith(("head_dense.", "center_grid")) for name in (*missing, *unexpected))
    check = "--arch, --cfg and --use_dense_prediction" if of_regions else "--arch and --cfg"
    remedy = f"check {check}, or pass --allow_partial True"
    if misfits:
        of_backbone = [name for name in misfits if not name.startswith(BESIDE)]
        prototypes = [name for name in misfits if "last_layer.weight" in name]
        name = (of_backbone or prototypes or misfits)[0]
        ours, theirs = tuple(wanted[name].shape), tuple(tensors[name].shape)
        if "last_layer.weight" in name and ours[0] != theirs[0]:
            return f"{source} has heads of {theirs[0]} prototypes, this run of {ours[0]}; set --out_dim {theirs[0]}"
        parts.append(
            f"{counted(len(misfits), 'tensor')} of another shape ({name} has shape {theirs}, this one wants {ours})"
        )
        remedy = _remedy(name, theirs, ours) or remedy
    if missing:
        parts.append(f"{counted(len(missing), 'tensor is', 'tensors are')} missing ({_first(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_first(unexpected)})")
    return f"{source} is of another network: {', '.join(parts)}; {remedy}"


def _remedy(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str | None:
    """The flag or key that makes a tensor of another shape fit, where one is likely."""
    if name.startswith(HEADS):
        return "check --use_bn_in_head, --head_hidden_dim and --head_bottleneck_dim"
    if len(theirs) == len(ours) == 4 and theirs[1] != ours[1] and theirs[0] == ours[0] and ours[1] <= MOST_CHANNELS:
        return f"set MODEL.SPEC.IN_CHANS {theirs[1]}"
    if "patch_embed" in name and len(theirs) == len(ours) == 4 and theirs[2:] != ours[2:]:
        return f"set --patch_size {theirs[2]} (or MODEL.SPEC.PATCH_SIZE where the yaml has it)"
    if name == "cls_token" and theirs[1] != ours[1]:
        return f"set MODEL.SPEC.NUM_CLS_TOKENS {theirs[1]}" + (" MODEL.SPEC.POS_RESIZE scale" if theirs[1] == 2 else "")
    if "pos_embed" in name:
        return "check --patch_size and MODEL.IMAGE_SIZE"
    return None


def _first(names: list[str]) -> str:
    listed = ", ".join(names[:LISTED_NAMES])
    return f"{listed}, ..." if len(names) > LISTED_NAMES else listed


def load_backbone(
    network: nn.Module, path: str | Path, key: str = "teacher", *, allow_partial: bool = False
) -> LoadReport:
    """Load the backbone of a checkpoint file of any known layout; tables of positions are resized where sizes differ.

    Raises:
        UsageError: see `load_file`, `network_state` and `load_network`.
    """
    state = network_state(load_file(path), key, path)
    return load_network(network, state, f"checkpoint '{path}'", resize=True, allow_partial=allow_partial)
