"""The command line of main_udi.py: names and defaults of ISL-CV/udi, and flags added here, which the help marks."""

from __future__ import annotations

from config.arguments.pretraining import (
    add_loss_flags,
    add_run_flags,
    add_schedule_flags,
    add_student_teacher_flags,
    add_view_flags,
)
from config.arguments.shared import Parser, bool_flag
from config.arguments.small_runs import DefaultInt
from config.choices import ALIGNMENTS, DRAWINGS, LEVELS, PAIR_MODES, REFERENCES, TARGET_MIXES
from config.ranges import FACTOR, SHARE, TEMPERATURE, integer

# Defaults of the published script that differ from EsViT's.
PUBLISHED = {
    "arch": "vit_small", "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": DefaultInt(30),
    "weight_decay_end": 0.1, "batch_size_per_gpu": 128, "epochs": 300, "min_lr": 1e-5, "saveckp_freq": 20,
    "global_crops_scale": (0.25, 1.0), "local_crops_number": (6,), "local_crops_scale": (0.05, 0.25),
}  # fmt: skip


def get_args_parser() -> Parser:
    """Return the parser of main_udi.py."""
    parser = Parser("main_udi.py", "Pre-train a vision transformer with UDI. (added): not in the published script.")
    add_student_teacher_flags(parser)
    add = parser.group("network").add_argument
    add("--drop_path_rate", "--drop_path", type=SHARE, default=0.1, help="stochastic depth rate of the student")
    text = "class tokens: 2 is UDI; 1 is for networks without a second one, as Swin, CvT, ViL and ResNet"
    add("--number_cls_token", type=int, default=2, choices=(1, 2), help=text)
    text = "attention heads of the sampled region pooling; 0: as many as the backbone's (added)"
    add("--srs_heads", type=integer(0, 1024), default=0, help=text)
    text = "share one projection head between class tokens and patches, or use one for each (added)"
    add("--shared_head", type=bool_flag, default=True, help=text)

    add = parser.group("loss").add_argument
    text = "distill sampled patches too; off requires --number_cls_token 1"
    add("--include_patch", type=bool_flag, default=True, help=text)
    text = (
        "weight of the teacher's patches in the target of the second class token, against the teacher's class token; "
        "raise it if training is unstable"
    )
    add("--alpha", type=SHARE, default=0.5, help=text)
    text = "what --alpha blends: logits as in the published code, or probs as in the paper (added)"
    add("--target_mix", default="logits", choices=TARGET_MIXES, help=text)
    add("--local_patch", type=bool_flag, default=False, help="distill patches of local views too (added)")
    text = f"loss weights of {', '.join(LEVELS)}: class token, second class token, patches (added)"
    add("--level_weights", type=FACTOR, nargs=3, default=(1.0, 1.0, 1.0), help=text)
    add("--student_temp", type=TEMPERATURE, default=0.1, help="student temperature (added)")
    add("--center_momentum", type=SHARE, default=0.9, help="EMA momentum of the centers (added)")
    add_loss_flags(parser)
    add_schedule_flags(parser)

    add_view_flags(parser)
    add = parser.group("views").add_argument
    add("--flip_prob", type=SHARE, default=0.5, help="probability of a view's horizontal flip (added)")
    text = "second global view: overlapping the first as in the published code, or nested as in the paper (added)"
    add("--global_pair_mode", default="overlap", choices=PAIR_MODES, help=text)
    text = "region of the global views that local views overlap (added)"
    add("--local_reference", default="intersection", choices=REFERENCES, help=text)
    text = "side of the windows of tokens in global views, in each of which one patch is sampled"
    add("--global_sampling_window_size", type=integer(1, 1024), default=3, help=text)
    text = "side of the sampling windows in local views"
    add("--local_sampling_window_size", type=integer(1, 1024), default=2, help=text)
    text = "position of the tokens: outer tokens on the corners of the crop, or tokens in the centers of their cells (added)"
    add("--srs_align", default="corners", choices=ALIGNMENTS, help=text)
    text = "sample once per image for all views of a size, for each view, or always the first token of a window (added)"
    add("--srs_drawing", default="image", choices=DRAWINGS, help=text)
    add_run_flags(parser)
    parser.set_defaults(**PUBLISHED)
    return parser
