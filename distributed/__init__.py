"""Distributed training: launchers, collectives, DDP and FSDP."""
