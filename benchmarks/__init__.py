"""Programs that time and weigh, each printing a ratio against a plain baseline."""
