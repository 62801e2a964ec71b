"""What can be asked for: strict, frozen config sections, the files that fill them, and the errors of bad ones. No JAX."""
