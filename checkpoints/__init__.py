"""Checkpoint files.

`serialization` reads and writes them safely, `layouts` finds the network in a published file and translates its names, `loading`
loads it into a network, and `files` and `locks` write any file atomically and keep a folder for one run.
"""
