"""fp16 graphs without overflow: activations are measured, and computed in fp32 where fp16 cannot hold them."""
