"""The order of an epoch: a keyed permutation, in windows of row groups where reading needs it."""

import numpy as np

from dpo.data.order import epoch_order, keyed_share


def test_every_epoch_is_another_permutation_and_the_same_each_time():
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(orders[1], epoch_order(1000, 0, 1))


def test_order_is_uniform():
    """The mean place of each of 20 pairs over 600 epochs is 9.5 with standard error 0.24."""
    places = np.zeros(20)
    for epoch in range(600):
        places += np.argsort(epoch_order(20, 5, epoch))
    assert np.abs(places / 600 - 9.5).max() < 1.0


def test_small_sets():
    assert epoch_order(1, 0, 0).tolist() == [0]
    assert sorted(epoch_order(2, 0, 7)) == [0, 1]


def test_windows_keep_few_groups_open():
    groups = np.repeat(np.arange(200, dtype=np.int32), 50)
    order = epoch_order(len(groups), 3, 2, groups, window=8)
    assert np.array_equal(np.sort(order), np.arange(len(groups)))
    sequence = groups[order]
    first = {g: int(np.argmax(sequence == g)) for g in range(200)}
    last = {g: len(sequence) - 1 - int(np.argmax(sequence[::-1] == g)) for g in range(200)}
    open_at = [sum(first[g] <= place <= last[g] for g in range(200)) for place in range(0, len(sequence), 97)]
    assert max(open_at) <= 9
    # and inside that window rows and groups are well mixed
    assert np.mean([len(set(sequence[i : i + 50])) for i in range(1000, 9000, 500)]) > 6
    assert not np.array_equal(np.unique(sequence[:400]), np.arange(8))


def test_window_of_one_reads_group_after_group():
    groups = np.repeat(np.arange(10), 5)
    sequence = groups[epoch_order(50, 0, 0, groups, window=1)]
    assert (np.diff(sequence) != 0).sum() == 9


def test_keyed_share_depends_on_the_key_alone():
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 20000)
    chosen = keyed_share(keys, 0.1)
    assert abs(chosen.mean() - 0.1) < 0.01
    assert np.array_equal(keyed_share(keys[::-1].copy(), 0.1), chosen[::-1])
    assert (keyed_share(keys, 0.2) >= chosen).all()  # a larger share holds the smaller one
