"""The command line of eval_finetune.py."""

from __future__ import annotations

from config.arguments import shared
from config.arguments.shared import Parser
from config.arguments.small_runs import DefaultInt
from config.ranges import ABOVE_ZERO, BATCH, BELOW_ONE, COUNT, EPOCHS, FACTOR, SHARE, WARMUP, integer, number
from utils import PRECISIONS


def get_args_parser() -> Parser:
    """Return the parser of eval_finetune.py."""
    parser = Parser("eval_finetune.py", "Fine-tune a pre-trained backbone with labels.")
    shared.add_network_flags(parser)
    shared.add_token_flag(parser)
    group = parser.group("network")
    add = group.add_argument
    add("--drop_path", type=SHARE, default=None, help="stochastic depth rate (default: DROP_PATH_RATE of the config)")
    text = "number of hidden layers to keep of the checkpoint's projection head"
    add("--finetune_head_layer", type=integer(0, 1000), default=0, help=text)
    add("--init_scale", type=FACTOR, default=1.0, help="factor on the initial weights of the linear layer")
    shared.add_switch(group, "--grad_checkpointing", "recompute blocks in the backward pass to save memory")
    shared.add_weights_flags(parser)

    shared.add_data_flags(parser, batch_size=64)
    shared.add_list_flag(parser)
    shared.add_crop_flags(parser)
    add = parser.group("data").add_argument
    text = "interpolation for validation images"
    add("--val_interpolation", choices=("bicubic", "bilinear"), default="bicubic", help=text)

    add = parser.group("augmentation").add_argument
    text = "RandAugment policy of timm; empty: color jitter instead"
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help=text)
    add("--color_jitter", type=number(0, 2), default=0.4, help="strength of the color jitter, without --aa")
    add("--reprob", type=SHARE, default=0.25, help="random erasing probability")
    add("--mixup", type=FACTOR, default=0.8, help="mixup alpha; 0: no mixup")
    add("--cutmix", type=FACTOR, default=1.0, help="cutmix alpha; 0: no cutmix")
    add("--smoothing", type=BELOW_ONE, default=0.1, help="label smoothing")

    group = parser.group("optimization")
    add = group.add_argument
    add("--epochs", type=EPOCHS, default=100, help="number of training epochs")
    add("--warmup_epochs", type=WARMUP, default=DefaultInt(5), help="epochs of the linear learning-rate warm-up")
    add("--accum_iter", type=BATCH, default=1, help="gradient accumulation: batches per optimizer step")
    add("--lr", type=FACTOR, default=5e-4, help="learning rate of the head for a total batch of 256, scaled linearly")
    add("--min_lr", type=FACTOR, default=1e-6, help="learning rate at the end of the cosine schedule, not scaled")
    text = "factor on the learning rate from each block to the one before; 1: the same rate for all"
    add("--layer_decay", type=ABOVE_ZERO, default=0.75, help=text)
    text = "weight decay; biases, norms and position embeddings have none"
    add("--weight_decay", type=FACTOR, default=0.05, help=text)
    text = "maximum gradient norm of all parameters; 0: no clipping"
    add("--clip_grad", type=number(0, 1e30), default=5.0, help=text)
    shared.add_switch(group, "--model_ema", "also keep and validate an exponential moving average of the weights")
    add("--model_ema_decay", type=BELOW_ONE, default=0.9999, help="decay of the average, lower in the first steps")
    add("--precision", choices=PRECISIONS, default="auto", help="precision of the network; losses are always float32")

    add = parser.group("logging").add_argument
    text = "folder for checkpoint.pth, best.pth, log.txt and results/finetune.json"
    add("--output_dir", default=".", metavar="DIR", help=text)
    add("--val_freq", type=COUNT, default=1, help="epochs between validations; the last epoch is always validated")
    add("--log_freq", type=COUNT, default=10, help="steps between log lines")
    shared.add_wandb_flag(parser)

    shared.add_seed_flag(parser, "head, order, views and untrained networks")
    shared.add_launch_flags(parser)
    return parser
