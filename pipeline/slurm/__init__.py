"""SLURM: the sbatch call for a config, and its submission."""
