"""The page of ``loraconv verify --report``: one file of HTML that needs nothing else, neither scripts nor a network.

The same result gives the same bytes. What a mode has to show beyond its verdict and findings stands in
``report/html_MODE.py``; a mode without one gets its JSON as tables.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loraconv.names import fold_names
from loraconv.report.html_parts import Html, code, details, joined, lines, nested, raw_json, rounded, section, tag, text
from loraconv.report.style import style_sheet

if TYPE_CHECKING:
    from loraconv.verification.result import VerifyResult
    from loraconv.verifier.diagnosis import Finding

#: What every report of loraconv begins with, by which an older one is known and may be replaced.
MARK = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="loraconv '

#: Where the modes name what they compared.
_SUBJECTS = ("one", "other", "subject", "before", "after", "base", "fused", "path", "model")

# Nothing on the page is fetched or run, whatever a name in a checkpoint may hold.
_HEAD = """">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""


def page(result: VerifyResult) -> str:
    """The whole page. ``result`` is of any mode that has a ``report/verify_MODE.py``."""
    from loraconv import __version__

    mode = import_module(f"loraconv.report.verify_{result.mode}")
    verdict = str(mode.verdict(result))
    value = rounded(result.to_dict())
    subjects = [value[key] for key in _SUBJECTS if isinstance(value.get(key), str)]
    body = lines(
        tag("header", tag("p", "loraconv verify", class_="kicker"), _banner(result.same, verdict, subjects)),
        Html("<main>"),
        _findings(result.findings),
        *_sections(result, value, mode.lines(result)),
        section("Raw data", details("The result as JSON; --json has all digits", raw_json(value))),
        Html("</main>"),
        tag("footer", f"loraconv {__version__}, verify, mode {result.mode}. Exit code {0 if result.same else 5}."),
    )
    title = tag("title", f"{verdict}: {' and '.join(subjects)}")
    style = tag("style", Html(f"\n{style_sheet()}"))
    return f"{MARK}{text(__version__)}{_HEAD}{title}\n{style}\n</head>\n<body>\n{body}\n</body>\n</html>\n"


def _banner(same: bool, verdict: str, subjects: list[str]) -> Html:
    sign = tag("span", "✓" if same else "✗", class_="sign", aria_hidden="true")
    compared = tag("p", joined(map(code, subjects), " and "))
    words = tag("div", tag("h1", verdict[:1].upper() + verdict[1:]), compared)
    return tag("div", sign, words, class_=f"verdict {'yes' if same else 'no'}")


def _findings(findings: tuple[Finding, ...]) -> Html:
    if not findings:
        return Html("")
    return section("Why, and what mends it", *map(_finding, findings))


def _finding(finding: Finding) -> Html:
    slug = tag("span", finding.slug, class_="slug no")
    said = [tag("p", slug, finding.sentence), tag("p", "Mend it: ", tag("code", finding.mend))]
    folded = fold_names(finding.modules)
    if len(folded) > 1:
        said.append(details(f"{len(finding.modules)} names", tag("p", joined(map(code, folded), "<br>"))))
    return tag("div", *said, class_="finding")


def _sections(result: VerifyResult, value: dict[str, Any], said: list[str]) -> list[Html]:
    name = f"loraconv.report.html_{result.mode}"
    if find_spec(name) is not None:
        made: list[Html] = import_module(name).sections(result)
        return made
    common = {"schema", "mode", "same", "findings"}
    rest = nested({key: item for key, item in value.items() if key not in common})
    return [section("Result", plain_lines(said)), section("In detail", rest)]


def plain_lines(said: list[str]) -> Html:
    """Lines of the text report; one that is indented further than others belongs to the one before it."""
    items: list[list[Html]] = []
    for line in said:
        if line.startswith("    ") and items:
            items[-1] += [Html("<br>"), code(line.strip())]
        else:
            items.append([text(line.strip())])
    return tag("ul", *(tag("li", *parts) for parts in items), class_="lines")
