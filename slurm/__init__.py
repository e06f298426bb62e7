"""Launch scripts for SLURM, and `testcluster`: a real SLURM of two nodes on one machine to try them on."""
