"""dpo.methods: one row a method, and all that follows from the row."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dpo import credit, objective
from dpo.methods import METHODS, SHAPES, own_settings, readers
from dpo.schedule import from_scheduler
from dpo.settings.config import specs

ROOT = Path(__file__).parents[2]


def test_the_rows_are_named_as_the_documents_name_them():
    assert list(METHODS) == ["dpo", "discounted", "dde-single", "dde-step", "dde", "sdpo", "kto", "mapo", "sft"]
    assert all(name == method.name for name, method in METHODS.items())
    for document in ("README.md", "docs/method.md"):
        text = (ROOT / document).read_text("utf-8")
        assert [name for name in METHODS if f"`{name}`" not in text] == []
    text = (ROOT / "README.md").read_text("utf-8")
    assert [shape for shape in SHAPES if f"`{shape}`" not in text] == []
    assert f"| {len(METHODS)}, with {len(SHAPES)} pairwise shapes" in text


def test_settings_of_a_row_are_settings():
    assert own_settings() <= set(specs())
    assert readers("weight_cap") == "dde, dde-single" and readers("gamma") == "discounted" and readers("seed") == ""


SD15 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 |= {"prediction_type": "epsilon"}


@pytest.mark.parametrize("method", METHODS)
def test_every_row_has_its_weight_and_correction(method):
    found = credit.tables(method, from_scheduler(SD15))
    assert bool(found.precision.any()) == METHODS[method].correction
    assert bool((found.weight == 1).all()) == (METHODS[method].weight == "uniform")


def test_every_shape_has_its_function_and_begins_as_it_says():
    assert list(objective.SHAPES) == list(SHAPES)
    z, sure = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for name, row in SHAPES.items():
        for alpha in (None,) if row.alpha is None else (None, 0.3):
            start, shape = row.start_of(alpha), objective.with_alpha(objective.SHAPES[name], alpha)
            more = (0 * z,) if shape.sides else ()
            soft = objective.slope(shape, z, 0.8 * sure, *more).abs().item()
            assert soft == pytest.approx(row.start_of(alpha, 0.6).pull, rel=1e-14), "linear in 2 p - 1"
            assert shape.loss(z, 0.8 * sure, *more).item() == pytest.approx(start.loss, rel=1e-14), "whatever p"
            assert shape.loss(z, sure, *more).item() == pytest.approx(start.loss, rel=1e-15)
            assert objective.slope(shape, z, sure, *more).abs().item() == pytest.approx(start.pull, rel=1e-15)


@pytest.mark.long
def test_a_new_row_is_seen_everywhere(tmp_path):
    """A row is all that choices, help, rules, report and card need: no torch, and no other list, knows of methods."""
    code = """
        import sys
        from dpo import methods
        row = methods.Method(
            "mine", "My own method", (methods.Paper("A paper of mine", "2501.00001"),), "single-shot", False, "winner", False,
            frozenset({"gamma"}),
        )
        methods.METHODS["mine"] = row
        from dpo.common.errors import UserError
        from dpo.settings import flags
        from dpo.settings.advice import headline
        from dpo.settings.config import to_toml
        from dpo.settings.resolve import DeviceFacts, ModelFacts, resolve
        text = " ".join(flags.help_text().split())
        assert "|sft|mine" in text and "away from noise (discounted, mine)" in text
        start = ["--model", "m", "--data", "d", "--method", "mine"]
        config, notes = flags.parse([*start, "--gamma", "0.9", "--beta", "5"])
        assert notes == ["--beta has no effect with method mine"], notes
        for flag in (["--loss", "ipo"], ["--sft-weight", "1"], ["--reference", "recorded"]):
            try:
                flags.parse([*start, *flag])
            except UserError as error:
                assert "method mine" in str(error)
            else:
                raise AssertionError(flag)
        config, _ = resolve(flags.parse(start)[0], ModelFacts("sd", "epsilon"), DeviceFacts("cpu"))
        assert config.method.beta == 200 and headline(config).startswith("mine, ") and "beta" not in headline(config)
        assert "torch" not in sys.modules
        from pathlib import Path
        Path("config.toml").write_text(to_toml(config))
        from dpo.pages.card import model_card
        from dpo.pages.folder import read_run
        from dpo.pages.report import render
        card = model_card(read_run("."))
        assert "trained on the preferred images of `d` by My own method" in card and "arXiv:2501.00001" in card
        assert "| gamma | 0.9948 |" in card and "| beta |" not in card and "2311.12908" not in card
        assert "My own method" in render(read_run("."))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_method_of_a_later_version_is_read_as_a_preference_method(tmp_path):
    from dpo.pages.folder import read_run

    (tmp_path / "config.toml").write_text('[method]\nmethod = "of tomorrow"\n')
    run = read_run(tmp_path)
    assert run.method_name == "of tomorrow" and run.pairwise and run.row.papers == METHODS["dpo"].papers
