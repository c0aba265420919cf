"""RetinaNet with a pre-trained Swin-T, window 7.

    python export.py --arch swin_tiny --pretrained_weights /my/run/checkpoint.pth --format mmdet --output swin_tiny_mmdet.pth
    DATA=/my/objects WEIGHTS=swin_tiny_mmdet.pth python MMDET/tools/train.py experiments/detection/mmdet_swin_tiny.py

MMDET is a checkout of mmdet 3.3; mmdet_retinanet.py describes DATA. For window 14 set window_size=14. The eps of LayerNorm is
that of pre-training (mmdet's default is 1e-5). Optimizer as in Swin Transformer (Liu et al., ICCV 2021).
"""

_base_ = "mmdet_retinanet.py"

model = dict(
    backbone=dict(
        type="SwinTransformer",
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type="LN", eps=1e-6),
        init_cfg=dict(type="Pretrained", checkpoint="{{$WEIGHTS:}}"),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=no_decay, relative_position_bias_table=no_decay)),
)
