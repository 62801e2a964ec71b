"""Text to ids and back: tokenizers, special tokens, chat templates, infilling. No JAX."""
