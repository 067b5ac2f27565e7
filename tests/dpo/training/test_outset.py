"""dpo.training.outset: the loss and the pull that a run's labels give before the first update, and what cannot follow them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.settings.flags import parse
from dpo.training.outset import check_target, start_of
from tests.help.running import advance, make_run
from tests.help.worlds import make_labelled, make_table


def outset(prob, *flags):
    config, _ = parse(["--model", "m", "--data", "d", "--output", "o", *flags])
    return config, SimpleNamespace(prob=np.array(prob, dtype=np.float32), sides=2)


SOFT = [1.0, 0.75, 0.5, 0.875]  # |2 p - 1| of those that are no ties: 1, 1/2, 3/4


@pytest.mark.parametrize(("flags", "prob", "loss", "pull"), [
    ((), [1, 1], math.log(2), 0.5),
    ((), SOFT, math.log(2), 0.375),
    (("--label-smoothing", "0.125"), SOFT, math.log(2), 0.5 * 2 / 3),  # soft labels keep theirs
    (("--loss", "smpo"), SOFT, math.log(2), 3.75),
    (("--loss", "hinge"), SOFT, 1.0, 0.75),
    (("--loss", "poly", "--loss-alpha", "2"), SOFT, math.log(2) + 1, 0.75),
    (("--loss", "apo-zero"), SOFT, 1.0, 0.1875),
    (("--loss", "ipo", "--sft-weight", "0.1"), SOFT, None, 0.75),  # the error is in the loss too
    (("--method", "kto"), SOFT, 0.5, 0.125 * 0.75),
    (("--method", "kto", "--kto-liked-weight", "2", "--kto-disliked-weight", "0.5"), [1, 1], 0.625, 0.15625),
    ((), [0.5], math.log(2), 0.0),  # ties alone
])  # fmt: skip
def test_the_start_of_pairs(flags, prob, loss, pull):
    found = start_of(*outset(prob, *flags))
    assert found == (loss if loss is None else pytest.approx(loss, rel=1e-12), pytest.approx(pull, rel=1e-12))


def test_the_start_of_images_alone():
    """w / 4 |p liked - (1 - p) disliked| each, and w / 2 of the loss."""
    config, source = outset([1, 1, 0, 1], "--method", "kto")
    source.sides = 1
    assert start_of(config, source) == (0.5, 0.25)
    flags = ("--kto-liked-weight", "2", "--kto-disliked-weight", "1", "--label-smoothing", "0.25")
    config, source = outset([1, 1, 0, 1], "--method", "kto", *flags)
    source.sides = 1
    liked, disliked = 0.75 * 2 - 0.25 * 1, 0.75 * 1 - 0.25 * 2
    found = start_of(config, source)
    assert found.pull == pytest.approx((3 * liked + disliked) / 16)
    assert found.loss == pytest.approx((3 * (1.5 + 0.25) + (0.75 + 0.5)) / 8)


@pytest.mark.parametrize("method", ["sft", "mapo"])
def test_without_a_reference_there_is_none(method):
    assert start_of(*outset([1, 1], "--method", method)) is None


def test_a_target_that_is_not_below_the_labels_own_pull_is_refused():
    flags = ("--target-gradient-factor", "0.2")
    with pytest.raises(UserError) as caught:
        check_target(*outset([0.6, 0.7, 0.5], *flags))
    said = str(caught.value)
    assert "--target-gradient-factor 0.2 is not below 0.15" in said and "\n" not in said and "such as 0.06" in said
    for prob in ([1, 1], [0.75, 0.85], [0.5]):
        check_target(*outset(prob, *flags))
    check_target(*outset([0.6, 0.7]))
    with pytest.raises(UserError, match="is not below 0.2,"):
        check_target(*outset([1.0], *flags, "--label-smoothing", "0.3"))


def soft_table(folder):
    """Twelve pairs, each with a probability of its own."""
    table = make_table(folder, 12)
    rows = [json.loads(row) for row in table.read_text("utf-8").splitlines()]
    table.write_text("\n".join(json.dumps(row | {"p": 0.5 + i / 24}) for i, row in enumerate(rows, 1)), "utf-8")
    return str(table)


KTO = ("--method", "kto", "--kto-liked-weight", "3", "--label-smoothing", "0.2")


@pytest.mark.long
@pytest.mark.parametrize(("flags", "images"), [
    (("--loss", "smpo"), False), (("--label-smoothing", "0.2"), False), (("--loss", "apo-zero"), False), (KTO, False), (KTO, True),
])  # fmt: skip
def test_the_first_update_has_this_loss_and_pull(world, tmp_path, flags, images):
    data = str(make_labelled(tmp_path / "images", 12)) if images else soft_table(tmp_path / "pairs")
    run = make_run(world("sd15"), data, tmp_path / "run", *flags, "--batch-size", "12", "--precision", "fp64")
    (first,) = advance(run, 1)
    found = start_of(run.config, run.source)
    assert first["pairs"] == 12 and found == pytest.approx((first["loss"], first["gradient_factor"]), rel=1e-7)
