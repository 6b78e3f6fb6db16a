"""Single bytes of a checkpoint changed at random: every one must be found, and none be loaded."""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from checkpoints_tools.convert import convert
from checkpoints_tools.verify import verify
from tpjax import env
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.errors import CheckpointError
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable


def places(folder: Path, times: int, seed: int) -> list[tuple[Path, int, int]]:
    """(file, offset, what to xor with): half of them anywhere in the bytes, half of them in any
    file, so that small files and ends of files are met too."""
    chance = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    out = []
    for number in range(times):
        path = chance.choice(files) if number % 2 else chance.choices(files, sizes)[0]
        out.append((path, chance.randrange(path.stat().st_size), chance.randrange(1, 256)))
    return out


def loads(folder: Path, tensor: int) -> bool:
    """Whether every byte that is read passes."""
    try:
        model = folders.read_folder(folder)
        config = folders.with_dtype(model.config, model.stored_dtype)
        table = WeightTable(config, Plan(mesh=make_mesh(tensor=tensor)).fit(config))
        load.load(table, model.family, load.open_source(folder, "full"))
    except CheckpointError:
        return False
    return True


def corrupt(folder: Path, times: int, seed: int = 0, quiet: bool = False, tensor: int = 4) -> dict:
    """Change, look, change back; raises AssertionError for a change that was not found."""
    assert loads(folder, tensor) and not verify(folder)["problems"]
    data = 0
    for path, offset, flip in tqdm(
        places(folder, times, seed), desc="corruptions", disable=quiet, leave=False
    ):
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ flip]))
        try:
            problems = verify(folder)["problems"]
            name = str(path.relative_to(folder))
            assert any(name in problem for problem in problems), (name, offset, problems)
            assert not loads(folder, tensor), (name, offset)
        finally:
            with open(path, "r+b") as file:
                file.seek(offset)
                file.write(bytes([byte]))
        data += "/c/" in name
    assert not verify(folder)["problems"]
    return {"corruptions": times, "in_data": data, "in_metadata": times - data, "found": times}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    env.start(devices=8)
    with tempfile.TemporaryDirectory() as folder:
        convert(folders.bundled(), Path(folder) / "m")
        print(json.dumps(corrupt(Path(folder) / "m", args.times, args.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
