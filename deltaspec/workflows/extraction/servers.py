"""What servers that are not PEFT take of an adapter, as they were run on 2026-11-28: the manual's page on servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deltaspec.architecture.match import identify
from deltaspec.architecture.patterns import EXPERT
from deltaspec.errors import OptionError, PairingError
from deltaspec.io.lay_out import StandIn
from deltaspec.pairing.modules import IN_BLOCKS
from deltaspec.types import Checkpoint, ModulePair


@dataclass(frozen=True, slots=True)
class Server:
    """Who loads an adapter.

    Attributes
    ----------
    name : str
        As its makers write it.
    then : str
        What to do with a merged model.
    conv1d : str
        What it does with factors of GPT-2's Conv1D.
    experts : str
        Why it takes no factors of single experts, each a module; "" where it takes them.
    without : frozenset of str
        Values of model_type of which it loads no adapter at all: a list, for only its own classes know.
    ranks : tuple of int
        The values of --max-lora-rank that it knows, ascending; empty where it has no such bound.
    commands : tuple of str
        What serves an adapter, with BASE, FOLDER (of the base), ADAPTER and BOUND (of ranks) to be filled in.
    """

    name: str
    then: str
    conv1d: str
    experts: str = ""
    without: frozenset[str] = frozenset()
    ranks: tuple[int, ...] = ()
    commands: tuple[str, ...] = ()

    def max_lora_rank(self, rank: int) -> int:
        """Return the least bound on ranks that it knows and ``rank`` keeps; where it knows none, the rank.

        Raises
        ------
        OptionError
            If the rank is above all bounds.
        """
        found = next((bound for bound in self.ranks if rank <= bound), None)
        if found is None and self.ranks:
            most = self.ranks[-1]
            message = f"The adapter has rank {rank}, and {self.name} loads at most {most}: pass --max-rank {most}."
            raise OptionError(message)
        return found or rank


SERVERS = {
    "vllm": Server(
        "vLLM",
        "serve the merged model",
        "vLLM loads no adapters of models with GPT-2's Conv1D",
        experts="vLLM loads factors of experts only where all of them are there, at one rank",
        without=frozenset({"gpt2", "bloom", "falcon", "gptj", "stablelm"}),
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        commands=("vllm serve BASE --enable-lora --max-lora-rank BOUND --lora-modules mine=ADAPTER",),
    ),
    "llamacpp": Server(
        "llama.cpp",
        "convert the merged model",
        "llama.cpp reads factors of GPT-2's Conv1D without transposing them",
        commands=(
            "python convert_hf_to_gguf.py FOLDER --outfile base.gguf",
            "python convert_lora_to_gguf.py ADAPTER --base FOLDER --outfile adapter.gguf",
            "llama-server -m base.gguf --lora adapter.gguf",
        ),
    ),
}


def refuse_modules(modules: Iterable[ModulePair], base: Checkpoint, target: str) -> dict[str, str]:
    """Say of which modules a target does not take factors: tensor → why; none where the target is peft."""
    if target not in SERVERS:
        return {}
    server, kind = SERVERS[target], str(base.config.get("model_type"))
    if kind in server.without:
        return {module.name: f"{server.name} loads no adapters of the model type {kind}" for module in modules}
    conv1d = _holds_conv1d(base)
    said = {module.name: _refusal(module, target, conv1d=conv1d) for module in modules}
    return {name: reason for name, reason in said.items() if reason}


def _refusal(module: ModulePair, target: str, *, conv1d: bool) -> str:
    server, key = SERVERS[target], module.pairs[0].key
    if module.kind not in ("linear", "conv1d") or key.role not in IN_BLOCKS or key.depth is None:
        return f"{target} takes factors of the blocks' linear layers only"
    if module.kind == "conv1d" or conv1d:
        return server.conv1d
    return server.experts if EXPERT.search(f"{module.path}.") else ""


def _holds_conv1d(base: Checkpoint) -> bool:
    """Tell whether a base stores its linear layers as (d_in, d_out); adapters alone say it in their config."""
    if isinstance(base, StandIn):
        return False
    known = identify({name: spec.shape for name, spec in base.tensors.items()}, base.config)
    found = (matrix for parts in known.matrices.values() for matrix in parts if matrix.key.role in IN_BLOCKS)
    return any(matrix.view.transposed and matrix.view.expert is None for matrix in found)


def refuse_nothing_left(ref: str, left: Mapping[str, str], target: str) -> None:
    """Stop where no module gets factors.

    Parameters
    ----------
    ref : str
        What the modules belong to.
    left : mapping
        Tensor → why it gets none; the reason that most share is said.
    target : str

    Raises
    ------
    PairingError
        Always, with the way out.
    """
    most = Counter(left.values()).most_common(1)
    name = next((name for name, reason in left.items() if reason == most[0][0]), "nothing") if most else "nothing"
    reason, server = left.get(name, "it has none"), SERVERS.get(target)
    whom = f" for {server.name}" if server else ""
    advice = "change the options"
    if server:
        advice = f"write it with --target peft, put that into the base with deltaspec merge, and {server.then}"
    message = f"No matrix of {ref} can get factors{whom} (for example '{name}': {reason}): {advice}."
    raise PairingError(message)
