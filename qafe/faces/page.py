"""Draws ``report.html``, a page with everything inside it, from what ``report.json`` holds."""

from __future__ import annotations

import base64
import html
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "video": (("patient", "patient", "text"), ("video", "video", "text")),
    "label": (("expression", "expression", "text"), ("score", "score", "two"), ("split", "split", "text")),
    "recording": (
        ("source", "file", "text"),
        ("frames", "frames", "whole"),
        ("duration_s", "length s", "one"),
        ("hz", "Hz", "two"),
        ("source_hz", "file's Hz", "two"),
        ("variable_rate", "rate varies", "yes"),
        ("width_px", "width px", "whole"),
        ("height_px", "height px", "whole"),
        ("rotation_deg", "rotated °", "whole"),
    ),
    "detection": (
        ("detected", "detected", "percent"),
        ("missed_frames", "guessed frames", "spans"),
        ("longest_gap_frames", "longest gap", "whole"),
        ("cut_start_frames", "cut at start", "whole"),
        ("cut_end_frames", "cut at end", "whole"),
        ("full_frame_detections", "whole-frame searches", "percent"),
        ("window_detections", "window searches", "percent"),
        ("faces_most", "faces in view", "whole"),
    ),
    "face": (
        ("face_size_px", "size px", "whole"),
        ("face_size_range_px", "size range px", "whole"),
        ("clipped_points", "points outside", "percent"),
        ("sharpness", "sharp-ness", "one"),
        ("sharpness_low", "lowest 5 %", "one"),
        ("brightness", "bright-ness", "whole"),
        ("brightness_range", "its range", "whole"),
        ("clipped_pixels", "black or white", "percent"),
    ),
    "head turns over": (
        ("pitch_range_deg", "pitch °", "whole"),
        ("yaw_range_deg", "yaw °", "whole"),
        ("roll_range_deg", "roll °", "whole"),
    ),
    "": (("notes", "notes", "notes"),),
}
"""The table of all videos: (key in a video's row, title, how a cell is written) by the group a column stands in."""

_FIRST_SHOWN = 25
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2126;--soft:#5f6973;--line:#dde1e5;--fill:#f4f6f8;
--train:#3b76af;--test:#e39a3b;--other:#8a939c;--dot:#6f8aa5;--bad:#c2362b;--zone:rgba(194,54,43,.08)}
@media(prefers-color-scheme:dark){:root{--page:#15181c;--ink:#e4e7ea;--soft:#98a2ac;--line:#32383f;--fill:#1e2328;
--train:#6aa5dd;--test:#eeb05c;--other:#88929c;--dot:#8fabc7;--bad:#ff7d70;--zone:rgba(255,125,112,.12)}}
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;padding:0 2em;max-width:1200px;color:var(--ink);
background:var(--page)}
h1{font-size:24px;margin:0 0 .3em}h2{font-size:17px;margin:2.2em 0 .4em}h3{font-size:13px;margin:0 0 .2em}
p{margin:.3em 0;max-width:62em}.soft{color:var(--soft)}.bad{color:var(--bad)}.lead{font-size:16px}
table{border-collapse:collapse;font-size:12px;font-variant-numeric:tabular-nums}
td,th{padding:.25em .6em;border-top:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600;border-top:0}td.n,th.n{text-align:right;white-space:nowrap}
ul{margin:0;padding-left:1.1em}td ul{padding:0;list-style:none}
.wide{overflow:auto;max-height:75vh;border:1px solid var(--line);border-radius:4px}
.wide table{border-collapse:separate;border-spacing:0;width:max-content}
.wide thead{position:sticky;top:0;background:var(--fill);z-index:2}
.wide th{vertical-align:bottom}.wide th.g{color:var(--soft);font-weight:400;padding-bottom:0}
.wide td.s,.wide th.s{border-left:1px solid var(--line)}.wide td.t{max-width:22em;overflow-wrap:anywhere}
.wide tbody td:nth-child(-n+2),.wide tr:last-child th:nth-child(-n+2){position:sticky;background:var(--page);left:0;
box-sizing:border-box;width:8em;min-width:8em;max-width:8em}
.wide tr:last-child th:nth-child(-n+2){background:var(--fill)}
.wide tbody td:nth-child(2),.wide tr:last-child th:nth-child(2){left:8em;width:12em;min-width:12em;max-width:12em;
border-right:1px solid var(--line)}
.wide tbody tr:hover td{background:var(--fill)}
th[aria-sort]{cursor:pointer}th[aria-sort]:focus-visible{outline:2px solid var(--train)}
th[aria-sort=ascending]::after{content:" ▲"}th[aria-sort=descending]::after{content:" ▼"}
.charts{display:flex;flex-wrap:wrap;gap:1.2em 1.6em}.key{display:inline-block;width:.8em;height:.8em;margin:0 .35em 0 0;
border-radius:2px;vertical-align:-.05em}.key+span{margin-right:1.2em}
svg{display:block;max-width:100%;height:auto}svg text{font:10px system-ui,sans-serif;fill:var(--soft);
text-anchor:middle}svg .side{text-anchor:start}svg .name{font-size:12px;fill:var(--ink)}
svg .axis{stroke:var(--line)}svg .median{stroke:var(--ink)}
.train{fill:var(--train);background:var(--train)}.test{fill:var(--test);background:var(--test)}
.other{fill:var(--other);background:var(--other)}.dot{fill:var(--dot);fill-opacity:.75}
.off{fill:var(--bad)}.zone{fill:var(--zone)}
details{margin:.3em 0}summary{cursor:pointer}details img{display:block;margin:.5em 0;max-width:100%}
@media print{.wide{overflow:visible;max-height:none;border:0}.wide thead{position:static}table{font-size:8px}}
"""
_SCRIPT = """
document.querySelectorAll('table.sorts').forEach(function(table){
 var heads=table.tHead.rows[table.tHead.rows.length-1].cells,body=table.tBodies[0];
 Array.prototype.forEach.call(heads,function(head,at){
  head.tabIndex=0;head.setAttribute('aria-sort','none');
  function sort(){
   var up=head.getAttribute('aria-sort')!=='ascending';
   Array.prototype.forEach.call(heads,function(h){h.setAttribute('aria-sort','none')});
   head.setAttribute('aria-sort',up?'ascending':'descending');
   Array.prototype.slice.call(body.rows).sort(function(a,b){
    var x=a.cells[at],y=b.cells[at],p=x.getAttribute('data-v'),q=y.getAttribute('data-v'),c;
    if(p!==null&&q!==null){if(p===''||q==='')return (p==='')-(q==='');c=p-q}
    else{x=x.textContent;y=y.textContent;if(x==='-'||y==='-')return (x==='-')-(y==='-');
     c=x.localeCompare(y,'en',{numeric:true})}
    return up?c:-c}).forEach(function(row){body.appendChild(row)})}
  head.addEventListener('click',sort);
  head.addEventListener('keydown',function(e){if(e.key==='Enter'||e.key===' '){e.preventDefault();sort()}})})});
"""


def draw_page(content: Row, pictures: Mapping[str, bytes] | None, colours: Mapping[str, tuple[int, int, int]]) -> str:
    """The page as HTML.

    Args:
        content: of ``report.json``, as `qafe.faces.report.write_report` writes it.
        pictures: JPEG bytes by title, in the order they are shown in; None says on the page that they were left out.
        colours: RGB of what is marked in the pictures, by its name.
    """
    rows: list[Row] = content["videos"]
    images = " img-src data:;" if pictures else ""
    parts = [
        "<h1>Prepared videos</h1>",
        f'<p class="lead">{_sentence(content["totals"])}</p>',
        *(f"<p>{_text(note)}</p>" for note in content["notes"]),
        _leaks(rows),
        "<h2>Look at these first</h2>",
        _first(content["refused"], content["findings"]),
    ]
    if rows:
        parts += [
            "<h2>Scores</h2>",
            _histograms(rows),
            "<h2>Patients</h2>",
            _patients(rows),
            "<h2>Quality of the recordings</h2>",
            '<p class="soft">One dot a video; the line is the median, dots in the tinted area are listed above. '
            "Sharpness depends on light and contrast too, so it compares videos of one cohort only. The head's "
            "turning is estimated with a generic face: read it as a range, not as a measurement.</p>",
            *_quality(rows, content["limits"]),
            "<h2>All videos</h2>",
            '<p class="soft">Click a column to sort by it. Ranges go from the 5th to the 95th percentile; guessed '
            "frames were filled in between their neighbours.</p>",
            _table(rows),
        ]
    parts += ["<h2>Contact sheets</h2>", _sheets(pictures, colours)]
    if settings := dict(_flat(content["settings"])):
        pairs = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in settings.items())
        parts.append(f"<h2>Settings</h2><table><tbody>{pairs}</tbody></table>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Prepared videos</title>'
        '<meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'unsafe-inline';{images}\"><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def real(row: Row, key: str) -> float | None:
    """What a row of plain values holds, if it is a number."""
    value = row.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def percent(share: float) -> str:
    """Never 100 % or 0 % of what is not all or nothing."""
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %" if 0 < share < 1 else f"{100 * share:.0f} %"


def _sentence(totals: Row) -> str:
    names = ("prepared", "refused", "patients", "frames", "warnings", "videos_with_warnings")
    prepared, refused, patients, frames, warnings, warned = (int(real(totals, name) or 0) for name in names)
    line = f"{_many(prepared, 'video')} of {_many(patients, 'patient')} prepared, {refused} refused"
    if (detected := real(totals, "detected")) is not None:
        line += f"; a face was detected in {percent(detected)} of all {frames:,} frames".replace(",", "\u2009")
    return line + (f"; {_many(warnings, 'warning')} on {_many(warned, 'video')}." if warnings else "; no warnings.")


def _leaks(rows: Sequence[Row]) -> str:
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(_text(row.get("patient")), set()).add(_split(row))
    both = [patient for patient, found in splits.items() if {"train", "test"} <= found and patient != "-"]
    line = f"In both train and test: {', '.join(both)}. Scores on these test videos say nothing."
    return f'<p class="bad">{line}</p>' if both else ""


def _first(refused: Sequence[Row], findings: Sequence[Row]) -> str:
    reasons: dict[str, list[str]] = {}
    for row in (*refused, *findings):
        reason = _text(row.get("reason"))
        if (weight := real(row, "weight")) is None:
            reason = f'<b class="bad">refused</b>: {reason}'
        elif weight < 1:
            reason = f'<span class="soft">{reason}</span>'
        video = f"<td>{_text(row.get('patient'))}</td><td>{_text(row.get('video'))}</td>"
        reasons.setdefault(video, []).append(f"<li>{reason}</li>")
    if not reasons:
        return "<p>Nothing stands out: every video was prepared, and no value lies outside its usual range.</p>"
    lines = [f"<tr>{video}<td><ul>{''.join(found)}</ul></td></tr>" for video, found in reasons.items()]
    head = "<table><thead><tr><th>patient</th><th>video</th><th>why</th></tr></thead><tbody>"
    page = f"{head}{''.join(lines[:_FIRST_SHOWN])}</tbody></table>"
    if rest := lines[_FIRST_SHOWN:]:
        summary = f"<summary>{_many(len(rest), 'more video')}</summary>"
        page += f"<details>{summary}{head}{''.join(rest)}</tbody></table></details>"
    return page


# ---------------------------------------------------------------- charts


def _bins(scores: Sequence[float]) -> tuple[list[int], dict[int, str]]:
    """The bin of each score, and all bins' names: at most 10 of a round width, for whole scores from 0 to 4 all 5."""
    low, high = min(scores), max(scores)
    if low >= 0 and high <= 4:
        low, high = 0, 4
    whole = low == high or all(score == int(score) for score in scores)
    step = _round_step(max((high - low) / 8, 1 if whole else 0))
    first, last, *bins = (math.floor(score / step + 0.5) for score in (low, high, *scores))
    exact = all(abs(score / step - at) < 1e-6 for score, at in zip(scores, bins, strict=True))
    beside = "" if exact else f" ± {step / 2:.6g}"
    return bins, {at: f"{at * step:.6g}{beside}" for at in range(first, last + 1)}


def _histograms(rows: Sequence[Row]) -> str:
    scores = [(row, score) for row in rows if (score := real(row, "score")) is not None]
    if not scores:
        return "<p>No video has a score.</p>"
    bins, names = _bins([score for _, score in scores])
    counted: dict[str, Counter[tuple[str, int]]] = {}
    for (row, _), at in zip(scores, bins, strict=True):
        counted.setdefault(_text(row.get("expression")), Counter())[_split(row), at] += 1
    tallest = max(max(counts.values()) for counts in counted.values())
    splits = _splits(rows)
    charts = "".join(_histogram(title, counts, splits, names, tallest) for title, counts in sorted(counted.items()))
    legend = "".join(f'<span class="key {_kind(split)}"></span><span>{_text(split)}</span>' for split in splits)
    absent = len(rows) - len(scores)
    line = f'<p class="soft">{_many(absent, "video")} without a score.</p>' if absent else ""
    return f'<p class="soft">Videos for each score. {legend}</p><div class="charts">{charts}</div>{line}'


def _histogram(
    title: str, counts: Counter[tuple[str, int]], splits: Sequence[str], names: Mapping[int, str], tallest: int
) -> str:
    width, height, base, top, side = 216, 130, 112, 16, 10
    slot = (width - 2 * side) / len(names)
    bar = min(slot * 0.8 / len(splits), 22)
    parts = [f'<line class="axis" x1="{side}" y1="{base}" x2="{width - side}" y2="{base}"/>']
    for at, (number, name) in enumerate(names.items()):
        middle = side + slot * (at + 0.5)
        for place, split in enumerate(splits):
            if count := counts[split, number]:
                tall = (base - top) * count / tallest
                x = middle + (place - len(splits) / 2) * bar
                tip = f"{title}, {_text(split)}, score {name}: {_many(count, 'video')}"
                parts.append(
                    f'<rect class="{_kind(split)}" x="{x + 0.5:.1f}" y="{base - tall:.1f}" width="{bar - 1:.1f}" '
                    f'height="{tall:.1f}" data-count="{count}"><title>{tip}</title></rect>'
                    f'<text x="{x + bar / 2:.1f}" y="{base - tall - 3:.1f}">{count}</text>'
                )
        if at % 2 == 0 or len(names) <= 5:
            parts.append(f'<text x="{middle:.1f}" y="{base + 13}">{name.split()[0]}</text>')
    head = f'<h3>{title} <span class="soft">({counts.total()})</span></h3>'
    return f"<div>{head}{_svg(f'scores of {title}', width, height, parts)}</div>"


def _patients(rows: Sequence[Row]) -> str:
    every = [score for row in rows if (score := real(row, "score")) is not None]
    shown = (min([0.0, *every]), max([4.0, *every]))
    lines, strips = [], []
    for split in _splits(rows):
        scores: dict[str, list[float]] = {}
        videos = [row for row in rows if _split(row) == split]
        for row in videos:
            found = scores.setdefault(_text(row.get("patient")), [])
            found += [] if (score := real(row, "score")) is None else [score]
        means = {patient: statistics.fmean(found) for patient, found in scores.items() if found}
        mean = spread = "-"
        if means:
            mean = f"{statistics.fmean(means.values()):.2f}"
            spread = f"{min(means.values()):.2f} to {max(means.values()):.2f}"
            dots = [
                (score, f"{patient}: mean score {score:.2f} of {_many(len(scores[patient]), 'video')}", _kind(split))
                for patient, score in means.items()
            ]
            strips.append(_strip(_text(split), dots, "{:.2f}", (None, None), shown))
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in (len(scores), len(videos), mean, spread))
        lines.append(f'<tr><td><span class="key {_kind(split)}"></span>{_text(split)}</td>{numbers}</tr>')
    names = ("patients", "videos", "mean of the patients' mean scores", "from, to")
    head = "<th>split</th>" + "".join(f'<th class="n">{name}</th>' for name in names)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return table + ('<p class="soft">One dot a patient: the mean score.</p>' + "".join(strips) if strips else "")


def _quality(rows: Sequence[Row], limits: Mapping[str, Sequence[float | None]]) -> Iterator[str]:
    measures: tuple[tuple[str, str, str, tuple[float, float]], ...] = (
        ("detected", "detected %", "{:.1f}", (90, 100)),
        ("sharpness", "sharpness", "{:.3g}", (0, 0)),
        ("brightness", "brightness", "{:.0f}", (40, 220)),
        ("face_size_px", "face size px", "{:.0f}", (80, 80)),
        ("yaw_range_deg", "yaw range °", "{:.0f}", (0, 45)),
    )
    for key, title, style, shown in measures:
        scale = 100 if key == "detected" else 1
        least, most = (None if limit is None else limit * scale for limit in limits[key])
        dots = []
        for row in rows:
            if (value := real(row, key)) is not None:
                value *= scale
                off = (least is not None and value < least) or (most is not None and value > most)
                name = f"{_text(row.get('patient'))}/{_text(row.get('video'))}: {style.format(value)}"
                dots.append((value, name, "off" if off else "dot"))
        if dots:
            yield _strip(title, dots, style, (least, most), shown)
        else:
            yield f'<p class="soft">{title}: not measured.</p>'


def _strip(
    title: str,
    dots: Sequence[tuple[float, str, str]],
    style: str,
    limits: tuple[float | None, float | None],
    shown: tuple[float, float],
) -> str:
    """A dot plot on one line; dots are (value, tip, class), what lies beyond the limits is tinted."""
    left, right, height, base = 130, 820, 66, 46
    dots = sorted(dots)
    low, high = min(dots[0][0], shown[0]), max(dots[-1][0], shown[1])
    if low == high:
        low, high = low - 1, high + 1
    step = _round_step((high - low) / 8)

    def place(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    median = statistics.median(value for value, *_ in dots)
    parts = [
        f'<text class="side name" x="0" y="24">{title}</text>',
        f'<text class="side" x="0" y="39">median {style.format(median)}</text>',
    ]
    for start, stop in ((low, limits[0]), (limits[1], high)):
        if start is not None and stop is not None and stop > start:
            x = place(start)
            parts.append(f'<rect class="zone" x="{x:.1f}" y="4" width="{place(stop) - x:.1f}" height="{base - 4}"/>')
    parts.append(f'<line class="axis" x1="{left}" y1="{base}" x2="{right}" y2="{base}"/>')
    for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        x = place(at * step)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 15}">{at * step:.6g}</text>')
    x = place(median)
    parts.append(f'<line class="median" x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="{base}"/>')
    slots = [round(place(value) / 7) for value, *_ in dots]
    lift = min(7.0, (base - 14) / max(Counter(slots).values()))
    for at, (value, tip, kind) in enumerate(dots):
        y = base - 5 - lift * (at - slots.index(slots[at]))
        tip = f"<title>{tip}</title>"
        parts.append(f'<circle class="{kind}" cx="{place(value):.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>')
    return _svg(title, right + 20, height, parts)


def _svg(name: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">'
        f"{''.join(parts)}</svg>"
    )


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is not below least."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= least * (1 - 1e-9))


# ---------------------------------------------------------------- tables and texts


def _table(rows: Sequence[Row]) -> str:
    columns = [
        (key, title, kind, ("t" if kind in ("text", "yes", "notes", "spans") else "n") + ("" if at else " s"))
        for group in COLUMNS.values()
        for at, (key, title, kind) in enumerate(group)
    ]
    groups = "".join(f'<th class="g s" colspan="{len(group)}">{name}</th>' for name, group in COLUMNS.items())
    heads = "".join(f'<th class="{style}">{title}</th>' for _, title, _, style in columns)
    lines = []
    for row in rows:
        line = ""
        for key, _, kind, style in columns:
            text, order = _written(row.get(key), kind)
            sorts = "" if order is None else f' data-v="{order}"'
            line += f'<td class="{style}"{sorts}>{text}</td>'
        lines.append(f"<tr>{line}</tr>\n")
    return (
        f'<div class="wide"><table class="sorts"><thead><tr>{groups}</tr><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _written(value: Any, kind: str) -> tuple[str, str | None]:
    """A cell's text, and what it is sorted by if that is a number ("" where it has none)."""
    if kind == "notes":
        notes = "".join(f"<li>{_text(note)}</li>" for note in value or ())
        return (f"<ul>{notes}</ul>" if notes else "-"), None
    if kind == "spans":
        names = [str(first) if first == last else f"{first}-{last}" for first, last in value or ()]
        text = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return text or "-", "" if value is None else str(sum(last - first + 1 for first, last in value))
    if kind == "yes":
        return "-" if value is None else "yes" if value else "no", None
    if kind == "text":
        return _text(value), None
    if isinstance(value, list):
        low, high = value
        return f"{low:.0f}-{high:.0f}", f"{high - low:.6g}"
    if not isinstance(value, int | float):
        return _text(value), ""
    if kind == "percent":
        text = percent(value)
    elif kind == "two":
        text = f"{value:.2f}".rstrip("0").rstrip(".")
    else:
        text = f"{value:.{int(kind == 'one')}f}"
    return text, f"{value:.6g}"


def _sheets(pictures: Mapping[str, bytes] | None, colours: Mapping[str, tuple[int, int, int]]) -> str:
    if pictures is None:
        return "<p>Pictures of faces were left out; python -m qafe prepare --with-images draws them.</p>"
    if not pictures:
        return "<p>No video has one.</p>"
    keys = "".join(
        f'<span class="key" style="background:rgb{colour}"></span><span>{_text(name)}</span>'
        for name, colour in colours.items()
    )
    sheets = "".join(
        f'<details><summary>{_text(name)}</summary><img alt="contact sheet of {_text(name)}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}"></details>\n'
        for name, picture in pictures.items()
    )
    return f'<p class="soft">{keys}</p>{sheets}'


def _split(row: Row) -> str:
    return "no split" if row.get("split") in (None, "") else str(row["split"])


def _splits(rows: Sequence[Row]) -> list[str]:
    return sorted({_split(row) for row in rows}, key=lambda split: (split != "train", split != "test", split))


def _kind(split: str) -> str:
    return split if split in ("train", "test") else "other"


def _flat(settings: Row, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in sorted(settings.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _text(value: Any) -> str:
    """Escaped, and - for nothing."""
    return "-" if value is None or value == "" else html.escape(str(value))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
