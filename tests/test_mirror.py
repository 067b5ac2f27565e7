"""The tests mirror the source: dpo/ROOM/FILE.py is tested by tests/dpo/ROOM/test_FILE.py, or this file says where.

What holds for whole runs, across files, stands in tests/runs/; what tests share, in tests/help/.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = [
    path
    for room in ("dpo", "csrc_triton")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.name != "__init__.py"
]

# Files that have no test of their own name, by the test that goes red when they break.
TESTED_BY = {
    "dpo/credit.py": "tests/dpo/test_schedule.py",
    "dpo/training/denoisers.py": "tests/dpo/training/test_build.py",
    "dpo/report.py": "tests/dpo/pages/test_report.py",
    "dpo/step.py": "tests/runs/test_step_zero.py",
    "dpo/train.py": "tests/runs/test_keyed_runs.py",
    "dpo/common/errors.py": "tests/runs/test_bad_input.py",
    "dpo/data/batch.py": "tests/dpo/data/test_loader.py",
    "dpo/data/hub.py": "tests/dpo/data/test_sources.py",
    "dpo/data/pairs.py": "tests/dpo/data/test_sources.py",
    "dpo/data/store/files.py": "tests/dpo/data/store/test_store.py",
    "dpo/data/store/fill.py": "tests/dpo/data/store/test_store.py",
    "dpo/data/store/filling.py": "tests/dpo/data/store/test_store.py",
    "dpo/data/store/known.py": "tests/dpo/data/store/test_store.py",
    "dpo/data/store/recorded.py": "tests/runs/test_recorded.py",
    "dpo/data/store/recording.py": "tests/runs/test_recorded.py",
    "dpo/common/pictures.py": "tests/dpo/drawing/test_images.py",
    "dpo/evaluating/work.py": "tests/dpo/test_evaluate.py",
    "dpo/voting/presets.py": "tests/dpo/voting/test_declare.py",
    "dpo/exporting/adapters.py": "tests/dpo/exporting/test_work.py",
    "dpo/exporting/asked.py": "tests/dpo/test_export.py",
    "dpo/exporting/sources.py": "tests/dpo/exporting/test_extracting.py",
    "dpo/exporting/spec.py": "tests/dpo/exporting/test_work.py",
    "dpo/exporting/table.py": "tests/dpo/exporting/test_extracting.py",
    "dpo/exporting/whole.py": "tests/dpo/exporting/test_work.py",
    "dpo/planning/asked.py": "tests/dpo/planning/test_work.py",
    "dpo/labelling/asked.py": "tests/dpo/test_label.py",
    "dpo/labelling/folder.py": "tests/dpo/test_label.py",
    "dpo/labelling/votes.py": "tests/dpo/test_label.py",
    "dpo/labelling/work.py": "tests/dpo/test_label.py",
    "dpo/labelling/written.py": "tests/dpo/test_label.py",
    "dpo/pairing/asked.py": "tests/dpo/test_pairs.py",
    "dpo/pairing/folder.py": "tests/dpo/test_pairs.py",
    "dpo/pairing/ranked.py": "tests/dpo/pairing/test_rankings.py",
    "dpo/pairing/work.py": "tests/dpo/test_pairs.py",
    "dpo/pairing/written.py": "tests/dpo/test_pairs.py",
    "dpo/sampling/flags.py": "tests/dpo/test_sample.py",
    "dpo/drawing/grid.py": "tests/dpo/drawing/test_draw.py",
    "dpo/models/flux2.py": "tests/dpo/models/test_flux.py",
    "dpo/models/parts.py": "tests/dpo/models/test_load.py",
    "dpo/models/sd.py": "tests/runs/test_parity.py",
    "dpo/models/sdxl.py": "tests/runs/test_parity.py",
    "dpo/pages/charts.py": "tests/dpo/pages/test_plots.py",
    "dpo/pages/vote_tables.py": "tests/dpo/pages/test_votes.py",
    "dpo/scorers/sets.py": "tests/dpo/scorers/test_diversity.py",
    "dpo/settings/fields.py": "tests/dpo/settings/test_config.py",
    "dpo/tiny/judge.py": "tests/dpo/tiny/test_assets.py",
    "dpo/tiny/paths.py": "tests/dpo/tiny/test_assets.py",
    "dpo/tiny/prompts.py": "tests/dpo/tiny/test_assets.py",
    "dpo/tiny/making/detail.py": "tests/dpo/tiny/test_detail.py",
    "dpo/tiny/making/judges.py": "tests/dpo/tiny/test_build.py",
    "dpo/tiny/making/pipeline.py": "tests/dpo/tiny/test_build.py",
    "dpo/tiny/making/text.py": "tests/dpo/tiny/test_build.py",
    "dpo/tiny/making/sprites.py": "tests/dpo/tiny/making/test_scenes.py",
    "dpo/tiny/making/vae.py": "tests/dpo/tiny/test_build.py",
    "dpo/tiny/making/unchanged.py": "tests/dpo/tiny/test_unchanged.py",
    "dpo/training/embedded.py": "tests/dpo/training/test_judging.py",
    "dpo/training/agreement.py": "tests/runs/test_processes.py",
    "dpo/training/parallel.py": "tests/runs/test_processes.py",
    "dpo/training/preparing.py": "tests/runs/test_recorded.py",
    "dpo/training/rescue.py": "tests/runs/test_trouble.py",
    "dpo/training/stored.py": "tests/runs/test_recorded.py",
    "dpo/training/validation.py": "tests/runs/test_recorded.py",
    "csrc_triton/dynamic_map.py": "tests/csrc_triton/test_adamw8bit.py",
    "csrc_triton/elementary.py": "tests/csrc_triton/test_philox.py",
    "csrc_triton/latents.py": "tests/csrc_triton/test_noising.py",
}


def mirror(path: Path) -> Path:
    """Where the test of a source file stands. A kernel's file is tested by the name of its op."""
    stem = path.stem.removesuffix("_kernels") if path.is_relative_to(ROOT / "csrc_triton") else path.stem
    return ROOT / "tests" / path.relative_to(ROOT).with_name(f"test_{stem}.py")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_file_of_the_source_has_its_test():
    missing = [f"{name(path)} wants {name(mirror(path))}" for path in SOURCE if not mirror(path).exists()]
    missing = [line for line in missing if line.split()[0] not in TESTED_BY]
    assert missing == [], "\n".join(
        ["write the test, or say in TESTED_BY which test goes red when the file breaks:", *missing]
    )


def test_the_list_of_tests_elsewhere_is_not_out_of_date():
    gone = [
        f"{file}: {test}" for file, test in TESTED_BY.items() if not ((ROOT / file).exists() and (ROOT / test).exists())
    ]
    assert gone == [], f"a file was moved or renamed; put its line in TESTED_BY right: {gone}"
    own = [name(path) for path in SOURCE if name(path) in TESTED_BY and mirror(path).exists()]
    assert own == [], f"these have tests of their own now; take their lines out of TESTED_BY: {own}"


def test_helpers_lie_in_one_place():
    astray = [
        name(path)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if not path.name.startswith(("test_", "check_", "conftest", "__init__")) and path.parent != ROOT / "tests/help"
    ]
    assert astray == [], f"what tests share belongs in tests/help/: {astray}"


def test_the_docstring_of_the_helpers_lists_them():
    text = ast.get_docstring(ast.parse((ROOT / "tests/help/__init__.py").read_text(encoding="utf-8"))) or ""
    missing = [
        path.name for path in (ROOT / "tests/help").glob("*.py") if path.name not in text and path.name != "__init__.py"
    ]
    assert missing == [], f"say in tests/help/__init__.py what these hold: {missing}"


@pytest.mark.parametrize(
    ("file", "test"),
    [
        ("dpo/models/lora.py", "tests/dpo/models/test_lora.py"),
        ("dpo/data/store/fill.py", "tests/dpo/data/store/test_fill.py"),
        ("csrc_triton/geglu_kernels.py", "tests/csrc_triton/test_geglu.py"),
    ],
)
def test_where_a_mirror_stands(file, test):
    assert name(mirror(ROOT / file)) == test
