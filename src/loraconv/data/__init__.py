"""Training data: moving shapes, precomputed latents, or videos with prompts, all as the same encoded samples.

Importing this package loads neither torch nor numpy. Files are hostile: read through ``InputFile``, bounded in size.
"""

from __future__ import annotations

from loraconv.data.opening import open_dataset
from loraconv.data.sample import Dataset, Sample
from loraconv.data.settings import DataSettings, ModelNeeds

__all__ = ["DataSettings", "Dataset", "ModelNeeds", "Sample", "open_dataset"]
