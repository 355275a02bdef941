"""Field names: which one a user most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from loraconv.names import printable

#: What others call a field.
ALSO = {
    "video": ("file_name", "video_path", "file", "filename", "path", "videos", "clip"),
    "prompt": ("text", "caption", "captions", "description", "label", "prompts"),
    "conversations": ("messages", "conversation", "dialog", "turns"),
    "from": ("role", "speaker"),
    "value": ("content", "text"),
    "latents": ("latent", "model_input", "encoded_video", "video_latents"),
    "prompt_embeds": ("prompt_embedding", "prompt_embeddings", "encoder_hidden_states", "text_embeds"),
    "image_latents": ("image_latent", "image_embeds"),
}


def nearest(wanted: str, names: Iterable[str]) -> str:
    """The name that is most like ``wanted`` or means the same; empty if none does."""
    plain = {name.strip().lower(): name for name in names}
    for other in (wanted, *ALSO.get(wanted, ())):
        if other in plain:
            return plain[other]
    close = difflib.get_close_matches(wanted, [name[:100] for name in plain], n=1)
    return plain.get(close[0], "") if close else ""


def missing(wanted: str, names: Iterable[str]) -> str:
    """Which field is missing, which is nearest to it, or which there are."""
    there = list(names)
    near = nearest(wanted, there)
    if near:
        return f"no {wanted!r}; nearest: {printable(near)!r}"
    return f"no {wanted!r}; there is {', '.join(printable(repr(name)) for name in there[:8]) or 'nothing'}"
