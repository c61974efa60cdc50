"""Value-Calibrated PPO for long chain-of-thought models: Megatron-Core training, vLLM rollouts, Slurm chains."""

__version__ = "0.1.0"
