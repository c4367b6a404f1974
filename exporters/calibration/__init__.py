"""fp16 graphs made to hold what their model computes: activations measured, and widened where fp16 ends."""
