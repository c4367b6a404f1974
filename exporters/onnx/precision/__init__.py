"""Which precision a graph's operators compute in: the policy of docs/precision.md, and fp16's overflow, measured."""
