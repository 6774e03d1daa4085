"""The seam to the inference engine, and vLLM behind it."""
