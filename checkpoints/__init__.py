"""Checkpoint files: written whole or not at all, read safely, and translated between published layouts."""
