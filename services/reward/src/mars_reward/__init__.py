"""The reward service: scores completions over HTTP and from the queue."""
