"""What came of a run, in a few values."""

import pytest

from dpo.common.errors import UserError
from dpo.pages.aligned import read_aligned
from dpo.pages.folder import read_run
from dpo.pages.verdict import verdict
from tests.help.fake_run import write_run


@pytest.mark.parametrize("kind", ["good", "early", "sft"])
def test_it_says_what_the_report_says(tmp_path, kind):
    write_run(tmp_path / "run", kind)
    run, found = read_run(tmp_path / "run"), read_aligned(str(tmp_path / "run"))
    assert (found.output, found.updates, found.verdict) == (run.folder, run.done, verdict(run).headline)
    assert found.report == tmp_path / "run" / "report.html"
    measured = kind == "good"
    assert (found.held_out is not None, found.win_rate is not None) == (measured, measured), found
    if found.held_out is not None:
        assert 0.5 < found.held_out.low < found.held_out.share < found.held_out.high


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_aligned(tmp_path)
