"""The command line of eval_segmentation.py."""

from __future__ import annotations

from config.arguments import shared
from config.arguments.shared import Parser, existing_path
from config.ranges import BATCH, COUNT, EPOCHS, FACTOR, PIXELS, TEMPERATURE, integer, number
from utils import PRECISIONS


def get_args_parser() -> Parser:
    """Return the parser of eval_segmentation.py."""
    parser = Parser("eval_segmentation.py", "Score frozen region features with linear or k-NN segmentation.")
    shared.add_network_flags(parser)
    shared.add_weights_flags(parser)
    group = parser.group("features")
    text = "stages whose regions are concatenated on the finest grid, from 1 (default: the last one)"
    group.add_argument("--stages", type=integer(1, 100), nargs="+", default=None, help=text)
    shared.add_switch(group, "--baselines", "also score raw pixels and the untrained network")
    text = "cache features of center crops and train on them: fast, but without augmentation"
    shared.add_switch(group, "--cache_features", text)
    text = "precision of the network; the classifiers are always float32"
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help=text)

    add = parser.group("data").add_argument
    text = "folder of images and masks: DIR/{train,val}/{images,masks}, DIR/{images,masks}/{train,val}, ADE20K or Pascal VOC"
    add("--data_path", type=existing_path, default="", help=text)
    text = "number of classes, or a text file with their names, one a line (default: as many as the masks have)"
    add("--classes", default=None, metavar="N or FILE", help=text)
    text = "value of pixels without a class (void), which do not count"
    add("--ignore_index", type=integer(0, 255), default=255, help=text)
    text = "0 is void too, and classes start at 1, as in ADE20K"
    shared.add_switch(parser.group("data"), "--reduce_zero_label", text)
    text = "shorter side to which images are resized, in pixels; masks keep their size (default: no resizing)"
    add("--image_size", type=PIXELS, default=None, help=text)
    text = "side of training crops and of the windows of larger images (default: at most 512)"
    add("--window", type=PIXELS, default=None, help=text)
    text = "distance of the windows of validation images in pixels (default: two thirds of the window)"
    add("--stride", type=PIXELS, default=None, help=text)
    add("--batch_size_per_gpu", type=BATCH, default=16, help="images per process and step")
    shared.add_workers_flag(parser)

    add = parser.group("linear segmentation").add_argument
    add("--epochs", type=EPOCHS, default=40, help="number of training epochs")
    text = "initial learning rate of AdamW, which falls linearly to 0; several values train several classifiers"
    add("--lr", type=number(0, 1000, above_low=True), nargs="+", default=[0.001], help=text)
    add("--weight_decay", type=FACTOR, default=1e-4, help="weight decay of AdamW")
    text = "epochs between validations before the last epoch, which is always scored; 0: none"
    add("--val_freq", type=integer(0), default=0, help=text)

    group = parser.group("k-NN segmentation")
    shared.add_switch(group, "--knn", "segment by the vote of the nearest training regions instead; trains nothing")
    add = group.add_argument
    add("--nb_knn", type=COUNT, nargs="+", default=[20], help="numbers of neighbors")
    add("--temperature", type=TEMPERATURE, default=0.07, help="temperature of the voting weights")
    text = "training regions at most, drawn from all images"
    add("--knn_regions", type=COUNT, default=100_000, help=text)

    add = parser.group("logging").add_argument
    text = "folder for segmentation.pth, log.txt, predictions.png and results/segmentation.json"
    add("--output_dir", default=".", metavar="DIR", help=text)
    add("--num_pictures", type=integer(0, 100), default=4, help="validation images in predictions.png")
    add("--log_freq", type=COUNT, default=20, help="steps between log lines")
    shared.add_wandb_flag(parser)

    shared.add_seed_flag(parser, "classifiers, order, crops, drawn regions and untrained networks")
    shared.add_launch_flags(parser)
    parser.set_defaults(token="cls")  # region features do not depend on it
    return parser
