# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Runs a function in two processes that talk to each other, by gloo on this machine."""

import socket
import time
from typing import Any, Callable, List

import pytest
import torch
import torch.distributed

NUM_PROCESSES = 2
TIMEOUT = 120  # seconds; they take about 10


def run(function: Callable, *args: Any) -> List[Any]:
    """
    What ``function(rank, *args)`` returns in each process, in no order. It must be found in
    a module, and what it returns must be plain.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked from a process that has imported what takes seconds, and nothing else.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_rb", "torch._dynamo"])
    queue = context.SimpleQueue()
    processes = torch.multiprocessing.start_processes(
        _process, (function, port, queue, args), NUM_PROCESSES, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + TIMEOUT
    # Returns at the end of each process, and raises what it raised.
    while not processes.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the processes were not done after {TIMEOUT} s")
    return [queue.get() for _ in range(NUM_PROCESSES)]


def _process(rank: int, function: Callable, port: int, queue: Any, args: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_PROCESSES
    )
    try:
        queue.put(function(rank, *args))
    finally:
        torch.distributed.destroy_process_group()
