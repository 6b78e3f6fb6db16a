"""Command-line tools for checkpoints. They import tpjax and are never imported by it."""
