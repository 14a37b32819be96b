"""Run a function on every rank of a world of CPU processes, as a cluster's launcher would."""

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning.utilities import rank_zero_only

from maml_pipeline.cli.terminal import configure_logging

WORLD_SIZE_VARIABLE = "MAML_TEST_WORLD_SIZE"
"""For jobs with several trainers: Lightning deletes WORLD_SIZE when the first one ends."""

Job = Callable[[Path], Any]
"""(folder shared by all ranks) -> result of this rank."""


def on_every_rank(job: Job, world_size: int, folder: Path, seconds: float) -> list[Any]:
    """Run a job on `world_size` ranks in parallel, and return the result of each.

    Ranks are forked from a server that has imported everything, since imports take longer than most
    jobs, and that has no threads yet.

    Raises:
        AssertionError: A rank failed, or took too long; its output is the message.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([job.__module__])
    port = find_free_network_port()
    folder.mkdir()
    ranks = [
        context.Process(target=_run, args=(job, rank, world_size, port, folder), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
        if time.monotonic() > deadline:
            break
        ranks[-1].join(0.05) if ranks[-1].is_alive() else time.sleep(0.05)
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    outputs = "\n".join(f"rank {r}: {(folder / f'{r}.log').read_text()}" for r in failed)
    assert not failed, f"ranks {failed} of {world_size} failed or took over {seconds} s\n{outputs}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(job: Job, rank: int, world_size: int, port: int, folder: Path) -> None:
    with (folder / f"{rank}.log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.environ[WORLD_SIZE_VARIABLE] = str(world_size)
    if world_size > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
        }
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    configure_logging()
    warnings.filterwarnings("ignore", "The `srun` command is available")
    try:
        torch.save(job(folder), folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # without waiting for ranks that wait for this one
