"""The results of a registration on the disk: where files lie, which of them this program wrote, reading them, and
mapping points and images with them."""
