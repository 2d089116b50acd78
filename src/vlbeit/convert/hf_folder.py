"""What lies beside the weights in a folder of `transformers`: config.json and its companions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlbeit.convert.layouts import Request
from vlbeit.convert.pixels import PixelScaling
from vlbeit.errors import InputError
from vlbeit.jsonfile import read_json

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class HfConfig:
    """A config.json of `transformers`, asked with the error that names it."""

    path: Path
    tree: dict[str, Any]

    def whole(self, name: str) -> int:
        """A whole number that must be there, 1 at least.

        Raises:
            InputError: it is not.
        """
        value = self.tree.get(name)
        if type(value) is not int or value < 1:
            raise InputError(f"{self.path}: {name} is {value!r}, expected a whole number from 1 on")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0; `default` is the value of the library when it is left out."""
        value = self.tree.get(name, default)
        if not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise InputError(f"{self.path}: {name} is {value!r}, expected a number above 0")
        return float(value)

    def expect(self, name: str, value: object) -> None:
        """Raise InputError when a setting is another one; left out, it has that value."""
        found = self.tree.get(name, value)
        if found != value:
            raise InputError(
                f"{self.path}: {name} is {found!r}; this model can only be {value!r} there"
            )

    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers; empty when the config has none."""
        names = self.tree.get("id2label")
        if not isinstance(names, dict) or not names:
            return ()
        try:
            ordered = sorted((int(number), str(name)) for number, name in names.items())
        except ValueError:
            raise InputError(f"{self.path}: id2label has keys that are no numbers") from None
        if [number for number, _ in ordered] != list(range(len(ordered))):
            raise InputError(f"{self.path}: id2label does not number its {len(ordered)} classes")
        return tuple(name for _, name in ordered)

    def completed(self, request: Request) -> Request:
        """The request with the scaling of pixels that the folder tells."""
        if request.pixels is not None:
            return request
        return replace(request, pixels=pixel_scaling(self.path.parent))


def read_hf_config(place: Path, kind: str) -> HfConfig:
    """config.json of a folder, or beside a file.

    Raises:
        InputError: there is none, or it is of another kind of model.
    """
    path = (place if place.is_dir() else place.parent) / CONFIG
    tree = read_json(path)
    if tree.get("model_type") != kind:
        raise InputError(f"{path}: model_type is {tree.get('model_type')!r}, expected {kind!r}")
    return HfConfig(path, tree)


def pixel_scaling(folder: Path) -> PixelScaling | None:
    """Mean and deviation of preprocessor_config.json; None where there is no such file.

    Raises:
        InputError: they are not three numbers each.
    """
    path = folder / PREPROCESSOR
    if not path.is_file():
        return None
    tree = read_json(path)
    found = []
    for name in ("image_mean", "image_std"):
        value = tree.get(name, [0.5, 0.5, 0.5])
        if not (
            isinstance(value, list)
            and len(value) == 3
            and all(isinstance(n, (int, float)) and 0 <= n < 1e3 for n in value)
            and (name == "image_mean" or min(value) > 0)
        ):
            raise InputError(f"{path}: {name} is {value!r}, expected three numbers")
        found.append((float(value[0]), float(value[1]), float(value[2])))
    return PixelScaling(*found)
