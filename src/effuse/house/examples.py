"""The prompts by which the house pipelines are looked at and compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    text: what is asked for; subgroup: its class; points: code points of the emoji it names, by
    which `effuse.house.data.pictures` knows the real pictures; style: the style asked for, or "";
    held: True if this emoji was not seen in this style in training.
    """

    text: str
    subgroup: str
    points: str
    style: str = ""
    held: bool = False


_COMMON = (
    ("red apple", "food-fruit", "1f34e"),
    ("blue heart", "heart", "1f499"),
    ("yellow smiling face", "face-smiling", "1f604"),
    ("car", "transport-ground", "1f697"),
    ("fish", "animal-marine", "1f41f"),
    ("green leaf", "plant-other", "1f343"),
    ("yellow banana", "food-fruit", "1f34c"),
    ("red rose", "plant-flower", "1f339"),
    ("dog face", "animal-mammal", "1f436"),
    ("cat face", "animal-mammal", "1f431"),
    ("green tree", "plant-other", "1f333"),
    ("house", "place-building", "1f3e0"),
    ("yellow star", "sky & weather", "2b50"),
    ("rocket", "transport-air", "1f680"),
    ("pizza", "food-prepared", "1f355"),
    ("birthday cake", "food-sweet", "1f382"),
    ("soccer ball", "sport", "26bd"),
    ("red balloon", "event", "1f388"),
    ("golden crown", "clothing", "1f451"),
    ("butterfly", "animal-bug", "1f98b"),
    ("rainbow", "sky & weather", "1f308"),
    ("orange pumpkin", "event", "1f383"),
    ("white ghost", "face-costume", "1f47b"),
    ("flag france", "country-flag", "1f1eb-1f1f7"),
)

# each of them is in the training pictures in the two other styles only
_HELD = (
    ("red apple", "food-fruit", "1f34e", "noto"),
    ("green apple", "food-fruit", "1f34f", "twemoji"),
    ("donut", "food-sweet", "1f369", "fluent"),
    ("green snake", "animal-reptile", "1f40d", "fluent"),
    ("guitar", "musical-instrument", "1f3b8", "fluent"),
    ("yellow sunflower", "plant-flower", "1f33b", "noto"),
    ("dog", "animal-mammal", "1f436", "noto"),
    ("cup of coffee", "drink", "2615", "noto"),
    ("yellow heart", "heart", "1f49b", "twemoji"),
    ("green frog", "animal-amphibian", "1f438", "twemoji"),
    ("yellow face with heart eyes", "face-affection", "1f60d", "twemoji"),
    ("yellow face with sunglasses", "face-glasses", "1f60e", "fluent"),
)


def prompts() -> list[Prompt]:
    """Return 24 common prompts and 12 of a style and an emoji never seen together."""
    out = [Prompt(text, subgroup, points) for text, subgroup, points in _COMMON]
    for name, subgroup, points, style in _HELD:
        out.append(Prompt(f"{style} {name}", subgroup, points, style, held=True))
    return out
