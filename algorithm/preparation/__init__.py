"""From two scans to what the cascade sees: values in HU, lungs, linear pre-alignment, network grid."""
