"""What can be asked for: strict, frozen config sections, the files that fill them, messages for bad ones. No JAX."""
