"""RetinaNet with a pre-trained ResNet-50.

    python export.py --arch resnet50 --pretrained_weights /my/run/checkpoint.pth --format mmdet --output resnet50_mmdet.pth
    DATA=/my/objects WEIGHTS=resnet50_mmdet.pth python MMDET/tools/train.py experiments/detection/mmdet_resnet50.py

MMDET is a checkout of mmdet 3.3; mmdet_retinanet.py describes DATA.
"""

_base_ = "mmdet_retinanet.py"

model = dict(
    backbone=dict(
        type="ResNet",
        depth=50,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="{{$WEIGHTS:}}"),
    ),
    neck=dict(in_channels=[512, 1024, 2048]),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=1e-4))
