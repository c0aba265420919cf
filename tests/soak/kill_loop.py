"""Kill a run at random moments, start it again each time, and compare its end with that of a run left alone.

    python tests/soak/kill_loop.py --kills 50
    python tests/soak/kill_loop.py --kills 50 --processes 2       # of which one is killed; the other gets SIGTERM, as from torchrun
    python tests/soak/kill_loop.py --kills 50 --signal INT        # Ctrl-C instead: all processes get it, and end with code 130
    python tests/soak/kill_loop.py --kills 50 --rivals 2          # each start is one of so many at the same time in the same folder

The run saves after every step, so that many kills come while it saves; that is seen by the temporary file they leave. Of rivals
one trains, and the others end with code 2. The program prints how many these were, and ends with code 1 unless every start found
a whole checkpoint no older than the last one seen, and the last one equals, to the bit, that of the run which nobody killed.
Children are forked, so that nothing is imported again.

"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.chdir(ROOT)

import torch  # noqa: E402
from helpers.runs import TINY_RUN, TINY_SWIN, free_port, write_images  # noqa: E402

import main_esvit  # noqa: E402
from checkpoints import files  # noqa: E402
from distributed import launch  # noqa: E402
from training import checkpointing  # noqa: E402

EPOCHS = 12


def train(folder: Path, images: Path) -> None:
    """The whole run, or what is left of it."""
    flags = ["--epochs", str(EPOCHS), "--saveckp_freq", "0", "--save_every_steps", "1", "--keep_last", "2"]
    line = [*TINY_RUN, *flags, "--data_path", str(images), "--output_dir", str(folder), "--", *TINY_SWIN]
    main_esvit.main(main_esvit.get_args_parser().parse_args(line))


def start(folder: Path, images: Path, processes: int) -> list[int]:
    """The numbers of processes that train together."""
    children, port = [], free_port()
    for rank in range(processes):
        child = os.fork()
        children.append(child)
        if child == 0:
            code = 1
            atexit._clear()  # the temporary folder is its parent's to remove
            try:
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, 1)
                os.dup2(silence, 2)
                if processes > 1:
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                launch.run_script(lambda: train(folder, images))
                code = 0
            except SystemExit as end:
                code = int(str(end.code))
            except KeyboardInterrupt:  # before `run_script` takes it
                code = launch.INTERRUPTED
            finally:
                os._exit(code)
    return children


def wait(children: list[int]) -> list[int]:
    """Their statuses."""
    return [os.waitpid(child, 0)[1] for child in children]


def place(folder: Path) -> tuple[int, int]:
    """Epoch and step of the newest whole checkpoint; (0, 0) before the first."""
    found = checkpointing.newest_whole(folder / checkpointing.CHECKPOINT)
    if found is None:
        return 0, 0
    content = found[1]
    return content["epoch"], content.get("in_epoch", {"steps": 0})["steps"]


def same(one: object, two: object) -> bool:
    """Equality of nested containers, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(two, list | tuple) and len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def hurt(children: list[int], draw: random.Random, number: signal.Signals) -> int:
    """Kill one of the processes, end the others as a launcher does, and return its status; Ctrl-C is sent to all."""
    victim = draw.randrange(len(children))
    for rank, child in enumerate(children):
        os.kill(child, number if rank == victim or number == signal.SIGINT else signal.SIGTERM)
    return wait(children)[victim]


def main(kills: int, seed: int, processes: int, number: signal.Signals, rivals: int) -> None:
    """Run, kill, compare."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        images, alone, killed = (Path(name) / part for part in ("images", "alone", "killed"))
        write_images(images, 12 * processes)
        begun = time.monotonic()
        assert not any(wait(start(alone, images, processes)))
        whole_run = time.monotonic() - begun
        done = while_saving = refused = 0
        reached = (0, 0)
        while done < kills:
            begun = time.monotonic()
            runs = [start(killed, images, processes) for _ in range(rivals)]
            until = begun + draw.uniform(0, 0.4 * whole_run)
            while rivals > 1 and len(runs) > 1:  # all but one are refused at their start
                codes = {run[0]: os.waitpid(run[0], os.WNOHANG)[1] for run in runs}
                refusals = [run for run in runs if codes[run[0]]]
                assert all(os.WEXITSTATUS(codes[run[0]]) == 2 for run in refusals), codes
                refused += len(refusals)
                runs = [run for run in runs if run not in refusals]
                assert runs, "every rival was refused"
                time.sleep(0.01)
            time.sleep(max(0.0, until - time.monotonic()))
            status = hurt(runs[0], draw, number)
            while_saving += any(killed.glob(f".*{files.TEMPORARY_SUFFIX}"))
            now = place(killed)
            assert now >= reached, f"the run fell back from {reached} to {now}"
            reached = now
            if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == launch.INTERRUPTED:
                assert os.WIFSIGNALED(status) == (number == signal.SIGKILL), status
                done += 1
            else:  # all epochs were done before the kill: begin anew
                assert os.WEXITSTATUS(status) == 0
                killed, reached = killed.with_name(f"killed{done}"), (0, 0)
        assert not any(wait(start(killed, images, processes)))
        ends = [torch.load(run / checkpointing.CHECKPOINT, weights_only=False) for run in (alone, killed)]
        differing = [key for key in ends[0].keys() - {"args"} if not same(ends[0][key], ends[1][key])]
        assert not differing, f"the killed run ends with another {', '.join(differing)}"
        lines = [len((run / "log.txt").read_text().splitlines()) for run in (alone, killed)]
        assert lines == [EPOCHS, EPOCHS], lines
    print(
        f"{done} kills, {while_saving} of them while saving; nothing was lost, the end is that of a run left alone"
        + (f"; {refused} rivals were refused" if rivals > 1 else "")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--signal", choices=("KILL", "INT"), default="KILL")
    parser.add_argument("--rivals", type=int, default=1, help="runs of one process that start at the same time")
    arguments = parser.parse_args()
    number = signal.Signals[f"SIG{arguments.signal}"]
    main(arguments.kills, arguments.seed, arguments.processes, number, arguments.rivals)
