"""Compare the collectives of a step with those that benchmarks/traffic.py predicts, for DDP, --fsdp and --fsdp_group 2.

    torchrun --nproc_per_node=4 tests/soak/count_traffic.py

Prints a line for each; the first difference ends all processes with code 1. Exact but for the scalars of a step, which are added.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from helpers.runs import TINY_RUN, TINY_SWIN  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # noqa: E402

import main_esvit  # noqa: E402
from benchmarks import traffic  # noqa: E402
from benchmarks.traffic import Collective, CountCollectives, ddp_step, fsdp_step  # noqa: E402
from distributed import collectives, launch  # noqa: E402
from models import Backbone, load_arch_config  # noqa: E402
from training import setup  # noqa: E402

CPU = torch.device("cpu")
CROP_SIZES = (32, 32, 16, 16)


def check(*flags: str) -> str:
    """Train three steps, and compare the third with the prediction."""
    args = main_esvit.get_args_parser().parse_args([*TINY_RUN, "--freeze_last_layer", "0", *flags, "--", *TINY_SWIN])
    config = load_arch_config(args.arch, args.cfg, args.opts)
    student, teacher = (main_esvit.build_network(args, config, is_teacher=is_teacher) for is_teacher in (False, True))
    world, criterion = collectives.get_world_size(), main_esvit.RegionMatchingLoss(args.out_dim, 4, 0.04, 0.04, 0, 2)
    predicted = predict(args.fsdp, student, criterion, world, args.fsdp_group)
    crops = setup.get_crops(args, config)
    networks = setup.pair_networks(args, student, teacher, crops, CPU)
    step = setup.build_step(args, main_esvit.EsViT(*networks, criterion), 2, CPU, "fp32")
    buckets = count_buckets(networks[0])
    views = [torch.randn(2, 3, size, size) for size in CROP_SIZES]
    for iteration in range(2):  # DDP settles its buckets in the second one
        step([views], iteration, 0)
    buckets.clear()
    with CountCollectives() as counted:
        scalars = step([views], 2, 0)
    predicted.append(Collective("all-reduce", 4 * len(scalars), world))
    found, expected = traffic.total(counted.found), traffic.total(predicted)
    assert found == expected, f"{flags}: counted {found}, predicted {expected}"
    assert args.fsdp or sum(buckets) == sum(p.nbytes for p in student.parameters() if p.requires_grad)
    return " ".join(flags) or "DDP"


def predict(sharded: bool, student: Backbone, criterion: nn.Module, world: int, group: int) -> list[Collective]:
    return fsdp_step(student, criterion, 2, world, group) if sharded else ddp_step(student, criterion, world)


def count_buckets(network: nn.Module) -> list[int]:
    """Return a list to which a communication hook of DDP appends the bytes of every bucket."""
    found: list[int] = []

    # DDP checks the annotation, which the stubs of torch do not declare.
    def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        found.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    if isinstance(network, nn.parallel.DistributedDataParallel):
        network.register_comm_hook(dist.group.WORLD, hook)
    return found


def main() -> None:
    launch.init_processes(main_esvit.get_args_parser().parse_args(["--device", "cpu"]))
    hybrid = [("--fsdp", "--fsdp_group", "2")] if collectives.get_world_size() > 2 else []
    for flags in ((), ("--fsdp",), *hybrid):
        checked = check(*flags)
        if collectives.is_main_process():
            print(f"{checked}: as predicted", flush=True)


if __name__ == "__main__":
    launch.run_script(main)
