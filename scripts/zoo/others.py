"""Tiny models of diffusers and timm: their classes have no defaults to shrink, so each is spelled out."""

from __future__ import annotations

import functools
import importlib.util
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIFFUSERS = Path(__file__).with_name("diffusers.toml")
TIMM = (
    *("test_vit", "test_vit2", "test_vit3", "test_vit4", "test_convnext", "test_convnext2", "test_convnext3"),
    *("test_resnet", "test_efficientnet", "test_efficientnet_gn", "test_byobnet", "test_nfnet", "test_mambaout"),
)


def list_others() -> dict[str, str]:
    """Map names of models that are no transformers' to the library that has them, where it is installed."""
    found = {}
    for library, names in (("diffusers", _read_table()), ("timm", TIMM)):
        if importlib.util.find_spec(library):
            found |= {f"{library}:{name}": library for name in names}
    return found


def build_other(library: str, name: str) -> tuple[Any, dict[str, Tensor] | None]:
    """Build a tiny model of diffusers or timm, and inputs where they are known."""
    torch.manual_seed(0)
    if library == "timm":
        return TimmFolder(name).create({}).eval(), {
            "x": torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(1))
        }
    table = _read_table()[name]
    model = getattr(importlib.import_module("diffusers"), name)(**table["config"]).eval()
    generator = torch.Generator().manual_seed(1)
    inputs = {key: torch.randn(shape, generator=generator) for key, shape in table.get("inputs", {}).items()}
    if "timestep" in inputs:
        inputs["timestep"] = torch.tensor([3])
    return model, inputs or None


def _read_table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(DIFFUSERS.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class TimmFolder:
    """What stands for a class: loads and saves a folder as timm does for the hub."""

    name: str

    def create(self, options: dict[str, Any]) -> Any:
        """Make the model, which can save itself."""
        timm = importlib.import_module("timm")
        model = timm.create_model(self.name, pretrained=False, num_classes=4, **options)
        model.save_pretrained = functools.partial(self._save, model)
        return model

    def from_pretrained(self, folder: Path) -> Any:
        """Load a folder."""
        from safetensors.torch import load_file

        assert json.loads((folder / "config.json").read_text())["architecture"] == self.name
        model = self.create({})
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model

    @staticmethod
    def _save(model: Any, folder: Path, **_: object) -> None:
        hub = importlib.import_module("timm.models._hub")
        hub.save_for_hf(model, str(folder), safe_serialization=True)
