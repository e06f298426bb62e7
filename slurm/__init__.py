"""Launch scripts for SLURM, and `testcluster`: a real SLURM on one machine to try them on."""
