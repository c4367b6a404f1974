"""Translation validation: proof that a later form of a model computes what an earlier one did."""
