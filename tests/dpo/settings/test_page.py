"""docs/settings.md says what the declarations say."""

from pathlib import Path

from dpo.settings.config import specs
from dpo.settings.flags import presets
from dpo.settings.page import settings_page

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def test_the_page_is_that_of_the_declarations():
    assert PAGE.read_text(encoding="utf-8") == settings_page(), "python -m dpo.settings.page > docs/settings.md"


def test_every_setting_and_preset_has_one_row_of_its_table():
    lines = settings_page().splitlines()
    for name in (*specs(), *presets()):
        (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        cells = row.replace("\\|", "").count("|") - 1
        assert cells == (5 if name in specs() else 2), row
