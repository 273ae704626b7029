"""From bytes to sites: vectorised scanners for each machine, and lazy decoding of single functions."""
