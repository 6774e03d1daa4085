"""The read-only page of a run: curves, replicas, and every group with all of its sources beside each other."""
