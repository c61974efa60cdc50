"""What starts and watches the processes of a stage, with or without Slurm."""
