"""ONNX: a checkpoint, plain or patched, as a bundle of opset-24 graphs whose weights stay where they are."""
