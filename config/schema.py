"""TODO."""

from __future__ import annotations

from typing import Any

from config.ranges import PIXELS, SHARE, integer, number

# What a backbone of each MODEL.NAME reads from MODEL.SPEC, with its defaults.
SPECS: dict[str, dict[str, Any]] = {
    "swin_transformer": {
        "PATCH_SIZE": 4,
        "IN_CHANS": 3,
        "DIM_EMBED": 96,
        "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [3, 6, 12, 24],
        "WINDOW_SIZE": 7,
        "MLP_RATIO": 4.0,
        "QKV_BIAS": True,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
        "PATCH_NORM": True,
        "USE_APE": False,
    },
    "cvt_v4_transformer": {
        "IN_CHANS": 3,
        "NUM_STAGES": 0,  # 0: as many as DEPTHS has entries
        "PATCH_SIZE": [7, 3, 3, 3],
        "PATCH_STRIDE": [4, 2, 2, 2],
        "PATCH_PADDING": [2, 1, 1, 1],
        "DIM_EMBED": [64, 192, 384, 768],
        "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [1, 3, 6, 12],
        "WINDOW_SIZE": [7, 7, 7, 7],
        "MLP_RATIO": [4.0, 4.0, 4.0, 4.0],
        "QKV_BIAS": True,
        "SHIFT": False,
        "REL_POS_EMBED": False,
        "RES_STEM": False,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
    },
    "vision_longformer": {
        "IN_CHANS": 3,
        "DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
        "NORM_EMBED": True,
        "AVG_POOL": False,
        "MSVIT": {
            "ARCH": "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_"
            "l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0",
            "SHARE_W": True,
            "SHARE_KV": True,
            "ONLY_GLOBAL": False,
            "ATTN_TYPE": "longformerhand",
            "SW_EXACT": 0,
            "MODE": 0,
            "VIL_MODE_SWITCH": 1.0,
            "LN_EPS": 1e-6,
        },
    },
    "vision_transformer": {  # its patch size is the flag --patch_size
        "IN_CHANS": 3,
        "NUM_CLS_TOKENS": 1,  # 2 for UDI
        # Of positions for other image sizes: size, or scale as DINO and UDI have it (models/resize.py); auto: as the program of
        # the loaded file does, else size.
        "POS_RESIZE": "auto",
        "DIM_EMBED": 384,
        "DEPTH": 12,
        "NUM_HEADS": 6,
        "MLP_RATIO": 4.0,
        "QKV_BIAS": True,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
    },
    "resnet": {"IN_CHANS": 3},  # its name is the flag --arch
}

# Everything else that code reads.
SCHEMA: dict[str, Any] = {
    "MODEL": {"NAME": "swin_transformer", "IMAGE_SIZE": [224, 224]},
    "INPUT": {
        "MEAN": [0.485, 0.456, 0.406],
        "STD": [0.229, 0.224, 0.225],
        "RANGE": [],  # [black, white]: what images of more than 8 bits hold, where their type does not say (data/decode.py)
    },
}

# Keys of the published files that belong to the supervised code base they came from; of a whole group every key is one.
PUBLISHED_UNUSED = {
    *(
        "AMP",
        "AUG",
        "CUDNN",
        "DATASET",
        "DEBUG",
        "FINETUNE",
        "LOSS",
        "OUTPUT_DIR",
        "PRINT_FREQ",
        "TEST",
        "TRAIN",
        "WORKERS",
    ),
    *("MODEL.NUM_CLASSES", "MODEL.INIT_WEIGHTS", "MODEL.PRETRAINED", "MODEL.PRETRAINED_LAYERS"),
    *("INPUT.IMAGE_SIZE", "INPUT.CROP_PCT", "INPUT.INTERPOLATION"),
}

# What a number, or every number of a list, may be, by the last part of its key.
RANGES = {
    **dict.fromkeys(("PATCH_SIZE", "PATCH_STRIDE", "WINDOW_SIZE"), integer(1, 1024)),
    **dict.fromkeys(("DEPTH", "DEPTHS"), integer(1, 1000)),
    **dict.fromkeys(("DROP_RATE", "ATTN_DROP_RATE", "DROP_PATH_RATE", "VIL_MODE_SWITCH"), SHARE),
    "IMAGE_SIZE": PIXELS,
    "MEAN": number(-1e6, 1e6),
    "STD": number(1e-6, 1e6),
    "IN_CHANS": integer(1, 1024),
    "DIM_EMBED": integer(1, 65_536),
    "NUM_HEADS": integer(1, 1024),
    "MLP_RATIO": number(0, 1000, above_low=True),
    "NUM_STAGES": integer(0, 100),
    "PATCH_PADDING": integer(0, 1024),
    "NUM_CLS_TOKENS": integer(0, 1024),
    "SW_EXACT": integer(-1, 1),
    "MODE": integer(-1, 8),
    "LN_EPS": number(0, 1, above_low=True),
}

# Published files of these networks may give one value for every stage, or one per stage where a key has a single value.
STAGED = {"cvt_v4_transformer"}

# Published files name the size that learned tables are made for as that of the training images, whatever the network.
COMMON_ALIASES = {"TRAIN.IMAGE_SIZE": "MODEL.IMAGE_SIZE"}

# Names of networks in published files that the published code itself no longer knows.
NAME_ALIASES = {"cls_cvt_v4": "cvt_v4_transformer", "cls_vil": "vision_longformer"}

# Other names of keys in published files, by MODEL.NAME.
ALIASES = {
    "cvt_v4_transformer": {"MODEL.SPEC.DEPTH": "MODEL.SPEC.DEPTHS"},
    "vision_longformer": {
        "MODEL.SPEC.DROP": "MODEL.SPEC.DROP_RATE",
        "MODEL.SPEC.DROP_PATH": "MODEL.SPEC.DROP_PATH_RATE",
    },
}

# Keys by which published files choose between networks, with the values that mean the one there is here; reported as unused.
ONLY_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "cvt_v4_transformer": {
        "MODEL.SPEC.INIT": ("trunc_norm",),
        "MODEL.SPEC.CLS_TOKEN": (False,),
        "MODEL.SPEC.POS_EMBED": (False,),
        "MODEL.SPEC.QKV_PROJ_METHOD": ("dw_bn",),
        "MODEL.SPEC.KERNEL_QKV": (3,),
        "MODEL.SPEC.PADDING_QKV": (1,),
        "MODEL.SPEC.STRIDE_QKV": (1,),
        "MODEL.SPEC.PADDING_KV": (1,),
        "MODEL.SPEC.STRIDE_KV": (1,),
        "MODEL.SPEC.PADDING_Q": (1,),
        "MODEL.SPEC.STRIDE_Q": (1,),
        "MODEL.SPEC.NORM": ("layernorm", "layer_norm", "LayerNorm", "ln"),
        "MODEL.SPEC.ACT": ("quick_gelu", "quickgelu", "QuickGELU"),
    },
    "vision_longformer": {  # no squeeze-and-excitation, no pooled tokens; the ratio would be that of the former
        "MODEL.SPEC.MSVIT.POOL_METHOD": ("None", None),
        "MODEL.SPEC.MSVIT.WITH_SE": ("None", None, False),
        "MODEL.SPEC.MSVIT.SE_MLP_RATIO": (0.0625,),
        "MODEL.SPEC.MSVIT.SE_MLP_BALANCE": (False,),
    },
}
