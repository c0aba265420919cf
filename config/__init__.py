"""Configuration: the YACS schema, yaml files with their bases and overrides, and the command line's shared flags."""

from config.loading import load_config as load_config
