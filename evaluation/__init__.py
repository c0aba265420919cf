"""Evaluation of frozen and fine-tuned features: extraction, k-NN, linear probe, fine-tuning, segmentation, result files."""
