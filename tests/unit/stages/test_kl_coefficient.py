"""The price of divergence from the reference."""

from megatron_vcppo.config.rl import PolicyLossConfig
from megatron_vcppo.stages.ppo import KlCoefficient


def test_without_a_target_it_stays() -> None:
    kl = KlCoefficient(PolicyLossConfig(kl_coef=0.2))
    kl.adapt({"actor/kl_ref": 5.0}, num_rollouts=64)
    assert kl.state_dict() == 0.2


def test_it_rises_above_the_target_and_falls_below_it() -> None:
    config = PolicyLossConfig(kl_coef=0.2, kl_target=1.0)
    high, low, unknown = KlCoefficient(config), KlCoefficient(config), KlCoefficient(config)
    high.adapt({"actor/kl_ref": 3.0}, num_rollouts=64)
    low.adapt({"actor/kl_ref": 0.1}, num_rollouts=64)
    unknown.adapt({}, num_rollouts=64)
    assert high.value > 0.2 > low.value and unknown.value == 0.2


def test_a_resume_continues_with_the_coefficient_of_the_checkpoint() -> None:
    config = PolicyLossConfig(kl_coef=0.2, kl_target=1.0)
    kl, resumed = KlCoefficient(config), KlCoefficient(config)
    kl.adapt({"actor/kl_ref": 3.0}, num_rollouts=64)
    resumed.load_state_dict(kl.state_dict())
    assert resumed.value == kl.value
