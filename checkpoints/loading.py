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
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from checkpoints.files import whole_file
from checkpoints.layouts import DERIVED as DERIVED  # these also found here
from checkpoints.layouts import PARTS, bare, in_our_names
from checkpoints.layouts import NetworkState as NetworkState
from checkpoints.layouts import network_state as network_state
from config.loading import SavedConfig
from distributed import fsdp
from distributed.collectives import all_gather_objects, is_main_process
from models.base import HEAD_PREFIXES, METHOD_PREFIXES, Backbone
from utils import UsageError, counted, logger

PREFIX = "module."
OPTIONAL = ("num_batches_tracked",)  # older files lack it
LISTED_NAMES = 5
CHUNK = 2**20  # bytes
# What published files hold beside tensors and plain values: arguments, which EsViT, DINO and UDI keep in a Namespace and the
# original Swin in its yacs config (read into an ordered dictionary, without any code of yacs), and numpy scalars, which their
# schedules write into the groups of the optimizer. Both spellings of numpy's constructor occur; of its types only numbers are read.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
READABLE: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]
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


def check_finite(**networks: Mapping[str, Tensor]) -> None:
    """Before a checkpoint is written: stop all processes, which call this together, unless the main one's weights are finite.

    Raises:
        FloatingPointError: naming the first that is not.
    """
    wrong = None
    if is_main_process():
        wrong = next((f"{key}.{name}" for key, state in networks.items() for name in nonfinite(state)), None)
    wrong = all_gather_objects(wrong)[0]
    if wrong is not None:
        raise FloatingPointError(
            f"{wrong} is not finite, and is not saved: the checkpoint before stays. Start again with a lower --lr, or with "
            "--precision fp32"
        )


def nonfinite(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of the tensors that hold a value which is not finite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            yield name


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


def _check_whole(path: str | Path) -> None:
    """Compare every record of a file with its checksum (torch writes zip files, whose CRC-32 it does not read again).

    Files that are no zip, as torch wrote them before 1.6, have none, and neither have safetensors.

    Raises:
        DamagedError: they differ.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as records:
            for record in records.infolist():
                with records.open(record) as content:
                    while record.CRC and content.read(CHUNK):  # 0: torch was told to write none
                        pass
    except Exception as error:  # on damaged bytes zipfile raises whatever it stumbles over
        raise DamagedError(f"checkpoint '{path}' is damaged ({error}); use another file") from None


def _check_readable(path: str | Path) -> None:
    """Stop on what is no file or cannot be opened, before anything waits for the other end of a FIFO.

    Raises:
        UsageError: nothing is there.
        DamagedError: it is something else.
    """
    if not os.path.lexists(path):
        raise UsageError(f"checkpoint '{path}' does not exist; check the path")
    if not os.path.isfile(path):
        there = "a pipe, socket or device" if os.path.exists(path) else "a link to nothing"
        what = "a folder" if os.path.isdir(path) else there
        raise DamagedError(f"checkpoint '{path}' is {what}; name a file")
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise DamagedError(f"checkpoint '{path}' cannot be read ({error.strerror}); see to it") from None


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
    _check_readable(path)
    if not (in_place or _is_safetensors(path)):
        _check_whole(path)
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


# --------------------------------------------------------------------------- networks


class LoadReport(NamedTuple):
    """What a network took from a file."""

    layout: str
    key: str | None
    matched: int
    resized: int
    left_out: int
    fresh: tuple[str, ...] = ()  # what is `METHOD_PREFIXES` the network's backbone and not in the file
    parts: tuple[str, ...] = ()  # that were left out, by the first words of their names

    def __str__(self) -> str:
        where = f"{self.layout}, key '{self.key}'" if self.key else self.layout
        parts = f" ({', '.join(self.parts)})" if self.parts else ""
        fresh = f", {' and '.join(part.rstrip('.') for part in self.fresh)} not in the file" if self.fresh else ""
        loaded = f"{counted(self.matched, 'tensor')} loaded, {self.resized} of them resized, {self.left_out} left out"
        return f"{where}: {loaded}{parts}{fresh}"


def load_network(
    network: nn.Module,
    state: NetworkState,
    source: str,
    *,
    resize: bool = False,
    new_parts: bool = False,
    allow_partial: bool = False,
) -> LoadReport:
    """Load a state dict into a network, wrapped or not; every tensor of the network must be there in its shape.

    Tensors of `METHOD_PREFIXES` are ignored if the network has none of them, and the `PARTS` of other programs always.
    Buffers that follow from the architecture are neither asked for nor taken. A backbone resizes positions as the file's program
    does, unless its config says.

    Args:
        network: keeps its tensors where an error is raised.
        state: see `network_state`.
        source: how messages name the file.
        resize: let a backbone resize its tables of positions to its own image or window size.
        new_parts: what lies `METHOD_PREFIXES` the backbone may be missing in the file as a whole; it stays as it is then.
        allow_partial: take what fits; what is missing is warned about instead of being an error.

    Raises:
        UsageError: a number of prototypes or other shapes that differ, names that are missing, with the first of them, or
            weights that are not finite.
    """
    network = unwrap(network)
    wanted = network.state_dict(keep_vars=True)
    offered = {name: t for name, t in state.tensors.items() if not name.endswith(DERIVED) and t.numel()}
    ours = in_our_names(network, offered)
    tensors = {ours[name]: tensor for name, tensor in offered.items()}
    _fill_second_names(wanted, tensors, source)
    in_file = [name for name in tensors if name in wanted or "last_layer." in name]  # also heads of another form
    lacking = (part for part in METHOD_PREFIXES if not any(name.startswith(part) for name in in_file))
    fresh = tuple(part for part in lacking if any(name.startswith(part) for name in wanted)) if new_parts else ()
    if isinstance(network, Backbone):
        network.adopt_pos_resize(state.pos_resize)
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
        and wanted[name].numel()
        and not name.endswith((*DERIVED, *OPTIONAL))
        and not name.startswith(fresh)
    ]
    unexpected = [
        name for name in tensors if name not in wanted and not bare(name).startswith((*METHOD_PREFIXES, *PARTS))
    ]
    if missing or unexpected or misfits:
        problem = _problem(source, missing, unexpected, misfits, tensors, wanted)
        if not allow_partial:
            raise UsageError(problem)
        logger.warning("%s; --allow_partial loads the rest", problem)
        if not taken:
            raise UsageError(
                f"{source} has not one tensor of this network, not even with --allow_partial; check --arch or use another file"
            )
    if wrong := next(nonfinite(taken), None):
        raise UsageError(
            f"{source} has a weight that is not finite ({wrong}): its training had diverged; use another file"
        )
    placed = {name: fsdp.placed_like(wanted[name], tensor) for name, tensor in taken.items()}
    network.load_state_dict(placed, strict=False)
    left_out = [name for name in tensors if name not in taken]
    parts = tuple(dict.fromkeys(bare(name).partition(".")[0] for name in left_out))
    return LoadReport(state.layout, state.key, len(taken), resized, len(left_out), fresh, parts)


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
        of_backbone = [name for name in misfits if not name.startswith(METHOD_PREFIXES)]
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
    if name.startswith(HEAD_PREFIXES):
        return "check --use_bn_in_head, --head_hidden_dim and --head_bottleneck_dim"
    if len(theirs) == len(ours) == 4 and theirs[1] != ours[1] and theirs[0] == ours[0] and ours[1] <= MOST_CHANNELS:
        return f"set MODEL.SPEC.IN_CHANS {theirs[1]}"
    if "patch_embed" in name and len(theirs) == len(ours) == 4 and theirs[2:] != ours[2:]:
        return f"set --patch_size {theirs[2]} (or MODEL.SPEC.PATCH_SIZE where the yaml has it)"
    if name == "cls_token" and theirs[1] != ours[1]:
        return f"set MODEL.SPEC.NUM_CLS_TOKENS {theirs[1]}"
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
    source = f"checkpoint '{path}'"
    return load_network(network, state, source, resize=True, new_parts=True, allow_partial=allow_partial)
