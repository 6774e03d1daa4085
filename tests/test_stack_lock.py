"""One stack a run folder, whichever Redis it talks to."""

from __future__ import annotations

from pathlib import Path

import pytest

from mars_shared.errors import ConfigError
from mars_shared.stack import only_stack


def test_a_second_stack_on_a_run_folder_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("the first one's")
    with only_stack(tmp_path):
        with pytest.raises(ConfigError, match="another `mars up`, `train` or `eval` works on"), only_stack(tmp_path):
            pass
        assert (tmp_path / "stack.json").read_text() == "the first one's"
    with only_stack(tmp_path):
        pass
