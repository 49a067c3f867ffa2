"""Techniques of training that any diffusion transformer can switch on, each by one config key; one file each."""
