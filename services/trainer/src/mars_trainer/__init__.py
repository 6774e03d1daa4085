"""The trainer service: dispatch, learning, datasets and the tiny policy."""
