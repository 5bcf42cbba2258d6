"""A font with the letters of all six languages: Noto Sans SC, which PyPI's `zhplot` carries.

matplotlib's own has no Chinese ones.
"""

from importlib.util import find_spec
from pathlib import Path

from matplotlib.font_manager import FontProperties

NAME = "Noto Sans SC"
_PACKAGE = "zhplot"


def find(package: str = _PACKAGE) -> Path:
    """The font's file. ValueError that names the font where the package that carries it is not installed."""
    spec = find_spec(package)
    file = Path(spec.origin).parent / "fonts" / "NotoSansSC-Regular.ttf" if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise ValueError(
            f"samples.png has Chinese words, and the font {NAME} that draws them is not here: `pip install "
            f"{_PACKAGE}`, which the extra `data` names, brings it"
        )
    return file


def of_size(points: float) -> FontProperties:
    """The font in a size, for matplotlib's `fontproperties`."""
    return FontProperties(fname=str(find()), size=points)
