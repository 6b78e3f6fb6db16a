"""Where tools for checkpoints belong: they import tpjax and are never imported by it. None yet."""
