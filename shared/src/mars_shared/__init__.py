"""Contracts, queue, blobs, weights and command line that the services share."""
