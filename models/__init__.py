from models.base import Backbone as Backbone
from models.base import Features as Features
from models.outputs import MultiCropOutput as MultiCropOutput
from models.registry import build_model as build_model
from models.registry import list_models as list_models
from models.registry import load_arch_config as load_arch_config

from . import cvt as cvt  # each architecture registers itself
from . import resnet as resnet
from . import swin as swin
from . import vil as vil
from . import vit as vit
