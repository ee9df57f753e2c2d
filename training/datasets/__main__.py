"""Convert public data sets from their own formats to folders with pairs for `training.data` and `benchmarks`.

    python -m training.datasets dirlab4dct SOURCE OUT               DIR-Lab 4DCT: .img and .txt of case 1 to 10
    python -m training.datasets copdgene SOURCE OUT                 DIR-Lab COPDgene: .img and .txt of copd1 to copd10
    python -m training.datasets learn2reg SOURCE OUT [--keypoints]  imagesTr (or scans) and their masks
    python -m training.datasets empire10 SOURCE OUT                 scans and lungMasks
    python -m training.datasets pairs --table TABLE.csv SOURCE OUT  any other: subject,fixed,moving[,*_mask]

OUT/<pair> gets fixed.mha and moving.mha (HU, int16, LPS mm). If SOURCE has them, it also gets fixed_landmarks.csv and
moving_landmarks.csv (header x,y,z; LPS mm; the same row is the same point), fixed_lung_mask.mha and
moving_lung_mask.mha. A pair that is already in OUT does not change. A pair that fails leaves no files. For more, see
docs/datasets.md.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from algorithm.errors import InputError, exit_code
from training.datasets.dirlab import COPDGENE, FOUR_D_CT, dirlab_pairs
from training.datasets.named import empire10_pairs, learn2reg_pairs, table_pairs
from training.datasets.pair_files import PairFiles, write_pair

log = logging.getLogger("training.datasets")

Finder = Callable[[argparse.Namespace], list[PairFiles]]
FINDERS: dict[str, tuple[str, Finder, int]] = {
    "dirlab4dct": ("DIR-Lab 4DCT", lambda o: dirlab_pairs(o.source, FOUR_D_CT), -1024),
    "copdgene": ("DIR-Lab COPDgene", lambda o: dirlab_pairs(o.source, COPDGENE), -1024),
    "learn2reg": ("Learn2Reg LungCT", lambda o: learn2reg_pairs(o.source, o.keypoints), 0),
    "empire10": ("EMPIRE10", lambda o: empire10_pairs(o.source), 0),
    "pairs": ("pairs of files that a table names", lambda o: table_pairs(o.source, o.table), 0),
}
"""For each set: its title, its pairs, and the offset that turns its values into HU."""


def run(options: argparse.Namespace) -> None:
    """Convert every pair that is not in OUT yet."""
    title, find, _ = FINDERS[options.set]
    pairs = find(options)
    if not pairs:
        raise InputError(f"{options.source}: holds no pair, expected {title}, unpacked (see docs/datasets.md)")
    options.out.mkdir(parents=True, exist_ok=True)
    for pair in (pair.swapped() for pair in pairs) if options.swap else pairs:
        if (options.out / pair.name).exists():
            log.info("%s: is there", pair.name)
        else:
            write_pair(options.out, pair, options.hu_offset)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 2 after bad input, with one sentence on stderr."""
    return exit_code(lambda: run(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.datasets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = parser.add_subparsers(dest="set", required=True)
    for name, (title, _, hu_offset) in FINDERS.items():
        one = sets.add_parser(name, help=title)
        one.add_argument("source", type=Path, metavar="SOURCE")
        one.add_argument("out", type=Path, metavar="OUT")
        one.add_argument("--swap", action="store_true", help="exchange fixed and moving")
        text = f"added to every value to give HU (default: {hu_offset})"
        one.add_argument("--hu-offset", type=int, default=hu_offset, help=text)
        if name == "learn2reg":
            one.add_argument("--keypoints", action="store_true", help="take the automatic keypoints for landmarks")
        if name == "pairs":
            text = "CSV with the columns subject, fixed, moving and perhaps fixed_mask, moving_mask"
            one.add_argument("--table", type=Path, required=True, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
