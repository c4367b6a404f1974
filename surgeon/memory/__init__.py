"""The grafts and the patched model. These modules import torch, transformers and each other only: they travel with
every patched checkpoint, so that transformers loads it where this tool is not installed."""
