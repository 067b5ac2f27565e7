"""dpo.settings.families: a name in the list is all that a new family's file needs to be seen."""

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.long
def test_a_new_family_is_seen_everywhere():
    code = """
        import sys
        from types import SimpleNamespace
        from dpo.settings import families
        families.FAMILIES += ("mine",)
        from dpo.settings import flags
        assert f"auto|{'|'.join(families.FAMILIES)}" in flags.help_text()
        assert flags.parse(["--model", "m", "--data", "d", "--family", "mine"])[0].model.family == "mine"
        assert "torch" not in sys.modules
        from dpo.models import family, load
        mine = SimpleNamespace(name="mine", pipeline="MinePipeline")
        sys.modules["dpo.models.mine"] = SimpleNamespace(FAMILY=mine)
        assert list(family.families()) == list(families.FAMILIES)
        assert load.family_of({"_class_name": "MinePipeline"}) is mine
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
