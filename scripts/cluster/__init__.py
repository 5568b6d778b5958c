"""Many GPUs: a plan of memory and seconds, and launchers for several nodes."""
