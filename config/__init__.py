"""Configuration: schema and loading of yaml files, and flags shared by the scripts."""

from config.loading import load_config as load_config
