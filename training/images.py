"""Images of samples: kept inside their folder, and safe to decode."""

from __future__ import annotations

import functools
import io
import stat
from pathlib import Path

from PIL import Image

from sp_fast.errors import DataError, ImageError, first_line
from sp_fast.training.conversation import ImageSource
from sp_fast.vision import MAX_PIXELS, load_image

_resolved = functools.lru_cache(maxsize=1 << 14)(Path.resolve)  # of folders, which many images share


class ImageFolder:
    """Where the paths of a data set begin, and what they cannot leave: by ``..``, an absolute path, or a link.

    Raises:
        DataError: no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"image folder {root} is no folder: give the one that the data's image paths begin at")
        self._root = root.resolve()

    def find(self, name: str) -> Path:
        """A regular file inside the folder, links resolved.

        Raises:
            DataError: there is none, it leads out of the folder, or it is no regular file: reading a pipe would wait.
        """
        try:
            path = self._root / name
            path = _resolved(path.parent) / path.name
            if path.is_symlink():
                path = path.resolve()
            inside = self._root in path.parents
            regular = inside and stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError as error:
            raise DataError(f"the image {_shown(name)} does not exist in {self._root}") from error
        except (OSError, ValueError, RuntimeError) as error:  # names that are too long, or no names; links in a circle
            raise DataError(f"the image {_shown(name)} cannot be found in {self._root}: {first_line(error)}") from error
        if not inside:
            raise DataError(f"the image {_shown(name)} leads out of {self._root}, where images have to be")
        if not regular:
            raise DataError(f"the image {_shown(name)} is no regular file")
        return path

    def load(self, source: ImageSource) -> Image.Image:
        """An RGB image of at most 64 megapixels, also when it is padded to a square.

        Raises:
            DataError: its path, as ``find``.
            ImageError: it cannot be decoded, or is too large.
        """
        image = load_image(_Bytes(source) if isinstance(source, bytes) else self.find(source))
        if max(image.size) ** 2 > MAX_PIXELS:
            raise ImageError(
                f"an image of {image.width}x{image.height} pixels would be padded to more than {MAX_PIXELS:,}: scale "
                "it down or crop it first"
            )
        return image


class _Bytes(io.BytesIO):
    """An encoded image in memory, by a name that messages can use."""

    def __str__(self) -> str:
        return f"an image of {len(self.getbuffer()):,} bytes"


def _shown(name: str) -> str:
    found = ascii(name)
    return found if len(found) <= 200 else f"{found[:200]}..."
