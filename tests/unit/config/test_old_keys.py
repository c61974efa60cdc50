"""Keys of earlier versions: stored configurations and users' files keep loading."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config.keys import REMOVED, RENAMED, all_keys, with_new_names
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.validation import leaves
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.sweep_points import points
from megatron_vcppo.report.run_data import read_config, worst_reward

VALUES = {
    "ppo.skip_limit": 3,
    "ppo.advantage.gamma": 0.5,
    "ppo.advantage.overlong_penalty_tokens": 7,
    "ppo.advantage.overlong_filter": True,
    "ppo.critic.bounds": [-2.0, 2.0],
    "ppo.critic.huber_delta": 0.25,
    "reward_model.cut_share": 0.5,
}


def test_the_table_leads_from_keys_that_are_gone_to_keys_that_are_there() -> None:
    assert not set(RENAMED) & set(all_keys()) and not set(REMOVED) & set(all_keys())
    assert set(RENAMED.values()) <= set(all_keys())


@pytest.mark.parametrize("old", RENAMED)
def test_a_value_under_an_old_name_is_taken_and_the_new_name_is_noted(old: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    notes: list[str] = []
    section, _, key = old.rpartition(".")
    text = f"{key}: {VALUES[old]}"
    for part in reversed(section.split(".")):
        text = f"{part}:\n" + "\n".join(f"  {line}" for line in text.splitlines())
    file.write_text(text)
    config = load_config(file, complete=False, note=notes.append)
    assert dict(leaves(config))[RENAMED[old]] == VALUES[old]
    assert notes == [f"note: {file}:{len(text.splitlines())}: {old} is now called {RENAMED[old]}"]
    file.write_text("")
    by_override = load_config(file, [f"{old}={VALUES[old]}"], complete=False, note=notes.append)
    assert by_override == config and notes[1:] == [f"note: command line: {old} is now called {RENAMED[old]}"]


def test_one_key_under_both_names_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text in ("run:\n  skip_limit: 3\nppo:\n  skip_limit: 4", "ppo:\n  skip_limit: 4\nrun:\n  skip_limit: 3"):
        file.write_text(text)
        line = text.splitlines().index("  skip_limit: 4") + 1
        with pytest.raises(UserError) as failure:
            load_config(file, complete=False)
        expected = f"{file}:{line}: ppo.skip_limit is the old name of run.skip_limit, which is also set: remove one"
        assert str(failure.value) == expected


def test_a_resume_may_change_what_a_stored_configuration_has_under_an_old_name(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("ppo: {skip_limit: 4}")
    assert load_config(file, ["run.skip_limit=9"], complete=False).run.skip_limit == 9


def test_other_keys_may_refer_to_an_old_name(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("ppo: {skip_limit: 4}\nvalue_pretrain: {stable_window: '${ppo.skip_limit}'}")
    assert load_config(file, complete=False).value_pretrain.stable_window == 4


def test_a_range_of_an_old_name_is_reported_where_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("ppo:\n  skip_limit: 0")
    with pytest.raises(UserError, match=r"c\.yaml:2: run\.skip_limit must be in \[1, inf\), got 0"):
        load_config(file, complete=False)


def test_what_a_stored_configuration_holds_of_removed_keys_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("rollout: {interface: lo}\nrun: {check_numerics: false}")
    load_config(file, complete=False)
    file.write_text("rollout:\n  interface: ib0")
    with pytest.raises(UserError, match=r"c\.yaml:2: rollout\.interface is no longer a key: engines use cluster\.net"):
        load_config(file, complete=False)


def test_a_sweep_may_vary_a_list_under_its_old_name() -> None:
    made, fixed = points(["ppo.critic.bounds=[[-1.0, 1.0], [-2.0, 2.0]]"])
    assert [point.overrides for point in made] == [
        ("ppo.critic.bounds=[-1.0, 1.0]",),
        ("ppo.critic.bounds=[-2.0, 2.0]",),
    ]
    assert not fixed


def test_a_report_reads_stored_values_under_the_present_names(tmp_path: Path) -> None:
    stored: dict[str, Any] = {"run": {"check_numerics": True, "seed": 1}}
    stored["ppo"] = {"skip_limit": 4, "critic": {"bounds": [0, 1]}}
    assert with_new_names(stored) == {
        "run": {"seed": 1, "skip_limit": 4},
        "ppo": {"critic": {}},
        "values": {"bounds": [0, 1]},
    }
    assert stored["ppo"]["skip_limit"] == 4, "the argument is left as it is"
    assert with_new_names({"ppo": None, "stages": []}) == {"ppo": None, "stages": []}
    for text in ("ppo: {advantage: {overlong_penalty_tokens: 4}}", "returns: {overlong_penalty_tokens: 4}"):
        (tmp_path / "config.yaml").write_text(text)
        assert worst_reward(read_config(tmp_path)) == -2.0
    (tmp_path / "config.yaml").write_text("ppo: {}")
    assert worst_reward(read_config(tmp_path)) == -1.0
    model = "path: x, weight: 2.0, verifier_weight: 0.5"
    for clip, worst in (("5.0", -10.5), ("null", None)):
        (tmp_path / "config.yaml").write_text(f"rewards: {{model: {{{model}, clip: {clip}}}}}")
        assert worst_reward(read_config(tmp_path)) == worst
