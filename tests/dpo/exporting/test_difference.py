"""dpo.exporting.difference: against torch's own SVD in float64."""

import pytest
import torch

from dpo.exporting.difference import decompose, rounding

SHAPES = [(6, 9), (12, 5), (7, 7), (8, 3, 3, 3), (3, 8, 1, 1), (1, 4)]


def change(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_rebuilds_every_weight(shape):
    wide = change(shape)
    found = decompose(wide)
    rebuilt = (found.directions @ found.rows).T if found.turned else found.directions @ found.rows
    assert (rebuilt - wide.flatten(1)).norm() < 1e-14 * wide.norm()
    down, up = found.factors(len(found.energies))
    assert down.dtype == torch.float32 and down.shape == (up.shape[1], wide.flatten(1).shape[1])
    assert (up.double() @ down.double() - wide.flatten(1)).norm() < 2e-7 * wide.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_at_a_rank_is_the_root_of_the_discarded_squares(shape):
    wide = change(shape, 1)
    values = torch.linalg.svdvals(wide.flatten(1))
    found = decompose(wide)
    assert torch.allclose(found.energies.sqrt(), values, rtol=1e-12)
    for rank in range(1, len(values) + 1):
        rows = found.rows[:rank]
        product = found.directions[:, :rank] @ rows
        error = ((product.T if found.turned else product) - wide.flatten(1)).norm()
        assert error == pytest.approx(float(values[rank:].square().sum().sqrt()), abs=1e-15)
        assert 1 - found.kept(rank) == pytest.approx(float((error / wide.norm()) ** 2), abs=1e-14)


def test_a_product_has_its_own_rank_and_is_not_clamped():
    generator = torch.Generator().manual_seed(2)
    up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 4), (4, 60)))
    up[0] *= 1000  # a clamp at a quantile would cut these
    found = decompose(up @ down)
    assert len(found.energies) == 4 and found.rank_of(1 - 1e-12) == 4
    assert (found.directions @ found.rows - up @ down).norm() < 1e-13 * (up @ down).norm()


def test_the_least_rank_that_keeps_a_share():
    found = decompose(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])))  # squares 9, 4, 1 of 14
    assert [found.rank_of(share) for share in (0.5, 9 / 14 - 1e-9, 0.65, 13 / 14 + 1e-9, 1.0)] == [1, 1, 2, 3, 3]
    assert found.kept(2) == pytest.approx(13 / 14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_that_is_expected_is_the_one_that_is_found(dtype):
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.02
    found = float((weight.to(dtype).double() - weight).square().sum())
    assert rounding(weight, dtype) == pytest.approx(found, rel=0.02)
