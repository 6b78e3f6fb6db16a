"""Other systems, measured beside tpjax in the same rounds: each is a process that loads the same
shape, waits, and runs one round when it is told to.

A peer reads a line for every round and answers with a line of JSON: seconds of one token and of
all. Its first line says what it is.
"""

import importlib.metadata
import json
import subprocess
import sys

from tpjax.errors import ResourceError

# Name -> what it needs, and the module that runs it.
PEERS = {"hf": (("torch", "transformers"), "tpjax.bench.peers.hf")}


class Peer:
    """One of them, ready to be measured. Raises ResourceError if it is not installed or fails."""

    def __init__(self, name: str, words: list[str]):
        needs, module = PEERS[name]
        # Not find_spec: a command has made torch look absent to itself.
        there = {found.name for found in importlib.metadata.distributions()}
        if missing := [package for package in needs if package not in there]:
            raise ResourceError(f"--compare {name}: pip install {' '.join(missing)}")
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
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
        return answer["one"], answer["all"] - answer["one"]

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ResourceError(f"--compare {self.name}: it ended; what it said is above")
        return json.loads(line)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
