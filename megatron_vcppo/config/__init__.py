"""Typed configuration: dataclasses hold every default, YAML and key=value only override. Imports no torch."""

from megatron_vcppo.config.schema import Config, Stage
from megatron_vcppo.config.sections.cluster import ClusterConfig
from megatron_vcppo.config.sections.evaluate import EvaluateConfig, ExportConfig
from megatron_vcppo.config.sections.hardware import HardwareConfig
from megatron_vcppo.config.sections.model import Dtype, LoraConfig, ModelConfig, ParallelConfig
from megatron_vcppo.config.sections.ppo import AdvantageConfig, CriticConfig, PolicyLossConfig, PpoConfig
from megatron_vcppo.config.sections.prompts import PromptsConfig
from megatron_vcppo.config.sections.reward_model import RewardModelConfig
from megatron_vcppo.config.sections.rewards import CodeRewardConfig, Isolation, ModelRewardConfig, RewardsConfig
from megatron_vcppo.config.sections.rollout import EngineConfig, RolloutConfig, WeightSyncConfig
from megatron_vcppo.config.sections.run import RunConfig
from megatron_vcppo.config.sections.sft import SftConfig
from megatron_vcppo.config.sections.training import (
    CheckpointConfig,
    KeepBestConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from megatron_vcppo.config.sections.value_pretrain import ValuePretrainConfig
from megatron_vcppo.config.sections.values import ReturnsConfig, ValuesConfig

__all__ = [
    "AdvantageConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CodeRewardConfig",
    "Config",
    "CriticConfig",
    "Dtype",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "HardwareConfig",
    "Isolation",
    "KeepBestConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelRewardConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolicyLossConfig",
    "PpoConfig",
    "PromptsConfig",
    "ReturnsConfig",
    "RewardModelConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "ScheduleConfig",
    "SftConfig",
    "Stage",
    "ValuePretrainConfig",
    "ValuesConfig",
    "WeightSyncConfig",
]
