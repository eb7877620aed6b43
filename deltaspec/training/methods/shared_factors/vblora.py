"""VB-LoRA: ΔW = B·A, whose pieces of length b are mixed from the few best of h vectors that all layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options.methods.shared_factors import VbLoraOptions
from deltaspec.training.methods.shared_factors.vector_bank import INDICES, WEIGHTS, mix_vectors, restore_logits
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import Attachment, Group, Method, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, module_at, refuse_embeddings
from deltaspec.training.sites.site import Site
from deltaspec.types.methods import PeftConfig

BANK = "base_model.vblora_vector_bank"
KINDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # bytes of a released index → its dtype


class VbLoraUpdate(Update):
    """Logits of one site over the bank: A (r, d_in/b, h), B (d_out/b, r, h)."""

    def __init__(self, site: Site, bank: nn.Parameter, options: VbLoraOptions, generator: torch.Generator) -> None:
        super().__init__(site)
        self.options, self.bank = options, bank
        (d_out, d_in), b = site.shape, options.vector_length
        shapes = (options.rank, d_in // b, options.vectors), (d_out // b, options.rank, options.vectors)
        self.logits_A, self.logits_B = (
            make_parameter(shape, bank, lambda t: t.normal_(0, 0.1, generator=generator)) for shape in shapes
        )

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y + weight · B A x; A and B are mixed anew each time, their product is never formed."""
        lora_A, lora_B = self.factors()
        h = F.linear(F.dropout(x.to(lora_A.dtype), self.options.dropout, self.training), lora_A)
        return y + F.linear(h * weight if weight != 1 else h, lora_B).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B; there is no α/r."""
        lora_A, lora_B = (
            mix_vectors(logits, self.bank, self.options.topk) for logits in (self.logits_A, self.logits_B)
        )
        return lora_A.flatten(1), lora_B.transpose(1, 2).flatten(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return both logits under PEFT's names."""
        return {"vblora_logits_A": self.logits_A, "vblora_logits_B": self.logits_B}

    def shared(self) -> dict[str, Tensor]:
        """Return the bank."""
        return {BANK: self.bank}


class VbLoraAttachment(Attachment):
    """VB-LoRA, which can be released as the few weights and indices that count."""

    options: VbLoraOptions

    def groups(self) -> list[Group]:
        """Return the bank at the loop's learning rate, and the logits at a multiple of it.

        Raises
        ------
        CheckpointError
            If the adapter was loaded from a file that holds the best weights only.
        """
        trained = self.trained()
        bank = trained.pop(BANK)
        if any(bool(torch.isinf(logits).any()) for logits in trained.values()):
            message = (
                f"Cannot train the adapter '{self.name}' further: it was saved with its {self.options.topk} best "
                "weights of each piece only; start from one that was saved without --save-topk."
            )
            raise CheckpointError(message)
        return [Group((bank,)), Group(tuple(trained.values()), factor=self.options.logits_factor)]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors in; best weights become their logarithms, with -inf for all other vectors."""
        whole = dict(tensors)
        for name in [name for name in tensors if name.endswith(INDICES)]:
            stem = name.removesuffix(INDICES)
            if stem + WEIGHTS in whole:
                pair = whole.pop(name), whole.pop(stem + WEIGHTS)
                whole[stem] = restore_logits(*pair, vectors=self.options.vectors, name=stem)
        super().load(whole)

    def released(self) -> dict[str, Tensor]:
        """Return bank and logits, or of each piece's logits the best alone: k indices and k-1 weights."""
        if not self.options.save_topk:
            return self.state()
        released = {BANK: self.shared[BANK]}
        for name, logits in self.state().items():
            if name != BANK:
                best, places = logits.detach().topk(self.options.topk, dim=-1)
                released[name + INDICES] = places.to(KINDS[self.options.index_size])
                kept = best.softmax(-1)[..., :-1].contiguous()
                over = kept.sum(-1, keepdim=True) > 1  # by rounding; PEFT takes the logarithm of 1 - sum
                released[name + WEIGHTS] = torch.where(over, kept * (1 - 1e-6), kept)
        return released

    def stored(self) -> int:
        """Count what the smallest release holds: hb + Q (k-1 + k f), Q pieces, f = bytes of an index / 4."""
        trained = self.trained()
        bank, k, size = trained.pop(BANK).numel(), self.options.topk, self.options.index_size
        pieces = sum(logits.numel() for logits in trained.values()) // self.options.vectors
        return int(bank + pieces * (k - 1) + pieces * k * size // 4)


def attach(model: nn.Module, sites: Sequence[Site], options: VbLoraOptions, *, name: str, seed: int) -> Attachment:
    """Put VB-LoRA at every site, not the identity: bank uniform in ±0.02, logits normal with deviation 0.1.

    Arguments are as of every method's attach, see Method.

    Raises
    ------
    OptionError
        If a site is an embedding, or ``vector_length`` does not divide its sides.
    """
    refuse_embeddings(sites, "vblora")
    for site in sites:
        if any(side % options.vector_length for side in site.shape):
            message = (
                f"--vector-length is {options.vector_length}, which does not divide the {site.shape[0]} × "
                f"{site.shape[1]} of '{site.name}': pass a divisor of every side, or leave it out of --targets."
            )
            raise OptionError(message)
    generator = torch.Generator().manual_seed(seed)
    like = base_matrix(module_at(model, sites[0].path), sites[0])
    shape = (options.vectors, options.vector_length)
    bank = make_parameter(shape, like, lambda t: t.uniform_(-0.02, 0.02, generator=generator))
    updates = [VbLoraUpdate(site, bank, options, generator) for site in sites]
    return VbLoraAttachment(model, updates, name=name, method="vblora", options=options)


def to_peft(options: VbLoraOptions) -> PeftConfig:
    """Return the fields of PEFT's VBLoRAConfig."""
    return {
        "r": options.rank,
        "num_vectors": options.vectors,
        "vector_length": options.vector_length,
        "topk": options.topk,
        "save_only_topk_weights": options.save_topk,
        "vblora_dropout": options.dropout,
        "bias": "none",
    }


def from_peft(config: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> VbLoraOptions:
    """Read PEFT's VBLoRAConfig; it must say of the bank what the file does, before anything of its size is made."""
    size = (config["num_vectors"], config["vector_length"])
    if shapes.get(BANK) != size:
        message = f"its num_vectors and vector_length are {size}, the file's '{BANK}' has {shapes.get(BANK)}"
        raise ValueError(message)
    return VbLoraOptions(
        config["r"],
        *size,
        config["topk"],
        save_topk=bool(config.get("save_only_topk_weights", False)),
        dropout=config.get("vblora_dropout", 0.0),
    )


METHOD = Method(
    title="VB-LoRA",
    reference="Li, Han, Ji, NeurIPS 2024, arXiv:2405.15179",
    options=VbLoraOptions,
    attach=attach,
    identity=False,
    peft="VBLORA",
    to_peft=to_peft,
    from_peft=from_peft,
)
