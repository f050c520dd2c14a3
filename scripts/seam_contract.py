#!/usr/bin/env python3
"""The seam contract: does a vLLM release still have what `moe_monitor/capture/vllm` relies on?

    python scripts/seam_contract.py --cache ~/.cache/vllm-sources
    python scripts/seam_contract.py --cache DIR --versions 0.32 0.33 --markdown report.md
    python scripts/seam_contract.py --sources path/to/site-packages

Every class, function, signature and behaviour that the seams use is looked for in vLLM's sources, with `ast`: nothing
of vLLM is installed, imported or run. Wheels are downloaded one at a time with `pip download` (about 300 MB each),
the few Python files needed are kept in the cache and the wheel is deleted; later runs need no network.

found: as relied upon. changed: it exists, but not in the form relied upon. missing: it is not there.
Exit code 1 when anything is changed or missing in a version that moe-monitor says it supports, else 0.
"""

from __future__ import annotations

import argparse
import datetime as dt
import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from seam_checks import CHECKS, KEPT, Check, Result, Sources, cpu_path, run_check  # noqa: E402

from moe_monitor.capture.vllm.versions import SUPPORTED, release, supported  # noqa: E402


@dataclass
class Report:
    """One release: what the checks said, and how its CPU path routes."""

    version: str
    results: dict[Check, Result] = field(default_factory=dict)
    cpu: str = ""

    @property
    def broken(self) -> bool:
        return supported(self.version) and any(r.state != "found" for r in self.results.values())


def check_sources(version: str, root: Path, checks: Sequence[Check] = CHECKS) -> Report:
    sources = Sources(root)
    return Report(version, {check: run_check(check, sources) for check in checks}, cpu_path(sources))


# getting the sources


class NoRelease(Exception):
    """The package index has no wheel of this version."""


def unpack(wheel: Path, cache: Path) -> Path:
    """Keep the Python files needed of a wheel in ``cache/VERSION``, and return that folder."""
    version = wheel.name.split("-")[1]
    target = cache / version
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                # extract() drops "..", drive letters and leading slashes
                if any(fnmatch.fnmatch(name, pattern) for pattern in KEPT):
                    archive.extract(name, folder)
        if target.exists():
            shutil.rmtree(target)
        (Path(folder) / "vllm").mkdir(exist_ok=True)
        (Path(folder) / _STAMP).write_text("\n".join(KEPT))
        # In one step at the end, so that an interrupted run leaves no half release behind
        Path(folder).rename(target)
        Path(folder).mkdir()  # for the context manager to remove
    return target


#: Says which files a folder of the cache was made with: an older list may lack some.
_STAMP = "kept.txt"


def _usable(folder: Path, version: str) -> bool:
    try:
        same = (folder / _STAMP).read_text() == "\n".join(KEPT)
    except OSError:
        return False
    return same and (folder.name == version or (version.count(".") < 2 and folder.name.startswith(f"{version}.")))


def download(minor: str, cache: Path) -> Path:
    """The sources of the newest patch release of ``0.NN``, from the cache or from the package index."""
    kept = [folder for folder in cache.iterdir() if _usable(folder, minor)]
    if kept:
        return max(kept, key=lambda p: [int(n) for n in p.name.split("+")[0].split(".") if n.isdigit()])
    wanted = f"vllm=={minor}" if minor.count(".") > 1 else f"vllm=={minor}.*"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
        command += ["--only-binary=:all:", "--no-cache-dir", "--dest", folder, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if "No matching distribution" in done.stderr:
                raise NoRelease(wanted)
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        (wheel,) = Path(folder).glob("*.whl")
        return unpack(wheel, cache)


def minors() -> list[str]:
    """All minor versions that moe-monitor says it supports."""
    (major, low), (_, high) = release(SUPPORTED[0]), release(SUPPORTED[1])
    return [f"{major}.{minor}" for minor in range(low, high)]


# output


def table(reports: Sequence[Report], absent: Sequence[str]) -> str:
    """Markdown: checks x versions, then the places, the differences and the CPU path."""
    lines = ["| our file | relied upon | " + " | ".join(r.version for r in reports) + " |"]
    lines.append("|---|---|" + "---|" * len(reports))
    for check in reports[0].results if reports else ():
        cells = " | ".join(r.results[check].state for r in reports)
        lines.append(f"| `{check.seam}.py` | {check.name} | {cells} |")
    lines += ["", "## Not as relied upon", ""]
    bad = [
        f"- {r.version}, `{c.seam}.py`, {c.name}: {x.state}: {x.note}{f' (`{x.place}`)' if x.place else ''}"
        for r in reports
        for c, x in r.results.items()
        if x.state != "found"
    ]
    lines += bad or ["Nothing."]
    lines += [f"- {name}: no release on the package index" for name in absent]
    lines += ["", "## CPU path", "", "| version | how a CPU build routes unquantised experts |", "|---|---|"]
    lines += [f"| {r.version} | {r.cpu} |" for r in reports]
    lines += ["", "## Where it stands", ""]
    for report in reports:
        lines += [f"### {report.version}", "", "| our file | relied upon | place |", "|---|---|---|"]
        lines += [f"| `{c.seam}.py` | {c.name} | `{x.place}` |" for c, x in report.results.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def summary(reports: Sequence[Report], absent: Sequence[str]) -> str:
    """For the terminal: a line per release, and each difference."""
    lines = [f"{name}: no release on the package index" for name in absent]
    for report in reports:
        bad = {c: x for c, x in report.results.items() if x.state != "found"}
        inside = "" if supported(report.version) else ", outside the supported range"
        lines.append(f"{report.version}: {len(report.results) - len(bad)} of {len(report.results)} found{inside}")
        lines += [f"    {x.state}: {c.seam}.py: {c.name}: {x.note} {x.place}".rstrip() for c, x in bad.items()]
        lines.append(f"    CPU: {report.cpu}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder for the sources of releases; made if it is not there")
    parser.add_argument("--versions", nargs="+", default=minors(), help="0.NN, or 0.NN.P; default: all supported")
    parser.add_argument("--sources", type=Path, help="check the folder that holds this `vllm` folder, and nothing else")
    parser.add_argument("--version", default="", help="with --sources: the version that these are")
    parser.add_argument("--markdown", type=Path, help="write the whole table to this file")
    options = parser.parse_args(argv)
    reports, absent = [], []
    if options.sources:
        reports.append(check_sources(options.version or SUPPORTED[0], options.sources, checks))
    elif options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
        for minor in options.versions:
            try:
                root = download(minor, options.cache)
            except NoRelease:
                absent.append(minor)
                continue
            reports.append(check_sources(root.name, root, checks))
    else:
        parser.error("--cache or --sources is needed")
    print(summary(reports, absent))
    if options.markdown:
        arguments = " ".join(["--cache DIR" if options.cache else "--sources DIR", "--markdown FILE"])
        head = (
            "# Seam contract\n\n"
            f"Made on {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d} with "
            f"`python scripts/seam_contract.py {arguments}`, from the sources in vLLM's wheels; nothing was installed "
            "or run. found: as relied upon; changed: it exists in another form; missing: it is not there.\n\n"
        )
        options.markdown.write_text(head + table(reports, absent), encoding="utf-8")
    return int(not reports or any(report.broken for report in reports))


if __name__ == "__main__":
    sys.exit(main())
