"""RetinaNet with a pre-trained ResNet-50.

    python export.py --arch resnet50 --pretrained_weights /my/run/checkpoint.pth --format detectron2 --output resnet50.pkl
    DATA=/my/objects WEIGHTS=resnet50.pkl python DETECTRON2/tools/lazyconfig_train_net.py \\
        --config-file experiments/detection/detectron2_resnet50.py

DETECTRON2 is a checkout of detectron2; detectron2_retinanet.py describes DATA. As in torchvision, the 3 x 3 convolution has
the stride.
"""

from detectron2 import model_zoo
from detectron2.config import LazyConfig

dataloader, lr_multiplier, model, train = LazyConfig.load_rel(
    "detectron2_retinanet.py", ("dataloader", "lr_multiplier", "model", "train")
)

model.backbone.bottom_up.stages.stride_in_1x1 = False
model.backbone.bottom_up.freeze_at = 2  # the stem and the first stage

optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.01
