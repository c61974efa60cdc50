"""Where and when a run happens: the controller of one stage, local and Slurm chains, the one-machine test cluster."""
