"""`moe-monitor dashboards`: write the shipped dashboards, rules and provisioning files to a folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from moe_monitor.cli.common import CommandError

#: Folders of the assets that are for use; the rest is how they are made.
SHIPPED = ("dashboards", "provisioning", "rules")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write to; made if it does not exist")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there and differ")


def assets() -> Path:
    """The folder of the assets: inside the installed package, or beside it in a clone. Raises CommandError."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "grafana", package.parent / "grafana"):
        if (folder / "dashboards").is_dir():
            return folder
    raise CommandError("this installation has no dashboards; reinstall moe-monitor")


def run(arguments: argparse.Namespace) -> int:
    """Copy, and say what went where. Changed files are kept unless forced."""
    source, target = assets(), Path(arguments.out)
    files = sorted(f.relative_to(source) for name in SHIPPED for f in (source / name).rglob("*") if f.is_file())
    try:
        if not arguments.force:
            changed = [
                f for f in files if (target / f).exists() and (target / f).read_bytes() != (source / f).read_bytes()
            ]
            if changed:
                listed = ", ".join(str(f) for f in changed[:3]) + (" and more" if len(changed) > 3 else "")
                raise CommandError(f"{listed} in {target} differ from what would be written; --force overwrites them")
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, target / file)
    except OSError as error:
        raise CommandError(f"cannot write to {str(target)!r}: {error.strerror}") from None
    print(f"{len(files)} files written to {target}")
    print("  dashboards/    import into Grafana, or provision with provisioning/dashboards/")
    print("  rules/         recording and alert rules: add to rule_files in prometheus.yml")
    print("  provisioning/  Grafana: dashboard provider, and the same alerts managed by Grafana")
    return 0
