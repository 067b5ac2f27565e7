"""dpo.correction: the sum C(t), the moving average M, and that the cut into micro-batches is invisible."""

import pytest
import torch

from dpo.correction import CorrectionTable, correction, updated
from dpo.credit import step_precision
from dpo.schedule import from_scheduler

T = 1000
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def lam(**options) -> torch.Tensor:
    return step_precision(from_scheduler(SD15, **options))


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
    assert torch.equal(CorrectionTable.zeros(lam(), 0.95).correction(), torch.zeros(T, dtype=torch.float64))


def test_negative_differences_give_a_negative_correction_that_falls_with_t():
    result = correction(torch.full((T,), -0.01, dtype=torch.float64), lam())
    assert (result[:-1] < 0).all() and result[-1] == 0
    assert (result.abs().diff() < 0).all()


def test_window_of_the_last_timestep_has_no_correction():
    table = CorrectionTable.zeros(lam(), 0.9)
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
    whole, cut = CorrectionTable.zeros(lam(), 0.95), CorrectionTable.zeros(lam(), 0.95)
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
        table = CorrectionTable.zeros(lam(), 0.5)
        for batch in batches:
            for part in batch:
                table.gather(*sums_of(*part))
            table.commit()
        return table.table

    one, two = (torch.tensor([5]), 4 * d), (torch.tensor([5]), 8 * d)
    assert run([one], [two])[5] == 0.5 * 0.5 * 4 + 0.5 * 8
    assert run([two], [one])[5] == 0.5 * 0.5 * 8 + 0.5 * 4
    assert run([one, two])[5] == run([two, one])[5] == 0.5 * 6
    torch.testing.assert_close(run([first, second]), run([second, first]), rtol=1e-14, atol=1e-16)


def test_commit_ends_the_step_and_discard_forgets_it():
    table = CorrectionTable.zeros(lam(), 0.95)
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


@pytest.mark.parametrize(("rho", "left"), [(1.0, 0.0), (0.0, 1.0), (0.95, 0.05)])
def test_memory(rho, left):
    table = CorrectionTable.zeros(lam(), rho)
    table.gather(*sums_of(torch.tensor([400]), torch.tensor([-2.0], dtype=torch.float64)))
    table.commit()
    assert table.table[400].item() == pytest.approx(-2.0 * left, abs=1e-15)


def test_converges_to_a_constant_difference():
    table = CorrectionTable.zeros(lam(), 0.95)
    everywhere = torch.arange(T)
    for _ in range(200):
        table.gather(*sums_of(everywhere, torch.full((T,), -0.3, dtype=torch.float64)))
        table.commit()
    torch.testing.assert_close(table.table, torch.full((T,), -0.3, dtype=torch.float64), rtol=1e-4, atol=0)


def test_the_table_is_updated_in_place():
    table = CorrectionTable.zeros(lam(), 0.95)
    seen = table.table
    table.gather(*sums_of(*drawn()))
    table.commit()
    assert table.table is seen and seen.count_nonzero() > 0
    assert table.sums.data_ptr() != table.counts.data_ptr() != table.table.data_ptr()
