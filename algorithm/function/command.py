"""The command ``lungreg function``. Large libraries are imported only when it is called."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from .settings import HELP, FunctionSettings, Scan

EXAMPLES = """
The scans are found by the paths in results.json. If these have changed, give the scans as options:

lungreg function result

lungreg function result --fixed inspiration.nii.gz --moving expiration.nii.gz --fixed-lobes lobes.nii.gz
"""

Default = FunctionSettings


def _told(name: str) -> Parameter:
    return Parameter(name=f"--{name.replace('_', '-')}", help=HELP[name], negative=())


def function(
    result: Annotated[Path, Parameter(help="the folder with the results of a registration")],
    /,
    *,
    fixed: Annotated[Path | None, Parameter(help="the fixed scan that was registered")] = None,
    moving: Annotated[Path | None, Parameter(help="the moving scan that was registered")] = None,
    fixed_mask: Annotated[
        Path | None, Parameter(help="lung mask of the fixed scan, instead of the lungs of the result")
    ] = None,
    moving_mask: Annotated[
        Path | None, Parameter(help="lung mask of the moving scan, instead of the lungs of the result")
    ] = None,
    fixed_lobes: Annotated[Path | None, Parameter(help="lobes of the fixed scan, from another program")] = None,
    moving_lobes: Annotated[Path | None, Parameter(help="lobes of the moving scan, from another program")] = None,
    inspiration: Annotated[Scan | None, _told("inspiration")] = None,
    prm_inspiration_hu: Annotated[float, _told("prm_inspiration_hu")] = Default.prm_inspiration_hu,
    prm_expiration_hu: Annotated[float, _told("prm_expiration_hu")] = Default.prm_expiration_hu,
    floor_hu: Annotated[float, _told("floor_hu")] = Default.floor_hu,
    ceiling_hu: Annotated[float, _told("ceiling_hu")] = Default.ceiling_hu,
    filter_voxels: Annotated[int, _told("filter_voxels")] = Default.filter_voxels,
    tissue_hu: Annotated[float, _told("tissue_hu")] = Default.tissue_hu,
    most_error_mm: Annotated[float, _told("most_error_mm")] = Default.most_error_mm,
    mass_correction: Annotated[Literal["on", "off"], _told("mass_correction")] = Default.mass_correction,
) -> None:
    """Measure lung function from inspiration and expiration: volumes, ventilation, PRM, densities, strains."""
    given = locals()
    from .deliver import Given
    from .deliver import function as measure

    sources = Given(**{entry.name: given[entry.name] for entry in fields(Given)})
    settings = FunctionSettings(**{entry.name: given[entry.name] for entry in fields(FunctionSettings)})
    print(measure(result, sources, settings))
