from data.datasets import ImageDataset as ImageDataset
from data.datasets import build_dataset as build_dataset
from data.loader import Batch as Batch
from data.loader import FailureTally as FailureTally
from data.loader import build_eval_loader as build_eval_loader
from data.loader import build_train_loader as build_train_loader
