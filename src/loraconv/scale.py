"""The truth about an adapter's scale: a value with a source, per module, exact until a writer needs a float.

Sources in order: the caller's own value, the sidecar, the file's header, the format's documented convention. Two that
disagree are both reported; a rank that contradicts a tensor's shape is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Literal, get_args

from loraconv.detect import Detected, factor_key
from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from loraconv.io.sidecar import at, parse_json
from loraconv.lazy import TensorRef
from loraconv.lazy import number as number_in
from loraconv.names import FLOAT_DTYPES, printable
from loraconv.naming import in_component
from loraconv.rules import Family, fill
from loraconv.source import Source

#: The header in which loraconv keeps what the trainer said, from which the way back is exact.
ORIGIN_KEY = "loraconv.origin"
#: Far above any rank; a greater alpha is a damaged file or a slip.
LARGEST_ALPHA = 1 << 20


#: How the ``.alpha`` tensors are named as a source of alpha.
ALPHA_TENSORS = "alpha tensors"
#: A decimal number as a trainer's ``str`` writes it.
_DECIMAL = re.compile(r"[0-9]{1,10}(\.[0-9]{1,10})?")

Place = Literal["up", "header", "file"]

#: What ``str`` makes of an alpha; ``Fraction`` alone would also take ``1e999999999`` and compute it.
_FRACTION = re.compile(r"[1-9][0-9]{0,39}(/[1-9][0-9]{0,39})?")


@dataclass(frozen=True, slots=True)
class Scale:
    """``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``, and where alpha was found."""

    alpha: Fraction
    rank: int
    source: str
    rslora: bool = False

    def of_rank(self, rank: int) -> Scale:
        """The same scale for factors of another rank, which are a part of those that alpha was stated for."""
        if rank == self.rank:
            return self
        scale = self.exact if self.exact is not None else Fraction(self.value)
        return Scale(scale * rank, rank, self.source)

    @property
    def exact(self) -> Fraction | None:
        """The scale as a fraction; None where rsLoRA makes it irrational."""
        if not self.rslora:
            return self.alpha / self.rank
        root = math.isqrt(self.rank)
        return self.alpha / root if root * root == self.rank else None

    @property
    def value(self) -> float:
        """The scale as the nearest float64 (as the trainer's own division gives it)."""
        exact = self.exact
        return float(exact) if exact is not None else float(self.alpha) / math.sqrt(self.rank)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the trainer said, kept in every output and read back, so that the way back is the same road.

    ``place`` is where the scale stood: ``up`` (folded in by loraconv), ``header`` (of a diffusers file, unfolded) or
    ``file`` (the settings file of a format whose consumers all read it).
    """

    alpha: Fraction
    rank: int
    source: str
    dtype: str
    place: Place

    def to_json(self) -> dict[str, Any]:
        return {
            "alpha": str(self.alpha),
            "dtype": self.dtype,
            "place": self.place,
            "rank": self.rank,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, value: Any) -> Origin:
        """The inverse of :meth:`to_json`; raises ValueError, KeyError or TypeError for anything else."""
        alpha, rank, dtype, place = str(value["alpha"]), value["rank"], value["dtype"], value["place"]
        known = dtype in FLOAT_DTYPES and place in get_args(Place)
        if not known or not _FRACTION.fullmatch(alpha) or type(rank) is not int:
            raise ValueError("not what to_json writes")
        return cls(Fraction(alpha), rank, str(value["source"]), dtype, place)


@dataclass(frozen=True, slots=True)
class Claim:
    """One place that says alpha (as it stands there) and perhaps rank for a module; ``None`` where it does not."""

    where: str
    alpha: Any
    rank: int | None
    rslora: bool = False


def given_alpha(alpha: float | None) -> Fraction | None:
    """The caller's own alpha as an exact fraction; raises :class:`UsageError` for one that cannot be meant."""
    if alpha is not None and not plausible(alpha):
        raise UsageError(f"--alpha must be above 0 and at most {LARGEST_ALPHA}, not {alpha}", hint="--alpha 1")
    return None if alpha is None else Fraction(alpha)


def plausible(alpha: float) -> bool:
    """True for a number that a trainer can have used as alpha."""
    return 0 < alpha <= LARGEST_ALPHA


def number(value: Any, where: str) -> Fraction:
    """A file's alpha as an exact fraction; raises :class:`CorruptCheckpoint` for one that no trainer can have used."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and plausible(value)
    if not fine:
        raise CorruptCheckpoint(
            f"alpha is not a number above 0 and at most {LARGEST_ALPHA}: {printable(repr(value), 60)}",
            where=where,
            hint="correct the file, or move it away and pass the right one: --alpha A",
            slug="alpha-implausible",
        )
    return Fraction(value)


def find_scales(
    source: Source, detected: Detected, ranks: dict[str, int], alpha: Fraction | None, strict: bool
) -> tuple[dict[str, Scale], list[str]]:
    """A :class:`Scale` for each module (diffusers names) and the notices that go with them.

    ``ranks`` holds each module's rank as its tensors show it. Raises :class:`FormatError` where a declared rank
    contradicts a tensor, where nothing says alpha, or, with ``strict``, where only a convention does.
    """
    scales: dict[str, Scale] = {}
    notices: dict[str, None] = {}
    claims_of = _claims(source, detected)
    for module, rank in ranks.items():
        claims = claims_of(module)
        _check_ranks(source, module, rank, claims)
        told = _told(claims, alpha, notices)
        if told is None:
            scales[module] = _by_convention(source, detected, rank, strict, notices)
        else:
            scales[module] = Scale(told[1], rank, told[0], any(c.rslora for c in claims))
    return scales, list(notices)


def _told(claims: list[Claim], alpha: Fraction | None, notices: dict[str, None]) -> tuple[str, Fraction] | None:
    """``(where, alpha)`` of the best place that says it; None if there is none. Places that disagree are noticed.

    With the caller's own ``alpha``, a file whose value makes no sense is only a notice.
    """
    said: list[tuple[str, Fraction]] = [] if alpha is None else [("--alpha", alpha)]
    for claim in claims:
        if claim.alpha is None:
            continue
        try:
            said.append((claim.where, number(claim.alpha, claim.where)))
        except CorruptCheckpoint as error:
            if alpha is None:
                raise
            notices[f"{error.what} ({claim.where}); --alpha was taken"] = None
    if len({value for _, value in said}) > 1:
        texts = [f"{where} says {value}" for where, value in said]
        notices[f"alpha: {'; '.join(texts)}; {said[0][0]} was taken"] = None
    return said[0] if said else None


def _check_ranks(source: Source, module: str, rank: int, claims: list[Claim]) -> None:
    for claim in claims:
        if claim.rank is not None and claim.rank != rank:
            raise FormatError(
                f"the declared rank contradicts the tensors: {claim.where} says {claim.rank}, the tensors say {rank}",
                where=f"{printable(str(source.path))}, {printable(module)}",
                why="the settings file belongs to another run, or the checkpoint was changed after training",
                hint="put the settings file of this very run beside the checkpoint, or move it away and pass --alpha",
                slug="rank-contradiction",
            )


def _by_convention(source: Source, detected: Detected, rank: int, strict: bool, notices: dict[str, None]) -> Scale:
    dialect = detected.dialect
    if dialect.default_alpha is None or strict:
        raise FormatError(
            f"nothing says alpha for {printable(str(source.path))}",
            why=dialect.default_why or f"a {dialect.name} adapter has it in {dialect.sidecar}, which was not found",
            hint="pass the alpha it was trained with: --alpha A (scale = A / rank)",
            slug="alpha-unknown",
        )
    alpha = rank if dialect.default_alpha == "rank" else dialect.default_alpha
    looked = f"{source.config_path.name} does not set it" if source.config_path else "no settings file was found"
    if dialect.sidecar:
        notices[f"alpha: {looked}; {dialect.default_why}. If that is wrong, pass --alpha"] = None
    else:
        notices[f"alpha: the file says none; {dialect.default_why}. If that is wrong, pass --alpha"] = None
    return Scale(Fraction(alpha), rank, f"{dialect.name} default")


Teller = Callable[[str], Claim]


def _claims(source: Source, detected: Detected) -> Callable[[str], list[Claim]]:
    """A function from a module name to what each place says about it, best place first."""
    places = [
        *_sidecar_claims(source, detected),
        *_header_claims(source, detected),
        *_tensor_claims(source, detected),
        *_text_claims(source, detected),
    ]
    return lambda module: [place(module) for place in places]


def _sidecar_claims(source: Source, detected: Detected) -> list[Teller]:
    dialect, config = detected.dialect, source.config
    if config is None or source.config_path is None or not dialect.alpha_at:
        return []
    _refuse_other_names(source, detected)
    paths = {
        "lora_alpha": dialect.alpha_at,
        "r": dialect.rank_at,
        "alpha_pattern": dialect.alpha_pattern_at,
        "rank_pattern": dialect.rank_pattern_at,
        "use_rslora": dialect.rslora_at,
    }
    return [_place(source.config_path.name, {key: at(config, path) for key, path in paths.items() if path})]


def _refuse_other_names(source: Source, detected: Detected) -> None:
    """Patterns match the names that modules had in training, and a module's alpha is looked up by diffusers' name."""
    dialect = detected.dialect
    patterns = [at(source.config, path) for path in (dialect.alpha_pattern_at, dialect.rank_pattern_at) if path]
    if detected.naming.spelling is not None and any(patterns):
        raise FormatError(
            "the adapter's settings give single modules another rank or alpha, by names that are not diffusers' own",
            where=printable(str(source.config_path)),
            hint="if one alpha is right for all, move the settings away and pass --alpha A",
            slug="pattern",
        )


def _header_claims(source: Source, detected: Detected) -> list[Teller]:
    """diffusers' ``lora_adapter_metadata`` (0.34 and later) and finetrainers' ``lora_config``."""
    found = []
    for key in ("lora_adapter_metadata", "lora_config"):
        text = source.metadata.get(key)
        if text is None:
            continue
        config = parse_json(text, f"{printable(str(source.path))}, header key {key}")
        if not isinstance(config, dict):
            raise _malformed(f"header {key}", "it is not a map of settings")
        found.append(_by_component(f"header {key}", config, detected.family))
    return found


def _by_component(where: str, config: dict[str, Any], family: Family) -> Teller:
    """The rule of :func:`_place` for each component of a pipeline, whose settings begin with its name; settings without
    any such name are for all."""
    places: dict[str, Teller] = {}

    def claim(module: str) -> Claim:
        component, name = in_component(family, module)
        if component not in places:
            prefix = f"{component}."
            own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
            places[component] = _place(where, own or config)
        return places[component](name)

    return claim


def _tensor_claims(source: Source, detected: Detected) -> list[Teller]:
    """The ``.alpha`` tensor beside a pair of factors: one number of any dtype."""
    told: dict[str, Claim] = {}
    for name in detected.ledger.alphas:
        key = factor_key(detected.dialect, name)
        found = detected.naming.find(key.module) if key else None
        assert found is not None
        rule, fields = found
        claim = Claim(ALPHA_TENSORS, _number_in(source.tensors[name]), None)
        told |= {fill(template, fields): claim for template in rule.targets}
    return [lambda module: told.get(module, Claim(ALPHA_TENSORS, None, None))] if told else []


def tuner_scale(source: Source, detected: Detected, module: str) -> tuple[Fraction, int] | None:
    """Alpha and rank of one module of peft's LoHa or LoKr, by its settings, where the scale is ``alpha / r`` whatever
    the shapes; None in a format with alpha tensors.

    Raises :class:`FormatError` where the settings are missing, and :class:`CorruptCheckpoint` for senseless ones.
    """
    if detected.dialect.alpha:
        return None
    where, config = detected.dialect.sidecar, source.config or {}
    told = _place(where, {**config, "lora_alpha": config.get("alpha")})(module)
    if told.alpha is None or told.rank is None:
        raise FormatError(
            f"the scale of this adapter is not known: {where} says no alpha and r",
            where=printable(str(source.path)),
            why="peft's LoHa and LoKr have no alpha in their tensors",
            hint=f"put the {where} that was saved with it beside it",
            slug="alpha-unknown",
        )
    return number(told.alpha, where), told.rank


def alpha_in(tensor: TensorRef) -> Fraction:
    """The alpha that a tensor holds; raises :class:`CorruptCheckpoint` for none, and one that cannot be meant."""
    return number(_number_in(tensor), f"{tensor.file.shown}, {printable(tensor.name)}")


def _number_in(tensor: TensorRef) -> int | float:
    try:
        return number_in(tensor)
    except ValueError as error:
        raise CorruptCheckpoint(
            f"{printable(tensor.name)} does not hold alpha",
            where=tensor.file.shown,
            why=str(error),
            hint="save the adapter again, or remove its alpha tensors and pass --alpha A",
            slug="alpha-shape",
        ) from None


def _text_claims(source: Source, detected: Detected) -> list[Teller]:
    """One alpha for all as text in the header (``ss_network_alpha``); a word such as ``Dynamic`` says none."""
    key = detected.dialect.header_alpha
    text = source.metadata.get(key, "") if key else ""
    if not _DECIMAL.fullmatch(text):
        return []
    claim = Claim(f"header {key}", float(text), None)
    return [lambda module: claim]


def _place(where: str, config: dict[str, Any]) -> Teller:
    """peft's rule: one alpha and rank for all, exceptions by module name or its end in the two patterns."""
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    if not isinstance(alphas, dict) or not isinstance(ranks, dict):
        raise _malformed(where, "alpha_pattern or rank_pattern is not a map")

    def claim(module: str) -> Claim:
        alpha, rank = _pattern(alphas, module, config.get("lora_alpha")), _pattern(ranks, module, config.get("r"))
        if isinstance(rank, float) and rank.is_integer():
            rank = int(rank)
        if rank is not None and (type(rank) is not int or rank <= 0):
            raise _malformed(where, f"rank is not a positive integer: {printable(repr(rank), 60)}")
        return Claim(where, alpha, rank, config.get("use_rslora") is True)

    return claim


def _malformed(where: str, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the adapter's settings cannot be read: {where}",
        why=why,
        hint="restore the file as its trainer wrote it, or move the settings away and pass --alpha",
        slug="settings",
    )


def _pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """peft's rule (``peft.utils.other.get_pattern_key``): the first expression that matches the end of the name, from
    behind a dot or from its beginning (with ``^``: the whole of it)."""
    for expression, value in patterns.items():
        if _expression(str(expression)).match(module):
            return value
    return default


@cache
def _expression(text: str) -> re.Pattern[str]:
    # An expression from a file must not be able to keep the matcher busy for years.
    if len(text) > 200 or len(re.findall(r"[*+?{]", text)) > 2 or re.search(r"\)[*+?{]", text):
        raise FormatError(
            f"a pattern in the adapter's configuration is too complicated: {printable(text, 80)}",
            hint="write the module names out in rank_pattern and alpha_pattern",
            slug="pattern",
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except re.error as error:
        raise CorruptCheckpoint(
            f"a pattern in the adapter's configuration is no regular expression: {printable(text, 80)}",
            why=str(error),
            hint="correct rank_pattern and alpha_pattern in adapter_config.json",
            slug="pattern",
        ) from None


def origins(source: Source) -> dict[str, Origin]:
    """What an earlier conversion recorded, by module (``""`` for all others); empty if none, or if it is malformed.

    It stands in a safetensors header as JSON text, in a trainer's settings file as a mapping.
    """
    value: Any = at(source.config, ORIGIN_KEY)
    if ORIGIN_KEY in source.metadata:
        value = parse_json(source.metadata[ORIGIN_KEY], f"{printable(str(source.path))}, header key {ORIGIN_KEY}")
    try:
        return {} if value is None else {str(module): Origin.from_json(entry) for module, entry in value.items()}
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        return {}
