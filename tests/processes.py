"""Processes for tests, forked from a server that has imported the libraries, which takes a program anew five seconds.

What a user starts is started in a test as well, once for every program: by subprocess, with what it imports.
"""

import multiprocessing.connection
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = "127.0.0.1"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["open_clip", "timm", "transformers", "webdataset", "tyro", "torch._dynamo", "torch.distributed.fsdp"]
)


def spawn(function, args=(), nprocs=1, join=True):
    """As torch.multiprocessing.spawn: `function(rank, *args)` in `nprocs` processes."""
    given = (Path.cwd(), dict(os.environ), function, args)
    return torch.multiprocessing.start_processes(_call, given, nprocs, join, start_method="forkserver")


def _call(rank, folder, environment, function, args):
    _settle(folder, environment)
    function(rank, *args)


def _settle(folder: Path, environment: Mapping[str, str]) -> None:
    """Where the test is, instead of where the server was started."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the default, as in what a user starts
    torch.set_num_threads(1)


class Program:
    """A Python program that runs; its standard output and error are `output`."""

    def __init__(self, path: Path | str, *arguments: object, environment: Mapping[str, str] | None = None):
        reading, writing = CONTEXT.Pipe(duplex=False)
        given = (writing, Path.cwd(), os.environ | (environment or {}), [str(path), *map(str, arguments)])
        self.process = CONTEXT.Process(target=_be_the_program, args=given)
        self.process.start()
        writing.close()
        self.output = os.fdopen(os.dup(reading.fileno()))
        reading.close()

    def kill(self) -> None:
        """Like a machine that is gone: it, and the workers that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, str]:
        """Its exit code, and what it has printed since."""
        with self.output:
            text = self.output.read()
        self.process.join()
        return self.process.exitcode, text


def _be_the_program(writing, folder: Path, environment: Mapping[str, str], argv: list[str]) -> None:
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(writing.fileno(), descriptor)
    writing.close()
    _settle(folder, environment)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HERE, 0))
        return free.getsockname()[1]


def run(path: Path | str, *arguments: object, processes: int = 1) -> str:
    """What a program prints, which ends well; with several processes, as torchrun starts them."""
    of_all = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": HERE, "MASTER_PORT": free_port()}
    started = []
    for rank in range(processes):
        place = {name: str(value) for name, value in ({"RANK": rank, "LOCAL_RANK": rank} | of_all).items()}
        started.append(Program(path, *arguments, environment=place if processes > 1 else {}))
    with ThreadPoolExecutor(processes) as readers:  # what nobody reads would hold them up
        printed = [readers.submit(program.output.read) for program in started]
        running = {program.process.sentinel: program for program in started}
        while running:
            for sentinel in multiprocessing.connection.wait(list(running)):
                running.pop(sentinel).process.join()
            if any(program.process.exitcode for program in started):
                for program in running.values():
                    program.kill()  # it would wait for the one that has ended
    text = "".join(one.result() for one in printed)
    ends = [program.wait()[0] for program in started]
    assert not any(ends), text
    return text
