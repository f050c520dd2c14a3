"""`moe-monitor dashboards`: write the shipped dashboards, rules, runbooks and provisioning files to a folder."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from urllib.parse import urlsplit

from moe_monitor.cli.common import CommandError

#: Folders of the assets that are for use; the rest is how they are made.
SHIPPED = ("dashboards", "provisioning", "rules", "runbooks")

#: Where alerts say where their runbook is; in the shipped files the name of a file in runbooks/.
_RUNBOOK = re.compile(r"(runbook_url: )runbooks/(?=\w+\.md\b)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write to; made if it does not exist")
    parser.add_argument(
        "--runbook-base",
        metavar="URL",
        help="where the files of DIR/runbooks are read by whoever is on call: the alerts' runbook_url is this and the "
        "file's name (default: the file itself in DIR, which opens on this machine only)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that are there and differ")


def assets() -> Path:
    """The folder of the assets: inside the installed package, or beside it in a clone. Raises CommandError."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "grafana", package.parent / "grafana"):
        if (folder / "dashboards").is_dir():
            return folder
    raise CommandError("this installation has no dashboards; reinstall moe-monitor")


def _sources() -> dict[Path, Path]:
    """Path below the folder to write to -> file."""
    source = assets()
    folders = {name: source / name for name in SHIPPED}
    if not folders["runbooks"].is_dir():  # a clone
        folders["runbooks"] = source.parent / "docs" / "runbooks"
    return {
        Path(name) / file.relative_to(folder): file
        for name, folder in folders.items()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _base(given: str | None, target: Path) -> str:
    if given is None:
        return (target.absolute() / "runbooks").as_uri() + "/"
    if urlsplit(given).scheme not in {"http", "https", "file"} or re.search(r"[\s'\"{}$#]", given):
        raise CommandError(f"--runbook-base {given!r} is not a URL; it begins with http://, https:// or file://")
    return given.rstrip("/") + "/"


def run(arguments: argparse.Namespace) -> int:
    """Write, and say what went where. Changed files are kept unless forced."""
    target = Path(arguments.out)
    base = _base(arguments.runbook_base, target)
    made = {}
    for path, file in _sources().items():
        text = file.read_text(encoding="utf-8")
        made[path] = _RUNBOOK.sub(lambda m: m[1] + base, text) if path.suffix in {".yml", ".yaml"} else text
    try:
        if not arguments.force:
            changed = [p for p, text in made.items() if (target / p).exists() and _read(target / p) != text]
            if changed:
                listed = ", ".join(str(p) for p in changed[:3]) + (" and more" if len(changed) > 3 else "")
                raise CommandError(f"{listed} in {target} differ from what would be written; --force overwrites them")
        for path, text in made.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write to {str(target)!r}: {error.strerror}") from None
    print(f"{len(made)} files written to {target}")
    print("  dashboards/    import into Grafana, or provision with provisioning/dashboards/")
    print("  rules/         recording and alert rules: add to rule_files in prometheus.yml")
    print("  provisioning/  Grafana: dashboard provider, and the same alerts managed by Grafana")
    print("  runbooks/      what to do when an alert fires; also a dashboard")
    if arguments.runbook_base is None:
        print(
            f"Alerts link to {base}, which opens on this machine only; --runbook-base sets where your team reads them"
        )
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
