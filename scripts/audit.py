#!/usr/bin/env python3
"""Look up everything that moe-monitor depends on in a database of known vulnerabilities, by pip-audit.

    python scripts/audit.py [--extras otel web analysis transformers] [--service pypi]

Resolves the dependencies as pip would on this machine today, without installing them, and asks the service for each
release. A release that the service does not know, or a service that cannot be reached, is a failure and not a clean
result. pip-audit lives in a temporary environment. Needs the network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("otel", "web", "analysis", "transformers")


def pinned(report: dict[str, Any]) -> list[str]:
    """`name==version` of all in pip's installation report but this project. Databases know no local versions."""
    found = (item["metadata"] for item in report["install"])
    return sorted(f"{m['name']}=={m['version'].partition('+')[0]}" for m in found if m["name"] != "moe-monitor")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extras", nargs="*", default=list(EXTRAS), help="optional parts to include")
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="whose database")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moe-monitor-audit-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
        subprocess.run([*pip, "--upgrade", "pip", "pip-audit"], check=True)
        project = f"{ROOT}[{','.join(arguments.extras)}]" if arguments.extras else str(ROOT)
        report, requirements = folder / "report.json", folder / "requirements.txt"
        subprocess.run([*pip, "--dry-run", "--ignore-installed", "--report", report, project], check=True)
        packages = pinned(json.loads(report.read_text()))
        requirements.write_text("\n".join(packages) + "\n")
        print(*packages, sep="\n")
        audit = [python, "-m", "pip_audit", "--strict", "--disable-pip", "--no-deps", "--progress-spinner", "off"]
        code = subprocess.run(
            [*audit, "--vulnerability-service", arguments.service, "-r", requirements], check=False
        ).returncode
    when = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    if code:
        print(f"{when}: not clean, or not all of the {len(packages)} packages could be looked up; see above")
    else:
        print(f"{when}: all {len(packages)} packages looked up with {arguments.service}, no known vulnerability")
    return code


if __name__ == "__main__":
    sys.exit(main())
