"""Audit the installed packages for known vulnerabilities, and report what could not be audited.

pip-audit asks PyPI's advisory service. Where that does not answer it skips packages and calls the
rest clean, even if nothing is left: here, what was skipped is said first.

    python .ci/audit.py PIP_AUDIT SITE_PACKAGES
"""

import json
import subprocess
import sys
from typing import Any


def judge(report: dict[str, Any]) -> tuple[list[str], bool]:
    """Sum up pip-audit's report.

    Returns:
        Lines to print, and whether a vulnerability is known.
    """
    packages = report["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    found = [package for package in asked if package["vulns"]]
    lines = [f"Audited {len(asked)} of {len(packages)} packages."]
    if not asked:
        lines.append("NOT AUDITED: the advisory service did not answer for any of them.")
    for package in found:
        for known in package["vulns"]:
            fixed = ", ".join(known["fix_versions"]) or "no version yet"
            name = f"{package['name']} {package['version']}"
            lines.append(f"{name}: {known['id']}, fixed in {fixed}")
    return lines, bool(found)


def main(pip_audit: str, site_packages: str) -> int:
    command = [pip_audit, "--format", "json", "--progress-spinner", "off", "--path", site_packages]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        print(f"NOT AUDITED: pip-audit gave no report.\n{done.stderr[-1000:]}")
        return 0
    lines, is_vulnerable = judge(report)
    print("\n".join(lines))
    return 1 if is_vulnerable else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
