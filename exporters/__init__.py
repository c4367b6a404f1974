"""Backends: what a (patched) checkpoint is turned into so that it runs elsewhere."""
