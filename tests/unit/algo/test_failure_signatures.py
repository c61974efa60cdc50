"""Named failures from histories: the shapes that were measured on collapsing and on sound runs."""

import math
from typing import Any

import pytest

from megatron_vcppo.algo.failure_signatures import SIGNS, diagnose, sign_scores, warned_before, warnings_of


def _history(**series: list[Any]) -> list[dict[str, float]]:
    """One row per iteration; ``__`` stands for the slash of a metric's name."""
    count = max(map(len, series.values()))
    return [
        {"iteration": i, **{name.replace("__", "/"): s[i] for name, s in series.items() if i < len(s)}}
        for i in range(count)
    ]


def _states(history: list[dict[str, float]], worst_reward: float | None = -1.0) -> dict[str, str]:
    findings = diagnose(history, worst_reward)
    assert [f.signature for f in findings] == [
        "length_collapse",
        "value_misalignment",
        "reward_decay",
        "value_loss_oscillation",
        "truncation",
    ]
    for finding in findings:
        assert bool(finding.advice) == (finding.state == "found")
        assert finding.evidence
    return {f.signature: f.state for f in findings}


def test_a_collapsing_run_is_named_with_its_numbers():
    lengths = [92.0, 90.0, 74.0, 51.0, 30.0, 18.0, 10.0, 6.0, 5.0, 5.0]
    history = _history(
        rollout__length_mean=lengths,
        rollout__truncated_share=[0.0] * 10,
        critic__explained_variance=[-0.08] * 10,
        critic__value_first_token=[-2.65] * 10,
        critic__value_loss=[1.0 - 0.05 * i for i in range(10)],
        critic__terminal_share_first_token=[0.95**n for n in (91, 89, 73, 50, 29, 17, 9, 5, 4, 4)],
        actor__advantage_early_late_gap=[-1.58] * 10,
        rollout__reward_std=[0.98] * 10,
        actor__give_up_advantage_sigma=[1.53] * 10,
    )
    states = _states(history)
    assert states["length_collapse"] == "found" and states["value_misalignment"] == "found"
    assert states["value_loss_oscillation"] == "absent" and states["truncation"] == "absent"
    collapse, misalignment = diagnose(history, -1.0)[:2]
    assert "91.0 tokens at the start, lowest 5.0 at iteration 8 (-95%)" in collapse.evidence
    assert misalignment.evidence.count("(bad)") == 3 and "-2.650" in misalignment.evidence


def test_a_sound_run_has_no_findings():
    states = _states(
        _history(
            rollout__length_mean=[92.0, 95.0, 91.0, 99.0, 110.0, 118.0, 125.0, 131.0, 130.0, 132.0],
            rollout__truncated_share=[0.02] * 10,
            critic__explained_variance=[0.23, 0.2, 0.2, 0.18, 0.15, 0.12, 0.1, 0.1, 0.08, 0.06],
            critic__value_first_token=[-0.3] * 10,
            critic__value_loss=[0.41, 0.4, 0.38, 0.41, 0.37, 0.33, 0.35, 0.3, 0.31, 0.28],
            critic__terminal_share_first_token=[1.0] * 10,
            actor__advantage_early_late_gap=[-0.1, 0.05, -0.2, -0.1, 0.1, -0.1, -0.1, 0.0, -0.1, -0.1],
            rollout__reward_std=[0.98] * 10,
            actor__give_up_advantage_sigma=[-1.19] * 10,
        )
    )
    assert set(states.values()) == {"absent"}


@pytest.mark.parametrize(
    ("share", "value", "state"),
    [
        (0.95**1000, -2.0, "found"),
        (0.95**1000, -0.9, "absent"),  # a pretrained critic's
        (1.0, -2.0, "absent"),
        (1.0, math.nan, "absent"),
        (0.95**1000, math.nan, "unknown"),
    ],
)
def test_reward_decay_is_a_target_without_the_outcome_and_a_value_that_shows_it(share, value, state):
    rewards = {"rollout__reward_mean": [-0.2] * 3, "rollout__reward_std": [0.98] * 3}
    history = _history(critic__terminal_share_first_token=[share] * 3, critic__value_first_token=[value] * 3, **rewards)
    assert _states(history)["reward_decay"] == state


@pytest.mark.parametrize(
    ("losses", "state"),
    [
        ([1.0 + 0.8 * (-1) ** i for i in range(12)], "found"),
        ([1.0 + 0.7 * math.sin(i * math.pi / 2 + 0.3) for i in range(16)], "found"),
        ([3.0 * 0.7**i + 0.2 for i in range(12)], "absent"),  # a steep curve that bends once
        ([1.0 + 0.02 * (-1) ** i for i in range(12)], "absent"),  # swings, but small
        ([1.0, 2.0, 1.0], "unknown"),
    ],
)
def test_value_loss_oscillation(losses, state):
    assert _states(_history(critic__value_loss=losses))["value_loss_oscillation"] == state


def test_one_odd_batch_is_not_a_collapse():
    assert _states(_history(rollout__length_mean=[90.0, 92.0, 20.0, 91.0, 93.0]))["length_collapse"] == "absent"


def test_an_early_late_gap_must_keep_its_sign():
    gap = [1.0, -1.2, 1.0, 1.3, 1.1]
    options = {"rollout__reward_std": [1.0] * 5}
    assert _states(_history(actor__advantage_early_late_gap=gap, **options))["value_misalignment"] == "absent"
    gap = [abs(x) for x in gap]
    assert _states(_history(actor__advantage_early_late_gap=gap, **options))["value_misalignment"] == "found"


def test_a_critic_that_starts_wrong_and_learns_fast_is_named():
    """As it was measured: the scatter of three values is their trend."""
    assert _states(_history(critic__explained_variance=[-4.9, -3.1, -2.0]))["value_misalignment"] == "found"
    assert _states(_history(critic__explained_variance=[-4.9, -3.1, 0.1]))["value_misalignment"] == "absent"


def test_truncation():
    assert _states(_history(rollout__truncated_share=[0.1, 0.2, 0.5, 0.6, 0.7, 0.8]))["truncation"] == "found"


def test_missing_or_broken_metrics_are_unknown_not_fine():
    assert set(_states([]).values()) == {"unknown"}
    broken = _history(critic__terminal_share_first_token=[math.nan] * 4, rollout__length_mean=["nan", 3.0, 4.0])
    assert set(_states(broken).values()) == {"unknown"}


def test_a_warning_comes_once_when_its_signature_first_shows():
    lengths = [92.0, 90.0, 85.0, 80.0, 60.0, 40.0, 30.0, 20.0]
    history = _history(rollout__length_mean=lengths, critic__explained_variance=[0.2] * 8)
    known: set[str] = set()
    warned = [warnings_of(history[: i + 1], None, known) for i in range(8)]
    (line,) = [line for lines in warned for line in lines]
    assert line.startswith("length_collapse: mean length: ") and "pretrain the critic" in line
    assert warnings_of([], None, known) == [] and known == {"length_collapse"}


def test_a_resumed_run_does_not_warn_again_of_what_has_passed():
    """The value was impossible at the start and is sound since; then it is impossible again."""
    values = [-1.5, -1.4, *[0.0] * 8, *[-3.0] * 5]
    history = _history(critic__value_first_token=values)
    assert _states(history[:10])["value_misalignment"] == "absent"
    known = warned_before(history[:10], -1.0)
    assert known == {"value_misalignment"}
    assert warnings_of(history, -1.0, known) == []
    assert [line.partition(":")[0] for line in warnings_of(history, -1.0, set())] == ["value_misalignment"]


def test_equal_rewards_leave_no_variance_to_explain():
    equal = _history(critic__explained_variance=[0.0] * 4, rollout__reward_std=[0.0] * 4)
    assert _states(equal)["value_misalignment"] == "unknown"
    varied = _history(critic__explained_variance=[0.0, -0.3, -0.3, -0.31], rollout__reward_std=[0.0, 0.5, 0.5, 0.5])
    assert _states(varied)["value_misalignment"] == "found"


def test_a_critic_that_knows_nothing_is_not_misaligned():
    """Its explained variance scatters around 0, also below it for a while; one that is worse than a constant stays."""
    around_zero = [0.05, 0.02, -0.03, 0.01, -0.06, -0.02, 0.02, -0.04]
    for count in range(1, 9):
        assert _states(_history(critic__explained_variance=around_zero[:count]))["value_misalignment"] != "found"
    below = _history(critic__explained_variance=[-0.30, -0.32, -0.35])
    assert _states(below)["value_misalignment"] == "found"


def test_late_advantages_above_early_ones_are_a_lagging_critic_not_a_misaligned_one():
    lagging = _history(actor__advantage_early_late_gap=[-0.8, -0.7, -0.75], rollout__reward_std=[1.0] * 3)
    assert _states(lagging)["value_misalignment"] == "absent"


def test_an_early_late_gap_is_measured_by_the_reward_not_by_small_advantages():
    """Seen on a sound run: 0.2 of ±1, which is 0.7 of the advantages' own deviation; the paper's failure has 1.0."""
    sound = _history(
        actor__advantage_early_late_gap=[0.19, 0.22, 0.2, 0.21],
        actor__advantage_std=[0.3] * 4,
        rollout__reward_std=[0.95] * 4,
    )
    assert _states(sound)["value_misalignment"] == "absent"
    failing = _history(actor__advantage_early_late_gap=[1.04, 1.0, 1.1], rollout__reward_std=[1.0] * 3)
    assert _states(failing)["value_misalignment"] == "found"


def test_a_few_responses_that_gave_up_are_no_proof():
    """A sound policy gives up rarely: the mean of a few tokens swings."""
    swinging = _history(actor__give_up_advantage_sigma=[-1.0, 2.4, -0.5, 2.0, 1.1])
    assert _states(swinging)["value_misalignment"] == "absent"
    steady = _history(actor__give_up_advantage_sigma=[1.35, 1.37, 1.43])
    assert _states(steady)["value_misalignment"] == "found"


def test_an_impossible_value_is_named_in_the_first_iteration():
    low = _history(critic__value_first_token=[-2.4])
    assert _states(low)["value_misalignment"] == "found" and _states(low, None)["value_misalignment"] == "unknown"


def test_signs_are_what_the_findings_compare():
    """The advantage of giving up: mean 0.32, standard error 0.0116; times 4.303 below it."""
    history = _history(
        actor__give_up_advantage_sigma=[0.30, 0.32, 0.34],
        critic__explained_variance=[-0.30, -0.32, -0.34],
        rollout__length_mean=[90.0, 60.0, 45.0],
    )
    scores, give_up = sign_scores(history, -1.0), 0.32 - 4.303 * 0.02 / math.sqrt(3)
    assert scores == pytest.approx({"give_up": give_up, "unexplained": 0.30, "length_drop": 1 - 52.5 / 75})
    assert set(scores) <= set(SIGNS)


def test_evidence_counts_the_iterations_that_there_are():
    early = _history(critic__value_first_token=[-1.1], rollout__truncated_share=[0.5])
    evidence = [finding.evidence for finding in diagnose(early, -1.0) if finding.state == "found"]
    assert len(evidence) == 2 and all("first iteration" in text for text in evidence)


def _hacking(accuracy: list[float], correlation: float, length_correlation: float, lengths: list[float]) -> str:
    history = _history(
        model_reward__score_mean=[0.1 * i for i in range(10)],
        model_reward__score_std=[0.5] * 10,
        model_reward__verifier_correlation=[correlation] * 10,
        model_reward__length_correlation=[length_correlation] * 10,
        rollout__accuracy=accuracy,
        rollout__length_mean=lengths,
    )
    (finding,) = [finding for finding in diagnose(history) if finding.signature == "reward_hacking"]
    assert bool(finding.advice) == (finding.state == "found")
    return f"{finding.state}: {finding.evidence}"


def test_a_score_that_rises_is_compared_with_accuracy_verdict_and_length():
    rising, falling = [0.3 + 0.04 * i for i in range(10)], [0.6 - 0.04 * i for i in range(10)]
    level, longer = [100.0] * 10, [100.0 + 20 * i for i in range(10)]
    assert _hacking(rising, 0.4, 0.1, level).startswith("absent")
    assert _hacking(rising, 0.4, 0.9, longer).startswith("absent"), "longer and more often right is no hack"
    found = _hacking(falling, 0.4, 0.1, level)
    assert found.startswith("found") and "score +1.00 σ since the start, accuracy 52% → 32% (bad)" in found
    assert _hacking(rising, -0.3, 0.1, level).count("(bad)") == 1
    assert "length 140 → 240 tokens (bad)" in _hacking([0.4] * 10, 0.2, 0.9, longer)


def test_reward_hacking_is_judged_only_with_a_reward_model_and_enough_iterations():
    few = _history(model_reward__score_mean=[0.0, 1.0], rollout__accuracy=[0.5, 0.1], rollout__length_mean=[1.0, 1.0])
    assert [f.state for f in diagnose(few) if f.signature == "reward_hacking"] == ["unknown"]
    assert not [f for f in diagnose(_history(rollout__accuracy=[0.5] * 10)) if f.signature == "reward_hacking"]
