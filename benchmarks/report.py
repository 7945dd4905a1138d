"""Write README's tables and the plots from `benchmarks/results/*.json`.

    python benchmarks/report.py            # rewrite what lies between the markers of README.md
    python benchmarks/report.py --check    # exit 1 if README.md is not what the results say

A table stands between `<!-- benchmark:begin NAME -->` and `<!-- benchmark:end NAME -->`; README
chooses which of those in `report_tables.py` it shows. A device without results says that it was not
measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

from benchmarks import report_plots  # noqa: E402
from benchmarks.report_data import ReportError, Result, load  # noqa: E402
from benchmarks.report_tables import tables  # noqa: E402

_MARKED = re.compile(
    r"(<!-- benchmark:begin (\w+) -->\n)(.*?)(<!-- benchmark:end (\w+) -->)", re.DOTALL
)


def render(readme: str, results: list[Result]) -> str:
    """README with its tables replaced."""
    made = tables(results)

    def replace(match: re.Match[str]) -> str:
        begin, name, _, end, end_name = match.groups()
        if name != end_name or name not in made:
            raise ReportError(
                f"README's marker {name!r} (closed by {end_name!r}) is none of {', '.join(made)}"
            )
        return f"{begin}\n{made[name]()}\n\n{end}"

    text = _MARKED.sub(replace, readme)
    if readme.count("<!-- benchmark:begin") != len(_MARKED.findall(readme)):
        raise ReportError("README has a benchmark marker without its partner")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README is out of date"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files"
    )
    options = parser.parse_args(argv)
    try:
        results = load(options.results)
        before = options.readme.read_text()
        after = render(before, results)
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if options.check:
        if before != after:
            print(
                f"report: {options.readme.name} is out of date; run: python benchmarks/report.py",
                file=sys.stderr,
            )
        return int(before != after)
    if before != after:
        options.readme.write_text(after)
    try:
        for path in report_plots.draw(results, options.results):
            print(f"report: drew {path.name}")
    except ImportError as error:
        print(f"report: no plots ({error}); pip install matplotlib", file=sys.stderr)
    state = "rewritten" if before != after else "up to date"
    print(f"report: {len(results)} results, {options.readme.name} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
