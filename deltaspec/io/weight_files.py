"""Which of a folder's files are its weights: sets of files that belong together, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from deltaspec.errors import CheckpointError
from deltaspec.io.file_formats import ORDER, SUFFIXES

TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)")
INDEX = re.compile(rf".+(?:{'|'.join(map(re.escape, SUFFIXES))})(?:\.[^/]+?)?\.index(?:\.[^/]+?)?\.json")
# model-00001-of-00002.safetensors, and what is split by rank: consolidated.00-of-02.pth, model0-mp8.safetensors
NUMBERED = re.compile(r"(?P<stem>.*?[-._]?)(?P<number>\d+)(?P<of>[-_]of[-_]|-mp)(?P<count>\d+)(?P<suffix>\..*)")
# What transformers and diffusers load: a stem of theirs, perhaps with a variant's label (fp16, non_ema) at one of the
# places that their versions have put it, of one file, a shard or an index.
LOADED = re.compile(
    r"(?P<stem>(?:diffusion_pytorch_|pytorch_)?model)(?:\.(?P<before>[^/]+?))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<after>[^/]+?))?"
    r"\.(?P<suffix>safetensors|bin)(?:(?:\.(?P<inner>[^/]+?))?\.index(?:\.(?P<last>[^/]+?))?\.json)?"
)
META = re.compile(r"consolidated\b.*")
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
FURTHEST = 10_000  # numbers of shards beyond any model's


@dataclass(frozen=True, slots=True)
class _Sort:
    """What a name says of its file; sorts from what is loaded first to what is loaded last.

    Names that a loader knows come before Meta's, these before all others; a name without a label before labelled ones,
    safetensors before pickled files and those before training checkpoints, as in ``ORDER``.
    """

    known: int
    labelled: bool
    form: int
    stem: int = 0
    label: str = ""

    @property
    def rank(self) -> tuple[int, bool, int, int]:
        """What decides which files are read; labels decide nothing."""
        return (self.known, self.labelled, self.form, self.stem)


def is_index(name: str) -> bool:
    """Tell whether a file of this name says which shard holds which tensor."""
    return bool(INDEX.fullmatch(name))


def choose_weights(names: Collection[str]) -> tuple[str, ...]:
    """Choose from a folder's file names those to open: one index, or the files that hold all weights.

    What transformers and diffusers load by default comes first: their own names without a variant's label, safetensors
    before pickled files, an index before single files, and these before shards that have no index. Then their names
    with a label, then Meta's ``consolidated``, then any others, training checkpoints (.ckpt) last; files of the same
    standing are taken together.

    Parameters
    ----------
    names : collection of str
        File names of one folder.

    Returns
    -------
    tuple of str
        One ``*.index.json`` (of several variants, each one's), or weight files; empty where there are none.

    Examples
    --------
    >>> choose_weights(["config.json", "pytorch_model.bin", "model.safetensors", "model.fp16.safetensors"])
    ('model.safetensors',)
    """
    found = _sorted(names)
    if not found:
        return ()
    first = min(sort.rank for sort in found.values())
    best: dict[str, list[str]] = {}
    for name, sort in found.items():
        if sort.rank == first:
            best.setdefault(sort.label, []).append(name)
    return tuple(name for held in best.values() for name in _one_form(held, loaded=first[0] == 0))


def find_weights(folder: Path, names: Collection[str]) -> list[Path]:
    """Return the paths of what ``choose_weights`` chooses; empty where there is nothing.

    Raises
    ------
    CheckpointError
        If shards are missing that the numbers of others promise, or only labels tell several indexes apart.
    """
    chosen = choose_weights(names)
    if len(chosen) > 1 and any(is_index(name) for name in chosen):
        message = f"Cannot tell which weights of '{folder}' are meant: {', '.join(chosen)}; open one by its own path."
        raise CheckpointError(message)
    if missing := missing_shards(chosen):
        message = f"Cannot open '{folder}': '{missing[0]}' is missing beside its other shards; download it."
        raise CheckpointError(message)
    return [folder / name for name in chosen]


def _one_form(names: list[str], *, loaded: bool) -> list[str]:
    """Keep one form of the same weights: an index, else a single file, else shards; other files are not the same."""
    if indexes := [name for name in names if is_index(name)]:
        return indexes[:1]
    single = [name for name in names if not NUMBERED.fullmatch(name)]
    return single if loaded and single else names


def passed_over(names: Collection[str], chosen: Collection[str]) -> list[str]:
    """List the weights beside those chosen, by one name of each variant and format: other variants, older copies.

    >>> passed_over(["model.safetensors", "model.fp16.safetensors", "optimizer.pt"], ["model.safetensors"])
    ['model.fp16.safetensors']
    """
    found = _sorted(names)
    taken = {_variant(name, found[name]) for name in chosen if name in found}
    others: dict[object, str] = {}
    for name, sort in found.items():
        if sort.known == 0 and (variant := _variant(name, sort)) not in taken:
            others.setdefault(variant, name)
    return list(others.values())


def _variant(name: str, sort: _Sort) -> object:
    """Return what tells one copy of a model from another; an index and its shards are one."""
    return sort.rank, sort.label, is_index(name) or bool(NUMBERED.fullmatch(name))


def without_label(name: str) -> str:
    """Return the name of a weight file without a variant's label, where loaders know the name.

    >>> without_label("model.fp16-00001-of-00002.safetensors"), without_label("mine.fp16.safetensors")
    ('model-00001-of-00002.safetensors', 'mine.fp16.safetensors')
    """
    match = LOADED.fullmatch(name)
    return f"{match['stem']}{match['shard'] or ''}.{match['suffix']}" if match and not is_index(name) else name


def _sorted(names: Collection[str]) -> dict[str, _Sort]:
    top = sorted((name for name in names if "/" not in name), key=lambda name: (len(name), name))
    sorts = {name: sort for name in top if (sort := _sort(name))}
    return dict(sorted(sorts.items(), key=lambda item: item[1].label))


def _sort(name: str) -> _Sort | None:
    """Say what a file is by its name; None where it holds no weights."""
    if match := LOADED.fullmatch(name):
        label = next((text for key in ("before", "after", "inner", "last") if (text := match[key])), "")
        return _Sort(0, bool(label), int(match["suffix"] == "bin"), STEMS.index(match["stem"]), label)
    weights = name.removesuffix(".json").partition(".index")[0] if is_index(name) else name
    form = next((place for place, suffixes in enumerate(ORDER) if weights.endswith(suffixes)), None)
    if form is None or TRAINING_STATE.match(name):
        return None
    return _Sort(1 if META.fullmatch(name) else 2, labelled=False, form=form)


def missing_shards(names: Collection[str]) -> list[str]:
    """Return the files that the numbering of others (…-00001-of-00003…) promises and that are not there.

    Numbers begin at 1, or at 0 where a file has that number.

    >>> missing_shards(["model-00001-of-00002.safetensors"]), missing_shards(["consolidated.00-of-01.pth"])
    (['model-00002-of-00002.safetensors'], [])
    """
    promised: set[str] = set()
    for name in names:
        if (match := NUMBERED.fullmatch(name)) and 0 < int(match["count"]) <= FURTHEST:
            number, stem, end = match["number"], match["stem"], "".join(match.group("of", "count", "suffix"))
            first = 0 if f"{stem}{0:0{len(number)}d}{end}" in names else 1
            promised |= {f"{stem}{n:0{len(number)}d}{end}" for n in range(first, first + int(match["count"]))}
    return sorted(promised - set(names))
