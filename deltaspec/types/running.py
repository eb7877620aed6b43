"""What deltaspec asks of objects of transformers and accelerate, which are imported only where they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer


class Tokenizer(Protocol):
    """Of transformers."""

    pad_token_id: int | None
    eos_token_id: int | None
    model_max_length: int

    def __call__(
        self, texts: list[str], *, verbose: bool = ..., truncation: bool = ..., max_length: int | None = ...
    ) -> Mapping[str, list[list[int]]]:
        """Return token ids, special tokens included, as ``input_ids``."""

    def save_pretrained(self, save_directory: Path, /) -> object:
        """Write its files."""


class ModelConfig(Protocol):
    """Of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """Return what its config.json holds."""


class Scaler(Protocol):
    """The loss scaler of a training in float16."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it needs to go on."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Go on from a state."""


class Accelerator(Protocol):
    """Of accelerate: one process's part of a training."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""

    @property
    def num_processes(self) -> int:
        """How many there are."""

    @property
    def process_index(self) -> int:
        """Which one this is, from 0."""

    @property
    def is_main_process(self) -> bool:
        """Whether it is the one that writes."""

    @property
    def scaler(self) -> Scaler | None:
        """Under float16 only."""

    def prepare(self, model: nn.Module, optimizer: Optimizer, /) -> tuple[nn.Module, Optimizer]:
        """Wrap them for these processes."""

    def unwrap_model(self, model: nn.Module, /) -> nn.Module:
        """Return the model as it was prepared from."""

    def backward(self, loss: Tensor, /) -> None:
        """Compute gradients."""

    def no_sync(self, model: nn.Module, /) -> AbstractContextManager[None]:
        """Leave gradients of this backward pass to the process alone."""

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, /) -> Tensor:
        """Clip gradients, and return their norm before."""

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """Return the sum or mean over processes."""

    def gather(self, tensor: Tensor, /) -> Tensor:
        """Return the tensors of all processes along the first axis."""

    def wait_for_everyone(self) -> None:
        """Wait for the other processes."""

    def main_process_first(self) -> AbstractContextManager[None]:
        """Let the others wait until the writing process has done this."""
