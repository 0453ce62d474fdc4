"""Writes docs/settings.md from the declaration in prefork/config.py: `python docs/settings.py`.

tests/test_config.py fails when the page is stale.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from prefork.config import SETTINGS, Setting

PAGE = Path(__file__).with_suffix(".md")

OPENING = """\
# Settings

<!-- Written by `python docs/settings.py` from prefork/config.py: change it there. -->

Every setting is a flag of `prefork serve`, a keyword of `prefork.serve()`, a key of the configuration file and an environment
variable, under one name: `--limit-body 10m`, `limit_body="10m"`, `limit-body = "10m"` (or `limit_body`) and
`PREFORK_LIMIT_BODY=10m` are the same. Where several say something, the first in this order wins: flag or keyword, environment,
file, default.

The configuration file is `prefork.toml` in the current directory, otherwise the table `[tool.prefork]` of `pyproject.toml`;
`--config` names another. In a variable, commas separate the values of a setting that may be repeated, and an empty variable counts
as unset. A switch is `--preload` or `--no-preload`, and `yes` or `no` elsewhere. `-b` is short for `--bind`, `-w` for `--workers`.

```toml
# prefork.toml: settings stand at the top, without a table (in pyproject.toml they stand in [tool.prefork])
app = "mysite.wsgi"
bind = ["127.0.0.1:8000", "unix:/run/app.sock"]
workers = 4
preload = true
limit-body = "10m"
```
"""


def page() -> str:
    parts = [OPENING]
    for group, settings in groupby(SETTINGS.values(), key=lambda setting: setting.group):
        parts.append(f"## {group}\n")
        parts.extend(entry(setting) for setting in settings)
    return "\n".join(parts)


def entry(setting: Setting) -> str:
    spelling = " ".join(filter(None, (setting.flag, setting.kind.metavar if setting.name != "app" else "")))
    return (
        f"**`{spelling}`** · `{setting.name}` · `{setting.variable}` · default: {setting.shown_default}  \n"
        f"{setting.help} Allowed: {setting.kind.allowed}.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
