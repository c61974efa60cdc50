"""The whole configuration: the chain, and one section per file of ``sections/``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_vcppo.config.sections.cluster import ClusterConfig
from megatron_vcppo.config.sections.evaluate import EvaluateConfig, ExportConfig
from megatron_vcppo.config.sections.hardware import HardwareConfig
from megatron_vcppo.config.sections.model import ModelConfig, ParallelConfig
from megatron_vcppo.config.sections.ppo import PpoConfig
from megatron_vcppo.config.sections.prompts import PromptsConfig
from megatron_vcppo.config.sections.reward_model import RewardModelConfig
from megatron_vcppo.config.sections.rewards import RewardsConfig
from megatron_vcppo.config.sections.rollout import RolloutConfig, WeightSyncConfig
from megatron_vcppo.config.sections.run import RunConfig
from megatron_vcppo.config.sections.sft import SftConfig
from megatron_vcppo.config.sections.value_pretrain import ValuePretrainConfig
from megatron_vcppo.config.sections.values import ReturnsConfig, ValuesConfig

Stage = Literal["sft", "reward_model", "value_pretrain", "ppo", "evaluate", "export"]


@dataclass
class Config:
    """The whole configuration. ``stages`` is the chain; each stage's settings are in its section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    stages: list[Stage] = field(default_factory=lambda: ["sft", "export"])
    """The chain, in order."""
    sft: SftConfig = field(default_factory=SftConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    returns: ReturnsConfig = field(default_factory=ReturnsConfig)
    values: ValuesConfig = field(default_factory=ValuesConfig)
    value_pretrain: ValuePretrainConfig = field(default_factory=ValuePretrainConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    overrides: dict[str, Any] = field(default_factory=dict)
    """stage: its own values of keys in parallel and of those in cluster that say which nodes it gets, such as {sft:
    {parallel: {tp: 1}, cluster: {trainer_nodes: 2, rollout_nodes: 0}}}."""
