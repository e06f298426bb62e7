"""A real SLURM of two nodes on one machine: see `cluster.TestCluster`."""
