"""dpo.correction: the sum C(t), the moving average M, and that the cut into micro-batches is invisible."""

import pytest
import torch

from dpo.correction import WIDEST, CorrectionTable, correction, shared_entries, updated
from dpo.credit import step_precision
from dpo.schedule import from_scheduler, usable_timesteps

T = 1000
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 |= {"num_train_timesteps": 1000, "prediction_type": "epsilon"}


def lam(**options) -> torch.Tensor:
    return step_precision(from_scheduler(SD15, **options))


def fresh(rho: float, pairs: int = T, timesteps: torch.Tensor | None = None) -> CorrectionTable:
    """A table that nothing was gathered for: by default the paper's, with an entry for each timestep."""
    return CorrectionTable.zeros(lam(), rho, torch.arange(T) if timesteps is None else timesteps, pairs)


def drawn(pairs: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(0, T, (pairs,), generator=generator)
    return t, torch.randn(pairs, generator=generator, dtype=torch.float64)


def sums_of(t: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blank = torch.zeros(T, dtype=torch.float64)
    return blank.index_add(0, t, d), blank.index_add(0, t, torch.ones_like(d))


def test_correction_is_the_sum_over_later_steps():
    table = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    precision = lam()
    result = correction(table, precision)
    for t in (0, 1, 500, 998, 999):
        expected = sum(precision[k] * table[k] for k in range(t + 1, T))
        assert result[t].item() == pytest.approx(float(expected), rel=1e-9, abs=1e-15)
    assert result[T - 1] == 0.0 and result.shape == (T,)


def test_a_fresh_table_corrects_nothing():
    assert torch.equal(fresh(0.95).correction(), torch.zeros(T, dtype=torch.float64))


def test_negative_differences_give_a_negative_correction_that_falls_with_t():
    result = correction(torch.full((T,), -0.01, dtype=torch.float64), lam())
    assert (result[:-1] < 0).all() and result[-1] == 0
    assert (result.abs().diff() < 0).all()


def test_window_of_the_last_timestep_has_no_correction():
    table = fresh(0.9)
    for step in range(10):
        d = torch.full((8,), -0.1 * (step + 1), dtype=torch.float64)
        table.gather(*sums_of(torch.full((8,), T - 1), d))
        table.commit()
    assert table.table[T - 1] < 0 and table.table.count_nonzero() == 1
    assert table.correction()[T - 1] == 0.0


def test_turbo_chain_corrects_along_its_own_steps():
    precision = lam(turbo=True)
    table = torch.full((T,), -1.0, dtype=torch.float64)
    result = correction(table, precision)
    assert result[749] == 0.0  # t = 999 is dead and leaves the sum
    torch.testing.assert_close(result[499], -precision[749])
    torch.testing.assert_close(result[249], -precision[749] - precision[499])


def test_update_is_the_moving_average_of_the_means():
    t, d = torch.tensor([3, 3, 3, 7]), torch.tensor([1.0, 2.0, 6.0, -4.0], dtype=torch.float64)
    before = torch.arange(T, dtype=torch.float64)
    after = updated(before, *sums_of(t, d), rho=0.9)
    expected = before.clone()
    expected[3] = 0.9 * 3 + 0.1 * 3.0
    expected[7] = 0.9 * 7 + 0.1 * -4.0
    assert torch.allclose(after, expected, rtol=1e-15)
    assert torch.equal(after[[0, 1, 2, 4, 500, 999]], before[[0, 1, 2, 4, 500, 999]])  # not drawn, not touched


@pytest.mark.parametrize("parts", [2, 8, 32])
def test_cut_into_micro_batches_changes_nothing(parts):
    whole, cut = fresh(0.95), fresh(0.95)
    for step in range(5):
        t, d = drawn(seed=step)
        d = (d * 2**20).round() / 2**20  # so that the sums are exact in any order
        whole.gather(*sums_of(t, d))
        for some_t, some_d in zip(t.chunk(parts), d.chunk(parts), strict=True):
            frozen = cut.correction()
            cut.gather(*sums_of(some_t, some_d))
            assert torch.equal(cut.correction(), frozen)  # read frozen during the step
        whole.commit()
        cut.commit()
    assert torch.equal(whole.table, cut.table) and whole.table.count_nonzero() > 500


def test_order_of_commits_matters_and_order_inside_one_does_not():
    first, second = drawn(seed=1), drawn(seed=2)
    d = torch.ones(1, dtype=torch.float64)

    def run(*batches):
        table = fresh(0.5)
        for batch in batches:
            for part in batch:
                table.gather(*sums_of(*part))
            table.commit()
        return table.table

    one, two = (torch.tensor([5]), 4 * d), (torch.tensor([5]), 8 * d)
    assert run([one], [two])[5] == (0.5 * 0.5 * 4 + 0.5 * 8) / 0.75
    assert run([two], [one])[5] == (0.5 * 0.5 * 8 + 0.5 * 4) / 0.75
    assert run([one, two])[5] == run([two, one])[5] == 6
    torch.testing.assert_close(run([first, second]), run([second, first]), rtol=1e-14, atol=1e-16)


def test_commit_ends_the_step_and_discard_forgets_it():
    table = fresh(0.95)
    t, d = drawn()
    table.gather(*sums_of(t, d))
    table.discard()
    table.commit()
    assert table.table.count_nonzero() == 0
    table.gather(*sums_of(t, d))
    table.commit()
    once = table.table.clone()
    assert table.sums.count_nonzero() == 0 == table.counts.count_nonzero()
    table.commit()  # nothing gathered since
    assert torch.equal(table.table, once) and once.count_nonzero() > 0


@pytest.mark.parametrize(("rho", "left"), [(1.0, 0.0), (0.0, 1.0), (0.95, 1.0)])
def test_the_first_mean_is_taken_whole_but_by_a_table_that_never_moves(rho, left):
    table = fresh(rho)
    table.gather(*sums_of(torch.tensor([400]), torch.tensor([-2.0], dtype=torch.float64)))
    table.commit()
    assert table.table[400].item() == pytest.approx(-2.0 * left, abs=1e-15)


def test_converges_to_a_constant_difference():
    table = fresh(0.95)
    everywhere = torch.arange(T)
    for _ in range(200):
        table.gather(*sums_of(everywhere, torch.full((T,), -0.3, dtype=torch.float64)))
        table.commit()
    torch.testing.assert_close(table.table, torch.full((T,), -0.3, dtype=torch.float64), rtol=1e-4, atol=0)


def test_the_table_is_updated_in_place():
    table = fresh(0.95)
    seen, start = table.average, table.start
    table.gather(*sums_of(*drawn()))
    table.commit()
    assert table.average is seen and seen.count_nonzero() > 0 and table.start is start
    assert table.sums.data_ptr() != table.counts.data_ptr() != seen.data_ptr()


@pytest.mark.long
@pytest.mark.parametrize("pairs", [1, 4, 16, 128, 2048])
def test_small_batches_find_the_differences_too(pairs):
    """2000 updates with a known d(t). With an entry a timestep and no bias correction the table holds 10 % of d at one
    pair an update, 33 % at 4, 80 % at 16."""
    d = -torch.linspace(1.0, 0.1, T, dtype=torch.float64)
    table, generator = fresh(0.95, pairs), torch.Generator().manual_seed(0)
    for _ in range(2000):
        t = torch.randint(0, T, (pairs,), generator=generator)
        table.gather(*sums_of(t, d[t]))
        table.commit()
    assert 0.95 < (table.table.sum() / d.sum()).item() < 1.05
    sums, sizes = (torch.zeros_like(table.average).index_add(0, table.entries, x) for x in (d, torch.ones_like(d)))
    inside = (sums / sizes)[table.entries]  # an entry is flat where d rises along it
    assert (table.table / inside - 1).abs().max() < 0.08
    assert (table.correction()[:900] / correction(d, lam())[:900] - 1).abs().max() < 0.05


def test_what_is_left_of_the_start_is_divided_out_whatever_the_memory_was():
    table = fresh(0.95, 4)
    for update in range(30):
        table.rho = 0.95 if update < 10 else 0.999  # --rho may change on resume
        table.gather(*sums_of(torch.tensor([400, 30]), torch.full((2,), -2.0, dtype=torch.float64)))
        table.commit()
    assert table.table[400].item() == pytest.approx(-2.0, rel=1e-12)
    assert table.table[30] == table.table[49] and table.table[60] == 0.0 == table.table[999]


@pytest.mark.parametrize(
    "pairs, entries", [(1, 20), (20, 20), (21, 21), (100, 100), (999, 999), (1000, 1000), (4096, 1000)]
)
def test_an_entry_is_drawn_about_once_an_update(pairs, entries):
    shared = shared_entries(torch.arange(T), T, pairs)
    sizes = torch.bincount(shared)
    assert len(sizes) == entries and sizes.max() - sizes.min() <= 1 and sizes.max() <= WIDEST
    assert (shared.diff() >= 0).all(), "neighbours share"


def test_only_timesteps_that_are_drawn_share():
    window = torch.arange(200, 330)
    shared = shared_entries(window, T, 2)
    assert shared[window].tolist() == sorted(shared[window].tolist()) and shared[window].max() == 2
    assert (shared[:200] == 3).all() and (shared[330:] == 3).all()
    table = fresh(0.95, 2, window)
    table.gather(*sums_of(torch.tensor([200]), torch.tensor([-1.0], dtype=torch.float64)))
    table.commit()
    assert table.table.nonzero().flatten().tolist() == list(range(200, 244)) and table.size() == (3, 130)

    turbo = from_scheduler(SD15, turbo=True)
    few = usable_timesteps(turbo)
    for pairs in (1, 2, 3, 64):  # far apart: never shared
        shared = shared_entries(few, T, pairs)
        assert shared[few].tolist() == [0, 1, 2] and (shared == 3).sum() == T - 3


def test_a_table_goes_on_from_its_tensors():
    table = fresh(0.95, 8)
    for seed in range(5):
        table.gather(*sums_of(*drawn(8, seed)))
        table.commit()
    other = fresh(0.95, 16).restored({name: value.clone() for name, value in table.tensors().items()})
    for each in (table, other):
        each.gather(*sums_of(*drawn(8, 9)))
        each.commit()
    assert table.tensors().keys() == {"correction", "start", "entries"}
    for name, value in table.tensors().items():
        assert torch.equal(other.tensors()[name], value), name
    assert torch.equal(table.table, other.table)


def test_a_table_of_before_goes_on_as_it_began():
    before = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    table = fresh(0.95, 8).restored({"correction": before})
    assert torch.equal(table.table, before)
    t, d = drawn(8)
    table.gather(*sums_of(t, d))
    table.commit()
    assert torch.equal(table.table, updated(before, *sums_of(t, d), 0.95))
    assert table.tensors().keys() == {"correction"}
