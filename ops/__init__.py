"""Building blocks below the networks: attention, windows, a memory-saving MLP, and cross-entropy of factored logits."""
