"""Results as plain text, without colour, at any width: every line is a fact that the result holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from loraconv.names import fold_names, human_bytes, printable, quoted

if TYPE_CHECKING:
    from loraconv.catalog import FormatInfo
    from loraconv.conversion import ConvertResult
    from loraconv.demonstration import DemoResult
    from loraconv.describe import AdapterFacts, Summary
    from loraconv.errors import LoraconvError
    from loraconv.verification.result import VerifyResult
    from loraconv.verifier.proof import Proof

_LABEL = 12


def _line(label: str, value: str) -> str:
    return f"{label:<{_LABEL}}{value}"


def summary(result: Summary, *, verbose: bool = False) -> str:
    """The text of ``loraconv inspect``; ``verbose`` lists every folded name."""
    return "\n".join(_summary_lines(result, verbose))


def _summary_lines(result: Summary, verbose: bool) -> Iterator[str]:
    ranks = f", {result.ranks} model-parallel ranks" if result.ranks > 1 else ""
    yield _line("source", printable(result.path, 1000))
    yield _line("container", f"{result.container}, {human_bytes(result.bytes)}{ranks}")
    yield _line("format", f"{result.dialect}: {result.reason}")
    yield _line("model", result.model)
    if result.adapter is not None:
        yield from _adapter_lines(result.adapter)
    elif result.problem:
        yield _line("LoRA", f"cannot be read: {result.problem}")
    else:
        yield _line("LoRA", "none")
    for number, group in enumerate(result.contents):
        count = (
            f"{group.tensors} tensors, {human_bytes(group.bytes)}" if group.tensors else f"{len(group.names)} entries"
        )
        yield _line("contents" if not number else "", f"{group.what}: {count}")
        if verbose:
            yield from (_line("", f"  {name}") for name in group.names)
    yield from (_line("notice", notice) for notice in result.notices)
    if result.next:
        yield _line("next", result.next)


def _adapter_lines(adapter: AdapterFacts) -> Iterator[str]:
    yield _line("rank", ", ".join(map(str, adapter.ranks)))
    yield _line("alpha", f"{', '.join(adapter.alphas)} (from {', '.join(adapter.alpha_sources)})")
    yield _line("scale", ", ".join(adapter.scales))
    yield _line("targets", ", ".join(map(printable, adapter.targets)))
    yield _line("layers", f"{adapter.layers} ({adapter.modules} modules)")
    yield _line("dtype", ", ".join(adapter.dtypes))


def conversion(result: ConvertResult) -> str:
    """The text of a finished conversion: what was written, the proof, the next command."""
    if result.dry_run:
        return plan(result)
    lines = [
        f"wrote   {printable(str(result.out / file.name), 1000)}"
        f"  {human_bytes(file.bytes)}" + (f"  sha256 {file.sha256}" if file.sha256 else "")
        for file in result.files
        if not file.name.endswith((".json", ".yaml", "latest"))
    ]
    adapter = result.source.adapter
    if adapter is not None and any(p.subject == "adapter" for p in result.proofs):
        lines.append(f"lora    {_strength(adapter)}; layers {adapter.layers}")
    lines += [f"proof   {proof(p)}" for p in result.proofs]
    lines.append(f"next    {next_step(result)}")
    return "\n".join(lines)


def _strength(adapter: AdapterFacts) -> str:
    rank, alpha, scale = (", ".join(map(str, x)) for x in (adapter.ranks, adapter.alphas, adapter.scales))
    return f"rank {rank}, alpha {alpha} (from {', '.join(adapter.alpha_sources)}), scale {scale}"


def proof(result: Proof) -> str:
    """One line: how many modules or tensors, how equal, and the controls."""
    count = result.checks[0].count
    if result.subject == "base":
        return f"base: {count}/{count} tensors, {result.checks[1].name}; controls caught {result.caught}"
    delta = next(c for c in result.checks if c.bound is not None)
    how = (
        f"max relative error {delta.figure:.1e}, bound {delta.bound:.1e}" if delta.bound else "equal number for number"
    )
    return f"adapter: {count}/{count} modules, {how}; controls caught {result.caught}"


def next_step(result: ConvertResult) -> str:
    """What to do with the output."""
    out = printable(str(result.out), 1000).replace('"', '\\"')
    if any(p.subject == "base" for p in result.proofs) and len(result.proofs) == 1:
        return f'CogVideoXTransformer3DModel.from_pretrained("{out}")'
    if result.to == "peft":
        return f'peft.PeftModel.from_pretrained(transformer, "{out}")'
    if result.to != "diffusers":
        return f"loraconv inspect {quoted(result.out)}"
    return f'pipe.load_lora_weights("{out}")'


def demonstration(result: DemoResult) -> str:
    """The text of ``loraconv demo``."""
    forward = result.forward
    verdict = "equal" if forward.passed else "NOT EQUAL"
    return "\n".join(
        [
            "A LoRA checkpoint as SAT and DeepSpeed write it (CogVideoX-2B in tiny, two real training steps):",
            "",
            summary(result.inspected),
            "",
            "Converted to diffusers, LoRA and base:",
            "",
            conversion(result.converted),
            "",
            "Loaded in diffusers and run on the inputs that were recorded from the real SAT model:",
            "",
            _line("with LoRA", f"{forward.live:.1e} relative L2 error (bound {forward.bound:.0e})"),
            _line("base alone", f"{forward.base:.1e}"),
            _line("LoRA off", f"{forward.effect:.1e} is what a LoRA that does nothing would score"),
            _line("verdict", verdict),
        ]
    )


def verification(result: VerifyResult) -> str:
    """The text of ``loraconv verify``: what the mode has to show (``report/verify_MODE.py``), why not, the verdict."""
    from importlib import import_module

    mode = import_module(f"loraconv.report.verify_{result.mode}")
    lines: list[str] = mode.lines(result)
    for finding in result.findings:
        lines += [f"why     {finding.sentence}", f"mend    {finding.mend}"]
    return "\n".join([f"verdict {mode.verdict(result)}", *lines])


def plan(result: ConvertResult) -> str:
    """The text of ``--dry-run``: every tensor, folded by layer, with its recipe; nothing was written."""
    lines = [f"would write to {printable(str(result.out), 1000)}"]
    for planned in result.plans:
        for file in planned.files:
            lossy = sum(not o.exact for o in file.outputs)
            note = f", {lossy} of them rounded" if lossy else ", none rounded"
            lines.append(f"  {file.name}: {len(file.outputs)} tensors, {human_bytes(file.bytes)}{note}")
            lines += [f"    {text}" for text in _folded_recipes(file.outputs)]
        lines += [f"  {name}: {human_bytes(len(text))}" for name, text in planned.texts.items()]
    if result.dropped:
        lines.append(f"  left behind: {len(result.dropped)} tensors")
        lines += [f"    {name}" for name in fold_names(result.dropped)]
    return "\n".join(lines)


def _folded_recipes(outputs: Iterable[object]) -> list[str]:
    recipes: dict[str, list[str]] = {}
    for output in outputs:
        tensor = getattr(output, "tensor")  # noqa: B009
        shape = "x".join(map(str, tensor.shape))
        recipes.setdefault(f"{tensor.dtype} {shape}, {getattr(output, 'how')}", []).append(getattr(output, "name"))  # noqa: B009
    return [f"{name}: {recipe}" for recipe, names in recipes.items() for name in fold_names(names)]


def catalogue(infos: Iterable[FormatInfo]) -> str:
    """The text of ``loraconv formats``."""
    return "\n\n".join("\n".join(_format_lines(info)) for info in infos)


def _format_lines(info: FormatInfo) -> Iterator[str]:
    yield f"{info.name}: {info.title}"
    yield _line("  file", info.file)
    yield _line("  keys", info.keys[0])
    yield from (_line("", key) for key in info.keys[1:])
    yield _line("  scale", info.scale)
    yield _line("  carries", "; ".join(info.carries))
    if info.cannot_carry:
        yield _line("  but not", "; ".join(info.cannot_carry))
    yield _line("  models", ", ".join(info.models))
    yield _line("  facts", info.facts)


def error(failure: LoraconvError) -> str:
    """An error as the user sees it: what, where, why, and the command that mends it."""
    lines = [f"error: {printable(failure.what, 2000)}"]
    parts = (("where", failure.where), ("why", failure.why), ("hint", failure.hint))
    return "\n".join(lines + [f"  {label}: {printable(text, 2000)}" for label, text in parts if text])
