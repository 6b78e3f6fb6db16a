"""Other systems, measured beside tpjax in the same rounds: each is a process that loads the same
shape, waits, and runs one round when it is told to.

A peer reads a line for every round and answers with a line of JSON: seconds until the first tokens
and of all others. Its first line says what it is.
"""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from typing import NamedTuple

from tpjax.errors import ResourceError


class System(NamedTuple):
    """What it needs installed, the module that runs it, and words for that alone. ``processes``:
    whether it is one per device of the tensor axis, started by torchrun."""

    needs: tuple[str, ...]
    module: str
    words: tuple[str, ...] = ()
    processes: bool = False


_SECONDS_TO_END = 20
_HF = "tpjax.bench.peers.hf"
PEERS = {
    "hf": System(("torch", "transformers"), _HF),
    "hf-tp": System(("torch", "transformers", "accelerate"), _HF, ("--tensor",), True),
    "torch-compile": System(("torch", "transformers"), _HF, ("--compile",)),
    "llama.cpp": System(("llama-cpp-python", "gguf"), "tpjax.bench.peers.llama_cpp"),
}


class Peer:
    """One of them, ready to be measured. Raises ResourceError if it is not installed or fails."""

    def __init__(self, name: str, words: list[str], tensor: int):
        system = PEERS[name]
        if system.processes and tensor < 2:
            raise ResourceError(f"--compare {name}: is several processes; give -tp 2 or more")
        # Not find_spec: a command has made torch look absent to itself.
        there = {found.name.replace("_", "-") for found in importlib.metadata.distributions()}
        if missing := [package for package in system.needs if package not in there]:
            raise ResourceError(f"--compare {name}: pip install {' '.join(missing)}")
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(tensor), "-m"]
        started = [*launcher, system.module] if system.processes else [system.module]
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", *started, *words, *system.words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that all its processes can be ended
        )
        try:
            self.about: str = self._answer()["about"]
        except BaseException:
            self.__exit__()
            raise

    def round(self) -> tuple[float, float]:
        """Seconds until the first token, and of all that follow."""
        assert self.process.stdin is not None
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["first"], answer["rest"]

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ResourceError(f"--compare {self.name}: it ended; what it said is above")
        return json.loads(line)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()  # which ends it, with all its processes
        try:
            self.process.wait(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
