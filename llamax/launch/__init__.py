"""Handing a sweep's cells to workers elsewhere. A launcher is one file of `on/`; this folder has what they share."""
