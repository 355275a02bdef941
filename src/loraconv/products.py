"""What a fusion adds for modules that are more than a pair of factors: each as it is read, with its scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any

from loraconv.adapter import Adapter, Factor, natural, read_adapter, refuse_rest
from loraconv.algebra import Special, in_words, row_magnitudes
from loraconv.deltas import Delta, size_of
from loraconv.detect import Detected
from loraconv.errors import FormatError
from loraconv.lazy import InMemory, TensorRef, Viewed, Zeros, encode, read
from loraconv.names import fold_names, quoted
from loraconv.scale import ALPHA_TENSORS, Scale, alpha_in
from loraconv.source import Source

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


#: That of a difference.
_NO_SCALE = Scale(Fraction(1), 1, "it has none")


def ranges(one: Special, detected: Detected) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    """The diffusers modules whose rows a module has, and the ranges of rows of each."""
    found = detected.naming.find(one.module)
    assert found is not None
    rows, columns = size_of(one)
    pieces = found[0].pieces(rows, columns)
    chunk = rows // sum(map(len, pieces))
    for module, own in zip(one.targets, pieces, strict=True):
        if own:
            yield module, tuple((n * chunk, (n + 1) * chunk) for n in own)


def scale_of(one: Special, alpha: Fraction | None) -> Scale:
    """``alpha / rank``, as LyCORIS stores alpha; 1 for a full difference and for its LoKr of two whole matrices."""
    if one.told is not None:
        told, rank = one.told
        return Scale(told if alpha is None else alpha, rank, "--alpha" if alpha is not None else "adapter_config.json")
    named = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    factor = next((one.tensors[side] for side in named if side in one.tensors), None)
    if factor is None:
        return _NO_SCALE
    rank = factor.shape[0]
    if alpha is not None:
        return Scale(alpha, rank, "--alpha")
    if "alpha" in one.tensors:
        return Scale(alpha_in(one.tensors["alpha"]), rank, ALPHA_TENSORS)
    return Scale(Fraction(rank), rank, "no alpha")


def read_products(
    source: Source, detected: Detected, specials: Sequence[Special], *, alpha: Fraction | None, strict: bool
) -> Adapter:
    """The adapter as a fusion takes it: a :class:`Delta` is the ``up`` of what is no pair of factors, beside a ``down``
    of no rows; what it adds to a bias is a module of the bias' own name.

    Raises :class:`FormatError` for magnitudes of columns where a module is several in diffusers.
    """
    refuse_rest(source, detected)
    wrong = [one for one in specials if _splits_columns(one)]
    if wrong:
        raise FormatError(
            f"this cannot be fused: {in_words(wrong)}",
            where="; ".join(fold_names(one.module for one in wrong)[:4]),
            why="magnitudes of columns are fused only to the one linear layer they were trained on",
            hint="loraconv convert ADAPTER -o OUT --to comfyui",
            slug="not-plain-lora",
        )
    whole = [one for one in specials if one.kind == "whole norm"]
    if whole:
        raise FormatError(
            f"this cannot be fused: {in_words(whole)}",
            where="; ".join(fold_names(one.module for one in whole)[:4]),
            why="they take the place of the base's, and have no strength; a control adapter widens x_embedder, too",
            hint="FluxControlPipeline.load_lora_weights(FILE), then fuse_lora(), of diffusers",
            slug="not-plain-lora",
        )
    pairs = [one for one in specials if one.kind == "LoRA"]
    plain = {f.module: f for f in read_plain(source, detected, pairs, alpha=alpha, strict=strict).factors}
    factors = [factor for one in specials for factor in _factors(one, detected, plain, alpha)]
    return Adapter(tuple(sorted(factors, key=lambda factor: natural(factor.module))))


def read_plain(
    source: Source, detected: Detected, pairs: Sequence[Special], *, alpha: Fraction | None, strict: bool
) -> Adapter:
    """The factors of these modules, which are pairs, as if nothing stood beside them; those of convolutions as
    matrices. Raises what reading them does."""
    if not pairs:
        return Adapter(())
    own = {t.name for one in pairs for side, t in one.tensors.items() if side in ("down", "up", "alpha")}
    tensors = {name: _as_matrix(ref) for name, ref in source.tensors.items() if name in own}
    config = None if source.config is None else {**source.config, "use_dora": False, "lora_bias": False}
    factors, alphas = ([n for n in names if n in own] for names in (detected.ledger.factors, detected.ledger.alphas))
    ledger = replace(detected.ledger, factors=factors, alphas=alphas, more=[])
    alone = replace(source, ranks=[tensors], config=config)
    return read_adapter(alone, replace(detected, ledger=ledger), alpha=alpha, strict=strict)


def read_kernels(
    source: Source, detected: Detected, pairs: Sequence[Special], *, alpha: Fraction | None, strict: bool
) -> Adapter:
    """The factors of LoRAs, those of convolutions in the shapes of kernels: down (rank, in, height, width), up
    (out, rank, 1, 1)."""
    plain, kernels = read_plain(source, detected, pairs, alpha=alpha, strict=strict), _kernels(pairs)
    return replace(plain, factors=tuple(with_kernel(factor, kernels[factor.module]) for factor in plain.factors))


def _kernels(pairs: Sequence[Special]) -> dict[str, tuple[int, ...]]:
    return {target: one.kernel for one in pairs for target in one.targets}


def with_kernel(factor: Factor, kernel: tuple[int, ...]) -> Factor:
    """The factors, which are matrices, in the shapes that a LoRA of a convolution has; as they are without a kernel."""
    if not kernel:
        return factor
    (rank, columns), rows = factor.down.shape, factor.up.shape[0]
    down = Viewed(factor.down, (rank, columns // prod(kernel), *kernel))
    return replace(factor, down=down, up=Viewed(factor.up, (rows, rank, *(1 for _ in kernel))))


def refuse_kernels_of_linear_layers(source: Source, detected: Detected, specials: Sequence[Special]) -> None:
    """Raise :class:`FormatError` (``factor-shape``) for factors with a kernel on what is a linear layer."""
    families = (detected.family, *detected.alike)
    kernels = [one for one in specials if one.kernel]
    strange = [one.module for one in kernels if not any(f.may_convolve(t) for f in families for t in one.targets)]
    if strange:
        raise FormatError(
            f"{len(strange)} modules have factors of convolutions",
            where="; ".join(fold_names(strange)[:4]),
            why=f"they are linear layers in {detected.family.title}: the file belongs to another model, or is damaged",
            hint=f"loraconv inspect {quoted(source.path)}",
            slug="factor-shape",
        )


def _as_matrix(ref: TensorRef) -> TensorRef:
    whole = len(ref.shape) > 2 and ref.strides is None
    return replace(ref, shape=(ref.shape[0], prod(ref.shape[1:]))) if whole else ref


def _splits_columns(one: Special) -> bool:
    return one.has_magnitude and one.by_column and (len(one.targets) > 1 or one.is_convolution)


def _factors(one: Special, detected: Detected, plain: Mapping[str, Factor], alpha: Fraction | None) -> Iterator[Factor]:
    magnitudes = row_magnitudes(one, detected)
    if one.kind == "norm":
        homes = {"w_norm": one.targets[0], "b_norm": f"{one.targets[0]}.bias"}
        yield from (_column(homes[side], vector, _NO_SCALE) for side, vector in one.tensors.items())
        return
    if one.kind == "LoRA":
        made = [plain[target] for target in one.targets if target in plain]
    elif one.kind == "bias":
        made = []
    else:
        scale = scale_of(one, alpha)
        columns = size_of(one)[1]
        none = Zeros("F64", (0, columns))
        made = [Factor(module, none, Delta(one, rows, columns), scale) for module, rows in ranges(one, detected)]
    yield from (replace(factor, magnitude=magnitudes.get(factor.module)) for factor in made)
    vector = one.tensors.get("diff_b", one.tensors.get("bias"))
    if vector is not None:
        # peft's LoRA bias is scaled as its product is; a difference is not.
        scale = made[0].scale if "bias" in one.tensors else _NO_SCALE
        yield _bias(one, vector, scale)


def _bias(one: Special, vector: TensorRef, scale: Scale) -> Factor:
    if len(one.targets) > 1:
        raise FormatError(
            f"the bias of a module that is several in diffusers is not fused: {fold_names([one.module])[0]}",
            hint="loraconv convert ADAPTER -o OUT --to comfyui",
            slug="not-plain-lora",
        )
    return _column(f"{one.targets[0]}.bias", vector, scale)


def _column(module: str, vector: TensorRef, scale: Scale) -> Factor:
    """What is added to a bias, or to the weight of a norm, as the product of a column and the number 1."""
    import numpy as np

    return Factor(module, _held(np.ones((1, 1))), _held(read(vector)[:, None]), scale)


def _held(array: Array) -> InMemory:
    return InMemory(encode(array, "F64"), "F64", tuple(array.shape))
