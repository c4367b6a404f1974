"""`surgeon validate`: forms of a model side by side, their files against what was recorded of them."""
