"""Specs: what to train. ``model`` holds the domain objects, ``document`` reads and checks what users write."""
