"""What tests share: processes over gloo, small models and steps, states of checkpoints, a cluster of Slurm."""
