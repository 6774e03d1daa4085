"""The head of a report: which run, when, how far it came."""

from __future__ import annotations

from datetime import UTC, datetime

from mars_shared.report.history import History
from mars_shared.report.markup import Child, Markup, tag
from mars_shared.report.numbers import duration


def overview(run: History) -> Markup:
    """Title, state, and the facts that name a run."""
    facts = "".join(_fact(name, value) for name, value in _facts(run).items())
    return tag(
        "header",
        tag("p", "mars report", class_="kind"),
        tag("h1", tag("bdi", run.name), " ", tag("span", _state(run), class_=f"state {run.state}")),
        tag("dl", Markup(facts), class_="facts"),
        class_="overview",
    )


def _state(run: History) -> str:
    planned = "" if run.planned_steps is None else f" of {run.planned_steps}"
    match run.state:
        case "finished":
            return f"finished at step {run.step}{planned}"
        case "running":
            return f"running, at step {run.step}{planned}"
        case "stopped":
            return f"stopped at step {run.step}{planned}"


def _facts(run: History) -> dict[str, Child]:
    times = [event["time"] for event in run.events]
    facts: dict[str, Child] = {}
    if times:
        facts = {"from": moment(times[0]), "to": moment(times[-1]), "time": duration(times[-1] - times[0])}
    incarnations = [start.incarnation for start in run.starts] + [event["incarnation"] for event in run.of("resumed")]
    facts["policy"] = f"version {max(incarnations, default=1)}.{run.step}"
    facts["restarts of the trainer"] = len(run.restarts)
    facts["seed"] = "not recorded" if run.seed is None else run.seed
    facts["report made"] = moment(run.read_at)
    return facts


def _fact(name: str, value: Child) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value))


def moment(unix_s: float) -> str:
    """A time, in UTC so that it reads the same everywhere."""
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
