"""Pure reward functions, one scorer a file; the registry says which recipe uses which."""
