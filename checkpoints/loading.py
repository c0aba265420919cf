"""Load networks from checkpoints of any known layout.

    report = load_backbone(backbone, "checkpoint.pth", key="teacher")

Beside a backbone, a method trains heads and further modules (`head.`, EsViT's `head_dense.`, UDI's `srs.`); a bare backbone leaves
them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.layouts import DERIVED, IGNORED_PREFIXES, NetworkState, match_names, network_state, strip_prefix
from checkpoints.serialization import load_file, nonfinite
from distributed import fsdp
from models.base import HEAD_PREFIXES, METHOD_PREFIXES, Backbone
from utils import UsageError, counted, logger

PREFIX = "module."
OPTIONAL = ("num_batches_tracked",)  # missing in older files
LISTED_NAMES = 5
MAX_IMAGE_CHANNELS = 32  # a convolution with more inputs is not the first one


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside a `DistributedDataParallel` wrapper, or the network itself."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def add_module_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with `module.` in front of each key, as in published files."""
    return {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}


class LoadReport(NamedTuple):
    """What was loaded into a network."""

    layout: str
    key: str | None
    matched: int
    resized: int
    left_out: int
    fresh: tuple[str, ...] = ()  # prefixes in `METHOD_PREFIXES` that the network has and the file lacks
    parts: tuple[str, ...] = ()  # first words of the names left out

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
    """Load a state dict into a network; every tensor of the network must be present with its shape.

    Heads that the network lacks are left out, and so are `IGNORED_PREFIXES`. Buffers that the architecture computes are neither
    required nor loaded. A backbone resizes positions as the program that wrote the file, unless its config specifies how.

    Args:
        network: The network, wrapped or not; unchanged if an error is raised.
        resize: Let a backbone resize position tables to its own image or window size.
        new_parts: Parts in `METHOD_PREFIXES` that the file lacks as a whole keep their values.
        allow_partial: Load what fits, and warn about the rest.

    Raises:
        UsageError: Names or shapes differ, or a weight is not finite.
    """
    network = unwrap(network)
    wanted = network.state_dict(keep_vars=True)
    offered = {name: t for name, t in state.tensors.items() if not name.endswith(DERIVED) and t.numel()}
    own_names = match_names(network, offered)
    tensors = {own_names[name]: tensor for name, tensor in offered.items()}
    _fill_shared(wanted, tensors, source)
    in_file = [name for name in tensors if name in wanted or "last_layer." in name]  # also heads of another shape
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
        name
        for name in tensors
        if name not in wanted and not strip_prefix(name).startswith((*METHOD_PREFIXES, *IGNORED_PREFIXES))
    ]
    if missing or unexpected or misfits:
        problem = _describe_mismatch(source, missing, unexpected, misfits, tensors, wanted)
        if not allow_partial:
            raise UsageError(problem)
        logger.warning("%s; --allow_partial loads the rest", problem)
        if not taken:
            raise UsageError(
                f"{source} has no tensor of this network, even with --allow_partial; check --arch or use another file"
            )
    if wrong := next(nonfinite(taken), None):
        raise UsageError(
            f"{source} has a weight that is not finite ({wrong}), so its training had diverged; use another file"
        )
    network.load_state_dict(
        {name: fsdp.shard_like(wanted[name], tensor) for name, tensor in taken.items()}, strict=False
    )
    left_out = [name for name in tensors if name not in taken]
    parts = tuple(dict.fromkeys(strip_prefix(name).partition(".")[0] for name in left_out))
    return LoadReport(state.layout, state.key, len(taken), resized, len(left_out), fresh, parts)


def load_backbone(
    network: nn.Module, path: str | Path, key: str = "teacher", *, allow_partial: bool = False
) -> LoadReport:
    """Load a backbone from a checkpoint file of any known layout; position tables are resized where sizes differ.

    Raises:
        UsageError: The file cannot be read, has no network `key`, or does not fit.
    """
    state = network_state(load_file(path), key, path)
    source = f"checkpoint '{path}'"
    return load_network(network, state, source, resize=True, new_parts=True, allow_partial=allow_partial)


def _may_be_resized(network: Backbone, state: NetworkState, theirs: Tensor, ours: Tensor) -> bool:
    """Return whether shapes differ, or could be equal by chance because the image sizes differ."""
    sizes = (network.image_size, state.image_size)
    return theirs.shape != ours.shape or (None not in sizes and sizes[0] != sizes[1])


def _fill_shared(wanted: Mapping[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Add tensors that the network shares under several names (ViL's projections) under the names that the file lacks.

    Raises:
        UsageError: The file has different tensors for a shared one.
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


def _describe_mismatch(
    source: str,
    missing: list[str],
    unexpected: list[str],
    misfits: list[str],
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> str:
    """Return why a file does not fit, with the first names and the most likely remedy."""
    parts = []
    dense = any(name.startswith(("head_dense.", "center_grid")) for name in (*missing, *unexpected))
    check = "--arch, --cfg and --use_dense_prediction" if dense else "--arch and --cfg"
    remedy = f"check {check}, or pass --allow_partial True"
    if misfits:
        of_backbone = [name for name in misfits if not name.startswith(METHOD_PREFIXES)]
        prototypes = [name for name in misfits if "last_layer.weight" in name]
        name = (of_backbone or prototypes or misfits)[0]
        ours, theirs = tuple(wanted[name].shape), tuple(tensors[name].shape)
        if "last_layer.weight" in name and ours[0] != theirs[0]:
            return f"{source} has heads of {theirs[0]} prototypes, this run of {ours[0]}; set --out_dim {theirs[0]}"
        parts.append(f"{counted(len(misfits), 'tensor')} of another shape ({name} has shape {theirs}, expected {ours})")
        remedy = _shape_remedy(name, theirs, ours) or remedy
    if missing:
        parts.append(f"{counted(len(missing), 'tensor is', 'tensors are')} missing ({_listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_listed(unexpected)})")
    return f"{source} does not fit this network: {', '.join(parts)}; {remedy}"


def _shape_remedy(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str | None:
    """Return the flag or config key that explains a different shape, if a likely one is known."""
    if name.startswith(HEAD_PREFIXES):
        return "check --use_bn_in_head, --head_hidden_dim and --head_bottleneck_dim"
    if (
        len(theirs) == len(ours) == 4
        and theirs[1] != ours[1]
        and theirs[0] == ours[0]
        and ours[1] <= MAX_IMAGE_CHANNELS
    ):
        return f"set MODEL.SPEC.IN_CHANS {theirs[1]}"
    if "patch_embed" in name and len(theirs) == len(ours) == 4 and theirs[2:] != ours[2:]:
        return f"set --patch_size {theirs[2]} (or MODEL.SPEC.PATCH_SIZE where the yaml has it)"
    if name == "cls_token" and theirs[1] != ours[1]:
        return f"set MODEL.SPEC.NUM_CLS_TOKENS {theirs[1]}"
    if "pos_embed" in name:
        return "check --patch_size and MODEL.IMAGE_SIZE"
    return None


def _listed(names: list[str]) -> str:
    listed = ", ".join(names[:LISTED_NAMES])
    return f"{listed}, ..." if len(names) > LISTED_NAMES else listed
