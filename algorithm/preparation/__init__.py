"""From two scans to the input of the cascade: values in HU, lungs, linear pre-alignment, network grid."""
