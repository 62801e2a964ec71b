"""The model: components and the one Transformer built from them."""
