"""Text from a model spread over all devices of this machine.

    python examples/generate.py                                  # the bundled model
    python examples/generate.py --model DIR-OR-HUB-ID -tp 8 --prompt "Once upon a time"

The same as `tpjax generate`; `--help` lists the options.
"""

import sys

from tpjax.cli import command

if __name__ == "__main__":
    sys.exit(command(["generate", *sys.argv[1:]]))
