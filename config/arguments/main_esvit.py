"""The command line of main_esvit.py: names and defaults of microsoft/esvit, and flags added here."""

from __future__ import annotations

from config.arguments.pretraining import (
    add_loss_flags,
    add_run_flags,
    add_schedule_flags,
    add_student_teacher_flags,
    add_view_flags,
)
from config.arguments.shared import Ascending, Parser, bool_flag
from config.choices import CENTERINGS
from config.ranges import BELOW_ONE, FACTOR, SHARE, integer


def get_args_parser() -> Parser:
    """Return the parser of main_esvit.py."""
    parser = Parser("main_esvit.py", "Pre-train a vision transformer with EsViT.")
    add_student_teacher_flags(parser)
    add = parser.group("network").add_argument
    text = "stochastic depth rate of the student (default: DROP_PATH_RATE of the config)"
    add("--drop_path", "--drop_path_rate", type=SHARE, default=None, help=text)
    add = parser.group("loss").add_argument
    text = "add the region-level task: match regions between views with a second head"
    add("--use_dense_prediction", type=bool_flag, default=False, help=text)
    add_loss_flags(parser)
    text = "centering of the teacher: EMA of the mean logits, or Sinkhorn-Knopp over the batch of all processes (SwAV, DINOv2)"
    add("--centering", choices=CENTERINGS, default="mean", help=text)
    text = "weight of the KoLeo regularizer, which spreads the student's features of the global crops; 0: none (DINOv2: 0.1)"
    add("--koleo_weight", type=FACTOR, default=0.0, help=text)
    add_schedule_flags(parser)
    add_view_flags(parser)
    add = parser.group("views").add_argument
    text = (
        "augmentation policy: DINO's, the same without blur and solarization, or DeiT's RandAugment and random erasing"
    )
    add("--aug-opt", dest="aug_opt", default="dino_aug", choices=("dino_aug", "small_aug", "deit_aug"), help=text)
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="deit_aug: RandAugment policy of timm")
    text = "deit_aug: interpolation of the random resized crop, as in timm"
    add("--train-interpolation", dest="train_interpolation", default="bicubic", metavar="NAME", help=text)
    add("--reprob", type=SHARE, default=0.25, help="deit_aug: random erasing probability")
    add("--remode", default="pixel", metavar="NAME", help="deit_aug: random erasing mode, const, rand or pixel")
    add("--recount", type=integer(1, 1000), default=1, help="deit_aug: maximum number of erased patches per view")
    add("--resplit", action="store_true", help="deit_aug: no random erasing in the first global view")

    add = parser.group("mixup").add_argument
    text = "apply mixup or cutmix to the student's views and their targets"
    add("--use_mixup", type=bool_flag, default=False, help=text)
    add("--num_mixup_views", type=integer(0), default=10, help="number of mixed views, global views first")
    add("--mixup", type=FACTOR, default=0.8, help="mixup alpha; 0: no mixup")
    add("--cutmix", type=FACTOR, default=1.0, help="cutmix alpha; 0: no cutmix")
    text = "range of the cut's side as fractions of the view's, instead of --cutmix"
    cut = {"action": Ascending, "dest": "cutmix_minmax", "type": SHARE, "nargs": 2}
    add("--cutmix-minmax", **cut, default=None, help=text)  # type: ignore[arg-type]
    add("--mixup-prob", dest="mixup_prob", type=SHARE, default=1.0, help="probability of mixing a batch")
    text = "probability of cutmix instead of mixup where both are enabled"
    add("--mixup-switch-prob", dest="mixup_switch_prob", type=SHARE, default=0.5, help=text)
    text = "draw one mixing ratio per batch, pair or elem(ent)"
    add("--mixup-mode", dest="mixup_mode", default="batch", metavar="NAME", help=text)
    add("--smoothing", type=BELOW_ONE, default=0.0, help="label smoothing of the mixed targets")
    add_run_flags(parser)
    return parser
