"""Takes jobs from the store and works them, one at a time."""
