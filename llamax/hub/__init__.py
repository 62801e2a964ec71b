"""Hugging Face checkpoints in and out: files, names, layouts, configs."""
