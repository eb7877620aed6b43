"""What config.json says about sizes and model types, where it says it sensibly; it is untrusted."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.types import Config

TEXT = ("text_config", "llm_config", "language_config")
LARGEST = 10**7


@dataclass(frozen=True, slots=True)
class Sizes:
    """Head counts and widths, None where unknown; ``declared`` if config.json also named the family."""

    heads: int | None = None
    shared_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    declared: bool = False

    def attention(self, d_in: int) -> tuple[int, int, int] | None:
        """Return query heads, key-value heads and rows per head of a projection from ``d_in``; None if unknown."""
        if self.heads is None:
            return None
        size = self.head_size
        if size is None:
            size, left = divmod(d_in, self.heads)
            if left:
                return None
        return self.heads, self.shared_heads or self.heads, size


def read_sizes(config: Config, *, declared: bool) -> tuple[Sizes, Sizes]:
    """Read the sizes of the language model (or only model) and those of a vision tower.

    Parameters
    ----------
    config : dict
        Content of config.json; values of the wrong type count as absent.
    declared : bool
        Whether the family was chosen by this config.

    Returns
    -------
    tuple of Sizes
        Text, vision.
    """
    text = {key: value for name in TEXT for key, value in _section(config, name).items() if value is not None}
    return _sizes({**config, **text}, declared=declared), _sizes(_section(config, "vision_config"), declared=declared)


def read_model_types(config: Config) -> tuple[str, ...]:
    """Return every model_type that config.json names, the outermost first; diffusers' _class_name counts as one."""
    sections = [config, *(_section(config, name) for name in (*TEXT, "vision_config", "encoder", "decoder"))]
    values = [config.get("_class_name"), *(section.get("model_type") for section in sections)]
    return tuple(value for value in values if isinstance(value, str))


def _section(config: Config, name: str) -> Config:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _sizes(config: Config, *, declared: bool) -> Sizes:
    shared_heads = _count(config, "num_key_value_heads")
    if config.get("new_decoder_architecture") is True:
        shared_heads = _count(config, "num_kv_heads")
    elif isinstance(config.get("multi_query"), bool):
        shared_heads = 1 if config["multi_query"] else None
    return Sizes(
        heads=_count(config, "num_attention_heads", "n_head", "n_heads", "num_heads"),
        shared_heads=shared_heads,
        head_size=_count(config, "head_dim"),
        hidden=_count(config, "hidden_size"),
        declared=declared,
    )


def _count(config: Config, *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 < value <= LARGEST), None)
