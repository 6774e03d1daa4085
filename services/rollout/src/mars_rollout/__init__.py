"""Rollout replicas: whole groups of completions from one policy version, sampled by vLLM."""
