"""How is a part of a Markdown page, between its two markers, renewed from the code?"""

from pathlib import Path


def renew_part(text: str, name: str, content: str) -> str:
    """Replace what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: a marker is missing.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_end:
        raise ValueError(f"the markers of {name} are missing")
    return f"{before}{begin}\n{content}\n{end}{after}"


def renew_file(path: str, name: str, content: str) -> None:
    """Renew a part of a page in place."""
    file = Path(path)
    file.write_text(renew_part(file.read_text(encoding="utf-8"), name, content), encoding="utf-8")
