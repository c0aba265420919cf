"""RetinaNet with a pre-trained Swin-T, window 7.

    python export.py --arch swin_tiny --pretrained_weights /my/run/checkpoint.pth --format detectron2 --output swin_tiny.pkl
    DATA=/my/objects WEIGHTS=swin_tiny.pkl python DETECTRON2/tools/lazyconfig_train_net.py \\
        --config-file experiments/detection/detectron2_swin_tiny.py

DETECTRON2 is a checkout of detectron2; detectron2_retinanet.py describes DATA. For window 14 set window_size=14. The eps of
LayerNorm is that of pre-training (detectron2's default is 1e-5). Optimizer as in Swin Transformer (Liu et al., ICCV 2021).
"""

from functools import partial

from detectron2 import model_zoo
from detectron2.config import LazyCall, LazyConfig
from detectron2.modeling import SwinTransformer
from torch.nn import LayerNorm

dataloader, lr_multiplier, model, train = LazyConfig.load_rel(
    "detectron2_retinanet.py", ("dataloader", "lr_multiplier", "model", "train")
)

model.backbone.bottom_up = LazyCall(SwinTransformer)(
    embed_dim=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    drop_path_rate=0.2,
    out_indices=(1, 2, 3),
    norm_layer=partial(LayerNorm, eps=1e-6),
)
model.backbone.in_features = ["p1", "p2", "p3"]
model.backbone.top_block.in_channels = 768
model.backbone.top_block.in_feature = "p3"

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr = 1e-4
optimizer.weight_decay = 0.05
optimizer.params.overrides = {"relative_position_bias_table": {"weight_decay": 0.0}}
