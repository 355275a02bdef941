"""The text of ``loraconv train``: what was trained, how well, where it lies, the next command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraconv.names import printable, quoted, ranges

if TYPE_CHECKING:
    from loraconv.training import TrainResult

_LABEL = 12


def training(result: TrainResult) -> str:
    """Plain text, one fact a line."""
    model = result.settings["model"]
    lines = {
        "model": printable(f"tiny {model['tiny']}" if model["tiny"] else model["path"], 1000),
        "trained": f"{result.settings['kind']}, {result.parameters} parameters, {result.steps} of"
        f" {result.settings['steps']} steps",
        "loss": "" if result.loss is None else f"{result.loss:.4g} in the last step that was logged",
        "held out": "" if result.held_out is None else f"{result.held_out:.4g} at best",
        "faults": f"NaN or Inf in step {ranges(result.faults)}, without an update" if result.faults else "",
        "layouts": ", ".join(result.layouts),
        "best": "" if result.best is None else printable(str(result.best), 1000),
        "last": "" if result.last is None else printable(str(result.last), 1000),
        "report": "" if result.dry_run else printable(str(result.out / "report" / "report.html"), 1000),
        "next": _next(result),
    }
    return "\n".join(f"{label:<{_LABEL}}{text}" for label, text in lines.items() if text)


def _next(result: TrainResult) -> str:
    if result.dry_run:
        return "run the same command without --dry-run"
    place = result.best or result.last
    if place is None or result.settings["kind"] == "full":
        return ""
    if "sat" in result.layouts:
        return f"loraconv sat2diffusers {quoted(place / 'sat')} -o DIR"
    return f"loraconv verify {quoted(place / result.layouts[0])} OTHER" if result.layouts else ""
