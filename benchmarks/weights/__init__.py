"""Parts of `make bench-weights`: what is compared, where the weights come from, and how a replica gets them."""
