"""Checkpoints in and out of tpjax: convert, inspect, verify, export. The command is
``tpjax-checkpoint``; each verb is a function of the same name in the module of the same name."""
