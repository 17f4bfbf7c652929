"""What this machine has and allows: host memory, GPU, link, bandwidths, and whether the software on it works."""
