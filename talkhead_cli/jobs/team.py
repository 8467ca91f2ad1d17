"""Data parallelism: several processes train one avatar, each on draws of its own.

Every process takes the preset's rays and rows per step; gradients are averaged, so N processes
train on N times as many.  Only the chief, the first process of the first machine, reports, writes
and saves.  With several machines, each runs the same command, with MASTER_ADDR, MASTER_PORT and
NODE_RANK set as Lightning requires, and must see the same home.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing import connection
from typing import Any, Literal, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from talkhead_cli.contracts import (
    MisuseError,
    Progress,
    SilentProgress,
    TalkheadError,
    n_cores,
)
from talkhead_cli.jobs import interrupt

Precision = Literal["16-mixed", "bf16-mixed", "32-true"]
Made = TypeVar("Made")
# Half precision where it is faster: on a CPU the casts cost more than the products gain.
PRECISION: dict[str, Precision] = {"cuda": "16-mixed", "cpu": "32-true"}
LAST_BREATH_S = 5.0
PATIENCE_S = 30.0  # for the others to end once the chief has


def run(
    job: Callable[..., Made],
    *args: Any,
    progress: Progress,
    devices: int,
    nodes: int,
    **options: Any,
) -> Made:
    """Run `job(*args, progress, devices=, nodes=, **options)` in a team; return the chief's result.

    On other machines it returns when the job ends, with a result that stands for what the chief
    saved."""
    if devices < 1 or nodes < 1:
        raise MisuseError("--devices and --nodes must be 1 or more")
    if nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
        raise MisuseError(
            "--nodes needs MASTER_ADDR, MASTER_PORT and NODE_RANK (0 on the first machine) in the "
            "environment of every machine"
        )
    options |= {"devices": devices, "nodes": nodes}
    if devices * nodes == 1:
        return job(*args, progress, **options)
    context = multiprocessing.get_context("spawn")
    with _named_place(devices) as place:
        others = [
            context.Process(
                target=_join_in,
                daemon=True,
                args=(job, args, options, {**place, "LOCAL_RANK": str(number)}),
            )
            for number in range(1, devices)
        ]
        for other in others:
            other.start()
        leads = is_chief(devices, nodes)
        try:
            # a first signal stops the chief alone, which saves; without it the others end
            with nullcontext() if leads else interrupt.delayed():
                made = job(*args, progress if leads else SilentProgress(), **options)
            for other in others:
                other.join(PATIENCE_S)
        except RuntimeError as error:  # of gloo and NCCL, when a process is gone
            # a process may outlive its connections for a while
            gone = connection.wait([other.sentinel for other in others], LAST_BREATH_S)
            if not gone and not (nodes > 1 and _is_of_the_net(error)):
                raise
            raise TalkheadError(
                "a process of the team failed, probably for memory; run the same command again, "
                "with fewer --devices"
                if gone
                else "another machine of the team has ended; run the same command again on each"
            ) from error
        finally:
            for other in others:
                other.kill()
                other.join()
    return made


def fabric(device: torch.device, precision: Precision, devices: int, nodes: int) -> Fabric:
    """Return Fabric for one of `devices` processes on each of `nodes`, connected to the others."""
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)  # its tips are not for our users
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    if devices * nodes == 1:
        return Fabric(accelerator=device.type, devices=1, precision=precision)
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise TalkheadError(
            f"--devices {devices} are asked for, {torch.cuda.device_count()} GPUs are here"
        )
    if device.type == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), n_cores() // devices)))
    made = Fabric(
        accelerator=device.type,
        devices=devices,
        num_nodes=nodes,
        precision=precision,
        # Parameters may be unused: a step may sample no point of the shoulders, say.  Buffers:
        # each process keeps its own observations of the grid until the grid is updated.
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False),
    )
    made.launch()
    return made


def is_chief(devices: int, nodes: int) -> bool:
    """Return whether this process reports and writes; read from the environment, before Fabric.

    A single process does, whatever rank a cluster's shell gives its machine."""
    if devices * nodes == 1:
        return True
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def _join_in(
    job: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], place: dict[str, str]
) -> None:
    os.environ.update(place)
    # Ctrl-C reaches all processes of a terminal, a scheduler's SIGTERM all of a job: the chief
    # saves, and without it the others end
    for number in interrupt.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    job(*args, SilentProgress(), **options)


def _is_of_the_net(error: RuntimeError) -> bool:
    """Return whether the error means that a connection to another process is gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def _named_place(devices: int) -> Iterator[dict[str, str]]:
    """Set the address where processes meet in the environment while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    place = {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(free)),
        "LOCAL_RANK": "0",
    }
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    try:
        yield place
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
