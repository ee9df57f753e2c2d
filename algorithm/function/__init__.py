"""Lung function from a pair of inspiration and expiration and the map between them: ``lungreg function``.

settings       thresholds and other settings
regions        both lungs, each lung, each lobe
deformation    volume change, principal strains and their indices, from the map
ventilation    specific volume change and the specific air volume changes of Ding et al. 2012
prm            parametric response map of Galbán et al. 2012
density        low-attenuation areas, percentile, mean density and mass of one scan
median         the filter before the parametric response map
voxels         the data of every voxel of the fixed lungs; which scan is the inspiration
quantities     every column of the table, with its definition
table          from voxels to the table
report         the section of report.html
deliver        the files; the command

The measures are functions of arrays, each with its formula, units and source. Only `voxels` depends on which
scan is the fixed one; all other modules know an inspiration and an expiration.
"""
