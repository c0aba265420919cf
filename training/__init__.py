"""The training loop and its parts: step, engine, optimizer, checkpointing, logs and monitors."""
