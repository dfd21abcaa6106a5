"""Methods whose weights others have as well: a file for each, with their names as data."""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict

from mae_jax.convert.families import hivit, m3ae, mae, mixmim, um_mae, videomae
from mae_jax.convert.families.family import Family, need
from mae_jax.convert.layouts import Layout
from mae_jax.errors import ConfigError

FAMILIES = {
    module.FAMILY.method: module.FAMILY for module in (mae, hivit, mixmim, um_mae, videomae, m3ae)
}  # of layouts with the same names, the first is recognised

# Names that tell a file of a library whose names, and more than its names, differ from all above.
FOREIGN = {
    "backbone.patch_embed.projection.weight": "mmpretrain, which also orders some arrays in another"
    " way: convert the authors' own file",
}


def family_of(config: ConfigDict) -> Family:
    """Return the family of a run.

    Raises:
      ConfigError: if nobody else has its method, or its model.
    """
    name = config.model.name
    need(
        name in FAMILIES,
        f"model.name {name}: other libraries have no such model, it cannot be converted",
    )
    FAMILIES[name].check(config)
    return FAMILIES[name]


def recognise(names: Iterable[str], where: str, *, clips: bool = False) -> tuple[Family, Layout]:
    """Return the layout that most of `names` belong to, and its family.

    Args:
      names: of arrays.
      where: they are from, for messages.
      clips: the model is one of clips, some of whose names are those of a ViT.

    Raises:
      ConfigError: if they are of none.
    """
    names = list(names)
    for name, whose in FOREIGN.items():
        need(name not in names, f"{where}: expected the names of the authors' code, got {whose}")
    pairs = [
        (family, layout)
        for family in FAMILIES.values()
        for layout in family.layouts
        if layout.clips == clips
    ]
    best = max(pairs, key=lambda pair: pair[1].known(names))
    if not best[1].has("encoder", names):
        example = f", such as {min(names)!r}" if names else ""
        raise ConfigError(
            f"{where}: expected weights of a ViT with the names of the official MAE, timm or"
            f" transformers, or of {', '.join(method for method in FAMILIES if method != 'mae')},"
            f" got {len(names)} other arrays{example}"
        )
    return best
