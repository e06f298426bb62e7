"""A config becomes an sbatch call."""
