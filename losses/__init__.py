"""Objectives: the view loss of DINO, the region loss of EsViT, and the losses of UDI."""

from losses.dino import DINOLoss as DINOLoss
from losses.region import RegionMatchingLoss as RegionMatchingLoss
from losses.udi import UDILoss as UDILoss
