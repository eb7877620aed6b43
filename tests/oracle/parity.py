"""PEFT against transformers: an adapter loaded from its files, and a checkpoint to which B·A was added."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltaspec.architecture.views import view_matrix
from deltaspec.io.matrix import read_low_rank
from deltaspec.io.open import open_plain
from deltaspec.io.peft_writer import PeftForm, write_adapter
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter
from deltaspec.types import AdapterModule, Checkpoint, Entry
from tests.families import FAMILIES, write
from tests.oracle.models import BUILT, build, inputs

RANK = 3
QUIET = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # exact until PEFT merges both uses
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # used, for target_parameters
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # one flag, and GPT-2's head is a plain linear
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]
TOKENS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "token_embedding")
EMBEDDING = re.compile(rf"({'|'.join(TOKENS)}|token_type_embeddings)\.weight$")
POSITIONS = re.compile(r"embed_positions|position_embed|relative_attention_bias|rel_embeddings|wpe\.")
TIED = [name for name in BUILT if FAMILIES[name].config.get("tie_word_embeddings")]


@dataclass
class Case:
    """A base on disk, the factors of its stored tensors, and the same change made densely."""

    name: str
    base: Path
    tuned: Path
    stored: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # A (…, r, d_in), B (…, d_out, r)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        opened = open_plain(self.base)
        assert isinstance(opened, Checkpoint)
        return opened

    def modules(self) -> list[AdapterModule]:
        """Every tensor with factors, as the extraction would hand it over."""
        return [self._module(name) for name in self.factors]

    def _module(self, name: str) -> AdapterModule:
        lora_A, lora_B = self.factors[name]
        kind = self.kinds[name]
        path = name if kind == "stack" else name.removesuffix(".weight")
        shape = (lora_B.shape[-2], lora_A.shape[-1])
        return AdapterModule(
            path, kind, shape, lora_A.shape[-2], lambda: (lora_A, lora_B),
            kernel=tuple(self.stored[name].shape[1:]) if kind == "conv" else (),
            experts=lora_A.shape[0] if kind == "stack" else 0,
            transposed=kind == "stack" and is_transposed(self.name),
        )  # fmt: skip


def is_transposed(name: str) -> bool:
    return name in ("gpt_oss", "llama4")


def kind_of(family: str, name: str, tensor: Tensor) -> str:
    """Name the kind of a stored tensor, "" for what gets no factors."""
    if tensor.ndim < 2 or POSITIONS.search(name) or name.endswith("bias"):
        return ""
    if EMBEDDING.search(name):
        return "embedding"
    if tensor.ndim == 3 and re.search(r"experts\.|(input|output)_linear", name):
        return "stack"
    if not name.endswith(".weight"):
        return ""
    if tensor.ndim > 2:
        return "conv"
    return "conv1d" if family.startswith("gpt2") else "linear"


def product(case: Case, name: str) -> Tensor:
    """B·A in the stored orientation and shape, float64."""
    lora_A, lora_B = (factor.double() for factor in case.factors[name])
    dense = lora_B @ lora_A
    turned = case.kinds[name] == "conv1d" or (case.kinds[name] == "stack" and is_transposed(case.name))
    return (dense.mT if turned else dense).reshape(case.stored[name].shape)


def make_case(name: str, folder: Path, *, renamed: tuple[str, str] = ("", "")) -> Case:
    """Write a family's model and draw rank-3 factors for all it can carry; ``renamed`` (old, new) changes its names."""
    scale = 0.3
    model = build(name)
    base = folder / "base"
    if name.endswith(("_stacked", "_in_memory")):
        model.config.architectures = [type(model).__name__]
        write(base, model.state_dict(), model.config.to_dict())
    else:
        model.save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    if renamed[0]:
        stored = {re.sub(*renamed, key): tensor.clone() for key, tensor in stored.items()}
        write(base, stored, json.loads((base / "config.json").read_text()))
    case = Case(name, base, folder / "tuned", stored)
    generator = torch.Generator().manual_seed(3)
    for key, tensor in stored.items():
        kind = kind_of(name, key, tensor)
        if not kind:
            continue
        stack = tensor.shape[:1] if kind == "stack" else ()
        rows, columns = tensor.shape[1:] if stack else (tensor.shape[0], math.prod(tensor.shape[1:]))
        if kind == "conv1d" or (stack and is_transposed(name)):
            rows, columns = columns, rows
        case.kinds[key] = kind
        case.factors[key] = (
            scale * torch.randn(*stack, RANK, columns, generator=generator),
            scale * torch.randn(*stack, rows, RANK, generator=generator),
        )
    return case


def write_tuned(case: Case, whole: Mapping[str, Tensor] | None = None) -> None:
    """Write the checkpoint to which the products were added, and in which ``whole`` replaces tensors."""
    tuned = {
        name: (tensor.double() + product(case, name)).to(tensor.dtype) if name in case.factors else tensor
        for name, tensor in case.stored.items()
    }
    write(case.tuned, {**tuned, **(whole or {})}, json.loads((case.base / "config.json").read_text()))


def load(folder: Path) -> Any:
    """Load a checkpoint with the class that its config names."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model, report = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"], report["missing_keys"]
    return model.eval()


def outputs(model: Any) -> dict[str, Tensor]:
    """Every floating tensor that the model's forward returns."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        found = model(**inputs(base), return_dict=True)
    return {key: value for key, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference over all outputs, relative to the largest output where that is above 1."""
    assert one.keys() == other.keys()
    assert one
    return max(float((one[key] - other[key]).abs().max() / max(1.0, float(other[key].abs().max()))) for key in one)


def store(case: Case, folder: Path, *, full: list[Entry] | None = None, **options: Any) -> dict[str, str]:
    """Write the case's adapter; returns what was refused."""
    folder.mkdir(exist_ok=True)
    settings = {"dtype": "fp32", **options}
    return write_adapter(folder, case.modules(), full or [], base=case.checkpoint, form=PeftForm(**settings))


def attach(base: Path, adapter: Path) -> Any:
    """Load base and adapter from their files, with PEFT."""
    import peft

    return peft.PeftModel.from_pretrained(load(base), adapter).eval()


def without(case: Case, refused: Mapping[str, str]) -> None:
    """Forget the factors that were refused."""
    for name in [name for name in case.factors if name.removesuffix(".weight") in refused]:
        del case.factors[name]


def assert_parity(case: Case, adapter: Path, *, merge: bool = True) -> None:
    """The adapter has an effect, and that of the change made densely; merged by PEFT too."""
    model, wanted = attach(case.base, adapter), outputs(load(case.tuned))
    assert distance(outputs(load(case.base)), wanted) > 1e-2
    assert distance(outputs(model), wanted) <= 1e-5
    if merge:
        assert distance(outputs(model.merge_and_unload()), wanted) <= 1e-5


def assert_read_back(case: Case, adapter: Path) -> None:
    """Our own reader pairs the files with the base, every matrix once, and finds the same products."""
    plan = pair_adapter(case.checkpoint, open_plain(adapter), AnalyzeOptions(device="cpu"))
    assert {pair.base.spec.name for pair in plan.pairs} == set(case.factors)
    assert len({str(pair.key) for pair in plan.pairs}) == len(plan.pairs)
    elements = 0
    for pair in plan.pairs:
        found = read_low_rank(pair.tuned)
        wanted = view_matrix(product(case, pair.base.spec.name), pair.base.view)
        assert torch.allclose(found.lora_B @ found.lora_A, wanted, rtol=1e-12, atol=1e-12)
        elements += wanted.numel()
    assert elements == sum(case.stored[name].numel() for name in case.factors)
