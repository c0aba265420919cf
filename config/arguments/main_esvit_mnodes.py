"""The command line of main_esvit_mnodes.py: that of main_esvit.py, and the flags of the nodes."""

from __future__ import annotations

import argparse

from config.arguments import main_esvit
from config.arguments.shared import Parser
from config.ranges import integer


def get_args_parser() -> Parser:
    """Return the parser of main_esvit_mnodes.py."""
    parser = main_esvit.get_args_parser()
    parser.prog, parser.description = "main_esvit_mnodes.py", "Pre-train with EsViT on several nodes."
    add_node_flags(parser.group("nodes"))
    return parser


def add_node_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags that main_esvit.py does not have."""
    add = parser.add_argument
    add("--num_nodes", type=integer(1, 100_000), default=1, help="number of nodes")
    add("--num_gpus_per_node", type=integer(1, 1024), default=8, help="processes on each node, one per GPU")
    text = "rank of this node, from 0 (default: OMPI_COMM_WORLD_RANK, as set by mpirun)"
    add("--node_rank", type=integer(0, 99_999), default=None, help=text)
