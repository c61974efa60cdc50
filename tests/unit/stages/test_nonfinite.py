"""Updates that were skipped because something was not finite."""

from megatron_vcppo.stages.loop import NonfiniteUpdates


def test_skipped_updates_are_counted_for_each_model_alone() -> None:
    skips = NonfiniteUpdates(limit=3)
    assert skips.count({"actor": [False, False], "critic": [False]}) == "" and not skips.too_many
    text = skips.count({"critic": [False, False], "actor": [False, True]})
    assert text == "skipped 1 of 2 updates of the actor (1 in a row): loss or gradient was not finite"
    again = NonfiniteUpdates(3, dict(skips.in_a_row))  # as after a resume
    again.count({"critic": [False, False], "actor": [True, True]})
    assert again.too_many
    assert "3 updates of the actor in a row" in str(again.error("ppo", 7)) and "iteration 7" in str(
        again.error("ppo", 7)
    )
    again.count({"actor": [False]})
    assert not again.too_many
