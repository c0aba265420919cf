"""Numerics that stand in for torch's own: attention, linear layers, windows, and logits that are not multiplied out."""
