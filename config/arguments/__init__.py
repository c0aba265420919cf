"""Command lines: one module per script with its parser, and the flags and checks that several scripts share.

Nothing here imports torch, so that `--help` and usage errors are fast.
"""

from config.arguments.pretraining import check_pretraining as check_pretraining
from config.arguments.shared import Parser as Parser
from config.arguments.shared import bool_flag as bool_flag
from config.arguments.shared import check_wandb as check_wandb
from config.arguments.shared import check_weights as check_weights
