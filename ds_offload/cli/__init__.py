"""The command line `ds-offload`."""
