"""docs/settings.md: every setting with its default, what it takes, and whether it may change on resume.

python -m dpo.settings.page > docs/settings.md
"""

from __future__ import annotations

import sys

from dpo.settings.config import groups, specs
from dpo.settings.fields import Spec, allowed
from dpo.settings.flags import presets, shown

HEAD = """# Every setting

The flags of `python -m dpo.train` (`--batch-size`), the keys of a TOML file for `--config` (`batch_size`, grouped as here or not), and
the keywords of `dpo.align`. `--help` says the same, `--print-config` what a command line would use, and the `config.toml` of a run what it
used. `dpo.prepare`, `dpo.sweep` and `dpo.plan` take them too.

*On resume*: free: it may change; said: it may change, and the log says so; refused: the result would belong to neither setting. A few depend
on values: `fp32`, `bf16` and `fp16` runs may go on in each other, and with a linear or cosine schedule a change of `steps` is said.
What is not named on resume is the run's own, but for a whole command line ([running.md](running.md#go-on-with-a-run)).

This page is written by `python -m dpo.settings.page > docs/settings.md`.
"""


def settings_page() -> str:
    """The text of docs/settings.md: a table for each group in the order of `--help`, then the presets."""
    tables = [_group(group, str(cls.__doc__)) for group, cls in groups().items()]
    rows = "".join(f"| `{name}` | {line} |\n" for name, line in presets().items())
    return HEAD + "".join(tables) + f"\n## Presets\n\n| `--preset` | what it trains |\n|---|---|\n{rows}"


def _group(group: str, title: str) -> str:
    rows = "".join(_row(spec) for spec in specs().values() if spec.group == group)
    head = "| setting | default | it takes | what it is | on resume |\n|---|---|---|---|---|\n"
    return f"\n## {title}\n\n`[{group}]`\n\n{head}{rows}"


def _row(spec: Spec) -> str:
    cells = (f"`{spec.name}`", _default(spec), _takes(spec), spec.meta["help"], spec.meta["resume"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _default(spec: Spec) -> str:
    return "none" if (text := shown(spec.default)) == "none" else f"`{text}`"


def _takes(spec: Spec) -> str:
    """What the setting accepts, in words."""
    if spec.meta["choices"]:
        return ", ".join(f"`{word}`" for word in spec.meta["choices"])
    if spec.kind is bool:
        return "yes or no"
    words = allowed(spec).removeprefix("expected ")
    return f"one or more: {words}" if spec.many else words


if __name__ == "__main__":
    sys.stdout.write(settings_page())
