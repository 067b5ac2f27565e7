"""What the command prints."""

import pytest

from dpo.planning import fitting, page
from dpo.planning.asked import Asked
from dpo.planning.cuda import room
from dpo.planning.work import Pairs
from dpo.settings.config import change
from tests.dpo.planning.test_fitting import dry
from tests.dpo.planning.test_work import CONFIG, plan


def lines(**asked) -> str:
    return "\n".join(page.page(plan(**asked), Asked(**asked)))


def test_a_plan_says_each_part():
    text = lines(gpu="H100", price=2.0, mfu=0.5)
    for words in ("4 pairs x 8 passes = 32 pairs an update", "1,000 in the denoiser, 900 trained", "7.00 TFLOP a pair"):
        assert words in text
    assert "policy, recomputed" in text and "not measured" in text and "estimate" in text
    assert "12 GB yes" in text and "70.7 pairs/s" in text and "10 updates (320 pairs) take 4.53 s and cost 0.00" in text


@pytest.mark.parametrize(
    ("changes", "processes", "said"),
    [
        ({"sharding": "on"}, 1, "--sharding on has no effect on one process: give --processes"),
        ({"sharding": "on"}, 4, "of each of 4 processes, which hold the weights in shards; not measured"),
        ({"cuda_graph": True}, 1, "--cuda-graph is not counted"),
        ({"compile": True}, 1, "--compile is not counted"),
        ({}, 4, None),
    ],
)
def test_what_the_memory_leaves_out_is_said(changes, processes, said):
    found = plan(change(CONFIG, **changes), processes=processes)
    lines = [line.strip() for line in page.page(found, Asked(processes=processes))]
    told = [line for line in lines if "is not counted" in line or "sharding" in line or "shards" in line]
    assert len(told) == (said is not None) and all(line.startswith(said) for line in told)


@pytest.mark.parametrize(
    ("changes", "pairs", "said"),
    [
        ({}, None, "10 updates; give --pairs for the number of epochs"),
        ({"data": "a/typo"}, None, "10 updates; a/typo is not on this machine: give --pairs for the number of epochs"),
        ({"steps": None, "epochs": 2.0}, None, "2 epochs; give --pairs for the number of updates"),
        ({}, Pairs(90, 80), "10 updates = 4 epochs of 80 pairs, and 10 are held out"),
        ({"steps": 1000}, Pairs(150, 150), "1,000 updates = 213 epochs of 150 pairs"),
        ({"steps": 1}, Pairs(32, 32), "1 update = 1 epoch of 32 pairs"),
        ({"steps": 1}, Pairs(2000, 2000), "1 update = 0.016 epochs of 2,000 pairs"),
    ],
)
def test_the_length_is_said_in_updates_and_epochs(changes, pairs, said):
    found = plan(change(CONFIG, **changes), pairs)
    assert f"length       {said}" in page.page(found, Asked())


def test_hours_say_how_many_pairs_are_encoded():
    found = plan(change(CONFIG, keep_encoded="on"), Pairs(100, 100), gpu="H100")
    assert "(320 pairs, 100 of them encoded where memory keeps the set) take" in "\n".join(
        page.page(found, Asked(gpu="H100"))
    )


def test_without_a_gpu_it_says_what_hours_need():
    assert "name the --gpu, or a run that was --measured" in lines()
    text = "\n".join(page.page(plan(change(CONFIG, steps=None, epochs=1.0), gpu="H100"), Asked(gpu="H100")))
    assert "give --pairs" in text


def test_costs_count_every_gpu():
    one, two = (plan(gpu="H100", price=100000.0, processes=n) for n in (1, 2))
    cost = [
        float(next(line for line in page.page(found, Asked(gpu="H100", price=100000.0, processes=n)) if " cost " in line)
        .split(" cost ")[1].split()[0].replace(",", ""))
        for n, found in ((1, one), (2, two))
    ]  # fmt: skip
    assert cost[0] > 0 and abs(cost[1] - 2 * cost[0]) < 1  # twice the pairs an update, on twice the GPUs


def test_what_fits_is_said_in_flags():
    planned = plan()
    best = fitting.largest(CONFIG, Asked(), dry, room(40), print)
    line = page.largest_line(best, planned, 40)
    assert "--batch-size 16 --accumulation 2 (" in line and line.endswith("GiB; the same 32 pairs an update)")
    assert "GiB, all blocks computed again; the" in page.largest_line(best, planned, 40, auto=True)
    other = fitting.largest(change(CONFIG, batch_size=3), Asked(), dry, room(40), print)
    assert page.largest_line(other, planned, 40).endswith("; another training: 24 pairs an update, not 32)")
    assert page.largest_line(None, planned, 12).endswith("no micro-batch of this update fits 12 GB")
    found = fitting.cheapest(change(CONFIG, reference="copy", batch_size=32), Asked(), dry, room(24), lambda line: None)
    assert any(one.flags in "\n".join(page.cheapest_lines(found, 24)) for one in found.changes)
    assert "no change" in page.cheapest_lines(None, 4)[0]
