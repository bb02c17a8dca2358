"""The one door to MLflow: what a sweep sends passes here, as text or as a file, and nothing that names a patient does.

Names become pseudonyms and folders become words, wherever they stand: in params, tags, names of metrics, reasons,
tracebacks, tables and pages. Of files only text, our own figures and our own weights may leave; a picture from
anywhere else, an array, a video or an input example stays. What is held back is said once, without naming it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import getpass
import html
import json
import logging
import re
import shutil
import socket
import tempfile
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qafe.data.cohort import Cohort
from qafe.errors import ConfigError

from . import pictures
from .own_words import OWN, own_words
from .pseudonyms import load_key, pseudonym
from .spool import Entry

logger = logging.getLogger(__name__)

OURS = ("kind", "uri", "folder", "trial", "sweep_id", "state", "names", "folders", "own")
"""Fields of the spool's entries that are for the sender alone, or that the sweep itself has made up."""
NOBODY = frozenset({"admin", "app", "docker", "jovyan", "localhost", "mlflow", "nobody", "qafe", "ray", "root", "vm"})
"""Names of users and machines that belong to no person."""
SHORT = 5
"""A name of so many characters or fewer is looked for as a whole word; a longer one anywhere."""
ANY_CASE = 4
"""From so many characters on, case does not matter: ``p01`` is a word of many a program."""
Place = tuple[str, str, int]
"""Where a name is looked for: what stands before and after it, as patterns, and flags."""
ANYWHERE: Place = ("", "", re.IGNORECASE)
AS_WORD: Place = (r"(?<![^\W_])", r"(?![^\W_])", re.IGNORECASE)
AS_WRITTEN: Place = (*AS_WORD[:2], 0)
ABSOLUTE = re.compile(r"(?<![\w/.:~<>-])/(?:[\w.@+~-]+/)+[\w.@+~-]*|\b[A-Za-z]:\\[^\s\"']+")
EMBEDDED = re.compile(
    r"data:[\w/+.=;-]*;base64,(?P<uri>[\w+/=%]+)"
    r"|(?<![\w+/])(?P<plain>(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3])[\w+/]{64,}=*)"
)
"""A file inside a text; the second is a JPEG, PNG, GIF, WebP or BMP without a word about what it is."""
PIXELS = re.compile(r"(?<![\d.])(?>(?:25[0-5]|2[0-4]\d|1?\d?\d)[\s,;\[\]]+){768,}+")
"""As many bytes as the smallest picture that shows somebody; none of our tables has so many small whole numbers."""
EXAMPLE = "input_example"
"""MLflow's name of a model's example; ours would be a patient's clip."""


@dataclass(frozen=True)
class Secrets:
    """What must not leave.

    Attributes:
        names: of patients, videos, users, machines.
        folders: paths of this machine.
        own: what a sweep itself says, which stays as it is; see `Guard`.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    own: tuple[str, ...] = OWN

    @classmethod
    def of_machine(cls, *folders: Path | str) -> Secrets:
        """The user's and the machine's own, and these folders."""
        people = [socket.gethostname()]
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            people.append(getpass.getuser())
        names = tuple(name for name in people if name.lower() not in NOBODY and not _spoken(name, "\n".join(OWN)))
        return cls(names, tuple(sorted({str(folder) for folder in (*folders, Path.home())})))

    @classmethod
    def of_cohort(cls, cohort: Cohort, *folders: Path | str) -> Secrets:
        """The above, and the cohort's patients, videos and folder.

        A video that is called like an expression or a part of what a sweep says (``Smile``, ``squeeze``, ``test``)
        names nobody. A patient who is called so does: his name stays a secret; see `check_patients`.
        """
        machine = cls.of_machine(cohort.store.root, *folders)
        samples = (*cohort.manifest.train, *cohort.manifest.test)
        patients = {sample.patient for sample in samples}
        own = own_words(cohort.manifest.expressions)
        said = "\n".join(own)
        others = {*machine.names} | {sample.video for sample in samples}
        names = patients | {sample.id for sample in samples} | {name for name in others if not _spoken(name, said)}
        clashes = {text for _, text in _clashes(cohort)}
        return cls(tuple(sorted(names)), machine.folders, tuple(text for text in own if text not in clashes))


def check_patients(cohort: Cohort) -> None:
    """Checks that no patient is called like an expression, or like a part of what a sweep says.

    Raises:
        ConfigError: one is; with a pseudonym in its place numbers and weights would lose their names.
    """
    for patient, text in _clashes(cohort):
        raise ConfigError(
            f"a patient's name must not be a part of what a sweep says in MLflow, got {patient!r} ({text!r} has it). "
            "Rename the patient in the dataset's folders and CSV files, or let names pass with --allow-identifiable."
        )


class Guard:
    """Keeps names, folders and faces back.

    Names of digits alone, or of a single character, are found in paths and in names of videos, not by themselves.

    Args:
        names: of patients, videos, users and machines.
        folders: paths of this machine.
        own: texts that stay as they are: a spelling of a name that is found in one of them is not looked for.
        on: False lets everything pass.
    """

    def __init__(
        self, names: Iterable[str], folders: Iterable[str], *, own: Iterable[str] = (), on: bool = True
    ) -> None:
        self.on = on
        self._said = False
        self._name_of: dict[str, str] = {}
        spellings: dict[Place, set[str]] = {ANYWHERE: set(), AS_WORD: set(), AS_WRITTEN: set()}
        for name in filter(_telling, names):
            for spelling in _spellings(name):
                spellings[_place(name)].add(spelling)
                self._name_of[spelling.casefold()] = name
        said = "\n".join(own)
        # Those that are found anywhere come first: a name may hold a shorter one.
        found = (_pattern(place, group, said) for place, group in spellings.items())
        self._patterns = [pattern for pattern in found if pattern]
        roots = sorted({folder.rstrip("/") for folder in folders}, key=len, reverse=True)
        whole = "|".join(re.escape(root) for root in roots if root) or "(?!)"
        self._folders = re.compile(rf"(?:{whole})(?![\w.-])(?:/[^\s\"'<>,;)]*)?")

    def text(self, text: str) -> str:
        """A short text without names, folders and other absolute paths."""
        return self._noted(text, ABSOLUTE.sub("path-hidden", self._clean_text(text)) if self.on else text)

    def finds(self, text: str) -> bool:
        """Whether there is something in a text that must not leave."""
        return self._clean_text(text) != text

    def entry(self, entry: Entry) -> Entry:
        """An entry of the spool, of which all is guarded but what the sender itself needs."""
        return {name: value if name in OURS else self.tree(value) for name, value in entry.items()}

    def tree(self, value: Any) -> Any:
        """Any JSON value, with every text in it guarded, names of fields too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(name): self.tree(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.tree(each) for each in value]
        return value

    @contextlib.contextmanager
    def cleaned(self, folder: Path) -> Iterator[Path]:
        """A copy of a folder with what may leave of it."""
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / "files"
            shutil.copytree(folder, copy)
            self.clean(copy)
            yield copy

    def clean(self, folder: Path) -> None:
        """Takes names out of a folder's texts, and deletes the files that must stay."""
        if not self.on:
            return
        for path in sorted(folder.rglob("*"), reverse=True):  # a folder after what is in it
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            elif path.is_symlink() or not self._may_leave(path, str(path.relative_to(folder))):
                path.unlink()
                self._say("a file is kept back")

    def _may_leave(self, path: Path, name: str) -> bool:
        if self.finds(name) or EXAMPLE in name:
            return False
        if path.suffix == ".safetensors":
            return self._weights_are_clean(path)
        content = path.read_bytes()
        if content.startswith(pictures.MAGIC):
            return self._all_clean(pictures.words_in(content, load_key()))
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return False
        if "\0" in text:
            return False
        guarded = self._clean_text(text)
        if path.suffix != ".diff":  # of our own source, in which an address looks like a path
            guarded = ABSOLUTE.sub("path-hidden", guarded)
        if guarded != text:
            path.write_text(self._noted(text, guarded))
        return True

    def _clean_text(self, text: str) -> str:
        text = PIXELS.sub("pixels-hidden ", EMBEDDED.sub(self._embedded, text))
        text = self._folders.sub("folder-hidden", text)
        for pattern in self._patterns:
            text = pattern.sub(self._pseudonym, text)
        return text

    def _embedded(self, found: re.Match[str]) -> str:
        coded = urllib.parse.unquote(found["uri"] or found["plain"])
        try:
            words = pictures.words_in(base64.b64decode(coded), load_key())
        except (binascii.Error, ValueError):
            words = None
        return found[0] if self._all_clean(words) else "data:,"

    def _all_clean(self, words: Sequence[str] | None) -> bool:
        return words is not None and not any(map(self.finds, words))

    def _weights_are_clean(self, path: Path) -> bool:
        """Whether a file is one of weights, with no name in its notes; a frame would be made of bytes."""
        try:
            with safe_open(path, "np") as weights:
                kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (no mapping)
                notes = json.dumps([list(weights.keys()), weights.metadata()])
        except (SafetensorError, OSError):
            return False
        return "U8" not in kinds and not self.finds(notes)

    def _pseudonym(self, found: re.Match[str]) -> str:
        return pseudonym(self._name_of.get(found[0].casefold(), found[0]), load_key())

    def _noted(self, before: str, after: str) -> str:
        if before != after:
            self._say("a name or a path was replaced")
        return after

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            logger.warning("the privacy guard is at work: %s on its way to MLflow (--allow-identifiable)", what)


def _telling(name: str) -> bool:
    """Whether a name tells something by itself."""
    return len(name) > 1 and not name.isdigit()


def _place(name: str) -> Place:
    if len(name) > SHORT or not name.isascii():  # not all scripts part their words
        return ANYWHERE
    return AS_WORD if len(name) >= ANY_CASE else AS_WRITTEN


def _pattern(place: Place, spellings: set[str], said: str) -> re.Pattern[str] | None:
    """What finds the spellings in their place, without those that it would find in what is said anyway."""
    before, after, flags = place
    while spellings:
        pattern = re.compile(f"{before}{_any_of(spellings)}{after}", flags)
        spoken = {found[0] for found in pattern.finditer(said)}
        if not spoken:
            return pattern
        of_ours = re.compile(_any_of(spoken), flags)
        spellings = {each for each in spellings - spoken if not of_ours.fullmatch(each)}
    return None


def _spoken(name: str, said: str) -> bool:
    """Whether a name, as it is written, would be found in what is said."""
    before, after, flags = _place(name)
    likely = _telling(name) and name.casefold() in said.casefold()
    return likely and re.search(before + re.escape(name) + after, said, flags) is not None


def _clashes(cohort: Cohort) -> list[tuple[str, str]]:
    """Patients whose names, or ids with them, are found in what a sweep says, each with the text."""
    own = own_words(cohort.manifest.expressions)
    said = "\n".join(own)
    found = []
    samples = (*cohort.manifest.train, *cohort.manifest.test)
    for patient in sorted({sample.patient for sample in samples}):
        guard = Guard([patient], ())
        if guard.finds(said):
            found += [(patient, text) for text in own if guard.finds(text)]
    for sample in samples:
        if _spoken(sample.id, said):
            found += [(sample.patient, text) for text in own if _spoken(sample.id, text)]
    return found


def _spellings(name: str) -> set[str]:
    """A name as it may stand in a text, in JSON, in a page or in a URL."""
    plain = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    spaced = {re.sub(r"[\W_]+", separator, each) for each in plain for separator in ("_", "-", " ", ".", "", "%20")}
    several = {each for each in spaced if len(each) > SHORT}
    found = {name} | plain | several
    ways: Sequence[Callable[[str], str]] = (lambda text: json.dumps(text)[1:-1], html.escape, urllib.parse.quote)
    return found | {way(each) for each in found for way in ways}


def _any_of(words: Iterable[str]) -> str:
    """A pattern of many words that looks at each character of a text only a few times: what begins alike is one."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        ways = []
        for character, rest in sorted(node.items(), reverse=True):  # the end of a word comes last: the longest wins
            ways.append(re.escape(character) + pattern(rest) if character else "")
        return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"

    return pattern(tree)
