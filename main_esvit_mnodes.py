"""Start main_esvit.py on several nodes: the same command on each of them, every flag of main_esvit.py and three more.

    MASTER_ADDR=HOST MASTER_PORT=29500 python main_esvit_mnodes.py --num_nodes 4 --node_rank 0 --arch swin_tiny ...    # on HOST
    mpirun -npernode 1 -x MASTER_ADDR -x MASTER_PORT python main_esvit_mnodes.py --num_nodes 4 --arch swin_tiny ...    # on all

The arguments are checked, then torchrun takes over in this process and starts one process a GPU.

Origin: names and meaning of the flags are those of microsoft/esvit.
"""

from __future__ import annotations

from config.arguments.main_esvit_mnodes import add_node_flags
from config.arguments.main_esvit_mnodes import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    get_args_parser().parse_command_line()

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.distributed import run as torchrun

from distributed import launch
from utils import UsageError

SCRIPT = Path(__file__).with_name("main_esvit.py")


def torchrun_arguments(argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """Return the arguments of torchrun on this node: the rendezvous, main_esvit.py, and the flags of `argv` that are main_esvit's.

    Raises:
        UsageError: The numbers of nodes or GPUs are invalid, or the rank of this node or the rendezvous is missing.
    """
    args = get_args_parser().parse_args(argv)
    if args.device in {"auto", "cuda"} and 0 < torch.cuda.device_count() < args.num_gpus_per_node:
        raise UsageError(
            f"--num_gpus_per_node {args.num_gpus_per_node}, but this machine has {torch.cuda.device_count()} GPUs; lower it"
        )
    where = ["--nnodes", str(args.num_nodes), "--nproc_per_node", str(args.num_gpus_per_node)]
    if args.num_nodes == 1 and args.node_rank in {None, 0} and "MASTER_PORT" not in env:
        where.append("--standalone")
    else:
        where += ["--node_rank", str(_node_rank(args, env)), *_rendezvous(args.num_nodes, env)]
    return [*where, str(SCRIPT), *_without_node_flags(argv)]


def _node_rank(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    text = env.get("OMPI_COMM_WORLD_RANK")
    if args.node_rank is None and args.num_nodes > 1:
        if text is None:
            raise UsageError(
                f"--num_nodes {args.num_nodes} needs --node_rank (from 0) on each, or mpirun to set OMPI_COMM_WORLD_RANK"
            )
        size = env.get("OMPI_COMM_WORLD_SIZE", str(args.num_nodes))
        if size != str(args.num_nodes):
            raise UsageError(
                f"mpirun started {size} processes for --num_nodes {args.num_nodes}; start one a node (mpirun -npernode 1)"
            )
        if not text.isdecimal():
            raise UsageError(f"OMPI_COMM_WORLD_RANK={text} is not a number; pass --node_rank")
        args.node_rank = int(text)
    rank = args.node_rank or 0
    if not 0 <= rank < args.num_nodes:
        raise UsageError(f"--node_rank {rank} must lie in 0..{args.num_nodes - 1} with --num_nodes {args.num_nodes}")
    return rank


def _rendezvous(nodes: int, env: Mapping[str, str]) -> list[str]:
    """Return torchrun's flags for the host and port of node 0."""
    if nodes == 1:
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | dict(env)
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if absent:
        raise UsageError(
            f"{nodes} nodes need a rendezvous: set MASTER_ADDR to the host of node 0 and MASTER_PORT to a free port there "
            f"({' and '.join(absent)} not set)"
        )
    port = env["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"MASTER_PORT={port} is not a port, 1..{2**16 - 1}")
    return ["--master_addr", env["MASTER_ADDR"], "--master_port", port]


def _without_node_flags(argv: Sequence[str]) -> list[str]:
    """Return `argv` without the flags of this script; after -- there are only KEY VALUE pairs."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_node_flags(parser)
    return [*parser.parse_known_args(argv[:end])[1], *argv[end:]]


def main(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> None:
    """Hand over to torchrun."""
    torchrun.main(torchrun_arguments(argv, env))


if __name__ == "__main__":
    launch.run_script(partial(main, sys.argv[1:]))
