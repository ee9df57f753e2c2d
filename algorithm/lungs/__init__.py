"""The lungs in a chest CT, without training: mask, crop box, left and right."""

from .mask import LungMask, crop_grid, lung_mask

__all__ = ["LungMask", "crop_grid", "lung_mask"]
