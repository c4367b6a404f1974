"""surgeon: surgery on pretrained vision-language models, proof that it did no damage, and export."""

__version__ = "0.1.0"
