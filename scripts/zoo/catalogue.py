"""Which architectures there are: read from transformers' own tables, one class for each model type."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from .others import TimmFolder, list_others

HEADS = (  # the table that names a type's main class is the first of these that has it; a bare body comes last
    *("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "CAUSAL_LM"),
    *("ZERO_SHOT_IMAGE_CLASSIFICATION", "CTC", "RNNT", "TDT", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM"),
    *("AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "IMAGE_CLASSIFICATION"),
    *("OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "INSTANCE_SEGMENTATION", "UNIVERSAL_SEGMENTATION"),
    *("SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "NORMAL_ESTIMATION", "POSE_ESTIMATION", "POINTMAP_ESTIMATION"),
    *("MASK_GENERATION", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "IMAGE_MATTING"),
    *("IMAGE_TO_IMAGE", "IMAGE_SEGMENTATION", "TEXT_RECOGNITION", "TABLE_RECOGNITION", "CAUSAL_IMAGE_MODELING"),
    *("MASKED_IMAGE_MODELING", "TIME_SERIES_PREDICTION", "TIME_SERIES_REGRESSION", "TIME_SERIES_CLASSIFICATION"),
    *("VISUAL_QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING", "RETRIEVAL", "DECISION", "PRETRAINING"),
    *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "BACKBONE"),
)


@dataclass(frozen=True, slots=True)
class Species:
    """One architecture: its model type, and the class that is built; ``library`` has that class."""

    name: str
    cls: str
    library: str = "transformers"

    def model_class(self) -> Any:
        """Return the class, or what loads folders in its place."""
        return (
            TimmFolder(self.cls) if self.library == "timm" else getattr(importlib.import_module(self.library), self.cls)
        )


def list_species() -> dict[str, Species]:
    """Map each model type of the installed transformers to its main class, ``type/Class`` to its bare body.

    Models of diffusers and timm follow as ``library:name``, where these are installed.
    """
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    tables = [getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {}) for head in HEADS]
    bodies = auto.MODEL_MAPPING_NAMES
    found = {}
    for kind in sorted({name for table in [*tables, bodies] for name in table}):
        known = [_first(table[kind]) for table in [*tables, bodies] if kind in table]
        found[kind] = Species(kind, known[0])
        body = _first(bodies.get(kind, ""))
        if body and body != known[0]:
            found[f"{kind}/{body}"] = Species(kind, body)
    return found | {name: Species(name, name.partition(":")[2], library) for name, library in list_others().items()}


def _first(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else names[0]
