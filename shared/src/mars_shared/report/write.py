"""A run's folder to its report."""

from __future__ import annotations

from pathlib import Path

from mars_shared.blobs import BlobStore
from mars_shared.files import write_atomic
from mars_shared.report.atlas_view import atlas
from mars_shared.report.curves import curves
from mars_shared.report.evaluations import evaluations
from mars_shared.report.history import Groups, History, read_history
from mars_shared.report.incidents import incidents
from mars_shared.report.overview import overview
from mars_shared.report.page import document
from mars_shared.report.settings_table import recipe, versions
from mars_shared.report.timing import timing


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run, finished or not, as one HTML file.

    Args:
        out: where to; None: report.html in the run's folder.

    Returns:
        where it is.

    Raises:
        ConfigError: `run_dir` is no run folder.
        IntegrityError: its groups were changed.
    """
    history = read_history(run_dir)
    path = run_dir / "report.html" if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(history, Groups(run_dir / "groups"), BlobStore(run_dir / "blobs")).encode())
    return path


def render(run: History, groups: Groups, blobs: BlobStore) -> str:
    """The report as HTML."""
    sections = {
        "Evaluations": evaluations(run),
        "Curves": curves(run),
        "Conflict atlas": atlas(groups, blobs),
        "Time": timing(run),
        "Incidents": incidents(run, groups.unreadable),
        "Recipe": recipe(run),
        "Versions": versions(run),
    }
    return document(f"{run.name}: mars report", overview(run), sections)
