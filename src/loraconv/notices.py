"""What has to be said of an adapter's file, whatever is made of it."""

from __future__ import annotations

from loraconv.detect import Detected
from loraconv.names import fold_names
from loraconv.source import Source


def nearest_notices(source: Source) -> list[str]:
    """What has to be said about an adapter that was trained on several model-parallel ranks."""
    if len(source.ranks) == 1:
        return []
    from loraconv.verifier.oracles import rank_distances  # half of the verifier, for few runs

    gaps = ", ".join(f"{name} {gap:.2%}" for name, gap in sorted(rank_distances(list(source.ranks)).items()))
    return [
        f"this is the nearest single adapter to {len(source.ranks)} model-parallel ranks, and equals none of them;"
        f" its delta is off from a rank's own by (worst layer): {gaps}"
    ]


def left_behind(source: Source, detected: Detected) -> list[str]:
    """Trained tensors that are no LoRA factor stay behind when the LoRA alone is converted: say so."""
    trained = sorted((source.trained or frozenset()) - set(detected.ledger.factors))
    trained = [name for name in trained if name in source.tensors]
    if not trained:
        return []
    return [
        f"{len(trained)} tensors were trained besides the LoRA and are not in it: {'; '.join(fold_names(trained)[:4])}"
    ]


def unknown_notices(detected: Detected) -> list[str]:
    """Tensors without a rule that do not stop what is asked for."""
    names = detected.ledger.unknown
    shown = "; ".join(fold_names(names)[:4])
    return [f"{len(names)} tensors are not understood and stay behind: {shown}"] if names else []
