"""Figures that may leave: saved here, they carry the words in them and a seal under the local key.

A face is a picture, and so is a figure. A guard cannot tell one from the other by looking, but it can tell whether
our own code drew it: `save` seals the pixels together with every word that is drawn. A photograph inside a figure
(an image with colours of its own) gets no seal.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import _ImageBase
from matplotlib.text import Text

from .pseudonyms import load_key

MAGIC = b"\x89PNG\r\n\x1a\n"
WORDS, SEAL = b"qafe-words", b"qafe-seal"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG that `words_in` knows again; one that shows a photograph gets no seal."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    content = out.getvalue()
    if not any(_has_own_colours(image) for image in figure.findobj(_ImageBase)):
        words = json.dumps(sorted({text.get_text() for text in figure.findobj(Text)} - {""}, key=str)).encode()
        seal = _seal(words, content, load_key())
        end = content.rindex(b"\0\0\0\0IEND")
        content = content[:end] + _chunk(WORDS, words) + _chunk(SEAL, seal) + content[end:]
    path.write_bytes(content)


def words_in(content: bytes, key: bytes) -> list[str] | None:
    """The words that are drawn in a figure of ours; None for any other file, or one that was changed."""
    if not content.startswith(MAGIC):
        return None
    notes, rest = {}, MAGIC
    try:
        for kind, data, chunk in _chunks(content):
            name, _, text = data.partition(b"\0") if kind == b"tEXt" else (b"", b"", b"")
            if name in (WORDS, SEAL):
                notes[name] = text
            else:
                rest += chunk
    except struct.error:
        return None
    if notes.keys() != {WORDS, SEAL} or not hmac.compare_digest(notes[SEAL], _seal(notes[WORDS], rest, key)):
        return None
    return [str(word) for word in json.loads(notes[WORDS])]


def _has_own_colours(image: _ImageBase) -> bool:
    """Whether an image is a photograph or the like, not numbers that a colour map paints."""
    array = image.get_array()
    return array is None or array.ndim != 2


def _seal(words: bytes, content: bytes, key: bytes) -> bytes:
    return hmac.new(key, words + b"\0" + content, hashlib.sha256).hexdigest().encode()


def _chunk(name: bytes, text: bytes) -> bytes:
    data = b"tEXt" + name + b"\0" + text
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(kind, data, the whole chunk) of each chunk; what follows the last one counts as changed."""
    place = len(MAGIC)
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        whole = content[place : place + 12 + length]
        yield kind, whole[8:-4], whole
        place += 12 + length
