"""A patient's name and a face are planted in every channel to MLflow, and looked for in all that it then holds."""

import base64
import io
import itertools
import json
import re
import sqlite3
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from PIL import Image
from safetensors.numpy import save_file

import sweeps.driver
from qafe import config, dotted
from qafe.config import tiny
from qafe.data.cohort import Cohort, load_cohort
from qafe.data.manifest import Manifest, Sample
from qafe.errors import ConfigError
from qafe.model.qafenet import build
from qafe.store import CsvRow, Store
from sweeps.callbacks import TRACKED
from sweeps.command import main
from sweeps.monitor import Monitor
from sweeps.provenance import source_tags, trial_tags
from sweeps.studies import STUDIES
from sweeps.study import PRUNERS, SAMPLERS
from tests.conftest import QUICK_FLAGS
from tests.data.cohort import video_frames, video_landmarks
from tracking import pictures
from tracking.figures import trial_files
from tracking.guard import Guard, Secrets, check_patients
from tracking.pseudonyms import load_key, pseudonym
from tracking.runs import SweepTracker

from .stores import embedded
from .test_runs import checkpoint, runs_of  # noqa: F401 (a fixture)

NAME = "Grünwald_Anna"
VIDEO = "gruenwald0412smile"
DATA = "/data/clinic-7/study"
SPELLINGS = (NAME, "grünwald anna", "GRÜNWALD-ANNA", json.dumps(NAME)[1:-1], "Gr%C3%BCnwald_Anna", VIDEO, DATA)
SECRETS = Secrets((NAME, VIDEO, f"{VIDEO}_{NAME}"), (DATA,))


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    """A frame, uint8 [64,64,3]."""
    return video_frames(3, 1)[0]


def jpeg(face: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(face).save(out, "JPEG")
    return out.getvalue()


def figure(title: str, image: np.ndarray | None = None) -> Figure:
    drawn = Figure(figsize=(2, 2))
    axes = drawn.add_subplot()
    axes.set_title(title)
    if image is not None:
        axes.imshow(image)
    return drawn


def plant_files(folder: Path, face: np.ndarray) -> None:
    """Every way in which a folder of artifacts may hold the name or the face; ``kept-*`` have neither."""
    folder.mkdir()
    coded = base64.b64encode(jpeg(face)).decode()
    for number, spelling in enumerate(SPELLINGS):
        (folder / f"table-{number}.csv").write_text(f"trial,patient\n1,{spelling}\n")
    (folder / f"{NAME}.csv").write_text("1,2\n")
    (folder / VIDEO).mkdir()
    (folder / VIDEO / "numbers.csv").write_text("1,2\n")
    (folder / "face.jpg").write_bytes(jpeg(face))
    Image.fromarray(face).save(folder / "face.png")
    Image.fromarray(face).save(folder / "renamed.gif")
    (folder / "renamed.gif").rename(folder / "renamed.txt")
    np.save(folder / "face.npy", face)
    (folder / "face.bin").write_bytes(face.tobytes())
    (folder / "video.mp4").write_bytes(b"\0\0\0\x20ftypisom" + face.tobytes())
    (folder / "link.csv").symlink_to(folder / "face.jpg")
    (folder / "page.html").write_text(f"<p>{NAME}</p><img src='data:image/jpeg;base64,{coded}'><p>{coded}</p>")
    (folder / "pixels.csv").write_text("\n".join(",".join(map(str, row.ravel())) for row in face))
    (folder / "pixels.json").write_text(json.dumps(face.tolist()))
    (folder / "input_example.json").write_text(json.dumps({"clip": [f"{DATA}/frames/{NAME}/{VIDEO}"]}))
    save_file({"frame": face}, folder / "frame.safetensors")
    save_file({"w": np.ones(3, np.float32)}, folder / "named.safetensors", metadata={"of": NAME})
    pictures.save(figure(NAME), folder / "named.png")
    pictures.save(figure("a face", face), folder / "shown.png")
    figure("drawn by somebody else").savefig(folder / "unsealed.png")
    pictures.save(figure("residuals of 3fa85f64"), folder / "kept-figure.png")
    pictures.save(figure("a heatmap", face[..., 0]), folder / "kept-map.png")
    (folder / "kept-table.csv").write_text("patient,score\n3fa85f64,2.5\n")
    save_file({"w": np.ones(3, np.float32)}, folder / "kept-weights.safetensors", metadata={"epoch": "3"})


def plant(folder: Path, face: np.ndarray, uri: str, *, identifiable: bool) -> None:
    """A sweep with the name and the face in all that it says."""
    coded = base64.b64encode(jpeg(face)).decode()
    said = {f"said.{number}": f"of {spelling}, then" for number, spelling in enumerate(SPELLINGS)}
    said |= {"picture": f"data:image/jpeg;base64,{coded}", "plain_picture": coded}
    named = {f"of {NAME}": "1", f"{VIDEO}.x": "2"}
    tracker = SweepTracker(
        folder / "tracking.jsonl",
        uri=uri,
        experiment=f"study-{NAME}",
        sweep="s-1",
        sweep_id="0a" * 16,
        params=said | named,
        tags=said | named,
        dataset=(f"cohort of {NAME}", "d" * 64),
        clips={f"clips of {NAME}": 1},
        secrets=SECRETS,
        identifiable=identifiable,
    )
    tracker.trial_started("0", 0, said | named, said | named)
    tracker.epoch("0", 1, {"spearman": 0.5, f"spearman_{NAME}": 0.25, f"{VIDEO}/mae": 1.0})
    tracker.trial_tags("0", said | named)
    tracker.trial_metrics("0", {f"test_{NAME}": 0.5})
    trace = f'File "{DATA}/frames/{NAME}/x.py", line 3\nMediaError: {DATA}/frames/{NAME}/{VIDEO} {coded}\n'
    tracker.trial_ended("0", "failed", folder=None, reason=f"no frames in {DATA}/{NAME}", trace=trace)
    tracker.sweep_files(folder / "planted", {f"of {NAME}": 1.0})
    tracker.sweep_ended("finished")
    assert tracker.close() == 0


def all_that_arrived(folder: Path) -> dict[str, bytes]:
    """The whole database, as its file and as text, and every artifact by its path."""
    found = {"mlflow.db": b"".join(path.read_bytes() for path in sorted(folder.glob("mlflow.db*")))}
    with sqlite3.connect(folder / "mlflow.db") as database:
        found["dump"] = "\n".join(database.iterdump()).encode()
    artifacts = list((folder / "mlruns").rglob("*"))
    assert len(artifacts) >= 4
    contents = [path.read_bytes() if path.is_file() else b"" for path in artifacts]
    return found | dict(zip([str(path.relative_to(folder)) for path in artifacts], contents, strict=True))


def identifying(arrived: dict[str, bytes], face: np.ndarray) -> list[str]:
    """Where the name or the face is."""
    signs = [spelling.casefold().encode() for spelling in SPELLINGS]
    signs += [spelling.encode() for spelling in SPELLINGS]
    coded = base64.b64encode(jpeg(face)).decode()
    signs += [jpeg(face)[-200:-100], face[30].tobytes(), coded[40:160].encode(), coded[40:160].casefold().encode()]
    signs += [",".join(map(str, face[30].ravel()[:60])).encode(), json.dumps(face[30].tolist()[:20]).encode()]
    places = []
    for name, content in arrived.items():
        texts = (content, name.encode(), content.decode(errors="ignore").casefold().encode())
        if any(sign in text for sign in signs for text in texts):
            places.append(name)
        if content.startswith((b"\x89PNG", b"\xff\xd8", b"GIF")) and pictures.words_in(content, load_key()) is None:
            places.append(name)
    return sorted(set(places))


def test_no_name_and_no_face_arrives_by_any_channel(
    tmp_path: Path, face: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    plant_files(tmp_path / "planted", face)
    before = sorted((tmp_path / "planted").rglob("*"))
    plant(tmp_path, face, embedded(store), identifiable=False)
    arrived = all_that_arrived(store)
    assert identifying(arrived, face) == []
    assert sorted((tmp_path / "planted").rglob("*")) == before

    run = runs_of(embedded(store))["s-1-000"]
    hidden = pseudonym(NAME, load_key())
    assert run.data.params[f"of {hidden}"] == "1"
    assert run.data.metrics[f"spearman_{hidden}"] == 0.25
    assert run.data.metrics["spearman"] == 0.5
    assert run.data.tags["qafe.reason"] == "no frames in folder-hidden"
    assert "qafe.identifiable" not in run.data.tags
    parent = runs_of(embedded(store))["s-1"]
    names = {item.path for item in MlflowClient(embedded(store)).list_artifacts(parent.info.run_id)}
    kept = {"kept-figure.png", "kept-map.png", "kept-table.csv", "kept-weights.safetensors"}
    texts = {f"table-{number}.csv" for number in range(len(SPELLINGS))} | {"page.html", "pixels.csv", "pixels.json"}
    assert names == kept | texts
    said = [line for line in caplog.messages if "privacy guard" in line]
    assert len(said) == 1
    assert not [spelling for spelling in SPELLINGS if spelling in said[0]]


def test_paths_in_files_are_hidden_and_what_only_looks_like_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"model.rgb.weights": "/mnt/clinic/anna/a.pth"}')
    page = '<svg xmlns="http://www.w3.org/2000/svg"><path d="M1/2"/></svg><style>a{font:12px/1.5 x;width:50%}</style>'
    (tmp_path / "report.html").write_text(page)
    diff = "--- /dev/null\n+++ b/sweeps/new.py\n+CREATES = '/mlflow/experiments/create'\n"
    (tmp_path / "source.diff").write_text(diff)
    Guard((), ()).clean(tmp_path)
    assert (tmp_path / "summary.json").read_text() == '{"model.rgb.weights": "path-hidden"}'
    assert (tmp_path / "report.html").read_text() == page
    assert (tmp_path / "source.diff").read_text() == diff


def test_allowed_is_noted_and_lets_everything_pass(tmp_path: Path, face: np.ndarray) -> None:
    store = tmp_path / "store"
    store.mkdir()
    plant_files(tmp_path / "planted", face)
    plant(tmp_path, face, embedded(store), identifiable=True)
    places = identifying(all_that_arrived(store), face)
    assert {"mlflow.db", "dump"} <= set(places)
    assert len(places) > 20
    assert {run.data.tags["qafe.identifiable"] for run in runs_of(embedded(store)).values()} == {"allowed"}


def test_a_cohorts_secrets_are_its_patients_videos_and_folder(sample_root: Path) -> None:
    cohort = load_cohort(sample_root, tiny().data)
    secrets = Secrets.of_cohort(cohort)
    assert {path.name for path in (sample_root / "frames").iterdir()} <= set(secrets.names)
    assert {path.name for path in (sample_root / "frames").glob("*/*")} <= set(secrets.names)
    assert str(Store(sample_root).root) in secrets.folders
    assert str(Path.home()) in secrets.folders
    assert not set(cohort.manifest.expressions) & set(secrets.names)


def test_a_machine_that_is_called_like_a_setting_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, user, names in (("heatmap", "root", ()), ("annas-laptop", "anna", ("annas-laptop", "anna"))):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setattr("getpass.getuser", lambda user=user: user)
        assert Secrets.of_machine().names == names


def test_what_a_sweep_says_stays_as_it_is() -> None:
    guard = Guard(["P01", "S31", "anna", "7", "12", "smile_left_03", "王小明"], ["/data"])
    for text in ("model.fusion.layers", "spearman_smile", "0.712", "system/cpu_utilization_percentage", "16/32 trials",
                 "runs:/0a1b/checkpoint", "p01", "annalise", "s-1-007", "http://127.0.0.1:5000"):  # fmt: skip
        assert guard.text(text) == text
    key = load_key()
    assert guard.text("P01/S31 anna") == f"{pseudonym('P01', key)}/{pseudonym('S31', key)} {pseudonym('anna', key)}"
    assert guard.text("患者王小明来了") == f"患者{pseudonym('王小明', key)}来了"
    assert guard.text("see /mnt/share/x.mp4, or /data/frames/P01/x") == "see path-hidden, or folder-hidden"


def test_a_seal_holds_for_one_picture(tmp_path: Path, face: np.ndarray) -> None:
    path = tmp_path / "figure.png"
    pictures.save(figure("a title"), path)
    content, key = path.read_bytes(), load_key()
    assert pictures.words_in(content, key) is not None
    assert "a title" in (pictures.words_in(content, key) or [])
    assert Image.open(path).size == (200, 200)
    assert pictures.words_in(content, b"another key") is None
    assert pictures.words_in(content + jpeg(face), key) is None
    assert pictures.words_in(content.replace(b"a title", b"a tilte"), key) is None
    assert pictures.words_in(content[: len(content) // 2], key) is None
    assert pictures.words_in(jpeg(face), key) is None
    place = content.index(b"IDAT") + 40
    assert pictures.words_in(content[:place] + b"\0\1" + content[place + 2 :], key) is None


def cohort_of(root: Path, *videos: tuple[str, str, str]) -> Cohort:
    """A cohort of these (patient, video, expression), of which nothing is on disk."""
    samples = tuple(Sample(f"{video}_{patient}", patient, video, kind, 1.0, 8) for patient, video, kind in videos)
    return Cohort(Store(root), Manifest("own", samples, (), "0" * 64), samples, (), ())


def guard_of(cohort: Cohort) -> Guard:
    secrets = Secrets.of_cohort(cohort)
    return Guard(secrets.names, secrets.folders, own=secrets.own)


def test_videos_that_are_called_like_expressions_cost_no_weights(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    cohort = cohort_of(tmp_path, ("P01", "Smile", "smile"), ("P01", "test", "smile"), ("P02", "Checkpoint", "smile"))
    tracker = SweepTracker(
        tmp_path / "tracking.jsonl", uri=embedded(tmp_path), experiment="study", sweep="s-1", sweep_id="0a" * 16,
        params={}, tags={}, dataset=("own", "d" * 64), secrets=Secrets.of_cohort(cohort),
    )  # fmt: skip
    tracker.trial_started("0", 0, {"train.loss": "mse"})
    tracker.epoch("0", 1, {"spearman_smile": 0.5, "spearman_smile_low": 0.25})
    tracker.trial_metrics("0", {"test_spearman": 0.5})
    tracker.trial_ended("0", "finished", folder=checkpoint, reason="of Smile_P01 and P01/Smile")
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    run = runs_of(embedded(tmp_path))["s-1-000"]
    assert {"spearman_smile", "spearman_smile_low", "test_spearman"} == run.data.metrics.keys()
    (weights,) = MlflowClient(embedded(tmp_path)).list_artifacts(run.info.run_id, "checkpoint")
    assert weights.path == "checkpoint/smile.safetensors"
    key = load_key()
    said = f"of {pseudonym('Smile_P01', key)} and {pseudonym('P01', key)}/Smile"
    assert run.data.tags["qafe.reason"] == said


def test_a_name_of_a_video_hides_nothing_that_a_sweep_says(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    """Videos that are called like all words that there are in params, tags, numbers, files, figures and weights."""
    expressions = (*config.EXPRESSIONS, "other_one")
    texts = {"True", "False", "checkpoint.json", *TRACKED, *Monitor().take(), *STUDIES, *PRUNERS, *SAMPLERS}
    for kind, mixer in itertools.product(get_args(config.Fusion), get_args(config.Mixer)):
        settings = {"model.fusion.kind": kind, "model.fusion.mixer": mixer}
        try:
            chosen = dotted.override(tiny(), settings)
        except ConfigError:  # not all go together
            continue
        texts |= {*build(chosen).state_dict(), dotted.to_json(chosen)}
    cohort = cohort_of(tmp_path, *((f"P{number}", "x", kind) for number, kind in enumerate(expressions)))
    texts |= source_tags().keys() | trial_tags(tiny(), cohort, 0, "tpe").keys()
    with trial_files(checkpoint, load_key()) as folder:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        texts |= {str(path.relative_to(folder)) for path in paths}
        drawn = [pictures.words_in(path.read_bytes(), load_key()) for path in paths if path.suffix == ".png"]
        texts |= set(itertools.chain(*filter(None, drawn)))
    for expression in expressions:
        texts |= {f"spearman_{expression}", f"spearman_{expression}_high", f"checkpoint/{expression}.safetensors"}
    words = {word for text in texts for way in (r"\w{2,}", r"[^\W_]{2,}") for word in re.findall(way, text)}
    words = {word for word in words if not re.search(r"\d\d|[0-9a-f]{12}", word)}  # numbers, pseudonyms
    assert {"smile", "squeeze", "eyes", "attention", "running", "spearman", "png", "severity"} <= words
    spelled = words | {word.title() for word in words if len(word) > 3}
    videos = [(f"Q{number:03d}", word, "smile") for number, word in enumerate(sorted(spelled))]
    cohort = cohort_of(tmp_path, *((s.patient, s.video, s.expression) for s in cohort.train), *videos)
    check_patients(cohort)
    guard = guard_of(cohort)
    assert {text: guard.text(text) for text in texts if guard.text(text) != text} == {}
    assert guard.text("Q007's smile") == f"{pseudonym('Q007', load_key())}'s smile"


def test_what_only_looks_like_our_words_stays_a_secret(tmp_path: Path) -> None:
    videos = [("P01", "smile_anna", "smile"), ("SAF", "smile", "smile"), ("1", "task", "task11"), ("LR", "x7", "smile")]
    cohort = cohort_of(tmp_path, *videos)
    check_patients(cohort)
    guard = guard_of(cohort)
    for text in ("checkpoint/smile.safetensors", "spearman_task11", "train.lr"):
        assert guard.text(text) == text
    for name in ("smile_anna", "Smile Anna", "smile_SAF", "smile-saf", "SAF", "task_1", "task-1", "LR", "P01"):
        assert guard.text(f"of {name}.") == f"of {pseudonym(found_as(name), load_key())}."


def found_as(name: str) -> str:
    """The cohort's own spelling."""
    return {"Smile Anna": "smile_anna", "smile-saf": "smile_SAF", "task-1": "task_1"}.get(name, name)


@pytest.mark.parametrize(
    ("patient", "video", "text"),
    [
        ("Smile", "x1", "spearman_smile_low"),
        ("squeeze", "x1", "spearman_squeeze_eyes_low"),
        ("Test", "x1", "test_spearman"),
        ("lr", "x1", "train.lr"),
        ("l", "smile", "spearman_smile_low"),
    ],
)
def test_a_patient_who_is_called_like_our_words_stays_a_secret(
    patient: str, video: str, text: str, tmp_path: Path
) -> None:
    """Of a sweep that began before this was checked: numbers lose their names rather than the patient his secret."""
    cohort = cohort_of(tmp_path, (patient, video, "smile"), ("P02", "x2", "squeeze_eyes"))
    with pytest.raises(ConfigError, match=f"got '{patient}'") as raised:
        check_patients(cohort)
    assert "\n" not in str(raised.value)
    assert guard_of(cohort).finds(f"{text} of {video}_{patient}")
    assert guard_of(cohort).finds(f"of {video}_{patient}")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_sweep_does_not_start_with_a_patient_who_is_called_like_an_expression(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.create(tmp_path / "data")
    rows = []
    for number, patient in enumerate(("Frown", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9", "P10")):
        for expression in ("smile", "frown"):
            video = f"x{number}{expression[0]}"
            store.write_video(patient, video, video_frames(number, 12), video_landmarks(number, 12))
            rows.append(CsvRow(f"{video}_{patient}", float(number % 5), 12, expression))
    store.write_csv("train", rows[:-4], "own")
    store.write_csv("test", rows[-4:], "own")
    monkeypatch.setattr(sweeps.driver, "run_sweep", lambda *_, **__: 0)
    line = ["fusion_search", "--data-root", str(store.root), "--storage", str(tmp_path / "sweeps"), "--preset", "tiny"]
    line += ["--tracking-uri", embedded(tmp_path), *QUICK_FLAGS, "--set", "data.validation_fraction=0.5"]
    assert main([*line, *(["--allow-identifiable"] if allowed else [])]) == (0 if allowed else 2)
    if not allowed:
        error = capsys.readouterr().err
        assert "a patient's name must not be a part of what a sweep says in MLflow, got 'Frown'" in error
        assert "Rename the patient" in error
        assert not (tmp_path / "sweeps").exists()
