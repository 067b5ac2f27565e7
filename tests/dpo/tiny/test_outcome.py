"""What a run's summary keeps of an evaluation."""

from dpo.tiny.outcome import figures


def entry(scorer, win_rate, before, after):
    paired = {"win_rate": win_rate, "win_interval": (win_rate - 0.1, win_rate + 0.1), "prompts": 7}
    return {"scorer": scorer, "paired": {**paired, "mean_a": before, "mean_b": after}}


def test_the_first_scorer_is_the_judge_and_of_others_the_win_rate_stays():
    found = figures(
        [entry("clip-l14", 0.6, 0.20, 0.25), entry("tiny-b-faithful", 0.5, 0.9, 0.8), entry("pickscore", 0.7, 20, 21)]
    )
    assert (found["win_rate"], found["win_rate_interval"], found["prompts"]) == (0.6, [0.5, 0.7], 7)
    assert (found["score_before"], found["score_after"], found["judge"]) == (0.20, 0.25, "clip-l14")
    assert (found["faithfulness_before"], found["faithfulness_after"]) == (0.9, 0.8)
    assert found["win_rate_by_pickscore"] == 0.7
    assert figures([]) == {}
