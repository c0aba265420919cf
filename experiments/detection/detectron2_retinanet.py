"""RetinaNet of detectron2 on a set of your own in COCO's format; the base of detectron2_swin_tiny.py and detectron2_resnet50.py.

The environment variable DATA names a folder with annotations/train.json, annotations/val.json and the images in train/ and val/;
WEIGHTS names the exported file. 12 epochs.
"""

import json
import os
from pathlib import Path

from detectron2 import model_zoo
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

folder = Path(os.environ["DATA"])
for split in ("train", "val"):
    if f"objects_{split}" not in DatasetCatalog:
        register_coco_instances(f"objects_{split}", {}, str(folder / f"annotations/{split}.json"), str(folder / split))
annotations = json.loads((folder / "annotations/train.json").read_text())

model = model_zoo.get_config("common/models/retinanet.py").model
model.num_classes = len(annotations["categories"])
model.input_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]  # 255 x INPUT.MEAN
model.pixel_std = [58.395, 57.12, 57.375]  # 255 x INPUT.STD

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "objects_train"
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = False
dataloader.test.dataset.names = "objects_val"

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = os.environ["WEIGHTS"]
train.max_iter = max(12 * len(annotations["images"]) // dataloader.train.total_batch_size, 1)
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
