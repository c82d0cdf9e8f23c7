"""The version and the date of a release are the same everywhere."""

import re
import tomllib

from tests.project import pages


def test_version_and_date_agree():
    version = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog, citation = ((pages.ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff"))
    newest, date = re.findall(r"^## \[(\d[^\]]*)\] - (\S+)$", changelog, re.M)[0]
    assert newest == version == re.findall(r"^version: (\S+)$", citation, re.M)[0]
    assert date == re.findall(r"^date-released: (\S+)$", citation, re.M)[0]
    assert f"[{version}]: https://github.com/xentjax/xentjax/releases/tag/v{version}" in changelog
