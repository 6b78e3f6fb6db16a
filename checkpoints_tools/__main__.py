"""``python -m checkpoints_tools``."""

import sys

from checkpoints_tools.cli import command

sys.exit(command())
