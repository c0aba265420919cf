"""Checkpoint files: written atomically, read safely, and translated between published layouts."""
